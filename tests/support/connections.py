"""Responses read byte by byte: event streams, and connections until their end."""

import http.client
import itertools
import json
import selectors
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.servers import Running


@dataclass(frozen=True)
class Received:
    """A received event: its fields, and its bytes."""

    id: str
    event: str
    data: str
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class EventStream:
    """An event stream being read; `status` and `headers` (names in lower case) of its response."""

    def __init__(
        self,
        server: Running,
        path: str,
        after: str | None = None,
        *,
        timeout: float = 20,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
        position = {} if after is None else {"Last-Event-ID": after}
        self._connection.request("GET", path, headers={"Accept": "text/event-stream", **position, **(headers or {})})
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = {name.lower(): value for name, value in self._response.getheaders()}

    def __enter__(self) -> "EventStream":
        return self

    def __exit__(self, *error: object) -> None:
        self._response.close()
        self._connection.close()

    def __iter__(self) -> Iterator[Received]:
        """Yield events until the stream ends, without comments."""
        lines: list[bytes] = []
        while line := self._response.readline():
            if line == b"\n" and lines:
                fields = dict(entry.rstrip(b"\n").decode().partition(": ")[::2] for entry in lines)
                raw = b"".join(lines) + line
                yield Received(fields.get("id", ""), fields.get("event", ""), fields.get("data", ""), raw)
                lines = []
            elif not line.startswith(b":"):
                lines.append(line)

    def take(self, count: int) -> list[Received]:
        return list(itertools.islice(self, count))


def read_all(connection: socket.socket) -> bytes:
    """Return all bytes until the server closes or resets the connection."""
    received = bytearray()
    with connection:
        while True:
            try:
                chunk = connection.recv(1 << 20)
            except ConnectionResetError:
                break
            if not chunk:
                break
            received += chunk
    return bytes(received)


def read_crowd(connections: Sequence[socket.socket]) -> list[bytes]:
    """Return all bytes that many connections receive until the server closes them, read as they arrive."""
    received = {connection: bytearray() for connection in connections}
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(20)
            assert ready, "the server sends nothing"
            for key, _ in ready:
                ready_one = key.fileobj
                assert isinstance(ready_one, socket.socket)
                if chunk := ready_one.recv(1 << 18):
                    received[ready_one] += chunk
                else:
                    selector.unregister(ready_one)
    return [bytes(body) for body in received.values()]


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """Return the bytes up to `mark`."""
    received = bytearray()
    while mark not in received:
        chunk = connection.recv(65536)
        assert chunk, f"the connection ended before {mark!r}: {bytes(received)!r}"
        received += chunk
    return bytes(received)
