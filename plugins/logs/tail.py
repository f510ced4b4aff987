"""Follow log files as `tail -F` does: no line lost, none duplicated, every rotation reported.

A `Tail` is a loop: look (read the status of every file, and decide what changed), read, yield a `Batch`, and wait for a
change when there is nothing more to yield. Only positions are stored. A position has a checksum of the bytes before
it, so changes while the server was down are found in the same way as changes while it runs.

Some losses cannot be prevented, and are reported if they can be detected: lines that were truncated before they were
read, unless an uncompressed copy of them is in the same folder; lines added to a renamed file after it was silent for
the whole grace period; the content of a file that was emptied before its first line was read; and a file of the
same inode whose new content repeats the old one up to our position. On a file system that does not update the status
change time of a renamed file, the grace period starts at the last write instead.
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
from .chunks import CHUNK, Line, split_lines

log = logging.getLogger(__name__)

ITEMS = 500
"""Maximum number of items in one batch."""

BATCH = 1024 * 1024
"""Approximate maximum of text in one batch, in bytes; a long chunk of a line is a batch alone."""

READ = 64 * 1024
"""Number of bytes read at once, unless no line ends within them."""

PROOF = 1024
"""Number of bytes before a position that its checksum covers."""

MISSING = 20
"""Maximum number of positions stored for files of a glob that disappeared while the server was down."""

LOOK_MS = 1000
"""Maximum time between two looks at the disk, in milliseconds."""

Kind = Literal["rotated", "truncated"]
Cursors = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Rotation:
    """The end of a file's content: it was renamed, replaced or deleted ("rotated"), or emptied ("truncated")."""

    kind: Kind
    file: str
    complete: bool
    """Whether the old content is known to have been read to its end."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Lines and rotations in order, and the cursors after them.

    A caller that stores `cursors` together with its results of `items`, in one transaction, and passes the last stored
    ones to the next `Tail`, gets every line exactly once, however it was stopped. `items` may be empty: then only the
    cursors have changed.
    """

    items: list[Line | Rotation]
    cursors: Cursors
    """By absolute path, as JSON values; opaque to the caller."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a content has been read: to the start of a line, or of a chunk of a long line."""

    path: str
    """Last known path of the content, links resolved."""
    device: int
    inode: int
    offset: int
    check: int
    """CRC-32 of the up to `PROOF` bytes before the offset."""
    modified: int
    """Time of modification of the file at the last look, in nanoseconds."""
    turn: Kind = "rotated"
    """Kind of the rotation that ends this content. (The names of the fields are stored in checkpoints.)"""
    told: bool = False
    """Whether that rotation was reported; a file at the followed path is then another content."""

    @property
    def identity(self) -> disk.Identity:
        """Return device and inode."""
        return self.device, self.inode

    def holds(self, file: io.FileIO) -> bool:
        """Return whether the bytes before the offset are those that were read."""
        count = min(PROOF, self.offset)
        proof = os.pread(file.fileno(), count, self.offset - count)
        return len(proof) == count and zlib.crc32(proof) == self.check


class Content:
    """A content that is read: a position, and its open file, if it was found."""

    def __init__(self, position: Position, file: io.FileIO | None = None) -> None:
        self.position = position
        self.file = file
        self.dry = False
        """Whether everything had been read at the last look."""
        self.half = False
        """Whether a line without a line break follows the position."""
        self.final = False
        """Whether the file is complete, so that its last line needs no line break."""
        self.broken = False
        """Whether the bytes did not match the position, so that the content must be searched again."""
        self._seen: os.stat_result | None = None

    @property
    def deleted(self) -> bool:
        """Return whether the open file was unlinked."""
        return self._seen is not None and self._seen.st_nlink == 0

    @property
    def modified(self) -> int:
        """Return the last known time of modification, in nanoseconds."""
        return self.position.modified if self._seen is None else self._seen.st_mtime_ns

    def silent(self, grace: float) -> bool:
        """Return whether the file was neither written nor renamed for `grace` seconds; a copy is always silent."""
        if self.position.turn == "truncated" or self._seen is None:
            return True
        return abs(time.time() - max(self._seen.st_mtime, self._seen.st_ctime)) > grace

    def finish(self) -> None:
        """Read the file once more, including a last line without a line break."""
        self.final, self.dry = True, False

    def find(self, followed: Path, here: os.stat_result | None, elsewhere: disk.Found) -> bool:
        """Make sure that the content is open, and return whether it is: at its path, under another name, or as a copy.

        `here` is the status of `followed` now, `elsewhere` are other files it may have been renamed to. Raises OSError.
        """
        if self.file is None or self.broken:
            self.close()
            self._search(followed, here, elsewhere)
        if self.file is None:
            return False
        status = os.fstat(self.file.fileno())
        if self._seen is None or disk.state(status) != disk.state(self._seen):
            self.dry = False
        self._seen = status
        return True

    def _search(self, followed: Path, here: os.stat_result | None, elsewhere: disk.Found) -> None:
        position = self.position
        # After a reported rotation, even the same bytes at the followed path are a new content.
        if here is not None and not position.told and self._is_same_inode(here) and self._adopt(here, followed):
            return
        siblings = disk.siblings(followed, position.path)
        others = [
            (status, path)
            for status, path in [*siblings, *elsewhere]
            if here is None or disk.identity(status) != disk.identity(here)
        ]
        for status, path in others:
            with suppress(PermissionError):
                if self._is_same_inode(status) and self._adopt(status, path):
                    return
        # A copy is never older than its original. If nothing was read yet, any file would match.
        copies = [(status, path) for status, path in siblings if status.st_mtime_ns >= position.modified]
        for status, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns, reverse=True):
            if position.offset == 0 or (here is not None and disk.identity(status) == disk.identity(here)):
                continue
            with suppress(PermissionError):
                if self._adopt(status, path):
                    self.position = replace(self.position, turn="truncated")
                    return

    def _is_same_inode(self, status: os.stat_result) -> bool:
        # A device may have another number after a reboot; then the checksum decides.
        position = self.position
        return status.st_ino == position.inode and (status.st_dev == position.device or position.offset > 0)

    def _adopt(self, status: os.stat_result, path: Path) -> bool:
        """Open a file, and return whether it has the bytes before the position."""
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

    async def read(self, name: str, limit: int, threads: Threads) -> list[Line]:
        """Read up to `limit` lines after the position, and advance it.

        Raises OSError; the next look then searches the file again.
        """
        if self.file is None or self.dry or self.broken:
            return []
        file, position = wrap(self.file, executor=threads.executor), self.position
        start = max(0, position.offset - PROOF)
        known = position.offset - start
        try:
            for count in (READ, CHUNK + 2):
                await shielded(file.seek(start))
                found = await shielded(file.read(known + count))
                more = len(found) == known + count
                if not more or found.find(b"\n", known) >= 0:
                    break
        except OSError:
            self.broken = True
            raise
        # The file may have been truncated, and even refilled, since the look: the checksum detects it.
        if len(found) < known or zlib.crc32(found[:known]) != position.check:
            self.broken = True
            return []
        lines: list[Line] = []
        end = known
        for text, end_of_text, continued in split_lines(found, known, final=self.final and not more):
            lines.append(Line(text.decode(errors="replace"), name, continued))
            end = end_of_text
            if len(lines) == limit:
                break
        else:
            self.dry = not more
        self.half = end < len(found)
        if lines:
            check = zlib.crc32(found[max(0, end - PROOF) : end])
            self.position = replace(position, offset=start + end, check=check, modified=self.modified)
        return lines

    def close(self) -> None:
        """Close the file; the position remains."""
        if self.file is not None:
            self.file.close()
        self.file, self._seen, self.broken, self.dry = None, None, False, False


class FollowedPath:
    """A path with all its contents over time.

    `contents` are oldest first. The last is the current one. Those before it were rotated, and stay open for late
    writers; the one before an unread content stays open, too, since only it proves where that content begins.
    """

    def __init__(self, path: Path, contents: list[Content], *, grace: float, backlog: int | None = None) -> None:
        self.path = path
        self.contents = contents
        self.released: list[Position] = []
        """Last positions of contents that were closed, until another path adopts them."""
        self.rotations: list[Rotation] = []
        self.here: os.stat_result | None = None
        self._grace = grace
        self._backlog = backlog

    @property
    def over(self) -> bool:
        """Return whether there is nothing to follow, and nothing left to report."""
        return self.here is None and not self.contents and not self.rotations

    @property
    def missing(self) -> bool:
        """Return whether only positions are left, whose files were not found."""
        return self.here is None and bool(self.contents) and all(content.file is None for content in self.contents)

    def cursor(self) -> list[dict[str, Any]]:
        """Return the positions as JSON values."""
        return [asdict(content.position) for content in self.contents]

    def look(self, elsewhere: disk.Found) -> bool:
        """Check what happened to the file. Return True to look again after reading, without waiting for a change.

        `elsewhere` are other files that its content may have been renamed to. Raises OSError; the caller may retry.
        """
        self.here = here = disk.look(self.path)
        if not self.contents:
            return self._open_first()
        moved = self._close_rotated(elsewhere)
        current = self.contents[-1]
        if len(self.contents) > 1 and current.position.offset == 0:
            # Nothing of it has been read, so nothing proves that it is still the content that comes next.
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
                self._emit_rotation(complete=False)
            else:
                deleted = current.deleted and not after
                if not after and not deleted:
                    return moved
                # The file's status is newer than the path's: it includes all writes up to the renaming.
                if not current.dry:
                    return True
                if (deleted or current.half) and not current.silent(self._grace):
                    return moved
                if current.half and not current.final:
                    current.finish()
                    return True
                self._emit_rotation(complete=True)
                if deleted:
                    self.close()
                    self.contents.clear()
                    return True
        return self._open_next(*after[0]) if after else moved

    async def read(self, threads: Threads) -> list[Line | Rotation]:
        """Read the next items, in order. Raises OSError."""
        items: list[Line | Rotation] = list(self.rotations)
        self.rotations.clear()
        # Divided among the contents, so that a late writer cannot delay the current one.
        limit = max(1, (ITEMS - len(items)) // max(1, len(self.contents)))
        for content in self.contents:
            try:
                items += await content.read(self.path.name, limit, threads)
            except OSError:
                if not items:
                    raise
        return items

    def close(self) -> None:
        """Close all files; the positions remain."""
        for content in self.contents:
            content.close()

    # -- the decisions of `look`

    def _open_first(self) -> bool:
        """Open the first content of a path."""
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

    def _open_next(self, status: os.stat_result, path: Path) -> bool:
        """Open the content that follows the current one."""
        file = disk.open_file(path, status)
        if file is None:
            return True
        turn: Kind = "rotated" if path == self.path else self.contents[-1].position.turn
        position = Position(
            os.path.realpath(path), *disk.identity(status), 0, zlib.crc32(b""), status.st_mtime_ns, turn
        )
        self.contents.append(Content(position, file))
        return True

    def _emit_rotation(self, *, complete: bool) -> None:
        current = self.contents[-1]
        turn = current.position.turn
        if not complete and self.here is not None and current.position.inode == self.here.st_ino:
            turn = "truncated"
        current.position = replace(current.position, turn=turn, told=True)
        self.rotations.append(Rotation(turn, self.path.name, complete))

    def _close_rotated(self, elsewhere: disk.Found) -> bool:
        """Close rotated contents that are silent. Return True to look again after reading."""
        moved = False
        for content in self.contents[:-1]:
            if content is self.contents[-2] and self.contents[-1].position.offset == 0:
                continue
            if content.find(self.path, self.here, elsewhere):
                if not content.dry or not content.silent(self._grace):
                    continue
                if content.half and not content.final:
                    content.finish()
                    moved = True
                    continue
                if not content.deleted:
                    self.released.append(content.position)
            content.close()
            self.contents.remove(content)
        return moved

    def _after(self, content: Content) -> disk.Found:
        """Return the files written after `content`, oldest first: unread rotated siblings, and the path itself.

        It is empty as well while a rotation is in progress.
        """
        listed = self._rotated_siblings(content)
        for _ in range(10):
            before, listed = listed, self._rotated_siblings(content)
            # Two equal listings, and the same file at the path: no file was missed between them.
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

    def _rotated_siblings(self, content: Content) -> disk.Found:
        """Return the siblings that look like earlier contents of the path, or of its link target."""
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
    """A file, or all files that match a glob, followed from the cursors of an earlier run.

    `cursors` are those of the last stored batch, or empty: then files that exist at the first look are read from the
    first line start within their last `backlog` bytes. Files that appear later are read from their beginning.
    Cursors of paths that `pattern` does not match are dropped. A renamed or deleted file stays open until
    `grace` seconds after the last write to it.

    Raises ValueError if the cursors are not those of a Tail.
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
        # The pattern itself is always in the cursors: it marks that there was a first look, even without a file.
        self._cursors: Cursors = {}
        self._followed: dict[Path, FollowedPath] = {}
        for key, positions in (cursors or {}).items():
            if disk.is_match(self.pattern, key):
                try:
                    contents = [Content(Position(**position)) for position in positions]
                except TypeError:
                    raise ValueError(f"This is not a cursor of a Tail: {positions!r}") from None
                self._cursors[key] = [asdict(content.position) for content in contents]
                if contents:
                    self._followed[Path(key)] = FollowedPath(Path(key), contents, grace=grace)
        self._first = not self._cursors
        self._folders: dict[str, disk.Identity] = {}
        self._warned: dict[Path, str] = {}
        self._begun = False

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Yield new items as soon as they are written, without end. Call it once, and close it (`aclosing`).

        Nothing is read ahead: while the consumer processes a batch, no file is read. An OSError is not raised, but
        logged once, and retried every second.
        """
        if self._begun:
            raise RuntimeError("A Tail can be followed only once.")
        self._begun = True
        # One thread for all access to the disk, so that looks and reads never overlap.
        async with Threads("tail", 1) as threads, aclosing(self._batches(threads)) as batches:
            async for batch in batches:
                yield batch

    async def _batches(self, threads: Threads) -> AsyncGenerator[Batch, None]:
        yielded: Cursors | None = None if self._first else dict(self._cursors)
        self._cursors.setdefault(str(self.pattern), [])
        changes = _Changes()
        try:
            while True:
                moved = await threads.run(self._look)
                for key in set(self._cursors) - {str(path) for path in [*self._followed, self.pattern]}:
                    del self._cursors[key]
                items: list[Line | Rotation] = []
                failed = False
                for path, followed in list(self._followed.items()):
                    try:
                        more = await followed.read(threads)
                    except OSError as error:
                        self._warn(path, error)
                        failed = True
                        continue
                    if items and (len(items) + len(more) > ITEMS or _bytes(items) + _bytes(more) > BATCH):
                        yielded = dict(self._cursors)
                        yield Batch(items, dict(yielded))
                        items = []
                    items += more
                    self._cursors[str(path)] = followed.cursor()
                    if more:
                        self._warned.pop(path, None)
                    moved = moved or any(content.broken for content in followed.contents)
                if items or self._cursors != yielded:
                    yielded = dict(self._cursors)
                    yield Batch(items, dict(yielded))
                elif failed or not moved:
                    await changes.wait(self._folders)
        finally:
            try:
                await changes.close()
            finally:
                await threads.finish(self._close)

    def _look(self) -> bool:
        """Look at every file. Return True to look again after reading, without waiting for a change."""
        matches = disk.matches(self.pattern, self._followed)
        contents = [content for followed in self._followed.values() for content in followed.contents]
        elsewhere = disk.found(matches) if any(content.file is None for content in contents) else []
        moved = False
        for path, followed in list(self._followed.items()):
            moved = self._look_at(path, followed, elsewhere) or moved
        for path in matches:
            if path not in self._followed and (new := self._start_following(path)):
                self._followed[path] = new
                moved = self._look_at(path, new, []) or moved
        for followed in self._followed.values():
            followed.released.clear()
        self._first = False
        for path in [path for path, followed in self._followed.items() if followed.missing][:-MISSING]:
            del self._followed[path]
        self._folders = self._watched()
        return moved

    def _look_at(self, path: Path, followed: FollowedPath, elsewhere: disk.Found) -> bool:
        try:
            moved = followed.look(elsewhere)
        except OSError as error:
            self._warn(path, error)
            return False
        # A pattern that is a single path is never dropped: its file may be created later.
        if followed.over and path != self.pattern:
            del self._followed[path]
        return moved

    def _start_following(self, path: Path) -> FollowedPath | None:
        """Follow a new path. Return None while its content was renamed and is still read under its old name."""
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
        return FollowedPath(path, contents, grace=self._grace, backlog=backlog)

    def _watched(self) -> dict[str, disk.Identity]:
        """Return the folders to watch, with their identity: a folder that was recreated is a new one."""
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
            log.warning("%s cannot be followed: %s (retrying)", path, reason)

    def _close(self) -> None:
        for followed in self._followed.values():
            followed.close()


class _Changes:
    """Waits for a change in some folders, at most a second."""

    def __init__(self) -> None:
        self._folders: dict[str, disk.Identity] = {}
        self._watch: AsyncGenerator[Any, None] | None = None
        self._warned = False

    async def wait(self, folders: dict[str, disk.Identity]) -> None:
        """Return after a change in one of the folders, or at once if there was one since the last call."""
        if folders != self._folders:
            await self.close()
            self._folders = folders
        if self._watch is None and folders:
            # Short steps: a line is delayed by one to two of them.
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
                    log.warning("Log files cannot be watched, and are read once a second: %s", error)
                    self._warned = True
                await self.close()
        await asyncio.sleep(LOOK_MS / 1000)

    async def close(self) -> None:
        """Stop watching."""
        watch, self._watch, self._folders = self._watch, None, {}
        if watch is not None:
            await watch.aclose()


def _bytes(items: list[Line | Rotation]) -> int:
    return sum(len(item.text) for item in items if isinstance(item, Line))


def _line_start(file: io.FileIO, size: int, backlog: int) -> int:
    """Return the first offset of a line within the last `backlog` bytes, or the end if there is none."""
    if size <= backlog:
        return 0
    # One byte more: a line starts after the line break of another.
    offset = size - backlog - 1
    while offset < size:
        found = os.pread(file.fileno(), READ, offset)
        if not found:
            break
        if (end := found.find(b"\n")) >= 0:
            return offset + end + 1
        offset += len(found)
    return size
