"""The past of a log as text: the lines of its files, rotated ones first, that somebody wants."""

import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from streamlab import Event, Threads

from .disk import history
from .filters import LineFilter
from .lines import Reader
from .pieces import PIECE

EVENTS = 500
"""Events of a command's log that are looked at together."""

BLOCK = 64 * 1024
"""Bytes that are handed out at once, about."""

SCAN = 4 * 1024 * 1024
"""Bytes that are read, in a thread, before the reader may leave,"""

SCAN_SECONDS = 0.05
"""or seconds, and one line: a thread is for all downloads."""


async def matching_lines(
    threads: Threads, pattern: Path, lines: LineFilter | None, since: float | None
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of the lines that are wanted, as they stand in the files when this begins; none is lost to a
    rotation meanwhile."""
    files = await threads.run(_open, pattern, discard=_close)
    try:
        for file, size in files:
            found = _wanted(file, size, lines, since)
            while (block := await threads.run(next, found, None)) is not None:
                if block:
                    yield block
    finally:
        await threads.finish(_close, files)


async def matching_events(
    threads: Threads, events: AsyncIterator[Event], wanted: Callable[[Event], bool]
) -> AsyncGenerator[bytes, None]:
    """Yield the lines of the events that are wanted; `wanted` is called in a thread, with each event in order."""
    batch: list[Event] = []
    async for event in events:
        batch.append(event)
        if len(batch) == EVENTS:
            async for block in _blocks(threads, batch, wanted):
                yield block
            batch.clear()
    async for block in _blocks(threads, batch, wanted):
        yield block


async def _blocks(threads: Threads, events: Sequence[Event], wanted: Callable[[Event], bool]) -> AsyncIterator[bytes]:
    start = 0
    while start < len(events):
        block, start = await threads.run(_scan, events, start, wanted)
        if block:
            yield block


def _scan(events: Sequence[Event], start: int, wanted: Callable[[Event], bool]) -> tuple[bytes, int]:
    """Return the wanted lines of the events from an index on, and how far it came in SCAN_SECONDS, or one event."""
    block, due = bytearray(), time.monotonic() + SCAN_SECONDS
    for number in range(start, len(events)):
        if wanted(events[number]):
            block += (json.loads(events[number].data)["line"] + "\n").encode()
        if time.monotonic() >= due:
            return bytes(block), number + 1
    return bytes(block), len(events)


def _open(pattern: Path) -> list[tuple[BinaryIO, int]]:
    """Open all files at once, each with its size now."""
    files: list[tuple[BinaryIO, int]] = []
    for path in history(pattern):
        with suppress(OSError):
            file = path.open("rb")
            files.append((file, os.fstat(file.fileno()).st_size))
    return files


def _close(files: list[tuple[BinaryIO, int]]) -> None:
    for file, _ in files:
        file.close()


def _wanted(file: BinaryIO, size: int, lines: LineFilter | None, since: float | None) -> Iterator[bytes]:
    """The wanted lines in blocks; an empty block says that much was read and nothing found."""
    reader, block, scanned, goes_on, wanted = Reader(), bytearray(), 0, False, False
    due = time.monotonic() + SCAN_SECONDS
    while size > 0 and (raw := file.readline(min(PIECE, size))):
        size -= len(raw)
        scanned += len(raw)
        if not goes_on:  # what follows of a very long line goes the way of its beginning
            text = raw.decode(errors="replace").rstrip("\r\n")
            level, when = reader.read(text)
            young = since is None or (when is not None and when >= since)
            wanted = young and (lines is None or lines.takes(level, lambda text=text: text))
        goes_on = not raw.endswith(b"\n")
        if wanted:
            block += raw
        if len(block) >= BLOCK or scanned >= SCAN or time.monotonic() >= due:
            yield bytes(block)
            block.clear()
            scanned, due = 0, time.monotonic() + SCAN_SECONDS
    if wanted and goes_on:
        block += b"\n"
    yield bytes(block)
