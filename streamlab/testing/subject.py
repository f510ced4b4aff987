"""One endpoint of a server under test, and what is known of its responses."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
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
    from .stopping import Stopped

WATCH_SECONDS = 3.0
"""Maximum time for which a response without an end is read, in seconds."""

MAX_BYTES = 1 << 20
"""Maximum body of a response that is stored, in bytes."""

FULL = (429, 503)
"""Statuses of a server that is over its limits."""


@dataclass
class Known:
    """What is known of the endpoints of a server, shared by the cases: each response is requested once."""

    varies: frozenset[str] = frozenset()
    """Endpoints whose body may be another each time."""
    responses: dict[bytes, StreamedResponse] = field(default_factory=dict)
    """By request."""
    steady: dict[bytes, bool] = field(default_factory=dict)
    idle_cpu: float | None = None


@dataclass
class Subject:
    """The subject of a case: one form of one endpoint, with the values that its request needs."""

    form: EndpointForm
    server: Server
    values: Mapping[str, Any]
    large: Mapping[str, Any]
    """Values that make the answer as long as it gets."""
    data_is_json: bool
    known: Known
    report: Callable[[Mapping[str, Any]], None]
    """A function that records what a case found, for the summary."""
    watching: "Future[Watched] | None"
    """The event stream of this endpoint as another client watches it; None where nobody does."""
    stopped: "Callable[[], Stopped]"
    """Returns how a server stopped that had a stream of each endpoint open; the first call stops one."""

    @property
    def host(self) -> str:
        """Return the Host of a request."""
        return f"127.0.0.1:{self.server.port}"

    def message(self, *, long: bool = False, values: Mapping[str, Any] | None = None, **options: Any) -> bytes:
        """Return a request, valid but for the options; `long` for a response as long as possible."""
        everything = {**self.values, **(self.large if long else {}), **(values or {})}
        if long and self.form.carries_events and "limit" not in self.large:
            options["without"] = ("limit",)
        return self.form.message(everything, self.host, **options)

    @property
    def line(self) -> str:
        """Return the valid request, for reports: its method and target, and its body."""
        head, _, body = self.message().decode(errors="replace").partition("\r\n\r\n")
        return f"{head.partition(' HTTP/')[0]} {body}".rstrip()

    def request(self, **options: Any) -> AbstractAsyncContextManager[StreamedResponse]:
        """Send a request on a new connection, with the options of `message`."""
        return wire.send(self.server.port, self.message(**options))

    def _key(self, *, long: bool = False) -> bytes:
        """Return the request as it is to every server of this plugin."""
        return self.message(long=long).replace(self.host.encode(), b"", 1)

    async def watched(self) -> Watched:
        """Wait until the event stream has been watched; where it was full of other clients, watch it alone."""
        if self.watching is not None:
            watched = await asyncio.wrap_future(self.watching)
            if watched.response.status not in FULL:
                return watched
        return await watch(self)

    async def response(self, *, long: bool = False) -> StreamedResponse:
        """Return the response to the valid request, read for a while; it is requested once."""
        key = self._key(long=long)
        if key not in self.known.responses:
            async with self.request(long=long) as response:
                await response.read(seconds=WATCH_SECONDS, most=MAX_BYTES)
            self.known.responses[key] = response
        return self.known.responses[key]

    async def steady(self) -> bytes | None:
        """Return the body of a response that ends and is the same each time; None for others, and for events."""
        if self.form.carries_events or self.form.endpoint in self.known.varies:
            return None
        key, first = self._key(), await self.response()
        if key not in self.known.steady:
            async with self.request() as again:
                await again.read(seconds=WATCH_SECONDS, most=MAX_BYTES)
            over = first.ending is not None and again.ending is not None
            self.known.steady[key] = over and first.body == again.body
        return bytes(first.body) if self.known.steady[key] else None

    async def differs(self, body: bytes) -> str:
        """Return how a body differs from the usual one; empty where it may differ each time."""
        whole = await self.steady()
        if whole is None or body == whole:
            return ""
        async with self.request() as again:  # what grows, as a log does, was the same twice only by chance
            await again.read(seconds=WATCH_SECONDS, most=MAX_BYTES)
        return _difference(body, whole) if again.body == whole else ""

    async def fits(self) -> bool:
        """Return whether even the longest response is short and complete at once: no client can leave or stall."""
        if (await self.response()).ending is None:
            return False  # nor does a longer one end
        response = await self.response(long=True)
        return response.ending is not None and len(response.body) < 64 * 1024 and response.ended_after < 0.25

    @asynccontextmanager
    async def events(
        self, *, most: int, seconds: float, **options: Any
    ) -> "AsyncIterator[tuple[StreamedResponse, list[Event]]]":
        """Request the event stream, and yield its first events: up to `most`, or those of `seconds`."""
        async with self.request(**options) as response:
            yield response, await taken(response, most=most, seconds=seconds)


def _difference(body: bytes, whole: bytes) -> str:
    place = next((n for n, (one, other) in enumerate(zip(body, whole, strict=False)) if one != other), None)
    if place is None:
        return f"{len(body)} bytes and not {len(whole)}"
    return f"{body[place : place + 40]!r} at byte {place}, and not {whole[place : place + 40]!r}"


async def taken(response: StreamedResponse, *, most: int, seconds: float) -> list[Event]:
    """Return the first events of a response: up to `most`, or those of `seconds`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while len(parsed(response)) < most and await response.read_chunk():
                pass
    return parsed(response)[:most]


def parsed(response: StreamedResponse) -> list[Event]:
    """Return the events that have arrived so far. Raises Broken where they are not UTF-8."""
    try:
        return wire.events(bytes(response.body))
    except UnicodeDecodeError as error:
        raise Broken(f"bytes that are not UTF-8: {error.object[error.start : error.end]!r}") from None
