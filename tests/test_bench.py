"""The benchmarks are not run here; what judges, tells and bounds them is."""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import __main__ as command
from bench import file, followers, page, rig, scale, suite
from bench.event_peers import raw_asyncio
from bench.record import Outcome, Record
from bench.report import Goal, Measurement, Numbers, judge, number, spread
from bench.rig import Run, Step
from tests.support.servers import REPOSITORY

WITH = {  # what meets every goal of the downloads, by server and number of streams
    ("streamlab", 1): {"rate": 7.0, "cpu": 0.1, "memory": 1.0},
    ("streamlab", 4): {"rate": 7.0, "cpu": 0.1, "memory": 1.0},
    ("FastAPI way", 1): {"rate": 1.0, "cpu": 1.0},
    ("FastAPI way", 4): {"rate": 1.0, "cpu": 1.0},
    ("nginx", 1): {"rate": 6.0},
    ("nginx", 4): {"rate": 7.0},
}
Row = tuple[str, int, int, str, float]
Written = Callable[..., Path]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results of its own."""
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def written(results: Path) -> Written:
    """Write the file of a run of the downloads, by hand; `changed` numbers differ from what meets every goal."""

    def write(
        changed: Mapping[tuple[str, int], Mapping[str, float]] = {},
        without: Sequence[str] = (),
        name: str = "2026-01-02T030405.json",
        full: bool = True,
        **others: Any,
    ) -> Path:
        rows: list[Row] = []
        for (server, streams), values in WITH.items():
            if server not in without:
                values = {**values, **changed.get((server, streams), {})}
                rows += [(server, 1, streams, key, value) for key, value in values.items()]
        results.mkdir(exist_ok=True)
        document = {
            "began": "2026-01-02T030405",
            "full": full,
            "benchmarks": {"file": {"measurements": rows, **others}},
        }
        (results / name).write_text(json.dumps(document))
        return results / name

    return write


def checked(path: Path | None, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run the gate; return its status and what it says, its columns a space apart."""
    status = command.main(["--check", *([str(path)] if path else [])])
    said = capsys.readouterr()
    return status, re.sub(r" {2,}", " ", said.out + said.err)


# -- the gate


def test_gate_passes_what_meets_its_goals(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = checked(written(), capsys)
    assert status == 0
    assert "\nfile streamlab rate / FastAPI way 1 7 >= 6 met\n" in said
    assert "\nfile streamlab CPU per GB / FastAPI way 4 0.1 <= 0.167 met\n" in said
    assert said.endswith(
        "5 of 5 ratios are met, 0 fall short for a known reason and stay above their floor,"
        " 0 have a peer that is not on this machine, and 0 do not pass\n"
    )


def test_gate_passes_a_shortfall_with_a_reason(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = checked(written({("streamlab", 4): {"cpu": 0.2}}), capsys)
    assert status == 0
    assert "file streamlab CPU per GB / FastAPI way 4 0.2 <= 0.167 falls short by 20 %, floor 0.265\n" in said
    assert "\n- file: streamlab CPU per GB / FastAPI way, 4: streamlab spends as much" in said
    assert "\n4 of 5 ratios are met, 1 fall short for a known reason" in said


def test_gate_stops_what_falls_below_its_floor(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = checked(written({("streamlab", 4): {"cpu": 0.27}}), capsys)
    assert status == 1
    assert said.endswith("and 1 do not pass\n- file: streamlab CPU per GB / FastAPI way, 4: below its floor of 0.265\n")


def test_gate_stops_a_shortfall_without_a_reason(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = checked(written({("streamlab", 1): {"rate": 5.97}}), capsys)
    assert status == 1
    assert said.endswith("and 1 do not pass\n- file: streamlab rate / FastAPI way, 1: falls short by 1 %\n")


def test_gate_tells_and_does_not_judge_what_has_a_unit(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = checked(written({("streamlab", 1): {"memory": 12.0}}), capsys)
    assert status == 0
    judged, told = said.split("told, not judged: what is measured in a unit depends on the machine\n")
    assert "file streamlab peak RSS growth, MB 1 12 <= 8 falls short by 50 %\n" in told
    assert "MB" not in judged


def test_gate_passes_a_peer_that_is_not_here_and_says_so(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(without=["nginx"], absent={"nginx": "nginx is not installed"})
    status, said = checked(path, capsys)
    assert status == 0
    assert "file streamlab rate / nginx 1 - >= 0.85 not measured: nginx is not installed\n" in said
    assert "2 have a peer that is not on this machine" in said


def test_gate_stops_what_is_not_measured_for_no_reason(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(without=["nginx"], failure="ended, as its time of 100 s was over")
    status, said = checked(path, capsys)
    assert status == 1
    assert "\n- file: streamlab rate / nginx, 1: not measured\n" in said
    assert "\nfile: ended, as its time of 100 s was over\n" in said


def test_gate_says_that_nothing_was_measured_yet(
    results: Path, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "bench: no full run is in bench/results/: run `make bench` first\n"
    assert checked(None, capsys) == (2, said)
    written(full=False)
    assert checked(None, capsys) == (2, said)


def test_gate_takes_the_newest_full_run(written: Written, capsys: pytest.CaptureFixture[str]) -> None:
    written(name="2026-01-02T000000.json")
    written({("streamlab", 1): {"rate": 1.0}}, name="2026-01-01T000000.json")  # older
    written({("streamlab", 1): {"rate": 1.0}}, name="2026-01-03T000000.json", full=False)
    written({("streamlab", 1): {"rate": 1.0}}, name="file-2026-01-04T000000.json")  # a benchmark by itself
    assert checked(None, capsys)[0] == 0


@pytest.mark.parametrize("text", ["", "{}", '{"full": true, "began": "", "benchmarks": {"file": {}}}', "[]"])
def test_gate_refuses_what_is_no_run(text: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.mkdir()
    path = results / "2026-01-01T000000.json"
    path.write_text(text)
    status, said = checked(path, capsys)
    assert (status, said.startswith(f"bench: {path} is not the file of a run: ")) == (2, True)


# -- goals


def test_ratios_are_of_the_same_round_and_their_median_is_judged() -> None:
    rows = [("us", 1, 6.0), ("us", 2, 8.0), ("us", 3, 100.0), ("us", 4, 1.0), ("them", 1, 2.0), ("them", 2, 2.0)]
    rows += [("them", 3, 1.0), ("them", 5, 1.0)]
    numbers = Numbers(Measurement(server, at, 1, "rate", value) for server, at, value in rows)
    [judged] = judge([Goal("rate / them", "them", 1, "rate", ">=", 5, "us")], numbers, {})
    assert judged.found == {1: 3.0, 2: 4.0, 3: 100.0}
    assert (judged.median, judged.verdict, judged.passes) == (4.0, "falls short by 20 %", False)


def test_a_server_may_be_its_own_peer() -> None:
    numbers = Numbers([Measurement("us", 1, 30, "rate", 9.0), Measurement("us", 1, 30, "rate of one", 10.0)])
    [judged] = judge([Goal("all / one", "us", 30, "rate", ">=", 0.9, "us", by="rate of one")], numbers, {})
    assert (judged.found, judged.verdict) == ({1: 0.9}, "met")


@pytest.mark.parametrize(
    ("sign", "value", "verdict", "passes"),
    [
        (">=", 2.0, "met", True),
        (">=", 1.9, "falls short by 5 %, floor 1.5", True),
        (">=", 1.5, "falls short by 25 %, floor 1.5", True),
        (">=", 1.4, "below its floor of 1.5", False),
        ("<=", 2.0, "met", True),
        ("<=", 2.1, "falls short by 5 %, floor 2.5", True),
        ("<=", 2.6, "below its floor of 2.5", False),
    ],
)
def test_goals_and_floors_have_a_right_side(sign: str, value: float, verdict: str, passes: bool) -> None:
    floor = 1.5 if sign == ">=" else 2.5
    goal = Goal("x", "them", 1, "rate", sign, 2.0, "us", short="it is known", floor=floor)
    numbers = Numbers([Measurement("us", 1, 1, "rate", value), Measurement("them", 1, 1, "rate", 1.0)])
    [judged] = judge([goal], numbers, {})
    assert (judged.verdict, judged.passes) == (verdict, passes)


@pytest.mark.parametrize("wrong", [{"unit": "ms"}, {"peer": None}, {"short": "a reason and no floor"}, {"floor": 1.0}])
def test_goals_that_nobody_could_judge_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="x: a ratio"):
        replace(Goal("x", "them", 1, "rate", ">=", 2.0), **wrong)


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_every_goal_is_about_what_its_benchmark_measures(name: str) -> None:
    benchmark = suite.BENCHMARKS[name]
    for goal in benchmark.goals:
        assert {goal.server, goal.peer or goal.server} <= set(benchmark.servers), goal
        assert {goal.key, goal.by or goal.key} <= set(benchmark.keys), goal
        if goal.floor is not None:
            assert not goal.reached(goal.floor, goal.limit), goal


def test_a_number_that_its_benchmark_does_not_name_is_refused(tmp_path: Path) -> None:
    run = Run(file.BENCHMARK, argparse.Namespace(), None, tmp_path, 0.0)
    run.note("nginx", 1, 4, "rate", 1.0)
    for server, key in (("nginx", "speed"), ("apache", "rate")):
        with pytest.raises(ValueError, match="file has no number"):
            run.note(server, 1, 4, key, 1.0)
    assert run.outcome.measurements == [Measurement("nginx", 1, 4, "rate", 1.0)]


def test_a_step_that_fails_takes_no_other_down_and_steps_end_with_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, taken = Run(file.BENCHMARK, argparse.Namespace(), None, tmp_path, 10.0), list[str]()
    clock = iter([8.0, 9.0, 10.0, 11.0])
    monkeypatch.setattr(rig, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def broken() -> None:
        raise RuntimeError("it broke\nat length")

    steps = [
        Step("one", lambda: taken.append("one")),
        Step("two", broken),
        Step("three", lambda: taken.append("three")),
    ]
    run.go_through([*steps, Step("four", lambda: taken.append("four"))])
    assert taken == ["one", "three"]
    assert run.outcome.failure == "it broke"
    assert run.outcome.notes == ["1 of 4 steps, from four on: no time was left"]


def test_rounds_are_as_many_as_there_is_time_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(file.BENCHMARK, argparse.Namespace(rounds=9), None, tmp_path, 100.0)
    clock = iter([0.0, 40.0, 40.0, 70.0, 70.0, 100.0, 100.0])  # of 40, 30 and 30 seconds
    monkeypatch.setattr(rig, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(run.rounds()) == [1, 2, 3]
    assert run.outcome.facts["rounds"] == "3, of 9 wanted"


def test_what_the_load_client_prints_is_named() -> None:
    printed = {key for name in ("one", "burst", "lines", "single") for key in _window().numbers(name)}
    assert printed <= set(followers.KEYS) == set(suite.BENCHMARKS["events"].keys)


def _window() -> followers.Window:
    window = followers.Window(None)  # type: ignore[arg-type]
    window.seconds, window.deliveries = 1.0, 1
    return window


def test_numbers_are_written_without_powers_of_ten() -> None:
    assert [number(value) for value in (0.0, 0.16666, 1.0, 68_649.0, 1_234_567.0)] == [
        "0",
        "0.167",
        "1",
        "68,600",
        "1,230,000",
    ]
    assert [spread(values) for values in ({}, {1: 2.0}, {1: 2.0, 2: 1.0, 3: 9.0})] == ["-", "2", "2 (1..9)"]


# -- a run of all


SCRIPT = """
import os, threading
from dataclasses import replace
from pathlib import Path

from bench import file, rig

def measure(run):
    run.note("nginx", 1, 4, "rate", 1.0)
    Path(os.environ["READY"]).write_text("noted")
    {then}

rig.main(replace(file.BENCHMARK, measure=measure))
"""


def _words(then: str, into: Path) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(then=then), "--into", str(into)]


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a benchmark of this test writes that it has noted a number."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("READY", str(tmp_path / "ready"))
    return tmp_path / "ready"


def test_a_benchmark_that_overruns_is_ended_and_keeps_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: Path
) -> None:
    into = tmp_path / "into.json"
    os.mkfifo(ready)

    class Slow(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == file.BENCHMARK.full_seconds + suite.GRACE_SECONDS:
                assert ready.read_text() == "noted"  # it is in the middle of it, and its time is over
                raise subprocess.TimeoutExpired("bench", timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    outcome = suite.run(_words("threading.Event().wait()", into), into, file.BENCHMARK)
    assert outcome.failure == f"ended, as its time of {file.BENCHMARK.full_seconds} s was over"
    assert outcome.measurements == [Measurement("nginx", 1, 4, "rate", 1.0)]


def test_a_benchmark_that_fails_keeps_its_numbers(tmp_path: Path, ready: Path) -> None:
    into = tmp_path / "into.json"
    outcome = suite.run(_words("raise KeyError('no such thing')", into), into, file.BENCHMARK)
    assert outcome.failure == "'no such thing'"
    assert outcome.measurements == [Measurement("nginx", 1, 4, "rate", 1.0)]


def test_a_benchmark_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise SystemExit(3)"]
    assert suite.run(words, tmp_path / "into.json", file.BENCHMARK).failure == "left no numbers, and the status 3"


def test_all_benchmarks_together_end_in_time() -> None:
    end = suite.GRACE_SECONDS + suite.END_SECONDS
    assert sum(one.full_seconds + end for one in suite.BENCHMARKS.values()) <= suite.SECONDS == 15 * 60


def test_one_failure_takes_no_other_numbers_down(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Outcome(measurements=[Measurement("nginx", 1, 4, "rate", 2.5)], facts={"rounds": "1"})
    ended = [("events", Outcome(failure="no such thing")), ("file", good)]
    monkeypatch.setattr(suite, "measure", lambda chosen, options: iter(ended))
    assert command.main([]) == 1
    [kept] = results.glob("*.json")
    record = Record.read(kept)
    assert (record.full, record.outcomes) == (True, dict(ended))
    said = capsys.readouterr().out
    assert re.search(r"\nnginx +4 +2\.5 ", said)
    assert re.search(r"\nevents .* no such thing\n", said)
    assert "\n- ended: no such thing\n" in kept.with_suffix(".md").read_text()


def test_a_part_of_all_is_no_full_run(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "measure", lambda chosen, options: ((one.name, Outcome()) for one in chosen))
    assert command.main(["--only", "llm", "file"]) == 0
    [kept] = results.glob("*.json")
    assert (Record.read(kept).full, list(Record.read(kept).outcomes)) == (False, ["file", "llm"])


def test_options_of_all_are_options_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(quick=True, no_pin=False, realtime=False)
    assert suite.options_of(file.BENCHMARK, options) == [
        "--rounds",
        "9",
        "--size-mb",
        "512",
        "--quick",
        "--at-most",
        "86",
    ]


# -- pages and plots


def test_a_run_fills_its_sections_and_no_others(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    other = "<!-- bench:llm -->\n\nas it was\n\n<!-- /bench -->\n"
    readme.write_text(
        f"before\n<!-- bench:all -->\n<!-- /bench -->\n<!-- bench:file -->\nold\n<!-- /bench -->\n{other}after\n"
    )
    monkeypatch.setattr(page, "README", readme)
    monkeypatch.setattr(page, "PLOTS", tmp_path / "plots")
    written({("streamlab", 4): {"cpu": 0.2}}, seconds=100, budget=110, facts={"machine": "a small one", "rounds": "1"})
    assert command.main(["--write"]) == 0
    text = readme.read_text()
    assert "\n| file | 100 | 110 | 1 | 4 of 5 | 2 of 2 | done |\n\n<!-- /bench -->\n<!-- bench:file -->\n\n" in text
    assert "- machine: a small one\n" in text
    assert "| streamlab rate / FastAPI way | 1 | 7 | >= 6 | met |\n" in text
    assert "\n- *streamlab CPU per GB / FastAPI way, 4*: streamlab spends as much" in text
    assert "old" not in text
    assert text.endswith(f"{other}after\n")
    assert command.main(["--write"]) == 0
    assert readme.read_text() == text


def test_readme_has_a_place_for_every_benchmark() -> None:
    names = [found[1] for found in page.SECTION.findall((REPOSITORY / "bench/README.md").read_text())]
    assert sorted(names) == sorted(["all", *suite.BENCHMARKS])


def test_plots_show_what_scale_measures() -> None:
    from bench import plots  # it imports matplotlib, which takes half a second of a processor

    for plot in plots.PLOTS:
        assert {panel.key for panel in plot.panels} <= set(scale.BENCHMARK.keys)
        assert set(plot.servers) <= set(plots.LOOKS) & set(scale.BENCHMARK.servers)


def test_plots_are_small_and_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    from bench import plots

    values = {"one rate": 50_000.0, "one cpu": 12.0, "paced p99": 20.0, "idle": 0.0}
    sizes = {"streamlab": (10, 100, 1000, 5000), "sse-starlette": (10, 100, 1000)}
    outcome = Outcome(
        measurements=[
            Measurement(server, 1, size, key, value)
            for server, all_sizes in sizes.items()
            for size in all_sizes
            for key, value in values.items()
        ]
    )
    [drawn] = plots.draw(outcome, tmp_path, "one-")
    [again] = plots.draw(outcome, tmp_path, "two-")
    text = drawn.read_text()
    assert (drawn.name, text) == ("one-followers.svg", again.read_text())
    assert len(text) < 60_000
    for words in ("streamlab", "sse-starlette (to 1,000)", "p99 of a delivery, ms, paced", "5,000"):
        assert f">{words}</text>" in text


# -- peers


async def test_raw_asyncio_answers_requests_that_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_asyncio, "followers", set())
    server = await asyncio.get_running_loop().create_server(raw_asyncio.Connection, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        follower, leaving = await asyncio.open_connection("127.0.0.1", port)
        leaving.write(b"GET /stream/stock-ticker HTTP/1.1\r\n\r\n")
        await follower.readuntil(b"\r\n\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\none" + b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\ntwo"
        )
        assert await reader.readexactly(2 * len(raw_asyncio.ACCEPTED)) == 2 * raw_asyncio.ACCEPTED
        assert await follower.readexactly(32) == b"b\r\ndata: one\n\n\r\nb\r\ndata: two\n\n\r\n"
        for one in (writer, leaving):
            one.close()
            await one.wait_closed()
