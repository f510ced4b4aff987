"""Every beginning and ending of a stream, on the process that `make run` starts."""

import functools
import gzip
import http.client
import json
import re
import shutil
import signal
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.connections import read_all, read_until
from tests.support.proxies import nginx_to
from tests.support.servers import Running, starting_in

LOADED_PLUGINS = ("file",)

LAST_CHUNK = b"0\r\n\r\n"

SOURCES = '''
    """Sources with every ending."""

    import asyncio
    import logging

    from aiohttp import web
    from streamlab import Problem, Scenario, endpoint, hookimpl, open_event_stream, open_stream

    log = logging.getLogger(__name__)


    class Source:
        """Something that must be released, whatever happens."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            log.info("source released")


    class Sources(Scenario):
        """Streams for tests."""

        @endpoint("GET", "/idle")
        async def idle(self, request):
            async with open_stream(request, "text/plain") as response:
                with Source():
                    await asyncio.Event().wait()
            return response

        @endpoint("GET", "/idle-events", sends="text/event-stream")
        async def idle_events(self, request):
            async with open_event_stream(request) as response:
                await response.write(b"data: 1\\nid: 1\\n\\n")
                await asyncio.Event().wait()
            return response

        @endpoint("GET", "/endless")
        async def endless(self, request):
            async with open_stream(request, "application/octet-stream") as response:
                with Source():
                    while True:
                        await response.write(bytes(10_000))
            return response

        @endpoint("GET", "/endless-events", sends="text/event-stream")
        async def endless_events(self, request):
            async with open_event_stream(request) as response:
                while True:
                    await response.write(b"data: " + b"x" * 1000 + b"\\n\\n")
            return response

        @endpoint("GET", "/tokens")
        async def tokens(self, request):
            async with open_stream(request, "text/plain") as response:
                for _ in range(400_000):
                    await response.write(b"token")
            return response

        @endpoint("GET", "/megabytes")
        async def megabytes(self, request):
            async with open_stream(request, "application/octet-stream") as response:
                for _ in range(300):
                    await response.write(bytes(1_000_000))
            return response

        @endpoint("GET", "/kilobytes")
        async def kilobytes(self, request):
            async with open_stream(request, "application/octet-stream", length=120_000) as response:
                await response.write(bytes(120_000))
            return response

        @endpoint("GET", "/stubborn-events", sends="text/event-stream")
        async def stubborn_events(self, request):
            async with open_event_stream(request) as response:
                await response.write(b"data: 1\\nid: 1\\n\\n")
                try:
                    await asyncio.Event().wait()
                finally:
                    await asyncio.Event().wait()

        @endpoint("GET", "/swallows")
        async def swallows(self, request):
            async with open_stream(request, "text/plain") as response:
                await response.write(b"begun\\n")
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    pass
            return response

        @endpoint("GET", "/slow")
        async def slow(self, request):
            async with open_stream(request, "text/plain") as response:
                await response.write(b"begun\\n")
                await asyncio.sleep(1)
                await response.write(b"done\\n")
            return response

        @endpoint("GET", "/fails-at-once")
        async def fails_at_once(self, request):
            async with open_stream(request, "text/plain"):
                raise ValueError("the source is secret")

        @endpoint("GET", "/rejects-at-once")
        async def rejects_at_once(self, request):
            async with open_stream(request, "text/plain"):
                raise Problem(502, "The upstream does not respond.")

        @endpoint("GET", "/fails-later")
        async def fails_later(self, request):
            async with open_stream(request, "text/plain") as response:
                await response.write(b"first\\n")
                raise ValueError("the source is secret")

        @endpoint("GET", "/fails-later-compressed")
        async def fails_later_compressed(self, request):
            async with open_stream(request, "text/plain", compress=True) as response:
                await response.write(b"first\\n")
                raise ValueError("the source is secret")

        @endpoint("GET", "/fails-later-in-a-group")
        async def fails_later_in_a_group(self, request):
            async with open_stream(request, "text/plain") as response:
                async with asyncio.TaskGroup() as group:
                    group.create_task(response.write(b"first\\n"))
                    await asyncio.sleep(0)
                    raise ValueError("the source is secret")

        @endpoint("GET", "/upstream-resets")
        async def upstream_resets(self, request):
            async with open_stream(request, "text/plain") as response:
                await response.write(b"first\\n")
                raise ConnectionResetError("the upstream has disconnected, not the client")

        @endpoint("GET", "/shorter-than-declared")
        async def shorter_than_declared(self, request):
            async with open_stream(request, "text/plain", length=10) as response:
                await response.write(b"first\\n")
            return response

        @endpoint("GET", "/longer-than-declared")
        async def longer_than_declared(self, request):
            async with open_stream(request, "text/plain", length=3) as response:
                await response.write(b"first\\n")
            return response

        @endpoint("GET", "/events-fail-later", sends="text/event-stream")
        async def events_fail_later(self, request):
            async with open_event_stream(request) as response:
                await response.write(b"data: 1\\nid: 1\\n\\n")
                raise Problem(502, "The upstream has disconnected.")

        @endpoint("GET", "/lines")
        async def lines(self, request):
            async with open_stream(request, "text/plain", compress=True) as response:
                await response.write(b"one\\n")
                await response.write(b"two\\n" * 100_000)
            return response

        @endpoint("GET", "/lines-one-by-one")
        async def lines_one_by_one(self, request):
            async with open_stream(request, "text/plain", compress=True) as response:
                await response.write(b"one\\n")
                await asyncio.Event().wait()
            return response

        @endpoint("GET", "/compressed-events", sends="text/event-stream")
        async def compressed_events(self, request):
            async with open_event_stream(request) as response:
                await response.write(b"data: 1\\nid: 1\\n\\n")
            return response

        @endpoint("GET", "/empty")
        async def empty(self, request):
            async with open_stream(request, "text/plain") as response:
                await response.write(b"")
            return response

        @endpoint("GET", "/nothing-returned")
        async def nothing_returned(self, request):
            pass


    @hookimpl
    def register_scenarios():
        return [Sources]
'''


@pytest.fixture
def serve(start: Callable[..., Running]) -> Callable[..., Running]:
    def serving(config: str = "", **options: bool) -> Running:
        return start(config, sources=SOURCES, **options)

    return serving


def ended(server: Running, outcome: str) -> dict[str, str]:
    """Return the fields of the first log line of a stream with this outcome."""
    log = server.wait_for_log(f"outcome={outcome}")
    line = next(line for line in log.splitlines() if f"outcome={outcome}" in line)
    return {name: value.strip('"') for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', line)}


def is_rejected(server: Running) -> bool:
    try:
        server.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def wait_until(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


# -- the beginning


def test_headers_are_sent_before_the_first_item_exists(serve: Callable[..., Running]) -> None:
    server = serve()
    with server.send("GET /idle HTTP/1.1\nHost: localhost") as connection:
        head = read_until(connection, b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nTransfer-Encoding: chunked\r\n" in head


def test_first_byte_arrives_before_the_last_exists(serve: Callable[..., Running]) -> None:
    server = serve()
    with server.send("GET /slow HTTP/1.1\nHost: localhost") as connection:
        first = read_until(connection, b"begun\n")
        assert b"done" not in first
        assert read_until(connection, LAST_CHUNK).endswith(b"5\r\ndone\n\r\n" + LAST_CHUNK)


def test_every_stream_has_headers_against_buffering_proxies(serve: Callable[..., Running]) -> None:
    server = serve()
    for path in ("/empty", "/lines", "/compressed-events", "/download/large-file?size_mb=1"):
        _, headers, _ = server.get(path)
        cached = "no-cache" if "etag" in headers else "no-store"
        if headers["content-type"] == "text/event-stream":
            cached += ", no-transform"
        assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", cached), path


def test_head_has_the_headers_of_get_and_no_body(serve: Callable[..., Running]) -> None:
    server = serve()
    _, of_get, _ = server.get("/lines", {"Accept-Encoding": "gzip"})
    status, of_head, body = server.get("/lines", {"Accept-Encoding": "gzip"}, method="HEAD")
    for headers in (of_get, of_head):
        headers.pop("date")
    of_get.pop("transfer-encoding")  # RFC 9112 section 6.1: HEAD may leave it out
    assert (status, of_head, body) == (200, of_get, b"")


def test_head_of_an_endless_stream_leaves_the_connection_usable(serve: Callable[..., Running]) -> None:
    server = serve()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with closing(connection):
        for path in ("/idle", "/endless", "/idle-events", "/download/large-file?size_mb=1"):
            connection.request("HEAD", path)
            assert (connection.getresponse().read(), connection.sock is None) == (b"", False)
        connection.request("GET", "/empty")
        assert connection.getresponse().read() == b""


def test_http_1_0_gets_a_body_that_the_end_of_the_connection_ends(serve: Callable[..., Running]) -> None:
    server = serve()
    head, _, body = read_all(server.send("GET /slow HTTP/1.0")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK")
    assert b"chunked" not in head
    assert body == b"begun\ndone\n"


def test_too_many_streams_are_503_until_one_ends(serve: Callable[..., Running]) -> None:
    server = serve("[server]\nmax_streams = 2")
    with ExitStack() as held:
        for _ in range(2):
            connection = held.enter_context(server.send("GET /idle HTTP/1.1\nHost: localhost"))
            read_until(connection, b"\r\n\r\n")
        status, headers, body = server.get("/empty")
        assert (status, headers["retry-after"], headers["content-type"]) == (
            503,
            "5",
            "application/problem+json; charset=utf-8",
        )
        assert json.loads(body)["status"] == 503
    wait_until(lambda: server.get("/empty")[0] == 200)


# -- the client disconnects or stalls


def test_client_disconnects_from_an_idle_handler(serve: Callable[..., Running]) -> None:
    server = serve()
    with server.send("GET /idle HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"\r\n\r\n")
    server.wait_for_log("source released", seconds=3)
    assert ended(server, '"client left"')["path"] == "/idle"


def test_client_disconnects_from_a_writing_handler(serve: Callable[..., Running]) -> None:
    server = serve()
    with server.send("GET /endless HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"\r\n\r\n")
    server.wait_for_log("source released", seconds=3)
    assert ended(server, '"client left"')["path"] == "/endless"


def test_many_disconnecting_clients_cause_no_traceback(serve: Callable[..., Running]) -> None:
    server = serve()
    for path in ("/endless", "/idle", "/endless-events", "/tokens", "/download/large-file?size_mb=500") * 8:
        with server.send(f"GET {path} HTTP/1.1\nHost: localhost") as connection:
            connection.recv(1000)
    wait_until(lambda: server.log.count('outcome="client left"') == 40)
    assert json.loads(server.get("/health")[2])["open_streams"] == 0


def test_client_that_stalls_is_disconnected_after_stall_seconds(serve: Callable[..., Running]) -> None:
    server = serve("[server]\nstall_seconds = 1")
    paths = ("/endless", "/download/large-file?size_mb=500", "/download/large-file")
    for number, path in enumerate(paths, start=1):
        with server.send(f"GET {path} HTTP/1.1\nHost: localhost", receive_buffer=4096) as connection:
            assert connection.recv(5) == b"HTTP/"
            wait_until(functools.partial(has_left, server, number))


def has_left(server: Running, times: int) -> bool:
    return server.log.count('outcome="client left"') == times


def test_client_that_stalls_uses_bounded_memory(serve: Callable[..., Running]) -> None:
    server = serve("[server]\nstall_seconds = 1")
    with server.send("GET /endless HTTP/1.1\nHost: localhost", receive_buffer=4096) as connection:
        assert connection.recv(5) == b"HTTP/"
        server.get("/health")
        before = cpu_seconds(server)
        taken = int(ended(server, '"client left"')["bytes"])
        used = cpu_seconds(server) - before
    assert taken < 512 * 1024
    assert used < 0.2


def cpu_seconds(server: Running) -> float:
    """Return the user and system time of the server so far."""
    return time.clock_gettime(~server.process.pid << 3 | 2)  # its number: clock_getcpuclockid(3)


def test_memory_does_not_grow_with_the_size(serve: Callable[..., Running]) -> None:
    server = serve(fresh=True)
    read_all(server.send("GET /lines HTTP/1.1\nHost: localhost\nConnection: close"))
    before = peak_memory(server)
    body = read_all(server.send("GET /megabytes HTTP/1.1\nHost: localhost\nConnection: close"))
    assert len(body) > 300_000_000
    assert peak_memory(server) - before < 16 * 1024 * 1024


def peak_memory(server: Running) -> int:
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("reads peak memory from /proc, which this system does not have")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]


def test_fast_writer_does_not_starve_the_others(serve: Callable[..., Running]) -> None:
    server = serve()
    with server.send("GET /tokens HTTP/1.1\nHost: localhost\nConnection: close") as connection:
        connection.recv(10)
        reader = threading.Thread(target=read_all, args=(connection,))
        reader.start()
        open_streams = [json.loads(server.get("/health")[2])["open_streams"] for _ in range(5)]
        reader.join()
    assert open_streams == [1] * 5


# -- the source fails


def test_source_that_fails_before_the_first_byte_is_a_real_status(serve: Callable[..., Running]) -> None:
    server = serve(tracebacks=True)
    status, headers, body = server.get("/fails-at-once")
    assert (status, headers["content-type"]) == (500, "application/problem+json; charset=utf-8")
    assert b"secret" not in body
    assert "ValueError: the source is secret" in server.wait_for_log("secret")
    fields = ended(server, "failed")
    assert (fields["status"], fields["bytes"]) == ("500", "0")


def test_problem_before_the_first_byte_chooses_the_status(serve: Callable[..., Running]) -> None:
    server = serve()
    status, headers, body = server.get("/rejects-at-once")
    assert (status, json.loads(body)["detail"]) == (502, "The upstream does not respond.")
    assert headers["content-length"] == str(len(body))
    assert ended(server, "failed")["status"] == "502"


@pytest.mark.parametrize(
    "path",
    [
        "/fails-later",
        "/fails-later-compressed",
        "/fails-later-in-a-group",
        "/upstream-resets",
        "/shorter-than-declared",
    ],
)
def test_source_that_fails_after_the_first_byte_never_looks_complete(serve: Callable[..., Running], path: str) -> None:
    server = serve(tracebacks=True)
    received = read_all(server.send(f"GET {path} HTTP/1.1\nHost: localhost\nAccept-Encoding: gzip"))
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert len(received.partition(b"\r\n\r\n")[2]) > 5
    assert not received.endswith(LAST_CHUNK)
    assert b"secret" not in received
    assert ended(server, "failed")["path"] == path
    server.wait_for_log("Traceback (most recent call last)")


def test_body_longer_than_declared_is_a_logged_failure(serve: Callable[..., Running]) -> None:
    server = serve(tracebacks=True)
    assert server.get("/longer-than-declared")[2] == b"fir"
    server.wait_for_log("ValueError: 3 bytes were declared, 6 were written")


@pytest.mark.parametrize(("version", "status"), [("--http1.1", 18), ("--http1.0", 56)])
def test_curl_sees_a_failure_in_mid_stream(serve: Callable[..., Running], version: str, status: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    server = serve(tracebacks=True)
    done = subprocess.run(["curl", "-sS", version, f"{server.url}/fails-later"], capture_output=True, check=False)
    assert done.returncode == status, done.stderr


def test_event_stream_reports_its_failure_before_it_is_aborted(serve: Callable[..., Running]) -> None:
    server = serve()
    received = read_all(server.send("GET /events-fail-later HTTP/1.0"))
    head, _, last = received.partition(b"\r\n\r\n")[2].partition(b"event: error\n")
    assert head == b"data: 1\nid: 1\n\n"
    assert json.loads(last.removeprefix(b"data: "))["detail"] == "The upstream has disconnected."


def test_handler_that_returns_nothing_is_a_500(serve: Callable[..., Running]) -> None:
    server = serve(tracebacks=True)
    assert server.get("/nothing-returned")[0] == 500


# -- the server stops


def test_sigterm_ends_200_event_streams_with_a_last_chunk_within_a_second(serve: Callable[..., Running]) -> None:
    server = serve()
    with ExitStack() as held:
        connections = [
            held.enter_context(server.send("GET /idle-events HTTP/1.1\nHost: localhost")) for _ in range(200)
        ]
        for connection in connections:
            read_until(connection, b"data: 1\nid: 1\n\n")
        status, seconds = server.terminate()
        endings = [read_all(connection) for connection in connections]
    farewell = re.compile(rb"event: stop\nretry: (\d+)\ndata: [^\n]+\n\n\r\n" + re.escape(LAST_CHUNK))
    found = [re.search(farewell, ending) for ending in endings]
    assert all(match is not None and match.end() == len(match.string) for match in found)
    waits = [int(match[1]) for match in found if match is not None]
    assert min(waits) >= 1000, "clients must not come back before the next server is there"
    assert len(set(waits)) > 100, "clients must not come back all at once"
    assert status == 0
    assert seconds < 1
    assert server.log.count('outcome="server stopped"') == 200


@pytest.mark.parametrize(
    "path", ["/endless", "/endless-events", "/download/large-file", "/download/large-file?size_mb=500"]
)
def test_sigterm_with_a_stalled_client_takes_no_longer_than_the_drain(serve: Callable[..., Running], path: str) -> None:
    server = serve("[server]\ndrain_seconds = 1")
    with server.send(f"GET {path} HTTP/1.1\nHost: localhost", receive_buffer=4096) as connection:
        assert connection.recv(5) == b"HTTP/"
        status, seconds = server.terminate()
        received = read_all(connection)
    assert status == 0
    assert seconds < 2
    assert not received.endswith(LAST_CHUNK)
    assert ended(server, '"server stopped"')["route"] == path.partition("?")[0]


def test_sigterm_does_not_wait_for_an_event_stream_whose_client_stalls(serve: Callable[..., Running]) -> None:
    server = serve("[server]\ndrain_seconds = 60")
    with server.send("GET /endless-events HTTP/1.1\nHost: localhost", receive_buffer=4096) as connection:
        assert connection.recv(5) == b"HTTP/"
        status, seconds = server.terminate()
    assert status == 0
    assert seconds < 5


def test_sigterm_does_not_wait_for_an_event_stream_that_will_not_end(serve: Callable[..., Running]) -> None:
    server = serve("[server]\ndrain_seconds = 60")
    with server.send("GET /stubborn-events HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"data: 1\nid: 1\n\n")
        status, seconds = server.terminate()
        assert not read_all(connection).endswith(LAST_CHUNK)
    assert status == 0
    assert seconds < 5


def test_sigterm_loses_nothing_of_a_body_that_waits_for_a_slow_client(serve: Callable[..., Running]) -> None:
    server = serve("[server]\ndrain_seconds = 20")
    with server.send("GET /kilobytes HTTP/1.1\nHost: localhost", receive_buffer=4096) as connection:
        begun = connection.recv(5)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping")
        assert server.process.poll() is None
        received = begun + read_all(connection)
    assert len(received.partition(b"\r\n\r\n")[2]) == 120_000
    assert server.process.wait(10) == 0
    assert ended(server, "finished")["path"] == "/kilobytes"


def test_sigterm_lets_a_download_finish_and_rejects_new_connections(serve: Callable[..., Running]) -> None:
    server = serve()
    with server.send("GET /slow HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"begun\n")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping")
        assert is_rejected(server)
        assert read_all(connection).endswith(b"done\n\r\n" + LAST_CHUNK)
    assert server.process.wait(10) == 0
    assert ended(server, "finished")["path"] == "/slow"


def test_sigterm_aborts_bodies_that_do_not_finish_in_time_so_that_they_do_not_look_complete(
    serve: Callable[..., Running],
) -> None:
    server = serve("[server]\ndrain_seconds = 0.2")
    with server.send("GET /idle HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"\r\n\r\n")
        status, seconds = server.terminate()
        assert read_all(connection) == b""
    assert status == 0
    assert seconds < 1.2
    assert "source released" in server.log


def test_block_that_suppresses_its_cancellation_does_not_look_complete(serve: Callable[..., Running]) -> None:
    server = serve("[server]\ndrain_seconds = 0.2")
    with server.send("GET /swallows HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"begun\n")
        status, _ = server.terminate()
        assert not read_all(connection).endswith(LAST_CHUNK)
    assert status == 0
    assert 'outcome="server stopped"' in server.log


def test_second_signal_aborts_open_streams(serve: Callable[..., Running]) -> None:
    server = serve("[server]\ndrain_seconds = 60")
    with server.send("GET /idle HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"\r\n\r\n")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping")
        status, seconds = server.terminate(signal.SIGINT)
    assert status == 0
    assert seconds < 5


def test_health_is_503_while_draining_on_open_connections(serve: Callable[..., Running]) -> None:
    server = serve()
    probe = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with closing(probe), server.send("GET /slow HTTP/1.1\nHost: localhost") as stream:
        read_until(stream, b"begun\n")
        probe.request("GET", "/health")
        assert probe.getresponse().read().startswith(b'{"status":"ok"')
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping")
        probe.request("GET", "/health")
        response = probe.getresponse()
        assert (response.status, json.loads(response.read())["status"]) == (503, "draining")
        assert response.headers["Connection"] == "close"


# -- compression


def test_compression_sends_each_item_at_once(serve: Callable[..., Running]) -> None:
    server = serve()
    request = "GET /lines-one-by-one HTTP/1.0\nAccept-Encoding: gzip"
    with server.send(request) as connection:
        received = read_until(connection, b"\r\n\r\n")
        decompressor = zlib.decompressobj(wbits=31)
        text = decompressor.decompress(received.partition(b"\r\n\r\n")[2])
        while text != b"one\n":
            text += decompressor.decompress(connection.recv(1000))
    assert b"\r\nContent-Encoding: gzip\r\n" in received


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield a server with these sources, for tests that do not change it."""
    with starting_in(tmp_path_factory.mktemp("shared")) as start:
        yield start(sources=SOURCES)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [("gzip", "gzip"), ("br;q=1, gzip;q=0.1", "gzip"), ("gzip;q=0", None), ("identity, gzip;q=0.5", None), ("", None)],
)
def test_compression_is_negotiated_by_weight_and_in_vary(shared: Running, accepted: str, coding: str | None) -> None:
    _, headers, body = shared.get("/lines", {"Accept-Encoding": accepted})
    assert (headers.get("content-encoding"), headers["vary"]) == (coding, "Accept-Encoding")
    assert (gzip.decompress(body) if coding else body) == b"one\n" + b"two\n" * 100_000


def test_event_streams_are_never_compressed(serve: Callable[..., Running]) -> None:
    server = serve()
    _, headers, body = server.get("/compressed-events", {"Accept-Encoding": "gzip"})
    assert "content-encoding" not in headers
    assert body == b"data: 1\nid: 1\n\n"


# -- behind a proxy


@pytest.fixture
def nginx(serve: Callable[..., Running], tmp_path: Path) -> Iterator[Running]:
    """Yield an nginx with its defaults in front of the server."""
    server = serve()
    with nginx_to(tmp_path, server.port) as proxy:
        yield replace(server, url=proxy.url)


def test_it_streams_behind_an_unchanged_nginx(nginx: Running) -> None:
    with nginx.send("GET /slow HTTP/1.1\nHost: localhost") as connection:
        first = read_until(connection, b"begun\n")
        assert b"done" not in first
        assert read_until(connection, b"done\n").startswith((b"5\r\n", b"\r\n5", b"d"))


def test_client_that_disconnects_from_nginx_stops_the_work_behind_it(nginx: Running) -> None:
    with nginx.send("GET /idle HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"\r\n\r\n")
    nginx.wait_for_log("source released")
