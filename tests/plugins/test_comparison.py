"""Buffered and streamed rows on the process that `make run` starts: equal bytes, both costs, the end of a report."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from streamlab.config import Config
from streamlab.server.app import create_app
from tests.support.connections import EventStream, read_all, read_until
from tests.support.servers import Running, plugin_module

LOADED_PLUGINS = ("comparison",)

modes = plugin_module("comparison", "modes")
memory = plugin_module("comparison", "memory")
measuring = plugin_module("comparison", "measure")
reporting = plugin_module("comparison", "report")

BUFFERED, STREAMED = "/demo/comparison/buffered", "/demo/comparison/streamed"
REPORT = "/demo/comparison/report"
OTHERS = ("export", "file", "llm", "logs", "ticker")
LONG = f"{REPORT}?rows=1000000"
"""A report that takes a minute."""
AS_EVENTS = f"GET {LONG} HTTP/1.1\nAccept: text/event-stream"

Serve = Callable[..., Running]


@pytest.fixture
def serve(start: Serve) -> Serve:
    """Yield a server with only this scenario, configured by these lines."""

    def serving(comparison: str = "", others: str = "", **options: bool) -> Running:
        off = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in OTHERS)
        return start(f"{others}\n{off}[scenarios.comparison]\n{comparison}\n", **options)

    return serving


def until(reached: Callable[[], Any], *, seconds: float = 20) -> Any:
    """Return the result of `reached` once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)
    return found


def status_of(pid: int) -> dict[str, str]:
    """Return what the kernel reports of a process; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":", 1) for line in lines)


def resident(server: Running) -> int:
    """Return the memory of a server, in bytes."""
    return int(status_of(server.process.pid)["VmRSS"].split()[0]) * 1024


def children(parent: int) -> list[int]:
    """Return the pids of the child processes of a process."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [pid for pid in pids if status_of(pid).get("PPid", "").strip() == str(parent)]


def processes_of(server: Running, *, serving: bool = False) -> tuple[list[int], Path]:
    """Return the pids of the processes of a report, and the folder of their socket.

    The last process is the one that is measured: it has been forked by the first, if the report is already `serving`.
    """

    def found() -> tuple[list[int], Path] | None:
        for pid in children(server.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                if words[2:3] and words[2].endswith("modes.py") and (not serving or Path(words[3]).exists()):
                    return [pid, *children(pid)], Path(words[3]).parent
        return None

    return until(found)  # type: ignore[no-any-return]


def assert_ended(pids: list[int], folder: Path, *, orphans: bool = False) -> None:
    """Assert that neither the processes nor their folder remain; an orphan may still be a zombie."""

    def has_ended(pid: int) -> bool:
        status = status_of(pid)
        return not status or (orphans and status["State"].strip().startswith("Z"))

    until(lambda: all(map(has_ended, pids)))
    until(lambda: not folder.exists())


# -- the two routes


def test_both_modes_send_the_same_bytes_one_with_a_length_the_other_in_chunks(serve: Serve) -> None:
    server = serve()
    for rows in (0, 1, 100, 101, 2345):
        lines = [json.dumps(modes.row(number), separators=(",", ":")).encode() for number in range(rows)]
        expected = b"[\n" + b",\n".join(lines) + b"\n]\n" if lines else b"[\n]\n"
        status, buffered, body = server.get(f"{BUFFERED}?rows={rows}")
        assert (status, body) == (200, expected)
        assert [one["id"] for one in json.loads(body)] == list(range(rows))
        status, streamed, body = server.get(f"{STREAMED}?rows={rows}")
        assert (status, body) == (200, expected)
        assert (buffered["content-length"], buffered.get("transfer-encoding")) == (str(len(expected)), None)
        assert (streamed.get("content-length"), streamed["transfer-encoding"]) == (None, "chunked")
        assert buffered["content-type"] == streamed["content-type"] == "application/json"
        assert re.fullmatch(
            rf'collect;dur=\d+\.\d{{3}};desc="{rows} rows generated and buffered"', buffered["server-timing"]
        )
        assert re.fullmatch(r'first;dur=\d+\.\d{3};desc="first rows generated"', streamed["server-timing"])


def test_no_row_is_longer_than_the_size_that_memory_is_reserved_for() -> None:
    tens = [10**power + number for power in range(9) for number in range(110)]
    assert max(len(json.dumps(modes.row(number))) + 2 for number in tens) <= modes.ROW_BYTES


def test_head_and_http_1_0_work_as_everywhere(serve: Serve) -> None:
    server = serve()
    body = server.get(STREAMED)[2]
    for path in (BUFFERED, STREAMED, REPORT):
        status, headers, nothing = server.get(path, method="HEAD")
        assert (status, nothing) == (200, b""), path
        assert headers.get("content-length") == (str(len(body)) if path == BUFFERED else None)
    for path in (BUFFERED, STREAMED):
        head, _, old = read_all(server.send(f"GET {path} HTTP/1.0")).partition(b"\r\n\r\n")
        assert b" 200 " in head.partition(b"\r\n")[0]
        assert b"chunked" not in head.lower()
        assert old == body


def test_the_first_streamed_rows_arrive_before_the_buffered_response_and_no_request_waits(
    serve: Serve,
) -> None:
    server = serve()
    # Collecting these rows takes seconds, and starts first; the other response is sent concurrently.
    with (
        server.send(f"GET {BUFFERED}?rows=1000000 HTTP/1.1\nHost: localhost") as buffered,
        server.send(f"GET {STREAMED}?rows=1000000 HTTP/1.1\nHost: localhost") as streamed,
    ):
        assert b'"id":99,' in read_until(streamed, b'"id":99,')
        assert server.get("/health")[0] == 200
        assert select.select([buffered], [], [], 0)[0] == []
    server.wait_for_log("client left")


def test_a_streamed_response_waits_for_its_client_in_constant_memory(serve: Serve) -> None:
    server = serve(fresh=True)

    def sent() -> float:
        found = re.search(
            rb'^streamlab_stream_bytes_total\{scenario="comparison"\} (\S+)', server.get("/metrics")[2], re.M
        )
        return float(found[1]) if found else 0.0

    def read(connection: Any, count: int) -> None:
        while count > 0:
            received = connection.recv(min(count, 65536))
            assert received
            count -= len(received)

    with server.send(f"GET {STREAMED}?rows=100000000 HTTP/1.1\nHost: localhost", receive_buffer=65536) as connection:
        read(connection, 2_000_000)
        before, stalled = resident(server), [0.0]

        def is_still() -> bool:
            time.sleep(0.05)
            stalled.append(sent())
            return stalled[-1] == stalled[-2] > 0

        until(is_still)
        assert stalled[-1] < 6_000_000  # of 13 GB
        read(connection, 10_000_000)
        assert resident(server) - before < 5_000_000


def test_rows_that_do_not_fit_are_rejected_by_name(serve: Serve) -> None:
    server = serve("max_rows = 5000")
    for path in (BUFFERED, REPORT):
        assert server.get(f"{path}?rows=5000", method="HEAD")[0] == 200
        status, _, body = server.get(f"{path}?rows=5001")
        problem = json.loads(body)
        assert (status, problem["detail"]) == (422, "Invalid parameters: rows.")
        detail = "must be at most 5000 (max_rows)"
        assert problem["errors"] == [{"in": "query", "name": "rows", "detail": detail}]
    assert len(json.loads(server.get(f"{STREAMED}?rows=6000")[2])) == 6000
    for path, wrong in [
        (BUFFERED, "rows=-1"),
        (STREAMED, "rows=100000001"),
        (REPORT, "rows=99"),
        (REPORT, "repeats=0"),
    ]:
        status, _, body = server.get(f"{path}?{wrong}")
        assert (status, json.loads(body)["errors"][0]["name"]) == (422, wrong.partition("=")[0])


def test_buffered_responses_beyond_the_limit_are_rejected_with_503(serve: Serve) -> None:
    server = serve("max_buffered = 1")
    with server.send(f"GET {BUFFERED}?rows=100000 HTTP/1.1\nHost: localhost", receive_buffer=65536) as first:
        read_until(first, b"\r\n\r\n")  # it stays in memory until its client has read it
        status, headers, body = server.get(BUFFERED)
        assert (status, headers["retry-after"]) == (503, "5")
        assert json.loads(body)["detail"] == "Too many buffered responses: 1 of 1 in progress."
        assert server.get(STREAMED)[0] == 200
    until(lambda: server.get(BUFFERED)[0] == 200)


# -- memory


@pytest.fixture
async def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[TestClient[Any, Any], Any]]:
    """Yield a client of an application in this process, and the module of the plugin."""
    off = {name: {"enabled": False} for name in OTHERS}
    config = Config.of({"scenarios": off, "events": {"url": "sqlite://"}}, base=tmp_path)
    app = create_app(config)
    async with TestClient(TestServer(app)) as client:
        yield client, sys.modules["streamlab.plugins.comparison"]


async def test_rows_that_need_more_than_half_of_the_free_memory_are_rejected(
    client: tuple[TestClient[Any, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    http_client, module = client
    need = modes.collected_bytes(10_000)
    assert need == 1_800_000
    for free, status in ((2 * need, 200), (2 * need - 2, 422), (0, 422), (None, 200)):
        monkeypatch.setattr(module.memory, "available", lambda free=free: free)
        response = await http_client.get(BUFFERED)
        assert response.status == status, free
    monkeypatch.setattr(module.memory, "available", lambda: 3_000_000)
    problem = await (await http_client.get(f"{REPORT}?rows=10000")).json()
    assert problem["errors"][0]["detail"] == "would take up to 1 MB of memory; the limit is half of the available 3 MB"
    # Memory counts when it is reserved, before it is used.
    monkeypatch.setattr(module.memory, "available", lambda: 400_000_000)
    async with http_client.get(f"{REPORT}?rows=1000000") as report:
        assert (report.status, (await http_client.get(BUFFERED)).status) == (200, 200)
        response = await http_client.get(f"{BUFFERED}?rows=200000")
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert (await response.json())["detail"] == "Other requests are using the memory that these rows would take."


def test_free_memory_is_the_minimum_of_the_machine_and_its_control_groups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    assert memory.available(proc, groups) is None
    write({"proc/meminfo": "MemFree:  1 kB\nMemAvailable:    9000 kB\n", "proc/self/cgroup": "0::/a/b\n"})
    assert memory.available(proc, groups) == 9_216_000
    write({"cgroup/a/b/memory.max": "max\n", "cgroup/a/b/memory.current": "7\n"})
    assert memory.available(proc, groups) == 9_216_000
    write({"cgroup/a/memory.max": "5000\n", "cgroup/a/memory.current": "4000\n"})
    assert memory.available(proc, groups) == 1000
    write({"cgroup/a/memory.stat": "anon 9\ninactive_file 500\nslab 1\n"})
    assert memory.available(proc, groups) == 1500
    write({"cgroup/memory.max": "100\n", "cgroup/memory.current": "200\n"})
    assert memory.available(proc, groups) == 0
    write({"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/outside\n1:cpu:/\n0::/\n", "cgroup/memory.max": "max"})
    write({"cgroup/memory/memory.limit_in_bytes": "300", "cgroup/memory/memory.usage_in_bytes": "100"})
    write({"cgroup/memory/memory.stat": "inactive_file 70\ntotal_inactive_file 50\n"})
    assert memory.available(proc, groups) == 250


# -- the report


def test_a_report_as_events_measures_both_modes_at_every_size_and_ends_with_a_verdict(serve: Serve) -> None:
    server = serve()
    with EventStream(server, f"{REPORT}?rows=40000&repeats=1") as stream:
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")
        assert stream.headers["vary"] == "Accept"
        events = list(stream)
    assert len({event.id for event in events}) == len(events)
    assert all(event.id for event in events)
    names = ["progress", "progress", "measurement", "measurement"] * 3 + ["end"]
    assert [event.event for event in events] == names
    progress = [event.json for event in events if event.event == "progress"]
    assert [(one["done"], one["total"]) for one in progress] == [(done, 6) for done in range(6)]
    assert progress[3]["message"] == "measuring 4,000 rows, streamed"

    measured = [event.json for event in events if event.event == "measurement"]
    plan = [(mode, rows) for rows in (400, 4000, 40000) for mode in ("buffered", "streamed")]
    assert [(one["mode"], one["rows"]) for one in measured] == plan
    for one in measured:
        assert one["bytes"] == sum(map(len, modes.chunks(one["rows"])))
        assert 0 < one["ttfb_ms"] <= one["total_ms"]
        assert one["cpu_ms"] > 0
        assert one["mb_per_s"] == pytest.approx(one["bytes"] / one["total_ms"] / 1000, rel=0.1, abs=0.06)
    small, _, _, _, buffered, streamed = measured
    assert buffered["peak_rss_mb"] > 0.8 * buffered["bytes"] / 1_000_000
    assert buffered["peak_rss_mb"] > 4 * small["peak_rss_mb"]
    assert streamed["peak_rss_mb"] < buffered["peak_rss_mb"] / 3
    assert buffered["ttfb_ms"] > buffered["total_ms"] / 2
    assert streamed["ttfb_ms"] < streamed["total_ms"] / 2
    assert events[-1].json["verdict"].startswith("Streaming pays from ")

    with EventStream(server, REPORT, events[-1].id) as stream:
        assert stream.status == 204
    assert server.get(f"{REPORT}?last_event_id={events[-1].id}", {"Accept": "text/event-stream"})[0] == 204


def test_a_report_for_curl_is_a_table_that_arrives_line_by_line(serve: Serve) -> None:
    server = serve()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", f"{REPORT}?rows=2000&repeats=1")
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        head = response.readline().decode()
        processes_of(server)  # the head arrives before the first measurement
        body = response.read().decode().splitlines()
    names = ["rows", "mode", "bytes", "first byte", "total", "peak memory", "CPU", "throughput"]
    assert re.split(r"\s{2,}", head.strip()) == names
    lines = [re.split(r"\s{2,}", line.strip()) for line in body[:6]]
    plan = [(rows, mode) for rows in ("20", "200", "2,000") for mode in ("buffered", "streamed")]
    assert [(rows, mode) for rows, mode, *_ in lines] == plan
    sizes = [f"{sum(map(len, modes.chunks(int(line[0].replace(',', ''))))):,}" for line in lines]
    assert [line[2] for line in lines] == sizes
    for line in lines:
        units = zip(line[3:], (r"ms", r"ms", r"MB", r"ms", r"MB/s"), strict=True)
        assert all(re.fullmatch(rf"[\d,]+\.\d {unit}", cell) for cell, unit in units), line
    assert body[6] == ""
    assert re.fullmatch(r"Streaming (pays|does not pay) .*\.", body[7])
    assert len(body) == 8


def test_a_report_stops_when_its_client_disconnects_and_a_reconnect_gets_a_gap_and_a_new_one(serve: Serve) -> None:
    server = serve()
    with EventStream(server, LONG) as stream:
        (first,) = stream.take(1)
        status, headers, body = server.get(REPORT)
        assert (status, headers["retry-after"]) == (503, "5")
        assert json.loads(body)["detail"] == "Too many reports: 1 of 1 in progress."
        pids, folder = processes_of(server, serving=True)
        assert len(pids) == 2
    assert_ended(pids, folder)
    server.wait_for_log('outcome="client left"')
    with EventStream(server, LONG, first.id) as stream:
        gap, second = stream.take(2)
        assert (gap.event, gap.json["missing"]) == ("gap", None)
        assert (second.event, second.json["done"]) == ("progress", 0)
        assert len({first.id, gap.id, second.id}) == 3
        pids, folder = processes_of(server)
    assert_ended(pids, folder)


def test_no_process_outlives_a_server_that_is_killed(serve: Serve) -> None:
    server = serve()
    with EventStream(server, LONG) as stream:
        stream.take(1)
        pids, folder = processes_of(server, serving=True)
        assert len(pids) == 2
        server.terminate(signal.SIGKILL)
        assert_ended(pids, folder, orphans=True)


def test_sigterm_ends_a_report_of_events_at_once_and_aborts_a_table(serve: Serve) -> None:
    server = serve("max_reports = 2", "[server]\ndrain_seconds = 0.2")
    with (
        EventStream(server, LONG) as stream,
        server.send(f"GET {LONG} HTTP/1.1\nHost: localhost") as table,
    ):
        stream.take(1)
        read_until(table, b"throughput")
        pids, folder = processes_of(server)
        assert server.terminate()[0] == 0
        assert [event.event for event in stream][-1] == "stop"
        broken_off(table)
    assert_ended(pids, folder, orphans=True)


def broken_off(report: Any) -> bytes:
    """Return the rest of a report, which must not look complete."""
    rest = read_all(report)
    assert not rest.endswith(b"0\r\n\r\n")
    return rest


def test_a_report_that_takes_too_long_fails_visibly(serve: Serve) -> None:
    server = serve("max_seconds = 0.2")
    reason = rb"The report took longer than 0\.2 s \(max_seconds\)\. Request fewer rows or repeats\."
    events = broken_off(server.send(f"{AS_EVENTS}\nHost: localhost"))
    assert re.search(rb"\nevent: error\ndata: .*%b.*\n\n\r\n$" % reason, events)
    assert b"event: end" not in events
    table = broken_off(server.send(f"GET {LONG} HTTP/1.1\nHost: localhost"))
    assert re.search(rb"\n%b\n\r\n$" % reason, table)


def test_a_process_that_dies_fails_its_report_and_the_log_has_the_reason(serve: Serve) -> None:
    server = serve()
    for which in (-1, 0):  # the process that is measured, and the one that forks it
        with server.send(f"{AS_EVENTS}\nHost: localhost") as report:
            read_until(report, b"event: progress")
            pids, folder = processes_of(server, serving=True)
            assert len(pids) == 2
            os.kill(pids[which], signal.SIGKILL)
            assert b'\nevent: error\ndata: {"type":"about:blank","title":"Internal Server Error"' in broken_off(report)
        assert_ended(pids, folder)
        until(lambda: server.get(REPORT, method="HEAD")[0] == 200)
    assert len(re.findall(r"a measured process failed: .*exit status -9; no error output", server.log)) == 2


# -- the verdict


def measured(rows: int, buffered: tuple[float, float, float], streamed: tuple[float, float, float]) -> list[Any]:
    """Return measurements of both modes: milliseconds to the first byte and in total, and megabytes."""
    return [
        reporting.Measurement(mode, rows, rows * 130, first, total, peak, 37.0, 1.0, 1.0)
        for mode, (first, total, peak) in zip(("buffered", "streamed"), (buffered, streamed), strict=True)
    ]


def test_the_verdict_has_the_size_from_which_streaming_pays() -> None:
    small = measured(1000, (9.0, 9.5, 0.1), (1.0, 9.9, 0.0))
    middle = measured(10_000, (90.0, 91.0, 0.9), (1.0, 95.0, 0.1))
    large = measured(100_000, (900.0, 910.0, 13.5), (1.5, 1001.0, 0.5))
    gains = (
        "the first byte came 600 times sooner (1.5 ms, not 900.0 ms) and the response took 13.0 MB less memory "
        "(0.5 MB, not 13.5 MB), while the whole took 1.10 times as long"
    )
    assert reporting.verdict(small + middle + large) == (
        f"Streaming pays from 10,000 rows (1.3 MB) on: with 100,000 rows (13.0 MB) {gains}; "
        "with 1,000 rows (130 kB) or fewer, buffering is as good."
    )
    assert reporting.verdict(small + large) == (
        f"Streaming pays from 100,000 rows (13.0 MB) on: {gains}; "
        "with 1,000 rows (130 kB) or fewer, buffering is as good."
    )
    assert reporting.verdict(middle + large) == (
        f"Streaming pays from 10,000 rows (1.3 MB) on: with 100,000 rows (13.0 MB) {gains}."
    )
    assert reporting.verdict(small) == (
        "Streaming does not pay up to 1,000 rows (130 kB): there the first byte came after 1.0 ms streamed and 9.0 ms "
        "buffered, and the response took 0.0 MB of memory streamed and 0.1 MB buffered."
    )
    # A single size at which it pays is noise.
    assert reporting.verdict(middle + small).startswith("Streaming does not pay up to 1,000 rows")


def test_streaming_may_pay_by_memory_or_by_the_first_byte_alone() -> None:
    lighter = reporting.verdict(measured(1000, (2.0, 2.0, 9.0), (1.0, 2.0, 0.0)))
    assert lighter.startswith("Streaming pays from 1,000 rows (130 kB) on: the response took 9.0 MB less memory (")
    sooner = reporting.verdict(measured(1000, (80.0, 80.0, 1.0), (20.0, 40.0, 0.6)))
    assert sooner == (
        "Streaming pays from 1,000 rows (130 kB) on: the first byte came 4 times sooner (20.0 ms, not 80.0 ms), while "
        "the whole took 0.50 times as long."
    )


async def test_modes_take_turns_and_medians_are_reported() -> None:
    measured_runs: list[tuple[str, int]] = []

    async def measure(mode: str, rows: int) -> Any:
        measured_runs.append((mode, rows))
        number = (3, 1, 2)[sum(one == (mode, rows) for one in measured_runs) - 1]
        usage = measuring.Usage(20_000_000, 20_000_000 + number * 1_000_000, number / 100)
        return measuring.Run(1_000_000, number / 1000, number / 10, usage)

    updates = [update async for update in reporting.measure_all(1000, 3, measure)]
    assert measured_runs == [(mode, rows) for rows in (10, 100, 1000) for mode in ("buffered", "streamed") * 3]
    assert [update for update in updates if isinstance(update, reporting.Measurement)] == [
        reporting.Measurement(mode, rows, 1_000_000, 2.0, 200.0, 2.0, 20.0, 20.0, 5.0)
        for rows in (10, 100, 1000)
        for mode in ("buffered", "streamed")
    ]
    assert updates[1] == reporting.Progress(1, 18, "measuring 10 rows, streamed (1 of 3)")


async def test_a_client_gets_heartbeats_during_a_long_measurement(
    client: tuple[TestClient[Any, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    http_client, module = client

    async def measure(mode: str, rows: int) -> Any:
        await asyncio.Event().wait()

    @contextlib.asynccontextmanager
    async def measuring() -> AsyncIterator[Any]:
        yield measure

    monkeypatch.setattr(module, "measuring", measuring)
    monkeypatch.setattr(module, "open_event_stream", partial(module.open_event_stream, heartbeat_seconds=1))
    async with http_client.get(REPORT, headers={"Accept": "text/event-stream"}) as response:
        await response.content.readuntil(b"\n\n")
        assert await response.content.readuntil(b"\n") == b":\n"
