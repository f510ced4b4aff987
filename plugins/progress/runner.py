"""Run one task: call its function, publish its progress, and record its end, whatever that is."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from streamlab import EncodedEvent, Problem, Progress, Task, encode_event

from .store import Record, State, Store, now

log = logging.getLogger(__name__)

PUBLISH_SECONDS = 0.05
"""Minimum interval between two events `progress`, in seconds."""

HEARTBEAT_SECONDS = 5.0
"""Interval of the heartbeats of a task without progress, in seconds."""

CANCEL_SECONDS = 0.8
"""Seconds a cancelled task may take to end, before its end is published without it."""

STOP_SECONDS = 2.0
"""Timeout for saving the state of interrupted tasks when the server stops, in seconds."""

RATE_SECONDS = 15
"""Period over which the rate is measured, in seconds."""

CRASHED = "The process that ran it has died"


class _Outcome(NamedTuple):
    """The outcome of a task's function."""

    state: State
    result: Any = None
    error: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class _Running:
    """A task that this process runs, or is about to run."""

    ending: _Outcome | None = None
    """How it is to end, once it has been stopped."""
    stopped: float = 0
    """When it was stopped, in the event loop's time."""
    call: "asyncio.Task[_Outcome] | None" = None
    """The call of its function."""
    end_published: bool = False
    """Whether its end was published before its function returned."""
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    _call_cancelled: bool = False

    def stop(self, ending: _Outcome) -> None:
        """End the task for good; only the first `ending` counts."""
        if self.ending is None:
            self.ending = ending
            self.stopped = asyncio.get_running_loop().time()
        self.cancel_call()

    def cancel_call(self) -> None:
        """Cancel the call, once: a second request must not cancel its cleanup."""
        if self.call is not None and not self._call_cancelled:
            self._call_cancelled = True
            self.call.cancel()

    @property
    def ignores_cancellation(self) -> bool:
        """Whether it was stopped some time ago, and still runs."""
        time = asyncio.get_running_loop().time()
        return self.ending is not None and time - self.stopped >= CANCEL_SECONDS / 2


class Runner:
    """Runs the tasks of this process. Every change of a task's owner happens under one lock.

    `on_end` is called with each task that has ended.
    """

    def __init__(
        self,
        store: Store,
        kinds: Mapping[str, Task],
        *,
        max_crashes: int,
        max_seconds: float,
        on_end: Callable[[Record], None],
    ) -> None:
        self._store = store
        self._kinds = kinds
        self._max_crashes = max_crashes
        self._max_seconds = max_seconds
        self._on_end = on_end
        self._running: dict[str, _Running] = {}
        self.ownership_lock = asyncio.Lock()
        self.stopping = False
        """Whether no more tasks are started."""
        self.cancel_requested: set[str] = set()
        """Tasks that other processes were requested to cancel: the process that takes one over ends it."""

    def has(self, id: str) -> bool:  # noqa: A002
        """Return whether this process runs a task, or is about to."""
        return id in self._running

    def cancel(self, id: str) -> bool:  # noqa: A002
        """Cancel a task if this process runs it; return whether it does."""
        if running := self._running.get(id):
            running.stop(_Outcome("cancelled"))
        return running is not None

    def max_seconds(self, kind: Task) -> float:
        """Return the maximum duration of tasks of a kind, in seconds: its own limit or the server's."""
        return min(self._max_seconds, kind.max_seconds or self._max_seconds)

    async def stop(self) -> None:
        """Interrupt all running tasks for good, and save their state, within STOP_SECONDS."""
        self.stopping = True
        for running in (interrupted := tuple(self._running.values())):
            running.cancel_call()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                for running in interrupted:
                    await running.finished.wait()

    async def run(self, id: str, owner: str) -> bool:  # noqa: A002
        """Run a task until it ends or `stop` interrupts it; return whether this owner was to run it.

        When this is cancelled, the task is left unchanged: another process may have taken it over.
        """
        running = self._running[id] = _Running()
        try:
            async with self.ownership_lock:
                record = None if self.stopping else await self._start(id, owner)
            if record is not None:
                await self._execute(record, running)
            return record is not None
        finally:
            del self._running[id]
            running.finished.set()

    async def _start(self, id: str, owner: str) -> Record | None:  # noqa: A002
        record = await self._store.find(id)
        if record is None or record.has_ended or record.owner != owner or not await self.prepare(record):
            return None
        record.state, record.attempts, record.started = "running", record.attempts + 1, record.started or now()
        await self._store.save(record, encode_event(record.progress_data(), "progress"), retry_forever=True)
        return record

    async def prepare(self, record: Record) -> bool:
        """End or requeue a task that a dead process may have left, under the lock; return whether it is to be run."""
        kind = self._kinds.get(record.kind)
        if record.id in self.cancel_requested:
            await self._end(record, "cancelled")
        elif kind is None:
            await self._end(record, "interrupted", f"This server does not know the task kind {record.kind}.")
        elif record.state == "running" and not kind.resumable:
            reason = f"{CRASHED}, and tasks of the kind {record.kind} are not resumable."
            await self._end(record, "interrupted", reason)
        elif record.state == "running" and record.crashes + 1 >= self._max_crashes:
            await self._end(record, "interrupted", f"{CRASHED}; max_crashes = {self._max_crashes} is reached.")
        elif record.state == "running":
            record.state, record.crashes = "queued", record.crashes + 1
            record.message = f"{CRASHED}; the task resumes from its last checkpoint."
        return not record.has_ended

    async def end_cancelled(self, record: Record) -> None:
        """End a task that no process runs as cancelled, under the lock."""
        await self._end(record, "cancelled")

    async def _execute(self, record: Record, running: _Running) -> None:
        kind = self._kinds[record.kind]
        checkpoint = b"" if bytes(record.checkpoint) == b"null" else bytes(record.checkpoint)
        progress = Progress(
            record.id, done=record.done, total=record.total, checkpoint=checkpoint, attempt=record.attempts
        )
        progress.message = record.message
        publisher, limit = _ProgressPublisher(self._store, record, progress), self.max_seconds(kind)
        async with asyncio.TaskGroup() as group:
            publishing = group.create_task(publisher.run())
            running.call = group.create_task(_outcome(kind, progress, record.parameters))
            if running.ending is not None or self.stopping:
                running.cancel_call()
            timeout = min(CANCEL_SECONDS / 2, publisher.remaining(limit))
            while not (await asyncio.wait({running.call}, timeout=timeout))[0]:
                if publisher.remaining(limit) == 0:
                    running.stop(_Outcome("failed", error=_deadline_error(limit)))
                timeout = CANCEL_SECONDS / 2 if running.ending else min(CANCEL_SECONDS / 2, publisher.remaining(limit))
                if running.ignores_cancellation and not running.end_published:
                    assert running.ending is not None
                    log.warning(
                        "a task of the kind %s ignores its cancellation (%s)", record.kind, running.ending.state
                    )
                    publishing.cancel()
                    running.end_published = True
                    record.error = running.ending.error
                    await self._end(record, running.ending.state, events=publisher.take_events())
            publishing.cancel()
        if running.end_published:
            return
        outcome = None if running.call.cancelled() else running.call.result()
        if running.ending is not None and (outcome is None or running.ending.state == "failed"):
            outcome = running.ending  # a result after the deadline does not count
        if outcome is not None:
            record.result, record.error = outcome.result, outcome.error
            await self._end(record, outcome.state, events=publisher.take_events())
        elif self.stopping:
            await self._requeue(kind, record, publisher)
        else:
            await self._end(record, "failed", "The task cancelled itself.", events=publisher.take_events())

    async def _requeue(self, kind: Task, record: Record, publisher: "_ProgressPublisher") -> None:
        """Save a task that is interrupted because the server stops."""
        events = publisher.take_events()
        if not kind.resumable:
            reason = f"The server stopped, and tasks of the kind {record.kind} are not resumable."
            await self._end(record, "interrupted", reason, events=events)
            return
        record.state, record.message = "queued", "The server stopped; the task resumes when a server starts."
        record.rate = record.eta_seconds = None
        await self._store.save(record, *events, encode_event(record.progress_data(), "progress"), retry_forever=True)

    async def _end(
        self, record: Record, state: State, reason: str = "", *, events: list[EncodedEvent] | None = None
    ) -> None:
        record.state = state
        if reason:
            record.error = Problem(500, reason).document()
        self._on_end(record)
        await self._store.end(record, *(events or ()))


def _deadline_error(limit: float) -> dict[str, Any]:
    return Problem(500, f"The task took longer than max_seconds = {limit:g}.").document()


async def _outcome(kind: Task, progress: Progress, parameters: Mapping[str, Any]) -> _Outcome:
    try:
        return _Outcome("done", await kind.run(progress, parameters))
    except Problem as problem:
        return _Outcome("failed", error=problem.document())


class _ProgressPublisher:
    """Publishes the progress of a task's function, at most once per PUBLISH_SECONDS."""

    def __init__(self, store: Store, record: Record, progress: Progress) -> None:
        self._store = store
        self._record = record
        self._progress = progress
        self._samples: deque[tuple[float, float]] = deque(maxlen=RATE_SECONDS)
        self._sample()
        self._started = asyncio.get_running_loop().time() - record.ran_seconds
        """When it would have started without interruptions, in the event loop's time."""

    def remaining(self, limit: float) -> float:
        """Return how many of `limit` seconds remain."""
        return max(0.0, self._started + limit - asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._progress.changed.wait()
            await self._store.save(self._record, *self.take_events(), retry_forever=True)
            await asyncio.sleep(PUBLISH_SECONDS)

    def take_events(self) -> list[EncodedEvent]:
        """Update the record; return the events since the last call, at most one of them `progress`."""
        progress, record = self._progress, self._record
        record.ran_seconds = round(asyncio.get_running_loop().time() - self._started, 3)
        messages, progress.messages = progress.messages, []
        events = [encode_event({"message": message, "done": progress.done}, "message") for message in messages]
        if progress.changed.is_set():
            progress.changed.clear()
            record.done, record.total, record.message = progress.done, progress.total, progress.message
            record.checkpoint = msgspec.Raw(progress.saved or b"null")
            self._estimate()
            events.append(encode_event(record.progress_data(), "progress"))
        progress.published.set()
        return events

    def _sample(self) -> tuple[float, float]:
        """Record the amount done, once a second; return the oldest sample."""
        time = asyncio.get_running_loop().time()
        if not self._samples or time - self._samples[-1][0] >= 1:
            self._samples.append((time, self._progress.done))
        return self._samples[0]

    def _estimate(self) -> None:
        since, before = self._sample()
        record, elapsed = self._record, asyncio.get_running_loop().time() - since
        done = record.done - before
        record.rate = round(done / elapsed, 3) if elapsed > 0 and done > 0 else None
        remaining = None if record.total is None else max(0, record.total - record.done)
        record.eta_seconds = round(remaining / record.rate, 1) if remaining is not None and record.rate else None
