"""The hub by itself: what may change in a turn of the event loop during a flush."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from streamlab.events import hub
from streamlab.events.channel import Events, open_log
from streamlab.events.hub import Follower, Hub
from streamlab.events.log import END, Event, Position
from streamlab.events.views import EVERYTHING, Filters, View


class RecordingStream:
    """The stream of a follower, as the hub sees it: records the bytes written."""

    def __init__(self, on_write: Callable[[], None] = lambda: None) -> None:
        self.written: list[bytes] = []
        self.on_write = on_write
        self.begun = 0

    def attach_writer(self) -> tuple["RecordingStream", bool]:
        return self, False

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self.on_write()

    def note_first_byte(self) -> None:
        self.begun += 1


@asynccontextmanager
async def running(one: Hub) -> AsyncIterator[None]:
    """Run a hub while the block runs."""
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        task = group.create_task(one.run())
        yield
        task.cancel()


async def push(one: Hub, *events: Event) -> None:
    """Deliver events, and wait until all followers have them."""
    one.deliver(events)
    await one._idle.wait()


def joined(one: Hub, stream: RecordingStream, view: View = EVERYTHING, limit: int | None = None) -> Follower:
    follower = Follower(stream, view, one.position, limit)  # type: ignore[arg-type]
    one.join(follower)
    return follower


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
            follower.stop_writing()
        await asyncio.wait(tasks)
        await one.wait_for_capacity()
        running.cancel()
    assert {tuple(stream.written) for stream in streams} == {(b"from the log",)}


def event(offset: int) -> Event:
    return Event(Position(1, offset), 0, b"x", "", "")


async def test_every_follower_is_at_what_it_was_sent_however_it_is_released() -> None:
    one, frame = Hub("c", Position(1, 1), "", Filters()), len(b"id: 1-2\ndata: x\n\n")
    streams = [RecordingStream() for _ in range(2 * hub.SLICE)]
    followers = [joined(one, stream) for stream in streams]
    limited = joined(one, RecordingStream(), limit=2)
    other, slow, gone = followers[4], followers[5], followers[40]
    streams[5].on_write = slow.stop_writing  # it falls behind within the write of an event
    async with running(one):
        gone.stop_writing()
        await push(one, event(2))
        assert [follower.position.offset for follower in (*followers[:7], gone, limited)] == [2] * 7 + [1, 2]
        assert [len(stream.written) for stream in (*streams[:7], streams[40])] == [1] * 7 + [0]
        assert [follower.live for follower in (slow, gone, limited, other)] == [False, False, True, True]
        late = joined(one, RecordingStream())
        await push(one, event(3))
        assert [follower.position.offset for follower in (slow, gone, limited, late, other)] == [2, 1, 3, 3, 3]
        sent = [follower.bytes_written // frame for follower in (slow, gone, limited, late, other)]
        assert sent == [1, 0, 2, 1, 2]
        assert [limited.live, limited.released and limited.released.result()] == [False, True]
        assert [stream.begun for stream in (streams[5], streams[40], streams[4])] == [1, 0, 1]
        one.leave(other)
        one.join(slow)  # the log had the rest
        await push(one, event(4))
        assert [other.position.offset, slow.position.offset] == [3, 4]
        assert [other.bytes_written, slow.bytes_written] == [2 * frame, 2 * frame]


async def test_the_end_of_a_channel_is_the_last_thing_for_all_its_followers() -> None:
    one = Hub("c", Position(1, 1), "", Filters())
    streams = [RecordingStream() for _ in range(3)]
    followers = [joined(one, stream) for stream in streams]
    streams[1].on_write = followers[1].stop_writing  # its task has only to wait until it is sent
    async with running(one):
        await push(one, Event(Position(1, 2), 0, b"x", END, ""))
    for follower, stream in zip(followers, streams, strict=True):
        assert (len(stream.written), follower.position, follower.live) == (1, Position(1, 2), False)
        assert follower.released is not None
        assert follower.released.result() is True


async def test_a_follower_that_disconnects_during_a_flush_is_sent_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TURN_SECONDS", 0.0)  # a turn for the others after each slice
    one = Hub("c", Position(1, 1), "", Filters())
    streams = [RecordingStream() for _ in range(3 * hub.SLICE)]
    followers = [joined(one, stream) for stream in streams]
    async with running(one):
        one.deliver([event(2)])
        while not any(stream.written for stream in streams):
            await asyncio.sleep(0)
        served = [bool(stream.written) for stream in streams]
        assert 0 < sum(served) < len(streams)
        first, last = served.index(True), served.index(False)
        one.leave(followers[first])
        one.leave(followers[last])
        new = joined(one, RecordingStream())
        await one._idle.wait()
    assert [followers[first].position.offset, followers[last].position.offset, new.position.offset] == [2, 1, 2]
    assert [len(streams[first].written), len(streams[last].written), new.bytes_written] == [1, 0, 0]
    assert {len(stream.written) for stream in streams} == {0, 1}
    assert [len(stream.written) for stream in streams].count(0) == 1


async def test_who_joins_while_a_filter_is_behind_gets_no_event_twice() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def accepts(event: Event) -> bool:
        begun.set()
        return go_on.wait(20)

    view = View(accepts=accepts)
    async with asyncio.timeout(20), Filters() as filters:
        one = Hub("c", Position(1, 1), "", filters)
        early = joined(one, stream := RecordingStream(), view)
        async with running(one):
            one.deliver([event(2)])
            while not begun.is_set():
                await asyncio.sleep(0)
            one.deliver([event(3)])
            while one.position < Position(1, 3):
                await asyncio.sleep(0)
            new = joined(one, late := RecordingStream(), view)  # it has 3 from the log
            one.deliver([event(4)])
            while one.position < Position(1, 4):
                await asyncio.sleep(0)
            go_on.set()
            while early.position < Position(1, 4):
                await asyncio.sleep(0)
        assert [b"".join(each.written).count(b"data: ") for each in (stream, late)] == [3, 1]
        assert late.written == [b"id: 1-4\ndata: x\n\n"]
        assert new.position == Position(1, 4)


async def test_a_follower_is_past_the_events_that_its_view_excludes() -> None:
    one = Hub("c", Position(1, 1), "", Filters())
    follower = joined(one, RecordingStream(), View(keys=["other"]))
    async with running(one):
        await push(one, event(2))
    assert [follower.position, follower.bytes_written] == [Position(1, 2), 0]


class Beating(RecordingStream):
    """A stream with a transport, whose heartbeat is more than the kernel takes."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self.transport = transport

    def attach_writer(self) -> Any:
        return self.transport, False

    def beat(self) -> None:
        self.transport.write(b":" * 2_000_000 + b"\n")


async def test_no_event_overtakes_a_heartbeat() -> None:
    loop, (server, client) = asyncio.get_running_loop(), socket.socketpair()
    one, received = Hub("c", Position(1, 1), "", Filters()), b""
    with client:
        client.setblocking(False)
        transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, server)
        follower = joined(one, Beating(transport))
        async with running(one):
            follower.beat()
            assert transport.get_write_buffer_size() > 0
            one.deliver([event(2)])
            received += client.recv(4_000_000)  # the kernel has room again, and the transport does not know
            while b"data: x\n\n" not in received:
                received += await loop.sock_recv(client, 4_000_000)
        transport.abort()
    assert received == b":" * 2_000_000 + b"\nid: 1-2\ndata: x\n\n"


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
