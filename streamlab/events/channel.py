"""Channels of events, and what holds them: publishing, reading, leadership."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from aiohttp import web

from streamlab import sse

from .hub import SLICE, Follower, Hub
from .log import (
    LATEST,
    LEASE_SECONDS,
    ORIGIN,
    RENEW_SECONDS,
    Append,
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
from .views import MAX_FILTERS, Filters

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
"""How often every follower gets a comment; proxies and clients give up after 15 s and more of silence."""

RETRY_SECONDS = 1.0
"""How long a producer that insists waits before it tries again."""

EVENT_BYTES = 8 * 1024 * 1024
"""The largest data an event may have."""


_LEASE: ContextVar[str] = ContextVar("lease", default="")
"""The lease for whose holder the running code produces: what it publishes is rejected once another has that."""


class Channel:
    """A named, ordered stream of events that any number of clients follow, from any id.

    A value: making one costs nothing, and what it names exists from the first event on. `finite` says that it is to
    end with an event `end`, after which a client that comes back is told 204. `id_prefix` stands before the ids of its
    events, always the same for a name: where one route serves many channels, the id that a client comes back with says
    which it means.
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
        """Read the place in this channel that an event's id means; None where it means none."""
        return Position.parse(id.removeprefix(self.id_prefix)) if id.startswith(self.id_prefix) else None

    async def publish(self, data: Any, event: str = "", *, key: str = "") -> str:
        """Publish an event and return its id, once the log has it; followers get it after that, never before.

        `data` is sent as JSON; a str or bytes (UTF-8) as it is. `event` is its name, `key` what it is about (views
        choose by it). Waits while the log's server is away. Raises ValueError for data that is no JSON or larger than
        EVENT_BYTES, EventLogError where the event is not kept.
        """
        return (await self.publish_all([encode_event(data, event, key=key)]))[0]

    async def publish_all(
        self, drafts: Sequence[EncodedEvent], *, checkpoint: tuple[str, str] | None = None, retry_forever: bool = False
    ) -> list[str]:
        """Publish events together, or none of them, and return their ids.

        `checkpoint`, a name and a text, is kept with them: where their producer stands, for `checkpoint` to find after
        a crash. With `retry_forever` a refusal of the log is not raised, but waited out: a producer does not give up.
        """
        if not drafts and checkpoint is None:
            return []
        append = Append(self.name, drafts, self.retention, checkpoint, _LEASE.get())
        while True:
            try:
                last = await self.events.log.append(append)
                break
            except EventLogError as error:
                if not retry_forever or isinstance(error, LeaseLost):
                    raise
                log.warning("what is published on %s waits: %s", self.name, error)
                await asyncio.sleep(RETRY_SECONDS)
        await self.events.room(self.name)
        first = last.offset - len(drafts) + 1
        return [f"{self.id_prefix}{Position(last.epoch, first + number)}" for number in range(len(drafts))]

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


def encode_event(data: Any, event: str = "", *, key: str = "") -> EncodedEvent:
    """Make an event to be published; raises ValueError where it cannot be one."""
    encoded = sse.encode(data)
    if len(encoded) > EVENT_BYTES:
        raise ValueError(f"an event of {len(encoded)} bytes is larger than {EVENT_BYTES}")
    if any(character in event for character in "\r\n\0"):
        raise ValueError(f"the name of an event holds a line break or NUL: {event!r}")
    return EncodedEvent(encoded, event, key)


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

    def channel(
        self, name: str, *, keep: Retention | None = None, finite: bool = False, id_prefix: str = ""
    ) -> Channel:
        """Name a channel; without `keep` it keeps what config.toml says under [events]."""
        return Channel(self, name, keep or self._keep, finite=finite, id_prefix=id_prefix)

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
            hub = Hub(channel.name, position, channel.id_prefix, self.filters)
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
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            for number, follower in enumerate(tuple(self.followers), start=1):
                if follower in self.followers:
                    follower.stream.beat()
                if number % SLICE == 0:
                    await asyncio.sleep(0)

    async def run_as_leader(self, lease: str, produce: Callable[[], Awaitable[None]]) -> None:
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
        """Run `produce` as `run_as_leader` does, unless another process has the lease; whether it was run to its end.

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
        from .redis import RedisLog
    except ModuleNotFoundError as error:
        raise EventLogError(f"needs the Python module {error.name!r}: pip install 'streamlab[redis]'") from None
    return RedisLog(url)


EVENTS = web.AppKey("events", Events)
