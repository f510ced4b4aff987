"""The probe in a server under test: a plugin that reports what is open in the process."""

import asyncio
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import PrivateAttr

from streamlab import Scenario, StreamSummary, endpoint, hookimpl
from streamlab.streaming.drain import STREAMS
from streamlab.testing.loop_watch import LoopWatch


class ConformanceProbe(Scenario):
    """What is open in the process of this server, and the memory and processor time it has used."""

    _ended: deque[dict[str, Any]] = PrivateAttr(default_factory=lambda: deque(maxlen=1000))
    _watch: LoopWatch = PrivateAttr()

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Watch the event loop while the server runs."""
        with LoopWatch() as self._watch:
            yield

    @endpoint("GET", "/conformance/state", sends="application/json", curl="{url}")
    async def state(self, request: web.Request) -> web.Response:
        """Report what is open now, what it has cost so far, which streams have ended, and what blocked the loop."""
        usage = os.times()
        state = {
            "streams": len(request.config_dict[STREAMS]),
            "tasks": sorted(_name(task) for task in asyncio.all_tasks()),
            "files": sorted(_open_files()),
            # The threads of the event loop's default pool are created once and remain.
            "threads": sorted(thread.name for thread in threading.enumerate() if "asyncio_" not in thread.name),
            "children": sorted(_children()),
            "memory": _resident_bytes(),
            "cpu": usage.user + usage.system,
            "ended": list(self._ended),
            "blocks": list(self._watch.blocks),
            "watched": self._watch.seconds,
        }
        return web.json_response(state)

    @hookimpl
    def on_stream_end(self, request: web.Request, summary: StreamSummary) -> None:
        """Record how a stream ended, and when."""
        self._ended.append({"route": summary.route, "outcome": summary.outcome.value, "at": time.monotonic()})


def _name(task: "asyncio.Task[Any]") -> str:
    coroutine = task.get_coro()
    return str(getattr(coroutine, "__qualname__", coroutine))


def _open_files() -> list[str]:
    folder = Path("/proc/self/fd" if Path("/proc/self/fd").is_dir() else "/dev/fd")
    found = []
    for entry in folder.iterdir():
        try:
            found.append(str(entry.readlink()))
        except OSError:  # the descriptor of the listing itself, closed by now; or a system whose entries are not links
            continue
    return found


def _children() -> list[str]:
    found: list[str] = []
    for task in Path("/proc/self/task").glob("*/children"):
        try:
            found += task.read_text().split()
        except OSError:
            continue
    return found


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Return the probe."""
    return [ConformanceProbe]
