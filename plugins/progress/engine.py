"""What every way to run tasks has in common: they are cancelled, and processes hear of each other."""

import asyncio
import json
import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from streamlab import ORIGIN, Channel, Event, Events, Problem, Retention

from .runner import Runner
from .store import Record, Store

log = logging.getLogger(__name__)

CONTROL_EVENTS = 10_000
"""What processes have asked each other that is kept, for whoever takes up the tasks of one that is gone."""

FULL_RETRY_SECONDS = 5
"""When a client that was refused for want of room may ask again."""


class Engine(ABC):
    """Takes tasks on and sees that they are run. Subclasses say where, and what it means that nobody runs one."""

    def __init__(self, events: Events, store: Store, runner: Runner) -> None:
        self.events = events
        self.store = store
        self.runner = runner
        self.process = uuid.uuid4().hex
        self.heard = asyncio.Event()
        """Set once what other processes have asked so far is known."""
        self._group: asyncio.TaskGroup | None = None
        self._beside: set[asyncio.Task[None]] = set()

    @abstractmethod
    def opened(self) -> AbstractAsyncContextManager[None]:
        """Take tasks on while the block lasts."""

    @abstractmethod
    def serving(self, max_running: int) -> AbstractAsyncContextManager[None]:
        """Run tasks in a worker while the block lasts; raises Problem where the server runs them."""

    @abstractmethod
    async def submit(self, record: Record) -> None:
        """Keep a new task and see that it is run; raises Problem 429 where there is no room."""

    @abstractmethod
    def lease(self, record: Record) -> str:
        """The lease that whoever may run a task holds: where nobody does, nobody runs it."""

    @property
    def control(self) -> Channel:
        """Where processes that share the log ask each other to cancel a task, and say that they are there."""
        keep = Retention(events=CONTROL_EVENTS, seconds=86_400, idle_seconds=2 * 86_400)
        return self.events.channel("progress", keep=keep)

    @asynccontextmanager
    async def working(self, *works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """Do some work beside the block, and heed what other processes ask; all of it ends with the block."""
        async with asyncio.TaskGroup() as self._group:
            for work in (self._heed(), *works):
                self.beside(work)
            try:
                yield
            finally:
                await self.runner.stop()
                # A cancellation can get lost in a command to Redis (python/cpython#86296, in 3.11): until it is heard.
                while pending := tuple(self._beside):
                    for task in pending:
                        task.cancel()
                    await asyncio.wait(pending, timeout=0.05)

    def beside(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Do some more work, until it or the block of `working` ends."""
        assert self._group is not None, "the server has not started, or is over"
        task = self._group.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        return task

    async def surely(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work to its end, even when the client that wanted it has left."""
        failure: Exception | None = None

        async def doing() -> None:
            nonlocal failure
            try:
                await work
            except Exception as error:
                failure = error

        task = self.beside(doing())
        await asyncio.wait({task})  # unlike the task itself, this may be cancelled
        if failure is not None:
            raise failure
        if task.cancelled():
            raise Problem(503, "The server is stopping.", headers={"Retry-After": "5"})

    async def cancel(self, id: str) -> Record:  # noqa: A002
        """Cancel a task, or ask who runs it to; returns it as it stands then.

        Raises Problem 404, 410, and 409 where it is over.
        """
        record = await self.store.get(id)
        if record.over:
            raise Problem(409, f"This task is over already: {record.state}.")
        if self.runner.cancel(id):
            return record
        async with self.runner.hands:
            if self.runner.cancel(id):
                return record
            record = await self.store.get(id)
            if record.over:
                return record
            if record.owner == self.process:
                await self.runner.withdraw(record)
                return record
            async with self.events.lease(self.lease(record)) as free:
                if free:
                    record = await self.store.get(id)
                    if not record.over:
                        await self.runner.withdraw(record)
                    return record
        await self.control.publish({"cancel": id})
        return record

    async def _heed(self) -> None:
        control, last = self.control, ORIGIN
        async for event in control.read():
            self._note(event)
            last = event.position
        self.heard.set()
        async for event in control.listen(last):
            await self.asked(self._note(event))

    def _note(self, event: Event) -> dict[str, str]:
        asked: dict[str, str] = json.loads(event.data)
        if id := asked.get("cancel"):  # noqa: A001
            if len(self.runner.unwanted) >= 2 * CONTROL_EVENTS:
                self.runner.unwanted.clear()
            self.runner.unwanted.add(id)
        return asked

    async def asked(self, asked: dict[str, str]) -> None:
        """Do what another process asks right now."""
        self.runner.cancel(asked.get("cancel", ""))


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many tasks may wait: of all clients together, and of one."""

    total: int
    per_client: int

    def check(self, waiting: int, of_client: Callable[[], int]) -> None:
        """Raise Problem 429 where one task more is too many; `of_client` counts those of its client."""
        if waiting >= self.total:
            raise _full(f"{waiting} tasks wait to be run, which is all this server takes.")
        if waiting >= self.per_client and (count := of_client()) >= self.per_client:
            raise _full(f"{count} tasks of this client wait to be run, which is all this server takes of one.")


def _full(detail: str) -> Problem:
    return Problem(429, detail, headers={"Retry-After": str(FULL_RETRY_SECONDS)})
