"""The hooks that a plugin may implement, and the decorators that mark specification and implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer
    from aiohttp import web

    from .scenario import Scenario
    from .streaming.outcome import StreamSummary
    from .tasks import Task

hookspec = pluggy.HookspecMarker("streamlab")
hookimpl = pluggy.HookimplMarker("streamlab")
"""Decorator that marks a function of a plugin, or a method of a scenario, as the hook of its name."""


@hookspec
def register_scenarios() -> Iterable[type[Scenario]]:
    """Return the scenario classes of this plugin; called once, before a socket is bound."""


@hookspec
def register_tasks() -> Iterable[Task]:
    """Return the kinds of long tasks of this plugin; called once, before a socket is bound."""


@hookspec
def lifespan(app: web.Application) -> AbstractAsyncContextManager[None]:
    """Return a context manager for the time in which the server serves; the last that was entered is left first."""


@hookspec
def worker_lifespan(app: web.Application) -> AbstractAsyncContextManager[None] | None:
    """Return a context manager that `streamlab worker` holds open, or None if the plugin has no work for workers.

    A server does not enter it, and a worker does not enter `lifespan`.
    """


@hookspec
def health() -> str | None:
    """Return why this works only in part (a source cannot be read, an upstream is down), or None if it works.

    One sentence for /health, the table at start and `streamlab check`, which calls it without a `lifespan`: clients
    read it, so it contains no secret and no absolute path. Called from the event loop at every /health: return the
    state that the plugin has recorded, do no I/O.
    """


@hookspec
def check() -> Iterable[tuple[str, str]]:
    """Return what in the configuration cannot work on this machine, each as a key and a reason.

    A key is relative to the table of the scenario, as `sources.app.path`. The reason names the file or the variable,
    and contains no secret: the operator reads it. Called without a `lifespan`, in a thread, by `streamlab check`, which
    exits with 2 if there is any, and by `streamlab run`, which logs each as a warning and serves all the same. It may
    read files, but it neither changes them nor connects to other machines. A value that is invalid on every machine is
    rejected by a validator of its field instead.
    """


@hookspec
def on_stream_end(request: web.Request, summary: StreamSummary) -> None:
    """React to the end of a stream, whatever the reason; must neither block nor raise."""


@hookspec
def register_commands(cli: typer.Typer) -> None:
    """Add commands to the command line.

    Terminal hooks are implemented in `terminal.py` of the plugin's folder, which is imported without the rest of the
    plugin, or in the plugin itself. They are called for `streamlab --help` and for commands that the core does not
    have, whether or not the plugin is enabled. A command of the core cannot be replaced.
    """


@hookspec
def register_views() -> Mapping[str, Callable[..., None]]:
    """Return the views of `streamlab client`, by name: functions of a `streamlab.client.Terminal`.

    The first line of the docstring of a view is its text in the menu.
    """
