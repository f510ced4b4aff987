"""One endpoint of a server under test, and its cached responses."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import wire
from .promise import Broken
from .samples import EndpointForm
from .server import Server
from .watching import Watched, watch
from .wire import Event, StreamedResponse

if TYPE_CHECKING:
    from .access import Access, Ended
    from .stopping import Stopped

WATCH_SECONDS = 3.0
"""Maximum time for which a response without an end is read, in seconds."""

MAX_BYTES = 1 << 20
"""Maximum body of a response that is stored, in bytes."""

SHORT_SECONDS = 0.25
"""Maximum duration of a response that is complete at once, in seconds."""

SHORT_BYTES = 64 * 1024
"""Maximum body of a response that is complete at once, in bytes."""

FULL = (429, 503)
"""Statuses of a server that is over its limits."""


@dataclass
class Cache:
    """Results that the cases of a server share, so that each response is requested once."""

    nondeterministic: frozenset[str] = frozenset()
    """Endpoints whose body may differ for the same request."""
    responses: dict[bytes, StreamedResponse] = field(default_factory=dict)
    """By request."""
    is_stable: dict[bytes, bool] = field(default_factory=dict)
    is_short: dict[bytes, bool] = field(default_factory=dict)
    idle_cpu: float | None = None


@dataclass
class Subject:
    """The subject of a case: one form of one endpoint, with the values that its request needs."""

    form: EndpointForm
    server: Server
    values: Mapping[str, Any]
    large: Mapping[str, Any]
    """Values that make the response as long as possible."""
    data_is_json: bool
    cache: Cache
    report: Callable[[Mapping[str, Any]], None]
    """A function that records what a case found, for the summary."""
    watching: "Future[Watched] | None"
    """The event stream of this endpoint, watched by another client; None if none watches it."""
    stopped: "Callable[[], Stopped]"
    """A function that returns how a server with open streams stopped; its first call stops one."""
    access: "Callable[[], Access]"
    """A function that returns the server that decides by tokens; its first call starts it."""
    ended: "Callable[[], Awaitable[Sequence[Ended]]]"
    """A function that returns how the streams of this endpoint ended whose tokens ceased to be valid."""
    on: "Callable[[Server], Subject]"
    """A function that returns this endpoint on another server, with what its requests need there."""
    prepared: Mapping[str, Any]
    """Those of the values that `prepare` returned."""

    @property
    def host(self) -> str:
        """Return the Host of a request."""
        return f"127.0.0.1:{self.server.port}"

    def message(self, *, long: bool = False, values: Mapping[str, Any] | None = None, **options: Any) -> bytes:
        """Return a request, valid but for the options; `long` for a response as long as possible."""
        merged = {**self.values, **(self.large if long else {}), **(values or {})}
        if long and self.form.carries_events and "limit" not in self.large:
            options["without"] = ("limit",)
        if self.server.token:
            options["headers"] = {**self.server.credentials, **(options.get("headers") or {})}
        return self.form.message(merged, self.host, **options)

    @property
    def line(self) -> str:
        """Return the valid request, for reports: its method and target, and its body."""
        head, _, body = self.message().decode(errors="replace").partition("\r\n\r\n")
        return f"{head.partition(' HTTP/')[0]} {body}".rstrip()

    def request(self, **options: Any) -> AbstractAsyncContextManager[StreamedResponse]:
        """Send a request on a new connection, with the options of `message`."""
        return wire.send(self.server.port, self.message(**options))

    def _key(self, *, long: bool = False) -> bytes:
        """Return the request without the server's address and token, which differ between the servers of a plugin."""
        message = self.message(long=long).replace(self.host.encode(), b"", 1)
        return message.replace(self.server.token.encode(), b"", 1)

    async def watched(self) -> Watched:
        """Wait until the event stream has been watched; if the server was over its limits, watch it alone."""
        if self.watching is not None:
            watched = await asyncio.wrap_future(self.watching)
            if watched.response.status not in FULL:
                return watched
        return await watch(self)

    async def response(self) -> StreamedResponse:
        """Return the response to the valid request, read for WATCH_SECONDS; it is requested once."""
        key = self._key()
        if key not in self.cache.responses:
            async with self.request() as response:
                await response.read(seconds=WATCH_SECONDS, max_bytes=MAX_BYTES)
            self.cache.responses[key] = response
        return self.cache.responses[key]

    async def stable_body(self) -> bytes | None:
        """Return the body if the response ends and is the same each time; None otherwise, and for events."""
        if self.form.carries_events or self.form.endpoint in self.cache.nondeterministic:
            return None
        key, first = self._key(), await self.response()
        if key not in self.cache.is_stable:
            async with self.request() as again:
                await again.read(seconds=WATCH_SECONDS, max_bytes=MAX_BYTES)
            ended = first.ending is not None and again.ending is not None
            self.cache.is_stable[key] = ended and first.body == again.body
        return bytes(first.body) if self.cache.is_stable[key] else None

    async def differs(self, body: bytes) -> str:
        """Return how a body differs from the usual one; empty where it may differ each time."""
        expected = await self.stable_body()
        if expected is None or body == expected:
            return ""
        async with self.request() as again:  # a growing resource, such as a log, may be the same twice by chance
            await again.read(seconds=WATCH_SECONDS, max_bytes=MAX_BYTES)
        return _difference(body, expected) if again.body == expected else ""

    async def is_complete_at_once(self) -> bool:
        """Return whether even the longest response is short and complete at once: no client can disconnect or stall."""
        if (await self.response()).ending is None:
            return False  # nor does a longer one end
        key = self._key(long=True)
        if key not in self.cache.is_short:
            async with self.request(long=True) as response:
                await response.read(seconds=SHORT_SECONDS, max_bytes=SHORT_BYTES)
            size, ended_after = len(response.body), response.ended_after
            self.cache.is_short[key] = bool(response.ending) and size < SHORT_BYTES and ended_after < SHORT_SECONDS
        return self.cache.is_short[key]

    @asynccontextmanager
    async def events(
        self, *, limit: int, seconds: float, **options: Any
    ) -> "AsyncIterator[tuple[StreamedResponse, list[Event]]]":
        """Request the event stream, and yield its first events: up to `limit`, or those of `seconds`."""
        async with self.request(**options) as response:
            yield response, await read_events(response, limit=limit, seconds=seconds)


def _difference(body: bytes, expected: bytes) -> str:
    at = next((n for n, (one, other) in enumerate(zip(body, expected, strict=False)) if one != other), None)
    if at is None:
        return f"{len(body)} bytes, expected {len(expected)}"
    return f"{body[at : at + 40]!r} at byte {at}, expected {expected[at : at + 40]!r}"


async def read_events(response: StreamedResponse, *, limit: int, seconds: float) -> list[Event]:
    """Return the first events of a response: up to `limit`, or those of `seconds`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while len(parsed(response)) < limit and await response.read_chunk():
                pass
    return parsed(response)[:limit]


def parsed(response: StreamedResponse) -> list[Event]:
    """Return the events that have arrived so far. Raises Broken where they are not UTF-8."""
    try:
        return wire.events(bytes(response.body))
    except UnicodeDecodeError as error:
        raise Broken(f"bytes that are not UTF-8: {error.object[error.start : error.end]!r}") from None
