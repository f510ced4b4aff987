"""A followed path with all its contents over time: look at the disk, take the next step, and read."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamlab import Threads

from . import disk
from .chunks import Line
from .content import READ, Content
from .position import Kind, Position
from .rotation import Facts, Place, Rotation, Step, Successor, classify
from .successors import successors

ITEMS = 500
"""Maximum number of items in one batch, and of those that are read from one path between two looks."""


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
        """Status of the path at the last look."""
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
        return [content.position.to_json() for content in self.contents]

    def look(self, elsewhere: disk.Found) -> bool:
        """Check what happened to the file. Return True to look again after reading, without waiting for a change.

        `elsewhere` are other files that its content may have been renamed to. Raises OSError; the caller may retry.
        """
        self.here = disk.look(self.path)
        if not self.contents:
            return self._open_first()
        again = False
        # What precedes an unread content is not closed: see the class.
        for content in self.contents[: -2 if self._is_current_unread() else -1]:
            place = self._find(content, elsewhere)
            again = self._take_step(content, place, Successor.OPEN, []) or again
        if self._is_current_unread():
            self._recheck_current(elsewhere)
        current = self.contents[-1]
        place = self._find(current, elsewhere)
        after = [] if place is Place.AT_PATH else successors(self.path, self.here, self.contents)
        return self._take_step(current, place, Successor.FOUND if after else Successor.NONE, after) or again

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

    # -- the facts

    def _find(self, content: Content, elsewhere: disk.Found) -> Place:
        if not content.find(self.path, self.here, elsewhere):
            return Place.NOT_FOUND
        if self.here is not None and content.position.identity == disk.identity(self.here):
            return Place.AT_PATH
        return Place.DELETED if content.deleted else Place.RENAMED

    def _is_current_unread(self) -> bool:
        """Return whether nothing was read of the current content: then only the one before proves that it is next."""
        return len(self.contents) > 1 and self.contents[-1].position.offset == 0

    def _recheck_current(self, elsewhere: disk.Found) -> None:
        """Close an unread current content if it is not the next one any more."""
        self.contents[-2].find(self.path, self.here, elsewhere)
        after = successors(self.path, self.here, self.contents[:-1])
        if after and disk.identity(after[0][0]) != self.contents[-1].position.identity:
            self.contents.pop().close()

    # -- the steps

    def _take_step(self, content: Content, place: Place, successor: Successor, after: disk.Found) -> bool:
        """Do what follows from the facts. Return True to look again after reading, without waiting for a change."""
        facts = Facts(place, successor, content.position.reported, content.unread, content.is_silent(self._grace))
        match classify(facts).step:
            case Step.WAIT:
                return False
            case Step.CLOSE:
                self._close_rotated(content)
                return False
            case Step.READ:
                pass
            case Step.FINISH:
                content.finish()
            case Step.OPEN_NEXT:
                self._open_next(*after[0])
            case Step.MOVE_TO_NEXT:
                self._report_end(complete=True)
                self._open_next(*after[0])
            case Step.SKIP_TO_NEXT:
                self._report_end(complete=False)
                self._open_next(*after[0])
            case Step.END:
                self._report_end(complete=True)
                self.close()
                self.contents.clear()
        return True

    def _open_first(self) -> bool:
        """Open the first content of a path. Return whether to look again without waiting for a change."""
        if self.here is None:
            self._backlog = None
            return False
        file = disk.open_file(self.path, self.here)
        if file is None:
            return True
        offset = 0 if self._backlog is None else _line_start(file, self.here.st_size, self._backlog)
        self.contents.append(Content(Position.of(file, self.path, self.here, offset=offset), file))
        self._backlog = None
        return True

    def _open_next(self, status: os.stat_result, path: Path) -> None:
        """Open the content after the current one, unless its file was renamed since the look."""
        file = disk.open_file(path, status)
        if file is not None:
            ended_by: Kind = "rotated" if path == self.path else self.contents[-1].position.ended_by
            self.contents.append(Content(Position.of(file, path, status, ended_by=ended_by), file))

    def _report_end(self, *, complete: bool) -> None:
        """Report the end of the current content."""
        current = self.contents[-1]
        kind = current.position.ended_by
        if not complete and self.here is not None and current.position.inode == self.here.st_ino:
            kind = "truncated"
        current.position = replace(current.position, ended_by=kind, reported=True)
        self.rotations.append(Rotation(kind, self.path.name, complete))

    def _close_rotated(self, content: Content) -> None:
        """Close a content before the current one."""
        if content.file is not None and not content.deleted:
            self.released.append(content.position)
        content.close()
        self.contents.remove(content)


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
