"""An OpenAI-compatible server that is asked: whole events of its answer, or a failure that says which."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
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

_PASSED_ON = frozenset({400, 404, 408, 409, 413, 415, 422, 429, 503})
"""Refusals that are about the request, or about now; others are about this server and its upstream."""


class Upstream:
    """One server, asked at one address: redirects are not followed, nothing else is ever called.

    `key` is sent to it and told to nobody else. `socket` is the path of a unix socket that it listens on.
    """

    def __init__(self, url: str, *, key: str = "", socket: str = "", stall_seconds: float = 120.0) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._socket = socket
        self._stall_seconds = stall_seconds
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
            return aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout, cookie_jar=cookies)

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
    async def asked(self, path: str, body: bytes, *, events: bool = False) -> AsyncIterator[aiohttp.ClientResponse]:
        """POST to a path and lend the answer, a 200, to the block; leaving the block early ends the work there.

        With `events` it must be an event stream. A connection that fails before the answer begins is tried once more.
        Raises Failure for everything that is no answer.
        """
        try:
            async with asyncio.timeout(self._stall_seconds):
                response = await self._post(path, body)
        except TimeoutError as error:
            self._note(error)
            raise Failure(504, "upstream_timeout", "The upstream does not answer in time.") from None
        except aiohttp.ClientError as error:
            self._note(error)
            if self._socket:  # our own model's: its process has died, and who keeps it is about to notice
                raise Failure(503, "model_not_ready", STARTED_ANEW, headers={"Retry-After": "1"}) from None
            detail = "The upstream cannot be reached."
            raise Failure(502, "upstream_unreachable", detail, headers={"Retry-After": "2"}) from None
        try:
            if response.status != 200:
                raise await self._refusal(response)
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
            self._note(error)
            return await self._fresh.post(url, data=body, allow_redirects=False)

    def _note(self, error: Exception) -> None:
        log.warning("upstream: %s", self._without_key(f"{type(error).__name__}: {error}"))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    async def _refusal(self, response: aiohttp.ClientResponse) -> Failure:
        """What an answer other than 200 means to our client."""
        status = response.status
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                said = await response.content.read(REFUSAL_BYTES)
        except (aiohttp.ClientError, TimeoutError):
            said = b""
        reason = self._without_key(words(said)) or _phrase(status)
        if status not in _PASSED_ON:  # those others are for the client, and may say what is in its prompt
            log.warning("upstream: %d: %s", status, reason)
        if 300 <= status < 400:
            return Failure(502, "upstream_redirects", "The upstream redirects, which is not followed.")
        if status in (401, 403, 407):
            return Failure(502, "upstream_denies", "The upstream does not let this server in; its log says more.")
        if status not in _PASSED_ON:
            return Failure(502, "upstream_failed", f"The upstream failed with {status}.")
        headers = {name: response.headers[name] for name in ("Retry-After",) if name in response.headers}
        return Failure(status, "upstream_refused", reason, headers=headers)

    async def blocks(self, response: aiohttp.ClientResponse) -> AsyncGenerator[Block, None]:
        """Yield what comes of an event stream, whole events at a time, up to its `[DONE]`; in a silence an empty block.

        Raises Failure where it breaks off, stalls, sends an error or what is no event: what came before has been
        yielded then, but for what was not read yet when the connection was reset (aiohttp drops that).
        """
        frames, silence = Frames(), 0.0
        with _Patience(min(HEARTBEAT_SECONDS, self._stall_seconds)) as patience:
            while (part := await self._read(response, patience)) != b"":
                if part is None:
                    silence += patience.seconds
                    if silence >= self._stall_seconds:
                        raise Failure(504, "upstream_stalled", SILENT)
                    yield Block()
                    continue
                silence, block = 0.0, frames.feed(part)
                if block.raw:
                    yield block
                if block.error:
                    raise Failure(502, "upstream_failed", f"The upstream failed: {self._without_key(block.error)}.")
                if block.done:
                    return
        raise Failure(502, "upstream_closed", BROKE_OFF)

    async def _read(self, response: aiohttp.ClientResponse, patience: "_Patience") -> bytes | None:
        """Return what has come, b"" at the end, None where nothing comes for as long as patience lasts."""
        try:
            return await patience.wait(response.content.readany())
        except aiohttp.ClientError as error:
            self._note(error)
            raise Failure(502, "upstream_closed", BROKE_OFF) from None

    async def whole(self, response: aiohttp.ClientResponse) -> bytes:
        """Return an answer that is not streamed; raises Failure where it does not come whole."""
        body = bytearray()
        with _Patience(self._stall_seconds) as patience:
            while (part := await self._read(response, patience)) != b"":
                if part is None:
                    raise Failure(504, "upstream_stalled", SILENT)
                body += part
                if len(body) > WHOLE_BYTES:
                    raise Failure(502, "upstream_failed", f"The upstream's answer has more than {WHOLE_BYTES} bytes.")
        return bytes(body)


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
