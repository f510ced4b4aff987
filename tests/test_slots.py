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


async def test_one_client_gets_at_most_half_of_slots_and_queue_and_a_proxy_all() -> None:
    slots, started, release = Slots(2, 3, what="exports"), list[str](), asyncio.Event()

    async def use(client: str) -> None:
        async with slots.held(client=client):
            started.append(client)
            await release.wait()

    async with asyncio.TaskGroup() as group:
        for client in ("alice", "alice", "alice"):  # two have a slot, one waits
            group.create_task(use(client))
            await asyncio.sleep(0)
        with pytest.raises(
            Problem, match=r"^Too many exports: this client has 3 of the 3 that one may have"
        ) as rejected:
            await use("alice")
        assert (rejected.value.status, rejected.value.headers) == (429, {"Retry-After": "5"})
        for client in ("127.0.0.1", "127.0.0.1"):
            group.create_task(use(client))
            await asyncio.sleep(0)
        with pytest.raises(Problem, match="2 of 2 in progress, 3 waiting") as full:
            await use("127.0.0.1")
        assert full.value.status == 503
        release.set()
    assert slots.in_use == 0
    async with slots.held(2, client="alice"):  # one request may need more than a share
        pass


async def test_clients_take_turns() -> None:
    slots, started = Slots(2, 20), list[str]()
    ends = [asyncio.Event() for _ in range(6)]

    async def use(client: str, end: asyncio.Event) -> None:
        async with slots.held(client=client):
            started.append(client)
            await end.wait()

    async with asyncio.TaskGroup() as group:
        for client, end in zip(("alice", "alice", "alice", "alice", "bob", "carol"), ends, strict=True):
            group.create_task(use(client, end))
            await asyncio.sleep(0)
        for end in ends:
            end.set()
            await asyncio.sleep(0.001)
    assert started == ["alice", "alice", "bob", "carol", "alice", "alice"]
