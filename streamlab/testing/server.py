"""A real server with one plugin and the probe: its start, its state and its end."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from streamlab.config import Config, nearest
from streamlab.server.registry import find

MIN_PAUSE_SECONDS = 0.01
"""Pause after the first look at the state of a server, in seconds; each pause is twice as long as the one before."""

MAX_PAUSE_SECONDS = 0.1
"""Maximum pause between two looks, in seconds."""

START_SECONDS = 30.0
"""Maximum time for the start of a server, in seconds."""

DRAIN_SECONDS = 1.0
"""`drain_seconds` of a server under test."""

PROBE = "conformance_probe"
"""The name of the plugin that reports what is open in the server."""


@dataclass(frozen=True)
class State:
    """What is open in a server, and the memory and processor time it has used."""

    streams: int
    """Number of open streams."""
    tasks: list[str]
    """Tasks of the event loop, each as its name."""
    files: list[str]
    """Open files."""
    threads: list[str]
    """Threads, each as its name."""
    children: list[str]
    """Child processes."""
    memory: int
    """Resident bytes."""
    cpu: float
    """Processor time, in seconds."""
    ended: list[dict[str, Any]]
    """The streams that have ended, each with `route`, `outcome`, and the time `at`, by `time.monotonic`."""
    blocks: list[dict[str, Any]]
    """Each time that code occupied the event loop for too long: its `seconds`, its `code`, and its `stack`."""
    watched: float
    """How long the event loop has been watched, in seconds."""


@dataclass
class Server:
    """A streamlab process under test."""

    process: "subprocess.Popen[str]"
    port: int
    folder: Path
    """The folder of its config.toml and `var/`."""
    log_file: Path
    token: str = ""
    """The token that its requests send; empty for none."""

    @property
    def url(self) -> str:
        """Its address, as `http://127.0.0.1:8000`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def credentials(self) -> dict[str, str]:
        """The field that sends its token; empty without one."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def log(self) -> str:
        """Its log so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def request(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, body: Any = None
    ) -> "Response":
        """Send a request on a new connection and return the complete response; `body` is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent, fields = None, {**self.credentials, **(headers or {})}
        if body is not None:
            sent, fields = json.dumps(body).encode(), {"Content-Type": "application/json"} | fields
        with closing(connection):
            connection.request(method, path, body=sent, headers=fields)
            response = connection.getresponse()
            return Response(
                response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            )

    def state(self) -> State:
        """Return what is open in it now."""
        return State(**self.request("/conformance/state").json)

    def wait_for_state(self, accept: Callable[[State], bool], *, seconds: float) -> State:
        """Poll its state until `accept` returns True, for at most `seconds`; return the last one."""
        deadline, pause = time.monotonic() + seconds, MIN_PAUSE_SECONDS
        while not accept(state := self.state()) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
        return state

    def reload(self) -> None:
        """Have it read its configuration again (SIGHUP)."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self, number: int = signal.SIGTERM, *, seconds: float = 30.0) -> int | None:
        """Send a signal and wait for its end; return the exit status, None if it had to be killed."""
        self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


@dataclass(frozen=True)
class Response:
    """A complete response: status, header fields (names in lower case), body."""

    status: int
    """Status code."""
    headers: Mapping[str, str]
    """Header fields, with their names in lower case."""
    body: bytes
    """Body, without its framing, and still compressed where the request accepted that."""

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode()

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def environment(plugin: str, settings: Path, folders: Iterable[Path], *, needs: Collection[str] = ()) -> dict[str, str]:
    """Return the environment variables of a server under test: they enable the probe and disable other plugins.

    A plugin that has a table in the settings stays enabled, since the tested one may need it, and so do those that it
    `needs`. Raises ConfigError where the settings cannot be read, and LookupError where no plugin has that name.
    """
    paths = json.dumps([str(path.resolve()) for path in (*folders, settings.parent / "probe")])
    variables = {
        "STREAMLAB_SERVER__DRAIN_SECONDS": f"{DRAIN_SECONDS:g}",
        "STREAMLAB_SERVER__LOG_FILE": "",
        "STREAMLAB_PLUGINS__PATH": paths,
    }
    config = Config.read(settings, variables)
    known = {found.name for found in find(config)}
    if plugin not in known:
        where = ", ".join(map(str, folders)) or "no folder of plugins was found"
        raise LookupError(f"there is no plugin {plugin!r}; {nearest(plugin, known)} ({where})")
    others = known - {plugin, PROBE, *needs} - config.scenarios.keys()
    return variables | {f"STREAMLAB_SCENARIOS__{name.upper()}__ENABLED": "false" for name in others}


def write_settings(folder: Path, settings: str) -> Path:
    """Write the config.toml of a server, and the probe; return the path of config.toml."""
    probe = folder / "probe" / f"{PROBE}.py"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text((Path(__file__).parent / "probe.py").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "config.toml").write_text(settings, encoding="utf-8")
    return folder / "config.toml"


def start_process(
    arguments: Sequence[str], folder: Path, environ: Mapping[str, str], log: IO[str]
) -> "subprocess.Popen[str]":
    """Start `streamlab ARGUMENTS...` in a folder, with a pipe as its stdout, and its stderr in `log`."""
    command = [sys.executable, "-m", "streamlab", *arguments]
    return subprocess.Popen(  # noqa: S603 - this very program
        command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environ
    )


@contextmanager
def serving(settings: Path, variables: Mapping[str, str]) -> Iterator[Server]:
    """Run `streamlab run` with settings and variables, as a separate process, while the block runs.

    Raises RuntimeError with its log if it does not start.
    """
    folder = settings.parent
    environ = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLAB_")}
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = start_process(
            ["run", "--config", str(settings), "--port", "0"], folder, {**environ, **variables}, log
        )
    with process:
        server = Server(process, 0, folder, folder / "log")
        try:
            server.port = _port(server)
            yield server
        finally:
            if process.poll() is None:
                server.stop(seconds=DRAIN_SECONDS + 10)


def _port(server: Server) -> int:
    """Wait until it serves, and return its port."""
    assert server.process.stdout is not None
    timer = threading.Timer(START_SECONDS, server.process.kill)
    timer.start()
    try:
        for line in server.process.stdout:
            if " serves http" in line:
                return int(line.rpartition(":")[2])
    finally:
        timer.cancel()
    status = server.process.wait()
    how = f"within {START_SECONDS:g} s" if status == -signal.SIGKILL else f"and exited with status {status}"
    raise RuntimeError(f"the server did not start, {how}:\n{server.log}")
