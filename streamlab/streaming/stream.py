"""An open response: its headers, its writes, and every ending."""

import asyncio
import errno
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import IO, Any, Self

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import StreamWriter

from streamlab import sse
from streamlab.problems import Problem

from .compression import Encoder, choose_encoder
from .connection import HIGH_WATER, Chunk
from .drain import STREAMS, Streams
from .outcome import OnStop, Outcome, Stop, StreamSummary


class HeadersOnly(BaseException):
    """Unwinds the handler of a HEAD request: the headers are sent, and no body follows.

    Not an Exception, so that no `except Exception` of a scenario takes it for a failure of its source.
    """


HEADERS_GRACE = 0.05
"""Seconds in which a source can fail with an error status before the headers are sent without a first byte."""

YIELD_BYTES = 256 * 1024
"""Bytes after which a writer that never has to wait yields to the other streams."""

YIELD_WRITES = 64
"""Writes after which a writer that never has to wait yields to the other streams."""

SOURCE_FAILED = "The source of this response failed; see the log of the server."

SMALL_BYTES = 16 * 1024
"""Maximum bytes of a write that bypasses aiohttp's writer: small writes cost calls, not copies."""

SENDFILE_SEGMENT = 16 * 1024 * 1024
"""Bytes of a file passed to the kernel at once, so that the progress of a long download is known."""

_DISCONNECT_ERRNOS = {
    errno.EPIPE,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ETIMEDOUT,
}


class Stream(web.StreamResponse):
    """A response being written, made by `open_stream`. One task writes to it.

    `write` takes bytes, waits while the client is slow, and raises ConnectionError when the client has disconnected.
    """

    # Slots keep the memory of an idle stream small: they are not in the dictionary of the instance.
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
        "_stop_count",
        "_stop_mode",
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

    # The headers wait for the first write or the grace time, so that a source that fails at once still gets its error
    # status, and a short response is one packet. aiohttp's own Response does the same.
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
        self._stop_mode: Stop | None = None
        self._stop_count = 0
        self._eof_begun = False
        self._encoder = encoder
        self._transport = request.transport
        self._is_chunked = request.version >= (1, 1)
        self._since_yield_bytes = 0
        self._since_yield_writes = 0

    # -- writing

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; returns when the connection can take more. Empty data is ignored, and does not end the body."""
        if self._encoder is not None and data:
            data = await self._encoder.encode(data, self._streams.compressing)
        if not data:
            return
        if not (len(data) <= SMALL_BYTES and self._can_push and self.push(Chunk(bytes(data)))):
            self._send_headers_with(data)
            await super().write(data)
        await self._yield_after(len(data))

    async def _yield_after(self, size: int) -> None:
        """Yield to the other streams after YIELD_BYTES or YIELD_WRITES, the last of which had `size` bytes."""
        self._since_yield_bytes += size
        self._since_yield_writes += 1
        if self._since_yield_bytes >= YIELD_BYTES or self._since_yield_writes >= YIELD_WRITES:
            self._since_yield_bytes = self._since_yield_writes = 0
            await asyncio.sleep(0)

    @property
    def _can_push(self) -> bool:
        """Whether `push` may write a chunk to the connection, as aiohttp would in more calls."""
        return (
            self.headers_sent
            and self._is_chunked
            and self._encoder is None
            and not self._eof_begun
            and self.content_length is None
            and not self.is_disconnected
        )

    async def wait_writable(self) -> None:
        """Wait until no more than HIGH_WATER bytes wait for the client."""
        if self._writer is not None and self.headers_sent:
            await self._writer.drain()

    def note_first_byte(self) -> None:
        """Record that the body has begun."""
        if self.first_byte_at is None:
            self.first_byte_at = time.monotonic()

    @property
    def request(self) -> web.Request:
        """The request that it responds to."""
        return self._request

    @property
    def bytes_sent(self) -> int:
        """Return the bytes of the body handed to the connection."""
        return self._bytes_sent

    def push(self, chunk: Chunk) -> bool:
        """Write a chunk without waiting; return False, having written nothing, if more than HIGH_WATER bytes wait.

        For a body of unknown length that is not compressed, once the headers are sent, and while nothing else writes.
        """
        transport = self._transport
        if transport is None or transport.get_write_buffer_size() > HIGH_WATER:
            return False
        transport.write(chunk.framed if self._is_chunked else chunk.body)
        self._bytes_sent += len(chunk.body)
        self.note_first_byte()
        return True

    @property
    def can_sendfile(self) -> bool:
        """Whether `sendfile` works: a declared length, no compression, no TLS, the event loop of asyncio."""
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
            raise ConnectionResetError("the client has disconnected")
        self._send_headers_with(b"")
        self.note_first_byte()
        loop = asyncio.get_running_loop()
        end = offset + count
        while offset < end:
            segment = min(SENDFILE_SEGMENT, end - offset)
            try:
                sent = await loop.sendfile(transport, file, offset, segment, fallback=False)
            except OSError as error:
                if error.errno not in _DISCONNECT_ERRNOS:
                    raise
                transport.abort()
                raise ConnectionResetError("the client has disconnected") from error
            self._bytes_sent += sent
            offset += sent
            if sent < segment:
                raise EOFError(f"the file ended {end - offset} bytes early")

    async def write_eof(self, data: bytes = b"") -> None:
        """End the body with its last chunk. `open_stream` calls it; has no effect on a stream that was cut."""
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
        self._cancel_headers_timer()
        if not self.headers_sent and self._writer is not None:
            self.headers_sent = True
            with suppress(ConnectionError):
                self._writer.send_headers()

    def _cancel_headers_timer(self) -> None:
        """Cancel the timer that sends the headers."""
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
        """Return the task that writes to it."""
        return self._task

    @property
    def is_disconnected(self) -> bool:
        """Whether the connection to the client is closed or closing."""
        transport = self._request.transport
        return transport is None or transport.is_closing()

    @property
    def is_stalled(self) -> bool:
        """Whether bytes wait for a client that does not read them."""
        transport = self._request.transport
        return transport is not None and transport.get_write_buffer_size() > 0

    def stop(self, how: Stop) -> None:
        """Cancel the handler because the server stops, or the client may not have this stream any more."""
        if self._task is not None and self.outcome is None and self._stop_mode != how:
            self._stop_mode = how
            self._stop_count += 1
            self._task.cancel()

    def cut(self) -> None:
        """Close the connection so that no client takes the body for complete (RFC 9112 section 8).

        What was written is delivered first. Where the end of the connection ends the body (HTTP/1.0 without
        Content-Length), the connection is reset instead.
        """
        transport = self._request.transport
        if transport is None:
            return
        if self._request.version < (1, 1) and self.content_length is None:
            sock = transport.get_extra_info("socket")
            with suppress(OSError, AttributeError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        elif self.is_stalled and self._stop_mode:
            transport.abort()
        else:
            transport.close()

    async def __aenter__(self) -> Self:
        """Prepare the headers, and start the timer that sends them; raise HeadersOnly for HEAD."""
        request = self._request
        self._streams.register(request, self)
        try:
            stream: Stream = self
            request[STREAM] = stream
            self._writer = await self.prepare(request)
            if request.method == "HEAD":
                self.send_headers()
                self.outcome = Outcome.FINISHED
                raise HeadersOnly
        except BaseException:
            self._streams.unregister(request, self)
            raise
        self._headers_timer = asyncio.get_running_loop().call_later(HEADERS_GRACE, self.send_headers)
        request.protocol.keep_alive(True)  # cancels the timer of the idle connection, which starts again afterwards
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End the response as the block ended; return True to suppress its error."""
        try:
            if error is not None:
                return await self._end_after_error(error)
            # The block suppressed its cancellation: what it sent is incomplete.
            if self._stop_mode == "cut" or not self._can_end:
                return await self._end_after_stop()
            try:
                await self._finish()
            except BaseException as failure:
                if not await self._end_after_error(failure):
                    raise
            return False
        finally:
            self._cancel_headers_timer()
            self._streams.unregister(self._request, self)

    async def _finish(self) -> None:
        """End the body after the block; raises ValueError if its length is not the declared one."""
        if self.content_length is not None and self.bytes_sent != self.content_length:
            raise ValueError(f"{self.content_length} bytes were declared, {self.bytes_sent} were written")
        await self.write_eof()
        await self._flush()
        self.outcome = Outcome.FINISHED

    async def _flush(self) -> None:
        """Wait until the kernel has every byte: what is buffered in this process is lost when it stops."""
        transport = self._request.transport
        if transport is None or self._writer is None or not transport.get_write_buffer_size():
            return
        transport.set_write_buffer_limits(high=0)
        try:
            await self._writer.drain()
        finally:
            transport.set_write_buffer_limits()
        if self._request.transport is None:
            raise ConnectionResetError("the client disconnected before it had the complete body")

    async def _end_after_error(self, error: BaseException) -> bool:
        """End the stream after an exception of its block; return True to suppress it."""
        if self._stop_count and isinstance(error, asyncio.CancelledError):
            return await self._end_after_stop()
        if self.is_disconnected and _is_disconnect(error):
            # A client that has the complete body may disconnect before the block ends.
            complete = self.bytes_sent == self.content_length and not self._eof_begun
            self.outcome = Outcome.FINISHED if complete else Outcome.CLIENT_LEFT
            return False
        self.error = error
        if not self.headers_sent:
            self._discard_headers()
        else:
            with suppress(ConnectionError, asyncio.CancelledError):
                await self._send_error(error)
            self.cut()
        self.outcome = Outcome.FAILED
        return False

    async def _end_after_stop(self) -> bool:
        """End a stream that the server interrupted; return True to suppress the cancellation."""
        ended = self._stop_mode != "cut" and not self.is_disconnected and self._can_end
        if ended:
            try:
                await self._send_farewell()
                await self.write_eof()
                await self._flush()
            except (ConnectionError, asyncio.CancelledError):
                ended = False
        self.outcome = Outcome.UNAUTHORIZED if self._stop_mode == "unauthorized" else Outcome.SERVER_STOPPED
        if not ended:
            self.cut()
        assert self._task is not None
        for _ in range(self._stop_count):
            self._task.uncancel()
        return self._task.cancelling() <= self._cancellations

    @property
    def _can_end(self) -> bool:
        """Whether a last chunk may follow what has been written: not if it would make a part look complete."""
        return self._stop_mode != "unauthorized"

    async def _send_error(self, error: BaseException) -> None:
        """Report a failure in the body, in formats that have a way to: this one has none."""

    async def _send_farewell(self) -> None:
        """Report in the body why the server ends it, in formats that have a way to: this one has none."""

    def _discard_headers(self) -> None:
        """Discard headers that have not been sent, so that the response can have the status of the error."""
        self._cancel_headers_timer()
        if isinstance(self._writer, StreamWriter):
            self._writer.chunked = False

    def _response_status(self) -> int:
        """Return the status that the client got: that of the error, if the headers were not sent before it."""
        if self.error is None or self.headers_sent:
            return self.status
        return self.error.status if isinstance(self.error, Problem | web.HTTPException) else 500

    def summary(self) -> StreamSummary:
        """Return the summary of this stream so far."""
        first, resource = self.first_byte_at, self._request.match_info.route.resource
        return StreamSummary(
            scenario=self.scenario,
            route=resource.canonical if resource else "",
            method=self._request.method,
            status=self._response_status(),
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
    """Open a response, yield it to the block, and end it so that the client knows whether it is complete.

    Headers leave with the first write, at the latest after `HEADERS_GRACE`. `length` is the body's Content-Length in
    bytes, where it is known. `compress` offers gzip, and zstd where it is installed, negotiated by q-values and flushed
    at every write. `on_stop` is what SIGTERM does: let the stream `finish` within `drain_seconds`, or `end` it at once
    with its last chunk. Event streams have `open_event_stream`.

    The hook `on_stream_end` gets one of these outcomes:

    - `finished`: the block ended, and the last chunk is sent
    - `client left`: the client disconnected; the block is cancelled, or its write raises ConnectionError
    - `server stopped`: the block is cancelled, and the handler continues after it
    - `unauthorized`: the same, because the credentials of the client have expired or were removed
    - `failed`: the block raised. Before the first byte the error becomes the status of the response (raise Problem to
      choose it); after it the connection is cut without the last chunk, in event streams after an event `error`

    Raises Problem 503 when the server has too many streams or is stopping. Unwinds the handler where the request is
    HEAD, ValueError for an event stream. A body of unknown length has `Incremental: ?1`, so that proxies do not
    collect it (draft-ietf-httpbis-incremental).
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
    """Return whether an error, or every error of a group, is that of a lost connection."""
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
