"""Measure everything and its peers, compare a run with the goals, or write it into bench/README.md."""

import argparse
import signal
import sys
from pathlib import Path

from . import gate, page, suite
from .compare import compare
from .record import RESULTS, Record, newest, newest_two


def measure(options: argparse.Namespace) -> int:
    """Run all benchmarks, or the selected ones; store numbers, page and plots; return the exit status."""
    usual = [name for name, one in suite.BENCHMARKS.items() if one.short or not options.short]
    chosen = [one for name, one in suite.BENCHMARKS.items() if name in (options.only or usual)]
    record = Record({})
    path = RESULTS / f"{record.began}.json"
    for name, outcome in suite.measure(chosen, options):
        record.outcomes[name] = outcome
        store(record, path)  # after each one, so that an aborted run keeps its numbers
    record.full = not (options.quick or options.short) and len(chosen) == len(suite.BENCHMARKS)
    store(record, path)
    pictures = draw(record, RESULTS, f"{record.began}-")
    path.with_suffix(".md").write_text(page.page(record, [one.name for one in pictures]), encoding="utf-8")
    if options.keep:
        draw(record, page.PLOTS)
    for name, outcome in record.outcomes.items():
        print(f"\n== {name}\n\n{suite.BENCHMARKS[name].report(outcome, markdown=False)}")
    print(f"\n== all\n\n{page.summary(record, markdown=False)}")
    if options.markdown:
        print("\n" + path.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"\nevery number: bench/results/{path.name}; the page: {path.stem}.md; plots: {path.stem}-*.svg")
    return int(any(one.failure for one in record.outcomes.values()))


def store(record: Record, path: Path) -> None:
    """Write a run, with the results of its goals."""
    record.write(path, {name: suite.BENCHMARKS[name].judge(one) for name, one in record.outcomes.items()})


def draw(record: Record, folder: Path, prefix: str = "") -> list[Path]:
    """Draw the plots of a run, if it has the numbers, and return their files."""
    if "scale" not in record.outcomes:
        return []
    from . import plots  # judging needs no matplotlib

    return plots.draw(record.outcomes["scale"], folder, prefix)


def write(record: Record) -> None:
    """Write a run into bench/README.md and bench/plots/."""
    pictures = [f"plots/{one.name}" for one in draw(record, page.PLOTS)]
    text = page.README.read_text(encoding="utf-8")
    page.README.write_text(page.filled(text, page.sections(record, pictures)), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if a goal is missed or a benchmark fails, 2 without a run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--check",
        nargs="?",
        const="",
        metavar="FILE",
        help="compare a run with the goals (default: the newest full one)",
    )
    action.add_argument("--write", nargs="?", const="", metavar="FILE", help="write a run into bench/README.md")
    action.add_argument(
        "--compare",
        nargs="*",
        metavar="FILE",
        help="print how a run differs from one before, by their files (default: the newest two)",
    )
    parser.add_argument("--only", nargs="+", choices=suite.BENCHMARKS, help="run only these")
    parser.add_argument("--quick", action="store_true", help="one small round of each")
    parser.add_argument("--short", action="store_true", help="small rounds of what a change is likely to affect")
    parser.add_argument("--keep", action="store_true", help="draw the plots in bench/plots/, too")
    parser.add_argument("--markdown", action="store_true", help="print the page of the run, too")
    parser.add_argument("--no-pin", action="store_true", help="let servers and client share all CPUs")
    parser.add_argument("--realtime", action="store_true", help="use real-time scheduling (needs root)")
    options = parser.parse_args(arguments)
    file = options.check if options.check is not None else options.write
    if options.compare and len(options.compare) != 2:
        parser.error("--compare takes the files of two runs, or none")
    if file is None and options.compare is None:
        return measure(options)
    try:
        if options.compare is not None:
            before, after = [Path(one) for one in options.compare] or newest_two(RESULTS)
            print(compare(Record.read(before), Record.read(after)))
            return 0
        record = Record.read(Path(file) if file else newest(RESULTS))
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.check is None:
        write(record)
        return 0
    text, passes = gate.check(record)
    print(text)
    return int(not passes)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda caught, _: sys.exit(128 + caught))  # end child processes, as Ctrl-C does
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
