"""What one client may use: requests in a minute, and open connections."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from streamlab.auth import may_be_proxy, network_of
from streamlab.problems import Problem
from streamlab.tally import Tally

from .board import Row
from .forwarded import Proxies

HEAR_SECONDS = 0.005
"""Interval at which it is checked whether clients have begun to send, in seconds."""

MAX_CLIENTS = 10_000
"""Maximum number of clients that are remembered; the one that was silent for the longest time is forgotten first."""


class OpenConnections:
    """The open connections of each address, for IPv6 of each 64-bit network: at most `limit` (0: any number).

    Not counted are those of this machine and of trusted proxies, which are of any number of clients. `row` is that of a
    worker, in which the number of all is written.
    """

    def __init__(self, limit: int, trusted: Proxies, row: Row | None = None, open_of: Tally | None = None) -> None:
        self._limit = limit
        self._row = row
        self._trusted = trusted
        self._open = open_of or Tally()
        self._total = 0
        self._silent = 0
        """Number of those on which nothing has arrived yet."""

    def add(self, address: str) -> str | None:
        """Count a connection of an address; return what `remove` takes, or None where the address has too many."""
        network = network_of(address)
        if not self._limit or may_be_proxy(network) or address in self._trusted:
            self._count(1)
            return ""
        if not self._open.add(network, self._limit):
            return None
        self._count(1)
        return network

    def remove(self, counted: str) -> None:
        """Count a connection no longer."""
        self._count(-1)
        if counted:
            self._open.remove(counted)

    def hear(self) -> None:
        """Note that the first bytes of a connection have arrived, or its end."""
        self._silent -= 1

    async def heard(self, seconds: float) -> None:
        """Wait until something has arrived on each connection, for a time at most, and its handler has begun."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._silent:  # noqa: ASYNC110 - an event would cost every connection
                    await asyncio.sleep(HEAR_SECONDS)
        await asyncio.sleep(HEAR_SECONDS)

    def _count(self, change: int) -> None:
        self._total += change
        self._silent += change > 0
        if self._row is not None:
            self._row.connections = self._total


class Buckets:
    """The requests that are left to each client, and the time at which that was so; at most MAX_CLIENTS of them."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, list[float]] = OrderedDict()

    @contextmanager
    def bucket(self, client: str, full: tuple[float, float]) -> Iterator[list[float]]:
        """Yield the bucket of a client, `full` for a new one, to be changed in the block."""
        bucket = self._buckets.pop(client) if client in self._buckets else [*full]
        self._buckets[client] = bucket
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        yield bucket


class RequestRate:
    """A bucket of `per_minute` requests for each client, filled again evenly within a minute; 0: no limit.

    Source: draft-ietf-httpapi-ratelimit-headers, sections 2 and 3.
    """

    def __init__(self, per_minute: int, what: str = "sent {limit} requests", buckets: Buckets | None = None) -> None:
        self._per_minute = per_minute
        self._done = what.format(limit=per_minute)
        self._buckets = buckets or Buckets()

    def admit(self, client: str) -> None:
        """Count a request; raises Problem 429 where the bucket of its client is empty."""
        if not self._per_minute:
            return
        now, rate = time.monotonic(), self._per_minute / 60
        with self._buckets.bucket(client, (float(self._per_minute), now)) as bucket:
            left = min(float(self._per_minute), bucket[0] + (now - bucket[1]) * rate)
            admitted = left >= 1
            bucket[:] = left - admitted, now
        if not admitted:
            seconds = math.ceil((1 - left) / rate)
            headers = {
                "Retry-After": str(seconds),
                "RateLimit-Policy": f'"requests";q={self._per_minute};w=60',
                "RateLimit": f'"requests";r=0;t={seconds}',
            }
            raise Problem(429, f"This client has {self._done} within a minute.", headers=headers)
