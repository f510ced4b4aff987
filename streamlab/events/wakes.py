"""Send what is committed to the other processes of the machine that watch the same event log: a named pipe of each."""

import os
import select
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from .log import EncodedEvent

TICK_NANOSECONDS = 50_000_000
"""More than the resolution of the times of a folder, in nanoseconds."""

LOOK = b"\0"
"""Byte that only says that there was a commit."""

_COMMIT = struct.Struct(">BH")
"""What precedes an encoded commit: 1, and its length in bytes."""

_PIPE_BYTES = 65536
"""Capacity of a pipe. Source: pipe(7)."""


class Commit(NamedTuple):
    """Events that were added to a channel."""

    channel: str
    epoch: int
    last: int
    """Offset of the last one."""
    time: int
    """In milliseconds since 1970."""
    drafts: Sequence[EncodedEvent]


_encode = msgspec.msgpack.Encoder().encode

_decode = msgspec.msgpack.Decoder(Commit).decode


def encode(commits: Sequence[Commit]) -> bytes:
    """Return commits as they are written to a pipe, or LOOK where these are more than a pipe takes as a whole."""
    if sum(len(draft.data) for commit in commits for draft in commit.drafts) >= select.PIPE_BUF:
        return LOOK
    bodies = [_encode(commit) for commit in commits]
    if sum(map(len, bodies)) + _COMMIT.size * len(bodies) > select.PIPE_BUF:
        return LOOK
    return b"".join(_COMMIT.pack(1, len(body)) + body for body in bodies)


def decode(received: bytes) -> list[Commit] | None:
    """Return the commits that were read from a pipe; None where others may be missing."""
    if len(received) > _PIPE_BYTES - select.PIPE_BUF:  # it may have been full
        return None
    commits, start = [], 0
    while start < len(received):
        if received[start] != 1:
            return None
        _, size = _COMMIT.unpack_from(received, start)
        start += _COMMIT.size
        commits.append(_decode(received[start : start + size]))
        start += size
    return commits


class Wakes:
    """The pipe of this process, and those of the others. No method blocks; all but `release` belong to one thread.

    Whoever commits writes the events into each pipe, so that the others need not read the file. A pipe that nobody
    reads any more is that of a process that has died: it is deleted. What is lost with a pipe that is full, that is
    deleted from outside, or that another user may not write to, is only time: events that do not follow the one before
    are read from the file, and everybody looks for commits every two seconds as well.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / uuid.uuid4().hex
        self.descriptor: int | None = None
        """The pipe of this process, to be read by the event loop, which releases it; None without one."""
        self._opened: set[int] = set()
        self._others: dict[str, int] = {}
        self._listed: tuple[int, int] | None = None

    @property
    def has_others(self) -> bool:
        """Whether there were pipes of other processes at the last `notify`."""
        return bool(self._others)

    def ensure(self) -> None:
        """Create the pipe of this process unless it is in place; where that is not possible, there is none."""
        if self.descriptor is not None:
            with suppress(OSError):
                if os.path.samestat(os.fstat(self.descriptor), self._own.stat()):
                    return
        self.descriptor = None
        unnamed = self._folder / f".{self._own.name}"  # until it is read: a pipe without a reader is deleted
        with suppress(OSError, AttributeError):  # a system, or a file system, without named pipes
            self._folder.mkdir(parents=True, exist_ok=True)
            unnamed.unlink(missing_ok=True)
            os.mkfifo(unnamed)
            # Also for writing: it does not end when the last of the others closes it.
            descriptor = os.open(unnamed, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                unnamed.replace(self._own)
            except OSError:
                os.close(descriptor)
                raise
            self.descriptor = descriptor
            self._opened.add(descriptor)

    @staticmethod
    def read(descriptor: int) -> list[Commit] | None:
        """Return the commits that others have sent to a pipe of this process; None where others may be missing."""
        with suppress(BlockingIOError):
            return decode(os.read(descriptor, _PIPE_BYTES))
        return []

    def release(self, descriptor: int) -> None:
        """Close a pipe of this process that the event loop reads no longer."""
        self._opened.discard(descriptor)
        os.close(descriptor)

    def notify(self, commits: Callable[[], Sequence[Commit]] = tuple) -> None:
        """Wake all other processes, and send commits to them: they look for others where these are none."""
        try:
            status = self._folder.stat()
        except OSError:
            return
        if self._listed != (listed := (status.st_ino, status.st_mtime_ns)):
            # A pipe that is created in the same tick of the clock as this change leaves no other time.
            self._listed = listed if time.time_ns() - status.st_mtime_ns > TICK_NANOSECONDS else None
            self._list()
        if not self._others:
            return
        message = encode(commits()) or LOOK
        for name, other in tuple(self._others.items()):
            try:
                os.write(other, message)
            except BlockingIOError:
                pass  # it is full: whoever reads it looks for all commits
            except OSError:
                self._forget(name)
                (self._folder / name).unlink(missing_ok=True)

    def _list(self) -> None:
        """Open the pipes that have been created since, and close those that are gone."""
        with suppress(OSError):
            found = {path.name for path in self._folder.iterdir() if path.name[0] != "."} - {self._own.name}
            for name in self._others.keys() - found:
                self._forget(name)
            for name in found - self._others.keys():
                path = self._folder / name
                try:
                    self._others[name] = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                except PermissionError:
                    continue
                except OSError:  # nobody reads it
                    path.unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        os.close(self._others.pop(name))

    def close(self) -> None:
        """Delete the pipe of this process, and close those of the others."""
        for descriptor in tuple(self._opened):
            self.release(descriptor)
        for name in tuple(self._others):
            self._forget(name)
        if self.descriptor is not None:
            self.descriptor = None
            with suppress(OSError):
                self._own.unlink(missing_ok=True)
                self._folder.rmdir()  # unless others are there
