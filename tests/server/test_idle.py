"""A server that nobody uses: how often it wakes."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.servers import Running

CONFIG = """
    [scenarios.ticker]
    source = "push"
    [scenarios.logs]
    demo = false
"""


def wakes(process: int) -> int:
    """Return how often threads of a process have begun to wait."""
    return sum(
        int(re.findall(r"^voluntary_ctxt_switches:\s(\d+)$", (thread / "status").read_text(), re.MULTILINE)[0])
        for thread in Path(f"/proc/{process}/task").iterdir()
    )


def test_an_idle_server_wakes_less_than_four_times_a_second(start: Callable[..., Running]) -> None:
    """With all plugins, but without the demo sources; the thread of the watchdog wakes once a second."""
    server, found = start(CONFIG), [1e9]
    deadline = time.monotonic() + 30
    while min(found) >= 4 and time.monotonic() < deadline:
        # Once what began with the server has ended: a slow machine only makes it wake less often.
        before, began = wakes(server.process.pid), time.monotonic()
        time.sleep(2)
        found.append((wakes(server.process.pid) - before) / (time.monotonic() - began))
    assert min(found) < 4, found
