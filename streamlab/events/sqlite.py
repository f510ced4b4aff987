"""The event log in a SQLite file that the processes of one machine share, or in memory."""

import asyncio
import logging
import os
import sqlite3
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from math import inf
from pathlib import Path
from typing import TypeVar

import msgspec

from streamlab.threads import Threads
from streamlab.ticks import tick, until_tick

from .append_queue import AppendQueue
from .leases import Leases
from .log import (
    BATCH_BYTES,
    END,
    ORIGIN,
    Append,
    Batch,
    Conflict,
    Deliver,
    EncodedEvent,
    Event,
    EventLogError,
    LeaseLost,
    Position,
    Retention,
    is_replaced,
    within,
)
from .wakes import Commit, Wakes

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 0.02
"""Interval at which a process looks for commits of others where these cannot wake it (see Wakes), in seconds."""

SETTLE_SECONDS = 0.1
"""Time for which commits are looked for after a file was seen to change, in seconds.

The clock of files has steps of some milliseconds, and a commit is visible shortly after it was written.
"""

LOOK_SECONDS = 2.0
"""Interval at which it looks for them where they can wake it, in seconds."""

CERTAIN_SECONDS = 20.0
"""Interval at which commits are looked for although no file was seen to change, in seconds."""

HOUSEKEEPING_SECONDS = 2.0
"""Interval at which the write-ahead log is moved into the file, and expired channels are deleted, in seconds."""

QUIET_TURNS = 10
"""Turns of housekeeping of which one is done although no file was seen to change; it deletes expired events, too."""

RETRY_SECONDS = 0.005
"""Interval at which it is tried again to use a write-ahead log while another process does the same, in seconds."""

BUSY_SECONDS = 10.0
"""Maximum seconds that a commit waits for one of another process."""

TAIL_EVENTS = 1000
"""Maximum number of events read at once to catch up with another process."""

SUFFIXES = ("", "-wal", "-shm")
"""Suffixes of the files of a database: itself, its write-ahead log, and the index of that log."""

MOVED = "moved"
"""Name and message of the triggers that reject events in a file that has been replaced by its copy."""

DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""Error codes of a damaged file."""

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


_LIVES = "(expires IS NULL OR expires > ?)"
"""Condition on a channel at a time: one that has expired does not exist, though its rows are deleted later."""

_Identity = tuple[int, int] | None
"""Device and inode of a file; None if it does not exist."""


@dataclass(slots=True)
class _Watch:
    position: Position
    deliver: Deliver
    behind: bool = False
    """Whether there are commits that must be read from the file before they can be delivered."""


class _FileReplaced(Exception):
    """The file of a commit was replaced by another."""


class SqliteLog:
    """An event log in one file in WAL mode; in memory, for this process alone, if `path` is None.

    A commit survives the death of the process (SIGKILL). When the machine fails, the last seconds may be lost: every
    channel then begins a new epoch at the next start, so that clients get a gap. If `synced`, a commit is acknowledged,
    and visible to followers, only after the disk has it, and nothing is lost: the appends that wait meanwhile share the
    next commit.

    A commit is acknowledged only after the paths of the database and its write-ahead log have been found to name the
    open files. If one was deleted, the content of the open files is copied into a new database in its place, and
    nothing is lost. If another database was put there, it is the log from then on, with new epochs. A damaged file
    rejects all events until it is moved away or replaced. Source: sqlite.org/howtocorrupt.html, section 2.
    """

    def __init__(self, path: Path | None, *, synced: bool = False) -> None:
        self._path = path
        self._synced = synced
        self._files = () if path is None else tuple(path.with_name(path.name + suffix) for suffix in SUFFIXES)
        self._opened: tuple[_Identity, ...] = ()
        """Identities of the open files."""
        self._problems: dict[str, str] = {}
        """Why events cannot be written or read (`database`), or leases be held (`leases`); sent to clients."""
        self._damaged = False
        self._keeper_lock = threading.Lock()
        """Held while a thread uses or closes the connection of housekeeping."""
        self._filled = False
        """Whether the file was seen with a schema: that of a new one is only in its write-ahead log at first."""
        self._seen = 0
        """Greatest epoch that this process has committed to or read."""
        self._queue = AppendQueue(self._commit_all)
        self._watches: dict[str, _Watch] = {}
        self._watched = asyncio.Event()
        self._behind = asyncio.Event()
        self._last_state: list[tuple[int, int, int] | None] = []
        self._settled_at = self._checked_at = -inf
        # One thread writes and one reads, each with its connection; in memory they are the same.
        self._writing = Threads("eventlog-write", 1)
        self._reading = self._writing if path is None else Threads("eventlog-read", 1)
        self._background = Threads("eventlog-background", 1)
        """Thread that takes leases and moves the write-ahead log into the file, so that no event waits for either."""
        self._leases = None if path is None else Leases(path.with_name(f"{path.name}-leases"), self._background)
        self._wakes = None if path is None else Wakes(path.with_name(f"{path.name}-wakes"))
        self._pipe: int | None = None
        """The pipe by which other processes report their commits, while the event loop reads it."""
        self._dirty = False

    # -- life

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open the file, creating it if necessary, and run housekeeping until the block ends."""
        async with AsyncExitStack() as stack:
            for threads in dict.fromkeys((self._background, self._writing, self._reading)):
                await stack.enter_async_context(threads)
            try:
                await self._writing.run(self._open, discard=self._undo_open)
            except (OSError, sqlite3.Error) as error:
                reason = f"{self._path}: {_reason(error)} (`url` of [events] names the file; sqlite:// is memory)"
                raise EventLogError(f"cannot store events there: {reason}") from None
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(work()) for work in (self._queue.run, self._tail, self._run_housekeeping)
                    ]
                    try:
                        yield
                    finally:
                        for task in tasks:
                            task.cancel()
            finally:
                if self._leases is not None:
                    self._leases.close()
                # Each on its own thread, where the last read may still be running.
                try:
                    await self._reading.finish(self._close_reader)
                finally:
                    await self._writing.finish(self._close)

    def _connect(self, how: str = "mode=rw") -> sqlite3.Connection:
        target = ":memory:" if self._path is None else f"{self._path.absolute().as_uri()}?{how}"
        connection = sqlite3.connect(
            target, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
        )
        try:
            _use_write_ahead_log(connection)
            connection.execute(f"PRAGMA synchronous = {'FULL' if self._synced else 'NORMAL'}")
            # Housekeeping moves the log into the file, so that no commit waits for a disk.
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute("PRAGMA journal_size_limit = 16777216")
            connection.execute("PRAGMA cache_size = -16384")
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # opens the write-ahead log
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _open(self) -> None:
        if self._path is not None:
            missing = [folder for folder in self._path.absolute().parents if not folder.exists()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for folder in missing if self._synced else ():  # SQLite does so for the folder of the file
                _sync_folder(folder.parent)
        self._db = self._connect("mode=rwc")
        try:
            self._db.executescript(_SCHEMA)
            with self._transaction():
                self._renew_epochs_after_power_loss()
            self._opened = self._current_files()
            self._version = self._data_version()
            self._readers, self._read_from = (self._db if self._path is None else self._connect()), self._db
            self._keeper = self._db if self._path is None else self._connect()
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
        if self._wakes is not None:
            self._wakes.close()
        try:
            if not self._synced:
                with self._durably(), self._transaction():
                    self._db.execute("UPDATE meta SET value = value - 1 WHERE name = 'open'")
        except sqlite3.Error as error:
            log.warning("the event log could not be closed cleanly: %s", error)
        with self._keeper_lock:
            self._keeper.close()
        self._db.close()

    def _renew_epochs_after_power_loss(self) -> None:
        """Begin new epochs if the machine was restarted while the file was open, and count this opening.

        With `synchronous = NORMAL`, commits of the last seconds are lost if the machine fails. A client may have
        received them, and must not take the events published from now on for their continuation. An opening that is
        `synced` loses none, and is not counted.
        """
        boot, meta = _boot_id(), dict(self._db.execute("SELECT name, value FROM meta"))
        opened = int(meta.get("open", "0"))
        if meta.get("boot", boot) != boot:
            if opened > 0:
                log.warning("the machine stopped while %s was in use: every channel begins a new epoch", self._path)
                self._renew_epochs()
            opened = 0
        self._set_meta("boot", boot)
        self._set_meta("open", str(opened if self._synced else opened + 1))
        self._set_meta("inode", _inode(self._path))

    def _renew_epochs(self) -> None:
        for (channel,) in self._db.execute("SELECT id FROM channels ORDER BY id").fetchall():
            fresh = (self._new_epoch(), channel)
            self._db.execute("UPDATE channels SET epoch = ?, last = 0 WHERE id = ?", fresh)

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
        """Make commits of the block survive a failure of the machine, though the log is not `synced`."""
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            yield
        finally:
            self._db.execute("PRAGMA synchronous = NORMAL")

    def _data_version(self) -> int:
        """Return a number that changes when another process commits. (The reading connection never does.)"""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def _new_epoch(self) -> int:
        """Return an epoch later than every other of this file, whatever the clock says."""
        row = self._db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
        epoch = max(_now(), int(row[0]) + 1 if row else 0)
        self._set_meta("epoch", str(epoch))
        return epoch

    # -- files that are deleted, replaced or damaged

    def _current_files(self, count: int = len(SUFFIXES)) -> tuple[_Identity, ...]:
        """Return the identities of the first `count` files at their paths: a system call each."""
        return tuple(_identity(file) for file in self._files[:count])

    def _ensure_in_place(self, count: int = len(SUFFIXES)) -> bool:
        """Return whether all commits are in the files at the first `count` paths.

        If these are other files, the log continues in them. Raises OSError or sqlite3.Error if it cannot at present.
        """
        if not self._damaged and self._current_files(count) == self._opened[:count]:
            return True
        assert self._leases is not None, "a log in memory has no files"
        with self._leases.locked("files"):  # one process repairs, and the others find it repaired
            (database, *others), (opened, *others_opened) = self._current_files(), self._opened
            if database in (None, opened) and not self._damaged:
                self._copy()
            elif database == opened:
                raise sqlite3.DatabaseError("the file is damaged; move it away, or a backup into its place")
            else:  # files of the old database must not be applied to the new one
                for file, identity, before in zip(self._files[1:], others, others_opened, strict=True):
                    if identity == before:
                        file.unlink(missing_ok=True)
            complete = self._reopen()
        outcome = "all its events are in a new file" if complete else "events that the present file lacks are lost"
        log.warning("the event log's file %s was deleted or replaced while in use; %s", self._path, outcome)
        return complete

    def _copy(self) -> None:
        """Replace the deleted files by a copy of the open ones.

        Other processes that have the old files open cannot commit meanwhile, and cannot add events to them later.
        """
        database, log_file, index = self._files
        copy = database.with_name(f"{database.name}-copy")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)
        with self._transaction():
            log_file.unlink(missing_ok=True)
            with self._keeper_lock:
                self._keeper.execute("VACUUM INTO ?", (str(copy),))  # a connection in a transaction cannot
            with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
                # Each process that has the old file open will count its opening in the new one.
                connection.execute("UPDATE meta SET value = '0' WHERE name = 'open'")
                connection.execute("UPDATE meta SET value = ? WHERE name = 'inode'", (_inode(copy),))
            with copy.open("rb") as file:
                os.fsync(file.fileno())
            index.unlink(missing_ok=True)
            copy.replace(database)
            _sync_folder(database.parent)
            for change in ("INSERT", "UPDATE"):
                self._db.execute(
                    f"CREATE TRIGGER {MOVED}_{change} BEFORE {change} ON channels "
                    f"BEGIN SELECT RAISE(ABORT, '{MOVED}'); END"
                )

    def _reopen(self) -> bool:
        """Open the file that is at the path now, and return whether it has all commits of the old file.

        Every channel of a file that streamlab did not put there begins a new epoch.

        The old connections can be closed: SQLite deletes no write-ahead log of a database that has moved.
        """
        old, self._db = self._db, self._connect("mode=rwc")
        try:
            self._db.executescript(_SCHEMA)
            keeper = self._connect()
            with self._transaction():
                meta = dict(self._db.execute("SELECT name, value FROM meta"))
                self._set_meta("epoch", str(max(self._seen, int(meta.get("epoch", "0")))))
                if foreign := meta.get("inode") != _inode(self._path):
                    self._renew_epochs()
                self._renew_epochs_after_power_loss()
            self._opened = self._current_files()
        except BaseException:
            self._db.close()
            self._db = old
            raise
        self._damaged, self._filled, self._version = False, False, -1  # every watch has to read
        with self._keeper_lock:
            self._keeper.close()
            self._keeper = keeper
        with suppress(sqlite3.Error), closing(old):
            marks = old.execute("SELECT count(*) FROM sqlite_schema WHERE name LIKE ?", (f"{MOVED}%",)).fetchone()
            return not foreign and marks != (0,)
        return False

    def _reader(self) -> sqlite3.Connection:
        """Return the reading thread's connection to the file that is in use."""
        if self._read_from is not (db := self._db):
            readers = self._connect()
            with suppress(sqlite3.Error):
                self._readers.close()
            self._readers, self._read_from = readers, db
        return self._readers

    def _mark_failed(self, error: OSError | sqlite3.Error | _FileReplaced, part: str = "database") -> EventLogError:
        """Record a failure for /health, and return the error for the caller."""
        self._damaged = self._damaged or getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE
        if (reason := _reason(error)) != self._problems.get(part):
            log.error("the event log %s fails (%s): %s", self._path or "in memory", part, reason)
        self._problems[part] = reason
        return EventLogError(f"The event log fails: {reason}.")

    def _mark_working(self, part: str = "database") -> None:
        if self._problems.pop(part, ""):
            log.warning("the event log %s works again (%s)", self._path or "in memory", part)

    # -- appending

    async def append(self, append: Append) -> Position:
        """Add events; they are in the write-ahead log of the file when this returns.

        A suspended process keeps the locks of its leases, so that no fence has to be compared at the commit.
        """
        if append.lease and self._leases is not None and not self._leases.holds(append.lease):
            raise LeaseLost
        return await self._queue.append(append)

    async def _commit_all(self, appends: Sequence[Append]) -> Sequence[Position | EventLogError]:
        try:
            now, results = await self._writing.run(self._commit, appends)
        except (OSError, sqlite3.Error, _FileReplaced) as error:
            failure = self._mark_failed(error)
            return [failure for _ in appends]
        self._dirty = True
        for append, last in zip(appends, results, strict=True):
            if isinstance(last, Position):
                self._seen = max(self._seen, last.epoch)
                if watch := self._watches.get(append.channel):
                    self._deliver_commit(watch, append.drafts, last, now)
        return results

    def _commit(self, appends: Sequence[Append]) -> tuple[int, list[Position | Conflict]]:
        if self._damaged:
            self._ensure_in_place()
        now = _now()
        try:
            results = self._commit_once(appends, now)
        except sqlite3.IntegrityError:  # another process has copied this file into a new one
            self._ensure_in_place(2)
            results = self._commit_once(appends, now)
        if not self._ensure_in_place(2):
            raise _FileReplaced("its file was replaced while this was written")
        if self._wakes is not None:
            self._wakes.notify(
                lambda: [
                    Commit(append.channel, last.epoch, last.offset, now, append.drafts)
                    for append, last in zip(appends, results, strict=True)
                    if isinstance(last, Position)
                ]
            )
        return now, results

    def _commit_once(self, appends: Sequence[Append], now: int) -> list[Position | Conflict]:
        results: list[Position | Conflict] = []
        with self._transaction():
            for _, alike in groupby(appends, _kind):
                results += self._add_alike(list(alike), now)
        return results

    def _add_alike(self, appends: Sequence[Append], now: int) -> Iterator[Position | Conflict]:
        """Add appends of one kind as one, which takes a fraction of their time; yield the result of each."""
        first, counts = appends[0], Counter[str]()
        if len(appends) > 1:
            for append in appends:
                counts.update(append.counts)
            drafts = [draft for append in appends for draft in append.drafts]
            first = first._replace(drafts=drafts, counts=counts)
        last = self._add(first, now)
        behind = len(first.drafts)
        for append in appends:
            behind -= len(append.drafts)
            yield last._replace(offset=last.offset - behind) if isinstance(last, Position) else last

    def _add(self, append: Append, now: int) -> Position | Conflict:
        db, retention = self._db, append.retention
        row = db.execute("SELECT id, epoch, last, expires FROM channels WHERE name = ?", (append.channel,)).fetchone()
        if row is not None and row[3] is not None and row[3] <= now:
            self._forget([row[:1]])
            row = None
        if append.expected:
            before = {} if row is None else self._checkpoints_of(db, row[0], append.expected)
            if any(before.get(name) != text for name, text in append.expected.items()):
                return Conflict({name: before.get(name) for name in append.expected})
        source = None
        if append.copy is not None:
            source = db.execute(f"SELECT id FROM channels WHERE name = ? AND {_LIVES}", (append.copy.channel, now))  # noqa: S608
            if (source := source.fetchone()) is None or row is not None:
                return Conflict({})
        if row is None:
            epoch, last = self._new_epoch(), 0
            (channel,) = db.execute(
                "INSERT INTO channels (name, epoch, last, keep_events, keep_seconds) "
                "VALUES (?, ?, 0, ?, ?) RETURNING id",
                (append.channel, epoch, retention.events, retention.seconds),
            ).fetchone()
        else:
            channel, epoch, last, _ = row
        if append.copy is not None and source is not None:
            db.execute(
                "INSERT INTO events SELECT ?, epoch, offset, time, event, key, data FROM events "
                "WHERE channel = ? AND (epoch, offset) <= (?, ?) AND event != ?",
                (channel, *source, *append.copy.until, END),
            )
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
            (end, _expiry(retention, now), retention.events, retention.seconds, channel),
        )
        if append.checkpoints:
            texts = {name: text for name, text in append.checkpoints.items() if text is not None}
            if append.located:
                texts[append.located] = f"{Position(epoch, end)} {texts[append.located]}"
            rows = [(channel, name, text) for name, text in texts.items()]
            db.executemany("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?)", rows)
            removed = [(channel, name) for name in append.checkpoints.keys() - texts.keys()]
            db.executemany("DELETE FROM checkpoints WHERE channel = ? AND name = ?", removed)
        if append.counts:
            db.executemany(
                "INSERT INTO checkpoints VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET value = CAST(value AS INTEGER) + excluded.value",
                [(channel, name, count) for name, count in append.counts.items()],
            )
        step = max(1, retention.events // 8)
        if end // step != last // step:  # seldom, and then many at once
            self._delete_surplus(channel, epoch, end - retention.events)
        return Position(epoch, end)

    def _delete_surplus(self, channel: int, epoch: int, until: int) -> None:
        if until > 0:
            forgotten = (channel, epoch, until)
            self._db.execute("DELETE FROM events WHERE channel = ? AND (epoch, offset) <= (?, ?)", forgotten)

    # -- delivering

    def _deliver_commit(self, watch: _Watch, drafts: Sequence[EncodedEvent], last: Position, now: int) -> None:
        """Deliver a commit, unless others precede it that have not been delivered."""
        if not drafts:
            return
        first = Position(last.epoch, last.offset - len(drafts) + 1)
        if watch.behind or not watch.position.precedes(first):
            watch.behind = True
            self._behind.set()
            return
        watch.position = last
        watch.deliver(
            [
                Event(Position(last.epoch, offset), now, draft.data, draft.event, draft.key)
                for offset, draft in enumerate(drafts, first.offset)
            ]
        )

    def watch(self, channel: str, after: Position, deliver: Deliver) -> None:
        """Deliver the events after a position: own commits at once, those of others when their process reports them."""
        self._watches[channel] = _Watch(after, deliver, behind=True)
        self._watched.set()
        self._behind.set()

    def unwatch(self, channel: str) -> None:
        """End a watch."""
        self._watches.pop(channel, None)

    async def _tail(self) -> None:
        """Read the missing events of every watch that is behind; check for commits of other processes."""
        try:
            await self._tail_with_pipe()
        finally:
            self._read_pipe(None)

    async def _tail_with_pipe(self) -> None:
        while True:
            if not self._watches:
                self._watched.clear()
                await self._watched.wait()
            await self._wait_for_commits()
            try:
                version = await self._writing.run(self._check_version)
                self._read_pipe(None if self._wakes is None else self._wakes.descriptor)
                if version != self._version:
                    self._version = version
                    for watch in self._watches.values():
                        watch.behind = True
                for channel, watch in tuple(self._watches.items()):
                    if watch.behind:
                        await self._catch_up(channel, watch)
            except EventLogError:
                await asyncio.sleep(1)
            except (OSError, sqlite3.Error) as error:
                self._mark_failed(error)
                await asyncio.sleep(1)

    def _read_pipe(self, pipe: int | None) -> None:
        """Read another pipe from now on, or none, and close the one before."""
        if pipe == self._pipe:
            return
        loop = asyncio.get_running_loop()
        if self._pipe is not None:
            assert self._wakes is not None
            loop.remove_reader(self._pipe)
            self._wakes.release(self._pipe)
        self._pipe = pipe
        if pipe is not None:
            loop.add_reader(pipe, self._on_wake, pipe)

    def _on_wake(self, pipe: int) -> None:
        """Deliver what other processes have sent, without a thread: it is in the file before they send it."""
        assert self._wakes is not None
        try:
            commits = self._wakes.read(pipe)
        except (msgspec.MsgspecError, struct.error):  # not by this program
            commits = None
        if commits is None:
            self._behind.set()
            return
        for commit in commits:
            watch, last = self._watches.get(commit.channel), Position(commit.epoch, commit.last)
            if watch is not None and last > watch.position:
                self._deliver_commit(watch, commit.drafts, last, commit.time)

    async def _wait_for_commits(self) -> None:
        """Return when a watch is behind, or when another process may have committed."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None
        seconds = POLL_SECONDS if self._pipe is None else LOOK_SECONDS

        def poll() -> None:
            nonlocal timer
            timer = loop.call_later(until_tick(seconds), poll)
            if self._may_have_changed(loop.time()):
                self._behind.set()

        if self._path is not None:
            timer = loop.call_later(until_tick(seconds), poll)
        try:
            await self._behind.wait()
        finally:
            if timer is not None:
                timer.cancel()
        self._behind.clear()

    def _may_have_changed(self, now: float) -> bool:
        """Return whether to read the version, in the thread that writes: seldom, while nobody commits."""
        state = [_state(file) for file in self._files[:2]]  # two system calls of a microsecond each
        if state != self._last_state:
            self._last_state, self._settled_at = state, now + SETTLE_SECONDS
        elif self._settled_at <= now < self._checked_at + CERTAIN_SECONDS:
            return False
        self._checked_at = now
        return True

    def _check_version(self) -> int:
        """Return the data version of the file at the path, once other processes can report their commits."""
        if self._wakes is not None:
            self._wakes.ensure()
        if not self._damaged:
            self._ensure_in_place(2)
        return self._data_version()

    async def _catch_up(self, channel: str, watch: _Watch) -> None:
        watch.behind = False  # commits from here on set it again
        while self._watches.get(channel) is watch:
            batch = await self.read(channel, watch.position, TAIL_EVENTS)
            replaced = is_replaced(watch.position, batch.last)
            events = [event for event in batch.events if replaced or event.position > watch.position]
            if not events:
                return
            if self._watches.get(channel) is watch:
                watch.position = events[-1].position
                watch.deliver(events)

    # -- reading

    async def _run_read(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return await self._reading.run(work, *arguments)
        except sqlite3.Error as error:
            raise self._mark_failed(error) from error

    async def read(
        self, channel: str, after: Position, limit: int, size: int = BATCH_BYTES, names: Sequence[str] = ()
    ) -> Batch:
        """Return up to `limit` events after a position, and about `size` bytes, with checkpoints."""
        batch = await self._run_read(self._read, channel, after, limit, size, names)
        self._seen = max(self._seen, batch.last.epoch)
        return batch

    def _read(self, channel: str, after: Position, limit: int, size: int, names: Sequence[str]) -> Batch:
        db = self._reader()
        db.execute("BEGIN")  # one snapshot for all queries
        try:
            query = f"SELECT id, epoch, last FROM channels WHERE name = ? AND {_LIVES}"  # noqa: S608
            row = db.execute(query, (channel, _now())).fetchone()
            if row is None:
                return Batch((), ORIGIN)
            number, epoch, last = row
            if is_replaced(after, Position(epoch, last)):
                after = ORIGIN
            rows = db.execute(
                "SELECT epoch, offset, time, data, event, key FROM events "
                "WHERE channel = ? AND (epoch, offset) > (?, ?) ORDER BY epoch, offset LIMIT ?",
                (number, *after, limit),
            )
            events = (Event(Position(row[0], row[1]), *row[2:]) for row in rows)
            checkpoints = self._checkpoints_of(db, number, names) if names else {}
            return Batch(within(events, size), Position(epoch, last), checkpoints)
        finally:
            db.execute("COMMIT")

    @staticmethod
    def _checkpoints_of(db: sqlite3.Connection, channel: int, names: Collection[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in names:  # each a look-up by the primary key
            row = db.execute("SELECT value FROM checkpoints WHERE channel = ? AND name = ?", (channel, name)).fetchone()
            if row is not None:
                found[name] = row[0]
        return found

    async def checkpoint(self, channel: str, name: str) -> str | None:
        """Return the text that was last appended under a name."""
        return await self._run_read(self._read_checkpoint, channel, name)

    def _read_checkpoint(self, channel: str, name: str) -> str | None:
        row = (
            self._reader()
            .execute(
                "SELECT value FROM checkpoints WHERE name = ? AND channel = "  # noqa: S608
                f"(SELECT id FROM channels WHERE name = ? AND {_LIVES})",
                (name, channel, _now()),
            )
            .fetchone()
        )
        return row[0] if row else None

    async def checkpoints(self, prefix: str, name: str) -> Mapping[str, str]:
        """Return the texts last appended under a name, by channel, of channels whose names begin with a prefix."""
        return await self._run_read(self._read_checkpoints, prefix, name)

    def _read_checkpoints(self, prefix: str, name: str) -> Mapping[str, str]:
        rows = self._reader().execute(
            "SELECT channels.name, value FROM channels JOIN checkpoints ON channel = id "  # noqa: S608
            f"WHERE channels.name >= ? AND channels.name < ? AND checkpoints.name = ? AND {_LIVES}",
            (prefix, prefix + "\U0010ffff", name, _now()),
        )
        return dict(rows.fetchall())

    # -- deleting

    async def _run_write(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return await self._writing.run(work, *arguments)
        except sqlite3.Error as error:
            raise self._mark_failed(error) from error

    async def trim(self, channel: str, retention: Retention) -> None:
        """Delete the events beyond the retention."""
        await self._run_write(self._trim, channel, retention)

    def _trim(self, channel: str, retention: Retention) -> None:
        with self._transaction():
            row = self._db.execute("SELECT id, epoch, last FROM channels WHERE name = ?", (channel,)).fetchone()
            if row is not None:
                number, epoch, last = row
                self._delete_surplus(number, epoch, last - retention.events)
                self._delete_aged(number, _now() - int(retention.seconds * 1000))

    def _delete_aged(self, channel: int, before: int) -> None:
        # Events are ordered by time, so this reads only those that it deletes, and one more.
        oldest = self._db.execute(
            "SELECT epoch, offset FROM events WHERE channel = ? AND time >= ? ORDER BY epoch, offset LIMIT 1",
            (channel, before),
        ).fetchone()
        if oldest is None:
            self._db.execute("DELETE FROM events WHERE channel = ?", (channel,))
        else:
            self._db.execute("DELETE FROM events WHERE channel = ? AND (epoch, offset) < (?, ?)", (channel, *oldest))

    async def delete(self, channel: str) -> None:
        """Delete a channel, with its events and checkpoints."""
        await self._run_write(self._delete, "name = ?", channel)

    def _delete(self, condition: str, value: object) -> None:
        with self._transaction():
            self._forget(self._db.execute(f"SELECT id FROM channels WHERE {condition}", (value,)).fetchall())  # noqa: S608

    def _forget(self, channels: Sequence[tuple[int]]) -> None:
        for channel in channels:
            for table, column in (("events", "channel"), ("checkpoints", "channel"), ("channels", "id")):
                self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", channel)  # noqa: S608

    async def extend(self, channel: str, seconds: float) -> None:
        """Move the expiry of a channel that has one and has not expired."""
        await self._run_write(self._extend, channel, int(seconds * 1000))

    def _extend(self, channel: str, milliseconds: int) -> None:
        now = _now()
        with self._transaction():
            self._db.execute(
                "UPDATE channels SET expires = ? WHERE name = ? AND expires > ?", (now + milliseconds, channel, now)
            )

    async def _run_housekeeping(self) -> None:
        turn, seen = 0, None
        while True:
            await tick(HOUSEKEEPING_SECONDS)
            state = [_state(file) for file in self._files]  # three system calls of a microsecond each
            if turn % QUIET_TURNS and state == seen and not self._dirty and not self._problems:
                turn += 1
                continue
            seen, dirty, self._dirty = state, self._dirty, False
            try:
                await self._writing.run(self._tidy, turn % QUIET_TURNS == 0)
                if self._path is not None:
                    await self._background.run(self._visit_file, dirty)
            except (OSError, sqlite3.Error) as error:
                self._mark_failed(error)
            else:
                self._mark_working()
            turn += 1

    def _tidy(self, aged_too: bool) -> None:
        """Repair the files if possible, probe writing after a failure, and delete expired events."""
        self._ensure_in_place()
        if "database" in self._problems:
            with self._transaction():
                self._set_meta("probe", str(_now()))
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
                        self._delete_aged(channel, before)

    def _visit_file(self, dirty: bool) -> None:
        """Check that the file is still a database, and move the write-ahead log into it if `dirty`.

        On dedicated connections, while others read and write: those have pages in memory, or in the write-ahead log,
        that may be missing in the file.
        """
        assert self._path is not None
        name = f"{self._path.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(name, uri=True)) as connection:
            try:
                (version,) = connection.execute("PRAGMA schema_version").fetchone()
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
                    raise
            else:  # other errors may be due to pages that another process is moving into the file
                if self._filled and not version:
                    empty = sqlite3.DatabaseError("file is empty")
                    empty.sqlite_errorcode = sqlite3.SQLITE_NOTADB
                    raise empty
                self._filled = bool(version)
        if dirty:
            with self._keeper_lock:
                self._keeper.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    # -- leases

    async def hold(self, lease: str) -> bool:
        """Take or renew a lease; always succeeds in memory. Raises EventLogError if its file cannot be created."""
        try:
            held = self._leases is None or await self._leases.hold(lease)
        except OSError as error:
            raise self._mark_failed(error, "leases") from error
        self._mark_working("leases")
        return held

    async def release(self, lease: str) -> None:
        """Release a lease."""
        if self._leases is not None:
            self._leases.release(lease)

    def is_shared(self) -> bool:
        """Return whether another process watched the log at the last commit of this one, or may have."""
        return self._wakes is not None and (self._pipe is None or self._wakes.has_others)

    def state(self) -> Mapping[str, object]:
        """Return whether events can be written and read, and the reason if not."""
        engine = "sqlite" if self._path else "memory"
        for reason in self._problems.values():
            return {"engine": engine, "state": "degraded", "reason": f"The event log fails: {reason}."}
        return {"engine": engine, "state": "ok"}


def _identity(path: Path) -> _Identity:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Use a write-ahead log; SQLite itself does not wait where several processes begin to use it in the same moment."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            return


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _inode(path: Path | None) -> str:
    """Return the inode that a file has in its table `meta`, which tells it from a copy."""
    return "" if path is None else str(path.stat().st_ino)


def _reason(error: Exception) -> str:
    """Return the reason for clients, without a path."""
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


def _kind(append: Append) -> object:
    """Return what is equal for consecutive appends whose order alone matters: none changes what another expects."""
    if append.checkpoints or append.copy is not None or append.expected.keys() & append.counts.keys():
        return object()
    return append.channel, append.retention, append.expected


def _expiry(retention: Retention, now: int) -> int | None:
    """Return when a channel expires that gets events now, in milliseconds since 1970."""
    if retention.expires_at is not None:
        return int(retention.expires_at * 1000)
    return None if retention.idle_seconds is None else now + int(retention.idle_seconds * 1000)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _boot_id() -> str:
    """Return an id that changes when the machine restarts; empty on systems without one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
