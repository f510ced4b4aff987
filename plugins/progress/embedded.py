"""Tasks that run in the process that takes them on, and what becomes of those whose process is gone."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from streamlab import EventLogError, Events, Problem, encode_event

from .engine import Engine, QueueLimits
from .line import Line
from .runner import Runner
from .store import Record, Store

log = logging.getLogger(__name__)

ADOPT_AT_ONCE = 100
"""Tasks of a process that is gone that are taken on together, in one commit."""

AGAIN_SECONDS = 1.0
"""When a task that could not be begun is tried again."""


class Embedded(Engine):
    """Up to `max_running` tasks run at once, clients take turns, and a limited number waits.

    Tasks of a process that is gone come on top, since they had their place there: the next that notices takes them.
    """

    def __init__(self, events: Events, store: Store, runner: Runner, *, max_running: int, queue: QueueLimits) -> None:
        super().__init__(events, store, runner)
        self._max_running = max_running
        self._limits = queue
        self._line = Line()
        self._tickets: asyncio.Queue[None] = asyncio.Queue()
        """One for each task in the line."""
        self._waiting: dict[str, str] = {}
        """The clients of those in the line, and of those on their way into it, by id."""
        self._attended: set[str] = set()

    def lease(self, record: Record) -> str:
        """A process's: it holds one for all its tasks."""
        return _lease(record.owner)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Run tasks while the block lasts; those that are not over then, the next process finds."""
        living = self.events.run_as_leader(_lease(self.process), self._serve)
        async with self.working(living, self._look_after()):
            yield

    def serving(self, max_running: int) -> AbstractAsyncContextManager[None]:
        """Refuse: there is nothing left to workers."""
        raise Problem(500, 'Tasks run in the server; [scenarios.progress] engine = "docket" leaves them to workers.')

    async def submit(self, record: Record) -> None:
        """Keep a new task and put it into the queue."""
        self._limits.check(len(self._waiting), lambda: list(self._waiting.values()).count(record.client))
        self._waiting[record.id] = record.client
        await self.surely(self._enter(record))

    async def _enter(self, record: Record) -> None:
        record.owner = self.process
        try:
            await self.store.keep(record, encode_event(record.news(), "progress"))
        except BaseException:
            self._waiting.pop(record.id, None)
            raise
        self._enqueue(record.client, record.id)

    def _enqueue(self, client: str, id: str, *, first: bool = False) -> None:  # noqa: A002
        self._waiting[id] = client
        self._line.add(client, id, first=first)
        self._tickets.put_nowait(None)

    async def _serve(self) -> None:
        """Run what waits. This process holds its lease meanwhile: nobody else touches its tasks."""
        await self._adopt(self.process)  # what was broken off when the lease had been lost
        await self.control.publish({"hello": self.process})
        async with asyncio.TaskGroup() as group:
            for _ in range(self._max_running):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            await self._tickets.get()
            client, id = self._line.take()  # noqa: A001
            try:
                del self._waiting[id]
                await self.runner.run(id, self.process)
            except EventLogError as error:
                log.error("a task cannot be begun: %s", error)
                await asyncio.sleep(AGAIN_SECONDS)
                self._enqueue(client, id, first=True)
            finally:
                self._line.free(client)

    # -- processes that are gone

    async def asked(self, asked: dict[str, str]) -> None:
        """Wait for the end of a process that says it is there, and answer one that is new."""
        await super().asked(asked)
        if other := asked.get("hello"):
            self._attend(other)
            await self.control.publish({"here": self.process})
        elif other := asked.get("here"):
            self._attend(other)

    async def _look_after(self) -> None:
        """Take on what processes have left that were gone before this one began."""
        await self.heard.wait()
        for owner in dict.fromkeys(record.owner for record in await self._all() if not record.over):
            self._attend(owner)

    async def _all(self) -> list[Record]:
        """Every task, however often the log has to be asked."""
        while True:
            try:
                return await self.store.all()
            except EventLogError as error:
                log.error("tasks cannot be looked for: %s", error)
                await asyncio.sleep(AGAIN_SECONDS)

    def _attend(self, owner: str) -> None:
        if owner != self.process and owner not in self._attended:
            self._attended.add(owner)
            self.beside(self._inherit(owner))

    async def _inherit(self, owner: str) -> None:
        """Wait until a process is gone, and take its tasks on, unless another one does."""
        await self.events.run_as_leader(_lease(owner), lambda: self._adopt(owner))
        self._attended.discard(owner)

    async def _adopt(self, owner: str) -> None:
        async with self.runner.hands:
            tasks = [task for task in await self._all() if task.owner == owner and not task.over]
            left = [task for task in tasks if not self._has(task.id)]
            for first in range(0, len(left), ADOPT_AT_ONCE):
                batch = left[first : first + ADOPT_AT_ONCE]
                async with asyncio.TaskGroup() as group:
                    for record in batch:
                        group.create_task(self._take_on(record))
                for record in batch:
                    if not record.over:
                        self._enqueue(record.client, record.id)
        if left:
            log.info("took on %d tasks of a process that is gone", len(left))

    def _has(self, id: str) -> bool:  # noqa: A002
        return id in self._waiting or self.runner.has(id)

    async def _take_on(self, record: Record) -> None:
        before = record.state
        if await self.runner.pick_up(record):
            record.owner = self.process
            news = [encode_event(record.news(), "progress")] if record.state != before else []
            await self.store.keep(record, *news, retry_forever=True)


def _lease(process: str) -> str:
    return f"progress/{process}"
