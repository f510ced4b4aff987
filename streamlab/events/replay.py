"""Reads of the log for followers that catch up: few at the same time, and equal ones shared."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .hub import SLICE, Cut, Framed, cuts, framed
from .log import END, Event, EventLog, Position
from .views import Filters, View

READS = 4
"""Reads of the log at the same time; the others wait in their order. What they bring is framed and sent in one turn of
the loop, so that this bounds how long a turn takes, however many followers catch up."""

BATCH_EVENTS = 1000
"""Maximum number of events of one read."""

CATCH_UP_BYTES = 48 * 1024
"""Bytes that a follower's task reads at once: it waits for its client before it reads, so that a stalled one costs
what waits in its connection, and not what would come next."""


@dataclass(frozen=True)
class Past:
    """What one read brought, for all followers that stand at the same position and have equal views."""

    id_prefix: str
    """What stands before the ids."""
    first: Position | None
    """Of the events that were read, whether the view wants them or not; None where there were none."""
    until: Position
    """Where a follower stands that has them."""
    last: Position
    """The last position that the channel has handed out."""
    events: Sequence[Event]
    """Those of them that the view wants."""

    @cached_property
    def frames(self) -> list[Framed]:
        """The events with their bytes."""
        return [framed(event, self.id_prefix) for event in self.events]

    @cached_property
    def cuts(self) -> list[Cut]:
        """The frames, joined."""
        return cuts(self.frames, self.until)


_Key = tuple[str, Position, View, int]


class Reads:
    """The reads of one server's followers."""

    def __init__(self, log: EventLog, filters: Filters) -> None:
        self._log = log
        self._filters = filters
        self._slots = asyncio.Semaphore(READS)
        self._shared: dict[_Key, list[asyncio.Future[Past | None]]] = {}
        """Who waits for a read that is under way."""

    async def read(self, channel: str, id_prefix: str, after: Position, view: View, size: int = CATCH_UP_BYTES) -> Past:
        """Return the events after a position, up to BATCH_EVENTS or `size` bytes, and which of them a view wants.

        Raises EventLogError, and what the view's filter raises.
        """
        key = channel, after, view, size
        while (waiting := self._shared.get(key)) is not None:
            other: asyncio.Future[Past | None] = asyncio.get_running_loop().create_future()
            waiting.append(other)
            if (past := await other) is not None:
                return past  # else the one that read was cancelled, or has failed
        waiting, past = self._shared.setdefault(key, []), None
        try:
            async with self._slots:
                batch = await self._log.read(channel, after, BATCH_EVENTS, size)
            first, until = (batch.events[0].position, batch.events[-1].position) if batch.events else (None, after)
            wanted = await self._filters.chosen(channel, view, batch.events)
            end = next((number for number, event in enumerate(wanted, 1) if event.event == END), None)
            if end is not None:
                wanted, until = wanted[:end], wanted[end - 1].position
            past = Past(id_prefix, first, until, batch.last, wanted)
            return past
        finally:
            del self._shared[key]
            _hand_out(past, waiting)


def _hand_out(past: Past | None, waiting: Sequence[asyncio.Future[Past | None]]) -> None:
    """Wake those that wait, some in each turn of the loop: what they do next is to send it."""
    for other in waiting[:SLICE]:
        if not other.done():
            other.set_result(past)
    if len(waiting) > SLICE:
        asyncio.get_running_loop().call_soon(_hand_out, past, waiting[SLICE:])
