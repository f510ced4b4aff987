"""CSV, RFC 4180 (https://www.rfc-editor.org/rfc/rfc4180): CRLF, a header row, quotes only where they are needed."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from types import NoneType
from typing import Any, Final

import msgspec

from .encoder import Batch, Column
from .formula_guard import found, guarded, may_have_formulas, suspects
from .values import plain_writer, to_text

_MARKS: Final = (b",", b'"', b"\r", b"\n")
"""Characters that require quotes around a cell."""

KNOWN_CELLS: Final = 1024
"""Maximum number of cells of a column that are kept: none in so many first rows, where it would cost more than it
saves, and none after half as many in excess of half of all were not among them."""

KNOWN_LENGTH: Final = 64
"""Maximum length of a text whose cell is kept."""


class Csv:
    """CSV as `csv.writer(lineterminator="\\r\\n")` writes the prepared cells, several times faster.

    NULL is an empty cell, a blob base64, a boolean true or false, a float as in `_float`, a date or a time ISO 8601, an
    array or an object JSON, an interval its `str`. With the guard, a text that a spreadsheet would run as a formula
    gets an apostrophe before it, also a name in the header; numbers and the other plain values never do.

    A batch is written by columns. The texts of a column are joined and searched as one string for what must be quoted
    or guarded: most columns contain nothing of the kind and cost no work per cell. Where they do, cells of texts that
    are repeated are kept. Numbers are formatted by msgspec where it writes the same as `repr`.

    A cell that is not ASCII is UTF-8 as Latin-1: all strings have a byte per character then, which is fastest to join.
    """

    media_type = "text/csv; charset=utf-8"
    extension = "csv"
    altered = 0

    def __init__(self, columns: Sequence[Column], *, formula_guard: bool = True, header: bool = True) -> None:
        self._names = tuple(column.name for column in columns)
        self._guard = formula_guard
        self._header = header
        self._seen = 0
        self._known: list[_Known | None] = [None] * len(self._names)
        self._repeats = [True] * len(self._names)
        """Whether the texts of a column may be repeated often enough to keep their cells."""

    def begin(self) -> bytes:
        """Return the header row."""
        return (",".join(map(self._text, self._names)) + "\r\n").encode("latin-1") if self._header else b""

    def rows(self, batch: Batch) -> bytes:
        """Return a line per row."""
        if not self._names:
            return b"\r\n" * len(batch)
        if not batch:
            return b""
        self._seen += len(batch)
        cells = [self._column(index, values) for index, values in enumerate(zip(*batch, strict=True))]
        if len(cells) == 1:
            # An empty line would not count as a row; NULL and the empty text are written alike, as everywhere.
            lines: Iterable[str] = [cell or '""' for cell in cells[0]]
        else:
            lines = map(",".join, zip(*cells, strict=True))
        return ("\r\n".join(lines) + "\r\n").encode("latin-1")

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Return nothing."""
        return b""

    def _column(self, index: int, values: tuple[Any, ...]) -> Sequence[str]:
        if (known := self._known[index]) is not None:
            with contextlib.suppress(TypeError):  # a value that cannot be a key
                cells = known.cells(values)
                if known.misses > KNOWN_CELLS // 2:
                    self._known[index], self._repeats[index] = None, False
                return cells
        first = values[0]
        if first is None:
            first = next((value for value in values if value is not None), None)
            if first is None:
                return [""] * len(values)
        kind = type(first)
        others: Sequence[str] | None = None
        if kind is str:
            # str.join rejects all but texts, which is faster than checking the type of each.
            with contextlib.suppress(TypeError):
                return self._texts(index, values, "\0".join(values))
            with contextlib.suppress(TypeError):
                values = tuple(["" if value is None else value for value in values])
                return self._texts(index, values, "\0".join(values))
        elif kind is int or kind is float or kind is bool:
            others = _numbers(values)
        elif (write := plain_writer(kind)) and {kind, NoneType}.issuperset(map(type, values)):
            others = ["" if value is None else write(value) for value in values]
        return others or [self._cell(value) for value in values]

    def _texts(self, index: int, texts: Sequence[str], joined: str) -> Sequence[str]:
        """Return the cells of texts; `joined` has them with NUL between."""
        data = joined.encode("utf-8", "replace")
        formulas = suspects(data) if self._guard and may_have_formulas(data) else []
        marks = [mark for mark in _MARKS if mark in data]
        if not formulas and not marks and joined.isascii():
            return texts
        if data.count(b"\0") >= len(texts):  # one is in a text
            return [self._text(text) for text in texts]
        cells = list(texts) if joined.isascii() else data.decode("latin-1").split("\0")
        for number in _numbers_at(formulas, data):
            cells[number] = _utf8(guarded(texts[number]))
        if sum(map(data.count, marks)) > len(texts) // 4:
            cells = list(map(_quoted, cells))
        else:
            for number in _numbers_at(sorted([place for mark in marks for place in found(data, mark)]), data):
                cells[number] = _quoted(cells[number])
        if (formulas or marks) and self._repeats[index] and self._seen > KNOWN_CELLS:
            self._known[index] = _Known(self._cell)
        return cells

    def _cell(self, value: Any) -> str:
        text = to_text(value)
        if isinstance(value, str) or (value is not None and not plain_writer(type(value))):
            return self._text(text, guard=not isinstance(value, timedelta))
        return text

    def _text(self, text: str, *, guard: bool = True) -> str:
        return _quoted(_utf8(guarded(text) if self._guard and guard else text))


class _Known(dict[str | None, str]):
    """The cells of texts and NULL that were written before, and what writes others."""

    def __init__(self, write: Callable[[Any], str]) -> None:
        self._write = write
        self.misses = 0
        """How many more cells than half of all were not known."""

    def __missing__(self, value: Any) -> str:
        self.misses += 2
        cell = self._write(value)
        if len(self) < KNOWN_CELLS and (value is None or (type(value) is str and len(value) <= KNOWN_LENGTH)):
            self[value] = cell
        return cell

    def cells(self, values: Sequence[Any]) -> Sequence[str]:
        """Return the cells of some values."""
        cells = list(map(self.__getitem__, values))
        self.misses = max(0, self.misses - len(values))
        return cells


def _numbers_at(places: Iterable[int], data: bytes) -> Iterator[int]:
    """Yield the number of each cell with a byte at one of the ordered places in `data`, the cells joined."""
    number = start = end = 0
    for place in places:
        if place >= end >= 0:
            number += data.count(b"\0", start, place)
            yield number
            start, end = place, data.find(b"\0", place)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode("latin-1")


def _quoted(cell: str) -> str:
    """Return a cell with quotes around it, if they are needed."""
    if '"' in cell:
        return '"' + cell.replace('"', '""') + '"'
    return f'"{cell}"' if "," in cell or "\n" in cell or "\r" in cell else cell


def _numbers(values: tuple[Any, ...]) -> list[str] | None:
    """Return the cells of a column of numbers, booleans and NULL; None if it contains anything else."""
    try:
        text = _numbers_json(values).decode()
    except (TypeError, ValueError, RecursionError):
        return None
    if '"' in text or "{" in text or text.rfind("[") > 0:
        return None
    # msgspec writes exponents differently from repr: 1e16 for 1e+16, and 0.00001 for 1e-05.
    if "0.0000" in text or ("e" in text and _EXPONENT.search(text)):
        return None
    if "null" in text:
        if text.count("null") != values.count(None):  # NaN and infinity are null too
            return None
        text = text.replace("null", "")
    return text[1:-1].split(",")


_numbers_json: Final = msgspec.json.Encoder().encode
_EXPONENT: Final = re.compile(r"e[-\d]")
