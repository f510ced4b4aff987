"""One run of the download measurement: streamlab beside FastAPI, Starlette and nginx, over loopback."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import rig
from .report import Goal, goal_rows, keep, machine, show, spread
from .servers import Running, Server, nginx, nginx_binary, reset_peak, running, streamlab, uvicorn

STREAMLAB, FASTAPI, STARLETTE, NGINX = "streamlab", "FastAPI way", "Starlette FileResponse", "nginx"
MIB = 1024 * 1024
STREAMS = (1, 4)
SILENCE_SECONDS = 60  # a download that brings no byte for so long has failed
CLIENT_SECONDS = 600  # and so have downloads that take longer
PACKAGES = ("streamlab", "aiohttp", "fastapi", "starlette", "uvicorn", "h11", "aiofiles")
MISSING = "nginx is not installed"  # only nginx may be missing
GOALS = (
    Goal("rate / FastAPI way", FASTAPI, 1, "rate", ">=", 6),
    Goal("rate / nginx", NGINX, 1, "rate", ">=", 0.85),
    Goal("rate / nginx", NGINX, 4, "rate", ">=", 0.95),
    Goal("CPU per GB / FastAPI way", FASTAPI, 1, "cpu", "<=", 1 / 6),
    Goal("CPU per GB / FastAPI way", FASTAPI, 4, "cpu", "<=", 1 / 6),
    Goal("peak RSS growth, MB", None, 1, "memory", "<=", 8),
    Goal("peak RSS growth, MB", None, 4, "memory", "<=", 8),
)


@dataclass(frozen=True)
class Measurement:
    """What one server did with one or four downloads at once; 1 GB is 1,000,000,000 bytes, 1 MB 1,000,000."""

    server: str
    round: int
    streams: int
    rate: float  # GB/s, all streams together
    cpu: float  # CPU seconds of the server for a GB
    memory: float  # MB by which the server's peak exceeds what it held before its first download
    client: float  # CPU seconds of the client a second; near 1, the rate may be the client's


def make_file(path: Path, size_mib: int) -> str:
    """Write the file, no MiB of it like another; return its SHA-256."""
    digest, noise = hashlib.sha256(), os.urandom(MIB - 8)
    with path.open("wb") as file:
        for number in range(size_mib):
            block = number.to_bytes(8, "big") + noise
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def download(server: Running, streams: int, mode: str, size: int, cpu: int | None) -> dict[str, Any]:
    """Let a client process download, return what it saw. Raises RuntimeError unless exactly `size` bytes came each."""
    arguments = [str(server.port), str(streams), mode, str(SILENCE_SECONDS)]
    done = rig.client("bench.client", arguments, CLIENT_SECONDS, cpu)
    seen: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"received": None}
    if seen["received"] != [size] * streams:
        raise RuntimeError(f"a download from {server.name} failed: {seen}\n{done.stderr[-2000:]}\n{server.failure()}")
    return seen


def measure(server: Running, idle: int, number: int, streams: int, size: int, cpu: int | None) -> Measurement:
    """Download by so many streams; the server's CPU time is the difference of its counters, `idle` its bytes before."""
    before = server.cpu_seconds()
    seen = download(server, streams, "discard", size, cpu)
    used, growth = server.cpu_seconds() - before, server.memory("VmHWM") - idle
    gigabytes, seconds = streams * size / 1e9, seen["seconds"]
    rates = (gigabytes / seconds, used / gigabytes, growth / 1e6, seen["cpu"] / seconds)
    return Measurement(server.name, number, streams, *rates)


def servers_of(file: Path) -> list[Server]:
    """List every server that is here, each to send the file as /download/large-file."""
    here = {"BENCH_FILE": str(file)}
    send = f"location = /download/large-file {{ alias '{file}'; }}"
    fast = "sendfile on; tcp_nopush on; default_type application/octet-stream;"
    return [
        streamlab(STREAMLAB, lambda _: f"[server]\nlog_file = ''\n[scenarios.file]\nlarge_file = '{file}'\n"),
        uvicorn(FASTAPI, "bench.peers:fastapi_way", here),
        uvicorn(STARLETTE, "bench.peers:starlette_file", here),
        *([nginx(NGINX, send, http=fast)] if nginx_binary() else []),
    ]


def run(folder: Path, rounds: int, size_mib: int, cpus: tuple[int, int] | None) -> list[Measurement]:
    """Measure every server in turn, round by round, with a file made in the folder."""
    taken: list[Measurement] = []
    file, size, (theirs, ours) = folder / "large-file.bin", size_mib * MIB, cpus or (None, None)
    digest = make_file(file, size_mib)  # the peers read its size when they start
    found = servers_of(file)
    for number in range(1, rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr)
        with ExitStack() as stack:
            # Fresh processes every round, so that growth counts from servers that never sent the file; they sleep
            # while another is measured. The first download, unmeasured, proves the bytes and is the warm-up.
            servers = [
                stack.enter_context(running(server, folder / f"{number}-{index}", theirs))
                for index, server in enumerate(found)
            ]
            idle = {}
            for server in servers:
                for pid in server.pids:
                    reset_peak(pid)
                idle[server.name] = server.memory("VmRSS")
                if download(server, 1, "hash", size, ours)["sha256"] != digest:
                    raise RuntimeError(f"{server.name} sent other bytes than the file's")
            for streams in STREAMS:
                taken += [measure(server, idle[server.name], number, streams, size, ours) for server in servers]
    return taken


def server_rows(taken: Sequence[Measurement]) -> list[list[str]]:
    """A row for each server and number of streams, in absolute numbers."""
    rows = [["server", "streams", "GB/s", "CPU s/GB", "peak RSS growth, MB", "client's CPU share"]]
    for streams in STREAMS:
        for name in (STREAMLAB, FASTAPI, STARLETTE, NGINX):
            keys = ("rate", "cpu", "memory", "client")
            cells = [spread(numbers(taken, name, streams, key), MISSING) for key in keys]
            rows.append([name, str(streams), *cells])
    return rows


def numbers(taken: Sequence[Measurement], server: str, streams: int, key: str) -> dict[int, float]:
    """What was measured of a server with so many streams, by round."""
    return {one.round: getattr(one, key) for one in taken if (one.server, one.streams) == (server, streams)}


def main() -> None:
    """Measure, print, and keep every single number in bench/results/."""
    parser = rig.parser("python -m bench.file", __doc__, rounds=5)
    parser.add_argument("--size-mb", type=int, default=1024, help="size of the file, in MiB (default: 1024)")
    options = parser.parse_args()
    if min(options.rounds, options.size_mb) < 1 or sys.platform != "linux":
        parser.error("this needs Linux (it reads /proc), a round at least and a MiB at least")
    cpus = rig.choose_cpus(options)
    shared = Path("/dev/shm")  # memory, so that no disk is measured
    room = shutil.disk_usage(shared).free if os.access(shared, os.W_OK) else 0
    place = str(shared) if room > (options.size_mb + 512) * MIB else None
    start = "the idle server" if reset_peak(os.getpid()) else "start-up, whose own peak hides some (no clear_refs here)"
    facts = machine(PACKAGES) | {
        "memory": f"peak RSS is counted from {start}",
        "placement": rig.placement(cpus),
        "run": f"{options.rounds} rounds of {options.size_mb} MiB, HTTP/1.1 over loopback",
        "file": "in memory" if place else "in the temporary folder, read from the page cache",
        "client": "raw sockets; the kernel discards the body (MSG_TRUNC)",
    }
    with tempfile.TemporaryDirectory(prefix="streamlab-bench-", dir=place) as folder:
        taken = run(Path(folder), options.rounds, options.size_mb, cpus)
    goals = goal_rows(GOALS, lambda *which: numbers(taken, *which), "streams", MISSING)
    show(facts, [goals, server_rows(taken)], options.markdown, keep("file", facts, taken))


if __name__ == "__main__":
    rig.run("bench.file", main)
