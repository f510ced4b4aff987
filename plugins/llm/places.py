"""How many generations run at once, and how many wait for their turn."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .openai import Failure

RETRY_SECONDS = 2
"""When a client that was refused may ask again."""


class Places:
    """So many places, and so many who wait for one, first come, first served; whoever comes then is refused."""

    def __init__(self, places: int, waiting: int, wait_seconds: float) -> None:
        self._places = places
        self._free = asyncio.Semaphore(places)
        self._limit = waiting
        self._wait_seconds = wait_seconds
        self.waiting = 0

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Hold a place in the block; raises Failure 429 at once where too many wait, later where it takes too long."""
        if self._free.locked() and self.waiting >= self._limit:
            raise self._refusal(f"{self._places} generations run and {self.waiting} wait, which is all it takes")
        self.waiting += 1
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._free.acquire()
        except TimeoutError:
            raise self._refusal(f"no generation ended within {self._wait_seconds:g} seconds") from None
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._free.release()

    @staticmethod
    def _refusal(reason: str) -> Failure:
        detail = f"This server has more to generate than it can: {reason}."
        return Failure(429, "too_many_generations", detail, headers={"Retry-After": str(RETRY_SECONDS)})
