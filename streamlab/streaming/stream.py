"""An open response: its headers, its writes, every way it can end."""

import asyncio
import errno
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import IO, Any, Literal, Self

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import StreamWriter

from streamlab import sse
from streamlab.problems import Problem

from .compression import Encoder, choose_encoder
from .connection import HIGH_WATER, Piece
from .drain import STREAMS, Streams
from .outcome import OnStop, Outcome, StreamSummary


class HeadersOnly(BaseException):
    """Unwinds a handler whose request was HEAD: the headers are sent and nothing else is to be.

    Not an Exception, so that no `except Exception` of a scenario mistakes it for a failure of its source.
    """


HEADERS_GRACE = 0.05
"""Seconds a source has to fail with a real status before the headers go out without a first byte."""

YIELD_BYTES = 256 * 1024
"""A writer that never has to wait yields to the other streams after so many bytes,"""

YIELD_WRITES = 64
"""or so many writes."""

SOURCE_FAILED = "The source of this response failed; the server's log says why."

SMALL_BYTES = 16 * 1024
"""Writes up to this take the short way: what they cost is steps, and not copies."""

SENDFILE_SEGMENT = 16 * 1024 * 1024
"""Bytes of a file handed to the kernel at once, so that what was sent of a long download is known as it goes."""

_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT}


class Stream(web.StreamResponse):
    """A response being written, made by `open_stream`. One task writes to it.

    `write` takes bytes, waits while the client is slow, and raises ConnectionError when the client has left.
    """

    # An idle stream is to cost little, and what has a slot is not in the instance's dictionary.
    __slots__ = (
        "_bytes_sent",
        "_cancellations",
        "_encoder",
        "_eof_begun",
        "_headers_timer",
        "_is_chunked",
        "_request",
        "_since_yield_bytes",
        "_since_yield_writes",
        "_stopping",
        "_stops",
        "_streams",
        "_task",
        "_transport",
        "_writer",
        "error",
        "first_byte_at",
        "headers_sent",
        "on_stop",
        "opened_at",
        "outcome",
        "scenario",
    )

    # The headers wait for the first write or the grace time, so that a source that fails at once can still be
    # answered with its real status, and so that a short answer is one packet. aiohttp's own Response does the same.
    _send_headers_immediately = False

    def __init__(
        self,
        request: web.Request,
        *,
        status: int,
        headers: Mapping[str, str],
        on_stop: OnStop,
        encoder: Encoder | None,
        scenario: str,
        streams: "Streams",
    ) -> None:
        super().__init__(status=status, headers=headers)
        self._streams = streams
        self.on_stop = on_stop
        self.scenario = scenario
        self._bytes_sent = 0
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self.opened_at = time.monotonic()
        self.first_byte_at: float | None = None
        self._request = request
        self._task = asyncio.current_task()
        self._cancellations = self._task.cancelling() if self._task else 0
        self._writer: AbstractStreamWriter | None = None
        self.headers_sent = False
        self._headers_timer: asyncio.TimerHandle | None = None
        self._stopping: Literal["end", "cut"] | None = None
        self._stops = 0
        self._eof_begun = False
        self._encoder = encoder
        self._transport = request.transport
        self._is_chunked = request.version >= (1, 1)
        self._since_yield_bytes = 0
        self._since_yield_writes = 0

    # -- writing

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; returns when the connection can take more. Empty data is nothing, not an end."""
        if self._encoder is not None and data:
            data = await self._encoder.encode(data, self._streams.compressing)
        if not data:
            return
        if not (len(data) <= SMALL_BYTES and self._takes_pieces and self.push(Piece(bytes(data)))):
            self._send_headers_with(data)
            await super().write(data)
        await self._yield_after(len(data))

    async def _yield_after(self, size: int) -> None:
        """Give the other streams their turn, now and then, after a write of `size` bytes."""
        self._since_yield_bytes += size
        self._since_yield_writes += 1
        if self._since_yield_bytes >= YIELD_BYTES or self._since_yield_writes >= YIELD_WRITES:
            self._since_yield_bytes = self._since_yield_writes = 0
            await asyncio.sleep(0)

    @property
    def _takes_pieces(self) -> bool:
        """Whether a chunk may go straight to the connection: what aiohttp does, in fewer steps."""
        return (
            self.headers_sent
            and self._is_chunked
            and self._encoder is None
            and not self._eof_begun
            and self.content_length is None
            and not self.client_gone
        )

    async def ready(self) -> None:
        """Wait until no more than HIGH_WATER bytes wait for the client."""
        if self._writer is not None and self.headers_sent:
            await self._writer.drain()

    def note_first_byte(self) -> None:
        """Remember that the body has begun."""
        if self.first_byte_at is None:
            self.first_byte_at = time.monotonic()

    @property
    def bytes_sent(self) -> int:
        """Bytes of the body handed to the connection."""
        return self._bytes_sent

    def push(self, piece: Piece) -> bool:
        """Write a piece without waiting; False, and nothing is written, where too much waits for the client already.

        For a body of unknown length that is not compressed, once the headers are sent, and while nothing else writes.
        """
        transport = self._transport
        if transport is None or transport.get_write_buffer_size() > HIGH_WATER:
            return False
        transport.write(piece.chunk if self._is_chunked else piece.body)
        self._bytes_sent += len(piece.body)
        self.note_first_byte()
        return True

    @property
    def can_sendfile(self) -> bool:
        """Whether `sendfile` works here: a length is declared, nothing is compressed, no TLS, asyncio's own loop."""
        transport = self._request.transport
        return (
            self._encoder is None
            and self.content_length is not None
            and transport is not None
            and transport.get_extra_info("sslcontext") is None
            and isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop)
        )

    async def sendfile(self, file: IO[bytes], offset: int, count: int) -> None:
        """Send `count` bytes of a regular file from `offset` through the kernel (`sendfile(2)`).

        Raises EOFError when the file holds fewer; needs `can_sendfile`.
        """
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        self._send_headers_with(b"")
        self.note_first_byte()
        loop = asyncio.get_running_loop()
        end = offset + count
        while offset < end:
            segment = min(SENDFILE_SEGMENT, end - offset)
            try:
                sent = await loop.sendfile(transport, file, offset, segment, fallback=False)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                transport.abort()
                raise ConnectionResetError("the client has left") from error
            self._bytes_sent += sent
            offset += sent
            if sent < segment:
                raise EOFError(f"the file ended {end - offset} bytes early")

    async def write_eof(self, data: bytes = b"") -> None:
        """End the body with its last chunk. `open_stream` calls it; a stream that was cut stays cut."""
        if self.outcome is not None or self._eof_begun:
            return
        self._eof_begun = True
        if self._encoder is not None:
            data = data + self._encoder.finish()
        if data:
            self._send_headers_with(data)
        await super().write_eof(data)

    def send_headers(self) -> None:
        """Send the headers now, without waiting for the first write."""
        self.forget_timer()
        if not self.headers_sent and self._writer is not None:
            self.headers_sent = True
            with suppress(ConnectionError):
                self._writer.send_headers()

    def forget_timer(self) -> None:
        """Do not send headers by the clock any more."""
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _send_headers_with(self, data: bytes | bytearray | memoryview) -> None:
        if not self.headers_sent:
            if data:  # aiohttp joins waiting headers and the first chunk into one packet
                self.headers_sent = True
            self.send_headers()
        if data:
            self._bytes_sent += len(data)
            self.note_first_byte()

    # -- ending

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that writes to it."""
        return self._task

    @property
    def client_gone(self) -> bool:
        """Whether the connection is closed or closing."""
        transport = self._request.transport
        return transport is None or transport.is_closing()

    @property
    def stalled(self) -> bool:
        """Whether bytes wait for a client that does not take them."""
        transport = self._request.transport
        return transport is not None and transport.get_write_buffer_size() > 0

    def stop(self, how: Literal["end", "cut"]) -> None:
        """Interrupt the handler because the server stops: `end` with a last chunk, `cut` without one."""
        if self._task is not None and self.outcome is None and self._stopping != how:
            self._stopping = how
            self._stops += 1
            self._task.cancel()

    def cut(self) -> None:
        """Close the connection in a way that no client can take for a tidy end (RFC 9112 section 8).

        What was written is delivered first, but where only the end of the connection would end the body (HTTP/1.0
        without Content-Length): there it is reset.
        """
        transport = self._request.transport
        if transport is None:
            return
        if self._request.version < (1, 1) and self.content_length is None:
            sock = transport.get_extra_info("socket")
            with suppress(OSError, AttributeError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        elif self.stalled and self._stopping:
            transport.abort()
        else:
            transport.close()

    async def __aenter__(self) -> Self:
        """Make the headers ready, and see to it that they leave in time; HEAD ends here, with HeadersOnly."""
        request = self._request
        self._streams.admit(request, self)
        try:
            stream: Stream = self
            request[STREAM] = stream
            self._writer = await self.prepare(request)
            if request.method == "HEAD":
                self.send_headers()
                self.outcome = Outcome.FINISHED
                raise HeadersOnly
        except BaseException:
            self._streams.dismiss(request, self)
            raise
        self._headers_timer = asyncio.get_running_loop().call_later(HEADERS_GRACE, self.send_headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End the response as the block ended; True where the handler may go on after an error."""
        try:
            if error is not None:
                return await self.ended_by(error)
            if self._stopping == "cut":  # the block has kept its cancellation to itself: what it sent is a part
                return await self._settle_stop()
            try:
                await self.finish()
            except BaseException as failure:
                if not await self.ended_by(failure):
                    raise
            return False
        finally:
            self.forget_timer()
            self._streams.dismiss(self._request, self)

    async def finish(self) -> None:
        """End the body, the block being done; raises ValueError where it is not as long as was declared."""
        if self.content_length is not None and self.bytes_sent != self.content_length:
            raise ValueError(f"{self.content_length} bytes were declared, {self.bytes_sent} were written")
        await self.write_eof()
        await self._flush()
        self.outcome = Outcome.FINISHED

    async def _flush(self) -> None:
        """Wait until the kernel has taken every byte: what waits in this process is lost if it stops."""
        transport = self._request.transport
        if transport is None or self._writer is None or not transport.get_write_buffer_size():
            return
        transport.set_write_buffer_limits(high=0)
        try:
            await self._writer.drain()
        finally:
            transport.set_write_buffer_limits()
        if self._request.transport is None:
            raise ConnectionResetError("the client left before it had everything")

    async def ended_by(self, error: BaseException) -> bool:
        """Settle a stream whose block raised; True where the handler may go on after it, False to raise on."""
        if self._stops and isinstance(error, asyncio.CancelledError):
            return await self._settle_stop()
        if self.client_gone and _is_disconnect(error):
            # A client that has the whole body may leave before the block is over.
            whole = self.bytes_sent == self.content_length and not self._eof_begun
            self.outcome = Outcome.FINISHED if whole else Outcome.CLIENT_LEFT
            return False
        self.error = error
        if not self.headers_sent:
            self._forget_headers()
        else:
            with suppress(ConnectionError, asyncio.CancelledError):
                await self._send_error(error)
            self.cut()
        self.outcome = Outcome.FAILED
        return False

    async def _settle_stop(self) -> bool:
        """End a stream that the server interrupted; False where the client has left as well."""
        tidy = self._stopping == "end" and not self.client_gone and self._can_end
        if tidy:
            try:
                await self._send_farewell()
                await self.write_eof()
                await self._flush()
            except (ConnectionError, asyncio.CancelledError):
                tidy = False
        self.outcome = Outcome.SERVER_STOPPED
        if not tidy:
            self.cut()
        assert self._task is not None
        for _ in range(self._stops):
            self._task.uncancel()
        return self._task.cancelling() <= self._cancellations

    @property
    def _can_end(self) -> bool:
        """Whether a last chunk may follow what has been written."""
        return True

    async def _send_error(self, error: BaseException) -> None:
        """Report a failure in the body, in formats that have a way to: this one has none."""

    async def _send_farewell(self) -> None:
        """Report in the body that the server stops, in formats that have a way to: this one has none."""

    def _forget_headers(self) -> None:
        """Take back headers that have not left, so that the request can be answered with the error's own status."""
        self.forget_timer()
        if isinstance(self._writer, StreamWriter):
            self._writer.chunked = False

    def _answered_status(self) -> int:
        """The status the client got: an error before the headers left has its own."""
        if self.error is None or self.headers_sent:
            return self.status
        return self.error.status if isinstance(self.error, Problem | web.HTTPException) else 500

    def summary(self) -> StreamSummary:
        """What is known of this stream by now."""
        first, resource = self.first_byte_at, self._request.match_info.route.resource
        return StreamSummary(
            scenario=self.scenario,
            route=resource.canonical if resource else "",
            method=self._request.method,
            status=self._answered_status(),
            outcome=self.outcome or Outcome.FAILED,
            seconds=time.monotonic() - self.opened_at,
            first_byte_seconds=None if first is None else first - self.opened_at,
            bytes=self.bytes_sent,
            error=self.error,
        )


SCENARIO = web.RequestKey("scenario", str)

STREAM = web.RequestKey("stream", Stream)


def open_stream(
    request: web.Request,
    content_type: str,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    length: int | None = None,
    compress: bool = False,
    on_stop: OnStop = "finish",
) -> AbstractAsyncContextManager[Stream, bool]:
    """Open a response, lend it to the block, and end it in the one way that tells the client the truth.

    Headers leave with the first write, at the latest after `HEADERS_GRACE`. `length` is the body's Content-Length in
    bytes, where it is known. `compress` offers gzip, and zstd where it is installed, negotiated by q-values and flushed
    at every write. `on_stop` is what SIGTERM does: let the stream `finish` within `drain_seconds`, or `end` it at once
    with its last chunk. Event streams have `open_event_stream`.

    The block ends in one of these ways, and the hook `on_stream_end` hears which:

    - it is done: the last chunk is sent; `finished`
    - the client left: the block is cancelled, or its write raises ConnectionError; `client left`
    - the server stops: the block is cancelled, and the handler goes on after it; `server stopped`
    - it raises: before the first byte the error reaches the client as a status (raise Problem to choose which);
      after it the connection is cut without the last chunk, event streams send `event: error` first; `failed`

    Raises Problem 503 when the server has too many streams or is stopping. Unwinds the handler where the request is
    HEAD, ValueError for an event stream. A body of unknown length asks proxies not to collect it (`Incremental`,
    draft-ietf-httpbis-incremental).
    Source: RFC 9112 sections 7 and 8; RFC 9110 sections 9.3.2 and 12.5.3; WHATWG HTML 9.2.
    """
    if content_type.startswith(sse.MEDIA_TYPE):
        raise ValueError(f"open_stream does not send {content_type}: use open_event_stream(request)")
    encoder = choose_encoder(request.headers.get("Accept-Encoding", "")) if compress else None
    stream = Stream(
        request,
        status=status,
        headers=_headers(content_type, headers, encoder, compress=compress),
        on_stop=on_stop,
        encoder=encoder,
        scenario=request.get(SCENARIO, ""),
        streams=request.config_dict[STREAMS],
    )
    if length is not None and encoder is None:
        stream.content_length = length
    else:
        stream.headers["Incremental"] = "?1"
    return stream


def _is_disconnect(error: BaseException) -> bool:
    """Whether an error, or every error of a group, is what a lost connection looks like."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_disconnect, error.exceptions))
    return isinstance(error, ConnectionError | asyncio.CancelledError)


def stream_headers(content_type: str, given: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers that keep proxies from storing or collecting a stream, and those that are given."""
    return {"Content-Type": content_type, "Cache-Control": "no-store", "X-Accel-Buffering": "no", **(given or {})}


def _headers(
    content_type: str, given: Mapping[str, str] | None, encoder: Encoder | None, *, compress: bool
) -> dict[str, str]:
    headers = stream_headers(content_type, given)
    if compress:
        headers["Vary"] = ", ".join(filter(None, (headers.get("Vary"), "Accept-Encoding")))
    if encoder is not None:
        headers["Content-Encoding"] = encoder.name
    return headers
