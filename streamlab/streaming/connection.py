"""Connections to clients, and chunks that are written to many of them."""

import asyncio
import os
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

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

    __slots__ = ("descriptor", "writer")

    def __init__(self) -> None:
        self.writer: Writer | None = None
        """Where it writes, once `EventStream.attach_writer` has returned that."""
        self.descriptor: int | None = None
        """The socket, where its recipients may write to it themselves."""

    @property
    def bytes_written(self) -> int:
        """Bytes of the body that it has written."""
        raise NotImplementedError

    def event_id(self, name: str) -> str:
        """Return the id of an event of the stream itself, as `stop`, from its name."""
        raise NotImplementedError

    def stop_writing(self) -> None:
        """Write no more: over HIGH_WATER bytes wait for the client (called within a write), or it has disconnected."""


class _Messages(list[Any]):
    """The few requests that wait on a connection, for which an empty deque would allocate 64 slots, 0.7 KiB."""

    __slots__ = ()

    def popleft(self) -> Any:
        """Remove and return the first, as a deque does."""
        return self.pop(0)


class Connection(web.RequestHandler):
    """A connection of aiohttp that stops its fan-out writer when the client falls behind or disconnects."""

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
        """Stop the fan-out writer when more than HIGH_WATER bytes wait (the default of the transport, too)."""
        super().pause_writing()
        if self.fanout is not None:
            self.fanout.stop_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the fan-out writer before the transport closes its socket, whose descriptor the next connection gets."""
        if self.fanout is not None:
            self.fanout.stop_writing()
        super().connection_lost(exc)


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
        """Send or buffer bytes, and stop the fan-out writer above HIGH_WATER."""
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > HIGH_WATER:
            self._fanout.stop_writing()


class Writer(Protocol):
    """Where a fan-out writer writes."""

    def write(self, data: bytes) -> None:
        """Send bytes, or buffer them until the client reads; never waits."""


M = TypeVar("M", bound=FanoutWriter)


class Recipients(Generic[M]):
    """Connections that get the same bytes at the same time.

    Where nothing waits in the transport of a connection, the bytes are written to its socket, as the transport would do
    after a dozen checks: this is where a server with thousands of followers spends its time. What the socket does not
    take is given to the transport, and all that follows, until its buffer is empty again. So the order is that of the
    calls, and the transport notices a disconnect.
    """

    __slots__ = ("_buffered", "_direct")

    def __init__(self) -> None:
        self._direct: dict[int, M] = {}
        """Those that are written to by the descriptor of their socket."""
        self._buffered: set[M] = set()
        """Those that are written to by their transport."""

    def __len__(self) -> int:
        """Return their number."""
        return len(self._direct) + len(self._buffered)

    def all(self) -> list[M]:
        """Return all of them, in no order."""
        return [*self._direct.values(), *self._buffered]

    def add(self, one: M) -> None:
        """Add one that has a writer."""
        one.descriptor = _descriptor(one.writer)
        self._buffered.add(one)
        self.update(one)

    def remove(self, one: M) -> None:
        """Remove one, also within a write to it."""
        if one in self._buffered:
            self._buffered.remove(one)
        elif one.descriptor is not None:
            del self._direct[one.descriptor]

    def update(self, one: M) -> None:
        """Look again whether something waits in the transport of one, after anything else has written to it."""
        if one.descriptor is not None:
            self.remove(one)
            if _is_empty(one.writer):
                self._direct[one.descriptor] = one
            else:
                self._buffered.add(one)

    def write(self, data: bytes) -> None:
        """Send bytes to all of them, or buffer them; never waits."""
        size, write, buffered = len(data), os.write, tuple(self._buffered)
        for descriptor in tuple(self._direct):
            try:
                sent = write(descriptor, data)
            except OSError:  # it is full, or broken
                sent = 0
            if sent != size:
                one = self._direct.pop(descriptor)
                self._buffered.add(one)
                self._give(one, data[sent:])
        for one in buffered:
            self._give(one, data)

    def _give(self, one: M, data: bytes) -> None:
        """Write to the transport of one, which may remove it."""
        assert one.writer is not None
        one.writer.write(data)
        if one in self._buffered:
            self.update(one)


def _descriptor(writer: Writer | None) -> int | None:
    """Return the socket of a transport that writes to it whatever it is given; None for any other."""
    if (
        isinstance(writer, asyncio.Transport)
        and writer.get_extra_info("sslcontext") is None
        and isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop)
    ):
        descriptor: int = writer.get_extra_info("socket").fileno()
        return descriptor
    return None


def _is_empty(writer: Writer | None) -> bool:
    """Return whether a transport would write to its socket at once."""
    return isinstance(writer, asyncio.Transport) and not writer.get_write_buffer_size() and not writer.is_closing()
