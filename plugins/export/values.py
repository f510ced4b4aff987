"""Values of cells as text and as JSON, shared by the formats."""

import base64
import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import msgspec


def encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: each lone surrogate becomes "?"."""
    return text.encode("utf-8", "replace").decode()


def _base64(value: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(value).decode("ascii")


def _float(value: float) -> str:
    """Return the shortest text that reads back as the same number.

    NaN and Infinity are written as PostgreSQL's COPY writes them; it and pandas read them back.
    """
    if math.isfinite(value):
        return float.__repr__(value)
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _boolean(value: bool) -> str:
    return "true" if value else "false"


_json: Final = msgspec.json.Encoder(decimal_format="number", enc_hook=str).encode

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
"""Writers of the values that CSV neither quotes nor guards, by type; a subclass uses the first that matches."""


def plain_writer(kind: type) -> Callable[[Any], str] | None:
    """Return the writer in `_PLAIN` for a type, None if there is none; asyncpg's UUID is a subclass of UUID."""
    return _PLAIN.get(kind) or next((write for known, write in _PLAIN.items() if issubclass(kind, known)), None)


def to_text(value: Any) -> str:
    """Return a value as text: arrays and objects as JSON, values of unknown types as their `str`."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if write := plain_writer(type(value)):
        return write(value)
    if isinstance(value, list | tuple | dict):
        return to_json(value).decode()
    return str(value)


def json_value(value: Any) -> Any:
    """Return a value that JSON can hold: without lone surrogates, and with None for decimals that are not finite."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Decimal):
        return value if value.is_finite() else None
    if isinstance(value, dict):
        return {json_value(key): json_value(member) for key, member in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return list(map(json_value, value))
    if value is None or plain_writer(type(value)) or isinstance(value, timedelta | msgspec.Raw):
        return value
    return encodable(str(value))


def to_json(value: Any) -> bytes:
    """Return any value as valid JSON."""
    return _json(json_value(value))
