"""Blocking work in threads: results, and the end of work whose caller is cancelled."""

import asyncio
import gc
import threading
from contextlib import suppress

import pytest

from streamlab.threads import Threads, shielded


class Work:
    """Work that runs until it is interrupted or released, and counts how it ended."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.released = threading.Event()
        self.interrupted = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> str:
        self.began.set()
        try:
            while not self.released.wait(0.001):
                if self.interrupted.is_set():
                    raise OSError("interrupted")
            return "result"
        finally:
            self.ended.set()


async def _begun(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0)


async def test_a_result_and_an_error_reach_the_caller() -> None:
    async with Threads("test", 1) as threads:
        assert await threads.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await threads.run(divmod, 7, 0)


@pytest.mark.parametrize("cancellations", [1, 2, 5])
async def test_a_cancelled_caller_returns_only_after_its_work(cancellations: int) -> None:
    work = Work()
    async with Threads("test", 1) as threads:
        caller = asyncio.ensure_future(threads.run(work, interrupt=work.interrupted.set))
        await _begun(work.began)
        for _ in range(cancellations):
            caller.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert work.ended.is_set()


async def test_work_without_an_interrupt_is_waited_for_through_many_cancellations() -> None:
    work = Work()
    async with Threads("test", 1) as threads:
        caller = asyncio.ensure_future(threads.run(work))
        await _begun(work.began)
        for _ in range(5):
            caller.cancel()
            await asyncio.sleep(0)
            assert not caller.done()
        work.released.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert work.ended.is_set()


async def test_work_that_still_waits_for_a_thread_is_dropped() -> None:
    first, second = Work(), Work()
    async with Threads("test", 1) as threads:
        running = asyncio.ensure_future(threads.run(first))
        waiting = asyncio.ensure_future(threads.run(second))
        await _begun(first.began)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        first.released.set()
        assert await running == "result"
    assert not second.began.is_set()


async def test_an_undelivered_result_is_discarded() -> None:
    work, discarded = Work(), list[str]()
    async with Threads("test", 1) as threads:
        caller = asyncio.ensure_future(threads.run(work, discard=discarded.append))
        await _begun(work.began)
        caller.cancel()
        await asyncio.sleep(0)
        work.released.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
    assert discarded == ["result"]


async def test_no_exception_of_interrupted_work_stays_unretrieved() -> None:
    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    work = Work()
    async with Threads("test", 1) as threads:
        caller = asyncio.ensure_future(threads.run(work, interrupt=work.interrupted.set))
        await _begun(work.began)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        del caller
        gc.collect()
    assert reported == []


async def test_kinds_of_work_do_not_wait_for_each_other() -> None:
    work = Work()
    async with Threads("slow", 1) as slow, Threads("quick", 1) as quick:
        running = asyncio.ensure_future(slow.run(work))
        await _begun(work.began)
        assert await quick.run(divmod, 7, 2) == (3, 1)
        work.released.set()
        await running


async def test_threads_that_are_not_open_report_their_kind() -> None:
    with pytest.raises(RuntimeError, match="the threads for test are not open"):
        await Threads("test", 1).run(divmod, 7, 2)


async def test_a_close_is_never_dropped() -> None:
    """A close runs even if its caller is cancelled while it waits for a thread."""
    first, closed = Work(), list[str]()
    async with Threads("test", 1) as threads:
        running = asyncio.ensure_future(threads.run(first))
        closing = asyncio.ensure_future(threads.finish(closed.append, "closed"))
        await _begun(first.began)
        for _ in range(3):
            closing.cancel()
            await asyncio.sleep(0)
        first.released.set()
        assert await running == "result"
        with pytest.raises(asyncio.CancelledError):
            await closing
        await threads.finish(closed.append, "again")
    await threads.finish(closed.append, "outside")
    assert closed == ["closed", "again", "outside"]


async def test_closing_the_context_interrupts_running_work_and_drops_waiting_work() -> None:
    """A request may still be handled while its server closes: its work does not outlive the context."""
    running, waiting = Work(), Work()
    async with Threads("test", 1) as threads:
        first = asyncio.ensure_future(threads.run(running, interrupt=running.interrupted.set))
        second = asyncio.ensure_future(threads.run(waiting))
        await _begun(running.began)
    assert running.ended.is_set()
    with pytest.raises(OSError, match="interrupted"):
        await first
    with pytest.raises(RuntimeError, match="the threads for test were closed before the work began"):
        await second
    assert not waiting.began.is_set()


async def test_closing_the_context_survives_cancellation_and_waits_for_uninterruptible_work() -> None:
    work = Work()

    async def owner(threads: Threads, entered: asyncio.Event) -> None:
        async with threads:
            entered.set()
            await asyncio.Event().wait()

    threads, entered = Threads("test", 1), asyncio.Event()
    owning = asyncio.ensure_future(owner(threads, entered))
    await entered.wait()
    running = asyncio.ensure_future(threads.run(work))
    await _begun(work.began)
    for _ in range(5):
        owning.cancel()
        await asyncio.sleep(0)
        assert not owning.done()
    work.released.set()
    assert await running == "result"
    with pytest.raises(asyncio.CancelledError):
        await owning


async def test_a_cancellation_at_the_moment_of_the_result_discards_it() -> None:
    discarded: list[str] = []
    async with Threads("test", 1) as threads:
        for _ in range(200):
            work = Work()
            work.released.set()
            caller = asyncio.ensure_future(threads.run(work, discard=discarded.append))
            await _begun(work.ended)
            caller.cancel()
            with suppress(asyncio.CancelledError):
                discarded.append(await caller)
    assert discarded == ["result"] * 200


async def test_work_that_raises_stop_iteration_has_an_end() -> None:
    async with Threads("test", 1) as threads:
        with pytest.raises(RuntimeError, match="work in a thread raised StopIteration"):
            await threads.run(next, iter(()))


@pytest.mark.parametrize("cancellations", [1, 2, 5])
async def test_a_shielded_operation_ends_before_its_cancelled_caller(cancellations: int) -> None:
    ready, ended = asyncio.Event(), asyncio.Event()

    async def operation() -> None:
        await ready.wait()
        ended.set()
        raise OSError("not delivered")

    caller = asyncio.ensure_future(shielded(operation()))
    await asyncio.sleep(0)
    for _ in range(cancellations):
        caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
    ready.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()


async def test_a_shielded_operation_returns_its_result_or_raises_its_error() -> None:
    async def failing() -> None:
        raise OSError("broken")

    assert await shielded(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(OSError, match="broken"):
        await shielded(failing())
