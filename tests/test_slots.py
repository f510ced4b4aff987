"""Slots: bounded, first come first served, and never lost."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from streamlab import Problem, Slots


async def hold(slots: Slots, count: int, started: list[int], release: asyncio.Event) -> None:
    async with slots.held(count):
        started.append(count)
        await release.wait()


async def test_one_request_more_than_slots_and_queue_is_rejected_with_retry_after() -> None:
    slots = Slots(2, what="exports", retry_seconds=7)
    async with slots.held(), slots.held():
        assert slots.in_use == 2
        with pytest.raises(Problem, match=r"^Too many exports: 2 of 2 in progress\.$") as rejected:
            async with slots.held():
                pass
    assert (rejected.value.status, rejected.value.headers) == (503, {"Retry-After": "7"})
    assert slots.in_use == 0


async def test_requests_get_their_slots_in_their_order_whatever_they_need() -> None:
    slots, started, first, second = Slots(3, 2), list[int](), asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(hold(slots, 2, started, first))
        await asyncio.sleep(0)
        group.create_task(hold(slots, 3, started, second))
        await asyncio.sleep(0)
        group.create_task(hold(slots, 1, started, second))  # one is free, but another request is first
        await asyncio.sleep(0)
        assert started == [2]
        with pytest.raises(Problem, match="2 of 3 in progress, 2 waiting"):
            await hold(slots, 1, started, first)
        first.set()
        second.set()
    assert (started, slots.in_use) == ([2, 3, 1], 0)


async def test_a_request_that_waits_too_long_is_rejected_and_uses_no_slot() -> None:
    slots = Slots(1, 1, wait_seconds=0.01, status=429)
    async with slots.held():
        with pytest.raises(Problem, match=r"none ended within 0\.01 s") as rejected:
            async with slots.held():
                pass
    assert (rejected.value.status, slots.in_use) == (429, 0)


async def test_a_request_cancelled_while_it_waits_does_not_delay_the_next() -> None:
    slots, started, release = Slots(1, 2), list[int](), asyncio.Event()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        await stack.enter_async_context(slots.held())
        given_up = group.create_task(hold(slots, 1, started, release))
        group.create_task(hold(slots, 1, started, release))
        await asyncio.sleep(0)
        await stack.aclose()  # the first gets its slot in the moment in which it is cancelled
        given_up.cancel()
        release.set()
    assert (started, slots.in_use) == ([1], 0)


@pytest.mark.parametrize("count", [0, 3])
async def test_more_slots_than_exist_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} is not a number of slots \(1 to 2\)"):
        async with Slots(2).held(count):
            pass
