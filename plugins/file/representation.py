"""Bytes of known length that a download sends: a file of the disk, or a generated pattern."""

import asyncio
import mimetypes
import os
import random
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Protocol

from aiofiles.threadpool import wrap

from streamlab import Stream, Threads, shielded

from .conditions import Validators

CHUNK = 1024 * 1024
"""Bytes read at once where they pass through Python."""

PROOF = 64 * 1024
"""The last bytes of a body are held back until the file is known to be still the one that was promised."""


class Paced:
    """The writing end of a stream, at most `rate` bytes a second in even steps; without a rate, as fast as it goes."""

    def __init__(self, stream: Stream, rate: int | None) -> None:
        self.stream = stream
        self.rate = rate
        self._due = 0.0

    async def write(self, data: bytes | memoryview) -> None:
        """Write data, waiting before each tenth of a second's worth until it is due."""
        if self.rate is None:
            await self.stream.write(data)
            return
        loop, view, step = asyncio.get_running_loop(), memoryview(data), max(1, self.rate // 10)
        for offset in range(0, len(view), step):
            piece = view[offset : offset + step]
            if (wait := self._due - loop.time()) > 0:
                await asyncio.sleep(wait)
            await self.stream.write(piece)
            self._due = max(self._due, loop.time() - 0.1) + len(piece) / self.rate


class Representation(Protocol):
    """What a download needs to know of its bytes, and the way to send some of them."""

    @property
    def name(self) -> str:
        """The file name a client should save it under."""

    @property
    def media_type(self) -> str:
        """Its media type."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    @property
    def validators(self) -> Validators:
        """Entity-tag and date of this very state."""

    async def send(self, out: Paced, offset: int, count: int, *, last: bool) -> None:
        """Write `count` bytes from `offset`; `last`: the body ends with them."""

    def reader(self) -> "Reader":
        """Return a reader of all bytes that is independent of this, and to be closed."""


class Reader(Protocol):
    """Bytes as a thread reads them, in any order. Its methods may wait for a disk."""

    def read(self, offset: int) -> bytes | memoryview:
        """Return up to CHUNK bytes from an offset below the size; raises OSError, and EOFError where there are none."""

    def check(self) -> None:
        """Raise EOFError where the bytes may have changed since the representation was opened."""

    def close(self) -> None:
        """Release what it holds."""


@dataclass(frozen=True, slots=True)
class FileRepresentation:
    """An open file, as it was when it was opened."""

    file: BinaryIO
    status: os.stat_result
    name: str
    threads: Threads
    """Where it is read."""

    @property
    def media_type(self) -> str:
        """By the name's ending; what is compressed stays so."""
        guess, encoding = mimetypes.guess_type(self.name)
        if encoding is not None:
            return {"gzip": "application/gzip"}.get(encoding, "application/octet-stream")
        return guess or "application/octet-stream"

    @property
    def size(self) -> int:
        """In bytes."""
        return self.status.st_size

    @property
    def validators(self) -> Validators:
        """Strong: inode, size, and both times of change in nanoseconds.

        The time of modification can be put back (`cp -p`, `touch -r`), that of the status cannot: without it, new
        bytes could be resumed into the old file. The price is a new entity-tag after `chmod` or a new hard link.
        """
        status = self.status
        tag = f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"'
        return Validators(tag, status.st_mtime_ns // 1_000_000_000)

    async def send(self, out: Paced, offset: int, count: int, *, last: bool) -> None:
        """Send by the kernel where it can be, else read ahead in a thread.

        Raises EOFError when the file was cut short, RuntimeError when it was changed in the meantime: the stream
        fails before its last bytes, and no client takes the mixture for the file.
        """
        held_back = min(PROOF, count) if last else 0
        bulk = count - held_back
        if bulk:
            if out.rate is None and out.stream.can_sendfile:
                await out.stream.sendfile(self.file, offset, bulk)
            else:
                await self._read_and_write(out, offset, bulk)
        if held_back:
            await out.write(await self.threads.run(self._read_proven, offset + bulk, held_back))

    async def _read_and_write(self, out: Paced, offset: int, count: int) -> None:
        file = wrap(self.file, executor=self.threads.executor)
        await shielded(file.seek(offset))
        async with asyncio.TaskGroup() as group:
            ahead = group.create_task(shielded(file.read(min(CHUNK, count))))
            while count:
                chunk = await ahead
                if not chunk:
                    raise EOFError(f"{self.name} ended {count} bytes early")
                count -= len(chunk)
                if count:
                    ahead = group.create_task(shielded(file.read(min(CHUNK, count))))
                await out.write(chunk)

    def _read_proven(self, offset: int, count: int) -> bytes:
        self.file.seek(offset)
        data = self.file.read(count)
        now = os.fstat(self.file.fileno())
        if len(data) < count:
            raise EOFError(f"{self.name} ended {count - len(data)} bytes early")
        if _changed(self.status, now):
            raise RuntimeError(f"{self.name} was changed while it was sent")
        return data

    def reader(self) -> "_FileReader":
        """Open the same file once more, so that it can be read for longer than this one is open; raises OSError."""
        return _FileReader(os.dup(self.file.fileno()), self.status)


class _FileReader:
    """A descriptor of a file whose position others move: it is read at given offsets."""

    def __init__(self, descriptor: int, status: os.stat_result) -> None:
        self._descriptor = descriptor
        self._status = status

    def read(self, offset: int) -> bytes:
        """Read up to CHUNK bytes; raises EOFError where there are none, and OSError."""
        if chunk := os.pread(self._descriptor, CHUNK, offset):
            return chunk
        raise EOFError("the file was cut short")

    def check(self) -> None:
        """Raise EOFError where the file is not as it was when it was opened."""
        if _changed(self._status, os.fstat(self._descriptor)):
            raise EOFError("the file was changed")

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


def _changed(before: os.stat_result, now: os.stat_result) -> bool:
    """Return whether the bytes of an open file may differ from what they were.

    A changed time of status counts, as the time of modification can be put back; not where the number of links changed
    with it: a file that is replaced or deleted while it is sent has its old bytes to the end.
    """
    if (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
        return True
    return before.st_ctime_ns != now.st_ctime_ns and before.st_nlink == now.st_nlink


@asynccontextmanager
async def held(file: BinaryIO, name: str, threads: Threads) -> AsyncIterator[FileRepresentation]:
    """Hold an open file while it is sent, then close it in a thread: no other uses it any more."""
    try:
        yield FileRepresentation(file, os.fstat(file.fileno()), name, threads)
    finally:
        await threads.finish(file.close)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file that the operator named; anything else is FileNotFoundError."""
    return regular(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def open_beneath(root: Path, parts: tuple[str, ...]) -> int:
    """Open what `parts` name below `root`, never anything outside, whatever changes meanwhile; return a descriptor.

    Symbolic links are followed as long as they stay inside. Raises ValueError for what leads out, and OSError.
    """
    home = Path(os.path.realpath(root, strict=True))
    beneath = Path(os.path.realpath(home.joinpath(*parts), strict=True)).relative_to(home)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(home, flags | os.O_DIRECTORY)
    for part in beneath.parts:
        folder = descriptor
        try:
            descriptor = os.open(part, flags, dir_fd=folder)
        finally:
            os.close(folder)
    return descriptor


def regular(descriptor: int) -> BinaryIO:
    """Take over a descriptor of a regular file; anything else is closed, and FileNotFoundError."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError("not a regular file")
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return os.fdopen(descriptor, "rb")


# -- generated bytes


@dataclass(frozen=True, slots=True)
class Generated:
    """Bytes that no disk holds: a fixed pattern whose every MiB begins with its number, so that it can be resumed."""

    size: int
    name: str = "large-file.bin"
    media_type: str = "application/octet-stream"

    @property
    def validators(self) -> Validators:
        """The pattern never changes."""
        return Validators(f'"generated-1-{self.size:x}"', 0)

    async def send(self, out: Paced, offset: int, count: int, *, last: bool) -> None:
        """Write a part of the pattern."""
        while count:
            start = offset % CHUNK
            piece = memoryview(block(offset // CHUNK))[start : start + count]
            await out.write(piece)
            offset, count = offset + len(piece), count - len(piece)

    def reader(self) -> "_PatternReader":
        """Return a reader of the whole pattern."""
        return _PatternReader(self.size)


@dataclass(frozen=True, slots=True)
class _PatternReader:
    """Reads the pattern, which needs nothing and never changes."""

    size: int

    def read(self, offset: int) -> memoryview:
        """Make up to CHUNK bytes."""
        return memoryview(block(offset // CHUNK))[offset % CHUNK : offset % CHUNK + self.size - offset]

    def check(self) -> None:
        """Accept it."""

    def close(self) -> None:
        """Release nothing."""


def block(number: int) -> bytes:
    """The MiB `number` of the pattern: 8 bytes of its number, big-endian, then always the same noise."""
    return number.to_bytes(8, "big") + _noise()


@cache
def _noise() -> bytes:
    return random.Random(1).randbytes(CHUNK - 8)  # noqa: S311 - a pattern, not a secret
