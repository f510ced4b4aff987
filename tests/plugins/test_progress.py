"""Long tasks: one contract for both engines, and their behaviour when processes start and die."""

import asyncio
import contextlib
import hashlib
import http.client
import itertools
import json
import re
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from streamlab import Problem
from streamlab.events.channel import Events, open_log
from tests.support.connections import EventStream, Received
from tests.support.fork_server import ForkedProcess
from tests.support.servers import (
    Command,
    Running,
    begin,
    command,
    free_port,
    plugin_module,
    run_streamlab,
    without,
)
from tests.support.valkey import Valkey

LOADED_PLUGINS = ("comparison", "export", "file", "progress")

TOIL = '''
    """Tasks under the control of a test: they wait for files, and record each run."""

    import asyncio
    import sys
    import time
    from pathlib import Path

    from streamlab import Problem, Task, hookimpl


    async def count(progress, until: int, hold_at: int = -1, gate: str = ""):
        """Count from the checkpoint, and wait at a number for a file."""
        start = progress.checkpoint or 0
        with Path("runs").open("a") as file:
            file.write(f"{progress.attempt}:{start}\\n")
        for number in range(start, until):
            if number == hold_at:
                await progress(number, until, f"held at {number}")
                while not Path(gate).exists():
                    await asyncio.sleep(0.01)
            progress.checkpoint = number + 1
            await progress(number + 1, until)
        return {"counted": until}


    async def hold(progress, gate: str):
        """Wait for a file, without a checkpoint."""
        await progress(0, 1, "held")
        while not Path(gate).exists():
            await asyncio.sleep(0.01)
        return "through"


    async def fail(progress, how: str):
        """Fail in the given manner."""
        if how == "problem":
            raise Problem(507, "The disk is full.")
        if how == "exception":
            raise ValueError("cannot read /etc/passwd")
        if how == "exit":
            sys.exit(3)
        if how == "result":
            return object()
        if how == "large":
            return "x" * 2_000_000
        if how == "cancel":
            raise asyncio.CancelledError
        if how == "checkpoint":
            progress.checkpoint = object()


    async def stubborn(progress, gate: str):
        """Ignore the cancellation."""
        await progress(0, 1, "held")
        while not Path(gate).exists():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                Path("heard").touch()


    async def compute(progress, seconds: float):
        """Occupy a thread, and not the event loop."""
        def work():
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                pass
        await asyncio.to_thread(work)


    async def tick(progress):
        """Count forever, a number every twentieth of a second."""
        for number in range(progress.checkpoint or 0, 1_000_000):
            progress.checkpoint = number + 1
            await progress(number + 1)
            await asyncio.sleep(0.05)


    async def brief(progress, gate: str):
        """Wait for a file, but not for long."""
        await hold(progress, gate)


    @hookimpl
    def register_tasks():
        return [
            Task(brief, max_seconds=0.2),
            Task(tick, resumable=True),
            Task(count, unit="numbers", resumable=True),
            Task(hold),
            Task(fail),
            Task(stubborn),
            Task(compute),
        ]
'''

TASKS = "/process/tasks"


def send(
    server: Running, method: str, path: str, document: Any = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Send a request; return status, headers and JSON body of the response."""
    body = None if document is None else json.dumps(document).encode()
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    status, found, text = server.get(path, given, method=method, body=body)
    return status, found, json.loads(text) if text else None


def start_task(server: Running, kind: str, client: str = "127.0.0.1", **parameters: Any) -> dict[str, Any]:
    """Start a task, from an address of this machine."""
    status, headers, task = post_task(server, kind, client, **parameters)
    assert status == 202, task
    assert headers["location"] == task["url"]
    assert int(headers["retry-after"]) > 0
    return dict(task)


def post_task(server: Running, kind: str, client: str, **parameters: Any) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20, source_address=(client, 0))
    with contextlib.closing(connection):
        body = json.dumps({"kind": kind, "parameters": parameters})
        connection.request("POST", TASKS, body=body, headers={"Content-Type": "application/json"})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, json.loads(response.read())


def look(server: Running, task: dict[str, Any]) -> dict[str, Any]:
    status, _, found = send(server, "GET", task["url"])
    assert status == 200, found
    return dict(found)


def wait_for(server: Running, task: dict[str, Any], seconds: float = 30, **wanted: Any) -> dict[str, Any]:
    """Wait until a task has these values; return it."""
    deadline = time.monotonic() + seconds
    while any((found := look(server, task))[name] != value for name, value in wanted.items()):
        assert time.monotonic() < deadline, f"not {wanted} within {seconds} s: {found}"
        time.sleep(0.05)
    return found


def events(server: Running, path: str, after: str | None = None) -> list[Received]:
    with EventStream(server, path, after, timeout=40) as stream:
        assert stream.status == 200
        return list(stream)


def ended(server: Running, task: dict[str, Any]) -> dict[str, Any]:
    """Wait for the last event of a task; return its data."""
    last = events(server, task["url"])[-1]
    assert last.event == "end"
    return dict(last.json)


def offsets(received: list[Received]) -> list[int]:
    return [int(event.id.rpartition("-")[2]) for event in received]


@dataclass
class Workshop:
    """A server, and the workers that run its tasks, if any."""

    engine: str
    config: str
    start: Callable[..., Running]
    base: Path
    port: int = field(default_factory=free_port)
    workers: list[subprocess.Popen[str] | ForkedProcess] = field(default_factory=list)
    server: Running = field(init=False)

    @property
    def imports(self) -> tuple[str, ...]:
        """The modules that its processes import at their start."""
        return ("docket",) if self.engine == "docket" else ()

    def open(self, **plugins: str) -> None:
        self.server = self.start(
            self.config, port=self.port, tracebacks=True, imports=self.imports, toil=TOIL, **plugins
        )
        if self.engine == "docket":
            self.start_worker()

    def start_worker(self) -> None:
        """Start a worker, and wait until it runs tasks."""
        with (self.base / f"worker-{len(self.workers)}.log").open("w") as errors:
            arguments = ("worker", "--config", str(self.base / "config.toml"))
            environ = without(self.config, LOADED_PLUGINS)
            worker = begin(arguments, environ=environ, cwd=self.base, stderr=errors, imports=self.imports)
        self.workers.append(worker)
        assert worker.stdout is not None
        assert " runs tasks: " in worker.stdout.readline(), (
            self.base / f"worker-{len(self.workers) - 1}.log"
        ).read_text()

    def end(self, number: int) -> None:
        """End the process that runs the tasks, by a signal."""
        process = self.workers[-1] if self.engine == "docket" else self.server.process
        process.send_signal(number)
        assert process.wait(20) == (-number if number == signal.SIGKILL else 0)

    def restart(self) -> None:
        """Start the process that runs the tasks again."""
        if self.engine == "docket":
            self.start_worker()
        else:
            self.server = self.start(self.config, port=self.port, tracebacks=True, toil=TOIL)

    def runs(self) -> list[str]:
        """Return the runs of the task `count` so far: attempt and first number."""
        return (self.base / "runs").read_text().splitlines()

    def open_gate(self, gate: str) -> None:
        (self.base / gate).touch()

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in self.workers:
            with worker:
                try:
                    worker.wait(15)
                except subprocess.TimeoutExpired:
                    worker.kill()
                    raise


@pytest.fixture(params=["embedded", "docket"])
def start_workshop(
    request: pytest.FixtureRequest, start: Callable[..., Running], tmp_path: Path
) -> Iterator[Callable[..., Workshop]]:
    """Start a workshop: `start_workshop(max_running=1)` sets keys of [scenarios.progress]."""
    opened: list[Workshop] = []

    def opening(sample_rows: int = 1000, **keys: Any) -> Workshop:
        keys["engine"] = request.param
        lines = [f"{name} = {json.dumps(value)}" for name, value in keys.items()]
        config = "\n".join([f"[scenarios.export]\nsample_rows = {sample_rows}", "[scenarios.progress]", *lines])
        if request.param == "docket":
            pytest.importorskip("docket", reason="pydocket is not installed")
            valkey: Valkey = request.getfixturevalue("valkey")
            config += f'\n[events]\nurl = "{valkey.url}"\n'
        workshop = Workshop(request.param, config, start, tmp_path)
        opened.append(workshop)
        workshop.open()
        return workshop

    yield opening
    for workshop in opened:
        workshop.close()


# -- the contract


def test_a_task_is_started_followed_and_finished(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop()
    task = start_task(workshop.server, "rehearsal", steps=3, delay=0.15)
    assert (task["state"], task["done"], task["unit"], task["attempts"]) == ("queued", 0, "steps", 0)
    assert task["parameters"] == {"steps": 3, "delay": 0.15, "fail_at": None}

    received = events(workshop.server, task["url"])
    states = [(event.event, event.json.get("state"), event.json["done"]) for event in received]
    assert states == [
        ("progress", "queued", 0),
        ("progress", "running", 0),
        ("message", None, 0),
        ("progress", "running", 0),
        ("progress", "running", 1),
        ("progress", "running", 2),
        ("progress", "running", 3),
        ("end", "done", 3),
    ]
    assert received[2].json["message"] == "rehearsing"
    assert offsets(received) == list(range(1, 9))
    assert all(event.id.startswith(f"{task['id']}:") for event in received)

    end = received[-1].json
    assert (end["result"], end["error"], end["total"], end["attempts"]) == ({"steps": 3}, None, 3, 1)
    assert end["created"] <= end["started"] <= end["ended"]
    assert look(workshop.server, task) == end
    assert "retry-after" not in send(workshop.server, "GET", task["url"])[1]

    for position, event in enumerate(received[:-1]):
        assert events(workshop.server, task["url"], event.id) == received[position + 1 :]
    with EventStream(workshop.server, task["url"], received[-1].id) as stream:
        assert stream.status == 204
    if workshop.engine == "embedded":  # a worker has its own metrics, which are not exposed
        assert 'streamlab_tasks_total{kind="rehearsal",state="done"} 1.0' in workshop.server.get("/metrics")[2].decode()


def test_a_running_task_reports_its_progress(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop()
    task = start_task(workshop.server, "count", until=100, hold_at=40, gate="go")
    found = wait_for(workshop.server, task, done=40)
    assert (found["state"], found["total"], found["message"], found["unit"]) == (
        "running",
        100,
        "held at 40",
        "numbers",
    )
    assert 0 <= found["heartbeat_age"] < 6
    status, headers, _ = send(workshop.server, "GET", task["url"])
    assert (status, headers["retry-after"]) == (200, "1")
    workshop.open_gate("go")
    assert ended(workshop.server, task)["result"] == {"counted": 100}


def test_a_repeated_post_with_its_key_gets_the_same_task(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop()
    wanted = {"kind": "hold", "parameters": {"gate": "go"}}

    def post(_: int) -> tuple[int, dict[str, str], Any]:
        while True:
            response = send(workshop.server, "POST", TASKS, wanted, Idempotency_Key="a-key")
            if response[0] != 409:
                return response
            assert int(response[1]["retry-after"]) > 0

    with ThreadPoolExecutor(8) as threads:
        responses = list(threads.map(post, range(16)))
    assert {status for status, _, _ in responses} == {202}
    assert len({task["id"] for _, _, task in responses}) == 1
    assert len(send(workshop.server, "GET", TASKS)[2]["tasks"]) == 1

    status, _, problem = send(workshop.server, "POST", TASKS, {"kind": "rehearsal"}, Idempotency_Key="a-key")
    assert (status, problem["detail"]) == (422, "This Idempotency-Key was used for a different request.")
    status, _, other = send(workshop.server, "POST", TASKS, wanted, Idempotency_Key="another")
    assert other["id"] != responses[0][2]["id"]
    workshop.open_gate("go")
    for task in (other, responses[0][2]):
        assert ended(workshop.server, task)["state"] == "done"
    status, _, again = send(workshop.server, "POST", TASKS, wanted, Idempotency_Key="a-key")
    assert (status, again["id"], again["state"]) == (202, responses[0][2]["id"], "done")


REQUEST = {"kind": "hold", "parameters": {"gate": "go"}}


@contextlib.asynccontextmanager
async def claims(monkeypatch: pytest.MonkeyPatch, *, claim_seconds: float) -> AsyncIterator[Any]:
    """Yield a store in memory, and what a request with an Idempotency-Key does first: `claim(id)`."""
    store = plugin_module("progress", "store")
    monkeypatch.setattr(store, "CLAIM_SECONDS", claim_seconds)
    events = Events(open_log("sqlite://"))
    async with events.opened():
        yield store.Store(events, keep_seconds=60)


async def test_a_key_whose_request_died_becomes_free_however_often_it_is_requested_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with claims(monkeypatch, claim_seconds=0.5) as store:
        started = time.monotonic()
        assert await store.claim("key", REQUEST, "dead") is None
        # More often than claims expire.
        for number in itertools.count():
            with contextlib.suppress(Problem):
                assert await store.claim("key", REQUEST, f"alive-{number}") is None
                break
            assert time.monotonic() - started < 5
            await asyncio.sleep(0.02)
        assert time.monotonic() - started >= 0.5
        with pytest.raises(Problem, match="is in progress") as rejected:  # the request that got the key holds it now
            await store.claim("key", REQUEST, "late")
        assert rejected.value.status == 409


async def test_a_key_has_its_task_however_often_it_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    module = plugin_module("progress", "store")
    async with claims(monkeypatch, claim_seconds=60) as store:
        assert await store.claim("key", REQUEST, "first") is None
        await store.save(module.Record(id="first", kind="hold", parameters={}, created=1, heartbeat=1))
        monkeypatch.setattr(module, "CLAIM_SECONDS", 0)  # from now on only its task holds the key
        for number in range(150):
            assert await store.claim("key", REQUEST, f"again-{number}") == "first"


def test_a_failing_task_reports_why_and_affects_no_other(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_running=4)
    details = {
        "problem": "The disk is full.",
        "exception": "ValueError: cannot read ...",
        "exit": "SystemExit: 3",
        "result": "TypeError: Encoding objects of type object is unsupported",
        "large": "The result has 2000002 bytes; the maximum is 1048576.",
        "cancel": "The task cancelled itself.",
        "checkpoint": "TypeError: Encoding objects of type object is unsupported",
    }
    tasks = {how: start_task(workshop.server, "fail", how=how) for how in details}
    for how, detail in details.items():
        *_, error, end = events(workshop.server, tasks[how]["url"])
        assert (error.event, error.json["detail"]) == ("error", detail), how
        assert (end.event, end.json["state"], end.json["error"]) == ("end", "failed", error.json), how
    assert ended(workshop.server, start_task(workshop.server, "rehearsal", steps=1))["state"] == "done"


def test_a_task_is_cancelled_wherever_it_is(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_running=1)
    running = start_task(workshop.server, "hold", gate="never")
    wait_for(workshop.server, running, state="running")
    queued = start_task(workshop.server, "hold", gate="never")
    for task in (queued, running):
        sent = time.monotonic()
        status, headers, response = send(workshop.server, "DELETE", task["url"])
        assert (status, headers["location"]) == (202, task["url"])
        assert response["state"] in ("cancelled", "running", "queued")
        assert ended(workshop.server, task)["state"] == "cancelled"
        assert time.monotonic() - sent < 1, "a cancellation is acknowledged within a second"
        status, _, problem = send(workshop.server, "DELETE", task["url"])
        assert (status, problem["detail"]) == (409, "This task has already ended: cancelled.")
    assert ended(workshop.server, start_task(workshop.server, "rehearsal", steps=1))["state"] == "done"
    assert [event.event for event in events(workshop.server, queued["url"])] == ["progress", "end"]


def test_a_task_that_ignores_its_cancellation_is_reported_as_cancelled(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_running=1)
    task = start_task(workshop.server, "stubborn", gate="go")
    wait_for(workshop.server, task, message="held")
    sent = time.monotonic()
    assert send(workshop.server, "DELETE", task["url"])[0] == 202
    assert ended(workshop.server, task)["state"] == "cancelled"
    assert time.monotonic() - sent < 2
    assert (workshop.base / "heard").exists()
    waiting = start_task(workshop.server, "rehearsal", steps=1)
    assert look(workshop.server, waiting)["state"] == "queued", "its slot is free only when its function has returned"
    workshop.open_gate("go")
    assert ended(workshop.server, waiting)["state"] == "done"
    assert [event.event for event in events(workshop.server, task["url"])].count("end") == 1


def test_the_queue_is_bounded(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_running=1, max_queued=2)
    tasks = [start_task(workshop.server, "hold", gate="go")]
    wait_for(workshop.server, tasks[0], state="running")
    # The queue of docket includes delivered tasks.
    tasks += [start_task(workshop.server, "hold", gate="go") for _ in range(2 if workshop.engine == "embedded" else 1)]
    for method, path, document in (
        ("POST", TASKS, {"kind": "hold", "parameters": {"gate": "go"}}),
        ("GET", "/process/long-task?kind=rehearsal", None),
    ):
        status, headers, problem = send(workshop.server, method, path, document)
        assert (status, headers["retry-after"]) == (429, "5")
        assert problem["detail"] == "Too many tasks are waiting (limit 2)."
    workshop.open_gate("go")
    assert [ended(workshop.server, task)["result"] for task in tasks] == ["through"] * len(tasks)
    assert ended(workshop.server, start_task(workshop.server, "rehearsal", steps=1))["state"] == "done"


# -- deadlines and fairness


def test_a_task_that_exceeds_its_deadline_fails_and_frees_its_slot(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_running=1, max_seconds=0.7)
    for kind, seconds in (("hold", "0.7"), ("brief", "0.2")):  # the smaller limit applies
        sent = time.monotonic()
        end = ended(workshop.server, start_task(workshop.server, kind, gate="never"))
        assert (end["state"], end["error"]["detail"]) == (
            "failed",
            f"The task took longer than max_seconds = {seconds}.",
        )
        assert time.monotonic() - sent >= float(seconds)
    stubborn = start_task(workshop.server, "stubborn", gate="go")
    assert ended(workshop.server, stubborn)["error"]["detail"] == "The task took longer than max_seconds = 0.7."
    workshop.open_gate("go")
    assert ended(workshop.server, start_task(workshop.server, "rehearsal", steps=1, delay=0))["state"] == "done"
    kinds = {kind["kind"]: kind for kind in send(workshop.server, "GET", "/process/kinds")[2]["kinds"]}
    assert (kinds["hold"]["max_seconds"], kinds["brief"]["max_seconds"]) == (0.7, 0.2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_deadline_counts_the_time_of_all_runs(start_workshop: Callable[..., Workshop], number: int) -> None:
    workshop = start_workshop(max_seconds=6)
    task = start_task(workshop.server, "tick")
    deadline = time.monotonic() + 30
    while look(workshop.server, task)["done"] < 40:  # two seconds
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workshop.end(number)
    workshop.restart()
    end = ended(workshop.server, task)
    assert (end["state"], end["attempts"]) == ("failed", 2)
    assert 40 <= end["done"] < 150, "120 in six seconds, however many runs have shared them"


def test_a_client_that_fills_the_queue_does_not_delay_another(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_running=1)
    held = start_task(workshop.server, "hold", gate="go")
    wait_for(workshop.server, held, state="running")
    many = [start_task(workshop.server, "rehearsal", steps=1, delay=0.005) for _ in range(30)]
    two = [start_task(workshop.server, "rehearsal", "127.0.0.2", steps=1, delay=0.005) for _ in range(2)]
    one = start_task(workshop.server, "rehearsal", "127.0.0.3", steps=1, delay=0.005)
    workshop.open_gate("go")
    begun = [ended(workshop.server, task)["started"] for task in (held, *many, *two, one)]
    order = sorted(range(len(begun)), key=lambda number: begun[number])
    assert order[:6] == [0, 31, 33, 1, 32, 2], "clients take turns, and each has its own order"
    assert order[6:] == list(range(3, 31))


def test_clients_take_turns_after_a_crash_too(start: Callable[..., Running]) -> None:
    server = embedded(start, "max_running = 1")
    held = start_task(server, "count", until=2, hold_at=1, gate="go")
    many = [start_task(server, "rehearsal", steps=1, delay=0.005) for _ in range(20)]
    one = start_task(server, "rehearsal", "127.0.0.2", steps=1, delay=0.005)
    wait_for(server, held, done=1)
    server.terminate(signal.SIGKILL)
    (server.base / "go").touch()
    server = embedded(start, "max_running = 1")
    begun = [ended(server, task)["started"] for task in (*many, one)]
    assert sorted(begun).index(begun[-1]) == 0, "the other client had its turn before the crash"


def test_the_queue_is_bounded_for_each_client(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_running=1, max_queued_per_client=2)
    tasks = [start_task(workshop.server, "hold", gate="go")]
    wait_for(workshop.server, tasks[0], state="running")
    tasks += [start_task(workshop.server, "hold", gate="go") for _ in range(2)]
    status, headers, problem = post_task(workshop.server, "hold", "127.0.0.1", gate="go")
    assert (status, headers["retry-after"]) == (429, "5")
    assert problem["detail"] == "Too many tasks of this client are waiting (limit 2)."
    tasks.append(start_task(workshop.server, "hold", "127.0.0.2", gate="go"))
    workshop.open_gate("go")
    assert [ended(workshop.server, task)["result"] for task in tasks] == ["through"] * len(tasks)


@pytest.mark.parametrize(
    ("client", "is_given", "exceeds"),
    [("127.0.0.1", False, False), ("", False, False), ("127.0.0.1", True, True), ("203.0.113.7", False, True)],
)
def test_a_client_that_may_be_a_proxy_has_its_own_limit_of_tasks_only_where_given(
    client: str, is_given: bool, exceeds: bool
) -> None:
    limit = plugin_module("progress", "engine").ClientLimit(2, is_given)
    assert [limit.exceeds(client, tasks) for tasks in (1, 2)] == [False, exceeds]


def test_finished_tasks_are_retained_for_a_while(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(keep_seconds=1)
    held = start_task(workshop.server, "hold", gate="go")
    task = start_task(workshop.server, "rehearsal", steps=1, delay=0)
    end = events(workshop.server, task["url"])[-1]
    deadline = time.monotonic() + 15
    while (response := send(workshop.server, "GET", task["url"]))[0] == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    expired = (410, "This task has ended and expired: results are stored for 1 seconds.")
    assert (response[0], response[2]["detail"]) == expired
    assert [
        send(workshop.server, "DELETE", task["url"])[0],
        send(workshop.server, "GET", f"{TASKS}/{'f' * 32}")[0],
    ] == [
        410,
        404,
    ]
    with EventStream(workshop.server, task["url"]) as stream:
        assert stream.status == 410
    with EventStream(workshop.server, "/process/long-task", end.id) as stream:
        assert stream.status == 204, "a browser must not start another task instead"
    assert [listed["id"] for listed in send(workshop.server, "GET", TASKS)[2]["tasks"]] == [held["id"]]
    assert look(workshop.server, held)["state"] == "running", "an unfinished task is retained, however long it takes"
    workshop.open_gate("go")
    assert ended(workshop.server, held)["state"] == "done"


def test_the_list_has_the_newest_first_and_has_pages(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop()
    ids = [start_task(workshop.server, "rehearsal", steps=1, delay=0)["id"] for _ in range(5)]
    path: str | None = f"{TASKS}?limit=2"
    pages: list[list[str]] = []
    while path:
        page = send(workshop.server, "GET", path)[2]
        pages.append([task["id"] for task in page["tasks"]])
        path = page["next"]
    newest = sorted(ids, reverse=True)
    assert pages == [newest[:2], newest[2:4], newest[4:]]


def test_a_report_survives_kill_9_without_a_gap(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(sample_rows=20_000)
    task = start_task(workshop.server, "report", steps=400)
    before: list[Received] = []
    with EventStream(workshop.server, task["url"], timeout=40) as stream:
        for event in stream:
            before.append(event)
            if event.event == "progress" and event.json["done"] > 2000:
                break
    workshop.end(signal.SIGKILL)
    stood = look(workshop.server, task)["done"] if workshop.engine == "docket" else before[-1].json["done"]
    assert stood < 20_000
    workshop.restart()
    after = events(workshop.server, task["url"], before[-1].id)
    assert offsets(before + after) == list(range(1, len(before + after) + 1))
    end = after[-1].json
    assert (end["state"], end["attempts"], end["done"], end["total"]) == ("done", 2, 20_000, 20_000)
    assert any(event.json.get("message", "").startswith("The process that ran it has died") for event in after)
    resumed = [event.json["done"] for event in after if event.event == "progress"]
    assert min(resumed) >= before[-1].json["done"], "what was done is not done twice"

    with contextlib.closing(sqlite3.connect(workshop.base / "var/sample.db")) as database:
        for table, column in (("countries", "country"), ("months", "substr(created, 1, 7)")):
            totals = database.execute(f"SELECT {column}, count(*), sum(balance) FROM users GROUP BY 1 ORDER BY 1")
            expected = {key: (users, pytest.approx(balance, abs=0.5)) for key, users, balance in totals}
            found = {key: (total["users"], total["balance"]) for key, total in end["result"][table].items()}
            assert found == expected
    assert end["result"]["users"] == 20_000


def test_a_task_without_a_checkpoint_is_interrupted_and_reports_why(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_running=2)
    broken = start_task(workshop.server, "hold", gate="never")
    resumed = start_task(workshop.server, "count", until=10, hold_at=5, gate="go")
    wait_for(workshop.server, resumed, done=5)
    wait_for(workshop.server, broken, message="held")
    waiting = start_task(workshop.server, "count", until=3)
    workshop.end(signal.SIGKILL)
    workshop.open_gate("go")
    workshop.restart()
    *_, error, end = events(workshop.server, broken["url"])
    reason = "The process that ran it has died, and tasks of the kind hold are not resumable."
    assert (error.event, error.json["detail"]) == ("error", reason)
    assert (end.json["state"], end.json["attempts"]) == ("interrupted", 1)
    assert ended(workshop.server, resumed)["attempts"] == 2
    assert ended(workshop.server, waiting)["attempts"] == 1
    assert sorted(workshop.runs()) == ["1:0", "1:0", "2:5"]
    assert look(workshop.server, broken)["state"] == "interrupted"


def test_a_server_that_stops_hands_over_its_tasks(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_running=2, max_crashes=1)
    resumed = start_task(workshop.server, "count", until=10, hold_at=5, gate="go")
    broken = start_task(workshop.server, "hold", gate="never")
    wait_for(workshop.server, resumed, done=5)
    wait_for(workshop.server, broken, message="held")
    workshop.end(signal.SIGTERM)
    workshop.open_gate("go")
    workshop.restart()
    received = events(workshop.server, resumed["url"])
    assert offsets(received) == list(range(1, len(received) + 1))
    assert "The server stopped; the task resumes when a server starts." in [e.json.get("message") for e in received]
    end = received[-1].json
    assert (end["state"], end["attempts"], end["result"]) == ("done", 2, {"counted": 10})
    assert workshop.runs() == ["1:0", "2:5"]
    end = ended(workshop.server, broken)
    assert (end["state"], end["error"]["detail"]) == (
        "interrupted",
        "The server stopped, and tasks of the kind hold are not resumable.",
    )


def test_a_task_whose_process_dies_repeatedly_is_not_resumed_again(start_workshop: Callable[..., Workshop]) -> None:
    workshop = start_workshop(max_crashes=1)
    task = start_task(workshop.server, "count", until=10, hold_at=5, gate="never")
    wait_for(workshop.server, task, done=5)
    workshop.end(signal.SIGKILL)
    workshop.restart()
    end = ended(workshop.server, task)
    assert (end["state"], end["error"]["detail"]) == (
        "interrupted",
        "The process that ran it has died; max_crashes = 1 is reached.",
    )


# -- in the server itself


def embedded(start: Callable[..., Running], keys: str = "", **options: Any) -> Running:
    config = f"[scenarios.export]\nsample_rows = 1000\n[scenarios.progress]\n{keys}\n"
    return start(config, toil=TOIL, **options)


def test_a_long_task_is_one_request_and_one_task(start: Callable[..., Running]) -> None:
    server = embedded(start)
    with EventStream(server, "/process/long-task?kind=count&until=10&hold_at=5&gate=go") as stream:
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")
        location = stream.headers["location"]
        first = stream.take(3)
    assert location == f"{TASKS}/{first[0].json['id']}"
    assert send(server, "GET", location)[2]["state"] == "running", "disconnecting does not stop it"
    (server.base / "go").touch()
    rest = events(server, "/process/long-task?kind=count&until=10&hold_at=5&gate=go", first[-1].id)
    assert offsets(first + rest) == list(range(1, len(first + rest) + 1))
    assert (rest[-1].event, rest[-1].json["id"]) == ("end", first[0].json["id"])
    with EventStream(server, "/process/long-task?kind=count&until=10", rest[-1].id) as stream:
        assert stream.status == 204
    assert server.get("/process/long-task", method="HEAD")[0] == 200
    assert len(send(server, "GET", TASKS)[2]["tasks"]) == 1
    with EventStream(server, "/process/long-task?kind=rehearsal&steps=1", "7-7") as stream:
        gap, *_, end = list(stream)
    assert (gap.event, gap.json["reason"]) == ("gap", "the id is not one of this stream")
    assert (end.event, end.json["state"]) == ("end", "done")


def test_the_default_long_task_is_a_report(start: Callable[..., Running]) -> None:
    received = events(embedded(start), "/process/long-task?steps=4")
    assert received[0].json["kind"] == "report"
    assert (received[-1].event, received[-1].json["done"]) == ("end", 1000)
    assert received[-1].json["result"]["users"] == 1000


KINDS = ["brief", "checksum", "compute", "count", "export", "fail", "hold", "rehearsal", "report", "stubborn", "tick"]


WRONG: list[tuple[str, Any, dict[str, str]]] = [
    (TASKS, {"kind": "nap"}, {"kind": f"unknown: nap; known: {', '.join(KINDS)}"}),
    (
        TASKS,
        {"kind": "rehearsal", "parameters": {"steps": 0, "dealy": 1}},
        {
            "parameters.steps": "input should be greater than or equal to 1",
            "parameters.dealy": "unknown parameter of the task rehearsal; known: steps, delay, fail_at",
        },
    ),
    (TASKS, {"kind": "hold"}, {"parameters.gate": "field required"}),
    (TASKS, {"kinds": "hold"}, {"kind": "field required", "kinds": "extra inputs are not permitted"}),
    (
        TASKS,
        {"kind": "checksum", "parameters": {"path": "../etc/passwd"}},
        {"parameters.path": "must stay beneath the served folder"},
    ),
    ("/process/long-task?kind=checksum&path=/etc/passwd", None, {"path": "must stay beneath the served folder"}),
    (
        "/process/long-task?kind=rehearsal&steps=many",
        None,
        {"steps": "input should be a valid integer, unable to parse string as an integer"},
    ),
    ("/process/long-task?kind=nap", None, {"kind": f"unknown: nap; known: {', '.join(KINDS)}"}),
    (f"{TASKS}/abc", None, {"id": "string should match pattern '^[0-9a-f]{32}$'"}),
]


def test_an_invalid_request_lists_every_fault(start: Callable[..., Running]) -> None:
    server = embedded(start)
    for path, document, errors in WRONG:
        status, _, problem = send(server, "GET" if document is None else "POST", path, document)
        assert status == 422, path
        assert {error["name"]: error["detail"] for error in problem["errors"]} == errors, path
    assert send(server, "GET", TASKS)[2]["tasks"] == []


def test_odd_keys_and_bodies_are_accepted_or_rejected(start: Callable[..., Running]) -> None:
    server = embedded(start)
    half = b'{"kind": "checksum", "parameters": {"path": "\\ud800"}}'
    assert server.get(TASKS, {"Content-Type": "application/json"}, method="POST", body=half)[0] == 400
    assert send(server, "POST", TASKS, {"kind": "rehearsal"}, Idempotency_Key="")[0] == 400
    ids = [send(server, "POST", TASKS, {"kind": "rehearsal"}, Idempotency_Key="\xff\xfe")[2]["id"] for _ in range(2)]
    assert ids[0] == ids[1]
    assert send(server, "POST", TASKS, {"kind": "rehearsal"}, Idempotency_Key="x" * 256)[0] == 400
    large = {"kind": "checksum", "parameters": {"path": "x" * 70_000}}
    assert send(server, "POST", TASKS, large)[0] == 413
    assert "Traceback" not in server.log


def test_every_kind_is_listed_with_its_parameters(start: Callable[..., Running]) -> None:
    listed = send(embedded(start), "GET", "/process/kinds")[2]
    kinds = {kind["kind"]: kind for kind in listed["kinds"]}
    assert (listed["default"], list(kinds)) == ("report", KINDS)
    assert kinds["count"]["description"] == "Count from the checkpoint, and wait at a number for a file."
    assert (kinds["count"]["unit"], kinds["count"]["resumable"], kinds["hold"]["resumable"]) == ("numbers", True, False)
    assert kinds["count"]["parameters"]["required"] == ["until"]
    assert kinds["rehearsal"]["parameters"]["properties"]["steps"]["maximum"] == 1_000_000


def test_an_export_is_written_completely_and_can_be_downloaded(start: Callable[..., Running]) -> None:
    server = embedded(start)
    end = ended(server, start_task(server, "export", name="users", format="csv", columns=["id", "note"], limit=500))
    result = end["result"]
    status, _, body = server.get(result["url"])
    assert (status, body) == server.get("/export/users/csv?columns=id,note&limit=500")[::2]
    assert (result["rows"], result["bytes"]) == (500, len(body))
    assert result["sha256"] == hashlib.sha256(body).hexdigest()
    end = ended(server, start_task(server, "checksum", path=result["url"].removeprefix("/files/")))
    assert end["result"]["sha256"] == result["sha256"]
    assert (end["done"], end["total"], end["unit"]) == (len(body), len(body), "bytes")

    end = ended(server, start_task(server, "export", name="nothing"))
    assert (end["state"], end["error"]["status"]) == ("failed", 404)
    assert [path.name for path in (server.base / "var/files/exports").iterdir()] == [result["file"]]
    end = ended(server, start_task(server, "checksum", path="no/such"))
    assert (end["state"], end["error"]["detail"]) == ("failed", "There is no such file.")


def test_no_waiting_task_is_lost_at_a_crash(start: Callable[..., Running]) -> None:
    server = embedded(start, "max_running = 1")
    held = start_task(server, "count", until=2, hold_at=1, gate="go")
    tasks = [start_task(server, "rehearsal", steps=1, delay=0) for _ in range(250)]
    server.terminate(signal.SIGKILL)
    (server.base / "go").touch()
    server = embedded(start, "max_running = 1")
    assert ended(server, held)["state"] == "done"
    assert ended(server, tasks[-1])["attempts"] == 1
    listed = send(server, "GET", f"{TASKS}?limit=1000")[2]["tasks"]
    assert {task["id"]: task["state"] for task in listed} == {task["id"]: "done" for task in (held, *tasks)}
    ends = {task["id"]: task["ended"] for task in listed}
    assert [ends[task["id"]] for task in (held, *tasks)] == sorted(ends.values()), "first come, first served, still"


def test_servers_that_share_a_log_cancel_and_take_over_each_others_tasks(start: Callable[..., Running]) -> None:
    one, two = embedded(start, "max_running = 1"), embedded(start, "max_running = 1")
    running = start_task(one, "hold", gate="never")
    queued = start_task(one, "hold", gate="never")
    wait_for(two, running, state="running")
    for task in (running, queued):
        sent = time.monotonic()
        assert send(two, "DELETE", task["url"])[0] == 202
        assert ended(two, task)["state"] == "cancelled"
        assert time.monotonic() - sent < 1

    left = start_task(one, "count", until=10, hold_at=5, gate="go")
    waiting = start_task(one, "count", until=3)
    wait_for(two, left, done=5)
    received: list[Received] = []
    reading = threading.Thread(target=lambda: received.extend(events(two, left["url"])))
    reading.start()
    one.terminate(signal.SIGKILL)
    (two.base / "go").touch()
    reading.join(20)
    assert offsets(received) == list(range(1, len(received) + 1))
    assert (received[-1].json["state"], received[-1].json["attempts"]) == ("done", 2)
    assert ended(two, waiting)["attempts"] == 1
    assert (two.base / "runs").read_text().splitlines() == ["1:0", "2:5", "1:0"]


def test_a_computing_task_does_not_block_the_event_loop(start: Callable[..., Running]) -> None:
    server = embedded(start)
    task = start_task(server, "compute", seconds=1)
    responses = 0
    while look(server, task)["state"] in ("queued", "running"):
        responses += 1
    assert responses > 10, "the server did not respond meanwhile"


def test_a_kind_that_no_longer_exists_is_reported(start: Callable[..., Running]) -> None:
    server = embedded(start)
    task = start_task(server, "count", until=10, hold_at=5, gate="never")
    wait_for(server, task, done=5)
    server.terminate(signal.SIGTERM)
    server = start("[scenarios.toil]\nenabled = false\n")
    end = ended(server, task)
    assert (end["state"], end["error"]["detail"]) == ("interrupted", "This server does not know the task kind count.")


# -- the command line


def output_of(process: Command) -> tuple[int, str, str]:
    """Wait for the end of a command; return its exit status, stdout and stderr."""
    out, err = process.communicate(timeout=30)
    return process.wait(), out, err


def test_a_task_is_run_from_the_command_line(start: Callable[..., Running]) -> None:
    server = embedded(start)

    def run(*arguments: str) -> tuple[int, str, str]:
        return run_streamlab("task", "run", *arguments, "--url", server.url, cwd=server.base)

    assert run("rehearsal", "-p", "steps=2", "-p", "delay=0.01") == (0, '{\n "steps": 2\n}\n', "rehearsing\n")
    failure = "streamlab: the task is failed: Step 1 failed, as requested.\n"
    assert run("rehearsal", "-p", "fail_at=1") == (1, "", f"rehearsing\n{failure}")
    assert run("rehearsal", "-p", "steps") == (2, "", "streamlab: 'steps' is not NAME=VALUE\n")
    status, out, err = run("nap")
    assert (status, out) == (2, "")
    assert err.startswith(f"streamlab: {server.url}/process/tasks returned 422: Invalid parameters: kind.")
    status, out, err = run_streamlab("task", "watch", "f" * 32, "--url", server.url, cwd=server.base)
    assert (status, out) == (1, "")
    assert err.endswith("returned 404: There is no task with this id.\n")


def test_tasks_and_their_kinds_are_listed_at_the_command_line(start: Callable[..., Running]) -> None:
    server = embedded(start)

    def run(*arguments: str) -> tuple[int, list[str], str]:
        status, out, err = run_streamlab("task", *arguments, cwd=server.base, STREAMLAB_URL=server.url)
        return status, out.splitlines(), err

    assert run("list") == (0, ["id  kind  state  progress  created"], "")
    first, second = start_task(server, "rehearsal", steps=2, delay=0), start_task(server, "rehearsal", fail_at=1)
    assert [ended(server, task)["state"] for task in (first, second)] == ["done", "failed"]
    status, lines, err = run("list")
    assert (status, [line.split() for line in lines], err) == (
        0,
        [
            ["id", "kind", "state", "progress", "created"],
            [second["id"], "rehearsal", "failed", "0/10", "steps", second["created"]],
            [first["id"], "rehearsal", "done", "2/2", "steps", first["created"]],
        ],
        "",
    )
    assert run("list", "--limit", "1") == (0, lines[:2], "streamlab: there are more; these are the newest 1\n")
    status, lines, err = run("kinds")
    assert (status, err) == (0, "")
    known = {line.split("  ")[0]: re.split(r"  +", line)[1:] for line in lines}
    assert known["kind"] == ["parameters", "description"]
    assert known["checksum"] == ["path=STRING", "Compute the SHA-256 of a file of the served folder, of any size."]
    assert known["rehearsal"][0] == "[steps=10] [delay=0.2] [fail_at=INTEGER]"


def test_watching_continues_across_a_crash_of_the_server(start: Callable[..., Running]) -> None:
    port = free_port()
    server = embedded(start, port=port)
    task = start_task(server, "count", until=10, hold_at=5, gate="go")
    with command("task", "watch", task["id"], "--url", f"127.0.0.1:{port}", cwd=server.base) as watching:
        assert watching.stderr is not None
        assert watching.stderr.readline() == "held at 5\n"
        server.terminate(signal.SIGKILL)
        (server.base / "go").touch()
        embedded(start, port=port)
        status, out, err = output_of(watching)
    assert (status, json.loads(out)) == (0, {"counted": 10})
    assert "retrying in" in err


def test_a_task_is_cancelled_from_the_command_line(start: Callable[..., Running]) -> None:
    server = embedded(start)
    task = start_task(server, "hold", gate="never")
    wait_for(server, task, message="held")
    with command("task", "watch", task["id"], "--url", server.url, cwd=server.base) as watching:
        assert watching.stderr is not None
        assert watching.stderr.readline() == "held\n"
        assert run_streamlab("task", "cancel", task["id"], "--url", server.url, cwd=server.base)[0] == 0
        assert output_of(watching) == (1, "", "streamlab: the task is cancelled\n")


def test_a_worker_without_work_does_not_start(tmp_path: Path) -> None:
    fault = 'defaults: Tasks run in the server; workers need [scenarios.progress] engine = "docket".\n'
    status, out, err = run_streamlab("worker", cwd=tmp_path)
    assert (status, out, err) == (2, "", f"{fault}streamlab: 1 fault; nothing was started\n")
    (tmp_path / "config.toml").write_text('[scenarios.progress]\nengine = "docket"\n')
    status, _, err = run_streamlab("worker", cwd=tmp_path)
    assert (status, err.splitlines()[0]) == (
        2,
        'config.toml: engine = "docket" needs a Redis server: [events] url = "redis://..."',
    )
