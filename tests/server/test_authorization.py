"""Who may come in: tokens and their scopes, what belongs to whom, streams that end with their token, other origins."""

import hashlib
import hmac
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamlab.auth import EVERYBODY, Principal, Scope
from streamlab.config import Config
from streamlab.server.authorization import Authorization
from tests.support.connections import EventStream, read_all, read_until
from tests.support.servers import WITHOUT_MODEL, Running, run_streamlab, starting_in
from tests.support.tokens import EXPIRED, bearer, table

Start = Callable[..., Running]


def scopes(*texts: str) -> Principal:
    return Principal("somebody", tuple(map(Scope.parse, texts)))


# -- scopes


@pytest.mark.parametrize(
    ("text", "scenario", "action", "resource", "expected"),
    [
        ("export:read", "export", "read", "", True),
        ("export:read", "export", "read", "orders", True),
        ("export:read", "export", "write", "", False),
        ("export:read", "exports", "read", "", False),
        ("export:*", "export", "write", "orders", True),
        ("export:read:orders", "export", "read", "orders", True),
        ("export:read:orders", "export", "read", "orders2", False),
        ("export:read:orders", "export", "read", "", False),
        ("export:read:orders*", "export", "read", "orders2", True),
        ("file:read:reports/*", "file", "read", "reports/2026/a.csv", True),
        ("file:read:reports/*", "file", "read", "reports", False),
        ("file:read:a:b", "file", "read", "a:b", True),
        ("*:read", "logs", "read", "app", True),
        ("*:read", "logs", "write", "app", False),
        ("log*:read", "logs", "read", "app", True),
        ("*", "anything", "write", "whatever", True),
    ],
)
def test_a_scope_allows_what_it_names(text: str, scenario: str, action: Any, resource: str, expected: bool) -> None:
    assert scopes(text).may(scenario, action, resource) is expected
    assert str(Scope.parse(text)) in (text, f"{text}:*:*")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("export", "must be SCENARIO:ACTION, SCENARIO:ACTION:RESOURCE or \\*"),
        (":read", "must be SCENARIO"),
        ("export:list", "the action of 'export:list' must be read, write or \\*"),
        ("export:read:", "is empty; leave out the last colon"),
        ("exp*rt:read", "has a \\* that is not at the end"),
        ("export:read:*orders", "has a \\* that is not at the end"),
    ],
)
def test_a_scope_of_another_form_is_rejected_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Scope.parse(text)


def test_what_belongs_to_another_needs_a_scope_that_names_it() -> None:
    assert scopes("progress:read").may_use_of("somebody", "progress", "read", "0123")
    assert not scopes("progress:read").may_use_of("another", "progress", "read", "0123")
    assert scopes("progress:read:*").may_use_of("another", "progress", "read", "0123")
    assert not scopes("progress:read:*").may_use_of("another", "progress", "write", "0123")
    assert not scopes("logs:read").may_use_of("somebody", "progress", "read", "0123")
    assert EVERYBODY.may_use_of("another", "progress", "write", "0123")


# -- the configuration

SECRET = "slt_2_ilpJKyDAIN6KpzqnynSwzT_-vCcqMkdUFqCzXstXk"


@pytest.mark.parametrize("wrong", [{"sha256": SECRET}, {"token": SECRET}, {"allow": [SECRET]}, {"expires": SECRET}])
def test_a_token_that_is_written_where_its_hash_belongs_is_in_no_message(wrong: dict[str, Any]) -> None:
    """Messages of a reload are in the log, which others may read; and then the token is hashed and let in."""
    faults = Config.of({"auth": {"tokens": {"alice": {"sha256": "0" * 64, "allow": [], **wrong}}}}).faults
    assert "auth.tokens.alice" in str(faults)
    assert "slt_..." in str(faults)
    assert SECRET not in str(faults)


@pytest.mark.parametrize(
    ("tables", "fault"),
    [
        ({"tokens": {"a": {"sha256": "1234", "allow": []}}}, 'auth.tokens.a.sha256 = "1234" - String should match'),
        ({"tokens": {"a": {"sha256": "0" * 64}}}, "auth.tokens.a.allow - is required"),
        (
            {"tokens": {"a": {"sha256": "0" * 64, "allow": ["x"]}}},
            "auth.tokens.a.allow.0 = \"x\" - 'x' must be SCENARIO",
        ),
        ({"tokens": {"a b": {"sha256": "0" * 64, "allow": []}}}, "'a b' is no name: 1 to 64 letters"),
        (
            {"tokens": {"a": {"sha256": "0" * 64, "allow": [], "expires": datetime(2027, 1, 1)}}},
            "must have a time zone, as 2027-01-31T00:00:00Z",
        ),
        (
            {"tokens": {name: {"sha256": "0" * 64, "allow": []} for name in ("a", "b")}},
            "a and b have the same sha256: one token cannot be that of two principals",
        ),
        ({"open": True, "anonymous": ["ticker:read"]}, "open = true lets everybody do everything: remove it, or"),
        ({"token": {}}, "auth.token - unknown key; did you mean 'tokens'?"),
    ],
)
def test_a_wrong_table_is_a_fault_with_its_reason(tables: dict[str, Any], fault: str) -> None:
    (found,) = Config.of({"auth": tables}).faults
    assert fault in str(found)


def test_others_cannot_connect_before_it_says_what_they_may_do(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    for command in ("run", "check"):
        config.write_text('[server]\nhost = "0.0.0.0"\nport = 0\n')
        status, _, errors = run_streamlab(command, cwd=tmp_path, **WITHOUT_MODEL)
        assert status == 2
        assert (
            'server.host = "0.0.0.0" - others can connect to this address, and nothing says what they may do' in errors
        )
        assert "streamlab token NAME" in errors
        assert "open = true" in errors
    for auth in ("[auth]\nopen = true\n", table("alice", "logs:read"), "[auth]\nanonymous = []\nopen = false\n"):
        server = start(f'{auth}[server]\nhost = "0.0.0.0"\n')
        assert server.get("/health")[0] == 200


def test_a_token_for_every_scenario_that_never_expires_is_warned_of(start: Start, tmp_path: Path) -> None:
    later = datetime.now(UTC) + timedelta(days=1)
    tables = table("all", "*") + table("reader", "ticker:read", "*:read") + table("short", "*", expires=later)
    server = start('[auth]\nanonymous = ["*:read", "ticker:read"]\n' + tables + table("narrow", "ticker:*"))
    everybody = "is for every scenario, and for everybody: name the scenarios, or set open = true instead"
    reason = "is for every scenario, and the token never expires: name the scenarios, or set expires"
    expected = [
        f'{tmp_path}/config.toml: auth.anonymous = ["*:read"] - {everybody}',
        f'{tmp_path}/config.toml: auth.tokens.all.allow = ["*"] - {reason}',
        f'{tmp_path}/config.toml: auth.tokens.reader.allow = ["*:read"] - {reason}',
    ]
    assert re.findall(r"WARNING streamlab.server.app (.*auth.*)", server.log) == expected
    status, _, errors = run_streamlab("check", "--config", str(tmp_path / "config.toml"), cwd=tmp_path, **WITHOUT_MODEL)
    assert (status, errors.splitlines()) == (0, [f"warning: {line}" for line in expected])


# -- requests


CLOSED = (
    "[scenarios.export]\nsample_rows = 1000\n"
    + table("nobody")
    + table("everything", "*")
    + table("expired", "*", expires=EXPIRED)
    + table("orders", "export:read:users", "logs:read:demo", "file:read:reports/*", "ticker:read")
    + table("english", "hello:read:en")
    + table("operator", "site:read")
    + table("alice", "progress:*")
    + table("bob", "progress:*", "export:read:results")
    + table("auditor", "progress:read:*")
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = tmp_path_factory.mktemp("closed")
    for name in ("reports/2026.txt", "secret/salaries.txt", "notes.txt"):
        file = base / "var/files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    with starting_in(base) as start:
        yield start(CLOSED, tracebacks=False, hello=HELLO)


HELLO = """
    from enum import Enum

    from aiohttp import web
    from pydantic import BaseModel

    from streamlab import PRINCIPAL, Scenario, endpoint, hookimpl


    class Language(str, Enum):
        ENGLISH = "en"
        GERMAN = "de"


    class Languages(BaseModel):
        language: list[Language] = [Language.ENGLISH]


    class Hello(Scenario):
        @endpoint("GET", "/hello/languages", query=Languages, resource="language")
        async def languages(self, request: web.Request, query: Languages) -> web.Response:
            "Greet in languages."
            return web.Response(text=" ".join(one.value for one in query.language))

        @endpoint("GET", "/hello")
        async def hello(self, request: web.Request) -> web.Response:
            "Greet who asks."
            return web.Response(text=request[PRINCIPAL].name)


    @hookimpl
    def register_scenarios():
        return [Hello]
"""


def test_a_plugin_is_protected_without_a_line_of_its_own(server: Running) -> None:
    assert server.get("/hello")[0] == 401
    assert server.get("/hello", bearer("nobody"))[0] == 403
    assert server.get("/hello", bearer("everything"))[::2] == (200, b"everything")


def test_every_value_of_a_parameter_is_a_resource_and_so_is_its_default(server: Running) -> None:
    for query, expected in (("", 200), ("?language=en", 200), ("?language=de", 403), ("?language=en&language=de", 403)):
        assert server.get(f"/hello/languages{query}", bearer("english"))[0] == expected, query
    assert server.get("/hello", bearer("english"))[0] == 403


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/export/users/csv?limit=1", 200),
        ("/export/results/csv?limit=1", 403),
        ("/stream/database-results?limit=1", 403),
        ("/stream/live-logs?source=demo&limit=1", 200),
        ("/stream/live-logs?limit=1", 200),
        ("/stream/live-logs?source=server&limit=1", 403),
        ("/logs/download?source=server", 403),
        ("/files/reports/2026.txt", 200),
        ("/files/reports/", 200),
        ("/files/notes.txt", 403),
        ("/files/secret/", 403),
        ("/files/secret/salaries.txt", 403),
        ("/files/secret/caf%E9.txt", 403),
        ("/files/reports/../secret/salaries.txt", 404),
        ("/files/reports/%2e%2e/secret/salaries.txt", 404),
        ("/stream/stock-ticker?limit=1", 200),
        ("/process/kinds", 403),
        ("/metrics", 403),
    ],
)
def test_a_scope_reaches_its_resource_only(server: Running, path: str, status: int) -> None:
    assert server.get(path, bearer("orders"))[0] == status
    assert server.get(path, {"Sec-Fetch-Mode": "navigate", **bearer("orders")})[0] == status


def test_lists_have_what_the_client_may_read(server: Running) -> None:
    def read(path: str, name: str) -> Any:
        return json.loads(server.get(path, {"Accept": "application/json", **bearer(name)})[2])

    assert [entry["name"] for entry in read("/export", "orders")["exports"]] == ["users"]
    assert len(read("/export", "everything")["exports"]) > 1
    assert [entry["name"] for entry in read("/files/", "orders")["entries"]] == ["reports"]
    assert {"notes.txt", "reports", "secret"} <= {entry["name"] for entry in read("/files/", "everything")["entries"]}
    paths = read("/openapi.json", "orders")["paths"].keys()
    assert {"/export/{name}", "/stream/stock-ticker", "/health"} <= paths
    assert not {"/metrics", "/process/tasks", "/v1/models", "/hello"} & paths
    index = server.get("/", bearer("orders"))[2].decode()
    assert "/stream/stock-ticker" in index
    assert "/process/tasks" not in index


def test_pages_of_a_list_begin_with_no_name_that_the_client_may_not_read(server: Running) -> None:
    """The folder has `notes.txt`, `reports` and `secret`: what is skipped must not show where a page ends."""
    for query, expected in (("limit=1", ["reports"]), ("limit=1&after=reports", []), ("limit=1&after=a", ["reports"])):
        status, _, body = server.get(f"/files/?{query}", {"Accept": "application/json", **bearer("orders")})
        page = json.loads(body)
        assert (status, [entry["name"] for entry in page["entries"]], page["next"]) == (200, expected, None), query


def test_health_names_scenarios_for_those_who_may_know(server: Running) -> None:
    assert json.loads(server.get("/health")[2]) == {"status": "ok"}
    assert json.loads(server.get("/health", bearer("orders"))[2]) == {"status": "ok"}
    assert "scenarios" in json.loads(server.get("/health", bearer("operator"))[2])
    assert server.get("/metrics", bearer("operator"))[0] == 200


def test_a_refused_request_is_rejected_before_its_parameters_are_read(server: Running) -> None:
    path = "/export/users/csv?unknown=1"
    assert [server.get(path, headers)[0] for headers in ({}, bearer("nobody"), bearer("orders"))] == [401, 403, 422]


async def test_every_known_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that ends at the first difference, or at the token that is right, would tell parts of a hash."""
    compared: list[tuple[str, str]] = []

    def compare(known: str, given: str) -> bool:
        compared.append((known, given))
        return hmac.compare_digest(known, given)

    digests = {name: hashlib.sha256(f"{name}-secret".encode()).hexdigest() for name in ("alice", "bob", "carol")}
    tokens = {name: {"sha256": digest, "allow": []} for name, digest in digests.items()}
    authorization = Authorization(Config.of({"auth": {"tokens": tokens}}))
    monkeypatch.setattr("streamlab.server.authorization.hmac", SimpleNamespace(compare_digest=compare))
    assert (await authorization.identify("alice-secret")).name == "alice"
    assert compared == [(digest, digests["alice"]) for digest in digests.values()]


# -- what belongs to whom


def submitted(
    server: Running, client: str, /, kind: str = "rehearsal", **parameters: Any
) -> tuple[int, dict[str, Any]]:
    body = json.dumps({"kind": kind, "parameters": parameters}).encode()
    headers = {"Content-Type": "application/json", **bearer(client)}
    status, _, answer = server.get("/process/tasks", headers, method="POST", body=body)
    return status, json.loads(answer)


def test_a_task_belongs_to_who_started_it(server: Running) -> None:
    status, task = submitted(server, "alice", steps=1000, delay=1)
    assert status == 202
    url = task["url"]
    for name, expected in (("alice", 200), ("bob", 404), ("auditor", 200), ("everything", 200), ("nobody", 403)):
        assert server.get(url, bearer(name))[0] == expected, name
        listed = server.get("/process/tasks", bearer(name))
        if listed[0] == 200:
            assert (task["id"] in listed[2].decode()) == (expected == 200), name
    unknown = server.get(f"/process/tasks/{task['id'][:-1]}{'0' if task['id'][-1] != '0' else '1'}", bearer("bob"))
    assert server.get(url, bearer("bob"))[2] == unknown[2]  # nobody learns that it exists
    assert server.get(url, bearer("bob"), method="DELETE")[0] == 404
    assert server.get(url, bearer("auditor"), method="DELETE")[0] == 403
    with EventStream(server, f"/process/long-task?last_event_id={task['id']}:1-1", headers=bearer("bob")) as stream:
        assert stream.status == 404
    with EventStream(server, url, headers=bearer("alice")) as stream:
        assert stream.status == 200
    assert server.get(url, bearer("alice"), method="DELETE")[0] == 202


def test_a_task_is_no_way_around_a_scope(server: Running) -> None:
    assert submitted(server, "bob", "export", name="results", limit=1)[0] == 202
    status, problem = submitted(server, "bob", "export", name="users")
    assert (status, problem["detail"]) == (403, "bob needs the scope export:read:users for this.")
    assert submitted(server, "alice", "checksum", path="secret/salaries.txt")[0] == 403
    status, problem = submitted(server, "bob", "report")
    assert (status, problem["detail"]) == (403, "bob needs the scope export:read:users for this.")
    assert server.get("/process/long-task", bearer("bob"))[0] == 403


@pytest.mark.parametrize(
    ("kind", "parameters", "scope"),
    [
        ("checksum", {"path": "2*3/sums.txt"}, "file:read:2*3/sums.txt"),
        ("export", {"name": "*"}, "export:read:*"),
        ("export", {"name": ""}, "export:read"),
        ("export", {"name": "results:*"}, "export:read:results:*"),
    ],
)
def test_a_name_of_any_characters_is_no_pattern(server: Running, kind: str, parameters: Any, scope: str) -> None:
    status, problem = submitted(server, "bob", kind, **parameters)
    assert (status, problem["detail"]) == (403, f"bob needs the scope {scope} for this.")
    assert submitted(server, "everything", kind, **parameters)[0] == 202


def test_an_idempotency_key_is_that_of_its_client(server: Running) -> None:
    ids = []
    for name in ("alice", "bob", "alice"):
        body = json.dumps({"kind": "rehearsal", "parameters": {"steps": 1, "delay": 0}}).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": "the same", **bearer(name)}
        status, _, answer = server.get("/process/tasks", headers, method="POST", body=body)
        assert status == 202
        ids.append(json.loads(answer)["id"])
    assert ids[0] == ids[2] != ids[1]


# -- streams end with what let them in


def test_a_stream_ends_when_its_token_expires_and_loses_nothing(start: Start) -> None:
    expires = datetime.now(UTC) + timedelta(seconds=2)
    server = start(table("short", "ticker:read", expires=expires) + table("long", "ticker:read"))
    with EventStream(server, "/stream/stock-ticker", headers=bearer("short")) as stream:
        events = list(stream)
        ended = time.time()
    assert 0 <= ended - expires.timestamp() < 1
    *prices, last = events
    assert (last.event, last.id) == ("unauthorized", f"{prices[-1].id}.unauthorized")
    assert server.get("/stream/stock-ticker", bearer("short"))[0] == 401
    with EventStream(server, "/stream/stock-ticker", last.id, headers=bearer("long")) as stream:
        following = stream.take(3)
    offsets = [int(event.id.partition("-")[2]) for event in [*prices, *following]]
    assert offsets == list(range(offsets[0], offsets[0] + len(offsets)))
    assert "outcome=unauthorized" in server.wait_for_log("outcome=unauthorized")


SLOW = """
    import asyncio
    import contextlib

    from aiohttp import web

    from streamlab import Scenario, endpoint, hookimpl, open_event_stream, open_stream


    class Slow(Scenario):
        @endpoint("GET", "/slow", sends="application/octet-stream")
        async def slow(self, request: web.Request) -> web.StreamResponse:
            "Send a byte, and then nothing for a long time."
            async with open_stream(request, "application/octet-stream") as stream:
                await stream.write(b"x")
                await asyncio.sleep(3600)
            return stream

        @endpoint("GET", "/stubborn", sends="text/event-stream")
        async def stubborn(self, request: web.Request) -> web.StreamResponse:
            "Send events, whatever happens."
            async with open_event_stream(request) as stream:
                for number in range(1_000_000):
                    await stream.send({"number": number})
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(0.02)
            return stream

        @endpoint("GET", "/bare", sends="application/octet-stream")
        async def bare(self, request: web.Request) -> web.StreamResponse:
            "Send the same without the core."
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"x")
            await asyncio.sleep(3600)
            return response

        @endpoint("GET", "/socket", sends="application/octet-stream")
        async def socket(self, request: web.Request) -> web.WebSocketResponse:
            "Send each message back."
            response = web.WebSocketResponse()
            await response.prepare(request)
            async for message in response:
                await response.send_bytes(message.data)
            return response


    @hookimpl
    def register_scenarios():
        return [Slow]
"""


def test_a_reload_ends_the_streams_that_lost_their_scope_and_no_others(start: Start, tmp_path: Path) -> None:
    before = table("alice", "slow:read", "ticker:read") + table("bob", "ticker:read")
    server = start(before, slow=SLOW)
    with (
        EventStream(server, "/stream/stock-ticker", headers=bearer("alice")) as lost,
        EventStream(server, "/stream/stock-ticker", headers=bearer("bob")) as kept,
        server.send(
            f"GET /slow HTTP/1.1\nHost: localhost:{{port}}\nAuthorization: {bearer('alice')['Authorization']}"
        ) as cut,
    ):
        kept.take(1)
        while b"\r\n1\r\nx\r\n" not in (received := cut.recv(65536)):
            assert received
        (tmp_path / "config.toml").write_text("[auth.tokens]\nbroken = 1\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("the configuration is not reloaded: what was in force before still is")
        assert lost.take(1)[0].event == ""
        (tmp_path / "config.toml").write_text(table("alice", "other:read") + table("bob", "ticker:read"))
        server.process.send_signal(signal.SIGHUP)
        assert list(lost)[-1].event == "unauthorized"
        assert cut.recv(100) == b""  # without the last chunk
        server.wait_for_log("reloaded")
        assert all(event.event == "" for event in kept.take(3))
    assert server.get("/stream/stock-ticker", bearer("alice"))[0] == 403


def test_a_stream_whose_handler_goes_on_is_cut(start: Start, tmp_path: Path) -> None:
    server = start(table("alice", "slow:read"), slow=SLOW)
    with EventStream(server, "/stubborn", headers=bearer("alice")) as stream:
        stream.take(1)
        (tmp_path / "config.toml").write_text(table("alice", "ticker:read"))
        sent = time.monotonic()
        server.process.send_signal(signal.SIGHUP)
        assert {event.event for event in stream} == {""}
    assert time.monotonic() - sent < 2


def test_a_web_socket_and_a_response_without_the_core_are_cut_with_their_token(start: Start, tmp_path: Path) -> None:
    server = start(table("alice", "slow:read") + table("bob", "ticker:read"), slow=SLOW)
    key = "MDEyMzQ1Njc4OWFiY2RlZg=="
    upgrade = f"Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: {key}"

    def opened(path: str, name: str, fields: str = "") -> socket.socket:
        authorization = bearer(name)["Authorization"]
        return server.send(f"GET {path} HTTP/1.1\nHost: localhost\nAuthorization: {authorization}\n{fields}")

    with opened("/socket", "bob", upgrade) as rejected:
        assert rejected.recv(100).startswith(b"HTTP/1.1 403 ")
    with opened("/socket", "alice", upgrade) as messages, opened("/bare", "alice") as bare:
        assert read_until(messages, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        messages.sendall(b"\x82\x81\0\0\0\0x")
        assert messages.recv(10) == b"\x82\x01x"
        read_until(bare, b"x")
        (tmp_path / "config.toml").write_text(table("alice", "ticker:read"))
        server.process.send_signal(signal.SIGHUP)
        assert b"\r\n0\r\n" not in read_all(bare)
        assert read_all(messages) == b""


def test_a_stream_of_another_ends_when_no_scope_names_it_any_more(start: Start, tmp_path: Path) -> None:
    operator = table("operator", "progress:*:*")
    tokens = table("alice", "progress:*") + table("auditor", "progress:read:*") + table("bob", "progress:*")
    server = start(tokens + operator + table("removed", "progress:*"))
    of_removed = submitted(server, "removed", steps=1000, delay=60)[1]["url"]
    url = submitted(server, "alice", steps=1000, delay=60)[1]["url"]
    bobs = submitted(server, "bob", steps=1000, delay=60)[1]["url"]
    with (
        EventStream(server, url, headers=bearer("alice")) as own,
        EventStream(server, url, headers=bearer("auditor")) as of_another,
        EventStream(server, bobs, headers=bearer("bob")) as without_scope,
    ):
        for stream in (own, of_another, without_scope):
            stream.take(1)
        config = table("alice", "progress:*") + table("auditor", "progress:read") + table("bob", "progress:write")
        (tmp_path / "config.toml").write_text(config + operator)
        server.process.send_signal(signal.SIGHUP)
        assert [event.event for event in of_another][-1] == "unauthorized"
        assert [event.event for event in without_scope][-1] == "unauthorized"
        assert server.get(url, bearer("alice"), method="DELETE")[0] == 202
        assert [event.event for event in own][-1] == "end"
    assert server.get(of_removed, bearer("removed"))[0] == 401
    assert json.loads(server.get(of_removed, bearer("operator"))[2])["state"] == "running"
    assert server.get(of_removed, bearer("operator"), method="DELETE")[0] == 202


# -- limits of one client


def test_a_client_has_a_limited_number_of_streams(start: Start) -> None:
    server = start("[limits]\nstreams_per_client = 2\n" + table("alice", "ticker:read") + table("bob", "ticker:read"))
    with EventStream(server, "/stream/stock-ticker", headers=bearer("alice")) as first:
        with EventStream(server, "/stream/stock-ticker", headers=bearer("alice")):
            status, headers, body = server.get("/stream/stock-ticker", bearer("alice"))
            assert (status, headers["retry-after"]) == (429, "5")
            assert headers["ratelimit-policy"] == '"streams";q=2;qu="concurrent-requests"'
            assert headers["ratelimit"] == '"streams";r=0'
            assert json.loads(body)["detail"] == "This client has 2 streams open, its maximum."
            assert server.get("/stream/stock-ticker?limit=1", bearer("bob"))[0] == 200
        first.take(1)
        server.wait_for_log("client left")
        assert server.get("/stream/stock-ticker?limit=1", bearer("alice"))[0] == 200


# -- pages of other origins


ORIGIN = "https://app.example.org"


def test_a_page_of_a_listed_origin_may_use_the_server_and_no_other_may(start: Start) -> None:
    server = start(f'[cors]\norigins = ["{ORIGIN}"]\n' + table("alice", "ticker:read"), hello=HELLO)
    preflight = {
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization,last-event-id",
    }
    status, headers, _ = server.get("/stream/stock-ticker", {"Origin": ORIGIN, **preflight}, method="OPTIONS")
    assert status == 204
    assert headers["access-control-allow-origin"] == ORIGIN
    assert "GET" in headers["access-control-allow-methods"]
    assert {"authorization", "last-event-id"} <= set(headers["access-control-allow-headers"].lower().split(", "))
    assert "Origin" in headers["vary"]
    status, headers, _ = server.get("/stream/stock-ticker?limit=1", {"Origin": ORIGIN, **bearer("alice")})
    assert (status, headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "access-control-allow-credentials" not in headers
    assert "Retry-After" in headers["access-control-expose-headers"]
    assert server.get("/hello", {"Origin": ORIGIN})[1]["access-control-allow-origin"] == ORIGIN  # the 401, too
    for origin in ("https://app.example.org.evil", "null", "http://app.example.org"):
        status, headers, _ = server.get("/stream/stock-ticker", {"Origin": origin, **preflight}, method="OPTIONS")
        assert status == 405
        assert "access-control-allow-origin" not in headers
        headers = server.get("/stream/stock-ticker?limit=1", {"Origin": origin, **bearer("alice")})[1]
        assert "access-control-allow-origin" not in headers
        assert "Origin" in headers["vary"]


def test_every_origin_and_cookies_exclude_each_other() -> None:
    (fault,) = Config.of({"cors": {"origins": ["*"], "credentials": True}}).faults
    assert "credentials = true needs origins by name" in str(fault)
    (fault,) = Config.of({"cors": {"origins": ["https://a.example/path"]}}).faults
    assert "must be an origin, as https://app.example.org, without a path" in str(fault)


# -- the command line


def test_a_new_token_is_printed_once_and_its_lines_let_it_in(start: Start, tmp_path: Path) -> None:
    status, printed, _ = run_streamlab("token", "alice", "--allow", "ticker:read", "--days", "1", cwd=tmp_path)
    assert status == 0
    secret, _, lines = printed.partition("\n\n")
    assert re.fullmatch(r"slt_[A-Za-z0-9_-]{43}", secret)
    assert secret not in lines
    server = start(lines)
    assert server.get("/stream/stock-ticker?limit=1", {"Authorization": f"Bearer {secret}"})[0] == 200
    other = run_streamlab("token", "alice", "--allow", "ticker:read", cwd=tmp_path)[1]
    assert other != printed
    follow = ("follow", "/stream/stock-ticker", "--limit", "1", "--no-reconnect", "--url", server.url)
    assert run_streamlab(*follow, cwd=tmp_path)[0] == 1
    assert run_streamlab(*follow, cwd=tmp_path, STREAMLAB_TOKEN=secret)[0] == 0
    (tmp_path / "token").write_text(f"{secret}\n")
    assert run_streamlab(*follow, "--token", f"@{tmp_path}/token", cwd=tmp_path)[0] == 0
    assert run_streamlab("token", "alice", "--allow", "ticker:watch", cwd=tmp_path)[0] == 2


def test_the_token_of_the_variable_goes_to_the_server_at_url_only(start: Start, tmp_path: Path) -> None:
    server = start(table("alice", "ticker:read"))
    stream = f"{server.url}/stream/stock-ticker"
    follow = ("follow", stream, "--limit", "1", "--no-reconnect")
    assert run_streamlab(*follow, cwd=tmp_path, STREAMLAB_TOKEN="alice-secret")[0] == 1
    assert run_streamlab(*follow, "--url", server.url, cwd=tmp_path, STREAMLAB_TOKEN="alice-secret")[0] == 0
    assert run_streamlab(*follow, "--token", "alice-secret", cwd=tmp_path)[0] == 0
