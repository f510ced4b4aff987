"""All benchmarks, one after another, each in its own process with a time limit."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import events, export, file, llm, progress, requests, scale, streams
from .record import Outcome, Record
from .rig import Benchmark
from .servers import end

MODULES = (file, requests, events, streams, export, llm, progress, scale)
BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in MODULES}
SECONDS = 1020
"""Maximum time of a full run, in seconds: the limits of all benchmarks, and the time to end each."""
GRACE_SECONDS = 8
"""Time for a benchmark to finish its current step after its time limit, in seconds."""
END_SECONDS = 12
"""Time for it to end its servers after SIGTERM, in seconds."""


def options_of(benchmark: Benchmark, options: argparse.Namespace) -> list[str]:
    """Return the options of a benchmark in a run of all."""
    names = ("quick", "short", "no_pin", "realtime")
    passed_on = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
    own = benchmark.short if options.short else benchmark.full
    return [*own, *passed_on, "--at-most", str(seconds_of(benchmark, options))]


def seconds_of(benchmark: Benchmark, options: argparse.Namespace) -> float:
    """Return the time limit of a benchmark in a run of all, in seconds."""
    return benchmark.short_seconds if options.short else benchmark.full_seconds


def measure(chosen: Sequence[Benchmark], options: argparse.Namespace) -> Iterator[tuple[str, Outcome]]:
    """Run benchmarks; one that fails, or exceeds its limit, does not affect the others."""
    begun, bound = time.monotonic(), sum(seconds_of(one, options) for one in chosen)
    with tempfile.TemporaryDirectory(prefix="streamlab-bench-") as folder:
        for benchmark in chosen:
            elapsed = time.monotonic() - begun
            progress_line = (
                f"{benchmark.name}: at most {seconds_of(benchmark, options):g} s; {elapsed:.0f} of {bound:g} s elapsed"
            )
            print(f"-- {progress_line}", file=sys.stderr)
            into = Path(folder) / f"{benchmark.name}.json"
            command = [
                sys.executable,
                "-m",
                f"bench.{benchmark.name}",
                *options_of(benchmark, options),
                "--into",
                str(into),
            ]
            yield benchmark.name, run(command, into, benchmark, seconds_of(benchmark, options))


def run(command: Sequence[str], into: Path, benchmark: Benchmark, seconds: float) -> Outcome:
    """Run one benchmark, and end it after its time limit; its measurements until then remain."""
    begun, over = time.monotonic(), ""
    # In its own session: Ctrl-C reaches only this process, which ends the benchmark, which ends its servers.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        over = f"ended after its time limit of {seconds:g} s"
    finally:
        end(process, END_SECONDS)
    try:
        outcome = Record.read(into).outcomes[benchmark.name]
    except (OSError, ValueError, KeyError):
        outcome = Outcome(failure=f"wrote no numbers, exit status {process.returncode}")
    outcome.seconds, outcome.budget = round(time.monotonic() - begun, 1), seconds
    outcome.failure = over or outcome.failure
    if outcome.failure:
        print(f"-- {benchmark.name}: {outcome.failure}", file=sys.stderr)
    return outcome
