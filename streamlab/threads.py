"""Blocking work in threads: a bounded number of threads for each kind of work, and no work that outlives its caller."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

INTERRUPT_SECONDS = 0.02
"""Interval between two interrupts of the same work, in seconds: one between two statements has no effect."""


class _Call(NamedTuple):
    """Work that waits for a thread or runs in one."""

    job: "Future[Any]"
    interrupt: Callable[[], object] | None
    can_be_dropped: bool

    def end(self) -> None:
        """Drop the work if it still waits for a thread, or interrupt it."""
        if not (self.can_be_dropped and self.job.cancel()) and self.interrupt is not None:
            self.interrupt()


class Threads:
    """Up to `count` threads for one kind of blocking work, named `kind` in stack traces; an async context manager.

    Each kind has its own threads, so that digests cannot delay downloads, or exports the event log. Work that finds no
    free thread is queued, first come, first served; the queue is bounded by the number of callers, which all wait.
    """

    def __init__(self, kind: str, count: int) -> None:
        self.kind = kind
        self.count = count
        self._executor: ThreadPoolExecutor | None = None
        self._calls: dict[asyncio.Future[Any], _Call] = {}
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
            for call in tuple(self._calls.values()):
                call.end()
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
        done = asyncio.wrap_future(job)
        self._calls[done] = _Call(job, interrupt, can_be_dropped=True)
        try:
            try:
                await asyncio.wait({done})  # unlike the future itself, a wait can be cancelled alone
            except asyncio.CancelledError:
                if not job.cancel():
                    await _interrupt_and_wait(done, interrupt)
                    if discard is not None and done.exception() is None:
                        await self.finish(discard, done.result())
                raise
        finally:
            self._forget(done)
        try:
            if done.cancelled():
                raise RuntimeError(f"the threads for {self.kind} were closed before the work began")
            return done.result()
        finally:
            del job, done  # the traceback of an exception holds this frame: without them, there is no cycle

    async def finish(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call short `work` in a thread, also when the caller is cancelled before or while it runs.

        For what ends something, as the `close` of a file: it is never dropped, so it must not depend on its caller.
        Outside the context, where there are no threads, it is called at once.
        """
        if self._executor is None:
            return work(*arguments)
        job = self._executor.submit(_called, work, arguments)
        done = asyncio.wrap_future(job)
        self._calls[done] = _Call(job, None, can_be_dropped=False)
        try:
            return await shielded(done)
        finally:
            self._forget(done)

    def _forget(self, done: "asyncio.Future[Any]") -> None:
        del self._calls[done]
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


async def _interrupt_and_wait(done: asyncio.Future[Any], interrupt: Callable[[], object] | None) -> None:
    """Wait for running work through any number of cancellations, and retrieve its exception: nothing else does."""
    while not done.done():
        if interrupt is not None:
            interrupt()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({done}, timeout=None if interrupt is None else INTERRUPT_SECONDS)
    done.exception()


def _called(work: Callable[[*Ts], T], arguments: tuple[*Ts]) -> T:
    """Call work in its thread. A future does not accept StopIteration: its waiter would wait forever."""
    try:
        return work(*arguments)
    except StopIteration as error:
        raise RuntimeError("work in a thread raised StopIteration") from error
