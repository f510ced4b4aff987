"""Log files followed through everything that happens to them: while they are followed, and across a restart."""

import asyncio
import json
import logging
import os
import random
import shutil
import zlib
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.servers import plugin_module

changes = plugin_module("logs", "changes")
chunks = plugin_module("logs", "chunks")
content = plugin_module("logs", "content")
disk = plugin_module("logs", "disk")
tail = plugin_module("logs", "tail")
Line, Rotation, Tail = tail.Line, tail.Rotation, tail.Tail

GRACE = 0.3


class Follower:
    """A consumer that stores the items, and the cursors of the last batch as JSON."""

    def __init__(self, pattern: str | Path, cursors: str = "{}", **options: Any) -> None:
        self.tail = Tail(pattern, json.loads(cursors), **{"grace": GRACE} | options)
        self.batches: AsyncGenerator[Any, None] = self.tail.batches()
        self.cursors = cursors
        self.items: list[Any] = []
        self.sizes: list[int] = []
        self.next: asyncio.Future[Any] | None = None

    def wait(self) -> "asyncio.Future[Any]":
        """Return the next batch as a future that a timeout of the caller does not cancel."""
        if self.next is None:
            self.next = asyncio.ensure_future(anext(self.batches))
        return self.next

    async def close(self) -> None:
        if self.next is not None:
            self.next.cancel()
            await asyncio.wait([self.next])
        await self.batches.aclose()

    async def step(self) -> None:
        batch = await asyncio.shield(self.wait())
        self.next = None
        self.items += batch.items
        self.sizes.append(len(batch.items))
        self.cursors = json.dumps(batch.cursors)

    async def take(self, count: int, seconds: float = 10) -> list[Any]:
        """Return the next `count` items: texts of lines, and kinds of rotations in angle brackets."""
        async with asyncio.timeout(seconds):
            while len(self.items) < count:
                await self.step()
        taken, self.items = self.items[:count], self.items[count:]
        return [shown(item) for item in taken]

    async def until_known(self) -> None:
        """Read until the cursors have a position."""
        async with asyncio.timeout(10):
            while not any(json.loads(self.cursors).values()):
                await self.step()

    async def nothing(self, seconds: float) -> None:
        with pytest.raises(TimeoutError):
            await self.take(1, seconds)


def shown(item: Any) -> str:
    if isinstance(item, Line):
        return str(item.text)
    return f"<{item.kind}>" if item.complete else f"<{item.kind}, not complete>"


@asynccontextmanager
async def following(pattern: str | Path, cursors: str = "{}", **options: Any) -> Any:
    follower = Follower(pattern, cursors, **options)
    try:
        yield follower
    finally:
        await follower.close()


def add(path: Path, *lines: str, end: str = "\n") -> None:
    with path.open("ab") as file:
        file.write("".join(f"{line}{end}" for line in lines).encode())


def copytruncate(path: Path, copy: Path) -> None:
    shutil.copyfile(path, copy)
    os.truncate(path, 0)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "app.log"


def descriptors() -> list[str]:
    """Return the targets of the open file descriptors of this process."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(str(descriptor.readlink()))
    return found


def open_logs(folder: Path) -> list[str]:
    return [target for target in descriptors() if target.startswith(str(folder))]


class Moment:
    """When something happens to a file: while it is followed, or across a restart."""

    def __init__(self, live: bool) -> None:
        self.live = live

    @asynccontextmanager
    async def following(self, log: str | Path, known: int, happens: Any, **options: Any) -> Any:
        """Follow until `known` items were read, let it happen, then continue."""
        async with following(log, **options) as follower:
            if known:
                await follower.take(known)
            else:
                await follower.until_known()
            if self.live:
                # While the next batch is waited for, not between two.
                follower.wait()
                await asyncio.sleep(0.1)
                happens()
                yield follower
                return
        happens()
        async with following(log, follower.cursors, **options) as again:
            yield again


@pytest.fixture(params=["live", "across a restart"])
def moment(request: pytest.FixtureRequest) -> Moment:
    return Moment(request.param == "live")


# -- lines


async def test_added_lines_are_read(moment: Moment, log: Path) -> None:
    add(log, "one")
    async with moment.following(log, 1, lambda: add(log, "two", "three")) as follower:
        assert await follower.take(2) == ["two", "three"]


async def test_a_line_is_read_within_a_tenth_of_a_second(log: Path) -> None:
    add(log, "one")
    loop = asyncio.get_running_loop()
    async with following(log) as follower:
        await follower.take(1)
        delays = []
        for number in range(10):
            written = loop.time() + 0.05
            loop.call_at(written, add, log, str(number))
            assert await follower.take(1) == [str(number)]
            delays.append(loop.time() - written)
        assert sorted(delays)[5] < 0.1


async def test_a_partial_line_is_read_when_its_line_break_is_written(moment: Moment, log: Path) -> None:
    add(log, "one")
    add(log, "tw", end="")
    async with moment.following(log, 1, lambda: add(log, "o", "three")) as follower:
        assert await follower.take(2) == ["two", "three"]


async def test_a_partial_line_is_not_read(log: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        add(log, "half", end="")
        await follower.nothing(0.3)


async def test_only_a_line_feed_ends_a_line_and_a_carriage_return_before_it_is_removed(log: Path) -> None:
    log.write_bytes(b"a\r\nb\rc\x0bd\xc2\x85e\xe2\x80\xa8f\n\n\r\ng\n")
    async with following(log) as follower:
        assert await follower.take(5) == ["a", "b\rc\x0bd\x85e\u2028f", "", "", "g"]


async def test_bytes_that_are_not_utf_8_become_replacement_characters(log: Path) -> None:
    log.write_bytes(b"\x00\x00nul\n\xff\xfe\xc3\nend\n")
    async with following(log) as follower:
        assert await follower.take(3) == ["\0\0nul", "���", "end"]


async def test_a_line_has_the_name_of_its_file(log: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.step()
        assert follower.items == [Line("one", "app.log", False)]


async def test_a_line_of_the_maximum_size_is_one_item(log: Path) -> None:
    text = "x" * chunks.CHUNK
    add(log, text, "short")
    add(log, text, end="\r\n")
    async with following(log, backlog=10**9) as follower:
        lines: list[Any] = []
        while len(lines) < 3:
            await follower.step()
            lines, shorter = lines + follower.items, follower.items
            assert len(shorter) >= 1
            follower.items = []
    assert lines == [Line(text, "app.log"), Line("short", "app.log"), Line(text, "app.log")]


@pytest.mark.parametrize("restarts", [False, True])
async def test_a_longer_line_is_split_into_chunks_between_characters(log: Path, restarts: bool) -> None:
    text = "€" * (chunks.CHUNK * 5 // 6) + "end"
    add(log, text, "short")
    lines: list[Any] = []
    follower = Follower(log, backlog=10**9)
    while not lines or lines[-1].text != "short":
        async with asyncio.timeout(10):
            await follower.step()
        lines += follower.items
        follower.items = []
        if restarts:
            await follower.close()
            follower = Follower(log, follower.cursors)
    await follower.close()
    assert [line.continued for line in lines] == [True, True, False, False]
    assert "".join(line.text for line in lines[:-1]) == text
    assert all(len(line.text.encode()) <= chunks.CHUNK for line in lines)


async def test_a_chunk_of_a_long_line_is_read_before_its_line_break_is_written(log: Path) -> None:
    add(log, "x" * (chunks.CHUNK + 10), end="")
    async with following(log, backlog=10**9) as follower:
        assert await follower.take(1) == ["x" * chunks.CHUNK]
        add(log, "yz")
        assert await follower.take(1) == ["x" * 10 + "yz"]


async def test_batches_are_bounded(log: Path) -> None:
    add(log, *(f"{number}" for number in range(3000)))
    async with following(log) as follower:
        assert await follower.take(3000) == [f"{number}" for number in range(3000)]
        assert max(follower.sizes) <= 500


async def test_text_in_a_batch_is_bounded_over_many_files(tmp_path: Path) -> None:
    for number in range(100):
        add(tmp_path / f"{number}.log", "x" * 30_000, "y" * 30_000)
    async with following(tmp_path / "*.log") as follower:
        count = 0
        while count < 200:
            await follower.step()
            assert sum(len(item.text) for item in follower.items) <= tail.BATCH
            count, follower.items = count + len(follower.items), []


# -- the first position


async def test_reading_starts_at_a_line_start_within_the_backlog(log: Path) -> None:
    add(log, "0123456789", "abcdefghij", "ABCDEFGHIJ")
    for backlog, lines in [(0, []), (10, []), (11, ["A"]), (21, ["A"]), (22, ["a", "A"]), (33, ["0", "a", "A"])]:
        async with following(log, backlog=backlog) as follower:
            await follower.until_known()
            assert [item.text[0] for item in follower.items] == lines, backlog


async def test_the_first_position_is_in_the_cursors_although_no_line_was_read(moment: Moment, log: Path) -> None:
    add(log, "old")
    async with moment.following(log, 0, lambda: add(log, "new"), backlog=0) as follower:
        assert await follower.take(1) == ["new"]


async def test_a_file_that_appears_later_is_read_from_its_beginning(tmp_path: Path) -> None:
    log = tmp_path / "not" / "there" / "app.log"
    async with following(log, backlog=0) as follower:
        async with asyncio.timeout(10):
            await follower.step()
        assert follower.items == []
        log.parent.mkdir(parents=True)
        add(log, "one", "two")
        assert await follower.take(2) == ["one", "two"]


async def test_a_file_unknown_to_the_cursors_is_read_from_its_beginning(tmp_path: Path) -> None:
    add(tmp_path / "a.log", "a1")
    async with following(tmp_path / "*.log", backlog=0) as follower:
        await follower.until_known()
    add(tmp_path / "b.log", "b1", "b2")
    async with following(tmp_path / "*.log", follower.cursors, backlog=0) as again:
        assert await again.take(2) == ["b1", "b2"]


async def test_an_invalid_cursor_is_rejected(log: Path) -> None:
    with pytest.raises(ValueError, match="not a cursor"):
        Tail(log, {str(log): [{"offset": 3}]})


async def test_a_tail_can_be_followed_only_once(log: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        with pytest.raises(RuntimeError, match="followed only once"):
            await anext(follower.tail.batches())


# -- checkpoints of earlier versions


def former_position(path: Path, offset: int, *, turn: str = "rotated", told: bool = False) -> dict[str, Any]:
    """A position as earlier versions stored it, with the names that its fields had."""
    status, before = path.stat(), path.read_bytes()[max(0, offset - 1024) : offset]
    return {
        "path": str(path),
        "device": status.st_dev,
        "inode": status.st_ino,
        "offset": offset,
        "check": zlib.crc32(before),
        "modified": status.st_mtime_ns,
        "turn": turn,
        "told": told,
    }


def former_file_in_place(log: Path) -> list[dict[str, Any]]:
    add(log, "x" * 2000, "one", "two")
    return [former_position(log, 2005)]


def former_copy_before_truncation(log: Path) -> list[dict[str, Any]]:
    add(log, "one", "two")
    copytruncate(log, copy := Path(f"{log}.1"))
    add(log, "three")
    return [former_position(copy, 4, turn="truncated")]


def former_truncation_that_was_reported(log: Path) -> list[dict[str, Any]]:
    add(log, "one")
    truncated = former_position(log, 4, turn="truncated", told=True)
    os.truncate(log, 0)
    emptied = former_position(log, 0)
    add(log, "one", "two")  # the same bytes as before, but another content
    return [truncated, emptied]


def former_rotation_with_a_late_writer(log: Path) -> list[dict[str, Any]]:
    add(log, "one")
    log.rename(renamed := Path(f"{log}.1"))
    rotated = former_position(renamed, 4, told=True)
    add(log, "two", "three")
    current = former_position(log, 4)
    add(renamed, "late")
    return [rotated, current]


@pytest.mark.parametrize(
    ("former", "items"),
    [
        (former_file_in_place, ["two"]),
        (former_copy_before_truncation, ["two", "<truncated>", "three"]),
        (former_truncation_that_was_reported, ["one", "two"]),
        (former_rotation_with_a_late_writer, ["late", "three"]),
    ],
)
async def test_a_checkpoint_of_an_earlier_version_resumes_without_a_lost_or_duplicated_line(
    log: Path, former: Callable[[Path], list[dict[str, Any]]], items: list[str]
) -> None:
    async with following(log, json.dumps({str(log): former(log)})) as follower:
        assert await follower.take(len(items)) == items
        add(log, "end")
        assert await follower.take(1) == ["end"]
        stored = json.loads(follower.cursors)[str(log)]
    assert {frozenset(position) for position in stored} == {
        frozenset(("path", "device", "inode", "offset", "check", "modified", "ended_by", "reported"))
    }
    async with following(log, follower.cursors) as again:
        add(log, "more")
        assert await again.take(1) == ["more"]


# -- rotation by renaming


async def test_a_renamed_file_is_read_to_its_end_before_the_new_one(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        add(log, "two")
        log.rename(f"{log}.1")
        add(log, "three")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(3) == ["two", "<rotated>", "three"]


async def test_several_rotations_are_reported_in_order(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        for number in range(2, 5):
            add(log, f"{number}a", f"{number}b")
            for old in range(number, 0, -1):
                if (path := Path(f"{log}.{old}")).exists():
                    path.rename(f"{log}.{old + 1}")
            log.rename(f"{log}.1")
        add(log, "last")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(10) == [
            "2a",
            "2b",
            "<rotated>",
            "3a",
            "3b",
            "<rotated>",
            "4a",
            "4b",
            "<rotated>",
            "last",
        ]


async def test_rotation_to_dates_is_followed(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        for day in ("2026-11-01", "2026-11-02"):
            add(log, day)
            log.rename(f"{log}.{day}")
        add(log, "today")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(5) == ["2026-11-01", "<rotated>", "2026-11-02", "<rotated>", "today"]


@pytest.mark.parametrize("names", [("2", "1"), ("10", "9"), ("2026-11-09", "2026-11-10"), ("20261101", "20261102")])
async def test_files_of_equal_times_are_ordered_by_name(moment: Moment, log: Path, names: tuple[str, str]) -> None:
    add(log, "one")

    def rotate() -> None:
        modified = log.stat().st_mtime_ns
        for name in names:
            add(log, name)
            log.rename(f"{log}.{name}")
        add(log, "last")
        for name in names:
            os.utime(f"{log}.{name}", ns=(modified, modified))

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(5) == [names[0], "<rotated>", names[1], "<rotated>", "last"]


async def test_a_partial_line_alone_in_a_new_file_is_read_when_the_file_is_deleted(log: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        log.rename(f"{log}.1")
        add(log, "half", end="")
        assert await follower.take(1) == ["<rotated>"]
        await follower.nothing(0.1)
        log.unlink()
        assert await follower.take(2) == ["half", "<rotated>"]
        add(log, "two")
        assert await follower.take(1) == ["two"]


async def test_older_rotations_are_not_read_again(moment: Moment, log: Path) -> None:
    add(Path(f"{log}.1"), "long ago")
    add(log, "one")

    def rotate() -> None:
        Path(f"{log}.1").rename(f"{log}.2")
        log.rename(f"{log}.1")
        add(log, "two")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(2) == ["<rotated>", "two"]


async def test_a_rotation_is_reported_before_the_new_file_has_a_line(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        log.rename(f"{log}.1")
        log.touch()

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(1) == ["<rotated>"]
    async with following(log, follower.cursors) as again:
        add(log, "two")
        assert await again.take(1) == ["two"]


async def test_a_renamed_file_is_read_until_the_new_one_appears(log: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        with log.open("a") as writer:
            log.rename(f"{log}.1")
            await follower.nothing(2 * GRACE)
            print("two", file=writer, flush=True)
            assert await follower.take(1) == ["two"]
        add(log, "three")
        assert await follower.take(2) == ["<rotated>", "three"]


async def test_lines_of_a_late_writer_are_read_after_those_of_the_new_file(log: Path) -> None:
    add(log, "one")
    with log.open("a") as writer:
        async with following(log) as follower:
            await follower.take(1)
            log.rename(f"{log}.1")
            add(log, "new")
            assert await follower.take(2) == ["<rotated>", "new"]
            print("late", file=writer, flush=True)
            assert await follower.take(1) == ["late"]
        print("later", file=writer, flush=True)
        async with following(log, follower.cursors) as again:
            assert await again.take(1) == ["later"]


async def test_a_partial_line_of_a_late_writer_is_read_after_the_grace_period(log: Path, tmp_path: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        log.rename(renamed := Path(f"{log}.1"))
        add(log, "new")
        assert await follower.take(2) == ["<rotated>", "new"]
        add(renamed, "half", end="")
        assert await follower.take(1) == ["half"]
        while len(json.loads(follower.cursors)[str(log)]) > 1:
            await follower.step()
        assert open_logs(tmp_path) == [str(log)]


async def test_a_renamed_file_that_was_deleted_across_a_restart_leaves_the_cursors(log: Path) -> None:
    add(log, "one")
    async with following(log, grace=100) as follower:
        await follower.take(1)
        log.rename(f"{log}.1")
        add(log, "two")
        assert await follower.take(2) == ["<rotated>", "two"]
    assert len(json.loads(follower.cursors)[str(log)]) == 2
    Path(f"{log}.1").unlink()
    async with following(log, follower.cursors, grace=100) as again:
        async with asyncio.timeout(10):
            await again.step()
        assert (again.items, len(json.loads(again.cursors)[str(log)])) == ([], 1)


async def test_a_partial_line_of_a_renamed_file_is_read_after_the_grace_period(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        add(log, "half", end="")
        log.rename(f"{log}.1")
        add(log, "two")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(3) == ["half", "<rotated>", "two"]


async def test_a_partial_line_of_a_renamed_file_can_be_completed_within_the_grace_period(log: Path) -> None:
    add(log, "one")
    async with following(log, grace=5) as follower:
        await follower.take(1)
        add(log, "half", end="")
        log.rename(f"{log}.1")
        add(log, "two")
        await follower.nothing(0.2)
        add(Path(f"{log}.1"), " and half")
        assert await follower.take(3) == ["half and half", "<rotated>", "two"]


async def test_a_renamed_file_is_closed_after_the_grace_period(log: Path, tmp_path: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        log.rename(f"{log}.1")
        add(log, "two")
        await follower.take(2)
        assert len(open_logs(tmp_path)) == 2
        async with asyncio.timeout(10):
            await follower.step()
        assert follower.items == []
        assert open_logs(tmp_path) == [str(log)]


async def test_lines_that_cannot_be_found_are_reported_as_an_incomplete_rotation(log: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
    add(log, "lost")
    log.rename(log.with_name("elsewhere"))
    add(log, "new")
    async with following(log, follower.cursors) as again:
        assert await again.take(2) == ["<rotated, not complete>", "new"]


async def test_rotations_newer_than_the_lost_content_are_read(log: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
    log.rename(log.with_name("elsewhere"))
    for number, name in ((2, "second"), (1, "third")):
        add(log, name)
        # The resolution of file times may be too low to order them.
        later = log.stat().st_mtime + 10 - number
        os.utime(log, (later, later))
        log.rename(f"{log}.{number}")
    add(log, "last")
    async with following(log, follower.cursors) as again:
        assert await again.take(6) == ["<rotated, not complete>", "second", "<rotated>", "third", "<rotated>", "last"]


# -- truncation


async def test_a_copy_is_read_to_its_end_after_truncation(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        add(log, "two", "three")
        copytruncate(log, Path(f"{log}.1"))
        add(log, "four")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(4) == ["two", "three", "<truncated>", "four"]


async def test_truncation_is_detected_although_the_file_has_grown_again(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        copytruncate(log, Path(f"{log}.1"))
        add(log, *(f"new {number}" for number in range(5)))

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(6) == ["<truncated>", *(f"new {number}" for number in range(5))]


async def test_several_copies_are_read_in_order(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        add(log, "two")
        copytruncate(log, Path(f"{log}.2"))
        add(log, "three")
        copytruncate(log, Path(f"{log}.1"))
        add(log, "four")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(5) == ["two", "<truncated>", "three", "<truncated>", "four"]


async def test_a_compressed_copy_is_not_read(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        add(log, "two")
        copytruncate(log, Path(f"{log}.1.gz"))
        add(log, "three")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(2) == ["<truncated, not complete>", "three"]


async def test_truncation_is_reported_once_while_the_file_is_empty(moment: Moment, log: Path) -> None:
    add(log, "one")
    async with moment.following(log, 1, lambda: os.truncate(log, 0)) as follower:
        assert await follower.take(1) == ["<truncated, not complete>"]
    async with following(log, follower.cursors) as again:
        await again.nothing(0.2)
        # The same bytes as before, but a new content.
        add(log, "one", "two")
        assert await again.take(2) == ["one", "two"]


async def test_a_copy_of_a_content_that_was_never_read_at_its_path_is_read(moment: Moment, log: Path) -> None:
    add(log, "one")
    async with moment.following(log, 1, lambda: copytruncate(log, Path(f"{log}.2"))) as follower:
        assert await follower.take(1) == ["<truncated>"]
        add(log, "two")
        copytruncate(log, Path(f"{log}.1"))
        add(log, "three")
        assert await follower.take(3) == ["two", "<truncated>", "three"]


async def test_a_partial_line_of_a_copy_is_read(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        add(log, "half", end="")
        copytruncate(log, Path(f"{log}.1"))
        add(log, "two")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(3) == ["half", "<truncated>", "two"]


# -- deletion


async def test_a_file_that_was_deleted_and_recreated_is_read_from_its_beginning(log: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        add(log, "two")
        log.unlink()
        add(log, "one", "three")
        assert await follower.take(4) == ["two", "<rotated>", "one", "three"]


@pytest.mark.parametrize("same_inode", [True, False])
async def test_a_file_that_was_recreated_across_a_restart_is_read_from_its_beginning(
    log: Path, same_inode: bool
) -> None:
    add(log, "one", "two")
    async with following(log) as follower:
        await follower.take(2)
    inode = log.stat().st_ino
    if same_inode:
        log.write_text("other\nlines\n")
        assert log.stat().st_ino == inode
    else:
        log.rename(log.with_name("elsewhere"))
        add(log, "other", "lines")
    async with following(log, follower.cursors) as again:
        kind = "truncated" if same_inode else "rotated"
        assert await again.take(3) == [f"<{kind}, not complete>", "other", "lines"]


async def test_the_rest_of_a_deleted_file_is_read_and_the_file_closed(log: Path, tmp_path: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        add(log, "two")
        add(log, "half", end="")
        log.unlink()
        assert await follower.take(3) == ["two", "half", "<rotated>"]
        await follower.nothing(0.2)
        assert open_logs(tmp_path) == []
    async with following(log, follower.cursors) as again:
        add(log, "new")
        assert await again.take(1) == ["new"]


async def test_a_file_that_is_missing_for_a_while_retains_its_position(log: Path) -> None:
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
    log.rename(log.with_name("elsewhere"))
    async with following(log, follower.cursors) as again:
        await again.nothing(0.2)
        log.with_name("elsewhere").rename(log)
        add(log, "two")
        assert await again.take(1) == ["two"]


async def test_a_recreated_folder_is_watched_again(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "app.log"
    log.parent.mkdir()
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        shutil.rmtree(log.parent)
        assert await follower.take(1) == ["<rotated>"]
        log.parent.mkdir()
        add(log, "two")
        assert await follower.take(1) == ["two"]


# -- many files


async def test_files_of_a_glob_appear_and_disappear(tmp_path: Path) -> None:
    add(tmp_path / "a.log", "a1")
    async with following(f"{tmp_path}/*.log") as follower:
        assert await follower.take(1) == ["a1"]
        add(tmp_path / "b.log", "b1")
        assert await follower.take(1) == ["b1"]
        (tmp_path / "a.log").unlink()
        assert await follower.take(1) == ["<rotated>"]
        while str(tmp_path / "a.log") in json.loads(follower.cursors):
            await follower.step()
        add(tmp_path / "a.log", "a2")
        add(tmp_path / "b.log", "b2")
        assert sorted(await follower.take(2)) == ["a2", "b2"]
    (tmp_path / "b.log").unlink()
    add(tmp_path / "c.log", "c1")
    async with following(f"{tmp_path}/*.log", follower.cursors) as again:
        assert await again.take(1) == ["c1"]


async def test_rotations_that_match_a_glob_are_not_separate_files(moment: Moment, log: Path) -> None:
    add(log, "one")

    def rotate() -> None:
        add(log, "two")
        log.rename(f"{log}.1")
        add(log, "three")

    async with moment.following(f"{log}*", 1, rotate) as follower:
        assert await follower.take(3) == ["two", "<rotated>", "three"]
        await follower.nothing(2 * GRACE)


async def test_a_file_renamed_to_another_of_the_glob_is_not_read_twice(moment: Moment, tmp_path: Path) -> None:
    log, dated = tmp_path / "app.log", tmp_path / "app-2026-11-01.log"
    add(log, "one")

    def rotate() -> None:
        add(log, "two")
        log.rename(dated)
        add(log, "three")

    async with moment.following(tmp_path / "*.log", 1, rotate) as follower:
        assert await follower.take(3) == ["two", "<rotated>", "three"]
        await follower.nothing(3 * GRACE)
        add(dated, "four")
        assert await follower.take(1) == ["four"]


async def test_a_link_and_its_target_are_one_file(tmp_path: Path) -> None:
    add(tmp_path / "app-1.log", "one")
    (tmp_path / "current.log").symlink_to("app-1.log")
    async with following(tmp_path / "*.log") as follower:
        assert await follower.take(1) == ["one"]
        await follower.nothing(0.2)


async def test_folders_and_pipes_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "folder.log").mkdir()
    os.mkfifo(tmp_path / "pipe.log")
    add(tmp_path / "plain.log", "one")
    async with following(tmp_path / "*.log") as follower:
        assert await follower.take(1) == ["one"]


async def test_many_files_are_read_in_turns(tmp_path: Path) -> None:
    for number in range(20):
        add(tmp_path / f"{number:02}.log", *(f"{number}:{line}" for line in range(1200)))
    async with following(tmp_path / "*.log") as follower:
        lines = await follower.take(20 * 1200)
    for number in range(20):
        assert [line for line in lines if line.startswith(f"{number}:")] == [f"{number}:{line}" for line in range(1200)]


# -- links, and errors of the disk


async def test_another_target_of_a_link_is_a_rotation(moment: Moment, tmp_path: Path) -> None:
    pods, log = tmp_path / "pods", tmp_path / "containers" / "shop.log"
    pods.mkdir()
    log.parent.mkdir()
    add(pods / "0.log", "one")
    log.symlink_to(pods / "0.log")

    def change_target() -> None:
        add(pods / "0.log", "two")
        add(pods / "1.log", "three")
        fresh = log.with_name("fresh")
        fresh.symlink_to(pods / "1.log")
        fresh.rename(log)

    async with moment.following(log, 1, change_target) as follower:
        assert await follower.take(3) == ["two", "<rotated>", "three"]


async def test_rotation_behind_a_link_is_followed(moment: Moment, tmp_path: Path) -> None:
    pods, log = tmp_path / "pods", tmp_path / "shop.log"
    pods.mkdir()
    add(pods / "0.log", "one")
    log.symlink_to(pods / "0.log")

    def rotate() -> None:
        for number in (2, 3):
            add(pods / "0.log", str(number))
            (pods / "0.log").rename(pods / f"0.log.20261101-12000{number}")
        add(pods / "0.log", "four")

    async with moment.following(log, 1, rotate) as follower:
        assert await follower.take(5) == ["2", "<rotated>", "3", "<rotated>", "four"]


async def test_a_path_that_cannot_be_opened_is_logged_once_and_retried(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(changes, "LOOK_MS", 50)
    log.symlink_to(log)
    async with following(log) as follower:
        await follower.nothing(0.5)
        log.unlink()
        add(log, "one")
        assert await follower.take(1) == ["one"]
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert str(log) in caplog.records[0].getMessage()


async def test_a_file_without_permission_is_retried(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(changes, "LOOK_MS", 50)
    add(log, "old", "one")
    real = disk.open_file

    def deny(path: Path, status: os.stat_result) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk, "open_file", deny)
    for pattern in (log, f"{log.parent}/*.log"):
        async with following(pattern, backlog=4) as follower:
            await follower.nothing(0.5)
            monkeypatch.setattr(disk, "open_file", real)
            assert await follower.take(1) == ["one"]
        monkeypatch.setattr(disk, "open_file", deny)
    monkeypatch.setattr(disk, "open_file", deny)
    async with following(log, follower.cursors) as again:
        await again.nothing(0.5)
        monkeypatch.setattr(disk, "open_file", real)
        add(log, "two")
        assert await again.take(1) == ["two"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


async def test_a_failed_read_is_repeated(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(changes, "LOOK_MS", 50)
    add(log, "one")
    real = content.wrap

    def fail(file: Any, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(content, "wrap", fail)
    async with following(log) as follower:
        await follower.nothing(0.5)
        monkeypatch.setattr(content, "wrap", real)
        assert await follower.take(1) == ["one"]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", ["_Inotify", "_Watchfiles"])
async def test_a_change_is_noticed_at_once(log: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(changes, "watch", getattr(changes, kind))
    monkeypatch.setattr(changes, "LOOK_MS", 60_000)
    add(log, "one")
    async with following(log) as follower:
        assert await follower.take(1) == ["one"]
        for text in ("two", "three"):
            await follower.nothing(0.1)
            add(log, text)
            assert await follower.take(1) == [text]


async def test_files_are_read_every_second_if_folders_cannot_be_watched(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folders: Collection[str]) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(changes, "watch", fail)
    monkeypatch.setattr(changes, "LOOK_MS", 50)
    add(log, "one")
    async with following(log) as follower:
        await follower.take(1)
        asyncio.get_running_loop().call_later(0.2, add, log, "two")
        assert await follower.take(1) == ["two"]
    assert len(caplog.records) == 1


# -- closing


async def test_closing_releases_files_and_watcher(log: Path, tmp_path: Path) -> None:
    def watchers() -> int:
        return sum("inotify" in target for target in descriptors())

    async def closed() -> None:
        async with asyncio.timeout(5):
            while watchers() > before:
                await asyncio.sleep(0.01)

    before = watchers()
    add(log, "one")
    for waiting in (True, False):
        follower = Follower(log)
        await follower.take(1)
        assert open_logs(tmp_path) == [str(log)]
        await follower.nothing(0.2)
        assert watchers() > before
        if not waiting:
            add(log, "two")
            await follower.take(1)
        await follower.close()
        assert open_logs(tmp_path) == []
        await closed()


@pytest.mark.parametrize("delay", [0, 0.0003, 0.001, 0.003, 0.01, 0.1])
async def test_cancelling_at_any_moment_releases_the_files(log: Path, tmp_path: Path, delay: float) -> None:
    add(log, *(str(number) for number in range(5000)))
    seen = 0

    async def consume() -> None:
        nonlocal seen
        async with aclosing(Tail(log).batches()) as batches:
            async for batch in batches:
                seen += len(batch.items)

    task = asyncio.create_task(consume())
    await asyncio.sleep(delay)
    task.cancel()
    loop = asyncio.get_running_loop()
    cancelled = loop.time()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop.time() - cancelled < 0.5
    assert open_logs(tmp_path) == []


# -- everything together


def test_history_has_the_oldest_content_first_and_only_rotations(tmp_path: Path) -> None:
    names = ["app.log.2", "app.log-20261101", "app.log.1", "app.log"]
    for seconds, name in enumerate([*names, "app.log.old", "app.log.3.gz", "app.log2", "app.log.lock"]):
        add(tmp_path / name, name)
        os.utime(tmp_path / name, (seconds, seconds))
    assert [path.name for path in disk.history(tmp_path / "app.log")] == names
    assert [path.name for path in disk.history(f"{tmp_path}/*.log")] == names
    assert [path.name for path in disk.history(f"{tmp_path}/app.log*")][:4] == names
    assert disk.history(tmp_path / "none" / "app.log") == []


@pytest.mark.parametrize("seed", range(8))
async def test_every_line_is_read_once_and_in_order_whatever_happens(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    paths = [tmp_path / "a.log", tmp_path / "b.log"]
    written: dict[str, list[str]] = {path.name: [] for path in paths}
    received: dict[str, list[str]] = {path.name: [] for path in paths}
    reported, stored = 0, "{}"
    by_copy = {path: chance.random() < 0.5 for path in paths}

    def write(path: Path) -> None:
        for _ in range(chance.choice([1, 1, 3, 40, 700])):
            line = f"{path.name} {len(written[path.name]):06}" + "-" * chance.choice([0, 0, 5, 200])
            written[path.name].append(line)
            add(path, line, end=chance.choice(["\n", "\n", "\r\n"]))

    def rotate(path: Path) -> None:
        if path.exists() and path.stat().st_size:
            for number in range(30, 0, -1):
                if (old := Path(f"{path}.{number}")).exists():
                    old.rename(f"{path}.{number + 1}")
            if by_copy[path]:
                copytruncate(path, Path(f"{path}.1"))
            else:
                path.rename(f"{path}.1")

    def store(follower: Follower) -> None:
        nonlocal reported, stored
        stored = follower.cursors
        for item in follower.items:
            if isinstance(item, Rotation):
                assert item.complete
                reported += 1
            else:
                received[item.file].append(item.text)
        follower.items.clear()

    for path in paths:
        write(path)
    follower = Follower(tmp_path / "*.log", backlog=10**9)
    while len(json.loads(follower.cursors)) < 3:
        await follower.step()
        store(follower)
    rotations = 0
    for _ in range(60):
        action = chance.choice(["write", "write", "write", "rotate", "read", "read", "restart", "crash", "wait"])
        path = chance.choice(paths)
        if action == "write":
            write(path)
        elif action == "rotate" and rotations < 25:
            rotations += 1
            rotate(path)
        elif action in ("read", "crash") and any(len(received[name]) < len(written[name]) for name in received):
            async with asyncio.timeout(10):
                await follower.step()
            if action == "read":
                store(follower)
            else:
                await follower.close()
                follower = Follower(tmp_path / "*.log", stored)
        elif action == "wait":
            await asyncio.sleep(chance.random() * 0.05)
        elif action == "restart":
            await follower.close()
            follower = Follower(tmp_path / "*.log", follower.cursors)
    async with asyncio.timeout(20):
        while any(len(received[name]) < len(written[name]) for name in received):
            await follower.step()
            store(follower)
    await follower.close()
    assert received == written
    assert reported <= rotations
