"""The contract of every engine of the event log: one suite, run on each of them."""

import asyncio
import os
import select
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from streamlab.events import sqlite as eventlog_sqlite
from streamlab.events.append_queue import PENDING_BYTES
from streamlab.events.channel import open_log
from streamlab.events.log import (
    LATEST,
    ORIGIN,
    Append,
    Batch,
    Conflict,
    Copy,
    EncodedEvent,
    Event,
    EventLog,
    EventLogError,
    LeaseLost,
    Position,
    Retention,
)
from streamlab.events.wakes import Wakes
from tests.support.valkey import Valkey

KEEP = Retention(1000, 3600)


@pytest.fixture(params=["memory", "sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return "sqlite://"
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'events.db'}"
    valkey: Valkey = request.getfixturevalue("valkey")
    return valkey.url


@pytest.fixture
def shared(url: str) -> str:
    """Return the URL of an engine that several processes share."""
    if url == "sqlite://":
        pytest.skip("memory is not shared between processes")
    return url


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[EventLog]:
    log = open_log(url)
    async with log.opened():
        yield log


def texts(events: Sequence[Event]) -> list[str]:
    return [event.data.decode() for event in events]


async def publish(log: EventLog, *data: str, channel: str = "c", keep: Retention = KEEP) -> Position:
    return await log.append(Append(channel, [EncodedEvent(text.encode()) for text in data], keep))


class Watcher:
    """Collects what a watch delivers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()

    def __call__(self, events: Sequence[Event]) -> None:
        self.events += events
        self._news.set()

    async def until(self, count: int) -> list[Event]:
        async with asyncio.timeout(40):
            while len(self.events) < count:
                self._news.clear()
                await self._news.wait()
        return self.events


# -- appending and reading


async def test_offsets_are_consecutive_from_1_and_the_epoch_stays(url: str) -> None:
    async with opened(url) as log:
        first = await publish(log, "a")
        last = await publish(log, "b", "c")
        assert (first.offset, last) == (1, Position(first.epoch, 3))
        batch = await log.read("c", ORIGIN, 10)
        assert [event.position for event in batch.events] == [Position(first.epoch, offset) for offset in (1, 2, 3)]
        assert texts(batch.events) == ["a", "b", "c"]
        assert batch.last == last


async def test_an_event_is_read_as_it_was_appended(url: str) -> None:
    data = b'\x00 {"a": "\xe2\x82\xac\\n"}\r\n' + bytes(range(1, 255))
    async with opened(url) as log:
        before = time.time() * 1000
        await log.append(Append("c", [EncodedEvent(data, "näme", "ke y"), EncodedEvent(b"")], KEEP))
        first, second = (await log.read("c", ORIGIN, 10)).events
        assert (first.data, first.event, first.key) == (data, "näme", "ke y")
        assert (second.data, second.event, second.key) == (b"", "", "")
        assert before - 1 <= first.time <= time.time() * 1000 + 1


async def test_reading_begins_after_a_position_and_ends_at_the_limit(url: str) -> None:
    async with opened(url) as log:
        last = await publish(log, *"abcdef")
        assert texts((await log.read("c", last._replace(offset=2), 3)).events) == ["c", "d", "e"]
        assert (await log.read("c", last, 3)).events == []
        assert (await log.read("c", LATEST, 1)).last == last


async def test_a_channel_without_events_is_empty(url: str) -> None:
    async with opened(url) as log:
        events, last, _ = await log.read("nothing", ORIGIN, 10)
        assert (list(events), last) == ([], ORIGIN)


async def test_channels_do_not_mix(url: str) -> None:
    names = ("a", "b/é {x}")
    async with opened(url) as log:
        await asyncio.gather(*(publish(log, f"{name}{n}", channel=name) for n in range(20) for name in names))
        for name in names:
            batch = await log.read(name, ORIGIN, 100)
            assert texts(batch.events) == [f"{name}{n}" for n in range(20)]
            assert batch.last.offset == 20


async def test_each_of_many_appends_at_once_gets_the_position_of_its_last_event(url: str) -> None:
    """Some expect what is so, some what is not, some change it; an engine may apply those that are alike as one."""
    appends = []
    for number in range(60):
        expected = {"state": None if number < 40 else "changed"} if number % 7 else {"state": "wrong"}
        drafts = [EncodedEvent(f"{number}.{part}".encode()) for part in range(1 + number % 3)]
        checkpoints = {"state": "changed"} if number == 39 else {}
        channel = "other" if number in (20, 21) else "c"
        appends.append(Append(channel, drafts, KEEP, checkpoints, expected, {"total": number}))
    async with opened(url) as log:
        await log.append(Append("other", (), KEEP))
        await log.append(Append("c", (), KEEP))
        results = await asyncio.gather(*(log.append(append) for append in appends), return_exceptions=True)
        assert {number for number, result in enumerate(results) if isinstance(result, Conflict)} == set(range(0, 60, 7))
        for channel in ("c", "other"):
            stored = [
                (append, result)
                for append, result in zip(appends, results, strict=True)
                if append.channel == channel and isinstance(result, Position)
            ]
            batch = await log.read(channel, ORIGIN, 1000, names=["total"])
            assert [event.data for event in batch.events] == [
                draft.data for append, _ in stored for draft in append.drafts
            ]
            last_of = {event.position: event.data for event in batch.events}
            assert [last_of[result] for _, result in stored] == [append.drafts[-1].data for append, _ in stored]
            assert batch.checkpoints["total"] == str(sum(append.counts["total"] for append, _ in stored))


async def test_events_survive_a_restart(url: str, shared: str) -> None:
    async with opened(shared) as log:
        last = await publish(log, "a", "b")
    async with opened(shared) as log:
        assert (await publish(log, "c")) == last._replace(offset=3)
        assert texts((await log.read("c", ORIGIN, 10)).events) == ["a", "b", "c"]


async def test_appends_beyond_the_queue_are_rejected_and_the_others_stored(url: str) -> None:
    async with opened(url) as log:
        half = "x" * (PENDING_BYTES // 2)
        results = await asyncio.gather(*(publish(log, half) for _ in range(3)), return_exceptions=True)
        rejected = [result for result in results if isinstance(result, EventLogError)]
        assert len(rejected) in (1, 2)
        assert (await log.read("c", LATEST, 1)).last.offset == 3 - len(rejected)


async def test_a_cancelled_publisher_cancels_no_other(url: str) -> None:
    async with opened(url) as log:
        async with asyncio.TaskGroup() as group:
            leaving = group.create_task(publish(log, "a"))
            staying = group.create_task(publish(log, "b"))
            await asyncio.sleep(0)
            leaving.cancel()
        assert staying.result().offset in (1, 2)


# -- checkpoints


async def test_a_checkpoint_is_stored_with_its_events(url: str) -> None:
    async with opened(url) as log:
        assert await log.checkpoint("c", "file") is None
        await log.append(Append("c", [EncodedEvent(b"a")], KEEP, {"file": "10"}))
        await log.append(Append("c", [EncodedEvent(b"b")], KEEP, {"file": "20"}))
        await log.append(Append("c", [EncodedEvent(b"c")], KEEP, {"other": "é"}))
        assert [await log.checkpoint("c", name) for name in ("file", "other")] == ["20", "é"]
        assert await log.checkpoint("d", "file") is None


async def test_a_checkpoint_can_be_stored_alone(url: str) -> None:
    async with opened(url) as log:
        watcher = Watcher()
        log.watch("c", ORIGIN, watcher)
        await log.append(Append("c", [], KEEP, {"file": "0"}))
        assert await log.checkpoint("c", "file") == "0"
        last = await publish(log, "a")
        await log.append(Append("c", [], KEEP, {"file": "1"}))
        assert [await log.checkpoint("c", "file"), (await publish(log, "b")).offset] == ["1", last.offset + 1]
        assert texts(await watcher.until(2)) == ["a", "b"]


# -- operations for streams of several writers


async def test_an_append_that_expects_another_checkpoint_stores_nothing(url: str) -> None:
    async with opened(url) as log:
        first = Append("c", [EncodedEvent(b"a")], KEEP, {"seq": "1", "open": "é"}, {"seq": None})
        last = await log.append(first)
        with pytest.raises(Conflict) as again:
            await log.append(first)
        assert again.value.found == {"seq": "1"}
        with pytest.raises(Conflict) as wrong:
            await log.append(
                Append("c", [EncodedEvent(b"b")], KEEP, {"seq": "2"}, {"open": "é", "none": "", "seq": "1"})
            )
        assert wrong.value.found == {"open": "é", "none": None, "seq": "1"}
        assert await log.append(Append("c", [EncodedEvent(b"c")], KEEP, {"seq": "2"}, {"seq": "1"})) == (last[0], 2)
        batch = await log.read("c", ORIGIN, 10, names=("seq", "none", "open"))
        assert (texts(batch.events), batch.checkpoints) == (["a", "c"], {"seq": "2", "open": "é"})


async def test_one_of_many_that_expect_the_same_is_stored(url: str, shared: str) -> None:
    async def claim(log: EventLog, name: str) -> bool:
        try:
            await log.append(Append("c", [EncodedEvent(name.encode())], KEEP, {"owner": name}, {"owner": None}))
        except Conflict:
            return False
        return True

    async with opened(shared) as one, opened(shared) as two:
        await publish(one, "first")
        both = [claim(log, f"{number}") for number in range(20) for log in (one, two)]
        assert sum(await asyncio.gather(*both)) == 1
        batch = await one.read("c", ORIGIN, 100, names=("owner",))
        assert texts(batch.events) == ["first", batch.checkpoints["owner"]]


async def test_counts_of_concurrent_appends_add_up(url: str) -> None:
    async with opened(url) as log:
        appends = (log.append(Append("c", [], KEEP, counts={"bytes": number, "all": -1})) for number in range(50))
        await asyncio.gather(*appends)
        assert (await log.read("c", LATEST, 1, names=("bytes", "all"))).checkpoints == {"bytes": "1225", "all": "-50"}


async def test_a_checkpoint_may_say_where_its_events_are_and_be_deleted(url: str) -> None:
    async with opened(url) as log:
        drafts = [EncodedEvent(b"a"), EncodedEvent(b"b")]
        last = await log.append(Append("c", drafts, KEEP, {"at": "two é", "other": "x"}, located="at"))
        batch = await log.read("c", LATEST, 1, names=("at", "other"))
        assert batch.checkpoints == {"at": f"{last} two é", "other": "x"}
        await log.append(Append("c", [], KEEP, {"other": None, "none": None}, {"other": "x"}))
        assert (await log.read("c", LATEST, 1, names=("at", "other"))).checkpoints == {"at": f"{last} two é"}


async def test_an_empty_channel_exists_at_offset_0_of_its_epoch(url: str) -> None:
    async with opened(url) as log:
        begun = await log.append(Append("c", [], KEEP, {"closed": "true"}))
        assert (begun.offset, await log.append(Append("c", [], KEEP, {"closed": "no"}))) == (0, begun)
        batch = await log.read("c", begun, 10, names=["closed"])
        assert (list(batch.events), batch.last, batch.checkpoints) == ([], begun, {"closed": "no"})
        watcher = Watcher()
        log.watch("c", begun, watcher)
        assert await publish(log, "a") == (begun.epoch, 1)
        assert texts(await watcher.until(1)) == ["a"]


async def test_a_copy_has_the_positions_of_its_source_and_goes_on_in_a_later_epoch(url: str) -> None:
    async with opened(url) as log:
        last = await publish(log, *"abc")
        await log.append(Append("c", [EncodedEvent(b"", "end")], KEEP))
        until = last._replace(offset=2)
        own = await log.append(
            Append("fork", [EncodedEvent(b"X")], KEEP, {"from": "c"}, {"from": None}, copy=Copy("c", until))
        )
        assert own.epoch > last.epoch
        assert own.offset == 1
        await publish(log, "d")
        await publish(log, "Y", channel="fork")
        whole = await log.append(Append("whole", [], KEEP, copy=Copy("c", last._replace(offset=4))))
        empty = await log.append(Append("empty", [], KEEP, copy=Copy("c", ORIGIN)))
        assert (whole.offset, empty.offset) == (0, 0)
        fork = await log.read("fork", ORIGIN, 10)
        assert [(event.position, event.data) for event in fork.events] == [
            (last._replace(offset=1), b"a"),
            (until, b"b"),
            (own, b"X"),
            (own._replace(offset=2), b"Y"),
        ]
        assert (await log.read("fork", until, 10)).events[0].position == own
        assert texts((await log.read("whole", ORIGIN, 10)).events) == ["a", "b", "c"]
        assert (await log.read("whole", ORIGIN, 10)).last == whole
        assert (await log.read("empty", ORIGIN, 10))[:2] == ([], empty)


async def test_what_does_not_exist_is_not_copied_and_nothing_is_copied_onto_a_channel(url: str) -> None:
    async with opened(url) as log:
        with pytest.raises(Conflict):
            await log.append(Append("fork", [EncodedEvent(b"X")], KEEP, copy=Copy("none", LATEST)))
        last = await publish(log, "a")
        await publish(log, "b", channel="fork")
        with pytest.raises(Conflict):
            await log.append(Append("fork", [EncodedEvent(b"X")], KEEP, copy=Copy("c", last)))
        assert texts((await log.read("fork", ORIGIN, 10)).events) == ["b"]


async def test_a_channel_expires_at_a_time_or_when_nobody_extends_it(url: str) -> None:
    async def missing(log: EventLog, channel: str) -> None:
        async with asyncio.timeout(20):
            while (await log.read(channel, ORIGIN, 1, names=["a"])).checkpoints:
                await asyncio.sleep(0.02)
        assert await log.checkpoint(channel, "a") is None
        assert channel not in await log.checkpoints(channel, "a")

    async with opened(url) as log:
        now, idle = time.time(), Retention(1000, 3600, idle_seconds=0.3)
        first = await log.append(Append("at", [EncodedEvent(b"x")], Retention(1000, 3600, None, now + 0.3), {"a": "1"}))
        for channel in ("idle", "extended"):
            await log.append(Append(channel, [EncodedEvent(b"x")], idle, {"a": "1"}))
        await log.extend("extended", 600)
        await log.extend("none", 600)
        for channel in ("at", "idle"):
            await missing(log, channel)
        assert time.time() >= now + 0.3
        assert (await log.append(Append("at", [], KEEP, {"a": "2"}, {"a": None}))).epoch > first.epoch
        assert (await log.read("extended", ORIGIN, 1, names=["a"])).checkpoints == {"a": "1"}


# -- watching


async def test_a_watch_delivers_new_events_in_order_and_once(url: str) -> None:
    async with opened(url) as log:
        first = await publish(log, "a", "b")
        watcher = Watcher()
        log.watch("c", first._replace(offset=1), watcher)
        await asyncio.gather(*(publish(log, f"{n}") for n in range(100)))
        events = await watcher.until(101)
        assert [event.position.offset for event in events] == list(range(2, 103))
        assert texts(events)[0] == "b"
        assert sorted(texts(events)[1:], key=int) == [str(n) for n in range(100)]


async def test_a_watch_from_the_origin_sees_the_first_event_of_a_new_channel(url: str) -> None:
    async with opened(url) as log:
        watcher = Watcher()
        log.watch("c", ORIGIN, watcher)
        last = await publish(log, "a")
        assert [event.position for event in await watcher.until(1)] == [last]


async def test_a_watch_that_begins_while_another_waits_is_served(url: str) -> None:
    async with opened(url) as log:
        first, second = Watcher(), Watcher()
        log.watch("a", ORIGIN, first)
        await publish(log, "1", channel="a")
        await first.until(1)
        log.watch("b", ORIGIN, second)
        async with asyncio.timeout(1.5):  # sooner than a blocking read ends by itself
            await publish(log, "2", channel="b")
            await second.until(1)


async def test_a_watch_that_has_ended_gets_nothing_more(url: str) -> None:
    async with opened(url) as log:
        ended, watcher = Watcher(), Watcher()
        log.watch("a", ORIGIN, ended)
        log.watch("b", ORIGIN, watcher)
        await publish(log, "1", channel="a")
        await ended.until(1)
        log.unwatch("a")
        await publish(log, "2", channel="a")
        await publish(log, "3", channel="b")
        await watcher.until(1)
        assert texts(ended.events) == ["1"]


async def test_two_processes_publish_and_both_see_everything_in_one_order(shared: str) -> None:
    async with opened(shared) as one, opened(shared) as two:
        watchers = Watcher(), Watcher()
        for log, watcher in zip((one, two), watchers, strict=True):
            log.watch("c", ORIGIN, watcher)
        await asyncio.gather(*(publish(log, f"{n}") for n in range(200) for log in (one, two)))
        seen = [await watcher.until(400) for watcher in watchers]
        assert seen[0] == seen[1]
        assert [event.position.offset for event in seen[0]] == list(range(1, 401))


# -- retention


async def test_trim_retains_the_configured_number_and_positions_continue(url: str) -> None:
    async with opened(url) as log:
        last = await publish(log, *map(str, range(50)))
        await log.trim("c", Retention(10, 3600))
        batch = await log.read("c", ORIGIN, 100)
        assert texts(batch.events) == [str(n) for n in range(40, 50)]
        assert batch.last == last
        await asyncio.sleep(0.005)  # an event is older than 0 s from the next millisecond on
        await log.trim("c", Retention(10, 0))
        assert (await log.read("c", ORIGIN, 100))[:2] == ([], last)
        assert (await publish(log, "next")) == last._replace(offset=51)


async def test_trim_by_age_retains_young_events(url: str) -> None:
    async with opened(url) as log:
        await publish(log, "old", "old")
        await asyncio.sleep(0.25)
        await publish(log, "young")
        await log.trim("c", Retention(1000, 0.15))
        assert texts((await log.read("c", ORIGIN, 100)).events) == ["young"]


async def test_appending_deletes_events_beyond_the_retention(url: str) -> None:
    async with opened(url) as log:
        keep = Retention(100, 3600)
        for _ in range(40):
            await publish(log, *map(str, range(25)), keep=keep)
        events = (await log.read("c", ORIGIN, 2000)).events
        assert 100 <= len(events) <= 125
        assert events[-1].position.offset == 1000


async def test_a_channel_that_is_deleted_leaves_nothing_and_begins_a_new_epoch(url: str) -> None:
    async with opened(url) as log:
        last = await log.append(Append("c", [EncodedEvent(b"a")], KEEP, {"file": "10"}))
        await log.delete("c")
        assert (await log.read("c", ORIGIN, 10))[:2] == ([] if "sqlite" not in url else (), ORIGIN)
        assert await log.checkpoint("c", "file") is None
        again = await publish(log, "b")
        assert (again.epoch > last.epoch, again.offset) == (True, 1)
        assert texts((await log.read("c", last, 10)).events) == ["b"]


async def test_a_channel_that_is_idle_for_too_long_is_deleted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventlog_sqlite, "HOUSEKEEPING_SECONDS", 0.02)
    async with opened(url) as log:
        first = await publish(log, "a", keep=Retention(100, 3600, idle_seconds=0.1))
        await publish(log, "b", channel="d")
        async with asyncio.timeout(10):
            while (await log.read("c", ORIGIN, 1)).last != ORIGIN:
                await asyncio.sleep(0.02)
        assert texts((await log.read("d", ORIGIN, 1)).events) == ["b"]
        assert (await publish(log, "c")).epoch > first.epoch


# -- checkpoints of many channels


async def test_checkpoints_are_found_by_the_prefix_of_their_channels(url: str) -> None:
    async with opened(url) as log:
        for channel in ("task/a", "task/b", "task", "tasks/c", "ta*/d"):
            await log.append(Append(channel, [EncodedEvent(b"x")], KEEP, {"state": f"of {channel}"}))
        await log.append(Append("task/e", [EncodedEvent(b"x")], KEEP, {"other": "text"}))
        assert dict(await log.checkpoints("task/", "state")) == {"task/a": "of task/a", "task/b": "of task/b"}
        assert dict(await log.checkpoints("ta*/", "state")) == {"ta*/d": "of ta*/d"}
        assert dict(await log.checkpoints("none/", "state")) == {}


async def test_checkpoints_of_many_channels_are_all_found(url: str) -> None:
    async with opened(url) as log:
        async with asyncio.TaskGroup() as group:
            for number in range(2500):
                append = Append(f"task/{number}", [], KEEP, {"state": str(number)})
                group.create_task(log.append(append))
        found = await log.checkpoints("task/", "state")
        assert found == {f"task/{number}": str(number) for number in range(2500)}


# -- leases


async def test_a_lease_has_one_holder_and_moves_when_it_is_released(shared: str) -> None:
    async with opened(shared) as one, opened(shared) as two:
        assert [await one.hold("l"), await one.hold("l"), await two.hold("l")] == [True, True, False]
        assert await two.hold("another/ü")
        await one.append(Append("c", [EncodedEvent(b"a")], KEEP, lease="l"))
        with pytest.raises(LeaseLost):
            await two.append(Append("c", [EncodedEvent(b"b")], KEEP, lease="l"))
        assert texts((await two.read("c", ORIGIN, 10)).events) == ["a"]
        await two.release("l")  # releasing a lease of another process has no effect
        assert not await two.hold("l")
        await one.release("l")
        assert [await two.hold("l"), await one.hold("l")] == [True, False]


# -- tests of one engine


async def test_sqlite_begins_new_epochs_when_the_machine_stopped_while_the_file_was_open(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with opened(f"sqlite:///{path}") as log:
        old = await publish(log, "a")
    async with opened(f"sqlite:///{path}") as log:
        assert (await publish(log, "b")).epoch == old.epoch
    with sqlite3.connect(path) as database:  # as after a power failure
        database.execute("UPDATE meta SET value = 'another boot' WHERE name = 'boot'")
        database.execute("UPDATE meta SET value = '1' WHERE name = 'open'")
    database.close()
    async with opened(f"sqlite:///{path}") as log:
        new = await publish(log, "c")
        assert (new.epoch > old.epoch, new.offset) == (True, 1)
        assert texts((await log.read("c", ORIGIN, 10)).events) == ["a", "b", "c"]


async def test_sqlite_retains_epochs_when_the_machine_was_restarted_after_a_clean_end(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    async with opened(f"sqlite:///{path}") as log:
        old = await publish(log, "a")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = 'another boot' WHERE name = 'boot'")
    database.close()
    async with opened(f"sqlite:///{path}") as log:
        assert (await publish(log, "b")).epoch == old.epoch


async def test_sqlite_names_the_file_in_which_it_cannot_store_events(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    hint = r"\(`url` of \[events\] names the file; sqlite:// is memory\)"
    names = rf"cannot store events there: {tmp_path}/file/events\.db: .+ {hint}"
    with pytest.raises(EventLogError, match=names):
        async with opened(f"sqlite:///{tmp_path}/file/events.db"):
            pass
    (tmp_path / "rubbish.db").write_text("not a database " * 100)
    with pytest.raises(EventLogError, match="not a database"):
        async with opened(f"sqlite:///{tmp_path}/rubbish.db"):
            pass


FILES = {"all files": ("", "-wal", "-shm"), "the log": ("-wal",), "the database": ("",), "the index": ("-shm",)}


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_sqlite_uses_no_thread_while_nobody_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventlog_sqlite, "CERTAIN_SECONDS", 3600)
    monkeypatch.setattr(eventlog_sqlite, "HOUSEKEEPING_SECONDS", 3600)
    found: list[bool] = []
    may_have_changed = eventlog_sqlite.SqliteLog._may_have_changed

    def recorded(log: eventlog_sqlite.SqliteLog, now: float) -> bool:
        found.append(may_have_changed(log, now))
        return found[-1]

    monkeypatch.setattr(eventlog_sqlite.SqliteLog, "_may_have_changed", recorded)
    monkeypatch.setattr(Wakes, "ensure", lambda self: None)  # as where there are no named pipes
    url, watcher = f"sqlite:///{tmp_path / 'events.db'}", Watcher()
    async with opened(url) as one, opened(url) as two:
        one.watch("c", ORIGIN, watcher)
        for text in "abc":
            await publish(two, text)
            assert texts(await watcher.until(ord(text) - ord("a") + 1))[-1] == text
            await until(lambda: len(found) > 20 and not any(found[-20:]))


def test_a_process_that_begins_in_the_same_tick_as_another_is_woken_as_well(tmp_path: Path) -> None:
    publisher, follower = Wakes(tmp_path), Wakes(tmp_path)
    try:
        publisher.ensure()
        publisher.notify()
        before = tmp_path.stat()
        follower.ensure()
        os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns))
        publisher.notify()
        assert follower.descriptor is not None
        assert os.read(follower.descriptor, 2) == b"\0"
    finally:
        publisher.close()
        follower.close()


async def test_sqlite_is_woken_by_the_commit_of_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOOK_SECONDS", "CERTAIN_SECONDS", "HOUSEKEEPING_SECONDS"):
        monkeypatch.setattr(eventlog_sqlite, name, 3600)
    url, watcher = f"sqlite:///{tmp_path / 'events.db'}", Watcher()
    folder = tmp_path / "events.db-wakes"
    async with opened(url) as one, opened(url) as two:
        one.watch("c", ORIGIN, watcher)
        await until(lambda: folder.exists() and len(list(folder.iterdir())) == 1)
        os.mkfifo(folder / "dead")  # of a process that was killed
        for number, text in enumerate("abc", 1):
            await publish(two, text)
            assert texts(await watcher.until(number))[-1] == text
        assert not (folder / "dead").exists()
        monkeypatch.setattr(eventlog_sqlite, "CERTAIN_SECONDS", 0.05)
        shutil.rmtree(folder)
        await publish(two, "unnoticed")
        assert isinstance(one, eventlog_sqlite.SqliteLog)
        one._behind.set()  # as it is after a second
        await watcher.until(4)
        await until(lambda: folder.exists() and len(list(folder.iterdir())) == 1)
    assert not folder.exists()


async def test_sqlite_gets_events_of_another_process_without_reading_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOOK_SECONDS", "CERTAIN_SECONDS", "HOUSEKEEPING_SECONDS"):
        monkeypatch.setattr(eventlog_sqlite, name, 3600)
    url, watcher, reads = f"sqlite:///{tmp_path / 'events.db'}", Watcher(), list[Position]()
    read = eventlog_sqlite.SqliteLog._read

    def recorded(log: eventlog_sqlite.SqliteLog, channel: str, after: Position, *others: Any) -> Batch:
        reads.append(after)
        return read(log, channel, after, *others)

    monkeypatch.setattr(eventlog_sqlite.SqliteLog, "_read", recorded)
    async with opened(url) as one, opened(url) as two:
        assert isinstance(one, eventlog_sqlite.SqliteLog)
        assert isinstance(two, eventlog_sqlite.SqliteLog)
        one.watch("c", ORIGIN, watcher)
        await until(lambda: one._pipe is not None and len(reads) == 1)
        small = await publish(two, "a", "\N{SNOWMAN}")
        await watcher.until(2)
        await publish(two, "of another channel", channel="d")
        assert len(reads) == 1
        await publish(two, "b" * select.PIPE_BUF)  # more than is sent
        await watcher.until(3)
        assert small in reads
        with monkeypatch.context() as patch:
            patch.setattr(Wakes, "notify", lambda *_: None)  # as with a pipe that is full
            await publish(two, "lost")
        await publish(two, "c")
        await watcher.until(5)
        assert (await two.read("c", ORIGIN, 10)).events == watcher.events
        count = len(reads)
        await publish(two, "d")
        assert texts(await watcher.until(6))[-1] == "d"
        assert len(reads) == count


async def test_sqlite_reads_the_file_where_what_was_sent_may_be_incomplete(tmp_path: Path) -> None:
    url, watcher = f"sqlite:///{tmp_path / 'events.db'}", Watcher()
    async with opened(url) as one, opened(url) as two:
        assert isinstance(one, eventlog_sqlite.SqliteLog)
        one.watch("c", ORIGIN, watcher)
        await until(lambda: one._pipe is not None)
        for number, sent in enumerate((b"\0", b"\1\0\2\xc1\xc1", b"\1", b"\1\0\0" * 21_000), 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Wakes, "notify", lambda *_: None)
                await publish(two, f"{number}")
            (pipe,) = (tmp_path / "events.db-wakes").iterdir()
            with pipe.open("wb", buffering=0) as file:
                file.write(sent)
            await watcher.until(number)
    assert texts(watcher.events) == ["1", "2", "3", "4"]


async def test_sqlite_finds_a_commit_that_no_file_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventlog_sqlite, "CERTAIN_SECONDS", 0.05)
    monkeypatch.setattr(eventlog_sqlite, "_state", lambda file: None)
    url, watcher = f"sqlite:///{tmp_path / 'events.db'}", Watcher()
    async with opened(url) as one, opened(url) as two:
        one.watch("c", ORIGIN, watcher)
        await publish(two, "a")
        assert texts(await watcher.until(1)) == ["a"]


@pytest.mark.parametrize("what", FILES)
async def test_sqlite_files_deleted_while_in_use_lose_no_acknowledged_event(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventlog_sqlite, "HOUSEKEEPING_SECONDS", 0.05)
    url, watcher, database = f"sqlite:///{tmp_path / 'events.db'}", Watcher(), tmp_path / "events.db"
    async with opened(url) as one, opened(url) as two:
        one.watch("c", ORIGIN, watcher)
        first = await publish(one, "a")
        await publish(two, "b")
        old = database.stat().st_ino
        for suffix in FILES[what]:
            (tmp_path / f"events.db{suffix}").unlink()
        if what == "the index":
            await until(lambda: database.exists() and database.stat().st_ino != old)
        for number in range(20):
            await publish((one, two)[number % 2], f"{number}")
        events = await watcher.until(22)
        assert texts(events) == ["a", "b", *(f"{number}" for number in range(20))]
        assert [event.position for event in events] == [Position(first.epoch, n + 1) for n in range(22)]
        await until(lambda: (one.state()["state"], two.state()["state"]) == ("ok", "ok"))
    async with opened(url) as log:
        assert (await log.read("c", ORIGIN, 100)).events == events
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.db", "events.db-leases"]
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_sqlite_file_replaced_by_a_backup_begins_new_epochs(tmp_path: Path) -> None:
    database, url = tmp_path / "events.db", f"sqlite:///{tmp_path / 'events.db'}"
    async with opened(url) as log:
        await publish(log, "a")
    backup = tmp_path / "backup"
    backup.write_bytes(database.read_bytes())
    watcher = Watcher()
    async with opened(url) as one, opened(url) as two:
        two.watch("c", ORIGIN, watcher)
        old = await publish(one, "b", "c")
        await watcher.until(3)
        backup.replace(database)
        with pytest.raises(EventLogError, match="its file was replaced while this was written"):
            await publish(one, "rejected")  # no event is acknowledged into a deleted file
        new = await publish(one, "d")
        assert (new.epoch > old.epoch, new.offset) == (True, 1)
        async with asyncio.timeout(10):
            while (await two.read("c", LATEST, 1)).last != new:
                await asyncio.sleep(0.01)
        assert await publish(two, "e") == new._replace(offset=2)
        await until(lambda: "e" in texts(watcher.events))
        assert [text for text in texts(watcher.events) if text != "rejected"] == ["a", "b", "c", "d", "e"]
        assert texts((await one.read("c", ORIGIN, 10)).events) == ["a", "d", "e"]
        await until(lambda: (one.state()["state"], two.state()["state"]) == ("ok", "ok"))
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_sqlite_file_that_is_damaged_rejects_events_until_it_is_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventlog_sqlite, "HOUSEKEEPING_SECONDS", 0.05)
    database, url = tmp_path / "events.db", f"sqlite:///{tmp_path / 'events.db'}"
    async with opened(url) as log:
        watcher = Watcher()
        log.watch("c", ORIGIN, watcher)
        for _ in range(50):
            old = await publish(log, "x" * 10_000)
        await watcher.until(50)
        # The write-ahead log would repair the file when it is moved there.
        await until(lambda: database.stat().st_size > 500_000)
        dd = await asyncio.create_subprocess_exec("dd", "if=/dev/zero", f"of={database}", "count=32", "conv=notrunc")
        assert await dd.wait() == 0
        await until(lambda: log.state()["state"] == "degraded")
        assert "/" not in str(log.state()["reason"])
        with pytest.raises(EventLogError, match="the file is damaged; move it away, or a backup into its place"):
            await publish(log, "rejected")
        database.rename(tmp_path / "damaged.db")
        await until(lambda: log.state()["state"] == "ok")
        new = await publish(log, "y")
        assert (new.epoch > old.epoch, new.offset) == (True, 1)
        assert texts(await watcher.until(51))[50:] == ["y"]
        assert texts((await log.read("c", ORIGIN, 100)).events) == ["y"]


async def test_sqlite_lease_whose_file_is_deleted_is_lost_and_one_process_has_it_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'events.db'}"
    async with opened(url) as one, opened(url) as two:
        assert [await one.hold("l"), await two.hold("l")] == [True, False]
        shutil.rmtree(tmp_path / "events.db-leases")
        assert [await two.hold("l"), await one.hold("l"), await one.hold("l")] == [True, False, False]
        await one.release("l")
        assert [await two.hold("l"), await one.hold("l")] == [True, False]


async def test_sqlite_lease_without_a_file_is_an_error_of_the_log(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'events.db'}"
    (tmp_path / "events.db-leases").write_text("in the way")
    async with opened(url) as log:
        with pytest.raises(EventLogError, match="File exists"):
            await log.hold("l")
        assert log.state()["state"] == "degraded"
        (tmp_path / "events.db-leases").unlink()
        assert await log.hold("l")
        assert log.state()["state"] == "ok"


async def test_disconnected_redis_makes_publishers_and_watchers_wait_and_nothing_is_lost_or_doubled(
    valkey: Valkey,
) -> None:
    async with opened(valkey.url) as log:
        watcher = Watcher()
        log.watch("c", ORIGIN, watcher)
        await publish(log, "before")
        await watcher.until(1)
        valkey.kill()
        async with asyncio.TaskGroup() as group:
            waiting = [group.create_task(publish(log, f"{n}")) for n in range(20)]
            reading = group.create_task(log.read("c", ORIGIN, 100))
            async with asyncio.timeout(10):
                while log.state()["state"] != "disconnected":
                    await asyncio.sleep(0.01)
            assert not any(task.done() for task in (*waiting, reading))
            valkey.start()
        assert reading.result().events[0].data == b"before"
        events = await watcher.until(21)
        assert [event.position.offset for event in events] == list(range(1, 22))
        assert sorted(texts(events[1:]), key=int) == [str(n) for n in range(20)]
        assert log.state() == {"engine": "redis", "state": "ok"}


async def test_redis_killed_repeatedly_while_publishing_stores_every_event_once(valkey: Valkey) -> None:
    async with opened(valkey.url) as log:
        watcher = Watcher()
        log.watch("c", ORIGIN, watcher)

        async def publishing() -> None:
            for number in range(1500):
                await publish(log, f"{number}")

        async with asyncio.TaskGroup() as group:
            task = group.create_task(publishing())
            for count in (100, 500, 900):
                await watcher.until(count)
                await asyncio.to_thread(valkey.kill)
                await asyncio.to_thread(valkey.start)
            await task
        assert texts(await watcher.until(1500)) == [str(number) for number in range(1500)]


class Proxy:
    """A proxy of a Valkey server that breaks the connection instead of passing on the response to a request."""

    def __init__(self, valkey: Valkey) -> None:
        self._valkey = valkey
        self.path = valkey.folder / "p"
        self.lose = b"never sent"
        """Part of the request whose response is lost; no connection is accepted after that until `open` is set."""
        self._serving = 0
        self.lost = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async with await asyncio.start_unix_server(self._serve, self.path):
            yield f"unix://{self.path}?db=0"
            while self._serving:
                await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving += 1
        try:
            await self._serve_one(reader, writer)
        finally:
            self._serving -= 1

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            if not self.open.is_set():
                return
            responses, requests = await asyncio.open_unix_connection(self._valkey.socket)
            with closing(requests), suppress(ConnectionError):
                passing = asyncio.create_task(self._pass_on(responses, writer))
                while data := await reader.read(1 << 20):
                    if self.lose in data:
                        passing.cancel()
                        await asyncio.wait({passing})
                        self.open.clear()
                        requests.write(data)
                        await responses.read(1)
                        self.lost.set()
                        break
                    requests.write(data)
                passing.cancel()

    @staticmethod
    async def _pass_on(responses: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await responses.read(1 << 20):
                writer.write(data)


async def test_redis_append_whose_response_is_lost_is_applied_once_whatever_came_in_between(valkey: Valkey) -> None:
    proxy = Proxy(valkey)
    async with proxy.running() as url, opened(url) as log, opened(valkey.url) as other:
        first = await publish(log, "first")
        proxy.lose = b"the response to this is lost"
        async with asyncio.TaskGroup() as group:
            publishing = group.create_task(publish(log, "the response to this is lost"))
            await proxy.lost.wait()
            for _ in range(12):
                last = await publish(other, *(["between"] * 1000), keep=Retention(20_000, 3600))
            proxy.lose = b"never sent"
            proxy.open.set()
        assert publishing.result() == first._replace(offset=2)
        assert (await other.read("c", LATEST, 1)).last == last == first._replace(offset=12_002)


async def test_redis_deletes_the_token_of_an_acknowledged_append(valkey: Valkey) -> None:
    import redis.asyncio

    async with opened(valkey.url) as log:
        for number in range(50):
            await publish(log, f"{number}")
        async with redis.asyncio.Redis.from_url(valkey.url) as client:
            assert len([key async for key in client.scan_iter(match="*:applied:*")]) == 1


async def test_redis_rejects_appends_of_a_holder_that_lost_its_lease(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamlab.events import redis as eventlog_redis

    monkeypatch.setattr(eventlog_redis, "LEASE_SECONDS", 0.3)
    append = Append("c", [EncodedEvent(b"stale")], KEEP, {"place": "old"}, lease="l")
    async with opened(valkey.url) as one, opened(valkey.url) as two:
        with pytest.raises(LeaseLost):
            await one.append(append)  # it never held that lease
        assert await one.hold("l")
        await one.append(append)
        async with asyncio.timeout(5):
            while not await two.hold("l"):
                await asyncio.sleep(0.02)
        monkeypatch.setattr(eventlog_redis, "LEASE_SECONDS", 60)
        assert await two.hold("l")
        await two.append(Append("c", [EncodedEvent(b"new")], KEEP, {"place": "new"}, lease="l"))
        with pytest.raises(LeaseLost):
            await one.append(append)
        await two.release("l")
        with pytest.raises(LeaseLost):  # it does not know yet, and no other process has the lease
            await one.append(append)
        assert [await one.hold("l"), await one.hold("l")] == [False, True]
        assert texts((await one.read("c", ORIGIN, 10)).events) == ["stale", "new"]
        assert await one.checkpoint("c", "place") == "new"


async def lose_everything(valkey: Valkey) -> None:
    """Kill the server, remove its directory, and start it again."""
    valkey.kill()
    await asyncio.to_thread(shutil.rmtree, valkey.folder / "appendonlydir")
    await asyncio.to_thread(valkey.start)


async def begin_ahead(valkey: Valkey) -> int:
    """Begin a channel as a server whose clock is an hour ahead of what it will be after its data is lost."""
    import redis.asyncio

    epoch = int((time.time() + 3600) * 1000)
    async with redis.asyncio.Redis.from_url(valkey.url) as client:
        fields: dict[Any, Any] = {"t": epoch, "e": "", "k": "", "d": "a"}
        await client.xadd("streamlab:{c}:events", fields, f"{epoch}-1")
    return epoch


async def test_redis_epochs_grow_though_the_clock_of_a_server_that_lost_its_data_is_behind(valkey: Valkey) -> None:
    epoch, watcher = await begin_ahead(valkey), Watcher()
    async with opened(valkey.url) as log:
        log.watch("c", ORIGIN, watcher)
        await watcher.until(1)
        await lose_everything(valkey)
        new = await publish(log, "b")
        assert (new.epoch > epoch, new.offset) == (True, 1)
        assert texts(await watcher.until(2)) == ["a", "b"]
        assert (await publish(log, "c", channel="another")).epoch > new.epoch


async def test_redis_epochs_that_do_not_grow_are_noticed_by_watchers(valkey: Valkey) -> None:
    epoch, watcher = await begin_ahead(valkey), Watcher()
    async with opened(valkey.url) as log:
        log.watch("c", ORIGIN, watcher)
        await watcher.until(1)
        await lose_everything(valkey)
        async with opened(valkey.url) as other:  # which has not seen the lost events
            new = await publish(other, "b", "c")
        assert new.epoch < epoch
        assert texts(await watcher.until(3)) == ["a", "b", "c"]
        batch = await log.read("c", Position(epoch, 1), 10)
        assert (texts(batch.events), batch.last) == (["b", "c"], new)


async def test_redis_that_lost_the_end_of_a_channel_begins_a_new_epoch(valkey: Valkey) -> None:
    async with opened(valkey.url) as log:
        watcher = Watcher()
        log.watch("c", ORIGIN, watcher)
        old = await publish(log, "a", "b")
        saved = valkey.append_only_files()
        await publish(log, "c")
        await watcher.until(3)
        valkey.kill()
        valkey.restore(saved)  # as after a restart of a machine that had not written the last event to its disk
        valkey.start()
        async with asyncio.timeout(10):
            while (await log.read("c", LATEST, 1)).last.epoch == old.epoch:
                await asyncio.sleep(0.05)
        new = await publish(log, "d")
        assert (new.epoch > old.epoch, new.offset) == (True, 1)
        assert texts(await watcher.until(4)) == ["a", "b", "c", "d"]
        assert texts((await log.read("c", ORIGIN, 10)).events) == ["a", "b", "d"]


async def test_redis_that_lost_acknowledged_events_gives_no_id_again(valkey: Valkey) -> None:
    """Also to a process that publishes before it has looked at the stream again, and does not follow it."""
    async with opened(valkey.url) as log:
        await publish(log, "a")
        saved = valkey.append_only_files()
        old = await publish(log, "b")
        valkey.kill()
        valkey.restore(saved)
        valkey.start()
        new = await publish(log, "c")
        assert (new.epoch > old.epoch, new.offset) == (True, 1)
        assert texts((await log.read("c", ORIGIN, 10)).events) == ["a", "c"]
        assert await publish(log, "d") == new._replace(offset=2)


async def test_a_released_lease_leaves_no_file(tmp_path: Path) -> None:
    url, folder = f"sqlite:///{tmp_path / 'events.db'}", tmp_path / "events.db-leases"
    async with opened(url) as one, opened(url) as two:
        assert await one.hold("l")
        assert await one.hold("m")
        assert len(list(folder.iterdir())) == 2
        await one.release("l")
        assert await two.hold("l")
        assert not await one.hold("l")
        await two.release("l")
    assert list(folder.iterdir()) == []


async def test_redis_lease_moves_when_its_holder_dies(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamlab.events import redis as eventlog_redis

    monkeypatch.setattr(eventlog_redis, "LEASE_SECONDS", 0.3)
    async with opened(valkey.url) as one, opened(valkey.url) as two:
        assert await one.hold("l")
        async with asyncio.timeout(5):
            while not await two.hold("l"):
                await asyncio.sleep(0.02)
        assert not await one.hold("l")


async def test_redis_may_be_disconnected_at_the_start(valkey: Valkey) -> None:
    valkey.kill()
    async with opened(valkey.url) as log:
        assert log.state()["state"] == "disconnected"
        with pytest.raises(EventLogError, match="does not respond"):
            await log.hold("l")
        valkey.start()
        assert (await publish(log, "a")).offset == 1
        assert log.state()["state"] == "ok"


def test_invalid_url_of_redis_is_rejected() -> None:
    with pytest.raises(EventLogError, match="is not a valid URL of a Redis server"):
        open_log("redis://localhost:port/0")


async def test_processes_that_create_the_same_file_in_one_moment_all_open_it(tmp_path: Path) -> None:
    for number in range(20):
        path, together = tmp_path / f"{number}.db", threading.Barrier(4)

        def use(path: Path = path, together: threading.Barrier = together) -> str:
            together.wait(20)
            with closing(sqlite3.connect(path, isolation_level=None)) as connection:
                eventlog_sqlite._use_write_ahead_log(connection)
                return str(connection.execute("PRAGMA journal_mode").fetchone()[0])

        assert await asyncio.gather(*(asyncio.to_thread(use) for _ in range(4))) == ["wal"] * 4
