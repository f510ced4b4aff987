"""Which route a request is for: found once for a path without parameters, and by aiohttp's router otherwise."""

import re
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.web_urldispatcher import MatchInfoError

_PLAIN = re.compile(r"/([\w.~-]+)(?:/|$)", re.ASCII)
"""The first segment of a path, where nothing in it is escaped, or must be."""

Respond = Callable[[web.Request, Callable[[web.Request], Awaitable[Any]]], Awaitable[web.StreamResponse]]
"""Responds to a request by the handler of its route."""


class Dispatch:
    """Finds the route of each request to an application, and responds by its handler.

    So does `Application._handle`, whose place it takes, but with objects that it creates for each request: of the
    match, of the exception 404 with the route that raises it, and of each middleware. Here a path without parameters,
    and one that is certainly nobody's, is looked up, and a function takes the place of the middlewares.
    """

    def __init__(self, app: web.Application, respond: Respond) -> None:
        self._app, self._respond = app, respond
        self._exact: dict[tuple[str, str], web.UrlMappingMatchInfo] = {}
        """The match by method and path, where the path has no parameters."""
        self._first: set[str] = set()
        """The first segments of all paths, those with parameters in it as "{"."""
        for resource in app.router.resources():
            segment = resource.canonical[1:].partition("/")[0]
            self._first.add("{" if "{" in segment else segment)
            if isinstance(resource, web.PlainResource):
                for route in resource:
                    self._exact[route.method, resource.canonical] = self._complete(web.UrlMappingMatchInfo({}, route))
        self._none = self._complete(MatchInfoError(web.HTTPNotFound()))

    @staticmethod
    def install(app: web.Application, respond: Respond) -> None:
        """Let an application, whose routes are complete, respond by `respond`, however it is served."""
        object.__setattr__(app, "_handle", Dispatch(app, respond))  # where its servers take it from

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        """Respond to a request."""
        path = request._message.path.partition("?")[0]
        match = self._exact.get((request.method, path))
        if match is None:
            match = self._none if self._is_unknown(path) else self._complete(await self._app.router.resolve(request))
        request._match_info = match
        return await self._respond(request, match.handler)

    def _is_unknown(self, path: str) -> bool:
        """Return whether no route can have a target: it is a path whose first segment, as written, none begins with."""
        if "{" in self._first or (segment := _PLAIN.match(path)) is None:
            return False
        return segment[1] not in self._first

    def _complete(self, match: web.UrlMappingMatchInfo) -> web.UrlMappingMatchInfo:
        match.add_app(self._app)
        match.freeze()
        return match
