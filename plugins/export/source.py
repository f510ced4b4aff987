"""What a database promises to an export, and how it refuses."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from .encoder import Column, Encoder


class BadQuery(Exception):
    """The database does not take the SQL that the operator configured; the message is the database's own."""


class Unavailable(Exception):
    """The database does not answer. The message is fit for a client: no host, no path, no password."""


class Interrupted(Exception):
    """A result broke off: the database went away, or the query took too long."""


class Misfit(Exception):
    """A value cannot be said in the format asked for; the message names its column."""


class TooLarge(Exception):
    """A cell is larger than exports may have; the message says which, as far as the database does."""


class UnknownColumn(Exception):
    """A column was asked for that the result does not have."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(name)
        self.name = name
        self.known = tuple(known)


class BadValue(Exception):
    """A value does not have the type of what it is for: of a column that it is compared with."""

    def __init__(self, column: str, detail: str) -> None:
        super().__init__(f"{column}: {detail}")
        self.column = column
        self.detail = detail

    @property
    def name(self) -> str:
        """The name of the value in a request."""
        return f"where.{self.column}"


class BadParameter(BadValue):
    """A value does not have the type that the query needs at the place of a parameter of its own."""

    @property
    def name(self) -> str:
        """The name of the parameter."""
        return self.column


@dataclass(frozen=True, slots=True)
class Query:
    """A configured SELECT, and the values of the parameters that it names as `:name`."""

    sql: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a client wants of a result; values are text as they came, and are bound, never put into SQL."""

    columns: Sequence[str] = ()
    """By name, in this order; empty for all."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Columns that must equal a value."""
    limit: int | None = None
    skip: int = 0
    """Rows of the result that are left out at its beginning."""


class Export(Protocol):
    """A result on its way: its first rows are there already."""

    columns: Sequence[Column]
    rows: int
    """How many rows the chunks handed out so far have."""
    version: str
    """What the data is: another text where it may have changed."""
    begin: bytes
    """What stands before the first row."""

    @property
    def altered(self) -> int:
        """How many values so far do not come as they are in the database, as the format cannot hold them."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the rows, without what is before the first and behind the last.

        Raises Interrupted, TooLarge, Misfit.
        """


class Source(Protocol):
    """A database that results come from."""

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
        """Run a query, in one snapshot, and lend its result to the block; leaving the block ends the query.

        Its first rows are fetched before the block begins, so that what fails at once can be refused: raises BadQuery,
        Unavailable, UnknownColumn, BadValue, Misfit, TooLarge, Interrupted, MissingLibrary. If strict, Misfit also
        where a value could only be sent altered.
        """


def quoted(name: str) -> str:
    """A name as SQL has it, whatever it is."""
    return '"' + name.replace('"', '""') + '"'


async def body(export: Export) -> AsyncGenerator[bytes, None]:
    """The body but for its end; what begins it comes with the first rows, in one piece."""
    begin = export.begin
    async for data in export.chunks():
        yield begin + data
        begin = b""
    if begin:
        yield begin
