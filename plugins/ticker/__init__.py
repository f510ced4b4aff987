"""Serve prices as server-sent events: simulated, replayed from a file, or pushed by clients."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Annotated, Literal

import msgspec
from aiohttp import web
from pydantic import BeforeValidator, Field, PositiveFloat, PrivateAttr, StringConstraints, model_validator

from streamlab import (
    EVENTS,
    ORIGIN,
    PRINCIPAL,
    Channel,
    ConfigPath,
    EventLogError,
    Position,
    Problem,
    ResumeQuery,
    Scenario,
    View,
    encode_event,
    endpoint,
    follow,
    hookimpl,
    read_body,
)

from .once import Claim, Keys
from .prices import InvalidPrices, LastPrices, Price, read_prices
from .sources import InvalidFile, Replay, Simulation, fault

log = logging.getLogger(__name__)

SYMBOL = r"^[A-Za-z0-9][A-Za-z0-9.:/=^_-]{0,31}$"

Symbol = Annotated[str, StringConstraints(pattern=SYMBOL)]

MAX_LAST_PRICES = 10_000
"""Maximum number of symbols whose last price is remembered."""

UNFOLLOWED_SECONDS = 10.0
"""Time between two simulated prices while nobody follows them, in seconds."""

JSON_TYPES = ("application/json", "application/x-ndjson", "application/jsonl")


def _split_at_commas(symbols: object) -> object:
    """Accept `symbols=A,B` as well as `symbols=A&symbols=B`."""
    if isinstance(symbols, list):
        return [symbol for value in symbols for symbol in (value.split(",") if isinstance(value, str) else [value])]
    return symbols


class TickerQuery(ResumeQuery):
    """Which prices to follow, and from which event on."""

    symbols: Annotated[tuple[Symbol, ...], BeforeValidator(_split_at_commas)] = Field(
        (),
        max_length=100,
        description="Only these symbols, as `A,B` or repeated. Default: all.",
        examples=[["AAPL", "MSFT"]],
    )
    limit: int | None = Field(None, ge=1, le=1_000_000, description="End the stream after N events.", examples=[10])
    conflate: float = Field(
        0.0, ge=0, le=3600, description="Send at most one event per symbol, the latest, every N seconds."
    )


class Ticker(Scenario):
    """Prices as server-sent events, published once for all followers, resumable from any id."""

    source: Literal["simulate", "replay", "push"] = "simulate"
    """Where prices come from: a simulation, a CSV file, or POST /stream/stock-ticker."""
    symbols: tuple[Symbol, ...] = Field(("AAPL", "AMZN", "GOOGL", "MSFT", "TSLA"), min_length=1, max_length=10_000)
    """Symbols that are simulated."""
    interval: float = Field(1.0, ge=0.001, le=3600)
    """Time between two simulated prices of a symbol, in seconds; 10 while nobody follows them, unless it is more."""
    seed: int = 1
    """Seed of the simulation: the same seed gives the same prices."""
    file: ConfigPath | None = None
    """CSV file to replay, with the columns time, symbol and price; other columns are published too."""
    speed: PositiveFloat = 1.0
    """Speed of a replay; 2 is twice as fast as the times in the file."""
    repeat: bool = True
    """Whether a replay starts again at the end of the file."""

    _channel: Channel = PrivateAttr()
    _keys: Keys = PrivateAttr()
    _last_prices: LastPrices = PrivateAttr(default_factory=lambda: LastPrices(MAX_LAST_PRICES))
    _loaded: asyncio.Event = PrivateAttr(default_factory=asyncio.Event)
    """Set once the last prices have been read from the event log."""

    @model_validator(mode="after")
    def _require_file(self) -> "Ticker":
        if self.source == "replay" and self.file is None:
            raise ValueError('source = "replay" needs a file')
        return self

    @hookimpl
    def check(self) -> Iterator[tuple[str, str]]:
        """Report a file that cannot be replayed."""
        if self.source == "replay" and self.file is not None and (reason := fault(self.file)):
            yield "file", f"{self.file} {reason}"

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Publish prices while the server runs, in one of the processes that share the event log."""
        events = app[EVENTS]
        self._channel = events.channel("ticker")
        self._keys = Keys(self._channel)
        async with asyncio.TaskGroup() as group:
            if self.source == "push":
                task = group.create_task(self._track_last_prices())
            else:
                task = group.create_task(events.run_as_leader("ticker", self._publish_source))
            yield
            task.cancel()

    def _known_symbols(self) -> tuple[str, ...] | None:
        """Return the symbols of the simulation; others may come at any time, so that any can be followed."""
        return self.symbols if self.source == "simulate" else None

    @endpoint(
        "GET",
        "/stream/stock-ticker",
        query=TickerQuery,
        choices={"symbols": _known_symbols},
        sends="text/event-stream",
    )
    async def prices(self, request: web.Request, query: TickerQuery) -> web.StreamResponse:
        """Follow prices as they are published. An id resumes without a gap."""
        view = View(keys=frozenset(query.symbols) or None, conflate=query.conflate)
        return await follow(request, self._channel, view=view, after=query.last_event_id, limit=query.limit)

    @endpoint(
        "POST",
        "/stream/stock-ticker",
        takes=JSON_TYPES,
        sends="application/json",
        responses={
            202: "The prices are stored. The body has their event ids.",
            409: "This ticker does not accept prices by POST.",
            413: "The body is larger than 1 MiB.",
            422: "A price is invalid, or the Idempotency-Key was used for others.",
        },
        curl='--json \'{"symbol": "ACME", "price": 12.5}\' {url}',
    )
    async def push(self, request: web.Request) -> web.StreamResponse:
        """Publish prices: one JSON object with `symbol` and `price`, or JSON lines of them.

        `change` and `time` are added where they are missing; every other field is published unchanged. Either all
        prices are published, in order, or none. With an `Idempotency-Key` they are published once, however often the
        request is sent; the last 10,000 keys are remembered.
        """
        if self.source != "push":
            raise Problem(409, f'The prices of this ticker come from source = "{self.source}", not by POST.')
        body = await read_body(request, JSON_TYPES)
        try:
            prices = read_prices(body, SYMBOL)
        except InvalidPrices as error:
            raise Problem(422 if error.errors else 400, str(error), errors=error.errors) from None
        await self._loaded.wait()
        key = request.headers.get("Idempotency-Key")
        if key is None:
            ids = await self._publish(prices)
        else:
            client = request[PRINCIPAL].name
            ids = await self._keys.once(client, key, body, len(prices), partial(self._publish, prices))
        stored = msgspec.json.encode({"ids": ids})
        return web.Response(body=stored, status=202, headers={"Content-Type": "application/json; charset=utf-8"})

    async def _publish_source(self) -> None:
        """Publish the prices of the source, from the checkpoint of the last leader on."""
        # Each file has its own checkpoint: a row number of one file means nothing in another.
        name = f"replay {self.file}" if self.source == "replay" else self.source
        checkpoint = await self._channel.checkpoint(name)
        source: Replay | Simulation
        if self.source == "replay" and self.file is not None:
            await self._load_last_prices()
            source = Replay(self.file, speed=self.speed, repeat=self.repeat, checkpoint=checkpoint)
        else:
            source = Simulation(self.symbols, interval=self.interval, seed=self.seed, checkpoint=checkpoint)
        try:
            async with aclosing(source.prices()) as batches:
                async for prices, checkpoint in batches:
                    await self._publish(prices, checkpoint=(name, checkpoint), retry_forever=True)
                    if self.source == "simulate":
                        await self._channel.wait_until_followed(UNFOLLOWED_SECONDS)
        except InvalidFile as error:
            raise Problem(503, str(error)) from None

    async def _publish(
        self,
        prices: Sequence[Price],
        claim: Claim | None = None,
        *,
        checkpoint: tuple[str, str] | None = None,
        retry_forever: bool = False,
    ) -> list[str]:
        """Publish prices, each with its change since the previous one, and return their ids."""
        last_prices, stored = self._last_prices, None
        texts = last_prices.add_changes(prices)
        events = [encode_event(text, key=price.symbol) for price, text in zip(prices, texts, strict=True)]
        try:
            if claim is not None:
                stored = await self._channel.append(
                    events, checkpoints=claim.checkpoints, expected=claim.expected, located=claim.located
                )
                return self._channel.ids(stored, len(events))
            ids = await self._channel.publish_all(events, checkpoint=checkpoint, retry_forever=retry_forever)
            stored = Position.parse(ids[-1])
            return ids
        finally:
            last_prices.settle(prices, stored)

    async def _track_last_prices(self) -> None:
        """Follow the channel to know the last price of each symbol, whichever process it was pushed to."""
        while True:
            try:
                position = await self._load_last_prices()
                self._loaded.set()
                async for event in self._channel.listen(position):
                    self._last_prices.record(event.key, event.position, event.data)
            except EventLogError as error:
                log.warning("the last prices are unknown: %s", error)
                self._loaded.set()  # prices can be pushed without them: their change is null
                await asyncio.sleep(1)

    async def _load_last_prices(self) -> Position:
        """Read the last prices from the event log, and return the position of its last event."""
        position = ORIGIN
        async for event in self._channel.read():
            self._last_prices.record(event.key, event.position, event.data)
            position = event.position
        return position


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Return the ticker."""
    return [Ticker]
