"""Which worker runs which tests: those that share a server or browser stay together, and long ones begin first."""

import re
from collections import Counter
from collections.abc import Sequence

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support.servers import REPOSITORY

LONG = ("testing/", "web/", "plugins/test_progress.py", "test_")
"""Beginnings of the paths, below tests/, of tests that take long, in the order in which they begin."""

CHUNK = 3
"""Number of tests of a module that one worker runs in a row, if they share nothing."""

IN_BROWSER = re.compile(r"^async def (test_\w+)\([^)]*(?:browser: \w*Browser|page: Page)\b", re.MULTILINE)
"""The name of a test that uses the shared browser."""

LONGEST = "tests/web/test_lab.py"
"""The module that needs a browser for as long as all others together: another worker runs it."""


def begin_with_long_tests(items: list[pytest.Item]) -> None:
    """Sort tests so that no long one is left for the end, when other workers would wait for it."""

    def order(item: pytest.Item) -> int:
        path = item.nodeid.removeprefix("tests/")
        return next((number for number, start in enumerate(LONG) if path.startswith(start)), len(LONG))

    items.sort(key=order)


class ByServer(LoadScopeScheduling):  # type: ignore[misc]
    """Assign work in units of what is shared, so that what is shared is not started by several workers."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        self._units: dict[str, str] = {}

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
