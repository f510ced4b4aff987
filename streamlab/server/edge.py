"""The checks at the edge: HTTP syntax and versions, Host, origin of the page, size and time of a request."""

import asyncio
import ipaddress
import logging
import re
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError, LineTooLong
from multidict import CIMultiDict
from yarl import URL

from streamlab.config import Server
from streamlab.problems import Problem
from streamlab.streaming.connection import Connection

from .forwarded import host_of
from .limits import OpenConnections

log = logging.getLogger(__name__)

SERVER_NAME = "streamlab"

BODY_LIMIT = 1024 * 1024
"""Maximum request body, in bytes, unless an endpoint declares another `body_limit`; a larger one gets 413."""

LINE_LIMIT = 8190
"""Maximum request target (414), and maximum header field (431), in bytes."""

KEEP_ALIVE_SECONDS = 75
"""Maximum time that an idle connection stays open, in seconds."""

HEAD_SECONDS = 10
"""Maximum time from the first packet of a request to the end of its header fields, in seconds."""

REMEMBERED_HOSTS = 1000
"""Maximum number of hosts that are not checked again: a pattern of `allowed_hosts` may allow any number."""

HOST_LENGTH = 255
"""Maximum length of such a host, in characters."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing (RFC 9110, 9.2.1), unless an endpoint declares `starts_work`."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"})
"""Methods that get 405, not 501, where no route of a path has them."""

_TOKEN_AND_TARGET = re.compile(r"b['\"][!#$%&*+.^_`|~0-9A-Za-z-]+ (/|\*|https?:)")
"""The message of aiohttp for a well-formed request line with an unknown method."""

_ACCEPTED_BODY = web.RequestKey("accepted_body", int)


# -- a connection


class EdgeConnection(Connection):
    """A connection that rejects what is not HTTP with a problem document and one log line.

    A client has `HEAD_SECONDS` for the head of a request, and `accept_body` bytes for its body, however it is read.
    """

    __slots__ = ("_counted", "_head_timer", "_is_silent", "_open_connections")

    def __init__(self, *args: Any, open_connections: OpenConnections | None = None, **kwargs: Any) -> None:
        super().__init__(
            *args,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            max_line_size=LINE_LIMIT,
            max_field_size=LINE_LIMIT,
            access_log=None,
            **kwargs,
        )
        self._head_timer: asyncio.TimerHandle | None = None
        self._open_connections, self._counted, self._is_silent = open_connections, "", False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection for its client, and close it at once where the client has too many."""
        if self._open_connections is not None:
            peer = transport.get_extra_info("peername")
            counted = self._open_connections.add(peer[0] if isinstance(peer, tuple) else "")
            if counted is None:
                self._open_connections = None
                super().connection_made(transport)
                self.force_close()
                return
            self._counted, self._is_silent = counted, True
        super().connection_made(transport)

    @property
    def peername(self) -> str | tuple[str, int, int, int] | tuple[str, int] | None:
        """Return the address of the client; None at a Unix socket: a client may bind its end to any name."""
        peer = super().peername
        return peer if isinstance(peer, tuple) else None

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, and limit the time and size of what follows."""
        if self._is_silent:
            self._hear()
        super().data_received(data)
        if (request := self._current_request) is not None:
            self._limit_body(request)
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._cancel_head_timer()
        elif self._head_timer is None:  # it waits for a request whose head has begun
            self._head_timer = self._loop.call_later(HEAD_SECONDS, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancel the timer, and count the connection no longer."""
        self._cancel_head_timer()
        if self._open_connections is not None:
            self._hear()
            self._open_connections.remove(self._counted)
            self._open_connections = None
        super().connection_lost(exc)

    def _hear(self) -> None:
        if self._is_silent and self._open_connections is not None:
            self._is_silent = False
            self._open_connections.hear()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _limit_body(self, request: web.BaseRequest) -> None:
        """Fail the reader of a body that is too large or whose framing is broken."""
        body, limit = request.content, request.get(_ACCEPTED_BODY)
        if body.exception() is not None:
            return
        if limit is not None and body.total_bytes > limit:
            body.set_exception(_too_large(limit))
        elif not body.is_eof() and self._messages and not isinstance(self._messages[-1][0], RawRequestMessage):
            body.set_exception(web.RequestPayloadError("the framing is broken"))

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Respond to a request that cannot be parsed; what a handler raises is handled by the middleware before."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        log.info("not HTTP from %s: %s", request.remote, type(exc).__name__)
        response = _parse_problem(exc).response()
        set_common_headers(response.headers)
        response.force_close()
        return response

    def log_exception(self, *args: object, **kwargs: Any) -> None:
        """Log an error outside any handler; a body that is broken or too large is not a fault of the server."""
        error = kwargs.get("exc_info")
        if isinstance(error, web.RequestPayloadError | Problem):
            log.info("broken body from %s: %s", self.peername, type(error).__name__)
        else:
            super().log_exception(*args, **kwargs)


def _parse_problem(error: HttpProcessingError) -> Problem:
    """Return the Problem of a request that aiohttp's parser rejects."""
    if isinstance(error, LineTooLong):
        # aiohttp measures targets and fields, and reads only the target into a bytearray.
        if isinstance(error.args[0], bytearray):
            return Problem(414, f"The request target is longer than {LINE_LIMIT} bytes.")
        return Problem(431, f"A header field is longer than {LINE_LIMIT} bytes.")
    if error.message == "Too many headers received":
        return Problem(431, "The request has more than 128 header fields.")
    if isinstance(error, BadHttpMethod) and _TOKEN_AND_TARGET.search(error.message):
        return Problem(501, "The method of this request is unknown.")
    return Problem(400, "The request is malformed (RFC 9112).")


def set_common_headers(headers: CIMultiDict[str]) -> None:
    """Set the header fields that every response has."""
    headers["Server"] = SERVER_NAME
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Cache-Control", "no-store")


# -- a request


def reject_unsupported(request: web.Request) -> None:
    """Reject an unsupported version, framing, form of target, method, or expectation.

    Source: RFC 9110, 9.1, 9.3.6, 10.1.1 and 15.6; RFC 9112, 3.2, 6.1 and 6.3.
    """
    version, close = request._version, {"Connection": "close"}
    if version not in (HttpVersion10, HttpVersion11):
        request._version = HttpVersion11  # the status line repeats it, and must name a supported version
        raise Problem(505, "Supported versions: HTTP/1.1, HTTP/1.0.", headers=close)
    if codings := request.headers.getall("Transfer-Encoding", ()):
        if version == HttpVersion10:
            raise Problem(400, "HTTP/1.0 has no Transfer-Encoding.", headers=close)
        if ", ".join(codings).lower().strip(" \t") != "chunked":
            raise Problem(501, "The only supported transfer coding is chunked.", headers=close)
    if "#" in request.raw_path:
        raise Problem(400, "The target of a request must not have a fragment.")
    if request.method == "OPTIONS" and request.raw_path == "*":
        raise Problem(405, "OPTIONS needs a path; * is not supported.", headers={"Allow": ""})
    if request.method not in _METHODS and request.match_info.http_exception is not None:
        raise Problem(501, "The method of this request is not implemented.", headers=close)
    if request.headers.get("Expect", "100-continue").lower() != "100-continue":
        raise Problem(417, "The only supported expectation is 100-continue.")


def accept_body(request: web.Request, limit: int) -> None:
    """Limit the body of a request to `limit` bytes; raises Problem 413 where its Content-Length is more.

    A body of unknown length fails its reader with the same Problem once it is longer.
    """
    if max(request.content_length or 0, request.content.total_bytes) > limit:
        raise _too_large(limit)
    request[_ACCEPTED_BODY] = limit
    request._client_max_size = limit  # the limit of read() and post()


def _too_large(limit: int) -> Problem:
    return Problem(413, f"The body is larger than {limit} bytes.")


class AllowedHosts:
    """The hosts under which a server may be requested: a page of another site must not reach it (DNS rebinding)."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._accepted: set[str] = set()
        """Hosts that were checked and are allowed, as clients write them; nearly every request has one of these."""

    def check(self, request: web.Request) -> None:
        """Raise Problem 400 or 421 for a request with no valid host, or with one that is not allowed.

        The host is that of an absolute target, and of the Host field otherwise (RFC 9112, 3.2.2).
        """
        host, target = request.headers.get("Host"), request._message.url  # rel_url has lost the host
        if host in self._accepted and not target.absolute:
            return
        if host is None and request.version >= HttpVersion11:
            raise Problem(400, "A request of HTTP/1.1 needs a Host field (RFC 9112 section 3.2).")
        if target.absolute:
            host = target.raw_authority
        if host is None:
            return
        if (name := host_of(host)) is None:
            raise Problem(400, "The Host is not a host name with an optional port (RFC 9110 section 7.2).")
        if target.absolute and target.scheme != (scheme := "https" if request.get_extra_info("sslcontext") else "http"):
            raise Problem(421, f"Targets must have the scheme {scheme} on this port.")
        if not _is_allowed(name.rstrip(".").lower(), self._server):
            raise Problem(421, "This Host is not allowed; see `server.allowed_hosts` in the configuration.")
        if len(self._accepted) < REMEMBERED_HOSTS and len(host) <= HOST_LENGTH:
            self._accepted.add(host)


def reject_other_origin(request: web.Request) -> None:
    """Reject with 403 a request that a page of another origin caused (CSRF); for routes that start or change something.

    Browsers send `Sec-Fetch-Site` to https and to loopback, and `Origin` with every unsafe method. A client without
    both, as curl, is not a page.
    """
    if not _is_from_own_origin(request):
        raise Problem(403, "Requests from pages of another origin are not allowed here (Sec-Fetch-Site, Origin).")


def _is_from_own_origin(request: web.Request) -> bool:
    """Return whether a page of this server, its user, or a program sent a request. Nothing else decides this.

    `Sec-Fetch-Site` comes first, since no page can forge it and it is right behind a proxy that ends TLS, where the
    scheme of `Origin` is not that of the request. Source: W3C Fetch Metadata, 2.3 and 5; RFC 6454, 7.
    """
    site = request.headers.get("Sec-Fetch-Site", "")
    if site in ("same-origin", "none"):
        return True
    if site in ("same-site", "cross-site"):
        return False
    origin = request.headers.get("Origin")
    if origin is None:
        return True
    with suppress(ValueError):  # not a URL with a scheme and a host, as `null`
        return URL(origin).origin() == request.url.origin()
    return False


def _is_allowed(name: str, server: Server) -> bool:
    listens_locally = is_loopback(server.host)
    if listens_locally and is_loopback(name):
        return True
    if not server.allowed_hosts:
        return not listens_locally
    return any(fnmatchcase(name, allowed.lower()) for allowed in server.allowed_hosts)


def reachable(address: str, server: Server) -> str:
    """Return a TCP address for a browser on this machine: 0.0.0.0, :: and names that are not allowed are replaced."""
    scheme, _, authority = address.partition("://")
    host, _, port = authority.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104
    if not _is_allowed(host.strip("[]"), server):
        host = next((name for name in server.allowed_hosts if not re.search("[*?:]", name)), host)
    return f"{scheme}://{host}:{port}"


def is_local(server: Server) -> bool:
    """Return whether only clients of this machine can connect: to a loopback address, or to a Unix socket."""
    return server.socket is not None or is_loopback(server.host)


def is_loopback(name: str) -> bool:
    """Return whether a name or an address is only for clients of this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return False
