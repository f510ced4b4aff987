"""One run of the download measurement: streamlab beside FastAPI, Starlette and nginx, over loopback."""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import rig
from .report import Goal, Numbers, Table, crowd_rows
from .servers import Running, Server, counted_from, nginx, nginx_binary, reset_peak, running, streamlab, uvicorn

STREAMLAB, FASTAPI, STARLETTE, NGINX = "streamlab", "FastAPI way", "Starlette FileResponse", "nginx"
MIB = 1024 * 1024
STREAMS = (1, 4)
SILENCE_SECONDS = 60  # a download that brings no byte for so long has failed
CLIENT_SECONDS = 600  # and so have downloads that take longer
# 1 GB is 1,000,000,000 bytes, 1 MB 1,000,000.
COLUMNS = {
    "GB/s": "rate",  # all streams together
    "CPU s/GB": "cpu",  # of the server
    "peak RSS growth, MB": "memory",  # by which the server's peak exceeds what it held before its first download
    "client's CPU share": "client",  # CPU seconds of the client a second; near 1, the rate may be the client's
}
GOALS = (
    Goal("rate / FastAPI way", FASTAPI, 1, "rate", ">=", 6),
    Goal("rate / nginx", NGINX, 1, "rate", ">=", 0.85),
    Goal("rate / nginx", NGINX, 4, "rate", ">=", 0.95),
    Goal("CPU per GB / FastAPI way", FASTAPI, 1, "cpu", "<=", 1 / 6),
    Goal(
        "CPU per GB / FastAPI way",
        FASTAPI,
        4,
        "cpu",
        "<=",
        1 / 6,
        floor=0.265,
        short="streamlab spends as much for a gigabyte with four streams as with one, nearly all of it in the kernel's"
        " copy (sendfile), but the FastAPI way gets a fifth cheaper when four downloads share its thread hops.",
    ),
    Goal("peak RSS growth", None, 1, "memory", "<=", 8, unit="MB"),
    Goal("peak RSS growth", None, 4, "memory", "<=", 8, unit="MB"),
)


def make_file(path: Path, size_mib: int) -> str:
    """Write the file, no MiB of it like another; return its SHA-256."""
    digest, noise = hashlib.sha256(), os.urandom(MIB - 8)
    with path.open("wb") as file:
        for number in range(size_mib):
            block = number.to_bytes(8, "big") + noise
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def download(
    server: Running, streams: int, mode: str, size: int, cpu: int | None, times: int = 1
) -> list[dict[str, Any]]:
    """Let a client process download, return what it saw. Raises RuntimeError unless exactly `size` bytes came each."""
    arguments = [str(server.port), str(streams), mode, str(SILENCE_SECONDS), str(times)]
    done = rig.client("bench.client", arguments, CLIENT_SECONDS, cpu)
    seen: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
    if [one["received"] for one in seen] != [[size] * streams] * times:
        reason = done.stderr.rstrip().rpartition("\n")[2] or str(seen)
        words = f"a download from {server.name} failed: {reason}"
        raise RuntimeError(f"{words}\n{done.stderr[-2000:]}\n{server.failure()}")
    return seen


def measure_streams(here: rig.Round, server: Running, idle: int, streams: int, size: int) -> None:
    """Download by so many streams; the server's CPU time is the difference of its counters, `idle` its bytes before."""
    before = server.cpu_seconds()
    [seen] = download(server, streams, "discard", size, here.run.placed[1])
    used, growth = server.cpu_seconds() - before, server.memory("VmHWM") - idle
    gigabytes, seconds = streams * size / 1e9, seen["seconds"]
    here.note(server.name, streams, "rate", gigabytes / seconds)
    here.note(server.name, streams, "cpu", used / gigabytes)
    here.note(server.name, streams, "memory", growth / 1e6)
    here.note(server.name, streams, "client", seen["cpu"] / seconds)


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


def measure(run: rig.Run) -> None:
    """Measure every server in turn, round by round, with a file that is in memory if there is room for it."""
    shared = Path("/dev/shm")  # memory, so that no disk is measured
    size_mib = 64 if run.options.quick else run.options.size_mb
    room = shutil.disk_usage(shared).free if os.access(shared, os.W_OK) else 0
    place = shared if room > (size_mib + 512) * MIB else run.folder
    run.outcome.facts |= {
        "memory": f"peak RSS is counted from {counted_from()}",
        "run": f"{size_mib} MiB, HTTP/1.1 over loopback",
        "file": "in memory" if place is shared else "in the temporary folder, read from the page cache",
        "client": "raw sockets; the kernel discards the body (MSG_TRUNC)",
    }
    if nginx_binary() is None:
        run.outcome.absent[NGINX] = "nginx is not installed"
    with tempfile.TemporaryDirectory(prefix="streamlab-bench-", dir=place) as name:
        folder = Path(name)
        file = folder / "large-file.bin"
        digest = make_file(file, size_mib)  # the peers read its size when they start
        for number in run.rounds():
            measure_round(rig.Round(run, number), folder, servers_of(file), size_mib * MIB, digest)


def measure_round(here: rig.Round, folder: Path, found: list[Server], size: int, digest: str) -> None:
    """Measure every server once."""
    theirs, ours = here.run.placed
    with ExitStack() as stack:
        # Fresh processes every round, so that growth counts from servers that never sent the file; they sleep
        # while another is measured. The first download, unmeasured, proves the bytes and is the warm-up.
        servers = [
            stack.enter_context(running(server, folder / f"{here.number}-{index}", theirs))
            for index, server in enumerate(found)
        ]
        idle = {}
        for server in servers:
            for pid in server.pids:
                reset_peak(pid)
            idle[server.name] = server.memory("VmRSS")
            if download(server, 1, "hash", size, ours)[0]["sha256"] != digest:
                raise RuntimeError(f"{server.name} sent other bytes than the file's")
        for streams in STREAMS:
            for server in servers:
                measure_streams(here, server, idle[server.name], streams, size)


def tables(numbers: Numbers) -> list[Table]:
    """Lay out what was measured in absolute numbers."""
    return [crowd_rows(numbers, BENCHMARK.servers, "streams", COLUMNS)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's own options."""
    parser.add_argument("--size-mb", type=int, default=1024, help="size of the file, in MiB (default: 1024)")


BENCHMARK = rig.Benchmark(
    name="file",
    description=__doc__,
    streams="streams",
    servers=(STREAMLAB, FASTAPI, STARLETTE, NGINX),
    keys=tuple(COLUMNS.values()),
    packages=("streamlab", "aiohttp", "fastapi", "starlette", "uvicorn", "h11", "aiofiles"),
    goals=GOALS,
    measure=measure,
    tables=tables,
    add_options=add_options,
    rounds=5,
    seconds=300,
    full=("--rounds", "9", "--size-mb", "512"),
    full_seconds=86,
)

if __name__ == "__main__":
    rig.main(BENCHMARK)
