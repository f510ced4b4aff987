"""`workers` of `[server]`: several processes that listen at one address, and what happens when they die or change."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from streamlab.config import Config, Source
from streamlab.events.views import Filters, View
from streamlab.problems import Problem
from streamlab.server.limits import RequestRate
from streamlab.server.shared_limits import SharedBuckets, SharedByWorkers, SharedTally
from streamlab.server.worker import Assignment, Worker
from streamlab.slots import Slots
from tests.support.chaos import TICKER, Follower
from tests.support.connections import EventStream, read_until
from tests.support.servers import Running, begin, ended_at_exit, run_streamlab, without, write_plugins
from tests.support.service_manager import service_manager

LOADED_PLUGINS = ("ticker",)

CONFIG = """
    [server]
    workers = 2
    [scenarios.ticker]
    source = "push"
"""

Start = Callable[..., Running]


def workers(server: Running) -> list[dict[str, Any]]:
    """Return what `/health` reports of the workers."""
    reported: list[dict[str, Any]] = json.loads(server.get("/health")[2])["workers"]
    return reported


def wait_for(reached: Callable[[], bool], what: str, *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def is_running(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def push(server: Running, price: int) -> str:
    body = json.dumps({"symbol": "A", "price": price}).encode()
    status, _, body = server.get(TICKER, {"Content-Type": "application/json"}, method="POST", body=body)
    assert status == 202, body
    (event_id,) = json.loads(body)["ids"]
    return str(event_id)


def test_workers_share_connections_and_events_and_end_with_their_supervisor(start: Start) -> None:
    server = start(f"{CONFIG}[limits]\nstreams_per_client = 40\n")
    assert server.process.stdout is not None
    announced = [next(server.process.stdout) for _ in range(4)]
    assert [line.partition(":")[0] for line in announced] == ["configuration", "data", "workers", "lab page"]
    assert announced[2] == "workers: 2\n"
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(EventStream(server, TICKER, "0-0")) for _ in range(40)]
        server.wait_for_open_streams(40)
        wait_for(lambda: [one["state"] for one in workers(server)] == ["serving", "serving"], "both serve")
        reported = workers(server)
        assert [one["number"] for one in reported] == [1, 2]
        assert sum(one["open_streams"] for one in reported) == 40
        assert min(one["open_streams"] for one in reported) >= 10  # 18, unless this machine is very busy
        server.wait_for_followers(40)
        for _ in range(4):  # whichever worker responds
            assert 'streamlab_open_streams{scenario="ticker"} 40.0' in server.get("/metrics")[2].decode().splitlines()
        assert [server.get(TICKER)[0] for _ in range(4)] == [429] * 4
        ids = [push(server, price) for price in range(10)]
        for stream in streams:
            assert [event.id for event in stream.take(10)] == ids
        server.process.kill()
        assert [event.event for stream in streams for event in stream] == ["stop"] * 40
    wait_for(lambda: not any(is_running(one["process"]) for one in reported), "the workers have ended")
    assert server.log.count("the process that supervises this one has died: stopping") == 2
    assert re.search(r" INFO streamlab\.access .* worker=[12]\n", server.log)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Worker]]:
    """Yield two workers in this process, of which the second has another process id."""
    with socket.socket() as lifeline:
        found = [Worker(Assignment(n, 2, [], tmp_path, Source(None)), lifeline.fileno()) for n in (1, 2)]
        found[1].process = 1
        for worker in found:
            worker.row.set("serving", worker.process)
        yield found


def test_a_client_is_counted_in_all_workers_that_live(pair: list[Worker]) -> None:
    first, second = (SharedTally(worker, "streams") for worker in pair)
    assert [tally.add("a", 3) for tally in (first, second, first, second, first)] == [True, True, True, False, False]
    assert second.add("b", 1)
    assert not first.add("b", 1)
    first.remove("a")
    assert second.add("a", 3)
    assert not first.add("a", 3)
    pair[1].row.set("none")  # with two of a, and one of b
    assert [first.add("a", 3) for _ in range(3)] == [True, True, False]
    assert first.add("b", 1)
    pair[1].row.set("serving", 1)
    again = SharedTally(pair[1], "streams")  # as its successor begins
    assert not again.add("a", 3)
    assert again.add("a", 4)


async def test_slots_their_queue_and_the_part_of_a_client_are_those_of_all_workers(pair: list[Worker]) -> None:
    one, two = (Slots(2, 2, what="exports", tally=SharedByWorkers(worker).tally("exports")) for worker in pair)
    release, started = asyncio.Event(), list[str]()

    async def use(slots: Slots, client: str) -> None:
        async with slots.held(client=client):
            started.append(client)
            await release.wait()

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        tasks = [group.create_task(use(*use_of)) for use_of in ((one, "10.0.0.1"), (two, "10.0.0.2"))]
        await asyncio.sleep(0)
        assert (started, one.in_use, two.in_use) == (["10.0.0.1", "10.0.0.2"], 2, 2)
        tasks.append(group.create_task(use(two, "10.0.0.1")))  # waits
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="this client has 2 of the 2 that one may have"):
            await use(one, "10.0.0.1")
        tasks.append(group.create_task(use(one, "10.0.0.3")))
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="2 of 2 in progress, 2 waiting"):
            await use(two, "10.0.0.4")
        release.set()
    assert sorted(started[2:]) == ["10.0.0.1", "10.0.0.3"]
    assert (one.in_use, two.in_use) == (0, 0)
    async with asyncio.timeout(20), one.held(2), asyncio.TaskGroup() as group:
        waits = group.create_task(use(one, "10.0.0.5"))
        await asyncio.sleep(0)
        pair[1].row.set("none")
        waits.cancel()
    async with one.held(2):
        pass


async def test_a_worker_takes_the_slots_that_one_had_which_has_died(pair: list[Worker]) -> None:
    one, two = (Slots(1, 1, tally=SharedByWorkers(worker).tally("exports")) for worker in pair)
    async with asyncio.timeout(20), two.held(client="10.0.0.1"), asyncio.TaskGroup() as group:

        async def use() -> None:
            async with one.held(client="10.0.0.2"):
                assert one.in_use == 1

        waits = group.create_task(use())
        await asyncio.sleep(0)
        assert not waits.done()
        pair[1].row.set("none")
        await waits


async def test_filters_of_a_channel_are_counted_in_all_workers(pair: list[Worker]) -> None:
    one, two = (Filters(2, SharedByWorkers(worker).tally("filters")) for worker in pair)
    views = [View(accepts=accepts) for accepts in (bool, callable, lambda _: True)]
    one.admit("c", views[0], "10.0.0.1")
    one.admit("c", views[0], "10.0.0.1")
    with pytest.raises(Problem, match="this client use 1 different filters"):
        two.admit("c", views[1], "10.0.0.1")
    two.admit("c", views[1], "10.0.0.2")
    two.admit("d", views[1], "10.0.0.1")
    with pytest.raises(Problem, match="use 2 different filters, the maximum"):
        one.admit("c", views[2], "10.0.0.3")
    one.leave("c", views[0], "10.0.0.1")
    with pytest.raises(Problem, match="use 2 different filters, the maximum"):
        two.admit("c", views[2], "10.0.0.3")
    one.leave("c", views[0], "10.0.0.1")
    two.admit("c", views[2], "10.0.0.3")


def test_more_clients_than_a_table_has_places_for_are_counted_all_the_same(
    pair: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamlab.server.shared_limits._SETS", 1)
    first, second = (SharedTally(worker, "streams") for worker in pair)
    clients = [f"client {number}" for number in range(20)]
    assert all(first.add(client, 1) for client in clients)
    assert not any(first.add(client, 1) for client in clients)
    assert [second.add(client, 1) for client in clients] == [False] * 8 + [True] * 12
    for client in clients:
        first.remove(client)
    assert second.add(clients[0], 1)


def test_requests_of_a_client_are_counted_in_all_workers(pair: list[Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    rates = [RequestRate(4, buckets=SharedBuckets(worker)) for worker in pair]

    def admitted(client: str) -> int:
        count = 0
        with contextlib.suppress(Problem):
            for rate in itertools.cycle(rates):
                rate.admit(client)
                count += 1
        return count

    assert [admitted("a"), admitted("b"), admitted("a")] == [4, 4, 0]
    now += 15
    assert [admitted("a"), admitted("b")] == [1, 1]


HANGS = """
    import os
    import signal
    import time
    from pathlib import Path

    from streamlab import Scenario, endpoint, hookimpl

    class Hangs(Scenario):
        @endpoint("GET", "/hangs", sends="text/plain")
        async def hang(self, request):
            print("a worker hangs", flush=True)
            time.sleep(1e6)

    @hookimpl
    def register_scenarios():
        return [Hangs]

    try:
        Path("reloads").mkdir()
        os.kill(os.getppid(), signal.SIGHUP)
    except FileExistsError:
        pass
"""


def test_workers_at_a_unix_socket_reload_also_while_they_start_and_stop_even_if_one_hangs(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hangs": HANGS})
    (tmp_path / "config.toml").write_text(CONFIG.replace("[server]", "[server]\n    drain_seconds = 0.2"))
    arguments = ["run", "--host", "unix:lab.sock", "--workers", "2"]
    with (
        (tmp_path / "log").open("w") as log,
        ended_at_exit(begin(arguments, environ=without("", ("ticker",)), cwd=tmp_path, stderr=log)) as process,
    ):
        assert process.stdout is not None
        assert any(line.endswith(f" serves unix:{tmp_path}/lab.sock\n") for line in process.stdout)
        reloaded = re.compile(r"reloaded config.toml(.*\n)+.* has stopped(.*\n)+.* has stopped")
        wait_for(lambda: bool(reloaded.search((tmp_path / "log").read_text())), "both are replaced")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "lab.sock"))

            def both_serve() -> bool:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return read_until(client, b'"ticker"').count(b'"state":"serving"') == 2

            wait_for(both_serve, "both serve")  # one that has just started may be late, and report that
            client.sendall(b"GET /hangs HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert any("a worker hangs" in line for line in process.stdout)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 1
    lines = (tmp_path / "log").read_text()
    assert lines.count("not stopped 1.2 s after the signal: killing the process") == 1
    assert len(re.findall(r"streamlab\.workers worker [123] \(process \d+\) has stopped", lines)) == 4
    assert not (tmp_path / "lab.sock").exists()


# -- faults


def test_a_fault_of_the_start_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f"{CONFIG}interval = 'often'\n")
    status, out, errors = run_streamlab("run", "--port", "0", cwd=tmp_path, **without("", ("ticker",)))
    assert (status, out) == (2, "")
    fault, end = [line for line in errors.splitlines() if " INFO " not in line]
    assert fault.startswith('config.toml: scenarios.ticker.interval = "often" - ')
    assert end == "streamlab: 1 fault; nothing was started"


def test_workers_need_an_event_log_that_they_share(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[events]\nurl = "sqlite://"\n')
    status, _, errors = run_streamlab("run", "--port", "0", "--workers", "3", cwd=tmp_path, **without("", ()))
    assert (status, errors) == (
        2,
        'config.toml: events.url = "sqlite://" - is the memory of one process, and there are 3 workers: set a file, as '
        "sqlite:///var/streamlab.db, or a server, as redis://localhost:6379/0; or workers = 1 in [server]\n"
        "streamlab: 1 fault; nothing was started\n",
    )


@pytest.mark.parametrize("value", [0, -1, 129, 1.5, True, "all", "", "-1"])
def test_a_number_of_workers_that_is_none_is_a_fault(value: object) -> None:
    (fault,) = Config.of({"server": {"workers": value}}).faults
    assert fault.key == "server.workers"
    assert fault.reason in (
        'must be a number from 1 to 128, or "auto": the number of usable processors',
        "must be a number",
    )


@pytest.mark.parametrize(("value", "processes"), [("auto", len(os.sched_getaffinity(0))), ("3", 3), (128, 128)])
def test_a_number_of_workers(value: object, processes: int) -> None:
    config = Config.of({"server": {"workers": value}})
    assert (config.faults, config.server.processes) == ((), processes)


def test_a_worker_that_hangs_is_killed_and_replaced_while_the_other_serves(start: Start) -> None:
    server = start(CONFIG.replace("workers = 2", "workers = 2\nhang_seconds = 5"))
    first, second = sorted(one["process"] for one in workers(server))
    os.kill(first, signal.SIGSTOP)
    server.wait_for_log(f"(process {first}) has not run for 5 s: killing it")
    server.wait_for_log("was killed by SIGKILL: restarting it in 0.1 s")
    states: list[dict[str, Any]] = []

    def is_complete() -> bool:
        states[:] = workers(server)
        return [one["state"] for one in states] == ["serving", "serving"]

    wait_for(is_complete, "another worker serves in its place")
    assert not is_running(first)
    assert second in {one["process"] for one in states}
    assert server.log.count("killing it") == 1


# -- a server under load


class Load:
    """Followers, a publisher that pushes numbered prices, and clients that connect all the time."""

    def __init__(self, server: Running) -> None:
        self.acknowledged: list[str] = []
        self.lost: list[str] = []
        """Requests that failed otherwise than by a status of success."""
        self.followers = [Follower(lambda: server.url) for _ in range(6)]
        self.counts: list[float] = []
        """What `/metrics` has reported of acknowledged requests."""
        self.open_streams = 0.0
        self._server = server
        self._pushed = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
            news = asyncio.Event()
            tasks = [group.create_task(follower.run(session, news)) for follower in self.followers]
            pushing = group.create_task(self._push(session))
            tasks += [pushing, *(group.create_task(self._connect()) for _ in range(4))]
            tasks.append(group.create_task(self._scrape(session)))
            try:
                yield
                pushing.cancel()  # nothing is acknowledged after the last, for which the followers are waited
                last = int((await self._push_one(session)).rpartition("-")[2])
                async with asyncio.timeout(20):
                    while min(follower.offset for follower in self.followers) < last:
                        news.clear()
                        await news.wait()
            finally:
                for task in tasks:
                    task.cancel()

    async def _push(self, session: aiohttp.ClientSession) -> None:
        while True:
            try:
                self.acknowledged.append(await self._push_one(session))
            except (aiohttp.ClientError, OSError) as error:
                self.lost.append(f"POST: {error!r}")
            await asyncio.sleep(0.005)

    async def _push_one(self, session: aiohttp.ClientSession) -> str:
        self._pushed += 1
        price = {"symbol": "A", "price": self._pushed}
        async with session.post(self._server.url + TICKER, json=price, raise_for_status=True) as response:
            (event_id,) = (await response.json())["ids"]
            return str(event_id)

    async def _scrape(self, session: aiohttp.ClientSession) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get(f"{self._server.url}/metrics", raise_for_status=True) as response:
                    text = await response.text()
                requests = r'^streamlab_request_seconds_count\{route="/stream/stock-ticker",status="202"\} (.*)$'
                self.counts += map(float, re.findall(requests, text, re.MULTILINE))
                self.open_streams = sum(
                    map(float, re.findall(r"^streamlab_open_streams\{.*\} (.*)$", text, re.MULTILINE))
                )
            await asyncio.sleep(0.05)

    async def _connect(self) -> None:
        """Connect, and send a request after a moment, as over a network."""
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
                with contextlib.closing(writer):
                    await asyncio.sleep(0.02)
                    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                    if not (response := await reader.read()).startswith(b"HTTP/1.1 200 "):
                        self.lost.append(f"GET: {response!r}")
                await writer.wait_closed()
            except OSError as error:
                self.lost.append(f"GET: {error!r}")


async def serving(server: Running, but: set[int]) -> set[int]:
    """Wait until two workers serve that are none of these processes; return their processes."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(OSError):
                reported = await asyncio.to_thread(workers, server)
                found = {one["process"] for one in reported if one["state"] == "serving"}
                if len(found) == len(reported) == 2 and not found & but:
                    return found
            await asyncio.sleep(0.02)


async def test_no_event_is_lost_when_a_worker_dies_when_all_are_replaced_and_when_all_stop(
    start: Start, tmp_path: Path
) -> None:
    with service_manager(f"@{tmp_path}") as manager:
        server = start(CONFIG, environ=manager.environ)
        await lose_and_replace_workers(server)
        reports = [manager.next(name) for name in ("READY", "RELOADING", "READY", "RELOADING", "READY", "STOPPING")]
        assert {process for process, _ in reports} == {server.process.pid}
        assert reports[-2][1]["STATUS"] == f"serves {server.url} with 2 workers"


async def lose_and_replace_workers(server: Running) -> None:
    config, load = server.base / "config.toml", Load(server)
    first, second = sorted(one["process"] for one in workers(server))
    async with load.running():
        os.kill(first, signal.SIGKILL)
        assert "was killed by SIGKILL: restarting it in 0.1 s" in await asyncio.to_thread(
            server.wait_for_log, "SIGKILL"
        )
        now = await serving(server, {first})
        assert second in now
        (again,) = now - {second}
        os.kill(again, signal.SIGKILL)
        await asyncio.to_thread(server.wait_for_log, "was killed by SIGKILL: restarting it in 0.2 s")
        now = await serving(server, {again})
        # What the dead one had accepted is lost; every other request has been served.
        assert not any("refused" in lost or " 5" in lost for lost in load.lost), load.lost

        load.lost.clear()
        tokens = "[auth]\nanonymous = ['ticker:read', 'ticker:write', 'site:read']\n"
        config.write_text("[server]\nworkers = 2\n[scenarios.ticker]\nsource = 'pull'\n")
        server.process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(server.wait_for_log, "is not reloaded: what was in force before still is")
        assert await serving(server, {first}) == now
        config.write_text(f"[server]\nworkers = 2\n{tokens}[scenarios.ticker]\nsource = 'push'\n")
        server.process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(server.wait_for_log, "replacing the workers by those with its configuration")
        last = await serving(server, now)
        assert load.lost == []
        async with asyncio.timeout(20):
            while load.open_streams != len(load.followers):  # and none of those that have died
                await asyncio.sleep(0.02)
    assert load.counts == sorted(load.counts)
    assert load.counts[-1] >= 50
    assert len(load.acknowledged) > 50
    for follower in load.followers:
        ids = [event_id for event_id, _ in follower.events]
        assert follower.odd == []
        assert ids == sorted(set(ids), key=lambda event_id: int(event_id.rpartition("-")[2]))
        seen = set(ids)
        assert [event_id for event_id in load.acknowledged if event_id not in seen] == []
    with EventStream(server, TICKER) as stream:
        server.process.send_signal(signal.SIGTERM)
        assert [event.event for event in stream][-1] == "stop"
        assert server.process.wait(20) == 0
    assert not any(map(is_running, last))
    with pytest.raises(ConnectionRefusedError):
        server.connect()
