"""Blocking work in threads: what a caller gets, and what remains of work whose caller is cancelled."""

import asyncio
import gc
import threading

import pytest

from streamlab.threads import Threads


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


async def test_a_result_nobody_gets_is_discarded() -> None:
    work, discarded = Work(), []
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
