"""HTTP/1.x as bytes on a socket: requests, and responses with the time of each chunk."""

import asyncio
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

Ending = Literal["complete", "closed", "cut"]
"""How a body ended: complete by its framing; by the end of the connection, the only framing of HTTP/1.0; or before its
length or its last chunk (RFC 9112, section 8)."""

HEAD_SECONDS = 20.0
"""Maximum time for the headers of a response, in seconds."""

_HEAD_BYTES = 64 * 1024


class NotHTTP(Exception):
    """What arrived is not a response of HTTP/1.x (RFC 9112); the message says what arrived."""


@dataclass
class StreamedResponse:
    """A response as it arrives: its head, then its body chunk by chunk."""

    status: int
    reason: str
    version: str
    fields: list[tuple[str, str]]
    """The header fields in their order, names in lower case."""
    sent_at: float
    """When the request was sent, by `time.monotonic`."""
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    has_body: bool
    body: bytearray = field(default_factory=bytearray)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """For each read of the body: the seconds since the request, and the number of bytes."""
    ending: Ending | None = None
    """None while the body may continue."""
    ended_after: float = 0.0
    """The seconds from the request to the end of the body."""
    head_after: float = 0.0
    """The seconds from the request to the end of the headers."""
    _left: int = 0
    """Remaining bytes of the current chunk."""
    _chunks: int = 0
    _in_trailers: bool = False

    def get(self, name: str) -> str | None:
        """Return a header field's value, several joined by commas; None where there is none."""
        values = [value for field, value in self.fields if field == name.lower()]
        return ", ".join(values) if values else None

    @property
    def media(self) -> str:
        """The media type, without its parameters."""
        return (self.get("content-type") or "").partition(";")[0].strip().lower()

    @property
    def line(self) -> str:
        """The status line, for reports."""
        return f"{self.version} {self.status} {self.reason}".rstrip()

    @property
    def size(self) -> int:
        """The number of bytes of the body that have arrived."""
        return sum(length for _, length in self.arrivals)

    @property
    def is_chunked(self) -> bool:
        """Whether the body has chunked framing."""
        return "chunked" in (self.get("transfer-encoding") or "").lower()

    @property
    def first_after(self) -> float | None:
        """The seconds from the request to the first byte of the body."""
        return self.arrivals[0][0] if self.arrivals else None

    async def read_chunk(self) -> bytes:
        """Return the next bytes of the body; empty at its end. May be cancelled, and called again."""
        if self.ending is not None:
            return b""
        try:
            found = await self._receive()
        except (asyncio.IncompleteReadError, ConnectionError):
            return self._end("cut")
        if found:
            self.arrivals.append((time.monotonic() - self.sent_at, len(found)))
            self.body += found
        return found

    async def _receive(self) -> bytes:
        if not self.has_body:
            return self._end("complete")
        if self.is_chunked:
            return await self._read_chunked()
        length = self.get("content-length")
        left = (1 << 16) if length is None else int(length) - self.size
        if not left:
            return self._end("complete")
        found = await self.reader.read(min(left, 1 << 16))
        return found or self._end("closed" if length is None else "cut")

    async def _read_chunked(self) -> bytes:
        while not self._left:
            line = (await self.reader.readuntil(b"\r\n"))[:-2]
            if self._in_trailers:
                if not line:
                    return self._end("complete")
            elif line or not self._chunks:  # an empty line ends the chunk before
                size = line.partition(b";")[0].strip()
                if not re.fullmatch(rb"[0-9A-Fa-f]{1,16}", size):
                    raise NotHTTP(f"the chunk size {line[:80]!r}")
                self._left, self._chunks = int(size, 16), self._chunks + 1
                self._in_trailers = not self._left
        found = await self.reader.read(min(self._left, 1 << 16))
        self._left -= len(found)
        return found or self._end("cut")

    def _end(self, how: Ending) -> bytes:
        self.ending, self.ended_after = how, time.monotonic() - self.sent_at
        return b""

    async def read(self, *, seconds: float, max_bytes: int = 1 << 20) -> bytes:
        """Read until the body ends, or for `seconds`, or `max_bytes` bytes; return what has arrived."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(self.body) < max_bytes and await self.read_chunk():
                    pass
        return bytes(self.body)

    async def wait_for_first_byte(self, *, seconds: float) -> bool:
        """Wait for the first byte of the body; return whether it arrived."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.read_chunk()
        return bool(self.body)

    def disconnect(self, *, reset: bool = False) -> None:
        """Close the connection, with a reset instead of an orderly end if `reset`."""
        connection = self.writer.get_extra_info("socket")
        if reset and connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()
        else:
            self.writer.close()


def request(
    method: str,
    target: str,
    *,
    host: str,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    version: str = "1.1",
) -> bytes:
    """Return the bytes of a request (RFC 9112, section 3)."""
    lines = [f"{method} {target} HTTP/{version}", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


@asynccontextmanager
async def send(port: int, message: bytes) -> AsyncIterator[StreamedResponse]:
    """Send a request on a new connection, and yield the response when its head is read; then close the connection.

    Raises NotHTTP if no response arrives, or one that is not HTTP.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield await send_on(reader, writer, message)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def send_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes) -> StreamedResponse:
    """Send a request on an open connection, and return the response when its head is read."""
    started = time.monotonic()
    writer.write(message)
    try:
        async with asyncio.timeout(HEAD_SECONDS):
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
    except TimeoutError:
        raise NotHTTP(f"no headers within {HEAD_SECONDS:g} s") from None
    except asyncio.IncompleteReadError as error:
        raise NotHTTP(f"the connection ended after {error.partial[:80]!r}") from None
    except (ConnectionError, asyncio.LimitOverrunError) as error:
        raise NotHTTP(f"{type(error).__name__}: {error}") from None
    first, *lines = head.decode("latin-1").split("\r\n")
    found = re.fullmatch(r"(HTTP/1\.[01]) ([1-5]\d\d)(?: (.*))?", first)
    if found is None:
        raise NotHTTP(f"the status line {first[:80]!r}")
    fields = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(r"[\0\r\n]", value):
            raise NotHTTP(f"the header line {line[:80]!r}")
        fields.append((name.lower(), value.strip()))
    status = int(found[2])
    has_body = not message.startswith(b"HEAD ") and status >= 200 and status not in (204, 304)
    response = StreamedResponse(status, found[3] or "", found[1], fields, started, reader, writer, has_body)
    response.head_after = time.monotonic() - started
    return response


def stalled(port: int, message: bytes) -> socket.socket:
    """Send a request on a connection with the smallest receive buffer, and read nothing from it."""
    connection = socket.socket()
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(HEAD_SECONDS)
        connection.connect(("127.0.0.1", port))
        connection.sendall(message)
    except OSError:
        connection.close()
        raise
    return connection


# -- event streams


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a stream: its bytes, and its fields in their order (WHATWG HTML 9.2.6)."""

    raw: bytes
    fields: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str | None:
        """Return the last value of a field; of `data`, all lines joined by LF. None where the field is missing."""
        values = [value for field, value in self.fields if field == name]
        return None if not values else "\n".join(values) if name == "data" else values[-1]

    @property
    def id(self) -> str:
        """Its id; empty if it has none."""
        return self.get("id") or ""

    @property
    def event(self) -> str:
        """Its name, or `message`."""
        return self.get("event") or "message"

    def __str__(self) -> str:
        """Return its text on one line, shortened."""
        text = self.raw.decode(errors="replace").strip().replace("\n", " | ")
        return text if len(text) <= 160 else text[:157] + "..."


def events(body: bytes, errors: str = "strict") -> list[Event]:
    """Return the complete events of a body. Raises UnicodeDecodeError where it is not UTF-8, if `strict`."""
    found: list[Event] = []
    raw: list[bytes] = []
    fields: list[tuple[str, str]] = []
    for line in re.split(rb"(?<=\n)|(?<=\r)(?!\n)", body):
        content = line.rstrip(b"\r\n")
        if len(content) == len(line):
            break  # not complete yet
        if content.startswith(b":"):
            continue
        if content:
            name, _, value = content.decode(errors=errors).partition(":")
            fields.append((name, value.removeprefix(" ")))
            raw.append(line)
        elif fields:
            found.append(Event(b"".join([*raw, line]), tuple(fields)))
            raw, fields = [], []
    return found
