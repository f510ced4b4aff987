"""Pages of other origins: which of them may read responses, and send what (WHATWG Fetch, 3.2)."""

from aiohttp import web
from multidict import CIMultiDict

from streamlab.config import Config

EXPOSED = (
    "Accept-Ranges, Content-Disposition, Content-Encoding, Content-Length, Content-Range, ETag, Last-Modified, "
    "Location, RateLimit, RateLimit-Policy, Repr-Digest, Retry-After, WWW-Authenticate, "
    # Durable Streams, PROTOCOL.md, 5
    "Producer-Epoch, Producer-Expected-Seq, Producer-Received-Seq, Producer-Seq, Stream-Closed, Stream-Cursor, "
    "Stream-Expires-At, Stream-Next-Offset, Stream-SSE-Data-Encoding, Stream-TTL, Stream-Up-To-Date"
)
"""Header fields that a page may read, besides those that every page may: what resuming needs, and what errors say."""

ACCEPTED = (
    "Accept, Authorization, Cache-Control, Content-Type, Idempotency-Key, If-Match, If-Modified-Since, If-None-Match, "
    "If-Range, If-Unmodified-Since, Last-Event-ID, Range, "
    "Producer-Epoch, Producer-Id, Producer-Seq, Stream-Closed, Stream-Expires-At, Stream-Fork-Offset, "
    "Stream-Fork-Sub-Offset, Stream-Forked-From, Stream-Seq, Stream-TTL"
)
"""Header fields that a page may send."""

METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"

PREFLIGHT_SECONDS = 600
"""Time for which a browser may remember the answer to a preflight, in seconds."""


class Cors:
    """Decides for the origins of one configuration."""

    def __init__(self, config: Config) -> None:
        self._origins: frozenset[str] = frozenset()
        self._credentials = False
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take the origins of a configuration in place of those that are in force."""
        self._origins, self._credentials = frozenset(config.cors.origins), config.cors.credentials

    def trusts(self, origin: str) -> bool:
        """Return whether a page of an origin may act for its user: that is for origins by name, with credentials."""
        return self._credentials and origin.lower() in self._origins

    def lists(self, origin: str) -> bool:
        """Return whether a page of an origin may send requests, with a token if it has one."""
        return "*" in self._origins or origin.lower() in self._origins

    def preflight(self, request: web.Request) -> web.Response | None:
        """Return the response to a preflight of a page that may use the server; None for any other request."""
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        response = web.Response(status=204)
        if not self.complete(request, response.headers):
            return None
        response.headers["Access-Control-Allow-Methods"] = METHODS
        response.headers["Access-Control-Allow-Headers"] = ACCEPTED
        response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        return response

    def complete(self, request: web.BaseRequest, headers: CIMultiDict[str]) -> bool:
        """Add the fields that let the page of a request read its response; return whether it may."""
        if not self._origins:
            return False
        headers["Vary"] = f"{headers['Vary']}, Origin" if "Vary" in headers else "Origin"
        origin = request.headers.get("Origin", "")
        if not origin or not self.lists(origin):
            return False
        headers["Access-Control-Allow-Origin"] = "*" if "*" in self._origins else origin
        headers["Access-Control-Expose-Headers"] = EXPOSED
        if self._credentials:
            headers["Access-Control-Allow-Credentials"] = "true"
        return True


CORS = web.AppKey("cors", Cors)
