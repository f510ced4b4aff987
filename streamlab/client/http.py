"""Requests to a server: JSON, streams, and what is reported where one fails."""

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import aiohttp
from yarl import URL

from streamlab.problems import MEDIA_TYPE as PROBLEM
from streamlab.sse import MEDIA_TYPE

MAX_RETRY_AFTER_SECONDS = 3600.0
"""The longest pause that `Retry-After` is granted."""

CONNECT_SECONDS = 15.0
"""What a connection may take to come about, with its DNS and its TLS."""

SILENCE_SECONDS = 45.0
"""Without a byte for so long, a connection is lost: servers send a comment every 15 s at the latest."""

MAX_REDIRECTS = 5

_TRANSIENT = {429, 502, 503, 504}

_UNSENDABLE = re.compile("[\0-\x08\x0a-\x1f\x7f\ud800-\udfff]")
"""What no header can carry: aiohttp refuses control characters, and UTF-8 has no surrogates."""


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
