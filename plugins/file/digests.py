"""Digests of whole files for Repr-Digest: each computed once for all requests, up to a size and a time."""

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
"""Bytes hashed before another file gets the thread: a small file never waits for all of a large one."""

CACHED = 1000
"""Maximum number of digests in the cache."""

THREADS = max(1, (os.cpu_count() or 1) // 2)
"""Number of threads that hash: half of the processors, as each uses one completely."""


class Digests:
    """SHA-256 of files up to `limit` bytes, computed for up to `seconds` per request, in dedicated threads.

    Requests for the same state of the same file share one computation, which stops when the last of them disconnects;
    its result is cached. No request waits for more than one slice of another file.
    """

    def __init__(self, *, seconds: float, limit: int) -> None:
        self._seconds = seconds
        self._limit = limit
        self._threads = Threads("digest", THREADS)
        self._group: asyncio.TaskGroup | None = None
        self._cached: OrderedDict[str, bytes] = OrderedDict()
        """Digests by entity-tag, the most recently used last."""
        self._running: dict[str, _Running] = {}

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Compute digests during the block; computations that run at its end are interrupted."""
        async with self._threads, asyncio.TaskGroup() as self._group:
            try:
                yield
            finally:
                self._group = None
                for tag in tuple(self._running):
                    self._stop(tag)

    async def of(self, file: Representation) -> bytes | None:
        """Return the SHA-256 of all bytes; None if the file is too large, or hashing takes too long.

        Raises Problem 503 if the file changes meanwhile.
        """
        tag = file.validators.etag
        if tag in self._cached:
            self._cached.move_to_end(tag)
            return self._cached[tag]
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
        return self._cached.get(tag)

    def _stop(self, tag: str) -> None:
        """Stop a computation that no request waits for."""
        self._running.pop(tag).task.cancel()

    async def _compute(self, tag: str, file: Representation) -> bytes | None:
        """Hash slice by slice, and cache the digest; None if the file has changed or cannot be read."""
        hashing = _Hashing(file.reader(), file.size)
        try:
            while await self._threads.run(hashing.hash_slice, interrupt=hashing.given_up.set):
                pass
        except (OSError, EOFError):
            return None
        else:
            digest = self._cached[tag] = hashing.digest.digest()
            if len(self._cached) > CACHED:
                self._cached.popitem(last=False)
            return digest
        finally:
            if (running := self._running.get(tag)) is not None and running.task is asyncio.current_task():
                del self._running[tag]
            await self._threads.finish(hashing.reader.close)


@dataclass(slots=True, eq=False)
class _Running:
    """A computation, and the number of requests that wait for it."""

    task: "asyncio.Task[bytes | None]"
    waiting: int = 0


@dataclass(slots=True, eq=False)
class _Hashing:
    """The progress of hashing a file."""

    reader: Reader
    size: int
    done: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    given_up: threading.Event = field(default_factory=threading.Event)

    def hash_slice(self) -> bool:
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
