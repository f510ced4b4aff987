"""Run long tasks that clients start, follow, resume and cancel, and that survive a restart."""

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from prometheus_client import Counter
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from streamlab import (
    ANY,
    CONFIG,
    EVENTS,
    METRICS,
    PRINCIPAL,
    TASKS,
    Action,
    Problem,
    Progress,
    ResumeQuery,
    Scenario,
    Scope,
    Task,
    client_of,
    endpoint,
    follow,
    hookimpl,
    no_more_events,
    public_path,
    require,
    require_own,
    resume_id,
    wants_events,
)

from .embedded import EmbeddedEngine
from .engine import ClientLimit, Engine, QueueLimits, StoredLimits
from .runner import Runner
from .store import ID, UNKNOWN_TASK, Record, Store, new_id, now, task_of

BODY_BYTES = 64 * 1024
"""Maximum request body, in bytes."""

UNKNOWN_EVENT = "There is no task with an event of this id."
"""The detail of a 404 of a client that reconnects, also to a task of another principal."""

REHEARSAL_SECONDS = 900
"""Maximum duration of the task `rehearsal`, in seconds."""

RETRY_SECONDS = 1
"""Retry-After for clients that poll a task, in seconds."""


class NewTask(BaseModel):
    """A task to be started."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"kind": "rehearsal", "parameters": {"steps": 5}}]})

    kind: str = Field(max_length=100, description="The kind of task; GET /process/kinds lists them.")
    parameters: dict[str, Any] = Field({}, description="Parameters of that kind.")


class TaskPath(BaseModel):
    """The path of a task."""

    id: str = Field(pattern=ID, description="The task's id.", examples=["0" * 32])


class LongTaskQuery(ResumeQuery):
    """A task to be started and followed at once; other parameters are those of its kind."""

    model_config = ConfigDict(extra="allow")

    kind: str | None = Field(None, max_length=100, description="The kind of task; GET /process/kinds lists them.")
    steps: int | None = Field(
        None, ge=1, le=1_000_000, description="Number of steps, for kinds with this parameter.", examples=[10]
    )


class TaskListQuery(BaseModel):
    """A page of the list of tasks."""

    limit: int = Field(100, ge=1, le=1000, description="Maximum tasks.")
    before: str = Field("f" * 32, pattern=ID, description="Only tasks created before this one.")


class Tasks(Scenario):
    """Long tasks: started, followed from any event, cancelled, and resumed after a crash."""

    name = "progress"

    engine: Literal["embedded", "docket"] = "embedded"
    """Where tasks run: in this process, or in `streamlab worker` processes on any machine (streamlab[redis])."""
    kind: str = "report"
    """Default kind of /process/long-task."""
    max_running: int = Field(2, ge=1, le=1000)
    """Maximum tasks that one process runs at once."""
    max_queued: int = Field(1000, ge=1, le=100_000)
    """Maximum waiting tasks; one more gets 429 with Retry-After."""
    max_queued_per_client: int = Field(500, ge=1, le=100_000)
    """Maximum waiting tasks of one client; one more gets 429 with Retry-After."""
    max_stored: int = Field(10_000, ge=1, le=1_000_000)
    """Maximum stored tasks, with those that have ended; one more gets 429 with Retry-After."""
    max_stored_per_client: int = Field(5000, ge=1, le=1_000_000)
    """Maximum stored tasks of one client; one more gets 429 with Retry-After."""
    max_seconds: float = Field(3600.0, gt=0, le=365 * 86_400)
    """Maximum duration of a task, all its runs together, in seconds; then it fails. A kind may have a smaller limit."""
    max_crashes: int = Field(3, ge=1, le=1000)
    """Number of crashes of its process after which a task is not resumed again."""
    keep_seconds: float = Field(86_400.0, ge=1, le=365 * 86_400)
    """Retention of a finished task and its events, in seconds."""

    _engine: Engine = PrivateAttr()
    _store: Store = PrivateAttr()
    _stored_limits: StoredLimits = PrivateAttr()
    _kinds: Mapping[str, Task] = PrivateAttr(default_factory=dict)
    _described: dict[str, msgspec.Raw] = PrivateAttr(default_factory=dict)
    """Each kind as GET /process/kinds returns it, once somebody has requested them."""

    @model_validator(mode="after")
    def _docket_is_installed(self) -> "Tasks":
        if self.engine == "docket" and importlib.util.find_spec("docket") is None:
            raise ValueError("engine = \"docket\" needs the package pydocket: pip install 'streamlab[redis]'")
        return self

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Accept tasks while the server runs."""
        self._engine = self._create_engine(app)
        async with self._engine.opened():
            yield

    @hookimpl
    def worker_lifespan(self, app: web.Application) -> AbstractAsyncContextManager[None]:
        """Run tasks in a worker; raises Problem where the server runs them itself."""
        self._engine = self._create_engine(app)
        return self._engine.serving(self.max_running)

    def _create_engine(self, app: web.Application) -> Engine:
        self._kinds, self._store = app[TASKS], Store(app[EVENTS], self.keep_seconds)
        stored = ClientLimit(self.max_stored_per_client, "max_stored_per_client" in self.model_fields_set)
        self._stored_limits = StoredLimits(self._store, total=self.max_stored, per_client=stored)
        ended = Counter("streamlab_tasks", "Finished tasks.", ["kind", "state"], registry=app[METRICS].registry)
        runner = Runner(
            self._store,
            self._kinds,
            max_crashes=self.max_crashes,
            max_seconds=self.max_seconds,
            on_end=lambda record: ended.labels(record.kind, record.state).inc(),
        )
        events, store = app[EVENTS], self._store
        queued = ClientLimit(self.max_queued_per_client, "max_queued_per_client" in self.model_fields_set)
        queue = QueueLimits(self.max_queued, queued)
        if self.engine == "embedded":
            return EmbeddedEngine(events, store, runner, max_running=self.max_running, queue=queue)
        if (url := app[CONFIG].events.url).startswith("sqlite"):
            raise Problem(500, 'engine = "docket" needs a Redis server: [events] url = "redis://..."')
        from .docket_engine import DocketEngine  # it imports a hundred modules

        return DocketEngine(events, store, runner, url=url, queue=queue)

    # -- routes

    def _kind_names(self) -> list[str]:
        """Return the names of the kinds of tasks."""
        return sorted(self._kinds)

    @endpoint("GET", "/process/kinds", resource=ANY, sends="application/json", curl="{url}")
    async def list_kinds(self, request: web.Request) -> web.Response:
        """List the kinds of tasks that the client may start, with their parameters as JSON Schema."""
        if not self._described:
            self._described.update((name, self._describe(self._kinds[name])) for name in self._kind_names())
        may = request[PRINCIPAL].may
        kinds = [described for name, described in self._described.items() if may(self.name, "write", name)]
        return _json({"kinds": kinds, "default": self.kind})

    def _describe(self, kind: Task) -> msgspec.Raw:
        """Return a kind of task as JSON, which does not change while the server runs."""
        described = {
            "kind": kind.name,
            "description": kind.description,
            "unit": kind.unit,
            "resumable": kind.resumable,
            "max_seconds": min(self.max_seconds, kind.max_seconds or self.max_seconds),
            "parameters": kind.parameters.model_json_schema(),
        }
        return msgspec.Raw(msgspec.json.encode(described))

    @endpoint("GET", "/process/tasks", query=TaskListQuery, resource=ANY, sends="application/json", curl="{url}")
    async def list_tasks(self, request: web.Request, query: TaskListQuery) -> web.Response:
        """List the stored tasks that the client may read, newest first."""
        stored = [record for record in reversed(await self._store.all()) if record.id < query.before]
        may_use_of = request[PRINCIPAL].may_use_of
        records = [record for record in stored if may_use_of(record.principal, self.name, "read", record.id)]
        page = records[: query.limit]
        more = None
        if len(records) > len(page):
            more = public_path(request, f"/process/tasks?limit={query.limit}&before={page[-1].id}")
        return _json({"tasks": [_document(request, record) for record in page], "next": more})

    @endpoint(
        "POST",
        "/process/tasks",
        body=NewTask,
        resource="kind",
        choices={"kind": _kind_names},
        body_limit=BODY_BYTES,
        sends="application/json",
        responses={
            202: "The task is stored and will be run; Location is its URL.",
            409: "Another request with this Idempotency-Key is in progress.",
            429: "Too many tasks are waiting; see Retry-After.",
        },
        curl="{url}",
    )
    async def submit(self, request: web.Request, body: NewTask) -> web.Response:
        """Start a task; with an Idempotency-Key, a repeated request gets the task of the first."""
        parameters = self._read(body.kind, body.parameters, "body", "parameters.")
        key = request.headers.get("Idempotency-Key")
        if key is not None and not 0 < len(key) <= 255:
            raise Problem(400, "An Idempotency-Key must have 1 to 255 characters.")
        id = new_id()  # noqa: A001
        if key is not None:
            key = f"{request[PRINCIPAL].name}\0{key}"  # keys of two principals are two keys
            holder = await self._store.claim(key, {"kind": body.kind, "parameters": parameters}, id)
            if holder is not None:
                return _response(request, await self._get(request, "read", holder), status=202)
        try:
            return _response(request, await self._submit(request, id, body.kind, parameters), status=202)
        except Problem:
            if key is not None:
                await self._store.release(key)
            raise

    @endpoint(
        "GET",
        "/process/tasks/{id}",
        path_model=TaskPath,
        resource=ANY,
        query=ResumeQuery,
        sends=("application/json", "text/event-stream"),
        responses={
            204: "The client already has the end of the task's events.",
            404: "The task does not exist.",
            410: "The task has ended and expired.",
        },
        curl="{url}",
    )
    async def task(self, request: web.Request, path: TaskPath, query: ResumeQuery) -> web.StreamResponse:
        """Return the state of a task, or follow it: events `progress` and `message`, then `end`."""
        record = await self._get(request, "read", path.id)
        if wants_events(request):
            channel = self._store.channel(path.id)
            return await follow(request, channel, after=query.last_event_id, headers={"Vary": "Accept"})
        return _response(request, record)

    @endpoint(
        "DELETE",
        "/process/tasks/{id}",
        path_model=TaskPath,
        resource=ANY,
        sends="application/json",
        responses={
            202: "The task is being cancelled; its last event confirms it.",
            404: "The task does not exist.",
            409: "The task has already ended.",
            410: "The task has ended and expired.",
        },
        curl="{url}",
    )
    async def cancel(self, request: web.Request, path: TaskPath) -> web.Response:
        """Cancel a task, wherever it waits or runs."""
        await self._get(request, "write", path.id)
        return _response(request, await self._engine.cancel(path.id), status=202)

    @endpoint(
        "GET",
        "/process/long-task",
        query=LongTaskQuery,
        resource=ANY,
        choices={"kind": _kind_names},
        starts_work=True,
        sends="text/event-stream",
        responses={
            204: "The client already has the end of the task's events.",
            429: "Too many tasks are waiting; see Retry-After.",
        },
    )
    async def long_task(self, request: web.Request, query: LongTaskQuery) -> web.StreamResponse:
        """Start a task and follow it at once: events `progress` and `message`, then `end`.

        Disconnecting does not stop it. A client that reconnects with an id resumes the same task.
        """
        id = task_of(resume_id(request, query.last_event_id))  # noqa: A001
        if id is None:
            kind = query.kind or self.kind
            given = {"steps": query.steps} if query.steps is not None else {}
            own = {name: values[0] for name, values in (query.model_extra or {}).items()}
            parameters = self._read(kind, {**own, **given}, "query", "")
            id = (await self._submit(request, new_id(), kind, parameters)).id  # noqa: A001
        elif (record := await self._store.find(id)) is not None:
            require_own(request, record.principal, Scope(self.name, "read", id), UNKNOWN_EVENT)
        else:
            if self._store.is_expired(id):  # it had ended before it expired
                return no_more_events()
            raise Problem(404, UNKNOWN_EVENT)
        headers = {"Location": f"/process/tasks/{id}"}
        return await follow(request, self._store.channel(id), after=query.last_event_id, headers=headers)

    # -- the tasks of a principal

    async def _get(self, request: web.Request, action: Action, id: str) -> Record:  # noqa: A002
        """Return a task; raises Problem 404 also where it is of another client, since an id is no credential."""
        record = await self._store.get(id)
        require_own(request, record.principal, Scope(self.name, action, id), UNKNOWN_TASK)
        return record

    # -- new tasks

    def _read(self, kind: str, given: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
        """Validate the parameters of a new task; return all of them, as JSON. Raises Problem 422."""
        known = self._kinds.get(kind)
        if known is None:
            detail = f"unknown task kind; known: {', '.join(sorted(self._kinds)) or 'none'}"
            raise Problem.parameter("kind", detail, where)
        return known.read(given, where=where, prefix=prefix)

    async def _submit(
        self,
        request: web.Request,
        id: str,  # noqa: A002
        kind: str,
        parameters: Mapping[str, Any],
    ) -> Record:
        require(request, Scope(self.name, "write", kind))
        for scope in map(Scope.needed, self._kinds[kind].needs(parameters)):
            require(request, scope)
        unit, time = self._kinds[kind].unit, now()
        record = Record(id=id, kind=kind, parameters=dict(parameters), unit=unit, created=time, heartbeat=time)
        record.principal = request[PRINCIPAL].name
        record.client = client_of(request)
        await self._stored_limits.check(record.client)
        await self._engine.submit(record)
        return record


def _document(request: web.Request, record: Record) -> dict[str, Any]:
    document = record.document()
    return {**document, "url": public_path(request, document["url"])}


def _response(request: web.Request, record: Record, *, status: int = 200) -> web.Response:
    headers = {"Vary": "Accept"}
    if not record.has_ended:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 202:
        headers["Location"] = f"/process/tasks/{record.id}"
    return _json(_document(request, record), status=status, headers=headers)


def _json(document: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    content = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store"}
    return web.Response(body=msgspec.json.encode(document), status=status, headers={**content, **(headers or {})})


async def rehearsal(
    progress: Progress,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="Number of steps.")] = 10,
    delay: Annotated[float, Field(ge=0, le=60, description="Duration of each step, in seconds.")] = 0.2,
    fail_at: Annotated[int | None, Field(ge=1, le=1_000_000, description="The step that fails.")] = None,
) -> dict[str, int]:
    """Do nothing, step by step, and fail at a given step: for testing clients."""
    await progress(0, steps, "rehearsing")
    for step in range(1, steps + 1):
        await asyncio.sleep(delay)
        if step == fail_at:
            raise Problem(500, f"Step {step} failed, as requested.")
        await progress(step)
    return {"steps": steps}


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Return the scenario of long tasks."""
    return [Tasks]


@hookimpl
def register_tasks() -> list[Task]:
    """Return the task `rehearsal`."""
    return [Task(rehearsal, unit="steps", max_seconds=REHEARSAL_SECONDS)]
