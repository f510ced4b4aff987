"""Ownership: one process owns work, another takes it over, and commands reach both."""

import asyncio
from pathlib import Path

from streamlab import Ownership, Retention
from streamlab.events.channel import Events, open_log

COMMANDS = Retention(events=10, seconds=60)


async def test_work_is_taken_over_when_its_owner_releases_its_lease(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/events.db"
    first, second = Events(open_log(url)), Events(open_log(url))
    async with first.opened(), second.opened():
        owner, heir = Ownership(first, "work", COMMANDS), Ownership(second, "work", COMMANDS)
        assert owner.lease(owner.process) == f"work/{owner.process}" != heir.lease(heir.process)
        begun, taken = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            begun.set()
            await asyncio.Event().wait()

        async def take() -> None:
            taken.set()

        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            holding = group.create_task(owner.hold(work))
            await begun.wait()
            group.create_task(heir.take_over(owner.process, take))
            await asyncio.sleep(0.05)
            assert not taken.is_set()
            holding.cancel()
            await taken.wait()


async def test_stored_commands_are_followed_by_new_ones_without_a_gap() -> None:
    events = Events(open_log("sqlite://"))
    async with events.opened():
        ownership = Ownership(events, "work", COMMANDS)
        await ownership.send({"cancel": "1"})
        assert [command async for command in ownership.stored_commands()] == [{"cancel": "1"}]
        await ownership.send({"cancel": "2"})
        async with asyncio.timeout(5):
            async for command in ownership.commands():
                assert command == {"cancel": "2"}
                break
