"""The lifespans of all plugins: entered one after the other, each within a limit, and left in reverse."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from aiohttp import web

from streamlab.problems import Problem

from .registry import Registry

log = logging.getLogger(__name__)

REPORT_SECONDS = 2.0
"""Time after which a plugin that has not started is reported, in seconds."""


@asynccontextmanager
async def lifespans(
    app: web.Application, registry: Registry, *, start_seconds: float, stop_at: Callable[[], float | None]
) -> AsyncIterator[None]:
    """Hold every plugin's lifespan open, each in its own task: where one fails, only that plugin fails.

    A plugin that has not started after `start_seconds` is out of service, and the others start. `stop_at` is the time
    of the loop by which all of them must have been left, once it is known; one that is not is cancelled.
    """
    async with asyncio.TaskGroup() as group:
        held: list[_Lifespan] = []
        for name, enter in registry.lifespans(app):
            lifespan = _Lifespan(registry, name, enter)
            held.append(lifespan)
            await lifespan.start(group, start_seconds)
        yield
        for lifespan in reversed(held):
            await lifespan.stop(stop_at())


class _Lifespan:
    """The lifespan of one plugin, in its own task."""

    def __init__(self, registry: Registry, name: str, enter: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self._registry = registry
        self._name = name
        self._enter = enter
        self._settled = asyncio.Event()
        """Set when the plugin has started or failed."""
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def _plugin(self) -> str:
        return self._name.partition(":")[0]

    async def start(self, group: asyncio.TaskGroup, seconds: float) -> None:
        """Enter it, and wait until it has started or failed; log a warning when that takes long, fail at the limit."""
        self._task = group.create_task(self._run(), name=f"lifespan of {self._name}")
        if await self._has_settled(min(REPORT_SECONDS, seconds)):
            return
        log.warning("waiting for the plugin %s to start; its limit is %g s", self._plugin, seconds)
        if not await self._has_settled(seconds - REPORT_SECONDS):
            self._closing.set()
            self._task.cancel()
            self._registry.fail(self._name, Problem(503, f"It did not start within {seconds:g} s."))

    async def _has_settled(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True

    async def _run(self) -> None:
        try:
            async with self._enter():
                self._settled.set()
                await self._closing.wait()
        except Exception as error:
            if not self._closing.is_set() or self._settled.is_set():
                self._registry.fail(self._name, error)
        finally:
            self._settled.set()

    async def stop(self, stop_at: float | None) -> None:
        """Leave it; cancel it if that is not done by `stop_at`."""
        assert self._task is not None
        self._closing.set()
        left = None if stop_at is None else max(0.0, stop_at - asyncio.get_running_loop().time())
        await asyncio.wait({self._task}, timeout=left)
        if not self._task.done():
            log.error("the plugin %s did not stop in time: its lifespan is cancelled", self._plugin)
            self._task.cancel()
