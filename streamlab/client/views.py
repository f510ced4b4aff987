"""The toolbox of terminal views: questions, lines, live tables, progress bars and streams of a server.

Questions use plain `input`, so that the replies may come through a pipe. Where stdout is a terminal, views draw live;
elsewhere they print plain lines.
"""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from rich.console import Console
from rich.text import Text

from .follow import follow
from .http import request_json
from .terminal import one_line, print_error

if TYPE_CHECKING:
    from rich.table import Table

DRAWINGS_PER_SECOND = 8
"""Refresh rate of live tables, in drawings per second."""

LISTING_SECONDS = 120.0
"""Timeout of a list request, in seconds: a server may create its sample data first."""


class EndOfInput(Exception):
    """The input ended at a question."""


class ViewError(Exception):
    """A view cannot continue; the message is shown in one line."""


# -- questions


def prompt(question: str, default: str = "", hint: str = "") -> str:
    """Return the reply to a question; for an empty one `default`, which is displayed as `hint`.

    Raises EndOfInput, and KeyboardInterrupt.
    """
    shown = f" [{hint or default}]" if hint or default else ""
    try:
        reply = input(f"{question}{shown}: ").strip()
    except EOFError:
        raise EndOfInput from None
    if not sys.stdin.isatty():
        print(reply)  # a pipe does not echo
    return reply or default


def prompt_number(question: str, default: int | None, hint: str = "") -> int | None:
    """Return a positive integer, or `default`; repeat the question until the reply is valid."""
    while reply := prompt(question, "" if default is None else str(default), hint):
        if reply.isascii() and reply.isdigit() and 0 < int(reply) < 10**12:
            return int(reply)
        print_error(f"{reply!r} is not a positive integer")
    return default


def prompt_file(default: str) -> Path:
    """Return a file to write: a new one, or one that may be overwritten."""
    while True:
        path = Path(prompt("output file", default)).expanduser()
        if path.is_dir():
            print_error(f"{path} is a folder")
        elif not path.exists() or prompt(f"{path} exists; overwrite", "no").lower() in ("y", "yes"):
            return path


def prompt_choice(names: Sequence[str], default: str) -> str:
    """Return one of the names that a server offers: `default` is preselected if it is among them."""
    return prompt(f"which of {', '.join(names)}", default if default in names else names[0] if names else "")


# -- the terminal


@dataclass
class Terminal:
    """The server that a view shows, and the terminal that it is shown on."""

    url: str
    """The address of the server."""
    console: Console = field(default_factory=lambda: Console(highlight=False, emoji=False, markup=False))

    def print(self, text: str | Text = "", style: str = "") -> None:
        """Print one line of any length."""
        self.console.print(text if isinstance(text, Text) else Text(text), style=style or None, soft_wrap=True)

    def note(self, what: object) -> None:
        """Print a line about the stream: above a live table, or on stderr."""
        if self.console.is_terminal:
            self.print(one_line(str(what)), style="dim")
        else:
            print_error(str(what))

    @asynccontextmanager
    async def live(self, draw: Callable[[], "Table"]) -> AsyncGenerator[None, None]:
        """Refresh the table that `draw` returns while the block runs; does nothing where stdout is not a terminal."""
        if not self.console.is_terminal:
            yield
            return
        from rich.live import Live

        with Live(console=self.console, auto_refresh=False, vertical_overflow="crop") as live:

            async def refresh() -> None:
                while True:
                    live.update(draw(), refresh=True)
                    await asyncio.sleep(1 / DRAWINGS_PER_SECOND)

            refreshing = asyncio.create_task(refresh())  # not in a TaskGroup, which would wrap what the block raises
            try:
                yield
            finally:
                refreshing.cancel()
                await asyncio.wait({refreshing})
                live.update(draw(), refresh=True)

    @contextmanager
    def progress_bar(self, name: str, *columns: Any, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Yield a function that updates a bar: `completed=`, `total=` and fields of the columns."""
        from rich.progress import BarColumn, Progress, TextColumn

        text = TextColumn("{task.description}", markup=False)
        with Progress(text, BarColumn(), *columns, console=self.console, disable=not self.console.is_terminal) as bar:
            yield partial(bar.update, bar.add_task(one_line(name), total=total, rows=""))

    # -- requests

    def fetch_names(self, path: str, key: str, name: str) -> list[str]:
        """Return the member `name` of each object of the list `key` in the JSON document at `path`."""
        document = asyncio.run(request_json("GET", f"{self.url}{path}", timeout=LISTING_SECONDS))
        try:
            return [one_line(str(member[name])) for member in document[key]]
        except (KeyError, TypeError):
            raise ViewError(f"{self.url}{path} does not list {key}") from None

    async def events(
        self, path: str, query: Mapping[str, object], *, reconnect: bool = True
    ) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Yield the name and the JSON object of each event of a stream; omit parameters that are None or empty.

        Reconnects are noted. Without them, an event `error` is raised as ViewError.
        """
        url = url_with_query(f"{self.url}{path}", query)
        async with aclosing(follow(url, reconnect=reconnect, on_pause=self.note)) as events:
            async for event in events:
                try:
                    data = json.loads(event.data)
                except ValueError:
                    data = None
                if not isinstance(data, dict):
                    raise ViewError(f"invalid event of {path}: {event.data[:200]}")
                if event.event == "error" and not reconnect:
                    raise ViewError(describe_event(event.event, data))
                yield event.event, data


def url_with_query(url: str, query: Mapping[str, object]) -> str:
    """Return a URL with the parameters that are neither None nor empty."""
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{url}?{urlencode(given)}" if given else url


def describe_event(name: str, data: Mapping[str, Any]) -> str:
    """Return an event about the stream itself (`gap`, `stop`, `error`) as one line."""
    if name == "gap":
        return f"gap: {data.get('missing') or 'some'} events are no longer retained"
    return f"{name}: {data.get('detail') or json.dumps(data, ensure_ascii=False)}"
