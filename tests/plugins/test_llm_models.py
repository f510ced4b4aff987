"""Several models behind one gateway: which one serves a request, its own limits, and its fallbacks."""

import http.client
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support.fake_upstream import (
    DONE,
    FINISH,
    USAGE,
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


def continue_text(exchange: Exchange) -> None:
    """Respond as POST /v1/completions does."""
    name, usage = exchange.body["model"], {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    if exchange.body.get("stream"):
        parts = ({"index": 0, "text": text, "finish_reason": None} for text in (name, "!"))
        exchange.respond(*(event(choices=[part]) for part in parts), event(choices=[], usage=usage), DONE)
    else:
        body = {"choices": [{"index": 0, "text": name}], "usage": usage}
        exchange.respond_with(200, json.dumps(body).encode(), b"Content-Type: application/json")


EMBEDDING = (
    b'{"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 1e-3]}], "model": "x",'
    b' "usage": {"prompt_tokens": 7000, "total_tokens": 7000}}'
)


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
    "continue": continue_text,
    "continue elsewhere": lambda exchange: (
        exchange.respond_with(500) if exchange.body["model"] == "large-1" else continue_text(exchange)
    ),
    "embed": lambda exchange: exchange.respond_with(200, EMBEDDING, b"Content-Type: application/json"),
    "no route": lambda exchange: exchange.respond_with(404, b'{"error": {"message": "no such route"}}'),
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
    status, _, body = complete(server, "to none")
    assert (status, json.loads(body)["error"]["param"]) == (400, "model")
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


def post(server: Running, path: str, **fields: Any) -> tuple[int, Any, bytes]:
    return server.get(path, JSON, method="POST", body=json.dumps(fields).encode())


def tokens_of(server: Running, kind: str) -> float:
    (count,) = re.findall(rf'streamlab_llm_tokens_total{{kind="{kind}"}} (\S+)', server.get("/metrics")[2].decode())
    return float(count)


def test_completions_and_embeddings_are_passed_through_and_metered(server: Running, upstream: FakeUpstream) -> None:
    complete(server, "so that both counters exist", model="alone")
    prompts, completions = tokens_of(server, "prompt"), tokens_of(server, "completion")
    fields = {"prompt": "continue", "logprobs": 2, "echo": True, "max_tokens": 5, "stop": ["x"]}
    status, _, body = post(server, "/v1/completions", model="alone", **fields)
    assert (status, json.loads(body)["choices"][0]["text"]) == (200, "alone")
    exchange = upstream.exchanges[-1]
    assert exchange.head.startswith("POST /v1/completions ")
    assert exchange.body == {**fields, "model": "alone"}

    status, headers, body = post(server, "/v1/completions", model="large", prompt="continue", stream=True)
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    texts = [json.loads(line[6:])["choices"] for line in body.split(b"\n") if line.startswith(b"data: {")]
    assert [choice["text"] for choices in texts for choice in choices] == ["large-1", "!"]
    assert body.endswith(DONE)
    assert upstream.exchanges[-1].body["max_tokens"] == 50

    status, headers, body = post(server, "/v1/embeddings", model="small", input="embed", dimensions=2)
    assert (status, body) == (200, EMBEDDING)
    exchange = upstream.exchanges[-1]
    assert exchange.head.startswith("POST /v1/embeddings ")
    assert exchange.body == {"model": "small", "input": "embed", "dimensions": 2}
    assert tokens_of(server, "prompt") - prompts == 9000
    assert tokens_of(server, "completion") - completions == 200

    for stream in (True, False):  # the fallback has limits of its own
        status, _, body = post(
            server, "/v1/completions", model="large", prompt="continue elsewhere", stream=stream, max_tokens=50
        )
        assert status == 200
        assert b'"small"' in body
        assert upstream.exchanges[-1].body["max_tokens"] == 9


def test_bad_completions_and_embeddings_are_rejected_by_name(server: Running) -> None:
    invalid: list[tuple[str, dict[str, Any], str]] = [
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ["a", 1]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", {"prompt": ["x"] * 5}, "prompt"),
        ("completions", {"prompt": "x", "n": 5}, "n"),
        ("completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("completions", {"prompt": "x", "max_tokens": 51}, "max_tokens"),
        ("completions", {"prompt": "x", "logprobs": 6}, "logprobs"),
        ("completions", {"prompt": "x" * 5000}, "prompt"),
        ("embeddings", {}, "input"),
        ("embeddings", {"input": "x", "encoding_format": "text"}, "encoding_format"),
        ("embeddings", {"input": "x", "dimensions": 0}, "dimensions"),
        ("embeddings", {"input": "x" * 5000}, "input"),
    ]
    for route, fields, param in invalid:
        status, _, body = post(server, f"/v1/{route}", **{"model": "large", **fields})
        assert (status, json.loads(body)["error"]["param"]) == (400, param), (route, fields)
    for route in ("completions", "embeddings"):
        assert post(server, f"/v1/{route}", model="huge", prompt="x", input="x")[0] == 404


def test_an_upstream_without_the_route_is_404_and_no_trouble(server: Running) -> None:
    complete(server, "so that nothing else is a trouble", model="alone")
    status, _, body = post(server, "/v1/embeddings", model="alone", input="no route")
    assert (status, json.loads(body)["error"]["message"]) == (404, "no such route")
    assert b"alone:" not in server.get("/health")[2]


def test_tools_formats_images_and_choices_reach_an_upstream_unchanged(server: Running, upstream: FakeUpstream) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": [None, 1.5]}}}
    fields = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "what?"}, image]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {"a": []}}},
        "logprobs": True,
        "top_logprobs": 3,
        "n": 2,
        "max_tokens": 7,
    }
    assert post(server, "/v1/chat/completions", model="alone", **fields)[0] == 200
    assert upstream.exchanges[-1].body == {**fields, "model": "alone"}


def be_capable(exchange: Exchange) -> None:
    """Respond as a model with tools does, completely."""
    base = {"id": "chatcmpl-1", "created": 1, "model": exchange.body["model"]}
    if exchange.body.get("stream"):
        deltas = [({"role": "assistant", "content": ""}, None), ({"content": "ok"}, None), ({}, "stop")]
        choices = [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None} for delta, reason in deltas]
        used = [event(**base, choices=[], usage=USAGE)] if exchange.body.get("stream_options") else []
        exchange.respond(*(event(**base, choices=[choice]) for choice in choices), *used, DONE)
        return
    message: dict[str, Any] = {"role": "assistant", "content": "ok", "refusal": None, "annotations": []}
    if tools := exchange.body.get("tools"):
        call = {"name": tools[0]["function"]["name"], "arguments": "{}"}
        message |= {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": call}]}
    reason = "tool_calls" if tools else "stop"
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    document = {**base, "object": "chat.completion", "choices": [choice], "usage": USAGE}
    exchange.respond_with(200, json.dumps(document).encode(), b"Content-Type: application/json")


def test_a_compliance_tester_accepts_every_response(start: Callable[..., Running]) -> None:
    pytest.importorskip("llm_comply", reason="llm-comply is not installed")
    with fake_upstream({"default": be_capable}) as upstream:
        tables = "".join(f'[scenarios.llm.models.{name}]\nurl = "{upstream.url}"\n' for name in ("capable", "other"))
        server = start(f"{OTHERS}[scenarios.llm]\nmax_prompt_tokens = 100000\n{tables}")
        command = [sys.executable, "-m", "llm_comply.cli", "--json", "--format", "openai-chat", "-m", "capable"]
        command += ["-k", "none", "-u", f"{server.url}/v1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    summary = json.loads(done.stdout)["summary"]  # one is skipped: its model must be one of OpenAI
    assert (summary["passed"], summary["failed"], summary["skipped"]) == (8, 0, 1), (
        done.stdout
    )  # one needs OpenAI's own


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
        status, _, body = complete(server, "Hello", model="large", tools=[tool], max_tokens=2)
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] in (1, 2)
        parts = [{"type": "image_url", "image_url": {"url": "data:,"}}]
        body = json.dumps({"model": "large", "messages": [{"role": "user", "content": parts}]}).encode()
        status, _, body = server.get("/v1/chat/completions", JSON, method="POST", body=body)
        assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_failed")

        status, _, body = post(server, "/v1/completions", model="tiny", prompt="Once upon a", max_tokens=2)
        document = json.loads(body)
        assert (status, document["object"], document["model"]) == (200, "text_completion", "SmolLM2-135M-Instruct")
        assert document["usage"]["completion_tokens"] in (1, 2)
        status, _, body = post(server, "/v1/completions", model="tiny", prompt=["x", "word " * 3000])
        error = json.loads(body)["error"]
        assert (status, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
        status, _, body = post(server, "/v1/embeddings", model="tiny", input="x")
        error = json.loads(body)["error"]
        assert (status, error["code"], error["message"]) == (400, "unsupported", "'tiny' has no embeddings.")


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
