"""Lines as PostgreSQL's COPY writes them, made those of every CSV here: CRLF after a row, and the formula guard."""

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

from .formula_guard import suspects

Guard: TypeAlias = Callable[[str], str]

_CELL = re.compile(rb'("(?:[^"]|"")*"|[^,\0]*),?')
_QUOTED_DOT = re.compile(rb'(?<![^\n])"\\\."(?=\n)')
"""A row that PostgreSQL quotes although it has no special character, since psql would take it for the end."""


MANY_COMMAS = 32
"""Number of commas that are not counted again for the next suspect of the same row."""


class CsvLines:
    """Turns chunks of whole rows into lines; `guards` has the guard of each column, None for one that needs none.

    A byte of a chunk costs some nanoseconds; only a cell that may have a formula is looked at by itself.
    """

    def __init__(self, guards: Sequence[Guard | None]) -> None:
        self._guards = guards
        self._guarding = any(guards)

    def lines(self, chunk: bytes) -> tuple[int, bytes]:
        """Return the number of rows, and their lines."""
        if len(self._guards) == 1:
            chunk = _QUOTED_DOT.sub(rb"\\.", chunk)
        rows = _separated(chunk)
        return rows.count(b"\0"), (self._guarded(rows) if self._guarding else rows).replace(b"\0", b"\r\n")

    def _guarded(self, rows: bytes) -> bytes:
        """Apply the guards; a NUL ends each row."""
        parts: list[bytes] = []
        copied = row = cell = column = 0  # `cell` is the start of a cell of `row`, and `column` its number
        for place in suspects(rows):
            if place < copied:
                continue
            if (start := rows.rfind(b"\0", 0, place) + 1) != row:
                row, cell, column = start, start, 0
            if rows.find(b'"', cell, place) < 0:  # every comma is between two cells
                commas = rows.count(b",", cell, place)
                if not self._guards[column + commas] and commas < MANY_COMMAS:  # most suspects are negative numbers
                    continue
                column, cell = column + commas, max(cell, rows.rfind(b",", cell, place) + 1)
            while (match := _CELL.match(rows, cell)) and match.end() <= place:
                column, cell = column + 1, match.end()
            if match and (guard := self._guards[column]):
                parts += rows[copied:cell], _guarded_cell(match[1], guard)
                copied = match.end(1)
        return b"".join(parts) + rows[copied:] if parts else rows


def _separated(chunk: bytes) -> bytes:
    """Return rows with NUL, which no text of PostgreSQL contains, for the line feed at the end of each."""
    if b'"' not in chunk:
        return chunk.replace(b"\n", b"\0")
    # Every other part is within quotes; between two quotes that are one, there is an empty part.
    parts = chunk.split(b'"')
    parts[::2] = [part.replace(b"\n", b"\0") for part in parts[::2]]
    return b'"'.join(parts)


def _guarded_cell(cell: bytes, guard: Guard) -> bytes:
    if cell[:1] != b'"':
        return guard(cell.decode()).encode()
    text = cell[1:-1].decode().replace('""', '"')
    return b'"' + guard(text).replace('"', '""').encode() + b'"'
