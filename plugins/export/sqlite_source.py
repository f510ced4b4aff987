"""Results of a SQLite file: read-only, begun in several threads, and continued by turns in one."""

import re
import sqlite3
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from streamlab import Threads

from .encoder import Column, Encoder, unique
from .formats import make
from .request import integer, real, truth
from .source import (
    BadQuery,
    BadValue,
    Interrupted,
    Query,
    Selection,
    TooLarge,
    Unavailable,
    UnknownColumn,
    UnrepresentableValue,
    quoted,
)

BATCHES = (16, 64, 256, 2000)
"""Number of rows in each of the first batches of an export, and in all after them: the first bytes leave early."""

CHUNK_ROWS = 256
"""Rows read and encoded at once: an encoder holds the interpreter while it encodes them. Fewer cost more each."""

BATCH_BYTES = 1024 * 1024
"""Encoded size that ends a batch before it has all its rows, in bytes."""

NARROW_BYTES = 32 * 1024
"""Maximum size of a cell while rows are read CHUNK_ROWS at once, in bytes."""

_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
"""The operations that a configured query may use; the connection denies all others: writing, ATTACH, PRAGMA."""


class _Reading:
    """A connection to a file that reads one result in one snapshot. Its methods block: call them in threads."""

    def __init__(
        self, path: Path, query: Query, known: dict[str, tuple[int, Sequence[str]]], *, max_cell: int, strict: bool
    ) -> None:
        self._path = path
        self._query = query
        self._known = known
        self._connection: sqlite3.Connection | None = None
        self._cursor: sqlite3.Cursor | None = None
        self._statement: tuple[str, Mapping[str, Any]] = "", {}
        self._encoder: Encoder | None = None
        self._read = 0
        self._max_cell = max_cell
        self._strict = strict
        self._tolerant = False
        """Whether invalid UTF-8 is read, with replacement characters; that is slower, so only once there was some."""
        self._wide = False
        """Whether cells may be larger than NARROW_BYTES; rows are read one at a time then, to limit memory."""
        self.altered = 0
        """Number of texts in which invalid UTF-8 was replaced."""

    def describe(self) -> Sequence[Column]:
        """Connect, begin the snapshot, and return the columns of the result; raises BadQuery, Unavailable."""
        try:
            self._connection = connection = sqlite3.connect(
                f"file:{quote(str(self._path))}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, self._max_cell)
            connection.execute("BEGIN")
            (schema,) = connection.execute("PRAGMA schema_version").fetchone()
            connection.set_authorizer(_authorize)
            described = f"SELECT * FROM ({self._query.sql}\n) LIMIT 0"  # noqa: S608 - the operator's own
            cursor = connection.execute(described, self._query.parameters)
            names = unique(_original_names([entry[0] for entry in cursor.description]))
            types = self._types(connection, len(names), schema)
        except sqlite3.Error as error:
            raise _classified(error) from error
        except sqlite3.Warning as error:
            raise BadQuery(str(error)) from error
        return [Column(name, kind) for name, kind in zip(names, types, strict=True)]

    def _types(self, connection: sqlite3.Connection, count: int, schema: int) -> Sequence[str]:
        """Return the declared types of the columns; expressions have none. Only a view exposes them."""
        if self._query.parameters:
            return ["any"] * count  # a view cannot have parameters
        known, types = self._known.get(self._query.sql, (None, ()))
        if known == schema:
            return types
        connection.set_authorizer(None)
        connection.execute(f"CREATE TEMP VIEW described AS SELECT * FROM ({self._query.sql}\n)")  # noqa: S608
        types = [_type(row[2]) for row in connection.execute("PRAGMA temp.table_info(described)")]
        connection.execute("DROP VIEW temp.described")
        connection.set_authorizer(_authorize)
        self._known[self._query.sql] = schema, types
        return types

    def open(self, selection: Selection, form: str, formula_guard: bool) -> "_Opened":
        """Run the query and read its first batch; raises what `Source.export` does."""
        columns = self.describe()
        assert self._connection is not None
        sql, values, chosen = _select(self._query, selection, columns)
        self._statement = sql, values
        self._encoder = make(form, chosen, formula_guard=formula_guard, strict=self._strict)
        begin = self._encoder.begin()
        self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(NARROW_BYTES, self._max_cell))
        try:
            first = self.batch(BATCHES[0])
        except sqlite3.Error as error:
            raise _classified(error) from error
        return _Opened(chosen, self._encoder, begin, first, self._version())

    def batch(self, count: int) -> tuple[int, bytes]:
        """Read and encode up to `count` rows, fewer if they are large; return their number (0 at the end) and bytes.

        Raises sqlite3.Error, UnrepresentableValue, TooLarge.
        """
        assert self._encoder is not None
        read, size, chunks = 0, 0, []
        while read < count and size < BATCH_BYTES and (rows := self._rows(min(CHUNK_ROWS, count - read))):
            read += len(rows)
            self._read += len(rows)
            try:
                chunks.append(self._encoder.rows(rows))
            except ValueError as error:
                raise UnrepresentableValue(str(error)) from error
            size += len(chunks[-1])
        return read, b"".join(chunks)

    def _rows(self, count: int) -> list[tuple[Any, ...]]:
        """Read up to `count` rows, in the mode that the result requires."""
        assert self._connection is not None
        while True:
            try:
                if self._cursor is None:
                    self._cursor = self._restart(self._connection)
                return self._cursor.fetchmany(1 if self._wide else count)
            except sqlite3.Error as error:
                self._adapt(self._connection, error)

    def _adapt(self, connection: sqlite3.Connection, error: sqlite3.Error) -> None:
        """Change to the mode that can read the row that caused `error`; raise the error if no mode can.

        The query is then run again, in the same snapshot, up to that row.
        """
        if "decode" in str(error) and isinstance(error, sqlite3.OperationalError) and not self._tolerant:
            if self._strict:
                column = re.search(r"column '(.*?)'", str(error))
                name = f" of column {column[1]!r}" if column else ""
                raise UnrepresentableValue(f"a text{name} after row {self._read} is not valid UTF-8") from error
            self._tolerant = True
            connection.text_factory = self._text
        elif error.sqlite_errorcode == sqlite3.SQLITE_TOOBIG and not self._wide:
            self._wide = True
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, self._max_cell)
        elif error.sqlite_errorcode == sqlite3.SQLITE_TOOBIG:
            raise TooLarge(f"a cell after row {self._read} is larger than {self._max_cell:,} bytes") from error
        else:
            raise error
        self._cursor = None

    def _restart(self, connection: sqlite3.Connection) -> sqlite3.Cursor:
        """Run the query again, and skip the rows that have been read before."""
        cursor, left = connection.execute(*self._statement), self._read
        while left and (skipped := len(cursor.fetchmany(1 if self._wide else min(left, 1000)))):
            left -= skipped
        return cursor

    def _text(self, data: bytes) -> str:
        """Decode a text that may not be valid UTF-8."""
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.altered += 1
            return data.decode(errors="replace")

    def _version(self) -> str:
        """Return a version that changes with the file: a hash of the last writes to it and to its write-ahead log."""
        marks = []
        for path in (self._path, self._path.with_name(self._path.name + "-wal")):
            with suppress(OSError):
                status = path.stat()
                marks += [status.st_mtime_ns, status.st_size, status.st_ino]
        return f"{hash(tuple(marks)) & 0xFFFFFFFF:08x}"

    def interrupt(self) -> None:
        """Interrupt the running call, from any thread; it raises OperationalError there."""
        if self._connection is not None:
            self._connection.interrupt()

    def close(self) -> None:
        """End the snapshot."""
        if self._connection is not None:
            self._connection.close()


class _Opened(NamedTuple):
    """A result, and its first batch."""

    columns: Sequence[Column]
    encoder: Encoder
    begin: bytes
    first: tuple[int, bytes]
    version: str


@dataclass(slots=True)
class _SqliteExport:
    columns: Sequence[Column]
    version: str
    begin: bytes
    _reading: _Reading
    _turns: Threads
    _first: tuple[int, bytes]
    _encoder: Encoder
    rows: int = 0

    @property
    def altered(self) -> int:
        """Texts that were not valid UTF-8, and values that the format cannot hold."""
        return self._reading.altered + self._encoder.altered

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the encoded rows a batch at a time; the next is read only when the last has been consumed."""
        (count, data), number = self._first, 0
        self._first = 0, b""
        while count:
            self.rows += count
            yield data
            number = min(number + 1, len(BATCHES) - 1)
            try:
                batch, interrupt = self._reading.batch, self._reading.interrupt
                count, data = await self._turns.run(batch, BATCHES[number], interrupt=interrupt)
            except sqlite3.Error as error:
                raise Interrupted(f"the query failed after {self.rows} rows: {error}") from error


class SqliteSource:
    """A SQLite file that is only read. `path` must exist when a result is requested.

    Exports take turns: `turns` is one thread for all sources. SQLite acquires and releases the interpreter's lock at
    every row, and concurrent threads spend their time on that lock: thirty clients at once are served two to three
    times faster in turns. First batches run in `threads`, since they may sort or aggregate for long with the lock
    released. `max_cell` is the maximum size of a cell in bytes.
    """

    def __init__(self, path: Path, threads: Threads, turns: Threads, *, max_cell: int) -> None:
        self._path = path
        self._max_cell = max_cell
        self._threads = threads
        self._turns = turns
        self._known: dict[str, tuple[int, Sequence[str]]] = {}
        """The types of results by SQL, each with the version of the schema that they are valid for."""

    @asynccontextmanager
    async def _reading(self, query: Query, *, strict: bool = False) -> AsyncIterator[_Reading]:
        """Yield a connection, and close it when no thread uses it: `Threads.run` returns no earlier."""
        reading = _Reading(self._path, query, self._known, max_cell=self._max_cell, strict=strict)
        try:
            yield reading
        finally:
            await self._threads.finish(reading.close)

    async def describe(self, query: Query) -> Sequence[Column]:
        """Return names and types of a result's columns."""
        async with self._reading(query) as reading:
            return await self._threads.run(reading.describe, interrupt=reading.interrupt)

    @asynccontextmanager
    async def export(
        self,
        query: Query,
        selection: Selection,
        form: str,
        *,
        formula_guard: bool,
        strict: bool = False,
    ) -> AsyncIterator[tuple[_SqliteExport, Encoder]]:
        """Run a query, and yield its result."""
        async with self._reading(query, strict=strict) as reading:
            opened = await self._threads.run(reading.open, selection, form, formula_guard, interrupt=reading.interrupt)
            export = _SqliteExport(
                opened.columns,
                opened.version,
                opened.begin,
                reading,
                self._turns,
                opened.first,
                opened.encoder,
            )
            yield export, opened.encoder


def rejected(path: Path, queries: Mapping[str, Query], *, max_cell: int) -> dict[str, str]:
    """Return the queries that a file rejects, each with the reason. Blocks; raises Unavailable."""
    reasons: dict[str, str] = {}
    for name, query in {"": Query("SELECT 1"), **queries}.items():
        reading = _Reading(path, query, {}, max_cell=max_cell, strict=False)
        try:
            reading.describe()
        except (BadQuery, TooLarge) as error:
            reasons[name] = str(error)
        finally:
            reading.close()
    return reasons


def _original_names(names: Sequence[str]) -> list[str]:
    """Return the names in the query: SQLite names the second column `a` of a subquery `a:1`."""
    return [match[1] if (match := re.fullmatch(r"(.+):[0-9]+", name)) and match[1] in names else name for name in names]


def _authorize(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED or action == sqlite3.SQLITE_TRANSACTION else sqlite3.SQLITE_DENY


def _classified(error: sqlite3.Error) -> BadQuery | Unavailable | TooLarge:
    """Return the exception for an error before the first row: the file is unavailable, or the query is invalid."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_NOTADB", "SQLITE_IOERR", "SQLITE_CORRUPT", "SQLITE_BUSY")):
        return Unavailable(f"The database cannot be read: {error}.")
    if name == "SQLITE_TOOBIG":
        return TooLarge("a cell exceeds the maximum size")
    return BadQuery(str(error))


def _type(declared: str) -> str:
    """Return the type of a column from its declaration. Source: SQLite, "Determination of column affinity"."""
    word = declared.upper()
    if "BOOL" in word:
        return "boolean"
    if "INT" in word:
        return "integer"
    if any(part in word for part in ("CHAR", "CLOB", "TEXT")):
        return "text"
    if "BLOB" in word:
        return "blob"
    if any(part in word for part in ("REAL", "FLOA", "DOUB")):
        return "real"
    return "any"


def _select(query: Query, selection: Selection, columns: Sequence[Column]) -> tuple[str, Any, Sequence[Column]]:
    """Return the SQL of a selection, its values, and its columns; raises UnknownColumn, BadValue."""
    known = {column.name: column for column in columns}
    for name in (*selection.columns, *selection.where):
        if name not in known:
            raise UnknownColumn(name, tuple(known))
    chosen = [known[name] for name in selection.columns] or list(columns)
    values: dict[str, Any] = dict(query.parameters)
    # All columns are renamed, so that two of one name can be distinguished; the line break ends a comment.
    sql = f"WITH q ({', '.join(quoted(name) for name in known)}) AS ({query.sql}\n)"
    sql += f" SELECT {', '.join(quoted(column.name) for column in chosen)} FROM q"  # noqa: S608 - names, quoted
    for number, (name, text) in enumerate(selection.where.items()):
        key = f"streamlab_where_{number}"
        left = f"CAST({quoted(name)} AS TEXT)" if known[name].type == "any" else quoted(name)
        sql += f" {'AND' if number else 'WHERE'} {left} = :{key}"
        values[key] = _value(known[name], text)
    if selection.limit is not None or selection.skip:
        sql += " LIMIT :streamlab_limit OFFSET :streamlab_skip"
        values["streamlab_limit"] = -1 if selection.limit is None else selection.limit
        values["streamlab_skip"] = selection.skip
    return sql, values, chosen


def _value(column: Column, text: str) -> Any:
    """Read the value that a column must equal."""
    if column.type == "blob":
        raise BadValue(column.name, "is binary, and cannot be compared with text")
    try:
        return {"integer": integer, "real": real, "boolean": truth}.get(column.type, str)(text)
    except ValueError as error:
        raise BadValue(column.name, str(error)) from None
