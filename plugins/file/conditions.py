"""Preconditions of a request: RFC 9110 section 13, as pure functions."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from typing import Literal

_ENTITY_TAG = re.compile(r'\s*(W/)?"([\x21\x23-\x7e\x80-\U0010ffff]*)"\s*(?:,|$)')


@dataclass(frozen=True, slots=True)
class Validators:
    """The values that distinguish one state of a representation from another."""

    etag: str
    """A strong entity-tag, including its quotes."""
    modified: int
    """Time of the last modification, in seconds since the epoch."""

    @property
    def headers(self) -> dict[str, str]:
        """The header fields that carry them."""
        return {"ETag": self.etag, "Last-Modified": formatdate(self.modified, usegmt=True)}


def precondition(method: str, headers: Mapping[str, str], validators: Validators) -> Literal[200, 304, 412]:
    """Evaluate a request's preconditions, in the order of RFC 9110 section 13.2.2, for a resource that exists.

    200: perform the request. An invalid date is ignored; an invalid entity-tag matches nothing.
    """
    if (if_match := headers.get("If-Match")) is not None:
        if not _matches(if_match, validators.etag, weakly=False):
            return 412
    elif (since := _date(headers.get("If-Unmodified-Since"))) is not None and validators.modified > since:
        return 412
    if (if_none_match := headers.get("If-None-Match")) is not None:
        if _matches(if_none_match, validators.etag, weakly=True):
            return 304 if method in ("GET", "HEAD") else 412
    elif (
        method in ("GET", "HEAD")
        and (since := _date(headers.get("If-Modified-Since"))) is not None
        and validators.modified <= since
    ):
        return 304
    return 200


def range_applies(headers: Mapping[str, str], validators: Validators) -> bool:
    """Return whether If-Range, if present, lets Range apply: the same strong entity-tag, or exactly the same date.

    Source: RFC 9110 section 13.1.5.
    """
    condition = headers.get("If-Range")
    if condition is None:
        return True
    if '"' in condition:
        return condition.strip() == validators.etag
    return _date(condition) == validators.modified


def _matches(field: str, etag: str, *, weakly: bool) -> bool:
    if field.strip() == "*":
        return True
    return any(f'"{opaque}"' == etag for weak, opaque in _entity_tags(field) if weakly or not weak)


def _entity_tags(field: str) -> Iterator[tuple[bool, str]]:
    position = 0
    while match := _ENTITY_TAG.match(field, position):
        yield bool(match[1]), match[2]
        position = match.end()


def _date(field: str | None) -> int | None:
    if field is None or not field.isascii():  # the parser accepts the digits of every script
        return None
    try:
        return int(parsedate_to_datetime(field).timestamp())
    except (ValueError, OverflowError):
        return None
