"""Clients lose nothing and get nothing twice or wrong while servers are killed at random."""

import asyncio
import os
import random
from collections.abc import Callable

import pytest

from tests.support.chaos import Chaos, usage_at_rest
from tests.support.servers import Running

KILLS = 15

MAX_RSS_MB = 150
"""Maximum memory of a server at the end, in MB: a fresh one has 60."""

MAX_DESCRIPTORS = 40
"""Maximum open files and sockets of a server without clients: a fresh one has 15."""


@pytest.mark.timeout(240)
async def test_nothing_is_lost_or_done_twice_while_servers_are_killed_at_random(
    start: Callable[..., Running],
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(1 << 32))
    print(f"CHAOS_SEED={seed} repeats these choices")
    chaos = Chaos(start, seed=seed)
    async with chaos.running():
        while chaos.fleet.kills < KILLS:
            await chaos.kill_once()
    for server in chaos.fleet.servers:
        usage = await usage_at_rest(server)
        if usage.rss_mb > MAX_RSS_MB or usage.descriptors > MAX_DESCRIPTORS or usage.open_streams > 0:
            chaos.problems.append(f"with no client left, {server.url} holds {usage}")
        print(usage)
        status, seconds = await asyncio.to_thread(server.terminate)
        if status != 0:
            chaos.problems.append(f"after SIGTERM, {server.url} ended with {status} after {seconds:.1f} s")
    chaos.problems += chaos.log_problems()
    print(chaos.summary())
    assert not chaos.problems, chaos.report()
