"""Tasks that run in worker processes on any machine: docket queues them on Redis, and redelivers them after a crash.

The state of tasks is in the event log; docket carries only ids. It delivers at least once, so the lease of a task
decides which process runs it: a worker returns a task that another process runs.
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
from .fair_queue import in_order
from .runner import HEARTBEAT_SECONDS, Runner
from .store import Record, Store, now

if TYPE_CHECKING:
    from docket import Docket, Execution

log = logging.getLogger(__name__)

QUEUE = "streamlab-tasks"
"""Prefix of docket's keys."""

REDELIVERY = timedelta(seconds=8)
"""Time after a worker's last heartbeat until its tasks are redelivered; it may take a third longer."""

RUNS_ELSEWHERE = timedelta(seconds=5)
"""Time until a task that another process seems to run is redelivered."""

SILENT_SECONDS = HEARTBEAT_SECONDS + 1
"""Seconds without a heartbeat after which the process of a running task may have died."""

RETURN_SECONDS = 2.0
"""Timeout for a stopping worker to return its tasks, in seconds; later ones are redelivered after REDELIVERY."""

RETRIES = 120
"""Retries of a command while Redis is unavailable (half a minute): a worker must not lose its tasks."""

RESTORE_SECONDS = 60.0
"""Interval at which tasks that the queue has lost are queued again, in seconds."""

UNAVAILABLE = (RedisConnectionError, RedisTimeoutError, OSError)


class DocketEngine(Engine):
    """Runs tasks in workers; a limited number of tasks waits on Redis, and clients take turns.

    Docket delivers tickets: a ticket is a slot for one task. There is one ticket for each task, under its id, but which
    task gets the slot is decided when it is free: docket itself does not know about clients.
    """

    def __init__(self, events: Events, store: Store, runner: Runner, *, url: str, queue: QueueLimits) -> None:
        super().__init__(events, store, runner)
        self._url = url
        self._limits = queue
        self._chosen: set[str] = set()
        """Tasks that this worker runs, or tries to run."""
        self._docket: Docket | None = None

    def lease(self, record: Record) -> str:
        """Return the lease of the task itself."""
        return self.ownership.lease(record.id)

    # -- in servers

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Accept tasks while the block lasts."""

        async def run_task(id: str) -> None:  # noqa: A002
            """Stand in for the workers' function: docket accepts only the names of registered functions."""

        async with self._queue(run_task), self.working(self._restore()):
            yield

    async def submit(self, record: Record) -> None:
        """Store a new task and put it into the queue; raises Problem 429 where the queue is full."""
        waiting = await self._waiting()
        own = 0
        if self._limits.per_client.exceeds(record.client, waiting):
            own = sum(other.client == record.client and other.state == "queued" for other in await self.store.all())
        self._limits.check(waiting, record.client, lambda: own)
        await self.run_shielded(self._accept(record))

    async def _accept(self, record: Record) -> None:
        await self.store.save(record, encode_event(record.progress_data(), "progress"))
        await self._enqueue(record)

    async def _enqueue(self, record: Record) -> None:
        """Put a task into the queue, unless it is there; wait while Redis is unavailable."""
        assert self._docket is not None
        while True:
            try:
                await self._docket.add("run_task", key=f"task:{record.id}")(id=record.id)
                return
            except UNAVAILABLE as error:
                log.warning("the task queue is unavailable (%s); retrying", type(error).__name__)
                await asyncio.sleep(1)

    async def _waiting(self) -> int:
        assert self._docket is not None
        try:
            async with self._docket.redis() as server:
                pipe = cast("redis.asyncio.Redis", server).pipeline(transaction=False)
                pipe.xlen(self._docket.stream_key)
                pipe.zcard(self._docket.queue_key)
                return sum(await pipe.execute())
        except UNAVAILABLE:
            raise EventLogError("The Redis server of the task queue does not respond.") from None

    async def _restore(self) -> None:
        """Queue unfinished tasks again that are missing: a server died before it queued them, or Redis lost them."""
        while True:
            try:
                for record in await self.store.all():
                    if not record.has_ended:
                        await self._enqueue(record)
            except (EventLogError, RedisError) as error:
                log.error("cannot list the tasks: %s", error)
            await asyncio.sleep(RESTORE_SECONDS)

    # -- in workers

    @asynccontextmanager
    async def serving(self, max_running: int) -> AsyncIterator[None]:
        """Run up to `max_running` tasks at once while the block lasts; other workers continue the unfinished ones."""
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
            await self.caught_up.wait()
            serving = self.spawn(worker.run_forever())
            try:
                yield
            finally:
                await self.runner.stop()
                serving.cancel()  # once: it accepts no more tasks, and returns the interrupted ones
                await asyncio.wait({serving}, timeout=RETURN_SECONDS)

    async def _run_next(self, id: str, execution: "Execution") -> None:  # noqa: A002
        """Run the task whose turn it is in the delivered slot, or return the ticket."""
        from docket.dependencies import AdmissionBlocked

        is_needed = True
        try:
            is_needed = await self._run_one(id)
        except* EventLogError as errors:
            log.error("cannot run a task now: %s", errors.exceptions[0])
        if self.runner.stopping:
            raise AdmissionBlocked(execution, "the worker is stopping", retry_delay=timedelta(0))
        if is_needed:
            raise AdmissionBlocked(execution, "another process runs it", retry_delay=RUNS_ELSEWHERE)

    async def _run_one(self, ticket: str) -> bool:
        """Run one task, if there is one that no process runs; return whether the ticket is still needed.

        It is needed while its own task has not ended, and while the process of a running task may have died.
        """
        is_needed = False
        for record in in_order(await self.store.all()):
            if record.id not in self._chosen and not self.runner.stopping and await self._try(record.id):
                return False
            is_silent = now() - record.heartbeat > SILENT_SECONDS * 1000
            is_needed = is_needed or record.id == ticket or (is_silent and record.state == "running")
        return is_needed

    async def _try(self, id: str) -> bool:  # noqa: A002
        """Run a task, unless another process does or it has ended; return whether it was run."""
        ran = False

        async def run() -> None:
            nonlocal ran
            ran = await self.runner.run(id, "")

        self._chosen.add(id)
        try:
            await self.events.try_run_as_leader(self.ownership.lease(id), run)
        finally:
            self._chosen.discard(id)
        return ran

    @asynccontextmanager
    async def _queue(self, function: Any) -> "AsyncIterator[Docket]":
        from docket import Docket

        # Nothing is stored there of a finished task: its result is in the event log.
        async with Docket(name=QUEUE, url=self._url, execution_ttl=timedelta(0)) as self._docket:
            self._docket.tasks.clear()
            self._docket.register(function)
            async with self._docket.redis() as server:
                retry: Any = Retry(ExponentialBackoff(cap=0.25, base=0.05), retries=RETRIES)
                cast("redis.asyncio.Redis", server).set_retry(retry)
            yield self._docket
