"""Measure one response in a new process, so that memory and CPU time are those of the response alone."""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
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


async def measure(mode: Mode, rows: int) -> Run:
    """Measure a response with `rows` rows in one mode, sent by a new process; raises Failed.

    When this is cancelled, the process is killed and has ended when this returns.
    """
    async with _serving(mode) as child:
        try:
            async with aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(child.socket), timeout=aiohttp.ClientTimeout()
            ) as client:
                await _fetch(client, WARM_ROWS)
                await child.line()
                size, first_byte_seconds, seconds = await _fetch(client, rows)
                return Run(size, first_byte_seconds, seconds, Usage(**json.loads(await child.line())))
        except aiohttp.ClientError as error:
            raise Failed(f"{type(error).__name__}: {await child.failure()}") from error


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
class _Child:
    """A process that serves one mode."""

    process: asyncio.subprocess.Process
    socket: str
    errors: IO[bytes]

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


@asynccontextmanager
async def _serving(mode: Mode) -> AsyncIterator[_Child]:
    """Run a process that serves one mode during the block."""
    with tempfile.TemporaryDirectory(prefix="streamlab-comparison-") as folder, tempfile.TemporaryFile() as errors:
        socket = f"{folder}/mode.sock"  # in a folder of mode 0700
        # It ends when its standard input does, which this process holds open, so it never outlives this process. It
        # needs no certificates, which aiohttp would read when it is imported: a tenth of a second, and 2 MB.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(WORKER), mode, socket,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
            env={**os.environ, "SSL_CERT_FILE": os.devnull},
        )  # fmt: skip
        child = _Child(process, socket, errors)
        try:
            try:
                async with asyncio.timeout(START_SECONDS):
                    await child.line()
            except TimeoutError:
                raise Failed(f"it did not start within {START_SECONDS:g} s: {await child.failure()}") from None
            yield child
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
