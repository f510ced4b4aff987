"""Wait for changes in folders: by notifications of the operating system, and at least once a second."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from watchfiles import awatch

from . import disk

log = logging.getLogger(__name__)

LOOK_MS = 1000
"""Maximum time between two looks at the disk, in milliseconds."""


class Changes:
    """Waits for a change in some folders. Close it after use (`aclosing`)."""

    def __init__(self) -> None:
        self._folders: dict[str, disk.Identity] = {}
        self._watch: AsyncGenerator[Any, None] | None = None
        self._warned = False

    async def wait(self, folders: dict[str, disk.Identity]) -> None:
        """Return after a change in one of the folders, or at once if there was one since the last call.

        It also returns after `LOOK_MS`. A folder with another identity is watched again: it was recreated.
        """
        if folders != self._folders:
            await self.aclose()
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
                await self.aclose()
        await asyncio.sleep(LOOK_MS / 1000)

    async def aclose(self) -> None:
        """Stop watching."""
        watch, self._watch, self._folders = self._watch, None, {}
        if watch is not None:
            await watch.aclose()
