"""Goals, reports and time limits of the benchmarks; the benchmarks themselves are not run."""

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
from bench import file, followers, page, rig, scale, suite, workers
from bench.event_peers import raw_asyncio
from bench.record import Outcome, Record
from bench.report import Goal, Measurement, Numbers, judge, number, spread
from bench.rig import Benchmark, Run, Step
from tests.support.servers import REPOSITORY

NUMBERS = {  # numbers that meet every goal of the downloads, by server and number of streams
    ("streamlab", 1): {"rate": 7.0, "cpu": 0.1, "memory": 1.0},
    ("streamlab", 4): {"rate": 7.0, "cpu": 0.1, "memory": 1.0},
    ("FastAPI", 1): {"rate": 1.0, "cpu": 1.0},
    ("FastAPI", 4): {"rate": 1.0, "cpu": 1.0},
    ("nginx", 1): {"rate": 6.0},
    ("nginx", 4): {"rate": 7.0},
}
Row = tuple[str, int, int, str, float]
WriteRun = Callable[..., Path]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an own folder of results."""
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def write_run(results: Path) -> WriteRun:
    """Write the file of a run of the downloads that meets every goal, except for the `changed` numbers."""

    def write(
        changed: Mapping[tuple[str, int], Mapping[str, float]] = {},
        without: Sequence[str] = (),
        name: str = "2026-01-02T030405.json",
        full: bool = True,
        **others: Any,
    ) -> Path:
        rows: list[Row] = []
        for (server, streams), values in NUMBERS.items():
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
    """Run the gate; return its status and output, with columns separated by one space."""
    status = command.main(["--check", *([str(path)] if path else [])])
    output = capsys.readouterr()
    return status, re.sub(r" {2,}", " ", output.out + output.err)


# -- the gate


def test_gate_passes_when_goals_are_met(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = checked(write_run(), capsys)
    assert status == 0
    assert "\nfile streamlab rate / FastAPI 1 7 >= 6 met\n" in output
    assert "\nfile streamlab CPU per GB / FastAPI 4 0.1 <= 0.167 met\n" in output
    assert output.endswith(
        "5 of 5 ratios are met, 0 fall short for a known reason and stay above their floor,"
        " 0 have a peer that is not installed, and 0 do not pass\n"
    )


def test_gate_passes_a_shortfall_with_a_reason(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = checked(write_run({("streamlab", 4): {"cpu": 0.2}}), capsys)
    assert status == 0
    assert "file streamlab CPU per GB / FastAPI 4 0.2 <= 0.167 falls short by 20 %, floor 0.265\n" in output
    assert "\n- file: streamlab CPU per GB / FastAPI, 4: streamlab spends as much" in output
    assert "\n4 of 5 ratios are met, 1 fall short for a known reason" in output


def test_gate_fails_below_a_floor(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = checked(write_run({("streamlab", 4): {"cpu": 0.27}}), capsys)
    assert status == 1
    assert output.endswith("and 1 do not pass\n- file: streamlab CPU per GB / FastAPI, 4: below its floor of 0.265\n")


def test_gate_fails_for_a_shortfall_without_a_reason(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = checked(write_run({("streamlab", 1): {"rate": 5.97}}), capsys)
    assert status == 1
    assert output.endswith("and 1 do not pass\n- file: streamlab rate / FastAPI, 1: falls short by 1 %\n")


def test_gate_reports_and_does_not_judge_numbers_with_a_unit(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output = checked(write_run({("streamlab", 1): {"memory": 12.0}}), capsys)
    assert status == 0
    judged, reported = output.split("reported, not judged: numbers with a unit depend on the machine\n")
    assert "file streamlab peak RSS growth, MB 1 12 <= 8 falls short by 50 %\n" in reported
    assert "MB" not in judged


def test_gate_passes_and_reports_a_missing_peer(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(without=["nginx"], absent={"nginx": "nginx is not installed"})
    status, output = checked(path, capsys)
    assert status == 0
    assert "file streamlab rate / nginx 1 - >= 0.85 not measured: nginx is not installed\n" in output
    assert "2 have a peer that is not installed" in output


def test_gate_fails_for_a_missing_number_without_a_reason(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(without=["nginx"], failure="ended after its time limit of 100 s")
    status, output = checked(path, capsys)
    assert status == 1
    assert "\n- file: streamlab rate / nginx, 1: not measured\n" in output
    assert "\nfile: ended after its time limit of 100 s\n" in output


def test_gate_reports_a_missing_run(results: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    output = "bench: no full run in bench/results/: run `make bench` first\n"
    assert checked(None, capsys) == (2, output)
    write_run(full=False)
    assert checked(None, capsys) == (2, output)


def test_gate_uses_the_newest_full_run(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(name="2026-01-02T000000.json")
    write_run({("streamlab", 1): {"rate": 1.0}}, name="2026-01-01T000000.json")  # older
    write_run({("streamlab", 1): {"rate": 1.0}}, name="2026-01-03T000000.json", full=False)
    write_run({("streamlab", 1): {"rate": 1.0}}, name="file-2026-01-04T000000.json")  # a single benchmark
    assert checked(None, capsys)[0] == 0


@pytest.mark.parametrize("text", ["", "{}", '{"full": true, "began": "", "benchmarks": {"file": {}}}', "[]"])
def test_gate_rejects_other_files(text: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.mkdir()
    path = results / "2026-01-01T000000.json"
    path.write_text(text)
    status, output = checked(path, capsys)
    assert (status, output.startswith(f"bench: {path} is not the file of a run: ")) == (2, True)


# -- goals


def test_median_of_ratios_within_rounds_is_judged() -> None:
    rows = [("us", 1, 6.0), ("us", 2, 8.0), ("us", 3, 100.0), ("us", 4, 1.0), ("them", 1, 2.0), ("them", 2, 2.0)]
    rows += [("them", 3, 1.0), ("them", 5, 1.0)]
    numbers = Numbers(Measurement(server, at, 1, "rate", value) for server, at, value in rows)
    [judged] = judge([Goal("rate / them", "them", 1, "rate", ">=", 5, "us")], numbers, {})
    assert judged.found == {1: 3.0, 2: 4.0, 3: 100.0}
    assert (judged.median, judged.verdict, judged.passes) == (4.0, "falls short by 20 %", False)


def test_server_can_be_its_own_peer() -> None:
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
def test_goals_and_floors_have_a_direction(sign: str, value: float, verdict: str, passes: bool) -> None:
    floor = 1.5 if sign == ">=" else 2.5
    goal = Goal("x", "them", 1, "rate", sign, 2.0, "us", short="it is known", floor=floor)
    numbers = Numbers([Measurement("us", 1, 1, "rate", value), Measurement("them", 1, 1, "rate", 1.0)])
    [judged] = judge([goal], numbers, {})
    assert (judged.verdict, judged.passes) == (verdict, passes)


@pytest.mark.parametrize("wrong", [{"unit": "ms"}, {"peer": None}, {"short": "a reason and no floor"}, {"floor": 1.0}])
def test_inconsistent_goals_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="x: a ratio"):
        replace(Goal("x", "them", 1, "rate", ">=", 2.0), **wrong)


@pytest.mark.parametrize("benchmark", [*suite.BENCHMARKS.values(), workers.BENCHMARK], ids=lambda one: one.name)
def test_every_goal_concerns_a_measured_number(benchmark: Benchmark) -> None:
    for goal in benchmark.goals:
        assert {goal.server, goal.peer or goal.server} <= set(benchmark.servers), goal
        assert {goal.key, goal.by or goal.key} <= set(benchmark.keys), goal
        if goal.floor is not None:
            assert not goal.reached(goal.floor, goal.limit), goal


def test_undeclared_number_is_rejected(tmp_path: Path) -> None:
    run = Run(file.BENCHMARK, argparse.Namespace(), None, tmp_path, 0.0)
    run.note("nginx", 1, 4, "rate", 1.0)
    for server, key in (("nginx", "speed"), ("apache", "rate")):
        with pytest.raises(ValueError, match="file has no number"):
            run.note(server, 1, 4, key, 1.0)
    assert run.outcome.measurements == [Measurement("nginx", 1, 4, "rate", 1.0)]


def test_failed_step_does_not_affect_others_and_steps_end_at_the_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ran = Run(file.BENCHMARK, argparse.Namespace(), None, tmp_path, 10.0), list[str]()
    clock = iter([8.0, 9.0, 10.0, 11.0])
    monkeypatch.setattr(rig, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def broken() -> None:
        raise RuntimeError("it broke\nat length")

    steps = [
        Step("one", lambda: ran.append("one")),
        Step("two", broken),
        Step("three", lambda: ran.append("three")),
    ]
    run.run_steps([*steps, Step("four", lambda: ran.append("four"))])
    assert ran == ["one", "three"]
    assert run.outcome.failure == "it broke"
    assert run.outcome.notes == ["1 of 4 steps, from four on: skipped, the time limit was reached"]


def test_rounds_end_at_the_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(file.BENCHMARK, argparse.Namespace(rounds=9), None, tmp_path, 100.0)
    clock = iter([0.0, 40.0, 40.0, 70.0, 70.0, 100.0, 100.0])  # of 40, 30 and 30 seconds
    monkeypatch.setattr(rig, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(run.rounds()) == [1, 2, 3]
    assert run.outcome.facts["rounds"] == "3 of 9"


def test_numbers_of_the_load_client_are_declared() -> None:
    printed = {key for name in ("one", "burst", "lines", "single") for key in _window().numbers(name)}
    assert printed <= set(followers.KEYS) == set(suite.BENCHMARKS["events"].keys)


def _window() -> followers.Window:
    window = followers.Window(None)  # type: ignore[arg-type]
    window.seconds, window.deliveries = 1.0, 1
    return window


def test_numbers_are_formatted_without_exponents() -> None:
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


def _command(then: str, into: Path) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(then=then), "--into", str(into)]


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file to which a benchmark of this test reports its first number."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("READY", str(tmp_path / "ready"))
    return tmp_path / "ready"


def test_benchmark_beyond_its_time_limit_is_ended_and_its_numbers_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: Path
) -> None:
    into = tmp_path / "into.json"
    os.mkfifo(ready)

    class Slow(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout == 76 + suite.GRACE_SECONDS:
                assert ready.read_text() == "noted"  # it is running, and its time limit is reached
                raise subprocess.TimeoutExpired("bench", timeout)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    outcome = suite.run(_command("threading.Event().wait()", into), into, file.BENCHMARK, 76)
    assert outcome.failure == "ended after its time limit of 76 s"
    assert outcome.measurements == [Measurement("nginx", 1, 4, "rate", 1.0)]


def test_numbers_of_a_failed_benchmark_are_stored(tmp_path: Path, ready: Path) -> None:
    into = tmp_path / "into.json"
    outcome = suite.run(_command("raise KeyError('no such thing')", into), into, file.BENCHMARK, 76)
    assert outcome.failure == "'no such thing'"
    assert outcome.measurements == [Measurement("nginx", 1, 4, "rate", 1.0)]


def test_benchmark_without_numbers_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert suite.run(command, tmp_path / "into.json", file.BENCHMARK, 76).failure == "wrote no numbers, exit status 3"


def test_limits_of_all_benchmarks_fit_into_the_total() -> None:
    end = suite.GRACE_SECONDS + suite.END_SECONDS
    assert sum(one.full_seconds + end for one in suite.BENCHMARKS.values()) <= suite.SECONDS == 17 * 60


def test_failure_of_one_benchmark_does_not_affect_others(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Outcome(measurements=[Measurement("nginx", 1, 4, "rate", 2.5)], facts={"rounds": "1"})
    ended = [("events", Outcome(failure="no such thing")), ("file", good)]
    monkeypatch.setattr(suite, "measure", lambda chosen, options: iter(ended))
    assert command.main([]) == 1
    [stored] = results.glob("*.json")
    record = Record.read(stored)
    assert (record.full, record.outcomes) == (True, dict(ended))
    output = capsys.readouterr().out
    assert re.search(r"\nnginx +4 +2\.5 ", output)
    assert re.search(r"\nevents .* no such thing\n", output)
    assert "\n- ended: no such thing\n" in stored.with_suffix(".md").read_text()


def test_selected_benchmarks_are_not_a_full_run(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "measure", lambda chosen, options: ((one.name, Outcome()) for one in chosen))
    assert command.main(["--only", "llm", "file"]) == 0
    [stored] = results.glob("*.json")
    assert (Record.read(stored).full, list(Record.read(stored).outcomes)) == (False, ["file", "llm"])


def test_options_are_passed_to_each_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(quick=True, short=False, no_pin=False, realtime=False)
    full = ["--rounds", "9", "--size-mb", "512", "--quick", "--at-most", str(file.BENCHMARK.full_seconds)]
    assert suite.options_of(file.BENCHMARK, options) == full
    options = argparse.Namespace(quick=False, short=True, no_pin=True, realtime=False)
    assert suite.options_of(file.BENCHMARK, options) == [
        *("--rounds", "5", "--short", "--no-pin", "--at-most", str(file.BENCHMARK.short_seconds))
    ]


def test_a_short_run_takes_three_minutes_at_most(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "measure", lambda chosen, options: ((one.name, Outcome()) for one in chosen))
    assert command.main(["--short"]) == 0
    [stored] = results.glob("*.json")
    record = Record.read(stored)
    assert (record.full, list(record.outcomes)) == (False, ["file", "requests", "events", "export"])
    assert sum(suite.BENCHMARKS[name].short_seconds for name in record.outcomes) <= 180


def test_two_runs_are_compared_in_percent_with_their_noise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def record(rates: list[float]) -> str:
        peer = [Measurement("FastAPI", number, 1, key, 1.0) for number in (1, 2, 3) for key in ("rate", "cpu")]
        own = [Measurement("streamlab", number, 1, "rate", rate) for number, rate in enumerate(rates, 1)]
        own += [Measurement("streamlab", number, 1, "cpu", 1 / rate) for number, rate in enumerate(rates, 1)]
        path = tmp_path / f"{rates[0]}.json"
        Record({"file": Outcome(measurements=[*own, *peer])}).write(path, {})
        return str(path)

    before, noisy, faster = record([10.0, 9.0, 11.0]), record([11.0, 9.0, 13.0]), record([20.0, 19.0, 21.0])
    slow = record([5.0])

    def compared(*files: str) -> list[list[str]]:
        assert command.main(["--compare", *files]) == 0
        return [re.split(r"  +", line)[-2:] for line in capsys.readouterr().out.splitlines()[1:]]

    assert compared(before, noisy) == [
        ["+10.0 %", "within the noise of 28.2 %"],
        ["-9.1 %", "within the noise of 28.9 %"],
    ]
    assert compared(before, faster) == [["+100.0 %", "better, noise 15.0 %"], ["-50.0 %", "better, noise 15.1 %"]]
    assert compared(faster, before) == [["-50.0 %", "worse, noise 15.0 %"], ["+100.0 %", "worse, noise 15.1 %"]]
    assert compared(before, slow)[0] == ["-50.0 %", "one round: its noise is not known"]
    with pytest.raises(SystemExit):
        command.main(["--compare", before])
    assert "--compare takes the files of two runs, or none" in capsys.readouterr().err


def test_the_newest_two_runs_are_compared(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--compare"]) == 2
    assert "there are no two runs" in capsys.readouterr().err
    for day in (1, 2, 3):
        Record({}, began=f"2026-11-0{day}").write(results / f"2026-11-0{day}.json", {})
    assert command.main(["--compare"]) == 0
    assert capsys.readouterr().out == "these two runs have no ratio in common\n"


# -- pages and plots


def test_run_fills_only_its_sections(write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    other = "<!-- bench:llm -->\n\nas it was\n\n<!-- /bench -->\n"
    readme.write_text(
        f"before\n<!-- bench:all -->\n<!-- /bench -->\n<!-- bench:file -->\nold\n<!-- /bench -->\n{other}after\n"
    )
    monkeypatch.setattr(page, "README", readme)
    monkeypatch.setattr(page, "PLOTS", tmp_path / "plots")
    write_run(
        {("streamlab", 4): {"cpu": 0.2}}, seconds=100, budget=110, facts={"machine": "a small one", "rounds": "1"}
    )
    assert command.main(["--write"]) == 0
    text = readme.read_text()
    assert "\n| file | 100 | 110 | 1 | 4 of 5 | 2 of 2 | done |\n\n<!-- /bench -->\n<!-- bench:file -->\n\n" in text
    assert "- machine: a small one\n" in text
    assert "| streamlab rate / FastAPI | 1 | 7 | >= 6 | met |\n" in text
    assert "\n- *streamlab CPU per GB / FastAPI, 4*: streamlab spends as much" in text
    assert "old" not in text
    assert text.endswith(f"{other}after\n")
    assert command.main(["--write"]) == 0
    assert readme.read_text() == text


def test_readme_has_a_section_for_every_benchmark() -> None:
    names = [found[1] for found in page.SECTION.findall((REPOSITORY / "bench/README.md").read_text())]
    assert sorted(names) == sorted(["all", *suite.BENCHMARKS])


def test_plots_show_what_scale_measures() -> None:
    from bench import plots  # imports matplotlib, which takes half a second

    for plot in plots.PLOTS:
        assert {panel.key for panel in plot.panels} <= set(scale.BENCHMARK.keys)
        assert set(plot.servers) <= set(plots.STYLES) & set(scale.BENCHMARK.servers)


def test_plots_are_small_and_reproducible(tmp_path: Path) -> None:
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
    for text_in_plot in ("streamlab", "sse-starlette (to 1,000)", "p99 of a delivery, ms, paced", "5,000"):
        assert f">{text_in_plot}</text>" in text


# -- peers


async def test_raw_asyncio_responds_to_pipelined_requests(monkeypatch: pytest.MonkeyPatch) -> None:
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
