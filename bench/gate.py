"""The regression gate: the ratios of a run, held against the goals."""

from .record import Record
from .report import Judgement, number, spread, table
from .suite import BENCHMARKS


def check(record: Record) -> tuple[str, bool]:
    """Judge a run: return what is to be said of it, and whether it passes."""
    judged = {name: BENCHMARKS[name].judge(one) for name, one in record.outcomes.items() if name in BENCHMARKS}
    every = [(name, one) for name, found in judged.items() for one in found]
    ratios = [(name, one) for name, one in every if not one.goal.unit]
    failed = [(name, one) for name, one in ratios if not one.passes]
    parts = [_table(ratios)]
    parts += ["told, not judged: what is measured in a unit depends on the machine\n" + _table(every, absolute=True)]
    parts += ["\n".join(f"- {name}: {one.goal}, {one.goal.streams:,}: {one.goal.short}" for name, one in _known(every))]
    for name, outcome in record.outcomes.items():
        parts += [f"{name}: {words}" for words in (outcome.failure, *outcome.notes) if words]
    met = sum(one.verdict == "met" for _, one in ratios)
    short = sum(bool(one.found) and one.verdict != "met" and one.passes for _, one in ratios)
    missing = sum(not one.found and one.passes for _, one in ratios)
    told = f"{met} of {len(ratios)} ratios are met, {short} fall short for a known reason and stay above their floor,"
    told += f" {missing} have a peer that is not on this machine, and {len(failed)} do not pass"
    parts += [told + "".join(f"\n- {name}: {one.goal}, {one.goal.streams:,}: {one.verdict}" for name, one in failed)]
    return "\n\n".join(part for part in parts if part), not failed


def _known(every: list[tuple[str, Judgement]]) -> list[tuple[str, Judgement]]:
    return [(name, one) for name, one in every if one.goal.short and one.found and one.verdict != "met"]


def _table(every: list[tuple[str, Judgement]], absolute: bool = False) -> str:
    rows = [["benchmark", "ratio" if not absolute else "number", "of", "median (min..max)", "goal", "result"]]
    for name, one in every:
        if bool(one.goal.unit) == absolute:
            wanted = f"{one.goal.sign} {number(one.goal.limit)}"
            rows.append([name, str(one.goal), f"{one.goal.streams:,}", spread(one.found), wanted, one.verdict])
    return table(rows, markdown=False)
