"""The benchmark of Durable Streams: appending, reading and following, compared with the servers of that protocol."""

import argparse
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from . import rig
from .report import Goal, Numbers, Table, filesystem, ratio_rows, stream_rows
from .request_client import Work
from .servers import Running, Server, running, streamlab, uvicorn
from .stream_client import PATH, Load, create, message

STREAMLAB, MACHINE = "streamlab", "streamlab, durability machine"
NODE, RAKAIA = "Node reference server", "rakaia-streams"
SERVERS = (STREAMLAB, MACHINE, NODE, RAKAIA)
REFERENCE = Path(__file__).parents[1] / "tests/node/stream_server.mjs"
CLIENT_SECONDS = 60
FEW, MANY = 1, 32  # connections that append
MESSAGES, FOLLOWERS = 10_000, 50
PEERS = {NODE: "Node", RAKAIA: "rakaia"}
DISK = (
    "an append is checked against the scope and the state of the stream, and acknowledged after a commit in another"
    " thread; the peers add it to a list in memory, and lose it when they end."
)
FSYNC = "followers get an append after the disk has it, and the slowest hundredth waits for whatever else it writes."
GOALS = tuple(
    goal
    for peer, short in PEERS.items()
    for server, floors in ((STREAMLAB, (0.15, 0.18)), (MACHINE, (0.05, 0.15)))
    for goal in (
        *(
            Goal(f"append rate / {short}", peer, count, "append rate", ">=", 1.0, server, short=DISK, floor=floor)
            for count, floor in zip((FEW, MANY), floors, strict=True)
        ),
        Goal(f"read rate / {short}", peer, 1, "read rate", ">=", 1.0, server),
        Goal(
            f"p99 of append to follower / {short}",
            peer,
            FOLLOWERS,
            "tail p99",
            "<=",
            1.0,
            server,
            short=FSYNC if server == MACHINE else "",
            floor=20.0 if server == MACHINE else None,
        ),
    )
)


def config(durability: str) -> Callable[[Path], str]:
    """Return streamlab's configuration with a durability."""
    return lambda folder: (
        "[server]\nlog_file = ''\nlog_level = 'WARNING'\n"
        f"[events]\nurl = 'sqlite:///{folder}/events.db'\ndurability = '{durability}'\n"
        "[scenarios.ticker]\nsource = 'push'\n[scenarios.logs]\ndemo = false\n"
    )


def servers() -> dict[str, Server]:
    """Return every available server, by name."""
    found = {STREAMLAB: streamlab(STREAMLAB, config("process")), MACHINE: streamlab(MACHINE, config("machine"))}
    missing = absent()
    if NODE not in missing:
        found[NODE] = Server(NODE, lambda _, port: [shutil.which("node") or "", str(REFERENCE), str(port)])
    if RAKAIA not in missing:
        found[RAKAIA] = uvicorn(RAKAIA, "rakaia:app")
    return found


def absent() -> dict[str, str]:
    """Return the reason for each server that is not available."""
    reasons = {}
    if shutil.which("node") is None:
        reasons[NODE] = "node is not installed"
    elif not (REFERENCE.parent / "node_modules/@durable-streams/server").is_dir():
        reasons[NODE] = "@durable-streams/server is not installed (make node)"
    if importlib.util.find_spec("rakaia") is None:
        reasons[RAKAIA] = "rakaia-streams is not installed"
    return reasons


def _client(here: rig.Round, server: Running, module: str, arguments: list[str]) -> dict[str, float]:
    done = rig.client(module, arguments, CLIENT_SECONDS, here.run.placement[1])
    if done.returncode:
        reason = done.stderr.rstrip().rpartition("\n")[2]
        raise RuntimeError(f"{server.name} failed: {reason}\n{done.stderr[-2000:]}\n{server.failure()}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def append(here: rig.Round, server: Running, connections: int, seconds: float) -> None:
    """Append a message a request, again and again, on a number of connections."""
    name = f"append-{here.number}-{connections}"
    create(server.port, name, 0)
    work = Work("POST", f"{PATH}/{name}", 204, message(0).decode())
    before = server.cpu_seconds()
    arguments = [str(server.port), str(connections), str(seconds), json.dumps(asdict(work))]
    found = _client(here, server, "bench.request_client", arguments)
    here.note(server.name, connections, "append rate", found["count"] / found["seconds"])
    here.note(server.name, connections, "append cpu", (server.cpu_seconds() - before) / found["requests"] * 1e6)


def visit(here: rig.Round, server: Server, place: str, seconds: float) -> None:
    """Measure a fresh server that runs in the folder `place`."""
    with running(server, here.run.folder / place, here.run.placement[0]) as one:
        for connections in (FEW, MANY):
            append(here, one, connections, seconds)
        found = _client(here, one, "bench.stream_client", [Load(one.port, "read", MESSAGES, seconds).text()])
        here.note(server.name, 1, "read rate", found["count"] / found["seconds"])
        found = _client(here, one, "bench.stream_client", [Load(one.port, "tail", FOLLOWERS, 3 * seconds).text()])
        for name in ("p50", "p99"):
            here.note(server.name, FOLLOWERS, f"tail {name}", found[name])


def step(here: rig.Round, server: Server, seconds: float) -> rig.Step:
    """Return the step that measures a server in a round."""
    place = f"{here.number}-{SERVERS.index(server.name)}"
    return rig.Step(server.name, lambda: visit(here, server, place, seconds))


def measure(run: rig.Run) -> None:
    """Measure every server in turn, round by round."""
    seconds = 0.3 if run.options.quick else 0.6
    run.outcome.absent |= absent()
    run.outcome.facts |= {
        "run": f"{seconds:g} s per number ({3 * seconds:g} s for p99), HTTP/1.1 over loopback",
        "messages": f"{len(message(0))} bytes of JSON; every reader and follower received each",
        "database": f"on {filesystem(run.folder)}; the peers store nothing",
    }
    for number in run.rounds():
        in_turn = list(servers().values())[:: 1 if number % 2 else -1]
        run.run_steps([step(rig.Round(run, number), server, seconds) for server in in_turn])


def tables(numbers: Numbers) -> list[Table]:
    """Return tables of ratios, and one of absolute numbers."""
    shared = {"append rate": "append rate", "CPU per append": "append cpu", "read rate": "read rate", "p99": "tail p99"}
    appends = {"appends/s": "append rate", "CPU us each": "append cpu", "messages read/s": "read rate"}
    tails = {"append to follower: p50, ms": "tail p50", "p99, ms": "tail p99"}
    return [
        *(
            ratio_rows(numbers, server, SERVERS[at:], "clients", shared)
            for at, server in enumerate(SERVERS[:2], start=1)
        ),
        stream_rows(numbers, SERVERS, "clients", appends),
        stream_rows(numbers, SERVERS, "clients", tails),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add no options."""


BENCHMARK = rig.Benchmark(
    name="streams",
    description=__doc__,
    streams="clients",
    servers=SERVERS,
    keys=("append rate", "append cpu", "read rate", "tail p50", "tail p99"),
    packages=("streamlab", "aiohttp", "rakaia-streams", "uvicorn", "h11"),
    goals=GOALS,
    measure=measure,
    tables=tables,
    add_options=add_options,
    rounds=5,
    seconds=180,
    full=("--rounds", "3"),
    full_seconds=60,
)  # fmt: skip

if __name__ == "__main__":
    rig.main(BENCHMARK)
