"""`streamlab follow`: event streams parsed byte by byte, and followed across every ending of a connection."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import IO

import pytest

from streamlab.client.follow import MAX_RETRY_SECONDS, Pause, backoff, follow
from streamlab.client.http import ConnectionLost, RequestRejected, retry_after_seconds
from streamlab.client.sse import MAX_BYTES, Event, Parser
from tests.support.servers import REPOSITORY, Command, Running, command, ended_at_exit, free_port, starting_in


def event(data: str, *, name: str = "message", id: str = "", retry: int | None = None) -> Event:  # noqa: A002
    return Event(name, data, id, retry)


# -- parsing

STREAMS: dict[str, tuple[bytes, list[Event]]] = {
    "nothing": (b"", []),
    "one event": (b"data: a\n\n", [event("a")]),
    "line ends of LF": (b"data: a\n\ndata: b\n\n", [event("a"), event("b")]),
    "line ends of CR": (b"data: a\r\rdata: b\r\r", [event("a"), event("b")]),
    "line ends of CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", [event("a"), event("b")]),
    "line ends mixed": (b"data: a\r\n\rdata: b\n\r\ndata: c\r\r\n", [event("a"), event("b"), event("c")]),
    "CRLF is one line end, LF CR two": (b"data: a\r\ndata: b\n\rdata: c\n\n", [event("a\nb"), event("c")]),
    "no other character ends a line": (
        "data: a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\n\n".encode(),
        [event("a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g")],
    ),
    "data lines are joined by LF": (b"data: a\ndata: b\ndata:\ndata: c\n\n", [event("a\nb\n\nc")]),
    "a line that is a field's name alone": (b"data\n\ndata\ndata\n\n", [event(""), event("\n")]),
    "empty data is an event": (b"data:\n\ndata: \n\n", [event(""), event("")]),
    "one space after the colon is no data": (
        b"data:a\n\ndata:  a \n\ndata:\ta\n\n",
        [event("a"), event(" a "), event("\ta")],
    ),
    "only the first colon counts": (b"data: a: b:c\n\n", [event("a: b:c")]),
    "comments": (b": hello\n:\n\n:data: x\ndata: a\n: between\ndata: b\n\n", [event("a\nb")]),
    "unknown fields": (b"foo: bar\nData: x\n data: x\ndata : x\ndatas: x\ndata: a\n\n", [event("a")]),
    "a block without data is no event": (b"event: x\n\nretry: 5\n\ndata: a\n\n", [event("a")]),
    "a name lasts for one event": (
        b"event: x\ndata: a\n\ndata: b\n\nevent: y\nevent: z\ndata: c\n\n",
        [event("a", name="x"), event("b"), event("c", name="z")],
    ),
    "an empty name is the default name": (b"event: x\nevent:\ndata: a\n\n", [event("a")]),
    "an id lasts": (
        b"id: 1\ndata: a\n\ndata: b\n\nid: 2\n\ndata: c\n\n",
        [event("a", id="1"), event("b", id="1"), event("c", id="2")],
    ),
    "an empty id forgets the one before": (b"id: 1\ndata: a\n\nid\ndata: b\n\n", [event("a", id="1"), event("b")]),
    "an id with NUL is ignored": (b"id: 1\nid: 2\x003\ndata: a\n\n", [event("a", id="1")]),
    "retry takes digits": (b"retry: 0010\ndata: a\n\ndata: b\n\n", [event("a", retry=10), event("b")]),
    "retry takes nothing else": (
        "retry: 1\nretry: 1.5\nretry: -2\nretry: +3\nretry: 4 \nretry:\nretry\nretry: \u0665\nretry: \u00b2\n"
        "retry:  6\nretry: 1_0\ndata: a\n\n".encode(),
        [event("a", retry=1)],
    ),
    "retry with more digits than Python converts": (
        b"retry: " + b"9" * 5000 + b"\ndata: a\n\nretry: " + b"0" * 5000 + b"7\ndata: b\n\n",
        [event("a", retry=10**18), event("b", retry=7)],
    ),
    "a byte order mark at the start": (b"\xef\xbb\xbfdata: a\n\n", [event("a")]),
    "a byte order mark and a blank line": (b"\xef\xbb\xbf\ndata: a\n\n", [event("a")]),
    "one byte order mark, not two": (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [event("b")]),
    "a byte order mark elsewhere": (b"\n\xef\xbb\xbfdata: a\ndata: \xef\xbb\xbfb\n\n", [event("\ufeffb")]),
    "characters of every length": (
        "id: \u00e9\nevent: \u20ac\ndata: a\u00e9\u20ac\U0001f600\n\n".encode(),
        [event("a\u00e9\u20ac\U0001f600", name="\u20ac", id="\u00e9")],
    ),
    "bytes that are no UTF-8": (
        b"data: \xff\xe2\x82\n\ndata: \xed\xa0\x80\xc0\xafx\n\n",
        [event("\ufffd\ufffd"), event("\ufffd\ufffd\ufffd\ufffd\ufffdx")],
    ),
    "NUL in data": (b"data: a\x00b\n\n", [event("a\x00b")]),
    "an event without its blank line": (b"data: a\n\nid: 9\nevent: x\ndata: b\n", [event("a")]),
    "a line without its end": (b"data: a\n\ndata: b\n\ndata", [event("a"), event("b")]),
}

EACH_STREAM = pytest.mark.parametrize(("stream", "expected"), STREAMS.values(), ids=STREAMS.keys())


@EACH_STREAM
def test_a_complete_stream_is_parsed(stream: bytes, expected: list[Event]) -> None:
    assert Parser().feed(stream) == expected


@EACH_STREAM
def test_a_stream_is_parsed_byte_by_byte(stream: bytes, expected: list[Event]) -> None:
    parser = Parser()
    assert [found for byte in stream for found in parser.feed(bytes([byte]))] == expected


@EACH_STREAM
def test_a_stream_is_parsed_wherever_it_is_split(stream: bytes, expected: list[Event]) -> None:
    for cut in range(min(len(stream), 200)):
        parser = Parser()
        found = parser.feed(stream[:cut])
        found += parser.feed(b"")
        found += parser.feed(stream[cut:])
        assert found == expected, cut


def test_an_event_is_emitted_at_its_last_byte_even_if_that_is_a_cr() -> None:
    parser = Parser()
    assert parser.feed(b"data: a\r\n\r") == [event("a")]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"\n\rdata: b\n\n") == [event("b")]


def test_the_position_advances_at_the_blank_line() -> None:
    parser = Parser("0")
    parser.feed(b"id: 1\ndata: a\n")
    assert parser.last_event_id == "0"
    parser.feed(b"\nid: 2\n")
    assert parser.last_event_id == "1"
    parser.feed(b"\n")
    assert parser.last_event_id == "2"


def test_a_parser_starts_with_the_last_id_so_that_an_event_without_one_does_not_reset_the_position() -> None:
    parser = Parser("7")
    assert parser.feed(b"data: a\n\n") == [event("a", id="7")]
    assert parser.last_event_id == "7"


def test_a_retry_applies_immediately_and_without_an_event() -> None:
    parser = Parser()
    assert parser.retry is None
    parser.feed(b"retry: 30\n")
    assert parser.retry == 30


def test_a_line_and_an_event_are_bounded() -> None:
    assert Parser(max_bytes=12).feed(b"data: 123456\ndata: 1234\n\n") == [event("123456\n1234")]
    with pytest.raises(ValueError, match=r"^a line of more than 12 bytes$"):
        Parser(max_bytes=12).feed(b"data: 1234567\n\n")
    with pytest.raises(ValueError, match=r"^an event of more than 12 bytes$"):
        Parser(max_bytes=12).feed(b"data: 123456\ndata: 123456\n\n")


def test_a_line_without_an_end_and_an_event_without_an_end_stop_at_16_mib() -> None:
    assert MAX_BYTES == 16 * 1024 * 1024
    parser = Parser()
    for _ in range(16):
        parser.feed(b":" * 1024 * 1024)
    with pytest.raises(ValueError, match="a line of more than 16777216 bytes"):
        parser.feed(b":")
    parser = Parser()
    for _ in range(16):
        parser.feed(b"data:" + b"x" * (1024 * 1024 - 1) + b"\n")
    with pytest.raises(ValueError, match="an event of more than 16777216 bytes"):
        parser.feed(b"data: x\n")


def test_comments_without_a_blank_line_may_continue_forever() -> None:
    parser = Parser(max_bytes=100)
    for _ in range(1000):
        assert parser.feed(b": still here\n") == []
    assert parser.feed(b"data: a\n\n") == [event("a")]


# -- pauses


@pytest.mark.parametrize("retry", [0.0, 0.01, 1.0, 45.0, 60.0, 1e15])
def test_a_pause_is_what_the_server_sets_then_grows_up_to_a_minute(retry: float) -> None:
    shortest = min(retry, MAX_RETRY_SECONDS)
    assert backoff(0, retry) == shortest
    for failures in (1, 2, 3, 10, 100_000):
        longest = min(60.0, max(retry, 0.1) * 2.0 ** min(failures, 16))
        for _ in range(50):
            assert max(shortest, longest / 2) <= backoff(failures, retry) <= longest
    assert len({backoff(3, 1.0) for _ in range(50)}) > 1


def test_a_pause_reads_as_a_line() -> None:
    assert str(Pause("connection lost", 1.23, "a-7")) == "connection lost; retrying in 1.2 s after id a-7"
    assert str(Pause("connection lost", 0.0, "")) == "connection lost; retrying in 0.0 s"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("\u0665", None),
        ("0", 0.0),
        (" 5 ", 5.0),
        ("9" * 5000, 3600.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0.0),
        ("Sun Nov  6 08:49:37 1994", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value) == seconds


def test_retry_after_counts_from_now_to_a_date() -> None:
    seconds = retry_after_seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True))
    assert seconds is not None
    assert 90 < seconds <= 100


# -- the server that is followed

LAB = """
    import asyncio
    import collections
    import json

    from aiohttp import web
    from pydantic import BaseModel, Field

    from streamlab import Problem, Scenario, endpoint, hookimpl, open_event_stream, open_stream

    EVENTS = "text/event-stream"
    requests = collections.Counter()


    def last(request):
        return int(request.headers.get("Last-Event-ID", "0"))


    async def send(request, *parts, hold=False, cut=False, content_type=EVENTS):
        opened = open_event_stream(request) if content_type == EVENTS else open_stream(request, content_type)
        async with opened as response:
            for part in parts:
                await response.write(part.encode())
            if hold:
                await asyncio.Event().wait()
            if cut:
                request.transport.close()
                await asyncio.Event().wait()
        return response


    def numbers(first, count):
        return [f"id: {n}\\nretry: 10\\ndata: {n}\\n\\n" for n in range(first, first + count)]


    class Count(BaseModel):
        count: int = Field(3, ge=0, le=100_000)


    class Hop(BaseModel):
        times: int


    class Lab(Scenario):
        @endpoint("GET", "/requests")
        async def requests(self, request):
            return web.json_response(requests)

        @endpoint("GET", "/seven")
        async def seven(self, request):
            if last(request) >= 7:
                return web.Response(status=204)
            return await send(request, *numbers(last(request) + 1, min(3, 7 - last(request))))

        @endpoint("GET", "/held", query=Count)
        async def held(self, request, query):
            return await send(request, *numbers(last(request) + 1, query.count), hold=True)

        @endpoint("GET", "/cut")
        async def cut(self, request):
            if last(request) == 0:
                return await send(request, *numbers(1, 1), "id: 2\\ndata: tw", cut=True)
            return await send(request, "id: 2\\ndata: two\\n\\n", "event: end\\ndata: {}\\n\\n")

        @endpoint("GET", "/finite")
        async def finite(self, request):
            requests["finite"] += 1
            return await send(request, "data: a\\n\\n", "event: end\\ndata: {}\\n\\ndata: beyond\\n\\n")

        @endpoint("GET", "/end-held")
        async def end_held(self, request):
            return await send(request, "event: end\\ndata: {}\\n\\n", hold=True)

        @endpoint("GET", "/end-later")
        async def end_later(self, request):
            async with open_event_stream(request) as response:
                await response.write(b"event: end\\ndata: {}\\n\\n")
                await asyncio.sleep(0.1)  # long enough to notice a client that disconnects
            return response

        @endpoint("GET", "/busy")
        async def busy(self, request):
            requests["busy"] += 1
            if requests["busy"] == 1:
                raise Problem(503, "No place is free.", headers={"Retry-After": "0"})
            return await send(request, "data: a\\n\\n", "event: end\\ndata: {}\\n\\n")

        @endpoint("GET", "/always-busy", query=Count)
        async def always_busy(self, request, query):
            raise Problem(429, "Too many.", headers={"Retry-After": str(query.count)})

        @endpoint("GET", "/bad-gateway")
        async def bad_gateway(self, request):
            return web.Response(status=502)

        @endpoint("GET", "/page")
        async def page(self, request):
            return web.Response(text="<p>hello", content_type="text/html")

        @endpoint("GET", "/charset")
        async def charset(self, request):
            return await send(request, "event: end\\ndata: {}\\n\\n", content_type="Text/Event-Stream; charset=UTF-8")

        @endpoint("GET", "/hop", query=Hop)
        async def hop(self, request, query):
            location = f"/hop?times={query.times - 1}" if query.times > 1 else "/finite"
            return web.Response(status=307, headers={"Location": location})

        @endpoint("GET", "/elsewhere")
        async def elsewhere(self, request):
            return web.Response(status=302, headers={"Location": "ftp://example.org/"})

        @endpoint("GET", "/headers")
        async def headers(self, request):
            headers = {name.lower(): value for name, value in request.headers.items()}
            return await send(request, f"data: {json.dumps(headers)}\\n\\nevent: end\\ndata: {{}}\\n\\n")

        @endpoint("GET", "/nothing")
        async def nothing(self, request):
            return await send(request)

        @endpoint("GET", "/bad-id")
        async def bad_id(self, request):
            return await send(request, "retry: 0\\nid: a\\x01\\ndata: a\\n\\n")

        @endpoint("GET", "/huge")
        async def huge(self, request):
            return await send(request, "data: a\\n\\n", ": " + "x" * (16 * 1024 * 1024), hold=True)

        @endpoint("GET", "/accented")
        async def accented(self, request):
            if "Last-Event-ID" not in request.headers:
                return await send(request, "retry: 0\\nid: \\u00e9\\u20ac\\ndata: a\\n\\n")
            return await send(request, f"data: {request.headers['Last-Event-ID']}\\n\\nevent: end\\ndata\\n\\n")

        @endpoint("GET", "/shapes")
        async def shapes(self, request):
            return await send(
                request,
                "data: one\\n\\n",
                "data: two\\ndata:   lines\\n\\n",
                "event: gap\\ndata: {}\\n\\n",
                "event: message\\ndata: \\u20ac\\n\\n",
                "event: \\x1bx\\ndata: a\\x1b[31m\\tb\\x00\\x7f\\x9b\\ndata: c\\n\\n",
                "event: end\\ndata: {}\\n\\n",
            )

        @endpoint("GET", "/malice")
        async def malice(self, request):
            raise Problem(403, "no\\x1b[31m\\nstreamlab: entry \\u20ac")


    @hookimpl
    def register_scenarios():
        return [Lab]
"""


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLAB_")}
ENVIRONMENT |= {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error", "PYTHONUTF8": "1"}


@contextlib.contextmanager
def serving(folder: Path, *, port: int = 0) -> Iterator[Running]:
    """Yield a server with the plugin above only; it ends with the block."""
    with starting_in(folder, ()) as start:
        yield start(port=port, lab=LAB)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("lab")) as server:
        yield server


@contextlib.contextmanager
def logging(server: Running, outcome: str) -> Iterator[None]:
    """Assert that the server logs this outcome of a stream in the block, or soon after it."""
    before = server.log.count(outcome)
    yield
    deadline = time.monotonic() + 10
    while server.log.count(outcome) == before:
        assert time.monotonic() < deadline, f"no new {outcome!r} in:\n{server.log}"
        time.sleep(0.01)


class Enough(Exception):
    """Ends a stream at a pause."""


async def collect(url: str, **options: object) -> tuple[list[str], list[Pause]]:
    """Return the data of every event until the end, and the pauses."""
    pauses: list[Pause] = []
    events = follow(url, on_pause=pauses.append, **options)  # type: ignore[arg-type]
    return [found.data async for found in events], pauses


async def pauses_of(url: str, count: int, **options: object) -> list[Pause]:
    """Return the first pauses of an endless stream, without waiting for the last."""
    pauses: list[Pause] = []

    def keep(pause: Pause) -> None:
        pauses.append(pause)
        if len(pauses) == count:
            raise Enough

    with pytest.raises(Enough):
        async for _ in follow(url, on_pause=keep, **options):  # type: ignore[arg-type]
            pass
    return pauses


# -- following


async def test_a_stream_that_ends_is_followed_from_its_last_id_until_204(lab: Running) -> None:
    data, pauses = await collect(f"{lab.url}/seven")
    assert data == ["1", "2", "3", "4", "5", "6", "7"]
    assert pauses == [Pause("stream ended", 0.01, id) for id in ("3", "6", "7")]  # noqa: A001


async def test_a_stream_is_followed_from_the_id_that_is_given(lab: Running) -> None:
    assert (await collect(f"{lab.url}/seven", last_event_id="5"))[0] == ["6", "7"]
    assert await collect(f"{lab.url}/seven", last_event_id="7") == ([], [])


async def test_a_url_needs_no_scheme(lab: Running) -> None:
    assert (await collect(f"127.0.0.1:{lab.port}/seven", last_event_id="6"))[0] == ["7"]


async def test_the_request_accepts_an_uncompressed_event_stream(lab: Running) -> None:
    (first, _), _ = await collect(f"{lab.url}/headers")
    headers = json.loads(first)
    assert headers["accept"] == "text/event-stream"
    assert headers["accept-encoding"] == "identity"
    assert headers["cache-control"] == "no-cache"
    assert "last-event-id" not in headers
    (second, _), _ = await collect(f"{lab.url}/headers", last_event_id="a b")
    assert json.loads(second)["last-event-id"] == "a b"


async def test_an_id_travels_as_utf_8(lab: Running) -> None:
    assert (await collect(f"{lab.url}/accented"))[0] == ["a", "\u00e9\u20ac", ""]


async def test_an_incomplete_event_is_dropped_and_received_from_the_next_connection(lab: Running) -> None:
    data, pauses = await collect(f"{lab.url}/cut")
    assert data == ["1", "two", "{}"]
    assert pauses == [Pause("connection lost", 0.01, "1")]


async def test_the_end_event_stops_reconnects(lab: Running) -> None:
    before = json.loads(lab.get("/requests")[2]).get("finite", 0)
    with logging(lab, "route=/finite status=200 outcome=finished"):
        assert await collect(f"{lab.url}/finite") == (["a", "{}"], [])
    assert json.loads(lab.get("/requests")[2])["finite"] == before + 1


async def test_a_server_that_is_a_little_later_than_its_end_event_still_counts_a_finished_stream(lab: Running) -> None:
    with logging(lab, "route=/end-later status=200 outcome=finished"):
        assert await collect(f"{lab.url}/end-later") == (["{}"], [])


async def test_the_end_event_ends_a_response_that_stays_open(lab: Running) -> None:
    assert await collect(f"{lab.url}/end-held") == (["{}"], [])


async def test_a_busy_server_is_retried_after_its_retry_after(lab: Running) -> None:
    data, pauses = await collect(f"{lab.url}/busy")
    assert data == ["a", "{}"]
    assert pauses == [Pause("returned 503: No place is free.", 0.0, "")]


async def test_retry_after_is_obeyed_but_repeated_zeros_are_not(lab: Running) -> None:
    assert await pauses_of(f"{lab.url}/always-busy?count=1", 1) == [Pause("returned 429: Too many.", 1.0, "")]
    first, second = await pauses_of(f"{lab.url}/always-busy?count=0", 2)
    assert first.seconds == 0.0
    assert 2.0 <= second.seconds <= 4.0


async def test_a_bad_gateway_is_retried_after_a_pause(lab: Running) -> None:
    (pause,) = await pauses_of(f"{lab.url}/bad-gateway", 1, last_event_id="5")
    assert (pause.reason, pause.last_event_id) == ("returned 502: Bad Gateway", "5")
    assert 1.0 <= pause.seconds <= 2.0


async def test_a_stream_without_a_byte_counts_as_a_failure(lab: Running) -> None:
    (pause,) = await pauses_of(f"{lab.url}/nothing", 1)
    assert pause.reason == "stream ended"
    assert 1.0 <= pause.seconds <= 2.0


async def test_a_silent_connection_times_out(lab: Running) -> None:
    pauses = await pauses_of(f"{lab.url}/held", 2, read_seconds=0.3)
    assert pauses == [Pause("read timed out", 0.01, id) for id in ("3", "6")]  # noqa: A001


async def test_an_unreachable_server_is_retried() -> None:
    with socket.socket() as unheard:  # bound but not listening: connections are rejected, and the port stays reserved
        unheard.bind(("127.0.0.1", 0))
        (pause,) = await pauses_of(f"http://127.0.0.1:{unheard.getsockname()[1]}/", 1)
    assert pause.reason == "cannot connect: Connection refused"
    assert 1.0 <= pause.seconds <= 2.0


async def test_a_connection_is_closed_when_its_reader_exits(lab: Running) -> None:
    with logging(lab, 'outcome="client left"'):
        async with aclosing(follow(f"{lab.url}/held")) as events:
            assert (await anext(events)).data == "1"


async def test_a_name_of_the_content_type_has_no_case_and_may_have_a_charset(lab: Running) -> None:
    assert (await collect(f"{lab.url}/charset"))[0] == ["{}"]


async def test_five_redirects_are_followed_and_no_sixth(lab: Running) -> None:
    assert (await collect(f"{lab.url}/hop?times=5"))[0] == ["a", "{}"]
    with pytest.raises(RequestRejected, match=r"/hop\?times=6 redirects more than 5 times$"):
        await collect(f"{lab.url}/hop?times=6")


async def test_a_response_that_is_not_an_event_stream_is_rejected_without_retry(lab: Running) -> None:
    for path, message in {
        "/elsewhere": "redirects to a URL that is not http(s): ftp://example.org/",
        "/page": "returned text/html; charset=utf-8, expected an event stream (text/event-stream)",
        "/none": "returned 404: Nothing is served at this path. GET / lists every route.",
        "/held?count=x": "returned 422: Invalid parameters: count. - "
        "count: input should be a valid integer, unable to parse string as an integer",
    }.items():
        with pytest.raises(RequestRejected) as rejected:
            await collect(f"{lab.url}{path}")
        assert str(rejected.value) == f"{lab.url}{path} {message}"
        assert rejected.value.status == (int(message.split()[1][:3]) if "returned 4" in message else None)


async def test_a_line_without_an_end_is_rejected_without_retry(lab: Running) -> None:
    with pytest.raises(RequestRejected, match=r"/huge sent a line of more than 16777216 bytes$"):
        await collect(f"{lab.url}/huge")


async def test_an_id_that_no_header_can_carry_is_rejected(lab: Running) -> None:
    with pytest.raises(RequestRejected, match=r"/bad-id sent the event id 'a\\x01', which no header can carry$"):
        await collect(f"{lab.url}/bad-id")
    for unsendable in ("a\nb", "a\rb", "a\0b", "a\x7fb", "\udc80"):
        with pytest.raises(
            ValueError, match=r"^invalid event id '.*': it contains characters that no header can carry$"
        ):
            await collect(f"{lab.url}/seven", last_event_id=unsendable)


@pytest.mark.parametrize("url", ["", "ftp://example.org/", "http://", "http:///x", "http://a:99999/", "http://[::1/"])
async def test_an_invalid_url_is_rejected(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not an http\(s\) URL"):
        await collect(url)


async def test_a_password_is_sent_and_not_shown(lab: Running) -> None:
    address = f"http://user:secret@127.0.0.1:{lab.port}"
    (first, _), _ = await collect(f"{address}/headers")
    assert json.loads(first)["authorization"] == "Basic dXNlcjpzZWNyZXQ="
    with pytest.raises(RequestRejected, match=f"^{lab.url}/none returned 404: "):
        await collect(f"{address}/none")
    with pytest.raises(RequestRejected, match=f"^{lab.url}/elsewhere redirects to "):
        await collect(f"{address}/elsewhere")


async def test_without_reconnects_a_regular_end_is_the_end_and_a_break_is_an_error(lab: Running) -> None:
    assert await collect(f"{lab.url}/seven", reconnect=False) == (["1", "2", "3"], [])
    with pytest.raises(ConnectionLost, match=f"^{lab.url}/cut: connection lost$"):
        await collect(f"{lab.url}/cut", reconnect=False)
    with pytest.raises(RequestRejected, match=f"^{lab.url}/always-busy returned 429: Too many.$"):
        await collect(f"{lab.url}/always-busy", reconnect=False)


# -- the command

FOLLOW = [sys.executable, "-m", "streamlab", "follow"]


def run(*words: str, **variables: str) -> tuple[int, bytes, str]:
    """Follow to the end; return exit status, stdout and stderr."""
    with command("follow", *words, cwd=Path.cwd(), **variables) as process:
        out, err = process.communicate(timeout=30)
    return process.wait(), out.encode(), err


@contextlib.contextmanager
def following(*words: str, stdout: int | IO[bytes] | None = None) -> Iterator[Command]:
    """Yield a command that follows; it ends with the block. Without another stdout, that is a pipe."""
    if stdout is None:
        with command("follow", *words, cwd=Path.cwd()) as forked:
            yield forked
        return
    # A shell without job control starts its background processes with SIGINT ignored, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen([*FOLLOW, *words], stdout=stdout, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    finally:
        signal.signal(signal.SIGINT, before)
    with ended_at_exit(process):
        yield process


def lines(process: Command, count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


def errors(process: Command) -> str:
    assert process.stderr is not None
    return process.stderr.read()


SHAPES = b"one\ntwo\n  lines\ngap: {}\n\xe2\x82\xac\n\x1bx: a\x1b[31m\tb\x00\x7f\xc2\x9b\nc\nend: {}\n"


def test_the_command_prints_data_a_line_each_and_names_before_it_raw_into_a_pipe(lab: Running) -> None:
    assert run(f"{lab.url}/shapes") == (0, SHAPES, "")


def test_the_command_prints_the_id_of_each_event_when_verbose(lab: Running) -> None:
    assert run(f"{lab.url}/seven", "-v", "--limit", "3") == (0, b"1\t1\n2\t2\n3\t3\n", "")
    assert run(f"{lab.url}/finite", "--verbose") == (0, b"\ta\n\tend: {}\n", "")


def test_the_command_accepts_a_path_of_the_configured_server(lab: Running) -> None:
    assert run("/finite", "--url", lab.url) == (0, b"a\nend: {}\n", "")
    assert run("/finite", STREAMLAB_URL=f"127.0.0.1:{lab.port}/") == (0, b"a\nend: {}\n", "")
    assert run(f"{lab.url}/finite", STREAMLAB_URL="http://127.0.0.1:9") == (0, b"a\nend: {}\n", "")


def test_the_command_shows_a_terminal_no_control_character(lab: Running) -> None:
    master, slave = pty.openpty()
    try:
        with following(f"{lab.url}/shapes", stdout=slave) as process:
            assert process.wait(20) == 0
            assert errors(process) == ""
        shown = os.read(master, 65536)
    finally:
        os.close(slave)
        os.close(master)
    assert shown.replace(b"\r\n", b"\n") == (
        b"one\ntwo\n  lines\ngap: {}\n\xe2\x82\xac\n"
        + rb"\x1bx: a\x1b[31m"
        + b"\t"
        + rb"b\x00\x7f\x9b"
        + b"\nc\nend: {}\n"
    )


def test_the_command_reports_reconnects_on_stderr(lab: Running) -> None:
    assert run(f"127.0.0.1:{lab.port}/cut") == (
        0,
        b"1\ntwo\nend: {}\n",
        "connection lost; retrying in 0.0 s after id 1\n",
    )
    assert run(f"{lab.url}/seven", "--last-event-id", "5") == (
        0,
        b"6\n7\n",
        "stream ended; retrying in 0.0 s after id 7\n",
    )


def test_the_command_exits_at_its_limit(lab: Running) -> None:
    assert run(f"{lab.url}/held", "--limit", "2") == (0, b"1\n2\n", "")
    assert run(f"{lab.url}/seven", "--limit", "4") == (
        0,
        b"1\n2\n3\n4\n",
        "stream ended; retrying in 0.0 s after id 3\n",
    )
    status, output, message = run(f"{lab.url}/held", "--limit", "0")
    assert (status, output) == (2, b"")
    assert message.startswith("streamlab follow: invalid value for '--limit': ")


def test_the_command_without_reconnects_exits_with_0_at_a_regular_end_and_with_1_at_a_break(lab: Running) -> None:
    assert run(f"{lab.url}/seven", "--no-reconnect") == (0, b"1\n2\n3\n", "")
    assert run(f"{lab.url}/cut", "--no-reconnect") == (1, b"1\n", f"streamlab: {lab.url}/cut: connection lost\n")


def test_the_command_reports_an_error_response_in_one_line_with_status_1(lab: Running) -> None:
    assert run(f"{lab.url}/held?count=-1") == (
        1,
        b"",
        f"streamlab: {lab.url}/held?count=-1 returned 422: Invalid parameters: count. - "
        "count: input should be greater than or equal to 0\n",
    )
    assert run(f"{lab.url}/malice") == (
        1,
        b"",
        f"streamlab: {lab.url}/malice returned 403: no\\x1b[31m\\x0astreamlab: entry \u20ac\n",
    )


def test_the_command_rejects_an_invalid_url_with_status_2() -> None:
    assert run("ftp://example.org/") == (2, b"", "streamlab: 'ftp://example.org/' is not an http(s) URL\n")


@pytest.mark.parametrize("path", ["/held", "/held?count=100000"], ids=["a quiet stream", "a busy stream"])
def test_the_command_exits_quietly_when_the_reader_of_its_pipe_exits(lab: Running, path: str) -> None:
    with logging(lab, 'outcome="client left"'), following(f"{lab.url}{path}") as process:
        assert lines(process, 3) == ["1\n", "2\n", "3\n"]
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(20) == 0
        assert errors(process) == ""


def test_the_command_exits_quietly_when_a_write_fails_for_lack_of_a_reader(lab: Running) -> None:
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.shutdown(socket.SHUT_RD)
        with following(f"{lab.url}/held", stdout=writer.fileno()) as process:
            assert process.wait(20) == 0
            assert errors(process) == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which takes nothing")
def test_the_command_reports_that_it_cannot_write(lab: Running) -> None:
    with Path("/dev/full").open("wb") as full, following(f"{lab.url}/held", stdout=full) as process:
        assert process.wait(20) == 1
        assert errors(process) == "streamlab: [Errno 28] No space left on device\n"


def test_ctrl_c_ends_the_command_quietly_with_status_130(lab: Running) -> None:
    with logging(lab, 'outcome="client left"'), following(f"{lab.url}/held") as process:
        assert lines(process, 3) == ["1\n", "2\n", "3\n"]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert errors(process) == ""


def test_the_command_survives_a_killed_server_and_continues_with_the_next(tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        with serving(tmp_path, port=port) as server:
            process = stack.enter_context(following(f"127.0.0.1:{port}/held?count=2"))
            assert process.stderr is not None
            assert lines(process, 2) == ["1\n", "2\n"]
            assert server.terminate(signal.SIGKILL)[0] == -signal.SIGKILL
            assert process.stderr.readline() == "connection lost; retrying in 0.0 s after id 2\n"
            assert re.fullmatch(r"cannot connect: .*; retrying in 0\.[12] s after id 2\n", process.stderr.readline())
        with serving(tmp_path, port=port) as server:
            assert lines(process, 2) == ["3\n", "4\n"]
            assert server.terminate()[0] == 0
            notice = next(line for line in process.stderr if not line.startswith("cannot connect: "))
            assert re.fullmatch(r"stream ended; retrying in \d+\.\d s after id 4\n", notice)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
