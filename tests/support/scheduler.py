"""Which worker runs which tests: those that share something stay together, and some wait while others compute."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tests.support.servers import REPOSITORY

LONG = ("testing/", "web/", "streaming/", "plugins/test_progress.py", "client/test_doctor.py", "test_")
"""Beginnings of the paths, below tests/, of tests that take long, in the order in which they begin."""

WAITING = (
    "testing/test_conformance_catches.py",
    "testing/test_plugin_guide.py",
    "testing/test_task_conformance.py",
    "plugins/test_progress.py",
    "client/test_doctor.py",
    "server/test_protocol.py",
    "server/test_stopping.py",
    "streaming/test_event_stream.py",
    "plugins/test_logs_tail.py",
)
"""Beginnings of the paths, below tests/, of tests that mainly wait for time to pass.

Half of the workers run those while the other half runs tests that keep a processor busy.
"""

CHUNK = 3
"""Number of tests of a module that one worker runs in a row, if they share nothing."""

IN_BROWSER = re.compile(r"^async def (test_\w+)\([^)]*(?:browser: \w*Browser|page: Page)\b", re.MULTILINE)
"""The name of a test that uses the shared browser."""

LONGEST = "tests/web/test_lab.py"
"""The module that needs a browser for as long as all others together: another worker runs it."""


def begin_with_long_tests(items: list[pytest.Item]) -> None:
    """Sort tests so that no long one is left for the end, when other workers would wait for it."""

    def order(item: pytest.Item) -> int:
        return next((number for number, start in enumerate(LONG) if _path(item.nodeid).startswith(start)), len(LONG))

    items.sort(key=order)


class ByServer(LoadScopeScheduling):  # type: ignore[misc]
    """Assign work in units of what is shared, so that what is shared is not started by several workers."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        self._units: dict[str, str] = {}

    def _assign_work_unit(self, node: WorkerController) -> None:
        latest = [
            next(reversed(work.values())) for other, work in self.assigned_work.items() if work and other is not node
        ]
        waiting = sum(map(_waits, latest))
        wanted = waiting < len(self.assigned_work) // 2
        unit = next((name for name, unit in self.workqueue.items() if _waits(unit) == wanted), None)
        if unit is not None:
            self.workqueue.move_to_end(unit, last=False)
        super()._assign_work_unit(node)

    def _split_scope(self, nodeid: str) -> str:
        if not self._units:
            self._units = units(self.collection or ())
        return self._units[nodeid]


def units(collected: Sequence[str]) -> dict[str, str]:
    """Return the name of the unit of each test: what it shares with others, or a few tests of its module.

    A test shares a browser, its class, or the fixtures of its module.
    """
    sources: dict[str, str] = {}
    in_browser: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    found = {}
    for nodeid in collected:
        parent, _, name = nodeid.partition("[")[0].rpartition("::")
        module = nodeid.partition("::")[0]
        if module not in sources:
            sources[module] = (REPOSITORY / module).read_text(encoding="utf-8")
            in_browser[module] = set() if module == LONGEST else set(IN_BROWSER.findall(sources[module]))
        if name in in_browser[module]:
            parent = "browser"
        elif parent == module and 'scope="module"' not in sources[module]:
            parent = f"{module} {counts[module] // CHUNK}"
            counts[module] += 1
        found[nodeid] = parent
    return found


def _path(nodeid: str) -> str:
    return nodeid.removeprefix("tests/")


def _waits(unit: Iterable[str]) -> bool:
    return _path(next(iter(unit))).startswith(WAITING)
