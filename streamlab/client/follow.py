"""Follow an event stream across reconnects."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass

import aiohttp
from yarl import URL

from streamlab.sse import MEDIA_TYPE

from .credentials import authorization_header
from .http import (
    CONNECT_SECONDS,
    MAX_REDIRECTS,
    READ_SECONDS,
    UNSENDABLE,
    ConnectionLost,
    RequestRejected,
    connect_error,
    display_url,
    parse_url,
    read_chunk,
    require_event_stream,
)
from .sse import Event, Parser

RETRY_SECONDS = 1.0
"""Pause before a reconnect until the server has sent a `retry:`, in seconds."""

MAX_RETRY_SECONDS = 60.0
"""Longest pause before a reconnect, in seconds, whatever the server and the number of failures."""

CLOSE_SECONDS = 2.0
"""Timeout for the server to end its response after `event: end`, in seconds, so that it counts a finished stream."""


@dataclass(frozen=True, slots=True)
class Pause:
    """The pause of `follow` between two connections; as a string, one line to show."""

    reason: str
    """Why the previous connection ended, for example `connection lost`."""
    seconds: float
    """Length of the pause, in seconds."""
    last_event_id: str
    """The id that the next connection resumes after."""

    def __str__(self) -> str:
        position = f" after id {self.last_event_id}" if self.last_event_id else ""
        return f"{self.reason}; retrying in {self.seconds:.1f} s{position}"


@dataclass(slots=True)
class _Cursor:
    """The position in the stream that is followed, and the state of its connections."""

    last_event_id: str
    retry_seconds: float = RETRY_SECONDS
    failures: int = 0
    """Consecutive connections without a byte of the stream."""
    ended: bool = False

    def pause(self, failure: ConnectionLost | RequestRejected | None) -> Pause:
        """Return the pause before the next connection; the last one failed, or ended regularly (None)."""
        reason = failure.reason if failure else "stream ended"
        seconds = backoff(self.failures, self.retry_seconds)
        if isinstance(failure, RequestRejected) and failure.retry_after is not None:
            # A server that repeats `Retry-After: 0` must not be requested in a tight loop.
            seconds = failure.retry_after if self.failures == 1 else max(failure.retry_after, seconds)
        return Pause(reason, seconds, self.last_event_id)


def backoff(failures: int, retry_seconds: float) -> float:
    """Return the seconds to wait after a number of consecutive failures: exponential, with jitter.

    0 failures are exactly `retry_seconds`; from 1 on it is a random value in the upper half of the interval, so that
    the clients of a server that crashed do not reconnect at once. Never more than `MAX_RETRY_SECONDS`, otherwise
    never less than the server says (WHATWG HTML 9.2.3).
    """
    shortest = min(retry_seconds, MAX_RETRY_SECONDS)
    if not failures:
        return shortest
    longest = min(max(shortest, 0.1) * 2.0 ** min(failures, 16), MAX_RETRY_SECONDS)
    return random.uniform(max(shortest, longest / 2), longest)  # noqa: S311 - jitter, not a secret


async def follow(
    url: str,
    *,
    last_event_id: str = "",
    reconnect: bool = True,
    on_pause: Callable[[Pause], None] | None = None,
    read_seconds: float = READ_SECONDS,
) -> AsyncGenerator[Event, None]:
    """Yield every event of the stream at `url` after `last_event_id`, across any number of connections.

    A `url` without a scheme gets `http://`. Ends when the stream is over: after `event: end`, or a 204. When a
    connection breaks, sends nothing for `read_seconds`, is ended by the server, or returns 429, 502, 503 or 504,
    `on_pause` is called, and after a pause (see `Pause`, `backoff`) the next one resumes after the last id. With
    `reconnect=False` there is one connection, and its regular end is the end.

    Raises ValueError for an invalid URL or id, RequestRejected for a response that is not an event stream and that a
    retry would not change, and ConnectionLost only with `reconnect=False`. A loop that may leave early wraps the
    generator in `contextlib.aclosing`, so that the connection is closed at once.
    Source: WHATWG HTML 9.2.3 and 9.2.5; RFC 9110 section 10.2.3.
    """
    target = parse_url(url)
    if UNSENDABLE.search(last_event_id):
        raise ValueError(f"invalid event id {last_event_id!r}: it contains characters that no header can carry")
    cursor = _Cursor(last_event_id)
    async with _session(read_seconds) as session:
        while True:
            failure = None
            try:
                async with aclosing(_read_connection(session, target, cursor)) as events:
                    async for event in events:
                        yield event
            except (ConnectionLost, RequestRejected) as error:
                if not reconnect or not error.is_transient:
                    raise
                failure = error
            if cursor.ended or not reconnect:
                return
            pause = cursor.pause(failure)
            if on_pause is not None:
                on_pause(pause)
            await asyncio.sleep(pause.seconds)


def _session(read_seconds: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        # Each connection serves one stream: no connection is reused that the server may have closed meanwhile.
        connector=aiohttp.TCPConnector(force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=read_seconds),
    )


async def _read_connection(session: aiohttp.ClientSession, target: URL, cursor: _Cursor) -> AsyncGenerator[Event, None]:
    """Yield the events of one connection; update `cursor`, and mark it when the stream has ended."""
    cursor.failures += 1
    response = await _connect(session, target, cursor)
    try:
        if response.status == 204:
            cursor.ended = True
            return
        await require_event_stream(response)
        parser = Parser(cursor.last_event_id)
        while chunk := await read_chunk(response):
            cursor.failures = 0
            try:
                events = parser.feed(chunk)
            except ValueError as error:
                raise RequestRejected(response.url, f"sent {error}") from None
            cursor.last_event_id = parser.last_event_id
            if parser.retry is not None:
                cursor.retry_seconds = min(parser.retry / 1000, MAX_RETRY_SECONDS)
            for event in events:
                yield event
                if event.event == "end":
                    cursor.ended = True
                    with suppress(ConnectionLost, TimeoutError):
                        async with asyncio.timeout(CLOSE_SECONDS):
                            while await read_chunk(response):
                                pass
                    return
    finally:
        response.close()


async def _connect(session: aiohttp.ClientSession, target: URL, cursor: _Cursor) -> aiohttp.ClientResponse:
    # Compression gains nothing here, and a proxy that compresses may buffer events.
    headers = {"Accept": MEDIA_TYPE, "Accept-Encoding": "identity", "Cache-Control": "no-cache"}
    headers |= authorization_header(target)
    if cursor.last_event_id:
        if UNSENDABLE.search(cursor.last_event_id):
            raise RequestRejected(target, f"sent the event id {cursor.last_event_id!r}, which no header can carry")
        headers["Last-Event-ID"] = cursor.last_event_id
    try:
        # aiohttp counts the redirect that exceeds the limit.
        return await session.get(target, headers=headers, max_redirects=MAX_REDIRECTS + 1)
    except aiohttp.TooManyRedirects:
        raise RequestRejected(target, f"redirects more than {MAX_REDIRECTS} times") from None
    except aiohttp.RedirectClientError as error:
        raise RequestRejected(target, f"redirects to a URL that is not http(s): {error}") from None
    except aiohttp.ClientConnectorCertificateError as error:
        raise RequestRejected(target, f"has an invalid TLS certificate: {error.certificate_error}") from None
    except aiohttp.InvalidURL as error:
        raise ValueError(f"{display_url(target)!r} is not an http(s) URL: {error}") from None
    except (aiohttp.ClientError, OSError) as error:
        raise ConnectionLost(target, f"cannot connect: {connect_error(error)}") from error
