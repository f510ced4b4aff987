"""Real servers for the tests: a process as `make run` starts it, and an application on a socket of this process."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass
class Running:
    """A streamlab process, what it was started with, and ways to talk to it."""

    process: subprocess.Popen[str]
    url: str
    base: Path
    stderr: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        return self.stderr.read_text()

    def connect(self, *, receive_buffer: int | None = None, timeout: float = 10) -> socket.socket:
        """A plain connection; with a small receive buffer, one that stalls soon when it does not read."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(timeout)
        try:
            connection.connect(("127.0.0.1", self.port))
        except OSError:
            connection.close()
            raise
        return connection

    def send(self, request: str, **options: object) -> socket.socket:
        """Send a request given as its head, line by line; `{port}` is filled in. Returns the open connection."""
        connection = self.connect(**options)  # type: ignore[arg-type]
        head = textwrap.dedent(request).strip().replace("{port}", str(self.port)).replace("\n", "\r\n")
        connection.sendall(head.encode() + b"\r\n\r\n")
        return connection

    def get(
        self, path: str, headers: Mapping[str, str] | None = None, *, method: str = "GET", body: bytes | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def wait_for_log(self, text: str, *, seconds: float = 10) -> str:
        """The log, once it holds `text`."""
        deadline = time.monotonic() + seconds
        while text not in (log := self.log):
            assert time.monotonic() < deadline, f"no {text!r} within {seconds} s in:\n{log}"
            time.sleep(0.01)
        return log

    def terminate(self, number: int = signal.SIGTERM, *, seconds: float = 20) -> tuple[int, float]:
        """Send a signal and wait for the end: exit status, and the seconds it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        return status, time.monotonic() - started


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes; what came so far where it resets."""
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


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """What comes until `mark` has come."""
    received = bytearray()
    while mark not in received:
        chunk = connection.recv(65536)
        assert chunk, f"the connection ended before {mark!r}: {bytes(received)!r}"
        received += chunk
    return bytes(received)


def write_plugins(base: Path, plugins: Mapping[str, str]) -> None:
    """Write plugin files beside the configuration."""
    folder = base / "plugins"
    folder.mkdir(exist_ok=True)
    for name, source in plugins.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start `streamlab run` as a process of its own; it is ended after the test, and must not have left a traceback."""
    servers: list[tuple[Running, bool]] = []

    def starting(
        config: str = "", *, tracebacks: bool = False, environ: Mapping[str, str] | None = None, **plugins: str
    ) -> Running:
        write_plugins(tmp_path, plugins)
        (tmp_path / "config.toml").write_text(textwrap.dedent(config))
        stderr = tmp_path / f"stderr-{len(servers)}.log"
        with stderr.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "streamlab", "run", "--config", str(tmp_path / "config.toml"), "--port", "0"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONWARNINGS": "error", "PYTHONPATH": str(REPOSITORY), **(environ or {})},
                cwd=tmp_path,
            )
        assert process.stdout is not None
        address = next((line.rpartition(" ")[2].strip() for line in process.stdout if " serves http" in line), None)
        server = Running(process, address or "", tmp_path, stderr)
        servers.append((server, tracebacks))
        assert address is not None, f"the server did not start:\n{server.log}"
        return server

    yield starting
    for server, _ in servers:
        if server.process.poll() is None:
            server.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(15)
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
    for server, tracebacks in servers:
        assert tracebacks or "Traceback" not in server.log, server.log
