"""The measuring client of small requests: a separate process that repeats one on some connections, and prints JSON."""

import json
import re
import selectors
import socket
import sys
import time
from dataclasses import dataclass

WARM_UP = 50
"""Number of requests of each connection before the clock starts."""
SILENCE_SECONDS = 10
"""Time without any response after which the server has failed, in seconds."""


@dataclass(frozen=True)
class Work:
    """A request, and the status of its response."""

    method: str
    path: str
    status: int
    body: str = ""

    def text(self, port: int) -> bytes:
        """Return the bytes of the request."""
        kind = f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n" if self.body else ""
        return f"{self.method} {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{kind}\r\n{self.body}".encode()


class Connection:
    """A connection with one request in flight."""

    def __init__(self, port: int, work: Work) -> None:
        self._request, self._status = work.text(port), f"HTTP/1.1 {work.status} ".encode()
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head, self._left = b"", -1
        self._buffer = bytearray(1024 * 1024)

    def send(self) -> None:
        """Send the request."""
        self._head, self._left = b"", -1
        self.socket.sendall(self._request)

    def receive(self) -> bool:
        """Receive what has arrived; return whether the response is complete. Raises ValueError for another one."""
        if self._left > 0:  # the kernel discards the body
            count = self.socket.recv_into(self._buffer, min(self._left, len(self._buffer)), socket.MSG_TRUNC)
        else:
            chunk = self.socket.recv(64 * 1024)
            count, self._head = len(chunk), self._head + chunk
        if not count:
            raise ValueError(f"the response ended early: {self._head[:200]!r}")
        if self._left >= 0:
            self._left -= count
        elif b"\r\n\r\n" in self._head:
            fields, _, body = self._head.partition(b"\r\n\r\n")
            length = re.search(rb"(?im)^content-length: *(\d+)\r?$", fields)
            has_none = fields.startswith(b"HTTP/1.1 204 ")  # nor a Content-Length
            if not (length or has_none) or not fields.startswith(self._status):
                raise ValueError(f"not {self._status!r} with a Content-Length: {fields!r}")
            self._left = (int(length[1]) if length else 0) - len(body)
        return self._left == 0


def measure(port: int, connections: int, seconds: float, work: Work) -> dict[str, float]:
    """Repeat a request; return how many responses came within `seconds`, and the number of all requests."""
    with selectors.DefaultSelector() as selector:
        opened = [Connection(port, work) for _ in range(connections)]
        try:
            for one in opened:
                selector.register(one.socket, selectors.EVENT_READ, one)
                one.send()
            begun, first, count, warm = 0.0, 0, 0, WARM_UP * connections
            while not begun or time.perf_counter() - begun < seconds:
                if not (ready := selector.select(SILENCE_SECONDS)):
                    raise ValueError("no response arrives any more")
                for key, _ in ready:
                    if key.data.receive():
                        count += 1
                        key.data.send()
                if not begun and count >= warm:
                    begun, first = time.perf_counter(), count
            return {"count": count - first, "seconds": time.perf_counter() - begun, "requests": count}
        finally:
            for one in opened:
                one.socket.close()


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Work(**json.loads(sys.argv[4])))))
