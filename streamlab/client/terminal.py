"""Terminal output of the commands: escape control characters, map errors to exit codes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from .http import RequestRejected

LOCAL_URL = "http://127.0.0.1:8000"
"""Address of a server with the default configuration on this machine."""

UrlOption = Annotated[str, typer.Option("--url", help="The server; http:// is optional.", metavar="URL")]
"""The option `--url` of a command that requests a server."""


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
