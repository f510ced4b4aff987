"""One run of the download measurement: streamlab beside FastAPI, Starlette and nginx, over loopback."""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .servers import FASTAPI, NGINX, STARLETTE, STREAMLAB, Running, nginx_binary, reset_peak, running

MIB = 1024 * 1024
STREAMS = (1, 4)
SILENCE_SECONDS = 60  # a download that brings no byte for so long has failed
CLIENT_SECONDS = 600  # and so have downloads that take longer
RESULTS = Path(__file__).parent / "results"
GOALS = (  # of streamlab's number divided by the peer's, or of its own number where the peer is itself
    ("rate / FastAPI way", FASTAPI, 1, "rate", ">=", 6),
    ("rate / nginx", NGINX, 1, "rate", ">=", 0.85),
    ("rate / nginx", NGINX, 4, "rate", ">=", 0.95),
    ("CPU per GB / FastAPI way", FASTAPI, 1, "cpu", "<=", 1 / 6),
    ("CPU per GB / FastAPI way", FASTAPI, 4, "cpu", "<=", 1 / 6),
    ("peak RSS growth, MB", STREAMLAB, 1, "memory", "<=", 8),
    ("peak RSS growth, MB", STREAMLAB, 4, "memory", "<=", 8),
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
    done = subprocess.run(
        [sys.executable, "-m", "bench.client", str(server.port), str(streams), mode, str(SILENCE_SECONDS)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CLIENT_SECONDS,
        preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
    )
    seen: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"received": None}
    if seen["received"] != [size] * streams:
        log = server.log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"a download from {server.name} failed: {seen}\n{done.stderr[-2000:]}\nits log:\n{log}")
    return seen


def measure(server: Running, idle: int, number: int, streams: int, size: int, cpu: int | None) -> Measurement:
    """Download by so many streams; the server's CPU time is the difference of its counters, `idle` its bytes before."""
    before = server.cpu_seconds()
    seen = download(server, streams, "discard", size, cpu)
    used, growth = server.cpu_seconds() - before, server.memory("VmHWM") - idle
    gigabytes, seconds = streams * size / 1e9, seen["seconds"]
    rates = (gigabytes / seconds, used / gigabytes, growth / 1e6, seen["cpu"] / seconds)
    return Measurement(server.name, number, streams, *rates)


def run(folder: Path, rounds: int, size_mib: int, cpus: tuple[int, int] | None) -> list[Measurement]:
    """Measure every server in turn, round by round, with a file made in the folder."""
    taken: list[Measurement] = []
    names = [STREAMLAB, FASTAPI, STARLETTE, *([NGINX] if nginx_binary() else [])]
    file, size, (theirs, ours) = folder / "large-file.bin", size_mib * MIB, cpus or (None, None)
    digest = make_file(file, size_mib)
    for number in range(1, rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr)
        with ExitStack() as stack:
            # Fresh processes every round, so that growth counts from servers that never sent the file; they sleep
            # while another is measured. The first download, unmeasured, proves the bytes and is the warm-up.
            folders = [folder / f"{number}-{index}" for index in range(len(names))]
            servers = [
                stack.enter_context(running(name, own, file, theirs)) for name, own in zip(names, folders, strict=True)
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


def goal_rows(taken: Sequence[Measurement]) -> list[list[str]]:
    """A row for each goal: numbers of the same round are divided, and the median of the ratios is judged."""
    rows = [["ratio", "streams", "median (min..max)", "goal", "result"]]
    for title, peer, streams, key, sign, limit in GOALS:
        found, theirs = (_numbers(taken, name, streams, key) for name in (STREAMLAB, peer))
        if peer != STREAMLAB:
            found = [a / b for a, b in zip(found, theirs, strict=True)] if theirs else []
        median = statistics.median(found) if found else 0
        result = "met" if (median >= limit if sign == ">=" else median <= limit) else "missed"
        cells = [_spread(found), f"{sign} {limit:.3g}", result if found else "-"]
        rows.append([f"streamlab {title}", str(streams), *cells])
    return rows


def server_rows(taken: Sequence[Measurement]) -> list[list[str]]:
    """A row for each server and number of streams, in absolute numbers."""
    rows = [["server", "streams", "GB/s", "CPU s/GB", "peak RSS growth, MB", "client's CPU share"]]
    for streams in STREAMS:
        for name in (STREAMLAB, FASTAPI, STARLETTE, NGINX):
            keys = ("rate", "cpu", "memory", "client")
            rows.append([name, str(streams), *(_spread(_numbers(taken, name, streams, key)) for key in keys)])
    return rows


def _numbers(taken: Sequence[Measurement], server: str, streams: int, key: str) -> list[float]:
    return [getattr(one, key) for one in taken if (one.server, one.streams) == (server, streams)]


def _spread(values: Sequence[float]) -> str:
    if not values:  # only nginx may be missing
        return "nginx is not installed"
    return f"{statistics.median(values):.3g} ({min(values):.3g}..{max(values):.3g})"


def table(rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Lay out rows, the first of them the header, as aligned text or as Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---" * len(widths) + "|", *lines[1:]])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def machine() -> dict[str, str]:
    """What the numbers depend on besides the options, as name and value."""
    info = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "unknown CPU")
    peers = ("streamlab", "aiohttp", "fastapi", "starlette", "uvicorn", "h11", "aiofiles")
    binary = nginx_binary()
    said = subprocess.run([binary, "-v"], capture_output=True, text=True).stderr if binary else "not installed"
    start = "the idle server" if reset_peak(os.getpid()) else "start-up, whose own peak hides some (no clear_refs here)"
    return {
        "machine": f"{os.cpu_count()} cores, {model}, {platform.machine()}",
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in peers) + f", nginx {said.strip().split('/')[-1]}",
        "memory": f"peak RSS is counted from {start}",
        "load": f"{os.getloadavg()[0]:.2f} processes on average in the minute before",
    }


def main() -> None:
    """Measure, print, and keep every single number in bench/results/."""
    parser = argparse.ArgumentParser(prog="python -m bench.file", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (default: 5)")
    parser.add_argument("--size-mb", type=int, default=1024, help="size of the file, in MiB (default: 1024)")
    parser.add_argument("--no-pin", action="store_true", help="let servers and client share all CPUs")
    parser.add_argument("--markdown", action="store_true", help="print everything as Markdown, too")
    options = parser.parse_args()
    if min(options.rounds, options.size_mb) < 1 or sys.platform != "linux":
        parser.error("this needs Linux (it reads /proc), a round at least and a MiB at least")
    for number in (signal.SIGTERM, signal.SIGHUP):  # they clean up as Ctrl-C does, but nohup is obeyed
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda caught, _: sys.exit(128 + caught))
    allowed = sorted(os.sched_getaffinity(0))
    # The first and the last: neighbours are often two threads of one core.
    cpus = None if options.no_pin or len(allowed) < 2 else (allowed[0], allowed[-1])
    shared = Path("/dev/shm")  # memory, so that no disk is measured
    room = shutil.disk_usage(shared).free if os.access(shared, os.W_OK) else 0
    place = str(shared) if room > (options.size_mb + 512) * MIB else None
    facts = machine() | {
        "placement": f"servers on CPU {cpus[0]}, client on CPU {cpus[1]}" if cpus else "not pinned",
        "run": f"{options.rounds} rounds of {options.size_mb} MiB, HTTP/1.1 over loopback",
        "file": "in memory" if place else "in the temporary folder, read from the page cache",
        "client": "raw sockets; the kernel discards the body (MSG_TRUNC)",
    }
    with tempfile.TemporaryDirectory(prefix="streamlab-bench-", dir=place) as folder:
        taken = run(Path(folder), options.rounds, options.size_mb, cpus)
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"file-{datetime.now():%Y-%m-%dT%H%M%S}.json"
    kept.write_text(json.dumps({"facts": facts, "measurements": [asdict(one) for one in taken]}, indent=1) + "\n")
    for markdown in (False, True)[: 1 + options.markdown]:
        lines = [f"- {name}: {fact}" if markdown else f"{name + ':':<11}{fact}" for name, fact in facts.items()]
        tables = [table(rows, markdown) for rows in (goal_rows(taken), server_rows(taken))]
        print("\n" + "\n\n".join(["\n".join(lines), *tables]))
    print(f"\nevery number: bench/results/{kept.name}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, OSError, ImportError, subprocess.TimeoutExpired) as error:
        sys.exit(f"bench.file: {error}")
