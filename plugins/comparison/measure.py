"""Measure one response in a new process, so that memory and CPU time are those of the response alone."""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import aiohttp

from .modes import Mode, Usage

WORKER = Path(__file__).with_name("modes.py")

START_SECONDS = 20.0
"""Maximum time for a process to start serving, in seconds."""

DYING_SECONDS = 1.0
"""Maximum time for a failed process to end, in seconds."""

WARM_ROWS = 400
"""Rows of a response that is not measured: the first response of a process includes one-time setup."""

ERROR_BYTES = 2000
"""Maximum size of a failed process's last output in the log, in bytes."""


class Failed(Exception):
    """A process could not be measured; the message is the reason, for the log."""


@dataclass(frozen=True, slots=True)
class Run:
    """The measurements of one response."""

    bytes: int
    """Size of its body, in bytes."""
    first_byte_seconds: float
    """Time from the request to the first byte of the body, in seconds."""
    seconds: float
    """Time from the request to the last byte, in seconds."""
    usage: Usage


Measure = Callable[[Mode, int], Awaitable[Run]]
"""A function that measures a response of a mode with this number of rows, sent by a new process; it raises Failed."""


@asynccontextmanager
async def measuring() -> AsyncIterator[Measure]:
    """Yield a function that measures one response after the other; its processes have ended when this returns."""
    async with _worker() as worker:
        yield partial(_measure, worker)


async def _measure(worker: "_Worker", mode: Mode, rows: int) -> Run:
    await worker.begin(mode)
    try:
        async with aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(worker.socket), timeout=aiohttp.ClientTimeout()
        ) as client:
            await _fetch(client, WARM_ROWS)
            await worker.line()
            size, first_byte_seconds, seconds = await _fetch(client, rows)
            return Run(size, first_byte_seconds, seconds, Usage(**json.loads(await worker.line())))
    except aiohttp.ClientError as error:
        raise Failed(f"{type(error).__name__}: {await worker.failure()}") from error


async def _fetch(client: aiohttp.ClientSession, rows: int) -> tuple[int, float, float]:
    """Read a response; return its size in bytes, and the seconds to its first and its last byte."""
    start, first, size = time.perf_counter(), None, 0
    async with client.get(f"http://localhost/{rows}", raise_for_status=True) as response:
        async for data in response.content.iter_any():
            first = first or time.perf_counter()
            size += len(data)
    end = time.perf_counter()
    return size, (first or end) - start, end - start


@dataclass(frozen=True, slots=True)
class _Worker:
    """A process that serves one mode after the other, each in a process that it forks."""

    process: asyncio.subprocess.Process
    socket: str
    errors: IO[bytes]

    async def begin(self, mode: Mode) -> None:
        """Let a new process serve one mode; raises Failed if it does not."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{mode}\n".encode())
        try:
            async with asyncio.timeout(START_SECONDS):
                await self.line()
        except TimeoutError:
            raise Failed(f"it did not start within {START_SECONDS:g} s: {await self.failure()}") from None

    async def line(self) -> bytes:
        """Return the next line that it prints; raises Failed if it has ended."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise Failed(await self.failure())
        return line

    async def failure(self) -> str:
        """Return why it ended, as far as known; kill it if it does not end by itself."""
        try:
            # A signal to a dying process would make asyncio lose its exit status (python/cpython#87744).
            async with asyncio.timeout(DYING_SECONDS):
                status = await self.process.wait()
        except TimeoutError:
            self.process.kill()
            status = await self.process.wait()
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - ERROR_BYTES))
        output = self.errors.read().decode(errors="replace").splitlines()
        return f"exit status {status}; {' | '.join(output) or 'no error output'}"

    async def end(self) -> None:
        """Kill it, and wait until the process that it forked has ended, too: that closes the output that they share."""
        assert self.process.stdout is not None
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(DYING_SECONDS):
                await self.process.stdout.read()


@asynccontextmanager
async def _worker() -> AsyncIterator[_Worker]:
    """Run a worker during the block."""
    with tempfile.TemporaryDirectory(prefix="streamlab-comparison-") as folder, tempfile.TemporaryFile() as errors:
        socket = f"{folder}/mode.sock"  # in a folder of mode 0700
        # It ends when its standard input does, which this process holds open, so it never outlives this process. It
        # needs no certificates, which aiohttp would read when it is imported: a tenth of a second, and 2 MB.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(WORKER), socket,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
            env={**os.environ, "SSL_CERT_FILE": os.devnull},
        )  # fmt: skip
        worker = _Worker(process, socket, errors)
        try:
            yield worker
        finally:
            await worker.end()
