"""The history of a log as text: the selected lines of its files, rotated ones first."""

import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from streamlab import Event, Threads

from .chunks import CHUNK
from .disk import history
from .filters import LineFilter
from .lines import Reader

EVENTS = 500
"""Number of events of a command's log that are filtered together."""

BLOCK = 64 * 1024
"""Approximate size of a block of output, in bytes."""

SCAN = 4 * 1024 * 1024
"""Maximum number of bytes that one download scans in a thread before others have their turn."""

SCAN_SECONDS = 0.05
"""Maximum time that one download scans in a thread before others have their turn, in seconds (and one line)."""


async def matching_lines(
    threads: Threads, pattern: Path, lines: LineFilter | None, since: float | None
) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of the selected lines in the files as of now. A rotation meanwhile loses none of them."""
    files = await threads.run(_open, pattern, discard=_close)
    try:
        for file, size in files:
            blocks = _selected(file, size, lines, since)
            while (block := await threads.run(next, blocks, None)) is not None:
                if block:
                    yield block
    finally:
        await threads.finish(_close, files)


async def matching_events(
    threads: Threads, events: AsyncIterator[Event], is_selected: Callable[[Event], bool]
) -> AsyncGenerator[bytes, None]:
    """Yield the lines of the selected events. `is_selected` is called in a thread, with each event in order."""
    batch: list[Event] = []
    async for event in events:
        batch.append(event)
        if len(batch) == EVENTS:
            async for block in _blocks(threads, batch, is_selected):
                yield block
            batch.clear()
    async for block in _blocks(threads, batch, is_selected):
        yield block


async def _blocks(
    threads: Threads, events: Sequence[Event], is_selected: Callable[[Event], bool]
) -> AsyncIterator[bytes]:
    start = 0
    while start < len(events):
        block, start = await threads.run(_scan, events, start, is_selected)
        if block:
            yield block


def _scan(events: Sequence[Event], start: int, is_selected: Callable[[Event], bool]) -> tuple[bytes, int]:
    """Return the selected lines from an index on, and the next index: after SCAN_SECONDS, but at least one event."""
    block, due = bytearray(), time.monotonic() + SCAN_SECONDS
    for number in range(start, len(events)):
        if is_selected(events[number]):
            block += (json.loads(events[number].data)["line"] + "\n").encode()
        if time.monotonic() >= due:
            return bytes(block), number + 1
    return bytes(block), len(events)


def _open(pattern: Path) -> list[tuple[BinaryIO, int]]:
    """Open all files at once, each with its current size."""
    files: list[tuple[BinaryIO, int]] = []
    for path in history(pattern):
        with suppress(OSError):
            file = path.open("rb")
            files.append((file, os.fstat(file.fileno()).st_size))
    return files


def _close(files: list[tuple[BinaryIO, int]]) -> None:
    for file, _ in files:
        file.close()


def _selected(file: BinaryIO, size: int, lines: LineFilter | None, since: float | None) -> Iterator[bytes]:
    """Yield the selected lines in blocks; an empty block after a long scan without one."""
    reader, block, scanned, is_continued, is_selected = Reader(), bytearray(), 0, False, False
    due = time.monotonic() + SCAN_SECONDS
    while size > 0 and (raw := file.readline(min(CHUNK, size))):
        size -= len(raw)
        scanned += len(raw)
        if not is_continued:  # all chunks of a very long line are selected by the first
            text = raw.decode(errors="replace").rstrip("\r\n")
            level, when = reader.read(text)
            is_recent = since is None or (when is not None and when >= since)
            is_selected = is_recent and (lines is None or lines.accepts(level, lambda text=text: text))
        is_continued = not raw.endswith(b"\n")
        if is_selected:
            block += raw
        if len(block) >= BLOCK or scanned >= SCAN or time.monotonic() >= due:
            yield bytes(block)
            block.clear()
            scanned, due = 0, time.monotonic() + SCAN_SECONDS
    if is_selected and is_continued:
        block += b"\n"
    yield bytes(block)
