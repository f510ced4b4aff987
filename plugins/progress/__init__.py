"""Run long tasks that are started, watched, cancelled and come back to, and that survive a restart."""

import asyncio
import importlib.util
import ipaddress
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, Literal

from aiohttp import web
from prometheus_client import Counter
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from streamlab import CONFIG, EVENTS, METRICS, TASKS, Problem, Progress, Scenario, Task, endpoint, follow, hookimpl

from .embedded import Embedded
from .engine import Engine, QueueLimits
from .runner import Runner
from .store import ID, Record, Store, new_id, now, read_id

BODY_BYTES = 64 * 1024
"""What a task may be given."""

REHEARSAL_SECONDS = 900
"""How long the task that does nothing may run, in seconds."""

RETRY_SECONDS = 1
"""When a client that asks for a task, instead of following it, may ask again."""


class NewTask(BaseModel):
    """A task to be run."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"kind": "rehearsal", "parameters": {"steps": 5}}]})

    kind: str = Field(max_length=100, description="Its kind; GET /process/kinds lists them.")
    parameters: dict[str, Any] = Field({}, description="What its kind takes.")


class Which(BaseModel):
    """Which task is meant."""

    id: str = Field(pattern=ID, description="The task's id.", examples=["0" * 32])


class Again(BaseModel):
    """From where on a task is followed."""

    last_event_id: str = Field(
        "", max_length=200, description="Go on after this event; the header Last-Event-ID says the same, and wins."
    )


class Started(Again):
    """A task to be started and followed at once; parameters of its kind beside these are its own."""

    model_config = ConfigDict(extra="allow")

    kind: str | None = Field(None, max_length=100, description="Its kind; GET /process/kinds lists them.")
    steps: int | None = Field(
        None, ge=1, le=1_000_000, description="In how many steps, where its kind takes that.", examples=[10]
    )


class Page(BaseModel):
    """Which part of the list is meant."""

    limit: int = Field(100, ge=1, le=1000, description="Tasks at most.")
    before: str = Field("f" * 32, pattern=ID, description="Only those that were made before this one.")


class Tasks(Scenario):
    """Long tasks: started, watched from any id, cancelled, and gone on with after a crash."""

    name = "progress"

    engine: Literal["embedded", "docket"] = "embedded"
    """Who runs tasks: this process, or those that `streamlab worker` starts, on any machine (streamlab[redis])."""
    kind: str = "report"
    """What /process/long-task starts where a client does not say."""
    max_running: int = Field(2, ge=1, le=1000)
    """Tasks that a process runs at once."""
    max_queued: int = Field(1000, ge=1, le=100_000)
    """Tasks that wait for their turn; one more is answered 429 with Retry-After."""
    max_queued_per_client: int = Field(500, ge=1, le=100_000)
    """Tasks of one client that wait; one more is answered 429 with Retry-After."""
    max_seconds: float = Field(3600.0, gt=0, le=365 * 86_400)
    """How long a task may run, all its runs together; then it is stopped and has failed. A kind may have less."""
    max_crashes: int = Field(3, ge=1, le=1000)
    """A task whose process has died so often is given up."""
    keep_seconds: float = Field(86_400.0, ge=1, le=365 * 86_400)
    """How long a task that is over is kept, with its events."""

    _engine: Engine = PrivateAttr()
    _store: Store = PrivateAttr()
    _kinds: Mapping[str, Task] = PrivateAttr()

    @model_validator(mode="after")
    def _docket_is_there(self) -> "Tasks":
        if self.engine == "docket" and importlib.util.find_spec("docket") is None:
            raise ValueError("engine = \"docket\" needs the package pydocket: pip install 'streamlab[redis]'")
        return self

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Take tasks on while the server serves."""
        self._engine = self._made(app)
        async with self._engine.opened():
            yield

    @hookimpl
    def worker_lifespan(self, app: web.Application) -> AbstractAsyncContextManager[None]:
        """Run tasks in a worker; raises Problem where the server does that itself."""
        self._engine = self._made(app)
        return self._engine.serving(self.max_running)

    def _made(self, app: web.Application) -> Engine:
        self._kinds, self._store = app[TASKS], Store(app[EVENTS], self.keep_seconds)
        ended = Counter("streamlab_tasks", "Tasks that are over.", ["kind", "state"], registry=app[METRICS].registry)
        runner = Runner(
            self._store,
            self._kinds,
            max_crashes=self.max_crashes,
            max_seconds=self.max_seconds,
            on_end=lambda record: ended.labels(record.kind, record.state).inc(),
        )
        events, store = app[EVENTS], self._store
        queue = QueueLimits(self.max_queued, self.max_queued_per_client)
        if self.engine == "embedded":
            return Embedded(events, store, runner, max_running=self.max_running, queue=queue)
        if (url := app[CONFIG].events.url).startswith("sqlite"):
            raise Problem(500, 'engine = "docket" needs a Redis server: [events] url = "redis://..."')
        from .workers import Workers  # it brings a hundred modules along

        return Workers(events, store, runner, url=url, queue=queue)

    # -- routes

    @endpoint("GET", "/process/kinds", sends="application/json", curl="{url}")
    async def list_kinds(self, request: web.Request) -> web.Response:
        """List the kinds of tasks, with what they take as JSON Schema."""
        kinds = [
            {
                "kind": task.name,
                "description": task.description,
                "unit": task.unit,
                "resumable": task.resumable,
                "max_seconds": min(self.max_seconds, task.max_seconds or self.max_seconds),
                "parameters": task.parameters.model_json_schema(),
            }
            for _, task in sorted(self._kinds.items())
        ]
        return _json({"kinds": kinds, "default": self.kind})

    @endpoint("GET", "/process/tasks", query=Page, sends="application/json", curl="{url}")
    async def list_tasks(self, request: web.Request, query: Page) -> web.Response:
        """List the tasks that are kept, newest first."""
        records = [record for record in reversed(await self._store.all()) if record.id < query.before]
        listed = records[: query.limit]
        more = f"/process/tasks?limit={query.limit}&before={listed[-1].id}" if len(records) > len(listed) else None
        return _json({"tasks": [record.document() for record in listed], "next": more})

    @endpoint(
        "POST",
        "/process/tasks",
        body=NewTask,
        body_limit=BODY_BYTES,
        sends="application/json",
        responses={
            202: "The task is kept and will be run; Location names it.",
            409: "Another request with this Idempotency-Key is being answered.",
            429: "Too many tasks wait; Retry-After says when to ask again.",
        },
        curl="{url}",
    )
    async def submit(self, request: web.Request, body: NewTask) -> web.Response:
        """Start a task; with an Idempotency-Key, a request that is repeated gets the task that it got before."""
        parameters = self._read(body.kind, body.parameters, "body", "parameters.")
        key = request.headers.get("Idempotency-Key")
        if key is not None and not 0 < len(key) <= 255:
            raise Problem(400, "An Idempotency-Key has 1 to 255 characters.")
        id = new_id()  # noqa: A001
        if key is not None:
            claimed = await self._store.claimed(key, {"kind": body.kind, "parameters": parameters}, id)
            if claimed is not None:
                return _answer(await self._store.get(claimed), status=202)
        return _answer(await self._submit(request, id, body.kind, parameters), status=202)

    @endpoint(
        "GET",
        "/process/tasks/{id}",
        path_model=Which,
        query=Again,
        sends=("application/json", "text/event-stream"),
        responses={
            204: "The client has the end of the task's events already.",
            404: "There is no such task.",
            410: "The task is over, and not kept any more.",
        },
        curl="{url}",
    )
    async def task(self, request: web.Request, path: Which, query: Again) -> web.StreamResponse:
        """Tell where a task stands, or follow it: events `progress` and `message`, then `end`."""
        record = await self._store.get(path.id)
        if "text/event-stream" in request.headers.get("Accept", ""):
            channel = self._store.channel(path.id)
            return await follow(request, channel, after=query.last_event_id, headers={"Vary": "Accept"})
        return _answer(record)

    @endpoint(
        "DELETE",
        "/process/tasks/{id}",
        path_model=Which,
        sends="application/json",
        responses={
            202: "The task is being cancelled; its last event says when it is.",
            404: "There is no such task.",
            409: "The task is over already.",
            410: "The task is over, and not kept any more.",
        },
        curl="{url}",
    )
    async def cancel(self, request: web.Request, path: Which) -> web.Response:
        """Cancel a task, wherever it waits or runs."""
        return _answer(await self._engine.cancel(path.id), status=202)

    @endpoint(
        "GET",
        "/process/long-task",
        query=Started,
        starts_work=True,
        sends="text/event-stream",
        responses={
            204: "The client has the end of the task's events already.",
            429: "Too many tasks wait; Retry-After says when to ask again.",
        },
    )
    async def long_task(self, request: web.Request, query: Started) -> web.StreamResponse:
        """Start a task and follow it at once: events `progress` and `message`, then `end`.

        Leaving does not stop it. A client that comes back with an id goes on with the same task.
        """
        asked = request.headers.get("Last-Event-ID") or query.last_event_id
        id = read_id(asked)  # noqa: A001
        if id is None:
            kind = query.kind or self.kind
            given = {"steps": query.steps} if query.steps is not None else {}
            others = {name: values[0] for name, values in (query.model_extra or {}).items()}
            parameters = self._read(kind, {**others, **given}, "query", "")
            id = (await self._submit(request, new_id(), kind, parameters)).id  # noqa: A001
        elif await self._store.find(id) is None:
            if self._store.expired(id):  # it was over before it was forgotten
                return web.Response(status=204, headers={"Cache-Control": "no-store"})
            raise Problem(404, "There is no task that this event's id belongs to.")
        headers = {"Location": f"/process/tasks/{id}"}
        return await follow(request, self._store.channel(id), after=query.last_event_id, headers=headers)

    # -- what is asked for

    def _read(self, kind: str, given: Mapping[str, Any], place: str, prefix: str) -> dict[str, Any]:
        """Validate the parameters of a task and return all of them, as JSON; raises Problem 422."""
        task = self._kinds.get(kind)
        if task is None:
            detail = f"is none of the kinds of tasks: {', '.join(sorted(self._kinds)) or 'there are none'}"
            errors = [{"in": place, "name": "kind", "detail": detail}]
            raise Problem(422, "This server has no task of this kind.", errors=errors)
        return task.read(given, place=place, prefix=prefix)

    async def _submit(
        self,
        request: web.Request,
        id: str,  # noqa: A002
        kind: str,
        parameters: Mapping[str, Any],
    ) -> Record:
        task, time = self._kinds[kind], now()
        record = Record(id=id, kind=kind, parameters=dict(parameters), unit=task.unit, created=time, told=time)
        record.client = client_of(request)
        await self._engine.submit(record)
        return record


def client_of(request: web.Request) -> str:
    """Return whom a task counts for when slots are divided: the address of the client, of IPv6 its network of 64 bits.

    One host has all addresses of such a network. Behind a reverse proxy all clients are one.
    """
    try:
        address = ipaddress.ip_address(request.remote or "")
    except ValueError:  # a Unix socket has none
        return ""
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return str(address)


def _answer(record: Record, *, status: int = 200) -> web.Response:
    headers = {"Vary": "Accept"}
    if not record.over:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 202:
        headers["Location"] = f"/process/tasks/{record.id}"
    return _json(record.document(), status=status, headers=headers)


def _json(document: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response(document, status=status, headers={"Cache-Control": "no-store", **(headers or {})})


async def rehearsal(
    progress: Progress,
    steps: Annotated[int, Field(ge=1, le=1_000_000, description="How many.")] = 10,
    delay: Annotated[float, Field(ge=0, le=60, description="Seconds that each takes.")] = 0.2,
    fail_at: Annotated[int | None, Field(ge=1, description="The step at which it fails.")] = None,
) -> dict[str, int]:
    """Do nothing, step by step, and fail where that is asked for: to try clients with."""
    await progress(0, steps, "rehearsing")
    for step in range(1, steps + 1):
        await asyncio.sleep(delay)
        if step == fail_at:
            raise Problem(500, f"Step {step} failed, as it was asked to.")
        await progress(step)
    return {"steps": steps}


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Bring the tasks."""
    return [Tasks]


@hookimpl
def register_tasks() -> list[Task]:
    """Bring the task that does nothing."""
    return [Task(rehearsal, unit="steps", max_seconds=REHEARSAL_SECONDS)]
