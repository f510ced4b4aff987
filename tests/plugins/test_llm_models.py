"""Several models behind one gateway: which one serves a request, its own limits, and its fallbacks."""

import http.client
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.fake_upstream import (
    DONE,
    FINISH,
    USED,
    Exchange,
    FakeUpstream,
    Script,
    event,
    fake_upstream,
)
from tests.support.models import needs_model
from tests.support.servers import Running, plugin_module, starting_in

LOADED_PLUGINS = ("llm",)

OTHERS = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in ("ticker", "logs", "export"))
JSON = {"Content-Type": "application/json"}
ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
TOOL = event(choices=[{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "t"}]}, "finish_reason": None}])


def answer(exchange: Exchange) -> None:
    """Respond completely, with the name of the model that the upstream was sent."""
    name = exchange.body["model"]
    if exchange.body.get("stream"):
        exchange.respond(ROLE, event(name), FINISH, USED, DONE)
    else:
        choice = {"index": 0, "message": {"role": "assistant", "content": name}, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice]}).encode()
        exchange.respond_with(200, body, b"Content-Type: application/json")


def fails(how: Script) -> Script:
    """Return a script that fails for the first model, and responds for every other."""
    return lambda exchange: how(exchange) if exchange.body["model"] == "large-1" else answer(exchange)


def break_off(exchange: Exchange) -> None:
    if exchange.body.get("stream"):
        exchange.begin()
        exchange.send_events(ROLE)
    else:
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


def report_an_error(exchange: Exchange) -> None:
    if exchange.body.get("stream"):
        exchange.respond(ROLE, b'data: {"error": {"message": "out of memory"}}\n\n')
    else:
        exchange.respond_with(500)


def break_off_later(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send_events(ROLE, TOOL)


def be_busy_once(exchange: Exchange) -> None:
    """Respond with 429 to every request but the second."""
    seen[exchange.prompt] += 1
    if seen[exchange.prompt] == 2:
        answer(exchange)
    else:
        exchange.respond_with(429, b"", b"Retry-After: 1")


seen: Counter[str] = Counter()

FAILURES: dict[str, Script] = {
    "500": lambda exchange: exchange.respond_with(500),
    "404": lambda exchange: exchange.respond_with(404),
    "busy": lambda exchange: exchange.respond_with(429, b"", b"Retry-After: 0"),
    "reset": lambda exchange: exchange.reset(),
    "break off": break_off,
    "error": report_an_error,
}

SCRIPTS: dict[str, Script] = {
    "default": answer,
    **{prompt: fails(how) for prompt, how in FAILURES.items()},
    "later": fails(break_off_later),
    "400": fails(lambda exchange: exchange.respond_with(400, b'{"error": {"message": "no"}}')),
    "once": be_busy_once,
    "for long": lambda exchange: exchange.respond_with(429, b"", b"Retry-After: 7"),
}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with fake_upstream(SCRIPTS) as running:
        yield running


@pytest.fixture(scope="module")
def server(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield a server of four models, all at one upstream."""
    with starting_in(tmp_path_factory.mktemp("models"), LOADED_PLUGINS) as starting:
        yield starting(
            f"""{OTHERS}
[scenarios.llm]
max_tokens = 50
[scenarios.llm.models.large]
url = "{upstream.url}"
model = "large-1"
fallback = ["small"]
[scenarios.llm.models.small]
url = "{upstream.url}"
limit_field = "max_completion_tokens"
max_tokens = 9
[scenarios.llm.models.alone]
url = "{upstream.url}"
[scenarios.llm.models.pausing]
url = "{upstream.url}"
model = "large-1"
fallback = ["small"]
"""
        )


def complete(server: Running, prompt: str, **fields: Any) -> tuple[int, Any, bytes]:
    body = json.dumps({"messages": [{"role": "user", "content": prompt}], **fields}).encode()
    return server.get("/v1/chat/completions", JSON, method="POST", body=body)


def text_of(response: bytes) -> str:
    """Return the text of a response, streamed or not."""
    if response.startswith(b"{"):
        return str(json.loads(response)["choices"][0]["message"]["content"])
    events = [json.loads(line[6:]) for line in response.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content", "") for one in events for choice in one["choices"])


def models_called(upstream: FakeUpstream, prompt: str) -> list[str]:
    return [exchange.body["model"] for exchange in upstream.exchanges if exchange.prompt == prompt]


def test_the_model_of_a_request_chooses_the_upstream_and_its_limits(server: Running, upstream: FakeUpstream) -> None:
    listed = json.loads(server.get("/v1/models")[2])
    assert [model["id"] for model in listed["data"]] == ["large", "small", "alone", "pausing"]
    assert json.loads(server.get("/v1/models/small")[2])["id"] == "small"

    sent = {"large": "large-1", "small": "small", "alone": "alone"}
    for name, upstreams_name in sent.items():
        assert text_of(complete(server, f"to {name}", model=name)[2]) == upstreams_name
        assert text_of(complete(server, f"to {name}", model=name, stream=True)[2]) == upstreams_name
    assert text_of(complete(server, "to the default")[2]) == "large-1"
    assert server.get("/ai/chat-stream?prompt=x")[2] == b"large-1"

    limits = {exchange.prompt: exchange.body for exchange in upstream.exchanges}
    assert limits["to large"]["max_tokens"] == limits["to alone"]["max_tokens"] == 50
    assert limits["to small"]["max_completion_tokens"] == 9
    assert "max_tokens" not in limits["to small"]
    assert complete(server, "x", model="large", max_tokens=50)[0] == 200
    status, _, body = complete(server, "x", model="small", max_tokens=50)
    assert (status, json.loads(body)["error"]["message"]) == (400, "max_tokens must be at most 9.")


def test_an_unknown_model_is_404_with_the_names(server: Running) -> None:
    for status, _, body in (complete(server, "x", model="huge"), server.get("/v1/models/huge")):
        error = json.loads(body)["error"]
        assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
        assert error["message"] == "Unknown model; this server has 'large', 'small', 'alone', 'pausing'."


@pytest.mark.parametrize("stream", [True, False])
def test_another_model_takes_over_before_the_first_token(stream: bool, server: Running, upstream: FakeUpstream) -> None:
    for prompt in FAILURES:
        before = len(models_called(upstream, prompt))
        status, _, body = complete(server, prompt, model="large", max_tokens=40, stream=stream)
        assert (status, text_of(body)) == (200, "small"), prompt
        assert b"error" not in body
        assert body.count(b'"assistant"') == 1, "events of the failed response were passed on"
        called = models_called(upstream, prompt)[before:]
        assert called[0] == "large-1"
        assert called[-1] == "small"
        assert upstream.exchanges[-1].body["max_completion_tokens"] == 9
    metrics = server.get("/metrics")[2].decode()
    assert 'streamlab_llm_fallbacks_total{model="large"}' in metrics


def test_no_model_takes_over_after_the_first_token(server: Running, upstream: FakeUpstream) -> None:
    with pytest.raises(http.client.IncompleteRead) as cut:
        complete(server, "later", model="large", stream=True)
    body = cut.value.partial
    assert b'"tool_calls"' in body
    assert json.loads(body.split(b"data: ")[-1])["error"]["code"] == "upstream_closed"
    assert b"[DONE]" not in body
    assert models_called(upstream, "later") == ["large-1"]


def test_no_model_takes_over_a_request_that_is_invalid(server: Running, upstream: FakeUpstream) -> None:
    status, _, body = complete(server, "400", model="large")
    assert (status, json.loads(body)["error"]["message"]) == (400, "no")
    assert models_called(upstream, "400") == ["large-1"]


def test_retries_honour_retry_after(server: Running, upstream: FakeUpstream) -> None:
    began = time.monotonic()
    status, _, body = complete(server, "once", model="alone")
    assert (status, text_of(body)) == (200, "alone")
    assert time.monotonic() - began >= 1
    assert models_called(upstream, "once") == ["alone", "alone"]

    status, headers, _ = complete(server, "for long", model="alone")
    assert (status, headers["retry-after"]) == (429, "7")
    assert models_called(upstream, "for long") == ["alone"]


def test_a_model_that_requests_a_pause_is_not_called_until_its_end(server: Running, upstream: FakeUpstream) -> None:
    upstream.scripts["pause"] = fails(lambda exchange: exchange.respond_with(503, b"", b"Retry-After: 3600"))
    for _ in range(3):
        assert text_of(complete(server, "pause", model="pausing")[2]) == "small"
    assert models_called(upstream, "pause") == ["large-1", "small", "small", "small"]


@needs_model
def test_the_embedded_model_takes_over_from_an_upstream(start: Callable[..., Running]) -> None:
    with fake_upstream({"default": lambda exchange: exchange.respond_with(500)}) as upstream:
        server = start(
            f"""{OTHERS}
[scenarios.llm.models.large]
url = "{upstream.url}"
fallback = ["tiny"]
[scenarios.llm.models.tiny]
"""
        )
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        status, _, body = complete(server, "Hello", tools=[tool], max_tokens=2)
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] in (1, 2)
        parts = [{"type": "image_url", "image_url": {"url": "data:,"}}]
        body = json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()
        status, _, body = server.get("/v1/chat/completions", JSON, method="POST", body=body)
        assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_failed")


URL = "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"models": {"a": {"url": URL, "fallback": ["b"]}}}, "fallback of a: 'b' is not another model of models: none"),
        (
            {"models": {"a": {"url": URL, "fallback": ["a"]}, "c": {"url": URL}}},
            "fallback of a: 'a' is not another model of models: c",
        ),
        ({"models": {"a": {}, "b": {}}}, "models.b: url is missing; only one model, a, can be embedded"),
        ({"models": {"a": {"model": "m"}}}, "models.a: model and api_key_env belong to an upstream; url is missing"),
        ({"url": URL, "model": "a", "models": {"a": {"url": URL}}}, "models.a: the model of url has this name already"),
        ({"models": {"a": {"url": "ftp://x"}}}, "must be an http:// or https:// URL"),
        ({"models": {"a b": {"url": URL}}}, "should match pattern"),
        ({"fallback": ["a"], "models": {"a": {"url": URL}}}, "fallback belongs to the model of url, which is missing"),
    ],
)
def test_models_that_do_not_fit_together_are_rejected_by_name(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as rejected:
        plugin_module("llm", "__init__").Llm.model_validate(config)
    assert reason in str(rejected.value)
