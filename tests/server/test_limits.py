"""What one client can make the server hold or compute is bounded: the table of docs/security.md, and what holds it."""

import asyncio
import contextlib
import json
import re
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from streamlab.config import Config
from streamlab.problems import Problem
from streamlab.server.app import create_app
from streamlab.server.edge import EdgeConnection
from streamlab.server.forwarded import Proxies
from streamlab.server.limits import OpenConnections, RequestRate
from streamlab.streaming.drain import COMPRESSING_THREADS
from tests.support.connections import EventStream, read_until
from tests.support.fake_upstream import Exchange, event, fake_upstream
from tests.support.servers import REPOSITORY, Running, disabled, starting_in
from tests.support.tokens import bearer, table

TABLE = re.compile(r"<!-- limits -->\n(.*?)<!-- /limits -->", re.DOTALL)


def test_every_bound_of_the_table_is_held_by_a_test() -> None:
    rows = TABLE.findall((REPOSITORY / "docs/security.md").read_text())[0].splitlines()[2:]
    assert len(rows) > 30
    for row in rows:
        resource, bound, answer, held_by = (cell.strip() for cell in row.strip("|").split(" | "))
        assert resource
        assert bound
        assert answer
        named = re.findall(r"\[(\w+\.py)\]\(\.\./(tests/[\w/.]+)\)::(\w+)", held_by)
        assert named, row
        for name, path, test in named:
            assert path.endswith(f"/{name}"), row
            assert f"def {test}(" in (REPOSITORY / path).read_text(), f"{path} has no {test}"


RATE = 60
"""Requests of one client in a minute, on the shared server."""


def never_ends(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send_events(event("a"))
    exchange.wait_until_closed(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = tmp_path_factory.mktemp("limits")
    (base / "app.log").write_text("one\n")
    with (
        fake_upstream({"default": never_ends}) as upstream,
        starting_in(base, ("export", "llm", "logs", "progress", "ticker")) as start,
    ):
        config = f"""
            [server]
            trusted_proxies = ["127.0.0.1/32"]
            [limits]
            requests_per_minute = {RATE}
            [events]
            max_filters = 3
            [scenarios.export]
            max_exports = 3
            sample_rows = 100_000
            [scenarios.llm]
            url = "{upstream.url}"
            model = "fake-1"
            max_generations = 2
            max_waiting = 1
            max_stored = 8
            [scenarios.logs.sources.app]
            path = "app.log"
            [scenarios.progress]
            max_stored = 3
            max_stored_per_client = 2
        """
        yield start(f"{config}\n{table('alice', '*')}{table('bob', '*')}{table('carol', 'llm:*')}")


Client = Callable[..., tuple[int, dict[str, str], Any]]


@pytest.fixture
def ask(server: Running) -> Client:
    def request(name: str, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        content = None if body is None else json.dumps(body).encode()
        headers = {**bearer(name), **({"Content-Type": "application/json"} if content else {})}
        status, fields, text = server.get(path, headers, method="POST" if content else "GET", body=content)
        return status, fields, json.loads(text) if "json" in fields.get("content-type", "") else text

    return request


def test_a_client_has_half_of_the_exports(server: Running, ask: Client) -> None:
    path = "/export/users/csv?limit=100000"
    token = bearer("alice")["Authorization"]
    with ExitStack() as stack:
        for _ in range(2):  # they wait for a client that does not read
            connection = stack.enter_context(server.connect(receive_buffer=4096))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\n\r\n".encode())
            assert b" 200 " in read_until(connection, b"\r\n")
        status, headers, problem = ask("alice", path)
        assert (status, headers["retry-after"]) == (429, "5")
        assert problem["detail"] == "Too many exports: this client has 2 of the 2 that one may have."
        assert ask("bob", "/export/users/csv?limit=1")[0] == 200
    counted = 'streamlab_rejected_requests_total{scenario="export",status="429"} 1.0'
    assert counted in ask("bob", "/metrics")[2].decode().splitlines()


def test_a_client_has_half_of_the_generations(server: Running, ask: Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    started: dict[str, list[str]] = {"alice": []}
    with ExitStack() as stack:
        for _ in range(2):  # of two that run, and one that waits
            path = "/ai/chat-stream-sse?prompt=Hello"
            stream = stack.enter_context(EventStream(server, path, headers=bearer("alice")))
            assert [one.event for one in stream.take(2)] == ["generation", "token"]
            started["alice"].append(stream.headers["location"])
        status, headers, document = ask("alice", "/v1/chat/completions", body)
        assert (status, headers["retry-after"]) == (429, "2")
        assert document["error"]["code"] == "too_many_generations"
        assert document["error"]["message"].endswith("this client has 2 of the 2 that one may have.")
        with EventStream(server, "/ai/chat-stream-sse?prompt=Hello", headers=bearer("bob")) as waiting:
            assert waiting.status == 200
            started["bob"] = [waiting.headers["location"]]
    for name, paths in started.items():
        for path in paths:
            assert server.get(path, bearer(name), method="DELETE")[0] == 204


def test_a_client_has_half_of_the_stored_generations(server: Running, ask: Client) -> None:
    for number in range(5):
        with EventStream(server, "/ai/chat-stream-sse?prompt=Hello", headers=bearer("carol")) as stream:
            if number == 4:
                assert (stream.status, stream.headers["retry-after"]) == (429, "60")
                break
            assert stream.status == 200
            assert [one.event for one in stream.take(2)] == ["generation", "token"]
        path = stream.headers["location"]
        assert server.get(path, bearer("carol"), method="DELETE")[0] == 204
    assert ask("carol", "/ai/chat-stream-sse?prompt=Hello")[2]["detail"].startswith(
        "Too many generations are stored: 4 of this client, and "
    )


def test_a_client_that_may_be_a_proxy_has_all_stored_generations(tmp_path: Path) -> None:
    with fake_upstream({"default": never_ends}) as upstream, starting_in(tmp_path, ("llm",)) as start:
        server = start(f'[scenarios.llm]\nurl = "{upstream.url}"\nmodel = "fake-1"\nmax_stored = 3')
        for number in range(4):
            with EventStream(server, "/ai/chat-stream-sse?prompt=Hello") as stream:
                if number == 3:
                    assert (stream.status, stream.headers["retry-after"]) == (429, "60")
                    break
                assert [one.event for one in stream.take(2)] == ["generation", "token"]
            assert server.get(stream.headers["location"], method="DELETE")[0] == 204


def test_a_client_has_half_of_the_filters_of_a_channel(server: Running, ask: Client) -> None:
    with ExitStack() as stack:
        for pattern in ("a", "b", "b"):
            path = f"/stream/live-logs?source=app&grep={pattern}"
            assert stack.enter_context(EventStream(server, path, headers=bearer("alice"))).status == 200
        status, headers, problem = ask("alice", "/stream/live-logs?source=app&grep=c")
        assert (status, headers["retry-after"]) == (429, "5")
        assert problem["detail"] == "Streams of this client use 2 different filters, its maximum."
        for pattern in ("a", "c"):  # one that is in use, and the last
            path = f"/stream/live-logs?source=app&grep={pattern}"
            assert stack.enter_context(EventStream(server, path, headers=bearer("bob"))).status == 200


def test_a_client_has_a_limited_number_of_stored_tasks(ask: Client) -> None:
    task = {"kind": "rehearsal", "parameters": {"steps": 1, "delay": 0}}
    for _ in range(2):
        assert ask("alice", "/process/tasks", task)[0] == 202
    for name, detail in (
        ("alice", "Too many tasks of this client are stored (limit 2)."),
        ("bob", ""),
        ("bob", "Too many tasks are stored (limit 3)."),
    ):
        status, headers, document = ask(name, "/process/tasks", task)
        assert status == (429 if detail else 202)
        if detail:
            assert (headers["retry-after"], document["detail"]) == ("60", detail)


def test_a_rejected_request_leaves_no_idempotency_key(server: Running, ask: Client) -> None:
    def keys() -> int:
        with contextlib.closing(sqlite3.connect(server.base / "var/streamlab.db")) as database:
            query = "SELECT count(DISTINCT channel) FROM events JOIN channels ON channel = id WHERE name LIKE ?"
            return int(database.execute(query, ("progress-key/%",)).fetchone()[0])

    task = {"kind": "rehearsal", "parameters": {"steps": 1, "delay": 0}}
    statuses = []
    for number in range(5):
        headers = {**bearer("bob"), "Content-Type": "application/json", "Idempotency-Key": f"key-{number}"}
        statuses.append(server.get("/process/tasks", headers, method="POST", body=json.dumps(task).encode())[0])
    assert statuses[-1] == 429
    assert keys() == statuses.count(202)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/stream/stock-ticker", {"Authorization": "Bearer guessed"}, 401),
        ("/no/such/route", {}, 404),
        ("/stream/stock-ticker", {}, 401),
    ],
)
def test_requests_of_an_address_are_counted_whatever_they_get(
    server: Running, path: str, headers: dict[str, str], status: int
) -> None:
    address = {"X-Forwarded-For": f"192.0.2.{len(path)}{len(headers)}"}
    for _ in range(RATE):
        assert server.get(path, {**headers, **address})[0] == status
    given, fields, body = server.get(path, {**headers, **address})
    assert (given, fields["ratelimit-policy"]) == (429, f'"requests";q={RATE};w=60')
    assert fields["ratelimit"].startswith('"requests";r=0;t=')
    assert 0 < int(fields["retry-after"]) <= 60
    assert json.loads(body)["status"] == 429
    assert server.get(path, {**headers, "X-Forwarded-For": "192.0.2.1"})[0] == status


def test_a_limited_number_of_clients_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlab.server.limits.MAX_CLIENTS", 2)
    rate = RequestRate(1)
    for client in ("a", "b", "c", "a"):  # the first is forgotten, and so begins again
        rate.admit(client)
    with pytest.raises(Problem, match="sent 1 requests within a minute"):
        rate.admit("c")


def test_requests_that_wait_on_a_connection_are_not_read(server: Running) -> None:
    token = bearer("alice")["Authorization"]
    stream = f"GET /stream/stock-ticker HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\n\r\n".encode()
    with server.connect(timeout=0.5) as connection:
        connection.sendall(stream)
        read_until(connection, b"\r\n\r\n")
        sent, requests = 0, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10_000
        with suppress(TimeoutError):
            while sent < 1 << 26:
                sent += connection.send(requests)
        assert sent < 1 << 25  # what the buffers of the kernel hold


def test_json_that_is_nested_too_deep_is_400(server: Running) -> None:
    headers = {"Content-Type": "application/json", **bearer("bob")}
    status, _, body = server.get("/process/tasks", headers, method="POST", body=b"[" * 60_000 + b"]" * 5000)
    assert (status, json.loads(body)["detail"]) == (400, "The body is not JSON.")


COMPRESSED = """
    from aiohttp import web

    from streamlab import Scenario, endpoint, hookimpl, open_stream


    class Compressed(Scenario):
        @endpoint("GET", "/compressed", sends="text/plain")
        async def compressed(self, request: web.Request) -> web.StreamResponse:
            "Send large chunks."
            async with open_stream(request, "text/plain", compress=True) as stream:
                for number in range(200):
                    await stream.write(b"%d" % number * 200_000)
            return stream


    @hookimpl
    def register_scenarios():
        return [Compressed]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_streams_are_compressed_in_two_threads(start: Callable[..., Running]) -> None:
    server = start("", compressed=COMPRESSED)

    def threads() -> int:
        return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))

    request = "GET /compressed HTTP/1.1\nHost: localhost\nAccept-Encoding: gzip"
    counts = []
    with ExitStack() as stack:
        for _ in range(10):
            connection = stack.enter_context(server.send(request))
            assert b"Content-Encoding: gzip" in read_until(connection, b"\r\n\r\n")
            counts.append(threads())
    assert counts[-1] <= counts[COMPRESSING_THREADS] + 1  # of the process, for something else


# -- connections


def own_address() -> str:
    """Return an address of this machine that is not loopback; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


def test_an_address_has_a_limited_number_of_connections(start: Callable[..., Running]) -> None:
    address = own_address()
    config = '[server]\nhost = "0.0.0.0"\n[auth]\nopen = true\n[limits]\nconnections_per_client = 2\n'
    server = start(config)

    def connect(host: str) -> socket.socket:
        return stack.enter_context(socket.create_connection((host, server.port), timeout=5))

    def is_served(connection: socket.socket) -> bool:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return connection.recv(4096).startswith(b"HTTP/1.1 200")
        except ConnectionError:
            return False

    with ExitStack() as stack:
        first, second, third = (connect(address) for _ in range(3))
        assert [is_served(one) for one in (first, second, third)] == [True, True, False]
        assert all(is_served(connect("127.0.0.1")) for _ in range(3))  # may be a proxy
        first.close()
        while not is_served(connect(address)):  # once the server has seen that
            pass


def test_connections_are_counted_by_network_and_not_for_proxies() -> None:
    connections = OpenConnections(1, Proxies(["192.0.2.9/32"]))
    counted = connections.add("2001:db8::1")
    assert counted == "2001:db8::/64"
    assert connections.add("2001:db8::2") is None
    assert connections.add("2001:db8:0:1::1") == "2001:db8:0:1::/64"
    for proxy in ("192.0.2.9", "127.0.0.1", "::1", ""):
        assert [connections.add(proxy) for _ in range(3)] == [""] * 3
    connections.remove(counted)
    assert connections.add("2001:db8::2") == counted


async def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("streamlab.server.edge.KEEP_ALIVE_SECONDS", 0.2)
    app = create_app(Config.of({"scenarios": disabled(), "events": {"url": "sqlite://"}}, base=tmp_path))
    runner, loop = web.AppRunner(app), asyncio.get_running_loop()
    await runner.setup()
    manager = runner.server
    assert manager is not None
    server = await loop.create_server(lambda: EdgeConnection(manager, loop=loop), "127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
    finally:
        server.close()
        await runner.cleanup()


# -- a plugin that is out of service


BROKEN = """
    from contextlib import asynccontextmanager

    from aiohttp import web

    from streamlab import Problem, Scenario, endpoint, hookimpl


    class Broken(Scenario):
        @hookimpl
        @asynccontextmanager
        async def lifespan(self, app):
            raise Problem(503, "the password of its database is missing")
            yield

        @endpoint("GET", "/broken")
        async def broken(self, request):
            "Never respond."
            return web.Response()


    @hookimpl
    def register_scenarios():
        return [Broken]
"""


def test_the_reason_of_a_failure_is_for_those_who_may_know_it(start: Callable[..., Running]) -> None:
    tokens = table("operator", "*") + table("user", "broken:read") + table("other", "ticker:read")
    server = start(tokens, broken=BROKEN)
    answers = [server.get("/broken", headers) for headers in ({}, *map(bearer, ("other", "user", "operator")))]
    assert [status for status, _, _ in answers] == [401, 403, 503, 503]
    assert ["password" in body.decode() for _, _, body in answers] == [False, False, False, True]


LOADED_PLUGINS = ("ticker",)
