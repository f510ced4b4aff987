"""The load client of the fan-out measurement: it publishes, proves what each follower got, and prints numbers as JSON.

One process and one epoll for all followers. Two ways to know that an event has come:

- One event in flight: every follower's socket is registered edge-triggered, and the edge is the arrival. When all have
  been told, off the clock, each follower is read, and must hold exactly that event. Reading on the clock would cost the
  client more than the fastest servers spend on sending.
- Several in flight: an edge is read at once, and events are counted by their closing brace. Off the clock, the bytes
  of every follower must again be exactly the events published, in order.

While a server sends, the client does not wait in epoll: the kernel would wake it at every delivery, and the server's
own send() would pay for that, which followers on other machines would never cost it. So it sleeps through most of the
time that the fastest of the last deliveries took, and from then on looks again and again without waiting.
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
BLOCK_EVENTS, BLOCK_SECONDS = 16, 0.5  # what is counted, or dropped, together: whichever is less
CONNECTED_AT_ONCE = 64  # below every server's backlog
READ = 64 * 1024
SILENCE_SECONDS = 20
PACED_RATE = 20
PACED_LEAST = 5  # events, however slow the pace
PACED_TIMES, HEALTH_TIMES = 5, 2  # as long as a measurement of throughput
PROBE_SECONDS = 0.01
LOOK_SECONDS = 0.00025  # between looks, where each delivery has a time of its own
LONG_SECONDS = 0.05  # a delivery that takes longer need not be clocked more finely than that
ASLEEP = {1: 0.8, BURST: 0.5}  # the part of the expected time slept through; after a burst there is more to read
LINES = 100
PUBLISHERS = 8
MISSED = 10_000
FIRST = 1_000_000  # sequence numbers have seven digits, so that every event has the same size
KEYS = (
    *(f"{name} {key}" for name in ("one", "burst", "lines", "single") for key in ("rate", "cpu", "busy", "client")),
    "paced p50", "paced p99", "health p50", "health p95", "idle", "resume",
)  # fmt: skip
"""What a number that it prints may be called."""
NUMBER = re.compile(rb'"price": ?(\d+)\.25')


@dataclass(frozen=True)
class Load:
    """What the client is to do: connect so many followers to a server, then take each measurement of the plan."""

    name: str
    port: int
    pids: list[int]
    log: str
    followers: int
    plan: list[str]
    seconds: float
    """How long a measurement lasts, about; a slow server's burst is never cut."""
    pace: float = PACED_RATE
    """Events a second where each is clocked to every follower."""
    one_by_one: bool = False
    """A POST takes one event only: several are sent as pipelined POSTs on one connection."""

    def text(self) -> str:
        """Write it as the argument of this module."""
        return json.dumps(asdict(self))


def event(number: int) -> bytes:
    """Return the event with this number, always of the same size."""
    return (
        b'{"symbol":"ACME","price":%d.25,"change":-0.25,"time":"2026-01-02T03:04:05.678901Z","currency":"EUR"}' % number
    )


class Connection:
    """A keep-alive connection for requests whose answers have a Content-Length."""

    def __init__(self, port: int) -> None:
        self.socket = _connect(port)
        self.host = f"127.0.0.1:{port}".encode()
        self._received = b""

    def send(self, request: bytes) -> None:
        """Send one or more requests at once. What is published is a few KB: it fits into the send buffer."""
        if self.socket.send(request) != len(request):
            raise RuntimeError("a request did not fit into the send buffer")

    def post(self, events: Sequence[bytes], one_by_one: bool) -> bytes:
        """Write a POST of JSON lines, or a POST for each event."""
        bodies = events if one_by_one else [b"\n".join(events)]
        kind = b"application/json" if len(events) == 1 or one_by_one else b"application/jsonl"
        return b"".join(
            b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (PATH.encode(), self.host, kind, len(body), body)
            for body in bodies
        )

    def get(self, path: str, headers: bytes = b"Accept: */*") -> bytes:
        """Write a GET."""
        return b"GET %b HTTP/1.1\r\nHost: %b\r\n%b\r\n\r\n" % (path.encode(), self.host, headers)

    def receive(self) -> list[bytes]:
        """Take what has come; return the bodies of the answers that are whole now. Raises unless they are 2xx."""
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
                raise RuntimeError(f"refused: {head + rest!r}")
            if len(rest) < length:
                break
            bodies.append(rest[:length])
            self._received = rest[length:]
        return bodies

    def ask(self, request: bytes) -> bytes:
        """Send one request and wait for its answer's body."""
        self.send(request)
        while _has_news(self.socket):
            if bodies := self.receive():
                return bodies[0]
        raise RuntimeError(f"no answer to {request[:500]!r}")


class Probe:
    """A second connection that asks for /health: each time, so long after the last answer."""

    def __init__(self, port: int) -> None:
        self.connection = Connection(port)
        self.seconds: list[float] = []
        self._asked: float | None = None
        self._due = time.perf_counter()

    def look(self, events: dict[int, int]) -> None:
        """Take an answer if it is among the events, and out of them; ask again when it is time."""
        now = time.perf_counter()
        if events.pop(self.connection.socket.fileno(), 0) and self.connection.receive() and self._asked:
            self.seconds.append(now - self._asked)
            self._asked, self._due = None, now + PROBE_SECONDS
        if self._asked is None and now >= self._due:
            self.connection.send(self.connection.get("/health"))
            self._asked = time.perf_counter()


class Window:
    """Clocks of server and client, running while they are to."""

    def __init__(self, server: Running) -> None:
        self.seconds = self.server = self.client = 0.0
        self.deliveries = 0
        self._running = server

    @contextmanager
    def serving(self, deliveries: int) -> Iterator[None]:
        """Count the server's CPU time inside, in which so many events reach a follower."""
        begun = self._running.cpu_seconds()
        yield
        self.server += self._running.cpu_seconds() - begun
        self.deliveries += deliveries

    @contextmanager
    def clocked(self) -> Iterator[None]:
        """Count the time that passes inside, and the client's CPU time."""
        client, begun = time.process_time(), time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun
        self.client += time.process_time() - client

    def add(self, other: "Window") -> None:
        """Count what another window has counted, too."""
        self.seconds += other.seconds
        self.client += other.client
        self.server += other.server
        self.deliveries += other.deliveries

    def numbers(self, prefix: str) -> dict[str, float]:
        """Deliveries a second, the server's microseconds a delivery, and what each used of a CPU."""
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
        self._proven = b""
        self._pause = 0.0
        self._took: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=8))
        self._epoll = select.epoll()
        self._watch(self.publisher.socket)
        request = self.publisher.get(PATH, b"Accept: text/event-stream")
        while len(self.sockets) < count:
            opened = [_connect(load.port) for _ in range(min(CONNECTED_AT_ONCE, count - len(self.sockets)))]
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
        """Leave."""
        for one in (*self.sockets.values(), self.publisher.socket):
            one.close()
        self._epoll.close()

    def _watch(self, one: socket.socket) -> None:
        self._epoll.register(one, select.EPOLLIN | select.EPOLLET)

    def _look(self, most: int = 1024) -> dict[int, int]:
        """Return the sockets that have news, without waiting for any."""
        return dict(self._epoll.poll(0, most))

    def _publish(self, count: int) -> int:
        """Send the next events; return how many answers they will have."""
        events = [event(number) for number in range(self.published, self.published + count)]
        self.published += count
        self.publisher.send(self.publisher.post(events, self.load.one_by_one))
        return count if self.load.one_by_one else 1

    @contextmanager
    def _delivery(self, count: int) -> Iterator[int]:
        """Publish so many events, sleep while they are sure to be on their way, and clock when all have come."""
        took = self._took[count]
        expected = min(took, default=0)
        self._pause = LOOK_SECONDS if self.probe or not took or expected > LONG_SECONDS else 0
        begun = time.perf_counter()
        answers = self._publish(count)
        if (nap := ASLEEP[count] * expected) > LOOK_SECONDS and not self.probe:
            time.sleep(nap)
        yield answers
        took.append(time.perf_counter() - begun)

    def _rest(self, events: dict[int, int], deadline: float) -> None:
        """Rest before the next look; raises where nothing came and no time is left."""
        if not events and time.perf_counter() > deadline:
            raise RuntimeError(f"not every follower got event {self.published - 1}")
        if self._pause:
            time.sleep(self._pause)

    # -- one event in flight

    def _rally(self) -> None:
        """Publish an event and wait until every follower has been told of it, and the publisher of its success."""
        publisher, wanted, told = self.publisher.socket.fileno(), len(self.sockets), set[int]()
        silence = time.perf_counter() + SILENCE_SECONDS
        with self._delivery(1) as answers:
            while len(told) < wanted or answers:
                events = self._look()
                if publisher in events:
                    del events[publisher]
                    answers -= len(self.publisher.receive())
                if self.probe:
                    self.probe.look(events)
                told.update(events)
                self._rest(events, silence)

    def one_in_flight(self, seconds: float) -> dict[str, float]:
        """Publish an event, wait until all have it, publish the next."""
        window, count, begun = Window(self.server), 1, time.perf_counter()
        self._block(count)  # only tells how long an event takes
        count = max(1, min(BLOCK_EVENTS, int(BLOCK_SECONDS / (time.perf_counter() - begun))))
        while window.seconds < seconds:
            if block := self._block(count):
                window.add(block)
        return window.numbers("one")

    def _block(self, count: int) -> Window | None:
        """Let some events pass, each read before the next; None where a heartbeat passed for one of them."""
        block, clean = Window(self.server), True
        # What the server does after the last delivery is off the clock, but not off its CPU time.
        with block.serving(count * len(self.sockets)):
            for number in range(self.published, self.published + count):
                with block.clocked():
                    self._rally()
                for one in self.sockets.values():
                    data, silence = _read(one), time.perf_counter() + SILENCE_SECONDS
                    while not data.count(b"}"):
                        clean = False
                        self._rest({}, silence)
                        data += _read(one)
                    clean = self._prove(data, [number]) and clean
        return block if clean else None

    def _prove(self, data: bytes, numbers: Iterable[int]) -> bool:
        """See that a follower got exactly these events, in order; return whether nothing else came."""
        if data != self._proven:  # most get the very bytes that another one got
            found = [int(number) for number in NUMBER.findall(data)]
            if found != list(numbers):
                raise RuntimeError(f"{numbers} was published, a follower got {found}: {data[:500]!r}")
            if COMMENT.search(data):
                return False
            self._proven = data
        return True

    # -- several events in flight

    def _burst(self, count: int) -> dict[int, list[bytes]]:
        """Publish so many events at once and wait until every follower has them; return what each has read."""
        pieces: dict[int, list[bytes]] = defaultdict(list)
        lacks = dict.fromkeys(self.sockets, count)
        sockets, publisher, wanted = self.sockets, self.publisher.socket.fileno(), len(self.sockets)
        silence = time.perf_counter() + SILENCE_SECONDS
        with self._delivery(count) as answers:
            while wanted or answers:
                events = self._look()
                if publisher in events:
                    del events[publisher]
                    answers -= len(self.publisher.receive())
                for one in events:
                    data = _read(sockets[one])
                    pieces[one].append(data)
                    lacks[one] -= data.count(b"}")
                    if not lacks[one]:
                        wanted -= 1
                self._rest(events, silence)
        return pieces

    def check(self) -> None:
        """Prove that an event comes in one piece: only then an edge is an event."""
        for _ in range(3):  # a heartbeat may come between
            number = self.published
            pieces = self._burst(1)
            for found in pieces.values():
                self._prove(b"".join(found), [number])
            if sum(len(found) > 1 for found in pieces.values()) <= len(pieces) / 100:
                return
        raise RuntimeError(f"an event comes in pieces: {next(iter(pieces.values()))}")

    def bursts(self, seconds: float) -> dict[str, float]:
        """Publish 32 events at once, wait until all have them, publish the next 32."""
        window = Window(self.server)
        while window.seconds < seconds:
            numbers = range(self.published, self.published + BURST)
            with window.serving(BURST * len(self.sockets)), window.clocked():
                pieces = self._burst(BURST)
            for found in pieces.values():
                self._prove(b"".join(found), numbers)
        return window.numbers("burst")

    def paced(self, seconds: float) -> dict[str, float]:
        """Publish events at the load's pace, and clock each from its publication to each follower's edge."""
        pace = self.load.pace
        total, sent, late = max(PACED_LEAST, int(seconds * pace)), list[float](), list[float]()
        pieces: dict[int, list[bytes]] = defaultdict(list)
        got = dict.fromkeys(self.sockets, 0)
        publisher, wanted, first = self.publisher.socket.fileno(), total * len(self.sockets), self.published
        begun, answers = time.perf_counter(), total
        while len(late) < wanted or answers:
            due = begun + len(sent) / pace
            if len(sent) < total and time.perf_counter() >= due:
                sent.append(time.perf_counter())
                self._publish(1)
            # Few at a time, as the clock is read once for all of them, before they are read.
            events, now = self._look(64), time.perf_counter()
            if publisher in events:
                del events[publisher]
                answers -= len(self.publisher.receive())
            for one in events:
                data = _read(self.sockets[one])
                pieces[one].append(data)
                had, has = got[one], got[one] + data.count(b"}")
                late += [now - at for at in sent[had:has]]
                got[one] = has
            if not events:
                if now > due + SILENCE_SECONDS:
                    raise RuntimeError(f"{len(late)} of {wanted} events came")
                time.sleep(LOOK_SECONDS)
        for found in pieces.values():
            self._prove(b"".join(found), range(first, first + total))
        return {"paced p50": statistics.median(late) * 1e3, "paced p99": _percentile(late, 99) * 1e3}

    def health(self, seconds: float) -> dict[str, float]:
        """Ask for /health on another connection while one event after the other is flushed."""
        self.probe = Probe(self.load.port)
        self._watch(self.probe.connection.socket)
        self.one_in_flight(seconds)
        found, self.probe = self.probe.seconds, None
        return {"health p50": statistics.median(found) * 1e3, "health p95": _percentile(found, 95) * 1e3}


# -- the engine behind it, without followers


def publish_lines(load: Load, seconds: float) -> dict[str, float]:
    """Publish 100 events a POST, one POST after the other."""
    window, connection = Window(_server(load)), Connection(load.port)
    body = connection.post([event(FIRST + number) for number in range(LINES)], False)
    while window.seconds < seconds:
        with window.serving(LINES * 10), window.clocked():
            for _ in range(10):
                connection.ask(body)
    connection.socket.close()
    return window.numbers("lines")


def publish_single(load: Load, seconds: float) -> dict[str, float]:
    """Publish an event a POST over eight connections, each waiting for its answer before its next POST."""
    window, connections = Window(_server(load)), [Connection(load.port) for _ in range(PUBLISHERS)]
    request = connections[0].post([event(FIRST)], False)
    with select.epoll() as epoll:
        those = {one.socket.fileno(): one for one in connections}
        for number, one in those.items():
            epoll.register(number, select.EPOLLIN)
            one.send(request)
        while window.seconds < seconds:
            with window.serving(done := 500), window.clocked():
                while done > 0:
                    for number, _ in epoll.poll(SILENCE_SECONDS):
                        if those[number].receive():
                            done -= 1
                            those[number].send(request)
            window.deliveries -= done  # the last look may have brought more than were wanted
    for one in connections:
        one.socket.close()
    return window.numbers("single")


def resume(load: Load) -> dict[str, float]:
    """Miss 10,000 events, then follow from the one before them: seconds until the last of them is there."""
    connection, took = Connection(load.port), list[float]()
    seen = json.loads(connection.ask(connection.post([event(FIRST)], False)))["ids"][0]
    for first in range(FIRST + 1, FIRST + 1 + MISSED, LINES):
        connection.ask(connection.post([event(first + number) for number in range(LINES)], False))
    for _ in range(3):
        with closing(_connect(load.port)) as follower:
            begun = time.perf_counter()
            follower.send(connection.get(PATH, b"Accept: text/event-stream\r\nLast-Event-ID: %b" % seen.encode()))
            received = bytearray(_read_head(follower))
            count = received.count(b"}")
            while count < MISSED:
                if not _has_news(follower):
                    raise RuntimeError(f"{count} of {MISSED} missed events came: {bytes(received[-500:])!r}")
                data = _read(follower)
                count += data.count(b"}")
                received += data
            took.append(time.perf_counter() - begun)
        found = [int(number) for number in NUMBER.findall(received)]
        if found != list(range(FIRST + 1, FIRST + 1 + MISSED)):
            raise RuntimeError(f"{MISSED} events were missed, {len(found)} came: {bytes(received[:500])!r}")
    return {"resume": statistics.median(took)}


# -- sockets


def _connect(port: int) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port), SILENCE_SECONDS)
    one.setblocking(False)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


def _has_news(one: socket.socket) -> bool:
    """Wait until there is something to read; False where nothing comes."""
    poll = select.poll()
    poll.register(one, select.POLLIN)
    return bool(poll.poll(SILENCE_SECONDS * 1000))


def _read(one: socket.socket) -> bytes:
    """Read everything there is; a read that comes short of the buffer has emptied the socket."""
    try:
        data = piece = one.recv(READ)
        while len(piece) == READ:
            data += (piece := one.recv(READ))
    except BlockingIOError:
        return b""
    if not piece:
        raise RuntimeError("the server closed a follower's connection")
    return data


def _read_head(one: socket.socket) -> bytes:
    """Read until the headers are there; return what came after them."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not _has_news(one):
            raise RuntimeError(f"no headers came: {received!r}")
        received += _read(one)
    if not received.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"a follower was refused: {received[:500]!r}")
    return received.partition(b"\r\n\r\n")[2]


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def _server(load: Load) -> Running:
    return Running(load.name, load.port, load.pids, Path(load.log))


def main(load: Load) -> dict[str, float]:
    """Do all of a load."""
    seconds, server = load.seconds, _server(load)
    with closing(Followers(load, 1)) as one:  # what is loaded or filled only once is no follower's
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
