"""Follow log files as `tail -F` does: no line lost, none twice, every rotation told.

A `Tail` goes round and round: look (ask the disk what became of every file, and decide what that means), read, tell
(yield a `Batch`), and wait for a change once there is nothing more to tell. A position is all that is ever remembered
of a file, and it proves itself against the bytes before it; so what happened while nobody was looking is found out in
the same way as what happens under our eyes.

What no reader can save is lost, and told where it can be known: lines that were truncated away before they were read,
unless a plain copy of them stands beside the file; what a writer adds to a renamed file after it had been silent for
the whole grace; the content of a file that was emptied before its very first line was read; and a file of the very
same inode whose new content repeats the old one up to our position. On a file system that does not note a renaming in
the file's time of change, the grace runs from the last write instead.
"""

import asyncio
import io
import logging
import math
import os
import stat
import time
import zlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from aiofiles.threadpool import wrap
from watchfiles import awatch

from streamlab import Threads, shielded

from . import disk
from .pieces import PIECE, Line, cut_lines

log = logging.getLogger(__name__)

ITEMS = 500
"""Items in one batch at most."""

BATCH = 1024 * 1024
"""Bytes of text in one batch, about; a long piece of a line comes alone."""

READ = 64 * 1024
"""Bytes read at once, unless no line ends within them."""

PROOF = 1024
"""Bytes before a position that must not have changed for it to hold."""

MISSING = 20
"""Files of a glob that vanished while nobody looked, and may come back: positions kept of them at most."""

LOOK_MS = 1000
"""Milliseconds after which the disk is looked at even if no change was heard of."""

Kind = Literal["rotated", "truncated"]
Cursors = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Turn:
    """The content of a file is over: it was renamed, replaced or deleted ("rotated"), or emptied ("truncated")."""

    kind: Kind
    file: str
    complete: bool
    """Whether the old content is known to have been read to its end."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some lines and turns in their order, and where to go on after them.

    Whoever stores `cursors` together with what it made of `items`, in one transaction, and gives the last ones stored
    to the next `Tail`, has every line exactly once, however it was stopped. `items` may be empty: then only the
    cursors are news.
    """

    items: list[Line | Turn]
    cursors: Cursors
    """By absolute path, as JSON can say it; what it says is no business of the caller's."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a content has been read: always to a line's start, or to where a piece of a line was cut."""

    path: str
    """Where the content was last seen, links resolved."""
    device: int
    inode: int
    offset: int
    check: int
    """CRC-32 of the up to `PROOF` bytes before the offset."""
    modified: int
    """Of the file, in nanoseconds, when it was last looked at."""
    turn: Kind = "rotated"
    """What the end of this content is called."""
    told: bool = False
    """Whether that end has been told; what is found at the followed path then is another content."""

    @property
    def identity(self) -> disk.Identity:
        """Device and inode."""
        return self.device, self.inode

    def holds(self, file: io.FileIO) -> bool:
        """Whether the bytes before the offset are those that were read."""
        count = min(PROOF, self.offset)
        proof = os.pread(file.fileno(), count, self.offset - count)
        return len(proof) == count and zlib.crc32(proof) == self.check


class Content:
    """One content that is read: a position, and the file it is in, as long as that is known."""

    def __init__(self, position: Position, file: io.FileIO | None = None) -> None:
        self.position = position
        self.file = file
        self.dry = False
        """Whether everything had been read when the file was last looked at."""
        self.half = False
        """Whether a line without its end follows the position."""
        self.final = False
        """Whether the file is given up, so that a line without its end is a line."""
        self.broken = False
        """Whether what was read did not follow from the position, so that the content must be sought anew."""
        self._seen: os.stat_result | None = None

    @property
    def deleted(self) -> bool:
        """Whether the open file has no name any more."""
        return self._seen is not None and self._seen.st_nlink == 0

    @property
    def modified(self) -> int:
        """When the content was last known to change, in nanoseconds."""
        return self.position.modified if self._seen is None else self._seen.st_mtime_ns

    def silent(self, grace: float) -> bool:
        """Whether nobody has written for `grace` seconds, nor renamed the file; a copy is silent from the start."""
        if self.position.turn == "truncated" or self._seen is None:
            return True
        return abs(time.time() - max(self._seen.st_mtime, self._seen.st_ctime)) > grace

    def give_up(self) -> None:
        """Have it read once more, and the half line with it."""
        self.final, self.dry = True, False

    def find(self, followed: Path, here: os.stat_result | None, elsewhere: disk.Found) -> bool:
        """Make sure that the content is open: where it was, under another name, or in a copy of it.

        `here` is what `followed` is now, `elsewhere` are other files it may have been renamed to. Raises OSError if the
        disk does not tell.
        """
        if self.file is None or self.broken:
            self.close()
            self._seek_out(followed, here, elsewhere)
        if self.file is None:
            return False
        status = os.fstat(self.file.fileno())
        if self._seen is None or disk.state(status) != disk.state(self._seen):
            self.dry = False
        self._seen = status
        return True

    def _seek_out(self, followed: Path, here: os.stat_result | None, elsewhere: disk.Found) -> None:
        position = self.position
        # Told to be over: then even the same bytes at the followed path are those of a new content.
        if here is not None and not position.told and self._is(here) and self._adopt(here, followed):
            return
        siblings = disk.siblings(followed, position.path)
        others = [
            (status, path)
            for status, path in [*siblings, *elsewhere]
            if here is None or disk.identity(status) != disk.identity(here)
        ]
        for status, path in others:
            with suppress(PermissionError):
                if self._is(status) and self._adopt(status, path):
                    return
        # A copy is never older than what it is a copy of; and where nothing was read, anything would be one.
        copies = [(status, path) for status, path in siblings if status.st_mtime_ns >= position.modified]
        for status, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns, reverse=True):
            if position.offset == 0 or (here is not None and disk.identity(status) == disk.identity(here)):
                continue
            with suppress(PermissionError):
                if self._adopt(status, path):
                    self.position = replace(self.position, turn="truncated")
                    return

    def _is(self, status: os.stat_result) -> bool:
        # A device may have another number after the machine was started anew; the bytes decide.
        position = self.position
        return status.st_ino == position.inode and (status.st_dev == position.device or position.offset > 0)

    def _adopt(self, status: os.stat_result, path: Path) -> bool:
        """Open a file, if it has what stands before the position."""
        file = disk.open_file(path, status)
        if file is None:
            return False
        if not self.position.holds(file):
            file.close()
            return False
        self.file = file
        device, inode = disk.identity(status)
        self.position = replace(self.position, path=os.path.realpath(path), device=device, inode=inode)
        return True

    async def read(self, name: str, room: int, threads: Threads) -> list[Line]:
        """Read up to `room` lines that stand after the position, and move it behind them.

        Raises OSError; the file is then sought out anew when it is next looked at.
        """
        if self.file is None or self.dry or self.broken:
            return []
        file, position = wrap(self.file, executor=threads.executor), self.position
        start = max(0, position.offset - PROOF)
        known = position.offset - start
        try:
            for count in (READ, PIECE + 2):
                await shielded(file.seek(start))
                found = await shielded(file.read(known + count))
                more = len(found) == known + count
                if not more or found.find(b"\n", known) >= 0:
                    break
        except OSError:
            self.broken = True
            raise
        # What is read proves itself: the file may have been truncated, even refilled, since it was looked at.
        if len(found) < known or zlib.crc32(found[:known]) != position.check:
            self.broken = True
            return []
        lines: list[Line] = []
        end = known
        for text, end_of_text, continued in cut_lines(found, known, final=self.final and not more):
            lines.append(Line(text.decode(errors="replace"), name, continued))
            end = end_of_text
            if len(lines) == room:
                break
        else:
            self.dry = not more
        self.half = end < len(found)
        if lines:
            check = zlib.crc32(found[max(0, end - PROOF) : end])
            self.position = replace(position, offset=start + end, check=check, modified=self.modified)
        return lines

    def close(self) -> None:
        """Let the file go; the position stays."""
        if self.file is not None:
            self.file.close()
        self.file, self._seen, self.broken, self.dry = None, None, False, False


class Followed:
    """One path, through all the contents it ever has.

    `contents` are oldest first. The last is the current one. Those before it are over, and kept open for late writers;
    the one before an unread content is kept as well, as the only proof of where that content begins.
    """

    def __init__(self, path: Path, contents: list[Content], *, grace: float, backlog: int | None = None) -> None:
        self.path = path
        self.contents = contents
        self.released: list[Position] = []
        """Where reading ended in contents that were let go, until somebody takes them."""
        self.turns: list[Turn] = []
        self.here: os.stat_result | None = None
        self._grace = grace
        self._backlog = backlog

    @property
    def over(self) -> bool:
        """Whether there is nothing to follow, and nothing left to tell."""
        return self.here is None and not self.contents and not self.turns

    @property
    def missing(self) -> bool:
        """Whether only a position is left, which may or may not be found again."""
        return self.here is None and bool(self.contents) and all(content.file is None for content in self.contents)

    def cursor(self) -> list[dict[str, Any]]:
        """The positions, as JSON can say them."""
        return [asdict(content.position) for content in self.contents]

    def look(self, elsewhere: disk.Found) -> bool:
        """See what has become of the file, and decide what it means; True: look again after reading, without waiting.

        `elsewhere` are other files that its content may have been renamed to. Raises OSError where the disk does not
        answer; then it may be tried again.
        """
        self.here = here = disk.look(self.path)
        if not self.contents:
            return self._enter()
        moved = self._let_go(elsewhere)
        current = self.contents[-1]
        if len(self.contents) > 1 and current.position.offset == 0:
            # Nothing has been read of it, so nothing proves that it is still the content to go on with.
            before = self.contents[-2]
            before.find(self.path, here, elsewhere)
            after = self._after(before)
            if after and disk.identity(after[0][0]) != current.position.identity:
                self.contents.pop().close()
                current = before
        found = current.find(self.path, here, elsewhere)
        if found and here is not None and current.position.identity == disk.identity(here):
            return moved or current.broken
        after = self._after(current)
        if not current.position.told:
            if not found:
                if not after:
                    return moved
                self._tell(complete=False)
            else:
                deleted = current.deleted and not after
                if not after and not deleted:
                    return moved
                # The file was looked at after its name: what was written until it was renamed is known to be there.
                if not current.dry:
                    return True
                if (deleted or current.half) and not current.silent(self._grace):
                    return moved
                if current.half and not current.final:
                    current.give_up()
                    return True
                self._tell(complete=True)
                if deleted:
                    self.close()
                    self.contents.clear()
                    return True
        return self._begin(*after[0]) if after else moved

    async def read(self, threads: Threads) -> list[Line | Turn]:
        """Read some of what is to come, in its order; raises OSError."""
        items: list[Line | Turn] = list(self.turns)
        self.turns.clear()
        # Shared out, so that a late writer cannot keep the current content waiting.
        room = max(1, (ITEMS - len(items)) // max(1, len(self.contents)))
        for content in self.contents:
            try:
                items += await content.read(self.path.name, room, threads)
            except OSError:
                if not items:
                    raise
        return items

    def close(self) -> None:
        """Let all files go; the positions stay."""
        for content in self.contents:
            content.close()

    # -- what look decides

    def _enter(self) -> bool:
        """Begin with a path nothing is known of."""
        if self.here is None:
            self._backlog = None
            return False
        file = disk.open_file(self.path, self.here)
        if file is None:
            return True
        offset = 0 if self._backlog is None else _line_start(file, self.here.st_size, self._backlog)
        count = min(PROOF, offset)
        check = zlib.crc32(os.pread(file.fileno(), count, offset - count))
        self._backlog = None
        position = Position(
            os.path.realpath(self.path), *disk.identity(self.here), offset, check, self.here.st_mtime_ns
        )
        self.contents.append(Content(position, file))
        return True

    def _begin(self, status: os.stat_result, path: Path) -> bool:
        """Go on with the content that follows the current one."""
        file = disk.open_file(path, status)
        if file is None:
            return True
        turn: Kind = "rotated" if path == self.path else self.contents[-1].position.turn
        position = Position(
            os.path.realpath(path), *disk.identity(status), 0, zlib.crc32(b""), status.st_mtime_ns, turn
        )
        self.contents.append(Content(position, file))
        return True

    def _tell(self, *, complete: bool) -> None:
        current = self.contents[-1]
        turn = current.position.turn
        if not complete and self.here is not None and current.position.inode == self.here.st_ino:
            turn = "truncated"
        current.position = replace(current.position, turn=turn, told=True)
        self.turns.append(Turn(turn, self.path.name, complete))

    def _let_go(self, elsewhere: disk.Found) -> bool:
        """Give up the contents that are over and silent; True: look again after reading."""
        moved = False
        for content in self.contents[:-1]:
            if content is self.contents[-2] and self.contents[-1].position.offset == 0:
                continue
            if content.find(self.path, self.here, elsewhere):
                if not content.dry or not content.silent(self._grace):
                    continue
                if content.half and not content.final:
                    content.give_up()
                    moved = True
                    continue
                if not content.deleted:
                    self.released.append(content.position)
            content.close()
            self.contents.remove(content)
        return moved

    def _after(self, content: Content) -> disk.Found:
        """What was written since `content`, oldest first: rotated siblings not read so far, and the path itself.

        Empty as well while names are just being changed.
        """
        listed = self._rotations(content)
        for _ in range(10):
            before, listed = listed, self._rotations(content)
            # Two equal listings, and the same file behind the path: nothing slipped through between them.
            if [(disk.identity(status), path) for status, path in before] == [
                (disk.identity(status), path) for status, path in listed
            ]:
                break
        else:
            return []
        now = disk.look(self.path)
        if (now and disk.identity(now)) != (self.here and disk.identity(self.here)):
            return []
        ages = {disk.identity(status): disk.age(status, path) for status, path in listed}
        unknown = (content.modified, math.inf, "")
        age = unknown if content.file is None else ages.get(content.position.identity, unknown)
        read = {
            other.position.identity
            for other in self.contents[: self.contents.index(content) + 1]
            if other.file is not None
        }
        after = [
            (status, path)
            for status, path in sorted(listed, key=lambda found: disk.age(*found))
            if status.st_size > 0 and disk.identity(status) not in read and disk.age(status, path) > age
        ]
        return after if now is None else [*after, (now, self.path)]

    def _rotations(self, content: Content) -> disk.Found:
        """The siblings that look like earlier contents of the path, or of what it was a link to."""
        here = self.here and disk.identity(self.here)
        old = disk.unrotated(Path(content.position.path))
        bases = {str(self.path), os.path.realpath(self.path), str(old)}
        return [
            (status, path)
            for status, path in disk.siblings(self.path, content.position.path)
            if disk.identity(status) != here
            and (path == old or any(disk.is_rotation(path, Path(base)) for base in bases))
        ]


class Tail:
    """A file, or all files that match a glob, followed for ever from where an earlier run ended.

    `cursors` are those of the last batch that was stored, or empty: then what exists at the first look is begun at the
    first line start within its last `backlog` bytes. Everything that is unknown later is read from its beginning.
    Cursors of paths that `pattern` does not mean are dropped. A file that was renamed or deleted is kept open until
    `grace` seconds after the last write to it.

    Raises ValueError if the cursors cannot be ones that a Tail has given.
    """

    def __init__(
        self,
        pattern: str | Path,
        cursors: Mapping[str, list[dict[str, Any]]] | None = None,
        *,
        backlog: int = 256 * 1024,
        grace: float = 3.0,
    ) -> None:
        self.pattern = Path(pattern).absolute()
        self._grace = grace
        self._backlog = backlog
        # The pattern itself stays in the cursors, so that they say "looked at" even when no file is there.
        self._cursors: Cursors = {}
        self._followed: dict[Path, Followed] = {}
        for key, positions in (cursors or {}).items():
            if disk.means(self.pattern, key):
                try:
                    contents = [Content(Position(**position)) for position in positions]
                except TypeError:
                    raise ValueError(f"This is no cursor of a Tail: {positions!r}") from None
                self._cursors[key] = [asdict(content.position) for content in contents]
                if contents:
                    self._followed[Path(key)] = Followed(Path(key), contents, grace=grace)
        self._first = not self._cursors
        self._folders: dict[str, disk.Identity] = {}
        self._warned: dict[Path, str] = {}
        self._begun = False

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Yield what is new, as soon as it is there, for ever; to be called once, and closed (`aclosing`).

        Nothing is read ahead: as long as the consumer holds a batch, the files wait. No OSError is raised: it is
        logged once, and tried again every second.
        """
        if self._begun:
            raise RuntimeError("A Tail is followed once.")
        self._begun = True
        # One thread for all that waits for the disk, so that no two of them look or read at once.
        async with Threads("tail", 1) as threads, aclosing(self._batches(threads)) as batches:
            async for batch in batches:
                yield batch

    async def _batches(self, threads: Threads) -> AsyncGenerator[Batch, None]:
        told: Cursors | None = None if self._first else dict(self._cursors)
        self._cursors.setdefault(str(self.pattern), [])
        changes = _Changes()
        try:
            while True:
                moved = await threads.run(self._look)
                for key in set(self._cursors) - {str(path) for path in [*self._followed, self.pattern]}:
                    del self._cursors[key]
                items: list[Line | Turn] = []
                failed = False
                for path, followed in list(self._followed.items()):
                    try:
                        more = await followed.read(threads)
                    except OSError as error:
                        self._warn(path, error)
                        failed = True
                        continue
                    if items and (len(items) + len(more) > ITEMS or _bytes(items) + _bytes(more) > BATCH):
                        told = dict(self._cursors)
                        yield Batch(items, dict(told))
                        items = []
                    items += more
                    self._cursors[str(path)] = followed.cursor()
                    if more:
                        self._warned.pop(path, None)
                    moved = moved or any(content.broken for content in followed.contents)
                if items or self._cursors != told:
                    told = dict(self._cursors)
                    yield Batch(items, dict(told))
                elif failed or not moved:
                    await changes.wait(self._folders)
        finally:
            try:
                await changes.close()
            finally:
                await threads.finish(self._close)

    def _look(self) -> bool:
        """Look at every file; True if something turned out that is to be read, and looked at again, at once."""
        matches = disk.matches(self.pattern, self._followed)
        contents = [content for followed in self._followed.values() for content in followed.contents]
        elsewhere = disk.found(matches) if any(content.file is None for content in contents) else []
        moved = False
        for path, followed in list(self._followed.items()):
            moved = self._look_at(path, followed, elsewhere) or moved
        for path in matches:
            if path not in self._followed and (met := self._meet(path)):
                self._followed[path] = met
                moved = self._look_at(path, met, []) or moved
        for followed in self._followed.values():
            followed.released.clear()
        self._first = False
        for path in [path for path, followed in self._followed.items() if followed.missing][:-MISSING]:
            del self._followed[path]
        self._folders = self._watched()
        return moved

    def _look_at(self, path: Path, followed: Followed, elsewhere: disk.Found) -> bool:
        try:
            moved = followed.look(elsewhere)
        except OSError as error:
            self._warn(path, error)
            return False
        # The pattern itself may be one path: that one is waited for.
        if followed.over and path != self.pattern:
            del self._followed[path]
        return moved

    def _meet(self, path: Path) -> Followed | None:
        """Begin to follow a path; not yet, if its content was renamed and is still read under its old name."""
        contents = []
        for status, _ in disk.found([path]):
            for followed in self._followed.values():
                for content in followed.contents:
                    if content.file is not None and content.position.identity == disk.identity(status):
                        return None
                for position in followed.released:
                    if position.identity == disk.identity(status):
                        contents = [Content(replace(position, turn="rotated", told=False))]
        backlog = self._backlog if self._first else None
        return Followed(path, contents, grace=self._grace, backlog=backlog)

    def _watched(self) -> dict[str, disk.Identity]:
        """The folders in which a change matters, with what they are: one that was made anew is another one."""
        paths = {root} if (root := disk.root(self.pattern)) else set()
        for path, followed in self._followed.items():
            paths.add(path.parent)
            paths.update(Path(content.position.path).parent for content in followed.contents)
        folders = {}
        for path in paths:
            with suppress(OSError):
                status = path.stat()
                if stat.S_ISDIR(status.st_mode):
                    folders[str(path)] = disk.identity(status)
        return folders

    def _warn(self, path: Path, error: OSError) -> None:
        reason = error.strerror or type(error).__name__
        if self._warned.get(path) != reason:
            self._warned[path] = reason
            log.warning("%s cannot be followed for now: %s", path, reason)

    def _close(self) -> None:
        for followed in self._followed.values():
            followed.close()


class _Changes:
    """Waits until something changes in some folders, and a second at most."""

    def __init__(self) -> None:
        self._folders: dict[str, disk.Identity] = {}
        self._watch: AsyncGenerator[Any, None] | None = None
        self._warned = False

    async def wait(self, folders: dict[str, disk.Identity]) -> None:
        """Return after a change in one of the folders; changes since the last call count."""
        if folders != self._folders:
            await self.close()
            self._folders = folders
        if self._watch is None and folders:
            # Short steps: the time until a line is told is between one and two of them.
            self._watch = awatch(
                *folders,
                watch_filter=None,
                step=15,
                debounce=45,
                rust_timeout=LOOK_MS,
                yield_on_timeout=True,
                recursive=False,
            )
        if self._watch is not None:
            try:
                await anext(self._watch)
                return
            except (OSError, RuntimeError, StopAsyncIteration) as error:
                if not self._warned:
                    log.warning("Changes of log files are seen once a second only: %s", error)
                    self._warned = True
                await self.close()
        await asyncio.sleep(LOOK_MS / 1000)

    async def close(self) -> None:
        """End the watching."""
        watch, self._watch, self._folders = self._watch, None, {}
        if watch is not None:
            await watch.aclose()


# -- what the bytes say


def _bytes(items: list[Line | Turn]) -> int:
    return sum(len(item.text) for item in items if isinstance(item, Line))


def _line_start(file: io.FileIO, size: int, backlog: int) -> int:
    """The first offset within the last `backlog` bytes at which a line starts; the end, if none does."""
    if size <= backlog:
        return 0
    # One byte more: a line starts where the byte before it ends another.
    offset = size - backlog - 1
    while offset < size:
        found = os.pread(file.fileno(), READ, offset)
        if not found:
            break
        if (end := found.find(b"\n")) >= 0:
            return offset + end + 1
        offset += len(found)
    return size
