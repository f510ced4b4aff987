"""The report of a benchmark: numbers, goals and their results, and tables of both."""

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .servers import nginx_binary

Table = Sequence[Sequence[str]]
"""Rows of cells; the first of them is the header."""


@dataclass(frozen=True)
class Measurement:
    """One number of one server in one round; `streams` is its number of concurrent clients, or the size of its task."""

    server: str
    round: int
    streams: int
    key: str
    value: float


class Numbers:
    """Measurements, by server, number of streams and key."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self._found: dict[tuple[str, int, str], dict[int, float]] = {}
        for one in measurements:
            self._found.setdefault((one.server, one.streams, one.key), {})[one.round] = one.value

    def __call__(self, server: str, streams: int, key: str) -> Mapping[int, float]:
        """Return a number of a server with `streams` streams, by round."""
        return self._found.get((server, streams, key), {})

    def ratios(self, server: str, peer: str, streams: int, key: str, by: str | None = None) -> dict[int, float]:
        """Divide the numbers of a server by those of a peer in the same round; `by` is the peer's key, if another."""
        mine, theirs = self(server, streams, key), self(peer, streams, by or key)
        return {number: mine[number] / theirs[number] for number in mine if theirs.get(number)}

    def streams(self, key: str, server: str | None = None) -> list[int]:
        """Return the numbers of streams with a measurement of a key, of one server or of any."""
        return sorted({count for name, count, other in self._found if other == key and server in (None, name)})


@dataclass(frozen=True)
class Goal:
    """The required value of a server's number divided by the peer's of the same round; without a peer, of the number.

    A ratio of the same run depends mostly on the server, so it is judged. A number with a `unit` depends as much on the
    machine, so its result is only reported.
    """

    title: str
    peer: str | None
    streams: int
    key: str
    sign: str  # ">=" or "<="
    limit: float
    server: str = "streamlab"
    by: str | None = None
    """The key of the peer's number, if another: a server may be its own peer."""
    unit: str = ""
    short: str = ""
    """Known reason for falling short."""
    floor: float | None = None
    """Worst accepted value despite the reason."""

    def __post_init__(self) -> None:
        if (self.peer is None) != bool(self.unit):
            raise ValueError(f"{self.title}: a ratio has a peer and no unit, a number a unit and no peer")
        if self.peer and bool(self.short) != (self.floor is not None):
            raise ValueError(f"{self.title}: a ratio that may fall short has a reason and a floor")

    def __str__(self) -> str:
        return f"{self.server} {self.title}" + (f", {self.unit}" if self.unit else "")

    def reached(self, value: float, limit: float) -> bool:
        """Return whether a value meets a limit."""
        return value >= limit if self.sign == ">=" else value <= limit


@dataclass(frozen=True)
class Judgement:
    """The result of a goal: the median of its rounds is judged."""

    goal: Goal
    found: Mapping[int, float]
    absent: str = ""
    """Known reason for a missing number: a peer that is not installed."""

    @cached_property
    def median(self) -> float:
        """The median of the rounds; there must be one."""
        return statistics.median(self.found.values())

    @property
    def verdict(self) -> str:
        """Met, or by how much not, or why not measured."""
        goal = self.goal
        if not self.found:
            return "not measured" + (f": {self.absent}" if self.absent else "")
        if goal.reached(self.median, goal.limit):
            return "met"
        if goal.floor is not None and not goal.reached(self.median, goal.floor):
            return f"below its floor of {number(goal.floor)}"
        percent = abs(self.median - goal.limit) / goal.limit * 100
        floor = "" if goal.floor is None else f", floor {number(goal.floor)}"
        return f"falls short by {max(1, round(percent))} %{floor}"

    @property
    def passes(self) -> bool:
        """Whether a ratio passes: a shortfall or a missing number needs a known reason."""
        goal = self.goal
        if not self.found:
            return bool(self.absent)
        return goal.reached(self.median, goal.limit if goal.floor is None else goal.floor)


def judge(goals: Sequence[Goal], numbers: Numbers, absent: Mapping[str, str]) -> list[Judgement]:
    """Judge goals; `absent` has the reason for each server that is not available."""
    judged = []
    for goal in goals:
        if goal.peer is None:
            found = numbers(goal.server, goal.streams, goal.key)
        else:
            found = numbers.ratios(goal.server, goal.peer, goal.streams, goal.key, goal.by)
        judged.append(Judgement(goal, found, absent.get(goal.server) or absent.get(goal.peer or "") or ""))
    return judged


# -- tables


def number(value: float) -> str:
    """Format a number with three significant digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def spread(values: Mapping[int, float]) -> str:
    """Format the median, minimum and maximum of the rounds of a number; "-" if there is none."""
    if not values:
        return "-"
    found = values.values()
    median = number(statistics.median(found))
    return median if len(values) == 1 else f"{median} ({number(min(found))}..{number(max(found))})"


def goal_rows(judged: Sequence[Judgement], streams: str) -> list[list[str]]:
    """Return a row for each goal; `streams` heads the column with the number of streams."""
    rows = [["ratio", streams, "median (min..max)", "goal", "result"]]
    for one in judged:
        goal = f"{one.goal.sign} {number(one.goal.limit)}"
        rows.append([str(one.goal), f"{one.goal.streams:,}", spread(one.found), goal, one.verdict])
    return rows


def reasons(judged: Sequence[Judgement]) -> list[str]:
    """Return the known reasons of goals that are not met."""
    return [
        f"*{one.goal}, {one.goal.streams:,}*: {one.goal.short}"
        for one in judged
        if one.goal.short and one.found and one.verdict != "met"
    ]


def server_rows(numbers: Numbers, servers: Sequence[str], keys: Mapping[str, tuple[int, str]]) -> list[list[str]]:
    """Return a row for each server that has any of the numbers; `keys`: number of streams and key, by title."""
    rows = [["server", *keys]]
    for name in servers:
        cells = [spread(numbers(name, *key)) for key in keys.values()]
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    return rows


def stream_rows(numbers: Numbers, servers: Sequence[str], streams: str, keys: Mapping[str, str]) -> list[list[str]]:
    """Return a row for each server and number of streams that has any of the keys; `keys`: by title."""
    rows = [["server", streams, *keys]]
    for count in sorted({count for key in keys.values() for count in numbers.streams(key)}):
        for name in servers:
            cells = [spread(numbers(name, count, key)) for key in keys.values()]
            if set(cells) != {"-"}:
                rows.append([name, f"{count:,}", *cells])
    return rows


def ratio_rows(
    numbers: Numbers, server: str, peers: Sequence[str], streams: str, keys: Mapping[str, str]
) -> list[list[str]]:
    """Return a row for each peer and number of streams: the server's numbers over the peer's; `keys`: by title."""
    rows = [[f"{server} / peer", streams, *keys]]
    for count in sorted({count for key in keys.values() for count in numbers.streams(key, server)}):
        for peer in peers:
            cells = [spread(numbers.ratios(server, peer, count, key)) for key in keys.values()]
            if set(cells) != {"-"}:
                rows.append([peer, f"{count:,}", *cells])
    return rows


def table(rows: Table, markdown: bool) -> str:
    """Format rows, the first of them the header, as aligned text or as Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---" * len(widths) + "|", *lines[1:]])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


# -- facts


def machine(packages: Sequence[str]) -> dict[str, str]:
    """Return the conditions of a run besides its options, by name; `packages` are those whose versions matter."""
    info = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown CPU")
    binary = nginx_binary()
    output = subprocess.run([binary, "-v"], capture_output=True, text=True).stderr if binary else "not installed"
    versions = ", ".join(f"{name} {_version(name)}" for name in packages) + f", nginx {output.strip().split('/')[-1]}"
    return {
        "machine": f"{os.cpu_count()} cores, {model}, {platform.machine()}",
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "versions": versions,
        "load": f"{os.getloadavg()[0]:.2f} processes on average in the minute before",
    }


def filesystem(path: Path) -> str:
    """Return the type of the file system a path is on, as `ext4`."""
    kinds = [line.split()[1:3] for line in Path("/proc/mounts").read_text(errors="replace").splitlines()]
    real = path.resolve()
    above = [(mount, kind) for mount, kind in kinds if real.is_relative_to(re.sub(r"\\040", " ", mount))]
    return max(above, key=lambda found: len(found[0]))[1] if above else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
