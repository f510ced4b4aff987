"""Tasks that run in worker processes of any machine: docket queues them on Redis, hands them out, and again at a crash.

What a task is and where it stands is in the event log, as ever; docket carries ids alone. It delivers at least once, so
a task's lease decides who runs it: whoever is handed one that another process runs gives it back.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from streamlab import EventLogError, Events, encode_event

from .engine import Engine, QueueLimits
from .line import in_turn
from .runner import HEARTBEAT_SECONDS, Runner
from .store import Record, Store, now

if TYPE_CHECKING:
    from docket import Docket, Execution

log = logging.getLogger(__name__)

QUEUE = "streamlab-tasks"
"""What docket's keys begin with."""

REDELIVERY = timedelta(seconds=8)
"""How long after its last sign of life a worker's tasks are handed to another, and a third of that more at most."""

ELSEWHERE = timedelta(seconds=5)
"""When a task that another process seems to run is handed out again."""

SILENT_SECONDS = HEARTBEAT_SECONDS + 1
"""A running task without a sign of life for so long may have lost its process."""

GIVE_BACK_SECONDS = 2.0
"""What a worker that stops may take to give back what it has; else it is handed out again after REDELIVERY."""

RETRIES = 120
"""How often a command is tried while the server is away, half a minute at most: a worker must not lose its tasks."""

RESTORE_SECONDS = 60.0
"""How often tasks that the queue has lost are put into it again."""

AWAY = (RedisConnectionError, RedisTimeoutError, OSError)


class Workers(Engine):
    """Tasks wait on Redis, clients take turns, and a limited number waits.

    What docket hands to a worker is a ticket: a slot for one task. There are as many tickets as tasks, and each is
    named for one, but which task the slot goes to is decided when it is free: docket itself knows no clients.
    """

    def __init__(self, events: Events, store: Store, runner: Runner, *, url: str, queue: QueueLimits) -> None:
        super().__init__(events, store, runner)
        self._url = url
        self._limits = queue
        self._chosen: set[str] = set()
        """Tasks that this worker tries to run, or runs."""
        self._docket: Docket | None = None

    def lease(self, record: Record) -> str:
        """The task's own."""
        return _lease(record.id)

    # -- in servers

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Take tasks on while the block lasts."""

        async def run_task(id: str) -> None:  # noqa: A002
            """Stand for the workers' function: docket takes no name that it does not know."""

        async with self._queue(run_task), self.working(self._restore()):
            yield

    async def submit(self, record: Record) -> None:
        """Keep a new task and put it into the queue."""
        waiting = await self._waiting()
        mine = 0
        if waiting >= self._limits.per_client:
            mine = sum(task.client == record.client and task.state == "queued" for task in await self.store.all())
        self._limits.check(waiting, lambda: mine)
        await self.surely(self._enter(record))

    async def _enter(self, record: Record) -> None:
        await self.store.keep(record, encode_event(record.news(), "progress"))
        await self._add(record)

    async def _add(self, record: Record) -> None:
        """Put a task into the queue, unless it is there; wait for a server that is away."""
        assert self._docket is not None
        while True:
            try:
                await self._docket.add("run_task", key=f"task:{record.id}")(id=record.id)
                return
            except AWAY as error:
                log.warning("the queue of tasks is away (%s); waiting for it", type(error).__name__)
                await asyncio.sleep(1)

    async def _waiting(self) -> int:
        assert self._docket is not None
        try:
            async with self._docket.redis() as server:
                pipe = cast("redis.asyncio.Redis", server).pipeline(transaction=False)
                pipe.xlen(self._docket.stream_key)
                pipe.zcard(self._docket.queue_key)
                return sum(await pipe.execute())
        except AWAY:
            raise EventLogError("The Redis server of the queue does not answer.") from None

    async def _restore(self) -> None:
        """Put tasks into the queue that are not over and not there: the server died, or lost them."""
        while True:
            try:
                for record in await self.store.all():
                    if not record.over:
                        await self._add(record)
            except (EventLogError, RedisError) as error:
                log.error("tasks cannot be looked for: %s", error)
            await asyncio.sleep(RESTORE_SECONDS)

    # -- in workers

    @asynccontextmanager
    async def serving(self, max_running: int) -> AsyncIterator[None]:
        """Run tasks while the block lasts, so many at once; those that are not over then, others go on with."""
        from docket import CurrentExecution, Execution, Worker

        current = CurrentExecution()

        async def run_task(id: str, execution: Execution = current) -> None:  # noqa: A002
            await self._run_next(id, execution)

        async with (
            self._queue(run_task) as docket,
            Worker(
                docket, concurrency=max_running, redelivery_timeout=REDELIVERY, schedule_automatic_tasks=False
            ) as worker,
            self.working(),
        ):
            await self.heard.wait()
            taking = self.beside(worker.run_forever())
            try:
                yield
            finally:
                await self.runner.stop()
                taking.cancel()  # once: it takes no more, and gives back what was broken off
                await asyncio.wait({taking}, timeout=GIVE_BACK_SECONDS)

    async def _run_next(self, id: str, execution: "Execution") -> None:  # noqa: A002
        """Run the task whose turn it is in the slot that was handed to this worker, or give the slot back."""
        from docket.dependencies import AdmissionBlocked

        needed = True
        try:
            needed = await self._run_one(id)
        except* EventLogError as errors:
            log.error("a task cannot be run now: %s", errors.exceptions[0])
        if self.runner.stopping:
            raise AdmissionBlocked(execution, "the worker stops", retry_delay=timedelta(0))
        if needed:
            raise AdmissionBlocked(execution, "another process has it", retry_delay=ELSEWHERE)

    async def _run_one(self, ticket: str) -> bool:
        """Run one task, if there is one that no process runs; return whether the ticket is still needed.

        It is, where its own task is not over, and where a process that has a task may have died with it.
        """
        needed = False
        for record in in_turn(await self.store.all()):
            if record.id not in self._chosen and not self.runner.stopping and await self._try(record.id):
                return False
            silent = now() - record.told > SILENT_SECONDS * 1000
            needed = needed or record.id == ticket or (silent and record.state == "running")
        return needed

    async def _try(self, id: str) -> bool:  # noqa: A002
        """Run a task, unless another process does or it is over; return whether it was run."""
        ran = False

        async def run() -> None:
            nonlocal ran
            ran = await self.runner.run(id, "")

        self._chosen.add(id)
        try:
            await self.events.if_free(_lease(id), run)
        finally:
            self._chosen.discard(id)
        return ran

    @asynccontextmanager
    async def _queue(self, function: Any) -> "AsyncIterator[Docket]":
        from docket import Docket

        # Nothing of a task that is over is kept there: its result is in the event log.
        async with Docket(name=QUEUE, url=self._url, execution_ttl=timedelta(0)) as self._docket:
            self._docket.tasks.clear()
            self._docket.register(function)
            async with self._docket.redis() as server:
                retry: Any = Retry(ExponentialBackoff(cap=0.25, base=0.05), retries=RETRIES)
                cast("redis.asyncio.Redis", server).set_retry(retry)
            yield self._docket


def _lease(id: str) -> str:  # noqa: A002
    return f"progress/{id}"
