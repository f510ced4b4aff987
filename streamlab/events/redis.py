"""Events kept in Redis or Valkey streams, shared by the processes of many machines."""

import asyncio
import logging
import random
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from .append_queue import AppendQueue
from .log import (
    BATCH_BYTES,
    LEASE_SECONDS,
    ORIGIN,
    Append,
    Batch,
    Deliver,
    Event,
    EventLogError,
    LeaseLost,
    Position,
    Retention,
    is_replaced,
    within,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

AWAY = (RedisConnectionError, RedisTimeoutError, OSError)
"""What a server that is away, starting, or out of reach looks like; all else is an answer."""

BLOCK_SECONDS = 2.0
"""How long one XREAD waits before the watched streams are looked at for lost history."""

COMMAND_SECONDS = 5.0
"""A server that answers nothing for so long counts as away."""

READ_EVENTS = 500
"""Events of one stream that one XREAD may bring."""

AGING_SECONDS = 20.0
"""How often the streams that this process publishes to are trimmed by age."""

AGING_CHANNELS = 1000
"""Streams it remembers for that; those of channels that vanish by themselves need no trimming."""

TYPICAL_BYTES = 1024
"""How large an event is thought to be before one of its channel has been read."""

SIZES = 1000
"""Channels whose events' size is remembered."""

SCAN_KEYS = 1000
"""Keys that the server looks at in one step where all of some kind are searched."""

TOKEN_SECONDS = 86_400
"""How long the server remembers an append whose acknowledgement may have been lost, in seconds."""

# An entry's id is the event's position. An epoch is the server's time in milliseconds, but later than every epoch that
# the calling process knows of (ARGV), since the clock may have been set back: a stream that was lost and begun anew has
# greater ids than the lost one, and a reader that waits for more of the old one gets it at once.
_NEW_EPOCH = """
local function new_epoch(seen)
    local time = redis.call('TIME')
    local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
    return string.format('%.0f', now), string.format('%.0f', math.max(now, tonumber(seen) + 1))
end
"""

# An append whose acknowledgement was lost is sent again with its token, and found by it. One that belongs to a lease is
# rejected unless the lease is held with the same token as when it was sent.
_APPEND = (
    _NEW_EPOCH
    + """
local stream, state, applied, lease = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local before = redis.call('GET', applied)
if before then return {string.match(before, '(%d+)-(%d+)')} end
if lease and redis.call('GET', lease) ~= ARGV[4] then return redis.error_reply('LEASELOST') end
local now, epoch = new_epoch(ARGV[3])
local offset = 0
local info = redis.pcall('XINFO', 'STREAM', stream)
if not info.err then
    for index = 1, #info, 2 do
        if info[index] == 'last-generated-id' and info[index + 1] ~= '0-0' then
            epoch, offset = string.match(info[index + 1], '(%d+)-(%d+)')
        end
    end
end
local last = string.format('%.0f', offset)
for index = 8, #ARGV, 3 do
    offset = offset + 1
    last = string.format('%.0f', offset)
    redis.call('XADD', stream, epoch .. '-' .. last,
        't', now, 'e', ARGV[index], 'k', ARGV[index + 1], 'd', ARGV[index + 2])
end
redis.call('XTRIM', stream, 'MAXLEN', ARGV[1])
if ARGV[6] ~= '' then redis.call('HSET', state, ARGV[6], ARGV[7]) end
if ARGV[2] ~= '0' then
    redis.call('PEXPIRE', stream, ARGV[2])
    redis.call('PEXPIRE', state, ARGV[2])
end
redis.call('SET', applied, epoch .. '-' .. last, 'PX', ARGV[5])
return {epoch, last}
"""
)

# What a watch has been given lies after the end of the stream: 1 where the end was lost, and the stream begins a new
# epoch; 2 where all was lost, and another process, which did not know of the old epoch, began with an earlier one.
_RENEW = (
    _NEW_EPOCH
    + """
local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
if info.err then return 0 end
for index = 1, #info, 2 do
    if info[index] == 'last-generated-id' then
        local epoch, offset = string.match(info[index + 1], '(%d+)-(%d+)')
        if epoch == ARGV[1] and tonumber(offset) < tonumber(ARGV[2]) then
            local _, fresh = new_epoch(ARGV[3])
            redis.call('XSETID', KEYS[1], fresh .. '-0')
            return 1
        end
        if tonumber(epoch) < tonumber(ARGV[1]) and info[index + 1] ~= '0-0' then return 2 end
    end
end
return 0
"""
)

_TRIM = """
while true do
    local entries = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 100)
    if #entries == 0 then return 0 end
    for _, entry in ipairs(entries) do
        if tonumber(entry[2][2]) >= tonumber(ARGV[1]) then
            redis.call('XTRIM', KEYS[1], 'MINID', entry[1])
            return 0
        end
    end
    redis.call('XTRIM', KEYS[1], 'MAXLEN', redis.call('XLEN', KEYS[1]) - #entries)
end
"""

# A lease is taken with a new token (ARGV 3 is 1), and kept with the same: one that has ended in between is lost, even
# if nobody else has had it.
_HOLD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if not holder and ARGV[3] == '0' then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@dataclass(slots=True)
class _Watch:
    position: Position
    deliver: Deliver


class RedisLog:
    """An event log in a Redis >= 7 or Valkey server. `url` is redis://, rediss:// or unix://.

    While the server is away, appends and reads wait and go on by themselves. What an append acknowledged is as safe as
    the server keeps it: switch its append-only file on.
    """

    def __init__(self, url: str) -> None:
        never = Retry(NoBackoff(), 0)  # it waits below, where it can be seen
        options: dict[str, Any] = {"retry": never, "socket_connect_timeout": COMMAND_SECONDS, "protocol": 2}
        try:
            self._redis = redis.asyncio.Redis.from_url(url, socket_timeout=COMMAND_SECONDS, **options)
            # One connection waits in XREAD, and it alone: a client that blocked others would stop them all.
            patience = BLOCK_SECONDS + COMMAND_SECONDS
            self._blocking = redis.asyncio.Redis.from_url(url, socket_timeout=patience, **options)
        except ValueError as error:
            raise EventLogError(f"is no address of a Redis server: {error}") from None
        self._queue = AppendQueue(self._keep)
        self._watches: dict[str, _Watch] = {}
        self._changed = asyncio.Event()
        """Whether a watch began that the waiting XREAD does not know of."""
        self._reader_id = 0
        self._aging: OrderedDict[str, Retention] = OrderedDict()
        self._leases: dict[str, str] = {}
        """The token with which this process took each lease that it holds."""
        self._seen = 0
        """The greatest epoch that this process has appended to, read, or been given."""
        self._acknowledged: list[str] = []
        """Keys of tokens that the server need not remember any more."""
        self._sizes: dict[str, int] = {}
        self._away = ""
        self._scripts: dict[str, str] = {}

    # -- life

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Serve until the block ends; a server that is away now may come later."""
        try:
            await self._look_at_server()
        except AWAY as error:
            self._lost(error)
        except RedisError as error:
            raise EventLogError(f"the server refuses: {error}") from None
        try:
            async with asyncio.TaskGroup() as group:
                works = (self._queue.run, self._tail, self._nudge, self._keep_house)
                tasks = [group.create_task(work()) for work in works]
                try:
                    yield
                finally:
                    # A cancellation can get lost in a command (python/cpython#86296, in 3.11), so: until it is heard.
                    while pending := [task for task in tasks if not task.done()]:
                        for task in pending:
                            task.cancel()
                        await asyncio.wait(pending, timeout=0.05)
        finally:
            await self._redis.aclose()
            await self._blocking.aclose()

    async def _look_at_server(self) -> None:
        info = await self._redis.info("persistence")
        if not info.get("aof_enabled"):
            log.warning("the Redis server has no append-only file: what it loses in a crash, clients see as a gap")

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do something with the server, again and again while it is away."""
        loop, delays = asyncio.get_running_loop(), _backoff()
        while True:
            begun = loop.time()
            try:
                result = await work()
            except AWAY as error:
                self._lost(error)
                if loop.time() - begun > 2 * COMMAND_SECONDS:
                    delays = _backoff()  # it has been there in between
                await asyncio.sleep(next(delays))
            else:
                self._found()
                return result

    def _lost(self, error: BaseException) -> None:
        if not self._away:
            self._away = "The Redis server of the event log does not answer."
            log.warning("the event log's Redis server is away (%s); waiting for it", type(error).__name__)

    def _found(self) -> None:
        if self._away:
            self._away = ""
            log.info("the event log's Redis server is back")

    def state(self) -> Mapping[str, object]:
        """Say whether the server answers."""
        if self._away:
            return {"engine": "redis", "state": "away", "reason": self._away}
        return {"engine": "redis", "state": "ok"}

    async def _call(self, script: str, keys: Sequence[str], *arguments: object) -> Any:
        """Run a script, which the server may not know (any more)."""
        for _ in range(2):
            try:
                return await self._redis.evalsha(await self._sha(script), len(keys), *keys, *arguments)  # type: ignore[arg-type]
            except NoScriptError:
                self._scripts.pop(script, None)
        raise EventLogError("The Redis server forgets scripts as soon as it has them.")

    async def _sha(self, script: str) -> str:
        if script not in self._scripts:
            self._scripts[script] = _text(await self._redis.script_load(script))
        return self._scripts[script]

    # -- appending

    async def append(self, append: Append) -> Position:
        """Add events; the server has them when this returns, each once, however often the connection broke."""
        if append.lease:
            if append.lease not in self._leases:
                raise LeaseLost
            append = append._replace(fence=self._leases[append.lease])
        if append.retention.idle_seconds is None:
            self._aging[append.channel] = append.retention
            self._aging.move_to_end(append.channel)
            if len(self._aging) > AGING_CHANNELS:
                self._aging.popitem(last=False)
        else:
            self._aging.pop(append.channel, None)
        return await self._queue.append(append)

    async def _keep(self, appends: Sequence[Append]) -> Sequence[Position | EventLogError]:
        tokens = [secrets.token_hex(8) for _ in appends]
        results: list[Position | EventLogError | None] = [None] * len(appends)

        async def send() -> None:
            todo = [number for number, result in enumerate(results) if result is None]
            sha = await self._sha(_APPEND)
            pipe = self._redis.pipeline(transaction=False)
            for number in todo:
                append = appends[number]
                keys = [*_keys(append.channel), _token_key(append.channel, tokens[number])]
                keys += [_lease_key(append.lease)] if append.lease else []
                pipe.evalsha(sha, len(keys), *keys, *_arguments(append, self._seen))
            for key in self._acknowledged:
                pipe.unlink(key)
            answers = await pipe.execute(raise_on_error=False)
            for number, answer in zip(todo, answers, strict=False):
                if isinstance(answer, NoScriptError):
                    self._scripts.clear()
                elif isinstance(answer, AWAY):
                    raise answer
                elif isinstance(answer, ResponseError) and str(answer).startswith("LEASELOST"):
                    results[number] = LeaseLost()
                elif isinstance(answer, Exception):
                    log.error("events cannot be kept: %s", answer)
                    results[number] = EventLogError("The Redis server of the event log refuses to write.")
                else:
                    results[number] = Position(int(answer[0]), int(answer[1]))
                    self._seen = max(self._seen, int(answer[0]))
            self._acknowledged.clear()

        while None in results:
            await self._patiently(send)
        for append, token, result in zip(appends, tokens, results, strict=True):
            if isinstance(result, Position):
                self._acknowledged.append(_token_key(append.channel, token))
        return [result for result in results if result is not None]

    # -- passing on

    def watch(self, channel: str, after: Position, deliver: Deliver) -> None:
        """Deliver what follows a position, whoever publishes it."""
        self._watches[channel] = _Watch(after, deliver)
        self._changed.set()

    def unwatch(self, channel: str) -> None:
        """End a watch."""
        self._watches.pop(channel, None)

    async def _nudge(self) -> None:
        """Interrupt the waiting XREAD when it must read more streams than it knows of."""
        while True:
            await self._changed.wait()
            if self._reader_id:
                try:
                    await self._redis.client_unblock(self._reader_id)
                except AWAY as error:
                    self._lost(error)
            await asyncio.sleep(0.005)  # it may not have been waiting yet: see whether it has heard

    async def _tail(self) -> None:
        """Read every watched stream with one XREAD at a time, for as long as the server lives, and again after."""
        while True:
            try:
                await self._patiently(self._read_on)
            except RedisError as error:
                log.error("the event log's Redis server refuses: %s", error)
                await asyncio.sleep(1)

    async def _read_on(self) -> None:
        async with self._blocking.client() as reader:
            self._reader_id = 0
            await self._renew_what_is_lost()
            looked = asyncio.get_running_loop().time()
            try:
                self._reader_id = int(await reader.client_id())
                while True:
                    if not self._watches:
                        await self._changed.wait()
                    self._changed.clear()
                    self._found()
                    streams = {_stream(channel): str(watch.position) for channel, watch in self._watches.items()}
                    if not streams:
                        continue
                    answer: Any = await reader.xread(streams, READ_EVENTS, int(BLOCK_SECONDS * 1000))  # type: ignore[arg-type]
                    for name, entries in answer or ():
                        self._deliver(_channel(_text(name)), entries)
                    if asyncio.get_running_loop().time() - looked >= BLOCK_SECONDS:
                        await self._renew_what_is_lost()
                        looked = asyncio.get_running_loop().time()
            finally:
                self._reader_id = 0

    def _deliver(self, channel: str, entries: Sequence[Any]) -> None:
        watch = self._watches.get(channel)
        events = [event for event in map(_event, entries) if watch and event.position > watch.position]
        if watch and events:
            watch.position = events[-1].position
            self._seen = max(self._seen, watch.position.epoch)
            watch.deliver(events)

    async def _renew_what_is_lost(self) -> None:
        """Begin a new epoch for streams that the server has lost the end of, for it has been seen by this process."""
        for channel, watch in tuple(self._watches.items()):
            if watch.position == ORIGIN:
                continue
            found = await self._call(_RENEW, [_stream(channel)], *watch.position, self._seen)
            if found == 1:
                log.warning("the Redis server has lost the end of %s: it begins a new epoch", channel)
            elif found == 2:
                log.warning("the Redis server has lost %s, and its clock was set back", channel)
                watch.position = ORIGIN

    # -- reading

    async def read(self, channel: str, after: Position, limit: int, size: int = BATCH_BYTES) -> Batch:
        """Return up to `limit` events that follow a position, and about `size` bytes."""
        limit = min(limit, 1 + size // self._sizes.get(channel, TYPICAL_BYTES))

        async def ask() -> Sequence[Any]:
            pipe = self._redis.pipeline(transaction=False)
            pipe.xinfo_stream(_stream(channel))  # before the events: `last` must not be later than they are
            pipe.xrange(_stream(channel), f"({after}", "+", limit)
            answers = await pipe.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, AWAY):
                    raise answer
            return answers

        info, entries = await self._patiently(ask)
        if isinstance(entries, Exception):
            raise EventLogError("The Redis server of the event log refuses to read.") from entries
        last = ORIGIN if isinstance(info, ResponseError) else Position.parse(_text(info["last-generated-id"])) or ORIGIN
        self._seen = max(self._seen, last.epoch)
        if is_replaced(after, last):
            return await self.read(channel, ORIGIN, limit, size)
        events = [_event(entry) for entry in entries]
        if events:
            self._note_size(channel, sum(len(event.data) for event in events) // len(events))
        return Batch(within(events, size), last)

    def _note_size(self, channel: str, size: int) -> None:
        """Remember how large events of a channel are, for the server counts them and does not weigh them."""
        if len(self._sizes) >= SIZES:
            self._sizes.clear()
        self._sizes[channel] = max(1, size)

    async def checkpoint(self, channel: str, name: str) -> str | None:
        """Return the text that was last appended under a name."""

        async def ask() -> Any:
            return await self._redis.hget(_keys(channel)[1], name)

        value = await self._patiently(ask)
        return None if value is None else _text(value)

    async def checkpoints(self, prefix: str, name: str) -> Mapping[str, str]:
        """Return the texts last appended under a name, by the names of their channels, which begin with a prefix."""
        pattern = _keys(re.sub(r"([*?\[\]\\])", r"\\\1", prefix) + "*")[1]

        async def ask() -> tuple[list[str], list[Any]]:
            keys = [_text(key) async for key in self._redis.scan_iter(match=pattern, count=SCAN_KEYS)]
            keys = list(dict.fromkeys(keys))  # a scan may name one twice
            pipe = self._redis.pipeline(transaction=False)
            for key in keys:
                pipe.hget(key, name)
            return keys, await pipe.execute()

        keys, values = await self._patiently(ask)
        found = zip(keys, values, strict=True)
        return {_channel(key): _text(value) for key, value in found if value is not None}

    # -- forgetting

    async def trim(self, channel: str, retention: Retention) -> None:
        """Forget what retention does not keep."""

        async def ask() -> None:
            seconds, micros = await self._redis.time()
            before = seconds * 1000 + micros // 1000 - int(retention.seconds * 1000)
            await self._call(_TRIM, [_stream(channel)], before)
            await self._redis.xtrim(_stream(channel), maxlen=retention.events, approximate=False)

        await self._patiently(ask)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(AGING_SECONDS)
            for channel, retention in tuple(self._aging.items()):
                await self.trim(channel, retention)

    async def delete(self, channel: str) -> None:
        """Forget a channel and all that belongs to it."""

        async def ask() -> None:
            await self._redis.delete(*_keys(channel))

        self._aging.pop(channel, None)
        await self._patiently(ask)

    # -- leases

    async def hold(self, lease: str) -> bool:
        """Take a lease, or keep it for LEASE_SECONDS more; raises EventLogError while the server is away."""
        token = self._leases.get(lease, "")
        fresh = not token
        token = token or secrets.token_hex(8)
        try:
            held = await self._call(_HOLD, [_lease_key(lease)], token, int(LEASE_SECONDS * 1000), int(fresh))
        except AWAY as error:
            self._lost(error)
            raise EventLogError(self._away) from None
        except RedisError as error:
            log.error("the lease %s cannot be held: %s", lease, error)
            raise EventLogError("The Redis server of the event log refuses to write.") from None
        if held:
            self._leases[lease] = token
        else:
            self._leases.pop(lease, None)
        return bool(held)

    async def release(self, lease: str) -> None:
        """Give a lease back; one that cannot be given back ends by itself."""
        if token := self._leases.pop(lease, ""):
            try:
                await self._call(_RELEASE, [_lease_key(lease)], token)
            except RedisError as error:
                log.warning("the lease %s cannot be given back: %s", lease, error)


def _keys(channel: str) -> tuple[str, str]:
    """The keys of a channel: its stream, and its state. (A cluster keeps what stands in braces together.)"""
    return _stream(channel), f"streamlab:{{{channel}}}:state"


def _stream(channel: str) -> str:
    return f"streamlab:{{{channel}}}:events"


def _channel(key: str) -> str:
    """The channel that a key of `_keys` belongs to."""
    return key.removeprefix("streamlab:{").rpartition("}:")[0]


def _token_key(channel: str, token: str) -> str:
    return f"streamlab:{{{channel}}}:applied:{token}"


def _lease_key(lease: str) -> str:
    return f"streamlab:lease:{lease}"


def _arguments(append: Append, seen: int) -> Iterator[str | int | bytes]:
    idle = append.retention.idle_seconds
    yield from (append.retention.events, 0 if idle is None else max(1, int(idle * 1000)))
    yield from (seen, append.fence, TOKEN_SECONDS * 1000)
    yield from append.checkpoint or ("", "")
    for draft in append.drafts:
        yield from (draft.event, draft.key, draft.data)


def _event(entry: Any) -> Event:
    name, fields = entry
    position = Position.parse(_text(name))
    assert position is not None
    return Event(position, int(fields[b"t"]), fields[b"d"], _text(fields[b"e"]), _text(fields[b"k"]))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _backoff() -> Iterator[float]:
    """Seconds between tries: short at first, two at most, never the same for all."""
    delay = 0.05
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, keeps no secret
        delay = min(2.0, delay * 2)
