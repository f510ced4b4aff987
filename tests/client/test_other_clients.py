"""Common clients that reconnect by themselves: no event is lost or repeated, whatever is killed."""

import asyncio
import http.client
import itertools
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from playwright.async_api import Browser, Page

from tests.support.browsers import wait_for
from tests.support.connections import EventStream, read_until
from tests.support.servers import Running, free_port

PUSH = '[scenarios.ticker]\nsource = "push"\n[scenarios.logs]\nenabled = false\n'
PATH = "/stream/stock-ticker"
FROM_THE_BEGINNING = f"{PATH}?last_event_id=0-0"
"""Path that clients request: the header of later requests takes precedence over its query."""

# Heartbeats are sent every ten seconds, too rarely for a test: here they are between all events.
HEARTBEATS = "import streamlab.events.channel\n\nstreamlab.events.channel.HEARTBEAT_SECONDS = 0.02\n"

FINITE = '''
    """A channel that ends."""

    from aiohttp import web
    from streamlab import END, EVENTS, Scenario, endpoint, follow, hookimpl


    class Race(Scenario):
        """Three laps."""

        @endpoint("GET", "/race", sends="text/event-stream")
        async def watch(self, request):
            return await follow(request, request.app[EVENTS].channel("race", finite=True), after="0-0")

        @endpoint("POST", "/race")
        async def run(self, request):
            channel = request.app[EVENTS].channel("race", finite=True)
            for lap in range(3):
                await channel.publish({"lap": lap})
            await channel.publish({"laps": 3}, END)
            return web.Response(status=204)


    @hookimpl
    def register_scenarios():
        return [Race]
'''


class Received(NamedTuple):
    """An event as a client has parsed it."""

    id: str
    event: str
    data: str


def push(server: Running, *prices: int) -> None:
    body = "\n".join(json.dumps({"symbol": "ACME", "price": price}) for price in prices).encode()
    status, _, body = server.get(PATH, {"Content-Type": "application/jsonl"}, method="POST", body=body)
    assert status == 202, body


def everything(server: Running, last: int) -> list[Received]:
    """Return the events of the channel, up to a price, as an independent client reads them."""
    received: list[Received] = []
    with EventStream(server, FROM_THE_BEGINNING) as stream:
        for event in stream:
            if event.event != "gap":
                received.append(Received(event.id, event.event or "message", event.data))
                if event.json["price"] == last:
                    return received
    raise AssertionError("the stream ended")


def check(received: list[Received], expected: list[Received]) -> None:
    """Compare one by one: the difference of two long lists takes pytest minutes."""
    for one, other in itertools.zip_longest(received, expected):
        assert one == other


def wait_until(reached: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def publisher(server: Callable[[], Running]) -> Iterator[None]:
    """Push numbered prices during the block, whether or not a server responds."""
    over = threading.Event()
    failures: list[BaseException] = []

    def publish() -> None:
        try:
            for price in itertools.count():
                if over.wait(0.001):
                    return
                with suppress(OSError, http.client.HTTPException):  # the next one is sent once a server runs again
                    push(server(), price)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failures


# -- three common loops: follow, store the id, and reconnect with it

Follow = Callable[[str, str], Iterator[Received]]


def with_httpx_sse(url: str, last: str) -> Iterator[Received]:
    import httpx
    import httpx_sse

    headers = {"Last-Event-ID": last} if last else {}
    with (
        suppress(httpx.TransportError),
        httpx.Client(timeout=10) as client,
        httpx_sse.connect_sse(client, "GET", url, headers=headers) as source,
    ):
        for event in source.iter_sse():
            yield Received(event.id, event.event, event.data)


def with_sseclient(url: str, last: str) -> Iterator[Received]:
    import requests
    import sseclient

    headers = {"Last-Event-ID": last} if last else {}
    with suppress(requests.RequestException), requests.get(url, headers=headers, stream=True, timeout=10) as response:
        for event in sseclient.SSEClient(iter(response)).events():
            yield Received(event.id or "", event.event, event.data)


def with_curl(url: str, last: str) -> Iterator[Received]:
    words = ["curl", "-sN", *(["-H", f"Last-Event-ID: {last}"] if last else []), url]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, bufsize=1) as curl:
        assert curl.stdout is not None
        fields: dict[str, str] = {}
        for count, line in enumerate(curl.stdout):
            if line == "\n" and fields:
                yield Received(fields["id"], fields.get("event", "message"), fields["data"])
                fields = {}
            elif not line.startswith(":"):
                name, _, value = line.rstrip("\n").partition(": ")
                fields[name] = value
            if count == 60 and not last:
                curl.kill()  # once, in mid-stream: curl itself must be restarted
    # A killed server does not look like the end of the stream.
    assert curl.returncode in (-signal.SIGKILL, 7, 18, 52, 56)


class Client(threading.Thread):
    """Follows until a price arrives, with a new connection whenever the old one ends."""

    def __init__(self, follow: Follow, url: str, until: int) -> None:
        super().__init__(daemon=True)
        self._follow = follow
        self._url = url
        self._until = f'"price": {until},'
        self.received: list[Received] = []
        self.connections = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        last = ""
        try:
            while True:
                self.connections += 1
                for received in self._follow(self._url, last):
                    self.received.append(received)
                    last = received.id
                    if self._until in received.data:
                        return
                time.sleep(0.02)
        except BaseException as error:
            self.failure = error


LAST = 1_000_000


@pytest.mark.parametrize("follow", [with_httpx_sse, with_sseclient, with_curl])
def test_a_client_that_reconnects_after_the_server_was_killed_has_every_event_once(
    start: Callable[..., Running], follow: Follow
) -> None:
    if follow is with_curl and shutil.which("curl") is None:
        pytest.skip("needs curl")
    port = free_port()
    server = start(PUSH, port=port, heartbeats=HEARTBEATS)
    client = Client(follow, server.url + FROM_THE_BEGINNING, LAST)
    client.start()
    server.wait_for_followers(1)
    with publisher(lambda: server):
        wait_until(lambda: len(client.received) >= 50 or not client.is_alive())
        server.terminate(signal.SIGKILL)
        server = start(PUSH, port=port, heartbeats=HEARTBEATS)
        seen = len(client.received)
        wait_until(lambda: len(client.received) >= seen + 50 or not client.is_alive())
    server.wait_for_followers(1)
    with server.send(f"GET {PATH} HTTP/1.1\nHost: localhost") as other:
        read_until(other, b"2\r\n:\n")  # heartbeats go to all followers, so the client has received some too
        read_until(other, b"2\r\n:\n")
    push(server, LAST)
    client.join(20)
    assert client.failure is None
    assert client.connections >= 2
    check(client.received, everything(server, LAST))  # all events and nothing else: no heartbeat became an event
    offsets = [int(received.id.partition("-")[2]) for received in client.received]
    assert offsets == list(range(1, len(offsets) + 1))


# -- a browser, which reconnects by itself

FOLLOW = """
    path => {
        window.received = [];
        window.source = new EventSource(path);
        for (const name of ["message", "progress", "gap", "end", "stop"])
            source.addEventListener(name, event => received.push([event.lastEventId, event.type, event.data]));
        return new Promise((resolve, reject) => {
            source.onopen = () => resolve();
            source.onerror = () => reject(new Error("cannot be opened"));
        }).finally(() => { source.onerror = null; });
    }
"""


async def follow_in(page: Page, url: str, path: str) -> None:
    """Open a page of the server and follow a stream there."""
    await page.goto(f"{url}/health", wait_until="domcontentloaded")
    await page.evaluate(FOLLOW, path)


async def received_in(page: Page) -> list[Received]:
    return [Received(*fields) for fields in await page.evaluate("received")]


async def wait_for_price(page: Page, price: int) -> None:
    await wait_for(page, f"""received.some(([id, type, data]) => data.includes('"price": {price},'))""")


async def test_a_browser_reconnects_after_the_server_was_killed_and_has_every_event_once(
    start: Callable[..., Running], browser: Browser
) -> None:
    port = free_port()
    server = await asyncio.to_thread(start, PUSH, port=port)
    page = await browser.new_page()
    await follow_in(page, server.url, FROM_THE_BEGINNING)

    def interrupt() -> None:
        nonlocal server
        with publisher(lambda: server):
            with EventStream(server, f"{PATH}?limit=50") as other:
                list(other)
            server.terminate(signal.SIGKILL)
            server = start(PUSH, port=port)
        push(server, LAST)

    await asyncio.to_thread(interrupt)
    await wait_for_price(page, LAST)
    check(await received_in(page), await asyncio.to_thread(everything, server, LAST))


async def test_a_browser_that_has_the_end_of_a_channel_gets_204_and_does_not_reconnect(
    start: Callable[..., Running], browser: Browser
) -> None:
    server = await asyncio.to_thread(start, PUSH, race=FINITE)
    page = await browser.new_page()
    await follow_in(page, server.url, "/race")
    await asyncio.to_thread(server.get, "/race", method="POST")
    await wait_for(page, "source.readyState === EventSource.CLOSED")
    assert [(received.event, received.data) for received in await received_in(page)] == [
        ("message", '{"lap":0}'),
        ("message", '{"lap":1}'),
        ("message", '{"lap":2}'),
        ("end", '{"laps":3}'),
    ]
    assert re.findall(r"method=GET path=/race .*?status=(\d+)", server.wait_for_log("GET path=/race status=204")) == [
        "200",
        "204",
    ]


async def test_a_browser_that_reconnects_to_a_long_task_continues_the_same_one(
    start: Callable[..., Running], browser: Browser
) -> None:
    port, config = free_port(), "[scenarios.export]\nsample_rows = 20000\n"
    server = await asyncio.to_thread(start, config, port=port)
    page = await browser.new_page()
    await follow_in(page, server.url, "/process/long-task?steps=400")
    await wait_for(page, """received.some(([id, type, data]) => type == "progress" && JSON.parse(data).done > 1000)""")
    await asyncio.to_thread(server.terminate, signal.SIGKILL)
    server = await asyncio.to_thread(start, config, port=port)
    await wait_for(page, "source.readyState === EventSource.CLOSED")

    received = await received_in(page)
    assert [int(event.id.rpartition("-")[2]) for event in received] == list(range(1, len(received) + 1))
    end = json.loads(received[-1].data)
    assert (received[-1].event, end["state"], end["attempts"], end["result"]["users"]) == ("end", "done", 2, 20_000)
    listed = json.loads((await asyncio.to_thread(server.get, "/process/tasks"))[2])
    assert [task["id"] for task in listed["tasks"]] == [end["id"]]
    assert re.findall(
        r"path=/process/long-task .*?status=(\d+)", server.wait_for_log("GET path=/process/long-task status=204")
    ) == ["200", "204"]


@dataclass
class Exchange:
    """One request and its response, as the relay forwarded them."""

    requested_at: float
    response: bytearray = field(default_factory=bytearray)
    last_at: float = 0.0
    """Time of the last chunk: a browser starts its pause at the end of a body."""


class Wire:
    """A relay between a browser and a server that records each request and response."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.url = ""
        self.exchanges: list[Exchange] = []
        """The requests of the stream, in order."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Wire"]:
        relays: list[asyncio.Task[None]] = []
        async with asyncio.TaskGroup() as group:
            listener = await asyncio.start_server(
                lambda *ends: relays.append(group.create_task(self._relay(*ends))), "127.0.0.1", 0
            )
            self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            async with listener:
                yield self
            for relay in relays:
                relay.cancel()

    async def _server(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the server once it listens, so that a browser that reconnects early need not retry."""
        while True:
            with suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", self._port)
            await asyncio.sleep(0.01)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError, asyncio.IncompleteReadError):  # the browser has disconnected
            head = await reader.readuntil(b"\r\n\r\n")
            exchange = Exchange(requested_at=time.monotonic())
            if head.startswith(f"GET {PATH}?".encode()):
                self.exchanges.append(exchange)
            from_server, to_server = await self._server()
            with closing(to_server):
                # One request per connection, so that each is recorded.
                to_server.write(head.replace(b"Connection: keep-alive", b"Connection: close"))
                while chunk := await from_server.read(65536):
                    exchange.response += chunk
                    exchange.last_at = time.monotonic()
                    writer.write(chunk)


async def test_a_browser_reconnects_when_the_stopping_server_requests_it(
    start: Callable[..., Running], browser: Browser
) -> None:
    port = free_port()
    server = await asyncio.to_thread(start, PUSH, port=port)
    async with Wire(port).open() as wire:
        page = await browser.new_page()
        await follow_in(page, wire.url, FROM_THE_BEGINNING)
        await asyncio.to_thread(push, server, *range(10))
        await wait_for_price(page, 9)
        await asyncio.to_thread(server.terminate)
        server = await asyncio.to_thread(start, PUSH, port=port)
        await asyncio.to_thread(push, server, *range(10, 20), LAST)
        await wait_for_price(page, LAST)
        received = await received_in(page)
        await page.close()
    stop = received.pop(10)
    assert (stop.event, stop.id) == ("stop", f"{received[9].id}.stop")
    check(received, await asyncio.to_thread(everything, server, LAST))
    before, after = wire.exchanges
    (retry,) = re.findall(rb"\nretry: (\d+)\n", before.response)
    waited = after.requested_at - before.last_at
    assert int(retry) / 1000 - 0.1 < waited < int(retry) / 1000 + 2
