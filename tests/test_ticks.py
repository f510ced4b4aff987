import asyncio
from types import SimpleNamespace

import pytest

from streamlab import ticks


@pytest.mark.parametrize(
    ("now", "seconds", "wait"),
    [
        (12.0, 1.0, 1.0),
        (12.25, 1.0, 0.75),
        (12.875, 1.0, 0.125),
        (12.9375, 1.0, 1.0625),  # too near: a timer that has fired a little early must not fire again
        (12.25, 0.5, 0.25),
        (12.25, 2.0, 1.75),
    ],
)
def test_a_tick_is_at_a_multiple_of_its_interval(
    now: float, seconds: float, wait: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: SimpleNamespace(time=lambda: now))
    assert ticks.until_tick(seconds) == wait
