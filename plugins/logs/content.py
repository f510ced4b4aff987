"""One content of a log file: find its file, whatever its name is now, and read its lines."""

import io
import os
import time
from contextlib import suppress
from dataclasses import replace
from enum import Enum, auto
from pathlib import Path

from aiofiles.threadpool import wrap

from streamlab import Threads, shielded

from . import disk
from .chunks import CHUNK, Line, split_lines
from .position import Position

READ = 64 * 1024
"""Number of bytes read at once, unless no line ends within them."""


class Unread(Enum):
    """What remains to be read of a content."""

    LINES = auto()
    """Possibly lines: its end has not been reached, or it has changed since."""
    PARTIAL_LINE = auto()
    """Only a last line without a line break."""
    NOTHING = auto()


class Content:
    """A content that is read: a position, and its open file, if it was found."""

    def __init__(self, position: Position, file: io.FileIO | None = None) -> None:
        self.position = position
        self.file = file
        self.unread = Unread.LINES
        self.stale = False
        """Whether reading failed, or found other bytes before the position: the file must be searched again."""
        self._final = False
        """Whether the file is complete, so that its last line needs no line break."""
        self._seen: os.stat_result | None = None

    @property
    def deleted(self) -> bool:
        """Return whether the open file was unlinked."""
        return self._seen is not None and self._seen.st_nlink == 0

    @property
    def modified(self) -> int:
        """Return the last known time of modification, in nanoseconds."""
        return self.position.modified if self._seen is None else self._seen.st_mtime_ns

    def is_silent(self, grace: float) -> bool:
        """Return whether the file was neither written nor renamed for `grace` seconds; a copy is always silent."""
        if self.position.ended_by == "truncated" or self._seen is None:
            return True
        return abs(time.time() - max(self._seen.st_mtime, self._seen.st_ctime)) > grace

    def find(self, followed: Path, here: os.stat_result | None, elsewhere: disk.Found) -> bool:
        """Make sure that the content is open, and return whether it is: at its path, under another name, or as a copy.

        `here` is the status of `followed` now, `elsewhere` are other files it may have been renamed to. Raises OSError.
        """
        if self.file is None or self.stale:
            self.close()
            self._search(followed, here, elsewhere)
        if self.file is None:
            return False
        status = os.fstat(self.file.fileno())
        if self._seen is None or disk.state(status) != disk.state(self._seen):
            self.unread = Unread.LINES
        self._seen = status
        return True

    def _search(self, followed: Path, here: os.stat_result | None, elsewhere: disk.Found) -> None:
        position = self.position
        # After a reported rotation, even the same bytes at the followed path are a new content.
        if here is not None and not position.reported and self._is_same_inode(here) and self._adopt(here, followed):
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
                    self.position = replace(self.position, ended_by="truncated")
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
        if not self.position.is_in(file):
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
        if self.file is None or self.unread is not Unread.LINES or self.stale:
            return []
        file, position = wrap(self.file, executor=threads.executor), self.position
        start = position.check_start
        known = position.offset - start
        try:
            for count in (READ, CHUNK + 2):
                await shielded(file.seek(start))
                found = await shielded(file.read(known + count))
                more = len(found) == known + count
                if not more or found.find(b"\n", known) >= 0:
                    break
        except OSError:
            self.stale = True
            raise
        # The file may have been truncated, and even refilled, since the look: the checksum detects it.
        if not position.matches(found[:known]):
            self.stale = True
            return []
        lines: list[Line] = []
        end = known
        for text, end_of_text, continued in split_lines(found, known, final=self._final and not more):
            lines.append(Line(text.decode(errors="replace"), name, continued))
            end = end_of_text
            if len(lines) == limit:
                break
        else:
            if not more:
                self.unread = Unread.PARTIAL_LINE if end < len(found) else Unread.NOTHING
        if lines:
            self.position = position.advanced(found, end, self.modified)
        return lines

    def finish(self) -> None:
        """Read the file once more, including a last line without a line break."""
        self._final, self.unread = True, Unread.LINES

    def close(self) -> None:
        """Close the file; the position remains."""
        if self.file is not None:
            self.file.close()
        self.file, self._seen, self.stale, self.unread = None, None, False, Unread.LINES
