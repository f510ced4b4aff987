"""Behind a proxy: whose X-Forwarded-* are believed, and a server that nginx serves below a path."""

import contextlib
import hashlib
import http.client
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urljoin

import pytest
from playwright.async_api import Browser, expect

from tests.support import proxies
from tests.support.docs import blocks
from tests.support.servers import Running, free_port, starting_in

Start = Callable[..., Running]

LOADED_PLUGINS = ("ticker",)

TRUSTED = '[server]\ntrusted_proxies = ["127.0.0.1/32"]\n'

SCENARIOS = "[scenarios.ticker]\ninterval = 0.05\n[scenarios.export]\nsample_rows = 1000\n"

PATH = "/stream/stock-ticker?limit=1"


def get_from(server: Running, address: str, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
    """Send a request from an address of this machine; return its status and the Location or the body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20, source_address=(address, 0))
    with contextlib.closing(connection):
        connection.request("GET", path, headers=dict(headers))
        response = connection.getresponse()
        return response.status, response.headers.get("Location") or response.read().decode()


def logged_client(server: Running, path: str) -> str:
    """Return the client in the line of the access log about a path."""
    (client,) = re.findall(rf"path={re.escape(path)} .*client=(\S+)", server.wait_for_log(f"path={path} "))
    return str(client)


# -- whose fields are believed


def test_the_address_of_a_client_is_what_the_trusted_proxy_saw(start: Start) -> None:
    server = start(TRUSTED)
    for number, (peer, forwarded, expected) in enumerate(
        (
            ("127.0.0.1", "203.0.113.7", "203.0.113.7"),
            ("127.0.0.1", "8.8.8.8, 203.0.113.7", "203.0.113.7"),  # what is left of it, the client has written
            ("127.0.0.1", "203.0.113.7, 127.0.0.1", "203.0.113.7"),  # a trusted proxy before this one
            ("127.0.0.1", "8.8.8.8, unknown", "127.0.0.1"),
            ("127.0.0.1", "[2001:db8::7]:4711", "2001:db8::7"),
            ("127.0.0.1", "", "127.0.0.1"),
            ("127.0.0.2", "203.0.113.7", "127.0.0.2"),  # not a trusted proxy
        )
    ):
        path = f"/unknown-{number}"
        assert get_from(server, peer, path, {"X-Forwarded-For": forwarded})[0] == 404
        assert logged_client(server, path) == expected, forwarded


def test_scheme_host_and_prefix_come_from_a_trusted_proxy_only(start: Start) -> None:
    server = start(TRUSTED)
    given = {
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "stream.example.org",
        "X-Forwarded-Prefix": "/stream/",
        "Accept": "text/plain",
    }
    own, public = f"http://127.0.0.1:{server.port}/lab", "https://stream.example.org/stream/lab"
    for peer, headers, expected in (
        ("127.0.0.1", given, public),
        ("127.0.0.2", given, own),
        ("127.0.0.1", {"X-Forwarded-Prefix": "//evil.example"}, own),
        ("127.0.0.1", {"X-Forwarded-Prefix": "/a/../b"}, own),
        ("127.0.0.1", {"X-Forwarded-Host": "evil.example:99999"}, own),
        ("127.0.0.1", {"X-Forwarded-Host": "[:::]"}, own),
        (
            "127.0.0.1",
            {"X-Forwarded-Prefix": '/"><b>', "X-Forwarded-Proto": "ftp", "X-Forwarded-Host": "a b"},
            own,
        ),
    ):
        index = get_from(server, peer, "/", headers)[1]
        assert index.splitlines()[2].endswith(f" {expected}"), (peer, headers)


def test_limits_count_the_clients_of_a_trusted_proxy(start: Start) -> None:
    server = start(f"{TRUSTED}[limits]\nrequests_per_minute = 2\n")

    def status(forwarded: str, peer: str = "127.0.0.1") -> int:
        return get_from(server, peer, "/health", {"X-Forwarded-For": forwarded})[0]

    assert [status(f"8.8.8.{number}, 203.0.113.7") for number in range(3)] == [200, 200, 429]
    assert [status(f"2001:db8:1:2::{number}") for number in range(3)] == [200, 200, 429]
    assert status("203.0.113.8") == 200
    # What is not a trusted proxy is one client, whatever it reports.
    assert [status(f"203.0.113.{number}", "127.0.0.2") for number in range(20, 23)] == [200, 200, 429]


# -- below a path


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield nginx, which serves a server below /stream/ only, as docs/operating.md says."""
    (location,) = (block for block in blocks("docs/operating.md", "nginx") if "X-Forwarded-Prefix" in block)
    (trusted,) = (block for block in blocks("docs/operating.md", "toml") if "127.0.0.1/32" in block)
    base, folder, port = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("nginx"), free_port()
    for name in ("reports/2026 & more.txt", "notes.txt"):
        file = base / "var/files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    with starting_in(base, ("ticker", "file", "export", "progress")) as start:
        digest = hashlib.sha256(b"alice-secret").hexdigest()
        token = f'[auth.tokens.alice]\nsha256 = "{digest}"\nallow = ["ticker:read"]\n'
        server = start(f'{trusted}[auth]\nanonymous = ["*"]\n{token}{SCENARIOS}')
        location = location.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        with proxies.nginx(folder, f"server {{ listen 127.0.0.1:{port}; {location} }}", port=port) as proxy:
            yield proxy


def test_every_url_in_a_response_leads_through_the_proxy(behind: Running) -> None:
    def read(path: str) -> Any:
        return json.loads(behind.get(path, {"Accept": "application/json"})[2])

    status, headers, _ = behind.get("/stream/files/reports")
    assert (status, headers["location"]) == (308, "/stream/files/reports/")
    listing = read("/stream/files/reports/?limit=1")
    assert [behind.get(entry["url"])[::2] for entry in listing["entries"]] == [(200, b"reports/2026 & more.txt")]
    following = read("/stream/files/?limit=1")["next"]
    assert following.startswith("/stream/files/?")
    assert [entry["name"] for entry in read(following)["entries"]] == ["reports"]
    urls = read("/stream/export")["exports"][0]["urls"]
    assert behind.get(f"{urls['csv']}?limit=1")[0] == 200
    body = json.dumps({"kind": "rehearsal", "parameters": {"steps": 1, "delay": 0}}).encode()
    for _ in range(2):
        status, headers, answer = behind.get(
            "/stream/process/tasks", {"Content-Type": "application/json"}, method="POST", body=body
        )
        assert (status, headers["location"]) == (202, json.loads(answer)["url"])
        assert read(headers["location"])["id"] == json.loads(answer)["id"]
    tasks = read("/stream/process/tasks?limit=1")
    assert read(tasks["tasks"][0]["url"])["id"] == tasks["tasks"][0]["id"]
    assert len(read(tasks["next"])["tasks"]) == 1
    assert read("/stream/openapi.json")["servers"] == [{"url": "/stream"}]
    index = behind.get("/stream/")[2].decode()
    commands = re.findall(r"http://127\.0\.0\.1:[0-9]+\S*", index)
    assert [url for url in commands if not url.startswith(f"{behind.url}/stream/")] == []


def test_every_link_of_a_page_leads_through_the_proxy(behind: Running) -> None:
    for page in ("/stream/", "/stream/lab", "/stream/docs", "/stream/files/", "/stream/files/reports/?limit=1"):
        status, _, text = behind.get(page, {"Accept": "text/html"})
        assert status == 200
        links = [link for link in re.findall(r'(?:href|src)="([^"#]+)"', text.decode()) if link]
        assert links
        for link in links:
            target = urljoin(page, link.replace("&amp;", "&"))
            assert target.startswith("/stream/"), (page, link)
            assert behind.get(target)[0] == 200, (page, link)


async def test_a_browser_runs_routes_below_the_path(behind: Running, browser: Browser) -> None:
    page = await browser.new_page()
    missed: list[str] = []
    page.on("response", lambda got: missed.append(f"{got.status} {got.url}") if got.status >= 400 else None)
    page.on("pageerror", lambda error: missed.append(str(error)))
    await page.goto(f"{behind.url}/stream/lab")
    await page.get_by_role("link", name="Sign in").click()
    await page.get_by_label("Token").fill("alice-secret")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_text("Signed in as alice")).to_be_visible()
    assert page.url.startswith(f"{behind.url}/stream/lab")
    await page.goto(f"{behind.url}/stream/lab#GET/stream/stock-ticker?limit=3")
    await page.locator("#run").click()
    await expect(page.locator("#state")).to_have_text("Done: the response is complete.", timeout=20_000)
    await expect(page.locator("#curl")).to_contain_text(f"{behind.url}/stream/stream/stock-ticker")
    await expect(page.locator("#memory")).to_contain_text("MB")
    await page.goto(f"{behind.url}/stream/docs#/site/site_health")
    block = page.locator("#operations-site-site_health")
    await block.get_by_role("button", name="Try it out").click(timeout=20_000)
    await block.get_by_role("button", name="Execute").click()
    await expect(block.locator(".request-url")).to_contain_text(f"{behind.url}/stream/health", timeout=20_000)
    await page.goto(f"{behind.url}/stream/files/")
    await page.get_by_role("link", name="reports/").click()
    await expect(page.locator("h1")).to_have_text("/files/reports/")
    assert missed == []
