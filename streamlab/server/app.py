"""The aiohttp application: how it is built, served, drained and closed."""

import asyncio
import gc
import logging
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, NoReturn

from aiohttp import HttpVersion11, web

from streamlab import sse
from streamlab.auth import PRINCIPAL, client_of
from streamlab.config import CONFIG, Config, ConfigError, Fault
from streamlab.events.channel import EVENTS, Events, open_log
from streamlab.events.log import EventLogError, Retention
from streamlab.events.views import Filters
from streamlab.pages import PREFIX, public_path
from streamlab.problems import ERROR_FORMATS, Problem, error_format_of, from_aiohttp
from streamlab.scenario import Endpoint, Route
from streamlab.served_files import FILES, ServedFiles
from streamlab.streaming.drain import STREAMS, Streams
from streamlab.streaming.event_stream import open_event_stream
from streamlab.streaming.stream import SCENARIO, STREAM, HeadersOnly, Stream, open_stream
from streamlab.tally import SHARED, Shared
from streamlab.tasks import TASKS
from streamlab.threads import Threads
from streamlab.ticks import tick

from . import preflight
from .access_log import AccessLog
from .authorization import AUTHORIZATION, Authorization, authorize, end_unauthorized
from .cors import CORS, Cors
from .credentials import authenticate, complete, take_ticket
from .dispatch import Dispatch, Respond
from .edge import (
    BODY_LIMIT,
    SAFE_METHODS,
    AllowedHosts,
    EdgeConnection,
    accept_body,
    reject_other_origin,
    reject_unsupported,
    set_common_headers,
)
from .forwarded import Proxies, take_forwarded
from .lifespans import lifespans
from .limits import OpenConnections, RequestRate
from .listening import accepting, listening
from .metrics import METRICS, Metrics
from .registry import Plugin, Registry
from .reload import reload_requests, reloading
from .service import Service
from .sessions import SESSIONS, Sessions
from .shared_limits import SharedBuckets, SharedByWorkers, SharedTally
from .sign_in import SignIn, denied_page
from .site import OWN, REGISTRY, ROUTES, STARTED_AT, Site, is_degraded
from .validation import read_authorized
from .watchdog import Stopped, Watchdog
from .worker import WORKER, Worker

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0001
"""Time that a computing thread, as that of an export, holds the interpreter while the event loop waits, in seconds."""

YOUNG_OBJECTS = 10_000
"""Net number of new objects after which the garbage collector examines the youngest generation."""

STOP_SECONDS = 1.0
"""Maximum time from the end of the drain to the end of the process, in seconds."""

HEARD_SECONDS = 0.25
"""Maximum time for the first request of a connection to arrive at a worker that stops, in seconds."""

TROUBLE_SECONDS = 1.0
"""Interval at which a worker reports to the others whether something does not work in it, in seconds."""

CLOSE_SECONDS = 0.3
"""Maximum time from the end of the drain until every plugin must have closed, in seconds."""


def create_app(config: Config, worker: Worker | None = None) -> web.Application:
    """Build the application; two calls return independent servers. Raises ConfigError with every fault at once.

    `worker` is this process where it is one of several that serve.
    """
    registry = Registry.load(config)
    streams = Streams(
        limit=config.server.max_streams,
        limit_per_client=config.limits.streams_per_client,
        limits_proxies=config.limits.limits_proxies,
        stall_seconds=config.server.stall_seconds,
        on_end=registry.on_stream_end,
        **({} if worker is None else _shared_streams(worker)),
    )
    shared = Shared() if worker is None else SharedByWorkers(worker)
    events = _events(config, shared)
    metrics = Metrics(streams, events, worker)
    registry.add("streamlab:metrics", metrics)
    registry.add("streamlab:access-log", AccessLog())

    app = web.Application(client_max_size=BODY_LIMIT)
    if worker is not None:
        app[WORKER] = worker
        app.cleanup_ctx.append(_report_trouble)
    app[CONFIG], app[REGISTRY], app[STREAMS], app[METRICS] = config, registry, streams, metrics
    app[EVENTS], app[TASKS], app[FILES], app[SHARED] = events, registry.tasks(), ServedFiles(), shared
    app[TRUSTED] = Proxies(config.server.trusted_proxies)
    app[RATE] = RequestRate(
        config.limits.requests_per_minute, buckets=None if worker is None else SharedBuckets(worker)
    )
    app[AUTHORIZATION], app[CORS] = Authorization(config), Cors(config)
    app[SESSIONS] = Sessions(config, events, app[AUTHORIZATION])
    app[STARTED_AT] = time.monotonic()
    app[ROUTES] = _add_routes(app, registry, config)
    app[ERROR_FORMATS] = tuple(dict.fromkeys(route.error_format for route in app[ROUTES] if route.error_format))
    Dispatch.install(app, _responding(app, AllowedHosts(config.server)))
    app.on_response_prepare.append(_complete_headers)
    app.cleanup_ctx.append(_compression_threads)
    app.cleanup_ctx.append(_check_credentials)
    app.cleanup_ctx.append(_event_log)
    app.cleanup_ctx.append(_plugin_lifespans)
    app.on_shutdown.append(_drain)
    return app


async def serve(
    config: Config,
    *,
    on_ready: Callable[[web.Application, str], None],
    read_again: Callable[[], Config] | None = None,
    may_restart: bool = False,
    worker: Worker | None = None,
) -> bool:
    """Serve until SIGTERM or SIGINT, then drain; a second signal aborts the streams that are still open.

    A `worker` accepts connections of the sockets that its supervisor listens on, and stops when that has died.
    `on_ready` is called with the application and the address once connections are accepted. `read_again` returns the
    configuration at a SIGHUP, and what can change in a running server is taken from it (see `reload`). Where it
    `may_restart`, it ends when other tables have changed; return whether that is why it has ended. Raises
    ConfigError, also for an address that cannot be bound. The process is expected to exit afterwards: if it
    hangs for STOP_SECONDS longer than it may drain, it is killed (see Watchdog).
    """
    tls = preflight.startable(config)
    server, app, loop = config.server, create_app(config, worker), asyncio.get_running_loop()
    streams, service, restarts = app[STREAMS], Service(), False

    def restart() -> None:
        nonlocal restarts
        restarts = True
        signal.raise_signal(signal.SIGTERM)

    # handler_cancellation: without it an idle handler does not notice that its client has disconnected.
    # shutdown_timeout: the drain below has ended every request by then; 0 would mean to wait forever.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    watchdog = Watchdog(
        stop_seconds=server.drain_seconds + STOP_SECONDS,
        on_second=streams.cut,
        lifeline=None if worker is None else worker.lifeline,
        on_check=(lambda _: None) if worker is None else worker.row.ran_at,
    )
    with watchdog, reload_requests() as requests:
        try:
            async with AsyncExitStack() as stack:
                async with watchdog.starting():
                    await _warn_of_faults(app)
                    await runner.setup()
                    manager = runner.server
                    assert manager is not None
                    counted = OpenConnections(
                        config.limits.connections_per_client,
                        app[TRUSTED],
                        row=None if worker is None else worker.row,
                        open_of=None if worker is None else SharedTally(worker, "connections"),
                    )
                    connections = partial(EdgeConnection, manager, loop=loop, open_connections=counted)
                    listener = await listening(config) if worker is None else worker.listening(config)
                    stack.callback(listener.close)
                    is_ahead = (lambda _: False) if worker is None else worker.is_ahead
                    acceptor = stack.enter_context(accepting(listener.sockets, connections, tls, is_ahead))
                _shorten_pauses()
                on_ready(app, listener.address)
                await stack.enter_async_context(service.watched())
                service.ready(status := f"serves {listener.address}")
                taking = partial(service.reload, status)
                async with reloading(requests, app, tls, read_again, restart if may_restart else None, taking):
                    await watchdog.stopping.wait()
                service.stopping()
                listener.remove_file()
                await acceptor.stop()
                if worker is not None:  # others serve on: no client that is connected to this one may get an error
                    await counted.heard(HEARD_SECONDS)
                    manager.pre_shutdown()
                log.info("stopping: no new connections; %d streams have up to %g s", len(streams), server.drain_seconds)
                await streams.drain(server.drain_seconds)
        except Stopped:
            log.info("stopped before the start was complete")
        finally:
            await runner.cleanup()
    return restarts


def _shared_streams(worker: Worker) -> dict[str, Any]:
    """Return what counts the streams of a worker together with those of the others."""
    return {
        "on_count": worker.count_streams,
        "clients": SharedTally(worker, "open-streams"),
        "elsewhere": lambda: sum(row.streams for row in worker.others),
    }


async def work(config: Config, *, on_ready: Callable[[web.Application], None]) -> None:
    """Run the worker lifespans of all plugins, without serving, until SIGTERM or SIGINT.

    `on_ready` is called once they have started. Raises ConfigError, also where no plugin has one.
    """
    app = create_app(config)
    worker_lifespans = app[REGISTRY].worker_lifespans(app)
    if not worker_lifespans:
        reason = "no scenario of this configuration has work for workers"
        raise ConfigError([Fault(config.source, "", reason)])
    with Watchdog(stop_seconds=config.server.drain_seconds + STOP_SECONDS) as watchdog:
        try:
            async with AsyncExitStack() as stack:
                async with watchdog.starting():
                    await stack.enter_async_context(_open_events(app))
                    for lifespan in worker_lifespans:
                        await stack.enter_async_context(lifespan)
                _shorten_pauses()
                on_ready(app)
                await watchdog.stopping.wait()
        except Stopped:
            log.info("stopped before the start was complete")


def _shorten_pauses() -> None:
    """Shorten the time for which the garbage collector and computing threads block the event loop.

    What has been imported by now lives as long as the process: a full collection does not examine it each time (40 ms
    and more), nor do the last ones when the process ends (300 ms of CPU time in a worker). Young objects are collected
    less often, since reference counting frees most of them.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)


async def _warn_of_faults(app: web.Application) -> None:
    """Log what cannot work on this machine, as `streamlab check` reports it; the rest is served all the same."""
    config, registry = app[CONFIG], app[REGISTRY]
    async with Threads("check", 1) as threads:
        found = await threads.run(lambda: [fault for _, fault in registry.check(config)])
    for fault in (*preflight.folder_faults(config), *preflight.scope_warnings(config), *found):
        log.warning("%s", fault)


# -- routes


def _add_routes(app: web.Application, registry: Registry, config: Config) -> list[Route]:
    """Add the routes of the site and of the plugins to the router; a path that two of them declare is a fault."""
    app[OWN] = (Site(), SignIn())
    site = Plugin("site", "streamlab", scenarios=[*app[OWN]])
    owners: dict[tuple[str, str], str] = {}
    routes: list[Route] = []
    faults: list[Fault] = []
    for plugin in (site, *registry.plugins):
        declared: list[tuple[str, str, Route | None]] = [(r.endpoint.method, r.endpoint.path, r) for r in plugin.routes]
        for method, path, route in declared or [(method, path, None) for method, path in plugin.lost_routes]:
            # Two paths that differ only in the names of their parameters match the same requests.
            shape = re.sub(r"\{\w+", "{", path)
            if owner := owners.get((method, shape)):
                faults.append(Fault(plugin.origin, "", f"{method} {path} already belongs to {owner}"))
                continue
            owners[method, shape] = "the server itself" if plugin is site else f"the plugin {plugin.name!r}"
            handler: Any = _bind(app, route, plugin) if route else _reject_lost(plugin)
            try:
                for verb in (method, "HEAD") if method == "GET" else (method,):
                    app.router.add_route(verb, path, handler)
            except ValueError as error:
                faults.append(Fault(plugin.origin, "", f"{method} {path} is not a valid path: {error}"))
            routes += [route] if route else []
    if faults:
        raise ConfigError(faults)
    return routes


TRUSTED = web.AppKey("trusted", Proxies)

RATE = web.AppKey("rate", RequestRate)

_Begin = Callable[[web.Request], Awaitable[Awaitable[web.StreamResponse]]]
"""Checks a request and returns the coroutine of its handler, which `_responding` awaits."""


def _bind(app: web.Application, route: Route, plugin: Plugin) -> _Begin:
    endpoint, scenario, rate, cors = route.endpoint, route.scenario, app[RATE], app[CORS]
    body_limit = endpoint.body_limit or BODY_LIMIT

    # This ends before the handler begins: as its caller, it would live as long as the stream (256 bytes a follower).
    async def begin(request: web.Request) -> Awaitable[web.StreamResponse]:
        request[SCENARIO] = scenario
        try:
            has_token = await authenticate(request, is_public=endpoint.public)
        finally:  # also wrong tokens are counted, by address
            rate.admit(client_of(request))
        changes = endpoint.starts_work or request.method not in SAFE_METHODS or "Upgrade" in request.headers
        if changes and not has_token and not cors.trusts(request.headers.get("Origin", "")):
            reject_other_origin(request)
        authorize(request, route)
        if plugin.state == "failed":
            raise _out_of_service(request, plugin)
        accept_body(request, body_limit)
        await _send_continue(request)
        parameters = await read_authorized(request, route)
        if endpoint.starts_work and request.method == "HEAD":
            return _send_headers_only(request, endpoint)
        return route.handler(request, **parameters)

    return begin


async def _send_continue(request: web.Request) -> None:
    """Send 100 to a client that waits for it, after all checks that need no body (RFC 9110, 10.1.1)."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # of the response, which has not begun


async def _send_headers_only(request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
    """Respond to HEAD for an endpoint that starts work: the header fields of GET known without it (RFC 9110, 9.3.2)."""
    accept = request.headers.get("Accept", "")
    media = next((media for media in endpoint.sends if media in accept), endpoint.sends[0])
    if media.startswith("text/") and media != sse.MEDIA_TYPE:
        media += "; charset=utf-8"
    headers = {"Vary": "Accept"} if len(endpoint.sends) > 1 else {}
    async with _opened(request, media, headers) as stream:
        pass
    return stream


def _opened(request: web.Request, media: str, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Stream, bool]:
    if media == sse.MEDIA_TYPE:
        return open_event_stream(request, headers=headers)
    return open_stream(request, media, headers=headers)


def _reject_lost(plugin: Plugin) -> _Begin:
    """Return what responds for the routes of a plugin that could not be loaded."""

    async def reject(request: web.Request) -> NoReturn:
        try:
            await authenticate(request, is_public=False)
        finally:
            request.app[RATE].admit(client_of(request))
        raise _out_of_service(request, plugin)

    return reject


def _out_of_service(request: web.Request, plugin: Plugin) -> Problem:
    """Return the Problem of a plugin that has failed; its reason is for those who may know the state of the server."""
    reason = f": {plugin.reason}" if request[PRINCIPAL].may("site", "read") else "."
    return Problem(503, f"The plugin {plugin.name} is out of service{reason}")


# -- every request and response


def _responding(app: web.Application, hosts: AllowedHosts) -> Respond:
    """Return what checks each request, turns whatever its handler raises into a response, and counts and logs it."""
    streams, trusted, cors, rate, metrics = app[STREAMS], app[TRUSTED], app[CORS], app[RATE], app[METRICS]

    async def respond(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> web.StreamResponse:
        started = time.monotonic()
        response: web.StreamResponse | web.HTTPException
        task = streams.begin_request(request)
        try:
            reject_unsupported(request)
            take_forwarded(request, trusted)
            take_ticket(request)
            hosts.check(request)
            if (answer := cors.preflight(request)) is not None:
                return answer
            if (missing := request.match_info.http_exception) is not None:  # no route, so that nothing else counts it
                rate.admit(client_of(request))
                raise from_aiohttp(missing) or missing
            handling = await handler(request)  # see _bind
            response = await handling
            if not isinstance(response, web.StreamResponse):
                raise TypeError(f"the handler of {request.path} returned {type(response).__name__}, not a response")
        except HeadersOnly:
            response = request[STREAM]
        except Exception as error:
            response = _error_response(error, request)
        finally:
            streams.end_request(task)
        if STREAM not in request:
            resource = request.match_info.route.resource
            route = resource.canonical if resource else "none"
            seconds = time.monotonic() - started
            metrics.observe_request(request.get(SCENARIO, "none"), route, response.status, seconds)
            AccessLog.request(request, route, response.status, seconds)
        if isinstance(response, web.HTTPException):
            raise response
        return response

    return respond


def _error_response(error: Exception, request: web.Request) -> web.StreamResponse | web.HTTPException:
    """Return the response for what a handler raised; a fault of the server is logged here, once."""
    stream: Stream | None = request.get(STREAM)
    if stream is not None and stream.is_disconnected and stream.error is None:
        return stream
    if isinstance(error, web.HTTPException) and error.status < 400:
        return error
    problem = error if isinstance(error, Problem) else from_aiohttp(error)
    if isinstance(error, EventLogError):
        problem = Problem(503, str(error), headers={"Retry-After": "5"})
    if problem is None:
        log.error("%s %s failed", request.method, request.path, exc_info=error)
        problem = Problem(500, "Internal error; the server's log has the reason.")
    if error_format := error_format_of(request.path, request.app[ERROR_FORMATS]):
        problem = error_format.convert(problem)
    elif (stream is None or not stream.headers_sent) and (page := denied_page(request, problem)) is not None:
        return page
    return stream if stream is not None and stream.headers_sent else problem.response()


async def _complete_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Complete the header fields of a response, and close its connection afterwards where they say so."""
    app, headers = request.app, response.headers
    set_common_headers(headers)
    complete(request, headers)
    app[CORS].complete(request, headers)
    if PREFIX in request and headers.get("Location", "").startswith("/"):
        headers["Location"] = public_path(request, headers["Location"])
    # Only the end of the connection ends a body of unknown length on HTTP/1.0 (RFC 9112, 6.3).
    ends_by_close = request.version < HttpVersion11 and response.content_length is None
    if ends_by_close or app[STREAMS].draining:
        headers["Connection"] = "close"
    if headers.get("Connection", "").lower() == "close":
        response.force_close()


# -- lifecycle


def _events(config: Config, shared: Shared) -> Events:
    settings = config.events
    retention = Retention(settings.keep_events, settings.keep_seconds)
    try:
        engine = open_log(settings.url, synced=settings.durability == "machine")
        filters = Filters(settings.max_filters, shared.tally("filters"))
        return Events(engine, retention=retention, filters=filters)
    except EventLogError as error:
        raise ConfigError([config.fault(("events", "url"), str(error))]) from None


async def _compression_threads(app: web.Application) -> AsyncIterator[None]:
    """Run the threads that compress streams while anything may stream."""
    async with app[STREAMS].compressing:
        yield


async def _check_credentials(app: web.Application) -> AsyncIterator[None]:
    """Fetch the keys that verify credentials; end streams whose credentials expire or are removed, or session ends."""
    authorization = app[AUTHORIZATION]
    works = (
        authorization.keep_keys_current(),
        end_unauthorized(app[STREAMS], authorization),
        app[SESSIONS].run(app[STREAMS]),
    )
    async with asyncio.TaskGroup() as group:
        checking = [group.create_task(work) for work in works]
        yield
        for task in checking:
            task.cancel()


async def _report_trouble(app: web.Application) -> AsyncIterator[None]:
    """Let the other workers know whether something does not work in this one, within a second."""
    row = app[WORKER].row

    async def report() -> None:
        while True:
            row.is_degraded = is_degraded(app, app[REGISTRY].degraded())
            await tick(TROUBLE_SECONDS)

    async with asyncio.TaskGroup() as group:
        reporting = group.create_task(report())
        yield
        reporting.cancel()


async def _event_log(app: web.Application) -> AsyncIterator[None]:
    """Open the event log before all plugins and close it after them: they publish until they are closed."""
    async with _open_events(app):
        yield


@asynccontextmanager
async def _open_events(app: web.Application) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(app[EVENTS].opened())
        except EventLogError as error:
            raise ConfigError([app[CONFIG].fault(("events", "url"), str(error))]) from None
        yield


async def _plugin_lifespans(app: web.Application) -> AsyncIterator[None]:
    """Enter the lifespans of all plugins, and leave them within CLOSE_SECONDS after the drain."""
    start_seconds, streams = app[CONFIG].server.start_seconds, app[STREAMS]

    def stop_at() -> float | None:
        return None if streams.drained_at is None else streams.drained_at + CLOSE_SECONDS

    async with lifespans(app, app[REGISTRY], start_seconds=start_seconds, stop_at=stop_at):
        yield


async def _drain(app: web.Application) -> None:
    await app[STREAMS].drain(app[CONFIG].server.drain_seconds)
