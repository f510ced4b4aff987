"""The workers benchmark: two workers compared with one, and how long a price takes from one worker to another.

It is no part of a run of all: it needs both processors of a small machine for the servers, which the client shares.
"""

import argparse
import http.client
import json
import math
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from . import rig
from .report import Goal, Numbers, Table, ratio_rows, stream_rows
from .servers import Running, running, streamlab

STREAMLAB, ONE = "streamlab", "one worker"
SERVERS = (STREAMLAB, ONE)
WORKERS = {STREAMLAB: 2, ONE: 1}
CLIENTS = 8
ROWS = 200_000
PRICES = 300
TIMEOUT_SECONDS = 30
PAUSE_SECONDS = 0.005
"""Pause between two prices, in seconds."""
GOALS = (
    Goal(
        "exports / one worker", ONE, CLIENTS, "rate", ">=", 1.7, floor=1.1,
        short="the client runs on the same processors; its share is below.",
    ),
    Goal("price to another worker, p99", None, 2, "other p99", "<=", 3.0, unit="ms"),
)  # fmt: skip


def config(workers: int) -> Callable[[Path], str]:
    """Return what writes streamlab's configuration with a number of workers."""
    return lambda folder: (
        f"[server]\nlog_file = ''\nworkers = {workers}\n"
        f"[events]\nurl = 'sqlite:///{folder}/events.db'\n"
        "[scenarios.ticker]\nsource = 'push'\n"
        f"[scenarios.export]\nsample_rows = {ROWS}\n"
        "[scenarios.logs]\ndemo = false\n"
    )


# -- prices


def _connection(server: Running, number: int) -> http.client.HTTPConnection:
    """Return a connection to the worker of a number, which is kept alive; raises RuntimeError if there is none."""
    for _ in range(1000):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_SECONDS)
        connection.request("GET", "/health")
        if json.loads(connection.getresponse().read())["worker"] == number:
            return connection
        connection.close()
    raise RuntimeError(f"no connection of a thousand was accepted by worker {number}")


@contextmanager
def _following(server: Running, number: int) -> Iterator[socket.socket]:
    """Yield a connection on which a worker sends all prices."""
    with closing(_connection(server, number)) as connection:
        connection.sock.sendall(b"GET /stream/stock-ticker?last_event_id=0-0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        yield connection.sock


def _wait_for(follower: socket.socket, mark: bytes) -> float:
    """Wait until a follower has received a mark; return when."""
    received = b""
    while mark not in received:
        if not (chunk := follower.recv(65536)):
            raise RuntimeError("a follower was disconnected")
        received = received[-len(mark) :] + chunk
    return time.perf_counter()


def measure_prices(here: rig.Round, server: Running) -> None:
    """Publish prices at both workers in turn, and note when followers of the same and of the other one have them."""
    times: dict[str, list[float]] = {"same": [], "other": []}
    with ExitStack() as stack:
        publishers = [stack.enter_context(closing(_connection(server, number))) for number in (1, 2)]
        followers = [stack.enter_context(_following(server, number)) for number in (1, 2)]
        pool = stack.enter_context(ThreadPoolExecutor(2))
        for price in range(PRICES):
            mark = f"{here.number}.{price:06}1".encode()  # no digits at its end are lost as zeros
            waits = [pool.submit(_wait_for, follower, mark) for follower in followers]
            body = f'{{"symbol": "ACME", "price": {mark.decode()}}}'
            begun, publisher = time.perf_counter(), publishers[price % 2]
            publisher.request("POST", "/stream/stock-ticker", body, {"Content-Type": "application/json"})
            publisher.getresponse().read()
            for number, wait in enumerate(waits):
                times["same" if number == price % 2 else "other"].append((wait.result() - begun) * 1000)
            time.sleep(PAUSE_SECONDS)
    for where, found in times.items():
        here.note(server.name, 2, f"{where} p50", statistics.median(found))
        here.note(server.name, 2, f"{where} p99", sorted(found)[math.ceil(len(found) * 0.99) - 1])


# -- exports


def _export(server: Running) -> int:
    """Export the sample once; return the number of its bytes."""
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT_SECONDS) as connection:
        connection.sendall(b"GET /export/users/csv HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        buffer, received, end = bytearray(1024 * 1024), 0, b""
        while count := connection.recv_into(buffer):
            received, end = received + count, (end + buffer[:count])[-8:]
    if not end.endswith(b"0\r\n\r\n"):
        raise RuntimeError(f"an export was aborted after {received} bytes")
    return received


def measure_exports(here: rig.Round, server: Running) -> None:
    """Let several clients export all rows at once."""
    cpu, used = server.cpu_seconds(), resource.getrusage(resource.RUSAGE_SELF)
    begun, before = time.perf_counter(), used.ru_utime + used.ru_stime
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(_export, [server] * CLIENTS))
    seconds, used = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    here.note(server.name, CLIENTS, "rate", CLIENTS * ROWS / seconds / 1000)
    here.note(server.name, CLIENTS, "cpu", (server.cpu_seconds() - cpu) / (CLIENTS * ROWS) * 1e6)
    here.note(server.name, CLIENTS, "client", (used.ru_utime + used.ru_stime - before) / seconds)


def measure(run: rig.Run) -> None:
    """Measure both servers in turn, round by round."""
    run.outcome.facts |= {
        "run": f"{PRICES} prices, one at a time; {CLIENTS} exports of {ROWS:,} rows as CSV at once",
        "placement": "not pinned: the client runs on the processors of the servers",
    }
    with ExitStack() as stack:
        found = [
            stack.enter_context(running(streamlab(name, config(count)), run.folder / f"server-{count}", None))
            for name, count in WORKERS.items()
        ]
        for server in found:
            _export(server)  # which creates the sample
        for number in run.rounds():
            here = rig.Round(run, number)
            for server in found[:: 1 if number % 2 else -1]:
                measure_exports(here, server)
                if server.name == STREAMLAB:
                    measure_prices(here, server)


def tables(numbers: Numbers) -> list[Table]:
    """Return a table of ratios, and the absolute numbers."""
    exports = {"k rows/s": "rate", "server CPU us per row": "cpu", "processors of the client": "client"}
    prices = {
        "same worker p50, ms": "same p50", "p99": "same p99", "another worker p50, ms": "other p50",
        "its p99": "other p99",
    }  # fmt: skip
    return [
        ratio_rows(numbers, STREAMLAB, [ONE], "clients", {"exports: rate": "rate", "server CPU per row": "cpu"}),
        stream_rows(numbers, SERVERS, "clients", exports),
        stream_rows(numbers, SERVERS, "workers", prices),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add no options."""


BENCHMARK = rig.Benchmark(
    name="workers",
    description=__doc__,
    streams="clients",
    servers=SERVERS,
    keys=("rate", "cpu", "client", "same p50", "same p99", "other p50", "other p99"),
    packages=("streamlab", "aiohttp"),
    goals=GOALS,
    measure=measure,
    tables=tables,
    add_options=add_options,
    rounds=5,
    seconds=120,
    full_seconds=0,
)

if __name__ == "__main__":
    rig.main(BENCHMARK)
