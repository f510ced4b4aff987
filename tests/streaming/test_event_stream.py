"""An event stream to one client, and what it takes from aiohttp-sse, on the process that `make run` starts."""

import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from aiohttp_sse import EventSourceResponse

from streamlab import EventStream
from tests.support.connections import EventStream as Reader
from tests.support.connections import read_all, read_until
from tests.support.servers import Running, starting_in

LAST_CHUNK = b"0\r\n\r\n"

SOURCES = r'''
    """Events for one client, with every ending."""

    import asyncio

    from streamlab import (
        Problem, ResumeQuery, Scenario, endpoint, hookimpl, no_more_events, open_event_stream, open_stream, resume_id,
    )


    class Sources(Scenario):
        """Streams for tests."""

        @endpoint("GET", "/fields", sends="text/event-stream")
        async def fields(self, request):
            async with open_event_stream(request) as stream:
                await stream.send({"a": [1, "é"]})
                await stream.send("two\r\nlines\rdata: 3\n", id="7", event="text", retry=2000)
                for broken in ({"id": "1\n2"}, {"event": "a\rb"}, {"id": "\0"}, {"retry": -1}):
                    try:
                        await stream.send(1, **broken)
                    except ValueError as error:
                        await stream.send(str(error))
                await stream.gap("lost", missing=3, until="9")
            return stream

        @endpoint("POST", "/posted", sends="text/event-stream")
        async def posted(self, request):
            async with open_event_stream(request, headers={"Vary": "Accept", "Cache-Control": "private"}) as stream:
                await stream.send(await request.text())
            return stream

        @endpoint("GET", "/quiet", sends="text/event-stream")
        async def quiet(self, request):
            async with open_event_stream(request, position="0", heartbeat_seconds=1) as stream:
                await stream.send(1, id="1")
                await stream.wait()
            return stream

        @endpoint("GET", "/waits", sends="text/event-stream")
        async def waits(self, request):
            async with open_event_stream(request, position="0", heartbeat_seconds=1) as stream:
                await stream.wait()
            return stream

        @endpoint("GET", "/large", sends="text/event-stream")
        async def large(self, request):
            async with open_event_stream(request, heartbeat_seconds=1) as stream:
                await stream.send(1, id="1")
                await stream.send("x" * 8_000_000, id="2")
                await stream.wait()
            return stream

        @endpoint("GET", "/fails", sends="text/event-stream")
        async def fails(self, request):
            async with open_event_stream(request) as stream:
                await stream.send(1, id="1")
                raise Problem(502, "The upstream is down.")

        @endpoint("GET", "/fails-at-once", sends="text/event-stream")
        async def fails_at_once(self, request):
            async with open_event_stream(request):
                raise Problem(502, "The upstream is down.")

        @endpoint("GET", "/stopped", sends="text/event-stream")
        async def stopped(self, request):
            async with open_event_stream(request) as stream:
                await stream.send(stream.is_connected(), id="1")
                asyncio.get_running_loop().call_soon(stream.stop_streaming)
                await stream.wait()
            return stream

        @endpoint("GET", "/resumed", query=ResumeQuery, sends="text/event-stream", responses={204: "The end."})
        async def resumed(self, request, query):
            after = resume_id(request, query.last_event_id)
            if after == "3":
                return no_more_events()
            async with open_event_stream(request) as stream:
                await stream.send([after, stream.last_event_id], id="3", event="end")
            return stream

        @endpoint("GET", "/by-open-stream", sends="text/event-stream")
        async def by_open_stream(self, request):
            async with open_stream(request, "text/event-stream; charset=utf-8") as stream:
                return stream

        @endpoint("GET", "/too-often", sends="text/event-stream")
        async def too_often(self, request):
            async with open_event_stream(request, heartbeat_seconds=0.5) as stream:
                return stream


    @hookimpl
    def register_scenarios():
        return [Sources]
'''


@pytest.fixture
def serve(start: Callable[..., Running]) -> Callable[..., Running]:
    def serving(config: str = "", **options: bool) -> Running:
        return start(config, sources=SOURCES, **options)

    return serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with starting_in(tmp_path_factory.mktemp("event_stream")) as start:
        yield start(sources=SOURCES, tracebacks=True)


def test_it_is_a_response_of_aiohttp_sse() -> None:
    assert issubclass(EventStream, EventSourceResponse)


def test_line_breaks_in_data_id_and_event_forge_no_field(server: Running) -> None:
    body = server.get("/fields")[2]
    assert body.decode() == (
        'data: {"a":[1,"é"]}\n\n'
        "id: 7\nevent: text\nretry: 2000\ndata: two\ndata: lines\ndata: data: 3\ndata: \n\n"
        "data: id of an event holds a line break or NUL: '1\\n2'\n\n"
        "data: event of an event holds a line break or NUL: 'a\\rb'\n\n"
        "data: id of an event holds a line break or NUL: '\\x00'\n\n"
        "data: retry of an event is negative: -1\n\n"
        'id: 7.gap\nevent: gap\ndata: {"reason":"lost","missing":3,"until":"9"}\n\n'
    )


def test_headers_are_those_of_every_stream(server: Running) -> None:
    _, headers, _ = server.get("/fields")
    assert headers["content-type"] == "text/event-stream"
    assert headers["cache-control"] == "no-store, no-transform"
    assert (headers["x-accel-buffering"], headers["incremental"]) == ("no", "?1")
    assert {"connection", "content-length"}.isdisjoint(headers)


def test_post_streams_events_with_custom_headers(server: Running) -> None:
    status, headers, body = server.get("/posted", method="POST", body=b"42")
    assert (status, headers["vary"], headers["cache-control"]) == (200, "Accept", "private")
    assert body == b"data: 42\n\n"


def test_head_has_the_headers_of_get_and_no_body(server: Running) -> None:
    _, of_get, _ = server.get("/fields")
    status, of_head, body = server.get("/fields", method="HEAD")
    for headers in (of_get, of_head):
        headers.pop("date")
    of_get.pop("transfer-encoding")  # RFC 9112 section 6.1: HEAD may leave it out
    assert (status, of_head, body) == (200, of_get, b"")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/quiet", "/waits"])
def test_heartbeats_are_sent_in_time(server: Running, path: str, version: str) -> None:
    with server.send(f"GET {path} HTTP/{version}\nHost: localhost") as connection:
        begun = time.monotonic()
        received = read_until(connection, b"\n:\n" if path == "/quiet" and version == "1.0" else b":\n")
        assert 0.9 < time.monotonic() - begun < 5
    assert (b"data: 1\n\n" in received) == (path == "/quiet")


def test_a_heartbeat_never_lands_in_an_event(server: Running) -> None:
    with server.send("GET /large HTTP/1.0") as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        received = bytearray(read_until(connection, b"id: 2\n"))
        time.sleep(2.5)  # two heartbeats are due while half of the event waits for the client
        while not received.endswith(b"\n\n:\n"):
            received += connection.recv(1 << 20)
    assert received.endswith(b"id: 2\ndata: " + b"x" * 8_000_000 + b"\n\n:\n")


def test_error_is_reported_before_the_connection_is_closed(server: Running) -> None:
    body = read_all(server.send("GET /fails HTTP/1.0")).partition(b"\r\n\r\n")[2]
    first, _, last = body.partition(b"\n\n")
    assert first == b"id: 1\ndata: 1"
    assert last.startswith(b"id: 1.error\nevent: error\ndata: {")
    assert json.loads(last.partition(b"data: ")[2])["detail"] == "The upstream is down."
    assert not read_all(server.send("GET /fails HTTP/1.1\nHost: localhost")).endswith(LAST_CHUNK)


def test_error_before_the_first_event_is_a_status(server: Running) -> None:
    assert server.get("/fails-at-once")[0] == 502


def test_another_task_stops_it(server: Running) -> None:
    received = read_all(server.send("GET /stopped HTTP/1.1\nHost: localhost\nConnection: close"))
    assert b"id: 1\ndata: true\n\n" in received
    assert b"id: 1.stop\nevent: stop\nretry: " in received
    assert received.endswith(LAST_CHUNK)


@pytest.mark.parametrize(("path", "id"), [("/quiet", "1.stop"), ("/waits", "0.stop")])
def test_sigterm_ends_it_with_a_farewell(serve: Callable[..., Running], path: str, id: str) -> None:  # noqa: A002
    server = serve()
    with server.send(f"GET {path} HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"data: 1\n\n" if path == "/quiet" else b"\r\n\r\n")
        server.process.send_signal(signal.SIGTERM)
        received = read_all(connection)
    assert re.search(rb"id: %b\nevent: stop\nretry: [0-9]+\ndata: \{" % id.encode(), received)
    assert received.endswith(LAST_CHUNK)


def test_client_that_disconnects_cancels_the_handler(server: Running) -> None:
    server.send("GET /waits HTTP/1.1\nHost: localhost").close()
    server.wait_for_log('outcome="client left"')


def test_resuming_prefers_the_header_and_ends_with_204(server: Running) -> None:
    with Reader(server, "/resumed?last_event_id=1", after="2") as reader:
        assert [event.data for event in reader] == ['["2","2"]']
    with Reader(server, "/resumed?last_event_id=1") as reader:
        assert [event.data for event in reader] == ['["1",null]']
    for path, after in (("/resumed", {"Last-Event-ID": "3"}), ("/resumed?last_event_id=3", {})):
        status, headers, body = server.get(path, after)
        assert (status, headers["cache-control"], body) == (204, "no-store", b"")
    assert server.get(f"/resumed?last_event_id={'3' * 201}")[0] == 422


def test_misuse_errors_name_the_alternative(server: Running) -> None:
    assert server.get("/by-open-stream")[0] == 500
    server.wait_for_log("open_stream does not send text/event-stream; charset=utf-8: use open_event_stream(request)")
    assert server.get("/too-often")[0] == 500
    server.wait_for_log("heartbeat_seconds: 0.5 is less than 1")
