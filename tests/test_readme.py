"""README is short and matches the code: its plugin runs, and its figures are those of the benchmarks."""

import re
from collections.abc import Callable

from tests.support.docs import COUNTDOWN, README
from tests.support.servers import REPOSITORY, Running

MAXIMUM_SIZE = 10_000
"""Maximum size of README, in bytes."""


def test_readme_is_short_and_shows_the_plugin_early() -> None:
    assert len(README.encode()) <= MAXIMUM_SIZE
    assert len(README.partition(COUNTDOWN)[0].splitlines()) + len(COUNTDOWN.splitlines()) < 55


def test_ratios_are_those_of_the_benchmarks() -> None:
    """Every figure of the table stands in bench/README.md, as a cell, or as the ends of one."""
    table = README.partition("\n## How it compares\n")[2].partition("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][2:]
    figures = [figure for row in rows for figure in re.findall(r"\d+\.\d+", row.rpartition(" | ")[2])]
    assert len(figures) > 12
    measured = (REPOSITORY / "bench/README.md").read_text()
    cells = set(re.findall(r"(?<![\d,])(?<!\d\.)\d+\.\d+(?![\d,])", measured))
    assert [figure for figure in figures if figure not in cells] == []
    (date,) = re.findall(r"^Measured on (\d+ \w+ \d{4}) ", table.strip(), re.MULTILINE)
    assert f"was made on {date}" in measured


def test_countdown_serves_validates_and_is_listed(start: Callable[..., Running]) -> None:
    server = start("[scenarios.countdown]\ninterval = 0.01", countdown=COUNTDOWN)
    assert server.get("/stream/countdown?start=3")[2] == b"3\n2\n1\n0\n"
    assert server.get("/stream/countdown?start=-1")[0] == 422
    assert b"/stream/countdown" in server.get("/")[2]
    assert b"/stream/countdown" in server.get("/openapi.json")[2]
    assert b'streamlab_streams_total{outcome="finished",scenario="countdown"} 1.0' in server.get("/metrics")[2]


def test_disabled_countdown_is_not_served(start: Callable[..., Running]) -> None:
    server = start("[scenarios.countdown]\nenabled = false", countdown=COUNTDOWN)
    assert server.get("/stream/countdown")[0] == 404
    assert b'"countdown":{"state":"disabled"}' in server.get("/health")[2]


def test_every_picture_exists_and_is_small() -> None:
    pictures = re.findall(r"!\[.+\]\((.+)\)", README)
    assert pictures
    for picture in pictures:
        content = (REPOSITORY / picture).read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert len(content) < 150_000
