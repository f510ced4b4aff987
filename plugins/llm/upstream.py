"""Client of an OpenAI-compatible server: its response as whole events, or a Failure with a code."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import aiohttp

from .openai import Block, EventSplitter, Failure, error_message

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
"""Timeout for connecting, and for reading an error response, in seconds."""

HEARTBEAT_SECONDS = 10.0
"""Seconds of silence of an upstream after which its reader gets an empty block, to send a heartbeat."""

RESPONSE_BYTES = 16 * 1024 * 1024
"""Maximum size of a response that is not streamed, in bytes."""

ERROR_BYTES = 64 * 1024
"""Maximum bytes read of an error response."""

STALLED = "The upstream has stopped sending data."
BROKE_OFF = "The upstream disconnected before the end of its response."
RESTARTING = "The model is being restarted."

REJECTED = "upstream_rejected"

_TROUBLE = frozenset(
    f"upstream_{word}" for word in ("unreachable", "timeout", "redirects", "denied", "failed", "stalled", "closed")
)

_PASSED_ON = frozenset({400, 404, 408, 409, 413, 415, 422, 429, 503})
"""Statuses about the request, or of a temporary condition; others are between this server and its upstream."""


class Upstream:
    """One server at one URL: redirects are not followed, and no other address is ever requested.

    `key` is sent to this server only. `socket` is the path of a unix socket that it listens on.
    """

    def __init__(
        self, url: str, *, key: str = "", socket: str = "", stall_seconds: float = 120.0, max_seconds: float = 300.0
    ) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._socket = socket
        self.stall_seconds = stall_seconds
        """Seconds without data after which a response has failed."""
        self.max_seconds = max_seconds
        """Seconds after which a response has failed, however much data arrives."""
        self.trouble: str | None = None
        """Why the last request failed by the upstream's fault; without its message, which may repeat a prompt."""
        self._pooled: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold the connections to it while the block lasts."""
        # `_ReadTimeout` watches the response: aiohttp would restart its own timer for every token.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"

        def session(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
            cookies = aiohttp.DummyCookieJar()
            return aiohttp.ClientSession(
                connector=connector, headers=headers, timeout=timeout, cookie_jar=cookies, auto_decompress=False
            )

        if self._socket:  # on this machine: a connection costs nothing
            async with session(aiohttp.UnixConnector(self._socket, limit=0, force_close=True)) as self._fresh:
                self._pooled = self._fresh
                yield
        else:
            async with (
                session(aiohttp.TCPConnector(limit=0)) as self._pooled,
                session(aiohttp.TCPConnector(limit=0, force_close=True)) as self._fresh,
            ):
                yield

    @asynccontextmanager
    async def post(
        self, path: str, body: bytes, *, events: bool = False, is_optional: bool = False
    ) -> "AsyncIterator[Response]":
        """POST to a path and yield the response, a 200; leaving the block early stops the upstream's work.

        With `events` it must be an event stream. A connection that fails before the response begins is retried once.
        With `is_optional`, an upstream that lacks the path is no trouble. Raises Failure for everything else, also for
        a response with a content coding: none was accepted, and decoding one would let a small body occupy this server
        (RFC 9110, 12.5.3).
        """
        deadline = asyncio.get_running_loop().time() + self.max_seconds
        try:
            async with self._respond(path, body, events=events) as response:
                self.trouble = None
                yield Response(self, response, deadline)
        except Failure as failure:
            troubling = {503} if is_optional else {404, 503}
            if failure.code in _TROUBLE or (failure.code == REJECTED and failure.status in troubling):
                status = f" with {failure.status}" if failure.code == REJECTED else ""
                self.trouble = f"The last request to the upstream failed: {failure.code}{status}."
            raise

    @asynccontextmanager
    async def _respond(self, path: str, body: bytes, *, events: bool) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with asyncio.timeout(min(self.stall_seconds, self.max_seconds)):
                response = await self._send(path, body)
        except TimeoutError as error:
            self.log_error(error)
            raise Failure(504, "upstream_timeout", "The upstream does not respond in time.") from None
        except aiohttp.ClientError as error:
            self.log_error(error)
            if self._socket:  # the embedded model: its process has died, and its supervisor is about to notice
                raise Failure(503, "model_not_ready", RESTARTING, headers={"Retry-After": "1"}) from None
            detail = "The upstream cannot be reached."
            raise Failure(502, "upstream_unreachable", detail, headers={"Retry-After": "2"}) from None
        try:
            if response.status != 200:
                raise await self._failure_of(response)
            if coding := _coding(response):
                log.warning("upstream: a response with Content-Encoding %r, though identity was requested", coding)
                detail = "The upstream's response has a content coding, though none was accepted."
                raise Failure(502, "upstream_failed", detail)
            if events and response.content_type != "text/event-stream":
                raise Failure(502, "upstream_failed", "The upstream's response is not an event stream.")
            yield response
        finally:
            response.close()  # never released: only a closed connection ends the upstream's work

    async def _send(self, path: str, body: bytes) -> aiohttp.ClientResponse:
        """Send a request on a pooled connection, if there is one; on a new one where that turns out to be closed."""
        assert self._pooled is not None
        assert self._fresh is not None
        url = f"{self._url}{path}"
        try:
            return await self._pooled.post(url, data=body, allow_redirects=False)
        except aiohttp.ClientConnectionError as error:
            if isinstance(error, TimeoutError):
                raise
            self.log_error(error)
            return await self._fresh.post(url, data=body, allow_redirects=False)

    def log_error(self, error: Exception) -> None:
        """Log a failure of the connection."""
        log.warning("upstream: %s", self.without_key(f"{type(error).__name__}: {error}"))

    def without_key(self, text: str) -> str:
        """Return a text of the upstream without the key, which it may repeat."""
        return text.replace(self._key, "***") if self._key else text

    async def _failure_of(self, response: aiohttp.ClientResponse) -> Failure:
        """Return the Failure for a response other than 200."""
        status, body = response.status, b""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                body = b"" if _coding(response) else await response.content.read(ERROR_BYTES)
        except (aiohttp.ClientError, TimeoutError):
            pass
        reason = self.without_key(error_message(body)) or _phrase(status)
        # The message of a passed-on error is for the client, and may repeat its prompt; that of a 404 is about the
        # address and the model, which the operator has configured.
        log.warning("upstream: %d%s", status, "" if status in _PASSED_ON - {404} else f": {reason}")
        if 300 <= status < 400:
            return Failure(502, "upstream_redirects", "The upstream redirects, which is not followed.")
        if status in (401, 403, 407):
            return Failure(502, "upstream_denied", "The upstream denies access to this server; see the log.")
        if status not in _PASSED_ON:
            return Failure(502, "upstream_failed", f"The upstream failed with {status}.")
        retry_after = read_retry_after(response.headers.get("Retry-After", ""))
        headers = {"Retry-After": retry_after} if retry_after else {}
        return Failure(status, REJECTED, reason, headers=headers)


class Response:
    """A response of an upstream that has begun, and its deadline, in the event loop's time."""

    def __init__(self, upstream: Upstream, response: aiohttp.ClientResponse, deadline: float) -> None:
        self._upstream = upstream
        self._response = response
        self._deadline = deadline
        self._time = asyncio.get_running_loop().time

    async def blocks(self, count: Callable[[Block], None]) -> AsyncGenerator[Block, None]:
        """Yield blocks of whole events as they arrive, up to `[DONE]`; an empty block during silence.

        Each is counted first. Silence is time without an event that has data: comments do not end it. Raises Failure
        where the stream breaks off, stalls, exceeds the deadline, or sends an error or an invalid event. Everything
        before that has been yielded, except what had not been read when the connection was reset (aiohttp drops that).
        """
        upstream, splitter, silence = self._upstream, EventSplitter(), 0.0
        # Nearly every token is a turn of this loop: it awaits one coroutine, and reads the clock twice.
        read, time, deadline = self._response.content.readany, self._time, self._deadline
        with _ReadTimeout(min(HEARTBEAT_SECONDS, upstream.stall_seconds, upstream.max_seconds)) as timeout:
            while True:
                started = timeout.since = time()
                part: bytes | None = None
                try:
                    part = await read()
                except asyncio.CancelledError:
                    if not timeout.has_expired():
                        raise
                except aiohttp.ClientError as error:
                    raise self._broken_off(error) from None
                timeout.since, now = None, time()
                silence += now - started  # the time that our own client takes does not count
                block = Block() if part is None else splitter.feed(part)
                if block.chunks or block.done:
                    silence = 0.0
                    count(block)
                if part is None or block.raw:
                    yield block
                if block.error:
                    detail = f"The upstream failed: {upstream.without_key(block.error)}."
                    raise Failure(502, "upstream_failed", detail)
                if block.done:
                    return
                if part == b"":
                    raise Failure(502, "upstream_closed", BROKE_OFF)
                if now >= deadline:
                    raise self._deadline_exceeded()
                if silence >= upstream.stall_seconds:
                    raise Failure(504, "upstream_stalled", STALLED)

    async def read(self) -> bytes:
        """Return the body of a response that is not streamed; raises Failure if it is incomplete, late or too large."""
        upstream, body = self._upstream, bytearray()
        with _ReadTimeout(min(upstream.stall_seconds, upstream.max_seconds)) as timeout:
            while (part := await self._read(timeout)) != b"":
                if self._time() >= self._deadline:
                    raise self._deadline_exceeded()
                if part is None:
                    raise Failure(504, "upstream_stalled", STALLED)
                body += part
                if len(body) > RESPONSE_BYTES:
                    raise Failure(502, "upstream_failed", f"The upstream's response exceeds {RESPONSE_BYTES} bytes.")
        return bytes(body)

    async def _read(self, timeout: "_ReadTimeout") -> bytes | None:
        """Return the bytes that have arrived, b"" at the end, None where none arrive within the timeout."""
        timeout.since = self._time()
        try:
            return await self._response.content.readany()
        except asyncio.CancelledError:
            if not timeout.has_expired():
                raise
            return None
        except aiohttp.ClientError as error:
            raise self._broken_off(error) from None
        finally:
            timeout.since = None

    def _broken_off(self, error: Exception) -> Failure:
        self._upstream.log_error(error)
        return Failure(502, "upstream_closed", BROKE_OFF)

    def _deadline_exceeded(self) -> Failure:
        detail = f"The generation took longer than the limit of {self._upstream.max_seconds:g} s."
        return Failure(504, "generation_timeout", detail)


class _ReadTimeout:
    """A timeout for each of many reads of one task, with one timer for all of them.

    It works like `asyncio.timeout`, which would set and cancel a timer for each read. The task sets `since` to the
    time at which a read begins, and to None after it; a read must not lose data when it is cancelled.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.since: float | None = None
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._cancelling = 0
        """Cancellations of the task by others, when its timeout cancelled it; -1 where it has not."""

    def __enter__(self) -> "_ReadTimeout":
        self._cancelling = -1
        self._timer = self._loop.call_later(self.seconds, self._check)
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        due = self.seconds if self.since is None else self.since + self.seconds - self._loop.time()
        if due <= 0 and self._task is not None:
            due, self._cancelling = self.seconds, self._task.cancelling()
            self._task.cancel()
        self._timer = self._loop.call_later(due, self._check)

    def has_expired(self) -> bool:
        """Return whether this timeout has cancelled a read, and nothing else has; reset that."""
        cancelling, self._cancelling = self._cancelling, -1
        return self._task is not None and cancelling >= 0 and self._task.uncancel() <= cancelling


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"status {status}"


def _coding(response: aiohttp.ClientResponse) -> str:
    """Return the content coding of a response; empty where it has none."""
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    return "" if coding == "identity" else coding


def read_retry_after(value: str) -> str:
    """Return a valid `Retry-After` (seconds in digits, or an HTTP date), or an empty text.

    Source: RFC 9110 section 10.2.3.
    """
    if re.fullmatch("[0-9]{1,9}", value):
        return value
    if re.fullmatch("[A-Za-z0-9,: -]{1,40}", value):
        try:
            parsedate_to_datetime(value)
        except ValueError:
            return ""
        return value
    return ""
