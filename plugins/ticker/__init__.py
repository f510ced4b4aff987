"""Serve prices as server-sent events: simulated, replayed from a file, or pushed by whoever has them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Literal

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, Field, PositiveFloat, PrivateAttr, StringConstraints, model_validator

from streamlab import (
    EVENTS,
    ORIGIN,
    Channel,
    ConfigPath,
    EventLogError,
    Position,
    Problem,
    Scenario,
    View,
    encode_event,
    endpoint,
    follow,
    hookimpl,
)

from .prices import LastPrices, Price, Unreadable, read_prices
from .sources import Replay, Simulation

log = logging.getLogger(__name__)

SYMBOL = r"^[A-Za-z0-9][A-Za-z0-9.:/=^_-]{0,31}$"

Symbol = Annotated[str, StringConstraints(pattern=SYMBOL)]

KNOWN_PRICES = 10_000
"""Symbols whose last price is remembered, to tell the change of the next."""

JSON_TYPES = ("application/json", "application/x-ndjson", "application/jsonl")


def _split(symbols: object) -> object:
    """`symbols=A,B` and `symbols=A&symbols=B` say the same."""
    if isinstance(symbols, list):
        return [symbol for given in symbols for symbol in (given.split(",") if isinstance(given, str) else [given])]
    return symbols


class Following(BaseModel):
    """What part of the ticker to follow, and from where."""

    symbols: Annotated[list[Symbol], BeforeValidator(_split)] = Field(
        [], max_length=100, description="Only these, as `A,B` or repeated; none for all.", examples=["AAPL,MSFT"]
    )
    limit: int | None = Field(
        None, ge=1, le=1_000_000, description="End the stream after so many events.", examples=[10]
    )
    conflate: float = Field(
        0.0, ge=0, le=3600, description="Seconds in which at most one event of a symbol, the latest, is sent."
    )
    last_event_id: str = Field(
        "", max_length=200, description="Go on after this id; the header Last-Event-ID says the same, and wins."
    )


class Ticker(Scenario):
    """Prices as server-sent events, published once for everybody, to be resumed from any id."""

    source: Literal["simulate", "replay", "push"] = "simulate"
    """Where prices come from: a simulation, a CSV file, or POST /stream/stock-ticker."""
    symbols: tuple[Symbol, ...] = Field(("AAPL", "AMZN", "GOOGL", "MSFT", "TSLA"), min_length=1, max_length=10_000)
    """What is simulated."""
    interval: float = Field(1.0, ge=0.001, le=3600)
    """Seconds between two simulated prices of a symbol."""
    seed: int = 1
    """The same seed gives the same prices."""
    file: ConfigPath | None = None
    """What is replayed: a CSV file with the columns time, symbol and price; others are carried along."""
    speed: PositiveFloat = 1.0
    """How many times faster than its own times a file is replayed."""
    repeat: bool = True
    """Whether a file begins anew when it is over."""

    _channel: Channel = PrivateAttr()
    _last: LastPrices = PrivateAttr(default_factory=lambda: LastPrices(KNOWN_PRICES))
    _learnt: asyncio.Event = PrivateAttr(default_factory=asyncio.Event)

    @model_validator(mode="after")
    def _replay_needs_a_file(self) -> "Ticker":
        if self.source == "replay" and self.file is None:
            raise ValueError('source = "replay" needs a file')
        return self

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Produce prices while the server serves, in one process of all that share the event log."""
        events = app[EVENTS]
        self._channel = events.channel("ticker")
        async with asyncio.TaskGroup() as group:
            if self.source == "push":
                task = group.create_task(self._remember())
            else:
                task = group.create_task(events.run_as_leader("ticker", self._produce))
            yield
            task.cancel()

    @endpoint("GET", "/stream/stock-ticker", query=Following, sends="text/event-stream")
    def prices(self, request: web.Request, query: Following) -> Awaitable[web.StreamResponse]:
        """Follow prices as they are made; an id resumes without a gap."""
        # No coroutine of its own, so that neither it nor the query is kept for as long as a client follows.
        if self.source == "simulate" and (unknown := sorted(set(query.symbols) - set(self.symbols))):
            known = f"unknown: {', '.join(unknown)}; known: {', '.join(self.symbols[:100])}"
            refusal = {"in": "query", "name": "symbols", "detail": known}
            raise Problem(422, "This ticker does not have every symbol asked for.", errors=[refusal])
        view = View(keys=frozenset(query.symbols) or None, conflate=query.conflate)
        return follow(request, self._channel, view=view, after=query.last_event_id, limit=query.limit)

    @endpoint(
        "POST",
        "/stream/stock-ticker",
        takes=JSON_TYPES,
        sends="application/json",
        responses={
            202: "The events are kept, and have these ids.",
            409: "Prices of this ticker do not come by POST.",
            413: "The body is larger than 1 MiB.",
        },
        curl='--json \'{"symbol": "ACME", "price": 12.5}\' {url}',
    )
    async def push(self, request: web.Request) -> web.StreamResponse:
        """Publish prices: one JSON object with `symbol` and `price`, or JSON lines of them.

        `change` and `time` are added where they are missing; every other field is carried through unchanged. All are
        published, in order, or none.
        """
        if self.source != "push":
            raise Problem(409, f'The prices of this ticker come from source = "{self.source}", not by POST.')
        if request.content_type not in JSON_TYPES:
            raise Problem(415, f"The body must be one of {', '.join(JSON_TYPES)}.", headers={"Accept": JSON_TYPES[0]})
        try:
            prices = read_prices(await request.read(), SYMBOL)
        except Unreadable as error:
            raise Problem(422 if error.errors else 400, str(error), errors=error.errors) from None
        await self._learnt.wait()
        return web.json_response({"ids": await self._publish(prices)}, status=202)

    # -- where prices come from

    async def _produce(self) -> None:
        """Publish what the source makes, going on where the last producer stopped."""
        # Where one file was left says nothing about another.
        name = f"replay {self.file}" if self.source == "replay" else self.source
        stands = await self._channel.checkpoint(name)
        source: Replay | Simulation
        if self.source == "replay" and self.file is not None:
            await self._learn()
            source = Replay(self.file, speed=self.speed, repeat=self.repeat, stands=stands)
        else:
            source = Simulation(self.symbols, interval=self.interval, seed=self.seed, stands=stands)
        async with aclosing(source.prices()) as made:
            async for prices, stands in made:
                await self._publish(prices, checkpoint=(name, stands), retry_forever=True)

    async def _publish(
        self, prices: Sequence[Price], *, checkpoint: tuple[str, str] | None = None, retry_forever: bool = False
    ) -> list[str]:
        """Publish prices, each with its change against the one before, and return their ids."""
        last, kept = self._last, None
        drafts = [encode_event(data, key=price.symbol) for price, data in zip(prices, last.tell(prices), strict=True)]
        try:
            ids = await self._channel.publish_all(drafts, checkpoint=checkpoint, retry_forever=retry_forever)
            kept = Position.parse(ids[-1])
            return ids
        finally:
            last.settle(prices, kept)

    async def _remember(self) -> None:
        """Learn the last price of each symbol, whichever process it was pushed to."""
        while True:
            try:
                after = await self._learn()
                self._learnt.set()
                async for event in self._channel.listen(after):
                    self._last.note(event.key, event.position, event.data)
            except EventLogError as error:
                log.warning("the last prices are not known: %s", error)
                self._learnt.set()  # a price can be pushed without: its change is null
                await asyncio.sleep(1)

    async def _learn(self) -> Position:
        """Note the last prices that the log has, and return where it ends."""
        after = ORIGIN
        async for event in self._channel.read():
            self._last.note(event.key, event.position, event.data)
            after = event.position
        return after


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Bring the ticker."""
    return [Ticker]
