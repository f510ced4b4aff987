"""What the bytes of a stream are, by its media type: how a message is stored, read, sent as an event, and cut."""

import base64
from collections.abc import Sequence
from typing import Protocol

import msgspec

from .protocol import media_type


class InvalidContent(ValueError):
    """What a client sent is not of the media type of the stream; the message is for it."""


class Content(Protocol):
    """A kind of content. A message is what one request appends."""

    sse_encoding: str
    """How the data of events is encoded; "" if not at all."""

    member: str
    """The member with the data, in events of several streams."""

    def message(self, body: bytes) -> bytes:
        """Return the message of a body, as it is stored; b"" if there is nothing in it. Raises InvalidContent."""

    def join(self, messages: Sequence[bytes]) -> bytes:
        """Return the body of a response that has some messages."""

    def event_data(self, messages: Sequence[bytes]) -> bytes:
        """Return the data of an event that has some messages."""

    def prefix(self, message: bytes, count: int) -> bytes | None:
        """Return the first bytes, or values, of a message; None if it does not have so many."""


class JsonContent:
    """JSON values: one level of arrays is flattened, and a message is stored as its values between commas."""

    sse_encoding = ""
    member = "messages"

    def message(self, body: bytes) -> bytes:
        """Return the values of a body."""
        try:
            body.decode()  # msgspec checks only the form of what it does not convert
            if body.lstrip(b" \t\r\n").startswith(b"["):
                return b",".join(map(bytes, msgspec.json.decode(body, type=list[msgspec.Raw])))
            return bytes(msgspec.json.decode(body, type=msgspec.Raw))
        except (ValueError, RecursionError) as error:
            raise InvalidContent(f"The body is not JSON: {error}.") from None

    def join(self, messages: Sequence[bytes]) -> bytes:
        """Return an array of all values."""
        return b"[%b]" % b",".join(messages)

    event_data = join

    def prefix(self, message: bytes, count: int) -> bytes | None:
        """Return the first values."""
        values = msgspec.json.decode(b"[%b]" % message, type=list[msgspec.Raw])
        return b",".join(map(bytes, values[:count])) if count <= len(values) else None


class ByteContent:
    """Bytes; in events as text, or in base64 where they need not be text."""

    def __init__(self, sse_encoding: str) -> None:
        self.sse_encoding = sse_encoding
        self.member = sse_encoding or "text"

    def message(self, body: bytes) -> bytes:
        """Return the body."""
        return body

    def join(self, messages: Sequence[bytes]) -> bytes:
        """Return the bytes of all messages."""
        return b"".join(messages)

    def event_data(self, messages: Sequence[bytes]) -> bytes:
        """Return them as text; bytes that are not UTF-8 are replaced in it."""
        joined = b"".join(messages)
        return base64.b64encode(joined) if self.sse_encoding else joined.decode(errors="replace").encode()

    def prefix(self, message: bytes, count: int) -> bytes | None:
        """Return the first bytes."""
        return message[:count] if count <= len(message) else None


_JSON, _TEXT, _BINARY = JsonContent(), ByteContent(""), ByteContent("base64")


def content_of(content_type: str) -> Content:
    """Return the kind of content that a content type names."""
    media = media_type(content_type)
    if media == "application/json":
        return _JSON
    return _TEXT if media.startswith("text/") else _BINARY
