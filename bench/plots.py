"""The plots: how cost grows with followers, with the size of a download and with the rows of an export, as SVG."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .events import FASTAPI, NCHAN, RAW, SSE_STARLETTE, STREAMLAB
from .export import SQLALCHEMY
from .file import NGINX
from .record import Outcome
from .report import Numbers, number
from .scale import DOWNLOADS, EXPORTS, FAN_OUT

STYLES = {  # colour and marker of each server, the same in every plot, distinguishable without colours
    STREAMLAB: ("#0b62d6", "o"),
    FASTAPI: ("#c2410c", "s"),
    SSE_STARLETTE: ("#7c3aed", "^"),
    SQLALCHEMY: ("#7c3aed", "^"),
    NCHAN: ("#15803d", "D"),
    NGINX: ("#15803d", "D"),
    RAW: ("#525252", "v"),
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text remains text: small, sharp and searchable
    "svg.hashsalt": "streamlab",  # the same numbers produce the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Panel:
    """One number by size; values below `minimum` are drawn there, since the axis is logarithmic."""

    title: str
    key: str
    minimum: float = 0.001


@dataclass(frozen=True)
class Plot:
    """The panels of one picture, side by side."""

    name: str
    axis: str
    servers: Sequence[str]
    panels: Sequence[Panel]


PLOTS = (
    Plot(
        "followers",
        "followers",
        FAN_OUT,
        (
            Panel("deliveries per second, one event in flight", "one rate"),
            Panel("p99 of a delivery, ms, paced", "paced p99"),
            Panel("memory per follower, KiB", "idle", 0.5),
            Panel("CPU per delivery, µs", "one cpu"),
        ),
    ),
    Plot(
        "downloads",
        "size of the file",
        DOWNLOADS,
        (
            Panel("rate, GB/s", "download rate"),
            Panel("first byte, ms", "download first"),
            Panel("growth of peak memory, MB (0.01: less, or none)", "download memory", 0.01),
            Panel("CPU seconds per GB", "download cpu"),
        ),
    ),
    Plot(
        "exports",
        "rows",
        EXPORTS,
        (
            Panel("CSV, thousand rows per second", "export rate"),
            Panel("growth of peak memory, MB", "export memory", 0.01),
        ),
    ),
)


def draw(outcome: Outcome, folder: Path, prefix: str = "") -> list[Path]:
    """Draw the plots of `scale` that have numbers, and return their files."""
    numbers, drawn = Numbers(outcome.measurements), []
    folder.mkdir(parents=True, exist_ok=True)
    for plot in PLOTS:
        if numbers.streams(plot.panels[0].key):
            drawn.append(folder / f"{prefix}{plot.name}.svg")
            with mpl.rc_context(SETTINGS):
                _figure(plot, numbers).savefig(drawn[-1], metadata={"Date": None, "Creator": None})
    return drawn


def _figure(plot: Plot, numbers: Numbers) -> Figure:
    rows = len(plot.panels) // 2
    figure = Figure(figsize=(9, 0.7 + 2.7 * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, 2, squeeze=False).flat, plot.panels, strict=True):
        _draw(axes, plot, panel, numbers)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _draw(axes: Axes, plot: Plot, panel: Panel, numbers: Numbers) -> None:
    sizes, values = numbers.streams(panel.key), []
    for name in plot.servers:
        here = numbers.streams(panel.key, name)
        line = [max(panel.minimum, statistics.median(numbers(name, size, panel.key).values())) for size in here]
        if line:
            colour, mark = STYLES[name]
            stops = "" if here[-1] == sizes[-1] else f" (to {_label(plot, here[-1])})"
            width = 2 if name == STREAMLAB else 1.2
            axes.plot(here, line, color=colour, marker=mark, markersize=4, linewidth=width, label=name + stops)
            values += line
    axes.set(title=panel.title, xlabel=plot.axis, xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _label(plot, round(value))))
    wide = max(values) > 100 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _label(plot: Plot, size: int) -> str:
    if plot.name != "downloads":
        return f"{size:,}"
    return f"{size // 1024} GiB" if size >= 1024 else f"{size} MiB"
