"""The past of a log as text: the lines of its files, rotated ones first, that somebody wants."""

import os
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from streamlab import Threads

from .disk import history
from .filters import LineFilter
from .lines import Reader
from .pieces import PIECE

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
