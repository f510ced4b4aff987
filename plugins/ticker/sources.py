"""Where a ticker's prices come from by themselves: a simulation, or a file that is replayed."""

import asyncio
import csv
import itertools
import json
import logging
import math
import random
import threading
import zlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from streamlab import Threads

from .prices import Price

log = logging.getLogger(__name__)

TRADING_SECONDS = 252 * 6.5 * 3600
"""Seconds of a year in which markets are open: what drift and volatility are given for."""

DRIFT, VOLATILITY = 0.05, 0.3
"""Of a year, as fractions."""

BATCH = 500
"""Rows of a file that are read, and published, at once."""


class Simulation:
    """Geometric Brownian motion, the same for the same seed; `stands` is where an earlier one stopped.

    Source: S(t + dt) = S(t) exp((mu - sigma^2 / 2) dt + sigma sqrt(dt) Z), with Z normally distributed.
    """

    def __init__(self, symbols: Sequence[str], *, interval: float, seed: int, stands: str | None) -> None:
        self._interval = interval
        self._seed = seed
        state: dict[str, Any] = json.loads(stands) if stands else {}
        self._step: int = state.get("step", 0)
        known: dict[str, float] = state.get("prices", {})
        self._prices = {symbol: known.get(symbol) or self._first(symbol) for symbol in symbols}

    def _first(self, symbol: str) -> float:
        return 20.0 + zlib.crc32(f"{self._seed}:{symbol}".encode()) % 48_000 / 100

    def step(self) -> list[Price]:
        """Move every symbol on by one interval."""
        self._step += 1
        noise = random.Random(f"{self._seed}:{self._step}")  # noqa: S311 - a simulation, not a secret
        years = self._interval / TRADING_SECONDS
        made: list[Price] = []
        for symbol, before in self._prices.items():
            drift = (DRIFT - VOLATILITY**2 / 2) * years
            after = max(0.01, before * math.exp(drift + VOLATILITY * math.sqrt(years) * noise.gauss(0, 1)))
            self._prices[symbol] = after
            price = round(after, 2)
            made.append(Price.of(symbol, price, change=round(price - round(before, 2), 2)))
        return made

    @property
    def stands(self) -> str:
        """What `stands` must be for another simulation to go on here."""
        return json.dumps({"step": self._step, "prices": self._prices})

    async def prices(self) -> AsyncGenerator[tuple[list[Price], str], None]:
        """Make prices at even intervals, with where the simulation stands after them."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            yield self.step(), self.stands
            due = max(due + self._interval, loop.time())
            await asyncio.sleep(due - loop.time())


class Row(NamedTuple):
    """A row of a file: its number, from 1, its time in Unix seconds, and what it says."""

    number: int
    time: float
    price: Price


class Replay:
    """A CSV file with the columns time, symbol and price, at its own pace times `speed`.

    `time` is ISO 8601 or Unix seconds, in ascending order. Other columns are carried along as text. A row that cannot
    be read is left out, with a line in the log. Raises ValueError where a column is missing or the file is no text.
    """

    def __init__(self, path: Path, *, speed: float, repeat: bool, stands: str | None) -> None:
        self._path = path
        self._speed = speed
        self._repeat = repeat
        self._row = int(stands) if stands else 0
        self._given_up = threading.Event()

    async def prices(self) -> AsyncGenerator[tuple[list[Price], str], None]:
        """Read prices when they are due, with the number of the last row read."""
        async with Threads("replay", 1) as threads, aclosing(self._prices(threads)) as prices:
            async for due in prices:
                yield due

    async def _prices(self, threads: Threads) -> AsyncGenerator[tuple[list[Price], str], None]:
        loop = asyncio.get_running_loop()
        while True:
            begun: tuple[float, float] | None = None
            file = await threads.run(self._open, discard=lambda file: file.close())
            try:
                rows = self._rows(csv.DictReader(file))
                while batch := await threads.run(self._take, rows, interrupt=self._given_up.set):
                    for moment, group in itertools.groupby(batch, key=attrgetter("time")):
                        due = list(group)
                        begun = begun or (loop.time(), moment)
                        await asyncio.sleep(begun[0] + (moment - begun[1]) / self._speed - loop.time())
                        yield [row.price for row in due], str(due[-1].number)
            finally:
                await threads.finish(file.close)
            if not self._repeat:
                await asyncio.Event().wait()  # keep the lease: another process would begin anew
            if begun is None and not self._row:
                raise ValueError(f"{self._path.name} has no row that can be replayed")
            self._row = 0
            await asyncio.sleep(1 / self._speed)  # a file of one moment would be repeated without a pause

    def _open(self) -> TextIO:
        try:
            return self._path.open(newline="", encoding="utf-8-sig")
        except OSError as error:
            raise ValueError(f"{self._path.name} cannot be read: {error.strerror}") from None

    def _take(self, rows: Iterator[Row]) -> list[Row]:
        """The next rows, as many as are published at once."""
        try:
            return list(itertools.islice(rows, BATCH))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self._path.name} cannot be read: {error}") from None

    def _rows(self, reader: "csv.DictReader[str]") -> Iterator[Row]:
        """Number, time and price of every row after the one where an earlier replay stopped."""
        if missing := {"time", "symbol", "price"} - set(reader.fieldnames or ()):
            raise ValueError(f"{self._path.name} has no column {', '.join(sorted(missing))}")
        for number, row in enumerate(reader, start=1):
            if self._given_up.is_set():
                return
            if number <= self._row:
                continue
            try:
                others = {name: value for name, value in row.items() if name and name not in ("symbol", "price")}
                if not row["symbol"]:
                    raise ValueError("it has no symbol")
                price = float(row["price"])
                if not math.isfinite(price):
                    raise ValueError("price is not a number")
                yield Row(number, _seconds(row["time"]), Price.of(row["symbol"], price, **others))
            except (ValueError, TypeError) as error:
                log.warning("row %d of %s is left out: %s", number, self._path.name, error)


def _seconds(text: str) -> float:
    """Unix seconds of a time; without an offset it is UTC."""
    try:
        seconds = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(f"{text} is no time")
    return seconds
