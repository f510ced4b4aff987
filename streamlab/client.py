"""A server as a client asks it: answers and refusals, and event streams parsed and followed across reconnects."""

import asyncio
import json
import os
import random
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import aiohttp
from yarl import URL

from .problems import MEDIA_TYPE as PROBLEM
from .sse import MEDIA_TYPE

MAX_BYTES = 16 * 1024 * 1024
"""What a line, and what the data of an event, may hold."""

RETRY_SECONDS = 1.0
"""The pause before a reconnect while the server has not said another in `retry:`."""

MAX_RETRY_SECONDS = 60.0
"""The longest such pause, whatever the server and the number of failures say."""

MAX_RETRY_AFTER_SECONDS = 3600.0
"""The longest pause that `Retry-After` is granted."""

CONNECT_SECONDS = 15.0
"""What a connection may take to come about, with its DNS and its TLS."""

SILENCE_SECONDS = 45.0
"""Without a byte for so long, a connection is lost: servers send a comment every 15 s at the latest."""

FAREWELL_SECONDS = 0.5
"""What a server has after `event: end` to end its response, so that it counts a finished stream."""

MAX_REDIRECTS = 5

_TRANSIENT = {429, 502, 503, 504}

_UNSENDABLE = re.compile("[\0-\x08\x0a-\x1f\x7f\ud800-\udfff]")
"""What no header can carry: aiohttp refuses control characters, and UTF-8 has no surrogates."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream."""

    event: str
    """Its name; `message` where it has none."""
    data: str
    """Its data lines, joined by LF."""
    id: str
    """The last id so far, its own or that of an event before: with it, the next request goes on after this event."""
    retry: int | None
    """The milliseconds of `retry:`, where it stands in this event."""


class Parser:
    """Turns the bytes of an event stream into events, however the network cut them (WHATWG HTML 9.2.6).

    One parser reads one response. `last_event_id` is the id to reconnect with, `retry` the milliseconds to wait
    before that, None until the stream says them. An event without its blank line never becomes one.

    Lines are told apart before they are decoded, since no byte of a longer UTF-8 character is CR or LF: so no
    character is ever cut, and invalid bytes become U+FFFD as if the stream were decoded whole.
    """

    def __init__(self, last_event_id: str = "", *, max_bytes: int = MAX_BYTES) -> None:
        self.last_event_id = last_event_id
        self.retry: int | None = None
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._at_start = True
        self._after_cr = False
        self._event = ""
        self._data = bytearray()
        # The standard begins each response with an empty id; an event without one would then make a client that has
        # reconnected forget its place. Browsers begin with the last id, and so does this.
        self._id = last_event_id
        self._event_retry: int | None = None

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that are whole with these bytes, in order.

        Raises ValueError when a line, or the data of an event, has more than `max_bytes` (default 16 MiB); the
        parser is of no more use then.
        """
        if self._after_cr and chunk:  # a CR ends its line at once, without waiting for the LF that may follow
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr |= chunk.endswith(b"\r")
        events = []
        for part in chunk.splitlines(keepends=True):  # of bytes: at CR, LF and CRLF, and at nothing else
            content = part.rstrip(b"\r\n")
            if len(self._line) + len(content) > self._max_bytes:
                raise ValueError(f"a line of more than {self._max_bytes} bytes")
            if len(content) == len(part):
                self._line += content
                continue
            if self._line:
                content = bytes(self._line + content)
                self._line.clear()
            event = self._take(content)
            if event is not None:
                events.append(event)
        return events

    def _take(self, line: bytes) -> Event | None:
        if self._at_start:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")  # of a comment, the name is empty
        value = value.removeprefix(b" ")
        if name == b"data":
            if len(self._data) + len(value) > self._max_bytes:
                raise ValueError(f"an event of more than {self._max_bytes} bytes")
            self._data += value
            self._data += b"\n"
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit():
            # Python converts no more than 4300 digits; nobody waits longer than 18 of them.
            digits = value.lstrip(b"0")
            self.retry = self._event_retry = int(digits or b"0") if len(digits) <= 18 else 10**18
        return None

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        event = None
        if self._data:
            data = self._data[:-1].decode("utf-8", "replace")
            event = Event(self._event or "message", data, self._id, self._event_retry)
        self._event = ""
        self._data.clear()
        self._event_retry = None
        return event


class Refused(Exception):
    """An answer that is no event stream, and says so at once: a status, another content type, too many redirects."""

    def __init__(self, url: URL, what: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(f"{_shown(url)} {what}")
        self.what = what
        """What the server did, as the rest of a sentence that begins with its URL: `answered 422: ...`."""
        self.status = status
        """The status of the answer, where that is what refuses."""
        self.retry_after = retry_after
        """Seconds the server wants to be left alone, where it says so."""

    @property
    def transient(self) -> bool:
        """Whether the same request may be granted a little later: 429, 502, 503 and 504 say so."""
        return self.status in _TRANSIENT


class Lost(ConnectionError):
    """A connection that did not come about, or broke; another one may do."""

    def __init__(self, url: URL, reason: str) -> None:
        super().__init__(f"{_shown(url)}: {reason}")
        self.reason = reason


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


def retry_after_seconds(value: str | None) -> float | None:
    """The seconds that a `Retry-After` asks for (RFC 9110 section 10.2.3: a number or a date); None for no such value.

    A date that is past is 0; nothing is more than `MAX_RETRY_AFTER_SECONDS`.
    """
    value = (value or "").strip()
    if value.isascii() and value.isdigit():
        seconds = float(value)  # unlike int, takes any number of digits
    else:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


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


async def ask(
    method: str,
    url: str,
    document: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    seconds: float = CONNECT_SECONDS,
) -> Any:
    """Send a request, with a JSON document if there is one, and return the JSON document that answers it.

    Raises ValueError for what is no URL, Refused for an answer without success or without JSON, Lost where there is
    none within `seconds`.
    """
    timeout = aiohttp.ClientTimeout(total=seconds, connect=CONNECT_SECONDS)
    async with answered(method, url, document, headers=headers, timeout=timeout) as response:
        try:
            return await response.json()
        except (aiohttp.ContentTypeError, json.JSONDecodeError):
            raise Refused(response.url, "answered with something other than JSON") from None


@asynccontextmanager
async def answered(
    method: str,
    url: str,
    document: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: aiohttp.ClientTimeout | None = None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The successful answer to a request, its body still to be read in the block, as it comes.

    Without a `timeout` the body may take as long as it likes, with silences of SILENCE_SECONDS at most. Raises
    ValueError for what is no URL, Refused for an answer without success, and Lost where there is none, or where the
    block reads a body that breaks off.
    """
    target = target_of(url)
    timeout = timeout or aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True), timeout=timeout, read_bufsize=1024 * 1024
    ) as session:
        try:
            response = await session.request(method, target, json=document, headers=headers)
        except aiohttp.InvalidURL as error:
            raise ValueError(f"{_shown(target)} is no URL of http or https: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(target, f"cannot connect: {_reason(error)}") from error
        try:
            if not response.ok:
                raise await _refused(response)
            yield response
        except (aiohttp.ClientError, TimeoutError) as error:  # other errors of the block are its own
            raise Lost(target, "connection lost") from error
        finally:
            response.close()


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


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The next bytes of the body, none at its end; raises Lost where it does not come to its end."""
    try:
        return await response.content.readany()
    except TimeoutError as error:
        raise Lost(response.url, "connection silent for too long") from error
    except (aiohttp.ClientError, OSError) as error:
        raise Lost(response.url, "connection lost") from error


async def _check(response: aiohttp.ClientResponse) -> None:
    """Raise Refused unless this is an event stream."""
    if response.status != 200:
        raise await _refused(response)
    if response.content_type.lower() != MEDIA_TYPE:
        what = response.headers.get("Content-Type") or "no content type"
        raise Refused(response.url, f"answered with {what}, not with an event stream ({MEDIA_TYPE})")


async def _refused(response: aiohttp.ClientResponse) -> Refused:
    return Refused(
        response.url,
        f"answered {response.status}: {await _detail(response)}",
        status=response.status,
        retry_after=retry_after_seconds(response.headers.get("Retry-After")),
    )


async def _detail(response: aiohttp.ClientResponse) -> str:
    """What an answer says about itself: the detail of its problem document (RFC 9457), or its reason phrase."""
    try:
        phrase = response.reason or HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "no reason given"
    if response.content_type.lower() != PROBLEM:
        return phrase
    body = bytearray()
    with suppress(Lost, TimeoutError):
        async with asyncio.timeout(CONNECT_SECONDS):
            while chunk := await _read(response):
                body += chunk
                if len(body) > 64 * 1024:
                    return phrase
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return phrase
    members = problem if isinstance(problem, dict) else {}
    said = [text for text in (members.get("detail"), members.get("title")) if isinstance(text, str) and text]
    listed = members.get("errors")
    faults = [
        f"{fault['name']}: {fault['detail']}"
        for fault in (listed if isinstance(listed, list) else ())
        if isinstance(fault, dict) and {"name", "detail"} <= fault.keys()
    ]
    return " - ".join([*(said[:1] or [phrase]), *filter(None, ["; ".join(faults)])])


def target_of(url: str) -> URL:
    """The URL that is meant; raises ValueError where none can be."""
    given = url if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) else f"http://{url}"
    try:
        target = URL(given)
        if target.scheme in ("http", "https") and target.host:
            return target
    except ValueError:
        pass
    raise ValueError(f"{url!r} is no URL of http or https")


def _shown(url: URL) -> str:
    """A URL for people to read: without the password it may hold."""
    return str(url.with_user(None) if url.user or url.password else url)


def _reason(error: Exception) -> str:
    """Why there is no connection, in the system's words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, OSError) and error.strerror:
        # asyncio puts the address into its text; a name that is not found has numbers of its own.
        return os.strerror(error.errno) if error.errno and not isinstance(error, socket.gaierror) else error.strerror
    return str(error) or type(error).__name__
