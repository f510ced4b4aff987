"""Follow an event stream through reconnects."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass

import aiohttp
from yarl import URL

from streamlab.sse import MEDIA_TYPE

from .http import (
    _UNSENDABLE,
    CONNECT_SECONDS,
    MAX_REDIRECTS,
    SILENCE_SECONDS,
    Lost,
    Refused,
    _check,
    _read,
    _reason,
    _shown,
    target_of,
)
from .sse import Event, Parser

RETRY_SECONDS = 1.0
"""The pause before a reconnect while the server has not said another in `retry:`."""

MAX_RETRY_SECONDS = 60.0
"""The longest such pause, whatever the server and the number of failures say."""

FAREWELL_SECONDS = 0.5
"""What a server has after `event: end` to end its response, so that it counts a finished stream."""


@dataclass(frozen=True, slots=True)
class Pause:
    """What `follow` does between two connections; as a string, a line for people."""

    reason: str
    """Why the connection before is over, as `connection lost`."""
    seconds: float
    """How long it waits."""
    last_event_id: str
    """The id it will go on after."""

    def __str__(self) -> str:
        place = f" from id {self.last_event_id}" if self.last_event_id else ""
        return f"{self.reason}; again in {self.seconds:.1f} s{place}"


@dataclass(slots=True)
class _Place:
    """Where a stream is followed from, and how its connections went."""

    last_event_id: str
    retry_seconds: float = RETRY_SECONDS
    failures: int = 0
    """Connections in a row that brought not a byte of a stream."""
    over: bool = False

    def pause(self, retry_after: float | None) -> float:
        """Seconds until the next connection."""
        if retry_after is None:
            return backoff(self.failures, self.retry_seconds)
        if self.failures == 1:
            return retry_after
        # Who answers `Retry-After: 0` again and again is not asked without end and without a breath.
        return max(retry_after, backoff(self.failures, self.retry_seconds))


def backoff(failures: int, retry_seconds: float) -> float:
    """Seconds to wait after so many failed connections in a row: as the server says, then twice as long each time.

    0 failures are exactly `retry_seconds`; from 1 on it is a random value in the upper half of what may be waited, so
    that the clients of a server that fell do not come back as one. Never more than `MAX_RETRY_SECONDS`, otherwise
    never less than the server says (WHATWG HTML 9.2.3).
    """
    shortest = min(retry_seconds, MAX_RETRY_SECONDS)
    if not failures:
        return shortest
    longest = min(max(shortest, 0.1) * 2.0 ** min(failures, 16), MAX_RETRY_SECONDS)
    return random.uniform(max(shortest, longest / 2), longest)  # noqa: S311 - a spread, not a secret


async def follow(
    url: str,
    *,
    last_event_id: str = "",
    reconnect: bool = True,
    on_pause: Callable[[Pause], None] | None = None,
    silence_seconds: float = SILENCE_SECONDS,
) -> AsyncGenerator[Event, None]:
    """Every event of the stream at `url`, after the one called `last_event_id`, across as many connections as it takes.

    A `url` without a scheme gets `http://`. Ends when the stream is over: after `event: end`, or a 204. When a
    connection breaks, falls silent for `silence_seconds` or is ended by the server, or answers 429, 502, 503 or 504,
    `on_pause` is told, and after a pause (see `Pause`, `backoff`) the next one asks for what follows the last id. With
    `reconnect=False` there is one connection, and an end of any kind that is tidy is the end.

    Raises ValueError for a URL or an id that cannot be asked for, Refused for an answer that is no event stream and
    would be none the next time either, and Lost only where it is told not to reconnect. A loop that may leave early
    wraps it in `contextlib.aclosing`, so that the connection is closed at once.
    Source: WHATWG HTML 9.2.3 and 9.2.5; RFC 9110 section 10.2.3.
    """
    target = target_of(url)
    if _UNSENDABLE.search(last_event_id):
        raise ValueError(f"{last_event_id!r} cannot be an id: it has characters that no header can carry")
    place = _Place(last_event_id)
    async with aiohttp.ClientSession(
        # A connection serves one stream, and none is left over that the server may have closed meanwhile.
        connector=aiohttp.TCPConnector(force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=silence_seconds),
    ) as session:
        while True:
            retry_after = None
            try:
                async with aclosing(_connection(session, target, place)) as events:
                    async for event in events:
                        yield event
                reason = "stream ended"
            except Lost as lost:
                if not reconnect:
                    raise
                reason = lost.reason
            except Refused as refused:
                if not reconnect or not refused.transient:
                    raise
                reason, retry_after = refused.what, refused.retry_after
            if place.over or not reconnect:
                return
            pause = Pause(reason, place.pause(retry_after), place.last_event_id)
            if on_pause is not None:
                on_pause(pause)
            await asyncio.sleep(pause.seconds)


async def _connection(session: aiohttp.ClientSession, target: URL, place: _Place) -> AsyncGenerator[Event, None]:
    """The events of one connection; keeps `place` up to date, and marks it when the stream is over."""
    place.failures += 1
    response = await _ask(session, target, place)
    try:
        if response.status == 204:
            place.over = True
            return
        await _check(response)
        parser = Parser(place.last_event_id)
        while chunk := await _read(response):
            place.failures = 0
            try:
                events = parser.feed(chunk)
            except ValueError as error:
                raise Refused(response.url, f"sent {error}") from None
            place.last_event_id = parser.last_event_id
            if parser.retry is not None:
                place.retry_seconds = min(parser.retry / 1000, MAX_RETRY_SECONDS)
            for event in events:
                yield event
                if event.event == "end":
                    place.over = True
                    with suppress(Lost, TimeoutError):
                        async with asyncio.timeout(FAREWELL_SECONDS):
                            while await _read(response):
                                pass
                    return
    finally:
        response.close()


async def _ask(session: aiohttp.ClientSession, target: URL, place: _Place) -> aiohttp.ClientResponse:
    # Nothing is won by compression here, and a proxy that compresses may hold an event back.
    headers = {"Accept": MEDIA_TYPE, "Accept-Encoding": "identity", "Cache-Control": "no-cache"}
    if place.last_event_id:
        if _UNSENDABLE.search(place.last_event_id):
            raise Refused(target, f"sent the id {place.last_event_id!r}, which no header can carry back")
        headers["Last-Event-ID"] = place.last_event_id
    try:
        # aiohttp counts the redirect that is too many.
        return await session.get(target, headers=headers, max_redirects=MAX_REDIRECTS + 1)
    except aiohttp.TooManyRedirects:
        raise Refused(target, f"redirects more than {MAX_REDIRECTS} times") from None
    except aiohttp.RedirectClientError as error:
        raise Refused(target, f"redirects to what is no URL of http or https: {error}") from None
    except aiohttp.ClientConnectorCertificateError as error:
        raise Refused(target, f"has a certificate that will not do: {error.certificate_error}") from None
    except aiohttp.InvalidURL as error:
        raise ValueError(f"{_shown(target)} is no URL of http or https: {error}") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Lost(target, f"cannot connect: {_reason(error)}") from error
