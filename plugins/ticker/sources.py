"""Sources of prices: a simulation, and the replay of a CSV file."""

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
"""Time per year in which markets are open, in seconds."""

DRIFT, VOLATILITY = 0.05, 0.3
"""Drift and volatility of simulated prices, as fractions per year."""

BATCH = 500
"""Maximum number of rows that are read, and published, at once."""


class Simulation:
    """Geometric Brownian motion: the same seed gives the same prices. `checkpoint` resumes an earlier simulation.

    Source: S(t + dt) = S(t) exp((mu - sigma^2 / 2) dt + sigma sqrt(dt) Z), with Z normally distributed.
    """

    def __init__(self, symbols: Sequence[str], *, interval: float, seed: int, checkpoint: str | None) -> None:
        self._interval = interval
        self._seed = seed
        state: dict[str, Any] = json.loads(checkpoint) if checkpoint else {}
        self._step: int = state.get("step", 0)
        known: dict[str, float] = state.get("prices", {})
        self._prices = {symbol: known.get(symbol) or self._first(symbol) for symbol in symbols}

    def _first(self, symbol: str) -> float:
        return 20.0 + zlib.crc32(f"{self._seed}:{symbol}".encode()) % 48_000 / 100

    def step(self) -> list[Price]:
        """Return the next price of each symbol, one interval later."""
        self._step += 1
        noise = random.Random(f"{self._seed}:{self._step}")  # noqa: S311 - a simulation, not a secret
        years = self._interval / TRADING_SECONDS
        drift = (DRIFT - VOLATILITY**2 / 2) * years
        prices: list[Price] = []
        for symbol, before in self._prices.items():
            after = max(0.01, before * math.exp(drift + VOLATILITY * math.sqrt(years) * noise.gauss(0, 1)))
            self._prices[symbol] = after
            price = round(after, 2)
            prices.append(Price.of(symbol, price, change=round(price - round(before, 2), 2)))
        return prices

    @property
    def checkpoint(self) -> str:
        """The state from which another simulation resumes."""
        return json.dumps({"step": self._step, "prices": self._prices})

    async def prices(self) -> AsyncGenerator[tuple[list[Price], str], None]:
        """Yield prices at even intervals, each time with the checkpoint after them."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            yield self.step(), self.checkpoint
            due = max(due + self._interval, loop.time())
            await asyncio.sleep(due - loop.time())


class Row(NamedTuple):
    """A row of a file: its number, starting at 1, its time in Unix seconds, and its price."""

    number: int
    time: float
    price: Price


class InvalidFile(ValueError):
    """A file that cannot be replayed; the message names it without its folder."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path.name} {reason}")
        self.reason = reason


def fault(path: Path) -> str | None:
    """Return why a file cannot be replayed, None if it exists and has the columns. Reads the disk."""
    try:
        if path.exists() and not path.is_file():
            return "is not a regular file"
        with _open(path) as file:
            _check_columns(path, csv.DictReader(file))
    except InvalidFile as error:
        return error.reason
    return None


def _open(path: Path) -> TextIO:
    try:
        return path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise InvalidFile(path, f"cannot be read: {error.strerror}") from None


def _check_columns(path: Path, reader: "csv.DictReader[str]") -> None:
    """Raise InvalidFile if a file lacks a column."""
    try:
        missing = {"time", "symbol", "price"} - set(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidFile(path, f"cannot be read: {error}") from None
    if missing:
        raise InvalidFile(path, f"has no column {', '.join(sorted(missing))}")


class Replay:
    """A CSV file with the columns time, symbol and price, replayed `speed` times as fast as its times say.

    `time` is ISO 8601 or Unix seconds, in ascending order. Other columns are published as text. An invalid row is
    skipped, and logged. `checkpoint` is the number of the last row that was published. Raises InvalidFile if the file
    cannot be read, is not UTF-8, or lacks a column.
    """

    def __init__(self, path: Path, *, speed: float, repeat: bool, checkpoint: str | None) -> None:
        self._path = path
        self._speed = speed
        self._repeat = repeat
        self._last_row = int(checkpoint) if checkpoint else 0
        self._cancelled = threading.Event()

    async def prices(self) -> AsyncGenerator[tuple[list[Price], str], None]:
        """Yield prices when they are due, each time with the number of the last row."""
        async with Threads("replay", 1) as threads, aclosing(self._prices(threads)) as batches:
            async for batch in batches:
                yield batch

    async def _prices(self, threads: Threads) -> AsyncGenerator[tuple[list[Price], str], None]:
        loop = asyncio.get_running_loop()
        while True:
            start: tuple[float, float] | None = None
            file = await threads.run(_open, self._path, discard=lambda file: file.close())
            try:
                rows = self._rows(csv.DictReader(file))
                while batch := await threads.run(self._next_batch, rows, interrupt=self._cancelled.set):
                    for moment, group in itertools.groupby(batch, key=attrgetter("time")):
                        due = list(group)
                        start = start or (loop.time(), moment)
                        await asyncio.sleep(start[0] + (moment - start[1]) / self._speed - loop.time())
                        yield [row.price for row in due], str(due[-1].number)
            finally:
                await threads.finish(file.close)
            if not self._repeat:
                await asyncio.Event().wait()  # hold the lease: another process would replay the file again
            if start is None and not self._last_row:
                raise InvalidFile(self._path, "has no valid row")
            self._last_row = 0
            await asyncio.sleep(1 / self._speed)  # a file whose rows share one time would repeat without a pause

    def _next_batch(self, rows: Iterator[Row]) -> list[Row]:
        """Return up to `BATCH` rows; an empty list at the end of the file."""
        try:
            return list(itertools.islice(rows, BATCH))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InvalidFile(self._path, f"cannot be read: {error}") from None

    def _rows(self, reader: "csv.DictReader[str]") -> Iterator[Row]:
        """Yield the valid rows after the checkpoint."""
        _check_columns(self._path, reader)
        for number, row in enumerate(reader, start=1):
            if self._cancelled.is_set():
                return
            if number <= self._last_row:
                continue
            try:
                others = {name: value for name, value in row.items() if name and name not in ("symbol", "price")}
                if not row["symbol"]:
                    raise ValueError("the symbol is missing")
                price = float(row["price"])
                if not math.isfinite(price):
                    raise ValueError("the price is not a finite number")
                yield Row(number, _seconds(row["time"]), Price.of(row["symbol"], price, **others))
            except (ValueError, TypeError) as error:
                log.warning("row %d of %s is skipped: %s", number, self._path.name, error)


def _seconds(text: str) -> float:
    """Return a time as Unix seconds; a time without an offset is UTC."""
    try:
        seconds = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(f"{text} is not a valid time")
    return seconds
