"""Tasks that run in the process that accepts them, and the takeover of tasks whose process has died."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from streamlab import EventLogError, Events, Problem, encode_event

from .engine import Engine, QueueLimits
from .fair_queue import FairQueue
from .runner import Runner
from .store import Record, Store

log = logging.getLogger(__name__)

TAKE_OVER_BATCH = 100
"""Maximum tasks of a dead process that are taken over in one commit."""

RETRY_SECONDS = 1.0
"""Pause before a failed operation of the event log is retried, in seconds."""


class EmbeddedEngine(Engine):
    """Runs up to `max_running` tasks at once; clients take turns, and a limited number of tasks waits.

    Tasks of a dead process go to the first process that notices, beyond its limit: they were accepted already.
    """

    def __init__(self, events: Events, store: Store, runner: Runner, *, max_running: int, queue: QueueLimits) -> None:
        super().__init__(events, store, runner)
        self._max_running = max_running
        self._limits = queue
        self._queue = FairQueue()
        self._tickets: asyncio.Queue[None] = asyncio.Queue()
        """One for each task in the queue."""
        self._watched: set[str] = set()
        """Processes whose leases are waited for."""

    def lease(self, record: Record) -> str:
        """Return the lease of the task's process, which holds one for all its tasks."""
        return self.ownership.lease(record.owner)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Accept and run tasks while the block lasts; the next process continues the unfinished ones."""
        async with self.working(self.ownership.hold(self._serve), self._watch_dead_owners()):
            yield

    def serving(self, max_running: int) -> AbstractAsyncContextManager[None]:
        """Raise Problem: the server runs tasks itself."""
        raise Problem(500, 'Tasks run in the server; workers need [scenarios.progress] engine = "docket".')

    async def submit(self, record: Record) -> None:
        """Store a new task and put it into the queue; raises Problem 429 where the queue is full."""
        self._limits.check(len(self._queue), record.client, lambda: self._queue.count(record.client))
        self._queue.reserve(record.client, record.id)
        await self.run_shielded(self._accept(record))

    async def _accept(self, record: Record) -> None:
        record.owner = self.ownership.process
        try:
            await self.store.save(record, encode_event(record.progress_data(), "progress"))
        except BaseException:
            self._queue.withdraw(record.id)
            raise
        self._enqueue(record.client, record.id)

    def _enqueue(self, client: str, id: str, *, first: bool = False) -> None:  # noqa: A002
        self._queue.add(client, id, first=first)
        self._tickets.put_nowait(None)

    async def _serve(self) -> None:
        """Run waiting tasks. This process holds its lease meanwhile: no other process touches its tasks."""
        await self._take_over(self.ownership.process)  # tasks that were interrupted when the lease was lost
        await self.ownership.send({"hello": self.ownership.process})
        async with asyncio.TaskGroup() as group:
            for _ in range(self._max_running):
                group.create_task(self._run_waiting())

    async def _run_waiting(self) -> None:
        while True:
            await self._tickets.get()
            client, id = self._queue.take()  # noqa: A001
            try:
                await self.runner.run(id, self.ownership.process)
            except EventLogError as error:
                log.error("cannot start a task: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
                self._enqueue(client, id, first=True)
            finally:
                self._queue.release(client)

    # -- dead processes

    async def handle(self, command: dict[str, str]) -> None:
        """Handle a command, and watch each process that announces itself; reply to a new one."""
        await super().handle(command)
        if other := command.get("hello"):
            self._watch_owner(other)
            await self.ownership.send({"here": self.ownership.process})
        elif other := command.get("here"):
            self._watch_owner(other)

    async def _watch_dead_owners(self) -> None:
        """Take over the tasks of processes that died before this one started."""
        await self.caught_up.wait()
        for owner in dict.fromkeys(record.owner for record in await self._all_records() if not record.has_ended):
            self._watch_owner(owner)

    async def _all_records(self) -> list[Record]:
        """Return the record of every stored task; retry until the log is available."""
        while True:
            try:
                return await self.store.all()
            except EventLogError as error:
                log.error("cannot list the tasks: %s", error)
                await asyncio.sleep(RETRY_SECONDS)

    def _watch_owner(self, owner: str) -> None:
        if owner != self.ownership.process and owner not in self._watched:
            self._watched.add(owner)
            self.spawn(self._wait_and_take_over(owner))

    async def _wait_and_take_over(self, owner: str) -> None:
        """Wait until a process has died, and take over its tasks, unless another process has."""
        await self.ownership.take_over(owner, lambda: self._take_over(owner))
        self._watched.discard(owner)

    async def _take_over(self, owner: str) -> None:
        async with self.runner.ownership_lock:
            unfinished = [
                record for record in await self._all_records() if record.owner == owner and not record.has_ended
            ]
            orphans = [record for record in unfinished if not self._has(record.id)]
            for first in range(0, len(orphans), TAKE_OVER_BATCH):
                batch = orphans[first : first + TAKE_OVER_BATCH]
                async with asyncio.TaskGroup() as group:
                    for record in batch:
                        group.create_task(self._requeue(record))
                for record in batch:
                    if not record.has_ended:
                        self._enqueue(record.client, record.id)
        if orphans:
            log.info("took over %d tasks of a dead process", len(orphans))

    def _has(self, id: str) -> bool:  # noqa: A002
        return id in self._queue or self.runner.has(id)

    async def _requeue(self, record: Record) -> None:
        before = record.state
        if await self.runner.prepare(record):
            record.owner = self.ownership.process
            events = [encode_event(record.progress_data(), "progress")] if record.state != before else []
            await self.store.save(record, *events, retry_forever=True)
