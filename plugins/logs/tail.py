"""Follow log files as `tail -F` does: no line lost, none duplicated, every rotation reported.

A `Tail` is a loop: look (read the status of every file, and decide what happened to it and what to do: rotation.py),
read, yield a `Batch`, and wait for a change when there is nothing more to yield. Only positions are stored. A position
has a checksum of the bytes before it, so changes while the server was down are found in the same way as changes while
it runs.

Some losses cannot be prevented, and are reported if they can be detected: lines that were truncated before they were
read, unless an uncompressed copy of them is in the same folder; lines added to a renamed file after it was silent for
the whole grace period; the content of a file that was emptied before its first line was read; and a file of the
same inode whose new content repeats the old one up to the position. On a file system that does not update the status
change time of a renamed file, the grace period starts at the last write instead.
"""

import logging
import stat
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamlab import Threads

from . import disk
from .changes import MAX_LOOKS, Changes
from .chunks import Line
from .content import Content
from .followed_path import ITEMS, FollowedPath
from .position import Position
from .rotation import Rotation

log = logging.getLogger(__name__)

BATCH = 1024 * 1024
"""Approximate maximum of text in one batch, in bytes; a long chunk of a line is a batch alone."""

MISSING = 20
"""Maximum number of positions stored for files of a glob that disappeared while the server was down."""

Cursors = dict[str, list[dict[str, Any]]]


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
                    contents = [Content(Position.from_json(position)) for position in positions]
                except (AttributeError, TypeError):
                    raise ValueError(f"This is not a cursor of a Tail: {positions!r}") from None
                self._cursors[key] = [content.position.to_json() for content in contents]
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
        async with (
            Threads("tail", 1) as threads,
            aclosing(Changes()) as changes,
            aclosing(self._batches(threads, changes)) as batches,
        ):
            async for batch in batches:
                yield batch

    async def _batches(self, threads: Threads, changes: Changes) -> AsyncGenerator[Batch, None]:
        yielded: Cursors | None = None if self._first else dict(self._cursors)
        self._cursors.setdefault(str(self.pattern), [])
        quiet = 0
        try:
            while True:
                again = await threads.run(self._look)
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
                    again = again or any(content.stale for content in followed.contents)
                if items or self._cursors != yielded:
                    yielded = dict(self._cursors)
                    yield Batch(items, dict(yielded))
                    quiet = 0
                elif failed or not again:
                    quiet = 1 if failed else min(quiet + 1, MAX_LOOKS)
                    await changes.wait(self._folders, quiet)
        finally:
            await threads.finish(self._close)

    def _look(self) -> bool:
        """Look at every file. Return True to look again after reading, without waiting for a change."""
        matches = disk.matches(self.pattern, self._followed)
        contents = [content for followed in self._followed.values() for content in followed.contents]
        elsewhere = disk.found(matches) if any(content.file is None for content in contents) else []
        again = False
        for path, followed in list(self._followed.items()):
            again = self._look_at(path, followed, elsewhere) or again
        for path in matches:
            if path not in self._followed and (new := self._start_following(path)):
                self._followed[path] = new
                again = self._look_at(path, new, []) or again
        for followed in self._followed.values():
            followed.released.clear()
        self._first = False
        for path in [path for path, followed in self._followed.items() if followed.missing][:-MISSING]:
            del self._followed[path]
        self._folders = self._watched()
        return again

    def _look_at(self, path: Path, followed: FollowedPath, elsewhere: disk.Found) -> bool:
        try:
            again = followed.look(elsewhere)
        except OSError as error:
            self._warn(path, error)
            return False
        # A pattern that is a single path is never dropped: its file may be created later.
        if followed.over and path != self.pattern:
            del self._followed[path]
        return again

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
                        contents = [Content(replace(position, ended_by="rotated", reported=False))]
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


def _bytes(items: list[Line | Rotation]) -> int:
    return sum(len(item.text) for item in items if isinstance(item, Line))
