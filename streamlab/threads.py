"""Blocking work in threads: a bounded number of threads for each kind of work, and no work that outlives its caller."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

INTERRUPT_SECONDS = 0.02
"""Interval between two interrupts of the same work, in seconds: one between two statements has no effect."""


class Threads:
    """Up to `count` threads for one kind of blocking work, named `kind` in stack traces; an async context manager.

    Each kind has threads of its own, so that digests cannot delay downloads, or exports the event log.
    """

    def __init__(self, kind: str, count: int) -> None:
        self.kind = kind
        self.count = count
        self._executor: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Self:
        """Accept work."""
        self._executor = ThreadPoolExecutor(self.count, self.kind)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Accept no more work. Every caller of `run` has waited for its own, so that no thread is busy."""
        assert self._executor is not None
        self._executor.shutdown(wait=False)
        self._executor = None

    async def run(
        self,
        work: Callable[[*Ts], T],
        *arguments: *Ts,
        interrupt: Callable[[], object] | None = None,
        discard: Callable[[T], object] | None = None,
    ) -> T:
        """Call `work` in a thread and return its result; never return before the thread is done with it.

        If the caller is cancelled, once or many times, work that still waits for a thread is dropped; work that runs
        is interrupted and waited for; then CancelledError is raised. `interrupt` is called from the event loop, again
        and again until the work ends: it must be safe while the work runs, and before and after it. Without it the
        work must be short, since nothing else ends it. `discard` is called in the thread with a result that a
        cancelled caller never gets, as the `close` of what was opened.

        Raises what the work raises, and RuntimeError outside the context.
        """
        if self._executor is None:
            raise RuntimeError(f"the threads for {self.kind} are not open")
        executor = self._executor
        job = executor.submit(work, *arguments)
        done = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not job.cancel():
                await _settle(done, interrupt)
                if discard is not None and done.exception() is None:
                    await _settle(asyncio.wrap_future(executor.submit(discard, done.result())))
            raise


async def _settle(done: asyncio.Future[Any], interrupt: Callable[[], object] | None = None) -> None:
    """Wait for a job through any number of cancellations, and retrieve its exception: nobody else will."""
    while not done.done():
        if interrupt is not None:
            interrupt()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({done}, timeout=None if interrupt is None else INTERRUPT_SECONDS)
    done.exception()
