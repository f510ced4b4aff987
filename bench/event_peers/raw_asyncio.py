"""The limit: an asyncio Protocol that writes one prebuilt chunk per event to every transport, and does nothing else."""

import asyncio
import re
import signal
import sys

HEADERS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"

followers: set[asyncio.Transport] = set()


class Connection(asyncio.Protocol):
    """One connection."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        """Respond to every complete request; several may arrive together."""
        self.received += data
        while True:
            head, end, body = self.received.partition(b"\r\n\r\n")
            found = re.search(rb"(?i)content-length: *(\d+)", head)
            length = int(found[1]) if found else 0
            if not end or len(body) < length:
                return
            self.received = body[length:]
            if head.startswith(b"POST "):
                for line in body[:length].splitlines():
                    publish(line)
                self.transport.write(ACCEPTED)
            elif head.startswith(b"GET /stream"):
                self.transport.write(HEADERS)
                followers.add(self.transport)
            else:
                self.transport.write(NOT_FOUND)

    def connection_lost(self, error: Exception | None) -> None:
        """Remove the follower."""
        followers.discard(self.transport)


def publish(data: bytes) -> None:
    """Write one event to every follower."""
    frame = b"data: " + data + b"\n\n"
    chunk = b"%x\r\n%b\r\n" % (len(frame), frame)
    for transport in followers:
        transport.write(chunk)


async def main(port: int) -> None:
    """Serve until SIGTERM."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    await loop.create_server(Connection, "127.0.0.1", port, backlog=2048)
    await stopped.wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
