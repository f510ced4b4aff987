"""JSON Lines (https://jsonlines.org), an object a line, and one JSON array of the same objects."""

import functools
import math
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import starmap
from operator import itemgetter
from types import NoneType
from typing import Any, Final
from uuid import UUID

import msgspec

from .encoder import Batch, Column
from .values import json_value, to_json

_read_raw: Final = msgspec.json.Decoder(msgspec.Raw).decode
_LINE_BREAKS: Final = bytes.maketrans(b"\r\n", b"  ")
_FINITE: Final = frozenset({NoneType, str, int, float, bool, bytes, datetime, date, time, timedelta, UUID, msgspec.Raw})
"""Types of values that neither are nor contain a Decimal."""


def _embedded(value: Any) -> Any:
    """Embed valid JSON text in the line. Other text stays a string: as it is, it could forge members and rows."""
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "replace")
    try:
        raw = _read_raw(text)
    except (msgspec.DecodeError, RecursionError):
        return value
    # Valid JSON has line breaks between its tokens only.
    return msgspec.Raw(bytes(raw).translate(_LINE_BREAKS)) if b"\n" in text or b"\r" in text else raw


@functools.lru_cache(maxsize=64)
def _row_type(names: tuple[str, ...]) -> Callable[..., Any]:
    """Return a type for the values of a row, which msgspec writes as an object with these names."""
    fields = {f"f{index}": name for index, name in enumerate(names)}
    try:
        return msgspec.defstruct("Row", [(field, Any) for field in fields], rename=fields, gc=False)
    except ValueError:  # a quote, a backslash or a control character
        return lambda *values: dict(zip(names, values, strict=True))


class JsonLines:
    """An object a line, its members in the order of the columns.

    A blob is base64, a Decimal a number with all its digits, an integer a number of any size; NaN and infinity are
    null, a date or a time is ISO 8601, an interval too ("P1D"). A text in a column of type json is a part of the
    object, its line breaks spaces; text that is not valid JSON is a string. Values of unknown types are their `str`.
    """

    media_type = "application/jsonl"
    extension = "jsonl"

    def __init__(self, columns: Sequence[Column], *, strict: bool = False) -> None:
        self.altered = 0
        self._strict = strict
        self._seen = 0
        self._names = tuple(column.name for column in columns)
        self._row = _row_type(self._names)
        self._with_nulls: Sequence[int] = ()
        self._embedded = [index for index, column in enumerate(columns) if column.type == "json"]
        # msgspec writes a Decimal NaN as it is. Searching every line for it would take half as long as writing it.
        self._decimals = [index for index, column in enumerate(columns) if column.type in {"decimal", "json", "any"}]
        self._lines = msgspec.json.Encoder(decimal_format="number", enc_hook=str).encode_lines

    def begin(self) -> bytes:
        """Return nothing."""
        return b""

    def rows(self, batch: Batch) -> bytes:
        """Return a line per row."""
        if self._embedded and batch:
            columns: list[Sequence[Any]] = list(zip(*batch, strict=True))
            for index in self._embedded:
                columns[index] = list(map(_embedded, columns[index]))
            batch = list(zip(*columns, strict=True))
        lines = self._encoded(batch)
        # Infinity is written as null. Checking each value would take half as long as writing it, so the nulls are
        # compared with the NULLs first, at best with those of the columns that have had some.
        if (nulls := lines.count(b":null")) and nulls != _count_nulls(batch, self._with_nulls):
            others = set(range(len(self._names))).difference(self._with_nulls)
            self._with_nulls = [*self._with_nulls, *(index for index in others if _count_nulls(batch, [index]))]
            if nulls != _count_nulls(batch, self._with_nulls):
                self._note(batch)
        self._seen += len(batch)
        return lines

    def _encoded(self, batch: Batch) -> bytes:
        try:
            lines = self._lines(list(starmap(self._row, batch)))
        except UnicodeEncodeError:
            return self._cleaned(batch)
        for index in self._decimals:
            if not _FINITE.issuperset(map(type, map(itemgetter(index), batch))):
                return self._cleaned(batch) if b"NaN" in lines or b"Infinity" in lines else lines
        return lines

    def _note(self, batch: Batch) -> None:
        """Count the numbers that JSON cannot represent; if strict, raise ValueError for the first."""
        for number, row in enumerate(batch, self._seen + 1):
            for name, value in zip(self._names, row, strict=True):
                if not _is_finite(value):
                    if self._strict:
                        raise ValueError(f"row {number} of column {name!r} holds {value}, which JSON cannot represent")
                    self.altered += 1

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Return the end record, which proves completeness: the number of rows, and a digest of them."""
        if digest is None:
            return b""
        return to_json({"@end": {"rows": rows, "sha256": digest, "altered": altered}}) + b"\n"

    def _cleaned(self, batch: Batch) -> bytes:
        return self._lines([self._row(*map(json_value, row)) for row in batch])


class JsonArray(JsonLines):
    """One array of the objects of JSON Lines, a line each, valid also without rows."""

    media_type = "application/json"
    extension = "json"

    def __init__(self, columns: Sequence[Column], *, strict: bool = False) -> None:
        super().__init__(columns, strict=strict)
        self._between = b""

    def begin(self) -> bytes:
        """Return the opening bracket."""
        return b"[\n"

    def rows(self, batch: Batch) -> bytes:
        """Return a line per row, without the last line end: it follows with the next row or the end."""
        if not batch:
            return b""
        # JSON escapes the line breaks of its strings: these are between the objects.
        lines = self._between + super().rows(batch)[:-1].replace(b"\n", b",\n")
        self._between = b",\n"
        return lines

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Return the closing bracket."""
        return b"\n]\n" if self._between else b"]\n"


def _count_nulls(batch: Batch, columns: Sequence[int]) -> int:
    return sum(list(map(itemgetter(index), batch)).count(None) for index in columns)


def _is_finite(value: Any) -> bool:
    """Return whether a value is anything but a NaN or an infinity, which JSON cannot represent."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, Decimal) or value.is_finite()
