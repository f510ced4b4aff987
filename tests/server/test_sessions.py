"""Browsers: sessions and tickets, on every process that shares the event log, and what nobody gets by them."""

import hashlib
import json
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.connections import EventStream, read_until
from tests.support.servers import Running, starting_in
from tests.support.tokens import bearer, table
from tests.support.valkey import Valkey

LOADED_PLUGINS = ("ticker", "file")

Start = Callable[..., Running]

FORM = {"Content-Type": "application/x-www-form-urlencoded"}

JSON = {"Content-Type": "application/json"}

PAGE = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "same-origin"}

HTTPS = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.7", "X-Forwarded-Prefix": "/live"}

COOKIE = re.compile(r"(?P<pair>[\w.-]+=(?P<secret>[\w.-]*)); Path=(?P<path>\S+); Max-Age=(?P<age>\d+); (?P<rest>.*)")

ECHO = """
    import asyncio
    from contextlib import suppress

    from aiohttp import web
    from pydantic import BaseModel

    from streamlab import PRINCIPAL, Scenario, endpoint, hookimpl, open_event_stream, open_stream


    class EchoQuery(BaseModel):
        model_config = {"extra": "allow"}


    class Echo(Scenario):
        @endpoint("GET", "/echo", query=EchoQuery)
        async def echo(self, request: web.Request, query: EchoQuery) -> web.Response:
            "Show what a handler sees."
            seen = (request[PRINCIPAL].name, request.path_qs, request.raw_path, request.query_string, str(request.url))
            return web.Response(text="\\n".join(seen))

        @endpoint("POST", "/echo")
        async def write(self, request: web.Request) -> web.Response:
            "Change something."
            return web.Response(text=request[PRINCIPAL].name)

        @endpoint("GET", "/echo/forever", sends="text/event-stream")
        async def forever(self, request: web.Request) -> web.StreamResponse:
            "Send one event, and no other."
            async with open_event_stream(request) as stream:
                await stream.send("here", id="1-1")
                await stream.wait()
            return stream

        @endpoint("GET", "/echo/bare")
        async def bare(self, request: web.Request) -> web.StreamResponse:
            "Respond without the core."
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"here")
            await asyncio.sleep(3600)
            return response

        @endpoint("GET", "/echo/stubborn", sends="text/plain")
        async def stubborn(self, request: web.Request) -> web.StreamResponse:
            "Go on, whatever the server wants."
            async with open_stream(request, "text/plain") as stream:
                await stream.write(b"here")
                while not stream.is_disconnected:
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(0.1)
            return stream


    @hookimpl
    def register_scenarios():
        return [Echo]
"""

TOKENS = table("alice", "echo:*", "ticker:read", "file:read:public/*") + table("bob", "echo:read") + table("nobody")


def cookie(headers: Mapping[str, str]) -> re.Match[str]:
    """Return the cookie that a response sets."""
    match = COOKIE.fullmatch(headers["set-cookie"])
    assert match, headers["set-cookie"]
    return match


def signed_in(server: Running, name: str = "alice") -> dict[str, str]:
    """Sign in, and return the header field that a browser sends from then on."""
    status, headers, _ = server.get("/auth/session", bearer(name), method="POST")
    assert status == 200
    return {"Cookie": cookie(headers)["pair"]}


def who(server: Running, headers: Mapping[str, str]) -> Any:
    return json.loads(server.get("/auth/session", headers)[2])["name"]


def ticket(server: Running, url: str, headers: Mapping[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    body = json.dumps({"url": url}).encode()
    given = {**JSON, **(bearer("alice") if headers is None else headers)}
    status, _, answer = server.get("/auth/tickets", given, method="POST", body=body)
    return status, json.loads(answer)


def ticketed(server: Running, url: str, headers: Mapping[str, str] | None = None) -> str:
    status, issued = ticket(server, url, headers)
    assert status == 201, issued
    return str(issued["url"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = tmp_path_factory.mktemp("sessions")
    file = base / "var/files/public/a b.txt"
    file.parent.mkdir(parents=True)
    file.write_text("0123456789")
    proxies = '[server]\ntrusted_proxies = ["127.0.0.1/32"]\nallowed_hosts = ["*"]\n'
    with starting_in(base, LOADED_PLUGINS) as start:
        yield start(proxies + TOKENS, echo=ECHO)


# -- sessions


def test_a_token_is_exchanged_for_a_cookie_that_signs_out(server: Running) -> None:
    status, headers, body = server.get("/auth/session", bearer("alice"), method="POST")
    assert status == 200
    set_cookie = cookie(headers)
    assert set_cookie["pair"].startswith("streamlab-session=")
    assert (set_cookie["path"], set_cookie["rest"]) == ("/", "HttpOnly; SameSite=Strict")
    assert 43_190 <= int(set_cookie["age"]) <= 43_200
    assert json.loads(body)["name"] == "alice"
    headers = {"Cookie": f"other=1; {set_cookie['pair']}; another=2"}
    state = json.loads(server.get("/auth/session", headers)[2])
    assert (state["open"], state["name"]) == (False, "alice")
    assert state["scopes"] == ["echo:*", "ticker:read", "file:read:public/*"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", state["expires"])
    assert server.get("/echo", headers)[2].startswith(b"alice\n")
    assert server.get("/echo", {**headers, **bearer("bob")})[2].startswith(b"bob\n")  # the header wins
    assert server.get("/metrics", headers)[0] == 403
    status, cleared, _ = server.get("/auth/session", headers, method="DELETE")
    assert (status, cookie(cleared)["secret"], cookie(cleared)["age"]) == (204, "", "0")
    assert server.get("/echo", headers)[0] == 401
    status, cleared, _ = server.get("/health", headers)
    assert (status, cookie(cleared)["age"]) == (200, "0")
    assert server.get("/auth/session", method="DELETE")[0] == 204
    browser = signed_in(server)
    assert server.get("/auth/session", {**browser, **bearer("alice")}, method="DELETE")[0] == 204
    assert who(server, browser) is None
    browser = signed_in(server)
    assert server.get("/auth/session", {**browser, **bearer("bob")}, method="POST")[0] == 200
    assert who(server, browser) is None  # another session is in its place


def test_the_cookie_is_for_https_and_the_prefix_behind_a_proxy(server: Running) -> None:
    set_cookie = cookie(server.get("/auth/session", {**bearer("alice"), **HTTPS}, method="POST")[1])
    assert (set_cookie["path"], set_cookie["rest"]) == ("/live", "HttpOnly; SameSite=Strict; Secure")
    status, headers, _ = server.get(
        "/auth/session", {**FORM, **HTTPS}, method="POST", body=b"token=alice-secret&next=/files/"
    )
    assert (status, headers["location"]) == (303, "/live/files/")


@pytest.mark.parametrize("forged", ["", "x", f"{'0' * 16}.1.{'A' * 43}", f"{'0' * 16}.99999.{'A' * 43}", "é", "'"])
def test_a_forged_cookie_is_no_credentials(server: Running, forged: str) -> None:
    headers = {"Cookie": f"streamlab-session={forged}"}
    assert who(server, headers) is None
    assert server.get("/echo", headers)[0] == 401


def test_a_session_cannot_be_begun_without_a_token_that_is_valid(server: Running) -> None:
    for headers, body in (({}, None), (FORM, b"token="), (FORM, b"token=wrong"), (bearer("wrong"), None)):
        status, given, _ = server.get("/auth/session", headers, method="POST", body=body)
        assert status == (401 if headers else 415), headers
        assert "set-cookie" not in given


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/files/?limit=3", "/files/?limit=3"),
        ("/docs#/ticker", "/docs#/ticker"),
        ("", "/lab"),
        ("//evil.example", "/lab"),
        ("/\\evil.example", "/lab"),
        ("\\/evil.example", "/lab"),
        ("/\t/evil.example", "/lab"),
        ("/a\r\nSet-Cookie: x=1", "/lab"),
        ("https://evil.example/", "/lab"),
        ("javascript:alert(1)", "/lab"),
        (f"/{'a' * 3000}", "/lab"),
    ],
)
def test_the_sign_in_leads_to_no_other_site(server: Running, path: str, expected: str) -> None:
    form = f"token=alice-secret&next={quote(path, safe='')}".encode()
    status, headers, _ = server.get("/auth/session", FORM, method="POST", body=form)
    assert (status, headers["location"]) == (303, expected)
    assert "x" not in re.findall(r"(\w+)=", headers["set-cookie"])
    page = server.get(f"/auth/session?next={quote(path, safe='')}", PAGE)[2].decode()
    assert f'name="next" value="{expected}"' in page


def test_the_page_signs_in_and_out_without_scripts(server: Running) -> None:
    status, headers, page = server.get("/auth/session?next=/files/public/", PAGE)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "form-action 'self'" in headers["content-security-policy"]
    assert "script-src 'self'" in headers["content-security-policy"]
    assert b"<script" not in page
    assert b'<form method="post" action="/auth/session">' in page
    assert b'type="password"' in page
    status, headers, page = server.get("/auth/session", {**FORM, **PAGE}, method="POST", body=b"token=no&next=/docs")
    assert (status, headers["content-type"]) == (401, "text/html; charset=utf-8")
    assert b"This token is not known here." in page
    assert b'name="next" value="/docs"' in page
    body = b"token=alice-secret+&next=/files/public/"
    status, headers, _ = server.get("/auth/session", {**FORM, **PAGE}, method="POST", body=body)
    assert (status, headers["location"]) == (303, "/files/public/")
    browser = {"Cookie": cookie(headers)["pair"]}
    page = server.get("/files/public/", {**PAGE, **browser})[2]
    assert b'Signed in as alice, <a href="/auth/session?next=/files/public/">sign out</a>' in page
    assert b"Signed in as alice." in server.get("/auth/session", {**PAGE, **browser})[2]
    status, headers, _ = server.get("/auth/session", {**FORM, **PAGE, **browser}, method="POST", body=b"end=1")
    assert (status, cookie(headers)["age"]) == (303, "0")
    assert who(server, browser) is None
    for path in ("/lab", "/docs"):
        assert f'<a href="/auth/session?next={path}">Sign in</a>' in server.get(path)[2].decode()
    assert "form-action 'none'" in server.get("/lab")[1]["content-security-policy"]


def test_a_page_that_is_denied_offers_the_sign_in_and_a_program_gets_a_problem(server: Running) -> None:
    for browser, status, reason in (
        ({}, 401, "This needs a token"),
        (signed_in(server, "nobody"), 403, "nobody needs"),
    ):
        for accept in (PAGE, {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}):
            given = server.get("/files/public/a%20b.txt?rate=10", {**accept, **browser})
            assert (given[0], given[1]["content-type"]) == (status, "text/html; charset=utf-8")
            assert given[1]["www-authenticate"].startswith("Bearer realm=")
            assert reason in given[2].decode()
            assert 'name="next" value="/files/public/a%20b.txt?rate=10"' in given[2].decode()
        for accept in ({}, {"Accept": "*/*"}, {"Accept": "text/html", "Sec-Fetch-Mode": "cors"}):
            given = server.get("/files/public/a%20b.txt", {**accept, **browser})
            assert (given[0], given[1]["content-type"]) == (status, "application/problem+json; charset=utf-8")


def test_a_page_of_another_origin_can_do_nothing_with_the_cookie(server: Running) -> None:
    browser = signed_in(server)
    for headers in (
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        for method, path in (("POST", "/echo"), ("DELETE", "/auth/session"), ("POST", "/auth/tickets")):
            assert server.get(path, {**browser, **headers, **JSON}, method=method, body=b'{"url": "/echo"}')[0] == 403
        login = server.get("/auth/session", {**FORM, **headers}, method="POST", body=b"token=bob-secret")
        assert (login[0], "set-cookie" in login[1]) == (403, False)
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.get("/echo", {**browser, **own}, method="POST", body=b"")[::2] == (200, b"alice")


def test_no_shared_cache_may_store_what_depends_on_the_client(server: Running) -> None:
    browser = signed_in(server)
    for path in ("/", "/lab", "/docs", "/openapi.json", "/health", "/files/public/", "/files/public/a%20b.txt", "/no"):
        for headers in ({}, browser, bearer("alice")):
            given = server.get(path, headers)[1]
            assert {"Authorization", "Cookie"} <= set(given["vary"].split(", ")), path
            assert re.search("private|no-store", given["cache-control"]), path
            assert "public" not in given["cache-control"]
    assert server.get("/assets/site.css", browser)[1]["cache-control"] == "public, no-cache"
    ended = {"Cookie": f"streamlab-session={'0' * 16}.1.{'A' * 43}"}
    assert "private" in server.get("/assets/site.css", ended)[1]["cache-control"]  # it removes the cookie


def test_the_api_document_has_both_kinds_of_credentials(server: Running) -> None:
    document = json.loads(server.get("/openapi.json", signed_in(server))[2])
    schemes = document["components"]["securitySchemes"]
    assert (schemes["token"]["type"], schemes["token"]["scheme"]) == ("http", "bearer")
    assert (schemes["session"]["in"], schemes["session"]["name"]) == ("cookie", "streamlab-session")
    assert document["paths"]["/echo"]["get"]["security"] == [{"token": []}, {"session": []}]
    assert document["paths"]["/health"]["get"]["security"] == [{}, {"token": []}, {"session": []}]
    assert "/echo" not in json.loads(server.get("/openapi.json")[2])["paths"]


def test_an_open_server_needs_no_sign_in(start: Start) -> None:
    server = start("[auth]\nopen = true\n", echo=ECHO)
    assert json.loads(server.get("/auth/session")[2])["open"] is True
    page = server.get("/auth/session", PAGE)[2]
    assert b"No sign-in is needed here" in page
    assert b'type="password"' not in page
    assert "set-cookie" not in server.get("/auth/session", FORM, method="POST", body=b"token=x")[1]
    assert ticket(server, "/echo?a=1", {})[1]["url"] == "/echo?a=1"
    assert b"Sign in" not in server.get("/lab", PAGE)[2]
    assert "/auth/session" not in json.loads(server.get("/openapi.json")[2])["paths"]
    assert "vary" not in server.get("/docs")[1]


# -- tickets


def test_a_ticket_works_once_and_repeats_with_its_cookie(server: Running) -> None:
    status, issued = ticket(server, "/stream/stock-ticker?symbols=AAPL&limit=1")
    assert status == 201
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", issued["expires"])
    path = issued["url"].partition("&ticket=")[0]
    assert path == "/stream/stock-ticker?symbols=AAPL&limit=1"
    status, headers, _ = server.get(issued["url"])
    assert status == 200
    set_cookie = cookie(headers)
    assert (set_cookie["path"], set_cookie["rest"]) == ("/stream/stock-ticker", "HttpOnly; SameSite=Lax")
    assert 43_100 <= int(set_cookie["age"]) <= 43_200
    assert headers["referrer-policy"] == "same-origin"
    assert server.get(issued["url"])[0] == 401
    repeated = {"Cookie": f"x=1; {set_cookie['pair']}"}
    status, headers, body = server.get(issued["url"], {**repeated, "Last-Event-ID": "0-0"})
    assert (status, body.startswith(b"id: ")) == (200, True)
    assert "set-cookie" not in headers
    assert server.get(path, repeated)[0] == 401  # the cookie alone is nothing
    assert server.get(issued["url"].replace("AAPL", "MSFT"), repeated)[0] == 401
    assert server.get(ticketed(server, "/stream/stock-ticker?limit=1"), repeated)[0] == 200


def test_a_ticket_for_https_can_be_used_by_pages_of_other_sites(server: Running) -> None:
    status, issued = ticket(server, "/live/files/public/a%20b.txt", {**bearer("alice"), **HTTPS})
    assert (status, issued["url"].partition("?")[0]) == (201, "/live/files/public/a%20b.txt")
    status, headers, body = server.get(issued["url"].removeprefix("/live"), HTTPS)
    assert (status, body) == (200, b"0123456789")
    set_cookie = cookie(headers)
    part = {"Cookie": set_cookie["pair"], "Range": "bytes=3-5"}  # as a browser resumes a download
    assert server.get(issued["url"].removeprefix("/live"), {**HTTPS, **part})[::2] == (206, b"345")
    assert set_cookie["path"] == "/live/files/public/a%20b.txt"
    assert set_cookie["rest"] == "HttpOnly; SameSite=None; Secure; Partitioned"


def test_a_ticket_is_for_its_url_only(server: Running) -> None:
    url = ticketed(server, "/echo?a=1&b=2&b=%C3%A4+x")
    query = url.partition("?")[2]
    secret = query.rpartition("=")[2]
    for other in (
        f"/echo?ticket={secret}",
        f"/echo?a=1&b=2&ticket={secret}",
        f"/echo?b=2&a=1&b=%C3%A4+x&ticket={secret}",
        f"/echo?a=1&b=2&b=%C3%A4+x&last_event_id=1-1&ticket={secret}",
        f"/echo/forever?{query}",
        f"/echo?a=1&b=2&b=%C3%A4+x&ticket={secret[:-1]}",
        f"/echo?a=1&b=2&b=%C3%A4+x&ticket={secret}.",
        "/echo?a=1&b=2&b=%C3%A4+x&ticket=",
    ):
        assert server.get(other)[0] == 401, other
    for method in ("HEAD", "POST"):
        assert server.get(url, method=method, body=b"" if method == "POST" else None)[0] == 401
    # The same parameters, as a browser may encode them; the place of the ticket does not matter.
    status, _, body = server.get(f"/%65cho?ticket={secret}&a=1&b=2&b=%c3%a4%20x")
    assert (status, body.decode().splitlines()) == (
        200,
        [
            "alice",
            "/%65cho?a=1&b=2&b=%c3%a4%20x",
            "/%65cho?a=1&b=2&b=%c3%a4%20x",
            "a=1&b=2&b=ä x",
            f"http://127.0.0.1:{server.port}/%65cho?a=1&b=2&b=%c3%a4%20x",
        ],
    )


def test_a_redirect_has_no_ticket(server: Running) -> None:
    status, headers, _ = server.get(ticketed(server, "/files/public?limit=3"))
    assert (status, headers["location"]) == (308, "/files/public/?limit=3")


@pytest.mark.parametrize(
    ("url", "name", "status", "detail"),
    [
        ("/nothing", "alice", 404, "No GET is served at /nothing."),
        ("/auth/tickets", "alice", 404, "No GET is served at /auth/tickets."),
        ("/echo", "nobody", 403, "nobody needs the scope echo:read for this."),
        ("/metrics", "alice", 403, "alice needs the scope site:read for this."),
        ("/stream/stock-ticker?limit=x", "alice", 422, "Invalid parameters: limit."),
        ("/echo?ticket=1", "alice", 422, "has a ticket already"),
        ("//evil.example/", "alice", 422, "must be a path and query of this server"),
        ("https://evil.example/", "alice", 422, "must be a path and query of this server"),
        ("/echo#a", "alice", 422, "must be a path and query of this server"),
        ("/files/../echo", "alice", 422, "must be a path and query of this server"),
        ("/echo\r\n", "alice", 422, "must be a path and query of this server"),
        ("", "alice", 422, "at least 1 character"),
    ],
)
def test_a_ticket_is_issued_for_what_its_client_may_read(
    server: Running, url: str, name: str, status: int, detail: str
) -> None:
    given, problem = ticket(server, url, bearer(name))
    assert (given, detail in json.dumps(problem)) == (status, True), problem


def test_a_ticket_needs_credentials(server: Running) -> None:
    assert ticket(server, "/echo", {})[0] == 401
    assert ticket(server, "/echo", signed_in(server))[0] == 201


def test_a_browser_has_a_limited_number_of_cookies_of_tickets(server: Running) -> None:
    cookies = [f"streamlab-ticket-{number}=x" for number in range(33)]
    url = ticketed(server, "/echo")
    connection = server.send(
        f"GET {url} HTTP/1.1\nHost: localhost:{{port}}\nConnection: close\nCookie: {'; '.join(cookies)}"
    )
    with connection, connection.makefile() as response:
        given = re.findall(
            r"^Set-Cookie: (streamlab-ticket-[\w.-]+)=[\w-]*; Path=/echo; Max-Age=(\d+)", response.read(), re.M
        )
    assert [(name, age == "0") for name, age in given[:2]] == [
        ("streamlab-ticket-0", True),
        ("streamlab-ticket-1", True),
    ]
    assert [age == "0" for _, age in given[2:]] == [False]


# -- several processes, restarts, ends


EXPIRED = """
    import streamlab.server.sessions

    streamlab.server.sessions.TICKET_SECONDS = 0
"""
"""A plugin with which tickets expire at once."""

BOUNDED = """
    from streamlab.server import sessions, sign_in

    sessions.MAX_SESSIONS = sessions.MAX_TICKETS = 2
    sign_in.TICKETS_PER_MINUTE = 5
"""
"""A plugin with which a principal has few sessions and tickets."""

SLOW_END = """
    import asyncio

    from streamlab import Channel

    publish_all = Channel.publish_all


    async def slow(self, *arguments, **options):
        if self.name == "auth:ended":
            await asyncio.sleep(1.2)
        return await publish_all(self, *arguments, **options)


    Channel.publish_all = slow
"""
"""A plugin with which the end of a session takes longer to be stored than the interval between two checks."""

IMPATIENT = """
    import streamlab.server.sessions

    streamlab.server.sessions.LOG_SECONDS = 0.2
"""
"""A plugin with which requests do not wait for the event log."""


def pair(base: Path, config: str, stack: ExitStack, **plugins: str) -> list[Running]:
    """Start two servers that share an event log."""
    servers = []
    for name in ("one", "two"):
        (base / name).mkdir()
        start = stack.enter_context(starting_in(base / name, LOADED_PLUGINS))
        servers.append(start(config, echo=ECHO, **plugins))
    return servers


@pytest.fixture(params=["sqlite", "valkey"])
def url_of_log(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/shared.db"
    return str(request.getfixturevalue("valkey").url)


def test_sessions_and_tickets_are_those_of_every_process_and_end_on_all(url_of_log: str, tmp_path: Path) -> None:
    config = f'[events]\nurl = "{url_of_log}"\n{TOKENS}'
    with ExitStack() as stack:
        one, two = pair(tmp_path, config, stack)
        browser = signed_in(one)
        assert who(two, browser) == "alice"
        # One of many that redeem a ticket at once, on both processes, gets in.
        url = ticketed(one, "/echo?a=1", browser)
        barrier = threading.Barrier(20)

        def redeem(number: int) -> tuple[int, dict[str, str], bytes]:
            barrier.wait()
            return (one, two)[number % 2].get(url)

        with ThreadPoolExecutor(20) as pool:
            given = list(pool.map(redeem, range(20)))
        assert sorted(status for status, _, _ in given) == [200] + [401] * 19
        (redeemed,) = (headers for status, headers, _ in given if status == 200)
        repeated = {"Cookie": cookie(redeemed)["pair"]}
        assert [server.get(url, repeated)[0] for server in (one, two)] == [200, 200]
        # Signing out on one process ends the streams of the session, and of its tickets, on the other.
        stream_url = ticketed(two, "/echo/forever", browser)
        with (
            EventStream(two, "/echo/forever", headers=browser) as by_session,
            EventStream(two, stream_url) as by_ticket,
            EventStream(two, "/echo/forever", headers=signed_in(two)) as other,
            EventStream(two, "/echo/forever", headers=bearer("alice")) as by_token,
        ):
            for stream in (by_session, by_ticket, other, by_token):
                assert [event.data for event in stream.take(1)] == ["here"]
            unused = ticketed(one, "/echo", browser)
            assert one.get("/auth/session", browser, method="DELETE")[0] == 204
            ended = time.monotonic()
            assert [event.event for event in by_session] == ["unauthorized"]
            assert [event.event for event in by_ticket] == ["unauthorized"]
            assert time.monotonic() - ended < 1
            assert [server.get("/echo", browser)[0] for server in (one, two)] == [401, 401]
            assert [server.get(url, repeated)[0] for server in (one, two)] == [401, 401]
            assert two.get(unused)[0] == 401
        two.wait_for_log('outcome="client left"')
        assert two.complete_log().count("outcome=unauthorized") == 2


def test_sessions_and_tickets_survive_a_restart_and_no_secret_is_written(start: Start, tmp_path: Path) -> None:
    config = f'[server]\nlog_level = "DEBUG"\n{TOKENS}'
    server = start(config, echo=ECHO)
    browser, unused = signed_in(server), ticketed(server, "/echo?a=1")
    used = ticketed(server, "/echo?a=2")
    repeated = {"Cookie": cookie(server.get(used)[1])["pair"]}
    form = server.get("/auth/session", FORM, method="POST", body=b"token=alice-secret")
    assert server.get(f"/no/such/path?{unused.partition('?')[2]}")[0] == 404
    assert server.terminate()[0] == 0
    again = start(config, echo=ECHO)
    assert who(again, browser) == "alice"
    assert again.get(used)[0] == 401
    assert again.get(used, repeated)[2].startswith(b"alice\n")
    assert again.get(unused)[2].startswith(b"alice\n")
    secrets = [
        "alice-secret",
        *(text.rpartition(".")[2] for text in (browser["Cookie"], unused, used)),
        repeated["Cookie"].rpartition("=")[2],
        cookie(form[1])["secret"].rpartition(".")[2],
    ]
    assert all(len(secret) > 10 for secret in secrets)
    assert again.terminate()[0] == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"streamlab.db", "stderr-0.log", "streamlab.log"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        assert [secret for secret in secrets if secret.encode() in content] == [], path
    with sqlite3.connect(tmp_path / "var/streamlab.db") as log:
        ((record,),) = log.execute(
            "SELECT value FROM checkpoints JOIN channels ON id = channel "
            "WHERE channels.name LIKE 'auth:sessions:%' ORDER BY checkpoints.name LIMIT 1"
        )
    assert hashlib.sha256(browser["Cookie"].rpartition(".")[2].encode()).hexdigest() in record


def test_a_session_ends_with_its_token(start: Start, tmp_path: Path) -> None:
    server = start(TOKENS, echo=ECHO)
    browser = signed_in(server)
    issued, unused = ticketed(server, "/echo/forever", browser), ticketed(server, "/echo")
    with (
        EventStream(server, "/echo/forever", headers=browser) as stream,
        EventStream(server, issued) as other,
    ):
        repeated = {"Cookie": other.headers["set-cookie"].partition(";")[0]}
        (tmp_path / "config.toml").write_text(table("bob", "echo:read"))
        server.process.send_signal(signal.SIGHUP)
        assert [event.event for event in stream] == ["", "unauthorized"]
        assert [event.event for event in other] == ["", "unauthorized"]
    assert who(server, browser) is None
    assert cookie(server.get("/health", browser)[1])["age"] == "0"
    assert [server.get(issued, repeated)[0], server.get(unused)[0]] == [401, 401]


def test_the_end_of_a_session_cuts_also_a_handler_that_goes_on(server: Running) -> None:
    browser = signed_in(server)
    request = f"GET /echo/stubborn HTTP/1.1\nHost: localhost\nCookie: {browser['Cookie']}"
    with server.send(request, timeout=3) as connection:
        read_until(connection, b"here")
        assert server.get("/auth/session", browser, method="DELETE")[0] == 204
        assert connection.recv(100) == b""


def test_a_response_without_the_core_is_cut_with_its_session_or_token(start: Start) -> None:
    """There is no other stream that would be looked at."""
    expires = datetime.now(UTC) + timedelta(seconds=2)
    server = start(TOKENS + table("short", "echo:read", expires=expires), echo=ECHO)
    request = f"GET /echo/bare HTTP/1.1\nHost: localhost\nAuthorization: {bearer('short')['Authorization']}"
    with server.send(request, timeout=4) as connection:
        read_until(connection, b"here")
        assert connection.recv(100) == b""
    browser = signed_in(server)
    request = f"GET /echo/bare HTTP/1.1\nHost: localhost\nCookie: {browser['Cookie']}"
    with server.send(request, timeout=3) as connection:
        read_until(connection, b"here")
        assert server.get("/auth/session", browser, method="DELETE")[0] == 204
        assert connection.recv(100) == b""


def test_the_request_that_ends_a_session_is_not_cut_with_it(start: Start) -> None:
    server = start(TOKENS, echo=ECHO, slow_end=SLOW_END)
    browser = signed_in(server)
    assert server.get("/auth/session", browser, method="DELETE")[0] == 204
    browser = signed_in(server)
    status, headers, _ = server.get("/auth/session", {**FORM, **browser}, method="POST", body=b"token=bob-secret")
    assert (status, who(server, {"Cookie": cookie(headers)["pair"]})) == (303, "bob")


def test_sessions_and_tickets_expire(start: Start) -> None:
    server = start(f"[auth]\nsession_hours = 0.0005\n{TOKENS}", echo=ECHO, expired=EXPIRED)
    browser = signed_in(server)
    assert who(server, browser) == "alice"
    assert server.get(ticketed(server, "/echo"))[0] == 401
    with EventStream(server, "/echo/forever", headers=browser) as stream:
        assert [event.event for event in stream] == ["", "unauthorized"]  # after 1.8 s
    assert who(server, browser) is None


def test_one_principal_has_a_limited_number_of_sessions_and_tickets(start: Start) -> None:
    server = start(TOKENS, echo=ECHO, bounded=BOUNDED)
    first = signed_in(server)
    with EventStream(server, "/echo/forever", headers=first) as stream:
        others = [signed_in(server), signed_in(server, "bob"), signed_in(server)]
        assert [event.event for event in stream] == ["", "unauthorized"]
    assert [who(server, browser) for browser in (first, *others)] == [None, "alice", "bob", "alice"]
    oldest, *newer = [ticketed(server, "/echo") for _ in range(3)]
    assert [server.get(url)[0] for url in (oldest, *newer)] == [401, 200, 200]
    assert [ticket(server, "/echo")[0] for _ in range(2)] == [201, 201]
    body = json.dumps({"url": "/echo"}).encode()
    status, headers, problem = server.get("/auth/tickets", {**JSON, **bearer("alice")}, method="POST", body=body)
    assert (status, 1 <= int(headers["retry-after"]) <= 12) == (429, True)
    assert json.loads(problem)["detail"] == "This client has requested 5 tickets within a minute."
    assert ticket(server, "/echo", bearer("bob"))[0] == 201


def test_while_the_event_log_is_unavailable_a_cookie_is_of_no_use_and_in_no_way(start: Start, valkey: Valkey) -> None:
    server = start(f'[events]\nurl = "{valkey.url}"\n{TOKENS}', echo=ECHO, impatient=IMPATIENT)
    browser = signed_in(server)
    issued = ticketed(server, "/echo")
    valkey.kill()
    status, headers, _ = server.get("/lab", browser)
    assert (status, "set-cookie" in headers) == (200, False)
    for path, given in (("/echo", browser), (issued, {})):
        status, headers, _ = server.get(path, given)
        assert (status, headers["retry-after"]) == (503, "5")
    assert server.get("/echo", bearer("alice"))[0] == 200
    valkey.start()
    server.wait_for_log("is connected again")
    assert server.get("/echo", browser)[2].startswith(b"alice\n")
