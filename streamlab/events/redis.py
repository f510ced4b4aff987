"""The event log in Redis or Valkey streams, shared by the processes of many machines."""

import asyncio
import json
import logging
import random
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
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
    Conflict,
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

DISCONNECTED = (RedisConnectionError, RedisTimeoutError, OSError)
"""Errors of a server that is down, starting, or unreachable; all others are responses."""

BLOCK_SECONDS = 2.0
"""Seconds that one XREAD waits before the watched streams are checked for lost history."""

COMMAND_SECONDS = 5.0
"""Timeout of a command, in seconds, after which the server counts as disconnected."""

READ_EVENTS = 500
"""Maximum number of events per stream of one XREAD."""

AGING_SECONDS = 20.0
"""Interval at which the streams that this process publishes to are trimmed by age, in seconds."""

AGING_CHANNELS = 1000
"""Maximum number of streams that are trimmed by age; those of channels that expire are not."""

APPENDED_CHANNELS = 1000
"""Maximum number of streams whose last appended position this process remembers, to notice that it was lost."""

TYPICAL_BYTES = 1024
"""Assumed size of an event before one of its channel has been read, in bytes."""

SIZES = 1000
"""Maximum number of channels whose event size is remembered."""

SCAN_KEYS = 1000
"""Number of keys that the server scans in one step."""

SYNC_SECONDS = 4.0
"""Maximum seconds for which the server may write an append to its disk before the append is sent again.

Less than COMMAND_SECONDS; `appendfsync everysec` takes up to two seconds.
"""

TOKEN_SECONDS = 86_400
"""Seconds for which the server remembers an append whose acknowledgement may have been lost."""

_LUA = Path(__file__).with_name("lua")


def _script(*names: str) -> str:
    """Return the Lua of one script, from files whose texts are joined."""
    return "\n".join((_LUA / f"{name}.lua").read_text(encoding="utf-8") for name in names)


_APPEND = _script("new_epoch", "append")

_RENEW = _script("new_epoch", "renew")

_TRIM = _script("trim")

_HOLD = _script("hold")

_RELEASE = _script("release")


@dataclass(slots=True)
class _Watch:
    position: Position
    deliver: Deliver


class _Unfit(RedisConnectionError):
    """The server responds, but does not do what `synced` requires; it is waited for as one that is disconnected."""


class RedisLog:
    """An event log in a Redis >= 7 or Valkey server. `url` is redis://, rediss:// or unix://.

    While the server is disconnected, appends and reads wait, and continue by themselves. The durability of an append is
    that of the server: enable its append-only file, with `appendfsync always`. With `everysec` the server acknowledges
    events up to two seconds before it writes them, while its disk is busy. Where it loses events, a new epoch begins.

    If `synced`, an append is acknowledged only after the server has reported that its append-only file is on its disk
    (WAITAOF, Redis >= 7.2 and Valkey); followers of a server with `everysec` get events before that.
    """

    def __init__(self, url: str, *, synced: bool = False) -> None:
        never = Retry(NoBackoff(), 0)  # `_retry_while_disconnected` waits instead, and reports it
        options: dict[str, Any] = {"retry": never, "socket_connect_timeout": COMMAND_SECONDS, "protocol": 2}
        try:
            self._redis = redis.asyncio.Redis.from_url(url, socket_timeout=COMMAND_SECONDS, **options)
            # A dedicated connection blocks in XREAD: a shared one would block all other commands.
            patience = BLOCK_SECONDS + COMMAND_SECONDS
            self._blocking = redis.asyncio.Redis.from_url(url, socket_timeout=patience, **options)
        except ValueError as error:
            raise EventLogError(f"is not a valid URL of a Redis server: {error}") from None
        self._synced = synced
        self._checked = False
        """Whether the server that is connected was found to do what `synced` requires."""
        self._queue = AppendQueue(self._commit)
        self._watches: dict[str, _Watch] = {}
        self._changed = asyncio.Event()
        """Set when a watch began that the waiting XREAD does not include."""
        self._reader_id = 0
        self._aging: OrderedDict[str, Retention] = OrderedDict()
        self._appended: OrderedDict[str, Position] = OrderedDict()
        """Last position of the channels that this process appended to most recently."""
        self._leases: dict[str, str] = {}
        """Token of each lease that this process holds."""
        self._seen = 0
        """Greatest epoch that this process has appended to, read, or received."""
        self._acknowledged: list[str] = []
        """Keys of tokens that the server no longer needs."""
        self._sizes: dict[str, int] = {}
        self._problem = ""
        self._unfit = ""
        """Why the last change could not be acknowledged, though the server responds."""
        self._scripts: dict[str, str] = {}

    # -- life

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Serve until the block ends; the server may be disconnected at the start."""
        try:
            await self._check_at_start()
            async with asyncio.TaskGroup() as group:
                works = (self._queue.run, self._tail, self._wake_reader, self._run_housekeeping)
                tasks = [group.create_task(work()) for work in works]
                try:
                    yield
                finally:
                    # A cancellation can get lost in a command (python/cpython#86296, in 3.11), so it is repeated.
                    while pending := [task for task in tasks if not task.done()]:
                        for task in pending:
                            task.cancel()
                        await asyncio.wait(pending, timeout=0.05)
        finally:
            await self._redis.aclose()
            await self._blocking.aclose()

    async def _check_at_start(self) -> None:
        try:
            await self._check_server()
        except _Unfit as error:
            raise EventLogError(f'does not suit durability = "machine": {error}') from None
        except DISCONNECTED as error:
            self._mark_disconnected(error)
        except RedisError as error:
            raise EventLogError(f"the server rejects commands: {error}") from None

    async def _check_server(self) -> None:
        info = await self._redis.info("persistence")
        if self._synced:
            if not info.get("aof_enabled"):
                raise _Unfit("The Redis server has no append-only file; set appendonly yes.")
            pipe: Any = self._redis.pipeline(transaction=False)
            pipe.execute_command("WAITAOF", 0, 0, 1)
            (found,) = await pipe.execute(raise_on_error=False)
            if isinstance(found, ResponseError):
                raise _Unfit("The Redis server has no command WAITAOF; Redis >= 7.2 and Valkey have.")
            with suppress(ResponseError):  # a server may forbid the command; WAITAOF reports it then, by its timeout
                if (await self._redis.config_get("appendfsync")).get("appendfsync") == "no":
                    raise _Unfit("The Redis server never waits for its disk; set appendfsync always.")
            self._checked = True
        elif not info.get("aof_enabled"):
            log.warning(
                "the Redis server has no append-only file: events that it loses in a crash become gaps for clients"
            )

    async def _retry_while_disconnected(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run a command, and retry it while the server is disconnected."""
        loop, delays = asyncio.get_running_loop(), _backoff()
        while True:
            begun = loop.time()
            try:
                result = await work()
            except DISCONNECTED as error:
                self._mark_disconnected(error)
                if loop.time() - begun > 2 * COMMAND_SECONDS:
                    delays = _backoff()  # it was connected in between
                await asyncio.sleep(next(delays))
            else:
                self._mark_connected()
                return result

    def _mark_disconnected(self, error: BaseException) -> None:
        self._checked = False
        if isinstance(error, _Unfit):
            self._mark_unfit(str(error))
        elif not self._problem:
            self._problem = "The Redis server of the event log does not respond."
            log.warning("the Redis server of the event log is disconnected (%s); waiting for it", type(error).__name__)

    def _mark_connected(self) -> None:
        if self._problem:
            self._problem = ""
            log.info("the Redis server of the event log is connected again")

    def _mark_unfit(self, reason: str) -> None:
        if reason != self._unfit:
            self._unfit = reason
            log.warning("%s", reason or "the Redis server of the event log writes to its disk again")

    def is_shared(self) -> bool:
        """Return True: which processes there are is not known."""
        return True

    def state(self) -> Mapping[str, object]:
        """Return whether the server responds."""
        if self._problem:
            return {"engine": "redis", "state": "disconnected", "reason": self._problem}
        if self._unfit:
            return {"engine": "redis", "state": "degraded", "reason": self._unfit}
        return {"engine": "redis", "state": "ok"}

    async def _call(self, script: str, keys: Sequence[str], *arguments: object) -> Any:
        """Run a script, loading it if the server does not have it."""
        for _ in range(2):
            try:
                return await self._redis.evalsha(await self._sha(script), len(keys), *keys, *arguments)  # type: ignore[arg-type]
            except NoScriptError:
                self._scripts.pop(script, None)
        raise EventLogError("The Redis server does not retain loaded scripts.")

    async def _sha(self, script: str) -> str:
        if script not in self._scripts:
            self._scripts[script] = _text(await self._redis.script_load(script))
        return self._scripts[script]

    # -- appending

    async def append(self, append: Append) -> Position:
        """Add events; the server has each of them once when this returns, however often the connection broke."""
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

    async def _commit(self, appends: Sequence[Append]) -> Sequence[Position | EventLogError]:
        tokens = [secrets.token_hex(8) for _ in appends]
        results: list[Position | EventLogError | None] = [None] * len(appends)

        async def send() -> None:
            if self._synced and not self._checked:
                await self._check_server()
            todo = [number for number, result in enumerate(results) if result is None]
            sha = await self._sha(_APPEND)
            pipe = self._redis.pipeline(transaction=False)
            for number in todo:
                append = appends[number]
                keys = [*_keys(append.channel), _token_key(append.channel, tokens[number]), _lease_key(append.lease)]
                keys += [] if append.copy is None else [_stream(append.copy.channel)]
                pipe.evalsha(sha, len(keys), *keys, *_arguments(append, self._seen, self._last_of(append.channel)))
            for key in self._acknowledged:
                pipe.unlink(key)
            replies = await self._execute(pipe)
            for number, reply in zip(todo, replies, strict=False):
                if isinstance(reply, NoScriptError):
                    self._scripts.clear()
                elif isinstance(reply, DISCONNECTED):
                    raise reply
                elif isinstance(reply, ResponseError) and str(reply).startswith("LEASELOST"):
                    results[number] = LeaseLost()
                elif isinstance(reply, list) and reply[0] == b"CONFLICT":
                    texts = (None if text is None else _text(text) for text in reply[1:])
                    results[number] = Conflict(dict(zip(appends[number].expected, texts, strict=False)))
                elif isinstance(reply, Exception):
                    log.error("events cannot be stored: %s", reply)
                    results[number] = EventLogError("The Redis server of the event log rejects writes.")
                else:
                    results[number] = position = Position(int(reply[0]), int(reply[1]))
                    self._note_appended(appends[number].channel, position)
            self._acknowledged.clear()

        while None in results:
            await self._retry_while_disconnected(send)
        for append, token, result in zip(appends, tokens, results, strict=True):
            if isinstance(result, Position):
                self._acknowledged.append(_token_key(append.channel, token))
        return [result for result in results if result is not None]

    async def _execute(self, pipe: Any) -> list[Any]:
        """Run commands that change the log; return their replies, errors included. Wait for the disk if `synced`."""
        if not self._synced:
            return list(await pipe.execute(raise_on_error=False))
        # Of the same connection: it waits for what that has written. A retry of an append, which finds its token, waits
        # for all that the server has written so far.
        pipe.execute_command("WAITAOF", 1, 0, int(SYNC_SECONDS * 1000))
        replies: list[Any] = await pipe.execute(raise_on_error=False)
        synced = replies.pop()
        if isinstance(synced, DISCONNECTED):
            raise synced
        if isinstance(synced, Exception):
            raise _Unfit(f"The Redis server cannot report what is on its disk: {synced}.")
        if synced[0] < 1:
            raise _Unfit("The disk of the Redis server does not keep up.")
        self._mark_unfit("")
        return replies

    def _note_appended(self, channel: str, position: Position) -> None:
        self._seen = max(self._seen, position.epoch)
        self._appended[channel] = position
        self._appended.move_to_end(channel)
        if len(self._appended) > APPENDED_CHANNELS:
            self._appended.popitem(last=False)

    def _last_of(self, channel: str) -> Position:
        """Return the last position of a channel that this process has appended or received; ORIGIN if there is none."""
        watch = self._watches.get(channel)
        return max(watch.position if watch else ORIGIN, self._appended.get(channel, ORIGIN))

    # -- delivering

    def watch(self, channel: str, after: Position, deliver: Deliver) -> None:
        """Deliver the events after a position, whichever process publishes them."""
        self._watches[channel] = _Watch(after, deliver)
        self._changed.set()

    def unwatch(self, channel: str) -> None:
        """End a watch."""
        self._watches.pop(channel, None)

    async def _wake_reader(self) -> None:
        """Interrupt the waiting XREAD when it must include more streams."""
        while True:
            await self._changed.wait()
            if self._reader_id:
                try:
                    await self._redis.client_unblock(self._reader_id)
                except DISCONNECTED as error:
                    self._mark_disconnected(error)
            await asyncio.sleep(0.005)  # it may not have been waiting yet: check whether it woke

    async def _tail(self) -> None:
        """Read all watched streams with one XREAD at a time, and again after a failure of the server."""
        while True:
            try:
                await self._retry_while_disconnected(self._read_on)
            except RedisError as error:
                log.error("the Redis server of the event log rejects commands: %s", error)
                await asyncio.sleep(1)

    async def _read_on(self) -> None:
        async with self._blocking.client() as reader:
            self._reader_id = 0
            await self._renew_truncated_streams()
            checked_at = asyncio.get_running_loop().time()
            try:
                self._reader_id = int(await reader.client_id())
                while True:
                    if not self._watches:
                        await self._changed.wait()
                    self._changed.clear()
                    self._mark_connected()
                    streams = {_stream(channel): str(watch.position) for channel, watch in self._watches.items()}
                    if not streams:
                        continue
                    reply: Any = await reader.xread(streams, READ_EVENTS, int(BLOCK_SECONDS * 1000))  # type: ignore[arg-type]
                    for name, entries in reply or ():
                        self._deliver(_channel(_text(name)), entries)
                    if asyncio.get_running_loop().time() - checked_at >= BLOCK_SECONDS:
                        await self._renew_truncated_streams()
                        checked_at = asyncio.get_running_loop().time()
            finally:
                self._reader_id = 0

    def _deliver(self, channel: str, entries: Sequence[Any]) -> None:
        watch = self._watches.get(channel)
        events = [event for event in map(_event, entries) if watch and event.position > watch.position]
        if watch and events:
            watch.position = events[-1].position
            self._seen = max(self._seen, watch.position.epoch)
            watch.deliver(events)

    async def _renew_truncated_streams(self) -> None:
        """Begin a new epoch for streams whose end the server has lost after this process received it."""
        for channel, watch in tuple(self._watches.items()):
            if watch.position == ORIGIN:
                continue
            found = await self._call(_RENEW, [_stream(channel)], *watch.position, self._seen)
            if found == 1:
                log.warning("the Redis server has lost the end of %s: a new epoch begins", channel)
            elif found == 2:
                log.warning("the Redis server has lost %s, and its clock was set back", channel)
                watch.position = ORIGIN

    # -- reading

    async def read(
        self, channel: str, after: Position, limit: int, size: int = BATCH_BYTES, names: Sequence[str] = ()
    ) -> Batch:
        """Return up to `limit` events after a position, and about `size` bytes, with checkpoints."""
        limit = min(limit, 1 + size // self._sizes.get(channel, TYPICAL_BYTES))

        async def fetch() -> Sequence[Any]:
            pipe = self._redis.pipeline(transaction=bool(names))  # then all of it is of one moment
            pipe.xinfo_stream(_stream(channel))  # before the events: `last` must not be later than they are
            pipe.xrange(_stream(channel), f"({after}", "+", limit)
            if names:
                pipe.hmget(_keys(channel)[1], names)
            replies = await pipe.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, DISCONNECTED):
                    raise reply
            return replies

        info, entries, *texts = await self._retry_while_disconnected(fetch)
        if isinstance(entries, Exception):
            raise EventLogError("The Redis server of the event log rejects reads.") from entries
        last = ORIGIN if isinstance(info, ResponseError) else Position.parse(_text(info["last-generated-id"])) or ORIGIN
        self._seen = max(self._seen, last.epoch)
        if is_replaced(after, last):
            return await self.read(channel, ORIGIN, limit, size, names)
        events = [_event(entry) for entry in entries]
        if events:
            self._record_size(channel, sum(len(event.data) for event in events) // len(events))
        found = zip(names, texts[0], strict=True) if texts else ()
        return Batch(within(events, size), last, {name: _text(text) for name, text in found if text is not None})

    def _record_size(self, channel: str, size: int) -> None:
        """Record the size of the events of a channel: the server limits their number, not their bytes."""
        if len(self._sizes) >= SIZES:
            self._sizes.clear()
        self._sizes[channel] = max(1, size)

    async def checkpoint(self, channel: str, name: str) -> str | None:
        """Return the text that was last appended under a name."""

        async def fetch() -> Any:
            return await self._redis.hget(_keys(channel)[1], name)

        value = await self._retry_while_disconnected(fetch)
        return None if value is None else _text(value)

    async def checkpoints(self, prefix: str, name: str) -> Mapping[str, str]:
        """Return the texts last appended under a name, by channel, of channels whose names begin with a prefix."""
        pattern = _keys(re.sub(r"([*?\[\]\\])", r"\\\1", prefix) + "*")[1]

        async def fetch() -> tuple[list[str], list[Any]]:
            keys = [_text(key) async for key in self._redis.scan_iter(match=pattern, count=SCAN_KEYS)]
            keys = list(dict.fromkeys(keys))  # a scan may return one twice
            pipe = self._redis.pipeline(transaction=False)
            for key in keys:
                pipe.hget(key, name)
            return keys, await pipe.execute()

        keys, values = await self._retry_while_disconnected(fetch)
        found = zip(keys, values, strict=True)
        return {_channel(key): _text(value) for key, value in found if value is not None}

    # -- deleting

    async def trim(self, channel: str, retention: Retention) -> None:
        """Delete the events beyond the retention."""

        async def fetch() -> None:
            seconds, micros = await self._redis.time()
            before = seconds * 1000 + micros // 1000 - int(retention.seconds * 1000)
            await self._call(_TRIM, [_stream(channel)], before)
            await self._redis.xtrim(_stream(channel), maxlen=retention.events, approximate=False)

        await self._retry_while_disconnected(fetch)

    async def _run_housekeeping(self) -> None:
        while True:
            await asyncio.sleep(AGING_SECONDS)
            for channel, retention in tuple(self._aging.items()):
                await self.trim(channel, retention)

    async def delete(self, channel: str) -> None:
        """Delete a channel, with its events and checkpoints."""

        async def fetch() -> None:
            pipe = self._redis.pipeline(transaction=False)
            pipe.delete(*_keys(channel))
            for reply in await self._execute(pipe):
                if isinstance(reply, Exception):
                    raise reply

        self._aging.pop(channel, None)
        await self._retry_while_disconnected(fetch)

    async def extend(self, channel: str, seconds: float) -> None:
        """Move the expiry of a channel."""

        async def fetch() -> None:
            pipe = self._redis.pipeline()
            for key in _keys(channel):
                pipe.pexpire(key, max(1, int(seconds * 1000)), xx=True)
            await pipe.execute()

        await self._retry_while_disconnected(fetch)

    # -- leases

    async def hold(self, lease: str) -> bool:
        """Take a lease, or renew it for LEASE_SECONDS; raises EventLogError while the server is disconnected."""
        token = self._leases.get(lease, "")
        fresh = not token
        token = token or secrets.token_hex(8)
        try:
            held = await self._call(_HOLD, [_lease_key(lease)], token, int(LEASE_SECONDS * 1000), int(fresh))
        except DISCONNECTED as error:
            self._mark_disconnected(error)
            raise EventLogError(self._problem) from None
        except RedisError as error:
            log.error("the lease %s cannot be held: %s", lease, error)
            raise EventLogError("The Redis server of the event log rejects writes.") from None
        if held:
            self._leases[lease] = token
        else:
            self._leases.pop(lease, None)
        return bool(held)

    async def release(self, lease: str) -> None:
        """Release a lease; one that cannot be released expires."""
        if token := self._leases.pop(lease, ""):
            try:
                await self._call(_RELEASE, [_lease_key(lease)], token)
            except RedisError as error:
                log.warning("the lease %s cannot be released: %s", lease, error)


def _keys(channel: str) -> tuple[str, str]:
    """Return the keys of a channel: stream and state. A cluster stores keys with equal braces together."""
    return _stream(channel), f"streamlab:{{{channel}}}:state"


def _stream(channel: str) -> str:
    return f"streamlab:{{{channel}}}:events"


def _channel(key: str) -> str:
    """Return the channel of a key of `_keys`."""
    return key.removeprefix("streamlab:{").rpartition("}:")[0]


def _token_key(channel: str, token: str) -> str:
    return f"streamlab:{{{channel}}}:applied:{token}"


def _lease_key(lease: str) -> str:
    return f"streamlab:lease:{lease}"


def _arguments(append: Append, seen: int, last: Position) -> Iterator[str | bytes]:
    retention = append.retention
    options = {
        "keep": retention.events,
        "idle": None if retention.idle_seconds is None else max(1, int(retention.idle_seconds * 1000)),
        "expires": None if retention.expires_at is None else int(retention.expires_at * 1000),
        "lease": bool(append.lease),
        "fence": append.fence,
        "token_seconds": TOKEN_SECONDS,
        # As texts: to a script, numbers are floating-point.
        "seen": str(seen),
        "epoch": str(last.epoch),
        "offset": str(last.offset),
        "checkpoints": [[name, text] for name, text in append.checkpoints.items() if text is not None],
        "removed": [name for name, text in append.checkpoints.items() if text is None],
        "located": append.located,
        "counts": [*append.counts.items()],
        "expected": [[name, text or "", text is not None] for name, text in append.expected.items()],
        "copy_until": None if append.copy is None else str(append.copy.until),
    }
    yield json.dumps({name: value for name, value in options.items() if value is not None}, ensure_ascii=False)
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
    """Yield the seconds between two attempts: short at first, at most two, different for each process."""
    delay = 0.05
    while True:
        yield delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, keeps no secret
        delay = min(2.0, delay * 2)
