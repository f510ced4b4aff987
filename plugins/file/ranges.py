"""The bytes that a Range requests, and their framing: RFC 9110 section 14, as pure functions."""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAX_RANGES = 64
"""Maximum number of parts, after joining adjacent ranges; beyond, the whole representation is sent."""

PART_OVERHEAD = 80
"""Minimum size of a part's header, in bytes; ranges with a smaller gap between them are joined."""

_SPEC = re.compile(r"([0-9]+)-([0-9]*)|-([0-9]+)")
r"""A range-spec. `\d` would match the digits of every script; DIGIT of RFC 9110 is ASCII (RFC 5234, appendix B.1)."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes: the offset of the first, and their number."""

    offset: int
    count: int

    def content_range(self, size: int) -> str:
        """Return the value of Content-Range for this part of `size` bytes."""
        return f"bytes {self.offset}-{self.offset + self.count - 1}/{size}"


class Unsatisfiable(Exception):
    """A valid Range of which no byte exists: 416."""


def parse(field: str | None, size: int) -> list[Span] | None:
    """Read a Range for a representation of `size` bytes; None means the whole.

    An unknown unit, a malformed field and a set of too many parts are ignored, as section 14.2 allows. Ranges that
    overlap or nearly touch are joined, so that no response is much larger than the file. Raises Unsatisfiable. Takes
    time linear in the field's length, except for one sort.
    """
    if field is None:
        return None
    unit, equals, text = field.partition("=")
    if unit.strip().lower() != "bytes" or not equals:
        return None
    spans: list[Span] = []
    specs = [spec.strip() for spec in text.split(",")]
    for spec in filter(None, specs):
        match = _SPEC.fullmatch(spec)
        if match is None or any(len(digits or "") > 20 for digits in match.groups()):
            return None
        first, last, suffix = match.groups()
        if suffix is not None:
            count = min(int(suffix), size)
            if size == 0 and int(suffix) > 0:
                return None  # satisfiable, yet no Content-Range can express it
            offset = size - count
        else:
            offset = int(first)
            if last and int(last) < offset:
                return None
            count = min(int(last) + 1 if last else size, size) - offset
        if count > 0:
            spans.append(Span(offset, count))
    if not any(specs):
        return None
    if not spans:
        raise Unsatisfiable
    spans = _joined(spans)
    return spans if len(spans) <= MAX_RANGES else None


def _joined(spans: list[Span]) -> list[Span]:
    """Join spans that overlap or nearly touch; if none do, return them in the requested order."""
    ordered = sorted(spans, key=lambda span: span.offset)
    joined = [ordered[0]]
    for span in ordered[1:]:
        last = joined[-1]
        if span.offset <= last.offset + last.count + PART_OVERHEAD:
            end = max(last.offset + last.count, span.offset + span.count)
            joined[-1] = Span(last.offset, end - last.offset)
        else:
            joined.append(span)
    return spans if len(joined) == len(spans) else joined


@dataclass(frozen=True, slots=True)
class Framing:
    """How a response carries the requested spans: its status, additional headers, and the parts of its body."""

    status: int
    content_type: str
    headers: Mapping[str, str]
    parts: Sequence[tuple[bytes, Span]]
    """Each span, with the bytes before it."""
    closing: bytes
    """The bytes after the last span."""

    @property
    def length(self) -> int:
        """Size of the whole body, in bytes."""
        return sum(len(head) + span.count for head, span in self.parts) + len(self.closing)


def frame(spans: Sequence[Span] | None, *, size: int, media_type: str) -> Framing:
    """Frame the whole (None), one span with Content-Range, or several as multipart/byteranges (section 14.6)."""
    if spans is None:
        return Framing(200, media_type, {}, [(b"", Span(0, size))], b"")
    if len(spans) == 1:
        return Framing(206, media_type, {"Content-Range": spans[0].content_range(size)}, [(b"", spans[0])], b"")
    boundary = secrets.token_hex(16)
    head = f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: "
    parts = [(f"{head}{span.content_range(size)}\r\n\r\n".encode(), span) for span in spans]
    return Framing(206, f"multipart/byteranges; boundary={boundary}", {}, parts, f"\r\n--{boundary}--\r\n".encode())
