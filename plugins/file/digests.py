"""Digests of whole files for Repr-Digest: each computed once for all who wait for it, within a size and a time."""

import asyncio
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from streamlab import Problem, Threads

from .representation import Reader, Representation

SLICE = 16 * 1024 * 1024
"""Bytes hashed before others get the thread: a small file waits for slices of large ones, never for all of one."""

KNOWN = 1000
"""Maximum number of digests that are remembered."""

THREADS = max(1, (os.cpu_count() or 1) // 2)
"""Threads that hash: half of the processors, as each takes all of one."""


class Digests:
    """SHA-256 of files up to `limit` bytes, computed for up to `seconds` per request, in dedicated threads.

    Requests for the same state of the same file share one computation, which ends when the last of them leaves, and
    whose result the next ones find. None waits for that of another file longer than for a slice of it.
    """

    def __init__(self, *, seconds: float, limit: int) -> None:
        self._seconds = seconds
        self._limit = limit
        self._threads = Threads("digest", THREADS)
        self._group: asyncio.TaskGroup | None = None
        self._known: OrderedDict[str, bytes] = OrderedDict()
        """By entity-tag, as everything here; the last one that was wanted is last."""
        self._running: dict[str, _Running] = {}

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Compute digests while the block lasts; what runs at its end is interrupted."""
        async with self._threads, asyncio.TaskGroup() as self._group:
            try:
                yield
            finally:
                self._group = None
                for tag in tuple(self._running):
                    self._stop(tag)

    async def of(self, file: Representation) -> bytes | None:
        """Return the SHA-256 of all bytes; None where the file is too large, or the time does not suffice.

        Raises Problem 503 where the file changes meanwhile.
        """
        tag = file.validators.etag
        if tag in self._known:
            self._known.move_to_end(tag)
            return self._known[tag]
        if file.size > self._limit or self._group is None:
            return None
        running = self._running.get(tag)
        if running is None:
            running = self._running[tag] = _Running(self._group.create_task(self._compute(tag, file)))
        running.waiting += 1
        try:
            await asyncio.wait({running.task}, timeout=self._seconds)  # its cancellation does not reach the task
        finally:
            running.waiting -= 1
            if not running.waiting and self._running.get(tag) is running:
                self._stop(tag)
        if running.task.done() and not running.task.cancelled() and running.task.result() is None:
            raise Problem(503, "This file is being written; try again.", headers={"Retry-After": "1"})
        return self._known.get(tag)

    def _stop(self, tag: str) -> None:
        """End a computation that nobody waits for any more."""
        self._running.pop(tag).task.cancel()

    async def _compute(self, tag: str, file: Representation) -> bytes | None:
        """Hash slice by slice, and remember the digest; None where the file has changed, or cannot be read."""
        hashing = _Hashing(file.reader(), file.size)
        try:
            while await self._threads.run(hashing.go_on, interrupt=hashing.given_up.set):
                pass
        except (OSError, EOFError):
            return None
        else:
            digest = self._known[tag] = hashing.digest.digest()
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
            return digest
        finally:
            if (running := self._running.get(tag)) is not None and running.task is asyncio.current_task():
                del self._running[tag]
            await self._threads.finish(hashing.reader.close)


@dataclass(slots=True, eq=False)
class _Running:
    """A computation, and how many requests wait for it."""

    task: "asyncio.Task[bytes | None]"
    waiting: int = 0


@dataclass(slots=True, eq=False)
class _Hashing:
    """How far a file is hashed."""

    reader: Reader
    size: int
    done: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    given_up: threading.Event = field(default_factory=threading.Event)

    def go_on(self) -> bool:
        """Hash up to SLICE bytes; return whether there are more. Raises OSError, and EOFError for a changed file."""
        end = min(self.size, self.done + SLICE)
        while self.done < end and not self.given_up.is_set():
            chunk = self.reader.read(self.done)
            self.digest.update(chunk)
            self.done += len(chunk)
        if self.done < self.size:
            return True
        self.reader.check()
        return False
