"""One endpoint of a server under test, and what is known of its answers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import wire
from .promise import NotKept
from .samples import Asked
from .server import Server
from .watching import Watched, watch
from .wire import Answer, Event

if TYPE_CHECKING:
    from .stopping import Stopped

WATCH_SECONDS = 3.0
"""How long an answer that has no end is looked at."""

MOST_BYTES = 1 << 20
"""How much of an answer is kept."""

FULL = (429, 503)
"""What says that there is no place now."""


@dataclass
class Known:
    """What was found out about the endpoints of a server, kept between cases: an answer is asked for once."""

    varies: frozenset[str] = frozenset()
    """Endpoints whose body may be another each time."""
    answers: dict[bytes, Answer] = field(default_factory=dict)
    """By request."""
    steady: dict[bytes, bool] = field(default_factory=dict)
    idle_cpu: float | None = None


@dataclass
class Subject:
    """What a case asks: one form of one endpoint, with the values that its request needs."""

    asked: Asked
    server: Server
    values: Mapping[str, Any]
    large: Mapping[str, Any]
    """Values that make the answer as long as it gets."""
    data_is_json: bool
    known: Known
    tell: Callable[[Mapping[str, Any]], None]
    """Takes what a case found, for the summary."""
    watching: "Future[Watched] | None"
    """The event stream of this endpoint as another client watches it; None where nobody does."""
    stopped: "Callable[[], Stopped]"
    """How a server stopped that had a stream of each endpoint open; one is stopped when this is first asked."""

    @property
    def host(self) -> str:
        """What a request says as Host."""
        return f"127.0.0.1:{self.server.port}"

    def message(self, *, long: bool = False, values: Mapping[str, Any] | None = None, **options: Any) -> bytes:
        """A request that is right, but for what is said otherwise; `long` for as long an answer as there is."""
        everything = {**self.values, **(self.large if long else {}), **(values or {})}
        if long and self.asked.carries_events and "limit" not in self.large:
            options["without"] = ("limit",)
        return self.asked.message(everything, self.host, **options)

    @property
    def line(self) -> str:
        """The right request, for reports: its method and target, and its body."""
        head, _, body = self.message().decode(errors="replace").partition("\r\n\r\n")
        return f"{head.partition(' HTTP/')[0]} {body}".rstrip()

    def ask(self, **options: Any) -> AbstractAsyncContextManager[Answer]:
        """Send a request on a connection of its own, with the options of `message`."""
        return wire.asked(self.server.port, self.message(**options))

    def _key(self, *, long: bool = False) -> bytes:
        """Return the request as it is to every server of this plugin."""
        return self.message(long=long).replace(self.host.encode(), b"", 1)

    async def watched(self) -> Watched:
        """Wait until the event stream has been watched; where it was full of other clients, watch it alone."""
        if self.watching is not None:
            watched = await asyncio.wrap_future(self.watching)
            if watched.answer.status not in FULL:
                return watched
        return await watch(self)

    async def answered(self, *, long: bool = False) -> Answer:
        """The answer to the right request, watched for a while; asked for once."""
        key = self._key(long=long)
        if key not in self.known.answers:
            async with self.ask(long=long) as answer:
                await answer.read(seconds=WATCH_SECONDS, most=MOST_BYTES)
            self.known.answers[key] = answer
        return self.known.answers[key]

    async def steady(self) -> bytes | None:
        """The body of an answer that ends, and is the same each time; None for any other, and for events."""
        if self.asked.carries_events or self.asked.endpoint in self.known.varies:
            return None
        key, first = self._key(), await self.answered()
        if key not in self.known.steady:
            async with self.ask() as again:
                await again.read(seconds=WATCH_SECONDS, most=MOST_BYTES)
            over = first.ending is not None and again.ending is not None
            self.known.steady[key] = over and first.body == again.body
        return bytes(first.body) if self.known.steady[key] else None

    async def differs(self, body: bytes) -> str:
        """How a body differs from the one that an answer has each time; nothing where it may be another each time."""
        whole = await self.steady()
        if whole is None or body == whole:
            return ""
        async with self.ask() as again:  # what grows, as a log does, was the same twice only by chance
            await again.read(seconds=WATCH_SECONDS, most=MOST_BYTES)
        return _difference(body, whole) if again.body == whole else ""

    async def fits(self) -> bool:
        """Whether even the longest answer is short, and over at once, so that it cannot be left or stalled."""
        if (await self.answered()).ending is None:
            return False  # nor does a longer one end
        answer = await self.answered(long=True)
        return answer.ending is not None and len(answer.body) < 64 * 1024 and answer.ended_after < 0.25

    @asynccontextmanager
    async def events(self, *, most: int, seconds: float, **options: Any) -> "AsyncIterator[tuple[Answer, list[Event]]]":
        """Ask for the event stream, and lend its first events: so many, or those of so many seconds."""
        async with self.ask(**options) as answer:
            yield answer, await taken(answer, most=most, seconds=seconds)


def _difference(body: bytes, whole: bytes) -> str:
    place = next((n for n, (one, other) in enumerate(zip(body, whole, strict=False)) if one != other), None)
    if place is None:
        return f"{len(body)} bytes and not {len(whole)}"
    return f"{body[place : place + 40]!r} at byte {place}, and not {whole[place : place + 40]!r}"


async def taken(answer: Answer, *, most: int, seconds: float) -> list[Event]:
    """The first events of an answer: so many, or those of so many seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while len(parsed(answer)) < most and await answer.piece():
                pass
    return parsed(answer)[:most]


def parsed(answer: Answer) -> list[Event]:
    """The events that have come so far. Raises NotKept where they are not UTF-8."""
    try:
        return wire.events(bytes(answer.body))
    except UnicodeDecodeError as error:
        raise NotKept(f"bytes that are not UTF-8: {error.object[error.start : error.end]!r}") from None
