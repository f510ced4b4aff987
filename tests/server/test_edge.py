"""Pages of another origin start and change nothing; programs, and pages of the server, do."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from playwright.async_api import Browser

from tests.support.servers import Running, starting_in

COUNTER = '''
    from aiohttp import web
    from pydantic import BaseModel
    from streamlab import Scenario, endpoint, hookimpl


    class Body(BaseModel):
        by: int = 1


    class Counter(Scenario):
        """Count what was started."""

        _started: list[str] = []

        @endpoint("GET", "/started", sends="application/json")
        async def started(self, request):
            """List what was started."""
            return web.json_response(self._started)

        @endpoint("GET", "/start", starts_work=True, sends=("application/json", "text/event-stream"))
        async def start(self, request):
            """Start something."""
            self._started.append("GET")
            return web.json_response({})

        @endpoint("POST", "/start", body=Body)
        async def start_by_post(self, request, body):
            """Start something with a body."""
            self._started.append("POST")
            return web.Response(text="started")

        @endpoint("DELETE", "/start")
        async def stop(self, request):
            """Stop something."""
            self._started.append("DELETE")
            return web.Response(text="stopped")

        @endpoint("GET", "/socket")
        async def socket(self, request):
            """Open a WebSocket."""
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            self._started.append("socket")
            await socket.close()
            return socket


    @hookimpl
    def register_scenarios():
        return [Counter]
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with starting_in(tmp_path_factory.mktemp("edge")) as start:
        yield start(counter=COUNTER)


def started(server: Running) -> list[str]:
    listed: list[str] = json.loads(server.get("/started")[2])
    return listed


JSON = {"Content-Type": "application/json"}
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}

FROM_OTHERS = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:{port}"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "https://127.0.0.1:{port}"},
    {"Origin": "http://localhost:{port}"},
    {"Origin": "http://127.0.0.1:{port}.evil.example"},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "a word of a later standard"},
]

FROM_OURS = [
    {},
    {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy.example"},
    {"Origin": "http://127.0.0.1:{port}"},
    {"Origin": "HTTP://127.0.0.1:{port}"},
    {"Sec-Fetch-Site": "a word of a later standard"},
    {"Host": "localhost", "Origin": "http://localhost"},
    {"Host": "localhost:80", "Origin": "http://localhost"},
]


def named(headers: dict[str, str], server: Running) -> dict[str, str]:
    return {name: value.replace("{port}", str(server.port)) for name, value in headers.items()}


@pytest.mark.parametrize("headers", FROM_OTHERS, ids=str)
def test_requests_of_a_page_of_another_origin_start_and_change_nothing(
    server: Running, headers: dict[str, str]
) -> None:
    before, headers = started(server), named(headers, server)
    for method, path, more, body in (
        ("GET", "/start", {}, None),
        ("HEAD", "/start", {}, None),
        ("POST", "/start", JSON, b"{}"),
        ("DELETE", "/start", {}, None),
        ("GET", "/socket", UPGRADE, None),
    ):
        status, got, text = server.get(path, {**more, **headers}, method=method, body=body)
        assert (status, got["content-type"]) == (403, "application/problem+json; charset=utf-8"), (method, path)
        assert "access-control-allow-origin" not in got
        assert method == "HEAD" or json.loads(text)["title"] == "Forbidden"
    assert started(server) == before
    assert server.get("/started", headers)[0] == 200, "what changes nothing is not concerned"


@pytest.mark.parametrize("headers", FROM_OURS, ids=str)
def test_requests_of_own_pages_typed_urls_and_programs_are_accepted(server: Running, headers: dict[str, str]) -> None:
    before, headers = started(server), named(headers, server)
    assert server.get("/start", headers)[0] == 200
    assert server.get("/start", {**JSON, **headers}, method="POST", body=b"{}")[0] == 200
    assert server.get("/start", headers, method="DELETE")[0] == 200
    assert started(server) == [*before, "GET", "POST", "DELETE"]


def test_head_never_starts_the_work_of_get(server: Running) -> None:
    before = started(server)
    status, headers, body = server.get("/start", method="HEAD")
    assert (status, headers["content-type"], headers["vary"], body) == (200, "application/json", "Accept", b"")
    status, headers, _ = server.get("/start", {"Accept": "text/event-stream"}, method="HEAD")
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert server.get("/start?unknown=1", method="HEAD")[0] == 422
    assert started(server) == before


@pytest.mark.parametrize("media", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_that_needs_no_preflight_is_415(server: Running, media: str | None) -> None:
    before = started(server)
    headers = {} if media is None else {"Content-Type": media}
    assert server.get("/start", headers, method="POST", body=b"{}")[0] == 415
    assert started(server) == before


def test_built_in_plugins_declare_endpoints_that_start_work(server: Running) -> None:
    for path in ("/process/long-task?kind=rehearsal&steps=3", "/demo/comparison/report?rows=1000&repeats=1"):
        assert server.get(path, {"Sec-Fetch-Site": "cross-site"})[0] == 403
    status, _, text = server.get(
        "/process/tasks", {"Origin": "http://evil.example", **JSON}, method="POST", body=b'{"kind": "rehearsal"}'
    )
    assert (status, json.loads(text)["status"]) == (403, 403)
    assert json.loads(server.get("/process/tasks")[2])["tasks"] == []


# -- in a browser

ATTACK = b"""<!doctype html><title>another site</title>
<iframe name="frame"></iframe>
<form method="post" target="frame" enctype="text/plain"><input name='{"by": 1, "x' value='": 1}'></form>
"""

TRIES = """async target => {
    const image = new Image();
    const over = new Promise(done => { image.onload = image.onerror = done; });
    image.src = `${target}/start`;
    await over;
    const body = new Blob(['{"by": 1}']);
    await fetch(`${target}/start`, {method: "POST", mode: "no-cors", body});
    await fetch(`${target}/start`, {method: "POST", mode: "no-cors", body: '{"by": 1}'});
    await fetch(`${target}/start`, {mode: "no-cors"});
    await fetch(`${target}/start`, {method: "DELETE"}).catch(() => {});
    const source = new EventSource(`${target}/start`);
    await new Promise(done => { source.onerror = done; });
    const socket = new WebSocket(`${target.replace("http", "ws")}/socket`);
    await new Promise(done => { socket.onclose = done; });
    const frame = document.querySelector("iframe"), form = document.querySelector("form");
    const loaded = new Promise(done => { frame.onload = done; });
    form.action = `${target}/start`;
    form.submit();
    await loaded;
}"""


class OtherSite(BaseHTTPRequestHandler):
    """A page of another site."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(ATTACK)))
        self.end_headers()
        self.wfile.write(ATTACK)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.0.1"])
async def test_a_page_of_another_site_or_port_starts_nothing_in_a_real_browser(
    server: Running, host: str, browser: Browser
) -> None:
    before = started(server)
    with ThreadingHTTPServer((host, 0), OtherSite) as site:
        Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
        try:
            page = await browser.new_page()
            await page.goto(f"http://{host}:{site.server_port}/")
            await page.evaluate(TRIES, server.url)
            assert started(server) == before
            # The same from a page of the server, to verify that the requests work.
            await page.goto(f"{server.url}/started")
            script = """async () => {
                const image = new Image();
                const over = new Promise(done => { image.onload = image.onerror = done; });
                image.src = "/start";
                await over;
                const headers = {"Content-Type": "application/json"};
                await fetch("/start", {method: "POST", body: "{}", headers});
                await fetch("/start", {method: "DELETE"});
                const source = new EventSource("/start");
                await new Promise(done => { source.onerror = done; });
                const socket = new WebSocket(`ws://${location.host}/socket`);
                await new Promise(done => { socket.onclose = done; });
            }"""
            await page.evaluate(script)
        finally:
            site.shutdown()
    assert started(server) == [*before, "GET", "POST", "DELETE", "GET", "socket"]
