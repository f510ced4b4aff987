"""Every route of the plugins that ship, with every kind of credentials: the exact status, and that nothing ran."""

import contextlib
import http.client
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.connections import EventStream
from tests.support.fake_upstream import DONE, FINISH, MODEL, Exchange, FakeUpstream, event, fake_upstream
from tests.support.servers import Running, command, starting_in
from tests.support.tokens import EXPIRED, bearer, table

PUBLIC = {"GET /", "GET /assets/{name}", "GET /docs", "GET /health", "GET /lab", "GET /openapi.json"}
"""The routes that need no credentials. A new one makes the tests red until it is listed here, on purpose."""

SIGN_IN = {f"{method} /auth/session" for method in ("GET", "POST", "DELETE")} | {"POST /auth/tickets"}
"""The routes of the sign-in, which are public: see test_sessions.py."""

PROMPT = {"prompt": "Hello"}
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
TASK = {"kind": "rehearsal", "parameters": {"steps": 1, "delay": 0}}


@dataclass(frozen=True)
class Row:
    """A request to a route, the scope that it needs, and the status with it."""

    scope: str
    target: str
    """The path, with `{task}` and `{generation}` for those of alice."""
    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    owner: int | None = None
    """The status for alice, whose resource it is; `status` is that for all others."""


REPORT = "/demo/comparison/report?rows=100&repeats=1"

ROWS = {
    "GET /metrics": Row("site:read", "/metrics"),
    "GET /demo/comparison/buffered": Row("comparison:read", "/demo/comparison/buffered?rows=1"),
    "GET /demo/comparison/streamed": Row("comparison:read", "/demo/comparison/streamed?rows=1"),
    "GET /demo/comparison/report": Row("comparison:write", REPORT),
    "GET /export": Row("export:read", "/export"),
    "GET /export/{name}": Row("export:read", "/export/users?limit=1"),
    "GET /export/{name}/{format}": Row("export:read", "/export/users/csv?limit=1"),
    "GET /stream/database-results": Row("export:read", "/stream/database-results?limit=1"),
    "GET /download/large-file": Row("file:read", "/download/large-file?size_mb=1"),
    "GET /files": Row("file:read", "/files", headers={"Accept": "application/json"}),
    "GET /files/{path}": Row("file:read", "/files/notes.txt"),
    "GET /ai/chat-stream": Row("llm:write", "/ai/chat-stream?prompt=Hello"),
    "POST /ai/chat-stream": Row("llm:write", "/ai/chat-stream", body=PROMPT),
    "GET /ai/chat-stream-sse": Row("llm:write", "/ai/chat-stream-sse?prompt=Hello"),
    "POST /ai/chat-stream-sse": Row("llm:write", "/ai/chat-stream-sse", body=PROMPT),
    "GET /ai/generations/{id}": Row("llm:read", "/ai/generations/{generation}", 404, owner=200),
    "DELETE /ai/generations/{id}": Row("llm:write", "/ai/generations/{generation}", 404, owner=204),
    "GET /v1/models": Row("llm:read", "/v1/models"),
    "GET /v1/models/{id}": Row("llm:read", f"/v1/models/{MODEL}"),
    "POST /v1/chat/completions": Row("llm:write", "/v1/chat/completions", body={**CHAT, "stream": True}),
    "POST /v1/completions": Row("llm:write", "/v1/completions", body={"prompt": "x", "stream": True}),
    "POST /v1/embeddings": Row("llm:write", "/v1/embeddings", 502, body={"input": "x"}),
    "GET /stream/live-logs": Row("logs:read", "/stream/live-logs"),
    "GET /logs/download": Row("logs:read", "/logs/download"),
    "GET /process/kinds": Row("progress:read", "/process/kinds"),
    "GET /process/tasks": Row("progress:read", "/process/tasks"),
    "POST /process/tasks": Row("progress:write", "/process/tasks", 202, body=TASK),
    "GET /process/tasks/{id}": Row("progress:read", "/process/tasks/{task}", 404, owner=200),
    "DELETE /process/tasks/{id}": Row("progress:write", "/process/tasks/{task}", 404, owner=202),
    "GET /process/long-task": Row("progress:write", "/process/long-task?kind=rehearsal&steps=1&delay=0"),
    "PUT /v1/stream/{path}": Row("streams:write", "/v1/stream/new", 201, headers={"Content-Type": "application/json"}),
    "POST /v1/stream/{path}": Row("streams:write", "/v1/stream/new", 204, body={}),
    "GET /v1/stream/{path}": Row("streams:read", "/v1/stream/new"),
    "GET /v1/streams": Row("streams:read", "/v1/streams?stream=new"),
    "DELETE /v1/stream/{path}": Row("streams:write", "/v1/stream/new", 204),
    "GET /stream/stock-ticker": Row("ticker:read", "/stream/stock-ticker"),
    "POST /stream/stock-ticker": Row("ticker:write", "/stream/stock-ticker", 202, body={"symbol": "ACME", "price": 1}),
}
"""A request to every route that needs credentials."""

OWNED = {route: row for route, row in ROWS.items() if row.owner is not None}

SCOPES = sorted({row.scope for row in ROWS.values()})


def holder(scope: str) -> str:
    """Return the name of the principal that has this scope only."""
    return f"only-{scope.replace(':', '-')}"


def stranger(scope: str) -> str:
    """Return the name of the principal that has every scope but this one."""
    return f"all-but-{scope.replace(':', '-')}"


CONFIG = f"""
    [scenarios.comparison]
    max_reports = 10
    [scenarios.export]
    sample_rows = 100
    [scenarios.file]
    [scenarios.logs]
    demo = false
    server = false
    [scenarios.logs.sources.first]
    path = "first.log"
    [scenarios.logs.sources.second]
    path = "second.log"
    [scenarios.progress]
    [scenarios.streams]
    [scenarios.ticker]
    source = "push"
    [scenarios.llm]
    model = "{MODEL}"
    url = """

TOKENS = (
    table("everything", "*")
    + table("expired", "*", expires=EXPIRED)
    + table("alice", "progress:*", "llm:*", "logs:read")
    + table("auditor", "progress:read:*", "llm:read:*")
    + table("writer", "progress:write", "llm:write")
    + table("narrow", "export:read:users", "file:read:reports/*", "logs:read:second", "progress:read",
            "progress:write:rehearsal", f"llm:*:{MODEL}")
    + table("other-model", "llm:*:large-1")
    + table("results", "export:read:results")
    + table("logs-with-s", "logs:read:s*")
    + "".join(table(holder(scope), scope) for scope in SCOPES)
    + "".join(table(stranger(scope), *(other for other in SCOPES if other != scope)) for scope in SCOPES)
)  # fmt: skip


def respond(exchange: Exchange) -> None:
    """Respond with two tokens; to the prompt of alice, only once her client has stopped it."""
    exchange.begin()
    exchange.send_events(event("a"), event("b"))
    if exchange.prompt == "never ends":
        exchange.wait_until_closed(60)
    else:
        exchange.send_events(FINISH, DONE)
        exchange.end()


@dataclass
class Served:
    """The server with all plugins that ship, what a request to it needs, and what it has done."""

    server: Running
    upstream: FakeUpstream
    task: str
    generation: str

    def status(self, method: str, row: Row, headers: Mapping[str, str]) -> tuple[int, dict[str, str], Any]:
        """Send the request of a row; return status, headers and, for an error, the document. No stream is read."""
        body = None if row.body is None else json.dumps(row.body).encode()
        target = row.target.format(task=self.task, generation=self.generation)
        fields = {**({"Content-Type": "application/json"} if body else {}), **row.headers, **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, target, body=body, headers=fields)
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            is_error = response.status >= 400 and method != "HEAD"
            return response.status, fields, json.loads(response.read()) if is_error else None

    def read(self, path: str, name: str) -> Any:
        """Return the JSON document that a principal gets."""
        status, _, body = self.server.get(path, {"Accept": "application/json", **bearer(name)})
        assert status == 200, (path, status, body)
        return json.loads(body)

    def done(self) -> dict[str, Any]:
        """Return everything that a request can have started or written."""
        metrics = self.server.get("/metrics", bearer("everything"))[2].decode().splitlines()
        counted = re.compile(r"streamlab_(streams|open_streams|stream_bytes|tasks|llm_|followers)[^ ]*")
        with contextlib.closing(sqlite3.connect(self.server.base / "var/streamlab.db")) as database:
            query = "SELECT name, max(offset), count(*) FROM channels JOIN events ON id = channel GROUP BY name"
            events = sorted(database.execute(query))
        return {
            "metrics": [line for line in metrics if counted.match(line)],
            "events": events,
            "tasks": [task["id"] for task in self.read("/process/tasks", "everything")["tasks"]],
            "requests of the model": len(self.upstream.exchanges),
            "files": sorted(str(path) for path in self.server.base.glob("var/**/*") if "streamlab." not in path.name),
        }

    def rejected(self) -> dict[tuple[str, str], int]:
        """Return the number of rejected requests by scenario and status, as /metrics counts them."""
        text = self.server.get("/metrics", bearer("everything"))[2].decode()
        pattern = r'streamlab_rejected_requests_total\{scenario="(\w+)",status="(\d+)"\} (\d+)'
        return {(scenario, status): int(count) for scenario, status, count in re.findall(pattern, text)}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tmp_path_factory.mktemp("matrix")
    for name in ("first", "second"):
        (base / f"{name}.log").write_text("".join(f"{name} {number}\n" for number in range(5)))
    for name in ("reports/2026.txt", "secret/salaries.txt", "notes.txt"):
        file = base / "var/files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    with fake_upstream({"default": respond}) as upstream, starting_in(base) as start:
        server = start(f'{CONFIG}"{upstream.url}"\n{TOKENS}')
        served = Served(server, upstream, "", "")
        with EventStream(server, "/stream/live-logs?source=second&tail=5", headers=bearer("alice")) as lines:
            lines.take(5)  # the logs have been read
        task = {"kind": "rehearsal", "parameters": {"steps": 1000, "delay": 60}}
        body, headers = json.dumps(task).encode(), {"Content-Type": "application/json", **bearer("alice")}
        served.task = json.loads(server.get("/process/tasks", headers, method="POST", body=body)[2])["id"]
        with EventStream(server, "/ai/chat-stream-sse?prompt=never%20ends", headers=bearer("alice")) as tokens:
            assert [token.event for token in tokens.take(3)] == ["generation", "token", "token"]
            served.generation = tokens.headers["location"].rpartition("/")[2]
        with EventStream(server, f"/process/tasks/{served.task}", headers=bearer("alice")) as steps:
            steps.take(1)
        server.wait_for_log("client left")
        yield served


def documented(served: Served) -> set[str]:
    """Return the routes in the API document for a client that may do everything."""
    paths = served.read("/openapi.json", "everything")["paths"]
    return {f"{method.upper()} {template}" for template, methods in paths.items() for method in methods}


def verbs(route: str) -> tuple[str, ...]:
    """Return the methods that a route serves: GET also as HEAD."""
    method = route.partition(" ")[0]
    return (method, "HEAD") if method == "GET" else (method,)


def test_every_route_is_either_public_on_purpose_or_in_the_matrix(served: Served) -> None:
    assert documented(served) == PUBLIC | SIGN_IN | ROWS.keys()
    for route in PUBLIC:
        target = route.partition(" ")[2].format(name="site.css")
        for method in verbs(route):
            assert served.server.get(target, method=method)[0] == 200, route
        assert served.server.get(target, bearer("wrong"))[0] == 401  # wrong credentials are an error everywhere


def test_without_the_scope_every_route_is_rejected_and_nothing_runs(served: Served) -> None:
    before, counted = served.done(), served.rejected()
    expected = dict(counted)
    for route, row in ROWS.items():
        scenario = row.scope.partition(":")[0]
        needed = re.escape(row.scope)
        for credentials, status, challenge in (
            ({}, 401, ""),
            ({"Authorization": "Basic YWxpY2U6c2VjcmV0"}, 401, ', error="invalid_request"'),
            ({"Authorization": "Bearer wrong-secret"}, 401, ', error="invalid_token"'),
            (bearer("expired"), 401, ', error="invalid_token"'),
            (bearer(stranger(row.scope)), 403, f', error="insufficient_scope", scope="{needed}(:[^"]+)?"'),
        ):
            for method in verbs(route):
                given, headers, problem = served.status(method, row, credentials)
                assert given == status, (method, route, credentials, problem)
                assert re.fullmatch(f'Bearer realm="streamlab"{challenge}', headers["www-authenticate"]), route
                if problem is not None:
                    is_openai = "/v1/" in route and "/v1/stream" not in route
                    assert "error" in problem if is_openai else problem["status"] == status
                expected[scenario, str(status)] = expected.get((scenario, str(status)), 0) + 1
    assert served.done() == before
    assert served.rejected() == expected


def changed(id: str) -> str:  # noqa: A002
    """Return an id that differs from another in its last digit."""
    return id[:-1] + ("1" if id[-1] == "0" else "0")


def test_what_belongs_to_another_does_not_exist_and_nothing_happens_to_it(served: Served) -> None:
    before = served.done()
    for route, row in OWNED.items():
        for name in (holder(row.scope), "narrow"):
            for method in verbs(route):
                assert served.status(method, row, bearer(name))[0] == 404, (method, route, name)
        absent = row.target.format(task=changed(served.task), generation=changed(served.generation))
        unknown = Row(row.scope, absent)
        method = route.partition(" ")[0]
        other = served.status(method, row, bearer("narrow"))[2]
        assert other == served.status(method, unknown, bearer("narrow"))[2]  # nobody learns that it exists
    # The same by the id of an event, as a client reconnects.
    ids = (f"{served.task}:1-1", f"{served.generation}:1-1")
    for path, id in zip(("/process/long-task", "/ai/chat-stream-sse?prompt=Hello"), ids, strict=True):  # noqa: A001
        for position in ({"Last-Event-ID": id}, {}):
            target = path if position else f"{path}{'&' if '?' in path else '?'}last_event_id={id}"
            with EventStream(served.server, target, headers={**position, **bearer("narrow")}) as stream:
                if path == "/process/long-task":
                    assert stream.status == 404
                else:
                    assert [one.event for one in stream] == ["gap", "end"]
    for path in ("/process/tasks/{task}", "/ai/generations/{generation}"):
        row = Row("", path, headers={"Accept": "text/event-stream"})
        assert served.status("GET", row, bearer("auditor"))[0] == 200
        assert served.status("DELETE", row, bearer("auditor"))[0] == 403
    after = served.done()
    assert {name: after[name] for name in ("events", "tasks", "requests of the model", "files")} == {
        name: before[name] for name in ("events", "tasks", "requests of the model", "files")
    }


def test_an_id_of_one_channel_opens_no_other(served: Served) -> None:
    with EventStream(served.server, "/stream/live-logs?source=first&tail=5", headers=bearer("alice")) as lines:
        first = lines.take(5)
    assert "first 4" in first[-1].data
    for after in (first[0].id, f"{first[0].id}.unauthorized"):
        path = "/stream/live-logs?source=second&tail=5&limit=5"
        with EventStream(served.server, path, after, headers=bearer("narrow")) as lines:
            assert lines.status == 200
            assert not [line for line in lines if "first" in line.data]
        with EventStream(served.server, "/stream/live-logs?source=first", after, headers=bearer("narrow")) as lines:
            assert lines.status == 403


@pytest.mark.parametrize(
    ("method", "target", "name", "status"),
    [
        ("GET", "/export/users/csv?limit=1", "narrow", 200),
        ("GET", "/export/results/csv?limit=1", "narrow", 403),
        ("GET", "/export/results", "narrow", 403),
        ("GET", "/export/unknown", "narrow", 403),
        ("GET", "/stream/database-results?limit=1", "narrow", 403),
        ("GET", "/files/reports/2026.txt", "narrow", 200),
        ("GET", "/files/reports/", "narrow", 200),
        ("GET", "/files/secret/", "narrow", 403),
        ("GET", "/files/secret/salaries.txt", "narrow", 403),
        ("GET", "/files/unknown.txt", "narrow", 403),
        ("GET", "/download/large-file?size_mb=1", "narrow", 403),
        ("GET", "/stream/live-logs?source=second", "narrow", 200),
        ("GET", "/stream/live-logs?source=first", "narrow", 403),
        ("GET", "/stream/live-logs?source=unknown", "narrow", 403),
        ("GET", "/stream/live-logs", "narrow", 403),
        ("GET", "/logs/download?source=second", "narrow", 200),
        ("GET", "/logs/download?source=first", "narrow", 403),
        ("GET", "/process/long-task?kind=rehearsal&steps=1&delay=0", "narrow", 200),
        ("GET", "/process/long-task?kind=checksum&path=notes.txt", "narrow", 403),
        ("GET", "/process/long-task", "narrow", 403),
        ("GET", f"/v1/models/{MODEL}", "narrow", 200),
        ("GET", "/v1/models/large-1", "narrow", 403),
        ("GET", f"/v1/models/{MODEL}", "other-model", 403),
        ("GET", "/ai/chat-stream?prompt=Hello", "narrow", 200),
        ("GET", "/ai/chat-stream?prompt=Hello", "other-model", 403),
        ("GET", "/ai/chat-stream-sse?prompt=Hello", "other-model", 403),
        ("GET", "/ai/chat-stream-sse?prompt=Hello", "writer", 200),
        ("POST", "/v1/chat/completions", "narrow", 200),
        ("POST", "/v1/chat/completions", "other-model", 403),
        ("POST", "/ai/chat-stream", "other-model", 403),
        ("POST", "/ai/chat-stream-sse", "other-model", 403),
    ],
)
def test_a_scope_of_one_resource_reaches_no_other(
    served: Served, method: str, target: str, name: str, status: int
) -> None:
    row = ROWS.get(f"{method} {target}", Row("", target))
    before = len(served.upstream.exchanges)
    assert served.status(method, Row("", target, body=row.body), bearer(name))[0] == status
    assert (len(served.upstream.exchanges) > before) == (status == 200 and "chat" in target)


def test_the_key_of_an_openai_client_is_its_token(served: Served) -> None:
    import openai

    def complete(key: str) -> str:
        with openai.OpenAI(base_url=f"{served.server.url}/v1", api_key=key, max_retries=0) as client:
            hello: Any = [{"role": "user", "content": "Hello"}]
            chunks = client.chat.completions.create(model="fake-1", messages=hello, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    assert complete("writer-secret")
    with pytest.raises(openai.PermissionDeniedError, match="other-model needs the scope llm:write:fake-1 for this"):
        complete("other-model-secret")
    with pytest.raises(openai.AuthenticationError, match="This token is not known here"):
        complete("wrong")


def test_lists_have_what_the_client_may_use(served: Served) -> None:
    def names(path: str, key: str, member: str, name: str) -> list[str]:
        return [entry[member] for entry in served.read(path, name)[key]]

    assert names("/export", "exports", "name", "narrow") == ["users"]
    assert names("/files/", "entries", "name", "narrow") == ["reports"]
    assert names("/process/kinds", "kinds", "kind", "narrow") == ["rehearsal"]
    assert set(names("/process/kinds", "kinds", "kind", "everything")) == {"checksum", "export", "rehearsal", "report"}
    assert names("/process/kinds", "kinds", "kind", "auditor") == []
    assert names("/v1/models", "data", "id", "narrow") == [MODEL]
    assert names("/v1/models", "data", "id", "other-model") == []
    assert served.task in names("/process/tasks", "tasks", "id", "alice")
    assert served.task in names("/process/tasks", "tasks", "id", "auditor")
    assert served.task not in names("/process/tasks", "tasks", "id", "narrow")
    api = served.read("/openapi.json", "narrow")
    choices = {
        parameter["name"]: parameter["schema"]["enum"]
        for path in ("/stream/live-logs", "/process/long-task", "/export/{name}")
        for parameter in api["paths"][path]["get"]["parameters"]
        if "enum" in parameter["schema"]
    }
    assert (choices["source"], choices["kind"], choices["name"]) == (["second"], ["rehearsal"], ["users"])
    assert not {"/metrics", "/stream/stock-ticker", "/demo/comparison/report"} & api["paths"].keys()
    for path in ("/", "/lab"):
        text = served.server.get(path, bearer("results"))[2].decode()
        assert "/export/results/csv" in text
        assert not re.search("/export/(users|data)|/stream/stock-ticker", text)
    status, _, problem = served.status("GET", Row("", "/stream/live-logs?source=x"), bearer("everything"))
    assert (status, problem["errors"][0]["detail"]) == (422, "unknown: x; known: first, second")
    status, _, problem = served.status("GET", Row("", "/stream/live-logs?source=sx"), bearer("logs-with-s"))
    assert (status, problem["errors"][0]["detail"]) == (422, "unknown: sx; known: second")


def test_with_the_scope_every_route_runs(served: Served) -> None:
    for route, row in ROWS.items():
        for method in verbs(route):
            assert served.status(method, row, bearer(holder(row.scope)))[0] == row.status, (method, route)
    for route, row in sorted(OWNED.items(), reverse=True):  # GET before DELETE
        for method in verbs(route):
            assert served.status(method, row, bearer("alice"))[0] == row.owner, (method, route)


def test_the_log_names_the_principal_and_has_no_credentials(served: Served) -> None:
    server = served.server
    assert server.get("/logs/download?access_token=alice-secret", bearer("alice"))[0] == 422
    assert server.get("/process/tasks/none", {"Authorization": "Bearer wrong-secret"})[0] == 401
    for request, principal in (("/logs/download status=422", "alice"), ("/process/tasks/none status=401", "")):
        (line,) = [line for line in server.wait_for_log(f"path={request}").splitlines() if f"path={request}" in line]
        assert line.partition(" principal=")[2].partition(" ")[0] == principal
    written = [server.stderr, *Path(server.base, "var/log").glob("*")]
    assert len(written) > 1
    for text in ("-secret", "Bearer", "YWxpY2U6c2VjcmV0", "access_token"):
        assert not [file for file in written if text in file.read_text()], text


@pytest.mark.parametrize(
    ("arguments", "lines", "printed"),
    [
        (("task", "list"), "", "rehearsal"),
        (("task", "kinds"), "", "rehearsal"),
        (("task", "run", "rehearsal", "-p", "steps=1", "-p", "delay=0"), "", '"steps": 1'),
        (("chat",), "Hello\n", "ab"),
        (("client", "task"), "rehearsal\nsteps=1\n", '"steps": 1'),
        (("client", "chat"), "2\nHello\n", "ab"),
    ],
)
def test_commands_and_views_send_the_token(
    served: Served, tmp_path: Path, arguments: tuple[str, ...], lines: str, printed: str
) -> None:
    for variables in ({"STREAMLAB_TOKEN": "alice-secret"}, {"STREAMLAB_TOKEN": "only-site-read-secret"}):
        with command(*arguments, "--url", served.server.url, cwd=tmp_path, COLUMNS="120", **variables) as process:
            out, errors = process.communicate(lines, timeout=20)
            if "alice" in variables["STREAMLAB_TOKEN"]:
                assert (printed in out, process.returncode) == (True, 0), (out, errors)
            else:
                assert "403" in out + errors or "needs the scope" in out + errors, (out, errors)
