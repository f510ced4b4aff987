"""The hub by itself: what may change in a turn of the event loop during a flush."""

import asyncio
from typing import Any

import pytest

from streamlab.events import hub
from streamlab.events.channel import Events, open_log
from streamlab.events.hub import Follower, Hub
from streamlab.events.log import Event, Position
from streamlab.events.views import EVERYTHING, Filters


class RecordingStream:
    """The stream of a follower, as the hub sees it: records the bytes written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def attach_writer(self) -> tuple["RecordingStream", bool]:
        return self, False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def note_first_byte(self) -> None:
        """Do nothing."""


async def test_a_follower_that_rejoins_during_a_flush_gets_no_event_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "TURN_SECONDS", 0.0)  # a turn for the others after each slice
    before, after = Position(1, 1), Position(1, 2)
    one = Hub("c", before, "", Filters())
    streams = [RecordingStream() for _ in range(3 * hub.SLICE)]
    followers = [Follower(stream, EVERYTHING, before) for stream in streams]  # type: ignore[arg-type]
    released: list[Any] = [one.join(follower) for follower in followers]

    async def come_back(number: int) -> None:
        """Do what its task does: read the missing events from the log, and join the hub at its position."""
        await released[number]
        one.leave(followers[number])
        streams[number].written.append(b"from the log")
        followers[number].position = one.position
        one.join(followers[number])

    async with asyncio.TaskGroup() as group:
        running = group.create_task(one.run())
        tasks = [group.create_task(come_back(number)) for number in range(len(streams))]
        await asyncio.sleep(0)
        one.deliver([Event(after, 0, b"1", "", "")])
        for follower in followers:
            follower.fall_behind()
        await asyncio.wait(tasks)
        await one.wait_for_capacity()
        running.cancel()
    assert {tuple(stream.written) for stream in streams} == {(b"from the log",)}


def event(offset: int) -> Event:
    return Event(Position(1, offset), 0, b"x", "", "")


async def test_who_waits_for_news_gets_those_that_directly_follow() -> None:
    one = Hub("c", Position(1, 1), "", Filters())
    async with asyncio.TaskGroup() as group:
        running = group.create_task(one.run())
        waiting = [group.create_task(one.wait_past(Position(1, offset))) for offset in (0, 1, 2)]
        await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [True, False, False]
        one.deliver([event(2)])
        assert await waiting[0] == ()  # it missed one
        assert await waiting[1] == [event(2)]
        one.deliver([event(3), event(4)])
        assert await waiting[2] == [event(3), event(4)]
        assert await one.wait_past(Position(1, 3)) == ()
        lost = group.create_task(one.wait_past(Position(1, 4)))
        await asyncio.sleep(0)
        one.deliver([event(7)])  # 5 and 6 were deleted
        assert await lost == ()
        running.cancel()


async def test_a_source_waits_until_its_channel_is_followed() -> None:
    events = Events(open_log("sqlite://"))
    channel, other = events.channel("c"), events.channel("other")
    one, two = (Follower(RecordingStream(), EVERYTHING, Position(1, 1)) for _ in range(2))  # type: ignore[arg-type]
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await channel.wait_until_followed(0.01)
        waiting = [group.create_task(each.wait_until_followed(3600)) for each in (channel, other)]
        await asyncio.sleep(0)
        events.add_follower("c", one)
        await waiting[0]
        events.add_follower("c", two)
        events.remove_follower("c", one)
        await channel.wait_until_followed(3600)
        events.remove_follower("c", two)
        again = group.create_task(channel.wait_until_followed(3600))
        await asyncio.sleep(0.01)
        assert [again.done(), waiting[1].done()] == [False, False]
        events.add_follower("other", one)
        await waiting[1]
        again.cancel()
