"""A response that sends events to one client: encoded, with heartbeats, and ended by an event that gives the reason."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web import BaseRequest
from aiohttp_sse import EventSourceResponse

from streamlab import sse
from streamlab.problems import Problem

from .connection import Chunk, Connection, FanoutWriter, PollingWriter, Writer
from .drain import STREAMS, Streams
from .outcome import OnStop
from .stream import SCENARIO, SOURCE_FAILED, Stream, stream_headers

HEARTBEAT_SECONDS = 5.0
"""Seconds between two checks of an event stream for silence; a comment is sent after at most twice as long."""

STEP_BYTES = 64 * 1024
"""Maximum bytes of an event that are written before the client must have taken some of them."""

_HEARTBEAT = Chunk(sse.HEARTBEAT)

# RFC 9111 section 5.2.2.6: no-transform forbids compression, in which some proxies hold events until a buffer is full.
_CACHE = "no-store, no-transform"


UNAUTHORIZED = "The credentials of this stream have expired, were removed, or do not suffice any more."
"""The reason in the last event of a stream that its client may not have any more."""


class EventStream(Stream, EventSourceResponse):
    """An event stream being written, made by `open_event_stream`. One task writes to it.

    It is the response of aiohttp-sse with the endings of `Stream`. What it overrides, and why:

    - `prepare` rejects every method but GET and starts a ping task outside of any block. Here POST may stream events,
      HEAD gets the headers, and a timer that ends with the block sends the heartbeats.
    - `send` starts a timeout for each event. Here `stall_seconds` limits a stalled client, in the kernel.
    - Lines end in CRLF, and the ping in an empty line, of which some clients make an event. Here they end in LF.
    - `Connection: keep-alive` is invalid in HTTP/2 and redundant in HTTP/1.1; `no-cache` lets proxies store events.
    """

    __slots__ = (
        "_bytes_checked",
        "_heartbeat_seconds",
        "_heartbeat_timer",
        "_ping_interval",
        "_ping_task",
        "_saved_tcp_user_timeout",
        "_sep",
        "_tcp_sock",
        "_torn",
        "event_id",
        "fanout",
        "position",
    )

    def __init__(
        self,
        request: web.Request,
        *,
        headers: Mapping[str, str],
        on_stop: OnStop,
        scenario: str,
        streams: Streams,
        position: str,
        heartbeat_seconds: float | None,
    ) -> None:
        super().__init__(
            request, status=200, headers=headers, on_stop=on_stop, encoder=None, scenario=scenario, streams=streams
        )
        del self.headers["Connection"]
        self.headers.update(headers)
        self.position = position
        """Id of the last event sent: the events of the stream itself, as `stop`, have it in their ids."""
        self.event_id: Callable[[str], str] | None = None
        """Makes the id of an event of the stream itself from its name, where `position` is not the source."""
        self.fanout: FanoutWriter | None = None
        """The other writer on the connection, which then makes these ids."""
        self._torn = False
        """Whether a part of an event was written, so that nothing but its rest may follow."""
        self._heartbeat_seconds = heartbeat_seconds
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self._bytes_checked = -1

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        """Prepare the headers as any stream does."""
        return await web.StreamResponse.prepare(self, request)

    # -- writing

    async def send(
        self,
        data: Any,
        id: str | None = None,  # noqa: A002
        event: str | None = None,
        retry: int | None = None,
    ) -> None:
        """Send one event; returns when the connection can take more.

        `data` is sent as JSON on one line; a str or bytes (UTF-8) as it is, a `data:` for each of its lines. `event` is
        its name, `id` what a client resumes from, `retry` milliseconds before it reconnects. Raises ValueError for a
        line break or NUL in `event` or `id`, a negative `retry`, and data that is not JSON; ConnectionError when the
        client has disconnected.
        """
        if retry is not None and retry < 0:
            raise ValueError(f"retry of an event is negative: {retry}")
        await self._write_events(sse.sse_event(data, event or "", id=id or "", retry=retry), id or self.position)

    async def gap(self, reason: str, *, missing: int | None = None, id: str = "", **details: Any) -> None:  # noqa: A002
        """Send an event `gap`: between the id of the client and the next event, `missing` events are lost.

        `missing` is None where their number is unknown; `details` are further members of its data.
        """
        data = {"reason": reason, "missing": missing, **details}
        await self._write_events(sse.sse_event(data, "gap", id=id or self.own_id("gap")), self.position)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send whole events that are encoded already; `send` encodes them."""
        if len(data) <= STEP_BYTES and self._can_push and self.push(Chunk(bytes(data))):
            await self._yield_after(len(data))
        else:
            await self._write_events(data, self.position)

    async def _write_events(self, data: bytes | bytearray | memoryview, position: str) -> None:
        """Write whole events; a large one in steps, so that a slow client does not fill this process with it."""
        if not self.headers_sent and len(data) <= STEP_BYTES:  # the headers and the first event in one packet
            self.position = position  # the data is handed over before anything is waited for
            await super().write(data)
            return
        self.send_headers()
        for offset in range(0, len(data), STEP_BYTES):
            chunk = Chunk(bytes(data[offset : offset + STEP_BYTES]))
            while True:
                if self.is_disconnected:
                    raise ConnectionResetError("the client has disconnected")
                if self.push(chunk):
                    break
                await self.wait_writable()
            self._torn = offset + STEP_BYTES < len(data)
        self.position = position
        await self._yield_after(len(data))

    def hold_headers(self, seconds: float) -> None:
        """Wait longer than HEADERS_GRACE for the first byte before the headers are sent without it."""
        if not self.headers_sent:
            self._cancel_headers_timer()
            self._headers_timer = asyncio.get_running_loop().call_later(seconds, self.send_headers)

    def attach_writer(self) -> tuple[Writer | None, bool]:
        """Send the headers, and let `fanout` write to the connection; return the writer, and whether it takes chunks.

        The caller ensures that nothing else writes meanwhile, writes until `stop_writing` is called, and counts the
        bytes. The writer is None while more than HIGH_WATER bytes wait for the client, and after it has disconnected.
        """
        self.send_headers()
        self.headers.clear()  # they are sent, and would take as much memory as everything else of a follower
        protocol, transport, fanout = self._request.protocol, self._transport, self.fanout
        assert fanout is not None
        if transport is None or protocol.writing_paused:
            return None, self._is_chunked
        if not isinstance(protocol, Connection):
            return PollingWriter(transport, fanout), self._is_chunked
        protocol.fanout = fanout
        return transport, self._is_chunked

    @property
    def bytes_sent(self) -> int:
        """Return the bytes of the body handed to the connection, by this stream or its fan-out writer."""
        return self._bytes_sent + (self.fanout.bytes_written if self.fanout is not None else 0)

    def beat(self) -> None:
        """Send a comment, unless an event is half written or the client does not read."""
        if self.headers_sent and not (self._torn or self._eof_begun or self.is_disconnected):
            self.push(_HEARTBEAT)

    def _beat_when_silent(self) -> None:
        """Send a comment if nothing was sent since the last time, and check again later."""
        if self._bytes_checked == self.bytes_sent:
            self.beat()
        self._bytes_checked = self.bytes_sent
        self._start_heartbeat()

    def _start_heartbeat(self) -> None:
        if self._heartbeat_seconds is not None:
            self._heartbeat_timer = asyncio.get_running_loop().call_later(
                self._heartbeat_seconds, self._beat_when_silent
            )

    # -- ending

    async def __aenter__(self) -> Self:
        """Prepare the headers and start the heartbeats; raise HeadersOnly for HEAD."""
        await super().__aenter__()
        self._start_heartbeat()
        return self

    async def __aexit__(  # type: ignore[override]  # aiohttp-sse never suppresses an error
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End the response as the block ended; return True to suppress its error."""
        try:
            return await Stream.__aexit__(self, kind, error, trace)
        finally:
            if self._heartbeat_timer is not None:
                self._heartbeat_timer.cancel()
            if self.fanout is not None and isinstance(self._request.protocol, Connection):
                self._request.protocol.fanout = None

    def own_id(self, name: str) -> str:
        """Return the id of an event of the stream itself: the position that a client resumes from, and its name."""
        if self.fanout is not None:
            return self.fanout.event_id(name)
        if self.event_id is not None:
            return self.event_id(name)
        return f"{self.position}.{name}" if self.position else ""

    @property
    def _can_end(self) -> bool:
        return not self._torn

    async def _send_error(self, error: BaseException) -> None:
        if not self._torn:
            problem = error if isinstance(error, Problem) else Problem(500, SOURCE_FAILED)
            await self.write(sse.sse_event(problem.document(), "error", id=self.own_id("error")))

    async def _send_farewell(self) -> None:
        if self._stop_mode == "unauthorized":
            await self.write(sse.sse_event({"reason": UNAUTHORIZED}, "unauthorized", id=self.own_id("unauthorized")))
        else:
            await self.write(sse.farewell(self.own_id("stop")))

    # -- the rest of aiohttp-sse, which works on its ping task

    def is_connected(self) -> bool:
        """Return whether the response has begun and the client is still connected."""
        return self.prepared and not self.is_disconnected

    async def wait(self) -> None:
        """Wait until the client disconnects or the server stops, either of which cancels the handler."""
        await asyncio.Event().wait()

    def stop_streaming(self) -> None:
        """End the stream from another task, as SIGTERM does."""
        self.stop("end")


def open_event_stream(
    request: web.Request,
    *,
    headers: Mapping[str, str] | None = None,
    on_stop: OnStop = "end",
    position: str = "",
    heartbeat_seconds: float | None = HEARTBEAT_SECONDS,
) -> AbstractAsyncContextManager[EventStream, bool]:
    """Open an event stream to one client, yield it to the block, and end it as `open_stream` ends any response.

    A comment is sent where nothing else was for `heartbeat_seconds` (at least 1 s; None where the caller sends them),
    at the latest after twice that time; never inside an event. On SIGTERM the block is cancelled, and the stream ends
    with an event `stop` that has a random `retry`, unless `on_stop` is `finish`. After a block that raises, an event
    `error` is sent, its data a problem document, and the connection is cut. The ids of both are that of the last event
    sent and their name, as `7.stop`; `position` is that id before the first event. Never compressed.

    Raises Problem 503 when the server has too many streams or is stopping. Unwinds the handler where the request is
    HEAD. Source: WHATWG HTML 9.2.
    """
    if heartbeat_seconds is not None and heartbeat_seconds < 1:
        raise ValueError(f"heartbeat_seconds: {heartbeat_seconds} is less than 1")
    return EventStream(
        request,
        headers={**stream_headers(sse.MEDIA_TYPE, {"Cache-Control": _CACHE, **(headers or {})}), "Incremental": "?1"},
        on_stop=on_stop,
        scenario=request.get(SCENARIO, ""),
        streams=request.config_dict[STREAMS],
        position=position,
        heartbeat_seconds=heartbeat_seconds,
    )
