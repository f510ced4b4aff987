"""HTTP requests of the clients: JSON, streamed bodies, and the errors that they raise."""

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

from .credentials import authorization_header

MAX_RETRY_AFTER_SECONDS = 3600.0
"""Longest pause that a `Retry-After` can request, in seconds."""

CONNECT_SECONDS = 15.0
"""Timeout of a connection attempt, in seconds, with DNS and TLS."""

READ_SECONDS = 45.0
"""Timeout of each read, in seconds; servers send a comment every 15 s at the latest."""

MAX_REDIRECTS = 5
"""Maximum number of redirects of one request."""

MAX_PROBLEM_BYTES = 64 * 1024
"""Maximum size of an error response that is read for its reason, in bytes."""

UNSENDABLE = re.compile("[\0-\x08\x0a-\x1f\x7f\ud800-\udfff]")
"""Characters that no header can carry: aiohttp rejects control characters, and UTF-8 has no surrogates."""

_TRANSIENT = {429, 502, 503, 504}


class RequestRejected(Exception):
    """The response is an error: a status other than 2xx, a wrong content type, too many redirects."""

    def __init__(self, url: URL, reason: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(f"{display_url(url)} {reason}")
        self.reason = reason
        """What the server did, as the rest of a sentence that begins with its URL: `returned 422: ...`."""
        self.status = status
        """The status of an error response; None for any other reason."""
        self.retry_after = retry_after
        """Seconds to wait before a retry, where the server says so."""

    @property
    def is_transient(self) -> bool:
        """Whether a retry may succeed: the status is 429, 502, 503 or 504."""
        return self.status in _TRANSIENT


class ConnectionLost(ConnectionError):
    """The connection failed or broke; a new one may succeed."""

    is_transient = True
    """Whether a retry may succeed."""

    def __init__(self, url: URL, reason: str) -> None:
        super().__init__(f"{display_url(url)}: {reason}")
        self.reason = reason
        """What failed, without the URL."""


def retry_after_seconds(value: str | None) -> float | None:
    """Return the seconds of a `Retry-After` (RFC 9110 section 10.2.3: a number or a date); None if it is not valid.

    A date in the past is 0; the maximum is `MAX_RETRY_AFTER_SECONDS`.
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


async def request_json(
    method: str,
    url: str,
    document: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: float = CONNECT_SECONDS,
) -> Any:
    """Send a request, with a JSON document if there is one, and return the JSON document of the response.

    Raises ValueError for an invalid URL, RequestRejected for an error response or one without JSON, ConnectionLost
    where there is no response within `timeout` seconds.
    """
    limits = aiohttp.ClientTimeout(total=timeout, connect=CONNECT_SECONDS)
    async with stream_response(method, url, document, headers=headers, timeout=limits) as response:
        try:
            return await response.json()
        except (aiohttp.ContentTypeError, json.JSONDecodeError):
            raise RequestRejected(response.url, "returned something other than JSON") from None


@asynccontextmanager
async def stream_response(
    method: str,
    url: str,
    document: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: aiohttp.ClientTimeout | None = None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Yield the successful response to a request; the block reads its body as it arrives.

    Without a `timeout` the body may take any time, with READ_SECONDS for each read. Raises ValueError for an invalid
    URL, RequestRejected for an error response, and ConnectionLost where there is no response, or the block reads a
    body that breaks off.
    """
    target = parse_url(url)
    timeout = timeout or aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True), timeout=timeout, read_bufsize=1024 * 1024
    ) as session:
        try:
            response = await session.request(
                method, target, json=document, headers={**authorization_header(target), **(headers or {})}
            )
        except aiohttp.InvalidURL as error:
            raise ValueError(f"{display_url(target)!r} is not an http(s) URL: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(target, f"cannot connect: {connect_error(error)}") from error
        try:
            if not response.ok:
                raise await _rejection(response)
            yield response
        except (aiohttp.ClientError, TimeoutError) as error:  # other errors of the block are its own
            raise ConnectionLost(target, "connection lost") from error
        finally:
            response.close()


async def read_chunk(response: aiohttp.ClientResponse) -> bytes:
    """Return the next bytes of the body, `b""` at its end; raises ConnectionLost where it breaks off."""
    try:
        return await response.content.readany()
    except TimeoutError as error:
        raise ConnectionLost(response.url, "read timed out") from error
    except (aiohttp.ClientError, OSError) as error:
        raise ConnectionLost(response.url, "connection lost") from error


async def require_event_stream(response: aiohttp.ClientResponse) -> None:
    """Raise RequestRejected unless the response is an event stream."""
    if response.status != 200:
        raise await _rejection(response)
    if response.content_type.lower() != MEDIA_TYPE:
        content_type = response.headers.get("Content-Type") or "no content type"
        raise RequestRejected(response.url, f"returned {content_type}, expected an event stream ({MEDIA_TYPE})")


async def _rejection(response: aiohttp.ClientResponse) -> RequestRejected:
    return RequestRejected(
        response.url,
        f"returned {response.status}: {await _detail(response)}",
        status=response.status,
        retry_after=retry_after_seconds(response.headers.get("Retry-After")),
    )


async def _detail(response: aiohttp.ClientResponse) -> str:
    """Return why a request failed: the detail of the problem document (RFC 9457), or the reason phrase."""
    try:
        phrase = response.reason or HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "no reason given"
    if response.content_type.lower() != PROBLEM:
        return phrase
    body = bytearray()
    with suppress(ConnectionLost, TimeoutError):
        async with asyncio.timeout(CONNECT_SECONDS):
            while chunk := await read_chunk(response):
                body += chunk
                if len(body) > MAX_PROBLEM_BYTES:
                    return phrase
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return phrase
    members = problem if isinstance(problem, dict) else {}
    texts = [text for text in (members.get("detail"), members.get("title")) if isinstance(text, str) and text]
    errors = members.get("errors")
    faults = [
        f"{fault['name']}: {fault['detail']}"
        for fault in (errors if isinstance(errors, list) else ())
        if isinstance(fault, dict) and {"name", "detail"} <= fault.keys()
    ]
    return " - ".join([*(texts[:1] or [phrase]), *filter(None, ["; ".join(faults)])])


def parse_url(url: str) -> URL:
    """Return a URL, with `http://` where it has no scheme; raises ValueError unless it is an http(s) URL."""
    given = url if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) else f"http://{url}"
    try:
        target = URL(given)
        if target.scheme in ("http", "https") and target.host:
            return target
    except ValueError:
        pass
    raise ValueError(f"{url!r} is not an http(s) URL")


def display_url(url: URL) -> str:
    """Return a URL to show: without the user and password that it may contain."""
    return str(url.with_user(None) if url.user or url.password else url)


def connect_error(error: Exception) -> str:
    """Return why a connection attempt failed, in the system's words."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, OSError) and error.strerror:
        # asyncio puts the address into its text; errors of name resolution have their own numbers.
        return os.strerror(error.errno) if error.errno and not isinstance(error, socket.gaierror) else error.strerror
    return str(error) or type(error).__name__
