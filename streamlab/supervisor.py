"""The process of `run --reload`: its child is the server, which it restarts, or notifies of changed files."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import typer
from watchfiles import Change, PythonFilter, watch

from .config import Config, ConfigError
from .server.reload import Terminal

RESTART_STATUS = 75
"""Exit status of a server that has ended to be restarted with a changed configuration."""

STOP_SECONDS = 5
"""Maximum time for the server to end before a restart, in seconds; then it is killed."""

CHECK_MILLISECONDS = 300
"""Interval at which it is noticed that the server has ended, in milliseconds."""


@dataclass(frozen=True)
class _Watched:
    """The files of a configuration, and the folders in which they and the plugins are."""

    config: Path
    keys: tuple[Path, ...]
    """The certificate and key of the server, and the key of an identity provider."""
    folders: frozenset[Path]

    @classmethod
    def of(cls, path: Path, config: Config) -> "_Watched":
        plugins = config.plugins.path
        for folder in plugins:
            folder.mkdir(parents=True, exist_ok=True)  # only existing folders can be watched
        packages = [package for folder in plugins if folder.is_dir() for package in folder.iterdir()]
        server, jwt = config.server, config.auth.jwt
        files = (server.tls_certificate, server.tls_key, None if jwt is None else jwt.public_key)
        keys = tuple(file.absolute() for file in files if file is not None)
        folders = (path.parent, *plugins, *packages, *(file.parent for file in keys))
        return cls(path, keys, frozenset(folder for folder in folders if folder.is_dir()))

    def concerns(self, change: Change, path: str) -> bool:
        """Return whether a change may matter: a link in the folder of a key may have a new target."""
        changed = Path(path)
        is_beside_key = changed.parent in {file.parent for file in self.keys}
        return changed == self.config or is_beside_key or _is_python(change, path)

    def state(self) -> list[tuple[int, int, int] | None]:
        """Return what differs when the content of the configuration or of a key has changed."""
        found: list[tuple[int, int, int] | None] = []
        for file in (self.config, *self.keys):
            try:
                status = file.stat()
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                found.append(None)
        return found


def supervise(command: Sequence[str], path: Path, config: Config) -> None:
    """Run `streamlab COMMAND...` until SIGTERM, Ctrl-C, or the end of the terminal.

    It takes what it can of a changed configuration by SIGHUP, also by one that this process gets. It is restarted when
    a plugin changes, when it ends with `RESTART_STATUS`, and, if it has ended otherwise, when anything changes. `path`
    is the file of the configuration, which need not exist.
    """
    stop, requested, terminal = threading.Event(), threading.Event(), Terminal()

    def handle(number: int, frame: FrameType | None) -> None:
        is_request = number == signal.SIGHUP and not terminal.is_closed()
        (requested if is_request else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handle)
    watched = _Watched.of(path, config)
    state = started = watched.state()
    server = _start(command)
    try:
        while not stop.is_set():
            for changes in _changes(watched, stop):
                names = ", ".join(sorted(name for _, name in changes)) or path.name
                before, state = state, watched.state()
                if any(_is_python(*change) for change in changes):
                    typer.echo(f"changed: {names}; restarting")
                    _stop(server)
                    started, server = state, _start(command)
                elif server.poll() == RESTART_STATUS or (server.poll() is not None and state != started):
                    started, server = state, _start(command)
                elif state != before or requested.is_set():
                    requested.clear()
                    typer.echo(f"changed: {names}; reloading")
                    server.send_signal(signal.SIGHUP)
                else:
                    continue
                newer = _watched_again(watched)
                if newer != watched:
                    if newer.keys != watched.keys:
                        state = newer.state()
                    watched = newer
                    break
    finally:
        _stop(server)


def _changes(watched: _Watched, stop: threading.Event) -> Iterable[set[tuple[Change, str]]]:
    """Yield changes, and an empty set after every interval without one, until `stop` is set."""
    return watch(
        *watched.folders,
        watch_filter=watched.concerns,
        stop_event=stop,
        rust_timeout=CHECK_MILLISECONDS,
        yield_on_timeout=True,
        raise_interrupt=False,
        recursive=False,
    )


def _watched_again(watched: _Watched) -> _Watched:
    """Return what the configuration names now; the same as before while it is invalid."""
    with suppress(ConfigError):
        config = Config.read(watched.config if watched.config.exists() else None)
        if not config.faults:
            return _Watched.of(watched.config, config)
    return watched


def _is_python(change: Change, path: str) -> bool:
    return PythonFilter()(change, path)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the server; a SIGHUP waits until it accepts signals, since until then that would end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # the child inherits this
    try:
        return subprocess.Popen([sys.executable, "-m", "streamlab", *command])  # noqa: S603 - this very program
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
