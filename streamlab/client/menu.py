"""The command `streamlab client`: a menu of what a server streams, each stream as a terminal shows it best.

Questions are asked by plain `input`, so that answers may come through a pipe. Where stdout is a terminal, views draw
live; elsewhere they print plain lines. Ctrl-C ends a view and leads back to the menu, and there it leaves.
"""

import asyncio
import io
import json
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from . import http, tasks
from .chat import ChatError, Conversation
from .follow import Pause, follow
from .terminal import one_line, print_error, printable
from .transfer import IntegrityError, TransferProgress, download, export

DRAWINGS_PER_SECOND = 8

RATE_SECONDS = 5.0
"""The time over which events a second are counted."""

LISTING_SECONDS = 120.0
"""A server may first make what it lists: the sample database has a million users."""

LEVEL_STYLES = {"DEBUG": "dim", "INFO": "", "WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold white on red"}

BAR_CELLS = 30


class _Leave(Exception):
    """The answers have come to their end."""


class _Failed(Exception):
    """What a view says when it cannot go on."""


FAILURES = (_Failed, IntegrityError, ChatError, http.RequestRejected, ValueError, OSError)
"""Everything that ends a view with one line."""


def run(url: str, names: Sequence[str] = ()) -> int:
    """Open the views called `names`, or else the menu, for the server at `url`; return the exit status.

    0 when it was left, or its input ended; 1 where the server is not there, or a named view failed; 2 for what is no
    URL or no view; 130 after Ctrl-C outside of a view.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show what servers send
    menu = _Menu(url.rstrip("/"))
    if unknown := [name for name in names if name not in VIEWS]:
        print_error(f"streamlab: there is no view {unknown[0]!r}; there are {', '.join(VIEWS)}")
        return 2
    try:
        menu.reach()
        if names:
            ended_well = [menu.open(name) for name in names]
            return int(not all(ended_well))
        menu.choose()
    except _Leave:
        print()
    except KeyboardInterrupt:
        print()
        return 130
    except ValueError as error:
        print_error(f"streamlab: {error}")
        return 2
    except http.ConnectionLost as lost:
        print_error(f"streamlab: {lost}")
        return 1
    return 0


# -- asking


def ask(question: str, default: str = "", shown: str = "") -> str:
    """The answer to a question, or `default`, which is shown as `shown`, for an empty one.

    Raises _Leave at the end of the input, and KeyboardInterrupt.
    """
    hint = f" [{shown or default}]" if shown or default else ""
    try:
        answer = input(f"{question}{hint}: ").strip()
    except EOFError:
        raise _Leave from None
    if not sys.stdin.isatty():
        print(answer)  # so that what a pipe answers can be read, too
    return answer or default


def ask_number(question: str, default: int | None, shown: str = "") -> int | None:
    """A whole number from 1 on, asked for until it is one; or `default`."""
    while answer := ask(question, "" if default is None else str(default), shown):
        if answer.isascii() and answer.isdigit() and 0 < int(answer) < 10**12:
            return int(answer)
        print_error("a whole number from 1 on, please")
    return default


def ask_file(default: str) -> Path:
    """A file to write, which is not there yet or may be replaced."""
    while True:
        path = Path(ask("into the file", default)).expanduser()
        if path.is_dir():
            print_error(f"{path} is a folder")
        elif not path.exists() or ask(f"{path} is there already; replace it", "no").lower() in ("y", "yes"):
            return path


def _one_of(names: Sequence[str], usual: str) -> str:
    """Which of what a server offers is meant: the usual, where it has that."""
    return ask(f"which of {', '.join(names)}", usual if usual in names else names[0] if names else "")


@dataclass
class _Menu:
    """The server that is looked at, and the terminal it is shown on."""

    url: str
    console: Console = field(default_factory=lambda: Console(highlight=False, emoji=False, markup=False))

    def reach(self) -> None:
        """Raise Lost where there is no server, and ValueError where the URL is none."""
        with suppress(http.RequestRejected):  # one that is not well, or has no such route, is there
            asyncio.run(http.request_json("GET", f"{self.url}/health"))

    def choose(self) -> None:
        """Ask for a view and open it, until that is to leave."""
        while True:
            self.print()
            for number, (name, view) in enumerate(VIEWS.items(), start=1):
                self.print(f"  {number}  {name:<11} {view.__doc__}")
            self.print(f"  {len(VIEWS) + 1}  quit")
            names = [*VIEWS, "quit"]
            while True:
                answer = ask("what").lower()
                if answer.isascii() and answer.isdigit() and 0 < int(answer) <= len(names):
                    answer = names[int(answer) - 1]
                meant = [name for name in names if answer and name.startswith(answer)]
                if len(meant) == 1:
                    break
                if answer:
                    print_error(f"there is no {answer!r} here")
            if meant[0] == "quit":
                return
            self.open(meant[0])

    def open(self, name: str) -> bool:
        """Ask what a view needs to know and show it; whether it ended well, or by Ctrl-C."""
        try:
            self.reach()
            VIEWS[name](self)
        except KeyboardInterrupt:
            self.print("\n[stopped]")
        except typer.Exit as left:  # of a command that says itself what is wrong
            return left.exit_code in (0, 130)
        except FAILURES as error:
            print_error(f"streamlab: {error}")
            return False
        return True

    # -- showing

    def print(self, text: str | Text = "", style: str = "") -> None:
        """One line, however long it is."""
        self.console.print(text if isinstance(text, Text) else Text(text), style=style or None, soft_wrap=True)

    def note(self, what: object) -> None:
        """Say something beside the stream: above what is drawn, or on stderr."""
        if self.console.is_terminal:
            self.print(one_line(str(what)), style="dim")
        else:
            print_error(str(what))

    @asynccontextmanager
    async def drawing(self, draw: Callable[[], Table]) -> AsyncGenerator[None, None]:
        """Draw again and again while the block runs, where that is possible."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False, vertical_overflow="crop") as live:

            async def again() -> None:
                while True:
                    live.update(draw(), refresh=True)
                    await asyncio.sleep(1 / DRAWINGS_PER_SECOND)

            drawing = asyncio.create_task(again())  # not in a TaskGroup, which would wrap what the block raises
            try:
                yield
            finally:
                drawing.cancel()
                await asyncio.wait({drawing})  # nobody else draws from here on
                live.update(draw(), refresh=True)

    @contextmanager
    def moving(self, name: str, *columns: Any, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Lend a function that moves a bar: `completed=`, `total=` and fields of the columns."""
        text = TextColumn("{task.description}", markup=False)
        with Progress(text, BarColumn(), *columns, console=self.console, disable=not self.console.is_terminal) as bar:
            yield partial(bar.update, bar.add_task(one_line(name), total=total, rows=""))

    # -- reading

    def listed(self, path: str, key: str, name: str) -> list[str]:
        """What the server offers at `path`: of each member of the list `key`, its `name`."""
        document = asyncio.run(http.request_json("GET", f"{self.url}{path}", timeout=LISTING_SECONDS))
        try:
            return [one_line(str(member[name])) for member in document[key]]
        except (KeyError, TypeError):
            raise _Failed(f"{self.url}{path} does not list {key}") from None

    async def told(
        self, path: str, query: Mapping[str, object], *, reconnect: bool = True
    ) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """The name and the JSON object of each event of a stream; parameters that are None or empty are left out.

        Reconnects are noted. Where there are none, an event `error` is raised as _Failed.
        """
        url = _address(f"{self.url}{path}", query)
        async with aclosing(follow(url, reconnect=reconnect, on_pause=self.note)) as events:
            async for event in events:
                try:
                    told = json.loads(event.data)
                except ValueError:
                    told = None
                if not isinstance(told, dict):
                    raise _Failed(f"this is no event of {path}: {event.data[:200]}")
                if event.event == "error" and not reconnect:
                    raise _Failed(_aside(event.event, told))
                yield event.event, told


def _address(url: str, query: Mapping[str, object]) -> str:
    """A URL with the parameters that are neither None nor empty."""
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{url}?{urlencode(given)}" if given else url


# -- the views


def show_download(menu: _Menu) -> None:
    """Download a file, with a bar; one that broke off goes on where it stopped."""
    path = ask("which", "/download/large-file")
    target = ask_file(Path(path.partition("?")[0]).name or "download.bin")
    counted = DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    begun: list[float] = []
    with menu.moving(target.name, *counted) as move:

        def show(moving: TransferProgress) -> None:
            if not begun and moving.resumed_at:
                of = f" of {moving.total:,}" if moving.total is not None else ""
                menu.note(f"goes on at byte {moving.resumed_at:,}{of}")
            if not begun:
                begun.append(time.monotonic())
            move(completed=moving.done, total=moving.total)

        def pause(pause: Pause) -> None:
            menu.note(pause)
            begun.clear()

        url = f"{menu.url}/{path.removeprefix('/')}"
        proof = asyncio.run(download(url, target, on_progress=show, on_pause=pause))
    menu.print(one_line(f"{target}: {target.stat().st_size:,} bytes, whole by its {proof}"))


def show_ticker(menu: _Menu) -> None:
    """Prices, live."""
    symbols = ask("symbols, as AAPL,MSFT", shown="all")
    limit = ask_number("events", None, shown="until Ctrl-C")
    asyncio.run(_tick(menu, symbols, limit))


async def _tick(menu: _Menu, symbols: str, limit: int | None) -> None:
    prices: dict[str, dict[str, Any]] = {}
    times: deque[float] = deque()

    def draw() -> Table:
        now = time.monotonic()
        while times and times[0] < now - RATE_SECONDS:
            times.popleft()
        rate = len(times) / min(RATE_SECONDS, max(now - started, 1.0))
        table = Table(title=f"{len(prices):,} symbols, {rate:,.1f} events/s", title_justify="left")
        table.add_column("symbol")
        for column in ("price", "change"):
            table.add_column(column, justify="right")
        table.add_column("time")
        room = max(menu.console.height - 6, 1)
        recent = sorted(prices, key=lambda symbol: str(prices[symbol].get("time")))[-room:]
        for symbol in sorted(recent):
            table.add_row(*_price(prices[symbol]))
        return table

    started, count = time.monotonic(), 0
    async with (
        menu.drawing(draw),
        aclosing(menu.told("/stream/stock-ticker", {"symbols": symbols, "limit": limit})) as events,
    ):
        async for name, told in events:
            if name != "message":
                menu.note(_aside(name, told))
                continue
            if menu.console.is_terminal:
                prices[str(told.get("symbol"))] = told
                times.append(time.monotonic())
            else:
                menu.print(Text(" ").join(_price(told)))
            count += 1
            if count == limit:
                return  # counted here, too: a connection that comes after another is given the limit anew


def _price(told: dict[str, Any]) -> tuple[Text, Text, Text, Text]:
    """Symbol, price, change and time of an event, as a terminal shows them."""
    change = told.get("change")
    moved = change if isinstance(change, int | float) else 0
    style = "green" if moved > 0 else "red" if moved < 0 else ""
    shown = f"{change:+g}" if isinstance(change, int | float) else "-"
    symbol, price, moment = (one_line(str(told.get(name))) for name in ("symbol", "price", "time"))
    return Text(symbol), Text(price), Text(shown, style=style), Text(moment)


def _aside(name: str, told: dict[str, Any]) -> str:
    """What a stream says about itself, in a line."""
    if name == "gap":
        return f"gap: {told.get('missing') or 'some'} events are not kept any more"
    return f"{name}: {told.get('detail') or json.dumps(told, ensure_ascii=False)}"


def show_logs(menu: _Menu) -> None:
    """Lines of a log, by level and pattern."""
    source = ask("log", shown="the first there is")
    level = ask("level and above: DEBUG, INFO, WARNING, ERROR or CRITICAL", shown="all").upper()
    grep = ask("only lines that match", shown="all")
    limit = ask_number("lines", None, shown="until Ctrl-C")
    asyncio.run(_log(menu, {"source": source, "level": level, "grep": grep, "limit": limit}, limit))


async def _log(menu: _Menu, query: Mapping[str, object], limit: int | None) -> None:
    count = 0
    async with aclosing(menu.told("/stream/live-logs", query)) as events:
        async for name, told in events:
            if name == "message":
                menu.print(printable(str(told.get("line"))), style=LEVEL_STYLES.get(str(told.get("level")), ""))
            else:
                menu.note(_aside(name, told))
            count += 1
            if count == limit:
                return


def show_export(menu: _Menu) -> None:
    """Rows of a query, counted, into a file of CSV or JSON lines."""
    name = _one_of(menu.listed("/export", "exports", "name"), "users")
    limit = ask_number("rows", None, shown="all")
    target = ask_file(f"{name}.jsonl")
    if target.suffix not in (".csv", ".jsonl"):
        raise _Failed(f"{target} ends neither in .csv nor in .jsonl, which says what is written")
    proven = {"end": "true"} if target.suffix == ".jsonl" else {}
    url = _address(f"{menu.url}/export/{name}/{target.suffix.removeprefix('.')}", {"limit": limit, **proven})
    last, began = TransferProgress(), time.monotonic()
    columns = TextColumn("{task.fields[rows]}"), DownloadColumn(), TimeElapsedColumn()
    with menu.moving(target.name, *columns, total=limit) as move:

        def show(moving: TransferProgress) -> None:
            nonlocal last
            last = moving
            speed = moving.done / max(time.monotonic() - began, 0.001) / 1e6
            move(completed=moving.rows, rows=f"{moving.rows:,} rows {moving.done:,} bytes {speed:,.1f} MB/s")

        proof = asyncio.run(export(url, target, on_progress=show))
    seconds = time.monotonic() - began
    menu.print(
        one_line(
            f"{target}: {last.rows:,} rows, {last.done:,} bytes in {seconds:.1f} s"
            f" ({last.done / max(seconds, 0.001) / 1e6:,.1f} MB/s), whole by its {proof}"
        )
    )


def show_chat(menu: _Menu) -> None:
    """Talk with a model; an empty line ends it."""
    talk = Conversation(menu.url, max_tokens=ask_number("tokens of an answer at most", 200))
    while text := ask("you"):
        talk.tell(text)


def show_task(menu: _Menu) -> None:
    """A long task, with a bar; Ctrl-C leaves it running."""
    kind = _one_of(menu.listed("/process/kinds", "kinds", "kind"), "report")
    parameters = ask("parameters, as steps=50", shown="none")
    tasks.run(kind, parameters.split(), menu.url)


def show_comparison(menu: _Menu) -> None:
    """Buffered beside streamed, measured now, as bars."""
    rows = ask_number("rows", 20_000)
    repeats = ask_number("repeats", 1)
    asyncio.run(_compare(menu, rows, repeats))


async def _compare(menu: _Menu, rows: int | None, repeats: int | None) -> None:
    measured: list[dict[str, Any]] = []
    verdict, doing = "", "measuring"

    def draw() -> Table:
        return _bars(menu.console, measured, doing)

    # What was measured is told once: another connection would have it measured anew.
    report = menu.told("/demo/comparison/report", {"rows": rows, "repeats": repeats}, reconnect=False)
    async with menu.drawing(draw), aclosing(report) as events:
        async for name, told in events:
            if name == "measurement":
                measured.append(told)
            elif name == "progress":
                doing = str(told.get("message"))
                if not menu.console.is_terminal:
                    menu.note(doing)
            elif name == "end":
                verdict, doing = str(told.get("verdict")), "measured"
    if not menu.console.is_terminal:
        menu.console.print(draw())
    if not verdict:
        raise _Failed("the report ended before its end")
    menu.print(one_line(verdict))


def _bars(console: Console, measured: Sequence[dict[str, Any]], title: str) -> Table:
    """Both ways at each size: what they took, as numbers and as bars on one scale a column of numbers."""
    mark = "#" if console.options.ascii_only else "█"
    table = Table(title=Text(one_line(title)), title_justify="left", box=None, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("way")
    scales = (("ttfb_ms", "first byte", "ms"), ("total_ms", "total", "ms"), ("peak_rss_mb", "peak memory", "MB"))
    cells = max(4, min(BAR_CELLS, (console.width - 28) // len(scales) - 14))
    for _, heading, _ in scales:
        table.add_column(heading, no_wrap=True)
    for one in measured:
        row = [Text(f"{_number(one, 'rows'):,.0f}"), Text(one_line(str(one.get("way"))))]
        for name, _, unit in scales:
            most = max(_number(other, name) for other in measured) or 1.0
            value = _number(one, name)
            bar = mark * round(max(value, 0.0) / most * cells)
            row.append(Text(f"{value:9,.1f} {unit} ").append(bar, style="cyan" if one.get("way") == "streamed" else ""))
        table.add_row(*row)
    return table


def _number(told: dict[str, Any], name: str) -> float:
    value = told.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


VIEWS: dict[str, Callable[[_Menu], None]] = {
    "download": show_download,
    "ticker": show_ticker,
    "logs": show_logs,
    "export": show_export,
    "chat": show_chat,
    "task": show_task,
    "comparison": show_comparison,
}
