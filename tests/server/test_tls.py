"""TLS at the server itself: event streams whose connections end in every way."""

import contextlib
import signal
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path

from tests.support.certificates import Pair
from tests.support.servers import Running

LOADED_PLUGINS = ("ticker",)

RESET = struct.pack("ii", 1, 0)


def begun(connection: ssl.SSLSocket) -> ssl.SSLSocket:
    connection.sendall(b"GET /stream/stock-ticker HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    return connection


def leave(connection: ssl.SSLSocket, how: int) -> None:
    """End a connection: by a reset, without a word, with the alert of TLS, or half of it."""
    if how == 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    elif how == 1:
        connection.settimeout(0.05)
        with contextlib.suppress(OSError):
            connection.unwrap()
    elif how == 2:
        connection.shutdown(socket.SHUT_WR)
    connection.close()


def test_followers_that_disconnect_leave_the_others_alone(start: Callable[..., Running], tmp_path: Path) -> None:
    """The second close() of a TLS transport once made the next price end the channel, and with it the server."""
    pair = Pair()
    pair.write(tmp_path / "server.pem", tmp_path / "server.key")
    tls = '[server]\ntls_certificate = "server.pem"\ntls_key = "server.key"\n'
    server = start(f"{tls}[scenarios.ticker]\ninterval = 0.01\n")
    with pair.connected(server.port) as other:
        begun(other)
        for number in range(80):
            with contextlib.ExitStack() as stack:
                leave(begun(stack.enter_context(pair.connected(server.port))), number % 4)
        for _ in range(3):
            assert b"data: " in other.recv(65536)
        server.process.send_signal(signal.SIGTERM)
        received = b""
        while chunk := other.recv(65536):
            received += chunk
    assert b"event: stop\n" in received
    assert received.endswith(b"\r\n0\r\n\r\n")
    assert server.process.wait(10) == 0
