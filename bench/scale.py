"""The scaling benchmark: 10 to 5,000 followers, downloads of 1 MiB to 4 GiB, exports of up to a million rows."""

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import events, export, file, rig
from .events import FASTAPI, NCHAN, RAW, SSE_STARLETTE, STREAMLAB
from .export import SQLALCHEMY
from .file import MIB, NGINX
from .followers import PACED_RATE
from .report import Numbers, Table, filesystem, ratio_rows, stream_rows
from .servers import Running, counted_from, nginx_binary, reset_peak, running

FOLLOWERS = (10, 100, 1000, 5000)
PACED_DELIVERIES = 5000  # maximum per second for the p99: half of what the slowest server reaches
SECONDS = 0.4
SIZES = {1: 15, 16: 7, 256: 3, 1024: 1, 4096: 1}  # MiB, and how often each is downloaded
ROWS = {10_000: 5, 100_000: 1, 1_000_000: 1}
FAN_OUT = (STREAMLAB, FASTAPI, SSE_STARLETTE, NCHAN, RAW)
DOWNLOADS = (STREAMLAB, FASTAPI, NGINX)
EXPORTS = (STREAMLAB, FASTAPI, SQLALCHEMY)
STOPS_AT = {("followers", SSE_STARLETTE): 1000, ("rows", FASTAPI): 100_000}
"""Maximum sizes for slow peers: larger ones would take the time of the others."""
FAN_OUT_COLUMNS = {
    "deliveries/s, one event in flight": "one rate",
    "CPU us per delivery": "one cpu",
    "server's CPU share": "one busy",
    "client's": "one client",
    "p50, ms, paced": "paced p50",
    "p99, ms": "paced p99",
    "KiB per follower": "idle",
}
DOWNLOAD_COLUMNS = {
    "GB/s": "download rate",
    "first byte, ms": "download first",
    "peak RSS growth, MB": "download memory",
    "CPU s/GB": "download cpu",
    "client's CPU share": "download client",
}
EXPORT_COLUMNS = {
    "CSV, krows/s": "export rate",
    "first byte, ms": "export first",
    "peak RSS growth, MB": "export memory",
    "CPU s/Mrow": "export cpu",
}


def measure(run: rig.Run) -> None:
    """Measure all sizes, with compared servers one after the other."""
    rig.allow_files(max(FOLLOWERS) + 1000)
    outcome, quick = run.outcome, run.options.quick
    outcome.absent |= {name: why for name, why in events.absent().items() if name in FAN_OUT}
    if nginx_binary() is None:
        outcome.absent[NGINX] = "nginx is not installed"
    outcome.facts |= {
        "followers": f"{SECONDS:g} s per number; p99 at {PACED_RATE} events a second, or fewer, for"
        f" {PACED_DELIVERIES:,} deliveries per second",
        "downloads": f"a sparse file on {filesystem(run.folder)}, read from the page cache; HTTP/1.1 over loopback",
        "exports": "users as CSV from SQLite; formula guard on",
        "memory": f"peak RSS is counted from {counted_from()}",
        "stops": "; ".join(f"{name} at {size:,} {kind}" for (kind, name), size in STOPS_AT.items())
        + ": larger sizes would take the time of the others",
    }
    for number in run.rounds():
        here = rig.Round(run, number)
        run.run_steps(
            [
                *download_steps(here, [1, 16] if quick else list(SIZES)),
                *fan_out_steps(here, FOLLOWERS[:2] if quick else FOLLOWERS),
                *export_steps(here, [10_000] if quick else list(ROWS)),
            ]
        )


def fan_out_steps(here: rig.Round, counts: Sequence[int]) -> list[rig.Step]:
    """Return the steps for followers."""
    found = events.servers()

    def step(name: str, count: int) -> rig.Step:
        visit, place = events.Visit(name, count, ["one", "paced"]), f"{here.number}-{count}-followers-{name}"
        pace = min(PACED_RATE, PACED_DELIVERIES / count)
        return rig.Step(str(visit), lambda: events.visit_server(here, visit, found[name], place, SECONDS, pace))

    available = [name for name in FAN_OUT if name in found]
    return [step(name, count) for count in counts for name in available if is_measured("followers", name, count)]


def download_steps(here: rig.Round, sizes: Sequence[int]) -> list[rig.Step]:
    """Return the steps for downloads."""

    def step(name: str, size: int) -> rig.Step:
        path = here.run.folder / f"{size}.bin"
        return rig.Step(f"{name}, {size} MiB", lambda: download(here, name, path, size))

    return [step(name, size) for size in sizes for name in DOWNLOADS if name not in here.run.outcome.absent]


def download(here: rig.Round, name: str, path: Path, size: int) -> None:
    """Measure downloads of one size from a fresh server."""
    server_cpu, client_cpu = here.run.placement
    if not path.exists():
        for other in path.parent.glob("*.bin"):
            other.unlink()  # also frees the page cache
        with path.open("wb") as sparse:
            sparse.truncate(size * MIB)
        with path.open("rb", buffering=0) as cached:
            while cached.read(MIB):  # loads it into the page cache
                pass
    server = next(one for one in file.servers_of(path) if one.name == name)
    with running(server, here.run.folder / f"{here.number}-{size}-{name}", server_cpu) as one:
        idle, before = reset_peak_memory(one), one.cpu_seconds()
        seen = file.download(one, 1, "discard", size * MIB, client_cpu, SIZES[size])
        used, grown = one.cpu_seconds() - before, one.memory("VmHWM") - idle
    gigabytes, seconds = size * MIB / 1e9, statistics.median(each["seconds"] for each in seen)
    here.note(name, size, "download rate", gigabytes / seconds)
    here.note(name, size, "download first", statistics.median(each["first"] for each in seen) * 1e3)
    here.note(name, size, "download memory", grown / 1e6)
    here.note(name, size, "download cpu", used / gigabytes / len(seen))
    here.note(name, size, "download client", sum(each["cpu"] for each in seen) / sum(each["seconds"] for each in seen))


def export_steps(here: rig.Round, sizes: Sequence[int]) -> list[rig.Step]:
    """Return the steps for exports."""
    database = here.run.folder / "sample.db"

    def step(name: str, rows: int) -> rig.Step:
        return rig.Step(f"{name}, {rows:,} rows", lambda: export_rows(here, name, database, rows, max(sizes)))

    return [step(name, rows) for rows in sizes for name in EXPORTS if is_measured("rows", name, rows)]


def export_rows(here: rig.Round, name: str, database: Path, rows: int, max_rows: int) -> None:
    """Measure exports of `rows` rows from a fresh server; the database has `max_rows` rows."""
    server_cpu, client_cpu = here.run.placement
    if not database.exists():
        export.sample(database, max_rows)
    server = next((one for one in export.servers_of(database, None) if one.name == name), None)
    if server is None:
        here.run.outcome.absent[name] = f"{name} is not installed"
        return
    with running(server, here.run.folder / f"{here.number}-{rows}-{name}", server_cpu) as one, on_cpu(client_cpu):
        idle, before = reset_peak_memory(one), one.cpu_seconds()
        seen = [export.read(one.port, f"/export/users/csv?limit={rows}") for _ in range(ROWS[rows])]
        used, grown = one.cpu_seconds() - before, one.memory("VmHWM") - idle
    here.note(name, rows, "export rate", rows / statistics.median(each.seconds for each in seen) / 1e3)
    here.note(name, rows, "export first", statistics.median(each.first[0] for each in seen) * 1e3)
    here.note(name, rows, "export memory", grown / 1e6)
    here.note(name, rows, "export cpu", used / rows / len(seen) * 1e6)


def is_measured(kind: str, name: str, count: int) -> bool:
    """Return whether a server is measured with this size."""
    return count <= STOPS_AT.get((kind, name), count)


def reset_peak_memory(server: Running) -> int:
    """Reset the peak memory of a server, and return its current memory in bytes."""
    for pid in server.pids:
        reset_peak(pid)
    return server.memory("VmRSS")


@contextmanager
def on_cpu(cpu: int | None) -> Iterator[None]:
    """Pin this process, the client during the block, to one CPU if given."""
    everywhere = os.sched_getaffinity(0)
    try:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


def tables(numbers: Numbers) -> list[Table]:
    """Return tables of ratios and absolute numbers by size."""
    found: list[Table] = []
    for servers, streams, ratios, columns in (
        (FAN_OUT, "followers", {"rate": "one rate", "CPU": "one cpu", "p99": "paced p99"}, FAN_OUT_COLUMNS),
        (DOWNLOADS, "MiB", {"rate": "download rate", "CPU": "download cpu"}, DOWNLOAD_COLUMNS),
        (EXPORTS, "rows", {"rate": "export rate", "CPU": "export cpu"}, EXPORT_COLUMNS),
    ):
        found.append(ratio_rows(numbers, STREAMLAB, servers[1:], streams, ratios))
        found.append(stream_rows(numbers, servers, streams, columns))
    return found


BENCHMARK = rig.Benchmark(
    name="scale",
    description=__doc__,
    streams="size",
    servers=tuple(dict.fromkeys((*FAN_OUT, *DOWNLOADS, *EXPORTS))),
    keys=(*FAN_OUT_COLUMNS.values(), *DOWNLOAD_COLUMNS.values(), *EXPORT_COLUMNS.values()),
    packages=(
        "streamlab", "aiohttp", "fastapi", "starlette", "sse-starlette", "uvicorn", "h11", "aiofiles", "SQLAlchemy",
        "aiosqlite",
    ),
    measure=measure,
    tables=tables,
    seconds=300,
    full_seconds=200,
)  # fmt: skip

if __name__ == "__main__":
    rig.main(BENCHMARK)
