"""Cases for every kind of long task: its parameters, its end, its cancellation, and a crash of its server."""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from typing import Any

from . import wire
from .promise import Broken, promise
from .samples import MISSING, InvalidValue, NoSample
from .server import DRAIN_SECONDS, Server, State
from .stopping import GRACE_SECONDS, SLACK_SECONDS
from .task_form import TASKS, TaskForm

CANCEL_SECONDS = 1.0
"""Maximum time from DELETE to the end of a task, in seconds."""

BEGIN_SECONDS = 20.0
"""Maximum time until a task runs, in seconds."""

END_SECONDS = 60.0
"""Maximum time until a task ends, in seconds."""

POLL_SECONDS = 0.05
"""Interval between two requests for the state of a task, in seconds."""

LEFT_SECONDS = 2.0
"""Time after which nothing of the work of a cancelled task may remain, in seconds."""

Document = Mapping[str, Any]
"""A task, as GET /process/tasks/ID returns it."""

_ENDED = {"done", "failed", "cancelled", "interrupted"}


@dataclass
class TaskSubject:
    """The subject of a case: one kind of task, on the server of its class."""

    form: TaskForm
    server: Server
    values: Mapping[str, Any]
    large: Mapping[str, Any]
    is_deterministic: bool
    report: Callable[[Mapping[str, Any]], None]
    """A function that records what a case found, for the summary."""
    interrupted: "Callable[[], Interrupted]"
    """A function that returns what became of tasks whose server was killed, and stopped; its first call does that."""

    def start(self, server: Server, *, long: bool = False) -> str:
        """Start the task on a server, and return its id; `long` with parameters that make it run long."""
        parameters = self.form.body({**self.values, **(self.large if long else {})})
        response = server.request(TASKS, method="POST", body={"kind": self.form.template, "parameters": parameters})
        if response.status != 202:
            raise Broken(f"{response.status} for the parameters {json.dumps(parameters)}: {response.text[:300]}")
        return str(response.json["id"])


@dataclass
class Interrupted:
    """What became of tasks whose server was killed with SIGKILL, started again, stopped with SIGTERM, and started."""

    expected: dict[str, Document] = field(default_factory=dict)
    """Of each kind whose results are compared, a task with the same parameters that was not disturbed."""
    killed: dict[str, Document] = field(default_factory=dict)
    """The same task before SIGKILL."""
    restarted: dict[str, Document] = field(default_factory=dict)
    """The same task on the server that was started after SIGKILL: running again, or ended."""
    ended: dict[str, Document] = field(default_factory=dict)
    """The same task at its end."""
    stop_status: int | None = None
    """The exit status after SIGTERM; None if the server had to be killed."""
    stop_seconds: float = 0.0
    stop_log: str = ""


def read_task(server: Server, id: str) -> Document:  # noqa: A002
    """Return a task as it is now."""
    response = server.request(f"{TASKS}/{id}")
    if response.status != 200:
        raise Broken(f"{response.status} for the task {id}: {response.text[:300]}")
    document: Document = response.json
    return document


def wait_for_task(server: Server, id: str, accept: Callable[[Document], bool], *, seconds: float) -> Document:  # noqa: A002
    """Poll a task until `accept` returns True, for at most `seconds`; return it as it was then."""
    deadline = time.monotonic() + seconds
    while not accept(document := read_task(server, id)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return document


def has_ended(document: Document) -> bool:
    """Return whether a task has ended."""
    return document["state"] in _ENDED


def _is_under_way(document: Document) -> bool:
    """Return whether a task has reported some progress, or has ended."""
    return has_ended(document) or document["done"] > 0


def interrupted(
    serving: Callable[[], AbstractContextManager[Server]], undisturbed: Server, subjects: Mapping[str, TaskSubject]
) -> Interrupted:
    """Run a long task of each subject on a server that is killed and stopped; `serving` starts it, each time."""
    found = Interrupted()
    with serving() as server:
        references = {
            label: subject.start(undisturbed, long=True)
            for label, subject in subjects.items()
            if subject.form.is_resumable and subject.is_deterministic
        }
        ids = {label: subject.start(server, long=True) for label, subject in subjects.items()}
        for label, id in ids.items():  # noqa: A001
            found.killed[label] = wait_for_task(server, id, _is_under_way, seconds=BEGIN_SECONDS)
        server.stop(signal.SIGKILL)
    with serving() as server:
        for label, id in ids.items():  # noqa: A001
            found.restarted[label] = wait_for_task(
                server, id, lambda task: has_ended(task) or task["attempts"] > 1, seconds=BEGIN_SECONDS
            )
        began = time.monotonic()
        found.stop_status = server.stop(seconds=DRAIN_SECONDS + GRACE_SECONDS + 5)
        found.stop_seconds, found.stop_log = time.monotonic() - began, server.log
    with serving() as server:
        for label, id in ids.items():  # noqa: A001
            found.ended[label] = wait_for_task(server, id, has_ended, seconds=END_SECONDS)
    for label, id in references.items():  # noqa: A001
        found.expected[label] = wait_for_task(undisturbed, id, has_ended, seconds=END_SECONDS)
    return found


class TaskCases:
    """Cases for every kind of task."""

    @promise("JSON Schema, 6.2, 6.3 and 6.4")
    async def test_parameters_have_bounds(self, subject: TaskSubject) -> str:
        """Every number has a minimum and a maximum, every text and list a maximum length."""
        if lacking := list(subject.form.unbounded()):
            raise Broken("; ".join(lacking))
        return f"{len(subject.form.body_schema.get('properties', {}))} parameters, all of them bounded"

    @promise("RFC 9457, 3; RFC 9110, 15.5.21")
    async def test_invalid_parameters_are_rejected_by_name(self, subject: TaskSubject) -> str:
        """Parameters that are unknown, missing or excluded by their declaration get 422, which names them."""
        form, tried = subject.form, 0
        valid = form.body(subject.values)
        unknown = InvalidValue("no_such_parameter", "body", 1, "is unknown")
        for bad in (unknown, *form.invalid_values()):
            given = {name: value for name, value in {**valid, bad.name: bad.value}.items() if value is not MISSING}
            body = {"kind": form.template, "parameters": given}
            response = await asyncio.to_thread(subject.server.request, TASKS, method="POST", body=body)
            what = f"{bad.name}={str(bad.value)[:40]!r}, which {bad.why}"
            if response.status != 422:
                raise Broken(f"{response.status} for {what}: {response.text[:300]}")
            names = [str(error.get("name")) for error in response.json.get("errors", ())]
            if not any(name.split(".")[:2] == ["parameters", bad.name] for name in names):
                raise Broken(f"422 for {what}, whose errors name {', '.join(names) or 'nothing'}")
            tried += 1
        return f"{tried} values, each rejected with its parameter's name"

    @promise("streamlab: events `progress`, then `end`; the last progress is always published")
    async def test_runs_to_its_end_and_reports_progress(self, subject: TaskSubject) -> str:
        """It ends as `done`; its progress never decreases, and reaches the total if it has one."""
        id = await asyncio.to_thread(subject.start, subject.server)  # noqa: A001
        head = {"Accept": "text/event-stream"}
        message = wire.request("GET", f"{TASKS}/{id}", host=f"127.0.0.1:{subject.server.port}", headers=head)
        async with wire.send(subject.server.port, message) as response:
            await response.read(seconds=END_SECONDS)
            events = wire.events(bytes(response.body))
        if response.ending is None or not events or events[-1].event != "end":
            raise Broken(f"no end within {END_SECONDS:g} s: with `values`, let it end sooner")
        end = json.loads(events[-1].get("data") or "null")
        if end["state"] != "done":
            raise Broken(f"{end['state']}: {end['error']}")
        amounts = [json.loads(event.get("data") or "null")["done"] for event in events if event.event == "progress"]
        if not end["done"] or not amounts:
            raise Broken("it reports no progress: await progress(done, total)")
        if amounts != sorted(amounts):
            raise Broken(f"its progress decreases: {', '.join(map(str, amounts[:50]))}")
        if end["total"] is not None and end["done"] != end["total"]:
            raise Broken(f"its last progress is {end['done']:g} of {end['total']:g}")
        return f"done, {end['done']:g} {end['unit']}".rstrip()

    @promise("streamlab: a cancelled task ends within a second")
    async def test_cancelled_task_ends(self, subject: TaskSubject) -> str:
        """DELETE ends a running task as `cancelled` within a second, and no task, file or child of it remains."""
        server = subject.server
        before = await asyncio.to_thread(server.state)
        id = await asyncio.to_thread(subject.start, server, long=True)  # noqa: A001
        begun = await _waited(server, id, _is_under_way, BEGIN_SECONDS)
        _require_running(begun)
        ignored = server.log.count("ignores its cancellation")
        requested_at = time.monotonic()
        response = await asyncio.to_thread(server.request, f"{TASKS}/{id}", method="DELETE")
        if response.status == 409:
            raise NoSample("it ended before it could be cancelled: with `large`, let it run for several seconds")
        document = await _waited(server, id, has_ended, CANCEL_SECONDS + 2)
        seconds = time.monotonic() - requested_at
        if document["state"] != "cancelled":
            raise Broken(f"{document['state']} {seconds:.1f} s after DELETE: {document['error'] or ''}")
        if server.log.count("ignores its cancellation") > ignored:
            raise Broken("it goes on after its end was published: let CancelledError through")
        if seconds > CANCEL_SECONDS + SLACK_SECONDS:
            raise Broken(f"ended {seconds:.1f} s after DELETE")
        after: list[State] = []

        def is_clean(state: State) -> bool:
            after.append(state)
            return not _left(before, [state])

        await asyncio.to_thread(server.wait_for_state, is_clean, seconds=LEFT_SECONDS)
        if left := _left(before, after):
            raise Broken(f"{LEFT_SECONDS:g} s after its end there are more than before: {left}")
        return f"cancelled {seconds:.2f} s after DELETE, and nothing of its work is left"

    @promise("streamlab: a resumable task resumes after a crash, others are never run again")
    async def test_crash_of_the_server_is_survived(self, subject: TaskSubject) -> str:
        """After SIGKILL and SIGTERM, a resumable task ends with the result of one run; others are `interrupted`."""
        found, label = await asyncio.to_thread(subject.interrupted), subject.form.label
        killed, restarted, ended = found.killed[label], found.restarted[label], found.ended[label]
        _require_running(killed)
        if not subject.form.is_resumable:
            if (ended["state"], ended["attempts"]) != ("interrupted", 1):
                raise Broken(f"{ended['state']} after {ended['attempts']} runs: it is not resumable")
            return f"interrupted at {killed['done']:g}, and never run again"
        if restarted["attempts"] < 2 or not has_ended(ended):
            raise Broken(f"{ended['state']} after {ended['attempts']} runs, {END_SECONDS:g} s after the restart")
        if ended["state"] != "done":
            raise Broken(f"{ended['state']} after {ended['attempts']} runs: {ended['error']}")
        if expected := found.expected.get(label):
            if ended["result"] != expected["result"]:
                result, other = json.dumps(ended["result"])[:200], json.dumps(expected["result"])[:200]
                raise Broken(f"the result {result} after {ended['attempts']} runs, and {other} of an undisturbed run")
            return f"killed at {killed['done']:g}, done after {ended['attempts']} runs with the result of one"
        return f"killed at {killed['done']:g}, done after {ended['attempts']} runs"

    @promise("streamlab: the process exits within drain_seconds + 1 s, with status 0", once=True)
    async def test_server_stops_while_tasks_run(self, subject: TaskSubject) -> str:
        """With tasks running, the server exits within drain_seconds + 1 s after SIGTERM, with status 0."""
        found = await asyncio.to_thread(subject.interrupted)
        limit = DRAIN_SECONDS + GRACE_SECONDS + SLACK_SECONDS
        if found.stop_status != 0 or found.stop_seconds > limit:
            how = "had to be killed" if found.stop_status is None else f"exited with status {found.stop_status}"
            raise Broken(f"it {how} {found.stop_seconds:.1f} s after SIGTERM: {found.stop_log[-500:]}")
        if "Traceback" in found.stop_log:
            raise Broken(f"a traceback in its log: {found.stop_log[found.stop_log.index('Traceback') :][:1000]}")
        return f"ended after {found.stop_seconds:.2f} s, status 0"


def _require_running(document: Document) -> None:
    """Raise NoSample for a task that ended too early, Broken for one that reports nothing."""
    if has_ended(document):
        raise NoSample(f"it is {document['state']} at once: with `large`, let it run for several seconds")
    if not document["done"]:
        raise Broken(f"no progress within {BEGIN_SECONDS:g} s; its state is {document['state']}")


def _waited(
    server: Server,
    id: str,  # noqa: A002
    accept: Callable[[Document], bool],
    seconds: float,
) -> Awaitable[Document]:
    return asyncio.to_thread(wait_for_task, server, id, accept, seconds=seconds)


def _left(before: State, after: Sequence[State]) -> str:
    """Return what there is more of than before in each of some states; empty if nothing is.

    The server opens and closes files and connections of its own, also in the moment of a state.
    """
    found = []
    for what in ("tasks", "files", "children"):
        earlier, later = Counter(getattr(before, what)), [Counter(getattr(state, what)) for state in after]
        more = reduce(and_, (each - earlier for each in later))
        if more.total() > (earlier - later[-1]).total():
            found.append(f"{what} ({', '.join(sorted(more))[:200]})")
    return ", ".join(found)
