"""Which route a request is for: what is looked up is what aiohttp's router finds."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from streamlab.config import Config
from streamlab.server.app import create_app
from streamlab.server.dispatch import Dispatch

TARGETS = (
    "/", "//", "/?x", "*", "/nothing", "/nothing/health", "/healthy", "/health/", "/health/x", "/health?verbose=1",
    "/health#x", "/heal%74h", "/%6eothing", "/nothing/../health", "/HEALTH", "/files", "/files/", "/files/a/b.csv",
    "/files/../health", "/stream", "/stream/stock-ticker", "/stream/stock-ticker?limit=1", "/v1/chat/completions",
    "/process/kinds", "/process/tasks/x", "/process/nothing", "/assets/site.css", "/assets", "http://localhost/health",
    "http://localhost/nothing", "http://localhost", "health", "/é", "/\udce9",
)  # fmt: skip


@pytest.mark.parametrize("more", [(), ("/{name}",), ("/{name}/below", "/nothing/{rest:.*}")])
async def test_each_target_gets_the_route_that_aiohttp_finds(tmp_path: Path, more: tuple[str, ...]) -> None:
    """A path without parameters is looked up, and the first segment rules others out; with any other routes as well."""

    async def handler(request: web.Request) -> web.Response:
        raise NotImplementedError

    found: list[web.UrlMappingMatchInfo] = []

    async def respond(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> web.Response:
        assert request.match_info.handler == handler
        assert request.app is app
        found.append(request.match_info)
        return web.Response()

    app = create_app(Config.of({"events": {"url": "sqlite://"}}, base=tmp_path))
    for path in more:
        app.router.add_get(path, handler)
    dispatch = Dispatch(app, respond)
    for target in TARGETS:
        for method in ("GET", "HEAD", "POST", "DELETE", "BREW"):
            request = make_mocked_request(method, target)
            expected = await app.router.resolve(request)
            await dispatch(request)
            got = found.pop()
            assert (got.http_exception and got.http_exception.status, dict(got)) == (
                expected.http_exception and expected.http_exception.status,
                dict(expected),
            ), (method, target)
            if expected.http_exception is None:
                assert got.route is expected.route, (method, target)
            elif isinstance(expected.http_exception, web.HTTPMethodNotAllowed):
                assert isinstance(got.http_exception, web.HTTPMethodNotAllowed)
                assert got.http_exception.allowed_methods == expected.http_exception.allowed_methods
