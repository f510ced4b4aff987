"""Rows of a result as the bytes of a format: CSV, JSON lines, JSON, Arrow or Parquet.

    csv      RFC 4180 (https://www.rfc-editor.org/rfc/rfc4180): CRLF, a header row, quotes only where they are needed
    jsonl    JSON Lines (https://jsonlines.org): an object a line
    json     one array of the same objects, a line each
    arrow    the Arrow IPC stream (https://arrow.apache.org/docs/format/Columnar.html), a record batch per call
    parquet  Apache Parquet (https://parquet.apache.org), row groups of some 64k rows

An encoder is made for one result and asked for its bytes in order: `begin`, `rows` for each batch, `end`. It waits for
nothing and keeps no more than a batch (Parquet: a row group), so it may run in any thread, in one at a time. What it
is given is what sqlite3 and asyncpg return, values whose types may differ from row to row included: that is what
SQLite's columns hold. A lone surrogate, for which UTF-8 has no bytes, becomes "?" in every format.
"""

import base64
import contextlib
import functools
import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import starmap
from operator import itemgetter
from types import NoneType
from typing import Any, Final, Literal, Protocol
from uuid import UUID

import msgspec

TYPES: Final = frozenset(
    {"integer", "real", "text", "blob", "boolean", "decimal", "date", "time", "timestamp", "timestamptz", "interval"}
    | {"uuid", "json", "any"}
)
"""What a column may be declared as. Only Arrow and Parquet hold the rows to it; `timestamptz` is with a zone."""

Batch = Sequence[Sequence[Any]]
"""Rows: tuples, or what else has as many values as there are columns."""


class MissingLibrary(RuntimeError):
    """A format needs a library that is not installed; the text says how to install it."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result: its name, and what it is declared to hold, one of `TYPES`."""

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
    """How many values so far the format could not hold and were written as something else."""

    def begin(self) -> bytes:
        """What stands before the first row."""

    def rows(self, batch: Batch) -> bytes:
        """The bytes of some rows; none, where they wait for a row group to fill."""

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Return what stands behind the last row. JSON Lines: the end record, if there is a digest to write into it.

        `altered` is how many values of the result do not come as they are in the database.
        """


def unique(names: Iterable[str]) -> list[str]:
    """Names without duplicates: a, a_2, a_3; an empty one is called "column". A given a_2 keeps its name."""
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


def make(
    format: str,  # noqa: A002
    columns: Sequence[Column],
    *,
    formula_guard: bool = True,
    header: bool = True,
    strict: bool = False,
) -> Encoder:
    """Return an encoder of one of `FORMATS`; guard and header are CSV's. Names are made unique, if they are not.

    A strict encoder raises ValueError for a value that it would have to alter, instead of counting it.

    Raises ValueError for an unknown format and MissingLibrary.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    names = unique(_encodable(column.name) for column in columns)
    columns = [Column(name, column.type) for name, column in zip(names, columns, strict=True)]
    return FORMATS[format](columns, formula_guard=formula_guard, header=header, strict=strict)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _base64(value: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(value).decode("ascii")


def _float(value: float) -> str:
    """The shortest text that reads back as the same number.

    NaN and Infinity are written as PostgreSQL's COPY writes them; it and pandas read them back.
    """
    if math.isfinite(value):
        return float.__repr__(value)
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _boolean(value: bool) -> str:
    return "true" if value else "false"


_json: Final = msgspec.json.Encoder(decimal_format="number", enc_hook=str).encode

# The texts of values that CSV neither quotes nor guards, in the order in which a subclass is looked for.
_PLAIN: Final[Mapping[type, Callable[[Any], str]]] = {
    bool: _boolean,
    int: int.__repr__,
    float: _float,
    Decimal: str,
    datetime: datetime.isoformat,
    date: date.isoformat,
    time: time.isoformat,
    UUID: str,
    bytes: _base64,
    bytearray: _base64,
    memoryview: _base64,
}


def _plain(kind: type) -> Callable[[Any], str] | None:
    """How values of a type are written, if as in `_PLAIN`; asyncpg's UUID is a subclass of UUID."""
    return _PLAIN.get(kind) or next((write for known, write in _PLAIN.items() if issubclass(kind, known)), None)


def _text(value: Any) -> str:
    """A value as text: arrays and objects as JSON, what is not known by its `str`."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if write := _plain(type(value)):
        return write(value)
    if isinstance(value, list | tuple | dict):
        return _lenient(value).decode()
    return str(value)


# Where a formula begins, in some spreadsheet. The characters are those of OWASP, and their wide and small variants:
# https://owasp.org/www-community/attacks/CSV_Injection. Before them may be what a spreadsheet may trim, drop or not
# show: white space, control characters, the Default_Ignorable_Code_Point of Unicode 16 (DerivedCoreProperties.txt), and
# a quote. A cell begins with a text, and behind a semicolon or a tab, where one of these separates: what it is in does
# not have its quotes then, since only at the start of a cell a quote is one.
FORMULA_MARKS: Final = "=+\\-@\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b"
IGNORED_RANGES: Final = (
    (0x01, 0x08), (0x0A, 0x20), (0x22, 0x22), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C),
    (0x115F, 0x1160), (0x1680, 0x1680), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2000, 0x200F), (0x2028, 0x202F),
    (0x205F, 0x206F), (0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
"""Code points that may be before a formula; 0, which PostgreSQL does not have, is one more."""

_IGNORED: Final = "\0" + "".join(f"{chr(first)}-{chr(last)}" for first, last in IGNORED_RANGES)
_FORMULA: Final = re.compile(f"(^|[;\t])(?=[{_IGNORED}]*[{FORMULA_MARKS}])")
_LEADING: Final = frozenset("\t\r\n")
"""What OWASP wants guarded at the start of a cell, whatever follows."""

_SUSPICIOUS: Final = frozenset(
    [chr(code) for first, last in ((0, 0), *IGNORED_RANGES) for code in range(first, last + 1)]
).union(FORMULA_MARKS, "\t") - {"\\"}
_WIDE_MARKS: Final = tuple(FORMULA_MARKS[5:])
_CLASSES: Final = bytes(
    ord("M" if chr(code) in "=+-@" else "B" if code > 0x7F or chr(code) in _SUSPICIOUS or chr(code) == ";" else "o")
    for code in range(256)
)
"""Bytes of UTF-8 as marks of formulas, as what may be before them, and as others."""


def _guarded(cell: str) -> str:
    """Put an apostrophe before whatever a spreadsheet would run as a formula."""
    cell = _FORMULA.sub(r"\1'", cell)
    return "'" + cell if cell[:1] in _LEADING else cell


# What makes a cell need quotes.
_MARKS: Final = ',"\r\n'


class Csv:
    """CSV as `csv.writer(lineterminator="\\r\\n")` writes the prepared cells, several times as fast.

    NULL is an empty cell, a blob base64, a boolean true or false, a float as in `_float`, a date or a time ISO 8601, an
    array or an object JSON, an interval its `str`. With the guard, a text that a spreadsheet would take for a formula
    gets an apostrophe before it, a name in the header too; numbers and the other plain values never do.

    A batch is written by columns. Their texts are joined and looked at once, as one string, for what must be quoted
    or guarded: most columns hold nothing of the kind and cost no work per cell. Numbers are formatted by msgspec where
    it writes what `repr` does.
    """

    media_type = "text/csv; charset=utf-8"
    extension = "csv"
    altered = 0

    def __init__(
        self, columns: Sequence[Column], *, formula_guard: bool = True, header: bool = True, strict: bool = False
    ) -> None:
        self._names = tuple(column.name for column in columns)
        self._guard = formula_guard
        self._header = header

    def begin(self) -> bytes:
        """The header row."""
        return self.rows([self._names]) if self._header else b""

    def rows(self, batch: Batch) -> bytes:
        """A line per row."""
        if not self._names:
            return b"\r\n" * len(batch)
        if not batch:
            return b""
        cells = [self._column(values) for values in zip(*batch, strict=True)]
        if len(cells) == 1:
            # An empty line would be no row; NULL and the empty text are written alike, as everywhere.
            lines: Iterable[str] = [cell or '""' for cell in cells[0]]
        else:
            lines = map(",".join, zip(*cells, strict=True))
        return ("\r\n".join(lines) + "\r\n").encode("utf-8", "replace")

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Nothing."""
        return b""

    def _column(self, values: tuple[Any, ...]) -> Sequence[str]:
        first = next((value for value in values if value is not None), None)
        if first is None:
            return [""] * len(values)
        kind = type(first)
        cells: Sequence[str] | None = None
        if kind is str:
            # str.join refuses all but texts: quicker than to ask each for its type.
            with contextlib.suppress(TypeError):
                return self._texts(values, "\0".join(values))
            with contextlib.suppress(TypeError):
                values = tuple(["" if value is None else value for value in values])
                return self._texts(values, "\0".join(values))
        elif kind is int or kind is float or kind is bool:
            cells = _numbers(values)
        elif (write := _plain(kind)) and {kind, NoneType}.issuperset(map(type, values)):
            cells = ["" if value is None else write(value) for value in values]
        return cells or [self._cell(value) for value in values]

    def _texts(self, cells: Sequence[str], joined: str) -> Sequence[str]:
        """A column of texts, also given as one, NUL between them; a NUL in a text costs time only."""
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
        text = _text(value)
        if not isinstance(value, str) and (value is None or _plain(type(value))):
            return text
        if self._guard and not isinstance(value, timedelta):
            text = _guarded(text)
        return _quoted(text) if any(mark in text for mark in _MARKS) else text


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


def _risky(joined: str) -> bool:
    """Return whether any of the texts joined by NUL may have to be guarded.

    Two passes in C, whatever the texts are: a byte is a mark, something that may be before one, or another.
    """
    classes = joined.encode("utf-8", "replace").translate(_CLASSES)
    if classes[:1] == b"M" or b"BM" in classes:
        return True
    if joined[:1] in _LEADING or any("\0" + mark in joined for mark in _LEADING):
        return True
    return not joined.isascii() and any(mark in joined for mark in _WIDE_MARKS)


def _numbers(values: tuple[Any, ...]) -> list[str] | None:
    """The cells of a column of numbers, booleans and NULL; None if that is not all there is."""
    try:
        text = _numbers_json(values).decode()
    except (TypeError, ValueError, RecursionError):
        return None
    if '"' in text or "{" in text or text.rfind("[") > 0:
        return None
    # Where repr writes an exponent, it is written differently, or not at all: 1e+16 and 1e-05 are 1e16 and 0.00001.
    if "0.0000" in text or ("e" in text and _EXPONENT.search(text)):
        return None
    if "null" in text:
        if text.count("null") != values.count(None):  # NaN and infinity are null too
            return None
        text = text.replace("null", "")
    return text[1:-1].split(",")


_numbers_json: Final = msgspec.json.Encoder().encode
_EXPONENT: Final = re.compile(r"e[-\d]")


def _cleaned(value: Any) -> Any:
    """A value that JSON can hold: without lone surrogates and without decimals that are no numbers."""
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, Decimal):
        return value if value.is_finite() else None
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(member) for key, member in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return list(map(_cleaned, value))
    if value is None or _plain(type(value)) or isinstance(value, timedelta | msgspec.Raw):
        return value
    return _encodable(str(value))


def _is_finite(value: Any) -> bool:
    """Return whether a value is not a number, or one that JSON has."""
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, Decimal) or value.is_finite()


def _lenient(value: Any) -> bytes:
    """Any value as valid JSON."""
    return _json(_cleaned(value))


_read_raw: Final = msgspec.json.Decoder(msgspec.Raw).decode
_LINE_BREAKS: Final = bytes.maketrans(b"\r\n", b"  ")
# What cannot be, or hold, a Decimal.
_FINITE: Final = frozenset({NoneType, str, int, float, bool, bytes, datetime, date, time, timedelta, UUID, msgspec.Raw})


def _embedded(value: Any) -> Any:
    """A JSON text as a part of the line; a text that is no JSON stays a text, or it could forge members and rows."""
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
    """A type to be made of the values of a row, which msgspec writes as an object with these names."""
    fields = {f"f{index}": name for index, name in enumerate(names)}
    try:
        return msgspec.defstruct("Row", [(field, Any) for field in fields], rename=fields, gc=False)
    except ValueError:  # a quote, a backslash or a control character
        return lambda *values: dict(zip(names, values, strict=True))


class JsonLines:
    """An object a line, its members in the order of the columns.

    A blob is base64, a Decimal a number with all its digits, an integer a number of any size; NaN and infinity are
    null, a date or a time is ISO 8601, an interval too ("P1D"). A text in a column of type json is a part of the
    object, its line breaks spaces; if it is no valid JSON it is a string. What is not known is written as its `str`.
    """

    media_type = "application/jsonl"
    extension = "jsonl"

    def __init__(
        self, columns: Sequence[Column], *, formula_guard: bool = True, header: bool = True, strict: bool = False
    ) -> None:
        self.altered = 0
        self._strict = strict
        self._seen = 0
        self._names = tuple(column.name for column in columns)
        self._row = _row_type(self._names)
        self._embedded = [index for index, column in enumerate(columns) if column.type == "json"]
        # msgspec writes a Decimal NaN as it is. To look for it in every line would take half as long as to write it.
        self._decimals = [index for index, column in enumerate(columns) if column.type in {"decimal", "json", "any"}]
        self._lines = msgspec.json.Encoder(decimal_format="number", enc_hook=str).encode_lines

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def rows(self, batch: Batch) -> bytes:
        """A line per row."""
        if self._embedded and batch:
            columns: list[Sequence[Any]] = list(zip(*batch, strict=True))
            for index in self._embedded:
                columns[index] = list(map(_embedded, columns[index]))
            batch = list(zip(*columns, strict=True))
        lines = self._encoded(batch)
        # Infinity is written as null. To look at each value would take half as long as to write it: so it is asked
        # first whether there is a null that no NULL accounts for.
        if b":null" in lines and lines.count(b":null") != sum(tuple(row).count(None) for row in batch):
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
        """Count the numbers that JSON does not have; raises ValueError for the first, if strict."""
        for number, row in enumerate(batch, self._seen + 1):
            for name, value in zip(self._names, row, strict=True):
                if not _is_finite(value):
                    if self._strict:
                        raise ValueError(f"row {number} of column {name!r} holds {value}, which JSON does not have")
                    self.altered += 1

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Return the end record, which shows that nothing is missing: the number of rows, and a digest of them."""
        if digest is None:
            return b""
        return _json({"@end": {"rows": rows, "sha256": digest, "altered": altered}}) + b"\n"

    def _cleaned(self, batch: Batch) -> bytes:
        return self._lines([self._row(*map(_cleaned, row)) for row in batch])


class JsonArray(JsonLines):
    """One array of the objects of JSON Lines, a line each, valid without rows too."""

    media_type = "application/json"
    extension = "json"

    def __init__(
        self, columns: Sequence[Column], *, formula_guard: bool = True, header: bool = True, strict: bool = False
    ) -> None:
        super().__init__(columns, strict=strict)
        self._between = b""

    def begin(self) -> bytes:
        """The bracket that opens."""
        return b"[\n"

    def rows(self, batch: Batch) -> bytes:
        """A line per row, without the last line end: it follows with the next row, or the end."""
        if not batch:
            return b""
        # JSON escapes the line breaks of its strings: these are between the objects.
        lines = self._between + super().rows(batch)[:-1].replace(b"\n", b",\n")
        self._between = b",\n"
        return lines

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """The bracket that closes."""
        return b"\n]\n" if self._between else b"]\n"


class _Sink:
    """A file for pyarrow whose bytes are taken away as they come."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: Any) -> int:
        part = bytes(data)  # pyarrow lends its own memory
        self._parts.append(part)
        self._size += len(part)
        return len(part)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def drain(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else _lenient(value).decode()


@dataclass(frozen=True, slots=True)
class _Fit:
    """What a column of a type may hold, and how it becomes what pyarrow is given."""

    arrow: str
    allowed: tuple[type, ...]
    refused: tuple[type, ...] = ()
    convert: Callable[[Any], Any] | None = None

    def accepts(self, kind: type) -> bool:
        return issubclass(kind, self.allowed) and not issubclass(kind, self.refused)


_FITS: Final[Mapping[str, _Fit]] = {
    "integer": _Fit("int64", (int,), (bool,)),
    "real": _Fit("float64", (float, int), (bool,)),
    "text": _Fit("string", (str,)),
    "blob": _Fit("binary", (bytes, bytearray, memoryview)),
    "boolean": _Fit("bool_", (bool,)),
    "decimal": _Fit("string", (Decimal, int, float), (bool,), _text),
    "date": _Fit("date32", (date,), (datetime,)),
    "time": _Fit("time64", (time,)),
    "timestamp": _Fit("timestamp", (datetime,)),
    "timestamptz": _Fit("timestamp", (datetime,)),
    "interval": _Fit("duration", (timedelta,)),
    "uuid": _Fit("string", (UUID,), (), str),
    "json": _Fit("string", (object,), (), _json_text),
    "any": _Fit("string", (object,), (), _text),
}


def missing(form: type[Any]) -> str:
    """Return why a format is not available on this server, in words for clients; empty if it is."""
    if not issubclass(form, Arrow) or importlib.util.find_spec("pyarrow") is not None:
        return ""
    return f"{form.__name__} needs pyarrow, which is not installed: pip install 'streamlab[arrow]'"


class Arrow:
    """The Arrow IPC stream: the schema first, then a record batch for each batch.

    A value that does not fit its column's type raises ValueError: nothing is rounded, cut off or guessed. Times count
    microseconds; `timestamp` has no zone and takes no value with one, `timestamptz` is UTC and takes no value without.
    A decimal is text, since its column does not say how many digits it may have; so are uuid, json (JSON text) and any
    (as in CSV, without the guard).
    """

    media_type = "application/vnd.apache.arrow.stream"
    extension = "arrows"
    altered = 0

    def __init__(
        self, columns: Sequence[Column], *, formula_guard: bool = True, header: bool = True, strict: bool = False
    ) -> None:
        if reason := missing(type(self)):
            raise MissingLibrary(reason)
        import pyarrow  # type: ignore[import-untyped]

        self._pyarrow: Any = pyarrow
        self._columns = columns
        self._schema = pyarrow.schema([(column.name, self._type(column)) for column in columns])
        self._sink = _Sink()
        self._seen = 0

    def begin(self) -> bytes:
        """The schema."""
        self._writer = self._pyarrow.ipc.new_stream(self._sink, self._schema)
        return self._sink.drain()

    def rows(self, batch: Batch) -> bytes:
        """A record batch."""
        if batch:
            self._writer.write_batch(self._record_batch(batch))
        return self._sink.drain()

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """The end-of-stream mark."""
        self._writer.close()
        return self._sink.drain()

    def _type(self, column: Column) -> Any:
        make_type = getattr(self._pyarrow, _FITS[column.type].arrow)
        match column.type:
            case "time" | "timestamp" | "interval":
                return make_type("us")
            case "timestamptz":
                return make_type("us", tz="UTC")
        return make_type()

    def _record_batch(self, batch: Batch) -> Any:
        arrays = [
            self._array(column, field.type, values)
            for column, field, values in zip(self._columns, self._schema, zip(*batch, strict=True), strict=True)
        ]
        self._seen += len(batch)
        return self._pyarrow.RecordBatch.from_arrays(arrays, schema=self._schema)

    def _array(self, column: Column, kind: Any, values: Sequence[Any]) -> Any:
        fit = _FITS[column.type]
        if column.type == "boolean" and not {bool, NoneType}.issuperset(map(type, values)):
            # SQLite has no other booleans.
            values = [value == 1 if type(value) is int and value in (0, 1) else value for value in values]
        if not all(found is NoneType or fit.accepts(found) for found in set(map(type, values))):
            self._refuse(column, values, lambda value: fit.accepts(type(value)))
        if column.type in {"time", "timestamp", "timestamptz"}:
            zoned = column.type == "timestamptz"
            if any(value is not None and (value.tzinfo is not None) != zoned for value in values):
                self._refuse(column, values, lambda value: (value.tzinfo is not None) == zoned)
        if fit.convert:
            values = [None if value is None else fit.convert(value) for value in values]
        try:
            return self._pyarrow.array(values, kind)
        except UnicodeEncodeError:
            return self._pyarrow.array([None if value is None else _encodable(value) for value in values], kind)
        except (self._pyarrow.ArrowException, OverflowError):
            self._refuse(column, values, lambda value: self._holds(kind, value))
            raise

    def _holds(self, kind: Any, value: Any) -> bool:
        try:
            self._pyarrow.array([value], kind)
        except (self._pyarrow.ArrowException, OverflowError):
            return False
        return True

    def _refuse(self, column: Column, values: Sequence[Any], fits: Callable[[Any], bool]) -> None:
        """Raise for the first value that does not fit."""
        for number, value in enumerate(values, self._seen + 1):
            if value is not None and not fits(value):
                what = type(value).__name__
                if hasattr(value, "tzinfo"):
                    what += " without a zone" if value.tzinfo is None else " with a zone"
                raise ValueError(
                    f"row {number} of column {column.name!r} holds a value of type {what} that does not fit its type "
                    f"{column.type}; csv, jsonl and json can hold it"
                )


class Parquet(Arrow):
    """Parquet, compressed with zstd; columns as in Arrow.

    The rows of a row group are collected, as Arrow, and written together: readers are slow with small ones.
    """

    media_type = "application/vnd.apache.parquet"
    extension = "parquet"

    GROUP_ROWS = 65536
    GROUP_BYTES = 16 << 20

    def __init__(
        self, columns: Sequence[Column], *, formula_guard: bool = True, header: bool = True, strict: bool = False
    ) -> None:
        super().__init__(columns)
        self._waiting: list[Any] = []
        self._waiting_rows = self._waiting_bytes = 0

    def begin(self) -> bytes:
        """The magic number."""
        from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

        self._writer = ParquetWriter(self._sink, self._schema, compression="zstd")
        return self._sink.drain()

    def rows(self, batch: Batch) -> bytes:
        """A row group, when enough rows have come, else nothing."""
        if batch:
            records = self._record_batch(batch)
            self._waiting.append(records)
            self._waiting_rows += len(batch)
            self._waiting_bytes += records.nbytes
            if self._waiting_rows >= self.GROUP_ROWS or self._waiting_bytes >= self.GROUP_BYTES:
                self._flush()
        return self._sink.drain()

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """The last row group, and the footer that says where all are."""
        if self._waiting:
            self._flush()
        return super().end(rows, digest, altered)

    def _flush(self) -> None:
        table = self._pyarrow.Table.from_batches(self._waiting, self._schema)
        self._writer.write_table(table, row_group_size=max(self._waiting_rows, 1))
        self._waiting = []
        self._waiting_rows = self._waiting_bytes = 0


Format = Literal["csv", "jsonl", "json", "arrow", "parquet"]

FORMATS: Final[Mapping[str, type[Csv | JsonLines | JsonArray | Arrow | Parquet]]] = {
    "csv": Csv,
    "jsonl": JsonLines,
    "json": JsonArray,
    "arrow": Arrow,
    "parquet": Parquet,
}
"""The formats by their names; each is made of columns, and takes CSV's options."""
