"""Servers that share an event log and are killed at random, their clients, and the checked promises.

`test_chaos.py` runs it for some kills, `soak.py` for minutes. All random choices come from one seed. Every broken
promise is a line of `Chaos.problems`: what was lost, doubled or wrong, and which client saw it.
"""

import asyncio
import csv
import hashlib
import itertools
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from streamlab.client.sse import Event, Parser
from tests.support.servers import Running, free_port

TICKER = "/stream/stock-ticker"

USERS = 10_000
"""Rows of the sample database, and of its largest export."""

CONFIG = f"""
    [events]
    keep_events = 1000
    [scenarios.ticker]
    source = "push"
    [scenarios.export]
    sample_rows = {USERS}
    [scenarios.progress]
    keep_seconds = 120
    # A resumable task never fails then, however often its process is killed.
    max_crashes = 1000
    [scenarios.logs]
    enabled = false
    [scenarios.comparison]
    enabled = false
"""

PATIENCE_SECONDS = 30.0
"""Maximum time for which clients wait, in seconds; a longer wait is a problem."""

LOST = (aiohttp.ClientError, asyncio.TimeoutError, OSError)
"""Errors that a client gets when a server is killed."""

RETRY_SECONDS = 0.02
"""Pause before the same request is sent again, unless Retry-After has another, in seconds."""

TRANSIENT = frozenset({409, 429, 503})
"""Statuses after which the same request is sent again. 409: its Idempotency-Key has another request in progress."""


# -- servers


@dataclass
class Fleet:
    """Servers that share a folder and its event log; the first `spared` of them are never killed."""

    start: Callable[..., Running]
    chance: random.Random
    size: int = 2
    spared: int = 0
    is_fresh: bool = False
    """Whether each has its own interpreter, so that its memory can be measured."""
    servers: list[Running] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    """A line for each kill."""
    kills: int = 0

    def __post_init__(self) -> None:
        self._urls = random.Random(self.chance.random())  # choosing addresses must not affect the kills

    async def open(self) -> None:
        """Start all of them."""
        for _ in range(self.size):
            self.servers.append(await self._started(free_port()))

    async def _started(self, port: int) -> Running:
        server = await asyncio.to_thread(self.start, CONFIG, port=port, fresh=self.is_fresh)
        self.logs.append(server.stderr)
        return server

    def any_url(self) -> str:
        """Return the address of any server, dead or alive."""
        return self._urls.choice(self.servers).url

    async def kill_some(self) -> None:
        """Kill one server, or sometimes all that are not spared, and start them again at the same ports."""
        candidates = range(self.spared, self.size)
        victims = candidates if self.chance.random() < 0.15 else [self.chance.choice(candidates)]
        for victim in victims:
            process = self.servers[victim].process
            process.kill()
            await asyncio.to_thread(process.wait)
            self.kills += 1
            self.history.append(f"kill {self.kills} at {time.strftime('%X')}: server {victim}, process {process.pid}")
        await asyncio.sleep(self.chance.uniform(0, 0.3))
        for victim in victims:
            self.servers[victim] = await self._started(self.servers[victim].port)


# -- clients


class WrongStatus(Exception):
    """A status that a client of this kind must not get."""

    def __init__(self, request: str, status: int, body: bytes) -> None:
        super().__init__(f"{request} returned {status}: {body.decode(errors='replace')}")


def _offset(event_id: str) -> int:
    return int(event_id.rpartition("-")[2])


@dataclass
class Follower:
    """Follows the ticker until cancelled; reconnects to any server with the last id whenever a connection ends."""

    url: Callable[[], str]
    stay: Callable[[], float | None] = lambda: None
    """How long it stays with a server, in seconds; None: until the connection ends."""
    events: list[tuple[str, str]] = field(default_factory=list)
    """Id and data of every price."""
    odd: list[str] = field(default_factory=list)
    """Names of unexpected events, as `gap`."""
    last: str = "0-0"
    connections: int = 0

    async def run(self, session: aiohttp.ClientSession, news: asyncio.Event) -> None:
        while True:
            with suppress(*LOST):
                headers = {"Last-Event-ID": self.last}
                async with asyncio.timeout(self.stay()), session.get(self.url() + TICKER, headers=headers) as response:
                    self.connections += 1
                    parser = Parser()
                    async for chunk in response.content.iter_any():
                        for event in parser.feed(chunk):
                            self.last = event.id
                            if event.event == "message":
                                self.events.append((event.id, event.data))
                            elif event.event != "stop":
                                self.odd.append(event.event)
                        news.set()
            await asyncio.sleep(RETRY_SECONDS)

    @property
    def offset(self) -> int:
        return _offset(self.last)


@dataclass
class Publisher:
    """Pushes numbered prices of one symbol, each once, and records which are acknowledged."""

    symbol: str
    fleet: Fleet
    chance: random.Random
    acknowledged: dict[str, int] = field(default_factory=dict)
    """Number by id."""
    pushed: int = 0
    problems: list[str] = field(default_factory=list)

    async def run(self, session: aiohttp.ClientSession, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await self.push(session, self.chance.randint(1, 4))
            await asyncio.sleep(self.chance.uniform(0.01, 0.1))

    async def push(self, session: aiohttp.ClientSession, count: int) -> None:
        """Push some prices with one request."""
        numbers = range(self.pushed, self.pushed + count)
        self.pushed += count
        lines = "".join(json.dumps({"symbol": self.symbol, "price": number}) + "\n" for number in numbers)
        headers = {"Content-Type": "application/jsonl"}
        with suppress(*LOST):
            async with session.post(self.fleet.any_url() + TICKER, data=lines, headers=headers) as response:
                if response.status == 202:
                    self.acknowledged |= zip((await response.json())["ids"], numbers, strict=True)
                elif response.status not in TRANSIENT:
                    error = WrongStatus(f"POST {TICKER}", response.status, await response.read())
                    self.problems.append(f"{self.symbol}: {error}")


class Order(NamedTuple):
    """A task of a client, and what the client does with it."""

    key: str
    kind: str
    parameters: dict[str, Any]
    is_repeated: bool
    """Whether it is submitted once more with the same Idempotency-Key."""
    is_cancelled: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.parameters}, key {self.key}" + ", cancelled" * self.is_cancelled


@dataclass
class Client:
    """Starts tasks in bursts, submits some twice, cancels some twice, follows each to its end and checks it."""

    name: str
    fleet: Fleet
    chance: random.Random
    numbers: "itertools.count[int]"
    """The number of the next task, which determines its parameters: no two exports have the same rows."""
    problems: list[str] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    """The id of a task by its Idempotency-Key."""
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The data of the event `end` of a task, by the id of the task."""
    _session: aiohttp.ClientSession = field(init=False)

    async def run(self, session: aiohttp.ClientSession, is_over: Callable[[], bool]) -> None:
        self._session = session
        while not is_over():
            async with asyncio.TaskGroup() as burst:  # started within a millisecond or two
                for _ in range(self.chance.randint(1, 4)):
                    burst.create_task(self._run_task(self._order(next(self.numbers))))
            await asyncio.sleep(self.chance.uniform(0.2, 1.5))

    def _order(self, number: int) -> Order:
        """Return a task of any kind: of the exports, half are as large as possible, and half are tiny."""
        kind = self.chance.choice(["rehearsal", "report", "export", "export", "export", "export"])
        steps, text = self.chance.randint(1, 30), self.chance.choice(["csv", "jsonl"])
        parameters: dict[str, Any] = {"steps": steps, "delay": 0.05} if kind == "rehearsal" else {"steps": steps}
        if kind == "export":
            limit = self.chance.choice([USERS - number % USERS, 1 + number % USERS])
            parameters = {"format": text, "limit": limit}
        return Order(f"{self.name}-{number}", kind, parameters, self.chance.random() < 0.3, self.chance.random() < 0.15)

    async def _run_task(self, order: Order) -> None:
        state = "not accepted"
        try:
            async with asyncio.timeout(2 * PATIENCE_SECONDS):
                task = self.ids[order.key] = await self._submit(order)
                state = f"accepted as {task}, but not over"
                if order.is_repeated and (other := await self._submit(order)) != task:
                    self.problems.append(f"{order}: one request has made two tasks, {task} and {other}")
                if order.is_cancelled:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(2):
                            group.create_task(self._send("DELETE", f"/process/tasks/{task}"))
                events = await self._follow(task)
                state = f"over as {task}, but not checked"
                await self._check(order, task, events)
        except TimeoutError:
            self.problems.append(f"{order}: {state} after {2 * PATIENCE_SECONDS:g} s")
        except WrongStatus as error:
            self.problems.append(f"{order}: {state}: {error}")

    # -- requests

    async def _send(
        self, method: str, path: str, *, json: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send a request to any server until one responds; return status and body."""
        while True:
            pause = RETRY_SECONDS
            with suppress(*LOST):
                url = self.fleet.any_url() + path
                async with self._session.request(method, url, json=json, headers=headers) as response:
                    if response.status not in TRANSIENT or method == "DELETE":
                        return response.status, await response.read()
                    pause = float(response.headers.get("Retry-After", pause))
            await asyncio.sleep(pause)

    async def _submit(self, order: Order) -> str:
        """Submit a task until it is accepted, and return its id."""
        body, headers = {"kind": order.kind, "parameters": order.parameters}, {"Idempotency-Key": order.key}
        status, text = await self._send("POST", "/process/tasks", json=body, headers=headers)
        if status != 202:
            raise WrongStatus("POST /process/tasks", status, text)
        return str(json.loads(text)["id"])

    async def _follow(self, task: str) -> list[Event]:
        """Return all events of a task, over any number of connections."""
        events: list[Event] = []
        while not (events and events[-1].event == "end"):
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": events[-1].id} if events else {})
            path = f"/process/tasks/{task}"
            with suppress(*LOST):
                async with self._session.get(self.fleet.any_url() + path, headers=headers) as response:
                    if response.status == 200:
                        parser = Parser()
                        async for chunk in response.content.iter_any():
                            events += [event for event in parser.feed(chunk) if event.event != "stop"]
                    elif response.status not in TRANSIENT:
                        raise WrongStatus(f"GET {path}", response.status, await response.read())
            await asyncio.sleep(RETRY_SECONDS)
        return events

    # -- promises

    async def _check(self, order: Order, task: str, events: list[Event]) -> None:
        """Record what is wrong with an ended task: its events, its state, its result."""
        wrong = []
        offsets = [_offset(event.id) for event in events]
        if offsets != list(range(1, len(events) + 1)):
            wrong.append(f"its events have the offsets {offsets}")
        if [event.event for event in events].count("end") != 1:
            wrong.append(f"it has ended more than once: {events}")
        path, headers = f"/process/tasks/{task}", {"Accept": "text/event-stream", "Last-Event-ID": events[-1].id}
        status, _ = await self._send("GET", path, headers=headers)
        if status != 204:
            wrong.append(f"a client that has its end got {status} instead of 204")
        self.ends[task] = end = json.loads(events[-1].data)
        status, record = await self._send("GET", path)
        if status != 200 or json.loads(record) != end:
            wrong.append(f"its last event is {end}, but its record ({status}) {record.decode()}")
        states = {"done"} | ({"cancelled"} if order.is_cancelled else set())
        if order.kind == "rehearsal":  # not resumable: run once, and interrupted where its process dies
            states.add("interrupted")
            if end["attempts"] > 1:
                wrong.append(f"it was run {end['attempts']} times")
        if end["state"] not in states:
            wrong.append(f"it is {end['state']}: {end['error']}")
        if end["state"] == "done":
            wrong += await self._result_problems(order, end["result"])
        self.problems += [f"{order}, task {task}: {problem}" for problem in wrong]

    async def _result_problems(self, order: Order, result: dict[str, Any]) -> list[str]:
        """Return what is wrong with a result: a file has its bytes, its rows and its digest."""
        if order.kind == "report" and result["users"] != USERS:
            return [f"it has counted {result['users']} users of {USERS}"]
        if order.kind == "export":
            status, content = await self._send("GET", result["url"])
            lines = content.decode().splitlines()
            rows = len(list(csv.reader(lines))) - 1 if order.parameters["format"] == "csv" else len(lines)
            file = {"rows": rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            reported = {name: result[name] for name in file}
            if status != 200 or file != reported or rows != order.parameters["limit"]:
                return [f"its result is {reported}, but its file {result['url']} ({status}) has {file}"]
        return []


# -- all of it


class Chaos:
    """Servers and clients together. `problems` is complete after the block of `running`."""

    def __init__(
        self,
        start: Callable[..., Running],
        *,
        seed: int,
        followers: int = 4,
        publishers: int = 2,
        clients: int = 2,
        **fleet: Any,
    ) -> None:
        self.seed = seed
        self.problems: list[str] = []
        self.fleet = Fleet(start, self._chance("fleet"), **fleet)
        stay = self._chance("stay")
        self.followers = [Follower(self.fleet.any_url, lambda: stay.uniform(0.1, 10)) for _ in range(followers)]
        self.publishers = [
            Publisher(f"P{number}", self.fleet, self._chance(f"publisher {number}"), problems=self.problems)
            for number in range(publishers)
        ]
        numbers = itertools.count()
        self.clients = [
            Client(f"client-{number}", self.fleet, self._chance(f"client {number}"), numbers, self.problems)
            for number in range(clients)
        ]
        self._news = asyncio.Event()
        self._session: aiohttp.ClientSession

    def _chance(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run all clients while the block lasts, then let them finish, and check what they have seen."""
        is_over = False
        await self.fleet.open()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=20)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as self._session:
            async with asyncio.TaskGroup() as group:
                following = [group.create_task(each.run(self._session, self._news)) for each in self.followers]
                async with asyncio.TaskGroup() as working:
                    for publisher in self.publishers:
                        working.create_task(publisher.run(self._session, lambda: is_over))
                    for client in self.clients:
                        working.create_task(client.run(self._session, lambda: is_over))
                    yield
                    is_over = True
                await self._caught_up()
                for task in following:
                    task.cancel()
            self.problems += self._event_problems()
            self.problems += await self._task_problems()

    async def kill_once(self) -> None:
        """Kill servers, start them again, and wait until prices reach every follower again."""
        await asyncio.sleep(self.fleet.chance.uniform(0.2, 2))
        await self.fleet.kill_some()
        await self._caught_up("after a kill", published=5)

    async def _caught_up(self, when: str = "at the end", *, published: int = 0) -> None:
        """Wait until that many more prices are acknowledged, and every follower has all of them."""
        goal = self._count() + published
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while self._count() < goal or min(each.offset for each in self.followers) < self._last_offset():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            count = self._count() - goal + published
            offsets = [each.offset for each in self.followers]
            self.problems.append(
                f"{when}, {PATIENCE_SECONDS:g} s have brought {count} of {published} acknowledgements, and followers "
                f"to the offsets {offsets} of {self._last_offset()}"
            )

    def _count(self) -> int:
        """Return the number of acknowledged prices."""
        return sum(len(each.acknowledged) for each in self.publishers)

    def _last_offset(self) -> int:
        """Return the offset of the last acknowledged price."""
        return max(_offset(next(reversed(each.acknowledged), "0-0")) for each in self.publishers)

    @property
    def acknowledged(self) -> dict[str, tuple[str, int]]:
        """Symbol and number of each acknowledged price, by its id."""
        return {
            event_id: (each.symbol, number)
            for each in self.publishers
            for event_id, number in each.acknowledged.items()
        }

    # -- promises

    def _event_problems(self) -> Iterable[str]:
        """Yield what is wrong with followers: each must have every acknowledged price once, in order."""
        acknowledged = self.acknowledged
        pushed = {each.symbol: each.pushed for each in self.publishers}
        reference = self.followers[0].events
        for name, follower in ((f"follower {number}", each) for number, each in enumerate(self.followers)):
            if follower.odd:
                yield f"{name} was sent the events {follower.odd}"
            offsets = [_offset(event_id) for event_id, _ in follower.events]
            if offsets != list(range(1, len(offsets) + 1)):
                lost, twice = sorted(set(range(1, max(offsets) + 1)) - set(offsets)), len(offsets) - len(set(offsets))
                yield f"{name} lacks {len(lost)} of {max(offsets)} offsets, as {lost[:10]}, and has {twice} twice"
            if len(epochs := {event_id.rpartition("-")[0] for event_id, _ in follower.events}) != 1:
                yield f"{name} has seen the epochs {sorted(epochs)}"
            if follower.events != reference and (different := set(follower.events) ^ set(reference)):
                yield f"{name} and follower 0 differ in {len(different)} events, as {sorted(different)[:3]}"
            seen = {event_id: _price(data) for event_id, data in follower.events}
            if lost_ids := sorted(acknowledged.keys() - seen.keys()):
                yield f"{name} lacks {len(lost_ids)} acknowledged events, as {lost_ids[:10]}"
            changed = [
                f"{event_id}: {price}, now {seen[event_id]}"
                for event_id, price in acknowledged.items()
                if event_id in seen and seen[event_id] != price
            ]
            if changed:
                yield f"{name} has {len(changed)} other prices than were acknowledged, as {changed[:3]}"
            if len(set(seen.values())) != len(seen):
                yield f"{name} has {len(seen) - len(set(seen.values()))} prices twice, with different ids"
            if invented := [price for price in seen.values() if price[1] >= pushed[price[0]]]:
                yield f"{name} has prices that were not pushed: {invented[:10]}"

    async def _task_problems(self) -> list[str]:
        """Return the tasks that exist without a key, and those that have not ended."""
        known = {task for client in self.clients for task in client.ids.values()}
        listed: list[dict[str, Any]] = []
        path: str | None = "/process/tasks?limit=1000"
        while path is not None:
            async with self._session.get(self.fleet.servers[0].url + path) as response:
                page = await response.json()
            listed, path = listed + page["tasks"], page["next"]
        problems = [f"no client was given the task {task}" for task in listed if task["id"] not in known]
        return problems + [f"a task is not over: {task}" for task in listed if task["state"] in ("queued", "running")]

    def log_problems(self) -> list[str]:
        """Return lines that no server may log, killed or not."""
        odd = re.compile("Traceback|never retrieved|was destroyed|never awaited")
        lines = ((log, line) for log in self.fleet.logs for line in log.read_text().splitlines())
        return [f"{log.name}: {line}" for log, line in lines if odd.search(line)]

    def summary(self) -> str:
        """Return figures of what has happened so far."""
        ends = [end for client in self.clients for end in client.ends.values()]
        states = [end["state"] for end in ends]
        counted = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        return (
            f"seed {self.seed}: {self.fleet.kills} kills; {self._count()} of "
            f"{sum(each.pushed for each in self.publishers)} prices acknowledged, "
            f"{sum(len(each.events) for each in self.followers)} delivered over "
            f"{sum(each.connections for each in self.followers)} connections; {len(ends)} tasks over ({counted}), "
            f"{sum(end['attempts'] > 1 for end in ends)} of them run again after a kill"
        )

    def report(self) -> str:
        """Return the figures, every problem, and every kill."""
        return "\n".join([self.summary(), *self.problems, *self.fleet.history])


def _price(data: str) -> tuple[str, int]:
    price = json.loads(data)
    return price["symbol"], price["price"]


# -- resources of a server


@dataclass(frozen=True)
class Usage:
    """The resources of a server at one time."""

    rss_mb: float
    descriptors: int
    threads: int
    asyncio_tasks: int
    open_streams: int


async def usage_of(server: Running) -> Usage:
    """Return the resources by the kernel and the metrics of the server."""
    process = Path(f"/proc/{server.process.pid}")
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
        metrics = await response.text()
    status = (process / "status").read_text()

    def total(name: str) -> int:
        return sum(int(float(value)) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE))

    return Usage(
        rss_mb=int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6,
        descriptors=len(list((process / "fd").iterdir())),
        threads=int(status.partition("Threads:")[2].split()[0]),
        asyncio_tasks=total("streamlab_asyncio_tasks"),
        open_streams=total("streamlab_open_streams"),
    )


async def usage_at_rest(server: Running) -> Usage:
    """Return the resources of a server once no stream is open, or after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (usage := await usage_of(server)).open_streams and time.monotonic() < deadline:
        await asyncio.sleep(RETRY_SECONDS)
    return usage
