"""Periodic work that wakes the event loop together with that of others, so that an idle process seldom wakes."""

import asyncio

EARLY = 0.1
"""Fraction of the interval by which a tick is too near to be waited for: a timer may fire a little early."""


def until_tick(seconds: float) -> float:
    """Return the time until the event loop's clock is next at a multiple of `seconds`, from 0.1 to 1.1 times that."""
    now = asyncio.get_running_loop().time()
    left = seconds - now % seconds
    return left if left >= seconds * EARLY else left + seconds


async def tick(seconds: float) -> None:
    """Sleep until the next multiple of `seconds`, as everything does that has the same interval."""
    await asyncio.sleep(until_tick(seconds))
