"""Results of a SQLite file: read-only, in threads that take turns."""

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote

from .formats import Column, Encoder, make, unique
from .source import BadQuery, BadValue, Interrupted, Misfit, Query, Selection, Unavailable, UnknownColumn

P = ParamSpec("P")
T = TypeVar("T")

BATCHES = (16, 64, 256, 1000)
"""Rows in the first batches of an export, and in all that follow: the first bytes leave at once."""

_ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
"""What a configured query may do; all else, as writing, ATTACH and PRAGMA, is refused by the connection itself."""


class Turns:
    """Where the queries of all exports run: their first batches at once, the later ones one after the other.

    SQLite takes and drops the interpreter's lock at every row. Threads that step at the same time spend their time on
    that lock: thirty clients at once are served two to three times faster in turns. First batches are free, since they
    may sort or aggregate for long, with the lock dropped.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self.turn = asyncio.Lock()

    async def run(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Do some work in a thread; if the caller is cancelled, stop what runs on a connection, and wait for that."""
        loop = asyncio.get_running_loop()
        job = loop.run_in_executor(self._threads, lambda: work(*arguments, **named))
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            self.interrupt(arguments)
            await asyncio.wait({job})
            job.exception()  # it says "interrupted", and nobody else is going to hear it
            raise

    @staticmethod
    def interrupt(arguments: Sequence[object]) -> None:
        """Stop what runs on a connection; it raises OperationalError there."""
        for argument in arguments:
            if isinstance(argument, _Rows):
                argument.connection.interrupt()


@dataclass(slots=True)
class _Rows:
    """A connection, and the result that is being read from it."""

    connection: sqlite3.Connection
    sql: str
    values: Sequence[Any]
    cursor: sqlite3.Cursor | None = None
    read: int = 0
    tolerant: bool = field(default=False)
    """Whether text that is no UTF-8 is read with replacement characters: slower, so only where there is some."""

    def begin(self) -> None:
        """Run the query, in the snapshot that its transaction begins with."""
        self.connection.execute("BEGIN")
        self.cursor = self.connection.execute(self.sql, self.values)

    def batch(self, encoder: Encoder, count: int) -> tuple[int, bytes]:
        """Read and encode up to `count` rows: how many there were, and their bytes."""
        assert self.cursor is not None
        try:
            rows = self.cursor.fetchmany(count)
        except sqlite3.OperationalError as error:
            if self.tolerant or "decode" not in str(error):
                raise
            rows = self._again(count)
        self.read += len(rows)
        try:
            return len(rows), encoder.rows(rows) if rows else b""
        except ValueError as error:
            raise Misfit(str(error)) from error

    def _again(self, count: int) -> list[tuple[Any, ...]]:
        """Begin anew in the same snapshot, reading text that is no UTF-8, and go on where it failed."""
        self.tolerant = True
        self.connection.text_factory = lambda data: data.decode(errors="replace")
        self.cursor = self.connection.execute(self.sql, self.values)
        left = self.read
        while left and (skipped := len(self.cursor.fetchmany(min(left, 1000)))):
            left -= skipped
        return self.cursor.fetchmany(count)


@dataclass(slots=True)
class _SqliteExport:
    columns: Sequence[Column]
    version: str
    begin: bytes
    _rows: _Rows
    _encoder: Encoder
    _turns: Turns
    _first: tuple[int, bytes]
    rows: int = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the rows, encoded, a batch at a time: nothing is read before it has been taken."""
        (count, data), number = self._first, 0
        self._first = 0, b""
        while count:
            self.rows += count
            yield data
            number = min(number + 1, len(BATCHES) - 1)
            async with self._turns.turn:
                try:
                    count, data = await self._turns.run(_batch, self._rows, self._encoder, BATCHES[number])
                except sqlite3.Error as error:
                    raise Interrupted(f"the query failed after {self.rows} rows: {error}") from error


def _batch(rows: _Rows, encoder: Encoder, count: int) -> tuple[int, bytes]:
    return rows.batch(encoder, count)


class SqliteSource:
    """A SQLite file that is only read. `path` must exist when something is asked for."""

    def __init__(self, path: Path, turns: Turns) -> None:
        self._path = path
        self._turns = turns

    async def describe(self, query: Query) -> Sequence[Column]:
        """Return names and types of a result's columns."""
        return await self._turns.run(self._describe, query)

    @asynccontextmanager
    async def export(
        self,
        query: Query,
        selection: Selection,
        form: str,
        *,
        formula_guard: bool,
    ) -> AsyncIterator[tuple[_SqliteExport, Encoder]]:
        """Run a query, and lend its result."""
        columns = await self.describe(query)
        sql, values, chosen = _select(query, selection, columns)
        encoder = make(form, chosen, formula_guard=formula_guard)
        begin = encoder.begin()
        rows = _Rows(await self._turns.run(self._connect), sql, values)
        try:
            try:
                first = await self._turns.run(_first, rows, encoder)
                version = await self._turns.run(self._version)
            except sqlite3.Error as error:
                raise _refusal(error) from error
            export = _SqliteExport(chosen, version, begin, rows, encoder, self._turns, first)
            yield export, encoder
        finally:
            rows.connection.interrupt()
            await asyncio.shield(self._turns.run(rows.connection.close))

    def _connect(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(
                f"file:{quote(str(self._path))}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise _refusal(error) from error
        try:
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        except sqlite3.Error as error:
            connection.close()
            raise _refusal(error) from error
        connection.set_authorizer(_authorize)
        return connection

    def _describe(self, query: Query) -> Sequence[Column]:
        connection = self._connect()
        try:
            described = f"SELECT * FROM ({query.sql}\n) LIMIT 0"  # noqa: S608 - the operator's own
            cursor = connection.execute(described, query.parameters)
            names = unique(_given([entry[0] for entry in cursor.description]))
            types = self._types(query, len(names))
        except sqlite3.Error as error:
            raise _refusal(error) from error
        except sqlite3.Warning as error:
            raise BadQuery(str(error)) from error
        finally:
            connection.close()
        return [Column(name, kind) for name, kind in zip(names, types, strict=True)]

    def _types(self, query: Query, count: int) -> Sequence[str]:
        """The types that columns were declared with; expressions have none. A view is the only thing that tells."""
        if query.parameters:
            return ["any"] * count  # a view takes no parameters
        connection = sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True, isolation_level=None)
        try:
            connection.execute(f"CREATE TEMP VIEW described AS SELECT * FROM ({query.sql}\n)")  # noqa: S608
            return [_type(row[2]) for row in connection.execute("PRAGMA temp.table_info(described)")]
        finally:
            connection.close()

    def _version(self) -> str:
        """What changes with the file: when it, and its write-ahead log, were last written to."""
        marks = []
        for path in (self._path, self._path.with_name(self._path.name + "-wal")):
            with suppress(OSError):
                status = path.stat()
                marks += [status.st_mtime_ns, status.st_size, status.st_ino]
        return f"{hash(tuple(marks)) & 0xFFFFFFFF:08x}"


def _given(names: Sequence[str]) -> list[str]:
    """The names as the query gave them: SQLite calls the second column `a` of a subquery `a:1`."""
    return [match[1] if (match := re.fullmatch(r"(.+):[0-9]+", name)) and match[1] in names else name for name in names]


def _first(rows: _Rows, encoder: Encoder) -> tuple[int, bytes]:
    rows.begin()
    return rows.batch(encoder, BATCHES[0])


def _authorize(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED or action == sqlite3.SQLITE_TRANSACTION else sqlite3.SQLITE_DENY


def _refusal(error: sqlite3.Error) -> BadQuery | Unavailable:
    """What an error means before the first row: the file is not there, or the query is wrong."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_NOTADB", "SQLITE_IOERR", "SQLITE_CORRUPT", "SQLITE_BUSY")):
        return Unavailable(f"The database cannot be read: {error}.")
    return BadQuery(str(error))


def _type(declared: str) -> str:
    """A column's type by what it was declared as. Source: SQLite, "Determination of column affinity"."""
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
    """The SQL for a selection, its values, and the columns it has; raises UnknownColumn, BadValue."""
    known = {column.name: column for column in columns}
    for name in (*selection.columns, *selection.where):
        if name not in known:
            raise UnknownColumn(name, tuple(known))
    chosen = [known[name] for name in selection.columns] or list(columns)
    values: dict[str, Any] = dict(query.parameters)
    # All columns are named anew, so that two of one name can be told apart; the line break ends a comment.
    sql = f"WITH q ({', '.join(_quoted(name) for name in known)}) AS ({query.sql}\n)"
    sql += f" SELECT {', '.join(_quoted(column.name) for column in chosen)} FROM q"  # noqa: S608 - names, quoted
    for number, (name, text) in enumerate(selection.where.items()):
        key = f"streamlab_where_{number}"
        left = f"CAST({_quoted(name)} AS TEXT)" if known[name].type == "any" else _quoted(name)
        sql += f" {'AND' if number else 'WHERE'} {left} = :{key}"
        values[key] = _value(known[name], text)
    if selection.limit is not None or selection.skip:
        sql += " LIMIT :streamlab_limit OFFSET :streamlab_skip"
        values["streamlab_limit"] = -1 if selection.limit is None else selection.limit
        values["streamlab_skip"] = selection.skip
    return sql, values, chosen


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_TRUTHS = {"true": 1, "false": 0, "1": 1, "0": 0}


def _value(column: Column, text: str) -> Any:
    """Read what a column is to equal."""
    if column.type == "integer":
        if not re.fullmatch(r"[+-]?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
            raise BadValue(column.name, "must be an integer")
        return int(text)
    if column.type == "real":
        try:
            return float(text)
        except ValueError:
            raise BadValue(column.name, "must be a number") from None
    if column.type == "boolean":
        if text.lower() not in _TRUTHS:
            raise BadValue(column.name, "must be true or false")
        return _TRUTHS[text.lower()]
    if column.type == "blob":
        raise BadValue(column.name, "is binary, and cannot be compared with text")
    return text
