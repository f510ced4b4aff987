"""Real servers for the tests: a process as `make run` starts it, and an application on a socket of this process.

The fixture `start` is for a test that changes or stops its server. Tests that only read share one server for each
module: a fixture `shared`, which enters `starting_in`. An application of this process loads only the plugin under test:
`disabled`. Whatever ends after a configured time, such as a drain, gets a short one; a test waits for events, and never
sleeps.
"""

import contextlib
import http.client
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import types
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from tests.support.fork_server import ForkedProcess, ForkServer

REPOSITORY = Path(__file__).resolve().parents[2]


WITHOUT_MODEL = {"STREAMLAB_SCENARIOS__LLM__ENABLED": "false"}

"""For servers without a model: loading it takes a second of processor time, and 300 MB."""


ENVIRONMENT = {
    "PYTHONWARNINGS": "error",
    "PYTHONPATH": str(REPOSITORY),
    # aiohttp reads the system's certificates when it is imported, which takes a tenth of a second.
    "SSL_CERT_FILE": os.devnull,
}

"""The environment of every server."""


FORK_SERVER = ForkServer()

AnyProcess = TypeVar("AnyProcess", bound=subprocess.Popen[Any] | ForkedProcess)


@dataclass
class Running:
    """A streamlab process, its options, and methods to send requests to it."""

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
        """Return a plain connection; with a small receive buffer it stalls soon when it does not read."""
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
        """Send a request given as the lines of its head, with `{port}` filled in; return the open connection."""
        connection = self.connect(**options)  # type: ignore[arg-type]
        head = textwrap.dedent(request).strip().replace("{port}", str(self.port)).replace("\n", "\r\n")
        connection.sendall(head.encode() + b"\r\n\r\n")
        return connection

    def get(
        self, path: str, headers: Mapping[str, str] | None = None, *, method: str = "GET", body: bytes | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers (names in lower case) and body of one request on a new connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

    def wait_for_log(self, text: str, *, seconds: float = 10) -> str:
        """Return the log once it contains `text`."""
        deadline = time.monotonic() + seconds
        while text not in (log := self.log):
            assert time.monotonic() < deadline, f"no {text!r} within {seconds} s in:\n{log}"
            time.sleep(0.01)
        return log

    def complete_log(self) -> str:
        """Return the log once it has the lines of everything until now: lines are written a few times a second."""
        path = f"/{uuid.uuid4().hex}"
        self.get(path)
        return self.wait_for_log(path)

    def wait_for_followers(self, count: int) -> None:
        """Wait until so many clients follow a channel live: each gets what is published from now on.

        A stream is open earlier: without an id, its position is not known until the event log has been read.
        """
        live = f'streamlab_followers{{state="live"}} {count}.0'
        _wait_until(lambda: live in self.get("/metrics")[2].decode().splitlines(), f"{count} followers")

    def wait_for_open_streams(self, count: int) -> None:
        _wait_until(lambda: json.loads(self.get("/health")[2])["open_streams"] == count, f"{count} open streams")

    def terminate(self, number: int = signal.SIGTERM, *, seconds: float = 20) -> tuple[int, float]:
        """Send a signal and wait for the end; return the exit status and the seconds until then."""
        started = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        return status, time.monotonic() - started


def _wait_until(reached: Callable[[], bool], what: str, *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.005)


def plugin_module(plugin: str, name: str) -> Any:
    """Return a module of a plugin's folder, loaded without the `__init__` of the plugin, once per session."""
    package = f"{plugin}_under_test"
    folder = REPOSITORY / "plugins" / plugin
    sys.modules.setdefault(package, types.ModuleType(package)).__path__ = [str(folder)]
    return importlib.import_module(f"{package}.{name}")


def free_port() -> int:
    """Return a port for servers of one test, one after the other; until this process ends, no other program gets it.

    The system gives a bound port to nobody who asks for any port, as listener or as client. A server that asks for this
    one gets it all the same: Linux lets sockets with SO_REUSEADDR share a port on which none listens.
    """
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        port = int(reservation.getsockname()[1])
        if sys.platform == "linux":
            reservation.detach()  # it remains open
    return port


BUILT_IN = frozenset(path.parent.name for path in (REPOSITORY / "plugins").glob("*/__init__.py"))
"""Names of the built-in plugins."""


def switch(plugin: str) -> str:
    """Return the environment variable that enables or disables a plugin."""
    return f"STREAMLAB_SCENARIOS__{plugin.upper()}__ENABLED"


def disabled(*, but: str = "") -> dict[str, dict[str, Any]]:
    """Return tables that disable built-in plugins: importing them takes a fifth of a second."""
    return {name: {"enabled": False} for name in BUILT_IN if name != but}


def without(config: str, shipped: Collection[str] | None) -> dict[str, str]:
    """Return the variables that disable all plugins but `shipped`, and those with a table in the configuration."""
    unused = BUILT_IN - set(shipped) if shipped is not None else {"llm"}
    return {switch(name): "false" for name in unused if f"[scenarios.{name}" not in config}


HELLO = """
    from aiohttp import web
    from streamlab import Scenario, endpoint, hookimpl


    class Hello(Scenario):
        word: str = "hello"

        @endpoint("GET", "/hello")
        async def hello(self, request):
            \"\"\"Say a word.\"\"\"
            return web.Response(text=self.word + " 1")


    @hookimpl
    def register_scenarios():
        return [Hello]
"""
"""A plugin with one route, `/hello`, and one key, `word`."""


def write_plugins(base: Path, plugins: Mapping[str, str]) -> None:
    """Write plugin files next to the configuration."""
    folder = base / "plugins"
    folder.mkdir(exist_ok=True)
    for name, source in plugins.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))


def begin(
    arguments: Sequence[str],
    *,
    environ: Mapping[str, str],
    cwd: Path,
    stderr: IO[str],
    fresh: bool = False,
    imports: Sequence[str] = (),
) -> subprocess.Popen[str] | ForkedProcess:
    """Start `python -m streamlab ARGUMENTS...`, with a pipe as its stdout; it is known to import `imports` as well."""
    environ = {**os.environ, **ENVIRONMENT, **environ}
    if not fresh and FORK_SERVER.is_suitable(environ):
        server = FORK_SERVER.importing(*imports)
        return server.start(arguments, environ=environ, cwd=cwd, stderr=stderr)
    command = [sys.executable, "-m", "streamlab", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environ, cwd=cwd)


Command = subprocess.Popen[str] | ForkedProcess
"""A process of `python -m streamlab` whose stdin, stdout and stderr are pipes."""


@contextlib.contextmanager
def command(*arguments: str, cwd: Path, **variables: str) -> Iterator[Command]:
    """Yield `python -m streamlab ARGUMENTS...`, to talk with; it ends with the block."""
    environ = {**os.environ, **ENVIRONMENT, **variables}
    process: Command
    if FORK_SERVER.is_suitable(environ):
        process = FORK_SERVER.start(arguments, environ=environ, cwd=cwd)
    else:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlab", *arguments],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=environ,
            cwd=cwd,
        )
    with ended_at_exit(process):
        yield process


@contextlib.contextmanager
def ended_at_exit(process: AnyProcess) -> Iterator[AnyProcess]:
    """Yield a process; however the block ends, it has been killed if it still ran, and its pipes are closed."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def run_streamlab(*arguments: str, cwd: Path, **variables: str) -> tuple[int, str, str]:
    """Run a command to its end; return exit status, stdout and stderr."""
    with tempfile.TemporaryFile("w+") as errors:
        with ended_at_exit(begin(arguments, environ=variables, cwd=cwd, stderr=errors)) as process:
            assert process.stdout is not None
            out, status = process.stdout.read(), process.wait()
        errors.seek(0)
        return status, out, errors.read()


@contextlib.contextmanager
def starting_in(base: Path, shipped: Collection[str] | None = None) -> Iterator[Callable[..., Running]]:
    """Yield a function that starts servers in a folder; they are stopped at the end.

    Of the plugins that ship, `shipped` are loaded, and those with a table in the configuration; None loads all. Loading
    all of them takes a tenth of a second of a processor.
    """
    servers: list[tuple[Running, bool]] = []

    def starting(
        config: str = "",
        *,
        tracebacks: bool = False,
        environ: Mapping[str, str] | None = None,
        port: int = 0,
        fresh: bool = False,
        imports: Sequence[str] = (),
        **plugins: str,
    ) -> Running:
        write_plugins(base, plugins)
        config_file = base / "config.toml"
        config_file.write_text(textwrap.dedent(config))
        stderr = base / f"stderr-{len(servers)}.log"
        arguments = ["run", "--config", str(config_file), "--port", str(port)]
        variables = {**without(config, shipped), **(environ or {})}
        with stderr.open("w") as errors:
            process = begin(arguments, environ=variables, cwd=base, stderr=errors, fresh=fresh, imports=imports)
        server = Running(process, "", base, stderr)
        servers.append((server, tracebacks))  # at once: its test may time out while the server starts
        assert process.stdout is not None
        server.url = next((line.rpartition(" ")[2].strip() for line in process.stdout if " serves http" in line), "")
        assert server.url, f"the server did not start:\n{server.log}"
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
