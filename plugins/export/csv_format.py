"""CSV, RFC 4180 (https://www.rfc-editor.org/rfc/rfc4180): CRLF, a header row, quotes only where they are needed."""

import contextlib
import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from types import NoneType
from typing import Any, Final

import msgspec

from .encoder import Batch, Column
from .values import plain_writer, to_text

# Some spreadsheet starts a formula at these characters: those of OWASP, and their wide and small variants. Source:
# https://owasp.org/www-community/attacks/CSV_Injection. They may be preceded by characters that a spreadsheet may trim,
# drop or not show: white space, control characters, the Default_Ignorable_Code_Point of Unicode 16
# (DerivedCoreProperties.txt), and a quote. A cell starts at the start of a text and, in spreadsheets that separate by
# semicolon or tab, after each of these: quotes around the text do not prevent that, as a quote counts only at the start
# of a cell.
FORMULA_MARKS: Final = "=+\\-@\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b"
IGNORED_RANGES: Final = (
    (0x01, 0x08), (0x0A, 0x20), (0x22, 0x22), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C),
    (0x115F, 0x1160), (0x1680, 0x1680), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2000, 0x200F), (0x2028, 0x202F),
    (0x205F, 0x206F), (0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
"""Ranges of code points that may precede a formula; so may 0, which PostgreSQL does not have."""

_IGNORED: Final = "\0" + "".join(f"{chr(first)}-{chr(last)}" for first, last in IGNORED_RANGES)
_FORMULA: Final = re.compile(f"(^|[;\t])(?=[{_IGNORED}]*[{FORMULA_MARKS}])")
_LEADING: Final = frozenset("\t\r\n")
"""Characters that OWASP wants guarded at the start of a cell, whatever follows."""

_SUSPICIOUS: Final = frozenset(
    [chr(code) for first, last in ((0, 0), *IGNORED_RANGES) for code in range(first, last + 1)]
).union(FORMULA_MARKS, "\t") - {"\\"}
_WIDE_MARKS: Final = tuple(FORMULA_MARKS[5:])
_CLASSES: Final = bytes(
    ord("M" if chr(code) in "=+-@" else "B" if code > 0x7F or chr(code) in _SUSPICIOUS or chr(code) == ";" else "o")
    for code in range(256)
)
"""The class of each byte of UTF-8: M, starts a formula; B, may precede one; o, any other."""


def _guarded(cell: str) -> str:
    """Put an apostrophe before each formula that a spreadsheet would run."""
    cell = _FORMULA.sub(r"\1'", cell)
    return "'" + cell if cell[:1] in _LEADING else cell


_MARKS: Final = ',"\r\n'
"""Characters that require quotes around a cell."""


class Csv:
    """CSV as `csv.writer(lineterminator="\\r\\n")` writes the prepared cells, several times faster.

    NULL is an empty cell, a blob base64, a boolean true or false, a float as in `_float`, a date or a time ISO 8601, an
    array or an object JSON, an interval its `str`. With the guard, a text that a spreadsheet would run as a formula
    gets an apostrophe before it, also a name in the header; numbers and the other plain values never do.

    A batch is written by columns. The texts of a column are joined and searched as one string for what must be quoted
    or guarded: most columns contain nothing of the kind and cost no work per cell. Numbers are formatted by msgspec
    where it writes the same as `repr`.
    """

    media_type = "text/csv; charset=utf-8"
    extension = "csv"
    altered = 0

    def __init__(self, columns: Sequence[Column], *, formula_guard: bool = True, header: bool = True) -> None:
        self._names = tuple(column.name for column in columns)
        self._guard = formula_guard
        self._header = header

    def begin(self) -> bytes:
        """Return the header row."""
        return self.rows([self._names]) if self._header else b""

    def rows(self, batch: Batch) -> bytes:
        """Return a line per row."""
        if not self._names:
            return b"\r\n" * len(batch)
        if not batch:
            return b""
        cells = [self._column(values) for values in zip(*batch, strict=True)]
        if len(cells) == 1:
            # An empty line would not count as a row; NULL and the empty text are written alike, as everywhere.
            lines: Iterable[str] = [cell or '""' for cell in cells[0]]
        else:
            lines = map(",".join, zip(*cells, strict=True))
        return ("\r\n".join(lines) + "\r\n").encode("utf-8", "replace")

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Return nothing."""
        return b""

    def _column(self, values: tuple[Any, ...]) -> Sequence[str]:
        first = next((value for value in values if value is not None), None)
        if first is None:
            return [""] * len(values)
        kind = type(first)
        cells: Sequence[str] | None = None
        if kind is str:
            # str.join rejects all but texts, which is faster than checking the type of each.
            with contextlib.suppress(TypeError):
                return self._texts(values, "\0".join(values))
            with contextlib.suppress(TypeError):
                values = tuple(["" if value is None else value for value in values])
                return self._texts(values, "\0".join(values))
        elif kind is int or kind is float or kind is bool:
            cells = _numbers(values)
        elif (write := plain_writer(kind)) and {kind, NoneType}.issuperset(map(type, values)):
            cells = ["" if value is None else write(value) for value in values]
        return cells or [self._cell(value) for value in values]

    def _texts(self, cells: Sequence[str], joined: str) -> Sequence[str]:
        """Return the cells of texts. `joined` has them with NUL between; a NUL within a text only costs time."""
        if self._guard and _risky(joined):
            cells = [
                _guarded(cell) if cell[:1] in _SUSPICIOUS or ";" in cell or "\t" in cell else cell for cell in cells
            ]
            joined = "\0".join(cells)
        marks = [mark for mark in _MARKS if mark in joined]
        if not marks:
            return cells
        if len(marks) == 1:
            mark = marks[0]
            return [_quoted(cell) if mark in cell else cell for cell in cells]
        return [_quoted(cell) if "," in cell or '"' in cell or "\n" in cell or "\r" in cell else cell for cell in cells]

    def _cell(self, value: Any) -> str:
        text = to_text(value)
        if not isinstance(value, str) and (value is None or plain_writer(type(value))):
            return text
        if self._guard and not isinstance(value, timedelta):
            text = _guarded(text)
        return _quoted(text) if any(mark in text for mark in _MARKS) else text


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


def _risky(joined: str) -> bool:
    """Return whether any of the texts joined by NUL may have to be guarded.

    Takes two passes in C over the classes of the bytes, whatever the texts are.
    """
    classes = joined.encode("utf-8", "replace").translate(_CLASSES)
    if classes[:1] == b"M" or b"BM" in classes:
        return True
    if joined[:1] in _LEADING or any("\0" + mark in joined for mark in _LEADING):
        return True
    return not joined.isascii() and any(mark in joined for mark in _WIDE_MARKS)


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
