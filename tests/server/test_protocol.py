"""HTTP by RFC 9110 and RFC 9112, case by case on a running server: grammar, smuggling, versions, limits.

Every case is a request as bytes, and what must come back.
"""

import json
import re
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from streamlab.problems import phrase
from streamlab.server.edge import HEAD_SECONDS
from tests.support.connections import read_all, read_until
from tests.support.servers import Running, starting_in

PLUGIN = '''
    from aiohttp import web
    from pydantic import BaseModel
    from streamlab import Scenario, endpoint, hookimpl, open_event_stream, open_stream


    class Body(BaseModel):
        amount: int


    class Lab(Scenario):
        """Bodies, and streams of unknown length."""

        @endpoint("POST", "/json", body=Body)
        async def json(self, request, body):
            """Read a JSON body."""
            return web.Response(text=str(body.amount))

        @endpoint("POST", "/raw", takes="application/octet-stream")
        async def raw(self, request):
            """Read the content as it arrives."""
            return await self._count(request)

        @endpoint("POST", "/small", takes="application/octet-stream", body_limit=10)
        async def small(self, request):
            """Read ten bytes."""
            return await self._count(request)

        @endpoint("POST", "/large", takes="application/octet-stream", body_limit=5_000_000)
        async def large(self, request):
            """Read five million bytes at once."""
            return web.Response(text=str(len(await request.read())))

        async def _count(self, request):
            count = 0
            async for chunk in request.content.iter_any():
                count += len(chunk)
            return web.Response(text=str(count))

        @endpoint("GET", "/lines")
        async def lines(self, request):
            """Send lines."""
            async with open_stream(request, "text/plain") as stream:
                for number in range(3):
                    await stream.write(b"line %d\\n" % number)
            return stream

        @endpoint("GET", "/events", sends="text/event-stream")
        async def events(self, request):
            """Send an event."""
            async with open_event_stream(request) as stream:
                await stream.write(b"id: 1\\ndata: 1\\n\\n")
            return stream

        @endpoint("GET", "/bare")
        async def bare(self, request):
            """Send a response without the core."""
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"bare")
            return response


    @hookimpl
    def register_scenarios():
        return [Lab]
'''

EXPORT = "[scenarios.export]\nsample_rows = 1000\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with starting_in(tmp_path_factory.mktemp("protocol")) as start:
        yield start(EXPORT, lab=PLUGIN)


def responses_in(received: bytes) -> list[tuple[str, int, bytes, bytes]]:
    """Return version, status, head and body of each response of known length; the last may end by the connection."""
    found = []
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        assert end, f"no end of a head in {received!r}"
        version, status = head.split(b" ", 2)[:2]
        length = re.search(rb"\r\nContent-Length: (\d+)", head, re.I)
        size = int(length[1]) if length else 0 if status in (b"100", b"204", b"304") else len(rest)
        found.append((version.decode(), int(status), head, rest[:size]))
        received = rest[size:]
    return found


def exchange(server: Running, *packets: bytes) -> list[tuple[str, int, bytes, bytes]]:
    """Send packets one after the other; return the responses until the server closes, which it must."""
    connection = server.connect(timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for number, packet in enumerate(packets):
        if number:  # a response on another connection shows that the server has received the packet before
            server.get("/health")
        connection.sendall(packet)
    return responses_in(read_all(connection))


HOST = b"Host: localhost\r\n"
GET = b"GET /health HTTP/1.1\r\n"
POST = b"POST /json HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BODY = b'{"amount": 1}'
SMUGGLED = b"GET /lines HTTP/1.1\r\n" + HOST + b"\r\n"

# An ambiguous request is 400, the only response, and ends its connection.
MALFORMED = {
    # Content-Length (RFC 9112, 6.3; RFC 9110, 8.6)
    "two lengths that differ": POST + b"Content-Length: 13\r\nContent-Length: 14\r\n\r\n" + BODY,
    "two lengths that are equal": POST + b"Content-Length: 13\r\nContent-Length: 13\r\n\r\n" + BODY,
    "a list of lengths": POST + b"Content-Length: 13, 13\r\n\r\n" + BODY,
    "a length with a plus": POST + b"Content-Length: +13\r\n\r\n" + BODY,
    "a length with a minus": POST + b"Content-Length: -13\r\n\r\n" + BODY,
    "a length in hex": POST + b"Content-Length: 0xd\r\n\r\n" + BODY,
    "a length with a fraction": POST + b"Content-Length: 13.0\r\n\r\n" + BODY,
    "a length with a space inside": POST + b"Content-Length: 1 3\r\n\r\n" + BODY,
    "a length with an underscore": POST + b"Content-Length: 1_3\r\n\r\n" + BODY,
    "a length of Arabic digits": POST + "Content-Length: ١٣\r\n\r\n".encode() + BODY,
    "a length beyond 64 bits": POST + b"Content-Length: 18446744073709551629\r\n\r\n" + BODY,
    "an empty length": POST + b"Content-Length: \r\n\r\n" + BODY,
    # Content-Length with Transfer-Encoding (RFC 9112, 6.1)
    "a length, then chunked": POST + b"Content-Length: 13\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked, then a length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
    # Transfer-Encoding
    "an unknown coding": POST + b"Transfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunked, but not last": POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked twice in a field": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked in two fields": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip and chunked in two fields": POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked with a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked with a space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "chunked on a folded line": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "chunked in quotes": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "chunked on HTTP/1.0": b"POST /json HTTP/1.0\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\nd\r\n" + BODY + b"\r\n0\r\n\r\n" + SMUGGLED,
    # chunks (RFC 9112, 7.1)
    "a chunk of no size": CHUNKED + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "an invalid chunk size": CHUNKED + b"zz\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk size with 0x": CHUNKED + b"0xd\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk size with a minus": CHUNKED + b"-d\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk size with a plus": CHUNKED + b"+d\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk size with a space": CHUNKED + b"d \r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk size with an underscore": CHUNKED + b"0_d\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk size beyond 64 bits": CHUNKED + b"1000000000000000d\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk size ended by LF": CHUNKED + b"d\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk size ended by CR": CHUNKED + b"d\r" + BODY + b"\r\n0\r\n\r\n",
    "a chunk that is longer than its size": CHUNKED + b"c\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk ended by LF": CHUNKED + b"d\r\n" + BODY + b"\n0\r\n\r\n",
    "an extension with a bare LF": CHUNKED + b"d;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a last chunk ended by LF": CHUNKED + b"d\r\n" + BODY + b"\r\n0\n\n",
    # lines and fields (RFC 9112, 2.2, 5.1, 5.2; RFC 9110, 5.5)
    "lines ended by LF": b"GET /health HTTP/1.1\nHost: localhost\n\n",
    "a field ended by LF": GET + b"X: 1\n" + HOST + b"\r\n",
    "a field ended by CR": GET + b"X: 1\rY: 2\r\n" + HOST + b"\r\n",
    "a folded field": GET + HOST + b"X: 1\r\n 2\r\n\r\n",
    "a first field that is folded": GET + b" X: 1\r\n" + HOST + b"\r\n",
    "a space before the colon": GET + HOST + b"X : 1\r\n\r\n",
    "a tab before the colon": GET + HOST + b"X\t: 1\r\n\r\n",
    "a field without a colon": GET + HOST + b"X\r\n\r\n",
    "a field without a name": GET + HOST + b": 1\r\n\r\n",
    "a name with a space": GET + HOST + b"X Y: 1\r\n\r\n",
    "a name with a parenthesis": GET + HOST + b"X(: 1\r\n\r\n",
    "a name that is not ASCII": GET + HOST + "Ü: 1\r\n\r\n".encode(),
    "NUL in a value": GET + HOST + b"X: a\0b\r\n\r\n",
    "NUL in a name": GET + HOST + b"X\0: 1\r\n\r\n",
    "a control character in a value": GET + HOST + b"X: a\x01b\r\n\r\n",
    # the request line (RFC 9112, 3)
    "no version": b"GET /health\r\n" + HOST + b"\r\n",
    "a tab for a space": b"GET\t/health\tHTTP/1.1\r\n" + HOST + b"\r\n",
    "a space in front": b" GET /health HTTP/1.1\r\n" + HOST + b"\r\n",
    "a space in the target": b"GET /hea lth HTTP/1.1\r\n" + HOST + b"\r\n",
    "NUL in the target": b"GET /\0 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a target that is not UTF-8": b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n",
    "a target without a slash": b"GET health HTTP/1.1\r\n" + HOST + b"\r\n",
    "an absolute target without a host": b"GET http:///health HTTP/1.1\r\n" + HOST + b"\r\n",
    "a target of another protocol's name": b"GET /health HTTQ/1.1\r\n" + HOST + b"\r\n",
    "a version in lower case": b"GET /health http/1.1\r\n" + HOST + b"\r\n",
    "a version with two digits": b"GET /health HTTP/1.10\r\n" + HOST + b"\r\n",
    "a version that never was": b"GET /health HTTP/1.2\r\n" + HOST + b"\r\n",
    "a handshake of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    # Host (RFC 9112, 3.2)
    "two hosts": GET + HOST + b"Host: evil.example\r\n\r\n",
    "the same host twice": GET + HOST + HOST + b"\r\n",
    "no host": GET + b"\r\n",
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
def test_an_ambiguous_request_is_400_and_the_last_of_its_connection(server: Running, request_bytes: bytes) -> None:
    [(version, status, head, body)] = exchange(server, request_bytes)
    document = json.loads(body)
    known = 400 if not request_bytes.startswith(b"GET /health\r\n") else 505  # that is HTTP/0.9
    assert (version in ("HTTP/1.0", "HTTP/1.1"), status, document["status"]) == (True, known, known)
    assert document["title"] == phrase(known)
    for field in (b"Content-Type: application/problem+json", b"Cache-Control: no-store", b"Server: streamlab"):
        assert field in head
    assert b"X-Content-Type-Options: nosniff" in head


ELSEWHERE = b"GET http://evil.example/ HTTP/1.1\r\n"

# Each with the status, and whether the connection stays open.
UNSPOKEN = {
    "HTTP/2.0": (505, False, b"GET /health HTTP/2.0\r\n" + HOST + b"\r\n"),
    "HTTP/0.9": (505, False, b"GET /health HTTP/0.9\r\n" + HOST + b"\r\n"),
    "HTTP/0.9 as it was": (505, False, b"GET /health\r\n\r\n"),
    "gzip, chunked": (501, False, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED),
    "an unknown method": (501, False, b"BREW / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a method in lower case": (501, False, b"get / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a method that no route has": (501, False, b"PROPFIND /files/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "CONNECT": (501, False, b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED),
    "OPTIONS *": (405, True, b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n"),
    "TRACE": (405, True, b"TRACE /health HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a fragment": (400, True, b"GET /health#x HTTP/1.1\r\n" + HOST + b"\r\n"),
    "the target of another host": (421, True, ELSEWHERE + HOST + b"\r\n"),
    "the target of another host, which is the Host, too": (421, True, ELSEWHERE + b"Host: evil.example\r\n\r\n"),
    "the target of another scheme": (421, True, b"GET https://localhost/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "the target of another protocol": (421, True, b"GET ftp://localhost/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a target with a user": (400, True, b"GET http://evil.example@localhost/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "another Host": (421, True, GET + b"Host: evil.example\r\n\r\n"),
    "an invalid Host": (400, True, GET + b"Host: a b\r\n\r\n"),
    "a Host with a path": (400, True, GET + b"Host: localhost/x\r\n\r\n"),
    "a Host in brackets that is no address": (400, True, GET + b"Host: [:::]\r\n\r\n"),
    "an empty Host": (400, True, GET + b"Host:\r\n\r\n"),
    "an expectation": (417, True, POST + b"Expect: 200-ok\r\nContent-Length: 13\r\n\r\n" + BODY),
    "an expectation of nothing": (417, True, GET.replace(b"health", b"nothing") + HOST + b"Expect: 200-ok\r\n\r\n"),
    "a target of 9 KB": (414, False, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a field of 9 KB": (431, False, GET + HOST + b"X: /" + b"a" * 9000 + b"\r\n\r\n"),
    "a name of 9 KB": (431, False, GET + HOST + b"a" * 9000 + b": 1\r\n\r\n"),
    "129 fields": (431, False, GET + HOST + b"X: 1\r\n" * 128 + b"\r\n"),
    "a body that is too large": (413, True, POST + b"Content-Length: 1048577\r\n\r\n" + bytes(1048577)),
}


@pytest.mark.parametrize(("status", "goes_on", "request_bytes"), UNSPOKEN.values(), ids=UNSPOKEN.keys())
def test_unsupported_protocol_features_have_their_own_status(
    server: Running, status: int, goes_on: bool, request_bytes: bytes
) -> None:
    after = GET + HOST + b"Connection: close\r\n\r\n" if goes_on else b""
    (version, got, head, body), *more = exchange(server, request_bytes + after)
    assert (version in ("HTTP/1.0", "HTTP/1.1"), got, [status for _, status, _, _ in more]) == (
        True,
        status,
        [200] * goes_on,
    )
    document = json.loads(body)
    assert (document["status"], document["title"]) == (status, phrase(status))
    assert head.splitlines()[0].endswith(phrase(status).encode()), "the status line has the same phrase"
    assert (b"Cache-Control: no-store" in head, b"evil" in head + body) == (True, False)


def test_a_target_of_this_host_is_served_in_every_form(server: Running) -> None:
    for target in (b"/", b"http://localhost/", b"HTTP://localhost/", b"http://127.0.0.1:%d/" % server.port):
        request = b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
        [(_, status, _, body)] = exchange(server, request)
        assert (status, b"curl" in body) == (200, True), target


def test_a_body_whose_framing_breaks_later_fails_its_reader_at_once(server: Running) -> None:
    for path in (b"/json", b"/raw", b"/large"):
        head = CHUNKED.replace(b"/json", path)
        [(_, status, _, body), *_] = exchange(server, head, b"2\r\n{}\r\n", b"zz\r\n")
        assert (status, json.loads(body)["title"]) == (400, "Bad Request"), path


def test_a_body_is_bounded_however_it_is_read(server: Running) -> None:
    binary = {"Content-Type": "application/octet-stream"}

    def post(path: str, size: int, *, chunked: bool) -> int:
        if not chunked:
            return server.get(path, binary, method="POST", body=bytes(size))[0]
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        connection = server.connect()
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        try:
            for start in range(0, size, 65536):
                chunk = bytes(min(65536, size - start))
                connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            connection.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the response has been sent, and the connection closed
        return responses_in(read_all(connection))[0][1]

    for chunked in (False, True):
        assert post("/raw", 1048576, chunked=chunked) == 200
        assert post("/raw", 1048577, chunked=chunked) == 413
        assert post("/small", 10, chunked=chunked) == 200
        assert post("/small", 11, chunked=chunked) == 413
        assert post("/large", 5_000_000, chunked=chunked) == 200
        assert post("/large", 5_000_001, chunked=chunked) == 413
    assert server.get("/health")[0] == 200


def test_100_continue_is_sent_only_for_an_acceptable_request(server: Running) -> None:
    expects = b"Expect: 100-continue\r\nConnection: close\r\n"
    with server.connect() as connection:
        connection.sendall(POST + expects + b"Content-Length: 13\r\n\r\n")
        assert read_until(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 200 OK\r\n")
    for more, status in (
        (b"Content-Length: 2000000\r\n", b"413"),
        (b"Content-Length: 13\r\nOrigin: http://evil.example\r\n", b"403"),
    ):
        with server.connect() as connection:
            connection.sendall(POST + expects + more + b"\r\n")
            assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 " + status)


def test_responses_of_one_connection_come_in_the_order_of_its_requests(server: Running) -> None:
    last = GET + HOST + b"Connection: close\r\n\r\n"
    got = exchange(
        server, POST + b"Content-Length: 13\r\n\r\n" + BODY + b"GET /none HTTP/1.1\r\n" + HOST + b"\r\n" + last
    )
    assert [status for _, status, _, _ in got] == [200, 404, 200]


# -- HTTP/1.0


@pytest.mark.parametrize("path", ["/lines", "/events", "/bare", "/export/users/csv?limit=3"])
@pytest.mark.parametrize("connection", ["keep-alive", "close", ""])
def test_a_body_of_unknown_length_ends_with_the_connection_on_http_1_0(
    server: Running, path: str, connection: str
) -> None:
    field = f"\nConnection: {connection}" if connection else ""
    [(version, status, head, body)] = responses_in(read_all(server.send(f"GET {path} HTTP/1.0{field}")))
    assert (version, status, b"\r\nConnection: close" in head) == ("HTTP/1.0", 200, True)
    assert b"chunked" not in head
    if "export" not in path:
        assert body == {"/lines": b"line 0\nline 1\nline 2\n", "/bare": b"bare"}.get(path, b"id: 1\ndata: 1\n\n")
    else:
        assert body.count(b"\r\n") == 4


def test_a_body_of_known_length_leaves_the_connection_open_on_http_1_0(server: Running) -> None:
    request = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    got = exchange(server, request + request + request.replace(b"keep-alive", b"close"))
    assert [status for _, status, _, _ in got] == [200, 200, 200]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("path", ["/export/users/csv?limit=10", "/events"])
def test_curl_on_http_1_0_with_keep_alive_gets_to_the_end(server: Running, path: str) -> None:
    command = ["curl", "-s", "-0", "-m", "10", "-H", "Connection: keep-alive", server.url + path]
    done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    assert (done.returncode, bool(done.stdout)) == (0, True)


@pytest.mark.skipif(shutil.which("ab") is None, reason="needs ab, of apache2-utils")
def test_ab_with_keep_alive_gets_to_the_end(server: Running) -> None:
    command = ["ab", "-k", "-q", "-n", "20", "-c", "2", "-s", "5", server.url + "/export/users/csv?limit=10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Complete requests: +20$", done.stdout, re.M)
    assert re.search(r"^Failed requests: +0$", done.stdout, re.M)


# -- time


def test_a_head_that_trickles_is_closed_and_an_idle_connection_is_not(server: Running) -> None:
    with server.connect() as trickling, server.connect() as used, server.connect() as idle:
        used.sendall(GET + HOST + b"\r\n")
        read_until(used, b"\r\n\r\n")
        started, sent = time.monotonic(), 0
        trickling.sendall(GET)
        while not select.select([trickling], [], [], 0.5)[0]:
            trickling.sendall(b"X-%d: 1\r\n" % sent)
            sent += 1
            assert time.monotonic() - started < HEAD_SECONDS + 5
        assert trickling.recv(1) == b""
        assert time.monotonic() - started >= HEAD_SECONDS - 0.5
        used.sendall(GET + HOST + b"Connection: close\r\n\r\n")
        assert read_all(used).endswith(b"}")
        assert select.select([idle], [], [], 0)[0] == []


# -- every route


def test_every_response_has_cache_control(server: Running) -> None:
    """Return the requests of all routes with the examples of their parameters, and of all errors."""
    document = json.loads(server.get("/openapi.json")[2])
    seen = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            query = [
                f"{parameter['name']}={parameter['example']}"
                for parameter in operation.get("parameters", ())
                if parameter["in"] == "query" and "example" in parameter
            ]
            address = re.sub(r"\{\w+\}", "x", path) + "?" + "&".join(query)
            with server.send(f"{method.upper()} {address} HTTP/1.1\nHost: localhost\nConnection: close") as connection:
                head = read_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")[0].decode()
            found = re.search(r"\r\nCache-Control: ([^\r]*)", head)
            seen[method, path] = found and found[1]
            if found and found[1] == "no-cache":
                assert "\r\nETag: " in head, (method, path, head)
    known = ("no-store", "no-cache", "no-store, no-transform")  # the last: event streams
    assert {route for route, found in seen.items() if found not in known} == set()
    revalidated = {path for (_, path), found in seen.items() if found == "no-cache"}
    assert {"/", "/lab", "/docs", "/openapi.json"} <= revalidated
    assert len(seen) > 30


@pytest.mark.parametrize("path", ["/", "/lab", "/docs", "/openapi.json"])
def test_a_page_that_has_not_changed_is_304(server: Running, path: str) -> None:
    status, headers, body = server.get(path)
    assert (status, headers["cache-control"], len(body) > 100) == (200, "no-cache", True)
    for known in (headers["etag"], f'"other", W/{headers["etag"]}', "*"):
        status, again, nothing = server.get(path, {"If-None-Match": known})
        assert (status, nothing, again["etag"], again["cache-control"]) == (304, b"", headers["etag"], "no-cache")
    assert server.get(path, {"If-None-Match": '"other"'})[0] == 200


def test_phrases_are_those_of_rfc_9110() -> None:
    assert {status: phrase(status) for status in (413, 414, 416, 422, 421, 431)} == {
        413: "Content Too Large",
        414: "URI Too Long",
        416: "Range Not Satisfiable",
        422: "Unprocessable Content",
        421: "Misdirected Request",
        431: "Request Header Fields Too Large",
    }


def test_no_request_of_this_module_caused_a_traceback_or_more_than_one_line(server: Running) -> None:
    # Lines are written in order: between two requests of known paths are those of one request.
    server.get("/before-the-line")
    exchange(server, MALFORMED["two hosts"])
    server.get("/after-the-line")
    _, _, log = server.wait_for_log("/after-the-line").partition("/before-the-line")
    new = log.partition("/after-the-line")[0].splitlines()[1:-1]
    assert len(new) == len([line for line in new if "not HTTP from 127.0.0.1" in line]) == 1
    assert (" ERROR " in server.log, "Traceback" in server.log) == (False, False)
