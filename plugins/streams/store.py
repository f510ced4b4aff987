"""Streams in the event log: a channel for each, whose checkpoints are its configuration and its state."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from streamlab import (
    END,
    FOREVER,
    LATEST,
    Batch,
    Channel,
    Conflict,
    Copy,
    EncodedEvent,
    Events,
    Position,
    Problem,
    Retention,
)

from .content import Content, InvalidContent, content_of
from .protocol import DEFAULT_TYPE, FORK_OFFSET, FORK_SUB_OFFSET, Creation, media_type, parse_offset, unix_time

PREFIX = "streams/"
"""Beginning of the names of channels; the path of a stream follows."""

CONFIG = "config"
"""Checkpoint: the `Config` of a stream, which exists as long as this does."""

CLOSED = "closed"
"""Checkpoint: that a stream is closed, and by which append of which producer, if any."""

SOURCE = "source"
"""Checkpoint of a fork: the path of the stream that it was copied from."""

BYTES = "bytes"
"""Checkpoint that counts the bytes of a stream."""

CLOSING = EncodedEvent(b"", END)
"""The last event of a closed stream, which wakes those who wait for more; it is not content."""

ATTEMPTS = 100
"""Maximum number of times that a change is tried again because another client was faster."""

COUNT_SECONDS = 10.0
"""Time for which the number of streams is remembered, in seconds."""

TOUCHED = 10_000
"""Maximum number of streams whose last extension is remembered."""


class Config(msgspec.Struct, frozen=True, omit_defaults=True):
    """The configuration of a stream, which never changes."""

    content_type: str
    ttl: int | None = None
    expires_at: str = ""
    fork: tuple[str, str, int] | None = None
    """Source, offset and sub-offset of the request that created it as a fork."""
    deleted: bool = False
    """Whether it was deleted while there are forks of it: nothing but its name is left."""

    @property
    def content(self) -> Content:
        """Return what its bytes are."""
        return content_of(self.content_type)

    @property
    def retention(self) -> Retention:
        """Return how long it lives."""
        expires_at = unix_time(self.expires_at) if self.expires_at else None
        return Retention(FOREVER.events, FOREVER.seconds, self.ttl, expires_at)


PUBLISHED = Config("application/json")
"""The configuration of a channel of another publisher."""


@lru_cache(maxsize=1000)
def decode_config(text: str) -> Config:
    """Return the configuration in a checkpoint."""
    return msgspec.json.decode(text, type=Config)


@dataclass(frozen=True, slots=True)
class Limits:
    """What all streams together, and each of them, may have at most."""

    streams: int
    stream_bytes: int
    producers: int


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream that exists, with what was read of it."""

    path: str
    channel: Channel
    config: Config
    batch: Batch

    @property
    def is_closed(self) -> bool:
        """Return whether nothing can be appended to it any more."""
        return CLOSED in self.batch.checkpoints


class Store:
    """The streams of all processes that share the event log."""

    def __init__(self, events: Events, limits: Limits, channels: Mapping[str, str]) -> None:
        self.limits = limits
        self._events = events
        self._channels = channels
        """The channels of other publishers that can be read as streams, by path."""
        self._count, self._counted_at = 0, float("-inf")
        self._extended: OrderedDict[str, float] = OrderedDict()
        """When each stream with a time to live was extended by a read of this process."""

    def channel(self, path: str, config: Config | None = None) -> Channel:
        """Return the channel of a stream; to append to it, its configuration is needed."""
        return self._events.channel(PREFIX + path, retention=config.retention if config else FOREVER)

    async def find(
        self, path: str, after: Position = LATEST, names: Sequence[str] = (), *, size: int = 1, limit: int = 1000
    ) -> Stream:
        """Return a stream, with its events after a position of `size` bytes, and checkpoints.

        Raises Problem 404 where there is none, and 410 for one that was deleted but has forks.
        """
        if (name := self._channels.get(path)) is not None:
            published = self._events.channel(name)
            return Stream(path, published, PUBLISHED, await published.look(after, size=size, limit=limit))
        batch = await self.channel(path).look(after, (CONFIG, CLOSED, *names), size=size, limit=limit)
        if (text := batch.checkpoints.get(CONFIG)) is None:
            raise Problem(404, "There is no such stream; PUT creates it.")
        config = decode_config(text)
        if config.deleted:
            await self._reject_deleted(path)
        return Stream(path, self.channel(path, config), config, batch)

    def require_writable(self, path: str) -> None:
        """Raise Problem 405 for a stream that is the channel of another publisher."""
        if path in self._channels:
            detail = "This stream is a channel of the server, which can only be read."
            raise Problem(405, detail, headers={"Allow": "GET, HEAD"})

    async def extend(self, stream: Stream) -> None:
        """Let a stream with a time to live begin it again, because it is read: up to a hundredth later than exactly."""
        ttl, now = stream.config.ttl, asyncio.get_running_loop().time()
        if not ttl or now - self._extended.get(stream.path, float("-inf")) < ttl / 100:
            return
        self._extended[stream.path] = now
        self._extended.move_to_end(stream.path)
        if len(self._extended) > TOUCHED:
            self._extended.popitem(last=False)
        await stream.channel.extend(ttl * 1.01)

    # -- creating

    async def create(self, path: str, wanted: Creation, body: bytes) -> tuple[Stream, bool]:
        """Return a stream, and whether it is new; raises Problem 409 where it exists with another configuration."""
        for _ in range(ATTEMPTS):
            try:
                stream = await self.find(path, names=(SOURCE,))
            except Problem as missing:
                if missing.status == 410:
                    detail = "A stream of this path was deleted, and there are forks of it; they keep its name."
                    raise Problem(409, detail) from None
            else:
                self._compare(stream, wanted)
                return stream, False
            try:
                return await self._begin(path, wanted, body), True
            except Conflict:  # another client creates it, or deletes the source of the fork
                continue
        raise _contended()

    def _compare(self, stream: Stream, wanted: Creation) -> None:
        """Raise Problem 409 unless a stream has the wanted configuration; what a fork inherits need not be named."""
        config, is_fork = stream.config, wanted.fork is not None
        same = (
            config.fork == _fork_of(wanted)
            and ((is_fork and not wanted.content_type) or _same_type(config.content_type, wanted.content_type))
            and ((is_fork and wanted.ttl is None) or config.ttl == wanted.ttl)
            and ((is_fork and not wanted.expires_at) or _same_time(config.expires_at, wanted.expires_at))
            and stream.is_closed == wanted.closed
        )
        if not same:
            raise Problem(409, "The stream exists, with another content type, lifetime, origin or closure.")

    async def _begin(self, path: str, wanted: Creation, body: bytes) -> Stream:
        await self._check_count()
        config = Config(wanted.content_type or DEFAULT_TYPE, wanted.ttl, wanted.expires_at, _fork_of(wanted))
        copy, drafts, size = None, list[EncodedEvent](), 0
        checkpoints = dict[str, str]()
        if wanted.fork is not None:
            source = await self._source(wanted.fork.source)
            config = _inherit(config, wanted, source.config)
            copy, prefix = await self._copy(source, wanted)
            size = int(source.batch.checkpoints.get(BYTES, 0))
            drafts += [EncodedEvent(prefix)] if prefix else []
            checkpoints[SOURCE] = source.path
        try:
            message = config.content.message(body) if body else b""
        except InvalidContent as error:
            raise Problem(400, str(error)) from None
        drafts += [EncodedEvent(message)] if message else []
        if wanted.closed:
            drafts.append(CLOSING)
            checkpoints[CLOSED] = ""
        checkpoints[CONFIG] = msgspec.json.encode(config).decode()
        channel = self.channel(path, config)
        counts = {BYTES: size + sum(len(draft.data) for draft in drafts)}
        last = await channel.append(drafts, checkpoints=checkpoints, expected={CONFIG: None}, counts=counts, copy=copy)
        self._count += 1
        return Stream(path, channel, config, Batch((), last, checkpoints))

    async def _check_count(self) -> None:
        """Raise Problem 429 where there are as many streams as there may be."""
        now, limit = asyncio.get_running_loop().time(), self.limits.streams
        if self._count >= limit or now - self._counted_at > COUNT_SECONDS:
            found = await self._events.checkpoints(PREFIX, CONFIG)
            self._count, self._counted_at = len(found), now
        if self._count >= limit:
            raise Problem(429, f"There are {limit} streams, their maximum; DELETE those that are not needed.")

    # -- forks

    async def _source(self, path: str) -> Stream:
        try:
            return await self.find(path, names=(BYTES,))
        except Problem as missing:
            if missing.status == 410:
                raise Problem(409, "The stream to fork was deleted.") from None
            raise Problem(404, "The stream to fork does not exist.") from None

    async def _copy(self, source: Stream, wanted: Creation) -> tuple[Copy, bytes]:
        """Return what of a source a fork has: whole messages, and the beginning of the next one."""
        assert wanted.fork is not None
        last, count = source.batch.last, wanted.fork.sub_offset
        until = parse_offset(wanted.fork.offset) if wanted.fork.offset else last
        if until > last:
            raise Problem(400, f"{FORK_OFFSET}: is beyond the end of the stream.")
        copy, prefix = Copy(source.channel.name, until), b""
        if count:
            following = await source.channel.look(until, limit=1)
            message = next((event.data for event in following.events if event.event != END), b"")
            found = source.config.content.prefix(message, count) if message else None
            if found is None:
                raise Problem(400, f"{FORK_SUB_OFFSET}: is beyond the end of the message after {FORK_OFFSET}.")
            prefix = found
        return copy, prefix

    async def forks(self, path: str) -> list[str]:
        """Return the paths of the forks of a stream."""
        found = await self._events.checkpoints(PREFIX, SOURCE)
        return [channel.removeprefix(PREFIX) for channel, source in found.items() if source == path]

    # -- deleting

    async def delete(self, path: str) -> None:
        """Delete a stream; where it has forks, its name remains until they are deleted."""
        stream = await self.find(path, names=(SOURCE,))
        config, checkpoints = stream.config, stream.batch.checkpoints
        if await self.forks(path):
            deleted = msgspec.structs.replace(config, deleted=True)
            with_name = {CONFIG: msgspec.json.encode(deleted).decode()}
            try:
                await stream.channel.append([], checkpoints=with_name, expected={CONFIG: checkpoints[CONFIG]})
            except Conflict:
                raise _contended() from None
            await self._events.log.trim(stream.channel.name, Retention(events=0))
        else:
            await stream.channel.delete()
            self._count -= 1
            await self._release(checkpoints.get(SOURCE))

    async def _release(self, path: str | None) -> None:
        """Delete what remains of a deleted stream, unless it has forks, and of that which it was copied from."""
        while path is not None:
            batch = await self.channel(path).look(LATEST, (CONFIG, SOURCE), limit=1)
            text = batch.checkpoints.get(CONFIG)
            if text is None or not decode_config(text).deleted or await self.forks(path):
                return
            await self.channel(path).delete()
            path = batch.checkpoints.get(SOURCE)

    async def _reject_deleted(self, path: str) -> None:
        """Raise the Problem of a stream that was deleted: 410, or 404 where its forks have been deleted or expired."""
        await self._release(path)
        if (await self.channel(path).look(LATEST, (CONFIG,), limit=1)).checkpoints:
            raise Problem(410, "The stream was deleted; there are forks of it.")
        raise Problem(404, "There is no such stream; PUT creates it.")


def _fork_of(wanted: Creation) -> tuple[str, str, int] | None:
    fork = wanted.fork
    return None if fork is None else (fork.source, fork.offset, fork.sub_offset)


def _inherit(config: Config, wanted: Creation, source: Config) -> Config:
    """Return the configuration of a fork: what its request does not name is that of the source."""
    if wanted.content_type and not _same_type(wanted.content_type, source.content_type):
        raise Problem(409, f"A fork of this stream has its content type, {source.content_type}.")
    if wanted.ttl is None and not wanted.expires_at:
        config = msgspec.structs.replace(config, ttl=source.ttl, expires_at=source.expires_at)
    return msgspec.structs.replace(config, content_type=wanted.content_type or source.content_type)


def _same_type(one: str, other: str) -> bool:
    return media_type(one or DEFAULT_TYPE) == media_type(other or DEFAULT_TYPE)


def _same_time(one: str, other: str) -> bool:
    return one == other or bool(one and other and unix_time(one) == unix_time(other))


def _contended() -> Problem:
    return Problem(503, "Other clients change this stream all the time.", headers={"Retry-After": "1"})
