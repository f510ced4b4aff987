"""An event as the bytes of an event stream (WHATWG HTML 9.2)."""

import json
import random
import re
from typing import Any

MEDIA_TYPE = "text/event-stream"

HEARTBEAT = b":\n"
"""A comment that keeps the connection alive. No empty line follows: some clients make an empty event of one."""

_LINE_END = re.compile(rb"\r\n|\r|\n")


def sse_event(data: Any, event: str = "", *, id: str = "", retry: int | None = None) -> bytes:  # noqa: A002
    """Return one event as bytes, its empty line included; `data` as `encode` has it, `event` is its name.

    Line breaks in the data cannot forge a field. Raises ValueError where one in id or event, or a NUL, would, and for
    data that is no JSON.
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
    """Return the data of an event as UTF-8: JSON on one line, but a str or bytes as they are.

    Raises ValueError for what JSON has no word for (NaN, a set).
    """
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        return data.encode()
    try:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can say but UTF-8 cannot
        return json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
    except TypeError as error:
        raise ValueError(str(error)) from None


def farewell(id: str) -> bytes:  # noqa: A002
    """The last event of a server that stops: clients wait unlike times, and do not come back all at once."""
    wait = random.randint(1000, 5000)  # noqa: S311 - spreads load, keeps no secret
    return sse_event({"reason": "The server stops."}, "stop", id=id, retry=wait)
