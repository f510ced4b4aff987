"""The routes that every streamlab serves: index, lab page, health, metrics, the API document and its page."""

import hashlib
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from pydantic import BaseModel, Field

from streamlab.auth import PRINCIPAL
from streamlab.events.channel import EVENTS
from streamlab.pages import account_link, public_path
from streamlab.problems import Problem
from streamlab.scenario import Route, Scenario, endpoint
from streamlab.streaming.drain import STREAMS

from . import openapi
from .authorization import AUTHORIZATION, may_use
from .metrics import METRICS
from .registry import Plugin, Registry
from .worker import WORKER

REGISTRY = web.AppKey("registry", Registry)
ROUTES = web.AppKey("routes", list[Route])
OWN = web.AppKey("own", Sequence[Scenario])
"""Key of the application: the scenarios of the server itself."""
STARTED_AT = web.AppKey("started_at", float)

WEB = Path(__file__).parent.parent / "web"

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI writes style attributes into its page.
DOCS_POLICY = CONTENT_SECURITY_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")

MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".png": "image/png", ".svg": "image/svg+xml"}


@cache
def version() -> str:
    """Return the installed version of streamlab; `0` in a checkout that is run without being installed."""
    try:
        return importlib.metadata.version("streamlab")
    except importlib.metadata.PackageNotFoundError:
        return "0"


class AssetPath(BaseModel):
    """The path of a file that a page needs."""

    name: str = Field(
        pattern=r"^[\w-]+\.(css|js|png|svg)$", max_length=100, description="The file's name.", examples=["site.css"]
    )


class Site(Scenario):
    """The server itself: its routes, its state, and its metrics."""

    @endpoint("GET", "/", public=True, sends=("text/plain", "text/html"), curl="{url}")
    async def index(self, request: web.Request) -> web.Response:
        """List every route with one line and a curl command that tries it; the lab page for a browser."""
        vary = {"Vary": "Accept"}
        if "text/html" in request.headers.get("Accept", ""):
            return self._lab(request, vary)
        serving, failed = self._routes_in_service(request)
        title = f"streamlab {version()}: a streaming server for backends"
        browser = f"Each route with a command that tries it; in a browser: {_base(request)}/lab"
        blocks = [
            f"{route.endpoint.method:6} {route.endpoint.template}  {route.endpoint.summary}\n       {command}\n"
            for route, command in serving
        ]
        blocks += [f"503    {path}  out of service: {p.reason}\n" for p in failed for _, path in p.lost_routes]
        text = f"{title}\n\n{browser}\n\n" + "\n".join(blocks)
        return _revalidated(request, text, "text/plain", vary)

    @endpoint("GET", "/lab", public=True, sends="text/html", curl="{url}")
    async def lab(self, request: web.Request) -> web.Response:
        """Run every route in a browser: watch what arrives, disconnect, resume."""
        return self._lab(request)

    @endpoint(
        "GET",
        "/health",
        public=True,
        sends="application/json",
        responses={503: "The server is stopping."},
        curl="{url}",
    )
    async def health(self, request: web.Request) -> web.Response:
        """Report the state of the server: its scenarios and its event log with reasons, open streams, uptime.

        `status` is `ok`, `degraded` (a plugin is out of service, a scenario or the event log works only in part, or
        there are no current keys for JWTs) or, with 503, `draining`. The states of a scenario are `ready`, `degraded`,
        `failed` and `disabled`. Of several workers the report has the number of the one that responds, and the state of
        each; the server is `degraded` while one of them is missing. Without the scope `site:read`, the report has the
        status only.
        """
        app, principal = request.app, request[PRINCIPAL]
        streams, registry, worker = app[STREAMS], app[REGISTRY], app.get(WORKER)
        reasons, keys_missing = registry.degraded(), app[AUTHORIZATION].trouble
        draining, degraded, open_streams = streams.draining, is_degraded(app, reasons), len(streams)
        workers: dict[str, Any] = {}
        if worker is not None:
            others = worker.others
            draining = draining and not any(row.state == "serving" for row in others)
            degraded = degraded or not worker.are_complete or any(row.is_degraded for row in others)
            open_streams += sum(row.streams for row in others)
            workers = {"worker": worker.row.number, "workers": worker.states()}
        status = "draining" if draining else "degraded" if degraded else "ok"
        report: dict[str, Any] = {"status": status}
        if principal.may(self.name, "read"):
            report |= {
                "version": version(),
                "seconds_up": round(time.monotonic() - app[STARTED_AT], 3),
                "open_streams": open_streams,
                **workers,
                "events": app[EVENTS].state(),
                **({"jwt": {"state": "degraded", "reason": keys_missing}} if keys_missing else {}),
                "scenarios": registry.states(reasons),
            }
        return web.Response(
            body=msgspec.json.encode(report),
            status=503 if draining else 200,
            headers={"Cache-Control": "no-store", "Content-Type": "application/json; charset=utf-8"},
        )

    @endpoint("GET", "/metrics", sends=("text/plain", "application/openmetrics-text"), curl="{url}")
    async def metrics(self, request: web.Request) -> web.Response:
        """Expose the metrics for Prometheus."""
        body, content_type = await request.app[METRICS].exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})

    @endpoint("GET", "/openapi.json", public=True, sends="application/json", curl="{url}")
    async def openapi(self, request: web.Request) -> web.Response:
        """Describe every route that the client may use as an OpenAPI 3.1 document."""
        routes = _listed(request)
        document = openapi.document(
            routes,
            version=version(),
            path=public_path(request, ""),
            described=self._described(request, routes),
            is_open=request.app[AUTHORIZATION].is_open,
            may=partial(_may, request),
        )
        return _revalidated(request, json.dumps(document), "application/json", {})

    @endpoint("GET", "/docs", public=True, sends="text/html", curl="{url}")
    async def docs(self, request: web.Request) -> web.Response:
        """Try every route in a browser (Swagger UI, served from this machine)."""
        page = template("docs.html").replace("{{account}}", account_link(request))
        return _page(request, page, {"Content-Security-Policy": DOCS_POLICY})

    @endpoint(
        "GET",
        "/assets/{name}",
        path_model=AssetPath,
        public=True,
        sends=tuple(MEDIA_TYPES.values()),
        curl="{url}",
    )
    async def asset(self, request: web.Request, path: AssetPath) -> web.StreamResponse:
        """Serve a file that the pages need."""
        for folder in (WEB, _swagger_ui()):
            if (file := folder / path.name).is_file():
                headers = {"Content-Type": MEDIA_TYPES[file.suffix], "Cache-Control": "public, no-cache"}
                return web.FileResponse(file, headers=headers)
        raise Problem(404, "There is no asset of this name.")

    def _routes_in_service(self, request: web.Request) -> tuple[list[tuple[Route, str]], list[Plugin]]:
        """Return the routes in service that the client may use, each with a curl command, and failed plugins."""
        knows_state = request[PRINCIPAL].may(self.name, "read")
        failed = [plugin for plugin in request.app[REGISTRY].plugins if plugin.state == "failed" and knows_state]
        lost = {
            name
            for plugin in request.app[REGISTRY].plugins
            if plugin.state == "failed"
            for name in plugin.scenario_names
        }
        origin = _base(request)
        serving = [route for route in _listed(request) if route.scenario not in lost]
        serving.sort(key=_effort)
        first = {route.scenario: _effort(route) for route in reversed(serving)}
        # The routes of a scenario stay together; those of the server come last.
        own = [scenario.name for scenario in request.app[OWN]]
        serving.sort(key=lambda route: (route.scenario in own, first[route.scenario], route.scenario))
        return [(route, openapi.curl(route, origin, may=partial(_may, request))) for route in serving], failed

    def _lab(self, request: web.Request, headers: dict[str, str] | None = None) -> web.Response:
        """Return the lab page. Its list of routes is complete without JavaScript; web/lab.js adds what runs them."""
        serving, failed = self._routes_in_service(request)
        described = self._described(request, [route for route, _ in serving])
        sections = [
            _section(scenario, described.get(scenario, ""), (_item(route, command) for route, command in listed))
            for scenario, listed in groupby(serving, key=lambda pair: pair[0].scenario)
        ]
        sections += [
            _section(
                plugin.name,
                f"Out of service: {plugin.reason}",
                (f"<li>{_name(method, path)}</li>" for method, path in plugin.lost_routes),
                style=' class="failed"',
            )
            for plugin in failed
        ]
        page = template("lab.html").replace("{{version}}", escape(version()))
        page = page.replace("{{account}}", account_link(request))
        return _page(request, page.replace("{{routes}}", "\n".join(sections)), headers)

    def _described(self, request: web.Request, routes: Iterable[Route]) -> dict[str, str]:
        """Return one sentence about each scenario of these routes."""
        plugins = (scenario for plugin in request.app[REGISTRY].plugins for scenario in plugin.scenarios)
        listed = {route.scenario for route in routes}
        scenarios = (*request.app[OWN], *plugins)
        return {scenario.name: _sentence(scenario) for scenario in scenarios if scenario.name in listed}


def is_degraded(app: web.Application, reasons: Mapping[str, str]) -> bool:
    """Return whether something does not work in this process; `reasons` are those of its scenarios."""
    works = app[EVENTS].state()["state"] == "ok" and not reasons and not app[AUTHORIZATION].trouble
    return not works or app[REGISTRY].has_failed


def _listed(request: web.Request) -> list[Route]:
    """Return the routes that a client may use; those to sign in, only where that is of use."""
    is_open = request.app[AUTHORIZATION].is_open
    needless = {scenario.name for scenario in request.app[OWN][1:] if is_open}
    return [r for r in request.app[ROUTES] if r.scenario not in needless and may_use(request, r)]


def _may(request: web.Request, route: Route, resource: str) -> bool:
    """Return whether the client of a request may use a route for a resource."""
    return request[PRINCIPAL].may(route.scenario, route.endpoint.action, resource)


def _effort(route: Route) -> tuple[Any, ...]:
    """Return a sort key of what a newcomer tries first: a stream of events that needs nothing and can be resumed.

    Other streams follow, then single documents, routes that need a value, and routes that change something.
    """
    declared, sends = route.endpoint, route.endpoint.sends
    fields = declared.query.model_fields if declared.query else {}
    needed = [name for name, field in fields.items() if field.is_required() and not field.examples]
    return (
        declared.method != "GET",
        "{" in declared.template or bool(needed),
        sends != ("text/event-stream",),
        not {"last_event_id", "limit"} <= fields.keys(),
        "text/event-stream" not in sends,
        sends == ("application/json",),
        len(fields),
    )


def _section(title: str, text: str, items: Iterable[str], style: str = "") -> str:
    listed = "\n".join(items)
    return f"<section{style}><h2>{escape(title)}</h2>\n<p>{escape(text)}</p>\n<ul>\n{listed}\n</ul></section>"


def _item(route: Route, command: str) -> str:
    method, path = route.endpoint.method, route.endpoint.template
    key = escape(method + path)  # as web/routes.js names it
    return (
        f'<li id="{key}"><a href="#{key}">{_name(method, path)}</a>\n'
        f"<p>{escape(route.endpoint.summary)}</p><pre>{escape(command)}</pre></li>"
    )


def _name(method: str, path: str) -> str:
    return f'<span class="method">{escape(method)}</span> <code>{escape(path)}</code>'


def _sentence(scenario: Scenario) -> str:
    return (type(scenario).__doc__ or scenario.name).strip().partition("\n")[0]


@cache
def template(name: str) -> str:
    """Return the text of a page, with the names of what it is filled with in double braces."""
    return (WEB / name).read_text(encoding="utf-8")


@cache
def _swagger_ui() -> Path:
    """Return the folder of Swagger UI's files without importing its package."""
    spec = importlib.util.find_spec("swagger_ui")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "static"


def _base(request: web.Request) -> str:
    """Return the address of the server for its client, without a slash at its end."""
    return f"{request.url.origin()}{public_path(request, '')}"


def _page(request: web.Request, text: str, headers: dict[str, str] | None = None) -> web.Response:
    policy = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return _revalidated(request, text, "text/html", policy | (headers or {}))


def _revalidated(request: web.Request, text: str, content_type: str, headers: dict[str, str]) -> web.Response:
    """Return a text with its ETag, or 304 where the client has it already (RFC 9110, 13.1.2)."""
    tag = hashlib.sha256(text.encode()).hexdigest()[:32]
    headers = {**headers, "Cache-Control": "no-cache", "ETag": f'"{tag}"'}
    if any(known.value in (tag, "*") for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(text=text, content_type=content_type, headers=headers)
