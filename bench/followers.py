"""The load client of the fan-out benchmark: it publishes, verifies what each follower received, and prints JSON.

One process and one epoll for all followers. Two methods to detect that an event has arrived:

- One event in flight: the socket of every follower is registered edge-triggered, and the edge is the arrival. After
  the last one, outside the measured time, each follower is read and must have exactly that event. Reading within the
  measured time would cost the client more than the fastest servers spend on sending.
- Several in flight: an edge is read immediately, and events are counted by their closing brace. Outside the measured
  time, the bytes of every follower must again be exactly the published events, in order.

While a server sends, the client does not wait in epoll: the kernel would wake it at every delivery, at the cost of the
server's send(), which followers on other machines would not cause. So it sleeps for most of the duration of the fastest
of the last deliveries, and then polls without waiting.
"""

import gc
import json
import re
import select
import socket
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .event_peers import PATH
from .servers import Running

COMMENT = re.compile(rb"(?m)^:")
BURST = 32
BLOCK_EVENTS, BLOCK_SECONDS = 16, 0.5  # size of a measured block: whichever is less
CONNECT_BATCH = 64  # below every server's backlog
READ = 64 * 1024
SILENCE_SECONDS = 20
PACED_RATE = 20
PACED_MIN_EVENTS = 5
PACED_TIMES, HEALTH_TIMES = 5, 2  # multiples of the duration of a throughput measurement
PROBE_SECONDS = 0.01
POLL_SECONDS = 0.00025  # between polls, where each delivery is timed
LONG_SECONDS = 0.05  # a longer delivery is timed less precisely
SLEEP_SHARE = {1: 0.8, BURST: 0.5}  # share of the expected time to sleep; after a burst there is more to read
LINES = 100
PUBLISHERS = 8
MISSED = 10_000
FIRST = 1_000_000  # sequence numbers have seven digits, so that every event has the same size
KEYS = (
    *(f"{name} {key}" for name in ("one", "burst", "lines", "single") for key in ("rate", "cpu", "busy", "client")),
    "paced p50", "paced p99", "health p50", "health p95", "idle", "resume",
)  # fmt: skip
"""Names of the numbers that it prints."""
NUMBER = re.compile(rb'"price": ?(\d+)\.25')


@dataclass(frozen=True)
class Load:
    """The work of the client: connect followers to a server, then make each measurement of the plan."""

    name: str
    port: int
    pids: list[int]
    log: str
    followers: int
    plan: list[str]
    seconds: float
    """Approximate duration of a measurement, in seconds; a burst is always completed."""
    pace: float = PACED_RATE
    """Events per second where each delivery is timed."""
    single_posts: bool = False
    """Whether a POST has only one event: several are sent as pipelined POSTs on one connection."""

    def text(self) -> str:
        """Return it as the argument of this module."""
        return json.dumps(asdict(self))


def event(number: int) -> bytes:
    """Return the event with this number, always of the same size."""
    return (
        b'{"symbol":"ACME","price":%d.25,"change":-0.25,"time":"2026-01-02T03:04:05.678901Z","currency":"EUR"}' % number
    )


class Connection:
    """A keep-alive connection for requests whose responses have a Content-Length."""

    def __init__(self, port: int) -> None:
        self.socket = _connect(port)
        self.host = f"127.0.0.1:{port}".encode()
        self._received = b""

    def send(self, request: bytes) -> None:
        """Send one or more requests at once; they have a few KB, which fit into the send buffer."""
        if self.socket.send(request) != len(request):
            raise RuntimeError("a request did not fit into the send buffer")

    def post(self, events: Sequence[bytes], single_posts: bool) -> bytes:
        """Return a POST of JSON lines, or a POST for each event."""
        bodies = events if single_posts else [b"\n".join(events)]
        kind = b"application/json" if len(events) == 1 or single_posts else b"application/jsonl"
        return b"".join(
            b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (PATH.encode(), self.host, kind, len(body), body)
            for body in bodies
        )

    def get(self, path: str, headers: bytes = b"Accept: */*") -> bytes:
        """Return a GET."""
        return b"GET %b HTTP/1.1\r\nHost: %b\r\n%b\r\n\r\n" % (path.encode(), self.host, headers)

    def receive(self) -> list[bytes]:
        """Read without waiting; return the bodies of completed responses. Raises RuntimeError unless they are 2xx."""
        try:
            data = self.socket.recv(READ)
        except BlockingIOError:
            return []
        if not data:
            raise RuntimeError(f"the server closed a connection: {self._received!r}")
        self._received += data
        bodies = []
        while b"\r\n\r\n" in self._received:
            head, _, rest = self._received.partition(b"\r\n\r\n")
            length = int(found[1]) if (found := re.search(rb"(?i)content-length: *(\d+)", head)) else 0
            if not re.match(rb"HTTP/1\.1 2\d\d ", head):
                raise RuntimeError(f"rejected: {head + rest!r}")
            if len(rest) < length:
                break
            bodies.append(rest[:length])
            self._received = rest[length:]
        return bodies

    def request(self, request: bytes) -> bytes:
        """Send one request, and return the body of the response."""
        self.send(request)
        while _wait_readable(self.socket):
            if bodies := self.receive():
                return bodies[0]
        raise RuntimeError(f"no response to {request[:500]!r}")


class Probe:
    """A second connection that requests /health, PROBE_SECONDS after each response."""

    def __init__(self, port: int) -> None:
        self.connection = Connection(port)
        self.seconds: list[float] = []
        self._sent_at: float | None = None
        self._due = time.perf_counter()

    def poll(self, events: dict[int, int]) -> None:
        """Remove its own event and read the response, if there is one; send the next request when it is due."""
        now = time.perf_counter()
        if events.pop(self.connection.socket.fileno(), 0) and self.connection.receive() and self._sent_at:
            self.seconds.append(now - self._sent_at)
            self._sent_at, self._due = None, now + PROBE_SECONDS
        if self._sent_at is None and now >= self._due:
            self.connection.send(self.connection.get("/health"))
            self._sent_at = time.perf_counter()


class Window:
    """Measured time, CPU times of server and client, and deliveries."""

    def __init__(self, server: Running) -> None:
        self.seconds = self.server = self.client = 0.0
        self.deliveries = 0
        self._running = server

    @contextmanager
    def serving(self, deliveries: int) -> Iterator[None]:
        """Add the CPU time of the server during the block, in which there are `deliveries`."""
        begun = self._running.cpu_seconds()
        yield
        self.server += self._running.cpu_seconds() - begun
        self.deliveries += deliveries

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the duration of the block, and the CPU time of the client."""
        client, begun = time.process_time(), time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun
        self.client += time.process_time() - client

    def add(self, other: "Window") -> None:
        """Add the totals of another window."""
        self.seconds += other.seconds
        self.client += other.client
        self.server += other.server
        self.deliveries += other.deliveries

    def numbers(self, prefix: str) -> dict[str, float]:
        """Return deliveries per second, microseconds of the server per delivery, and both CPU shares."""
        return {
            f"{prefix} rate": self.deliveries / self.seconds,
            f"{prefix} cpu": self.server / self.deliveries * 1e6,
            f"{prefix} busy": self.server / self.seconds,
            f"{prefix} client": self.client / self.seconds,
        }


class Followers:
    """Many followers of one channel, and the connection that publishes to it."""

    def __init__(self, load: Load, count: int) -> None:
        self.load = load
        self.server = Running(load.name, load.port, load.pids, Path(load.log))
        self.publisher = Connection(load.port)
        self.probe: Probe | None = None
        self.published = FIRST
        self.sockets: dict[int, socket.socket] = {}
        self._verified = b""
        self._pause = 0.0
        self._took: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=8))
        self._epoll = select.epoll()
        self._watch(self.publisher.socket)
        request = self.publisher.get(PATH, b"Accept: text/event-stream")
        while len(self.sockets) < count:
            opened = [_connect(load.port) for _ in range(min(CONNECT_BATCH, count - len(self.sockets)))]
            for one in opened:
                one.send(request)
            for one in opened:
                _read_head(one)
                self._watch(one)
                self.sockets[one.fileno()] = one
        while self._epoll.poll(0.3):  # a server may greet its followers
            for one in self.sockets.values():
                _read(one)

    def close(self) -> None:
        """Disconnect."""
        for one in (*self.sockets.values(), self.publisher.socket):
            one.close()
        self._epoll.close()

    def _watch(self, one: socket.socket) -> None:
        self._epoll.register(one, select.EPOLLIN | select.EPOLLET)

    def _poll(self, limit: int = 1024) -> dict[int, int]:
        """Return the sockets with new data, without waiting."""
        return dict(self._epoll.poll(0, limit))

    def _publish(self, count: int) -> int:
        """Send the next events; return the number of responses to expect."""
        events = [event(number) for number in range(self.published, self.published + count)]
        self.published += count
        self.publisher.send(self.publisher.post(events, self.load.single_posts))
        return count if self.load.single_posts else 1

    @contextmanager
    def _delivery(self, count: int) -> Iterator[int]:
        """Publish `count` events, sleep for most of the expected time, and record the duration of the block."""
        took = self._took[count]
        expected = min(took, default=0)
        self._pause = POLL_SECONDS if self.probe or not took or expected > LONG_SECONDS else 0
        begun = time.perf_counter()
        responses = self._publish(count)
        if (sleep := SLEEP_SHARE[count] * expected) > POLL_SECONDS and not self.probe:
            time.sleep(sleep)
        yield responses
        took.append(time.perf_counter() - begun)

    def _pause_before_poll(self, events: dict[int, int], deadline: float) -> None:
        """Pause before the next poll; raises RuntimeError if nothing arrived before the deadline."""
        if not events and time.perf_counter() > deadline:
            raise RuntimeError(f"not every follower received event {self.published - 1}")
        if self._pause:
            time.sleep(self._pause)

    # -- one event in flight

    def _deliver(self) -> None:
        """Publish an event, and wait until every follower has it and the publisher has its response."""
        publisher, wanted, delivered = self.publisher.socket.fileno(), len(self.sockets), set[int]()
        silence = time.perf_counter() + SILENCE_SECONDS
        with self._delivery(1) as responses:
            while len(delivered) < wanted or responses:
                events = self._poll()
                if publisher in events:
                    del events[publisher]
                    responses -= len(self.publisher.receive())
                if self.probe:
                    self.probe.poll(events)
                delivered.update(events)
                self._pause_before_poll(events, silence)

    def one_in_flight(self, seconds: float) -> dict[str, float]:
        """Publish an event, wait until all have it, publish the next."""
        window, count, begun = Window(self.server), 1, time.perf_counter()
        self._block(count)  # determines the duration of an event
        count = max(1, min(BLOCK_EVENTS, int(BLOCK_SECONDS / (time.perf_counter() - begun))))
        while window.seconds < seconds:
            if block := self._block(count):
                window.add(block)
        return window.numbers("one")

    def _block(self, count: int) -> Window | None:
        """Deliver `count` events, each read before the next; return None if a heartbeat came with one of them."""
        block, clean = Window(self.server), True
        # Work of the server after the last delivery counts as CPU time, not as duration.
        with block.serving(count * len(self.sockets)):
            for number in range(self.published, self.published + count):
                with block.timed():
                    self._deliver()
                for one in self.sockets.values():
                    data, silence = _read(one), time.perf_counter() + SILENCE_SECONDS
                    while not data.count(b"}"):
                        clean = False
                        self._pause_before_poll({}, silence)
                        data += _read(one)
                    clean = self._verify(data, [number]) and clean
        return block if clean else None

    def _verify(self, data: bytes, numbers: Iterable[int]) -> bool:
        """Verify that a follower received exactly these events, in order; return whether nothing else arrived."""
        if data != self._verified:  # most receive the same bytes
            found = [int(number) for number in NUMBER.findall(data)]
            if found != list(numbers):
                raise RuntimeError(f"{numbers} was published, a follower received {found}: {data[:500]!r}")
            if COMMENT.search(data):
                return False
            self._verified = data
        return True

    # -- several events in flight

    def _burst(self, count: int) -> dict[int, list[bytes]]:
        """Publish `count` events at once, wait until every follower has them, and return the chunks of each."""
        chunks: dict[int, list[bytes]] = defaultdict(list)
        missing = dict.fromkeys(self.sockets, count)
        sockets, publisher, wanted = self.sockets, self.publisher.socket.fileno(), len(self.sockets)
        silence = time.perf_counter() + SILENCE_SECONDS
        with self._delivery(count) as responses:
            while wanted or responses:
                events = self._poll()
                if publisher in events:
                    del events[publisher]
                    responses -= len(self.publisher.receive())
                for one in events:
                    data = _read(sockets[one])
                    chunks[one].append(data)
                    had, missing[one] = missing[one], missing[one] - data.count(b"}")
                    wanted -= had > 0 == missing[one]  # once: a heartbeat may follow
                self._pause_before_poll(events, silence)
        return chunks

    def check(self) -> None:
        """Verify that an event arrives in one chunk: otherwise an edge is not an event."""
        for _ in range(3):  # a heartbeat may intervene
            number = self.published
            chunks = self._burst(1)
            for found in chunks.values():
                self._verify(b"".join(found), [number])
            if sum(len(found) > 1 for found in chunks.values()) <= len(chunks) / 100:
                return
        raise RuntimeError(f"an event arrives in several chunks: {next(iter(chunks.values()))}")

    def bursts(self, seconds: float) -> dict[str, float]:
        """Publish 32 events at once, wait until all have them, publish the next 32."""
        window = Window(self.server)
        while window.seconds < seconds:
            numbers = range(self.published, self.published + BURST)
            with window.serving(BURST * len(self.sockets)), window.timed():
                chunks = self._burst(BURST)
            for found in chunks.values():
                self._verify(b"".join(found), numbers)
        return window.numbers("burst")

    def paced(self, seconds: float) -> dict[str, float]:
        """Publish events at the pace of the load, and time each from its publication to the edge of each follower."""
        pace = self.load.pace
        total, sent, late = max(PACED_MIN_EVENTS, int(seconds * pace)), list[float](), list[float]()
        chunks: dict[int, list[bytes]] = defaultdict(list)
        got = dict.fromkeys(self.sockets, 0)
        publisher, wanted, first = self.publisher.socket.fileno(), total * len(self.sockets), self.published
        begun, responses = time.perf_counter(), total
        while len(late) < wanted or responses:
            due = begun + len(sent) / pace
            if len(sent) < total and time.perf_counter() >= due:
                sent.append(time.perf_counter())
                self._publish(1)
            # Few at a time, since the time is taken once for all of them before reading.
            events, now = self._poll(64), time.perf_counter()
            if publisher in events:
                del events[publisher]
                responses -= len(self.publisher.receive())
            for one in events:
                data = _read(self.sockets[one])
                chunks[one].append(data)
                had, has = got[one], got[one] + data.count(b"}")
                late += [now - at for at in sent[had:has]]
                got[one] = has
            if not events:
                if now > due + SILENCE_SECONDS:
                    raise RuntimeError(f"{len(late)} of {wanted} events arrived")
                time.sleep(POLL_SECONDS)
        for found in chunks.values():
            self._verify(b"".join(found), range(first, first + total))
        return {"paced p50": statistics.median(late) * 1e3, "paced p99": _percentile(late, 99) * 1e3}

    def health(self, seconds: float) -> dict[str, float]:
        """Request /health on another connection while events are sent, one in flight."""
        self.probe = Probe(self.load.port)
        self._watch(self.probe.connection.socket)
        self.one_in_flight(seconds)
        found, self.probe = self.probe.seconds, None
        return {"health p50": statistics.median(found) * 1e3, "health p95": _percentile(found, 95) * 1e3}


# -- the event log, without followers


def publish_lines(load: Load, seconds: float) -> dict[str, float]:
    """Publish 100 events per POST, one POST after the other."""
    window, connection = Window(_server(load)), Connection(load.port)
    body = connection.post([event(FIRST + number) for number in range(LINES)], False)
    while window.seconds < seconds:
        with window.serving(LINES * 10), window.timed():
            for _ in range(10):
                connection.request(body)
    connection.socket.close()
    return window.numbers("lines")


def publish_single(load: Load, seconds: float) -> dict[str, float]:
    """Publish an event per POST over eight connections, each waiting for the response before the next POST."""
    window, connections = Window(_server(load)), [Connection(load.port) for _ in range(PUBLISHERS)]
    request = connections[0].post([event(FIRST)], False)
    with select.epoll() as epoll:
        by_socket = {one.socket.fileno(): one for one in connections}
        for number, one in by_socket.items():
            epoll.register(number, select.EPOLLIN)
            one.send(request)
        while window.seconds < seconds:
            with window.serving(done := 500), window.timed():
                while done > 0:
                    for number, _ in epoll.poll(SILENCE_SECONDS):
                        if by_socket[number].receive():
                            done -= 1
                            by_socket[number].send(request)
            window.deliveries -= done  # the last poll may have returned more than planned
    for one in connections:
        one.socket.close()
    return window.numbers("single")


def resume(load: Load) -> dict[str, float]:
    """Resume 10,000 events later, and return the seconds until the last of them has arrived."""
    connection, took = Connection(load.port), list[float]()
    seen = json.loads(connection.request(connection.post([event(FIRST)], False)))["ids"][0]
    for first in range(FIRST + 1, FIRST + 1 + MISSED, LINES):
        connection.request(connection.post([event(first + number) for number in range(LINES)], False))
    for _ in range(3):
        with closing(_connect(load.port)) as follower:
            begun = time.perf_counter()
            follower.send(connection.get(PATH, b"Accept: text/event-stream\r\nLast-Event-ID: %b" % seen.encode()))
            received = bytearray(_read_head(follower))
            count = received.count(b"}")
            while count < MISSED:
                if not _wait_readable(follower):
                    raise RuntimeError(f"{count} of {MISSED} missed events arrived: {bytes(received[-500:])!r}")
                data = _read(follower)
                count += data.count(b"}")
                received += data
            took.append(time.perf_counter() - begun)
        found = [int(number) for number in NUMBER.findall(received)]
        if found != list(range(FIRST + 1, FIRST + 1 + MISSED)):
            raise RuntimeError(f"{MISSED} events were missed, {len(found)} arrived: {bytes(received[:500])!r}")
    return {"resume": statistics.median(took)}


# -- sockets


def _connect(port: int) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port), SILENCE_SECONDS)
    one.setblocking(False)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


def _wait_readable(one: socket.socket) -> bool:
    """Wait until there is data to read; return False after SILENCE_SECONDS without any."""
    poll = select.poll()
    poll.register(one, select.POLLIN)
    return bool(poll.poll(SILENCE_SECONDS * 1000))


def _read(one: socket.socket) -> bytes:
    """Read all available data: a read shorter than the buffer has emptied the socket."""
    try:
        data = chunk = one.recv(READ)
        while len(chunk) == READ:
            data += (chunk := one.recv(READ))
    except BlockingIOError:
        return b""
    if not chunk:
        raise RuntimeError("the server closed a follower's connection")
    return data


def _read_head(one: socket.socket) -> bytes:
    """Read the headers; return the bytes after them."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not _wait_readable(one):
            raise RuntimeError(f"no headers arrived: {received!r}")
        received += _read(one)
    if not received.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"a follower was rejected: {received[:500]!r}")
    return received.partition(b"\r\n\r\n")[2]


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def _server(load: Load) -> Running:
    return Running(load.name, load.port, load.pids, Path(load.log))


def main(load: Load) -> dict[str, float]:
    """Make all measurements of a load."""
    seconds, server = load.seconds, _server(load)
    with closing(Followers(load, 1)) as one:  # one-time allocations do not count for the followers
        one.check()
        one.bursts(0.001)
    time.sleep(0.2)
    if not load.followers:
        engine: dict[str, Callable[[], dict[str, float]]] = {
            "lines": lambda: publish_lines(load, seconds),
            "single": lambda: publish_single(load, seconds),
            "resume": lambda: resume(load),
        }
        return {key: value for name in load.plan for key, value in engine[name]().items()}
    gc.disable()
    before = server.memory("VmRSS")
    with closing(Followers(load, load.followers)) as many:
        numbers = {"idle": (server.memory("VmRSS") - before) / load.followers / 1024}
        many.check()
        steps: dict[str, Callable[[], dict[str, float]]] = {
            "one": lambda: many.one_in_flight(seconds),
            "burst": lambda: many.bursts(seconds),
            "paced": lambda: many.paced(PACED_TIMES * seconds),
            "health": lambda: many.health(HEALTH_TIMES * seconds),
        }
        for name in load.plan:
            numbers |= steps[name]()
    return numbers


if __name__ == "__main__":
    print(json.dumps(main(Load(**json.loads(sys.argv[1])))))
