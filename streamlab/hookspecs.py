"""The hooks: what a plugin may be asked, and the marks on question and answer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from aiohttp import web

    from .scenario import Scenario
    from .streaming.outcome import StreamSummary
    from .tasks import Task

hookspec = pluggy.HookspecMarker("streamlab")
hookimpl = pluggy.HookimplMarker("streamlab")


@hookspec
def register_scenarios() -> Iterable[type[Scenario]]:
    """Name the scenarios this plugin brings; asked once, before a socket is bound."""


@hookspec
def register_tasks() -> Iterable[Task]:
    """Name the kinds of long tasks this plugin brings; asked once, before a socket is bound."""


@hookspec
def lifespan(app: web.Application) -> AbstractAsyncContextManager[None]:
    """Return what is held open while the server serves: entered before the first request, left last in, first out."""


@hookspec
def worker_lifespan(app: web.Application) -> AbstractAsyncContextManager[None] | None:
    """Return what `streamlab worker` holds open, which serves nobody; None where all work is the server's own.

    It is not entered by a server, nor `lifespan` by a worker.
    """


@hookspec
def health() -> str | None:
    """Return why this works only in part (a source cannot be read, an upstream is down), or None while all is well.

    One sentence for /health, the table at start and `streamlab check`, which calls it without a `lifespan`: clients
    read it, so it contains no secret and no absolute path. Called from the event loop at every /health: return what
    the plugin has noticed at its work, look nothing up.
    """


@hookspec
def on_stream_end(request: web.Request, summary: StreamSummary) -> None:
    """Hear that a stream is over, whatever the reason; must neither block nor raise."""
