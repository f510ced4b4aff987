"""The two modes of sending the same rows: buffered in memory first, or streamed as they are generated.

Run as a program, `python modes.py SOCKET`, it serves one mode after the other on a unix socket, so that their cost can
be measured apart from everything else. For each line on its standard input, the name of a mode, it ends the process
that it forked before, and forks another, whose response to `GET /ROWS` has that many rows. The forked process prints a
line `ready` once it serves, and after each response a line of JSON with the resources used. It is forked because the
imports of a new interpreter take a third of a second of processor time.

If a forked process dies, the program exits with the same status. All its processes end, and delete the socket and the
folder around it, as soon as its standard input ends: its parent holds the other end, so they never outlive the parent,
even a killed one.
"""

import asyncio
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from aiohttp import web

Mode = Literal["buffered", "streamed"]

Write = Callable[[bytes | bytearray | memoryview], Awaitable[None]]
"""A function that sends bytes, and returns when the connection can take more."""

ROW_BYTES = 160
"""Maximum length of a row including its separator, in bytes."""

CHUNK_ROWS = 100
"""Number of rows generated at once: a millisecond of work, about 13 kB."""

WRITE_BYTES = 256 * 1024
"""Bytes of a buffered body that are written at once."""

FIRST_NAMES = ("Ada", "Barbara", "Charles", "Dennis", "Edsger", "Frances", "Grace", "Hedy", "Ida", "John", "Katherine")
LAST_NAMES = (
    "Allen",
    "Hamilton",
    "Hopper",
    "Johnson",
    "Kernighan",
    "Lamarr",
    "Liskov",
    "Lovelace",
    "Ritchie",
    "Turing",
)


def row(number: int) -> dict[str, Any]:
    """Return row `number`; the same number gives the same row."""
    first, last = FIRST_NAMES[number % len(FIRST_NAMES)], LAST_NAMES[number % len(LAST_NAMES)]
    return {
        "id": number,
        "name": f"{first} {last}",
        "email": f"{first}.{last}.{number}@example.org".lower(),
        "amount": number * 7919 % 10_000_000 / 100,
        "created": f"2026-{1 + number // 28 % 12:02}-{1 + number % 28:02}T{number % 24:02}:{number % 60:02}:00Z",
    }


def chunks(rows: int) -> Iterator[bytes]:
    """Yield the chunks of one JSON document: an array of `rows` rows, one a line."""
    encode = json.JSONEncoder(separators=(",", ":")).encode
    before = "[\n"
    for begin in range(0, rows, CHUNK_ROWS):
        numbers = range(begin, min(begin + CHUNK_ROWS, rows))
        yield (before + ",\n".join(encode(row(number)) for number in numbers)).encode()
        before = ",\n"
    yield b"\n]\n" if rows else b"[\n]\n"


def collected_bytes(rows: int) -> int:
    """Return the maximum memory of `collect`, in bytes: a growing array allocates an eighth more than it needs."""
    return rows * ROW_BYTES * 9 // 8


async def collect(rows: int) -> bytearray:
    """Return the whole document, and let other requests run after every chunk.

    This buffers with the least memory: the encoded text, once. Rows that are collected as objects and encoded at the
    end take six times as much.
    """
    body = bytearray()
    for chunk in chunks(rows):
        body += chunk
        await asyncio.sleep(0)
    return body


async def send_collected(body: bytearray, write: Write) -> None:
    """Send a buffered body at the pace of the client."""
    with memoryview(body) as view:
        for offset in range(0, len(body), WRITE_BYTES):
            await write(view[offset : offset + WRITE_BYTES])


async def send_streamed(body: Iterable[bytes], write: Write) -> None:
    """Send each chunk before the next is generated; wait for the client, and let other requests run in between."""
    for chunk in body:
        await write(chunk)
        await asyncio.sleep(0)


# -- each mode in its own process


class Usage(NamedTuple):
    """The resources that a response used in its process."""

    idle_rss: int
    """Memory in use before it, in bytes."""
    peak_rss: int
    """Maximum memory in use since then, in bytes."""
    cpu_seconds: float
    """CPU time since then, in seconds."""


def _memory() -> dict[str, int]:
    """Return the memory of this process by the kernel's names, in bytes. Source: proc_pid_status(5)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


class _Meter:
    """Measures the resources of this process from now on; created between requests, as that takes milliseconds."""

    def __init__(self) -> None:
        gc.collect()
        # The peak of the imports is not the response's: reset it (proc_pid_clear_refs(5)). Where that is not allowed,
        # both modes are reported with the same surplus.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._idle_rss = _memory()["VmRSS"]
        self._cpu = time.process_time()

    def read(self) -> Usage:
        """Return the resources used since then."""
        cpu = time.process_time() - self._cpu
        return Usage(self._idle_rss, max(self._idle_rss, _memory()["VmHWM"]), cpu)


def _handler(mode: Mode) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    meter = _Meter()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal meter
        rows, response = int(request.path.strip("/")), web.StreamResponse()
        response.content_type = "application/json"
        body = bytearray()
        if mode == "buffered":
            body = await collect(rows)
            response.content_length = len(body)
            await response.prepare(request)
            await send_collected(body, response.write)
        else:
            await response.prepare(request)
            await send_streamed(chunks(rows), response.write)
        await response.write_eof()
        usage, body = meter.read(), bytearray()
        meter = _Meter()
        print(json.dumps(usage._asdict()), flush=True)
        return response

    return handle


async def serve(mode: Mode, path: str) -> None:
    """Serve one mode until the process is ended."""
    runner = web.ServerRunner(web.Server(_handler(mode)))
    await runner.setup()
    await web.UnixSite(runner, path).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def _delete(path: Path) -> None:
    """Delete the socket, and the folder around it."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def _exit_with_parent(parent: socket.socket, path: str) -> None:
    """Wait for the end of the parent, then delete the socket and exit at once."""
    parent.recv(1)
    _delete(Path(path))
    os._exit(0)


def _fork(mode: Mode, path: str) -> tuple[int, socket.socket]:
    """Fork a process that serves one mode; return its pid, and a socket that ends with it."""
    own, other = socket.socketpair()
    if pid := os.fork():
        other.close()
        return pid, own
    own.close()
    threading.Thread(target=_exit_with_parent, args=(other, path), daemon=True).start()
    asyncio.run(serve(mode, path))
    raise AssertionError("it serves until it is killed")


def _exit_like(status: int) -> NoReturn:
    """Exit with the status of a process that has ended."""
    if (code := os.waitstatus_to_exitcode(status)) < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code or 1)


def main(path: str) -> None:
    """Serve the modes that standard input names, each in its own process, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    gc.freeze()  # what was imported remains shared by the forked processes
    while line := os.read(0, 100):
        pid, child = _fork("buffered" if line == b"buffered\n" else "streamed", path)
        with child:
            if child.fileno() in select.select([0, child.fileno()], [], [])[0]:
                _exit_like(os.waitpid(pid, 0)[1])
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    _delete(Path(path))


if __name__ == "__main__":
    main(sys.argv[1])
