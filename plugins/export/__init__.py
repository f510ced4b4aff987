"""Export the result of any configured SQL query: as CSV, JSON lines and more, in constant memory."""

import asyncio
import hashlib
import json
import logging
import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, model_validator

from streamlab import (
    CONFIG,
    FILES,
    ConfigPath,
    Problem,
    Scenario,
    Task,
    Threads,
    endpoint,
    hookimpl,
    open_event_stream,
    open_stream,
    sse_event,
    weights,
)

from . import sample
from .arrow_formats import unavailable
from .encoder import Encoder, MissingLibrary
from .files import Files
from .formats import FORMATS, Format
from .jobs import Jobs
from .request import RESERVED, Parameter, RowsQuery
from .source import (
    BadQuery,
    BadValue,
    Export,
    Interrupted,
    Query,
    Selection,
    Source,
    TooLarge,
    Unavailable,
    UnknownColumn,
    UnrepresentableValue,
    body,
)
from .sqlite_source import SqliteSource

log = logging.getLogger(__name__)

THREADS = 8
"""Threads in which queries of SQLite run."""

EVENT_ENDS = (16, 80, 336)
"""After so many rows the first events end, so that the first of them comes soon;"""

EVENT_ROWS = 1000
"""each event after those has so many."""

NOT_INSTALLED = "The library that this format, or the database, needs is not installed: no retry helps."
"""The meaning of 501 in the API document."""

SAMPLE = "sample"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


def _database_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if separator and (scheme in ("postgresql", "postgres") or (scheme == "sqlite" and re.match(r"/.", rest))):
        return url
    raise ValueError("must be sqlite:///relative/path.db, sqlite:////absolute/path.db or postgresql://...")


class Table(BaseModel):
    """A table of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Database(Table):
    """Where results come from."""

    url: Annotated[str, AfterValidator(_database_url)]
    """`sqlite:///PATH` (a relative path starts at the folder of config.toml), or `postgresql://user@host/name`."""


class Configured(Table):
    """An export: a SELECT, and what a request may say about it."""

    sql: str = Field(min_length=1)
    """A SELECT; `:name` stands for a parameter. It comes from here alone, never from a request."""
    database: Name = SAMPLE
    """The name of its database."""
    parameters: dict[Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")], Parameter] = Field(
        default_factory=dict, max_length=50
    )
    """The values it names."""
    description: str = ""
    """What it is, for people."""

    @model_validator(mode="after")
    def _names_are_free(self) -> "Configured":
        if taken := sorted(set(self.parameters) & set(RESERVED)):
            raise ValueError(f"every export has {', '.join(taken)}: a parameter needs another name")
        return self


SAMPLES = {
    "users": Configured(
        sql="SELECT id, name, email, country, balance, created, active, note FROM users ORDER BY id",
        description="Every user of the sample database.",
    ),
    "data": Configured(
        sql="SELECT id, name, country, balance, created FROM users ORDER BY id",
        description="The users of the sample database, in short.",
    ),
    "results": Configured(
        sql="SELECT id, name, country, balance FROM users WHERE active ORDER BY id",
        description="The users who are active.",
    ),
}
"""The exports of the sample database."""


class Which(BaseModel):
    """Which export is meant."""

    name: str = Field(max_length=64, description="The export's name.", examples=["users"])


class WhichFormat(Which):
    """Which export is meant, in which format."""

    format: Format = Field(description="The format.", examples=["csv"])


class Asked(RowsQuery):
    """What is wanted of an export."""

    end: bool = Field(False, description="JSON lines: end with a record of the number of rows and a digest of them.")


class Followed(RowsQuery):
    """What is wanted of a stream of results."""

    last_event_id: str = Field(
        "", max_length=100, description="Go on after this event; the header Last-Event-ID says the same, and wins."
    )


class Exports(Scenario):
    """Results of SQL queries as CSV, JSON lines and more, in constant memory."""

    name = "export"

    databases: dict[Name, Database] = Field({}, max_length=100)
    """Databases by name."""
    queries: dict[Name, Configured] = Field({}, max_length=1000)
    """Exports by name."""
    sample: bool = True
    """Whether there is a database `sample`, made when it is first asked for, with exports users, data and results."""
    sample_rows: int = Field(1_000_000, ge=1, le=100_000_000)
    """How many users the sample has."""
    max_cell_mb: float = Field(16.0, gt=0, le=1000)
    """Maximum size of a cell, in 1,000,000 bytes: an export with a larger one is rejected or, once begun, cut."""
    formula_guard: bool = True
    """Whether text in CSV that a spreadsheet would run as a formula gets an apostrophe before it."""
    max_exports: int = Field(100, ge=1, le=10_000)
    """Exports at once; one more is answered 503 with Retry-After."""
    max_seconds: float = Field(3600.0, gt=0, le=7 * 86_400)
    """How long an export may take; then it is cut."""
    folder: ConfigPath = Path("var/files/exports")
    """Where the task `export` writes its files; below the root of the file scenario, they can be downloaded."""
    keep_seconds: float = Field(86_400.0, ge=1, le=365 * 86_400)
    """How long a file of the task `export` is kept, in seconds from its completion."""
    keep_mb: int = Field(10_000, ge=1, le=100_000_000)
    """Megabytes (1,000,000 bytes) that all files of the task `export` may have; beyond, the task fails with 507."""

    _sources: dict[str, Source] = PrivateAttr(default_factory=dict)
    _missing: dict[str, MissingLibrary] = PrivateAttr(default_factory=dict)
    _running: set[object] = PrivateAttr(default_factory=set)
    _sample_made: asyncio.Lock = PrivateAttr(default_factory=asyncio.Lock)
    _sample_path: Path = PrivateAttr(default=Path())
    _making: Threads = PrivateAttr()
    _files: Files = PrivateAttr()
    _file_url: Callable[[Path], str | None] = PrivateAttr()

    @property
    def files(self) -> Files:
        """The files of the task `export`."""
        return self._files

    def file_url(self, name: str) -> str | None:
        """Return the URL of a file of the task `export`, None if the file scenario does not serve its folder."""
        return self._file_url(self.folder / name)

    @model_validator(mode="after")
    def _databases_exist(self) -> "Exports":
        known = [*self.databases, *([SAMPLE] if self.sample else [])]
        for name, query in self.queries.items():
            if query.database not in known:
                raise ValueError(f"{name} names the database {query.database!r}; known: {', '.join(known) or 'none'}")
        return self

    @property
    def _max_cell(self) -> int:
        """The maximum size of a cell in bytes."""
        return int(self.max_cell_mb * 1_000_000)

    @property
    def has_sample(self) -> bool:
        """Whether there is a database `sample`."""
        return self.sample or SAMPLE in self.databases

    @property
    def exports(self) -> Mapping[str, Configured]:
        """Every export by name: those of the sample, unless others have their names, and the configured ones."""
        return {**(SAMPLES if self.sample and SAMPLE not in self.databases else {}), **self.queries}

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Keep threads for SQLite and connections to PostgreSQL while the server serves."""
        base = app[CONFIG].base
        self._sample_path = base / "var/sample.db"
        self._file_url = app[FILES].url
        async with AsyncExitStack() as stack:
            threads = await stack.enter_async_context(Threads("export", THREADS))
            self._making = await stack.enter_async_context(Threads("export-sample", 1))
            self._files = Files(self.folder, keep_seconds=self.keep_seconds, keep_bytes=self.keep_mb * 1_000_000)
            await stack.enter_async_context(self._files.opened())
            turn = asyncio.Lock()
            urls = {name: database.url for name, database in self.databases.items()}
            if self.sample:
                urls.setdefault(SAMPLE, f"sqlite:///{self._sample_path}")
            for name, url in urls.items():
                if url.startswith("sqlite"):
                    self._sources[name] = SqliteSource(
                        base / url.removeprefix("sqlite:///"), threads, turn, max_cell=self._max_cell
                    )
                    continue
                try:
                    self._sources[name] = await _open_postgres(stack, url, self.max_seconds, self._max_cell)
                except MissingLibrary as error:  # the exports of other databases need not go without
                    log.warning("the database %s cannot be read: %s", name, error)
                    self._missing[name] = error
            yield

    @hookimpl
    def worker_lifespan(self, app: web.Application) -> AbstractAsyncContextManager[None]:
        """Keep the same while a worker runs tasks."""
        return self.lifespan(app)

    @hookimpl
    def register_tasks(self) -> list[Task]:
        """Bring the report over the sample, and exports into files."""
        jobs = Jobs(self)
        report = [Task(jobs.report, unit="users", resumable=True)] if self.has_sample else []
        return [*report, Task(jobs.export, unit="rows", resumable=True)]

    # -- routes

    @endpoint("GET", "/export", sends="application/json", curl="{url}")
    async def index(self, request: web.Request) -> web.Response:
        """List every export with its columns, their types, its parameters and the formats that are installed."""
        listed = [await self._listed(name, query) for name, query in sorted(self.exports.items())]
        lacking = {form: reason for form, kind in FORMATS.items() if (reason := unavailable(kind))}
        text = json.dumps({"exports": listed, "unavailable_formats": lacking}, ensure_ascii=False, indent=1) + "\n"
        return web.Response(text=text, content_type="application/json")

    async def _listed(self, name: str, query: Configured) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": name, "description": query.description, "database": query.database}
        entry["urls"] = {form: f"/export/{name}/{form}" for form in _installed()}
        entry["parameters"] = {key: value.model_dump(exclude_defaults=True) for key, value in query.parameters.items()}
        try:
            columns = await (await self.source(query.database)).describe(_example(query))
            entry["columns"] = [{"name": column.name, "type": column.type} for column in columns]
        except (BadQuery, Unavailable, MissingLibrary, Problem) as error:
            entry["unavailable"] = str(error)
        return entry

    @endpoint(
        "GET",
        "/export/{name}",
        path_model=Which,
        query=Asked,
        sends=tuple(form.media_type for form in FORMATS.values()),
        responses={406: "Accept names none of the formats that are installed.", 501: NOT_INSTALLED},
        curl="-H 'Accept: application/jsonl' {url}",
    )
    async def negotiated(self, request: web.Request, path: Which, query: Asked) -> web.StreamResponse:
        """Export a result in the format that Accept names; CSV where it names none."""
        form = _preferred(request.headers.get("Accept", ""))
        return await self._send(request, path.name, form, query, {"Vary": "Accept"})

    @endpoint(
        "GET",
        "/export/{name}/{format}",
        path_model=WhichFormat,
        query=Asked,
        sends=tuple(form.media_type for form in FORMATS.values()),
        responses={501: NOT_INSTALLED},
        curl="-OJ {url}",
    )
    async def export(self, request: web.Request, path: WhichFormat, query: Asked) -> web.StreamResponse:
        """Export a result as CSV, JSON lines, a JSON array, an Arrow stream or Parquet."""
        return await self._send(request, path.name, path.format, query, {})

    @endpoint(
        "GET",
        "/stream/database-results",
        query=Followed,
        sends=("application/jsonl", "text/event-stream"),
        responses={204: "The client has the end of the stream already."},
        curl="-N {url}",
    )
    async def results(self, request: web.Request, query: Followed) -> web.StreamResponse:
        """Stream the rows of the export `results` as JSON lines, or as events, a batch each, that resume by row."""
        if "text/event-stream" in request.headers.get("Accept", ""):
            return await self._follow(request, "results", query)
        return await self._send(request, "results", "jsonl", query, {"Vary": "Accept"})

    # -- the answer

    async def _send(
        self, request: web.Request, name: str, form: str, wanted: Asked | Followed, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        end = isinstance(wanted, Asked) and wanted.end
        if end and form != "jsonl":
            errors = [{"in": "query", "name": "end", "detail": f"only jsonl ends with a record; this is {form}"}]
            raise Problem(422, "This format has no end record.", errors=errors)
        async with self.opened(name, form, wanted, 0) as (export, encoder, deadline):
            filename = f"{name}.{encoder.extension}"
            headers = {"Content-Disposition": f'attachment; filename="{filename}"', **headers}
            async with (
                open_stream(request, encoder.media_type, headers=headers, compress=True) as stream,
                self.limited(name, deadline),
            ):
                digest = hashlib.sha256() if end else None
                async for data in body(export):
                    if digest is not None:
                        digest.update(data)
                    await stream.write(data)
                altered = self.report_altered(name, export)
                await stream.write(encoder.end(export.rows, digest.hexdigest() if digest else None, altered))
        return stream

    async def _follow(self, request: web.Request, name: str, wanted: Followed) -> web.StreamResponse:
        """Send batches of rows as events. An id is the data's version and the number of rows up to there."""
        asked = request.headers.get("Last-Event-ID") or wanted.last_event_id
        if asked.endswith(".end"):
            return web.Response(status=204, headers={"Cache-Control": "no-store"})
        match = re.fullmatch(r"([0-9a-f]{1,16})-([0-9]{1,15})(?:\.[a-z]+)?", asked)
        skip = int(match[2]) if match else 0
        async with AsyncExitStack() as stack:
            export, _, deadline = await stack.enter_async_context(self.opened(name, "jsonl", wanted, skip))
            changed = bool(asked) and (match is None or match[1] != export.version)
            if changed and skip:  # those rows may be others by now: all are sent again
                await stack.aclose()
                skip = 0
                export, _, deadline = await stack.enter_async_context(self.opened(name, "jsonl", wanted, 0))
            stream = await stack.enter_async_context(open_event_stream(request))
            place = f"{export.version}-{skip}"
            await stack.enter_async_context(self.limited(name, deadline))
            stream.event_id = lambda kind: f"{place}.{kind}"
            if changed:
                gap = {"reason": "the data may have changed since", "missing": None}
                await stream.write(sse_event(gap, "gap", id=f"{place}.gap"))
            async for count, rows in _batches(export.chunks(), skip):
                identity = f"{export.version}-{count}"
                await stream.write(sse_event(b'{"count":%d,"rows":[%b]}' % (count, rows), "rows", id=identity))
                place = identity  # not before the write, which may be interrupted
            total = {"count": skip + export.rows, "altered": self.report_altered(name, export)}
            await stream.write(sse_event(total, "end", id=f"{place}.end"))
        return stream

    @staticmethod
    def report_altered(name: str, export: Export) -> int:
        """Return how many values of a finished export were altered, and log it: few formats have an end record."""
        if export.altered:
            log.warning("the export %s altered %d values that its format cannot hold", name, export.altered)
        return export.altered

    @asynccontextmanager
    async def opened(
        self, name: str, form: str, wanted: RowsQuery, skip: int
    ) -> AsyncIterator[tuple[Export, Encoder, float]]:
        """Run an export within the limits, and say until when; what it may be refused for becomes a refusal."""
        configured = self.exports.get(name)
        if configured is None:
            known = ", ".join(sorted(self.exports)) or "none"
            raise Problem(404, f"There is no export of this name; GET /export lists them: {known}.")
        values, where = wanted.read_values(configured.parameters)
        limit = None if wanted.limit is None else max(0, wanted.limit - skip)
        selection = Selection(wanted.columns, where, limit, skip)
        deadline = asyncio.get_running_loop().time() + self.max_seconds
        async with AsyncExitStack() as stack:
            stack.enter_context(self._place())
            async with self.limited(name, deadline):
                source = await self.source(configured.database)
                query = Query(configured.sql, values)
                guard = self.formula_guard
                running = source.export(query, selection, form, formula_guard=guard, strict=wanted.strict)
                export, encoder = await stack.enter_async_context(running)
            yield export, encoder, deadline

    @asynccontextmanager
    async def limited(self, name: str, deadline: float | None = None) -> AsyncIterator[None]:
        """Refuse, or break off, what fails or takes too long in the block.

        Inside the block of an open stream, for as soon as that is cut the handler is cancelled.
        """
        with _refusing(name):
            try:
                async with asyncio.timeout_at(deadline):
                    yield
            except TimeoutError:
                raise Interrupted(f"it took more than the {self.max_seconds:g} seconds it may") from None

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Hold one of the places for exports."""
        if len(self._running) >= self.max_exports:
            detail = f"This server runs {self.max_exports} exports, which is all it takes."
            raise Problem(503, detail, headers={"Retry-After": "5"})
        place = object()
        self._running.add(place)
        try:
            yield
        finally:
            self._running.discard(place)

    async def source(self, database: str = SAMPLE) -> Source:
        """The source of a database; the sample is made when it is first asked for."""
        path = self._sample_path
        if database == SAMPLE and SAMPLE not in self.databases:
            async with self._sample_made:
                if not await self._making.run(path.exists):
                    stop = threading.Event()
                    make = partial(sample.make, path, self.sample_rows, stop=stop)
                    try:
                        await self._making.run(make, interrupt=stop.set)
                    except (OSError, sqlite3.Error) as error:
                        reason = error.strerror if isinstance(error, OSError) else str(error)
                        raise Problem(503, f"The sample database cannot be made: {reason}.") from error
        if database in self._missing:
            raise self._missing[database]
        return self._sources[database]


async def _open_postgres(stack: AsyncExitStack, url: str, seconds: float, max_cell: int) -> Source:
    from .postgres_source import PostgresSource

    source = PostgresSource(url, statement_seconds=seconds, max_cell=max_cell)
    await stack.enter_async_context(source.opened())
    return source


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Say what an export is refused for: to the client as far as it is its fault, to the operator in the log."""
    try:
        yield
    except UnknownColumn as error:
        detail = f"the result has no column {error.name!r}; known: {', '.join(error.known)}"
        errors = [{"in": "query", "name": "columns", "detail": detail}]
        raise Problem(422, "The result does not have every column asked for.", errors=errors) from None
    except BadValue as error:
        raise Problem.of_parameters([{"in": "query", "name": error.name, "detail": error.detail}]) from None
    except TooLarge as error:
        log.warning("the export %s is rejected: %s", name, error)
        detail = f"{error}, which max_cell_mb limits. `columns` can leave a column out."
        raise Problem(422, detail[:1].upper() + detail[1:]) from None
    except UnrepresentableValue as error:
        log.warning("the export %s cannot be sent in this format: %s", name, error)
        raise Problem(422, f"This format cannot hold the result: {error}.") from None
    except MissingLibrary as error:  # 501 and not 503: nothing but an installation changes it
        raise Problem(501, str(error)) from None
    except Unavailable as error:
        log.warning("the export %s is refused: %s", name, error)
        raise Problem(503, str(error), headers={"Retry-After": "5"}) from None
    except BadQuery as error:
        log.error("the SQL of the export %s is wrong: %s", name, error)
        raise Problem(500, "The database refuses the SQL of this export; the server's log says why.") from None
    except Interrupted as error:
        log.warning("the export %s broke off: %s", name, error)
        raise Problem(503, "The database broke off.", headers={"Retry-After": "5"}) from None


def _example(query: Configured) -> Query:
    """The query with some value for every parameter, to be described, not to be run."""
    zero = {"text": "", "integer": 0, "real": 0.0, "boolean": False}
    return Query(query.sql, {name: zero[parameter.type] for name, parameter in query.parameters.items()})


def _installed() -> Mapping[str, str]:
    """Return the formats that this server can write, with their media types."""
    return {name: form.media_type.partition(";")[0] for name, form in FORMATS.items() if not unavailable(form)}


def _preferred(accept: str) -> str:
    """Return the installed format that Accept likes best (RFC 9110 section 12.5.1); raises Problem 406."""
    liked = weights(accept)
    if not liked:
        return "csv"

    def weight(media: str) -> float:
        return liked.get(media, liked.get(media.partition("/")[0] + "/*", liked.get("*/*", 0.0)))

    formats = _installed()
    best = max(formats, key=lambda form: weight(formats[form]))
    if weight(formats[best]) <= 0:
        raise Problem(406, f"This export comes as {', '.join(formats.values())}.")
    return best


async def _batches(chunks: AsyncIterator[bytes], count: int) -> AsyncIterator[tuple[int, bytes]]:
    """JSON lines after `count` rows as the rows of events, each with how many there are up to its end.

    Where an event ends depends on the number of rows alone, so that a client that comes back gets the same bytes.
    """
    waiting: list[bytes] = []
    async for data in chunks:
        waiting += data.removesuffix(b"\n").split(b"\n")
        while count + len(waiting) >= (end := _event_end(count)):
            yield end, b",".join(waiting[: end - count])
            del waiting[: end - count]
            count = end
    if waiting:
        yield count + len(waiting), b",".join(waiting)


def _event_end(count: int) -> int:
    """How many rows there are at the end of the event that begins after `count`."""
    begun = next((end for end in EVENT_ENDS if count < end), None)
    return begun or EVENT_ENDS[-1] + ((count - EVENT_ENDS[-1]) // EVENT_ROWS + 1) * EVENT_ROWS


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Bring the exports."""
    return [Exports]
