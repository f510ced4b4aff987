"""Fan-out: what is published on a channel, framed once and pushed to every follower of this process."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streamlab import sse
from streamlab.streaming.connection import Piece, Pusher, Writer
from streamlab.streaming.event_stream import EventStream

from .log import END, ORIGIN, Event, Position
from .views import Filters, View

log = logging.getLogger(__name__)

PIECE_BYTES = 64 * 1024
"""Bytes pushed to a follower at once; a larger event is written by the follower's own task."""

SLICE = 32
"""Followers served between two looks at the clock,"""

TURN_SECONDS = 0.0005
"""and how long they are served before whatever else the loop has to do gets its turn."""

PENDING_BYTES = 1024 * 1024
"""Bytes that may wait to be pushed before publishers of this process wait too."""

OVERRUN_BYTES = 4 * PENDING_BYTES
"""Bytes at which nothing is kept waiting any more (other processes publish faster than this one can push): the
followers catch up from the log, each at its own pace."""


class Framed(NamedTuple):
    """An event and its bytes."""

    event: Event
    frame: bytes


def framed(event: Event, id_prefix: str) -> Framed:
    """Frame an event of the log, `id_prefix` before its id; the same bytes whenever and wherever it is sent."""
    return Framed(event, sse.sse_event(event.data, event.event, id=f"{id_prefix}{event.position}"))


def latest(items: Sequence[Framed]) -> list[Framed]:
    """Leave, of the events of one key, only the last; what has no key stays."""
    seen: set[str] = set()
    kept: list[Framed] = []
    for item in reversed(items):
        if item.event.key not in seen:
            kept.append(item)
            if item.event.key:
                seen.add(item.event.key)
    return kept[::-1]


class Follower(Pusher):
    """One client of a channel. Either its own task writes (it catches up), or the hub pushes (it is live).

    While it is live, a push touches this object and the transport, and no other: with thousands of followers, what an
    event costs is memory that is not in the processor's cache.
    """

    __slots__ = ("chunked", "id_prefix", "live", "position", "released", "remaining", "stream", "transport", "view")

    def __init__(
        self, stream: EventStream, view: View, position: Position, remaining: int | None = None, id_prefix: str = ""
    ) -> None:
        super().__init__()
        self.id_prefix = id_prefix
        self.stream = stream
        self.view = view
        self.position = position
        """What it has been given, or has no wish for, ends here."""
        self.remaining = remaining
        """Events it still wants; None for no end."""
        self.live = False
        self.released: asyncio.Future[bool] | None = None
        """While live: done when its task must take over, True because everything has been sent."""
        self.transport: Writer | None = None
        self.chunked = False

    @property
    def audience_key(self) -> tuple[View, bool, bool]:
        """What its audience has in common."""
        return self.view, self.chunked, self.remaining is not None

    def event_id(self, name: str) -> str:
        """The id of an event that is not in the log: it tells where the follower stands."""
        return f"{self.id_prefix}{self.position}.{name}"

    def fall_behind(self) -> None:
        """Let its task take over, which waits for the client."""
        self.release(done=False)

    def release(self, *, done: bool) -> None:
        """Hand a live follower back to its task."""
        self.live = False
        if self.released is not None and not self.released.done():
            self.released.set_result(done)


class Cut(NamedTuple):
    """Whole frames of a bounded size; one frame that is larger stands alone."""

    body: bytes
    events: int
    after: Position
    """Where a follower stands that has it."""
    last: bool
    """Whether it ends the channel."""


def cuts(items: Sequence[Framed], after: Position) -> list[Cut]:
    """Join frames into pieces of bounded size; whoever has them all stands at `after`."""
    groups: list[list[Framed]] = []
    size = PIECE_BYTES
    for item in items:
        size += len(item.frame)
        if size > PIECE_BYTES:
            groups.append([])
            size = len(item.frame)
        groups[-1].append(item)
    return [
        Cut(
            body=b"".join(item.frame for item in group),
            events=len(group),
            after=after if group is groups[-1] else group[-1].event.position,
            last=group[-1].event.event == END,
        )
        for group in groups
    ]


@dataclass(slots=True)
class Audience:
    """The live followers that want the same bytes, and what a conflating view holds back for them."""

    view: View
    chunked: bool
    limited: bool
    """Whether its followers want so many events and no more."""
    followers: set[Follower] = field(default_factory=set)
    held: list[Framed] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None

    backlog: list[Event] = field(default_factory=list)
    """What its filter has not seen yet; empty where the view has none."""
    backlog_bytes: int = 0
    filtered: Position = ORIGIN
    """What its filter has seen ends here."""
    filtering: asyncio.Task[None] | None = None
    """Filters the backlog and pushes what is accepted, for as long as there is one."""

    def select(self, chosen: list[Framed], due: Callable[[], None]) -> list[Framed]:
        """Choose, of what the view wants, what to send now; `due` is called when something held back may go."""
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
        """Hand the followers back to their tasks, which read the log from where each of them stands."""
        self.backlog, self.backlog_bytes = [], 0
        for follower in self.followers:
            follower.release(done=False)

    def close(self) -> None:
        """Hold nothing back any more, there being nobody."""
        if self.timer is not None:
            self.timer.cancel()
        if self.filtering is not None:
            self.filtering.cancel()

    def pieces(self, items: Sequence[Framed], after: Position) -> list["Pushed"]:
        """What to write to each follower; whoever has it all stands at `after`."""
        return [
            Pushed(
                Piece(cut.body).chunk if self.chunked else cut.body,
                len(cut.body),
                len(cut.body) > PIECE_BYTES,
                cut.events,
                cut.after,
                cut.last,
            )
            for cut in cuts(items, after)
        ]


class Pushed(NamedTuple):
    """A cut, framed for an audience."""

    wire: bytes
    size: int
    too_large: bool
    events: int
    after: Position
    last: bool


class Hub:
    """The followers of one channel in this process."""

    def __init__(self, channel: str, position: Position, id_prefix: str, filters: Filters) -> None:
        self._channel = channel
        self._id_prefix = id_prefix
        self._filters = filters
        self._group = asyncio.TaskGroup()
        """What filters; open while the hub runs."""
        self.position = position
        """What has been pushed, or is being pushed, ends here."""
        self.members = 0
        """How many use this hub, live or not."""
        self._audiences: dict[tuple[View, bool, bool], Audience] = {}
        self._pending: list[Event] = []
        self._pending_bytes = 0
        self._overrun: Position | None = None
        self._joins = 0
        """How many have joined so far. Who joins while something is pushed may have it from the log already."""
        self._news = asyncio.Event()
        self._moved: set[asyncio.Future[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events from the log, in order, to be pushed in the loop's next turn."""
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

    async def room(self) -> None:
        """Wait until a publisher may publish more: its events are pushed no slower than it makes them."""
        while self._pending_bytes > PENDING_BYTES:
            await self._idle.wait()

    async def beyond(self, position: Position) -> None:
        """Wait until something after a position has come."""
        while self.position <= position:
            moved = asyncio.get_running_loop().create_future()
            self._moved.add(moved)
            try:
                await moved
            finally:
                self._moved.discard(moved)

    def join(self, follower: Follower) -> "asyncio.Future[bool]":
        """Push, from now on, to a follower that stands where the hub does.

        What is returned is done when its task must take over: True when it has everything, False when it lags.
        """
        follower.transport, follower.chunked = follower.stream.attach_writer(follower)
        key = follower.audience_key
        audience = self._audiences.get(key) or self._audiences.setdefault(key, Audience(*key))
        audience.followers.add(follower)
        self._joins += 1
        follower.live = True
        follower.released = asyncio.get_running_loop().create_future()
        if follower.transport is None:
            follower.release(done=False)
        return follower.released

    def leave(self, follower: Follower) -> None:
        """Push nothing more to a follower."""
        follower.live = False
        audience = self._audiences.get(follower.audience_key)
        if audience is not None:
            audience.followers.discard(follower)
            if not audience.followers:
                del self._audiences[follower.audience_key]
                audience.close()

    async def run(self) -> None:
        """Push what is delivered, until cancelled."""
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
        """Push what is pending: framed once for all, joined once a view, written once a follower."""
        events, self._pending, self._pending_bytes = self._pending, [], 0
        overrun, self._overrun = self._overrun, None
        before = position = self.position
        if overrun is not None or events:
            self.position = position = overrun if overrun is not None else events[-1].position
        for moved in self._moved:
            if not moved.done():
                moved.set_result(None)
        # What is missing, each follower's own task finds in the log, and says so.
        gap = overrun is not None or bool(events and not before.precedes(events[0].position))
        items = [] if gap else [framed(event, self._id_prefix) for event in events]
        # Who joins from here on stands after these events already, so all audiences are noted before the first await.
        noted = [(audience, tuple(audience.followers)) for audience in self._audiences.values()]
        joins, began = self._joins, time.monotonic()
        for audience, followers in noted:
            if gap:
                audience.release()
            elif audience.view.accepts is not None:
                self._leave_to_filter(audience, events)
            else:
                chosen = audience.select([item for item in items if audience.view.wants(item.event)], self._news.set)
                began = await self._push(audience, chosen, followers, position, joins, began)

    async def _push(
        self,
        audience: Audience,
        chosen: Sequence[Framed],
        followers: Sequence[Follower],
        after: Position,
        joins: int,
        began: float,
    ) -> float:
        """Push events to followers, who stand at `after` then; return when the loop last had its turn."""
        pieces = audience.pieces(chosen, after)
        push = self._push_some if audience.limited or audience.view.conflate or len(pieces) != 1 else _push_one
        for start in range(0, len(followers), SLICE):
            some: Sequence[Follower] = followers[start : start + SLICE]
            if self._joins != joins:  # one may have left and come back meanwhile, and be among them
                some = [follower for follower in some if follower.position < after]
            push(some, pieces, audience, chosen, after)
            if time.monotonic() - began >= TURN_SECONDS:
                await asyncio.sleep(0)
                began = time.monotonic()
        return began

    def _leave_to_filter(self, audience: Audience, events: Sequence[Event]) -> None:
        """Let a filter choose among events in its own time; followers of one that lags far behind read the log."""
        audience.backlog_bytes += sum(len(event.data) for event in events)
        if audience.backlog_bytes > PENDING_BYTES:
            audience.release()
            return
        audience.backlog += events
        if audience.filtering is None and (events or audience.held):
            audience.filtering = self._group.create_task(self._filter(audience))

    async def _filter(self, audience: Audience) -> None:
        """Push to an audience what its filter accepts, until its backlog is empty."""
        while True:
            events, audience.backlog, audience.backlog_bytes = audience.backlog, [], 0
            try:
                wanted = await self._filters.chosen(self._channel, audience.view, events)
            except Exception:
                log.exception("a filter of the channel %s failed", self._channel)
                audience.release()  # each follower fails by itself
                break
            chosen = audience.select([framed(event, self._id_prefix) for event in wanted], self._news.set)
            after = events[-1].position if events else audience.filtered
            audience.filtered = after
            followers = [follower for follower in audience.followers if follower.position < after]
            await self._push(audience, chosen, followers, after, self._joins, time.monotonic())
            if not audience.backlog:
                break
        audience.filtering = None

    def _push_some(
        self,
        followers: Sequence[Follower],
        pieces: Sequence[Pushed],
        audience: Audience,
        chosen: Sequence[Framed],
        after: Position,
    ) -> None:
        """Push several pieces, or to followers that may not want everything."""
        for follower in followers:
            mine = pieces
            if audience.view.conflate and chosen and follower.position >= chosen[0].event.position:
                # It joined after some of these had been held back for the others, and has them from the log.
                lacking = [item for item in chosen if item.event.position > follower.position]
                mine = audience.pieces(lacking, after)
            for piece in mine:
                if piece.too_large or (follower.remaining is not None and piece.events > follower.remaining):
                    follower.release(done=False)  # its task takes from the log as many as it wants, and as it may
                if not follower.live:
                    break
                if follower.remaining is not None:
                    follower.remaining -= piece.events
                _push(follower, piece, piece.last or follower.remaining == 0)
            if follower.live and not chosen and not audience.view.conflate:
                follower.position = after


def _push_one(followers: Sequence[Follower], pieces: Sequence[Pushed], *_: object) -> None:
    """Push one piece to followers that want it: the loop in which a server with many clients spends its time."""
    piece = pieces[0]
    for follower in followers:
        if piece.too_large:
            follower.release(done=False)
        if follower.live:
            _push(follower, piece, piece.last)


def _push(follower: Follower, piece: Pushed, done: bool) -> None:
    """Push a piece to a live follower, which has all that it wants then if `done`."""
    if done:  # before the write, from within which it may be said to fall behind: it lacks nothing any more
        follower.release(done=True)
    assert follower.transport is not None
    follower.transport.write(piece.wire)
    if not follower.pushed:
        follower.stream.note_first_byte()
    follower.pushed += piece.size
    follower.position = piece.after
