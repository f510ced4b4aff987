"""An event as the bytes of an event stream (WHATWG HTML 9.2)."""

import json
import random
import re
from typing import Any

MEDIA_TYPE = "text/event-stream"

HEARTBEAT = b":\n"
"""A comment that keeps the connection alive, without an empty line, of which some clients make an empty event."""

_LINE_END = re.compile(rb"\r\n|\r|\n")


def sse_event(data: Any, event: str = "", *, id: str = "", retry: int | None = None) -> bytes:  # noqa: A002
    """Return one event as bytes, its empty line included; `data` is encoded by `encode`, `event` is its name.

    Line breaks in the data cannot forge a field. Raises ValueError for a line break or NUL in id or event, and for
    data that is not JSON.
    """
    data = encode(data)
    for name, value in (("id", id), ("event", event)):
        if "\n" in value or "\r" in value or "\0" in value:
            raise ValueError(f"{name} of an event holds a line break or NUL: {value!r}")
    head = f"id: {id}\n" if id else ""
    if event:
        head += f"event: {event}\n"
    if retry is not None:
        head += f"retry: {retry}\n"
    if b"\n" in data or b"\r" in data:
        data = b"\ndata: ".join(_LINE_END.split(data))
    return b"%bdata: %b\n\n" % (head.encode(), data)


def encode(data: Any) -> bytes:
    """Return the data of an event as UTF-8: JSON on one line, but a str or bytes unchanged.

    Raises ValueError for what JSON cannot represent (NaN, a set).
    """
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        return data.encode()
    try:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape but UTF-8 cannot encode
        return json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
    except TypeError as error:
        raise ValueError(str(error)) from None


def farewell(id: str) -> bytes:  # noqa: A002
    """Return the last event of a server that stops, with a random `retry`: clients do not reconnect all at once."""
    wait = random.randint(1000, 5000)  # noqa: S311 - spreads load, is not a secret
    return sse_event({"reason": "The server stops."}, "stop", id=id, retry=wait)
