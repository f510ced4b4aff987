"""Publish once, replay from an id, fan out to everyone: channels."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from aiohttp import web

from . import sse
from .eventlog import (
    BATCH_BYTES,
    END,
    LATEST,
    LEASE_SECONDS,
    ORIGIN,
    RENEW_SECONDS,
    Append,
    Draft,
    Event,
    EventLog,
    EventLogError,
    LeaseLost,
    Position,
    Retention,
)
from .eventlog_sqlite import SqliteLog
from .hub import PIECE_BYTES, SLICE, Cut, Follower, Framed, Hub, cuts, latest
from .replay import BATCH_EVENTS, CATCH_UP_BYTES, Past, Reads
from .streaming import Piece, Stream, open_stream
from .views import EVERYTHING, MAX_FILTERS, Filters, View

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
"""How often every follower gets a comment; proxies and clients give up after 15 s and more of silence."""

BEGIN_SECONDS = 2.0
"""How long a client without an id waits for its headers while the log is asked where it stands."""

INSIST_SECONDS = 1.0
"""How long a producer that insists waits before it tries again."""

EVENT_BYTES = 8 * 1024 * 1024
"""The largest data an event may have."""


_LEASE: ContextVar[str] = ContextVar("lease", default="")
"""The lease for whose holder the running code produces: what it publishes is rejected once another has that."""


class Channel:
    """A named, ordered stream of events that any number of clients follow, from any id.

    A value: making one costs nothing, and what it names exists from the first event on. `finite` says that it is to
    end with an event `end`, after which a client that comes back is told 204. `stem` stands before the ids of its
    events, always the same for a name: where one route serves many channels, the id that a client comes back with says
    which it means.
    """

    def __init__(
        self, events: "Events", name: str, retention: Retention, *, finite: bool = False, stem: str = ""
    ) -> None:
        self.events = events
        self.name = name
        self.retention = retention
        self.finite = finite
        self.stem = stem

    def position(self, id: str) -> Position | None:  # noqa: A002
        """Read the place in this channel that an event's id means; None where it means none."""
        return Position.parse(id.removeprefix(self.stem)) if id.startswith(self.stem) else None

    async def publish(self, data: Any, event: str = "", *, key: str = "") -> str:
        """Publish an event and return its id, once the log has it; followers get it after that, never before.

        `data` is sent as JSON; a str or bytes (UTF-8) as it is. `event` is its name, `key` what it is about (views
        choose by it). Waits while the log's server is away. Raises ValueError for data that is no JSON or larger than
        EVENT_BYTES, EventLogError where the event is not kept.
        """
        return (await self.publish_all([draft(data, event, key=key)]))[0]

    async def publish_all(
        self, drafts: Sequence[Draft], *, checkpoint: tuple[str, str] | None = None, insist: bool = False
    ) -> list[str]:
        """Publish events together, or none of them, and return their ids.

        `checkpoint`, a name and a text, is kept with them: where their producer stands, for `checkpoint` to find after
        a crash. With `insist` a refusal of the log is not raised, but waited out: a producer does not give up.
        """
        if not drafts and checkpoint is None:
            return []
        append = Append(self.name, drafts, self.retention, checkpoint, _LEASE.get())
        while True:
            try:
                last = await self.events.log.append(append)
                break
            except EventLogError as error:
                if not insist or isinstance(error, LeaseLost):
                    raise
                log.warning("what is published on %s waits: %s", self.name, error)
                await asyncio.sleep(INSIST_SECONDS)
        await self.events.room(self.name)
        first = last.offset - len(drafts) + 1
        return [f"{self.stem}{Position(last.epoch, first + number)}" for number in range(len(drafts))]

    async def checkpoint(self, name: str) -> str | None:
        """Return the text that was last published under a name; None where there is none."""
        return await self.events.log.checkpoint(self.name, name)

    async def last(self) -> Position:
        """Return the position of the newest event; ORIGIN where there was none."""
        return (await self.events.log.read(self.name, LATEST, 1)).last

    async def read(self, after: Position = ORIGIN) -> AsyncIterator[Event]:
        """Go through the events that are kept, from a position on, to the newest."""
        while (batch := await self.events.log.read(self.name, after, BATCH_EVENTS)).events:
            for event in batch.events:
                yield event
            after = batch.events[-1].position

    async def listen(self, after: Position) -> AsyncIterator[Event]:
        """Go through the events after a position, and all that will be published."""
        hub = self.events.enter(self, after)
        try:
            while True:
                async for event in self.read(after):
                    yield event
                    after = event.position
                await hub.beyond(after)
        finally:
            self.events.leave(self)

    async def delete(self) -> None:
        """Forget the channel and all that belongs to it."""
        await self.events.log.delete(self.name)


def draft(data: Any, event: str = "", *, key: str = "") -> Draft:
    """Make an event to be published; raises ValueError where it cannot be one."""
    encoded = sse.encode(data)
    if len(encoded) > EVENT_BYTES:
        raise ValueError(f"an event of {len(encoded)} bytes is larger than {EVENT_BYTES}")
    if any(character in event for character in "\r\n\0"):
        raise ValueError(f"the name of an event holds a line break or NUL: {event!r}")
    return Draft(encoded, event, key)


class Events:
    """The channels of one server: their log, and who follows them."""

    def __init__(self, log: EventLog, *, keep: Retention | None = None, max_filters: int = MAX_FILTERS) -> None:
        self.log = log
        self.filters = Filters(max_filters)
        self.reads = Reads(log, self.filters)
        self._keep = keep or Retention()
        self._hubs: dict[str, tuple[Hub, asyncio.Task[None]]] = {}
        self.followers: set[Follower] = set()
        """Who follows a channel, and gets heartbeats."""
        self._group: asyncio.TaskGroup | None = None

    def channel(self, name: str, *, keep: Retention | None = None, finite: bool = False, stem: str = "") -> Channel:
        """Name a channel; without `keep` it keeps what config.toml says under [events]."""
        return Channel(self, name, keep or self._keep, finite=finite, stem=stem)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold the log open and the followers alive; raises EventLogError where the log cannot be opened."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.log.opened())
            await stack.enter_async_context(self.filters)
            self._group = await stack.enter_async_context(asyncio.TaskGroup())
            heartbeats = self._group.create_task(self._beat())
            try:
                yield
            finally:
                heartbeats.cancel()
                for _, task in self._hubs.values():
                    task.cancel()

    async def checkpoints(self, prefix: str, name: str) -> Mapping[str, str]:
        """Return the texts last published under a name, of all channels whose own names begin with a prefix."""
        return await self.log.checkpoints(prefix, name)

    def state(self) -> Mapping[str, object]:
        """How the log is, for /health."""
        return self.log.state()

    async def room(self, channel: str) -> None:
        """Wait until followers of this process have what was published, as far as they are quick enough."""
        if channel in self._hubs:
            await self._hubs[channel][0].room()

    def enter(self, channel: Channel, position: Position) -> Hub:
        """Lend the hub of a channel until `leave`; the first who needs it makes it at its own position."""
        if channel.name not in self._hubs:
            assert self._group is not None, "the server has not started, or is over"
            hub = Hub(channel.name, position, channel.stem, self.filters)
            self._hubs[channel.name] = hub, self._group.create_task(hub.run())
            self.log.watch(channel.name, position, hub.deliver)
        hub, _ = self._hubs[channel.name]
        hub.members += 1
        return hub

    def leave(self, channel: Channel) -> None:
        """Give a hub back; the last who does takes it down."""
        hub, task = self._hubs[channel.name]
        hub.members -= 1
        if not hub.members:
            del self._hubs[channel.name]
            self.log.unwatch(channel.name)
            task.cancel()

    async def _beat(self) -> None:
        heartbeat = Piece(sse.HEARTBEAT)
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            for number, follower in enumerate(tuple(self.followers), start=1):
                if follower in self.followers and follower.stream.headers_sent and not follower.stream.torn:
                    follower.stream.push(heartbeat)
                if number % SLICE == 0:
                    await asyncio.sleep(0)

    async def exclusively(self, lease: str, produce: Callable[[], Awaitable[None]]) -> None:
        """Run `produce` in one process of all that share the log, for as long as it takes; wait while another runs it.

        When the process that runs it dies, another begins within LEASE_SECONDS and a little more. `produce` is
        cancelled if the lease is lost: the log's server was away for too long, or the process was stopped. What it
        publishes then is rejected (LeaseLost), its checkpoint too, so that no other process's events are doubled.
        """
        done = False
        while not done:
            await self._wait_for(lease)
            try:
                done = await self._produce(lease, produce)
            finally:
                await self.log.release(lease)

    async def if_free(self, lease: str, produce: Callable[[], Awaitable[None]]) -> bool:
        """Run `produce` as `exclusively` does, unless another process has the lease; whether it was run to its end.

        Raises EventLogError where the log cannot tell.
        """
        async with self.lease(lease) as held:
            return held and await self._produce(lease, produce)

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[bool]:
        """Hold a lease in the block if nobody has it, and say whether that is so; the block is short.

        A lease belongs to a process: two blocks of one must not want the same. Raises EventLogError where the log
        cannot tell.
        """
        held = await self.log.hold(name)
        try:
            yield held
        finally:
            if held:
                await self.log.release(name)

    async def _wait_for(self, lease: str) -> None:
        while True:
            try:
                if await self.log.hold(lease):
                    return
            except EventLogError:
                pass
            await asyncio.sleep(RENEW_SECONDS)

    async def _produce(self, lease: str, produce: Callable[[], Awaitable[None]]) -> bool:
        """Run the producer while the lease is held; True when it is done by itself."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_fenced(lease, produce))
            sure = loop.time()
            while not (await asyncio.wait({task}, timeout=RENEW_SECONDS))[0]:
                asked = loop.time()
                try:
                    held, sure = await self.log.hold(lease), asked
                except EventLogError:
                    held = loop.time() - sure < LEASE_SECONDS - RENEW_SECONDS
                if not held:
                    log.warning("the lease %s is lost; another process may have it", lease)
                    task.cancel()
                    return False
        if not (done := task.cancelled() or task.result()):
            log.warning("the lease %s is lost: what was published was rejected", lease)
        return done


async def _fenced(lease: str, produce: Callable[[], Awaitable[None]]) -> bool:
    """Run a producer, and return whether it came to its end with the lease."""
    _LEASE.set(lease)  # in this task, and those that it starts
    lost = False
    try:
        await produce()
    except* LeaseLost:
        lost = True
    return not lost


def open_log(url: str) -> EventLog:
    """Choose the engine of an address: `sqlite:///PATH`, `sqlite://` (in memory), `redis://`, `rediss://`, `unix://`.

    Nothing is opened yet. Raises EventLogError where the engine's library is missing or the address is none.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        return SqliteLog(Path(rest.removeprefix("/")) if rest else None)
    try:
        from .eventlog_redis import RedisLog
    except ModuleNotFoundError as error:
        raise EventLogError(f"needs the Python module {error.name!r}: pip install 'streamlab[redis]'") from None
    return RedisLog(url)


EVENTS = web.AppKey("events", Events)


async def follow(
    request: web.Request,
    channel: Channel,
    *,
    view: View | None = None,
    after: str = "",
    tail: int | None = None,
    since: Callable[[Event], bool] | None = None,
    limit: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> web.StreamResponse:
    """Answer a request with a channel as an event stream: what follows an id, then everything as it is published.

    `view` chooses among the events; None for all. The id is the header Last-Event-ID, or `after`. Without one, the
    stream begins with the last `tail` events that the view wants, with the first for which `since` is true (with both,
    the last of those from there on), or with the next event to come; a finite channel begins with its first. `limit`
    ends it after so many events. What is missing between an id and the oldest event kept is told by an event `gap`;
    after an id that is none, everything kept follows. `since` runs in a thread, as the view's `accepts` does.

    Raises Problem 429 where the followers of the channel use as many different filters as config.toml allows.

    Source: WHATWG HTML 9.2 (Last-Event-ID, 204 against reconnection).
    """
    asked = request.headers.get("Last-Event-ID") or after
    position = channel.position(asked) if asked else None
    if channel.finite and position and await _has_ended(channel, position):
        return web.Response(status=204, headers={"Cache-Control": "no-store"})
    view = view or EVERYTHING
    with channel.events.filters.admitted(channel.name, view):
        async with open_stream(request, sse.MEDIA_TYPE, headers=headers) as stream:
            follower = Follower(stream, view, position or ORIGIN, limit, channel.stem)
            stream.event_id = follower.event_id
            channel.events.followers.add(follower)
            try:
                session = _Session(channel, follower)
                if not asked:
                    # Who sees the headers may publish at once, and is to get that: the position is known before.
                    stream.hold_headers(BEGIN_SECONDS)
                    await session.begin(tail, since)
                    stream.send_headers()
                elif position is None:
                    await session.begin_anew()
                await session.run()
            finally:
                channel.events.followers.discard(follower)
    return stream


async def _has_ended(channel: Channel, position: Position) -> bool:
    """Whether a client that stands at a position has the end of its channel."""
    before = position._replace(offset=max(0, position.offset - 1))
    events = (await channel.events.log.read(channel.name, before, 1)).events
    return bool(events) and events[0].position == position and events[0].event == END


class _Session:
    """One request that follows a channel: it reads the log until it is level with the hub, which then pushes."""

    __slots__ = ("_channel", "_follower", "_stream", "_sure")

    def __init__(self, channel: Channel, follower: Follower) -> None:
        self._channel = channel
        self._follower = follower
        self._stream: Stream = follower.stream
        self._sure = True
        """Whether the next event must be the very next one of the log, or something is missing."""

    async def begin(self, tail: int | None, since: Callable[[Event], bool] | None) -> None:
        """Find where to begin without an id."""
        follower = self._follower
        if self._channel.finite and tail is None and since is None:
            self._sure = False
            return
        follower.position = last = await self._channel.last()
        if not tail and since is None:
            return
        if follower.view == EVERYTHING and since is None and tail:
            follower.position, self._sure = last._replace(offset=max(0, last.offset - tail)), False
            return
        wanted = deque[Position](maxlen=tail)
        async for event in self._past(last, since):
            wanted.append(event.position)
            if tail is None:
                break
        if wanted:
            follower.position = wanted[0]._replace(offset=wanted[0].offset - 1)

    async def _past(self, last: Position, since: Callable[[Event], bool] | None) -> AsyncIterator[Event]:
        """Go through the events that the view wants, up to a position, from the first for which `since` is true."""
        channel, after = self._channel, ORIGIN
        while after < last:
            past = await self._read(after, BATCH_BYTES)
            if past.first is None:
                return
            events = past.events
            if since is not None and events:
                begun = await channel.events.filters.chosen(channel.name, View(accepts=since), events)
                events = [event for event in events if begun and event.position >= begun[0].position]
                since = None if begun else since
            for event in events:
                if event.position > last:
                    return
                yield event
            after = past.until

    async def begin_anew(self) -> None:
        """Begin with the oldest event kept, after an id that is none of ours."""
        first = (await self._channel.events.log.read(self._channel.name, ORIGIN, 1)).events
        start = first[0].position if first else await self._channel.last()
        await self.tell_gap(None, start._replace(offset=max(0, start.offset - 1)) if first else start)
        self._sure = False

    async def run(self) -> None:
        """Follow until the channel ends, or the client has as many events as it wanted."""
        follower = self._follower
        done = follower.remaining == 0 or await self._catch_up()
        if done:
            return
        hub = self._channel.events.enter(self._channel, follower.position)
        try:
            while not done:
                if follower.position == hub.position:
                    done = await hub.join(follower)
                    hub.leave(follower)
                elif follower.position > hub.position:
                    await hub.beyond(hub.position)  # what the log has given already is on its way to the hub
                done = done or await self._catch_up()
        finally:
            hub.leave(follower)
            self._channel.events.leave(self._channel)

    async def _catch_up(self) -> bool:
        """Send what the log has after the follower's position; True when the client has all that it wanted."""
        follower, position, held = self._follower, self._follower.position, list[Framed]()
        while True:
            past = None  # nothing is held while the client is waited for
            await self._stream.ready()
            past = await self._read(position)
            if past.first is None:
                break
            if self._sure and not position.precedes(past.first):
                await self.tell_gap(position, past.first._replace(offset=past.first.offset - 1))
            position, self._sure = past.until, True
            if follower.view.conflate:
                held = latest(held + past.frames)
            elif await (
                self._send(past.cuts, position)
                if follower.remaining is None
                else self._send_some(past.frames, position)
            ):
                return True
        if held and await self._send_some(held, position):
            return True
        if position != past.last:
            # A channel may have begun with a checkpoint alone: then nothing lies between its origin and its place.
            if self._sure and not (position == ORIGIN and not past.last.offset):
                await self.tell_gap(position, past.last)
            follower.position = past.last
        self._sure = True
        return False

    async def _read(self, after: Position, size: int = CATCH_UP_BYTES) -> Past:
        channel = self._channel
        return await channel.events.reads.read(channel.name, channel.stem, after, self._follower.view, size)

    async def _send_some(self, items: Sequence[Framed], after: Position) -> bool:
        """Write as many frames as the client wants; True when it has all that it wanted."""
        remaining = self._follower.remaining
        if remaining is not None and remaining <= len(items):
            items, after = items[:remaining], items[remaining - 1].event.position
        return await self._send(cuts(items, after), after)

    async def _send(self, pieces: Sequence[Cut], after: Position) -> bool:
        """Write pieces as the client takes them; True when it has all that it wanted."""
        follower = self._follower
        for piece in pieces:
            await self._write(piece.body, piece.after)
            if follower.remaining is not None:
                follower.remaining -= piece.events
        follower.position = after
        return follower.remaining == 0 or any(piece.last for piece in pieces)

    async def tell_gap(self, before: Position | None, after: Position) -> None:
        """Say that the events after one position, up to another, are missing; None: after an id that is none."""
        if before is None:
            reason, missing = "the id is none of this stream", None
        elif before.epoch != after.epoch:
            reason, missing = "the history of that id is lost", None
        elif before > after:
            reason, missing = "the id is ahead of this stream", 0
        else:
            reason, missing = "the events after that id are not kept any more", after.offset - before.offset
        data = {
            "reason": reason,
            "missing": missing,
            "after": None if before is None else f"{self._channel.stem}{before}",
            "until": f"{self._channel.stem}{after}",
        }
        await self._write(sse.frame(data, "gap", id=f"{self._channel.stem}{after}.gap"), after)

    async def _write(self, body: bytes, after: Position) -> None:
        """Write whole events; a large one in steps, so that a slow client does not fill this process with it."""
        self._stream.send_headers()
        for offset in range(0, len(body), PIECE_BYTES):
            piece = Piece(body[offset : offset + PIECE_BYTES])
            while not self._stream.push(piece):
                await self._stream.ready()
            self._stream.torn = offset + PIECE_BYTES < len(body)
        self._follower.position = after
