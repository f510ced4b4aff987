"""Reads of the log for followers that catch up: a bounded number at a time, and equal ones shared."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .hub import SLICE, Frame, FrameBatch, batch_frames, make_frame
from .log import END, Event, EventLog, Position
from .views import Filters, View

READS = 4
"""Maximum number of concurrent reads of the log; the others wait in order. Their events are framed and sent in one turn
of the event loop, so that this limits the duration of a turn, however many followers catch up."""

BATCH_EVENTS = 1000
"""Maximum number of events of one read."""

CATCH_UP_BYTES = 48 * 1024
"""Bytes that the task of a follower reads at once. It waits for its client before it reads, so that a stalled one costs
the memory of its connection, and not that of the next events."""


@dataclass(frozen=True)
class CatchUp:
    """Result of one read, for all followers at the same position with equal views."""

    id_prefix: str
    """Prefix of the ids."""
    first: Position | None
    """Position of the first event that was read, in the view or not; None if there was none."""
    until: Position
    """Position of a follower that has them."""
    last: Position
    """Last position of the channel."""
    events: Sequence[Event]
    """The events of the view."""

    @cached_property
    def frames(self) -> list[Frame]:
        """Return the events with their bytes."""
        return [make_frame(event, self.id_prefix) for event in self.events]

    @cached_property
    def batches(self) -> list[FrameBatch]:
        """Return the frames, joined."""
        return batch_frames(self.frames, self.until)


_Key = tuple[str, Position, View, int]


class Reads:
    """The reads for all followers of one server."""

    def __init__(self, log: EventLog, filters: Filters) -> None:
        self._log = log
        self._filters = filters
        self._slots = asyncio.Semaphore(READS)
        self._shared: dict[_Key, list[asyncio.Future[CatchUp | None]]] = {}
        """The followers that wait for a read in progress."""

    async def read(
        self, channel: str, id_prefix: str, after: Position, view: View, size: int = CATCH_UP_BYTES
    ) -> CatchUp:
        """Return the events after a position, up to BATCH_EVENTS or `size` bytes, and which of them belong to a view.

        Raises EventLogError, and what the view's filter raises.
        """
        key = channel, after, view, size
        while (waiting := self._shared.get(key)) is not None:
            other: asyncio.Future[CatchUp | None] = asyncio.get_running_loop().create_future()
            waiting.append(other)
            if (result := await other) is not None:
                return result  # else the follower that read was cancelled, or its read failed
        waiting, result = self._shared.setdefault(key, []), None
        try:
            async with self._slots:
                batch = await self._log.read(channel, after, BATCH_EVENTS, size)
            first, until = (batch.events[0].position, batch.events[-1].position) if batch.events else (None, after)
            wanted = await self._filters.chosen(channel, view, batch.events)
            end = next((number for number, event in enumerate(wanted, 1) if event.event == END), None)
            if end is not None:
                wanted, until = wanted[:end], wanted[end - 1].position
            result = CatchUp(id_prefix, first, until, batch.last, wanted)
            return result
        finally:
            del self._shared[key]
            _distribute(result, waiting)


def _distribute(result: CatchUp | None, waiting: Sequence[asyncio.Future[CatchUp | None]]) -> None:
    """Wake the followers that wait, SLICE in each turn of the event loop: each will send the events."""
    for other in waiting[:SLICE]:
        if not other.done():
            other.set_result(result)
    if len(waiting) > SLICE:
        asyncio.get_running_loop().call_soon(_distribute, result, waiting[SLICE:])
