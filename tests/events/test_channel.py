"""Channels on the process that `make run` starts: publish once, resume from any id, fan out to everyone."""

import http.client
import json
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from streamlab import View
from tests.support.connections import EventStream, Received, read_all, read_crowd, read_until
from tests.support.latency import assert_health_is_prompt_during
from tests.support.servers import Running
from tests.support.valkey import Valkey

LOADED_PLUGINS: tuple[str, ...] = ()

BOARD = '''
    """Channels that tests publish to and follow."""

    import asyncio
    import logging
    import time
    from contextlib import asynccontextmanager
    from dataclasses import dataclass

    from aiohttp import web
    from pydantic import BaseModel, Field
    from streamlab import EVENTS, Retention, Scenario, View, encode_event, endpoint, follow, hookimpl

    log = logging.getLogger(__name__)


    class Name(BaseModel):
        name: str


    def broken(event):
        if event.data == b'"trap"':
            raise ValueError("this view is broken")
        return True


    @dataclass(frozen=True)
    class Slowly:
        """Accepts events that contain a text, slowly."""

        text: str
        seconds: float

        def __call__(self, event):
            time.sleep(self.seconds)
            return self.text.encode() in event.data


    class Where(BaseModel):
        contains: str = ""
        seconds: float = 0
        broken: bool = False
        after: str = ""
        tail: int | None = None
        since: float | None = None
        limit: int | None = None
        keys: list[str] = []
        conflate: float = 0


    class Board(Scenario):
        """Channels for tests."""

        keep: int = 1000
        producer: bool = False

        def channel(self, request, name):
            keep = Retention(self.keep, 3600)
            return request.app[EVENTS].channel(name, retention=keep, finite=name.startswith("finite"))

        @hookimpl
        @asynccontextmanager
        async def lifespan(self, app):
            async def produce():
                log.info("the producer runs here")
                channel = app[EVENTS].channel("produced")
                while True:
                    await channel.publish({"pid": __import__("os").getpid()})
                    await asyncio.sleep(0.02)

            async with asyncio.TaskGroup() as group:
                task = group.create_task(app[EVENTS].run_as_leader("board", produce)) if self.producer else None
                yield
                if task:
                    task.cancel()

        @endpoint("GET", "/board/{name}", path_model=Name, query=Where, sends="text/event-stream")
        async def read(self, request, path, query):
            accepts = broken if query.broken else None
            if query.contains:
                accepts = Slowly(query.contains, query.seconds)
            # A list, and no view, as authors begin.
            view = View(keys=query.keys or None, accepts=accepts, conflate=query.conflate)
            if view == View():
                view = None
            return await follow(
                request, self.channel(request, path.name), view=view, after=query.after, tail=query.tail,
                since=None if query.since is None else lambda event: event.time >= query.since * 1000,
                limit=query.limit,
            )

        @endpoint("POST", "/board/{name}", path_model=Name, takes="application/json")
        async def write(self, request, path):
            drafts = [encode_event(data, event, key=key) for data, event, key in await request.json()]
            checkpoint = None if drafts else ("place", "here")
            return web.json_response(await self.channel(request, path.name).publish_all(drafts, checkpoint=checkpoint))

        @endpoint("DELETE", "/board/{name}", path_model=Name)
        async def forget(self, request, path):
            await self.channel(request, path.name).delete()
            return web.Response(status=204)

        @endpoint("POST", "/ends", takes="application/json")
        async def end(self, request):
            """Publish the end of each channel of a list."""
            for name in await request.json():
                await self.channel(request, name).publish({"done": True}, "end")
            return web.Response(status=204)

        @endpoint("POST", "/deletions", takes="application/json")
        async def forget_all(self, request):
            """Delete each channel of a list."""
            for name in await request.json():
                await self.channel(request, name).delete()
            return web.Response(status=204)


    @hookimpl
    def register_scenarios():
        return [Board]
'''

LATE = '''
    """Finds the last position of a channel once there is a file `gate`."""

    import asyncio
    from pathlib import Path

    from streamlab import Channel

    last = Channel.last


    async def late(channel):
        while not Path("gate").exists():
            await asyncio.sleep(0.005)
        return await last(channel)


    Channel.last = late
'''

QUIET = "[scenarios.ticker]\nenabled = false\n[scenarios.logs]\nenabled = false\n"


@pytest.fixture
def serve(start: Callable[..., Running]) -> Callable[..., Running]:
    def serving(config: str = "", **options: Any) -> Running:
        return start(QUIET + config, board=BOARD, **options)

    return serving


def publish(server: Running, *data: Any, channel: str = "c", event: str = "", key: str = "") -> list[str]:
    body = json.dumps([[item, event, key] for item in data], ensure_ascii=False).encode()
    status, _, response = server.get(
        f"/board/{channel}", {"Content-Type": "application/json"}, method="POST", body=body
    )
    assert status == 200, response
    return list(json.loads(response))


def data(events: Sequence[Any]) -> list[Any]:
    return [event.json for event in events]


# -- what is on the wire


def test_an_event_has_only_an_id_and_data(serve: Callable[..., Running]) -> None:
    server = serve()
    with server.send("GET /board/c?limit=3 HTTP/1.1\nHost: localhost\nConnection: close") as connection:
        head = read_until(connection, b"\r\n\r\n")
        ids = publish(server, {"price": 1.5, "name": "é\u2028"}, "plain\ntext\r\nof lines\rfour")
        body = read_until(connection, b"four\n\n\r\n")
        publish(server, 3, event="tick")
        body += read_all(connection)
    assert b"\r\nContent-Type: text/event-stream\r\n" in head
    assert b"\r\nCache-Control: no-store, no-transform\r\n" in head
    assert b"\r\nX-Accel-Buffering: no\r\n" in head
    assert b"Content-Length" not in head
    epoch = ids[0].partition("-")[0]
    assert re.fullmatch(r"\d{13}", epoch)
    first = f'id: {epoch}-1\ndata: {{"price":1.5,"name":"é\u2028"}}\n\n'.encode()
    second = f"id: {epoch}-2\ndata: plain\ndata: text\ndata: of lines\ndata: four\n\n".encode()
    third = f"id: {epoch}-3\nevent: tick\ndata: 3\n\n".encode()
    assert body == b"%x\r\n%b\r\n" % (len(first + second), first + second) + b"%x\r\n%b\r\n" % (len(third), third) + (
        b"0\r\n\r\n"
    )


def test_http_1_0_gets_the_same_events_without_chunks(serve: Callable[..., Running]) -> None:
    server = serve()
    with server.send("GET /board/c?limit=2 HTTP/1.0") as connection:
        read_until(connection, b"\r\n\r\n")
        ids = publish(server, 1, 2)
        body = read_all(connection)
    assert body == f"id: {ids[0]}\ndata: 1\n\nid: {ids[1]}\ndata: 2\n\n".encode()


def test_head_has_the_headers_and_no_event(serve: Callable[..., Running]) -> None:
    server = serve()
    publish(server, 1)
    status, headers, body = server.get("/board/c?after=1-0", method="HEAD")
    assert (status, headers["content-type"], body) == (200, "text/event-stream", b"")


def test_headers_are_sent_before_the_first_event(serve: Callable[..., Running]) -> None:
    server = serve()
    with EventStream(server, "/board/nothing", timeout=2) as stream:
        assert stream.status == 200


def test_line_breaks_and_fields_in_data_cannot_forge_an_event(serve: Callable[..., Running]) -> None:
    server = serve(tracebacks=True)
    hostile = 'x\r\rid: 9-9\revent: gap\n\ndata: "forged"\r\n\r\nretry: 1'
    publish(server, hostile, hostile, channel="h")
    with EventStream(server, "/board/h?tail=2") as stream:
        events = stream.take(2)
    for event in events:
        assert event.raw.count(b"\n\n") == 1
        assert [line[:6] for line in event.raw.strip().split(b"\n")[1:]] == [b"data: "] * 8
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with closing(connection):
        connection.request(
            "POST", "/board/h", json.dumps([["x", "a\nid: 1", ""]]), {"Content-Type": "application/json"}
        )
        assert connection.getresponse().status == 500  # a fault of the scenario, which chooses the names of its events
    server.wait_for_log("holds a line break")


# -- resuming


def test_a_client_that_resumes_gets_the_bytes_of_one_that_stayed_connected(serve: Callable[..., Running]) -> None:
    server = serve()
    with EventStream(server, "/board/c?limit=20") as stayed:
        for number in range(20):
            publish(server, {"n": number}, event="tick" if number % 3 else "")
        seen = list(stayed)
    for index in (0, 7, 18):
        with EventStream(server, f"/board/c?limit={19 - index}", after=seen[index].id) as back:
            assert list(back) == seen[index + 1 :]
        with EventStream(server, f"/board/c?limit={19 - index}&after={seen[index].id}") as back:
            assert list(back) == seen[index + 1 :]


def test_the_header_takes_precedence_over_the_query(serve: Callable[..., Running]) -> None:
    server = serve()
    ids = publish(server, 1, 2, 3)
    with EventStream(server, f"/board/c?limit=1&after={ids[0]}", after=ids[1]) as stream:
        assert data(list(stream)) == [3]


def test_an_empty_last_event_id_is_ignored(serve: Callable[..., Running]) -> None:
    server = serve()
    publish(server, 1)
    with EventStream(server, "/board/c?limit=1", after="") as stream:
        publish(server, 2)
        assert data(list(stream)) == [2]


def test_history_and_live_events_meet_without_gap_or_repeat(serve: Callable[..., Running]) -> None:
    server = serve()
    ids = publish(server, *range(500))
    with ExitStack() as held:
        streams = []
        for number in range(500, 540):
            streams.append(held.enter_context(EventStream(server, "/board/c?limit=545", after=f"{ids[0]}")))
            publish(server, *range(number * 1, number + 1))
        publish(server, *range(540, 600))
        for stream in streams:
            assert data(stream.take(545)) == list(range(1, 546))


@pytest.mark.parametrize(
    "wrong",
    [
        "42",
        "-1--1",
        "-5-7",
        "1e3-4",
        "9" * 40,
        f"{'9' * 40}-1",
        "1-" + "9" * 200,
        "\u0661-\u0662",
        "1-1; DROP TABLE events",
        "<script>",
        "1-2-3",
        "None",
        "1-2.",
        "1-2.GAP",
        "\u00ff\u00fe",
    ],
)
def test_an_invalid_id_is_a_gap_and_then_every_retained_event(serve: Callable[..., Running], wrong: str) -> None:
    server = serve()
    ids = publish(server, 1, 2)
    head = f"GET /board/c?limit=2 HTTP/1.1\nHost: localhost\nConnection: close\nLast-Event-ID: {wrong}"
    received = read_all(server.send(head)).decode()
    assert received.startswith("HTTP/1.1 200 OK\r\n")
    epoch = ids[0].partition("-")[0]
    assert f"id: {epoch}-0.gap\nevent: gap\ndata: " in received
    assert f"id: {ids[0]}\ndata: 1\n\n" in received
    assert f"id: {ids[1]}\ndata: 2\n\n" in received
    assert "<script>" not in received


def test_a_line_break_in_an_id_is_not_http(serve: Callable[..., Running]) -> None:
    server = serve()
    for line_break in ("\r", "\r\n", "\n", "\0"):
        with server.connect() as connection:
            connection.sendall(
                f"GET /board/c?limit=1 HTTP/1.1\r\nHost: a\r\nLast-Event-ID: 1{line_break}2\r\n\r\n".encode()
            )
            assert connection.recv(100)[9:10] == b"4"
    status, _, body = server.get("/board/c?limit=0&after=1%0D%0A%0D%0Adata:%20x")
    assert (status, b"\ndata: x" in body) == (200, False)


def test_an_id_before_the_retention_gets_the_number_of_missing_events(serve: Callable[..., Running]) -> None:
    server = serve("[scenarios.board]\nkeep = 10")
    ids = publish(server, *range(8))
    publish(server, *range(8, 40))
    with EventStream(server, "/board/c?limit=10", after=ids[1]) as stream:
        gap, *rest = list(stream)
    epoch = ids[0].partition("-")[0]
    assert (gap.event, gap.id) == ("gap", f"{epoch}-30.gap")
    assert gap.json == {
        "reason": "the events after that id are no longer retained",
        "missing": 28,
        "after": ids[1],
        "until": f"{epoch}-30",
    }
    assert data(rest) == list(range(30, 40))
    with EventStream(server, "/board/c?limit=10", after=gap.id) as stream:  # a gap has an id to resume from
        assert list(stream) == rest


def test_an_id_ahead_of_the_channel_is_a_gap_and_then_new_events(serve: Callable[..., Running]) -> None:
    server = serve()
    ids = publish(server, 1, 2)
    epoch = ids[0].partition("-")[0]
    with EventStream(server, "/board/c?limit=1", after=f"{epoch}-99") as stream:
        events = iter(stream)
        gap = next(events)
        assert (gap.event, gap.id, gap.json["missing"]) == ("gap", f"{epoch}-2.gap", 0)
        publish(server, 3)
        assert next(events).json == 3


def test_a_slow_client_gets_the_end_whichever_write_it_falls_behind_at(serve: Callable[..., Running]) -> None:
    server = serve()
    large = "x" * 60_000
    for number in range(10):  # in one of them the write that ends the channel fills the buffer of the connection
        channel = f"finite{number}"
        with server.send(
            f"GET /board/{channel} HTTP/1.1\nHost: localhost\nConnection: close", receive_buffer=4096
        ) as connection:
            head = read_until(connection, b"\r\n\r\n")
            for _ in range(number):
                publish(server, large, channel=channel)
            body = json.dumps([[large, "", ""], [1, "end", ""]]).encode()
            sent = server.get(f"/board/{channel}", {"Content-Type": "application/json"}, method="POST", body=body)
            assert sent[0] == 200
            received = head.partition(b"\r\n\r\n")[2] + read_all(connection)
        assert received.count(b"data: xxx") == number + 1
        assert received.endswith(b"event: end\ndata: 1\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("engine", ["sqlite", "redis"])
def test_a_channel_that_begins_with_a_checkpoint_has_no_gap_before_its_first_event(
    serve: Callable[..., Running], engine: str, request: pytest.FixtureRequest
) -> None:
    url = "sqlite://" if engine == "sqlite" else request.getfixturevalue("valkey").url
    server = serve(f'[events]\nurl = "{url}"\n')
    publish(server)
    with EventStream(server, "/board/c?limit=1", after="0-0") as stream:
        publish(server, 1)
        assert [(event.event, event.json) for event in stream] == [("", 1)]


def test_an_id_of_a_deleted_channel_never_matches_a_new_event(serve: Callable[..., Running]) -> None:
    server = serve()
    old = publish(server, "old", "old")[0]
    assert server.get("/board/c", method="DELETE")[0] == 204
    with EventStream(server, "/board/c?limit=1", after=old) as stream:
        events = iter(stream)
        assert next(events).event == "gap"
        publish(server, '"new"')
        assert next(events).json == "new"
    with EventStream(server, "/board/c?limit=1", after=old) as stream:
        assert [(event.event, event.data) for event in stream][1:] == [("", '"new"')]


def test_followers_of_a_channel_that_is_deleted_and_recreated_get_a_gap(serve: Callable[..., Running]) -> None:
    server = serve()
    publish(server, 1, 2)
    with EventStream(server, "/board/c?tail=2") as stream:
        assert data(stream.take(2)) == [1, 2]
        server.get("/board/c", method="DELETE")
        publish(server, 3)
        gap, event = stream.take(2)
    assert (gap.event, gap.json["reason"], event.json) == ("gap", "the history of that id is lost", 3)


def test_a_stream_without_an_id_begins_with_the_last_events_or_those_since_a_time(
    serve: Callable[..., Running],
) -> None:
    server = serve()
    for number in range(10):
        publish(server, number, key="even" if number % 2 == 0 else "odd")
    with EventStream(server, "/board/c?tail=3&limit=3") as stream:
        assert data(list(stream)) == [7, 8, 9]
    with EventStream(server, "/board/c?tail=3&limit=3&keys=even") as stream:
        assert data(list(stream)) == [4, 6, 8]
    with EventStream(server, "/board/c?tail=1000&limit=10") as stream:
        assert data(list(stream)) == list(range(10))
    with EventStream(server, "/board/c?since=0&limit=10") as stream:
        assert data(list(stream)) == list(range(10))
    with EventStream(server, f"/board/c?since={time.time() + 60}&limit=1") as stream:
        publish(server, 10)
        assert data(list(stream)) == [10]
    with EventStream(server, "/board/c?tail=0&limit=1") as stream:
        publish(server, 11)
        assert data(list(stream)) == [11]


# -- staying connected


HASTY = """
    import streamlab.events.channel

    streamlab.events.channel.HEARTBEAT_SECONDS = 0.05
"""


def test_a_comment_keeps_every_follower_connected_and_is_not_an_event(serve: Callable[..., Running]) -> None:
    server = serve(hasty=HASTY)
    with server.send("GET /board/c HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"\r\n\r\n")
        assert read_until(connection, b":\n\r\n2\r\n:\n\r\n") == b"2\r\n:\n\r\n" * 2
        (identity,) = publish(server, 1)
        event = f"id: {identity}\ndata: 1\n\n".encode()
        received = read_until(connection, event + b"\r\n2\r\n:\n\r\n")
    assert received.replace(b"2\r\n:\n\r\n", b"") == b"%x\r\n%b\r\n" % (len(event), event)


def test_a_follower_that_waits_for_redis_stays_connected(serve: Callable[..., Running], valkey: Valkey) -> None:
    server = serve(f'[events]\nurl = "{valkey.url}"\n', hasty=HASTY)
    valkey.kill()
    with server.send("GET /board/c?limit=1&after=0-0 HTTP/1.1\nHost: localhost\nConnection: close") as connection:
        read_until(connection, b":\n\r\n2\r\n:\n")
        valkey.start()
        read_until(connection, b":\n\r\n2\r\n:\n")
        publish(server, 1)
        assert b"data: 1\n\n" in read_all(connection)


# -- views


def test_each_view_gets_its_events_and_positions_advance_for_all(serve: Callable[..., Running]) -> None:
    server = serve()
    with ExitStack() as held:
        paths = {key: f"/board/c?limit=3&keys={key}" for key in "abc"}
        streams = {key: held.enter_context(EventStream(server, path)) for key, path in paths.items()}
        both = held.enter_context(EventStream(server, "/board/c?limit=6&keys=a&keys=b"))
        server.wait_for_followers(4)
        for number in range(3):
            for key in "abc":
                publish(server, f'"{key}{number}"', key=key)
        for key, stream in streams.items():
            assert data(list(stream)) == [f"{key}{number}" for number in range(3)]
        assert data(list(both)) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_conflation_sends_the_latest_of_each_key_at_most_once_per_interval(serve: Callable[..., Running]) -> None:
    server = serve()
    with EventStream(server, "/board/c?conflate=3") as stream:
        server.wait_for_followers(1)
        events = iter(stream)
        publish(server, 0, key="a")
        assert next(events).json == 0  # nothing was sent before, so it does not wait
        first = time.monotonic()
        for number in range(1, 20):
            publish(server, number, key="a")
            publish(server, -number, key="b")
        assert [next(events).json, next(events).json] == [19, -19]
        assert time.monotonic() - first > 2.9
        publish(server, 20, key="a")
        assert next(events).json == 20
        assert time.monotonic() - first > 5.8


def test_conflation_catches_up_with_the_latest_alone(serve: Callable[..., Running]) -> None:
    server = serve()
    ids = publish(server, *range(100), key="a")
    publish(server, *range(100, 200), key="b")
    with EventStream(server, "/board/c?conflate=0.1&limit=3", after=ids[10]) as stream:
        events = iter(stream)
        assert [next(events).json, next(events).json] == [99, 199]
        publish(server, 200, key="a")
        assert next(events).json == 200


def test_a_view_that_fails_ends_only_its_followers(serve: Callable[..., Running]) -> None:
    server = serve(tracebacks=True)
    with EventStream(server, "/board/c?broken=1") as broken, EventStream(server, "/board/c?limit=3") as whole:
        server.wait_for_followers(2)
        publish(server, 1)
        publish(server, '"trap"')
        publish(server, 3)
        assert data(list(whole)) == [1, "trap", 3]
        events = iter(broken)
        assert next(events).json == 1
        failed = next(events)
        assert (failed.event, failed.json["status"]) == ("error", 500)
        assert failed.id.endswith("-1.error")
    server.wait_for_log("outcome=failed")


def test_a_follower_without_an_id_is_live_once_its_position_is_known(serve: Callable[..., Running]) -> None:
    """Its stream is open earlier, and what is published until then is not for it."""
    server = serve(late=LATE)
    with server.send("GET /board/c?limit=1 HTTP/1.1\nHost: localhost\nConnection: close") as connection:
        server.wait_for_open_streams(1)
        server.wait_for_followers(0)
        publish(server, "earlier")
        (server.base / "gate").touch()
        server.wait_for_followers(1)
        publish(server, "later")
        body = read_all(connection)
    assert b"data: later\n\n" in body
    assert b"earlier" not in body


# -- endings


@pytest.mark.parametrize("wrong", [{"keys": "AAPL"}, {"accepts": [str.isupper]}])
def test_an_invalid_view_is_rejected_at_its_creation(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        View(**wrong)
    assert View(keys=["a", "b", "a"]) == View(keys=frozenset("ab"))


def texts(events: Iterable[Received]) -> list[str]:
    return [event.data for event in events]


def test_a_slow_filter_delays_no_other_follower_and_preserves_the_order(serve: Callable[..., Running]) -> None:
    """The follower with the filter gets the same events later; others, and /health, do not wait for it."""
    server = serve()
    numbers = [f"event {number}" for number in range(20)]
    with (
        EventStream(server, "/board/c?contains=event&seconds=0.1&tail=0") as slow,
        EventStream(server, "/board/c?contains=event&seconds=0.1&tail=0&limit=3") as slow_too,
        EventStream(server, "/board/c?contains=event%201&tail=0") as quick,
        EventStream(server, "/board/c?tail=0") as plain,
    ):
        server.wait_for_followers(4)
        publish(server, *numbers)
        began = time.monotonic()
        assert texts(plain.take(20)) == numbers
        assert texts(quick.take(11)) == [text for text in numbers if text.startswith("event 1")]
        assert server.get("/health")[0] == 200
        others = time.monotonic() - began
        assert texts(slow.take(20)) == numbers
        assert time.monotonic() - began >= 2.0 > others
        assert texts(slow_too) == numbers[:3]
        publish(server, "event 20", "nothing", "event 21")
        assert texts(slow.take(2)) == ["event 20", "event 21"]


def test_a_filter_that_lags_by_a_megabyte_continues_from_the_log(serve: Callable[..., Running]) -> None:
    server = serve()
    with EventStream(server, "/board/c?contains=x&seconds=0.02&tail=0") as stream:
        server.wait_for_followers(1)
        for number in range(8):
            publish(server, *(f"x{number * 10 + item} " + "y" * 30_000 for item in range(10)))
        assert [text.partition(" ")[0] for text in texts(stream.take(80))] == [f"x{number}" for number in range(80)]


def test_conflation_of_what_a_filter_accepts(serve: Callable[..., Running]) -> None:
    server = serve()
    with EventStream(server, "/board/c?contains=x&conflate=0.3&tail=0") as stream:
        server.wait_for_followers(1)
        publish(server, "x0", key="a")
        assert texts(stream.take(1)) == ["x0"]
        publish(server, "x1", "y", "x2", key="a")
        assert texts(stream.take(1)) == ["x2"]


def test_one_filter_more_than_config_allows_is_429_and_equal_ones_count_once(serve: Callable[..., Running]) -> None:
    server = serve("[events]\nmax_filters = 2\n")
    with ExitStack() as streams:
        first = streams.enter_context(EventStream(server, "/board/c?contains=a"))
        for other in ("c?contains=b", "c?contains=b", "c", "c?keys=k", "d?contains=c"):
            assert streams.enter_context(EventStream(server, f"/board/{other}")).status == 200
        status, headers, body = server.get("/board/c?contains=c")
        assert (status, headers["retry-after"]) == (429, "5")
        assert headers["content-type"].startswith("application/problem+json")
        assert "2 different filters" in json.loads(body)["detail"]
        first.__exit__()
        server.wait_for_open_streams(5)
        assert streams.enter_context(EventStream(server, "/board/c?contains=c")).status == 200


def test_many_followers_that_catch_up_do_not_delay_health(serve: Callable[..., Running]) -> None:
    """Their reads share a budget: without it, each turn of the event loop would serve all of them, and take seconds."""
    server = serve("[scenarios.board]\nkeep = 10000\n")
    for _ in range(10):
        publish(server, *range(400))
    request = b"GET /board/c?after=1-0&limit=4000 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    def crowd() -> None:
        with ExitStack() as stack:
            connections = [stack.enter_context(server.connect()) for _ in range(200)]
            for connection in connections:
                connection.sendall(request)
            received = read_crowd(connections)
        assert [body.count(b"\nid: ") for body in received] == [4001] * 200  # the gap, too

    assert_health_is_prompt_during(server, crowd)


def test_limit_ends_the_stream_after_that_number_of_events(serve: Callable[..., Running]) -> None:
    server = serve()
    ids = publish(server, *range(5))
    with EventStream(server, "/board/c?limit=8", after=ids[0]) as stream:
        server.wait_for_followers(1)
        publish(server, *range(5, 20))  # one batch for all, more than the limit of this one
        assert data(list(stream)) == list(range(1, 9))


def test_a_finite_channel_ends_and_a_client_that_has_its_end_gets_204(serve: Callable[..., Running]) -> None:
    server = serve()
    first = publish(server, 1, channel="finite")[0]
    with EventStream(server, "/board/finite", after=first) as live:
        server.wait_for_followers(1)
        publish(server, 2, channel="finite")
        publish(server, {"total": 2}, channel="finite", event="end")
        events = list(live)
    assert [(event.event, event.json) for event in events] == [("", 2), ("end", {"total": 2})]
    with EventStream(server, "/board/finite", after=first) as late:
        assert list(late) == events
    with EventStream(server, "/board/finite") as latest:  # a client without an id gets it from its beginning
        assert next((event.id, event.json) for event in latest) == (first, 1)
    status, _, body = server.get("/board/finite", {"Last-Event-ID": events[-1].id})
    assert (status, body) == (204, b"")


def test_sigterm_sends_a_farewell_with_an_id_to_resume_from(serve: Callable[..., Running]) -> None:
    server = serve()
    publish(server, 1, 2)
    with EventStream(server, "/board/c?tail=2") as stream, EventStream(server, "/board/none") as empty:
        assert data(stream.take(2)) == [1, 2]
        server.wait_for_followers(2)
        server.process.send_signal(signal.SIGTERM)
        (farewell,) = list(stream)
        (other,) = list(empty)
    assert server.process.wait(10) == 0
    assert re.fullmatch(rb"id: \d+-2\.stop\nevent: stop\nretry: \d{4}\ndata: [^\n]+\n\n", farewell.raw)
    assert other.id == "0-0.stop"
    server = serve()
    publish(server, 3)
    publish(server, 4, channel="none")
    with EventStream(server, "/board/c?limit=1", after=farewell.id) as stream:
        assert [(event.event, event.json) for event in stream] == [("", 3)]
    with EventStream(server, "/board/none?limit=1", after=other.id) as stream:
        assert [(event.event, event.json) for event in stream] == [("", 4)]


def test_a_log_that_cannot_keep_up_responds_503(serve: Callable[..., Running], valkey: Valkey) -> None:
    server = serve(f'[events]\nurl = "{valkey.url}"\n')
    valkey.kill()
    body = json.dumps([["x" * 1_000_000, "", ""]]).encode()
    with ExitStack() as held:
        waiting = []
        for _ in range(9):  # more than the queue holds while the server of the log is unavailable
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            held.enter_context(closing(connection))
            connection.request("POST", "/board/c", body, {"Content-Type": "application/json"})
            waiting.append(connection)
        rejected, _, _ = select.select([connection.sock for connection in waiting], [], [], 20)
        assert len(rejected) == 1
        deadline = time.monotonic() + 10
        while (health := json.loads(server.get("/health")[2]))["status"] == "ok":
            assert time.monotonic() < deadline
        assert (health["status"], health["events"]) == (
            "degraded",
            {
                "engine": "redis",
                "state": "disconnected",
                "reason": "The Redis server of the event log does not respond.",
            },
        )
        valkey.start()
        responses = [connection.getresponse() for connection in waiting]
        assert sorted(response.status for response in responses) == [200] * 8 + [503]
        assert [response.getheader("Retry-After") for response in responses if response.status == 503] == ["5"]
    with EventStream(server, "/board/c?limit=8&tail=8") as stream:
        assert len(list(stream)) == 8


def health_of_log(server: Running, state: str) -> dict[str, Any]:
    """Return the event log in /health once it has this state."""
    deadline = time.monotonic() + 15
    while True:
        health: dict[str, Any] = json.loads(server.get("/health")[2])
        if health["events"]["state"] == state:
            assert health["status"] == ("ok" if state == "ok" else "degraded")
            return dict(health["events"])
        assert time.monotonic() < deadline, health
        time.sleep(0.05)


def test_a_log_deleted_while_two_servers_use_it_loses_no_acknowledged_event(serve: Callable[..., Running]) -> None:
    servers = serve(), serve()
    with EventStream(servers[1], "/board/c") as stream:
        events = iter(stream)
        servers[1].wait_for_followers(1)
        ids = publish(servers[0], 0, 1)
        assert [next(events).id for _ in ids] == ids
        for file in (servers[0].base / "var").glob("streamlab.db*"):
            if file.is_file():
                file.unlink()
        for number in range(2, 12):
            ids += publish(servers[0], number)
        assert [next(events).id for _ in ids[2:]] == ids[2:]
        ids += publish(servers[1], 12)
        assert next(events).id == ids[12]
    for server in servers:
        assert server.terminate()[0] == 0
    server = serve()
    with EventStream(server, "/board/c?limit=12", after=ids[0]) as stream:
        assert [(event.id, event.json) for event in stream] == list(zip(ids[1:], range(1, 13), strict=True))
    assert health_of_log(server, "ok") == {"engine": "sqlite", "state": "ok"}


def test_a_log_that_cannot_be_written_is_503_and_degraded_until_it_can(serve: Callable[..., Running]) -> None:
    server = serve('[server]\nlog_file = ""\n')
    first = publish(server, "x" * 500_000)
    body = json.dumps([["y" * 900_000, "", ""]]).encode()
    _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1_000_000, hard))  # as a full disk, for this process
    status, headers, response = server.get("/board/c", {"Content-Type": "application/json"}, method="POST", body=body)
    assert (status, headers["retry-after"]) == (503, "5")
    state = health_of_log(server, "degraded")
    assert (state["engine"], state["reason"]) == ("sqlite", json.loads(response)["detail"])
    assert re.fullmatch(r"The event log fails: (disk I/O error|database or disk is full)\.", state["reason"])
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    health_of_log(server, "ok")
    second = publish(server, "z")
    with EventStream(server, "/board/c?limit=1", after=first[0]) as stream:
        assert [event.id for event in stream] == second


def test_followers_get_a_gap_and_new_events_if_the_log_lost_its_data_and_its_clock_is_behind(
    serve: Callable[..., Running], valkey: Valkey
) -> None:
    import redis

    server = serve(f'[events]\nurl = "{valkey.url}"\n')
    stream, epoch = "streamlab:{c}:events", int((time.time() + 3600) * 1000)
    fields: dict[Any, Any] = {"t": epoch, "e": "", "k": "", "d": "0"}
    with redis.Redis.from_url(valkey.url) as client:
        client.xadd(stream, fields, f"{epoch}-1")  # as if its clock were an hour ahead
    with EventStream(server, "/board/c", after="1-0") as follower:
        events = iter(follower)
        assert [next(events).id for _ in range(2)] == [f"{epoch}-0.gap", f"{epoch}-1"]
        server.wait_for_followers(1)
        valkey.kill()
        shutil.rmtree(valkey.folder / "appendonlydir")
        valkey.start()
        with redis.Redis.from_url(valkey.url) as client:  # a process that does not know the old epoch
            client.xadd(stream, fields, "1700000000000-1")
            client.xadd(stream, fields, "1700000000000-2")
        gap, *rest = [next(events) for _ in range(3)]
        assert (gap.event, gap.json["after"]) == ("gap", f"{epoch}-1")
        assert [event.id for event in rest] == ["1700000000000-1", "1700000000000-2"]
        ids = publish(server, 3)
        assert next(events).id == ids[0] == "1700000000000-3"


@pytest.mark.timeout(90)
def test_a_producer_that_was_stopped_publishes_nothing_after_another_took_over(
    serve: Callable[..., Running], valkey: Valkey
) -> None:
    config = f'[events]\nurl = "{valkey.url}"\n[scenarios.board]\nproducer = true\n'
    servers = [serve(config)]
    servers[0].wait_for_log("the producer runs here")
    servers.append(serve(config))
    with EventStream(servers[1], "/board/produced") as stream:
        events = iter(stream)
        old = next(events).json["pid"]
        assert old == servers[0].process.pid
        servers[0].process.send_signal(signal.SIGSTOP)
        try:
            while (new := next(events).json["pid"]) == old:
                pass
        finally:
            servers[0].process.send_signal(signal.SIGCONT)
        assert {event.json["pid"] for event in (next(events) for _ in range(50))} == {new}
    servers[0].wait_for_log("the lease board is lost", seconds=30)


@pytest.mark.timeout(120)
def test_a_thousand_short_channels_leave_nothing_behind(serve: Callable[..., Running]) -> None:
    server = serve()
    json_type = {"Content-Type": "application/json"}
    for number in range(0, 1000, 50):
        names = [f"finite{n}" for n in range(number, number + 50)]
        body = json.dumps(names).encode()
        with ExitStack() as held:
            streams = [held.enter_context(EventStream(server, f"/board/{name}")) for name in names]
            server.wait_for_followers(len(names))
            assert server.get("/ends", json_type, method="POST", body=body)[0] == 204
            assert all([event.event for event in stream] == ["end"] for stream in streams)
        assert server.get("/deletions", json_type, method="POST", body=body)[0] == 204
    assert server.terminate()[0] == 0
    with closing(sqlite3.connect(server.base / "var/streamlab.db")) as database:
        for table in ("channels", "events", "checkpoints"):
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


# -- slow clients


def stalled(server: Running, path: str) -> socket.socket:
    connection = server.send(f"GET {path} HTTP/1.1\nHost: localhost", receive_buffer=4096)
    read_until(connection, b"\r\n\r\n")
    return connection


def test_a_client_that_was_slow_gets_everything_once_it_reads(serve: Callable[..., Running]) -> None:
    server = serve()
    text = "x" * 2000
    with stalled(server, "/board/c?limit=900") as connection:
        server.wait_for_followers(1)
        for number in range(0, 900, 30):
            publish(server, *({"n": n, "text": text} for n in range(number, number + 30)))
        body = read_all_chunks(connection)
    assert [json.loads(line[6:])["n"] for line in body.split(b"\n") if line.startswith(b"data: ")] == list(range(900))
    assert b"event: gap" not in body


def read_all_chunks(connection: socket.socket) -> bytes:
    """Return the body of a chunked response whose head has been read."""
    body = bytearray()
    with connection.makefile("rb") as file:
        while size := int(file.readline(), 16):
            body += file.read(size)
            file.readline()
    return bytes(body)


def test_a_slow_client_that_retention_overtakes_gets_the_number_of_missed_events(serve: Callable[..., Running]) -> None:
    server = serve("[scenarios.board]\nkeep = 50")
    text = "x" * 10_000
    with stalled(server, "/board/c") as connection:
        server.wait_for_followers(1)
        for number in range(0, 800, 20):
            publish(server, *({"n": n, "text": text} for n in range(number, number + 20)))
        received = read_until(connection, b'"n":799')
    numbers = [int(match) for match in re.findall(rb'"n":(\d+)', received)]
    missing = [int(match) for match in re.findall(rb'"missing":(\d+)', received)]
    assert len(missing) >= 1
    assert len(numbers) + sum(missing) == 800
    assert numbers == sorted(set(numbers))


def test_stalled_clients_use_bounded_memory_and_are_disconnected(serve: Callable[..., Running]) -> None:
    server = serve("[server]\nstall_seconds = 2", fresh=True)
    count, text = 40, "x" * 5000
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("reads memory from /proc, which this system does not have")
    for _ in range(30):  # until the memory of the server no longer grows
        publish(server, *({"n": n, "text": text} for n in range(100)))
    with ExitStack() as held:
        for _ in range(count):
            held.enter_context(stalled(server, "/board/c"))
        server.wait_for_followers(count)
        before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
        for _ in range(20):
            publish(server, *({"n": n, "text": text} for n in range(100)))
        after = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
        assert (after - before) / count < 256
        server.wait_for_log('outcome="client left"')
        server.wait_for_open_streams(0)


def test_an_idle_follower_uses_little_memory(serve: Callable[..., Running]) -> None:
    server, count = serve(fresh=True), 400
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("reads memory from /proc, which this system does not have")

    def follow(number: int, held: ExitStack) -> int:
        for _ in range(number):
            connection = held.enter_context(server.send("GET /board/c HTTP/1.1\nHost: localhost"))
            read_until(connection, b"\r\n\r\n")
        server.wait_for_followers(number)
        return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])  # type: ignore[index]

    publish(server, 1)
    with ExitStack() as first:
        before = follow(20, first)  # what is allocated once
    server.wait_for_followers(0)
    with ExitStack() as held:
        assert (follow(count, held) - before) / count < 12.2  # 11, and what it varies by


def test_a_large_event_arrives_completely_and_a_client_that_stalls_in_it_is_disconnected(
    serve: Callable[..., Running],
) -> None:
    server = serve()
    large = {"text": "é" * 400_000}
    ids = publish(server, large, 2)
    with EventStream(server, "/board/c?limit=2&tail=2") as stream:
        assert data(list(stream)) == [large, 2]
    with stalled(server, f"/board/c?after={ids[0].partition('-')[0]}-0") as connection:
        assert connection.recv(100)  # only a part of it
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        rest = read_all(connection)
    assert b"event: stop" not in rest
    assert not rest.endswith(b"0\r\n\r\n")


# -- producers


@pytest.mark.parametrize("engine", ["sqlite", "redis"])
def test_a_producer_runs_in_one_process_and_moves_when_that_dies(
    serve: Callable[..., Running], request: pytest.FixtureRequest, engine: str
) -> None:
    config = "[scenarios.board]\nproducer = true\n"
    if engine == "redis":
        valkey: Valkey = request.getfixturevalue("valkey")
        config += f'[events]\nurl = "{valkey.url}"\n'
    first = serve(config)
    first.wait_for_log("the producer runs here")
    second = serve(config)
    with EventStream(second, "/board/produced?tail=1") as stream:
        events = iter(stream)
        seen = [next(events) for _ in range(20)]
        assert {event.json["pid"] for event in seen} == {first.process.pid}
        first.process.kill()
        first.process.wait()
        died = time.monotonic()
        while (event := next(events)).json["pid"] == first.process.pid:
            seen.append(event)
        assert event.json["pid"] == second.process.pid
        assert time.monotonic() - died < 10
        seen.append(event)
    offsets = [int(event.id.partition("-")[2]) for event in seen]
    assert offsets == list(range(offsets[0], offsets[0] + len(seen)))


def test_a_producer_moves_at_once_when_its_process_stops(serve: Callable[..., Running]) -> None:
    config = "[scenarios.board]\nproducer = true\n"
    first = serve(config)
    first.wait_for_log("the producer runs here")
    second = serve(config)
    first.terminate()
    second.wait_for_log("the producer runs here", seconds=5)
