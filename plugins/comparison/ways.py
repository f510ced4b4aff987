"""The same rows sent in two ways: collected in memory first, or as they are made.

Run as a program, `python ways.py WAY SOCKET`, it serves one of the ways on a unix socket, so that what it costs can be
told from all else: `GET /ROWS` answers with so many rows. It prints a line `ready` once it serves, and after each
answer a line of JSON that says what the answer took. It is gone, and its socket with the folder around it, as soon as
its standard input ends: whoever started it holds the other end, so it never outlives them, not even when they are
killed.
"""

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aiohttp import web

Way = Literal["buffered", "streamed"]

Write = Callable[[bytes | bytearray | memoryview], Awaitable[None]]
"""Sends bytes; returns when the connection can take more."""

ROW_BYTES = 160
"""No row is longer, with what divides it from the next."""

PIECE_ROWS = 100
"""Rows made at once: a millisecond of work, some 13 KB."""

WRITE_BYTES = 256 * 1024
"""Bytes of a body in memory that are handed over at once."""

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
    """Make a row; the same number gives the same row."""
    first, last = FIRST_NAMES[number % len(FIRST_NAMES)], LAST_NAMES[number % len(LAST_NAMES)]
    return {
        "id": number,
        "name": f"{first} {last}",
        "email": f"{first}.{last}.{number}@example.org".lower(),
        "amount": number * 7919 % 10_000_000 / 100,
        "created": f"2026-{1 + number // 28 % 12:02}-{1 + number % 28:02}T{number % 24:02}:{number % 60:02}:00Z",
    }


def pieces(rows: int) -> Iterator[bytes]:
    """Make one JSON document, an array of so many rows with one a line, piece by piece."""
    encode = json.JSONEncoder(separators=(",", ":")).encode
    before = "[\n"
    for begin in range(0, rows, PIECE_ROWS):
        numbers = range(begin, min(begin + PIECE_ROWS, rows))
        yield (before + ",\n".join(encode(row(number)) for number in numbers)).encode()
        before = ",\n"
    yield b"\n]\n" if rows else b"[\n]\n"


def collected_bytes(rows: int) -> int:
    """The most memory that `collect` takes: an array that grows has an eighth more than it needs."""
    return rows * ROW_BYTES * 9 // 8


async def collect(rows: int) -> bytearray:
    """Make the whole document in memory, giving others their turn after every piece.

    This is the thriftiest way to buffer: the finished text, once. Rows kept as objects until the last is there, and
    encoded then, take six times as much.
    """
    body = bytearray()
    for piece in pieces(rows):
        body += piece
        await asyncio.sleep(0)
    return body


async def send_collected(body: bytearray, write: Write) -> None:
    """Send what was collected, as the client takes it."""
    with memoryview(body) as view:
        for offset in range(0, len(body), WRITE_BYTES):
            await write(view[offset : offset + WRITE_BYTES])


async def send_as_made(made: Iterable[bytes], write: Write) -> None:
    """Send each piece before the next is made, which waits for the client, and for the others' turn."""
    for piece in made:
        await write(piece)
        await asyncio.sleep(0)


# -- one way, as a process of its own


class Usage(NamedTuple):
    """What an answer took of the process that gave it."""

    idle_rss: int
    """Bytes of memory in use before it."""
    peak_rss: int
    """Bytes of memory in use at most, since then."""
    cpu_seconds: float


def _memory() -> dict[str, int]:
    """Memory of this process by the kernel's names for it, in bytes. Source: proc_pid_status(5)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


class _Meter:
    """What this process takes from now on; made while nothing is asked for, since that takes milliseconds itself."""

    def __init__(self) -> None:
        gc.collect()
        # What imports took at most is not the answer's: the peak begins anew (proc_pid_clear_refs(5)). Where that is
        # not allowed, both ways are told the same surplus.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._idle_rss = _memory()["VmRSS"]
        self._cpu = time.process_time()

    def read(self) -> Usage:
        """Say what it has taken by now."""
        cpu = time.process_time() - self._cpu
        return Usage(self._idle_rss, max(self._idle_rss, _memory()["VmHWM"]), cpu)


def _answering(way: Way) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    meter = _Meter()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal meter
        rows, response = int(request.path.strip("/")), web.StreamResponse()
        response.content_type = "application/json"
        body = bytearray()
        if way == "buffered":
            body = await collect(rows)
            response.content_length = len(body)
            await response.prepare(request)
            await send_collected(body, response.write)
        else:
            await response.prepare(request)
            await send_as_made(pieces(rows), response.write)
        await response.write_eof()
        taken, body = meter.read(), bytearray()
        meter = _Meter()
        print(json.dumps(taken._asdict()), flush=True)
        return response

    return answer


async def serve(way: Way, socket: str) -> None:
    """Serve one way until the process is ended."""
    runner = web.ServerRunner(web.Server(_answering(way)))
    await runner.setup()
    await web.UnixSite(runner, socket).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


def _leave_with_parent(socket: Path) -> None:
    """Wait for the end of standard input, then be gone at once, and leave nothing behind."""
    while os.read(0, 4096):
        pass
    with suppress(OSError):
        socket.unlink(missing_ok=True)
        socket.parent.rmdir()
    os._exit(0)


def main(way: str, socket: str) -> None:
    """Serve until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    threading.Thread(target=_leave_with_parent, args=(Path(socket),), daemon=True).start()
    asyncio.run(serve("buffered" if way == "buffered" else "streamed", socket))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
