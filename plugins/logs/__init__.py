"""Serve logs as server-sent events: real files, followed as `tail -F` does, and what commands print."""

import asyncio
import json
import shlex
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, StringConstraints, model_validator

from streamlab import (
    CONFIG,
    EVENTS,
    Channel,
    ConfigPath,
    Draft,
    Event,
    Problem,
    Retention,
    Scenario,
    Threads,
    View,
    draft,
    endpoint,
    follow,
    hookimpl,
    open_stream,
)

from . import command, demo
from .download import matching_lines
from .filters import BadPattern, LineFilter, compile_pattern, moment
from .lines import LEVELS, Reader
from .pieces import Line
from .tail import Tail, Turn

THREADS = 4
"""Threads that read log files for downloads."""

TAIL = 10
"""Lines of the past that a stream begins with, unless it is told otherwise."""

Chooser = tuple[LineFilter | None, float | None]
"""Which lines are wanted (None for all), and since when, in Unix seconds."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class Source(BaseModel):
    """Where the lines of a log come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: ConfigPath | None = None
    """A file, or a glob."""
    command: Annotated[
        tuple[str, ...], BeforeValidator(lambda given: shlex.split(given) if isinstance(given, str) else given)
    ] = ()
    """A program that prints lines for ever, and is started anew when it ends."""

    @model_validator(mode="after")
    def _needs_one(self) -> "Source":
        if (self.path is None) == (not self.command):
            raise ValueError("a source needs either a path or a command")
        return self


class Which(BaseModel):
    """Which lines of which log are meant."""

    source: str = Field("", max_length=32, description="The log's name; without one, the first there is.")
    level: Level | None = Field(None, description="Only lines of this level and above; tracebacks have their record's.")
    grep: str = Field(
        "",
        max_length=1000,
        description="Only lines in which this regular expression (RE2) matches. The larger it is, the less of a very "
        "long line is searched: at least 2,000 characters.",
    )
    since: str = Field(
        "",
        max_length=40,
        description="Begin with lines of this time: ISO 8601, Unix seconds, or how long ago, as 90s, 15m, 2h or 3d.",
    )


class Following(Which):
    """Which lines to follow, and from where."""

    tail: int | None = Field(
        None, ge=0, le=10_000, description=f"Begin with the last so many lines ({TAIL} without since).", examples=[5]
    )
    limit: int | None = Field(
        None, ge=1, le=1_000_000, description="End the stream after so many events.", examples=[5]
    )
    last_event_id: str = Field(
        "", max_length=200, description="Go on after this id; the header Last-Event-ID says the same, and wins."
    )


class Logs(Scenario):
    """Logs as server-sent events, with their past, to be resumed from any id."""

    sources: dict[Name, Source] = Field({}, max_length=100)
    """Logs by name, each with a `path` or a `command`."""
    demo: bool = True
    """Whether there is a log `demo`, written by a small simulated service."""
    server: bool = True
    """Whether there is a log `server`: streamlab's own."""
    keep_lines: int = Field(10_000, ge=10, le=1_000_000)
    """How many lines of each log are kept for clients that come back, and for `tail` and `since`."""

    _served: dict[str, Source] = PrivateAttr(default_factory=dict)
    _channels: dict[str, Channel] = PrivateAttr(default_factory=dict)
    _threads: Threads = PrivateAttr()
    _compiling: Threads = PrivateAttr()

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Read every log while the server serves, each in one process of those that share the machine."""
        events, config = app[EVENTS], app[CONFIG]
        served = self._served
        served.update(self.sources)
        demo_log = config.base / "var/demo/service.log"
        if self.demo:
            served.setdefault("demo", Source(path=demo_log))
        if self.server and config.server.log_file is not None:
            served.setdefault("server", Source(path=config.server.log_file))
        keep = Retention(events=self.keep_lines, seconds=config.events.keep_seconds)
        self._channels.update({name: events.channel(f"logs/{name}", keep=keep) for name in served})
        host = socket.gethostname()
        async with (
            Threads("log-download", THREADS) as self._threads,
            Threads("patterns", 1) as self._compiling,
            asyncio.TaskGroup() as group,
        ):
            tasks = []
            for name, source in served.items():
                producer = f"{host}:{source.path or shlex.join(source.command)}"
                read = partial(self._read_file if source.path else self._run, name, source, host, producer)
                tasks.append(group.create_task(events.exclusively(f"logs/{producer}", read)))
            if self.demo:
                write = partial(demo.serve, demo_log)
                tasks.append(group.create_task(events.exclusively(f"logs/{host}:{demo_log}:writer", write)))
            yield
            for task in tasks:
                task.cancel()

    @endpoint(
        "GET",
        "/stream/live-logs",
        query=Following,
        sends="text/event-stream",
        responses={429: "The streams of this log use as many different filters as may be."},
    )
    def live(self, request: web.Request, query: Following) -> Awaitable[web.StreamResponse]:
        """Follow a log: its last lines, then every line as it is written, through rotation and restarts."""
        # Without a pattern no coroutine of its own, so that neither it nor the query is kept while a client follows.
        return self._follow_matching(request, query) if query.grep else self._follow(request, query, _chooser(query))

    async def _follow_matching(self, request: web.Request, query: Following) -> web.StreamResponse:
        return await self._follow(request, query, await self._compiling.run(_chooser, query))

    def _follow(self, request: web.Request, query: Following, chooser: Chooser) -> Awaitable[web.StreamResponse]:
        channel, (lines, since) = self._channels[self._chosen(query)], chooser
        return follow(
            request,
            channel,
            view=View(accepts=lines),
            after=query.last_event_id,
            tail=TAIL if query.tail is None and since is None else query.tail,
            since=None if since is None else partial(_is_since, since),
            limit=query.limit,
        )

    @endpoint("GET", "/logs/download", query=Which, sends="text/plain", curl="-OJ {url}")
    async def download(self, request: web.Request, query: Which) -> web.StreamResponse:
        """Download the lines of a log as text, rotated files included."""
        name, (lines, since) = self._chosen(query), await self._compiling.run(_chooser, query)
        disposition = {"Content-Disposition": f'attachment; filename="{name}.log"'}
        pieces = self._past(name, lines, since)
        async with aclosing(pieces), open_stream(request, "text/plain", headers=disposition, compress=True) as response:
            async for piece in pieces:
                await response.write(piece)
        return response

    async def _past(self, name: str, lines: LineFilter | None, since: float | None) -> AsyncGenerator[bytes, None]:
        """The lines of a log as they stand in its files; those of a command as far as they are kept."""
        source = self._served[name]
        if source.path is not None:
            async with aclosing(matching_lines(self._threads, source.path, lines, since)) as found:
                async for piece in found:
                    yield piece
            return
        begun = since is None
        async for event in self._channels[name].read():
            begun = begun or (since is not None and _is_since(since, event))
            if begun and not event.event and (lines is None or lines(event)):
                yield (json.loads(event.data)["line"] + "\n").encode()

    def _chosen(self, query: Which) -> str:
        known = list(self._served)
        name = query.source or next(iter(known), "")
        if name not in self._served:
            detail = f"there is no such log; known: {', '.join(known) or 'none'}"
            raise Problem(422, "There is no such log.", errors=[{"in": "query", "name": "source", "detail": detail}])
        return name

    # -- where lines come from

    async def _read_file(self, name: str, source: Source, host: str, producer: str) -> None:
        """Publish what is written to files; how far they were read is kept with the lines, so that none comes twice."""
        assert source.path is not None
        channel = self._channels[name]
        stands = await channel.checkpoint(producer)
        readers: dict[str, Reader] = {}
        async with aclosing(Tail(source.path, json.loads(stands) if stands else None).batches()) as batches:
            async for batch in batches:
                drafts = [_draft(name, host, item, readers) for item in batch.items]
                checkpoint = (producer, json.dumps(batch.cursors))
                await channel.publish_all(drafts, checkpoint=checkpoint, insist=True)

    async def _run(self, name: str, source: Source, host: str, producer: str) -> None:
        """Publish what a command prints."""
        channel, readers = self._channels[name], dict[str, Reader]()
        program = Path(source.command[0]).name
        async with aclosing(command.output(source.command)) as output:
            async for batch in output:
                drafts = [
                    draft({"source": name, "command": program, "status": item, "host": host}, "exited")
                    if isinstance(item, int)
                    else _draft(name, host, Line(item.text, program, item.continued), readers)
                    for item in batch
                ]
                await channel.publish_all(drafts, insist=True)


def _draft(source: str, host: str, item: Line | Turn, readers: dict[str, Reader]) -> Draft:
    """What happened in a log, as an event; a line's key is its level."""
    if isinstance(item, Turn):
        told = {"source": source, "file": item.file, "complete": item.complete, "host": host}
        return draft(told, item.kind)
    level, when = readers.setdefault(item.file, Reader()).read(item.text)
    fields: dict[str, Any] = {"source": source, "file": item.file, "level": level or None, "time": None}
    if when is not None:
        fields["time"] = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields |= {"line": item.text, "host": host}
    if item.continued:
        fields["continued"] = True
    return draft(fields, key=level)


def _chooser(query: Which) -> Chooser:
    """Read from a query which lines it wants, and since when; raises Problem 422, naming what cannot be read."""
    errors = []
    pattern = since = None
    try:
        pattern = compile_pattern(query.grep) if query.grep else None
    except BadPattern as error:
        errors.append({"in": "query", "name": "grep", "detail": str(error)})
    try:
        since = moment(query.since) if query.since else None
    except ValueError as error:
        errors.append({"in": "query", "name": "since", "detail": str(error)})
    if errors:
        raise Problem.of_parameters(errors)
    if pattern is None and query.level is None:
        return None, since
    return LineFilter(LEVELS[query.level] if query.level else 0, query.grep, pattern), since


def _is_since(since: float, event: Event) -> bool:
    """Whether a line was written after a time: by its own word, or else by when it was read."""
    said = json.loads(event.data).get("time")
    return (datetime.fromisoformat(said).timestamp() if said else event.time / 1000) >= since


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Bring the logs."""
    return [Logs]
