"""Fan-out: events of a channel, framed once and pushed to every follower of this process."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streamlab import sse
from streamlab.streaming.connection import Chunk, FanoutWriter, Recipients
from streamlab.streaming.event_stream import EventStream

from .log import END, ORIGIN, Event, Position
from .views import Filters, View

log = logging.getLogger(__name__)

FRAME_BATCH_BYTES = 64 * 1024
"""Maximum bytes pushed to a follower at once; a larger event is written by the follower's own task."""

SLICE = 32
"""Maximum number of followers served between two checks of the clock."""

TURN_SECONDS = 0.0005
"""Seconds for which followers are served before other tasks of the event loop run."""

PENDING_BYTES = 1024 * 1024
"""Bytes waiting to be pushed above which publishers of this process wait."""

OVERRUN_BYTES = 4 * PENDING_BYTES
"""Bytes waiting to be pushed above which they are dropped (other processes publish faster than this one can push),
and the followers catch up from the log, each at its own pace."""


class Frame(NamedTuple):
    """An event of the log, and its bytes in an event stream."""

    event: Event
    frame: bytes


def make_frame(event: Event, id_prefix: str) -> Frame:
    """Encode an event of the log, `id_prefix` before its id; always the same bytes."""
    return Frame(event, sse.sse_event(event.data, event.event, id=f"{id_prefix}{event.position}"))


def latest(items: Sequence[Frame]) -> list[Frame]:
    """Return the last event of each key, and all events without a key."""
    seen: set[str] = set()
    latest: list[Frame] = []
    for item in reversed(items):
        if item.event.key not in seen:
            latest.append(item)
            if item.event.key:
                seen.add(item.event.key)
    return latest[::-1]


class Follower(FanoutWriter):
    """One client of a channel. Either its own task writes (it catches up), or the hub pushes (it is live)."""

    __slots__ = ("_bytes", "_position", "_slice", "chunked", "id_prefix", "released", "remaining", "stream", "view")

    def __init__(
        self, stream: EventStream, view: View, position: Position, remaining: int | None = None, id_prefix: str = ""
    ) -> None:
        super().__init__()
        self.id_prefix = id_prefix
        self.stream = stream
        stream.fanout = self
        self.view = view
        self.remaining = remaining
        """Number of events until its limit; None for no limit."""
        self.chunked = False
        self.released: asyncio.Future[bool] | None = None
        """While live: done when its task must take over; True if everything has been sent."""
        self._slice: Slice | None = None
        self._position = position
        self._bytes = 0
        """Bytes that were pushed to it; while live, less those of its slice."""

    @property
    def live(self) -> bool:
        """Whether the hub pushes to it."""
        return self._slice is not None

    @property
    def position(self) -> Position:
        """Position of the last event that was sent to it or that its view excludes."""
        return self._position if self._slice is None else self._slice.position

    @position.setter
    def position(self, position: Position) -> None:
        assert self._slice is None, "the hub pushes to it"
        self._position = position

    @property
    def bytes_written(self) -> int:
        """Bytes of the body that were pushed to it."""
        return self._bytes if self._slice is None else self._bytes + self._slice.size

    @property
    def audience_key(self) -> tuple[View, bool, bool]:
        """Return what its audience has in common."""
        return self.view, self.chunked, self.remaining is not None

    def event_id(self, name: str) -> str:
        """Return the id of an event that is not in the log: the position of the follower, and a name."""
        return f"{self.id_prefix}{self.position}.{name}"

    def beat(self) -> None:
        """Send a heartbeat."""
        self.stream.beat()
        if self._slice is not None:
            self._slice.recipients.update(self)

    def enter(self, where: "Slice") -> None:
        """Become live."""
        self._slice = where
        self._bytes -= where.size

    def leave(self) -> None:
        """Be live no longer."""
        if self._slice is not None:
            where, self._position, self._bytes, self._slice = self._slice, self.position, self.bytes_written, None
            where.remove(self)

    def stop_writing(self) -> None:
        """Return it to its task, which waits for the client."""
        self.release(done=False)

    def release(self, *, done: bool) -> None:
        """Return a live follower to its task."""
        self.leave()
        if self.released is not None and not self.released.done():
            self.released.set_result(done)


class FrameBatch(NamedTuple):
    """Whole frames of at most FRAME_BATCH_BYTES together, or one that is larger."""

    wire: bytes
    """The frames as they are written: with chunk framing where the transfer coding is chunked."""
    size: int
    """Size of the frames, in bytes."""
    events: int
    after: Position
    """Position of a follower that has it."""
    is_last: bool
    """Whether it ends the channel."""


def batch_frames(items: Sequence[Frame], after: Position, *, chunked: bool = False) -> list[FrameBatch]:
    """Join frames into batches of bounded size; a follower that has all of them is at `after`."""
    groups: list[list[Frame]] = []
    size = FRAME_BATCH_BYTES
    for item in items:
        size += len(item.frame)
        if size > FRAME_BATCH_BYTES:
            groups.append([])
            size = len(item.frame)
        groups[-1].append(item)
    bodies = [b"".join(item.frame for item in group) for group in groups]
    return [
        FrameBatch(
            wire=Chunk(body).framed if chunked else body,
            size=len(body),
            events=len(group),
            after=after if group is groups[-1] else group[-1].event.position,
            is_last=group[-1].event.event == END,
        )
        for group, body in zip(groups, bodies, strict=True)
    ]


class Slice:
    """At most SLICE live followers of an audience that have the same events, and get the next ones in one go.

    What changes with an event is counted once for all of them: with thousands of followers, the cost of an event is
    memory that is not in the cache of the processor.
    """

    __slots__ = ("_audience", "_fresh", "position", "recipients", "size")

    def __init__(self, audience: "Audience", position: Position) -> None:
        self._audience = audience
        self._fresh: list[Follower] = []
        """Those that were pushed nothing yet."""
        self.position = position
        """Position of its followers."""
        self.size = 0
        """Bytes that were pushed to each follower since the slice began."""
        self.recipients = Recipients[Follower]()

    def add(self, follower: Follower) -> None:
        """Add a follower that is at the position of the slice."""
        follower.enter(self)
        self.recipients.add(follower)
        self._fresh.append(follower)

    def remove(self, follower: Follower) -> None:
        """Remove a follower, also within a write to it."""
        self.recipients.remove(follower)
        if follower in self._fresh:
            self._fresh.remove(follower)
        if not self.recipients:
            self._audience.slices.remove(self)

    def release(self) -> None:
        """Return its followers to their tasks, which read the log from their positions."""
        for follower in self.recipients.all():
            follower.release(done=False)

    def push(self, batch: FrameBatch) -> None:
        """Push a batch; whoever has its end or its limit then is released as done, who cannot get it reads the log."""
        if batch.size > FRAME_BATCH_BYTES:
            self.release()
        complete = self._spend(batch.events) if self._audience.limited else []
        # Before the writes, within which a follower may be released.
        self.position = batch.after
        self.size += batch.size
        for follower in self._fresh:
            follower.stream.note_first_byte()
        self._fresh.clear()
        for follower in self.recipients.all() if batch.is_last else complete:
            follower.release(done=True)
            assert follower.writer is not None
            follower.writer.write(batch.wire)
        self.recipients.write(batch.wire)

    def _spend(self, events: int) -> list[Follower]:
        """Reduce the limits by a number of events, and return who has reached its own; release who is beyond it."""
        complete: list[Follower] = []
        for follower in self.recipients.all():
            assert follower.remaining is not None
            if events > follower.remaining:
                follower.release(done=False)  # its task reads from the log as many as the limit allows
            else:
                follower.remaining -= events
                if not follower.remaining:
                    complete.append(follower)
        return complete


@dataclass(slots=True, eq=False)
class Audience:
    """The live followers that get the same bytes, and the events that a conflating view delays for them."""

    view: View
    chunked: bool
    limited: bool
    """Whether its followers have a limit."""
    slices: list[Slice] = field(default_factory=list)
    held: list[Frame] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None

    backlog: list[Event] = field(default_factory=list)
    """Events that its filter has not seen yet; empty for a view without one."""
    backlog_bytes: int = 0
    filtered: Position = ORIGIN
    """Position of the last event that its filter has seen."""
    filtering: asyncio.Task[None] | None = None
    """Filters the backlog and pushes the accepted events, until the backlog is empty."""

    def add(self, follower: Follower, position: Position) -> None:
        """Add a follower that is at a position."""
        for one in reversed(self.slices):  # the last often has room
            if one.position == position and len(one.recipients) < SLICE:
                break
        else:
            one = Slice(self, position)
            self.slices.append(one)
        one.add(follower)

    def select(self, chosen: list[Frame], due: Callable[[], None]) -> list[Frame]:
        """Return which of the chosen events to send now; `due` is called when delayed ones may be sent."""
        if not self.view.conflate:
            return chosen
        self.held = latest(self.held + chosen)
        if self.timer is not None or not self.held:
            return []
        chosen, self.held = self.held, []
        self.timer = asyncio.get_running_loop().call_later(self.view.conflate, self._open, due)
        return chosen

    def _open(self, due: Callable[[], None]) -> None:
        self.timer = None
        if self.held:
            due()

    def release(self) -> None:
        """Return the followers to their tasks, which read the log from their positions."""
        self.backlog, self.backlog_bytes = [], 0
        for one in tuple(self.slices):
            one.release()

    def close(self) -> None:
        """Cancel the timer and the filter: the last follower has left."""
        if self.timer is not None:
            self.timer.cancel()
        if self.filtering is not None:
            self.filtering.cancel()


class Hub:
    """The followers of one channel in this process."""

    def __init__(self, channel: str, position: Position, id_prefix: str, filters: Filters) -> None:
        self._channel = channel
        self._id_prefix = id_prefix
        self._filters = filters
        self._group = asyncio.TaskGroup()
        """The tasks that filter; open while the hub runs."""
        self.position = position
        """Position of the last event that has been pushed, or is being pushed."""
        self.users = 0
        """Number of users of this hub, live followers or not."""
        self._audiences: dict[tuple[View, bool, bool], Audience] = {}
        self._pending: list[Event] = []
        self._pending_bytes = 0
        self._overrun: Position | None = None
        self._news = asyncio.Event()
        self._waiters: set[asyncio.Future[tuple[Position, Sequence[Event]]]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events of the log, in order, to be pushed in the next turn of the event loop."""
        size = sum(len(event.data) for event in events)
        if self._overrun is not None or self._pending_bytes + size > OVERRUN_BYTES:
            self._overrun = events[-1].position
            self._pending.clear()
            self._pending_bytes = 0
        else:
            self._pending += events
            self._pending_bytes += size
        self._idle.clear()
        self._news.set()

    async def wait_for_capacity(self) -> None:
        """Apply back-pressure: wait while more than PENDING_BYTES wait to be pushed."""
        while self._pending_bytes > PENDING_BYTES:
            await self._idle.wait()

    async def wait_past(self, position: Position) -> Sequence[Event]:
        """Wait until an event after a position has come; return those that directly follow it.

        Returns none where they are no longer in memory: the caller reads them from the log.
        """
        before = self.position
        events: Sequence[Event] = ()
        while self.position <= position:
            waiter: asyncio.Future[tuple[Position, Sequence[Event]]] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                before, events = await waiter
            finally:
                self._waiters.discard(waiter)
        return events if before == position else ()

    def join(self, follower: Follower) -> "asyncio.Future[bool]":
        """Push from now on to a follower that is at the position of the hub.

        The future is done when its task must take over: True when it has everything, False when it lags.
        """
        follower.position = self.position  # one object for all, while they are idle
        follower.released = asyncio.get_running_loop().create_future()
        follower.writer, follower.chunked = follower.stream.attach_writer()
        if follower.writer is None:
            follower.released.set_result(False)
        else:
            key = follower.audience_key
            audience = self._audiences.get(key) or self._audiences.setdefault(key, Audience(*key))
            audience.add(follower, self.position)
        return follower.released

    def leave(self, follower: Follower) -> None:
        """Stop pushing to a follower."""
        follower.leave()
        audience = self._audiences.get(follower.audience_key)
        if audience is not None and not audience.slices:
            del self._audiences[follower.audience_key]
            audience.close()

    async def run(self) -> None:
        """Push the events that are delivered, until cancelled."""
        try:
            async with self._group:
                while True:
                    await self._news.wait()
                    self._news.clear()
                    await self._flush()
                    if not self._pending:
                        self._idle.set()
        finally:
            self._pending_bytes = 0
            self._idle.set()

    async def _flush(self) -> None:
        """Push the pending events: framed once for all, joined once per view, written once per follower."""
        events, self._pending, self._pending_bytes = self._pending, [], 0
        overrun, self._overrun = self._overrun, None
        before = position = self.position
        if overrun is not None or events:
            self.position = position = overrun if overrun is not None else events[-1].position
        # The task of each follower reads the missing events from the log, or reports a gap.
        gap = overrun is not None or bool(events and not before.precedes(events[0].position))
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result((before, () if gap else events))
        items = [] if gap else [make_frame(event, self._id_prefix) for event in events]
        # Followers that join from here on are past these events: in new slices, or in those that have been served.
        noted = [(audience, tuple(audience.slices)) for audience in self._audiences.values()]
        began = time.monotonic()
        for audience, slices in noted:
            if gap:
                audience.release()
            elif audience.view.accepts is not None:
                self._leave_to_filter(audience, events)
            else:
                chosen = audience.select([item for item in items if audience.view.wants(item.event)], self._news.set)
                began = await self._push(audience, chosen, slices, position, began)

    async def _push(
        self, audience: Audience, chosen: Sequence[Frame], slices: Sequence[Slice], after: Position, began: float
    ) -> float:
        """Push events to slices, which are at `after` then; return when the event loop last had its turn."""
        batches = batch_frames(chosen, after, chunked=audience.chunked)
        for one in slices:
            mine = batches
            if chosen and one.position >= chosen[0].event.position:
                # It joined after some of these were delayed for the others, and has them from the log.
                missing = [item for item in chosen if item.event.position > one.position]
                mine = batch_frames(missing, after, chunked=audience.chunked)
            for batch in mine:
                one.push(batch)
            if one.position < after and not audience.view.conflate:
                one.position = after
            if time.monotonic() - began >= TURN_SECONDS:
                await asyncio.sleep(0)
                began = time.monotonic()
        return began

    def _leave_to_filter(self, audience: Audience, events: Sequence[Event]) -> None:
        """Add events to the backlog of a filter; followers of one that lags far behind read the log."""
        audience.backlog_bytes += sum(len(event.data) for event in events)
        if audience.backlog_bytes > PENDING_BYTES:
            audience.release()
            return
        audience.backlog += events
        if audience.filtering is None and (events or audience.held):
            audience.filtering = self._group.create_task(self._filter(audience))

    async def _filter(self, audience: Audience) -> None:
        """Push the events that its filter accepts to an audience, until its backlog is empty."""
        while True:
            events, audience.backlog, audience.backlog_bytes = audience.backlog, [], 0
            try:
                wanted = await self._filters.chosen(self._channel, audience.view, events)
            except Exception:
                log.exception("a filter of the channel %s failed", self._channel)
                audience.release()  # the stream of each follower fails by itself
                break
            chosen = audience.select([make_frame(event, self._id_prefix) for event in wanted], self._news.set)
            after = events[-1].position if events else audience.filtered
            audience.filtered = after
            await self._push(audience, chosen, tuple(audience.slices), after, time.monotonic())
            if not audience.backlog:
                break
        audience.filtering = None
