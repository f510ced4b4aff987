"""The command `streamlab task`: long tasks of a server, started and watched from a terminal."""

import asyncio
import json
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from . import http
from .follow import follow
from .terminal import exit_on_error, print_error, printable

T = TypeVar("T")

task = typer.Typer(help="Start, watch and cancel long tasks of a server.", no_args_is_help=True, rich_markup_mode=None)

Url = Annotated[str, typer.Option(help="The server; http:// may be left out.", metavar="URL")]
Id = Annotated[str, typer.Argument(help="The task's id.")]

LOCAL = "http://127.0.0.1:8000"


@task.command()
def run(
    kind: Annotated[str, typer.Argument(help="What to run; GET /process/kinds lists the kinds.")],
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="A parameter of it, as steps=10.", metavar="NAME=VALUE")
    ] = None,
    url: Url = LOCAL,
) -> None:
    """Start a task, watch it to its end, and print its result as JSON. Ctrl-C leaves it running."""
    asked = {"kind": kind, "parameters": _parameters(param or ())}
    started = _finished(http.request_json("POST", _tasks(url), asked))
    _finished(_watch(_tasks(url, started["id"])))


@task.command()
def watch(id: Id, url: Url = LOCAL) -> None:  # noqa: A002
    """Watch a task to its end, and print its result as JSON. Ctrl-C leaves it running."""
    _finished(_watch(_tasks(url, id)))


@task.command()
def cancel(id: Id, url: Url = LOCAL) -> None:  # noqa: A002
    """Cancel a task, and watch it end."""
    _finished(http.request_json("DELETE", _tasks(url, id)))
    _finished(_watch(_tasks(url, id), wanted="cancelled"))


def _tasks(url: str, *id: str) -> str:  # noqa: A002
    return "/".join((url.rstrip("/"), "process/tasks", *id))


def _parameters(given: Sequence[str]) -> dict[str, Any]:
    """`steps=10` as a number, `path=a.bin` as text; a name that is given twice has a list."""
    values: dict[str, list[Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            print_error(f"streamlab: {text!r} is no NAME=VALUE")
            raise typer.Exit(2)
        try:
            values.setdefault(name, []).append(json.loads(value))
        except ValueError:
            values.setdefault(name, []).append(value)
    return {name: several if len(several) > 1 else several[0] for name, several in values.items()}


def _finished(work: Coroutine[Any, Any, T]) -> T:
    """Run a request as `exit_on_error` does; rejected parameters count as invalid arguments."""
    with exit_on_error():
        try:
            return asyncio.run(work)
        except http.RequestRejected as refused:
            if refused.status == 422:
                raise ValueError(str(refused)) from None
            raise


async def _watch(url: str, *, wanted: str = "done") -> None:
    """Show a task until it is over, however often the connection is lost; leave with 1 if it does not end as wanted.

    The bar and what the task says go to stderr, the result to stdout.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[figures]}")
    end: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("queued", total=None, figures="")

        def note(text: str) -> None:
            console.print(escape(printable(text)), highlight=False)

        async with aclosing(follow(url, on_pause=lambda pause: note(str(pause)))) as events:
            async for event in events:
                told = json.loads(event.data)
                if event.event == "message":
                    note(told["message"])
                elif event.event == "progress":
                    _show(bar, shown, told)
                elif event.event == "end":
                    end = told
                    _show(bar, shown, told)
    if end.get("result") is not None:
        print(json.dumps(end["result"], ensure_ascii=False, indent=1))
    if (state := end.get("state", "lost: it was over before")) != wanted:
        error = end.get("error") or {}
        print_error(f"streamlab: the task is {state}{': ' if error else ''}{error.get('detail', '')}")
        raise typer.Exit(1)


def _show(bar: Progress, shown: TaskID, told: dict[str, Any]) -> None:
    total = told["total"]
    figures = f"{told['done']:,}{'' if total is None else f'/{total:,}'} {told['unit']}"
    if told["rate"] is not None:
        figures += f"  {told['rate']:,.4g}/s"
    if told["eta_seconds"] is not None:
        figures += f"  {told['eta_seconds']:.0f} s left"
    description = printable(f"{told['kind']}: {told['message'] or told['state']}")
    bar.update(shown, description=escape(description), completed=told["done"], total=total, figures=figures)
