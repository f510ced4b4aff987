"""Blocking work in threads: a bounded number of threads for each kind of work, and no work that outlives its caller."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

INTERRUPT_SECONDS = 0.02
"""Interval between two interrupts of the same work, in seconds: one between two statements has no effect."""


class _Call:
    """Work that waits for a thread or runs in one, and who waits for it on the event loop."""

    __slots__ = ("_loop", "can_be_dropped", "ended", "interrupt", "job", "waiter")

    def __init__(self, job: "Future[Any]", interrupt: Callable[[], object] | None, *, can_be_dropped: bool) -> None:
        self.job = job
        self.interrupt = interrupt
        self.can_be_dropped = can_be_dropped
        self._loop = asyncio.get_running_loop()
        self.ended = False
        """Whether it was noticed on the event loop that the work has ended, or was dropped."""
        self.waiter: asyncio.Future[None] = self._loop.create_future()
        """Done then, unless whoever waits has been cancelled before: a future of its own, which can be cancelled."""
        job.add_done_callback(self._note_end)

    def _note_end(self, _: "Future[Any]") -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self.ended = True
        if not self.waiter.done():
            self.waiter.set_result(None)

    def drop(self) -> None:
        """Drop the work if it still waits for a thread, or interrupt it."""
        if not (self.can_be_dropped and self.job.cancel()) and self.interrupt is not None:
            self.interrupt()

    async def interrupt_and_wait(self) -> None:
        """Wait for running work through any number of cancellations."""
        while not self.ended:
            if self.interrupt is not None:
                self.interrupt()
            self.waiter = self._loop.create_future()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({self.waiter}, timeout=None if self.interrupt is None else INTERRUPT_SECONDS)


class Threads:
    """Up to `count` threads for one kind of blocking work, named `kind` in stack traces; an async context manager.

    Each kind has its own threads, so that digests cannot delay downloads, or exports the event log. Work that finds no
    free thread is queued, first come, first served; the queue is bounded by the number of callers, which all wait.
    """

    def __init__(self, kind: str, count: int) -> None:
        self.kind = kind
        self.count = count
        self._executor: ThreadPoolExecutor | None = None
        self._calls: set[_Call] = set()
        self._idle = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Accept work."""
        self._executor = ThreadPoolExecutor(self.count, self.kind)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Accept no more work; drop what is queued, interrupt what runs, and return when no thread is busy.

        A request may still be handled when the server closes what its handler uses. Its work then ends as if
        interrupted, or with RuntimeError.
        """
        executor = self.executor
        self._executor = None
        try:
            await shielded(self._end_calls())
        finally:
            executor.shutdown(wait=False)

    async def _end_calls(self) -> None:
        while self._calls:
            for call in tuple(self._calls):
                call.drop()
            self._idle.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERRUPT_SECONDS):
                    await self._idle.wait()

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The threads, for a library that runs its own short operations in them, as aiofiles: see `shielded`.

        Raises RuntimeError outside the context.
        """
        if self._executor is None:
            raise RuntimeError(f"the threads for {self.kind} are not open")
        return self._executor

    async def run(
        self,
        work: Callable[[*Ts], T],
        *arguments: *Ts,
        interrupt: Callable[[], object] | None = None,
        discard: Callable[[T], object] | None = None,
    ) -> T:
        """Call `work` in a thread and return its result; never return before the thread has finished it.

        If the caller is cancelled, once or many times, queued work is dropped; running work is interrupted and waited
        for; then CancelledError is raised. `interrupt` is called from the event loop, repeatedly until the work ends:
        it must be safe while the work runs, and before and after it. Without it the work must be short, since nothing
        else ends it. `discard` is called in a thread with a result that a cancelled caller does not get, as the `close`
        of what was opened.

        Raises what the work raises, and RuntimeError outside the context.
        """
        job = self.executor.submit(_called, work, arguments)
        call = _Call(job, interrupt, can_be_dropped=True)
        self._calls.add(call)
        try:
            try:
                await call.waiter
            except asyncio.CancelledError:
                if not job.cancel():
                    await call.interrupt_and_wait()
                    if discard is not None and not job.cancelled() and job.exception() is None:
                        await self.finish(discard, job.result())
                raise
        finally:
            self._forget(call)
        try:
            if job.cancelled():
                raise RuntimeError(f"the threads for {self.kind} were closed before the work began")
            return job.result()
        finally:
            del job, call  # the traceback of an exception holds this frame: without them, there is no cycle

    async def finish(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call short `work` in a thread, also when the caller is cancelled before or while it runs.

        For what ends something, as the `close` of a file: it is never dropped, so it must not depend on its caller.
        Outside the context, where there are no threads, it is called at once.
        """
        if self._executor is None:
            return work(*arguments)
        job = self._executor.submit(_called, work, arguments)
        call = _Call(job, None, can_be_dropped=False)
        self._calls.add(call)
        cancelled: asyncio.CancelledError | None = None
        try:
            try:
                await call.waiter
            except asyncio.CancelledError as error:
                cancelled = error
                await call.interrupt_and_wait()
        finally:
            self._forget(call)
        try:
            if cancelled is not None:
                raise cancelled
            return job.result()
        finally:
            del job, call, cancelled

    def _forget(self, call: _Call) -> None:
        self._calls.discard(call)
        del call.job  # which refers to the call: without this, both and the result would wait for the garbage collector
        if not self._calls:
            self._idle.set()


async def shielded(operation: Awaitable[T]) -> T:
    """Wait for `operation` through any number of cancellations of the caller, and return its result or raise its error.

    A cancelled caller gets CancelledError, but only when the operation has ended; an error of the operation is then
    dropped. For short operations that must not be abandoned halfway: those of aiofiles, whose thread would run on
    without a waiter, and what ends a transaction. Unlike with `asyncio.shield`, nothing runs in the background.
    """
    task = asyncio.ensure_future(operation)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if not cancelled:
        return task.result()
    if not task.cancelled():
        task.exception()  # retrieved, or asyncio would log it as never retrieved
    raise asyncio.CancelledError


def _called(work: Callable[[*Ts], T], arguments: tuple[*Ts]) -> T:
    """Call work in its thread. A future does not accept StopIteration: its waiter would wait forever."""
    try:
        return work(*arguments)
    except StopIteration as error:
        raise RuntimeError("work in a thread raised StopIteration") from error
