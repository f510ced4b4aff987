"""Connections to clients, and chunks that are written to many of them."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import web

HIGH_WATER = 64 * 1024
"""Maximum bytes that wait in this process for a client before `push` skips it."""


class Chunk:
    """Bytes framed once and pushed to many streams: plain, and as one chunk (RFC 9112 section 7.1)."""

    __slots__ = ("body", "framed")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.framed = b"%x\r\n%b\r\n" % (len(body), body)


class FanoutWriter:
    """A second writer on the connection of a stream, which counts its bytes and knows the last id it sent."""

    __slots__ = ("bytes_written",)

    def __init__(self) -> None:
        self.bytes_written = 0

    def event_id(self, name: str) -> str:
        """Return the id of an event of the stream itself, as `stop`, from its name."""
        raise NotImplementedError

    def fall_behind(self) -> None:
        """Stop writing: more than HIGH_WATER bytes wait for the client. Called from within a write."""


class _Messages(list[Any]):
    """The few requests that wait on a connection, for which an empty deque would allocate 64 slots, 0.7 KiB."""

    __slots__ = ()

    def popleft(self) -> Any:
        """Remove and return the first, as a deque does."""
        return self.pop(0)


class Connection(web.RequestHandler):
    """A connection of aiohttp that notifies its fan-out writer when the client falls behind."""

    __slots__ = ("fanout",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._messages = _Messages()  # type: ignore[assignment]
        self.fanout: FanoutWriter | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the transport be closed by several parts of the server, as the end of a stream and a disconnect.

        The second `close()` of asyncio's transport for TLS takes its protocol away, and every later write raises
        AttributeError: that of a fan-out would end the channel for all its followers.
        """
        if transport.get_extra_info("sslcontext") is not None:
            setattr(transport, "close", _only_once(transport))  # noqa: B010 - mypy rejects an assignment to a method
        super().connection_made(transport)

    def pause_writing(self) -> None:
        """Notify the fan-out writer that more than HIGH_WATER bytes wait (the default of the transport, too)."""
        super().pause_writing()
        if self.fanout is not None:
            self.fanout.fall_behind()


def _only_once(transport: asyncio.BaseTransport) -> Callable[[], None]:
    """Return what closes a transport unless it is closing."""
    close = transport.close
    return lambda: None if transport.is_closing() else close()


class PollingWriter:
    """Writer for a connection without `pause_writing` (aiohttp's own, under TestServer): polls the buffer size."""

    def __init__(self, transport: asyncio.Transport, fanout: FanoutWriter) -> None:
        self._transport = transport
        self._fanout = fanout

    def write(self, data: bytes) -> None:
        """Send or buffer bytes, and notify the fan-out writer above HIGH_WATER."""
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > HIGH_WATER:
            self._fanout.fall_behind()


class Writer(Protocol):
    """Where a fan-out writer writes."""

    def write(self, data: bytes) -> None:
        """Send bytes, or buffer them until the client reads; never waits."""
