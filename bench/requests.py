"""The request benchmark: small requests of streamlab, compared with bare handlers of aiohttp, and nginx."""

import argparse
import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from . import rig
from .report import Goal, Numbers, Table, ratio_rows, stream_rows
from .request_client import Work
from .servers import Running, Server, nginx, nginx_binary, python, running, streamlab

STREAMLAB, BARE, NGINX = "streamlab", "aiohttp", "nginx"
SERVERS = (STREAMLAB, BARE, NGINX)
CLIENT_SECONDS = 30
USUAL = 8  # number of connections that are kept alive
PRICE = b'{"symbol": "ACME", "price": 12.5}'
FILES = {"small": 4 * 1024, "large": 1024 * 1024}
WORKS = {
    "health": Work("GET", "/health", 200),
    "kinds": Work("GET", "/process/kinds", 200),
    "missing": Work("GET", "/missing", 404),
    "post": Work("POST", "/stream/stock-ticker", 202, PRICE.decode()),
    "small": Work("GET", "/files/small.bin", 200),
    "large": Work("GET", "/files/large.bin", 200),
}
"""The requests by the beginning of their keys."""
MEASURED = {
    STREAMLAB: {"health": [USUAL], "kinds": [USUAL], "missing": [USUAL], "post": [1, USUAL], "small": [USUAL],
                "large": [USUAL]},
    BARE: {"health": [1, USUAL], "small": [USUAL], "large": [USUAL], "post": [1, USUAL]},
    NGINX: {"small": [USUAL], "large": [USUAL]},
}  # fmt: skip
"""The requests that each server gets, and on how many connections."""
HANDLER = "each request has its framing, host, principal and parameters checked, and is counted and logged"
KERNEL = "the kernel buffers little of a download, and its last 64 KiB are sent after the file has been checked"
COMMIT = "a price is parsed and checked, and stored by a commit in another thread"
GOALS = (
    Goal("/health / handler", BARE, USUAL, "health rate", ">=", 0.5, floor=0.25, short=f"{HANDLER}."),
    Goal("kinds / handler", BARE, USUAL, "kinds rate", ">=", 0.5, by="health rate", floor=0.2, short=f"{HANDLER}."),
    Goal("404 / handler", BARE, USUAL, "missing rate", ">=", 0.5, by="health rate", floor=0.2, short=f"{HANDLER}."),
    Goal("POST / handler", BARE, USUAL, "post rate", ">=", 0.5, floor=0.12, short=f"{HANDLER}; {COMMIT}."),
    Goal("POST / handler", BARE, 1, "post rate", ">=", 0.45, floor=0.1, short=f"{HANDLER}; {COMMIT}."),
    Goal("4 KiB / FileResponse", BARE, USUAL, "small rate", ">=", 1.0, floor=0.6, short=f"{HANDLER}."),
    Goal("1 MiB / FileResponse", BARE, USUAL, "large rate", ">=", 1.0, floor=0.35, short=f"{HANDLER}; {KERNEL}."),
    Goal(
        "1 MiB / nginx", NGINX, USUAL, "large rate", ">=", 0.8, floor=0.3,
        short="nginx has no interpreter between two calls of sendfile.",
    ),
)  # fmt: skip


def config(folder: Path) -> str:
    """Return streamlab's configuration: the default one, but for where prices and files come from."""
    return (
        "[server]\nlog_file = ''\n"
        f"[events]\nurl = 'sqlite:///{folder}/events.db'\n"
        "[scenarios.ticker]\nsource = 'push'\n"
        f"[scenarios.file]\nroot = '{folder.parent}/files'\n"
        "[scenarios.logs]\ndemo = false\n"
    )


def servers(folder: Path) -> dict[str, Server]:
    """Return every available server, by name."""
    bare = python(BARE, "bench.request_peers")
    found = {
        STREAMLAB: streamlab(STREAMLAB, config),
        BARE: Server(BARE, bare.command, {"BENCH_FILES": str(folder / "files")}),
    }
    if nginx_binary():
        files = f"location /files/ {{ alias '{folder}/files/'; }}"
        http = "sendfile on; tcp_nopush on; keepalive_requests 1000000000; default_type application/octet-stream;"
        found[NGINX] = nginx(NGINX, files, http=http)
    return found


def measure_work(here: rig.Round, server: Running, name: str, connections: int, seconds: float) -> None:
    """Request one thing again and again, on a number of connections."""
    arguments = [str(server.port), str(connections), str(seconds), json.dumps(asdict(WORKS[name]))]
    before = server.cpu_seconds()
    done = rig.client("bench.request_client", arguments, CLIENT_SECONDS, here.run.placement[1])
    if done.returncode:
        reason = done.stderr.rstrip().rpartition("\n")[2]
        raise RuntimeError(f"{name} of {server.name} failed: {reason}\n{done.stderr[-2000:]}\n{server.failure()}")
    found = json.loads(done.stdout)
    here.note(server.name, connections, f"{name} rate", found["count"] / found["seconds"])
    here.note(server.name, connections, f"{name} cpu", (server.cpu_seconds() - before) / found["requests"] * 1e6)


def measure(run: rig.Run) -> None:
    """Measure every server in turn, round by round."""
    seconds = 0.3 if run.options.quick else 0.5
    folder = run.folder
    (folder / "files").mkdir()
    for name, size in FILES.items():
        (folder / f"files/{name}.bin").write_bytes(os.urandom(size))
    run.outcome.facts |= {
        "run": f"{seconds:g} s per number, HTTP/1.1 over loopback, connections that are kept alive",
        "log": "streamlab writes its access log and metrics; aiohttp and nginx write none",
    }
    if nginx_binary() is None:
        run.outcome.absent[NGINX] = "nginx is not installed"
    with ExitStack() as stack:
        found = [
            stack.enter_context(running(server, folder / f"server-{index}", run.placement[0]))
            for index, server in enumerate(servers(folder).values())
        ]
        for number in run.rounds():
            here = rig.Round(run, number)
            for name in WORKS:
                for connections in (1, USUAL):
                    # One after the other, so that both terms of a ratio are of the same seconds.
                    for server in found[:: 1 if number % 2 else -1]:
                        if connections in MEASURED[server.name].get(name, ()):
                            measure_work(here, server, name, connections, seconds)


def tables(numbers: Numbers) -> list[Table]:
    """Return a table of ratios, and one of absolute numbers."""
    shared = {f"{name}: rate": f"{name} rate" for name in WORKS}
    rates = {f"{name}, requests/s": f"{name} rate" for name in WORKS}
    cpu = {f"{name}, CPU us each": f"{name} cpu" for name in WORKS}
    return [
        ratio_rows(numbers, STREAMLAB, SERVERS[1:], "connections", shared),
        stream_rows(numbers, SERVERS, "connections", rates),
        stream_rows(numbers, SERVERS, "connections", cpu),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add no options."""


BENCHMARK = rig.Benchmark(
    name="requests",
    description=__doc__,
    streams="connections",
    servers=SERVERS,
    keys=tuple(f"{name} {number}" for name in WORKS for number in ("rate", "cpu")),
    packages=("streamlab", "aiohttp"),
    goals=GOALS,
    measure=measure,
    tables=tables,
    add_options=add_options,
    rounds=5,
    seconds=90,
    full=("--rounds", "3"),
    full_seconds=28,
    short=("--rounds", "3"),
    short_seconds=24,
)

if __name__ == "__main__":
    rig.main(BENCHMARK)
