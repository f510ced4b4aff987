"""Slots: how many requests do something costly at once, and how many wait for their turn."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .problems import Problem


class Slots:
    """A bounded number of slots, and a bounded queue of requests for them: first come, first served.

    A request may need several slots and gets all of them at once, so that no two requests hold a part each. One for
    which neither slots nor the queue has capacity is rejected: `async with slots.held(): ...` raises Problem with
    `status` and a Retry-After of `retry_seconds`; 503 where the server is over its limits, 429 where the client is.

    `limit` is the number of slots, `waiting` the maximum number of requests in the queue, and `wait_seconds` the
    maximum wait of each; None is no limit. `what` names the requests in the detail of a rejection.
    """

    def __init__(
        self,
        limit: int,
        waiting: int = 0,
        *,
        wait_seconds: float | None = None,
        what: str = "requests",
        status: int = 503,
        retry_seconds: int = 5,
    ) -> None:
        self.limit = limit
        """Slots, free and held."""
        self.waiting = waiting
        """Maximum number of requests in the queue."""
        self._free = limit
        self._wait_seconds = wait_seconds
        self._what = what
        self._status = status
        self._retry_seconds = retry_seconds
        self._queue = deque[tuple[int, asyncio.Future[None]]]()

    @property
    def in_use(self) -> int:
        """Number of slots held now."""
        return self.limit - self._free

    @asynccontextmanager
    async def held(self, count: int = 1) -> AsyncIterator[None]:
        """Hold `count` slots in the block.

        Raises Problem: at once where the queue is full, later where the wait takes longer than `wait_seconds`. Raises
        ValueError for more slots than there are.
        """
        if not 0 < count <= self.limit:
            raise ValueError(f"{count} is not a number of slots (1 to {self.limit})")
        if count <= self._free and not self._queue:
            self._free -= count
        else:
            await self._wait(count)
        try:
            yield
        finally:
            self._release(count)

    def rejection(self, reason: str) -> Problem:
        """Return the Problem of a request that gets no slot; a subclass may return another one."""
        headers = {"Retry-After": str(self._retry_seconds)}
        return Problem(self._status, f"Too many {self._what}: {reason}.", headers=headers)

    async def _wait(self, count: int) -> None:
        if len(self._queue) >= self.waiting:
            queued = f", {len(self._queue)} waiting" if self.waiting else ""
            raise self.rejection(f"{self.in_use} of {self.limit} in progress{queued}")
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((count, turn))
        try:
            async with asyncio.timeout(self._wait_seconds):
                await turn
        except BaseException as error:
            # Its turn may have come in the moment in which it gave up; else the next one may need less than this one.
            self._release(0 if turn.cancelled() else count)
            if isinstance(error, TimeoutError):
                raise self.rejection(f"none ended within {self._wait_seconds:g} s") from None
            raise

    def _release(self, count: int) -> None:
        """Return slots, and pass them to the requests that wait, in their order."""
        self._free += count
        self._queue = deque(request for request in self._queue if not request[1].cancelled())
        while self._queue and self._queue[0][0] <= self._free:
            needed, turn = self._queue.popleft()
            self._free -= needed
            turn.set_result(None)
