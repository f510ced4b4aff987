"""The frame of every benchmark: options, time limit, CPU placement, clean shutdown, and report."""

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .record import RESULTS, Outcome, Record
from .report import Goal, Judgement, Measurement, Numbers, Table, goal_rows, judge, machine, reasons, table


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its function, the names of its numbers, and its goals."""

    name: str
    description: str | None
    streams: str
    """Unit of concurrency: streams, followers, clients."""
    servers: Sequence[str]
    keys: Sequence[str]
    packages: Sequence[str]
    """Packages whose versions affect its numbers."""
    measure: Callable[["Run"], None]
    tables: Callable[[Numbers], list[Table]]
    seconds: float
    """Time limit when run alone, in seconds."""
    full_seconds: float
    """Time limit in a run of all benchmarks, in seconds."""
    goals: Sequence[Goal] = ()
    rounds: int = 1
    full: Sequence[str] = ()
    """Options in a run of all benchmarks."""
    short: Sequence[str] = ()
    """Options in a short run; none if it has no part in it."""
    short_seconds: float = 0
    """Time limit in a short run, in seconds."""
    add_options: Callable[[argparse.ArgumentParser], None] | None = None

    def judge(self, outcome: Outcome) -> list[Judgement]:
        """Compare the measurements with its goals."""
        return judge(self.goals, Numbers(outcome.measurements), outcome.absent)

    def report(self, outcome: Outcome, markdown: bool) -> str:
        """Return its report: the conditions of the run, goals with reasons for shortfalls, and tables."""
        facts = outcome.facts | ({"ended": outcome.failure} if outcome.failure else {})
        facts |= {f"skipped {at}" if at > 1 else "skipped": note for at, note in enumerate(outcome.notes, start=1)}
        facts |= {"not installed": "; ".join(sorted(set(outcome.absent.values())))} if outcome.absent else {}
        parts = [
            "\n".join(f"- {name}: {fact}" if markdown else f"{name + ':':<11}{fact}" for name, fact in facts.items())
        ]
        if judged := self.judge(outcome):
            parts += [
                table(goal_rows(judged, self.streams), markdown),
                "\n".join(f"- {one}" for one in reasons(judged)),
            ]
        parts += [table(rows, markdown) for rows in self.tables(Numbers(outcome.measurements)) if len(rows) > 1]
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Step:
    """A part of a run; if it fails, the others continue."""

    title: str
    run: Callable[[], None]


@dataclass
class Run:
    """A running benchmark; its measurements so far are stored however it ends."""

    benchmark: Benchmark
    options: argparse.Namespace
    cpus: tuple[int, int] | None
    folder: Path
    deadline: float
    """End of its time limit, by the monotonic clock."""
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def placement(self) -> tuple[int | None, int | None]:
        """The CPU of the servers and that of the client; None for any."""
        return self.cpus or (None, None)

    def note(self, server: str, number: int, streams: int, key: str, value: float) -> None:
        """Record a number. Raises ValueError for one that the benchmark does not declare: no goal would find it."""
        if server not in self.benchmark.servers or key not in self.benchmark.keys:
            raise ValueError(f"{self.benchmark.name} has no number {key!r} of {server!r}")
        self.outcome.measurements.append(Measurement(server, number, streams, key, value))

    def log(self, text: str) -> None:
        """Print the progress."""
        print(f"{self.benchmark.name}: {text}", file=sys.stderr)

    def time_is_left(self, rest: str) -> bool:
        """Return whether time is left; if not, print and record that `rest` is skipped."""
        if time.monotonic() <= self.deadline:
            return True
        self.outcome.notes.append(f"{rest}: skipped, the time limit was reached")
        self.log(self.outcome.notes[-1])
        return False

    def run_steps(self, steps: Sequence[Step]) -> None:
        """Run steps until the time limit; report one that fails, and continue with the next."""
        for index, step in enumerate(steps):
            if not self.time_is_left(f"{len(steps) - index} of {len(steps)} steps, from {step.title} on"):
                break
            self.log(f"{index + 1} of {len(steps)}: {step.title}")
            try:
                step.run()
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                self.fail(error)

    def fail(self, error: Exception) -> None:
        """Report a failure: in full here, and in a line of the report."""
        while isinstance(error, ExceptionGroup):  # of a TaskGroup: the first is the cause
            error = error.exceptions[0]
        failure = (str(error) or repr(error)).partition("\n")[0]
        if isinstance(error, TimeoutError | subprocess.TimeoutExpired):
            failure = "a response timed out"
        self.outcome.failure = self.outcome.failure or failure
        if not isinstance(error, RuntimeError | OSError | ImportError | subprocess.TimeoutExpired):
            traceback.print_exception(error)
        self.log(f"failed: {error}")

    def rounds(self) -> Iterator[int]:
        """Yield round numbers, as many as selected and fit into the time limit, by the duration of the last one."""
        planned, duration, number = self.options.rounds, 0.0, 0
        for number in range(1, planned + 1):
            begun = time.monotonic()
            if begun + duration > self.deadline:
                self.log(f"round {number} of {planned} skipped: the time limit was reached")
                number -= 1
                break
            self.log(f"round {number} of {planned}")
            yield number
            duration = time.monotonic() - begun
        self.outcome.facts["rounds"] = str(number) + (f" of {planned}" if number < planned else "")


@dataclass
class Round:
    """One round of a run."""

    run: Run
    number: int

    def note(self, server: str, streams: int, key: str, value: float) -> None:
        """Record a number."""
        self.run.note(server, self.number, streams, key, value)


def main(benchmark: Benchmark) -> None:
    """Run a benchmark as a command: measure, store and print. Its servers and client always end."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # they clean up as Ctrl-C does, unless nohup ignores them
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda caught, _: sys.exit(128 + caught))
    options = _options(benchmark)
    begun, everywhere = time.monotonic(), os.sched_getaffinity(0)
    try:
        cpus = choose_cpus(options)
        with tempfile.TemporaryDirectory(prefix="streamlab-bench-") as folder:
            run = Run(benchmark, options, cpus, Path(folder), begun + options.at_most)
            outcome = run.outcome
            outcome.facts |= machine(benchmark.packages) | {"placement": placement(cpus)}
            _measure(run)
        os.sched_setaffinity(0, everywhere)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"bench.{benchmark.name}: {error}")
    outcome.seconds, outcome.budget = round(time.monotonic() - begun, 1), options.at_most
    record = Record({benchmark.name: outcome})
    path = options.into or RESULTS / f"{benchmark.name}-{record.began}.json"
    record.write(path, {benchmark.name: benchmark.judge(outcome)})
    if not options.into:
        for as_markdown in (False, True)[: 1 + options.markdown]:
            print("\n" + benchmark.report(outcome, as_markdown))
        print(f"\nevery number: bench/results/{path.name}")
    sys.exit(bool(outcome.failure))


def _measure(run: Run) -> None:
    """Measure; a failure ends the benchmark, and its measurements until then are stored."""
    try:
        run.benchmark.measure(run)
    except SystemExit:
        run.outcome.failure = "terminated before its end"
    except Exception as error:
        run.fail(error)


def _options(benchmark: Benchmark) -> argparse.Namespace:
    """Parse the command line of a benchmark: the common options, and its own."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{benchmark.name}", description=benchmark.description)
    rounds, seconds = benchmark.rounds, benchmark.seconds
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each kind (default: {rounds})")
    parser.add_argument("--quick", action="store_true", help="one small round")
    parser.add_argument("--short", action="store_true", help="small rounds")
    parser.add_argument(
        "--at-most", type=float, default=seconds, metavar="SECONDS", help=f"time limit (default: {seconds:g})"
    )
    parser.add_argument("--no-pin", action="store_true", help="let servers and client share all CPUs")
    parser.add_argument("--realtime", action="store_true", help="use real-time scheduling (needs root)")
    parser.add_argument("--markdown", action="store_true", help="print everything as Markdown, too")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write all numbers to this file, and print no report")
    if benchmark.add_options:
        benchmark.add_options(parser)
    options = parser.parse_args()
    if options.rounds < 1 or sys.platform != "linux":
        parser.error("requires Linux (it reads /proc) and at least one round")
    if options.quick:
        options.rounds = 1
    options.quick |= options.short
    return options


def choose_cpus(options: argparse.Namespace) -> tuple[int, int] | None:
    """Choose the CPU of the servers and that of the client; None if they share all CPUs."""
    if options.realtime:  # child processes inherit it
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    allowed = sorted(os.sched_getaffinity(0))
    # The first and the last: neighbours are often two threads of one core.
    return None if options.no_pin or len(allowed) < 2 else (allowed[0], allowed[-1])


def placement(cpus: tuple[int, int] | None) -> str:
    """Describe where and how servers and client run."""
    where = f"servers on CPU {cpus[0]}, client on CPU {cpus[1]}" if cpus else "not pinned"
    return where + (", real-time scheduling" if os.sched_getscheduler(0) == os.SCHED_RR else "")


def allow_files(count: int) -> None:
    """Allow this process and its children to open `count` files and sockets; raises RuntimeError if not permitted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))
        except (ValueError, OSError):
            raise RuntimeError(f"requires {count} open files, but `ulimit -Hn` is {hard}") from None


def client(module: str, arguments: list[str], seconds: float, cpu: int | None) -> "subprocess.CompletedProcess[str]":
    """Run a measuring client, a module that prints JSON, on one CPU if given; kill it after `seconds`."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
    )
