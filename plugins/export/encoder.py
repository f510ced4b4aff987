"""What every format shares: columns, their names, and what an encoder does.

An encoder is made for one result and called in order: `begin`, `rows` for each batch, `end`. It never blocks and holds
at most a batch (Parquet: a row group), so it may run in any thread, in one at a time. Its rows are those of sqlite3 and
asyncpg, including values whose types differ from row to row, as SQLite's columns may hold them. A lone surrogate, for
which UTF-8 has no bytes, becomes "?" in every format.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

TYPES: Final = frozenset(
    {"integer", "real", "text", "blob", "boolean", "decimal", "date", "time", "timestamp", "timestamptz", "interval"}
    | {"uuid", "json", "any"}
)
"""Types that a column may be declared with. Only Arrow and Parquet enforce them; `timestamptz` has a zone."""

Batch = Sequence[Sequence[Any]]
"""Rows: tuples or other sequences with a value per column."""


class MissingLibrary(RuntimeError):
    """A format needs a library that is not installed; the text says how to install it."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result: its name and its declared type, one of `TYPES`."""

    name: str
    type: str

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"column {self.name!r} has the unknown type {self.type!r}")


class Encoder(Protocol):
    """Writes one result in one format."""

    media_type: str
    extension: str
    altered: int
    """Number of values so far that the format could not hold and that were written as something else."""

    def begin(self) -> bytes:
        """Return the bytes before the first row."""

    def rows(self, batch: Batch) -> bytes:
        """Return the bytes of some rows; empty while a row group is being filled."""

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Return the bytes after the last row. JSON Lines: the end record, if there is a digest for it.

        `altered` is the number of values of the result that differ from those in the database.
        """


def unique(names: Iterable[str]) -> list[str]:
    """Return names without duplicates: a, a_2, a_3. An empty one becomes "column"; a given a_2 is not renamed."""
    given = [name or "column" for name in names]
    taken = set(given)
    seen: set[str] = set()
    numbers: dict[str, int] = {}
    result = []
    for name in given:
        chosen = name
        if name in seen:
            number = numbers.get(name, 2)
            while (chosen := f"{name}_{number}") in taken:
                number += 1
            numbers[name] = number + 1
            taken.add(chosen)
        seen.add(name)
        result.append(chosen)
    return result
