"""Channels of events: publishing, reading, leadership."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aiohttp import web

from streamlab import sse
from streamlab.ticks import tick, until_tick

from .hub import SLICE, Follower, Hub
from .log import (
    BATCH_BYTES,
    LATEST,
    LEASE_SECONDS,
    ORIGIN,
    RENEW_SECONDS,
    Append,
    Batch,
    Copy,
    EncodedEvent,
    Event,
    EventLog,
    EventLogError,
    LeaseLost,
    Position,
    Retention,
)
from .replay import BATCH_EVENTS, Reads
from .sqlite import SqliteLog
from .views import Filters

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
"""Interval between two heartbeats, in seconds; proxies and clients give up after 15 s and more of silence."""

RETRY_SECONDS = 1.0
"""Delay before a publisher with `retry_forever` tries again, in seconds."""

EVENT_BYTES = 8 * 1024 * 1024
"""Maximum data of an event, in bytes."""


_NOTHING: Mapping[str, Any] = MappingProxyType({})

_LEASE: ContextVar[str] = ContextVar("lease", default="")
"""The lease under which the running code publishes: its events are rejected once the lease is lost."""


class Channel:
    """A named, ordered stream of events that any number of clients follow, from any id.

    A value: creating one costs nothing, and the channel exists from its first event on. A `finite` one ends with an
    event `end`, after which a client that reconnects gets 204. `id_prefix` precedes the ids of its events, always the
    same for a name: where one route serves many channels, the id of a client that reconnects names its channel.

    Every method that uses the log raises EventLogError where it cannot be read or written; a handler that lets it
    through sends 503.
    """

    def __init__(
        self, events: "Events", name: str, retention: Retention, *, finite: bool = False, id_prefix: str = ""
    ) -> None:
        self.events = events
        self.name = name
        self.retention = retention
        self.finite = finite
        self.id_prefix = id_prefix

    def position(self, id: str) -> Position | None:  # noqa: A002
        """Return the position that an event's id has in this channel; None for an invalid id."""
        return Position.parse(id.removeprefix(self.id_prefix)) if id.startswith(self.id_prefix) else None

    async def publish(self, data: Any, event: str = "", *, key: str = "") -> str:
        """Publish an event and return its id, once the log has it; followers get it after that, never before.

        `data` is sent as JSON; a str or bytes (UTF-8) as it is. `event` is its name, `key` its subject (views choose by
        it). Waits while the server of the log is unavailable. Raises ValueError for data that is not JSON or larger
        than EVENT_BYTES, EventLogError if the event was not stored.
        """
        return (await self.publish_all([encode_event(data, event, key=key)]))[0]

    async def publish_all(
        self, drafts: Sequence[EncodedEvent], *, checkpoint: tuple[str, str] | None = None, retry_forever: bool = False
    ) -> list[str]:
        """Publish events together, or none of them, and return their ids.

        `checkpoint`, a name and a text, is stored with them: the position of their producer, which `checkpoint` returns
        after a crash. With `retry_forever`, retries until the log accepts the events.
        """
        if not drafts and checkpoint is None:
            return []
        checkpoints = dict((checkpoint,)) if checkpoint else {}
        while True:
            try:
                last = await self.append(drafts, checkpoints=checkpoints)
                return self.ids(last, len(drafts))
            except EventLogError as error:
                if not retry_forever or isinstance(error, LeaseLost):
                    raise
                log.warning("publishing on %s is retried: %s", self.name, error)
                await asyncio.sleep(RETRY_SECONDS)

    async def append(
        self,
        drafts: Sequence[EncodedEvent],
        *,
        checkpoints: Mapping[str, str | None] = _NOTHING,
        expected: Mapping[str, str | None] = _NOTHING,
        counts: Mapping[str, int] = _NOTHING,
        located: str = "",
        copy: Copy | None = None,
    ) -> Position:
        """Add events together with checkpoints, or nothing at all, and return the position of the last event.

        The text None deletes a checkpoint; `located` is the one before whose text that position is stored.
        `expected` are the texts that checkpoints must have before (None: must not exist), or Conflict is raised with
        those that they have: so two clients cannot both change what only one may. `counts` are added to checkpoints
        that count. `copy` are events of another channel, for the beginning of a new one. Without events the channel
        exists nevertheless. Raises EventLogError as `publish` does.
        """
        append = Append(self.name, drafts, self.retention, checkpoints, expected, counts, located, copy, _LEASE.get())
        last = await self.events.log.append(append)
        await self.events.wait_for_capacity(self.name)
        return last

    def ids(self, last: Position, count: int) -> list[str]:
        """Return the ids of the last `count` events that were appended together."""
        return [f"{self.id_prefix}{Position(last.epoch, last.offset - back)}" for back in reversed(range(count))]

    async def look(
        self, after: Position, names: Sequence[str] = (), *, limit: int = BATCH_EVENTS, size: int = BATCH_BYTES
    ) -> Batch:
        """Return up to `limit` events after a position, the last position, and checkpoints by name, of one moment.

        They have at most `size` bytes of data, but there is at least one, if there are any.
        """
        return await self.events.log.read(self.name, after, limit, size, names)

    @asynccontextmanager
    async def watched(self, after: Position) -> AsyncIterator[Callable[[Position], Awaitable[Sequence[Event]]]]:
        """Yield a function that waits until an event after a position has come, from `after` on.

        It returns those that directly follow the position, or none where they are not in memory: read them then.
        """
        hub = self.events.acquire_hub(self, after)
        try:
            yield hub.wait_past
        finally:
            self.events.release_hub(self)

    async def extend(self, seconds: float) -> None:
        """Delete the channel, if it expires, not before `seconds` from now."""
        await self.events.log.extend(self.name, seconds)

    async def checkpoint(self, name: str) -> str | None:
        """Return the text that was last published under a name; None if there is none."""
        return await self.events.log.checkpoint(self.name, name)

    async def last(self) -> Position:
        """Return the position of the newest event; ORIGIN if there was none."""
        return (await self.events.log.read(self.name, LATEST, 1)).last

    async def read(self, after: Position = ORIGIN) -> AsyncIterator[Event]:
        """Yield the retained events after a position, to the newest."""
        while (batch := await self.events.log.read(self.name, after, BATCH_EVENTS)).events:
            for event in batch.events:
                yield event
            after = batch.events[-1].position

    async def listen(self, after: Position) -> AsyncIterator[Event]:
        """Yield the events after a position, and all that will be published."""
        async with self.watched(after) as wait_past:
            while True:
                async for event in self.read(after):
                    yield event
                    after = event.position
                while events := await wait_past(after):
                    for event in events:
                        yield event
                        after = event.position

    async def wait_until_followed(self, seconds: float) -> None:
        """Wait until somebody follows the channel, or may do so in another process; for `seconds` at most.

        For a source that simulates: while nobody follows it, it need not publish often.
        """
        followed = self.events.followed(self.name)
        if not followed.is_set() and not self.events.log.is_shared():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await followed.wait()

    async def delete(self) -> None:
        """Delete the channel, with its events and checkpoints."""
        await self.events.log.delete(self.name)


def encode_event(data: Any, event: str = "", *, key: str = "") -> EncodedEvent:
    """Return an event for `publish_all`; raises ValueError for invalid data or an invalid name."""
    encoded = sse.encode(data)
    if len(encoded) > EVENT_BYTES:
        raise ValueError(f"an event of {len(encoded)} bytes is larger than {EVENT_BYTES}")
    if any(character in event for character in "\r\n\0"):
        raise ValueError(f"the name of an event holds a line break or NUL: {event!r}")
    return EncodedEvent(encoded, event, key)


class Events:
    """The channels of one server: their log, and their followers."""

    def __init__(self, log: EventLog, *, retention: Retention | None = None, filters: Filters | None = None) -> None:
        self.log = log
        self.filters = filters or Filters()
        self.reads = Reads(log, self.filters)
        self._retention = retention or Retention()
        self._hubs: dict[str, tuple[Hub, asyncio.Task[None]]] = {}
        self.followers: set[Follower] = set()
        """The followers of all channels, which get heartbeats."""
        self._counts: Counter[str] = Counter()
        """The number of followers of each channel that has any."""
        self._followed: dict[str, asyncio.Event] = {}
        """Of each channel whose source has asked: set while it has followers here."""
        self._group: asyncio.TaskGroup | None = None

    def add_follower(self, channel: str, follower: Follower) -> None:
        """Note a follower of a channel."""
        self.followers.add(follower)
        self._counts[channel] += 1
        if (followed := self._followed.get(channel)) is not None:
            followed.set()

    def remove_follower(self, channel: str, follower: Follower) -> None:
        """Note that a follower has left."""
        self.followers.discard(follower)
        self._counts[channel] -= 1
        if not self._counts[channel]:
            del self._counts[channel]
            if (followed := self._followed.get(channel)) is not None:
                followed.clear()

    def followed(self, channel: str) -> asyncio.Event:
        """Return an event that is set while a channel has followers in this process."""
        if (followed := self._followed.get(channel)) is None:
            followed = self._followed[channel] = asyncio.Event()
            if self._counts[channel]:
                followed.set()
        return followed

    def channel(
        self, name: str, *, retention: Retention | None = None, finite: bool = False, id_prefix: str = ""
    ) -> Channel:
        """Return a channel by name; `retention` defaults to that of [events] in config.toml."""
        return Channel(self, name, retention or self._retention, finite=finite, id_prefix=id_prefix)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold the log open and send heartbeats; raises EventLogError if the log cannot be opened."""
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
        """Return the state of the log, for /health."""
        return self.log.state()

    async def wait_for_capacity(self, channel: str) -> None:
        """Apply back-pressure: wait while too many bytes of a channel wait to be pushed in this process."""
        if channel in self._hubs:
            await self._hubs[channel][0].wait_for_capacity()

    def acquire_hub(self, channel: Channel, position: Position) -> Hub:
        """Return the hub of a channel until `release_hub`; the first caller creates it at its position."""
        if channel.name not in self._hubs:
            assert self._group is not None, "the server has not started, or has ended"
            hub = Hub(channel.name, position, channel.id_prefix, self.filters)
            self._hubs[channel.name] = hub, self._group.create_task(hub.run())
            self.log.watch(channel.name, position, hub.deliver)
        hub, _ = self._hubs[channel.name]
        hub.users += 1
        return hub

    def release_hub(self, channel: Channel) -> None:
        """Release a hub; the last caller stops it."""
        hub, task = self._hubs[channel.name]
        hub.users -= 1
        if not hub.users:
            del self._hubs[channel.name]
            self.log.unwatch(channel.name)
            task.cancel()

    async def _beat(self) -> None:
        while True:
            await tick(HEARTBEAT_SECONDS)
            for number, follower in enumerate(tuple(self.followers), start=1):
                if follower in self.followers:
                    follower.beat()
                if number % SLICE == 0:
                    await asyncio.sleep(0)

    async def run_as_leader(self, lease: str, produce: Callable[[], Awaitable[None]]) -> None:
        """Run `produce` to its end in one of the processes that share the log; wait while another process runs it.

        When the process that runs it dies, another starts after little more than LEASE_SECONDS. `produce` is cancelled
        when the lease is lost: the server of the log was unavailable for too long, or the process was suspended. Events
        that it publishes after that are rejected (LeaseLost) with their checkpoint, so that none is published twice.
        """
        done = False
        while not done:
            await self._wait_for(lease)
            try:
                done = await self._produce(lease, produce)
            finally:
                await self.log.release(lease)

    async def try_run_as_leader(self, lease: str, produce: Callable[[], Awaitable[None]]) -> bool:
        """Run `produce` as `run_as_leader` does, unless another process has the lease.

        Returns whether it ran to its end. Raises EventLogError if the log is unavailable.
        """
        async with self.lease(lease) as held:
            return held and await self._produce(lease, produce)

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[bool]:
        """Hold a lease in the block unless another process has it, and yield whether it is held; the block is short.

        A lease belongs to a process: two blocks of one process must not use the same. Raises EventLogError if the log
        is unavailable.
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
            await tick(RENEW_SECONDS)

    async def _produce(self, lease: str, produce: Callable[[], Awaitable[None]]) -> bool:
        """Run the producer while the lease is held; return True if it ran to its end."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_fenced(lease, produce))
            held_at = loop.time()
            while not (await asyncio.wait({task}, timeout=until_tick(RENEW_SECONDS)))[0]:
                requested_at = loop.time()
                try:
                    held, held_at = await self.log.hold(lease), requested_at
                except EventLogError:
                    held = loop.time() - held_at < LEASE_SECONDS - RENEW_SECONDS
                if not held:
                    log.warning("the lease %s is lost; another process may have it", lease)
                    task.cancel()
                    return False
        if not (done := task.cancelled() or task.result()):
            log.warning("the lease %s is lost: events were rejected", lease)
        return done


async def _fenced(lease: str, produce: Callable[[], Awaitable[None]]) -> bool:
    """Run a producer, and return whether it ended without having lost the lease."""
    _LEASE.set(lease)  # in this task, and those that it starts
    lost = False
    try:
        await produce()
    except* LeaseLost:
        lost = True
    return not lost


def open_log(url: str, *, synced: bool = False) -> EventLog:
    """Return the engine for a URL: `sqlite:///PATH`, `sqlite://` (in memory), `redis://`, `rediss://`, `unix://`.

    With `synced`, an append returns only after its events are on the disk, so that they survive a power failure.
    Opens nothing yet. Raises EventLogError for a missing library of the engine or an invalid URL.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        return SqliteLog(Path(rest.removeprefix("/")) if rest else None, synced=synced)
    try:
        from .redis import RedisLog
    except ModuleNotFoundError as error:
        raise EventLogError(f"needs the Python module {error.name!r}: pip install 'streamlab[redis]'") from None
    return RedisLog(url, synced=synced)


EVENTS = web.AppKey("events", Events)
"""Key of the application: the channels of this server, open while its lifespans are."""
