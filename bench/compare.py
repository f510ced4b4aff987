"""A change of the code between two runs: its effect on each ratio in per cent, and the noise of that."""

import statistics
from collections.abc import Iterator, Mapping

from .record import Record
from .report import Judgement, spread, table
from .suite import BENCHMARKS


def compare(before: Record, after: Record) -> str:
    """Return a row for each ratio that both runs have.

    The noise is half the range of the rounds over their median, of both runs together. A change within it may be none.
    """
    rows = [["benchmark", "ratio", "of", f"before ({before.began})", f"after ({after.began})", "change", "result"]]
    for name, one, other in _pairs(before, after):
        change = (other.median / one.median - 1) * 100
        noise = _noise(one.found) + _noise(other.found)
        medians = spread(one.found), spread(other.found)
        result = _result(one, other, change, noise)
        rows.append([name, str(one.goal), f"{one.goal.streams:,}", *medians, f"{change:+.1f} %", result])
    return table(rows, markdown=False) if len(rows) > 1 else "these two runs have no ratio in common"


def _pairs(before: Record, after: Record) -> Iterator[tuple[str, Judgement, Judgement]]:
    for name in before.outcomes.keys() & after.outcomes.keys() & BENCHMARKS.keys():
        judge = BENCHMARKS[name].judge
        for one, other in zip(judge(before.outcomes[name]), judge(after.outcomes[name]), strict=True):
            if one.found and other.found and not one.goal.unit:
                yield name, one, other


def _noise(rounds: Mapping[int, float]) -> float:
    """Return half the range of a number in per cent of its median."""
    values = rounds.values()
    return (max(values) - min(values)) / 2 / statistics.median(values) * 100


def _result(one: Judgement, other: Judgement, change: float, noise: float) -> str:
    if min(len(one.found), len(other.found)) == 1:
        return "one round: its noise is not known"
    if abs(change) <= noise:
        return f"within the noise of {noise:.1f} %"
    return ("better" if (change > 0) == (one.goal.sign == ">=") else "worse") + f", noise {noise:.1f} %"
