"""Results of PostgreSQL: as COPY writes them, or encoded from the rows of a cursor.

CSV and JSON lines are written by PostgreSQL itself and passed on as they come; the other formats are encoded here.
Every export is a read-only transaction with one snapshot, on a connection of a pool. Needs PostgreSQL >= 14, and
`standard_conforming_strings` as they have been since 9.1.
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit
from uuid import UUID

from streamlab import Threads, shielded

from .encoder import Column, Encoder, MissingLibrary
from .formats import make
from .postgres_fields import NOT_FINITE, Field, fields_of
from .postgres_statement import Statement
from .source import (
    BadParameter,
    BadQuery,
    BadValue,
    Interrupted,
    Misfit,
    Query,
    Selection,
    TooLarge,
    Unavailable,
    UnknownColumn,
    quoted,
)

if TYPE_CHECKING:
    import asyncpg
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = PoolConnectionProxy[asyncpg.Record]

log = logging.getLogger(__name__)

LEAVE_SECONDS = 0.1
"""How long a query may take to end when its export does; then its connection is closed, which ends it too."""

CLOSE_SECONDS = 1.0
"""How long the connections may take to be closed when the server stops."""

THREADS = 2
"""Threads that encode rows of a database in formats that PostgreSQL does not write."""

CHECK_MILLISECONDS = 500
"""How often PostgreSQL looks whether the client of a running query is still there."""

PENDING_BYTES = 256 * 1024
"""What is kept of a result that its consumer has not taken yet; then PostgreSQL has to wait."""

BATCH_ROWS = (16, 1000)
"""Rows in the first batch of a cursor, and at most in the later ones, each up to four times as long as the last."""

# A row ends with a cell that is always quoted: `,"|"` and the line feed of COPY. Inside a quoted cell each quote is
# doubled, and a cell that begins with | has no line feed after its second quote, so nothing else in a row looks like
# that: one replacement makes every line end CRLF, and leaves the line feeds of texts alone.
_TOO_LARGE = re.compile(r"streamlab: (column .* holds [0-9]+ bytes)", re.DOTALL)
"""What `Field.size_check` makes PostgreSQL say."""

_MARK, _MARKED_END, _CRLF = "|", b',"|"\n', b"\r\n"

Put: TypeAlias = Callable[[int, bytes], Awaitable[None]]


# -- what a query results in


@dataclass(frozen=True, slots=True)
class _Result:
    """A query that PostgreSQL has looked at but not run."""

    statement: Statement
    fields: Sequence[Field]
    parameters: Mapping[str, int]
    """The OIDs of the types that it takes parameters for."""

    def named(self, names: Sequence[str]) -> Sequence[Field]:
        """The fields of some names; raises UnknownColumn."""
        known = {entry.column.name: entry for entry in self.fields}
        for name in names:
            if name not in known:
                raise UnknownColumn(name, tuple(known))
        return [known[name] for name in dict.fromkeys(names)]


# -- from the task that receives to the one that sends


class _Pipe:
    """Rows on their way, `PENDING_BYTES` of them at most and one chunk more."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._bytes = self._rows = 0
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._closed = False
        self.altered = 0

    async def put(self, rows: int, chunk: bytes) -> None:
        """Give a chunk, and wait until there is room for the next."""
        self._chunks.append(chunk)
        self._bytes += len(chunk)
        self._rows += rows
        self._arrived.set()
        while self._bytes >= PENDING_BYTES:
            self._taken.clear()
            await self._taken.wait()

    def close(self) -> None:
        """Say that no more will come."""
        self._closed = True
        self._arrived.set()

    async def arrived(self) -> bool:
        """Wait until there is something; False at the end."""
        while not self._chunks and not self._closed:
            self._arrived.clear()
            await self._arrived.wait()
        return bool(self._chunks)

    def take(self) -> tuple[int, bytes]:
        """Take all there is: the rows that it has, and its bytes."""
        rows, chunks = self._rows, self._chunks
        self._chunks, self._bytes, self._rows = [], 0, 0
        self._taken.set()
        return rows, chunks[0] if len(chunks) == 1 else b"".join(chunks)


@dataclass(slots=True)
class _PostgresExport:
    columns: Sequence[Column]
    version: str
    begin: bytes
    _source: "PostgresSource"
    _pipe: _Pipe
    _task: "asyncio.Task[None]"
    _encoder: Encoder
    rows: int = 0

    @property
    def altered(self) -> int:
        """Numbers that JSON does not have."""
        return self._pipe.altered + self._encoder.altered

    async def arrived(self) -> bool:
        """Wait until there is something to take; raises what ended the query."""
        async with asyncio.timeout(self._source.patience):
            if await self._pipe.arrived():
                return True
        await self._task
        return False

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the rows as they come from PostgreSQL, which waits while nobody takes them."""
        while await self._more():
            rows, chunk = self._pipe.take()
            self.rows += rows
            yield chunk

    async def _more(self) -> bool:
        try:
            return await self.arrived()
        except Exception as error:
            if (meaning := self._source.meaning(error)) is None:
                raise
            if meaning[0] is TooLarge:
                raise TooLarge(meaning[1]) from error
            raise Interrupted(f"the query failed after {self.rows} rows: {meaning[1]}") from error


# -- the source


class PostgresSource:
    """A PostgreSQL database that is only read. `url` is postgresql://USER:PASSWORD@HOST/DATABASE.

    Nothing is asked of the server before something is asked of the source, and a server that went away is found again
    by whoever asks next. `statement_seconds` bounds a COPY as a whole, with the time that its client takes, and each
    batch of a cursor; `max_cell` is the maximum size of a cell in bytes.

    Raises MissingLibrary, and ValueError for what is no URL of PostgreSQL.
    """

    def __init__(
        self,
        url: str,
        *,
        statement_seconds: float,
        max_cell: int = 1_000_000_000,
        connect_seconds: float = 5.0,
        connections: int = 10,
    ) -> None:
        try:
            import asyncpg
        except ImportError:
            raise MissingLibrary(
                "PostgreSQL needs asyncpg, which is not installed: pip install 'streamlab[postgres]'"
            ) from None
        if urlsplit(url).scheme not in ("postgresql", "postgres"):
            raise ValueError("is no address of a PostgreSQL server: it begins with postgresql://")
        self._asyncpg = asyncpg
        self._url = url
        self._connect_seconds = connect_seconds
        self._statement_seconds = statement_seconds
        self._connections = connections
        self._max_cell = max_cell
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._away = False
        self._threads = Threads("export-encode", THREADS)
        self.patience = connect_seconds + statement_seconds
        """Seconds after which a server that says nothing is gone: its own limit would have ended the query."""

    # -- connections

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Have connections until the block ends, and the exports with it."""
        self._pool = self._asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=self._connections,
            timeout=self._connect_seconds,
            server_settings={
                "application_name": "streamlab",
                "default_transaction_read_only": "on",
                "statement_timeout": str(max(1, int(self._statement_seconds * 1000))),
                "client_connection_check_interval": str(CHECK_MILLISECONDS),
                # How values are written must not depend on how the server is configured.
                "DateStyle": "ISO",
                "IntervalStyle": "iso_8601",
                "extra_float_digits": "1",
                "standard_conforming_strings": "on",
            },
        )
        await self._pool  # connects to nothing: its smallest size is 0
        try:
            async with self._threads:
                yield
        finally:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._pool.close()
            except TimeoutError:
                self._pool.terminate()

    @asynccontextmanager
    async def _snapshot(self) -> "AsyncIterator[Connection]":
        """Lend a connection in a transaction that only reads, and only what is there now; raises Unavailable."""
        pool = self._pool
        if pool is None:
            raise Unavailable("The database is not opened.")
        connection = await self._begun(pool)
        if self._away:
            self._away = False
            log.info("the PostgreSQL server of an export is back")
        try:
            yield connection
        finally:
            await shielded(self._give_back(pool, connection))

    async def _begun(self, pool: "asyncpg.Pool[asyncpg.Record]") -> "Connection":
        lost: Exception | None = None
        for _ in range(2):  # a connection of the pool may have died, and nobody has noticed yet
            connection = await self._acquired(pool)
            try:
                begin = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
                await connection.execute(begin, timeout=self._connect_seconds)
            except BaseException as error:
                await shielded(self._close(pool, connection))
                if not isinstance(error, Exception):
                    raise
                lost = error
            else:
                return connection
        raise self._lost(lost) from lost

    async def _acquired(self, pool: "asyncpg.Pool[asyncpg.Record]") -> "Connection":
        try:
            return await pool.acquire(timeout=self._connect_seconds)
        except Exception as error:
            if isinstance(error, TimeoutError) and pool.get_size() == pool.get_max_size() and not pool.get_idle_size():
                raise Unavailable("All connections to the database are in use.") from None
            raise self._lost(error) from error

    async def _give_back(self, pool: "asyncpg.Pool[asyncpg.Record]", connection: "Connection") -> None:
        """End a transaction; what ran in it has been cancelled. A connection that does not end it in time is closed."""
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await connection.execute("ROLLBACK")
        except Exception:
            await self._close(pool, connection)
            return
        try:
            await pool.release(connection, timeout=LEAVE_SECONDS)
        except Exception as error:
            log.info("a connection to PostgreSQL was not given back, but closed: %s", type(error).__name__)

    async def _close(self, pool: "asyncpg.Pool[asyncpg.Record]", connection: "Connection") -> None:
        """Close a connection, whatever state it is in: one that was lost has left the pool by itself."""
        with suppress(self._asyncpg.InterfaceError):
            connection.terminate()
        await pool.release(connection)

    # -- what goes wrong

    def meaning(self, error: Exception) -> tuple[type[Exception], str] | None:
        """What an error of the driver means, and one line on it; None for an error that is not the driver's.

        Source of the codes: https://www.postgresql.org/docs/current/errcodes-appendix.html.
        """
        if not isinstance(error, self._asyncpg.PostgresError):
            driver = (OSError, TimeoutError, self._asyncpg.InterfaceError, self._asyncpg.InternalClientError)
            return (Unavailable, "the database does not answer") if isinstance(error, driver) else None
        code = str(error.sqlstate or "")
        if code.startswith(("08", "57P")):
            return Unavailable, "the database does not answer"
        message = str(error).partition("\n")[0]
        if code == "22P02" and (large := _TOO_LARGE.search(message)):
            return TooLarge, large[1]
        if code == "57014":
            return Interrupted, f"it was stopped, as it may take {self._statement_seconds:g} s"
        # Conflicts with what a primary does, time limits of transactions, a lack of memory, disk or locks.
        if code.startswith(("25P", "40", "53", "55")):
            return Interrupted, message
        return BadQuery, message

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Raise what a driver's error means before there are rows."""
        try:
            yield
        except Exception as error:
            meaning = self.meaning(error)
            if meaning is None:
                raise
            if meaning[0] is Unavailable:
                raise self._lost(error) from error
            raise meaning[0](meaning[1]) from error

    def _lost(self, error: BaseException | None) -> Unavailable:
        """What a client is told when there is no server; the operator is told why, once."""
        if not self._away:
            self._away = True
            code = getattr(error, "sqlstate", None)
            why = type(error).__name__ + (f" {code}" if code else "")
            log.warning("the PostgreSQL server of an export is away (%s)", why)
        return Unavailable("The database does not answer.")

    # -- queries

    async def describe(self, query: Query) -> Sequence[Column]:
        """Return names and types of a result's columns, without running its query.

        Raises BadQuery, Unavailable, and Interrupted where a lock is in the way for too long.
        """
        async with self._snapshot() as connection:
            with self._refusals():
                async with asyncio.timeout(self.patience):
                    return [entry.column for entry in (await _look(connection, query)).fields]

    @asynccontextmanager
    async def export(
        self, query: Query, selection: Selection, form: str, *, formula_guard: bool, strict: bool = False
    ) -> AsyncIterator[tuple[_PostgresExport, Encoder]]:
        """Run a query, and lend its result; raises Interrupted too before the block, where it takes too long.

        In CSV, dates and times are as PostgreSQL has them, ISO 8601 with a space for the T; arrays and composites are
        JSON, blobs base64; an empty text is quoted and NULL is not, except in a single column. In JSON, NaN and
        infinity are null, and numbers have all their digits; inside of arrays, NaN is a text and a blob hexadecimal.
        Intervals are ISO 8601 in every format ("P1DT2H").
        """
        async with self._snapshot() as connection:
            with self._refusals():
                async with asyncio.timeout(self.patience):
                    result = await _look(connection, query)
                    chosen = result.named(selection.columns) or result.fields
                    rows = await self._bound(connection, query, selection, result, chosen)
                    version = await _version(connection)
            columns = kinds = [entry.column for entry in chosen]
            values = [entry.value(form) for entry in chosen]
            if form not in ("csv", "jsonl"):
                kinds = [Column(column.name, kind) for column, (_, kind) in zip(columns, values, strict=True)]
            encoder = make(form, kinds, formula_guard=formula_guard, strict=strict)
            begin, pipe = encoder.begin(), _Pipe()
            if form == "csv":
                receive = _receive_csv(connection, chosen, rows, pipe.put, formula_guard=formula_guard)
            elif form == "jsonl":
                receive = _receive_json_lines(connection, chosen, rows, pipe, strict=strict)
            else:
                sql = f"SELECT {', '.join(value for value, _ in values)} {rows}"
                receive = _receive_batches(connection, sql, encoder, pipe.put, self._threads)
            async with _running(receive, pipe) as task:
                export = _PostgresExport(columns, version, begin, self, pipe, task, encoder)
                with self._refusals():
                    await export.arrived()
                yield export, encoder

    async def _bound(
        self,
        connection: "Connection",
        query: Query,
        selection: Selection,
        result: _Result,
        chosen: Sequence[Field],
    ) -> str:
        """Bind all values, and return the SQL from FROM on; raises BadValue, BadParameter, UnknownColumn.

        COPY takes no parameters, so a value becomes a setting of the transaction, and the SQL reads that: the value
        itself is never part of any SQL. asyncpg would replace `$1` by the value in strings and comments, too.
        """
        compared = result.named(tuple(selection.where))
        oids = {*result.parameters.values(), *(entry.oid for entry in compared)}
        types = await _type_names(connection, oids) if oids else {}
        written: dict[str, str] = {}
        for number, (name, oid) in enumerate(result.parameters.items()):
            key, text = f"streamlab.p{number}", _text(name, query.parameters[name])
            if text is None:
                written[name] = f"(CAST(NULL AS {types[oid]}))"
            else:
                attempt = f"CAST($2::text AS {types[oid]}) IS NULL"
                await self._bind(connection, BadParameter, name, key, text, attempt)
                written[name] = f"(CAST(current_setting('{key}') AS {types[oid]}))"
        conditions = []
        for number, (entry, text) in enumerate(zip(compared, selection.where.values(), strict=True)):
            key, kind, name = f"streamlab.w{number}", types[entry.oid], entry.column.name
            if entry.column.type == "blob":
                raise BadValue(name, "is binary, and cannot be compared with text")
            value = f"CAST($2::text AS {kind})"
            await self._bind(connection, BadValue, name, key, text, f"{value} = {value}")
            conditions.append(f"{entry.ref} = CAST(current_setting('{key}') AS {kind})")
        # The line feed ends a comment. That the parenthesis holds is known: the query is a statement by itself.
        names = ", ".join(entry.ref for entry in result.fields)
        sql = f"FROM ({result.statement.text(written.__getitem__)}\n) AS q ({names})"
        if conditions:
            sql += f" WHERE {' AND '.join(conditions)}"
        if checks := [check for entry in chosen if (check := entry.size_check(self._max_cell))]:
            # OFFSET 0 keeps the checks from rows that the query leaves out: nothing is moved across it.
            sql = f"FROM (SELECT {names} {sql} OFFSET 0) AS q WHERE {' AND '.join(checks)}"
        if selection.limit is not None:
            sql += f" LIMIT {selection.limit:d}"
        return sql + f" OFFSET {selection.skip:d}" if selection.skip else sql

    async def _bind(
        self, connection: "Connection", bad: type[BadValue], name: str, key: str, text: str, attempt: str
    ) -> None:
        """Store a value for the transaction, if PostgreSQL can do with it what the query will; raises `bad`."""
        try:
            await connection.fetch(f"SELECT set_config($1, $2::text, true), {attempt}", key, text)
        except (self._asyncpg.PostgresError, UnicodeError) as error:
            meaning = self.meaning(error)
            if meaning and meaning[0] is not BadQuery:
                raise
            raise bad(name, meaning[1] if meaning else "is not valid text") from error


# -- what is asked of a connection


async def _look(connection: "Connection", query: Query) -> _Result:
    """Have PostgreSQL look at a query; raises BadQuery, and what the driver raises."""
    statement = Statement.parse(query.sql)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(statement.names), 1)}
    for name in numbers:
        if name not in query.parameters:
            known = ", ".join(f":{known}" for known in query.parameters) or "none"
            raise BadQuery(f"unknown parameter :{name}; known: {known}")
    sql = statement.text(lambda name: f"${numbers[name]}")
    # A statement that is whole by itself cannot end the parenthesis that it is put in; and what is in a parenthesis
    # can only be a SELECT, a VALUES or a TABLE. PostgreSQL prepares one statement at a time.
    await connection.prepare(sql, name="")
    prepared = await connection.prepare(f"SELECT * FROM ({sql}\n) AS q", name="")  # noqa: S608 - the operator's own
    attributes = prepared.get_attributes()
    if not attributes:
        raise BadQuery("the result has no columns")
    oids = [parameter.oid for parameter in prepared.get_parameters()]
    return _Result(statement, fields_of(attributes), dict(zip(numbers, oids, strict=True)))


async def _type_names(connection: "Connection", oids: Collection[int]) -> Mapping[int, str]:
    """The full names of types, for a CAST that does not shorten what it casts."""
    rows = await connection.fetch(
        "SELECT t.oid, format('%I.%I', n.nspname, t.typname) FROM pg_catalog.pg_type AS t"
        " JOIN pg_catalog.pg_namespace AS n ON n.oid = t.typnamespace WHERE t.oid = ANY($1::oid[])",
        list(oids),
    )
    return {row[0]: row[1] for row in rows}


async def _version(connection: "Connection") -> str:
    """Which transactions the snapshot sees: it is another where anything may have been written in between."""
    seen = await connection.fetchval("SELECT pg_current_snapshot()::text || pg_postmaster_start_time()::text")
    return hashlib.sha256(seen.encode()).hexdigest()[:16]


def _text(name: str, value: object) -> str | None:
    """A parameter's value as PostgreSQL reads it; None is NULL."""
    match value:
        case None:
            return None
        case bool():
            return "true" if value else "false"
        case str() | int() | float() | Decimal() | UUID():
            return str(value)
        case date() | time():
            return value.isoformat()
        case bytes():
            return f"\\x{value.hex()}"
    raise BadQuery(f"parameter :{name} has a value of type {type(value).__name__}")


async def _receive_csv(
    connection: "Connection", fields: Sequence[Field], rows: str, put: Put, *, formula_guard: bool
) -> None:
    """Receive lines as RFC 4180 has them, without a header."""
    cells = [entry.csv(formula_guard=formula_guard) for entry in fields]
    if len(cells) == 1:
        cells = [f"concat({cells[0]})"]  # NULL would be an empty line, which is no row to many readers
    shorter = len(_MARKED_END) - len(_CRLF)

    async def receive(chunk: bytes) -> None:
        # A chunk holds whole rows. Source: PostgreSQL, "Message Formats", CopyData.
        lines = chunk.replace(_MARKED_END, _CRLF)
        await put((len(chunk) - len(lines)) // shorter, lines)

    sql = f"SELECT {', '.join(cells)}, '{_MARK}' AS streamlab_mark {rows}"
    await connection.copy_from_query(sql, output=receive, format="csv", force_quote=["streamlab_mark"])


async def _receive_json_lines(
    connection: "Connection", fields: Sequence[Field], rows: str, pipe: _Pipe, *, strict: bool
) -> None:
    """Receive an object a line; count the numbers that JSON does not have, or raise Misfit for them."""
    members = ", ".join(f"{entry.json()} AS {quoted(entry.column.name)}" for entry in fields)
    line = "row_to_json(r.*)::text"  # r alone would be a column of that name

    async def receive(chunk: bytes) -> None:
        if altered := chunk.count(NOT_FINITE):
            if strict:
                raise Misfit("a number is not finite, which JSON does not have")
            pipe.altered += altered
            chunk = chunk.replace(NOT_FINITE, b"null")
        await pipe.put(chunk.count(b"\n"), chunk)

    # COPY's text format would double backslashes, its CSV quotes; JSON escapes the bytes that stand for those here.
    sql = f"SELECT {line} FROM (SELECT {members} {rows}) AS r"  # noqa: S608 - names, quoted
    await connection.copy_from_query(sql, output=receive, format="csv", quote="\x01", delimiter="\x02")


async def _receive_batches(connection: "Connection", sql: str, encoder: Encoder, put: Put, threads: Threads) -> None:
    """Receive rows through a cursor, and encode them in a thread."""
    cursor = await (await connection.prepare(sql)).cursor()
    fetch: Callable[[int], Awaitable[Any]] = cursor.fetch  # its rows are sequences, though not to mypy
    count, most = BATCH_ROWS
    while True:
        try:
            batch = await fetch(count)
            if not batch:
                return
            chunk = await threads.run(encoder.rows, batch)
        except (ValueError, OverflowError) as error:  # the encoder's, or asyncpg's for a date that Python has not
            raise Misfit(str(error)) from error
        await put(len(batch), chunk)
        # Fewer where rows are long, as there is no limit to that.
        count = max(1, min(4 * count, most, PENDING_BYTES * len(batch) // max(1, len(chunk))))


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None], pipe: _Pipe) -> "AsyncIterator[asyncio.Task[None]]":
    """Run what fills a pipe while the block runs. It is cancelled with the block: asyncpg then stops the query."""

    def ended(task: "asyncio.Task[None]") -> None:
        pipe.close()
        if not task.cancelled():
            task.exception()  # who takes the rows may have left before it came to that

    task = asyncio.create_task(work)  # not in a TaskGroup, which would wrap what the block raises
    task.add_done_callback(ended)
    try:
        yield task
    finally:
        await shielded(_ended(task))


async def _ended(task: "asyncio.Task[None]") -> None:
    """Cancel a task until it ends: a cancellation can get lost in a command (python/cpython#86296, in 3.11)."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=LEAVE_SECONDS / 4)
