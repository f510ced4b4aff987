"""One task being run: its function called, its progress told, its end written down, whatever that is."""

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

TELL_SECONDS = 0.05
"""How far apart two events `progress` are at least."""

HEARTBEAT_SECONDS = 5.0
"""How often a task that has nothing to tell gives a sign of life."""

CANCEL_SECONDS = 0.8
"""How long a task that is cancelled may take to end, before its clients are told without it."""

LAST_WORDS_SECONDS = 2.0
"""What tasks that are broken off may take to write down where they stand."""

RATE_SECONDS = 15
"""Over how long a time the rate is taken."""

GONE = "The process that ran it is gone"


class _Outcome(NamedTuple):
    """What came of a task's function."""

    state: State
    result: Any = None
    error: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class _Running:
    """A task of this process that is run, or about to be."""

    ending: _Outcome | None = None
    """What it ends as, once it has been stopped."""
    stopped: float = 0
    """When it was stopped, in the loop's time."""
    work: "asyncio.Task[_Outcome] | None" = None
    told_over: bool = False
    """Whether its end has been written down before its function has returned."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False

    def stop(self, ending: _Outcome) -> None:
        """End the task for good; the first `ending` counts, and again, this has no effect."""
        if self.ending is None:
            self.ending = ending
            self.stopped = asyncio.get_running_loop().time()
        self.end_work()

    def end_work(self) -> None:
        """Cancel the function's work, once: what it does to end must not be cancelled by another request."""
        if self.work is not None and not self._ended:
            self._ended = True
            self.work.cancel()

    @property
    def stubborn(self) -> bool:
        """Whether it was stopped some time ago, and runs on."""
        time = asyncio.get_running_loop().time()
        return self.ending is not None and time - self.stopped >= CANCEL_SECONDS / 2


class Runner:
    """Runs tasks of this process. Whatever changes the hands a task is in happens under one lock.

    `on_end` hears of each task that is over.
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
        self.hands = asyncio.Lock()
        self.stopping = False
        """Whether nothing is begun any more."""
        self.unwanted: set[str] = set()
        """Tasks that other processes have been asked to cancel: whoever takes one up ends it."""

    def has(self, id: str) -> bool:  # noqa: A002
        """Whether this process runs a task, or is about to."""
        return id in self._running

    def cancel(self, id: str) -> bool:  # noqa: A002
        """Cancel a task if it runs here; whether it does."""
        if running := self._running.get(id):
            running.stop(_Outcome("cancelled"))
        return running is not None

    def max_seconds(self, task: Task) -> float:
        """Return how long a task may run, in seconds: the smaller limit of its kind and the server."""
        return min(self._max_seconds, task.max_seconds or self._max_seconds)

    async def stop(self) -> None:
        """Break off what runs, once and for all, and write down where it stands, within LAST_WORDS_SECONDS."""
        self.stopping = True
        for running in (runs := tuple(self._running.values())):
            running.end_work()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                for running in runs:
                    await running.over.wait()

    async def run(self, id: str, owner: str) -> bool:  # noqa: A002
        """Run a task until it is over or `stop` breaks it off; return whether it was for this owner to run.

        When this is cancelled, the task is left as it is: another process may have it by now.
        """
        running = self._running[id] = _Running()
        try:
            async with self.hands:
                record = None if self.stopping else await self._begin(id, owner)
            if record is not None:
                await self._work(record, running)
            return record is not None
        finally:
            del self._running[id]
            running.over.set()

    async def _begin(self, id: str, owner: str) -> Record | None:  # noqa: A002
        record = await self._store.find(id)
        if record is None or record.over or record.owner != owner or not await self.pick_up(record):
            return None
        record.state, record.attempts, record.started = "running", record.attempts + 1, record.started or now()
        await self._store.keep(record, encode_event(record.news(), "progress"), retry_forever=True)
        return record

    async def pick_up(self, record: Record) -> bool:
        """Decide about a task that another process may have left, under the lock; whether it is to be run."""
        task = self._kinds.get(record.kind)
        if record.id in self.unwanted:
            await self._end(record, "cancelled")
        elif task is None:
            await self._end(record, "interrupted", f"This server has no task of the kind {record.kind}.")
        elif record.state == "running" and not task.resumable:
            reason = f"{GONE}, and a task of the kind {record.kind} cannot go on where it stopped."
            await self._end(record, "interrupted", reason)
        elif record.state == "running" and record.crashes + 1 >= self._max_crashes:
            await self._end(record, "interrupted", f"{GONE}, as often as that may be ({self._max_crashes}).")
        elif record.state == "running":
            record.state, record.crashes = "queued", record.crashes + 1
            record.message = f"{GONE}; it goes on from where it was last known to be."
        return not record.over

    async def withdraw(self, record: Record) -> None:
        """End a task that nobody runs as cancelled, under the lock."""
        await self._end(record, "cancelled")

    async def _work(self, record: Record, running: _Running) -> None:
        task = self._kinds[record.kind]
        checkpoint = b"" if bytes(record.checkpoint) == b"null" else bytes(record.checkpoint)
        progress = Progress(
            record.id, done=record.done, total=record.total, checkpoint=checkpoint, attempt=record.attempts
        )
        progress.message = record.message
        teller, limit = _Teller(self._store, record, progress), self.max_seconds(task)
        async with asyncio.TaskGroup() as group:
            telling = group.create_task(teller.run())
            running.work = group.create_task(_outcome(task, progress, record.parameters))
            if running.ending is not None or self.stopping:
                running.end_work()
            patience = min(CANCEL_SECONDS / 2, teller.left(limit))
            while not (await asyncio.wait({running.work}, timeout=patience))[0]:
                if teller.left(limit) == 0:
                    running.stop(_Outcome("failed", error=_late(limit)))
                patience = CANCEL_SECONDS / 2 if running.ending else min(CANCEL_SECONDS / 2, teller.left(limit))
                if running.stubborn and not running.told_over:
                    assert running.ending is not None
                    log.warning("a task %s ignores that it is %s", record.kind, running.ending.state)
                    telling.cancel()
                    running.told_over = True
                    record.error = running.ending.error
                    await self._end(record, running.ending.state, drafts=teller.news())
            telling.cancel()
        if running.told_over:
            return
        outcome = None if running.work.cancelled() else running.work.result()
        if running.ending is not None and (outcome is None or running.ending.state == "failed"):
            outcome = running.ending  # what a function returns after its deadline comes too late
        if outcome is not None:
            record.result, record.error = outcome.result, outcome.error
            await self._end(record, outcome.state, drafts=teller.news())
        elif self.stopping:
            await self._put_back(task, record, teller)
        else:
            await self._end(record, "failed", "The task cancelled itself.", drafts=teller.news())

    async def _put_back(self, task: Task, record: Record, teller: "_Teller") -> None:
        """Write down where a task stands that is broken off because its server stops."""
        drafts = teller.news()
        if not task.resumable:
            reason = f"The server stopped, and a task of the kind {record.kind} cannot go on where it stopped."
            await self._end(record, "interrupted", reason, drafts=drafts)
            return
        record.state, record.message = "queued", "The server stopped; it goes on when one starts."
        record.rate = record.eta_seconds = None
        await self._store.keep(record, *drafts, encode_event(record.news(), "progress"), retry_forever=True)

    async def _end(
        self, record: Record, state: State, reason: str = "", *, drafts: list[EncodedEvent] | None = None
    ) -> None:
        record.state = state
        if reason:
            record.error = Problem(500, reason).document()
        self._on_end(record)
        await self._store.end(record, *(drafts or ()))


def _late(limit: float) -> dict[str, Any]:
    return Problem(500, f"The task took longer than max_seconds = {limit:g}.").document()


async def _outcome(task: Task, progress: Progress, parameters: Mapping[str, Any]) -> _Outcome:
    try:
        return _Outcome("done", await task.run(progress, parameters))
    except Problem as problem:
        return _Outcome("failed", error=problem.document())


class _Teller:
    """Brings what a task's function tells to its clients, some times a second."""

    def __init__(self, store: Store, record: Record, progress: Progress) -> None:
        self._store = store
        self._record = record
        self._progress = progress
        self._samples: deque[tuple[float, float]] = deque(maxlen=RATE_SECONDS)
        self._sample()
        self._begun = asyncio.get_running_loop().time() - record.ran_seconds
        """When it would have begun if it had never been broken off, in the loop's time."""

    def left(self, limit: float) -> float:
        """Return for how many of `limit` seconds the task may still run."""
        return max(0.0, self._begun + limit - asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Tell, until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._progress.changed.wait()
            await self._store.keep(self._record, *self.news(), retry_forever=True)
            await asyncio.sleep(TELL_SECONDS)

    def news(self) -> list[EncodedEvent]:
        """Bring the record up to date; return the events that tell what is new, at most one of them `progress`."""
        progress, record = self._progress, self._record
        record.ran_seconds = round(asyncio.get_running_loop().time() - self._begun, 3)
        messages, progress.messages = progress.messages, []
        drafts = [encode_event({"message": message, "done": progress.done}, "message") for message in messages]
        if progress.changed.is_set():
            progress.changed.clear()
            record.done, record.total, record.message = progress.done, progress.total, progress.message
            record.checkpoint = msgspec.Raw(progress.saved or b"null")
            self._estimate()
            drafts.append(encode_event(record.news(), "progress"))
        progress.told.set()
        return drafts

    def _sample(self) -> tuple[float, float]:
        """Remember how much was done at this time, once a second; return the sample to compare with."""
        time = asyncio.get_running_loop().time()
        if not self._samples or time - self._samples[-1][0] >= 1:
            self._samples.append((time, self._progress.done))
        return self._samples[0]

    def _estimate(self) -> None:
        since, before = self._sample()
        record, elapsed = self._record, asyncio.get_running_loop().time() - since
        done = record.done - before
        record.rate = round(done / elapsed, 3) if elapsed > 0 and done > 0 else None
        left = None if record.total is None else max(0, record.total - record.done)
        record.eta_seconds = round(left / record.rate, 1) if left is not None and record.rate else None
