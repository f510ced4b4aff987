"""An OpenAI-compatible upstream for tests: real sockets, every byte and every fault scripted."""

import contextlib
import json
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MODEL = "fake-1"

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def event(text: str = "", *, finish: str | None = None, **others: Any) -> bytes:
    """Return one event of a completion."""
    delta = {"content": text} if text else {}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice], **others}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
FINISH = event(finish="stop")
USED = event(choices=[], usage=USAGE)
DONE = b"data: [DONE]\n\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class Exchange:
    """A request, and the connection to respond on."""

    head: str
    body: dict[str, Any]
    connection: socket.socket
    closed: threading.Event = field(default_factory=threading.Event)
    """Set once the client has been seen to disconnect."""

    @property
    def prompt(self) -> str:
        if "messages" in self.body:
            return str(self.body["messages"][-1]["content"])
        return str(self.body.get("prompt", self.body.get("input")))

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def begin(self) -> None:
        """Send the head of an event stream in chunks."""
        self.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")

    def send_events(self, *events: bytes) -> None:
        """Send events, a chunk each."""
        for one in events:
            self.send(chunked(one))

    def end(self) -> None:
        """Send the last chunk."""
        self.send(b"0\r\n\r\n")

    def respond(self, *events: bytes) -> None:
        """Send a complete event stream."""
        self.begin()
        self.send_events(*events)
        self.end()

    def respond_with(self, status: int, body: bytes = b"", *headers: bytes) -> None:
        """Send a response that is not streamed."""
        lines = [b"HTTP/1.1 %d Something" % status, b"Content-Length: %d" % len(body), *headers]
        self.send(b"\r\n".join(lines) + b"\r\n\r\n" + body)

    def reset(self) -> None:
        """Reset the connection."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def wait_until_closed(self, seconds: float = 10) -> bool:
        """Wait until the client closes the connection; return whether it did."""
        self.connection.settimeout(seconds)
        with contextlib.suppress(TimeoutError):
            try:
                closed = not self.connection.recv(1)
            except ConnectionError:
                closed = True
            if closed:
                self.closed.set()
        return self.closed.is_set()


Script = Callable[[Exchange], object]


@dataclass
class FakeUpstream:
    """It listens on a port of loopback; the script for a prompt is the one with its name, or `default`."""

    scripts: dict[str, Script]
    exchanges: list[Exchange] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            reader = connection.makefile("rb")
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = reader.readline()
                if not line:
                    return
                head += line
            lengths = [
                line.partition(b":")[2] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
            ]
            body = json.loads(reader.read(int(lengths[0]))) if lengths else {}
            exchange = Exchange(head.decode(), body, connection)
            self.exchanges.append(exchange)
            self.scripts[exchange.prompt if exchange.prompt in self.scripts else "default"](exchange)


@contextmanager
def fake_upstream(scripts: dict[str, Script]) -> Iterator[FakeUpstream]:
    """Run an upstream in threads of this process."""
    upstream = FakeUpstream(scripts)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            upstream.serve(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        upstream.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield upstream
        finally:
            server.shutdown()
            thread.join()
