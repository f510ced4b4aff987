"""Export the results of configured SQL queries as CSV, JSON lines and more, in constant memory."""

import asyncio
import hashlib
import json
import logging
import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from aiohttp import web
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    TypeAdapter,
    ValidationInfo,
    model_validator,
)

from streamlab import (
    ANY,
    CONFIG,
    FILES,
    PRINCIPAL,
    SHARED,
    ConfigPath,
    Problem,
    ResumeQuery,
    Scenario,
    Scope,
    Slots,
    Task,
    Threads,
    client_of,
    endpoint,
    hookimpl,
    no_more_events,
    open_event_stream,
    open_stream,
    public_path,
    require,
    resume_id,
    wants_events,
    weights,
)

from . import sample, sqlite_source
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
from .writes import writes

log = logging.getLogger(__name__)

THREADS = 8
"""Number of threads that begin queries of SQLite."""

EVENT_ENDS = (16, 80, 336)
"""Number of rows at the end of each of the first events, which are small so that they arrive early."""

EVENT_ROWS = 1000
"""Number of rows in each later event."""

NOT_INSTALLED = "A library that the format or the database requires is not installed; a retry does not help."
"""Description of 501 in the API document."""

SQLITE = "sqlite:///"
"""Beginning of the URL of an SQLite file; its path follows."""

SAMPLE = "sample"
"""Name of the sample database."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


_CONFIG_PATH: TypeAdapter[Path] = TypeAdapter(ConfigPath)


def _database_url(url: str, info: ValidationInfo) -> str:
    scheme, separator, rest = url.partition("://")
    if separator and scheme in ("postgresql", "postgres"):
        return url
    if separator and scheme == "sqlite" and re.match(r"/.", rest):
        return f"{SQLITE}{_CONFIG_PATH.validate_python(rest[1:], context=info.context)}"
    raise ValueError("must be sqlite:///relative/path.db, sqlite:////absolute/path.db or postgresql://...")


class Table(BaseModel):
    """A table of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Database(Table):
    """A database that exports read from."""

    url: Annotated[str, AfterValidator(_database_url)]
    """`sqlite:///PATH` (relative to the folder of config.toml), or `postgresql://user@host/name`."""

    @property
    def path(self) -> Path | None:
        """The file of an SQLite database."""
        return Path(self.url.removeprefix(SQLITE)) if self.url.startswith(SQLITE) else None


class ConfiguredExport(Table):
    """An export: a SELECT, and the parameters that requests may set."""

    sql: str = Field(min_length=1)
    """A SELECT with parameters as `:name`. SQL is never taken from a request."""
    database: Name = SAMPLE
    """Name of its database."""
    parameters: dict[Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")], Parameter] = Field(
        default_factory=dict, max_length=50
    )
    """Its parameters by name."""
    description: str = ""
    """Description for people."""

    @model_validator(mode="after")
    def _names_are_free(self) -> "ConfiguredExport":
        if taken := sorted(set(self.parameters) & set(RESERVED)):
            raise ValueError(f"{', '.join(taken)}: reserved in every export; rename the parameter")
        return self


SAMPLES = {
    "users": ConfiguredExport(
        sql="SELECT id, name, email, country, balance, created, active, note FROM users ORDER BY id",
        description="All users of the sample database.",
    ),
    "data": ConfiguredExport(
        sql="SELECT id, name, country, balance, created FROM users ORDER BY id",
        description="The users of the sample database, with fewer columns.",
    ),
    "results": ConfiguredExport(
        sql="SELECT id, name, country, balance FROM users WHERE active ORDER BY id",
        description="The active users of the sample database.",
    ),
}
"""The exports of the sample database, by name."""


class ExportPath(BaseModel):
    """The path of an export."""

    name: str = Field(max_length=64, description="Name of the export.", examples=["users"])


class ExportFormatPath(ExportPath):
    """The path of an export in a format."""

    format: Format = Field(description="The format.", examples=["csv"])


class ExportQuery(RowsQuery):
    """The query of an export."""

    end: bool = Field(False, description="JSON lines: end with a record of the number of rows and a digest of them.")


class ResultsQuery(RowsQuery, ResumeQuery):
    """The query of a stream of results."""


@dataclass(frozen=True, slots=True)
class OpenExport:
    """An export whose first rows have been fetched."""

    result: Export
    encoder: Encoder
    deadline: float
    """Time of the loop at which it is aborted."""


class Exports(Scenario):
    """Results of SQL queries as CSV, JSON lines and more, in constant memory."""

    name = "export"

    databases: dict[Name, Database] = Field({}, max_length=100)
    """Databases by name."""
    queries: dict[Name, ConfiguredExport] = Field({}, max_length=1000)
    """Exports by name."""
    sample: bool = True
    """Whether there is a database `sample`, created at its first use, with the exports users, data and results."""
    sample_rows: int = Field(1_000_000, ge=1, le=100_000_000)
    """Number of users in the sample."""
    max_cell_mb: float = Field(16.0, gt=0, le=1000)
    """Maximum size of a cell, in megabytes (1,000,000 bytes); a larger one fails the export, also once it has begun."""
    formula_guard: bool = True
    """Whether an apostrophe is put before text in CSV that a spreadsheet would run as a formula."""
    max_exports: int = Field(100, ge=1, le=10_000)
    """Maximum number of exports at once; more are rejected with 503 and Retry-After. One client has half of them."""
    max_seconds: float = Field(3600.0, gt=0, le=7 * 86_400)
    """Maximum duration of an export, in seconds; then it is aborted."""
    folder: ConfigPath = Path("var/files/exports")
    """Folder of the files of the task `export`; they can be downloaded if it is below the root of the file scenario."""
    keep_seconds: float = Field(86_400.0, ge=1, le=365 * 86_400)
    """Retention of a file of the task `export`, in seconds from its completion."""
    keep_mb: int = Field(10_000, ge=1, le=100_000_000)
    """Maximum size of all files of the task `export`, in megabytes (1,000,000 bytes); beyond, it fails with 507."""

    _sources: dict[str, Source] = PrivateAttr(default_factory=dict)
    _missing: dict[str, MissingLibrary] = PrivateAttr(default_factory=dict)
    _slots: Slots = PrivateAttr()
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
    def exports(self) -> Mapping[str, ConfiguredExport]:
        """Every export by name: the configured ones, and those of the sample whose names are not used otherwise."""
        return {**(SAMPLES if self.sample and SAMPLE not in self.databases else {}), **self.queries}

    @hookimpl
    def check(self) -> Iterator[tuple[str, str]]:
        """Report SQLite files that cannot be read, and SQL that they reject; no PostgreSQL server is connected to."""
        writing = {key: reason for key, query in self.queries.items() if (reason := writes(query.sql))}
        for key, reason in writing.items():
            yield f"queries.{key}.sql", reason
        for name, database in self.databases.items():
            path = database.path
            if path is None:
                if missing := _missing_library(database.url):
                    yield f"databases.{name}.url", missing
                continue
            own = {key for key, query in self.queries.items() if query.database == name} - writing.keys()
            queries = {key: _example(self.queries[key]) for key in sorted(own)}
            try:
                rejected = sqlite_source.rejected(path, queries, max_cell=self._max_cell)
            except Unavailable as error:
                yield f"databases.{name}.url", f"{path}: {error}" if path.exists() else f"there is no file {path}"
                continue
            for key, reason in rejected.items():
                yield f"queries.{key}.sql", f"{path} rejects it: {reason}"

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Hold threads for SQLite and connections to PostgreSQL open while the server serves."""
        base = app[CONFIG].base
        self._sample_path = base / "var/sample.db"
        self._file_url = app[FILES].url
        self._slots = Slots(self.max_exports, what="exports", tally=app[SHARED].tally("exports"))
        async with AsyncExitStack() as stack:
            threads = await stack.enter_async_context(Threads("export", THREADS))
            self._making = await stack.enter_async_context(Threads("export-sample", 1))
            self._files = Files(self.folder, keep_seconds=self.keep_seconds, keep_bytes=self.keep_mb * 1_000_000)
            await stack.enter_async_context(self._files.opened())
            turns = await stack.enter_async_context(Threads("export-turns", 1))
            databases = dict(self.databases)
            if self.sample:
                databases.setdefault(SAMPLE, Database(url=f"{SQLITE}{self._sample_path}"))
            for name, database in databases.items():
                if (path := database.path) is not None:
                    self._sources[name] = SqliteSource(path, threads, turns, max_cell=self._max_cell)
                    continue
                try:
                    self._sources[name] = await _open_postgres(stack, database.url, self.max_seconds, self._max_cell)
                except MissingLibrary as error:  # the exports of other databases still work
                    log.warning("the database %s cannot be read: %s", name, error)
                    self._missing[name] = error
            yield

    @hookimpl
    def worker_lifespan(self, app: web.Application) -> AbstractAsyncContextManager[None]:
        """Hold the same open while a worker runs tasks."""
        return self.lifespan(app)

    @hookimpl
    def register_tasks(self) -> list[Task]:
        """Register the report on the sample, and exports to files."""
        jobs = Jobs(self)
        # It reads what the export `users` has.
        reading = Task(jobs.report, unit="users", resumable=True, needs=lambda given: ["export:read:users"])
        report = [reading] if self.has_sample else []
        export = Task(jobs.export, unit="rows", resumable=True, needs=lambda given: [f"export:read:{given['name']}"])
        return [*report, export]

    # -- routes

    def _names(self) -> list[str]:
        """Return the names of the exports."""
        return sorted(self.exports)

    @endpoint("GET", "/export", resource=ANY, sends="application/json", curl="{url}")
    async def index(self, request: web.Request) -> web.Response:
        """List every export that the client may read: columns, their types, parameters, and the installed formats."""
        names = request[PRINCIPAL].visible(self.name, self._names())
        listed = [await self._listed(request, name, self.exports[name]) for name in names]
        missing = {form: reason for form, kind in FORMATS.items() if (reason := unavailable(kind))}
        text = json.dumps({"exports": listed, "unavailable_formats": missing}, ensure_ascii=False, indent=1) + "\n"
        return web.Response(text=text, content_type="application/json")

    async def _listed(self, request: web.Request, name: str, query: ConfiguredExport) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": name, "description": query.description, "database": query.database}
        entry["urls"] = {form: public_path(request, f"/export/{name}/{form}") for form in _installed()}
        entry["parameters"] = {key: value.model_dump(exclude_defaults=True) for key, value in query.parameters.items()}
        try:
            columns = await (await self.source(query.database)).describe(_example(query))
            entry["columns"] = [{"name": column.name, "type": column.type} for column in columns]
        except BadQuery as error:
            entry["unavailable"] = writes(query.sql) or str(error)
        except (Unavailable, MissingLibrary, Problem) as error:
            entry["unavailable"] = str(error)
        return entry

    @endpoint(
        "GET",
        "/export/{name}",
        path_model=ExportPath,
        resource="name",
        choices={"name": _names},
        query=ExportQuery,
        sends=tuple(form.media_type for form in FORMATS.values()),
        responses={406: "Accept allows none of the installed formats.", 501: NOT_INSTALLED},
        curl="-H 'Accept: application/jsonl' {url}",
    )
    async def negotiated(self, request: web.Request, path: ExportPath, query: ExportQuery) -> web.StreamResponse:
        """Export a result in the format that Accept prefers; CSV without Accept."""
        form = _preferred(request.headers.get("Accept", ""))
        return await self._send(request, path.name, form, query, {"Vary": "Accept"})

    @endpoint(
        "GET",
        "/export/{name}/{format}",
        path_model=ExportFormatPath,
        resource="name",
        choices={"name": _names},
        query=ExportQuery,
        sends=tuple(form.media_type for form in FORMATS.values()),
        responses={501: NOT_INSTALLED},
        curl="-OJ {url}",
    )
    async def export(self, request: web.Request, path: ExportFormatPath, query: ExportQuery) -> web.StreamResponse:
        """Export a result as CSV, JSON lines, a JSON array, an Arrow stream or Parquet."""
        return await self._send(request, path.name, path.format, query, {})

    @endpoint(
        "GET",
        "/stream/database-results",
        query=ResultsQuery,
        resource=ANY,
        sends=("application/jsonl", "text/event-stream"),
        responses={204: "The client has received the end of the stream."},
        curl="-N {url}",
    )
    async def results(self, request: web.Request, query: ResultsQuery) -> web.StreamResponse:
        """Stream the rows of the export `results` as JSON lines, or as events of a batch each that resume by row."""
        require(request, Scope(self.name, "read", "results"))
        if wants_events(request):
            return await self._send_events(request, "results", query)
        return await self._send(request, "results", "jsonl", query, {"Vary": "Accept"})

    # -- the response

    async def _send(
        self, request: web.Request, name: str, form: str, query: ExportQuery | ResultsQuery, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        end = isinstance(query, ExportQuery) and query.end
        if end and form != "jsonl":
            raise Problem.parameter("end", f"only jsonl has an end record, not {form}")
        async with self.opened(name, form, query, client=client_of(request)) as export:
            encoder, digest = export.encoder, hashlib.sha256() if end else None
            headers = {"Content-Disposition": f'attachment; filename="{name}.{encoder.extension}"', **headers}
            async with (
                open_stream(request, encoder.media_type, headers=headers, compress=True) as stream,
                self.limited(name, export.deadline),
            ):
                async for data in body(export.result):
                    if digest is not None:
                        digest.update(data)
                    await stream.write(data)
                altered = self.report_altered(name, export.result)
                await stream.write(encoder.end(export.result.rows, digest.hexdigest() if digest else None, altered))
        return stream

    async def _send_events(self, request: web.Request, name: str, query: ResultsQuery) -> web.StreamResponse:
        """Send batches of rows as events. An id is the version of the data and the number of rows up to its event."""
        last_id = resume_id(request, query.last_event_id)
        if last_id.endswith(".end"):
            return no_more_events()
        match = re.fullmatch(r"([0-9a-f]{1,16})-([0-9]{1,15})(?:\.[a-z]+)?", last_id)
        version, count = (match[1], int(match[2])) if match else ("", 0)
        async with self.opened(name, "jsonl", query, skip=count, client=client_of(request)) as export:
            has_changed = bool(last_id) and version != export.result.version
            if not (has_changed and count):
                return await self._send_batches(request, name, export, count, has_changed=has_changed)
        # The rows before `count` may have changed, too: all are sent again.
        async with self.opened(name, "jsonl", query, client=client_of(request)) as export:
            return await self._send_batches(request, name, export, 0, has_changed=True)

    async def _send_batches(
        self, request: web.Request, name: str, export: OpenExport, count: int, *, has_changed: bool
    ) -> web.StreamResponse:
        """Send the rows after the first `count` as events."""
        result = export.result
        async with (
            open_event_stream(request, headers={"Vary": "Accept"}, position=f"{result.version}-{count}") as stream,
            self.limited(name, export.deadline),
        ):
            if has_changed:
                await stream.gap("the data may have changed since")
            async for end, rows in _batches(result.chunks(), count):
                await stream.send(b'{"count":%d,"rows":[%b]}' % (end, rows), f"{result.version}-{end}", "rows")
            total = {"count": count + result.rows, "altered": self.report_altered(name, result)}
            await stream.send(total, f"{stream.position}.end", "end")
        return stream

    @staticmethod
    def report_altered(name: str, export: Export) -> int:
        """Return the number of altered values of a finished export, and log it: most formats cannot report it."""
        if export.altered:
            log.warning("the export %s altered %d values that its format cannot hold", name, export.altered)
        return export.altered

    @asynccontextmanager
    async def opened(
        self, name: str, form: str, query: RowsQuery, *, skip: int = 0, client: str = ""
    ) -> AsyncIterator[OpenExport]:
        """Run an export within the limits, without its first `skip` rows; raises Problem if it fails at the start."""
        configured = self.exports.get(name)
        if configured is None:
            known = ", ".join(sorted(self.exports)) or "none"
            raise Problem(404, f"There is no export of this name; GET /export lists them: {known}.")
        values, where = query.read_values(configured.parameters)
        limit = None if query.limit is None else max(0, query.limit - skip)
        selection = Selection(query.columns, where, limit, skip)
        deadline = asyncio.get_running_loop().time() + self.max_seconds
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._slots.held(client=client))
            async with self.limited(name, deadline):
                source = await self.source(configured.database)
                sql, guard = Query(configured.sql, values), self.formula_guard
                running = source.export(sql, selection, form, formula_guard=guard, strict=query.strict)
                result, encoder = await stack.enter_async_context(running)
            yield OpenExport(result, encoder, deadline)

    @asynccontextmanager
    async def limited(self, name: str, deadline: float | None = None) -> AsyncIterator[None]:
        """Turn errors and a timeout in the block into Problems.

        Enter it inside the block of an open stream: that cancels the handler as soon as it is aborted.
        """
        with _error_responses(name, self.exports[name].sql if name in self.exports else ""):
            try:
                async with asyncio.timeout_at(deadline):
                    yield
            except TimeoutError:
                raise Interrupted(f"it took longer than {self.max_seconds:g} s (max_seconds)") from None

    async def source(self, database: str = SAMPLE) -> Source:
        """Return the source of a database; create the sample database at its first use."""
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
                        raise Problem(503, f"The sample database cannot be created: {reason}.") from error
        if database in self._missing:
            raise self._missing[database]
        return self._sources[database]


def _missing_library(url: str) -> str | None:
    """Return why a PostgreSQL database cannot be read on this machine; None if it may be."""
    from .postgres_source import PostgresSource

    try:
        PostgresSource(url, statement_seconds=1)
    except (MissingLibrary, ValueError) as error:
        return str(error)
    return None


async def _open_postgres(stack: AsyncExitStack, url: str, seconds: float, max_cell: int) -> Source:
    from .postgres_source import PostgresSource

    source = PostgresSource(url, statement_seconds=seconds, max_cell=max_cell)
    await stack.enter_async_context(source.opened())
    return source


@contextmanager
def _error_responses(name: str, sql: str) -> Iterator[None]:
    """Turn errors of an export into Problems with what concerns the client, and log what concerns the operator."""
    try:
        yield
    except UnknownColumn as error:
        detail = f"the result has no column {error.name!r}; known: {', '.join(error.known)}"
        raise Problem.parameter("columns", detail) from None
    except BadValue as error:
        raise Problem.parameter(error.name, error.detail) from None
    except TooLarge as error:
        log.warning("the export %s is rejected: %s", name, error)
        detail = f"{error}; the limit is max_cell_mb. `columns` can exclude a column."
        raise Problem(422, detail[:1].upper() + detail[1:]) from None
    except UnrepresentableValue as error:
        log.warning("the export %s cannot be sent in this format: %s", name, error)
        raise Problem(422, f"This format cannot hold the result: {error}.") from None
    except MissingLibrary as error:  # 501 and not 503: only an installation changes it
        raise Problem(501, str(error)) from None
    except Unavailable as error:
        log.warning("the export %s is unavailable: %s", name, error)
        raise Problem(503, str(error), headers={"Retry-After": "5"}) from None
    except BadQuery as error:
        log.error("the SQL of the export %s is invalid: %s", name, writes(sql) or error)
        raise Problem(500, "The database rejects the SQL of this export; see the server's log.") from None
    except Interrupted as error:
        log.warning("the export %s was interrupted: %s", name, error)
        raise Problem(503, "The export was interrupted.", headers={"Retry-After": "5"}) from None


def _example(query: ConfiguredExport) -> Query:
    """Return the query with a value for every parameter, to be described, not run."""
    zero = {"text": "", "integer": 0, "real": 0.0, "boolean": False}
    return Query(query.sql, {name: zero[parameter.type] for name, parameter in query.parameters.items()})


def _installed() -> Mapping[str, str]:
    """Return the formats that this server can write, with their media types."""
    return {name: form.media_type.partition(";")[0] for name, form in FORMATS.items() if not unavailable(form)}


def _preferred(accept: str) -> str:
    """Return the installed format that Accept prefers (RFC 9110 section 12.5.1); raises Problem 406."""
    accepted = weights(accept)
    if not accepted:
        return "csv"

    def weight(media: str) -> float:
        return accepted.get(media, accepted.get(media.partition("/")[0] + "/*", accepted.get("*/*", 0.0)))

    formats = _installed()
    best = max(formats, key=lambda form: weight(formats[form]))
    if weight(formats[best]) <= 0:
        raise Problem(406, f"Accept allows none of the available formats: {', '.join(formats.values())}.")
    return best


async def _batches(chunks: AsyncIterator[bytes], count: int) -> AsyncIterator[tuple[int, bytes]]:
    """Yield JSON lines after `count` rows as the rows of events, each with the number of rows up to its end.

    The end of an event depends only on the number of rows, so that a client that resumes gets the same bytes.
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
    """Return the number of rows at the end of the event that begins after `count`."""
    early = next((end for end in EVENT_ENDS if count < end), None)
    return early or EVENT_ENDS[-1] + ((count - EVENT_ENDS[-1]) // EVENT_ROWS + 1) * EVENT_ROWS


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Register the exports."""
    return [Exports]
