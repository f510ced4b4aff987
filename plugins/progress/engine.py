"""The base of both engines: background work, cancellation, and commands between processes."""

import asyncio
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from streamlab import Events, Ownership, Problem, Retention, may_be_proxy

from .runner import Runner
from .store import Record, Store

log = logging.getLogger(__name__)

MAX_COMMANDS = 10_000
"""Maximum commands stored for processes that take over from a dead one."""

COMMANDS = Retention(events=MAX_COMMANDS, seconds=86_400, idle_seconds=2 * 86_400)
"""Retention of the commands with which processes announce themselves and request each other to cancel tasks."""

FULL_RETRY_SECONDS = 5
"""Retry-After of a request that finds the queue full, in seconds."""

FULL_STORE_RETRY_SECONDS = 60
"""Retry-After of a request for which too many tasks are stored, in seconds."""

RECOUNT_SECONDS = 60.0
"""Maximum age of a count of the stored tasks, in seconds."""


class Engine(ABC):
    """Accepts tasks and has them run. A subclass decides where, and which lease marks a task as running."""

    def __init__(self, events: Events, store: Store, runner: Runner) -> None:
        self.events = events
        self.store = store
        self.runner = runner
        self.ownership = Ownership(events, "progress", COMMANDS)
        self.caught_up = asyncio.Event()
        """Set once the stored commands of other processes have been read."""
        self._group: asyncio.TaskGroup | None = None
        self._background: set[asyncio.Task[None]] = set()

    @abstractmethod
    def opened(self) -> AbstractAsyncContextManager[None]:
        """Accept tasks while the block lasts."""

    @abstractmethod
    def serving(self, max_running: int) -> AbstractAsyncContextManager[None]:
        """Run tasks in a worker while the block lasts; raises Problem where the server runs them."""

    @abstractmethod
    async def submit(self, record: Record) -> None:
        """Store a new task and queue it; raises Problem 429 where the queue is full."""

    @abstractmethod
    def lease(self, record: Record) -> str:
        """Return the lease that a process must hold to run a task: if it is free, no process runs it."""

    @asynccontextmanager
    async def working(self, *coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """Run coroutines in the background, and handle commands of other processes; all of it ends with the block."""
        async with asyncio.TaskGroup() as self._group:
            for coroutine in (self._handle_commands(), *coroutines):
                self.spawn(coroutine)
            try:
                yield
            finally:
                await self.runner.stop()
                # A cancellation can get lost in a command to Redis (python/cpython#86296, in 3.11): repeat it.
                while pending := tuple(self._background):
                    for task in pending:
                        task.cancel()
                    await asyncio.wait(pending, timeout=0.05)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run a coroutine in the background until it, or the block of `working`, ends."""
        assert self._group is not None, "the server has not started, or has stopped"
        task = self._group.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def run_shielded(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine to its end, even if the client disconnects."""
        failure: Exception | None = None

        async def run() -> None:
            nonlocal failure
            try:
                await coroutine
            except Exception as error:
                failure = error

        task = self.spawn(run())
        await asyncio.wait({task})  # unlike the task itself, this may be cancelled
        if failure is not None:
            raise failure
        if task.cancelled():
            raise Problem(503, "The server is stopping.", headers={"Retry-After": "5"})

    async def cancel(self, id: str) -> Record:  # noqa: A002
        """Cancel a task, or request its process to; return its record.

        Raises Problem 404, 410, and 409 where it has ended.
        """
        record = await self.store.get(id)
        if record.has_ended:
            raise Problem(409, f"This task has already ended: {record.state}.")
        if self.runner.cancel(id):
            return record
        async with self.runner.ownership_lock:
            if self.runner.cancel(id):
                return record
            record = await self.store.get(id)
            if record.has_ended:
                return record
            if record.owner == self.ownership.process:
                await self.runner.end_cancelled(record)
                return record
            async with self.events.lease(self.lease(record)) as free:
                if free:
                    record = await self.store.get(id)
                    if not record.has_ended:
                        await self.runner.end_cancelled(record)
                    return record
        await self.ownership.send({"cancel": id})
        return record

    async def _handle_commands(self) -> None:
        async for command in self.ownership.stored_commands():
            self._remember(command)
        self.caught_up.set()
        async for command in self.ownership.commands():
            self._remember(command)
            await self.handle(command)

    def _remember(self, command: dict[str, str]) -> None:
        """Remember the task that a command cancels: this process may take it over later."""
        if id := command.get("cancel"):  # noqa: A001
            if len(self.runner.cancel_requested) >= 2 * MAX_COMMANDS:
                self.runner.cancel_requested.clear()
            self.runner.cancel_requested.add(id)

    async def handle(self, command: dict[str, str]) -> None:
        """Handle a command of another process."""
        self.runner.cancel(command.get("cancel", ""))


@dataclass(frozen=True, slots=True)
class ClientLimit:
    """The maximum tasks of one client; one that may be a proxy, for any number of others, has it only where given."""

    maximum: int
    is_given: bool
    """Whether the configuration has it."""

    def exceeds(self, client: str, tasks: int) -> bool:
        """Return whether one more task than these is too many for a client."""
        return tasks >= self.maximum and (self.is_given or not may_be_proxy(client))


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Maximum waiting tasks: of all clients together, and of one."""

    total: int
    per_client: ClientLimit

    def check(self, waiting: int, client: str, of_client: Callable[[], int]) -> None:
        """Raise Problem 429 where one more task exceeds a limit; `of_client` counts the waiting tasks of the client."""
        if waiting >= self.total:
            raise _full(f"Too many tasks are waiting (limit {self.total}).")
        if self.per_client.exceeds(client, waiting) and self.per_client.exceeds(client, of_client()):
            raise _full(f"Too many tasks of this client are waiting (limit {self.per_client.maximum}).")


class StoredLimits:
    """Maximum stored tasks: of all clients together, and of one.

    They are counted in the event log at intervals, and what this process starts in between is added.
    """

    def __init__(self, store: Store, *, total: int, per_client: ClientLimit) -> None:
        self._store = store
        self._total = total
        self._per_client = per_client
        self._stored: Counter[str] = Counter()
        self._counted_at = -math.inf

    async def check(self, client: str) -> None:
        """Count one more task of a client; raises Problem 429 where it exceeds a limit."""
        age = time.monotonic() - self._counted_at
        if age > RECOUNT_SECONDS or (age > 1 and self._fault(client)):
            self._stored = Counter(record.client for record in await self._store.all())
            self._counted_at = time.monotonic()
        if fault := self._fault(client):
            raise _full(fault, FULL_STORE_RETRY_SECONDS)
        self._stored[client] += 1

    def _fault(self, client: str) -> str:
        """Return why one more task of a client cannot be stored; empty if it can."""
        if self._stored.total() >= self._total:
            return f"Too many tasks are stored (limit {self._total})."
        if self._per_client.exceeds(client, self._stored[client]):
            return f"Too many tasks of this client are stored (limit {self._per_client.maximum})."
        return ""


def _full(detail: str, seconds: int = FULL_RETRY_SECONDS) -> Problem:
    return Problem(429, detail, headers={"Retry-After": str(seconds)})
