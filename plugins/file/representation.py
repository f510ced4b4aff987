"""Bytes of known length that a download sends: a file on disk, or a generated pattern."""

import asyncio
import errno
import mimetypes
import os
import random
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from aiofiles.threadpool import wrap

from streamlab import Stream, Threads, shielded

from .conditions import Validators

CHUNK = 1024 * 1024
"""Bytes read at once where sendfile is not used."""

SMALL_BYTES = 64 * 1024
"""Maximum size of a file that is read by the thread that opens it, in bytes, so that no other thread is needed."""

HELD_BACK_BYTES = 64 * 1024
"""Bytes at the end of a body that are held back until the file has been checked for changes."""


class Paced:
    """A writer to a stream that sends at most `rate` bytes per second in even steps; None is no limit."""

    def __init__(self, stream: Stream, rate: int | None) -> None:
        self.stream = stream
        self.rate = rate
        self._due = 0.0

    async def write(self, data: bytes | memoryview) -> None:
        """Write data, waiting until each tenth of a second's worth is due."""
        if self.rate is None:
            await self.stream.write(data)
            return
        loop, view, step = asyncio.get_running_loop(), memoryview(data), max(1, self.rate // 10)
        for offset in range(0, len(view), step):
            chunk = view[offset : offset + step]
            if (wait := self._due - loop.time()) > 0:
                await asyncio.sleep(wait)
            await self.stream.write(chunk)
            self._due = max(self._due, loop.time() - 0.1) + len(chunk) / self.rate


class Representation(Protocol):
    """The properties of a download's bytes, and how to send a part of them."""

    @property
    def name(self) -> str:
        """The file name that a client should save it as."""

    @property
    def media_type(self) -> str:
        """Its media type."""

    @property
    def size(self) -> int:
        """Number of bytes."""

    @property
    def validators(self) -> Validators:
        """Entity-tag and date of exactly this state."""

    async def send(self, out: Paced, offset: int, count: int, *, last: bool) -> None:
        """Write `count` bytes from `offset`; `last` if the body ends with them."""

    def reader(self) -> "Reader":
        """Return an independent reader of all bytes, which the caller closes."""


class Reader(Protocol):
    """Bytes as a thread reads them, in any order. Its methods may wait for a disk."""

    def read(self, offset: int) -> bytes | memoryview:
        """Return up to CHUNK bytes from an offset below the size; raises OSError, and EOFError if there are none."""

    def check(self) -> None:
        """Raise EOFError if the bytes may have changed since the representation was opened."""

    def close(self) -> None:
        """Release its resources."""


@lru_cache(maxsize=1000)
def _media_type(name: str) -> str:
    guess, encoding = mimetypes.guess_type(name)
    if encoding is not None:
        return {"gzip": "application/gzip"}.get(encoding, "application/octet-stream")
    return guess or "application/octet-stream"


@dataclass(frozen=True, slots=True)
class _State:
    """The state of a file on disk when it was opened."""

    status: os.stat_result
    name: str

    @property
    def media_type(self) -> str:
        """The media type by the name's extension; a compressed file is not decoded."""
        return _media_type(self.name)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.status.st_size

    @property
    def validators(self) -> Validators:
        """A strong entity-tag of inode, size, and the times of modification and of status change in nanoseconds.

        The time of modification can be set back (`cp -p`, `touch -r`), the time of status change cannot: without it, a
        client could append new bytes to the old file. The price is a new entity-tag after `chmod` or a new hard link.
        """
        status = self.status
        tag = f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"'
        return Validators(tag, status.st_mtime_ns // 1_000_000_000)


@dataclass(frozen=True, slots=True)
class SmallFile(_State):
    """A file that was read completely when it was opened: what happens to it afterwards changes nothing."""

    data: bytes

    async def send(self, out: Paced, offset: int, count: int, *, last: bool) -> None:
        """Send a part of what was read."""
        await out.write(self.data if count == len(self.data) else memoryview(self.data)[offset : offset + count])

    def reader(self) -> "_SmallReader":
        """Return a reader of what was read."""
        return _SmallReader(self.data)


@dataclass(frozen=True, slots=True)
class _SmallReader:
    """A reader of bytes in memory, which holds nothing else and never changes."""

    data: bytes

    def read(self, offset: int) -> bytes:
        """Return all bytes from an offset."""
        return self.data[offset:]

    def check(self) -> None:
        """Do nothing: the bytes never change."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


@dataclass(frozen=True, slots=True)
class FileRepresentation(_State):
    """An open file, as it was when it was opened."""

    file: BinaryIO
    threads: Threads
    """The threads that read it."""

    async def send(self, out: Paced, offset: int, count: int, *, last: bool) -> None:
        """Send with sendfile if possible, else read ahead in a thread.

        Raises EOFError if the file was truncated, RuntimeError if it was changed in the meantime: the stream fails
        before its last bytes, so that no client takes a mixture for the file.
        """
        held_back = min(HELD_BACK_BYTES, count) if last else 0
        bulk = count - held_back
        if bulk:
            if out.rate is None and out.stream.can_sendfile:
                await out.stream.sendfile(self.file, offset, bulk)
            else:
                await self._read_and_write(out, offset, bulk)
        if held_back:
            end: bytes | memoryview | None = _read_cached(self.file.fileno(), offset + bulk, held_back)
            if end is None:
                end = await self.threads.run(self._read_end, offset + bulk, held_back)
            elif self._check().st_nlink:  # or closing it frees its blocks, which takes time: in a thread
                self.file.close()
            await out.write(end)

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

    def _read_end(self, offset: int, count: int) -> bytes:
        """Read the last bytes that are sent, check that the file has not changed, and close it: one use of a thread."""
        with self.file:
            self.file.seek(offset)
            data = self.file.read(count)
            if len(data) < count:
                raise EOFError(f"{self.name} ended {count - len(data)} bytes early")
            self._check()
        return data

    def _check(self) -> os.stat_result:
        """Return the state of the file now; raises RuntimeError if it has changed."""
        if _changed(self.status, now := os.fstat(self.file.fileno())):
            raise RuntimeError(f"{self.name} was changed while it was sent")
        return now

    def reader(self) -> "_FileReader":
        """Duplicate the descriptor, so that the reader can outlive this object; raises OSError."""
        return _FileReader(os.dup(self.file.fileno()), self.status)


class _FileReader:
    """A descriptor whose position is shared with others, so it is read at given offsets."""

    def __init__(self, descriptor: int, status: os.stat_result) -> None:
        self._descriptor = descriptor
        self._status = status

    def read(self, offset: int) -> bytes:
        """Read up to CHUNK bytes; raises EOFError if there are none, and OSError."""
        if chunk := os.pread(self._descriptor, CHUNK, offset):
            return chunk
        raise EOFError("the file was truncated")

    def check(self) -> None:
        """Raise EOFError if the file has changed since it was opened."""
        if _changed(self._status, os.fstat(self._descriptor)):
            raise EOFError("the file was changed")

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


def _read_cached(descriptor: int, offset: int, count: int) -> memoryview | None:
    """Return bytes that the kernel has in memory, as those after what was just sent: no thread has to wait for a disk.

    Returns None where it has not all of them, and where it cannot tell (preadv2(2), Linux only).
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    data = bytearray(count)
    try:
        return memoryview(data) if os.preadv(descriptor, [data], offset, os.RWF_NOWAIT) == count else None
    except OSError:
        return None


def _changed(before: os.stat_result, now: os.stat_result) -> bool:
    """Return whether the bytes of an open file may differ from what they were.

    A changed status time counts, as the time of modification can be set back; but not if the number of links changed
    with it: a file that is replaced or deleted while it is sent retains its old bytes until it is closed.
    """
    if (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
        return True
    return before.st_ctime_ns != now.st_ctime_ns and before.st_nlink == now.st_nlink


@asynccontextmanager
async def held(file: BinaryIO, name: str, threads: Threads) -> AsyncIterator[FileRepresentation]:
    """Yield the representation of an open file, and close the file in a thread when no other thread uses it."""
    try:
        yield FileRepresentation(os.fstat(file.fileno()), name, file, threads)
    finally:
        if not file.closed:
            await threads.finish(file.close)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file that the operator configured; raise FileNotFoundError for anything else."""
    return regular(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def open_beneath(root: Path, parts: tuple[str, ...]) -> int:
    """Open `parts` below `root`, never anything outside, whatever changes meanwhile; return a descriptor.

    Symbolic links are followed if they stay inside. Raises ValueError for a path that leads out, and OSError.
    """
    try:
        return _descend(root, parts)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    # There are symbolic links on the path: resolve it, and open what it leads to without following any.
    home = Path(os.path.realpath(root, strict=True))
    beneath = Path(os.path.realpath(home.joinpath(*parts), strict=True)).relative_to(home)
    return _descend(home, beneath.parts)


def _descend(folder: Path, parts: tuple[str, ...]) -> int:
    """Open `parts` below a folder, each in the one before it; raises OSError with ELOOP for a symbolic link."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(folder, flags | os.O_DIRECTORY)
    for part in parts:
        outer = descriptor
        try:
            descriptor = os.open(part, flags | os.O_NOFOLLOW, dir_fd=outer)
        finally:
            os.close(outer)
    return descriptor


def read_small(descriptor: int, name: str) -> "SmallFile | None":
    """Read a regular file of at most SMALL_BYTES completely; None for any other, and for one that is being changed.

    The descriptor is at its beginning before and after, and stays open. Raises OSError.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > SMALL_BYTES:
        return None
    data = os.pread(descriptor, status.st_size + 1, 0)
    if len(data) != status.st_size or _changed(status, os.fstat(descriptor)):
        return None
    return SmallFile(status, name, data)


def regular(descriptor: int) -> BinaryIO:
    """Return the file of a descriptor; close it and raise FileNotFoundError if it is not a regular file."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError("not a regular file")
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return os.fdopen(descriptor, "rb")


# -- generated bytes


@dataclass(frozen=True, slots=True)
class Generated:
    """Bytes that are not on disk: a fixed pattern whose every MiB begins with its number, so that it can resume."""

    size: int
    name: str = "large-file.bin"
    media_type: str = "application/octet-stream"

    @property
    def validators(self) -> Validators:
        """Validators of the pattern, which never changes."""
        return Validators(f'"generated-1-{self.size:x}"', 0)

    async def send(self, out: Paced, offset: int, count: int, *, last: bool) -> None:
        """Write a part of the pattern."""
        while count:
            start = offset % CHUNK
            chunk = memoryview(block(offset // CHUNK))[start : start + count]
            await out.write(chunk)
            offset, count = offset + len(chunk), count - len(chunk)

    def reader(self) -> "_PatternReader":
        """Return a reader of the whole pattern."""
        return _PatternReader(self.size)


@dataclass(frozen=True, slots=True)
class _PatternReader:
    """A reader of the pattern, which holds no resources and never changes."""

    size: int

    def read(self, offset: int) -> memoryview:
        """Generate up to CHUNK bytes."""
        return memoryview(block(offset // CHUNK))[offset % CHUNK : offset % CHUNK + self.size - offset]

    def check(self) -> None:
        """Do nothing: the pattern never changes."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def block(number: int) -> bytes:
    """Return MiB `number` of the pattern: its number in 8 bytes, big-endian, then always the same noise."""
    return number.to_bytes(8, "big") + _noise()


@cache
def _noise() -> bytes:
    return random.Random(1).randbytes(CHUNK - 8)  # noqa: S311 - a pattern, not a secret
