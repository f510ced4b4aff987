"""Slots: how many requests do something costly at once, and how many wait for their turn."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from .auth import may_be_proxy
from .problems import Problem
from .tally import Tally

LOOK_SECONDS = 0.02
"""Interval at which a request that waits looks for slots that another process has released, in seconds."""

_HELD, _QUEUED = "slots", "queue"
"""Names under which slots, and requests in the queue, are counted; each client has one, too."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A request that waits for slots."""

    count: int
    client: str
    turn: "asyncio.Future[None]"


class Slots:
    """A bounded number of slots, and a bounded queue of requests for them, in which clients take turns.

    Of the requests that wait, the first of the client with the fewest slots is next; of several such clients, of that
    whose last turn was the longest ago. One client uses at most half of the slots and of the queue together, rounded
    up; one more of its requests is rejected with 429. That is not so for clients of this machine without credentials,
    which may be a proxy for any number of others.

    A request may need several slots and gets all of them at once, so that no two requests hold a part each. One for
    which neither slots nor the queue has capacity is rejected: `async with slots.held(): ...` raises Problem with
    `status` and a Retry-After of `retry_seconds`; 503 where the server is over its limits, 429 where the client is.

    `limit` is the number of slots, `waiting` the maximum number of requests in the queue, and `wait_seconds` the
    maximum wait of each; None is no limit. `what` names the requests in the detail of a rejection.

    With a `tally` of all workers of a server (`app[SHARED].tally(NAME)`), the slots, the queue and the part of a client
    are those of all of them together. Clients take turns in each worker; of the workers in which requests wait, the one
    that looks first takes a slot.
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
        tally: Tally | None = None,
    ) -> None:
        self.limit = limit
        """Slots, free and held."""
        self.waiting = waiting
        """Maximum number of requests in the queue."""
        self._tally = tally or Tally()
        self._wait_seconds = wait_seconds
        self._what = what
        self._status = status
        self._retry_seconds = retry_seconds
        self._queue: list[_Waiting] = []
        self._held: Counter[str] = Counter()
        """The number of slots that each client holds."""
        self._turns: dict[str, int] = {}
        """When each client with slots, or in the queue, had its last turn: any number that grows."""

    @property
    def in_use(self) -> int:
        """Number of slots held now."""
        return self._tally.total(_HELD)

    @asynccontextmanager
    async def held(self, count: int = 1, *, client: str = "") -> AsyncIterator[None]:
        """Hold `count` slots in the block, for a client as `client_of` returns it; "" for the server itself.

        Raises Problem: at once where the queue is full, or the client has its share, later where the wait takes longer
        than `wait_seconds`. Raises ValueError for more slots than there are.
        """
        if not 0 < count <= self.limit:
            raise ValueError(f"{count} is not a number of slots (1 to {self.limit})")
        self._count(count, client)
        try:
            if self._tally.total(_QUEUED) or not self._take(count, client):
                await self._wait(count, client)
            try:
                yield
            finally:
                self._release(count, client)
        finally:
            self._tally.remove(_part(client), count)

    def rejection(self, reason: str, *, of_client: bool = False) -> Problem:
        """Return the Problem of a request that gets no slot; a subclass may return another one.

        `of_client` is whether the client is over its limit, not the server.
        """
        headers = {"Retry-After": str(self._retry_seconds)}
        status = 429 if of_client else self._status
        return Problem(status, f"Too many {self._what}: {reason}.", headers=headers)

    def _count(self, count: int, client: str) -> None:
        """Raise Problem where a client that has slots, or waits for them, would have more than its share."""
        share = -(-(self.limit + self.waiting) // 2)
        limit = sys.maxsize if may_be_proxy(client) else max(share, count)
        if not self._tally.add(_part(client), limit, count):
            used = self._tally.total(_part(client))
            raise self.rejection(f"this client has {used} of the {share} that one may have", of_client=True)

    def _take(self, count: int, client: str) -> bool:
        """Take slots for a client; return whether there were enough."""
        if not self._tally.add(_HELD, self.limit, count):
            return False
        self._held[client] += count
        self._turns[client] = max(self._turns.values(), default=0) + 1
        return True

    async def _wait(self, count: int, client: str) -> None:
        if not self._tally.add(_QUEUED, self.waiting):
            queued = f", {self._tally.total(_QUEUED)} waiting" if self.waiting else ""
            raise self.rejection(f"{self.in_use} of {self.limit} in progress{queued}")
        one = _Waiting(count, client, asyncio.get_running_loop().create_future())
        self._queue.append(one)
        try:
            async with asyncio.timeout(self._wait_seconds):
                while self._tally.is_shared and not (await asyncio.wait({one.turn}, timeout=LOOK_SECONDS))[0]:
                    self._pass_on()
                await one.turn
        except BaseException as error:
            # Its turn may have come in the moment in which it gave up; else the next one may need less than this one.
            if waits := one in self._queue:
                self._leave_queue(one)
            self._release(0 if waits else count, client)
            if isinstance(error, TimeoutError):
                raise self.rejection(f"none ended within {self._wait_seconds:g} s") from None
            raise

    def _leave_queue(self, one: _Waiting) -> None:
        self._queue.remove(one)
        self._tally.remove(_QUEUED)

    def _release(self, count: int, client: str) -> None:
        """Return slots of a client, and pass them to the requests that wait, unless some wait in other processes."""
        self._tally.remove(_HELD, count)
        self._held[client] -= count
        if not self._held[client]:
            del self._held[client]
        if client not in self._held and all(one.client != client for one in self._queue):
            self._turns.pop(client, None)
        if self._tally.total(_QUEUED) <= len(self._queue):
            self._pass_on()

    def _pass_on(self) -> None:
        """Give free slots to the requests that wait here, in their order."""
        while waiting := [one for one in self._queue if not one.turn.cancelled()]:
            following = min(waiting, key=lambda one: (self._held[one.client], self._turns.get(one.client, 0)))
            if not self._take(following.count, following.client):
                break
            self._leave_queue(following)
            following.turn.set_result(None)


def _part(client: str) -> str:
    """Return the name under which the slots of a client are counted, with those that it waits for."""
    return f"client {client}"
