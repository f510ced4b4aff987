"""Measure one answer: in a fresh process, so that its memory and its processor time are its own."""

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

from .ways import Usage, Way

WORKER = Path(__file__).with_name("ways.py")

START_SECONDS = 20.0
"""What a process may take to begin to serve."""

DYING_SECONDS = 1.0
"""What a process that has failed may take to end."""

WARM_ROWS = 400
"""Rows of an answer that is not measured: the first one of a process pays for what is set up once."""

LAST_BYTES = 2000
"""Bytes of what a process said last that are kept to tell why it failed."""


class Failed(Exception):
    """A process could not be measured; the text says why, for the log."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one answer took."""

    bytes: int
    """Of its body."""
    first_byte_seconds: float
    """From the request to the first byte of the body."""
    seconds: float
    """From the request to the last byte."""
    usage: Usage


async def measure(way: Way, rows: int) -> Run:
    """Have a fresh process answer with so many rows, in one way; raises Failed where it does not.

    When this is cancelled the process is killed, and gone when it returns.
    """
    async with _serving(way) as child:
        try:
            async with aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(child.socket), timeout=aiohttp.ClientTimeout()
            ) as client:
                await _take(client, WARM_ROWS)
                await child.line()
                size, first_byte_seconds, seconds = await _take(client, rows)
                return Run(size, first_byte_seconds, seconds, Usage(**json.loads(await child.line())))
        except aiohttp.ClientError as error:
            raise Failed(f"{type(error).__name__}: {await child.last_words()}") from error


async def _take(client: aiohttp.ClientSession, rows: int) -> tuple[int, float, float]:
    """Read an answer and keep nothing of it: bytes, and seconds to its first and its last."""
    begun, first, size = time.perf_counter(), None, 0
    async with client.get(f"http://localhost/{rows}", raise_for_status=True) as response:
        async for data in response.content.iter_any():
            first = first or time.perf_counter()
            size += len(data)
    over = time.perf_counter()
    return size, (first or over) - begun, over - begun


@dataclass(frozen=True, slots=True)
class _Child:
    """A process that serves one way."""

    process: asyncio.subprocess.Process
    socket: str
    errors: IO[bytes]

    async def line(self) -> bytes:
        """What it prints next."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise Failed(await self.last_words())
        return line

    async def last_words(self) -> str:
        """Why it ended, as far as that is known; it is ended if it does not by itself."""
        try:
            # A signal to one that is dying would have asyncio lose its exit status (python/cpython#87744).
            async with asyncio.timeout(DYING_SECONDS):
                status = await self.process.wait()
        except TimeoutError:
            self.process.kill()
            status = await self.process.wait()
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - LAST_BYTES))
        said = self.errors.read().decode(errors="replace").splitlines()
        return f"exit status {status}; {' | '.join(said) or 'it said nothing'}"


@asynccontextmanager
async def _serving(way: Way) -> AsyncIterator[_Child]:
    """Run a process that serves one way, from when it is ready until the block is over."""
    with tempfile.TemporaryDirectory(prefix="streamlab-comparison-") as folder, tempfile.TemporaryFile() as errors:
        socket = f"{folder}/way.sock"  # in a folder of mode 0700
        # Its standard input is its life line: it ends when this process does, however that ends. It needs no
        # certificates, which aiohttp would read when it is imported: a tenth of a second, and 2 MB.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(WORKER), way, socket,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
            env={**os.environ, "SSL_CERT_FILE": os.devnull},
        )  # fmt: skip
        child = _Child(process, socket, errors)
        try:
            try:
                async with asyncio.timeout(START_SECONDS):
                    await child.line()
            except TimeoutError:
                raise Failed(f"it does not serve after {START_SECONDS:g} s: {await child.last_words()}") from None
            yield child
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
