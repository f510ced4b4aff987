"""`make soak`: the chaos test for minutes, with a server that is never killed and must not grow."""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.support.chaos import Chaos, Usage, usage_at_rest, usage_of
from tests.support.servers import starting_in

SAMPLES = 30
"""Number of samples of the server; the first third is its warm-up."""

MAX_GROWTH = {"rss_mb": 15.0, "descriptors": 10.0, "threads": 4.0, "asyncio_tasks": 20.0, "open_streams": 10.0}
"""Maximum growth of the median of the last third of the samples over that of the second third."""


async def main() -> int:
    """Run it with the options of the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="make soak ARGS=", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long servers are killed (default: 10)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="repeats the choices of a run")
    options = parser.parse_args()
    seconds = options.minutes * 60
    with tempfile.TemporaryDirectory(prefix="streamlab-soak-") as folder, starting_in(Path(folder)) as start:
        chaos = Chaos(start, seed=options.seed, followers=12, publishers=4, clients=4, size=3, spared=1, is_fresh=True)
        async with chaos.running(), asyncio.TaskGroup() as group:
            watching = group.create_task(_watched(chaos, seconds))
            while not watching.done():
                await chaos.kill_once()
        chaos.problems += _growth(watching.result())
        usage = await usage_at_rest(chaos.fleet.servers[0])
        print(f"with no client left: {_shown(usage)}")
        for server in chaos.fleet.servers:
            status, took = await asyncio.to_thread(server.terminate)
            if status != 0:
                chaos.problems.append(f"after SIGTERM, {server.url} ended with {status} after {took:.1f} s")
        chaos.problems += chaos.log_problems()
        print(chaos.report() if chaos.problems else chaos.summary())
    return 1 if chaos.problems else 0


async def _watched(chaos: Chaos, seconds: float) -> list[Usage]:
    """Sample the resources of the server that is never killed; print and return the samples."""
    samples, started = [], time.monotonic()
    for number in range(1, SAMPLES + 1):
        await asyncio.sleep(started + seconds * number / SAMPLES - time.monotonic())
        samples.append(usage := await usage_of(chaos.fleet.servers[0]))
        print(f"{time.monotonic() - started:6.0f} s  {_shown(usage)}; {chaos.summary()}", flush=True)
    return samples


def _growth(samples: list[Usage]) -> list[str]:
    """Return the resources that have grown too much."""
    third = SAMPLES // 3
    problems = []
    for name, limit in MAX_GROWTH.items():
        before, after = (
            statistics.median(getattr(sample, name) for sample in part)
            for part in (samples[third:-third], samples[-third:])
        )
        if after - before > limit:
            problems.append(f"{name} has grown from {before:g} to {after:g}; {limit:g} is the limit")
    return problems


def _shown(usage: Usage) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in asdict(usage).items())


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
