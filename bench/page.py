"""A run in Markdown: its page, and the sections of bench/README.md with numbers."""

import re
from collections.abc import Sequence
from pathlib import Path

from .record import Record
from .report import table
from .suite import BENCHMARKS

README = Path(__file__).parent / "README.md"
PLOTS = Path(__file__).parent / "plots"
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def summary(record: Record, markdown: bool) -> str:
    """Return a row for each benchmark: how long it took, and how many of its goals are met."""
    rows = [["benchmark", "time, s", "limit, s", "rounds", "ratios met", "numbers met", "ended"]]
    for name, outcome in record.outcomes.items():
        judged = BENCHMARKS[name].judge(outcome)
        cells = []
        for absolute in (False, True):
            verdicts = [one.verdict for one in judged if bool(one.goal.unit) == absolute]
            cells.append(f"{verdicts.count('met')} of {len(verdicts)}" if verdicts else "-")
        rounds = outcome.facts.get("rounds", "-")
        rows.append(
            [name, f"{outcome.seconds:.0f}", f"{outcome.budget:.0f}", rounds, *cells, outcome.failure or "done"]
        )
    return table(rows, markdown)


def sections(record: Record, pictures: Sequence[str]) -> dict[str, str]:
    """Return the text of each section by its name; `pictures` are the URLs of the plots."""
    found = {name: BENCHMARKS[name].report(one, markdown=True) for name, one in record.outcomes.items()}
    if "scale" in found:
        shown = "\n".join(f"![How cost grows: {Path(one).stem.rpartition('-')[2]}]({one})" for one in pictures)
        found["scale"] = f"{shown}\n\n{found['scale']}" if shown else found["scale"]
    if record.full:
        found["all"] = summary(record, markdown=True)
    return found


def page(record: Record, pictures: Sequence[str]) -> str:
    """Return the page of a run."""
    found = sections(record, pictures)
    parts = [f"# Run of {record.began}", summary(record, markdown=True)]
    parts += [f"## {name}\n\n{found[name]}" for name in record.outcomes]
    return "\n\n".join(parts) + "\n"


def filled(text: str, found: dict[str, str]) -> str:
    """Return a text with its sections filled; a section without numbers in the run is unchanged."""

    def fill(section: re.Match[str]) -> str:
        begin, name, end = section.groups()
        return f"{begin}\n{found[name]}\n\n{end}" if name in found else section[0]

    return SECTION.sub(fill, text)
