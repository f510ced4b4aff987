"""A run as stored in bench/results/: every number, its conditions, and how each benchmark ended."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from .report import Judgement, Measurement

RESULTS = Path(__file__).parent / "results"


@dataclass
class Outcome:
    """What one benchmark measured, and how it ended."""

    seconds: float = 0.0
    budget: float = 0.0
    facts: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Servers that are not available, and why."""
    notes: list[str] = field(default_factory=list)
    """Skipped measurements."""
    failure: str = ""
    """Why it ended early; empty if it did not."""
    measurements: list[Measurement] = field(default_factory=list)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> "Outcome":
        """Build it from the JSON of a file."""
        known = {key: data[key] for key in ("seconds", "budget", "facts", "absent", "notes", "failure") if key in data}
        return cls(**known, measurements=[Measurement(*one) for one in data["measurements"]])

    def document(self, judged: Sequence[Judgement]) -> dict[str, Any]:
        """Return it as JSON, with the results of the goals."""
        goals = [
            {
                "goal": str(one.goal),
                "streams": one.goal.streams,
                "wanted": f"{one.goal.sign} {one.goal.limit:.3g}",
                "judged": not one.goal.unit,
                "median": one.median if one.found else None,
                "rounds": list(one.found.values()),
                "verdict": one.verdict,
                "why": one.goal.short,
            }
            for one in judged
        ]
        # Each number is a list in the order of the fields of Measurement: a tenth of the size.
        rows = [list(asdict(one).values()) for one in self.measurements]
        return {**asdict(self), "goals": goals, "measurements": rows}


@dataclass
class Record:
    """A run of one or more benchmarks; `full` if it was all of them without --quick."""

    outcomes: dict[str, Outcome]
    full: bool = False
    began: str = field(default_factory=lambda: f"{datetime.now():%Y-%m-%dT%H%M%S}")

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a file. Raises OSError, or ValueError if it is not a run."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            outcomes = {name: Outcome.parse(one) for name, one in data["benchmarks"].items()}
            return cls(outcomes, bool(data["full"]), str(data["began"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not the file of a run: {error!r}") from None

    def write(self, path: Path, judged: Mapping[str, Sequence[Judgement]]) -> None:
        """Write it, with the results of the goals of each benchmark."""
        path.parent.mkdir(parents=True, exist_ok=True)
        benchmarks = {name: one.document(judged.get(name, ())) for name, one in self.outcomes.items()}
        text = json.dumps({"began": self.began, "full": self.full, "benchmarks": benchmarks})
        path.write_text(text + "\n", encoding="utf-8")


def newest(folder: Path) -> Path:
    """Find the newest full run. Raises FileNotFoundError if there is none."""
    for path in sorted(folder.glob("[0-9]*.json"), reverse=True):
        if Record.read(path).full:
            return path
    raise FileNotFoundError(f"no full run in bench/{folder.name}/: run `make bench` first")


def newest_two(folder: Path) -> list[Path]:
    """Find the newest two runs, the older one first. Raises FileNotFoundError if there are fewer."""
    found = sorted(folder.glob("[0-9]*.json"))[-2:]
    if len(found) < 2:
        raise FileNotFoundError(f'there are no two runs in bench/{folder.name}/: run `make bench ARGS="--short"` twice')
    return found
