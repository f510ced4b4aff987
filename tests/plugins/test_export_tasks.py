"""Exports as tasks: many concurrent cancellations and starts, and the files that they write."""

import asyncio
import fcntl
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import Running, disabled

LOADED_PLUGINS = ("export", "file", "progress")

TASKS = "/process/tasks"

ALONE = "".join(
    f"[scenarios.{name}]\nenabled = false\n" for name in disabled() if name not in ("export", "progress", "file")
)
"""Configuration without the other plugins."""


def config(*, export: str = "", progress: str = "", server: str = "") -> str:
    return f"[server]\n{server}\n[scenarios.export]\n{export}\n[scenarios.progress]\n{progress}\n{ALONE}"


QUICK = '''
    """Development mode without asyncio's part, which makes each step of a task several times slower."""

    import asyncio
    from contextlib import asynccontextmanager

    from streamlab import hookimpl


    @hookimpl
    @asynccontextmanager
    async def lifespan(app):
        asyncio.get_running_loop().set_debug(False)
        yield
'''


MARGIN_SECONDS = 1.0
"""Tolerance of time limits on a busy machine, in seconds."""


class Client:
    """A connection that stays open, for raw requests one after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, server: Running) -> "Client":
        return cls(*await asyncio.open_connection("127.0.0.1", server.port))

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        response = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(response.partition(b"content-length:")[2].partition(b"\r\n")[0])
        return int(response.split()[1]), await self._reader.readexactly(length)

    def close(self) -> None:
        self._writer.close()


def task(kind: str, **parameters: Any) -> bytes:
    return json.dumps({"kind": kind, "parameters": parameters}).encode()


# -- concurrent cancellations


def test_a_thousand_tasks_deleted_by_several_clients_at_once_leave_the_server_intact(
    start: Callable[..., Running],
) -> None:
    """The second DELETE once closed a database that a thread was reading: the process died of SIGSEGV."""
    server = start(
        config(export="sample_rows = 3000", progress="max_running = 8\nmax_queued = 100000"),
        environ={"PYTHONDEVMODE": "1"},
        tracebacks=True,
        quick=QUICK,
    )
    count, lanes, chance = 1000, 10, random.Random(13)
    left = iter(range(count))
    statuses: dict[int, int] = {}

    async def delete(client: Client, path: str, pause: float) -> None:
        await asyncio.sleep(pause)
        status, _ = await client.request("DELETE", path)
        statuses[status] = statuses.get(status, 0) + 1

    async def lane() -> None:
        clients = [await Client.connect(server) for _ in range(5)]
        for number in left:
            kind = "report" if number % 5 == 0 else "export"
            status, response = await clients[0].request("POST", TASKS, task(kind))
            assert status == 202, response
            path = json.loads(response)["url"]
            async with asyncio.TaskGroup() as group:
                for client in clients[: chance.randint(2, 5)]:
                    group.create_task(delete(client, path, chance.uniform(0, 0.002)))
        for client in clients:
            client.close()

    async def load() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(lanes):
                group.create_task(lane())

    server.get("/export/users/csv?limit=1")  # makes the sample
    asyncio.run(load())
    assert set(statuses) <= {202, 409}
    assert sum(statuses.values()) > 2 * count
    assert statuses[202] >= count
    assert server.get("/export/users/csv?limit=1")[0] == 200
    assert server.terminate()[0] == 0
    assert "Traceback" not in server.log
    assert "never retrieved" not in server.log
    assert "ResourceWarning" not in server.log


def test_sigterm_just_after_a_delete_ends_the_server_in_time(start: Callable[..., Running]) -> None:
    """The shutdown is the second cancellation of the work."""
    server = start(config(export="sample_rows = 50000", server="drain_seconds = 1"))
    server.get("/export/users/csv?limit=1")

    async def load() -> None:
        client = await Client.connect(server)
        paths = [json.loads((await client.request("POST", TASKS, task("export")))[1])["url"] for _ in range(2)]
        for path in paths:
            await client.request("DELETE", path)
        server.process.send_signal(signal.SIGTERM)
        client.close()

    asyncio.run(load())
    assert server.process.wait(2 + MARGIN_SECONDS) == 0
    assert "never retrieved" not in server.log


# -- concurrent starts


def test_the_files_of_200_exports_started_at_once_are_each_its_own(start: Callable[..., Running]) -> None:
    """Files were named by the first 12 digits of an id, which is only its millisecond: tasks overwrote each other's."""
    server = start(config(export="sample_rows = 300", progress="max_running = 8"))
    count = 200

    async def run(client: Client, number: int) -> str:
        body = task("export", name="users", format="jsonl", limit=number + 1, columns=["id"])
        status, response = await client.request("POST", TASKS, body)
        assert status == 202, response
        return str(json.loads(response)["id"])

    async def load() -> list[dict[str, Any]]:
        clients = [await Client.connect(server) for _ in range(count)]
        ids = await asyncio.gather(*(run(client, number) for number, client in enumerate(clients)))
        found: dict[str, Any] = {}
        while not found or any(is_unfinished(task) for task in found.values()):
            await asyncio.sleep(0.2)
            _, response = await clients[0].request("GET", f"{TASKS}?limit=1000")
            found = {task["id"]: task for task in json.loads(response)["tasks"]}
        for client in clients:
            client.close()
        assert {task["state"] for task in found.values()} == {"done"}, found
        return [dict(found[task_id]["result"]) for task_id in ids]

    server.get("/export/users/csv?limit=1")
    results = asyncio.run(load())
    assert len({result["file"] for result in results}) == count
    for number, result in enumerate(results):
        text = (server.base / "var/files/exports" / result["file"]).read_bytes()
        assert hashlib.sha256(text).hexdigest() == result["sha256"]
        assert text == b"".join(b'{"id":%d}\n' % (row + 1) for row in range(number + 1))
        assert (result["rows"], result["bytes"]) == (number + 1, len(text))
    status, _, text = server.get(results[0]["url"])
    assert (status, text) == (200, b'{"id":1}\n')


# -- files


def run_task(server: Running, **parameters: Any) -> dict[str, Any]:
    """Return the task once it has ended."""

    async def load() -> dict[str, Any]:
        client = await Client.connect(server)
        status, response = await client.request("POST", TASKS, task("export", **parameters))
        assert status == 202, response
        found = await over(client, json.loads(response))
        client.close()
        return found

    return asyncio.run(load())


def is_unfinished(found: dict[str, Any]) -> bool:
    return found["state"] in ("queued", "running")


async def over(client: Client, found: dict[str, Any]) -> dict[str, Any]:
    while is_unfinished(found):
        await asyncio.sleep(0.2)
        found = json.loads((await client.request("GET", found["url"]))[1])
    return found


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def wait_until_deleted(path: Path) -> None:
    deadline = time.monotonic() + 10
    while path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_a_file_is_deleted_when_it_is_too_old_and_no_other(start: Callable[..., Running]) -> None:
    server = start(config(export="sample_rows = 300\nkeep_seconds = 2"))
    folder = server.base / "var/files/exports"
    done = run_task(server, limit=1)["result"]
    young, link = (folder / f"users-{digit * 32}.csv" for digit in "01")
    foreign = [folder / name for name in ("notes.txt", "users-0123456789ab.csv", f"users-{'0' * 32}.csv.backup")]
    for path in (young, *foreign):
        path.touch()
        age(path, 1000 if path is not young else -1000)
    link.symlink_to(foreign[0])
    wait_until_deleted(folder / done["file"])
    assert server.get(done["url"])[0] == 404
    assert all(path.exists() for path in (young, link, *foreign))


def test_at_the_budget_a_new_export_fails_and_no_file_is_lost(start: Callable[..., Running]) -> None:
    """Deleting the oldest file would break the promise of `keep_seconds`."""
    server = start(config(export="sample_rows = 20000\nkeep_mb = 1"))
    folder = server.base / "var/files/exports"
    first = run_task(server, limit=5000)
    assert first["state"] == "done"
    second = run_task(server)
    assert second["state"] == "failed"
    assert second["error"]["status"] == 507
    begin, _, date = second["error"]["detail"].partition("; the oldest is deleted at ")
    assert begin == "The files of exports have reached their limit of 1 MB (keep_mb)"
    assert date
    assert [path.name for path in folder.iterdir()] == [first["result"]["file"]]
    assert run_task(server, limit=1)["state"] == "done"


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Path]:
    """A file that another live process is writing: it is locked, however old it is."""
    path = tmp_path / "var/files/exports/.unfinished-alive"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        age(path, 1_000_000)
        yield path


def test_a_start_deletes_files_of_a_dead_process_and_not_those_of_another(
    writer: Path, start: Callable[..., Running]
) -> None:
    left = writer.with_name(".unfinished-left")
    left.write_bytes(b"id,name")
    server = start(config())
    assert not left.exists()
    assert writer.exists()
    server.wait_for_log("deleted .unfinished-left, left by a process that died")


def test_files_that_a_killed_server_was_writing_are_deleted_at_the_next_start(start: Callable[..., Running]) -> None:
    server = start(config(export="sample_rows = 100000"))
    folder = server.base / "var/files/exports"
    server.get("/export/users/csv?limit=1")
    server.get(TASKS, {"Content-Type": "application/json"}, method="POST", body=task("export"))
    deadline = time.monotonic() + 10
    while not list(folder.glob(".unfinished-*")):
        assert time.monotonic() < deadline
    server.terminate(signal.SIGKILL)
    (left,) = folder.glob(".unfinished-*")
    start(config(export="sample_rows = 100000"))
    assert not left.exists()
