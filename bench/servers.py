"""The servers under measurement: how each is started, what the kernel says of it, and that none is left behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

STREAMLAB, FASTAPI, STARLETTE, NGINX = "streamlab", "FastAPI way", "Starlette FileResponse", "nginx"
UVICORN = "-m uvicorn --host 127.0.0.1 --loop asyncio --http h11 --no-access-log --log-level warning"
START_SECONDS = 30
STOP_SECONDS = 8


def nginx_binary() -> str | None:
    """Where nginx is, if it is; a user's PATH often lacks the sbin folders."""
    return shutil.which(NGINX, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")))


def _command(name: str, folder: Path, file: Path, port: int) -> list[str]:
    """Write what a server needs into its folder; return how it is started."""
    if name == STREAMLAB:
        config = folder / "config.toml"
        config.write_text(f"[server]\nlog_file = ''\n[scenarios.file]\nlarge_file = '{file}'\n", encoding="utf-8")
        return [sys.executable, "-m", "streamlab", "run", "--config", str(config), "--port", "0"]
    if name == NGINX:
        config = folder / "nginx.conf"
        # Started by root, nginx would hand its worker to a user who may not read the folder.
        user = "user root root;" if os.geteuid() == 0 else ""
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = " ".join(f"{kind}_temp_path '{folder}/{kind}';" for kind in kinds)
        config.write_text(
            f"daemon off; master_process on; worker_processes 1; {user} pid '{folder}/nginx.pid'; events {{}}\n"
            f"http {{ sendfile on; tcp_nopush on; access_log off; default_type application/octet-stream; {paths}\n"
            f"server {{ listen 127.0.0.1:{port}; location = /download/large-file {{ alias '{file}'; }} }} }}\n",
            encoding="utf-8",
        )
        return [nginx_binary() or NGINX, "-p", str(folder), "-e", "stderr", "-c", str(config)]
    app = {FASTAPI: "bench.peers:fastapi_way", STARLETTE: "bench.peers:starlette_file"}[name]
    return [sys.executable, *UVICORN.split(), "--port", str(port), app]


@dataclass(frozen=True)
class Running:
    """A server that answers, and what the kernel counts for all its processes together."""

    name: str
    port: int
    pids: list[int]
    log: Path

    def cpu_seconds(self) -> float:
        """User and system time so far, in seconds."""
        # A process's CPU clock (clock_getcpuclockid(3) computes its number so) is utime + stime of /proc/PID/stat to
        # the nanosecond. There they are rounded to 10 ms each: too coarse for a download that takes 200 ms.
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self.pids)

    def memory(self, key: str) -> int:
        """Bytes resident: VmRSS for now, VmHWM for the peak since `reset_peak`."""
        statuses = (Path(f"/proc/{pid}/status").read_text(errors="replace") for pid in self.pids)
        return sum(1024 * int(status.partition(f"{key}:")[2].split()[0]) for status in statuses)


def reset_peak(pid: int) -> bool:
    """Let VmHWM of a process begin anew at what it holds now; False where the kernel does not permit it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/clear_refs").write_text("5") > 0
    return False


@contextmanager
def running(name: str, folder: Path, file: Path, cpu: int | None) -> Iterator[Running]:
    """Run a fresh server in a folder of its own, on one CPU if given; all its processes have ended on leaving."""
    folder.mkdir()
    log = folder / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STREAMLAB_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(name, folder, file, port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | {"BENCH_FILE": str(file)},
            start_new_session=True,  # Ctrl-C is for the bench alone, which then ends its servers in order
            preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
        )
    try:
        port = _wait_for(process, name, port, log)
        yield Running(name, port, _family(process.pid), log)
    finally:
        family = _family(process.pid)
        process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            if process.poll() is None:
                for pid in family:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", name: str, port: int, log: Path) -> int:
    """Wait until the server answers; return its port."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if name == STREAMLAB:
            said = re.search(r"serves http://127\.0\.0\.1:(\d+)", log.read_text(errors="replace"))
            port = int(said[1]) if said else 0
        # An answer, if only 404, and not just a connection: nginx listens before its worker exists.
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
            if connection.recv(1024):
                return port
        time.sleep(0.05)
    raise RuntimeError(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:  # grows while it is walked
        found += [child for child in parents if parents[child] == parent]
    return found
