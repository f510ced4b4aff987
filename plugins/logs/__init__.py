"""Serve logs as server-sent events: files, followed as `tail -F` does, and the output of commands."""

import asyncio
import json
import logging
import shlex
import shutil
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, StringConstraints, model_validator

from streamlab import (
    ANY,
    CONFIG,
    EVENTS,
    Channel,
    ConfigPath,
    EncodedEvent,
    Event,
    Problem,
    ResumeQuery,
    Retention,
    Scenario,
    Scope,
    Threads,
    View,
    encode_event,
    endpoint,
    follow,
    hookimpl,
    open_stream,
    require,
)

from . import command, demo, disk
from .chunks import Line
from .download import matching_events, matching_lines
from .filters import BadPattern, LineFilter, compile_pattern, moment
from .lines import LEVELS, Reader
from .rotation import Rotation
from .tail import Tail

log = logging.getLogger(__name__)

THREADS = 4
"""Number of threads that read log files for downloads."""

PROBE_SECONDS = 2.0
"""Interval between two checks whether the logs can be read, in seconds."""

RETRY_SECONDS = 5
"""Retry-After of a log that cannot be read for now, in seconds."""

TAIL = 10
"""Default number of past lines at the start of a stream."""

Selection = tuple[LineFilter | None, float | None]
"""A filter of lines (None for all), and the earliest time, in Unix seconds (None for any)."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class Source(BaseModel):
    """The source of a log: files or a command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: ConfigPath | None = None
    """A file, or a glob."""
    command: Annotated[
        tuple[str, ...], BeforeValidator(lambda given: shlex.split(given) if isinstance(given, str) else given)
    ] = ()
    """A program that prints lines; it is restarted when it ends."""

    @model_validator(mode="after")
    def _require_one(self) -> "Source":
        if self.path is not None and self.command:
            raise ValueError("a source has both a path and a command; give it one of them")
        if self.path is None and not self.command:
            raise ValueError("a source needs either a path or a command")
        return self

    def fault(self) -> disk.Fault | None:
        """Return why the source cannot be read now, or None. Reads the disk."""
        if self.path is not None:
            return disk.fault(self.path)
        if shutil.which(self.command[0]) is None:
            return disk.Fault(503, f"the command {Path(self.command[0]).name} cannot be started: it was not found")
        return None


class LogQuery(BaseModel):
    """Which lines of which log to send."""

    source: str = Field("", max_length=32, description="Name of the log. Default: the first one.")
    level: Level | None = Field(
        None, description="Only lines of this level and above; a traceback has the level of its record."
    )
    grep: str = Field(
        "",
        max_length=1000,
        description="Only lines that match this regular expression (RE2). At least the first 2,000 characters of a "
        "line are searched, and more with a smaller expression.",
    )
    since: str = Field(
        "",
        max_length=40,
        description="Start with lines of this time: ISO 8601, Unix seconds, or an age such as 90s, 15m, 2h or 3d.",
    )


class FollowQuery(LogQuery, ResumeQuery):
    """Which lines to follow, and from which event on."""

    tail: int | None = Field(
        None,
        ge=0,
        le=10_000,
        description=f"Start with the last N lines. Default: {TAIL}, or all of them with `since`.",
        examples=[5],
    )
    limit: int | None = Field(None, ge=1, le=1_000_000, description="End the stream after N events.", examples=[5])


class Logs(Scenario):
    """Logs as server-sent events, with their history, resumable from any id."""

    sources: dict[Name, Source] = Field({}, max_length=100)
    """Logs by name, each with a `path` or a `command`."""
    demo: bool = True
    """Whether to serve a log `demo`, written by a small simulated service."""
    server: bool = True
    """Whether to serve streamlab's own log as `server`."""
    keep_lines: int = Field(10_000, ge=10, le=1_000_000)
    """Number of lines that each log retains, for resuming, `tail` and `since`."""

    _served: dict[str, Source] = PrivateAttr(default_factory=dict)
    _channels: dict[str, Channel] = PrivateAttr(default_factory=dict)
    _threads: Threads = PrivateAttr()
    _compiling: Threads = PrivateAttr()
    _probing: Threads = PrivateAttr()
    _faults: dict[str, disk.Fault] = PrivateAttr(default_factory=dict)
    """Why logs of `sources` cannot be read, by the last check of this process."""
    _reported: dict[str, str] = PrivateAttr(default_factory=dict)
    """The reasons that were last published to the followers of a log, by the process that reads it."""

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Read every log while the server runs, each in one of the processes that share the machine."""
        events, config = app[EVENTS], app[CONFIG]
        served = self._served
        served.update(self.sources)
        demo_log = config.base / "var/demo/service.log"
        if self.demo:
            served.setdefault("demo", Source(path=demo_log))
        if self.server and config.server.log_file is not None:
            served.setdefault("server", Source(path=config.server.log_file))
        retention = Retention(events=self.keep_lines, seconds=config.events.keep_seconds)
        self._channels.update({name: events.channel(f"logs/{name}", retention=retention) for name in served})
        host = socket.gethostname()
        async with (
            Threads("log-download", THREADS) as self._threads,
            Threads("patterns", 1) as self._compiling,
            Threads("log-probe", 1) as self._probing,
            asyncio.TaskGroup() as group,
        ):
            await self._check_all()
            tasks = [group.create_task(self._keep_checking())] if self.sources else []
            for name, source in served.items():
                producer = f"{host}:{source.path or shlex.join(source.command)}"
                read = partial(self._produce, name, source, host, producer)
                tasks.append(group.create_task(events.run_as_leader(f"logs/{producer}", read)))
            if self.demo:
                write = partial(demo.serve, demo_log, pause=self._channels["demo"].wait_until_followed)
                tasks.append(group.create_task(events.run_as_leader(f"logs/{host}:{demo_log}:writer", write)))
            yield
            for task in tasks:
                task.cancel()

    def _names(self) -> list[str]:
        """Return the names of the logs; the first one is the default."""
        return list(self._served)

    @endpoint(
        "GET",
        "/stream/live-logs",
        query=FollowQuery,
        resource=ANY,
        choices={"source": _names},
        sends="text/event-stream",
        responses={
            403: "The server is not allowed to read this log.",
            429: "The followers of this log use the maximum number of different filters.",
            503: "The command behind this log cannot be started.",
        },
    )
    async def live(self, request: web.Request, query: FollowQuery) -> web.StreamResponse:
        """Follow a log: its last lines, then every line as it is written, across rotation and restarts."""
        name = self._name(query)
        require(request, Scope(self.name, "read", name))
        if name in self._faults:
            fault = await self._check(name)
            if fault is not None and fault.status != 404 and not fault.partly:  # followers wait for a missing file
                raise _problem(fault)
        lines, since = await self._compiling.run(_selection, query) if query.grep else _selection(query)
        return await follow(
            request,
            self._channels[name],
            view=View(accepts=lines),
            after=query.last_event_id,
            tail=TAIL if query.tail is None and since is None else query.tail,
            since=None if since is None else partial(_is_since, since),
            limit=query.limit,
        )

    @endpoint(
        "GET",
        "/logs/download",
        query=LogQuery,
        resource=ANY,
        choices={"source": _names},
        sends="text/plain",
        responses={
            403: "The server is not allowed to read this log.",
            404: "The log has no file yet.",
            503: "The command behind this log cannot be started.",
        },
        curl="-OJ {url}",
    )
    async def download(self, request: web.Request, query: LogQuery) -> web.StreamResponse:
        """Download the lines of a log as text, rotated files included."""
        name = self._name(query)
        require(request, Scope(self.name, "read", name))
        lines, since = await self._compiling.run(_selection, query)
        path = self._served[name].path
        fault = await (self._check(name) if path is None else self._threads.run(disk.fault_of_history, path))
        if fault is not None:
            raise _problem(fault)
        disposition = {"Content-Disposition": f'attachment; filename="{name}.log"'}
        blocks = self._history(name, lines, since)
        async with aclosing(blocks), open_stream(request, "text/plain", headers=disposition, compress=True) as response:
            async for block in blocks:
                await response.write(block)
        return response

    async def _history(self, name: str, lines: LineFilter | None, since: float | None) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a log from its files, or the retained lines of a command."""
        source = self._served[name]
        if source.path is not None:
            async with aclosing(matching_lines(self._threads, source.path, lines, since)) as blocks:
                async for block in blocks:
                    yield block
            return
        async with aclosing(
            matching_events(self._threads, self._channels[name].read(), _event_filter(lines, since))
        ) as blocks:
            async for block in blocks:
                yield block

    def _name(self, query: LogQuery) -> str:
        """Return the name of the log that is requested. Raise Problem 422 if there is no log at all."""
        name = query.source or next(iter(self._served), "")
        if not name:
            raise Problem.parameter("source", "there is no log; known: none")
        return name

    # -- whether lines can be read

    @hookimpl
    def health(self) -> str | None:
        """Report the logs that cannot be read."""
        return "; ".join(f"{name}: {fault.reason}" for name, fault in self._faults.items()) or None

    @hookimpl
    def check(self) -> Iterator[tuple[str, str]]:
        """Report the configured logs that cannot be read."""
        for name, source in self.sources.items():
            if fault := source.fault():
                key, value = ("path", source.path) if source.path else ("command", shlex.join(source.command))
                yield f"sources.{name}.{key}", f"{value}: {fault.reason}"

    async def _keep_checking(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            await self._check_all()

    async def _check_all(self) -> None:
        for name in self.sources:
            await self._check(name)

    async def _check(self, name: str) -> disk.Fault | None:
        """Check whether a log can be read, and store the result. The server's own logs always can."""
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
        """Publish an event to the followers of a log if it became unreadable, or readable again."""
        fault = self._faults.get(name)
        reason = "" if fault is None else fault.reason
        if reason == self._reported.get(name, ""):
            return
        self._reported[name] = reason
        event = (
            encode_event({"source": name, "reason": reason, "host": host}, "unreadable")
            if reason
            else encode_event({"source": name, "host": host}, "readable")
        )
        await self._channels[name].publish_all([event], retry_forever=True)

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
            if name in self.sources:
                group.create_task(self._keep_reporting(name, host))
            await read(name, source, host, producer)

    async def _read_file(self, name: str, source: Source, host: str, producer: str) -> None:
        """Publish what is written to files. The checkpoint is stored with the lines, so that none is duplicated."""
        assert source.path is not None
        channel = self._channels[name]
        stored = await channel.checkpoint(producer)
        readers: dict[str, Reader] = {}
        async with aclosing(Tail(source.path, json.loads(stored) if stored else None).batches()) as batches:
            async for batch in batches:
                if batch.items and self._reported.get(name):  # `readable` comes before the lines
                    await self._check(name)
                    await self._report(name, host)
                encoded = [_encode(name, host, item, readers) for item in batch.items]
                checkpoint = (producer, json.dumps(batch.cursors))
                await channel.publish_all(encoded, checkpoint=checkpoint, retry_forever=True)

    async def _run(self, name: str, source: Source, host: str, producer: str) -> None:
        """Publish the output of a command."""
        channel, readers = self._channels[name], dict[str, Reader]()
        program = Path(source.command[0]).name
        async with aclosing(command.output(source.command)) as output:
            async for batch in output:
                encoded = [
                    encode_event({"source": name, "command": program, "status": item, "host": host}, "exited")
                    if isinstance(item, int)
                    else _encode(name, host, Line(item.text, program, item.continued), readers)
                    for item in batch
                ]
                await channel.publish_all(encoded, retry_forever=True)


def _encode(source: str, host: str, item: Line | Rotation, readers: dict[str, Reader]) -> EncodedEvent:
    """Return the event of a line, whose key is its level, or of a rotation."""
    if isinstance(item, Rotation):
        data = {"source": source, "file": item.file, "complete": item.complete, "host": host}
        return encode_event(data, item.kind)
    level, when = readers.setdefault(item.file, Reader()).read(item.text)
    fields: dict[str, Any] = {"source": source, "file": item.file, "level": level or None, "time": None}
    if when is not None:
        fields["time"] = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields |= {"line": item.text, "host": host}
    if item.continued:
        fields["continued"] = True
    return encode_event(fields, key=level)


def _selection(query: LogQuery) -> Selection:
    """Return which lines a query selects. Raise Problem 422, which names the invalid parameters."""
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
    """Return a function that selects the events of lines; it must be called with each event in order."""
    started = since is None

    def is_selected(event: Event) -> bool:
        nonlocal started
        started = started or (since is not None and _is_since(since, event))
        return started and not event.event and (lines is None or lines(event))

    return is_selected


def _problem(fault: disk.Fault) -> Problem:
    """Return the error response for a log that cannot be read."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if fault.status == 503 else {}
    return Problem(fault.status, f"This log cannot be read: {fault.reason}.", headers=headers)


def _is_since(since: float, event: Event) -> bool:
    """Return whether a line was written at or after a time: by its timestamp, or else by when it was read."""
    written = json.loads(event.data).get("time")
    return (datetime.fromisoformat(written).timestamp() if written else event.time / 1000) >= since


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Return the logs."""
    return [Logs]
