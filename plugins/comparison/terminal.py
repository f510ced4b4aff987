"""The terminal view `comparison`: buffered and streamed responses, measured and drawn as bars."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from streamlab import hookimpl
from streamlab.client import Terminal, ViewError, one_line, prompt_number

BAR_CELLS = 30
"""Maximum length of a bar, in characters."""

SCALES = (("ttfb_ms", "first byte", "ms"), ("total_ms", "total", "ms"), ("peak_rss_mb", "peak memory", "MB"))
"""Member of a measurement, heading and unit of each column of bars."""


def show_comparison(terminal: Terminal) -> None:
    """Buffered compared with streamed, measured now, as bars."""
    rows = prompt_number("rows", 20_000)
    repeats = prompt_number("repeats", 1)
    asyncio.run(_measure(terminal, rows, repeats))


async def _measure(terminal: Terminal, rows: int | None, repeats: int | None) -> None:
    measurements: list[dict[str, Any]] = []
    verdict, title = "", "measuring"

    def draw() -> Table:
        return _bars(terminal.console, measurements, title)

    # A report cannot be resumed: another connection would start a new measurement.
    query = {"rows": rows, "repeats": repeats}
    report = terminal.events("/demo/comparison/report", query, reconnect=False)
    async with terminal.live(draw), aclosing(report) as events:
        async for name, data in events:
            if name == "measurement":
                measurements.append(data)
            elif name == "progress":
                title = str(data.get("message"))
                if not terminal.console.is_terminal:
                    terminal.note(title)
            elif name == "end":
                verdict, title = str(data.get("verdict")), "measured"
    if not terminal.console.is_terminal:
        terminal.console.print(draw())
    if not verdict:
        raise ViewError("the report broke off")
    terminal.print(one_line(verdict))


def _bars(console: Console, measurements: Sequence[dict[str, Any]], title: str) -> Table:
    """Return the measurements as numbers and as bars, with one scale for each column."""
    mark = "#" if console.options.ascii_only else "█"
    table = Table(title=Text(one_line(title)), title_justify="left", box=None, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("mode")
    cells = max(4, min(BAR_CELLS, (console.width - 28) // len(SCALES) - 14))
    for _, heading, _ in SCALES:
        table.add_column(heading, no_wrap=True)
    for one in measurements:
        row = [Text(f"{_number(one, 'rows'):,.0f}"), Text(one_line(str(one.get("mode"))))]
        for name, _, unit in SCALES:
            longest = max(_number(other, name) for other in measurements) or 1.0
            value = _number(one, name)
            bar = mark * round(max(value, 0.0) / longest * cells)
            row.append(
                Text(f"{value:9,.1f} {unit} ").append(bar, style="cyan" if one.get("mode") == "streamed" else "")
            )
        table.add_row(*row)
    return table


def _number(data: dict[str, Any], name: str) -> float:
    value = data.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


@hookimpl
def register_views() -> Mapping[str, Callable[[Terminal], None]]:
    """Provide the view `comparison`."""
    return {"comparison": show_comparison}
