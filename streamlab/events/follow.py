"""A channel as the event stream of one client: resumed, caught up, then live."""

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from aiohttp import web

from streamlab.streaming.event_stream import EventStream, open_event_stream
from streamlab.streaming.resume import no_more_events, resume_id

from .channel import Channel
from .hub import Cut, Follower, Framed, cuts, latest
from .log import BATCH_BYTES, END, ORIGIN, Event, Position
from .replay import CATCH_UP_BYTES, Past
from .views import EVERYTHING, View

log = logging.getLogger(__name__)

BEGIN_SECONDS = 2.0
"""How long a client without an id waits for its headers while the log is asked where it stands."""


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
    asked = resume_id(request, after)
    position = channel.position(asked) if asked else None
    if channel.finite and position and await _has_ended(channel, position):
        return no_more_events()
    view = view or EVERYTHING
    with channel.events.filters.admitted(channel.name, view):
        async with open_event_stream(request, headers=headers, heartbeat_seconds=None) as stream:
            follower = Follower(stream, view, position or ORIGIN, limit, channel.id_prefix)
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
        self._stream: EventStream = follower.stream
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
        return await channel.events.reads.read(channel.name, channel.id_prefix, after, self._follower.view, size)

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
        self._stream.send_headers()
        await self._stream.gap(
            reason,
            missing=missing,
            id=f"{self._channel.id_prefix}{after}.gap",
            after=None if before is None else f"{self._channel.id_prefix}{before}",
            until=f"{self._channel.id_prefix}{after}",
        )
        self._follower.position = after

    async def _write(self, body: bytes, after: Position) -> None:
        """Write whole events, after which the follower is at a position."""
        self._stream.send_headers()
        await self._stream.write(body)
        self._follower.position = after
