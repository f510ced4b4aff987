"""The Arrow IPC stream (https://arrow.apache.org/docs/format/Columnar.html) and Parquet (https://parquet.apache.org)."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import NoneType
from typing import Any, Final
from uuid import UUID

from .encoder import Batch, Column, MissingLibrary
from .values import encodable, to_json, to_text


class _Sink:
    """A file for pyarrow whose bytes are drained as they come."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: Any) -> int:
        part = bytes(data)  # pyarrow reuses its memory
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
    return value if isinstance(value, str) else to_json(value).decode()


@dataclass(frozen=True, slots=True)
class _Fit:
    """The values allowed in a column of a type, and their conversion for pyarrow."""

    arrow: str
    allowed: tuple[type, ...]
    rejected: tuple[type, ...] = ()
    convert: Callable[[Any], Any] | None = None

    def accepts(self, kind: type) -> bool:
        return issubclass(kind, self.allowed) and not issubclass(kind, self.rejected)


_FITS: Final[Mapping[str, _Fit]] = {
    "integer": _Fit("int64", (int,), (bool,)),
    "real": _Fit("float64", (float, int), (bool,)),
    "text": _Fit("string", (str,)),
    "blob": _Fit("binary", (bytes, bytearray, memoryview)),
    "boolean": _Fit("bool_", (bool,)),
    "decimal": _Fit("string", (Decimal, int, float), (bool,), to_text),
    "date": _Fit("date32", (date,), (datetime,)),
    "time": _Fit("time64", (time,)),
    "timestamp": _Fit("timestamp", (datetime,)),
    "timestamptz": _Fit("timestamp", (datetime,)),
    "interval": _Fit("duration", (timedelta,)),
    "uuid": _Fit("string", (UUID,), (), str),
    "json": _Fit("string", (object,), (), _json_text),
    "any": _Fit("string", (object,), (), to_text),
}


def unavailable(form: type[Any]) -> str:
    """Return the reason, for clients, why a format is not available on this server; empty if it is available."""
    if not issubclass(form, Arrow) or importlib.util.find_spec("pyarrow") is not None:
        return ""
    return f"{form.__name__} needs pyarrow, which is not installed: pip install 'streamlab[arrow]'"


class Arrow:
    """The Arrow IPC stream: the schema first, then a record batch for each batch.

    A value that does not fit its column's type raises ValueError: nothing is rounded, cut or guessed. Times are in
    microseconds; `timestamp` rejects a value with a zone, `timestamptz` is UTC and rejects a value without one. A
    decimal is text, since its column has no maximum number of digits; so are uuid, json (JSON text) and any (as in CSV,
    without the guard).
    """

    media_type = "application/vnd.apache.arrow.stream"
    extension = "arrows"
    altered = 0

    def __init__(self, columns: Sequence[Column]) -> None:
        if reason := unavailable(type(self)):
            raise MissingLibrary(reason)
        import pyarrow

        self._pyarrow: Any = pyarrow
        self._columns = columns
        self._schema = pyarrow.schema([(column.name, self._type(column)) for column in columns])
        self._sink = _Sink()
        self._seen = 0

    def begin(self) -> bytes:
        """Return the schema."""
        self._writer = self._pyarrow.ipc.new_stream(self._sink, self._schema)
        return self._sink.drain()

    def rows(self, batch: Batch) -> bytes:
        """Return a record batch."""
        if batch:
            self._writer.write_batch(self._record_batch(batch))
        return self._sink.drain()

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Return the end-of-stream marker."""
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
            # SQLite's booleans are integers.
            values = [value == 1 if type(value) is int and value in (0, 1) else value for value in values]
        if not all(found is NoneType or fit.accepts(found) for found in set(map(type, values))):
            self._reject(column, values, lambda value: fit.accepts(type(value)))
        if column.type in {"time", "timestamp", "timestamptz"}:
            zoned = column.type == "timestamptz"
            if any(value is not None and (value.tzinfo is not None) != zoned for value in values):
                self._reject(column, values, lambda value: (value.tzinfo is not None) == zoned)
        if fit.convert:
            values = [None if value is None else fit.convert(value) for value in values]
        try:
            return self._pyarrow.array(values, kind)
        except UnicodeEncodeError:
            return self._pyarrow.array([None if value is None else encodable(value) for value in values], kind)
        except (self._pyarrow.ArrowException, OverflowError):
            self._reject(column, values, lambda value: self._holds(kind, value))
            raise

    def _holds(self, kind: Any, value: Any) -> bool:
        try:
            self._pyarrow.array([value], kind)
        except (self._pyarrow.ArrowException, OverflowError):
            return False
        return True

    def _reject(self, column: Column, values: Sequence[Any], fits: Callable[[Any], bool]) -> None:
        """Raise ValueError for the first value that does not fit."""
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

    The rows of a row group are collected, as Arrow, and written together: small row groups are slow to read.
    """

    media_type = "application/vnd.apache.parquet"
    extension = "parquet"

    GROUP_ROWS = 65536
    """Number of rows that completes a row group."""
    GROUP_BYTES = 16 << 20
    """Size in memory that completes a row group, in bytes."""

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__(columns)
        self._waiting: list[Any] = []
        self._waiting_rows = self._waiting_bytes = 0

    def begin(self) -> bytes:
        """Return the magic number."""
        from pyarrow.parquet import ParquetWriter

        self._writer = ParquetWriter(self._sink, self._schema, compression="zstd")
        return self._sink.drain()

    def rows(self, batch: Batch) -> bytes:
        """Return a row group once it has enough rows, else nothing."""
        if batch:
            records = self._record_batch(batch)
            self._waiting.append(records)
            self._waiting_rows += len(batch)
            self._waiting_bytes += records.nbytes
            if self._waiting_rows >= self.GROUP_ROWS or self._waiting_bytes >= self.GROUP_BYTES:
                self._flush()
        return self._sink.drain()

    def end(self, rows: int, digest: str | None, altered: int = 0) -> bytes:
        """Return the last row group, and the footer with the positions of all."""
        if self._waiting:
            self._flush()
        return super().end(rows, digest, altered)

    def _flush(self) -> None:
        table = self._pyarrow.Table.from_batches(self._waiting, self._schema)
        self._writer.write_table(table, row_group_size=max(self._waiting_rows, 1))
        self._waiting = []
        self._waiting_rows = self._waiting_bytes = 0
