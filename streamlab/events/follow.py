"""A channel as the event stream of one client: resumed, then caught up, then live."""

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

from aiohttp import web

from streamlab.auth import client_of
from streamlab.streaming.event_stream import open_event_stream
from streamlab.streaming.resume import no_more_events, resume_id

from .channel import Channel
from .hub import Follower, Frame, FrameBatch, Hub, batch_frames, latest
from .log import BATCH_BYTES, END, ORIGIN, Event, Position
from .replay import CATCH_UP_BYTES, CatchUp
from .views import EVERYTHING, View

log = logging.getLogger(__name__)

BEGIN_SECONDS = 2.0
"""Maximum seconds that a client without an id waits for its headers while the log is read for the start."""


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
    """Send a channel as an event stream: the events after an id, then all that are published.

    `view` chooses among the events; None for all. The id is the header Last-Event-ID, or `after`. Without one, the
    stream starts with the last `tail` events of the view, with the first for which `since` is true (with both, the last
    of those from there on), or with the next event; a finite channel starts with its first. `limit` is the number of
    events after which it ends. An event `gap` reports what is missing between the id and the oldest retained event;
    after an invalid id, all retained events follow. `since` runs in a thread, as `accepts` of the view does.

    Raises Problem 429 when the followers of the channel use as many different filters as config.toml allows.

    Source: WHATWG HTML 9.2 (Last-Event-ID, 204 against reconnection).
    """
    after = resume_id(request, after)
    position = channel.position(after) if after else None
    if channel.finite and position and await _has_ended(channel, position):
        return no_more_events()
    view = view or EVERYTHING
    client = client_of(request)
    channel.events.filters.admit(channel.name, view, client)
    try:
        async with open_event_stream(request, headers=headers, heartbeat_seconds=None) as stream:
            follower = Follower(stream, view, position or ORIGIN, limit, channel.id_prefix)
            session = _Session(channel, follower)
            try:
                if not after:
                    # A client that sees the headers may publish at once and expect that event: find the position first.
                    stream.hold_headers(BEGIN_SECONDS)
                    await session.start(tail, since)
                    stream.send_headers()
                elif position is None:
                    await session.start_from_oldest()
                # An idle follower waits here, in no coroutine of the session: there may be thousands of them.
                done = limit == 0 or await session.catch_up()
                while not done:
                    done = await session.join_hub() or await session.catch_up()
            finally:
                session.close()
    finally:
        channel.events.filters.leave(channel.name, view, client)
    return stream


async def _has_ended(channel: Channel, position: Position) -> bool:
    """Return whether a client at a position has the end of its channel."""
    before = position._replace(offset=max(0, position.offset - 1))
    events = (await channel.events.log.read(channel.name, before, 1)).events
    return bool(events) and events[0].position == position and events[0].event == END


class _Session:
    """One request that follows a channel: it reads the log up to the position of the hub, which then pushes."""

    __slots__ = ("_channel", "_expect_contiguous", "_follower", "_hub")

    def __init__(self, channel: Channel, follower: Follower) -> None:
        self._channel = channel
        self._follower = follower
        self._hub: Hub | None = None
        """The hub of the channel, once the session has read the log."""
        self._expect_contiguous = True
        """Whether there is a gap unless the next event directly follows the position."""
        channel.events.add_follower(channel.name, follower)

    def close(self) -> None:
        """Leave the hub, and the followers of all channels."""
        channel, follower = self._channel, self._follower
        channel.events.remove_follower(channel.name, follower)
        if self._hub is not None:
            self._hub.leave(follower)
            channel.events.release_hub(channel)

    async def start(self, tail: int | None, since: Callable[[Event], bool] | None) -> None:
        """Find the start without an id."""
        follower = self._follower
        if self._channel.finite and tail is None and since is None:
            self._expect_contiguous = False
            return
        follower.position = last = await self._channel.last()
        if not tail and since is None:
            return
        if follower.view == EVERYTHING and since is None and tail:
            follower.position, self._expect_contiguous = last._replace(offset=max(0, last.offset - tail)), False
            return
        wanted = deque[Position](maxlen=tail)
        async for event in self._wanted_until(last, since):
            wanted.append(event.position)
            if tail is None:
                break
        if wanted:
            follower.position = wanted[0]._replace(offset=wanted[0].offset - 1)

    async def _wanted_until(self, last: Position, since: Callable[[Event], bool] | None) -> AsyncIterator[Event]:
        """Yield the events of the view, up to a position, from the first for which `since` is true."""
        channel, after = self._channel, ORIGIN
        while after < last:
            caught_up = await self._read(after, BATCH_BYTES)
            if caught_up.first is None:
                return
            events = caught_up.events
            if since is not None and events:
                begun = await channel.events.filters.chosen(channel.name, View(accepts=since), events)
                events = [event for event in events if begun and event.position >= begun[0].position]
                since = None if begun else since
            for event in events:
                if event.position > last:
                    return
                yield event
            after = caught_up.until

    async def start_from_oldest(self) -> None:
        """Start from the oldest retained event because the id of the client is invalid."""
        first = (await self._channel.events.log.read(self._channel.name, ORIGIN, 1)).events
        start = first[0].position if first else await self._channel.last()
        await self.send_gap(None, start._replace(offset=max(0, start.offset - 1)) if first else start)
        self._expect_contiguous = False

    def join_hub(self) -> Awaitable[bool]:
        """Return what to wait for before the log is read again, with True when the stream is complete."""
        channel, follower = self._channel, self._follower
        if self._hub is None:
            self._hub = channel.events.acquire_hub(channel, follower.position)
        if follower.position == self._hub.position:
            return self._hub.join(follower)
        return self._wait_for(self._hub)

    async def _wait_for(self, hub: Hub) -> bool:
        """Wait until the hub has the events that were read from the log."""
        if self._follower.position > hub.position:
            await hub.wait_past(hub.position)
        return False

    async def catch_up(self) -> bool:
        """Send the events of the log after the position of the follower; return True when the stream is complete."""
        follower, position, held = self._follower, self._follower.position, list[Frame]()
        if self._hub is not None:
            self._hub.leave(follower)
        while True:
            caught_up = None  # hold no events in memory while the client is slow
            await self._follower.stream.wait_writable()
            caught_up = await self._read(position)
            if caught_up.first is None:
                break
            if self._expect_contiguous and not position.precedes(caught_up.first):
                await self.send_gap(position, caught_up.first._replace(offset=caught_up.first.offset - 1))
            position, self._expect_contiguous = caught_up.until, True
            if follower.view.conflate:
                held = latest(held + caught_up.frames)
            elif await (
                self._send(caught_up.batches, position)
                if follower.remaining is None
                else self._send_some(caught_up.frames, position)
            ):
                return True
        if held and await self._send_some(held, position):
            return True
        if position != caught_up.last:
            # A channel may have begun with a checkpoint alone: then nothing lies between its origin and its position.
            if self._expect_contiguous and not (position == ORIGIN and not caught_up.last.offset):
                await self.send_gap(position, caught_up.last)
            follower.position = caught_up.last
        self._expect_contiguous = True
        return False

    async def _read(self, after: Position, size: int = CATCH_UP_BYTES) -> CatchUp:
        channel = self._channel
        return await channel.events.reads.read(channel.name, channel.id_prefix, after, self._follower.view, size)

    async def _send_some(self, items: Sequence[Frame], after: Position) -> bool:
        """Write frames up to the limit; return True when the stream is complete."""
        remaining = self._follower.remaining
        if remaining is not None and remaining <= len(items):
            items, after = items[:remaining], items[remaining - 1].event.position
        return await self._send(batch_frames(items, after), after)

    async def _send(self, batches: Sequence[FrameBatch], after: Position) -> bool:
        """Write batches as the client takes them; return True when the stream is complete."""
        follower = self._follower
        for batch in batches:
            await self._write(batch.wire, batch.after)
            if follower.remaining is not None:
                follower.remaining -= batch.events
        follower.position = after
        return follower.remaining == 0 or any(batch.is_last for batch in batches)

    async def send_gap(self, before: Position | None, after: Position) -> None:
        """Report that the events after one position, up to another, are missing; None after an invalid id."""
        if before is None:
            reason, missing = "the id is not one of this stream", None
        elif before.epoch != after.epoch:
            reason, missing = "the history of that id is lost", None
        elif before > after:
            reason, missing = "the id is ahead of this stream", 0
        else:
            reason, missing = "the events after that id are no longer retained", after.offset - before.offset
        self._follower.stream.send_headers()
        await self._follower.stream.gap(
            reason,
            missing=missing,
            id=f"{self._channel.id_prefix}{after}.gap",
            after=None if before is None else f"{self._channel.id_prefix}{before}",
            until=f"{self._channel.id_prefix}{after}",
        )
        self._follower.position = after

    async def _write(self, body: bytes, after: Position) -> None:
        """Write whole events, after which the follower is at a position."""
        self._follower.stream.send_headers()
        await self._follower.stream.write(body)
        self._follower.position = after
