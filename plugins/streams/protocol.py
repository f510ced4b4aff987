"""The words of the protocol: header fields, offsets and cursors, and what a request asks for with them."""

import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import unquote, urlsplit

from aiohttp import web

from streamlab import ORIGIN, Position, Problem

NEXT_OFFSET = "Stream-Next-Offset"
UP_TO_DATE = "Stream-Up-To-Date"
CLOSED = "Stream-Closed"
CURSOR = "Stream-Cursor"
SEQ = "Stream-Seq"
TTL = "Stream-TTL"
EXPIRES_AT = "Stream-Expires-At"
FORKED_FROM = "Stream-Forked-From"
FORK_OFFSET = "Stream-Fork-Offset"
FORK_SUB_OFFSET = "Stream-Fork-Sub-Offset"
SSE_ENCODING = "Stream-SSE-Data-Encoding"
PRODUCER_ID = "Producer-Id"
PRODUCER_EPOCH = "Producer-Epoch"
PRODUCER_SEQ = "Producer-Seq"
EXPECTED_SEQ = "Producer-Expected-Seq"
RECEIVED_SEQ = "Producer-Received-Seq"

DEFAULT_TYPE = "application/octet-stream"

START = "-1"
"""The offset before the first byte."""

NOW = "now"
"""The offset after the last byte, wherever that is."""

MAX_NUMBER = 2**53 - 1
"""Maximum of an epoch, a sequence number and a sub-offset: what JavaScript represents exactly."""

MAX_TTL = 100 * 366 * 86_400
"""Maximum time to live, in seconds."""

MAX_TEXT = 256
"""Maximum length of an id of a producer, and of a `Stream-Seq`, in characters."""

CURSORS_SINCE = 1_728_432_000
"""Unix time at which cursors began to count, 2024-10-09, in seconds."""

CURSOR_SECONDS = 20
"""Time for which requests have the same cursor, so that a cache can collapse them, in seconds."""

CURSOR_JITTER = 180
"""Maximum number by which a cursor that a client has already is exceeded: an hour."""

_OFFSET = re.compile(r"([0-9]{16})_([0-9]{16})")

_NUMBER = re.compile(r"0|[1-9][0-9]{0,15}")

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.IGNORECASE | re.ASCII)


def format_offset(position: Position) -> str:
    """Return a position as an offset: of fixed width, so that texts are in the order of positions."""
    return f"{position.epoch:016}_{position.offset:016}"


def parse_offset(text: str, what: str = "offset") -> Position:
    """Return the position of an offset; raises Problem 400 for a text that is none."""
    if text == START:
        return ORIGIN
    if (match := _OFFSET.fullmatch(text)) is None:
        raise Problem(400, f"{what}: must be the {NEXT_OFFSET} of a response, -1 for the start, or now for the end.")
    return Position(int(match[1]), int(match[2]))


def next_cursor(given: str) -> str:
    """Return the cursor of a response: that of the time, but greater than the one that the client has."""
    cursor = int(time.time() - CURSORS_SINCE) // CURSOR_SECONDS
    if given.isascii() and given.isdigit() and len(given) < 16 and int(given) >= cursor:
        cursor = int(given) + random.randint(1, CURSOR_JITTER)  # noqa: S311 - spreads load, is not a secret
    return str(cursor)


def media_type(content_type: str) -> str:
    """Return a content type without parameters, in lower case: what two of them are compared by."""
    return content_type.partition(";")[0].strip().lower()


def is_closing(request: web.Request) -> bool:
    """Return whether a request closes its stream."""
    return request.headers.get(CLOSED, "").strip().lower() == "true"


# -- creating


@dataclass(frozen=True, slots=True)
class ForkRequest:
    """Where a stream is to begin as a copy of another."""

    source: str
    """Path of the other stream."""
    offset: str
    """Offset up to which it is copied; "" for its end."""
    sub_offset: int
    """How much of the message after that offset is copied: bytes, or values of a JSON stream."""


@dataclass(frozen=True, slots=True)
class Creation:
    """What a PUT asks for."""

    content_type: str
    """"" where the request has none."""
    ttl: int | None
    """Time to live without reads and writes, in seconds."""
    expires_at: str
    """RFC 3339; "" for never."""
    closed: bool
    fork: ForkRequest | None


def read_creation(request: web.Request, prefix: str) -> Creation:
    """Return what a PUT asks for; `prefix` precedes the paths of streams. Raises Problem 400 for invalid fields."""
    headers = request.headers
    ttl, expires_at = headers.get(TTL), headers.get(EXPIRES_AT, "")
    if ttl is not None and expires_at:
        raise Problem(400, f"{TTL} and {EXPIRES_AT} exclude each other.")
    if expires_at:
        unix_time(expires_at)
    return Creation(
        content_type=headers.get("Content-Type", "").strip(),
        ttl=None if ttl is None else _number(TTL, ttl, MAX_TTL),
        expires_at=expires_at,
        closed=is_closing(request),
        fork=_read_fork(headers, prefix),
    )


def unix_time(text: str) -> float:
    """Return the Unix time of an RFC 3339 time, in seconds; raises Problem 400 for another text."""
    try:
        if _TIME.fullmatch(text):
            return datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError):
        pass
    raise Problem(400, f"{EXPIRES_AT}: must be a time of RFC 3339, as 2027-01-31T12:00:00Z.")


def _read_fork(headers: Mapping[str, str], prefix: str) -> ForkRequest | None:
    source, sub_offset = headers.get(FORKED_FROM), headers.get(FORK_SUB_OFFSET, "0")
    if source is None:
        for name in (FORK_OFFSET, FORK_SUB_OFFSET):
            if name in headers:
                raise Problem(400, f"{name} needs {FORKED_FROM}.")
        return None
    path = unquote(urlsplit(source).path)
    if not path.startswith(prefix) or path == prefix:
        raise Problem(400, f"{FORKED_FROM}: must be the path of a stream, below {prefix}.")
    offset = headers.get(FORK_OFFSET, "")
    if offset:
        parse_offset(offset, FORK_OFFSET)
    return ForkRequest(path.removeprefix(prefix), offset, _number(FORK_SUB_OFFSET, sub_offset))


# -- appending


@dataclass(frozen=True, slots=True)
class Producer:
    """The producer of an append, and which of its appends it is."""

    id: str
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class AppendRequest:
    """What a POST asks for."""

    body: bytes
    content_type: str
    seq: str
    """"" where the request has none."""
    producer: Producer | None
    closes: bool


def read_append(request: web.Request, body: bytes) -> AppendRequest:
    """Return what a POST asks for; raises Problem 400 for invalid fields."""
    closes = is_closing(request)
    content_type = request.headers.get("Content-Type", "").strip()
    if not body and not closes:
        raise Problem(400, f"The body is empty; only with {CLOSED}: true it may be.")
    if body and not content_type:
        raise Problem(400, "Content-Type is missing; it must be that of the stream.")
    seq = request.headers.get(SEQ, "")
    if SEQ in request.headers:
        _check_text(SEQ, seq)
    return AppendRequest(body, content_type, seq, _read_producer(request.headers), closes)


def _read_producer(headers: Mapping[str, str]) -> Producer | None:
    given = [headers.get(name) for name in (PRODUCER_ID, PRODUCER_EPOCH, PRODUCER_SEQ)]
    if given == [None, None, None]:
        return None
    id, epoch, seq = given  # noqa: A001
    if id is None or epoch is None or seq is None:
        raise Problem(400, f"{PRODUCER_ID}, {PRODUCER_EPOCH} and {PRODUCER_SEQ} must be given together.")
    _check_text(PRODUCER_ID, id)
    return Producer(id, _number(PRODUCER_EPOCH, epoch), _number(PRODUCER_SEQ, seq))


def _check_text(name: str, text: str) -> None:
    if not (0 < len(text) <= MAX_TEXT and text.isascii() and text.isprintable()):
        raise Problem(400, f"{name}: must have 1 to {MAX_TEXT} printable characters of ASCII.")


def _number(name: str, text: str, maximum: int = MAX_NUMBER) -> int:
    if not _NUMBER.fullmatch(text) or int(text) > maximum:
        raise Problem(400, f"{name}: must be an integer from 0 to {maximum}, without sign or leading zeros.")
    return int(text)
