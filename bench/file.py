"""The download benchmark: streamlab compared with FastAPI, Starlette and nginx, over loopback."""

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
from .report import Goal, Numbers, Table, stream_rows
from .servers import Running, Server, counted_from, nginx, nginx_binary, reset_peak, running, streamlab, uvicorn

STREAMLAB, FASTAPI, STARLETTE, NGINX = "streamlab", "FastAPI", "Starlette FileResponse", "nginx"
MIB = 1024 * 1024
STREAMS = (1, 4)
SILENCE_SECONDS = 60  # a download without a byte for this time has failed
CLIENT_SECONDS = 600  # maximum time of the downloads
# 1 GB is 1,000,000,000 bytes, 1 MB 1,000,000.
COLUMNS = {
    "GB/s": "rate",  # all streams together
    "CPU s/GB": "cpu",  # of the server
    "peak RSS growth, MB": "memory",  # growth of the peak since before the first download
    "client's CPU share": "client",  # CPU seconds of the client per second; near 1, the client may limit the rate
}
GOALS = (
    Goal("rate / FastAPI", FASTAPI, 1, "rate", ">=", 6),
    Goal("rate / nginx", NGINX, 1, "rate", ">=", 0.85),
    Goal("rate / nginx", NGINX, 4, "rate", ">=", 0.95),
    Goal("CPU per GB / FastAPI", FASTAPI, 1, "cpu", "<=", 1 / 6),
    Goal(
        "CPU per GB / FastAPI",
        FASTAPI,
        4,
        "cpu",
        "<=",
        1 / 6,
        floor=0.265,
        short="streamlab spends as much for a gigabyte with four streams as with one, nearly all of it in the kernel's"
        " copy (sendfile), but FastAPI gets a fifth cheaper when four downloads share its thread hops.",
    ),
    Goal("peak RSS growth", None, 1, "memory", "<=", 8, unit="MB"),
    Goal("peak RSS growth", None, 4, "memory", "<=", 8, unit="MB"),
)


def make_file(path: Path, size_mib: int) -> str:
    """Write the file, with different bytes in every MiB; return its SHA-256."""
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
    """Download in a client process, return its results. Raises RuntimeError unless each download has `size` bytes."""
    arguments = [str(server.port), str(streams), mode, str(SILENCE_SECONDS), str(times)]
    done = rig.client("bench.client", arguments, CLIENT_SECONDS, cpu)
    results: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
    if [one["received"] for one in results] != [[size] * streams] * times:
        reason = done.stderr.rstrip().rpartition("\n")[2] or str(results)
        summary = f"a download from {server.name} failed: {reason}"
        raise RuntimeError(f"{summary}\n{done.stderr[-2000:]}\n{server.failure()}")
    return results


def measure_streams(here: rig.Round, server: Running, idle: int, streams: int, size: int) -> None:
    """Measure concurrent downloads: CPU time by the counters of the server, memory growth since its `idle` bytes."""
    before = server.cpu_seconds()
    [results] = download(server, streams, "discard", size, here.run.placement[1])
    used, growth = server.cpu_seconds() - before, server.memory("VmHWM") - idle
    gigabytes, seconds = streams * size / 1e9, results["seconds"]
    here.note(server.name, streams, "rate", gigabytes / seconds)
    here.note(server.name, streams, "cpu", used / gigabytes)
    here.note(server.name, streams, "memory", growth / 1e6)
    here.note(server.name, streams, "client", results["cpu"] / seconds)


def servers_of(file: Path) -> list[Server]:
    """Return every available server, each with the file as /download/large-file."""
    here = {"BENCH_FILE": str(file)}
    send = f"location = /download/large-file {{ alias '{file}'; }}"
    fast = "sendfile on; tcp_nopush on; default_type application/octet-stream;"
    return [
        streamlab(STREAMLAB, lambda _: f"[server]\nlog_file = ''\n[scenarios.file]\nlarge_file = '{file}'\n"),
        uvicorn(FASTAPI, "bench.peers:fastapi_file", here),
        uvicorn(STARLETTE, "bench.peers:starlette_file", here),
        *([nginx(NGINX, send, http=fast)] if nginx_binary() else []),
    ]


def measure(run: rig.Run) -> None:
    """Measure every server in turn, round by round, with a file in memory if it fits."""
    shared = Path("/dev/shm")  # in memory, to exclude the disk
    size_mib = 64 if run.options.quick else run.options.size_mb
    free = shutil.disk_usage(shared).free if os.access(shared, os.W_OK) else 0
    place = shared if free > (size_mib + 512) * MIB else run.folder
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
    server_cpu, client_cpu = here.run.placement
    with ExitStack() as stack:
        # Fresh processes every round, so that memory growth counts from servers that never sent the file; they are idle
        # while another is measured. The first download, unmeasured, verifies the bytes and is the warm-up.
        servers = [
            stack.enter_context(running(server, folder / f"{here.number}-{index}", server_cpu))
            for index, server in enumerate(found)
        ]
        idle = {}
        for server in servers:
            for pid in server.pids:
                reset_peak(pid)
            idle[server.name] = server.memory("VmRSS")
            if download(server, 1, "hash", size, client_cpu)[0]["sha256"] != digest:
                raise RuntimeError(f"{server.name} sent different bytes from the file")
        for streams in STREAMS:
            for server in servers:
                measure_streams(here, server, idle[server.name], streams, size)


def tables(numbers: Numbers) -> list[Table]:
    """Return a table of absolute numbers."""
    return [stream_rows(numbers, BENCHMARK.servers, "streams", COLUMNS)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
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
    full_seconds=76,
    short=("--rounds", "5"),
    short_seconds=30,
)

if __name__ == "__main__":
    rig.main(BENCHMARK)
