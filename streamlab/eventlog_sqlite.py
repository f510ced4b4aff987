"""Events kept in a SQLite file that the processes of one machine share, or in memory."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .eventlog import (
    BATCH_BYTES,
    ORIGIN,
    Append,
    AppendQueue,
    Batch,
    Deliver,
    Event,
    EventLogError,
    Position,
    Retention,
    within,
)
from .leases import Leases
from .threads import Threads

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 0.02
"""How often a process looks for what other processes of the machine have committed."""

HOUSEKEEPING_SECONDS = 2.0
"""How often the write-ahead log goes into the file, and what is too old goes out of it."""

BUSY_SECONDS = 10.0
"""How long a commit waits for another process's."""

TAIL_EVENTS = 1000
"""Events that are read at once to catch up with another process."""

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS channels (
        id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, epoch INTEGER NOT NULL, last INTEGER NOT NULL,
        keep_events INTEGER NOT NULL, keep_seconds REAL NOT NULL, expires INTEGER
    );
    CREATE INDEX IF NOT EXISTS expiring ON channels (expires) WHERE expires IS NOT NULL;
    CREATE TABLE IF NOT EXISTS events (
        channel INTEGER NOT NULL, epoch INTEGER NOT NULL, offset INTEGER NOT NULL,
        time INTEGER NOT NULL, event TEXT NOT NULL, key TEXT NOT NULL, data BLOB NOT NULL,
        PRIMARY KEY (channel, epoch, offset)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS checkpoints (
        channel INTEGER NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (channel, name)
    ) WITHOUT ROWID;
"""


@dataclass(slots=True)
class _Watch:
    position: Position
    deliver: Deliver
    behind: bool = False
    """Whether something was committed that cannot be delivered before it has been read from the file."""


class SqliteLog:
    """An event log in one file in WAL mode. `path` None keeps it in memory, for one process and its life.

    A commit is safe when the process dies (SIGKILL). When the machine dies, the last seconds may be lost: every
    channel then begins a new epoch at the next start, so that clients hear of it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._queue = AppendQueue(self._keep)
        self._watches: dict[str, _Watch] = {}
        self._watched = asyncio.Event()
        self._behind = asyncio.Event()
        # One thread writes and one reads, each with its connection; in memory there is one of both.
        self._writing = Threads("eventlog-write", 1)
        self._reading = self._writing if path is None else Threads("eventlog-read", 1)
        self._beside = Threads("eventlog-beside", 1)
        """Takes leases and moves the write-ahead log into the file, so that no event waits for either."""
        self._leases = None if path is None else Leases(path.with_name(f"{path.name}-leases"), self._beside)
        self._dirty = False

    # -- life

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open the file, making it if need be, and keep house until the block ends."""
        async with AsyncExitStack() as stack:
            for threads in dict.fromkeys((self._beside, self._writing, self._reading)):
                await stack.enter_async_context(threads)
            try:
                await self._writing.run(self._open, discard=self._undo_open)
            except (OSError, sqlite3.Error) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                raise EventLogError(f"cannot keep events there: {reason}") from None
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(work()) for work in (self._queue.run, self._tail, self._keep_house)]
                    try:
                        yield
                    finally:
                        for task in tasks:
                            task.cancel()
            finally:
                if self._leases is not None:
                    self._leases.close()
                # Each on its own thread: what was asked for last may still be read there.
                try:
                    await self._reading.finish(self._close_reader)
                finally:
                    await self._writing.finish(self._close)

    def _connect(self) -> sqlite3.Connection:
        target = ":memory:" if self._path is None else self._path
        connection = sqlite3.connect(target, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            # Housekeeping moves the log into the file, so that no commit waits for a disk.
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute("PRAGMA journal_size_limit = 16777216")
            connection.execute("PRAGMA cache_size = -16384")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _open(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        self._db = self._connect()
        try:
            self._db.executescript(_SCHEMA)
            with self._transaction():
                self._count_opening()
            self._version = self._data_version()
            self._readers = self._db if self._path is None else self._connect()
        except BaseException:
            self._db.close()
            raise

    def _undo_open(self, _: None) -> None:
        self._close_reader()
        self._close()

    def _close_reader(self) -> None:
        if self._readers is not self._db:
            self._readers.close()

    def _close(self) -> None:
        with self._durably(), self._transaction():
            self._db.execute("UPDATE meta SET value = value - 1 WHERE name = 'open'")
        self._db.close()

    def _count_opening(self) -> None:
        """Begin new epochs where the machine has been started anew while somebody had this file open.

        With `synchronous = NORMAL`, commits of the last seconds are lost if the machine stops without warning. A
        client may have seen them, and must not take what is published now for what comes after them.
        """
        boot, meta = _boot_id(), dict(self._db.execute("SELECT name, value FROM meta"))
        opened = int(meta.get("open", "0"))
        if meta.get("boot", boot) != boot:
            if opened > 0:
                log.warning("the machine stopped while %s was in use: every channel begins a new epoch", self._path)
                for (channel,) in self._db.execute("SELECT id FROM channels ORDER BY id").fetchall():
                    fresh = (self._new_epoch(), channel)
                    self._db.execute("UPDATE channels SET epoch = ?, last = 0 WHERE id = ?", fresh)
            opened = 0
        self._set_meta("boot", boot)
        self._set_meta("open", str(opened + 1))

    def _set_meta(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _durably(self) -> Iterator[None]:
        """Make commits of the block safe from a machine that stops."""
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            yield
        finally:
            self._db.execute("PRAGMA synchronous = NORMAL")

    def _data_version(self) -> int:
        """A number that changes when another process commits. (The reading connection never does.)"""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def _new_epoch(self) -> int:
        """An epoch later than every other of this file, whatever the clock says."""
        row = self._db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
        epoch = max(_now(), int(row[0]) + 1 if row else 0)
        self._set_meta("epoch", str(epoch))
        return epoch

    # -- appending

    async def append(self, append: Append) -> Position:
        """Add events; they are in the file's write-ahead log when this returns."""
        return await self._queue.append(append)

    async def _keep(self, appends: Sequence[Append]) -> Sequence[Position | EventLogError]:
        try:
            now, positions = await self._writing.run(self._commit, appends)
        except sqlite3.Error as error:
            log.error("events cannot be kept: %s", error)
            return [EventLogError("The event log cannot be written to.") for _ in appends]
        self._dirty = True
        for append, last in zip(appends, positions, strict=True):
            if watch := self._watches.get(append.channel):
                self._pass_on(watch, append, last, now)
        return positions

    def _commit(self, appends: Sequence[Append]) -> tuple[int, list[Position]]:
        now = _now()
        with self._transaction():
            return now, [self._add(append, now) for append in appends]

    def _add(self, append: Append, now: int) -> Position:
        db, keep = self._db, append.retention
        expires = None if keep.idle_seconds is None else now + int(keep.idle_seconds * 1000)
        row = db.execute("SELECT id, epoch, last FROM channels WHERE name = ?", (append.channel,)).fetchone()
        if row is None:
            epoch, last = self._new_epoch(), 0
            (channel,) = db.execute(
                "INSERT INTO channels (name, epoch, last, keep_events, keep_seconds) "
                "VALUES (?, ?, 0, ?, ?) RETURNING id",
                (append.channel, epoch, keep.events, keep.seconds),
            ).fetchone()
        else:
            channel, epoch, last = row
        db.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (channel, epoch, offset, now, draft.event, draft.key, draft.data)
                for offset, draft in enumerate(append.drafts, last + 1)
            ),
        )
        end = last + len(append.drafts)
        db.execute(
            "UPDATE channels SET last = ?, expires = ?, keep_events = ?, keep_seconds = ? WHERE id = ?",
            (end, expires, keep.events, keep.seconds, channel),
        )
        if append.checkpoint is not None:
            db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?)", (channel, *append.checkpoint))
        step = max(1, keep.events // 8)
        if end // step != last // step:  # now and then, and then many
            self._forget_surplus(channel, epoch, end - keep.events)
        return Position(epoch, end)

    def _forget_surplus(self, channel: int, epoch: int, until: int) -> None:
        if until > 0:
            forgotten = (channel, epoch, until)
            self._db.execute("DELETE FROM events WHERE channel = ? AND (epoch, offset) <= (?, ?)", forgotten)

    # -- passing on

    def _pass_on(self, watch: _Watch, append: Append, last: Position, now: int) -> None:
        """Deliver what was just committed, unless another process's events come before it."""
        if not append.drafts:
            return
        first = Position(last.epoch, last.offset - len(append.drafts) + 1)
        if watch.behind or not watch.position.precedes(first):
            watch.behind = True
            self._behind.set()
            return
        watch.position = last
        watch.deliver(
            [
                Event(Position(last.epoch, offset), now, draft.data, draft.event, draft.key)
                for offset, draft in enumerate(append.drafts, first.offset)
            ]
        )

    def watch(self, channel: str, after: Position, deliver: Deliver) -> None:
        """Deliver what follows a position: this process's commits at once, those of others within POLL_SECONDS."""
        self._watches[channel] = _Watch(after, deliver, behind=True)
        self._watched.set()
        self._behind.set()

    def unwatch(self, channel: str) -> None:
        """End a watch."""
        self._watches.pop(channel, None)

    async def _tail(self) -> None:
        """Read, for every watch that is behind, what it lacks; look for what other processes commit."""
        while True:
            if not self._watches:
                self._watched.clear()
                await self._watched.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if self._path is None else POLL_SECONDS):
                    await self._behind.wait()
            self._behind.clear()
            try:
                version = await self._writing.run(self._data_version)
                if version != self._version:
                    self._version = version
                    for watch in self._watches.values():
                        watch.behind = True
                for channel, watch in tuple(self._watches.items()):
                    if watch.behind:
                        await self._catch_up(channel, watch)
            except sqlite3.Error as error:
                log.error("events cannot be read: %s", error)
                await asyncio.sleep(1)

    async def _catch_up(self, channel: str, watch: _Watch) -> None:
        watch.behind = False  # what is committed from here on sets it again
        while self._watches.get(channel) is watch:
            batch = await self.read(channel, watch.position, TAIL_EVENTS)
            events = [event for event in batch.events if event.position > watch.position]
            if not events:
                return
            if self._watches.get(channel) is watch:
                watch.position = events[-1].position
                watch.deliver(events)

    # -- reading

    async def _asked(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return await self._reading.run(work, *arguments)
        except sqlite3.Error as error:
            raise EventLogError("The event log cannot be read.") from error

    async def read(self, channel: str, after: Position, limit: int, size: int = BATCH_BYTES) -> Batch:
        """Return up to `limit` events that follow a position, and about `size` bytes."""
        return await self._asked(self._read, channel, after, limit, size)

    def _read(self, channel: str, after: Position, limit: int, size: int) -> Batch:
        db = self._readers
        db.execute("BEGIN")  # one snapshot for both questions
        try:
            row = db.execute("SELECT id, epoch, last FROM channels WHERE name = ?", (channel,)).fetchone()
            if row is None:
                return Batch((), ORIGIN)
            number, epoch, last = row
            rows = db.execute(
                "SELECT epoch, offset, time, data, event, key FROM events "
                "WHERE channel = ? AND (epoch, offset) > (?, ?) ORDER BY epoch, offset LIMIT ?",
                (number, *after, limit),
            )
            events = (Event(Position(row[0], row[1]), *row[2:]) for row in rows)
            return Batch(within(events, size), Position(epoch, last))
        finally:
            db.execute("COMMIT")

    async def checkpoint(self, channel: str, name: str) -> str | None:
        """Return the text that was last appended under a name."""
        return await self._asked(self._read_checkpoint, channel, name)

    def _read_checkpoint(self, channel: str, name: str) -> str | None:
        row = self._readers.execute(
            "SELECT value FROM checkpoints WHERE name = ? AND channel = (SELECT id FROM channels WHERE name = ?)",
            (name, channel),
        ).fetchone()
        return row[0] if row else None

    async def checkpoints(self, prefix: str, name: str) -> Mapping[str, str]:
        """Return the texts last appended under a name, by the names of their channels, which begin with a prefix."""
        return await self._asked(self._read_checkpoints, prefix, name)

    def _read_checkpoints(self, prefix: str, name: str) -> Mapping[str, str]:
        rows = self._readers.execute(
            "SELECT channels.name, value FROM channels JOIN checkpoints ON channel = id "
            "WHERE channels.name >= ? AND channels.name < ? AND checkpoints.name = ?",
            (prefix, prefix + "\U0010ffff", name),
        )
        return dict(rows.fetchall())

    # -- forgetting

    async def trim(self, channel: str, retention: Retention) -> None:
        """Forget what retention does not keep."""
        await self._writing.run(self._trim, channel, retention)

    def _trim(self, channel: str, retention: Retention) -> None:
        with self._transaction():
            row = self._db.execute("SELECT id, epoch, last FROM channels WHERE name = ?", (channel,)).fetchone()
            if row is not None:
                number, epoch, last = row
                self._forget_surplus(number, epoch, last - retention.events)
                self._forget_aged(number, _now() - int(retention.seconds * 1000))

    def _forget_aged(self, channel: int, before: int) -> None:
        # Events are in the order of their times, so this reads only what it deletes, and one more.
        kept = self._db.execute(
            "SELECT epoch, offset FROM events WHERE channel = ? AND time >= ? ORDER BY epoch, offset LIMIT 1",
            (channel, before),
        ).fetchone()
        if kept is None:
            self._db.execute("DELETE FROM events WHERE channel = ?", (channel,))
        else:
            self._db.execute("DELETE FROM events WHERE channel = ? AND (epoch, offset) < (?, ?)", (channel, *kept))

    async def delete(self, channel: str) -> None:
        """Forget a channel and all that belongs to it."""
        await self._writing.run(self._delete, "name = ?", channel)

    def _delete(self, condition: str, value: object) -> None:
        with self._transaction():
            found = self._db.execute(f"SELECT id FROM channels WHERE {condition}", (value,)).fetchall()  # noqa: S608
            for channel in found:
                for table, column in (("events", "channel"), ("checkpoints", "channel"), ("channels", "id")):
                    self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", channel)  # noqa: S608

    async def _keep_house(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            try:
                await self._writing.run(self._forget, turn % 10 == 0)
                if self._dirty and self._path is not None:
                    self._dirty = False
                    await self._beside.run(self._checkpoint_file)
            except sqlite3.Error as error:
                log.warning("the event log could not be tidied: %s", error)
            turn += 1

    def _forget(self, aged_too: bool) -> None:
        now = _now()
        expired = self._db.execute("SELECT 1 FROM channels WHERE expires < ? LIMIT 1", (now,)).fetchone()
        if expired:
            self._delete("expires < ?", now)
        if aged_too:
            for channel, seconds in self._db.execute("SELECT id, keep_seconds FROM channels").fetchall():
                oldest = self._db.execute(
                    "SELECT time FROM events WHERE channel = ? ORDER BY epoch, offset LIMIT 1", (channel,)
                ).fetchone()
                if oldest and oldest[0] < (before := now - int(seconds * 1000)):
                    with self._transaction():
                        self._forget_aged(channel, before)

    def _checkpoint_file(self) -> None:
        """Move the write-ahead log into the file, on a connection of its own, while others read and write."""
        connection = self._connect()
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        finally:
            connection.close()

    # -- leases

    async def hold(self, lease: str) -> bool:
        """Take a lease; in memory there is nobody else who could."""
        return self._leases is None or await self._leases.hold(lease)

    async def release(self, lease: str) -> None:
        """Give a lease back."""
        if self._leases is not None:
            self._leases.release(lease)

    def state(self) -> Mapping[str, object]:
        """Say that all is well: a file does not go away."""
        return {"engine": "sqlite" if self._path else "memory", "state": "ok"}


def _now() -> int:
    return time.time_ns() // 1_000_000


def _boot_id() -> str:
    """What changes when the machine is started anew; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
