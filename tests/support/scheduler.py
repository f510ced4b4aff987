"""Which worker runs which tests: those that share a server stay together, and long ones begin first."""

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


def begin_with_long_tests(items: list[pytest.Item]) -> None:
    """Sort tests so that no long one is left for the end, when other workers would wait for it."""

    def order(item: pytest.Item) -> int:
        path = item.nodeid.removeprefix("tests/")
        return next((number for number, start in enumerate(LONG) if path.startswith(start)), len(LONG))

    items.sort(key=order)


class ByServer(LoadScopeScheduling):  # type: ignore[misc]
    """Assign work in units of what is shared, so that a shared server is not started by several workers."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        self._units: dict[str, str] = {}

    def _split_scope(self, nodeid: str) -> str:
        if not self._units:
            self._units = units(self.collection or ())
        return self._units[nodeid]


def units(collected: Sequence[str]) -> dict[str, str]:
    """Return the name of the unit of each test: its class, its module if that has a fixture, or a few tests of it."""
    has_fixture: dict[str, bool] = {}
    counts: Counter[str] = Counter()
    found = {}
    for nodeid in collected:
        parent = nodeid.partition("[")[0].rpartition("::")[0]
        module = nodeid.partition("::")[0]
        if module not in has_fixture:
            has_fixture[module] = 'scope="module"' in (REPOSITORY / module).read_text(encoding="utf-8")
        if parent == module and not has_fixture[module]:
            parent = f"{module} {counts[module] // CHUNK}"
            counts[module] += 1
        found[nodeid] = parent
    return found
