"""Connections that get the same bytes: their order, whatever the kernel takes, and what happens when one is lost."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager

import pytest
from aiohttp import web

from streamlab.streaming.connection import Connection, FanoutWriter, Recipients


class Member(FanoutWriter):
    """A member that records what its transport was given."""

    __slots__ = ("stopped", "through_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self.writer = transport
        self.stopped: list[int] = []
        """The socket of its transport, each time it had to stop."""
        self.through_transport: list[bytes] = []

    @property
    def transport(self) -> asyncio.Transport:
        assert isinstance(self.writer, asyncio.Transport)
        return self.writer

    def stop_writing(self) -> None:
        self.stopped.append(self.transport.get_extra_info("socket").fileno())


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield the two ends of a TCP connection whose buffers are small."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.connect(listener.getsockname())
        with closing(listener.accept()[0]) as accepted:
            yield accepted, client


@asynccontextmanager
async def joined(
    recipients: Recipients[Member], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Member, socket.socket]]:
    """Yield one of the recipients, and its client."""
    with connected() as (accepted, client):
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(asyncio.Protocol, accepted)
        one, write = Member(transport), transport.write

        def record(data: bytes) -> None:
            one.through_transport.append(data)
            write(data)

        monkeypatch.setattr(transport, "write", record)
        recipients.add(one)
        try:
            yield one, client
        finally:
            transport.abort()


async def read(client: socket.socket, size: int) -> bytes:
    """Read at least `size` bytes, while the event loop runs."""
    client.setblocking(False)
    received = b""
    while len(received) < size and (data := await asyncio.get_running_loop().sock_recv(client, 65536)):
        received += data
    return received


async def test_what_the_kernel_does_not_take_arrives_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    recipients = Recipients[Member]()
    async with (
        asyncio.timeout(20),
        joined(recipients, monkeypatch) as (slow, client),
        joined(recipients, monkeypatch) as (quick, other),
    ):
        events = [b"%04d" % number * 250 for number in range(200)]
        for event in events[:190]:
            recipients.write(event)
            assert await read(other, len(event)) == event
        assert slow.transport.get_write_buffer_size() > 0
        assert quick.through_transport == []
        assert 0 < len(slow.through_transport[0]) <= 1000  # the rest of one, and all that followed it
        assert slow.through_transport[1:] == events[191 - len(slow.through_transport) : 190]
        received = await read(client, 190_000)
        before = len(slow.through_transport)
        for event in events[190:]:
            recipients.write(event)
        received += await read(client, 10_000)
        assert received == b"".join(events)
        assert len(slow.through_transport) - before == 1  # the first found that the buffer was empty again
        recipients.remove(quick)
        recipients.write(b"last")
        assert await read(client, 4) == b"last"
        assert await read(other, 10_000) == b"".join(events[190:])
        assert len(recipients) == 1


async def test_an_event_of_which_the_kernel_takes_a_part_arrives_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipients, event = Recipients[Member](), b"".join(b"%08d" % number for number in range(60_000))
    async with asyncio.timeout(20), joined(recipients, monkeypatch) as (one, client):
        recipients.write(event)
        recipients.write(b"next")
        assert 0 < len(one.through_transport[0]) < len(event)
        assert await read(client, len(event) + 4) == event + b"next"


async def test_nothing_overtakes_what_something_else_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    recipients = Recipients[Member]()
    async with asyncio.timeout(20), joined(recipients, monkeypatch) as (one, client):
        sent = b""
        while not one.transport.get_write_buffer_size():
            one.transport.write(beat := b":" * 4999 + b"\n")
            sent += beat
        recipients.update(one)
        received = client.recv(65536)  # the kernel has room again, and the transport does not know
        recipients.write(b"event")
        received += await read(client, len(sent) + 5 - len(received))
        assert received == sent + b"event"


async def test_nothing_follows_an_event_that_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    recipients = Recipients[Member]()
    async with asyncio.timeout(20), joined(recipients, monkeypatch) as (one, client):
        while not one.transport.get_write_buffer_size():
            recipients.write(b"event" * 1000)
        one.transport.abort()
        received = client.recv(1000)  # the kernel has room again, and the socket is open until the next turn
        for _ in range(2):
            recipients.write(b"another")
        with contextlib.suppress(ConnectionResetError):
            received += await read(client, 10**9)
        assert received
        assert b"another" not in received


async def test_a_writer_stops_before_the_socket_of_its_connection_is_closed() -> None:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        raise AssertionError(request)

    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        with connected() as (accepted, client):
            transport, connection = await loop.connect_accepted_socket(
                lambda: Connection(web.Server(handle), loop=loop), accepted
            )
            connection.fanout = member = Member(transport)
            descriptor = accepted.fileno()
            client.close()
            while not member.stopped:
                await asyncio.sleep(0)
            assert member.stopped == [descriptor]
