"""Terminal output of the commands: print events, escape control characters, map errors to exit codes."""

import asyncio
import fcntl
import os
import re
import stat
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Annotated

import typer

from streamlab.config import URL_VARIABLE

from .credentials import use_server
from .http import RequestRejected
from .sse import Event

LOCAL_URL = "http://127.0.0.1:8000"
"""Address of a server with the default configuration on this machine."""


def _use_server(url: str) -> str:
    use_server(url)
    return url


UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        envvar=URL_VARIABLE,
        help="Request this server; http:// is optional.",
        metavar="URL",
        callback=_use_server,
    ),
]
"""The option `--url` of a command that requests a server; its default is in STREAMLAB_URL, else it is `LOCAL_URL`."""


def printable(text: str, pattern: str = r"[\0-\x08\x0b-\x1f\x7f-\x9f]") -> str:
    """Return a text with the control characters that a terminal would execute escaped, as `\\x1b`."""
    return re.sub(pattern, lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(text: str) -> str:
    """Return a text with every control character escaped, line breaks and tabs included."""
    return printable(text, r"[\0-\x1f\x7f-\x9f]")


def print_error(text: str) -> None:
    """Print one line on stderr."""
    typer.echo(one_line(text), err=True)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit a command with one line on stderr when the block raises an error.

    The status is 2 for invalid arguments (ValueError), 1 for a request that is rejected or a server that is
    unreachable (RequestRejected, OSError), 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except ValueError as error:
        print_error(f"streamlab: {error}")
        raise typer.Exit(2) from None
    except (RequestRejected, OSError) as error:
        print_error(f"streamlab: {error}")
        raise typer.Exit(1) from None


async def print_events(events: AsyncGenerator[Event, None], limit: int | None, *, ids: bool = False) -> None:
    """Print the data of each event, after its name if any; cancel this task when the reader of the pipe exits.

    With `ids`, each line begins with the id of its event and a tab.
    """
    output, is_terminal = sys.stdout.fileno(), sys.stdout.isatty()
    _cancel_when_pipe_breaks(output)
    count = 0
    async with aclosing(events):
        async for event in events:
            text = event.data if event.event == "message" else f"{event.event}: {event.data}"
            text = f"{event.id}\t{text}" if ids else text
            if is_terminal:
                line = (printable(text) + "\n").encode(sys.stdout.encoding, "backslashreplace")
            else:
                line = text.encode() + b"\n"
            while line:  # not to sys.stdout: its buffer would be flushed into a broken pipe at exit
                written = os.write(output, line)
                line = line[written:]
            count += 1
            if count == limit:
                break


def _cancel_when_pipe_breaks(output: int) -> None:
    """Cancel this task when the reader of a pipe exits; without this, only the next write would detect it."""
    task, access = asyncio.current_task(), fcntl.fcntl(output, fcntl.F_GETFL) & os.O_ACCMODE
    if task is not None and access == os.O_WRONLY and stat.S_ISFIFO(os.fstat(output).st_mode):
        # The write end of a pipe becomes readable when its reader exits.
        asyncio.get_running_loop().add_reader(output, task.cancel)
