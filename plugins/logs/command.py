"""Run a command and read its output, line by line."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

from .chunks import Line, split_lines

log = logging.getLogger(__name__)

READ = 64 * 1024
"""Maximum bytes of one read from the pipe."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Minimum and maximum pause before a restart, in seconds; it doubles unless the command ran for `LONGEST_PAUSE`."""

TERMINATE_SECONDS = 2.0
"""Maximum time for a command to end after SIGTERM, in seconds."""


async def output(command: Sequence[str]) -> AsyncGenerator[list[Line | int], None]:
    """Run a command repeatedly. Yield its lines (stdout and stderr) as they come, and its exit status when it ends.

    It is read at the pace of the caller: its pipe is the buffer. It is terminated when the generator is closed.
    """
    program, pause, loop = Path(command[0]).name, FIRST_PAUSE, asyncio.get_running_loop()
    while True:
        begun = loop.time()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must reach the server only, which then ends the command
            )
        except OSError as error:
            log.warning("the command %s cannot be started: %s", program, error.strerror)
        else:
            try:
                async for lines in _lines(process, program):
                    yield lines
                status = await process.wait()
            finally:
                await _end(process)
            log.warning("the command %s ended with status %d", program, status)
            yield [status]
        pause = FIRST_PAUSE if loop.time() - begun > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
        await asyncio.sleep(pause)


async def _lines(process: asyncio.subprocess.Process, program: str) -> AsyncIterator[list[Line | int]]:
    assert process.stdout is not None
    held = b""
    while True:
        data = await process.stdout.read(READ)
        held += data
        end, lines = 0, list[Line | int]()
        for text, end_of_text, continued in split_lines(held, 0, final=not data):
            lines.append(Line(text.decode(errors="replace"), program, continued))
            end = end_of_text
        held = held[end:]
        if lines:
            yield lines
        if not data:
            return


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a command and its children, unless it has ended."""
    if process.returncode is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(TERMINATE_SECONDS):
                await process.communicate()
                return
