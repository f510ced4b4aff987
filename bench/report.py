"""What a benchmark tells: facts of the machine, goals and whether they are met, tables, and every number kept."""

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .servers import nginx_binary

RESULTS = Path(__file__).parent / "results"

Numbers = Callable[[str, int, str], Mapping[int, float]]
"""What was measured of a server with so many streams under a key: a number for each round that has one."""


@dataclass(frozen=True)
class Measurement:
    """One number of one server in one round; `streams` is how many clients it had at once."""

    server: str
    round: int
    streams: int
    key: str
    value: float


def by_round(taken: Sequence[Measurement]) -> Numbers:
    """Look numbers up by server, streams and key; each of them by round."""
    return lambda *which: {one.round: one.value for one in taken if (one.server, one.streams, one.key) == which}


@dataclass(frozen=True)
class Goal:
    """What a server's number, divided by the peer's of the same round, shall be; without a peer, the number itself."""

    title: str
    peer: str | None
    streams: int
    key: str
    sign: str  # ">=" or "<="
    limit: float
    server: str = "streamlab"


def goal_rows(goals: Sequence[Goal], numbers: Numbers, streams: str, missing: str) -> list[list[str]]:
    """A row for each goal: numbers of the same round are divided, and the median of the ratios is judged.

    `streams` heads the column with the number of streams, and `missing` stands for a ratio that has no numbers.
    """
    rows = [["ratio", streams, "median (min..max)", "goal", "result"]]
    for goal in goals:
        found = numbers(goal.server, goal.streams, goal.key)
        if goal.peer is not None:
            theirs = numbers(goal.peer, goal.streams, goal.key)
            found = {number: found[number] / theirs[number] for number in found if number in theirs}
        median = statistics.median(found.values()) if found else 0
        result = "met" if (median >= goal.limit if goal.sign == ">=" else median <= goal.limit) else "missed"
        cells = [spread(found, missing), f"{goal.sign} {goal.limit:.3g}", result if found else "-"]
        rows.append([f"{goal.server} {goal.title}", str(goal.streams), *cells])
    return rows


def spread(values: Mapping[int, float], missing: str) -> str:
    """Median, least and greatest of a number's rounds; `missing` where there is none."""
    if not values:
        return missing
    found = values.values()
    return f"{statistics.median(found):.3g} ({min(found):.3g}..{max(found):.3g})"


def table(rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Lay out rows, the first of them the header, as aligned text or as Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---" * len(widths) + "|", *lines[1:]])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def machine(packages: Sequence[str]) -> dict[str, str]:
    """What any numbers depend on besides the options, as name and value: `packages` are those whose versions count."""
    info = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown CPU")
    binary = nginx_binary()
    said = subprocess.run([binary, "-v"], capture_output=True, text=True).stderr if binary else "not installed"
    versions = ", ".join(f"{name} {_version(name)}" for name in packages) + f", nginx {said.strip().split('/')[-1]}"
    return {
        "machine": f"{os.cpu_count()} cores, {model}, {platform.machine()}",
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "versions": versions,
        "load": f"{os.getloadavg()[0]:.2f} processes on average in the minute before",
    }


def filesystem(path: Path) -> str:
    """The type of the file system a path is on, as `ext4`."""
    kinds = [line.split()[1:3] for line in Path("/proc/mounts").read_text(errors="replace").splitlines()]
    real = path.resolve()
    above = [(mount, kind) for mount, kind in kinds if real.is_relative_to(re.sub(r"\\040", " ", mount))]
    return max(above, key=lambda found: len(found[0]))[1] if above else "unknown"


def keep(benchmark: str, facts: Mapping[str, str], measurements: Sequence[Any]) -> Path:
    """Write every number (dataclasses) of a run into bench/results/; return the file."""
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"{benchmark}-{datetime.now():%Y-%m-%dT%H%M%S}.json"
    kept.write_text(
        json.dumps({"facts": facts, "measurements": [asdict(one) for one in measurements]}, indent=1) + "\n"
    )
    return kept


def show(facts: Mapping[str, str], tables: Sequence[Sequence[Sequence[str]]], markdown: bool, kept: Path) -> None:
    """Print facts and tables as text, then as Markdown too if wanted."""
    for as_markdown in (False, True)[: 1 + markdown]:
        lines = [f"- {name}: {fact}" if as_markdown else f"{name + ':':<11}{fact}" for name, fact in facts.items()]
        print("\n" + "\n\n".join(["\n".join(lines), *(table(rows, as_markdown) for rows in tables)]))
    print(f"\nevery number: bench/results/{kept.name}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
