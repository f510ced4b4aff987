"""What surrounds every benchmark: its options and its time, the CPUs it is spread over, a clean end, and its report."""

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
    """One of the benchmarks: how it measures, what its numbers are called, and what they shall be."""

    name: str
    description: str | None
    streams: str
    """What a server has so many of at once: streams, followers, clients."""
    servers: Sequence[str]
    keys: Sequence[str]
    packages: Sequence[str]
    """Whose versions its numbers depend on."""
    measure: Callable[["Run"], None]
    tables: Callable[[Numbers], list[Table]]
    seconds: float
    """How long it may take by itself, and in a run of all benchmarks."""
    full_seconds: float
    goals: Sequence[Goal] = ()
    rounds: int = 1
    full: Sequence[str] = ()
    """Its options in a run of all benchmarks."""
    add_options: Callable[[argparse.ArgumentParser], None] | None = None

    def judge(self, outcome: Outcome) -> list[Judgement]:
        """Judge its goals by what was measured."""
        return judge(self.goals, Numbers(outcome.measurements), outcome.absent)

    def tell(self, outcome: Outcome, markdown: bool) -> str:
        """Write its report: what the numbers depend on, goals and why they fall short, and tables."""
        facts = outcome.facts | ({"ended": outcome.failure} if outcome.failure else {})
        facts |= {f"left out {at}" if at > 1 else "left out": note for at, note in enumerate(outcome.notes, start=1)}
        facts |= {"not here": "; ".join(sorted(set(outcome.absent.values())))} if outcome.absent else {}
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
    """A part of a run that stands for itself: where it fails, the others are worth having."""

    words: str
    take: Callable[[], None]


@dataclass
class Run:
    """A benchmark while it goes on; what it has measured so far is kept however it ends."""

    benchmark: Benchmark
    options: argparse.Namespace
    cpus: tuple[int, int] | None
    folder: Path
    deadline: float
    """When its time is over, by the monotonic clock."""
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def placed(self) -> tuple[int | None, int | None]:
        """The servers' CPU and the client's; None for any."""
        return self.cpus or (None, None)

    def note(self, server: str, number: int, streams: int, key: str, value: float) -> None:
        """Keep a number. Raises ValueError for one that the benchmark does not name: no goal would find it."""
        if server not in self.benchmark.servers or key not in self.benchmark.keys:
            raise ValueError(f"{self.benchmark.name} has no number {key!r} of {server!r}")
        self.outcome.measurements.append(Measurement(server, number, streams, key, value))

    def say(self, words: str) -> None:
        """Tell how far it is."""
        print(f"{self.benchmark.name}: {words}", file=sys.stderr)

    def time_is_left(self, rest: str) -> bool:
        """Tell whether time is left; if not, say so, here and in the report: `rest` is what is left out."""
        if time.monotonic() <= self.deadline:
            return True
        self.outcome.notes.append(f"{rest}: no time was left")
        self.say(self.outcome.notes[-1])
        return False

    def go_through(self, steps: Sequence[Step]) -> None:
        """Take steps as long as there is time; one that fails is told, and the next one is taken."""
        for index, step in enumerate(steps):
            if not self.time_is_left(f"{len(steps) - index} of {len(steps)} steps, from {step.words} on"):
                break
            self.say(f"{index + 1} of {len(steps)}: {step.words}")
            try:
                step.take()
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                self.fail(error)

    def fail(self, error: Exception) -> None:
        """Tell of what went wrong: at length here, and in a line in the report."""
        while isinstance(error, ExceptionGroup):  # a TaskGroup's; the first is what went wrong, the others followed
            error = error.exceptions[0]
        failure = (str(error) or repr(error)).partition("\n")[0]
        if isinstance(error, TimeoutError | subprocess.TimeoutExpired):
            failure = "an answer did not come in time"
        self.outcome.failure = self.outcome.failure or failure
        if not isinstance(error, RuntimeError | OSError | ImportError | subprocess.TimeoutExpired):
            traceback.print_exception(error)
        self.say(f"failed: {error}")

    def rounds(self) -> Iterator[int]:
        """Count rounds, as many as wanted and there is time for: each is taken to last as long as the one before."""
        wanted, lasted, number = self.options.rounds, 0.0, 0
        for number in range(1, wanted + 1):
            begun = time.monotonic()
            if begun + lasted > self.deadline:
                self.say(f"no time is left for round {number} of {wanted}")
                number -= 1
                break
            self.say(f"round {number} of {wanted}")
            yield number
            lasted = time.monotonic() - begun
        self.outcome.facts["rounds"] = str(number) + (f", of {wanted} wanted" if number < wanted else "")


@dataclass
class Round:
    """One round of a run."""

    run: Run
    number: int

    def note(self, server: str, streams: int, key: str, value: float) -> None:
        """Keep a number."""
        self.run.note(server, self.number, streams, key, value)


def main(benchmark: Benchmark) -> None:
    """Run a benchmark as a command: measure, keep and print. It ends its servers and its client whatever happens."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # they clean up as Ctrl-C does, but nohup is obeyed
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
            print("\n" + benchmark.tell(outcome, as_markdown))
        print(f"\nevery number: bench/results/{path.name}")
    sys.exit(bool(outcome.failure))


def _measure(run: Run) -> None:
    """Measure; what goes wrong ends the benchmark, and what it has measured until then is kept."""
    try:
        run.benchmark.measure(run)
    except SystemExit:
        run.outcome.failure = "it was ended before it was done"
    except Exception as error:
        run.fail(error)


def _options(benchmark: Benchmark) -> argparse.Namespace:
    """Read the options of a benchmark's command line: those that all have, and its own."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{benchmark.name}", description=benchmark.description)
    rounds, seconds = benchmark.rounds, benchmark.seconds
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each kind (default: {rounds})")
    parser.add_argument("--quick", action="store_true", help="one small round, for a first look")
    parser.add_argument(
        "--at-most", type=float, default=seconds, metavar="SECONDS", help=f"how long it may take (default: {seconds:g})"
    )
    parser.add_argument("--no-pin", action="store_true", help="let servers and client share all CPUs")
    parser.add_argument("--realtime", action="store_true", help="let nothing else on these CPUs disturb (needs root)")
    parser.add_argument("--markdown", action="store_true", help="print everything as Markdown, too")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write every number there, and print no report")
    if benchmark.add_options:
        benchmark.add_options(parser)
    options = parser.parse_args()
    if options.rounds < 1 or sys.platform != "linux":
        parser.error("this needs Linux (it reads /proc), and a round at least")
    if options.quick:
        options.rounds = 1
    return options


def choose_cpus(options: argparse.Namespace) -> tuple[int, int] | None:
    """Choose the servers' CPU and the client's; None where they are not to be, or cannot be, held apart."""
    if options.realtime:  # whatever is started inherits it
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    allowed = sorted(os.sched_getaffinity(0))
    # The first and the last: neighbours are often two threads of one core.
    return None if options.no_pin or len(allowed) < 2 else (allowed[0], allowed[-1])


def placement(cpus: tuple[int, int] | None) -> str:
    """Say where and how servers and client run."""
    where = f"servers on CPU {cpus[0]}, client on CPU {cpus[1]}" if cpus else "not pinned"
    return where + (", real-time scheduling" if os.sched_getscheduler(0) == os.SCHED_RR else "")


def allow_files(count: int) -> None:
    """Let this process, and all that it starts, open so many files and sockets; raises RuntimeError if it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))
        except (ValueError, OSError):
            raise RuntimeError(f"needs {count} open files, but `ulimit -Hn` is {hard}") from None


def client(module: str, arguments: list[str], seconds: float, cpu: int | None) -> "subprocess.CompletedProcess[str]":
    """Run a measuring client, a module that prints JSON, on one CPU if given; it is killed after so many seconds."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
    )
