"""What an acknowledged event survives: `durability` of `[events]`, with a disk that fails or is slow."""

import asyncio
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import redis.asyncio

from streamlab.config import Config
from streamlab.events import redis as eventlog_redis
from streamlab.events.channel import open_log
from streamlab.events.log import ORIGIN, Append, EncodedEvent, EventLog, EventLogError, Position, Retention
from streamlab.server.preflight import event_log_faults
from tests.support.servers import Running
from tests.support.valkey import Valkey

LOADED_PLUGINS = ("ticker",)

PATH = "/stream/stock-ticker"

TOGETHER = 40
"""Number of clients that publish at the same time."""


def configured(durability: str) -> str:
    return f'[events]\ndurability = "{durability}"\n[scenarios.ticker]\nsource = "push"\n'


def post(server: Running, price: int) -> int:
    body = json.dumps({"symbol": "ACME", "price": price}).encode()
    status, _, _ = server.get(PATH, {"Content-Type": "application/json"}, method="POST", body=body)
    return status


def prices(server: Running, count: int) -> list[int]:
    _, _, body = server.get(f"{PATH}?limit={count}", {"Last-Event-ID": "0-0"})
    return [json.loads(line[6:])["price"] for line in body.decode().splitlines() if line.startswith("data: {")]


@contextmanager
def disk_of(server: Running, fault: str, trace: Path) -> Iterator[Callable[[], int]]:
    """Change what the disk does to a process while the block runs; yield a function that counts syncs of the log."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    calls = "fsync,fdatasync"
    command = [strace, "-f", "-y", "-o", str(trace), "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}"]
    with subprocess.Popen([*command, "-p", str(server.process.pid)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        if "attached" not in (line := process.stderr.readline()):
            process.wait()
            pytest.skip(f"strace cannot attach to a process here: {line.strip()}")
        try:
            yield lambda: trace.read_text().count("-wal>")
        finally:
            process.terminate()
            process.stderr.read()


def test_machine_rejects_what_the_disk_does_not_take(start: Callable[..., Running], tmp_path: Path) -> None:
    server = start(configured("machine"))
    assert post(server, 1) == 202
    with disk_of(server, "error=EIO", tmp_path / "trace"):
        assert post(server, 2) == 503
    assert post(server, 3) == 202
    assert prices(server, 2) == [1, 3]


def test_process_does_not_wait_for_the_disk(start: Callable[..., Running], tmp_path: Path) -> None:
    server = start(configured("process"))
    with disk_of(server, "error=EIO", tmp_path / "trace"):
        assert post(server, 1) == 202
    assert prices(server, 1) == [1]


def test_events_that_are_published_while_the_disk_writes_share_the_next_commit(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    server = start(configured("machine"))
    with disk_of(server, "delay_enter=100000", tmp_path / "trace") as syncs, ThreadPoolExecutor(TOGETHER) as clients:
        assert set(clients.map(lambda price: post(server, price), range(TOGETHER))) == {202}
        assert 1 <= syncs() < TOGETHER
    assert sorted(prices(server, TOGETHER)) == list(range(TOGETHER))


def test_machine_with_a_log_in_memory_is_a_fault() -> None:
    (fault,) = event_log_faults(Config.of({"events": {"url": "sqlite://", "durability": "machine"}}))
    assert str(fault).endswith(
        'events.durability = "machine" - is impossible with url = sqlite://, which is memory: set a file, as '
        "sqlite:///var/streamlab.db, or a server, as redis://localhost:6379/0"
    )


async def publish(log: EventLog, text: str) -> Position:
    return await log.append(Append("c", [EncodedEvent(text.encode())], Retention()))


@pytest.mark.parametrize("synced", [True, False])
async def test_only_a_log_that_may_have_lost_events_begins_new_epochs_after_a_power_failure(
    tmp_path: Path, synced: bool
) -> None:
    log = open_log(f"sqlite:///{tmp_path}/events.db", synced=synced)
    async with log.opened():
        before = await publish(log, "a")
        for file in tmp_path.glob("events.db*"):  # as the disk is when the power fails
            if file.is_file():
                shutil.copy(file, tmp_path / f"later-{file.name}")
    with closing(sqlite3.connect(tmp_path / "later-events.db", isolation_level=None)) as database:
        database.execute("UPDATE meta SET value = 'another boot' WHERE name = 'boot'")
    log = open_log(f"sqlite:///{tmp_path}/later-events.db", synced=synced)
    async with log.opened():
        after = await publish(log, "b")
    assert (after == before._replace(offset=2)) is synced


async def test_an_append_waits_until_redis_has_it_on_its_disk(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventlog_redis, "SYNC_SECONDS", 0.05)
    log = open_log(valkey.url, synced=True)
    async with log.opened(), redis.asyncio.Redis.from_url(valkey.url) as server:
        first = await publish(log, "a")
        await server.config_set("appendfsync", "no")
        waiting = asyncio.create_task(publish(log, "b"))
        async with asyncio.timeout(20):
            while "appendfsync always" not in str(log.state().get("reason")):
                await asyncio.sleep(0.01)
        assert not waiting.done()
        await server.config_set("appendfsync", "always")
        assert await waiting == first._replace(offset=2)
        await log.delete("c")
        assert (await log.read("c", ORIGIN, 10)).events == []


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("appendonly", "no", "The Redis server has no append-only file; set appendonly yes."),
        ("appendfsync", "no", "The Redis server never waits for its disk; set appendfsync always."),
    ],
)
async def test_a_redis_that_does_not_write_to_its_disk_is_rejected(
    valkey: Valkey, setting: str, value: str, reason: str
) -> None:
    async with redis.asyncio.Redis.from_url(valkey.url) as server:
        await server.config_set(setting, value)
    with pytest.raises(EventLogError) as raised:
        async with open_log(valkey.url, synced=True).opened():
            pass
    assert str(raised.value) == f'does not suit durability = "machine": {reason}'
