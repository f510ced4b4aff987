"""What a terminal is told, though a server has worded it: nothing that it would act upon."""

import re

import typer


def printable(text: str, pattern: str = r"[\0-\x08\x0b-\x1f\x7f-\x9f]") -> str:
    """A text without the control characters that a terminal would act upon; each is shown as `\\x1b`."""
    return re.sub(pattern, lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(text: str) -> str:
    """The same, with its line breaks and tabs shown as well."""
    return printable(text, r"[\0-\x1f\x7f-\x9f]")


def say(text: str) -> None:
    """One line on stderr."""
    typer.echo(one_line(text), err=True)
