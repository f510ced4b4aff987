"""All benchmarks, one after another, each in a process of its own that has so much time and no more."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import events, export, file, llm, progress, scale
from .record import Outcome, Record
from .rig import Benchmark
from .servers import end

BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in (file, events, export, llm, progress, scale)}
SECONDS = 900
"""How long a full run may take: the times of all benchmarks, and what each may need to end besides."""
GRACE_SECONDS = 8
"""How long a benchmark may still take for what it has begun, once its time is over."""
END_SECONDS = 12
"""How long it may take to end its servers, once it is told to."""


def options_of(benchmark: Benchmark, options: argparse.Namespace) -> list[str]:
    """Write the options of a benchmark in a run of all."""
    passed_on = [f"--{name.replace('_', '-')}" for name in ("quick", "no_pin", "realtime") if getattr(options, name)]
    return [*benchmark.full, *passed_on, "--at-most", str(benchmark.full_seconds)]


def measure(chosen: Sequence[Benchmark], options: argparse.Namespace) -> Iterator[tuple[str, Outcome]]:
    """Run benchmarks; one that fails, or does not end in time, does not take the others with it."""
    begun, bound = time.monotonic(), sum(one.full_seconds for one in chosen)
    with tempfile.TemporaryDirectory(prefix="streamlab-bench-") as folder:
        for benchmark in chosen:
            gone = time.monotonic() - begun
            told = f"{benchmark.name}: {benchmark.full_seconds:g} s at most; {gone:.0f} of {bound:g} s are gone"
            print(f"-- {told}", file=sys.stderr)
            into = Path(folder) / f"{benchmark.name}.json"
            words = [
                sys.executable,
                "-m",
                f"bench.{benchmark.name}",
                *options_of(benchmark, options),
                "--into",
                str(into),
            ]
            yield benchmark.name, run(words, into, benchmark)


def run(words: Sequence[str], into: Path, benchmark: Benchmark) -> Outcome:
    """Run one benchmark, and end it when its time is over; what it measured until then is kept."""
    begun, over = time.monotonic(), ""
    # In a session of its own: Ctrl-C is for this process, which then ends the benchmark, and that its servers.
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(benchmark.full_seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        over = f"ended, as its time of {benchmark.full_seconds:g} s was over"
    finally:
        end(process, END_SECONDS)
    try:
        outcome = Record.read(into).outcomes[benchmark.name]
    except (OSError, ValueError, KeyError):
        outcome = Outcome(failure=f"left no numbers, and the status {process.returncode}")
    outcome.seconds, outcome.budget = round(time.monotonic() - begun, 1), benchmark.full_seconds
    outcome.failure = over or outcome.failure
    if outcome.failure:
        print(f"-- {benchmark.name}: {outcome.failure}", file=sys.stderr)
    return outcome
