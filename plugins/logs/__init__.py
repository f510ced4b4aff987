"""Serve logs as server-sent events: real files, followed as `tail -F` does, and what commands print."""

import asyncio
import json
import logging
import shlex
import shutil
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
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
    EncodedEvent,
    Event,
    Problem,
    Retention,
    Scenario,
    Threads,
    View,
    encode_event,
    endpoint,
    follow,
    hookimpl,
    open_stream,
)

from . import command, demo, disk
from .download import matching_events, matching_lines
from .filters import BadPattern, LineFilter, compile_pattern, moment
from .lines import LEVELS, Reader
from .pieces import Line
from .tail import Tail, Turn

log = logging.getLogger(__name__)

THREADS = 4
"""Threads that read log files for downloads."""

PROBE_SECONDS = 2.0
"""Interval between two looks at whether logs can be read, in seconds."""

RETRY_SECONDS = 5
"""Retry-After of a log that cannot be read for now, in seconds."""

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
        if self.path is not None and self.command:
            raise ValueError("a source has both a path and a command; give it one of them")
        if self.path is None and not self.command:
            raise ValueError("a source needs either a path or a command")
        return self

    def fault(self) -> disk.Fault | None:
        """Return why this cannot be read now, or None; asks the disk."""
        if self.path is not None:
            return disk.fault(self.path)
        if shutil.which(self.command[0]) is None:
            return disk.Fault(503, f"the command {Path(self.command[0]).name} cannot be started: it is not there")
        return None


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
    _probing: Threads = PrivateAttr()
    _faults: dict[str, disk.Fault] = PrivateAttr(default_factory=dict)
    """Why logs of `sources` cannot be read, as this process last saw it."""
    _reported: dict[str, str] = PrivateAttr(default_factory=dict)
    """The reasons that the followers of a log have been told, by the process that reads it."""

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
            Threads("log-probe", 1) as self._probing,
            asyncio.TaskGroup() as group,
        ):
            await self._probe()
            tasks = [group.create_task(self._watch())]
            for name, source in served.items():
                producer = f"{host}:{source.path or shlex.join(source.command)}"
                read = partial(self._produce, name, source, host, producer)
                tasks.append(group.create_task(events.run_as_leader(f"logs/{producer}", read)))
            if self.demo:
                write = partial(demo.serve, demo_log)
                tasks.append(group.create_task(events.run_as_leader(f"logs/{host}:{demo_log}:writer", write)))
            yield
            for task in tasks:
                task.cancel()

    @endpoint(
        "GET",
        "/stream/live-logs",
        query=Following,
        sends="text/event-stream",
        responses={
            403: "The server may not read this log.",
            429: "The streams of this log use as many different filters as may be.",
            503: "The command behind this log cannot be started.",
        },
    )
    def live(self, request: web.Request, query: Following) -> Awaitable[web.StreamResponse]:
        """Follow a log: its last lines, then every line as it is written, through rotation and restarts."""
        # Without a pattern no coroutine of its own, so that neither it nor the query is kept while a client follows.
        if query.grep or self._chosen(query) in self._faults:
            return self._follow_carefully(request, query)
        return self._follow(request, query, _chooser(query))

    async def _follow_carefully(self, request: web.Request, query: Following) -> web.StreamResponse:
        fault = await self._look(self._chosen(query))
        if fault is not None and fault.status != 404 and not fault.partly:  # what is missing may come: told in band
            raise _problem(fault)
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

    @endpoint(
        "GET",
        "/logs/download",
        query=Which,
        sends="text/plain",
        responses={
            403: "The server may not read this log.",
            404: "The log has no file yet.",
            503: "The command behind this log cannot be started.",
        },
        curl="-OJ {url}",
    )
    async def download(self, request: web.Request, query: Which) -> web.StreamResponse:
        """Download the lines of a log as text, rotated files included."""
        name, (lines, since) = self._chosen(query), await self._compiling.run(_chooser, query)
        path = self._served[name].path
        fault = await (self._look(name) if path is None else self._threads.run(disk.fault_of_history, path))
        if fault is not None:
            raise _problem(fault)
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
        async with aclosing(
            matching_events(self._threads, self._channels[name].read(), _event_filter(lines, since))
        ) as found:
            async for piece in found:
                yield piece

    def _chosen(self, query: Which) -> str:
        known = list(self._served)
        name = query.source or next(iter(known), "")
        if name not in self._served:
            detail = f"there is no such log; known: {', '.join(known) or 'none'}"
            raise Problem(422, "There is no such log.", errors=[{"in": "query", "name": "source", "detail": detail}])
        return name

    # -- whether lines can be read

    @hookimpl
    def health(self) -> str | None:
        """Report the logs that cannot be read; before the start, as `streamlab check` wants it, by a look at them."""
        faults = self._faults
        if not self._served:
            faults = {name: fault for name, source in self.sources.items() if (fault := source.fault())}
        return "; ".join(f"{name}: {fault.reason}" for name, fault in faults.items()) or None

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            await self._probe()

    async def _probe(self) -> None:
        for name in self.sources:
            await self._look(name)

    async def _look(self, name: str) -> disk.Fault | None:
        """Look whether a log can be read, and note it; what the server itself writes can."""
        source = self.sources.get(name)
        if source is None:
            return None
        fault = await self._probing.run(source.fault)
        if fault is None:
            self._faults.pop(name, None)
        else:
            if self._faults.get(name) != fault:
                log.warning("the log %s: %s", name, fault.reason)
            self._faults[name] = fault
        return fault

    async def _report(self, name: str, host: str) -> None:
        """Tell the followers of a log, by an event, that it cannot be read any more, or can be again."""
        fault = self._faults.get(name)
        reason = "" if fault is None else fault.reason
        if reason == self._reported.get(name, ""):
            return
        self._reported[name] = reason
        told = (
            encode_event({"source": name, "reason": reason, "host": host}, "unreadable")
            if reason
            else encode_event({"source": name, "host": host}, "readable")
        )
        await self._channels[name].publish_all([told], retry_forever=True)

    async def _keep_reporting(self, name: str, host: str) -> None:
        while True:
            await self._report(name, host)
            await asyncio.sleep(PROBE_SECONDS / 2)

    # -- where lines come from

    async def _produce(self, name: str, source: Source, host: str, producer: str) -> None:
        """Publish the lines of a source, and whether it can be read."""
        read = self._read_file if source.path else self._run
        self._reported.pop(name, None)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_reporting(name, host))
            await read(name, source, host, producer)

    async def _read_file(self, name: str, source: Source, host: str, producer: str) -> None:
        """Publish what is written to files; how far they were read is kept with the lines, so that none comes twice."""
        assert source.path is not None
        channel = self._channels[name]
        stands = await channel.checkpoint(producer)
        readers: dict[str, Reader] = {}
        async with aclosing(Tail(source.path, json.loads(stands) if stands else None).batches()) as batches:
            async for batch in batches:
                if batch.items and self._reported.get(name):  # that it can be read again comes before its lines
                    await self._look(name)
                    await self._report(name, host)
                drafts = [_draft(name, host, item, readers) for item in batch.items]
                checkpoint = (producer, json.dumps(batch.cursors))
                await channel.publish_all(drafts, checkpoint=checkpoint, retry_forever=True)

    async def _run(self, name: str, source: Source, host: str, producer: str) -> None:
        """Publish what a command prints."""
        channel, readers = self._channels[name], dict[str, Reader]()
        program = Path(source.command[0]).name
        async with aclosing(command.output(source.command)) as output:
            async for batch in output:
                drafts = [
                    encode_event({"source": name, "command": program, "status": item, "host": host}, "exited")
                    if isinstance(item, int)
                    else _draft(name, host, Line(item.text, program, item.continued), readers)
                    for item in batch
                ]
                await channel.publish_all(drafts, retry_forever=True)


def _draft(source: str, host: str, item: Line | Turn, readers: dict[str, Reader]) -> EncodedEvent:
    """What happened in a log, as an event; a line's key is its level."""
    if isinstance(item, Turn):
        told = {"source": source, "file": item.file, "complete": item.complete, "host": host}
        return encode_event(told, item.kind)
    level, when = readers.setdefault(item.file, Reader()).read(item.text)
    fields: dict[str, Any] = {"source": source, "file": item.file, "level": level or None, "time": None}
    if when is not None:
        fields["time"] = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields |= {"line": item.text, "host": host}
    if item.continued:
        fields["continued"] = True
    return encode_event(fields, key=level)


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


def _event_filter(lines: LineFilter | None, since: float | None) -> Callable[[Event], bool]:
    """Make a function that chooses lines among events, to be called with each in order."""
    begun = since is None

    def wanted(event: Event) -> bool:
        nonlocal begun
        begun = begun or (since is not None and _is_since(since, event))
        return begun and not event.event and (lines is None or lines(event))

    return wanted


def _problem(fault: disk.Fault) -> Problem:
    """Make the error response of a log that cannot be read."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if fault.status == 503 else {}
    return Problem(fault.status, f"This log cannot be read: {fault.reason}.", headers=headers)


def _is_since(since: float, event: Event) -> bool:
    """Whether a line was written after a time: by its own word, or else by when it was read."""
    said = json.loads(event.data).get("time")
    return (datetime.fromisoformat(said).timestamp() if said else event.time / 1000) >= since


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Bring the logs."""
    return [Logs]
