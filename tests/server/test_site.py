"""The routes of the server itself, error responses, accepted hosts, metrics and log lines."""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from streamlab.config import Config
from streamlab.scenario import Route
from streamlab.server import openapi
from streamlab.server.app import create_app
from streamlab.server.logging import LineFormatter, logging_to
from streamlab.server.metrics import METRICS
from streamlab.server.site import ROUTES, version
from streamlab.streaming.drain import STREAMS
from tests.support.browsers import installed_browser
from tests.support.connections import read_all
from tests.support.servers import Running, disabled, write_plugins

Client = TestClient[Any, Any]

PLUGIN = '''
    import asyncio

    from aiohttp import web
    from streamlab import Problem, Scenario, endpoint, hookimpl, open_stream


    class Lab(Scenario):
        """Things <b>bold</b>."""

        _gate: asyncio.Event = asyncio.Event()

        @endpoint("GET", "/lab/stream")
        async def stream(self, request):
            """Send five bytes & <stop>."""
            async with open_stream(request, "text/plain") as response:
                await response.write(b"12345")
            return response

        @endpoint("GET", "/lab/open")
        async def open(self, request):
            async with open_stream(request, "text/plain") as response:
                await response.write(b"first")
                await self._gate.wait()
            return response

        @endpoint("POST", "/lab/open")
        async def close(self, request):
            self._gate.set()
            return web.Response(text="closed")

        @endpoint("GET", "/lab/words/{word:.*}")
        async def words(self, request):
            return web.Response(text="word")

        @endpoint("GET", "/lab/fails")
        async def fails(self, request):
            raise RuntimeError("the password is sesame\\n2026-01-01T00:00:00.000Z INFO forged")

        @endpoint("GET", "/lab/nothing")
        async def nothing(self, request):
            return None

        @endpoint("GET", "/lab/text")
        async def text(self, request):
            return "text"

        @endpoint("GET", "/lab/teapot")
        async def teapot(self, request):
            raise Problem(429, "The queue is full.", headers={"Retry-After": "7"})

        @endpoint("GET", "/lab/forbidden")
        async def forbidden(self, request):
            raise web.HTTPForbidden(text="aiohttp says no")

        @endpoint("GET", "/lab/moved")
        async def moved(self, request):
            raise web.HTTPFound("/lab/stream")


    @hookimpl
    def register_scenarios():
        return [Lab]
'''


@pytest.fixture
def lab(tmp_path: Path, aiohttp_client: Callable[..., Awaitable[Client]]) -> Callable[..., Awaitable[Client]]:
    """Yield a client of a server with the plugin above and `file`, or all built-in ones; keywords are `[server]`."""

    async def making(*, shipped: bool = False, **server: Any) -> Client:
        write_plugins(tmp_path, {"lab": PLUGIN})
        tables = {"server": server, "auth": {"open": True}, "scenarios": {} if shipped else disabled(but="file")}
        return await aiohttp_client(create_app(Config.of(tables, base=tmp_path)))

    return making


Lab = Callable[..., Awaitable[Client]]


async def get(client: Client, path: str, **headers: str) -> tuple[int, str]:
    async with client.get(path, headers=headers) as response:
        return response.status, await response.text()


async def raw(client: Client, request: bytes) -> bytes:
    """Send bytes on a new connection, and return the complete response; the request must end the connection."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    try:
        writer.write(request)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def status_of(client: Client, *head: str, version: str = "1.1", path: str = "/health") -> int:
    lines = [f"GET {path} HTTP/{version}", *head, "Connection: close", "", ""]
    response_bytes = await raw(client, "\r\n".join(lines).encode("utf-8", "surrogateescape"))
    return int(response_bytes.split(b" ", 2)[1])


async def problem(client: Client, method: str, path: str, status: int) -> tuple[dict[str, Any], Any]:
    async with client.request(method, path) as response:
        assert (response.status, response.content_type) == (status, "application/problem+json")
        document: dict[str, Any] = await response.json(content_type=None)
        assert document["status"] == status
        return document, response.headers


async def wait_for(reached: Callable[[], bool], *, seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not reached():
            await asyncio.sleep(0.005)


# -- the index


def listed(client: Client) -> list[Route]:
    """Return the routes of an open server that are of use there: nobody needs to sign in."""
    return [route for route in client.app[ROUTES] if route.scenario != "auth"]


async def test_the_index_lists_every_route_with_a_line_and_a_command(lab: Lab) -> None:
    client = await lab(shipped=True)
    async with client.get("/") as response:
        assert (response.status, response.content_type, response.headers["Vary"]) == (200, "text/plain", "Accept")
        text = await response.text()
    assert text.startswith(f"streamlab {version()}: a streaming server for backends\n\n")
    origin = f"http://127.0.0.1:{client.port}"
    assert text.splitlines()[2].endswith(f" {origin}/lab")
    assert f"GET    /lab/stream  Send five bytes & <stop>.\n       curl -N {origin}/lab/stream\n" in text
    routes = listed(client)
    for route in routes:
        assert f"{route.endpoint.method:6} {route.endpoint.template}  {route.endpoint.summary}\n" in text
    assert len(re.findall(rf"^       curl .*{re.escape(origin)}/", text, re.MULTILINE)) == len(routes)


async def test_the_index_is_html_for_a_browser(lab: Lab) -> None:
    client = await lab(shipped=True)
    accept = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    async with client.get("/", headers={"Accept": accept}) as response:
        assert (response.status, response.content_type, response.headers["Vary"]) == (200, "text/html", "Accept")
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        page = await response.text()
    assert "Send five bytes &amp; &lt;stop&gt;." in page
    assert "<stop>" not in page
    assert "{{" not in page
    for route in listed(client):
        method, path = route.endpoint.method, route.endpoint.template
        assert f'<span class="method">{method}</span> <code>{path}</code>' in page
        assert f"<pre>{escape(openapi.curl(route, f'http://127.0.0.1:{client.port}'))}</pre>" in page
    assert "<p>Things &lt;b&gt;bold&lt;/b&gt;.</p>" in page
    assert (await get(client, "/lab"))[1] == page


EVIL_HOSTS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$(touch${IFS}forged)",
    "`touch${IFS}forged`",
    "x;touch${IFS}forged;",
    "x'$(touch${IFS}forged)'",
    "x&touch${IFS}forged",
    "x|touch${IFS}forged",
]


@pytest.mark.parametrize("host", EVIL_HOSTS)
async def test_a_host_is_never_echoed_as_html(host: str, lab: Lab) -> None:
    client = await lab(host="0.0.0.0")
    response_bytes = await raw(
        client, f"GET / HTTP/1.1\r\nHost: {host}\r\nAccept: text/html\r\nConnection: close\r\n\r\n".encode()
    )
    assert b" 500 " not in response_bytes.partition(b"\r\n")[0]
    assert b"<script>" not in response_bytes
    assert b"<img" not in response_bytes


@pytest.mark.parametrize("host", EVIL_HOSTS)
async def test_a_host_cannot_inject_into_the_commands(host: str, lab: Lab, tmp_path: Path) -> None:
    client = await lab(host="0.0.0.0")
    response_bytes = await raw(client, f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    head, _, text = response_bytes.decode().partition("\r\n\r\n")
    assert " 500 " not in head.partition("\r\n")[0]
    commands = re.findall(r"^ +(curl .*)$", text, re.MULTILINE)
    script = "\n".join(["curl() { :; }", *commands])
    folder = tmp_path / "pasted"
    folder.mkdir()
    done = await asyncio.to_thread(
        subprocess.run, ["sh", "-c", script], cwd=folder, capture_output=True, text=True, timeout=10
    )
    assert (list(folder.iterdir()), done.stderr) == ([], "")


@pytest.mark.parametrize("host", ["", "a b", "[::1", "x:99999", "x:y", "é", "x/y", "x?y", "x#y", "u@x", "%00", ":80"])
async def test_an_invalid_host_is_never_a_fault_of_the_server(host: str, lab: Lab) -> None:
    client = await lab(host="0.0.0.0")
    assert await status_of(client, f"Host: {host}", path="/") in (200, 400, 421)


# -- health


async def test_health_reports_status_version_scenarios_streams_and_seconds(lab: Lab) -> None:
    client = await lab()
    async with client.get("/health") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert response.headers["Cache-Control"] == "no-store"
        report = await response.json()
    assert list(report) == ["status", "version", "seconds_up", "open_streams", "events", "scenarios"]
    assert (report["status"], report["version"], report["open_streams"]) == ("ok", version(), 0)
    assert 0 <= report["seconds_up"] < 60
    assert report["scenarios"]["lab"] == {"state": "ready"}
    assert report["scenarios"]["file"] == {"state": "ready"}


async def test_health_counts_open_streams(lab: Lab) -> None:
    client = await lab()
    async with client.get("/lab/open") as response:
        assert await response.content.readexactly(5) == b"first"
        assert json.loads((await get(client, "/health"))[1])["open_streams"] == 1
        async with client.post("/lab/open"):
            pass
        await response.read()
    await wait_for(lambda: not len(client.app[STREAMS]))
    assert json.loads((await get(client, "/health"))[1])["open_streams"] == 0


async def test_health_is_503_while_the_server_drains(lab: Lab) -> None:
    client = await lab()
    client.app[STREAMS].draining = True
    async with client.get("/health") as response:
        assert (response.status, response.content_type) == (503, "application/json")
        assert response.headers["Connection"] == "close"
        assert (await response.json())["status"] == "draining"


async def test_a_stream_is_rejected_while_the_server_drains(lab: Lab) -> None:
    client = await lab()
    client.app[STREAMS].draining = True
    document, headers = await problem(client, "GET", "/lab/stream", 503)
    assert (document["detail"], headers["Retry-After"]) == ("The server is stopping.", "5")
    assert headers["Connection"] == "close"


# -- metrics


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in parse_text(text)}


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    """Return the samples of a name, by the values of their labels without `le`."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label != "le"): sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name == name
    }


async def test_metrics_are_prometheus_text_with_a_name_for_everything_measured(lab: Lab) -> None:
    client = await lab(shipped=True)
    async with client.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        assert response.headers["Cache-Control"] == "no-store"
        found = families(await response.text())
    assert {name: found[name].type for name in found if re.match(r"streamlab_\w+(?<!_created)$", name)} == {
        "streamlab_open_streams": "gauge",
        "streamlab_stream_bytes": "counter",
        "streamlab_stream_first_byte_seconds": "histogram",
        "streamlab_stream_duration_seconds": "histogram",
        "streamlab_streams": "counter",
        "streamlab_event_loop_lag_seconds": "histogram",
        "streamlab_followers": "gauge",
        "streamlab_asyncio_tasks": "gauge",
        "streamlab_llm_fallbacks": "counter",
        "streamlab_llm_generations": "counter",
        "streamlab_llm_tokens": "counter",
        "streamlab_tasks": "counter",
        "streamlab_request_seconds": "histogram",
        "streamlab_rejected_requests": "counter",
    }
    assert "process_resident_memory_bytes" in found
    assert all(family.documentation for family in found.values())


async def test_metrics_of_a_stream_that_ended_are_exact(lab: Lab) -> None:
    client = await lab()
    for _ in range(3):
        assert await get(client, "/lab/stream") == (200, "12345")
    await wait_for(lambda: not len(client.app[STREAMS]))
    _, text = await get(client, "/metrics")
    assert samples(text, "streamlab_streams_total") == {("finished", "lab"): 3}
    assert samples(text, "streamlab_stream_bytes_total") == {("lab",): 15}
    assert samples(text, "streamlab_open_streams") == {("lab",): 0}
    assert samples(text, "streamlab_stream_first_byte_seconds_count") == {("lab",): 3}
    assert samples(text, "streamlab_stream_duration_seconds_count") == {("lab",): 3}
    assert samples(text, "streamlab_stream_duration_seconds_sum")[("lab",)] < 3


async def test_metrics_of_a_stream_that_is_open_are_exact(lab: Lab) -> None:
    client = await lab()
    async with client.get("/lab/open") as response:
        await response.content.readexactly(5)
        _, text = await get(client, "/metrics")
        assert samples(text, "streamlab_open_streams") == {("lab",): 1}
        assert samples(text, "streamlab_stream_bytes_total") == {("lab",): 5}
        async with client.post("/lab/open"):
            pass
        await response.read()


async def test_the_duration_of_a_stream_is_not_in_the_request_latency(lab: Lab) -> None:
    client = await lab()
    await get(client, "/lab/stream")
    await get(client, "/lab/words/secret-word")
    await get(client, "/no/such/route")
    async with client.head("/lab/stream"):
        pass
    _, text = await get(client, "/metrics")
    assert samples(text, "streamlab_request_seconds_count") == {
        ("/lab/words/{word}", "200"): 1,
        ("none", "404"): 1,
    }
    assert "secret-word" not in text


async def test_the_lag_of_the_event_loop_is_measured(lab: Lab) -> None:
    client = await lab()
    metrics = client.app[METRICS]

    def lags() -> float:
        return samples(generate_latest(metrics.registry).decode(), "streamlab_event_loop_lag_seconds_count")[()]

    await wait_for(lambda: lags() >= 1)


async def test_metrics_are_openmetrics_where_accept_requests_it(lab: Lab) -> None:
    client = await lab()
    await get(client, "/lab/stream")
    accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
    async with client.get("/metrics", headers={"Accept": accept}) as response:
        assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        found = {family.name: family.type for family in parse_openmetrics(await response.text())}  # type: ignore[no-untyped-call]
    assert found["streamlab_streams"] == "counter"


# -- pages and their assets


class Links(HTMLParser):
    """Return every URL in a page, and every anchor that it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.places: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("href", "src", "action", "srcset", "data")]
        self.places |= {value or "" for name, value in attrs if name == "id"}


def links(page: str) -> list[str]:
    """Return the URLs beyond a page of the root; those within the page must be one of its anchors."""
    parser = Links(page)
    assert {link[1:] for link in parser.found if link.startswith("#")} <= parser.places
    return [urljoin("/", link) for link in parser.found if not link.startswith("#")]


@pytest.mark.parametrize("path", ["/", "/lab", "/docs"])
async def test_a_page_has_only_urls_of_this_server_and_each_is_served(path: str, lab: Lab) -> None:
    client = await lab()
    async with client.get(path, headers={"Accept": "text/html"}) as response:
        assert (response.status, response.content_type) == (200, "text/html")
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; ")
        page = await response.text()
    found = links(page)
    assert found
    assert [link for link in found if not re.match(r"/(?!/)", link)] == []
    for link in found:
        async with client.get(link) as response:
            assert response.status == 200, link
            assert await response.read(), link


async def test_the_assets_of_the_documentation_have_their_types(lab: Lab) -> None:
    client = await lab()
    types = {}
    for link in links((await get(client, "/docs"))[1]):
        async with client.get(link) as response:
            types[link] = response.content_type
            assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert types == {
        "/assets/swagger-ui.css": "text/css",
        "/assets/docs.css": "text/css",
        "/assets/favicon-32x32.png": "image/png",
        "/assets/swagger-ui-bundle.js": "text/javascript",
        "/assets/docs.js": "text/javascript",
    }


async def test_the_modules_of_the_lab_are_all_named_by_its_page_and_load_no_others(lab: Lab) -> None:
    client = await lab()
    modules = {link for link in links((await get(client, "/lab"))[1]) if link.endswith(".js")}
    assert "/assets/lab.js" in modules
    imported = set()
    for link in modules:
        async with client.get(link) as response:
            assert (response.content_type, response.headers["Cache-Control"]) == (
                "text/javascript",
                "public, no-cache",
            )
            source = await response.text()
        assert re.match("// [A-Z].*[.:;]", source), link  # its sentence
        imported |= {f"/assets/{name}" for name in re.findall(r'^import .* from "\./([^"]+)";$', source, re.MULTILINE)}
        assert source.count("import ") == len(re.findall(r"^import ", source, re.MULTILINE))
    assert imported | {"/assets/lab.js"} == modules


async def test_only_the_page_of_swagger_ui_may_have_inline_styles(lab: Lab) -> None:
    client = await lab()
    for path, style in (("/lab", "style-src 'self'; "), ("/docs", "style-src 'self' 'unsafe-inline'; ")):
        async with client.get(path) as response:
            assert style in response.headers["Content-Security-Policy"]


async def test_a_style_sheet_has_only_urls_of_this_server(lab: Lab) -> None:
    client = await lab()
    for name in ("site.css", "lab.css", "docs.css", "swagger-ui.css"):
        _, text = await get(client, f"/assets/{name}")
        outside = [url for url in re.findall(r"""url\(\s*["']?([^"')]+)""", text) if not url.startswith("data:")]
        assert (outside, "@import" in text) == ([], False)


@pytest.mark.parametrize(
    "name",
    [
        "lab.html",
        "docs.html",
        "absent.css",
        "..%2Fapp.py",
        "..%2F..%2Fsetup.cfg",
        "%2e%2e%2fconfig.py",
        "..%5Capp.py",
        "%2Fetc%2Fpasswd",
        "site.css%00",
        "site.css%0A",
        "site.css%2F",
        "site.css.",
        "SITE.CSS",
        ".css",
        "%FF.css",
        "a%2Fsite.css",
        "x" * 300 + ".css",
        "",
    ],
)
async def test_no_path_reaches_a_file_that_is_not_an_asset(name: str, lab: Lab) -> None:
    client = await lab()
    response_bytes = await raw(
        client, f"GET /assets/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = response_bytes.partition(b"\r\n\r\n")
    assert int(head.split(b" ", 2)[1]) in (404, 422)
    assert b"application/problem+json" in head
    assert json.loads(body)["status"] in (404, 422)


async def test_dot_segments_reach_no_file(lab: Lab) -> None:
    client = await lab()
    for path in ("/assets/../setup.cfg", "/assets/../../etc/passwd", "//etc/passwd", "/assets//site.css"):
        assert await status_of(client, "Host: localhost", path=path) in (400, 404, 422)


def test_the_documentation_renders_in_a_browser_without_a_network(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    browser = installed_browser()
    if browser is None:
        pytest.skip("needs a browser")
    server = start("", lab=PLUGIN)
    words = "--headless --no-sandbox --disable-gpu --disable-background-networking --virtual-time-budget=5000"
    options = [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [browser, *words.split(), *options, "--dump-dom", f"{server.url}/docs"],
        capture_output=True,
        text=True,
        timeout=50,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert re.search(r'id="operations-[^"]*lab_stream"', done.stdout), done.stderr
    shown = set(re.findall(r'data-path="([^"]+)"', done.stdout))
    document = json.loads(server.get("/openapi.json")[2])
    assert shown == set(document["paths"])
    blocked = ("Refused", "Content Security Policy")  # the words of older browsers, and of newer ones
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert [line for line in messages if any(words in line for words in blocked)] == []


# -- error responses


async def test_an_unknown_route_is_404_and_echoes_nothing(lab: Lab) -> None:
    client = await lab()
    document, headers = await problem(client, "GET", "/no/such/sesame?open=sesame", 404)
    assert document == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "Nothing is served at this path. GET / lists every route.",
    }
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_a_wrong_method_is_405_with_allow(method: str, lab: Lab) -> None:
    client = await lab()
    document, headers = await problem(client, method, "/health", 405)
    assert {name.strip() for name in headers["Allow"].split(",")} == {"GET", "HEAD"}
    assert (document["title"], document["detail"]) == ("Method Not Allowed", "Allowed methods: GET, HEAD.")


async def test_allow_names_every_method_of_a_path(lab: Lab) -> None:
    client = await lab()
    _, headers = await problem(client, "DELETE", "/lab/open", 405)
    assert {name.strip() for name in headers["Allow"].split(",")} == {"GET", "HEAD", "POST"}


async def test_head_on_an_unknown_route_has_no_body(lab: Lab) -> None:
    client = await lab()
    async with client.head("/no/such/route") as response:
        assert (response.status, response.content_type) == (404, "application/problem+json")
        assert await response.read() == b""


async def test_a_problem_of_a_scenario_is_sent_with_its_headers(lab: Lab) -> None:
    client = await lab()
    document, headers = await problem(client, "GET", "/lab/teapot", 429)
    assert (document["title"], document["detail"]) == ("Too Many Requests", "The queue is full.")
    assert headers["Retry-After"] == "7"


async def test_an_error_response_of_aiohttp_is_a_problem_document_too(lab: Lab) -> None:
    client = await lab()
    document, _ = await problem(client, "GET", "/lab/forbidden", 403)
    assert document["title"] == "Forbidden"


async def test_a_redirect_of_a_scenario_is_unchanged(lab: Lab) -> None:
    client = await lab()
    async with client.get("/lab/moved", allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (302, "/lab/stream")


async def test_a_redirect_is_counted_as_a_request(lab: Lab) -> None:
    client = await lab()
    async with client.get("/lab/moved", allow_redirects=False):
        pass
    _, text = await get(client, "/metrics")
    assert samples(text, "streamlab_request_seconds_count") == {("/lab/moved", "302"): 1}


async def test_a_failing_handler_is_500_without_details(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    client = await lab()
    async with client.get("/lab/fails") as response:
        assert (response.status, response.content_type) == (500, "application/problem+json")
        text = await response.text()
    assert json.loads(text) == {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "detail": "Internal error; the server's log has the reason.",
    }
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage() for record in errors] == ["GET /lab/fails failed"]
    assert "RuntimeError: the password is sesame" in LineFormatter("text").format(errors[0])


@pytest.mark.parametrize("path", ["/lab/nothing", "/lab/text"])
async def test_a_handler_that_returns_no_response_is_500(path: str, lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    client = await lab()
    await problem(client, "GET", path, 500)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [f"GET {path} failed"]


@pytest.mark.parametrize(
    "request_head",
    [
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /<b> c HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"<b>" * 3000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: <b>\r\n\r\n",
    ],
)
def test_invalid_http_is_rejected_with_a_problem_document(start: Callable[..., Running], request_head: bytes) -> None:
    server = start()
    connection = server.connect()
    connection.sendall(request_head)
    head, _, body = read_all(connection).partition(b"\r\n\r\n")
    status = 431 if b"X-Long" in request_head else 400
    assert head.startswith(b"HTTP/1.0 %d " % status)
    assert b"Content-Type: application/problem+json" in head
    assert b"Server: streamlab" in head
    assert json.loads(body)["status"] == status
    assert b"<b>" not in head + body
    assert "not HTTP from 127.0.0.1" in server.wait_for_log("not HTTP")


async def test_the_server_does_not_reveal_its_versions(lab: Lab) -> None:
    client = await lab()
    for path in ("/health", "/no/such/route", "/lab/fails", "/lab/stream"):
        async with client.get(path) as response:
            assert response.headers["Server"] == "streamlab"


# -- hosts


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LocalHost:1",
        "localhost.",
        "a.localhost",
        "127.0.0.1",
        "127.0.0.1:8000",
        "127.8.8.8",
        "[::1]",
        "[::1]:8000",
    ],
)
async def test_a_local_host_is_accepted_on_loopback(host: str, lab: Lab) -> None:
    assert await status_of(await lab(), f"Host: {host}") == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evillocalhost",
        "192.168.0.1",
        "0.0.0.0",
        "[::]",
        "evil.example@localhost",
        "localhost@evil.example",
        "localhost:80@evil.example",
        "127.0.0.1:80:80.evil.example",
    ],
)
async def test_a_foreign_host_is_rejected_on_loopback(host: str, lab: Lab) -> None:
    assert await status_of(await lab(), f"Host: {host}") in (400, 421)


async def test_a_foreign_host_is_421_as_a_problem_and_is_not_echoed(lab: Lab) -> None:
    client = await lab()
    async with client.get("/", headers={"Host": "evil.example"}) as response:
        assert (response.status, response.content_type) == (421, "application/problem+json")
        document = await response.json(content_type=None)
    assert (document["title"], document["status"]) == ("Misdirected Request", 421)
    assert "evil" not in document["detail"]
    assert "server.allowed_hosts" in document["detail"]


async def test_a_foreign_host_reaches_no_stream(lab: Lab) -> None:
    assert await status_of(await lab(), "Host: evil.example", path="/lab/stream") == 421


async def test_allowed_hosts_are_matched_exactly_or_by_wildcard(lab: Lab) -> None:
    client = await lab(allowed_hosts=["stream.example.org", "*.Example.net"])
    statuses = {
        host: await status_of(client, f"Host: {host}")
        for host in (
            "stream.example.org",
            "STREAM.example.org:8443",
            "stream.example.org.",
            "a.example.net",
            "a.b.example.net",
            "localhost",
            "example.net",
            "evilexample.net",
            "a.example.net.evil.example",
            "stream.example.orgx",
            "xstream.example.org",
        )
    }
    assert statuses == {
        "stream.example.org": 200,
        "STREAM.example.org:8443": 200,
        "stream.example.org.": 200,
        "a.example.net": 200,
        "a.b.example.net": 200,
        "localhost": 200,
        "example.net": 421,
        "evilexample.net": 421,
        "a.example.net.evil.example": 421,
        "stream.example.orgx": 421,
        "xstream.example.org": 421,
    }


async def test_any_host_is_accepted_beyond_loopback_unless_allowed_hosts_are_set(lab: Lab) -> None:
    assert await status_of(await lab(host="0.0.0.0"), "Host: any.example") == 200
    client = await lab(host="0.0.0.0", allowed_hosts=["one.example"])
    assert await status_of(client, "Host: any.example") == 421
    assert await status_of(client, "Host: one.example") == 200


async def test_http_1_1_without_a_host_is_400(lab: Lab) -> None:
    client = await lab()
    assert await status_of(client) == 400
    assert await status_of(client, version="1.0") == 200


async def test_http_1_1_with_two_hosts_is_400(lab: Lab) -> None:
    client = await lab(host="0.0.0.0")
    assert await status_of(client, "Host: localhost", "Host: evil.example") == 400


# -- log lines


@asynccontextmanager
async def logged(style: str, folder: Path, level: str = "INFO") -> AsyncIterator[tuple[Client, Path]]:
    """Yield a client, and the file with the log lines of its server after the block."""
    write_plugins(folder, {"lab": PLUGIN})
    file = folder / "streamlab.log"
    app = create_app(Config.of({"scenarios": {"llm": {"enabled": False}}}, base=folder))  # which logs lines itself
    with logging_to(style=style, level=level, file=file):
        server = TestServer(app)
        await server.start_server(access_log=None)  # like serve(): the core writes the log lines
        async with TestClient(server) as client:
            yield client, file
            await wait_for(lambda: not len(app[STREAMS]))


def lines(file: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())


async def test_a_stream_is_one_line_with_how_it_ended(tmp_path: Path) -> None:
    async with logged("json", tmp_path) as (client, file):
        assert await get(client, "/lab/stream") == (200, "12345")
    (line,) = [line for line in lines(file) if line["logger"] == "streamlab.access"]
    seconds, first_byte = line.pop("seconds"), line.pop("first_byte_ms")
    assert 0 <= first_byte / 1000 <= seconds + 0.001 < 5
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "INFO",
        "logger": "streamlab.access",
        "message": "stream",
        "scenario": "lab",
        "method": "GET",
        "path": "/lab/stream",
        "route": "/lab/stream",
        "status": 200,
        "outcome": "finished",
        "bytes": 5,
        "client": "127.0.0.1",
    }


async def test_a_request_without_a_stream_is_one_line(tmp_path: Path) -> None:
    async with logged("json", tmp_path) as (client, file):
        await get(client, "/lab/words/a")
        await get(client, "/no/such/route")
        await get(client, "/health")
        await get(client, "/metrics")
    found = [(line["message"], line["path"], line["status"]) for line in lines(file)]
    assert found == [("request", "/lab/words/a", 200), ("request", "/no/such/route", 404)]


async def test_probes_are_written_at_debug(tmp_path: Path) -> None:
    async with logged("json", tmp_path, "DEBUG") as (client, file):
        await get(client, "/health")
    assert [line["level"] for line in lines(file) if line.get("path") == "/health"] == ["DEBUG"]


@pytest.mark.parametrize("style", ["text", "json"])
async def test_a_query_is_in_no_log_line(style: str, tmp_path: Path) -> None:
    async with logged(style, tmp_path, "DEBUG") as (client, file):
        for path in ("/lab/stream", "/lab/words/a", "/lab/fails", "/no/such/route", "/health"):
            await get(client, f"{path}?prompt=sesame")
            await get(client, path, Authorization="Bearer sesame2", Cookie="sesame3")
        async with client.post("/lab/open?x=sesame", data=b"sesame"):
            pass
    assert "sesame" not in re.sub(r"the password is sesame", "", file.read_text())


FORGERIES = ["%0A2026-01-01T00:00:00.000Z%20INFO%20forged", "%0D%0Aforged", "%E2%80%A8forged", "%C2%85forged", "%1B[2J"]


async def test_control_characters_of_a_path_cannot_forge_a_log_line(tmp_path: Path) -> None:
    async with logged("text", tmp_path) as (client, file):
        for forgery in FORGERIES:
            response_bytes = await raw(
                client,
                f"GET /lab/words/{forgery} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(),
            )
            assert response_bytes.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 404 "))
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) == text.count("\n") == len(FORGERIES)
    assert all(" INFO streamlab.access request method=GET path=" in line for line in text.splitlines())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", text)


async def test_control_characters_of_an_error_cannot_forge_a_log_line(tmp_path: Path) -> None:
    async with logged("text", tmp_path) as (client, file):
        await get(client, "/lab/fails")
    found = file.read_text(encoding="utf-8").splitlines()
    assert [line for line in found if re.match(r"\S+ \w+ forged", line)] == []
    assert any(line.endswith("INFO forged") and line.startswith("    ") for line in found)


async def test_json_log_lines_parse_for_any_request(tmp_path: Path) -> None:
    async with logged("json", tmp_path) as (client, file):
        for forgery in [*FORGERIES, "%22%7D%0A%7B", "%FF%FE", "%F0%9F%98%80"]:
            await raw(
                client,
                f"GET /lab/words/{forgery} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(),
            )
        await get(client, "/lab/fails")
    found = list(lines(file))
    assert len(found) == len(FORGERIES) + 3 + 2
    (failure,) = [line for line in found if line["level"] == "ERROR"]
    assert failure["message"] == "GET /lab/fails failed"
    assert "RuntimeError: the password is sesame" in failure["traceback"]


async def test_a_log_file_that_cannot_be_written_is_reported_and_not_fatal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("")
    with logging_to(style="text", level="INFO", file=tmp_path / "taken" / "streamlab.log"):
        pass
    (message,) = [record.getMessage() for record in caplog.records]
    file = tmp_path / "taken" / "streamlab.log"
    assert re.fullmatch(
        rf"server\.log_file - cannot be written: {re.escape(str(file))}: .+; log lines go only to stderr", message
    )
