"""The measuring client of streams: it reads one, or times appends on their way to its followers, and prints JSON."""

import http.client
import json
import re
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass

PATH = "/v1/stream"
SILENCE_SECONDS = 10
"""Time without any byte after which the server has failed, in seconds."""
CHUNK = 256 * 1024


@dataclass(frozen=True)
class Load:
    """The work of the client: `read` a stream of `count` messages, or `tail` one with `count` followers."""

    port: int
    kind: str
    count: int
    seconds: float
    pace: float = 50.0
    """Appends per second of `tail`."""

    def text(self) -> str:
        """Return it as the argument of this module."""
        return json.dumps(asdict(self))


def message(number: int) -> bytes:
    """Return the message with this number, always of the same size."""
    return b'{"number":%d,"symbol":"ACME","price":12.25,"time":"2026-01-02T03:04:05.678901Z","currency":"EUR"}' % (
        1_000_000 + number
    )


def create(port: int, name: str, messages: int) -> None:
    """Create a stream of JSON with a number of messages."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=SILENCE_SECONDS)) as connection:
        fields = {"Content-Type": "application/json"}
        bodies = [
            b"[" + b",".join(map(message, range(at, min(at + 100, messages)))) + b"]" for at in range(0, messages, 100)
        ]
        for method, body in [("PUT", b""), *(("POST", body) for body in bodies)]:
            connection.request(method, f"{PATH}/{name}", body, fields)
            response = connection.getresponse()
            response.read()
            if response.status not in (200, 201, 204):
                raise ValueError(f"{method} gets {response.status}")


def pages(connection: http.client.HTTPConnection, name: str) -> Iterator[bytes]:
    """Yield the bodies of a stream from its start to its end."""
    offset, complete = "-1", False
    while not complete:
        connection.request("GET", f"{PATH}/{name}?offset={offset}")
        response = connection.getresponse()
        yield response.read()
        if response.status != 200:
            raise ValueError(f"GET gets {response.status}")
        offset, complete = response.headers["Stream-Next-Offset"], "Stream-Up-To-Date" in response.headers


def read(load: Load) -> dict[str, float]:
    """Read a stream again and again; return the number of messages and the seconds."""
    create(load.port, "read", load.count)
    with closing(http.client.HTTPConnection("127.0.0.1", load.port, timeout=SILENCE_SECONDS)) as connection:
        found = [one for page in pages(connection, "read") for one in json.loads(page)]
        if found != [json.loads(message(number)) for number in range(load.count)]:
            raise ValueError(f"{len(found)} other messages than the {load.count} appended")
        begun, times = time.perf_counter(), 0
        while time.perf_counter() - begun < load.seconds:
            for _ in pages(connection, "read"):
                pass
            times += 1
        return {"count": times * load.count, "seconds": time.perf_counter() - begun}


def tail(load: Load) -> dict[str, float]:
    """Append messages at a pace; return how long each took to reach each follower, as percentiles, in milliseconds."""
    create(load.port, "tail", 0)
    host = f"Host: 127.0.0.1:{load.port}"
    with ExitStack() as stack, selectors.DefaultSelector() as selector:

        def connect(request: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", load.port), SILENCE_SECONDS))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(request)
            return connection

        follow = f"GET {PATH}/tail?offset=now&live=sse HTTP/1.1\r\n{host}\r\nAccept: text/event-stream\r\n\r\n"
        for _ in range(load.count):
            follower = connect(follow.encode())
            head = b""
            while b"upToDate" not in head:  # the control event of the position from which it follows
                if not (part := follower.recv(CHUNK)):
                    raise ValueError(f"a follower was rejected: {head!r}")
                head += part
            selector.register(follower, selectors.EVENT_READ)
        publisher = connect(b"")
        fields = f"{host}\r\nContent-Type: application/json\r\nContent-Length: {len(message(0))}"
        post = f"POST {PATH}/tail HTTP/1.1\r\n{fields}\r\n\r\n"
        delays: list[float] = []
        start = time.perf_counter()
        for number in range(int(load.seconds * load.pace)):
            time.sleep(max(0.0, start + number / load.pace - time.perf_counter()))
            body, text = message(number), b'"number":%d' % (1_000_000 + number)
            begun = time.perf_counter()
            publisher.sendall(post.encode() + body)
            waiting = {key.fd: b"" for key in selector.get_map().values()}
            while waiting:
                if not (ready := selector.select(SILENCE_SECONDS)):
                    raise ValueError(f"{len(waiting)} of {load.count} followers did not get message {number}")
                for key, _ in ready:
                    assert isinstance(key.fileobj, socket.socket)
                    part = key.fileobj.recv(CHUNK)
                    now = time.perf_counter()
                    if not part:
                        raise ValueError("the server closed a follower")
                    if key.fd in waiting:
                        waiting[key.fd] += part
                        if text in waiting[key.fd].replace(b": ", b":"):
                            del waiting[key.fd]
                            delays.append(now - begun)
            response = publisher.recv(CHUNK)
            if not re.match(rb"HTTP/1\.1 20[04] ", response):
                raise ValueError(f"POST gets {response!r}")
        delays.sort()
        return {name: delays[int(len(delays) * share)] * 1000 for name, share in (("p50", 0.5), ("p99", 0.99))}


if __name__ == "__main__":
    work = Load(**json.loads(sys.argv[1]))
    print(json.dumps((read if work.kind == "read" else tail)(work)))
