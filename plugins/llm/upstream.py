"""An OpenAI-compatible server that is asked: whole events of its answer, or a failure that says which."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import aiohttp

from .openai import Block, Failure, Frames, words

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
"""What a connection may take to come about."""

HEARTBEAT_SECONDS = 10.0
"""How long an upstream may be silent before its reader hears that, to tell its own client."""

WHOLE_BYTES = 16 * 1024 * 1024
"""What an answer that is not streamed may have."""

REFUSAL_BYTES = 64 * 1024
"""What is read of a refusal."""

SILENT = "The upstream has fallen silent."
BROKE_OFF = "The upstream broke off before the end of its answer."
STARTED_ANEW = "The model is being started anew."

REFUSED = "upstream_refused"

_TROUBLE = frozenset(
    f"upstream_{word}" for word in ("unreachable", "timeout", "redirects", "denies", "failed", "stalled", "closed")
)

_PASSED_ON = frozenset({400, 404, 408, 409, 413, 415, 422, 429, 503})
"""Refusals that are about the request, or about now; others are about this server and its upstream."""


class Upstream:
    """One server, asked at one address: redirects are not followed, nothing else is ever called.

    `key` is sent to it and told to nobody else. `socket` is the path of a unix socket that it listens on.
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
        """Why the last request failed, where the upstream is at fault; without its words, which may repeat a prompt."""
        self._kept: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold the connections to it."""
        # What comes is watched by `_Patience`: a timer of aiohttp's own would be set anew for every token.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"

        def session(connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
            cookies = aiohttp.DummyCookieJar()
            return aiohttp.ClientSession(
                connector=connector, headers=headers, timeout=timeout, cookie_jar=cookies, auto_decompress=False
            )

        if self._socket:  # of this machine: a connection costs nothing
            async with session(aiohttp.UnixConnector(self._socket, limit=0, force_close=True)) as self._fresh:
                self._kept = self._fresh
                yield
        else:
            async with (
                session(aiohttp.TCPConnector(limit=0)) as self._kept,
                session(aiohttp.TCPConnector(limit=0, force_close=True)) as self._fresh,
            ):
                yield

    @asynccontextmanager
    async def asked(self, path: str, body: bytes, *, events: bool = False) -> "AsyncIterator[Reply]":
        """POST to a path and yield the response, a 200; leaving the block early stops the work of the upstream.

        With `events` it must be an event stream. A connection that fails before the response begins is retried once.
        Raises Failure for everything else, also for a response with a content coding: none was accepted, and decoding
        one would let a small body occupy this server (RFC 9110, 12.5.3).
        """
        deadline = asyncio.get_running_loop().time() + self.max_seconds
        try:
            async with self._begun(path, body, events=events) as response:
                self.trouble = None
                yield Reply(self, response, deadline)
        except Failure as failure:
            if failure.code in _TROUBLE or (failure.code == REFUSED and failure.status in (404, 503)):
                status = f" with {failure.status}" if failure.code == REFUSED else ""
                self.trouble = f"The last request to the upstream failed: {failure.code}{status}."
            raise

    @asynccontextmanager
    async def _begun(self, path: str, body: bytes, *, events: bool) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with asyncio.timeout(min(self.stall_seconds, self.max_seconds)):
                response = await self._post(path, body)
        except TimeoutError as error:
            self.note(error)
            raise Failure(504, "upstream_timeout", "The upstream does not answer in time.") from None
        except aiohttp.ClientError as error:
            self.note(error)
            if self._socket:  # our own model's: its process has died, and who keeps it is about to notice
                raise Failure(503, "model_not_ready", STARTED_ANEW, headers={"Retry-After": "1"}) from None
            detail = "The upstream cannot be reached."
            raise Failure(502, "upstream_unreachable", detail, headers={"Retry-After": "2"}) from None
        try:
            if response.status != 200:
                raise await self._refusal(response)
            if coding := _coding(response):
                log.warning("upstream: a response with Content-Encoding %r, though identity was requested", coding)
                detail = "The upstream's response has a content coding, though none was accepted."
                raise Failure(502, "upstream_failed", detail)
            if events and response.content_type != "text/event-stream":
                raise Failure(502, "upstream_failed", "The upstream does not answer with an event stream.")
            yield response
        finally:
            response.close()  # never released: only a closed connection ends the work at the other end

    async def _post(self, path: str, body: bytes) -> aiohttp.ClientResponse:
        """Ask on a connection that is kept, if there is one; on a fresh one where that turns out to be closed."""
        assert self._kept is not None
        assert self._fresh is not None
        url = f"{self._url}{path}"
        try:
            return await self._kept.post(url, data=body, allow_redirects=False)
        except aiohttp.ClientConnectionError as error:
            if isinstance(error, TimeoutError):
                raise
            self.note(error)
            return await self._fresh.post(url, data=body, allow_redirects=False)

    def note(self, error: Exception) -> None:
        """Log a failure of the connection."""
        log.warning("upstream: %s", self.without_key(f"{type(error).__name__}: {error}"))

    def without_key(self, text: str) -> str:
        """Return a text of the upstream without the key that it may repeat."""
        return text.replace(self._key, "***") if self._key else text

    async def _refusal(self, response: aiohttp.ClientResponse) -> Failure:
        """Return what a response other than 200 means to our client."""
        status, said = response.status, b""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                said = b"" if _coding(response) else await response.content.read(REFUSAL_BYTES)
        except (aiohttp.ClientError, TimeoutError):
            pass
        reason = self.without_key(words(said)) or _phrase(status)
        # The words of a passed-on error are for the client, and may repeat its prompt; those of a 404 are about the
        # address and the model, which the operator has configured.
        log.warning("upstream: %d%s", status, "" if status in _PASSED_ON - {404} else f": {reason}")
        if 300 <= status < 400:
            return Failure(502, "upstream_redirects", "The upstream redirects, which is not followed.")
        if status in (401, 403, 407):
            return Failure(502, "upstream_denies", "The upstream does not let this server in; its log says more.")
        if status not in _PASSED_ON:
            return Failure(502, "upstream_failed", f"The upstream failed with {status}.")
        retry_after = read_retry_after(response.headers.get("Retry-After", ""))
        headers = {"Retry-After": retry_after} if retry_after else {}
        return Failure(status, REFUSED, reason, headers=headers)


class Reply:
    """A response of an upstream that has begun, with the moment (of the event loop) by which it must be complete."""

    def __init__(self, upstream: Upstream, response: aiohttp.ClientResponse, deadline: float) -> None:
        self._upstream = upstream
        self._response = response
        self._deadline = deadline
        self._time = asyncio.get_running_loop().time

    async def blocks(self) -> AsyncGenerator[Block, None]:
        """Yield whole events of an event stream as they arrive, up to its `[DONE]`; an empty block during silence.

        Silence is time without an event that has data: comments do not end it. Raises Failure where the stream breaks
        off, stalls, takes longer than the deadline, sends an error or something that is not an event: what came before
        has been yielded then, except what was not read yet when the connection was reset (aiohttp drops that).
        """
        upstream, frames, silence = self._upstream, Frames(), 0.0
        with _Patience(min(HEARTBEAT_SECONDS, upstream.stall_seconds, upstream.max_seconds)) as patience:
            while True:
                begun = self._time()
                part = await self._read(patience)
                now = self._time()
                silence += now - begun  # the time that our own client takes is not the upstream's
                block = Block() if part is None else frames.feed(part)
                if block.chunks or block.done:
                    silence = 0.0
                if part is None or block.raw:
                    yield block
                if block.error:
                    detail = f"The upstream failed: {upstream.without_key(block.error)}."
                    raise Failure(502, "upstream_failed", detail)
                if block.done:
                    return
                if part == b"":
                    raise Failure(502, "upstream_closed", BROKE_OFF)
                if now >= self._deadline:
                    raise self._too_long()
                if silence >= upstream.stall_seconds:
                    raise Failure(504, "upstream_stalled", SILENT)

    async def whole(self) -> bytes:
        """Return a response that is not streamed; raises Failure where it does not arrive complete and in time."""
        upstream, body = self._upstream, bytearray()
        with _Patience(min(upstream.stall_seconds, upstream.max_seconds)) as patience:
            while (part := await self._read(patience)) != b"":
                if self._time() >= self._deadline:
                    raise self._too_long()
                if part is None:
                    raise Failure(504, "upstream_stalled", SILENT)
                body += part
                if len(body) > WHOLE_BYTES:
                    raise Failure(502, "upstream_failed", f"The upstream's answer has more than {WHOLE_BYTES} bytes.")
        return bytes(body)

    async def _read(self, patience: "_Patience") -> bytes | None:
        """Return what has arrived, b"" at the end, None where nothing arrives for as long as patience lasts."""
        try:
            return await patience.wait(self._response.content.readany())
        except aiohttp.ClientError as error:
            self._upstream.note(error)
            raise Failure(502, "upstream_closed", BROKE_OFF) from None

    def _too_long(self) -> Failure:
        detail = f"The generation took longer than {self._upstream.max_seconds:g} s, the limit of this server."
        return Failure(504, "generation_timeout", detail)


class _Patience:
    """Lets a task wait many times, each time for so many seconds at most, with one timer for all of them.

    It works as `asyncio.timeout` does, which would set and cancel a timer for each. All waits are of one task.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._since: float | None = None
        self._lost = False

    def __enter__(self) -> "_Patience":
        self._timer = self._loop.call_later(self.seconds, self._look)
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        due = self.seconds if self._since is None else self._since + self.seconds - self._loop.time()
        if due <= 0 and self._task is not None:
            self._lost, due = True, self.seconds
            self._task.cancel()
        self._timer = self._loop.call_later(due, self._look)

    async def wait(self, reading: Coroutine[None, None, bytes]) -> bytes | None:
        """Return what is read, or None where patience is lost; reading must not lose anything by being cancelled."""
        assert self._task is not None
        self._since, cancelling = self._loop.time(), self._task.cancelling()
        try:
            return await reading
        except asyncio.CancelledError:
            if self._lost and self._task.uncancel() <= cancelling:
                return None
            raise
        finally:
            self._since, self._lost = None, False


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
    """Return a `Retry-After` that can be passed on, or an empty text: seconds in digits, or an HTTP date.

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
