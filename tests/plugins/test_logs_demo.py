"""The log file of the simulated service."""

import asyncio
import logging
import os
import random
import re
import types
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import plugin_module

RECORD = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) shop\.[a-z]+ \S.*")

demo = plugin_module("logs", "demo")
lines = plugin_module("logs", "lines")


@asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(demo.serve(path, **options))
    yield
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # A thread may still be writing the last record.
    await asyncio.get_running_loop().shutdown_default_executor()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


async def test_records_are_written_into_a_folder_that_is_created(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "shop.log"
    async with serving(path, interval=0.001, seed=1):
        await until(lambda: count(path) >= 20)
    first, *_ = path.read_text().splitlines()
    assert RECORD.fullmatch(first)


async def test_the_mean_interval_of_records_is_half_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 200:
            enough.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(demo, "asyncio", types.SimpleNamespace(sleep=sleep, to_thread=asyncio.to_thread))
    async with serving(tmp_path / "shop.log", seed=1):
        async with asyncio.timeout(10):
            await enough.wait()
    assert sum(waits) / len(waits) == pytest.approx(0.5, rel=0.1)


async def test_the_file_is_rotated_by_renaming_between_records(tmp_path: Path) -> None:
    path = tmp_path / "shop.log"
    async with serving(path, interval=0.0005, seed=1, max_bytes=2000, backups=2):
        await until((tmp_path / "shop.log.2").exists)
        # Until the next rotation replaces it.
        with (tmp_path / "shop.log.2").open() as oldest:
            await until(lambda: os.fstat(oldest.fileno()).st_nlink == 0)
    assert {file.name for file in tmp_path.iterdir()} == {"shop.log", "shop.log.1", "shop.log.2"}
    for file in tmp_path.iterdir():
        assert file.stat().st_size <= 2000
        assert RECORD.fullmatch(file.read_text().partition("\n")[0])
        assert file.read_bytes().endswith(b"\n")


def test_the_same_seed_gives_the_same_records() -> None:
    assert list(islice(demo._records(random.Random(3)), 500)) == list(islice(demo._records(random.Random(3)), 500))


def test_records_have_every_level_and_some_are_tracebacks_without_a_path_of_this_machine() -> None:
    records = list(islice(demo._records(random.Random(1)), 3000))
    levels = [level for level, _, _ in records]
    assert levels.count("INFO") > levels.count("DEBUG") > levels.count("WARNING") > levels.count("ERROR") > 20
    tracebacks = [message for _, _, message in records if "\n" in message]
    assert tracebacks
    for message in tracebacks:
        assert "\nTraceback (most recent call last):\n" in message
        assert re.search(r"\nshop\.payment\.PaymentError: card of user \d+ declined$", message)
        assert set(re.findall(r'File "([^"]*)"', message)) == {"shop/web.py", "shop/orders.py", "shop/payment.py"}


def test_every_line_of_a_record_has_its_level_and_time() -> None:
    reader = lines.Reader()
    for level, logger, message in islice(demo._records(random.Random(1)), 1000):
        for text in f"2026-11-01T12:00:00.000Z {level} {logger} {message}".split("\n"):
            assert reader.read(text) == (level, 1_793_534_400.0)


async def test_an_error_of_the_disk_is_logged_once_and_retried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "folder" / "shop.log"
    path.parent.write_text("in the way")
    async with serving(path, interval=0.001, seed=1):
        await until(lambda: bool(caplog.records))
        await asyncio.sleep(0.05)
        path.parent.unlink()
        await until(lambda: count(path) > 3)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_full_disk_leaves_no_partial_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shop.log"
    demo._append(path, b"one\n", 1000, 1)
    real = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, record: bytes) -> int:
            return int(self.file.write(record[:2]))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda path, *arguments, **options: Full(real(path, *arguments, **options)))
        with pytest.raises(OSError, match=os.strerror(28)):
            demo._append(path, b"two\n", 1000, 1)
    demo._append(path, b"three\n", 1000, 1)
    assert path.read_bytes() == b"one\nthree\n"
