"""The regression gate: the ratios of a run, compared with the goals."""

from .record import Record
from .report import Judgement, number, spread, table
from .suite import BENCHMARKS


def check(record: Record) -> tuple[str, bool]:
    """Compare a run with the goals; return the report, and whether it passes."""
    judged = {name: BENCHMARKS[name].judge(one) for name, one in record.outcomes.items() if name in BENCHMARKS}
    every = [(name, one) for name, found in judged.items() for one in found]
    ratios = [(name, one) for name, one in every if not one.goal.unit]
    failed = [(name, one) for name, one in ratios if not one.passes]
    parts = [_table(ratios)]
    parts += ["reported, not judged: numbers with a unit depend on the machine\n" + _table(every, absolute=True)]
    parts += ["\n".join(f"- {name}: {one.goal}, {one.goal.streams:,}: {one.goal.short}" for name, one in _known(every))]
    for name, outcome in record.outcomes.items():
        parts += [f"{name}: {text}" for text in (outcome.failure, *outcome.notes) if text]
    met = sum(one.verdict == "met" for _, one in ratios)
    short = sum(bool(one.found) and one.verdict != "met" and one.passes for _, one in ratios)
    missing = sum(not one.found and one.passes for _, one in ratios)
    total = f"{met} of {len(ratios)} ratios are met, {short} fall short for a known reason and stay above their floor,"
    total += f" {missing} have a peer that is not installed, and {len(failed)} do not pass"
    parts += [total + "".join(f"\n- {name}: {one.goal}, {one.goal.streams:,}: {one.verdict}" for name, one in failed)]
    return "\n\n".join(part for part in parts if part), not failed


def _known(every: list[tuple[str, Judgement]]) -> list[tuple[str, Judgement]]:
    return [(name, one) for name, one in every if one.goal.short and one.found and one.verdict != "met"]


def _table(every: list[tuple[str, Judgement]], absolute: bool = False) -> str:
    rows = [["benchmark", "ratio" if not absolute else "number", "of", "median (min..max)", "goal", "result"]]
    for name, one in every:
        if bool(one.goal.unit) == absolute:
            goal = f"{one.goal.sign} {number(one.goal.limit)}"
            rows.append([name, str(one.goal), f"{one.goal.streams:,}", spread(one.found), goal, one.verdict])
    return table(rows, markdown=False)
