"""What one client may use: requests in a minute, and open connections."""

import asyncio
import math
import time
from collections import Counter, OrderedDict
from contextlib import suppress

from streamlab.auth import may_be_proxy, network_of
from streamlab.problems import Problem

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

    def __init__(self, limit: int, trusted: Proxies, row: Row | None = None) -> None:
        self._limit = limit
        self._row = row
        self._trusted = trusted
        self._open: Counter[str] = Counter()
        self._total = 0
        self._silent = 0
        """Number of those on which nothing has arrived yet."""

    def add(self, address: str) -> str | None:
        """Count a connection of an address; return what `remove` takes, or None where the address has too many."""
        network = network_of(address)
        if not self._limit or may_be_proxy(network) or address in self._trusted:
            self._count(1)
            return ""
        if self._open[network] >= self._limit:
            return None
        self._count(1)
        self._open[network] += 1
        return network

    def remove(self, counted: str) -> None:
        """Count a connection no longer."""
        self._count(-1)
        if counted:
            self._open[counted] -= 1
            if not self._open[counted]:
                del self._open[counted]

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


class RequestRate:
    """A bucket of `per_minute` requests for each client, filled again evenly within a minute; 0: no limit.

    Source: draft-ietf-httpapi-ratelimit-headers, sections 2 and 3.
    """

    def __init__(self, per_minute: int, what: str = "sent {limit} requests") -> None:
        self._per_minute = per_minute
        self._done = what.format(limit=per_minute)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Of each client, the requests that are left, and the time at which that was so."""

    def admit(self, client: str) -> None:
        """Count a request; raises Problem 429 where the bucket of its client is empty."""
        if not self._per_minute:
            return
        now, rate = time.monotonic(), self._per_minute / 60
        left, then = self._buckets.pop(client, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - then) * rate)
        admitted = left >= 1
        self._buckets[client] = left - admitted, now
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if not admitted:
            seconds = math.ceil((1 - left) / rate)
            headers = {
                "Retry-After": str(seconds),
                "RateLimit-Policy": f'"requests";q={self._per_minute};w=60',
                "RateLimit": f'"requests";r=0;t={seconds}',
            }
            raise Problem(429, f"This client has {self._done} within a minute.", headers=headers)
