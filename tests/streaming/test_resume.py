"""No event is lost or repeated: servers, and the server of the log, are killed under fifty clients."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from tests.support.chaos import Follower
from tests.support.servers import Running, free_port
from tests.support.valkey import Valkey

LOADED_PLUGINS = ("ticker", "export", "progress")

PUSH = '[scenarios.ticker]\nsource = "push"\n[scenarios.logs]\nenabled = false\n'

PATH = "/stream/stock-ticker"

CLIENTS = 50


class Crowd:
    """Fifty clients, and a publisher that does not give up; what they saw is compared at the end."""

    def __init__(self, urls: Callable[[], str]) -> None:
        self._urls = urls
        self._news = asyncio.Event()
        self.clients = [Follower(urls) for _ in range(CLIENTS)]
        self.acknowledged: list[str] = []
        self._numbers = itertools.count()
        self._session: aiohttp.ClientSession

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=20)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as self._session,
            asyncio.TaskGroup() as group,
        ):
            tasks = [group.create_task(client.run(self._session, self._news)) for client in self.clients]
            yield
            for task in tasks:
                task.cancel()

    async def publish(self, count: int) -> None:
        """Push prices until `count` more have been acknowledged; one whose response was lost may be pushed twice."""
        goal = len(self.acknowledged) + count
        while len(self.acknowledged) < goal:
            price = {"symbol": "ACME", "price": next(self._numbers)}
            with suppress(aiohttp.ClientError, asyncio.TimeoutError):
                async with self._session.post(self._urls() + PATH, json=price) as response:
                    assert response.status == 202, await response.text()
                    self.acknowledged += (await response.json())["ids"]
                    continue
            await asyncio.sleep(0.02)

    async def everyone_has(self, last: str) -> None:
        async with asyncio.timeout(30):
            while not all(client.events and client.events[-1][0] == last for client in self.clients):
                self._news.clear()
                await self._news.wait()

    def check(self) -> None:
        """Assert that every client has every acknowledged event once, in the order of their offsets."""
        first = self.clients[0].events
        offsets = [int(identity.partition("-")[2]) for identity, _ in first]
        assert offsets == list(range(1, len(first) + 1))
        assert len({identity.partition("-")[0] for identity, _ in first}) == 1
        for client in self.clients:
            assert client.events == first
            assert client.odd == []
        assert set(self.acknowledged) <= {identity for identity, _ in first}


@pytest.fixture(params=["sqlite", "redis"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return ""
    valkey: Valkey = request.getfixturevalue("valkey")
    return f'[events]\nurl = "{valkey.url}"\n'


async def killed(server: Running) -> None:
    server.process.kill()
    await asyncio.to_thread(server.process.wait)


async def test_clients_of_a_killed_server_continue_where_they_were(start: Callable[..., Running], engine: str) -> None:
    port = free_port()
    server = await asyncio.to_thread(start, PUSH + engine, port=port)
    crowd = Crowd(lambda: server.url)
    async with crowd.following():
        for _ in range(3):
            async with asyncio.TaskGroup() as group:
                publishing = group.create_task(crowd.publish(60))
                while len(crowd.clients[-1].events) < len(crowd.acknowledged) - 20 or not crowd.clients[-1].events:
                    await asyncio.sleep(0.001)
                await killed(server)
                server = await asyncio.to_thread(start, PUSH + engine, port=port)
                await publishing
        await crowd.publish(1)
        await crowd.everyone_has(crowd.acknowledged[-1])
        crowd.check()


async def test_clients_of_a_stopped_server_continue_where_they_were(start: Callable[..., Running]) -> None:
    port = free_port()
    server = await asyncio.to_thread(start, PUSH, port=port)
    crowd = Crowd(lambda: server.url)
    async with crowd.following():
        async with asyncio.TaskGroup() as group:
            publishing = group.create_task(crowd.publish(120))
            while len(crowd.clients[-1].events) < 50:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(server.terminate)
            server = await asyncio.to_thread(start, PUSH, port=port)
            await publishing
        await crowd.everyone_has(crowd.acknowledged[-1])
        crowd.check()


async def test_clients_move_between_two_servers_of_one_log_that_are_killed_alternately(
    start: Callable[..., Running], engine: str
) -> None:
    ports = [free_port(), free_port()]
    servers = [await asyncio.to_thread(start, PUSH + engine, port=port) for port in ports]
    turns = itertools.cycle(range(2))
    crowd = Crowd(lambda: servers[next(turns)].url)
    async with crowd.following():
        for number in (0, 1, 0):
            async with asyncio.TaskGroup() as group:
                publishing = group.create_task(crowd.publish(60))
                while len(crowd.clients[-1].events) < len(crowd.acknowledged) - 20 or not crowd.clients[-1].events:
                    await asyncio.sleep(0.001)
                await killed(servers[number])
                servers[number] = await asyncio.to_thread(start, PUSH + engine, port=ports[number])
                await publishing
        await crowd.publish(1)
        await crowd.everyone_has(crowd.acknowledged[-1])
        crowd.check()


async def test_the_server_of_the_log_is_killed_in_mid_stream(start: Callable[..., Running], valkey: Valkey) -> None:
    config = f'{PUSH}[events]\nurl = "{valkey.url}"\n'
    servers = [await asyncio.to_thread(start, config, port=free_port()) for _ in range(2)]
    turns = itertools.cycle(range(2))
    crowd = Crowd(lambda: servers[next(turns)].url)
    async with crowd.following():
        for _ in range(3):
            async with asyncio.TaskGroup() as group:
                publishing = group.create_task(crowd.publish(60))
                while len(crowd.clients[-1].events) < len(crowd.acknowledged) - 20 or not crowd.clients[-1].events:
                    await asyncio.sleep(0.001)
                await asyncio.to_thread(valkey.kill)
                await asyncio.to_thread(valkey.start)
                await publishing
        await crowd.publish(1)
        await crowd.everyone_has(crowd.acknowledged[-1])
        crowd.check()
        # No connection ended: the servers and the publisher waited for the log.
        assert len(crowd.acknowledged) == len(crowd.clients[0].events)
