"""Results of PostgreSQL: as COPY writes them, or encoded from the rows of a cursor.

PostgreSQL itself writes CSV and JSON lines, which are passed on; the other formats are encoded here. Every export is a
read-only transaction with one snapshot, on a connection of a pool. Requires PostgreSQL 14, and
`standard_conforming_strings`, the default since 9.1.
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
from .postgres_csv import CsvLines
from .postgres_fields import Field, fields_of
from .postgres_json import JsonLines
from .postgres_statement import Statement
from .source import (
    BadParameter,
    BadQuery,
    BadValue,
    Interrupted,
    Query,
    Selection,
    TooLarge,
    Unavailable,
    UnknownColumn,
    UnrepresentableValue,
)

if TYPE_CHECKING:
    import asyncpg
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = PoolConnectionProxy[asyncpg.Record]

log = logging.getLogger(__name__)

CANCEL_SECONDS = 0.1
"""Maximum time for a query to end after its export, in seconds; then its connection is closed, which ends it too."""

CLOSE_SECONDS = 1.0
"""Maximum time to close the connections when the server stops, in seconds."""

THREADS = 2
"""Number of threads that encode rows of a database in formats that PostgreSQL does not write."""

CHECK_MILLISECONDS = 500
"""Interval at which PostgreSQL checks whether the client of a running query is connected, in milliseconds."""

PENDING_BYTES = 256 * 1024
"""Maximum size of received rows that their consumer has not taken, in bytes; then PostgreSQL has to wait."""

BATCH_ROWS = (16, 1000)
"""Number of rows in the first batch of a cursor, and their maximum in later ones, each up to four times the last."""

_TOO_LARGE = re.compile(r"streamlab: (column .* holds [0-9]+ bytes)", re.DOTALL)
"""The error message that `Field.size_check` causes in PostgreSQL."""

READ_BYTES = 64 * 1024
"""Number of bytes worth reading at once; after fewer, the next are waited for."""

READ_SECONDS = 0.0005
"""Time to wait, in seconds, rounded up to a millisecond by the loop; PostgreSQL fills the socket meanwhile."""

Put: TypeAlias = Callable[[int, bytes], Awaitable[None]]


# -- the result of a query


@dataclass(frozen=True, slots=True)
class _Result:
    """A query that PostgreSQL has prepared but not run."""

    statement: Statement
    fields: Sequence[Field]
    parameters: Mapping[str, int]
    """The OID of the type of each parameter."""

    def named(self, names: Sequence[str]) -> Sequence[Field]:
        """Return the fields of these names; raises UnknownColumn."""
        known = {entry.column.name: entry for entry in self.fields}
        for name in names:
            if name not in known:
                raise UnknownColumn(name, tuple(known))
        return [known[name] for name in dict.fromkeys(names)]


# -- from the task that receives rows to the one that sends them


class _Pipe:
    """A queue of received rows, of at most PENDING_BYTES and one chunk more."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._bytes = self._rows = 0
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._closed = False
        self.altered = 0

    async def put(self, rows: int, chunk: bytes) -> None:
        """Append a chunk, and wait until there is capacity for the next."""
        self._chunks.append(chunk)
        self._bytes += len(chunk)
        self._rows += rows
        self._arrived.set()
        while self._bytes >= PENDING_BYTES:
            self._taken.clear()
            await self._taken.wait()

    def close(self) -> None:
        """Mark the end of the rows."""
        self._closed = True
        self._arrived.set()

    async def arrived(self) -> bool:
        """Wait until there are rows; return False at the end."""
        while not self._chunks and not self._closed:
            self._arrived.clear()
            await self._arrived.wait()
        return bool(self._chunks)

    def take(self) -> tuple[int, bytes]:
        """Take everything: the number of rows, and their bytes."""
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
        """Number of numbers that JSON cannot represent."""
        return self._pipe.altered + self._encoder.altered

    async def arrived(self) -> bool:
        """Wait until there are rows, return False at the end; raises the error that ended the query."""
        async with asyncio.timeout(self._source.response_seconds):
            if await self._pipe.arrived():
                return True
        await self._task
        return False

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the rows as they arrive from PostgreSQL, which waits while they are not consumed."""
        while await self._more():
            rows, chunk = self._pipe.take()
            self.rows += rows
            yield chunk

    async def _more(self) -> bool:
        try:
            return await self.arrived()
        except Exception as error:
            if (classified := self._source.classify(error)) is None:
                raise
            kind, reason = classified
            if kind is TooLarge:
                raise TooLarge(reason) from error
            raise Interrupted(f"the query failed after {self.rows} rows: {reason}") from error


# -- the source


class PostgresSource:
    """A PostgreSQL database that is only read. `url` is postgresql://USER:PASSWORD@HOST/DATABASE.

    It connects to the server at the first query, and again at the next query after a disconnection. `statement_seconds`
    limits a whole COPY, including the time that its client takes, and each batch of a cursor; `max_cell` is the maximum
    size of a cell in bytes.

    Raises MissingLibrary, and ValueError for a URL that is not one of PostgreSQL.
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
            raise ValueError("is not the URL of a PostgreSQL server (postgresql://...)")
        self._asyncpg = asyncpg
        self._url = url
        self._connect_seconds = connect_seconds
        self._statement_seconds = statement_seconds
        self._connections = connections
        self._max_cell = max_cell
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._unreachable = False
        self._threads = Threads("export-encode", THREADS)
        self.response_seconds = connect_seconds + statement_seconds
        """Maximum time without a response, in seconds; the server's own limit would have ended the query before."""

    # -- connections

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Provide connections during the block, whose end also ends the exports."""
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
                # The text of values must not depend on the configuration of the server.
                "DateStyle": "ISO",
                "IntervalStyle": "iso_8601",
                "extra_float_digits": "1",
                "standard_conforming_strings": "on",
            },
        )
        await self._pool  # makes no connection: its minimum size is 0
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
        """Yield a connection in a read-only transaction with one snapshot; raises Unavailable."""
        pool = self._pool
        if pool is None:
            raise Unavailable("The database is not open.")
        connection = await self._begin(pool)
        if self._unreachable:
            self._unreachable = False
            log.info("the PostgreSQL server of an export is reachable again")
        try:
            yield connection
        finally:
            await shielded(self._release(pool, connection))

    async def _begin(self, pool: "asyncpg.Pool[asyncpg.Record]") -> "Connection":
        lost: Exception | None = None
        for _ in range(2):  # a connection of the pool may have died unnoticed
            connection = await self._acquire(pool)
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
        raise self._mark_unreachable(lost) from lost

    async def _acquire(self, pool: "asyncpg.Pool[asyncpg.Record]") -> "Connection":
        try:
            return await pool.acquire(timeout=self._connect_seconds)
        except Exception as error:
            if isinstance(error, TimeoutError) and pool.get_size() == pool.get_max_size() and not pool.get_idle_size():
                raise Unavailable("All connections to the database are in use.") from None
            raise self._mark_unreachable(error) from error

    async def _release(self, pool: "asyncpg.Pool[asyncpg.Record]", connection: "Connection") -> None:
        """Roll back a transaction, whose query has been cancelled; close the connection if that takes too long."""
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                await connection.execute("ROLLBACK")
        except Exception:
            await self._close(pool, connection)
            return
        try:
            await pool.release(connection, timeout=CANCEL_SECONDS)
        except Exception as error:
            log.info("a connection to PostgreSQL was closed instead of released: %s", type(error).__name__)

    async def _close(self, pool: "asyncpg.Pool[asyncpg.Record]", connection: "Connection") -> None:
        """Close a connection in any state; one that was lost is no longer in the pool."""
        with suppress(self._asyncpg.InterfaceError):
            connection.terminate()
        await pool.release(connection)

    # -- errors

    def classify(self, error: Exception) -> tuple[type[Exception], str] | None:
        """Return the exception for an error of the driver, and one line on it; None if the error is not the driver's.

        Source of the codes: https://www.postgresql.org/docs/current/errcodes-appendix.html.
        """
        if not isinstance(error, self._asyncpg.PostgresError):
            driver = (OSError, TimeoutError, self._asyncpg.InterfaceError, self._asyncpg.InternalClientError)
            return (Unavailable, "the database does not respond") if isinstance(error, driver) else None
        code = str(error.sqlstate or "")
        if code.startswith(("08", "57P")):
            return Unavailable, "the database does not respond"
        message = str(error).partition("\n")[0]
        if code == "22P02" and (large := _TOO_LARGE.search(message)):
            return TooLarge, large[1]
        if code == "57014":
            return Interrupted, f"it exceeded the limit of {self._statement_seconds:g} s"
        # Conflicts with a primary, time limits of transactions, a lack of memory, disk or locks.
        if code.startswith(("25P", "40", "53", "55")):
            return Interrupted, message
        return BadQuery, message

    @contextmanager
    def _classified_errors(self) -> Iterator[None]:
        """Turn errors of the driver before the first row into those of `source`."""
        try:
            yield
        except Exception as error:
            if (classified := self.classify(error)) is None:
                raise
            kind, reason = classified
            if kind is Unavailable:
                raise self._mark_unreachable(error) from error
            raise kind(reason) from error

    def _mark_unreachable(self, error: BaseException | None) -> Unavailable:
        """Return the error for clients of an unreachable server; log the reason once."""
        if not self._unreachable:
            self._unreachable = True
            code = getattr(error, "sqlstate", None)
            why = type(error).__name__ + (f" {code}" if code else "")
            log.warning("the PostgreSQL server of an export is unreachable (%s)", why)
        return Unavailable("The database does not respond.")

    # -- queries

    async def describe(self, query: Query) -> Sequence[Column]:
        """Return names and types of a result's columns, without running its query.

        Raises BadQuery, Unavailable, and Interrupted if it waits too long for a lock.
        """
        async with self._snapshot() as connection:
            with self._classified_errors():
                async with asyncio.timeout(self.response_seconds):
                    return [entry.column for entry in (await _prepare(connection, query)).fields]

    @asynccontextmanager
    async def export(
        self, query: Query, selection: Selection, form: str, *, formula_guard: bool, strict: bool = False
    ) -> AsyncIterator[tuple[_PostgresExport, Encoder]]:
        """Run a query, and yield its result; raises Interrupted before the block, too, if it takes too long.

        In CSV, dates and times are as PostgreSQL has them, ISO 8601 with a space for the T; arrays and composites are
        JSON, blobs base64; an empty text is quoted and NULL is not, except in a single column. In JSON, NaN and
        infinity are null, and numbers have all their digits; inside of arrays, NaN is a text and a blob hexadecimal.
        Intervals are ISO 8601 in every format ("P1DT2H").
        """
        async with self._snapshot() as connection:
            with self._classified_errors():
                async with asyncio.timeout(self.response_seconds):
                    result = await _prepare(connection, query)
                    chosen = result.named(selection.columns) or result.fields
                    rows = await self._bound(connection, query, selection, result, chosen)
                    version = await _version(connection)
            columns, encoded = [entry.column for entry in chosen], [entry.value(form) for entry in chosen]
            declared = columns
            if form not in ("csv", "jsonl"):
                declared = [Column(column.name, kind) for column, (_, kind) in zip(columns, encoded, strict=True)]
            encoder = make(form, declared, formula_guard=formula_guard, strict=strict)
            begin, pipe = encoder.begin(), _Pipe()
            if form == "csv":
                receive = _receive_csv(connection, chosen, rows, pipe.put, formula_guard=formula_guard)
            elif form == "jsonl":
                receive = _receive_json_lines(connection, chosen, rows, pipe, strict=strict)
            else:
                sql = f"SELECT {', '.join(value for value, _ in encoded)} {rows}"
                receive = _receive_batches(connection, sql, encoder, pipe.put, self._threads)
            async with _receiving(receive, pipe) as task:
                export = _PostgresExport(columns, version, begin, self, pipe, task, encoder)
                with self._classified_errors():
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

        COPY has no parameters, so a value becomes a setting of the transaction, which the SQL reads: the value is never
        part of any SQL. asyncpg would replace `$1` with the value in strings and comments, too.
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
        # The line feed ends a comment. The query cannot close the parenthesis: it is a complete statement by itself.
        names = ", ".join(entry.ref for entry in result.fields)
        sql = f"FROM ({result.statement.text(written.__getitem__)}\n) AS q ({names})"
        if conditions:
            sql += f" WHERE {' AND '.join(conditions)}"
        if checks := [check for entry in chosen if (check := entry.size_check(self._max_cell))]:
            # OFFSET 0 excludes rows that the query leaves out from the checks: nothing is moved across it.
            sql = f"FROM (SELECT {names} {sql} OFFSET 0) AS q WHERE {' AND '.join(checks)}"
        if selection.limit is not None:
            sql += f" LIMIT {selection.limit:d}"
        return sql + f" OFFSET {selection.skip:d}" if selection.skip else sql

    async def _bind(
        self, connection: "Connection", bad: type[BadValue], name: str, key: str, text: str, attempt: str
    ) -> None:
        """Store a value for the transaction, if PostgreSQL can evaluate `attempt` with it; raises `bad`."""
        try:
            await connection.fetch(f"SELECT set_config($1, $2::text, true), {attempt}", key, text)
        except (self._asyncpg.PostgresError, UnicodeError) as error:
            classified = self.classify(error)
            if classified and classified[0] is not BadQuery:
                raise
            raise bad(name, classified[1] if classified else "is not valid text") from error


# -- statements on a connection


async def _prepare(connection: "Connection", query: Query) -> _Result:
    """Prepare a query; raises BadQuery, and errors of the driver."""
    statement = Statement.parse(query.sql)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(statement.names), 1)}
    for name in numbers:
        if name not in query.parameters:
            known = ", ".join(f":{known}" for known in query.parameters) or "none"
            raise BadQuery(f"unknown parameter :{name}; known: {known}")
    sql = statement.text(lambda name: f"${numbers[name]}")
    # A complete statement cannot close the parenthesis around it, and a parenthesis can only contain a SELECT, a VALUES
    # or a TABLE. PostgreSQL prepares one statement at a time.
    await connection.prepare(sql, name="")
    prepared = await connection.prepare(f"SELECT * FROM ({sql}\n) AS q", name="")  # noqa: S608 - the operator's own
    attributes = prepared.get_attributes()
    if not attributes:
        raise BadQuery("the result has no columns")
    oids = [parameter.oid for parameter in prepared.get_parameters()]
    return _Result(statement, fields_of(attributes), dict(zip(numbers, oids, strict=True)))


async def _type_names(connection: "Connection", oids: Collection[int]) -> Mapping[int, str]:
    """Return the qualified names of types, for a CAST that does not shorten its value."""
    rows = await connection.fetch(
        "SELECT t.oid, format('%I.%I', n.nspname, t.typname) FROM pg_catalog.pg_type AS t"
        " JOIN pg_catalog.pg_namespace AS n ON n.oid = t.typnamespace WHERE t.oid = ANY($1::oid[])",
        list(oids),
    )
    return {row[0]: row[1] for row in rows}


async def _version(connection: "Connection") -> str:
    """Return a hash of the transactions that the snapshot sees: it differs if anything may have been written since."""
    seen = await connection.fetchval("SELECT pg_current_snapshot()::text || pg_postmaster_start_time()::text")
    return hashlib.sha256(seen.encode()).hexdigest()[:16]


def _text(name: str, value: object) -> str | None:
    """Return the value of a parameter as PostgreSQL reads it; None is NULL."""
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
    """Receive lines of RFC 4180, without a header."""
    cells = [entry.csv() for entry in fields]
    if len(cells) == 1:
        cells = [f"concat({cells[0]})"]  # NULL would be an empty line, which many readers skip
    lines = CsvLines([entry.guard if formula_guard else None for entry in fields])

    async def receive(chunk: bytes) -> None:
        # A chunk holds whole rows. Source: PostgreSQL, "Message Formats", CopyData.
        await put(*lines.lines(bytes(chunk)))
        await _collect(chunk)

    await connection.copy_from_query(f"SELECT {', '.join(cells)} {rows}", output=receive, format="csv")


async def _collect(chunk: bytes) -> None:
    """Let rows collect in the socket: PostgreSQL sends 8 KiB at a time, and reading so few costs more than the rows."""
    if len(chunk) < READ_BYTES:
        await asyncio.sleep(READ_SECONDS)


async def _receive_json_lines(
    connection: "Connection", fields: Sequence[Field], rows: str, pipe: _Pipe, *, strict: bool
) -> None:
    """Receive an object a line; count the numbers that JSON cannot represent, or raise UnrepresentableValue for one."""
    lines = JsonLines(fields)

    async def receive(chunk: bytes) -> None:
        altered, data = lines.lines(chunk)
        if altered and strict:
            raise UnrepresentableValue("a number is not finite, which JSON cannot represent")
        pipe.altered += altered
        await pipe.put(data.count(b"\n"), data)
        await _collect(data)

    # COPY's text format would double backslashes, its CSV format quotes; JSON escapes the bytes used instead.
    sql = lines.sql(rows)
    await connection.copy_from_query(sql, output=receive, format="csv", quote="\x01", delimiter="\x02")


async def _receive_batches(connection: "Connection", sql: str, encoder: Encoder, put: Put, threads: Threads) -> None:
    """Receive rows through a cursor, and encode them in a thread."""
    cursor = await (await connection.prepare(sql)).cursor()
    fetch: Callable[[int], Awaitable[Any]] = cursor.fetch  # its rows are sequences, but not for mypy
    count, most = BATCH_ROWS
    while True:
        try:
            batch = await fetch(count)
            if not batch:
                return
            chunk = await threads.run(encoder.rows, batch)
        except (ValueError, OverflowError) as error:  # of the encoder, or of asyncpg for a date beyond Python's
            raise UnrepresentableValue(str(error)) from error
        await put(len(batch), chunk)
        # Fewer if rows are long: their length has no limit.
        count = max(1, min(4 * count, most, PENDING_BYTES * len(batch) // max(1, len(chunk))))


@asynccontextmanager
async def _receiving(work: Coroutine[Any, Any, None], pipe: _Pipe) -> "AsyncIterator[asyncio.Task[None]]":
    """Run the task that fills a pipe during the block. It is cancelled after the block, and asyncpg stops the query."""

    def ended(task: "asyncio.Task[None]") -> None:
        pipe.close()
        if not task.cancelled():
            task.exception()  # retrieved: the consumer may have stopped before that

    task = asyncio.create_task(work)  # not in a TaskGroup, which would wrap what the block raises
    task.add_done_callback(ended)
    try:
        yield task
    finally:
        await shielded(_cancel(task))


async def _cancel(task: "asyncio.Task[None]") -> None:
    """Cancel a task until it ends: a cancellation can get lost in a command (python/cpython#86296, in 3.11)."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_SECONDS / 4)
