"""The terminal view `ticker`: a live table of prices."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any

from rich.table import Table
from rich.text import Text

from streamlab import hookimpl
from streamlab.client import Terminal, describe_event, one_line, prompt, prompt_number

RATE_SECONDS = 5.0
"""Window over which the events per second are counted, in seconds."""


def show_ticker(terminal: Terminal) -> None:
    """Live prices."""
    symbols = prompt("symbols, for example AAPL,MSFT", hint="all")
    limit = prompt_number("events", None, hint="until Ctrl-C")
    asyncio.run(_follow_prices(terminal, symbols, limit))


async def _follow_prices(terminal: Terminal, symbols: str, limit: int | None) -> None:
    prices: dict[str, dict[str, Any]] = {}
    times: deque[float] = deque()
    started, count = time.monotonic(), 0

    def draw() -> Table:
        now = time.monotonic()
        while times and times[0] < now - RATE_SECONDS:
            times.popleft()
        rate = len(times) / min(RATE_SECONDS, max(now - started, 1.0))
        return _table(
            prices, f"{len(prices):,} symbols, {rate:,.1f} events/s", rows=max(terminal.console.height - 6, 1)
        )

    query = {"symbols": symbols, "limit": limit}
    async with terminal.live(draw), aclosing(terminal.events("/stream/stock-ticker", query)) as events:
        async for name, price in events:
            if name != "message":
                terminal.note(describe_event(name, price))
                continue
            if terminal.console.is_terminal:
                prices[str(price.get("symbol"))] = price
                times.append(time.monotonic())
            else:
                terminal.print(Text(" ").join(_cells(price)))
            count += 1
            if count == limit:
                return  # counted here as well: the server applies the limit to each connection


def _table(prices: Mapping[str, dict[str, Any]], title: str, *, rows: int) -> Table:
    """Return a table of the latest prices, at most `rows` symbols."""
    table = Table(title=title, title_justify="left")
    table.add_column("symbol")
    for column in ("price", "change"):
        table.add_column(column, justify="right")
    table.add_column("time")
    latest = sorted(prices, key=lambda symbol: str(prices[symbol].get("time")))[-rows:]
    for symbol in sorted(latest):
        table.add_row(*_cells(prices[symbol]))
    return table


def _cells(event: dict[str, Any]) -> tuple[Text, Text, Text, Text]:
    """Return symbol, price, change and time of an event."""
    change = event.get("change")
    direction = change if isinstance(change, int | float) else 0
    style = "green" if direction > 0 else "red" if direction < 0 else ""
    shown = f"{change:+g}" if isinstance(change, int | float) else "-"
    symbol, price, moment = (one_line(str(event.get(name))) for name in ("symbol", "price", "time"))
    return Text(symbol), Text(price), Text(shown, style=style), Text(moment)


@hookimpl
def register_views() -> Mapping[str, Callable[[Terminal], None]]:
    """Provide the view `ticker`."""
    return {"ticker": show_ticker}
