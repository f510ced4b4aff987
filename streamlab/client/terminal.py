"""What a command tells its terminal: a server's words, but nothing it would act upon; and why it leaves."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .http import Refused


def printable(text: str, pattern: str = r"[\0-\x08\x0b-\x1f\x7f-\x9f]") -> str:
    """A text without the control characters that a terminal would act upon; each is shown as `\\x1b`."""
    return re.sub(pattern, lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(text: str) -> str:
    """The same, with its line breaks and tabs shown as well."""
    return printable(text, r"[\0-\x1f\x7f-\x9f]")


def say(text: str) -> None:
    """One line on stderr."""
    typer.echo(one_line(text), err=True)


@contextmanager
def leaving() -> Iterator[None]:
    """Leave as every command does that asks a server, saying why in one line.

    With 2 where the call is wrong, with 1 where a server refuses or is not there, with 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except ValueError as error:
        say(f"streamlab: {error}")
        raise typer.Exit(2) from None
    except (Refused, OSError) as error:
        say(f"streamlab: {error}")
        raise typer.Exit(1) from None
