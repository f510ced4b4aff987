"""The protocol of a database for exports, and its errors."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from .encoder import Column, Encoder


class BadQuery(Exception):
    """The database rejects the SQL that the operator configured; the message is the database's own."""


class Unavailable(Exception):
    """The database is unavailable. The message may be sent to a client: no host, no path, no password."""


class Interrupted(Exception):
    """A result was interrupted: the database disconnected, or the query took too long."""


class UnrepresentableValue(Exception):
    """A value cannot be represented in the requested format; the message names its column."""


class TooLarge(Exception):
    """A cell exceeds the maximum size; the message names it, as far as the database does."""


class UnknownColumn(Exception):
    """A request names a column that the result does not have."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(name)
        self.name = name
        self.known = tuple(known)


class BadValue(Exception):
    """A value does not have the type of the column that it is compared with."""

    def __init__(self, column: str, detail: str) -> None:
        super().__init__(f"{column}: {detail}")
        self.column = column
        self.detail = detail

    @property
    def name(self) -> str:
        """The name of the value in a request."""
        return f"where.{self.column}"


class BadParameter(BadValue):
    """A value does not have the type of its parameter in the query."""

    @property
    def name(self) -> str:
        """The name of the parameter."""
        return self.column


@dataclass(frozen=True, slots=True)
class Query:
    """A configured SELECT, and the values of its parameters, `:name`."""

    sql: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a result that a client requests; values are text of the request, bound, never put into SQL."""

    columns: Sequence[str] = ()
    """Names of columns, in this order; empty for all."""
    where: Mapping[str, str] = field(default_factory=dict)
    """The value that each of these columns must equal."""
    limit: int | None = None
    """Maximum number of rows."""
    skip: int = 0
    """Number of rows to skip at the beginning of the result."""


class Export(Protocol):
    """A running export whose first rows have been fetched."""

    columns: Sequence[Column]
    rows: int
    """Number of rows in the chunks yielded so far."""
    version: str
    """The version of the data: it differs where the data may have changed."""
    begin: bytes
    """The bytes before the first row."""

    @property
    def altered(self) -> int:
        """Number of values so far that differ from those in the database, as the format cannot hold them."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the rows, without the bytes before the first and after the last.

        Raises Interrupted, TooLarge, UnrepresentableValue.
        """


class Source(Protocol):
    """A database that exports read from."""

    async def describe(self, query: Query) -> Sequence[Column]:
        """Return the columns of a result without running its query; raises BadQuery, Unavailable."""

    def export(
        self,
        query: Query,
        selection: Selection,
        form: str,
        *,
        formula_guard: bool,
        strict: bool = False,
    ) -> AbstractAsyncContextManager[tuple[Export, Encoder]]:
        """Run a query in one snapshot, and yield its result to the block; leaving the block ends the query.

        Its first rows are fetched before the block, so that early failures become error responses: raises BadQuery,
        Unavailable, UnknownColumn, BadValue, UnrepresentableValue, TooLarge, Interrupted, MissingLibrary. If strict,
        UnrepresentableValue also for a value that could only be sent altered.
        """


def quoted(name: str) -> str:
    """Return any name quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


async def body(export: Export) -> AsyncGenerator[bytes, None]:
    """Yield the body without its end; its beginning and the first rows are one chunk."""
    begin = export.begin
    async for data in export.chunks():
        yield begin + data
        begin = b""
    if begin:
        yield begin
