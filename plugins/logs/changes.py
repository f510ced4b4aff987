"""Wait for changes in folders: by notifications of the operating system, and every few seconds even so."""

import asyncio
import ctypes
import logging
import os
import sys
from collections.abc import AsyncGenerator, Collection
from contextlib import suppress
from typing import Any, Protocol

from watchfiles import awatch

from . import disk

log = logging.getLogger(__name__)

LOOK_MS = 1000
"""Maximum time between two looks at the disk, in milliseconds: a network file system does not report all changes."""

MAX_LOOKS = 5
"""Factor by which that time grows while nothing changes."""

SETTLE_SECONDS = 0.015
"""Time after a change for which others are waited for, so that lines that are written one by one are read together."""

_INOTIFY_BYTES = 64 * 1024
"""Maximum bytes of notifications read at once; they only say that something has changed."""

_INOTIFY_MASK = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
"""IN_MODIFY, IN_ATTRIB, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF."""


class _Watch(Protocol):
    """What reports changes in folders."""

    async def wait(self, seconds: float) -> None:
        """Return after a change, at once if there was one since the last call; at the latest after `seconds`."""

    async def aclose(self) -> None:
        """Stop watching."""


class _Inotify:
    """Notifications of Linux, which wake the event loop only when something changes. Source: inotify(7)."""

    def __init__(self, folders: Collection[str]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            for folder in folders:
                if libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _INOTIFY_MASK) < 0:
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)
            self._loop.add_reader(self._descriptor, self._read)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _read(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._descriptor, _INOTIFY_BYTES)
        self._changed.set()

    async def wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
                await asyncio.sleep(SETTLE_SECONDS)
        self._changed.clear()  # before the look, which sees what changed until now

    async def aclose(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)


class _Watchfiles:
    """Notifications of other systems, looked for in a thread, in short steps: each delays a line."""

    def __init__(self, folders: Collection[str]) -> None:
        self._changes: AsyncGenerator[Any, None] = awatch(
            *folders,
            watch_filter=None,
            step=15,
            debounce=45,
            rust_timeout=LOOK_MS,
            yield_on_timeout=True,
            recursive=False,
        )

    async def wait(self, seconds: float) -> None:
        try:
            await anext(self._changes)
        except (RuntimeError, StopAsyncIteration) as error:
            raise OSError(str(error)) from error

    async def aclose(self) -> None:
        await self._changes.aclose()


def watch(folders: Collection[str]) -> _Watch:
    """Watch folders; raises OSError where that is not possible, now or while waiting."""
    return _Inotify(folders) if sys.platform == "linux" else _Watchfiles(folders)


class Changes:
    """Waits for a change in some folders. Close it after use (`aclosing`)."""

    def __init__(self) -> None:
        self._folders: dict[str, disk.Identity] = {}
        self._watch: _Watch | None = None
        self._warned = False

    async def wait(self, folders: dict[str, disk.Identity], looks: int = 1) -> None:
        """Return after a change in one of the folders, or at once if there was one since the last call.

        It also returns after `LOOK_MS`, or `looks` times that where changes are reported. A folder with another
        identity is watched again: it was recreated.
        """
        if folders != self._folders:
            await self.aclose()
            self._folders = folders
        try:
            if self._watch is None and folders:
                self._watch = watch(folders)
                await asyncio.sleep(SETTLE_SECONDS)  # what changed before is not reported: look once more
                return
            if self._watch is not None:
                await self._watch.wait(looks * LOOK_MS / 1000)
                return
        except OSError as error:
            if not self._warned:
                log.warning("Log files cannot be watched, and are read once a second: %s", error)
                self._warned = True
            await self.aclose()
        await asyncio.sleep(LOOK_MS / 1000)

    async def aclose(self) -> None:
        """Stop watching."""
        closed, self._watch, self._folders = self._watch, None, {}
        if closed is not None:
            await closed.aclose()
