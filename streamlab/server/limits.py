"""How many requests one client may send in a minute."""

import math
import time
from collections import OrderedDict

from streamlab.problems import Problem

MAX_CLIENTS = 10_000
"""Maximum number of clients that are remembered; the one that was silent for the longest time is forgotten first."""


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
