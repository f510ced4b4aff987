"""How many generations run at once, and how many wait for their turn."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .openai import Failure

RETRY_SECONDS = 2
"""Seconds after which a client that found no slot may retry."""


class Places:
    """Slots for generations, and a bounded queue of requests for them: first come, first served, whatever they need.

    A request may need several slots and gets all of them at once, so that no two requests hold a part each.
    """

    def __init__(self, places: int, waiting: int, wait_seconds: float) -> None:
        self._places = self._free = places
        self._limit = waiting
        self._wait_seconds = wait_seconds
        self._queue = deque[tuple[int, asyncio.Future[None]]]()

    @asynccontextmanager
    async def held(self, count: int = 1) -> AsyncIterator[None]:
        """Hold `count` slots, no more than there are, in the block.

        Raises Failure 429: at once where the queue is full, later where the wait takes longer than `wait_seconds`.
        """
        if count <= self._free and not self._queue:
            self._free -= count
        else:
            await self._turn(count)
        try:
            yield
        finally:
            self._release(count)

    async def _turn(self, count: int) -> None:
        if len(self._queue) >= self._limit:
            running = self._places - self._free
            raise self._refusal(f"{running} of {self._places} slots are taken and {len(self._queue)} requests wait")
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((count, turn))
        try:
            async with asyncio.timeout(self._wait_seconds):
                await turn
        except BaseException as error:
            # Its turn may have come in the moment in which it gave up; else the next one may need less than this one.
            self._release(0 if turn.cancelled() else count)
            if isinstance(error, TimeoutError):
                raise self._refusal(f"no slot became free within {self._wait_seconds:g} seconds") from None
            raise

    def _release(self, count: int) -> None:
        """Return slots, and pass them to those who wait, in their order."""
        self._free += count
        self._queue = deque(request for request in self._queue if not request[1].cancelled())
        while self._queue and self._queue[0][0] <= self._free:
            needed, turn = self._queue.popleft()
            self._free -= needed
            turn.set_result(None)

    @staticmethod
    def _refusal(reason: str) -> Failure:
        detail = f"This server has more to generate than it can: {reason}."
        return Failure(429, "too_many_generations", detail, headers={"Retry-After": str(RETRY_SECONDS)})
