"""Appends that wait for their commit: batched, bounded, in order."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from .log import Append, EventLogError, Position

PENDING_BYTES = 8 * 1024 * 1024
"""Maximum bytes that wait to be appended; an append beyond it is rejected, so that its publisher knows."""

COMMIT_EVENTS = 2000
"""Maximum number of events of one commit, so that no publisher waits for all others."""


@dataclass(slots=True)
class _Waiting:
    append: Append
    done: "asyncio.Future[Position]"


@dataclass(slots=True)
class AppendQueue:
    """Appends that wait for their engine: bounded in bytes, committed together, in order of arrival."""

    commit: Callable[[Sequence[Append]], Awaitable[Sequence[Position | EventLogError]]]
    """Stores appends; returns a position or an error for each, in order."""
    _waiting: list[_Waiting] = field(default_factory=list)
    _size: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def append(self, append: Append) -> Position:
        """Wait until an append is stored; raises EventLogError if it was not, or if the queue is full."""
        size = append.size
        if self._size and self._size + size > PENDING_BYTES:
            raise EventLogError("The event log cannot keep up with what is published; try again.")
        waiting = _Waiting(append, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._size += size
        self._news.set()
        return await waiting.done

    async def run(self) -> None:
        """Commit waiting appends, until cancelled; also those whose publisher has been cancelled."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while self._waiting:
                    await self._commit(self._take())
        except asyncio.CancelledError:
            for waiting in self._waiting:
                waiting.done.cancel()
            raise

    def _take(self) -> list[_Waiting]:
        count = events = 0
        for waiting in self._waiting:
            events += len(waiting.append.drafts)
            if count and events > COMMIT_EVENTS:
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    async def _commit(self, taken: Sequence[_Waiting]) -> None:
        try:
            results = await self.commit([waiting.append for waiting in taken])
        except BaseException:
            for waiting in taken:
                waiting.done.cancel()
            raise
        else:
            for waiting, result in zip(taken, results, strict=True):
                if waiting.done.done():
                    continue
                if isinstance(result, EventLogError):
                    waiting.done.set_exception(result)
                else:
                    waiting.done.set_result(result)
        finally:
            self._size -= sum(waiting.append.size for waiting in taken)
