"""The command and view `task`: long tasks of a server, listed, started and watched from a terminal."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from streamlab import hookimpl
from streamlab.client import (
    LOCAL_URL,
    RequestRejected,
    Terminal,
    UrlOption,
    exit_on_error,
    follow,
    one_line,
    print_error,
    printable,
    prompt,
    prompt_choice,
    request_json,
)

T = TypeVar("T")

Id = Annotated[str, typer.Argument(help="The id of the task; `task list` prints them.", metavar="ID")]

FAILURES = "the server is unreachable or rejects the request; 2 for invalid arguments; 130 after Ctrl-C."
LISTED = f"Exit status: 0; 1 if {FAILURES}"
WATCHED = f"Exit status: 0 if the task is done; 1 if it is not, or {FAILURES}"
CANCELLED = f"Exit status: 0 if the task was cancelled; 1 if it had ended before, or {FAILURES}"

commands = typer.Typer(
    help="List, start, watch and cancel long tasks.",
    epilog="""Example: streamlab task run report --param steps=10

    Exit status: that of the command; `streamlab task COMMAND --help` has it.""",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@commands.command("list", epilog=f"Example: streamlab task list --limit 10\n\n{LISTED}")
def list_tasks(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="List at most N tasks.", metavar="N")] = 100,
    url: UrlOption = LOCAL_URL,
) -> None:
    """List the stored tasks, newest first."""
    page = _complete(request_json("GET", f"{_task_url(url)}?limit={limit}"))
    rows = [(task["id"], task["kind"], task["state"], _amount(task), task["created"]) for task in page["tasks"]]
    _print_table(("id", "kind", "state", "progress", "created"), rows)
    if page["next"]:
        print_error(f"streamlab: there are more; these are the newest {limit}")


@commands.command("kinds", epilog=f"Example: streamlab task kinds\n\n{LISTED}")
def list_kinds(url: UrlOption = LOCAL_URL) -> None:
    """List the kinds of tasks, with their parameters.

    Those in brackets are optional, with their default, or else their type.
    """
    kinds = _complete(request_json("GET", f"{url.rstrip('/')}/process/kinds"))["kinds"]
    rows = [(kind["kind"], _signature(kind["parameters"]), kind["description"].partition("\n")[0]) for kind in kinds]
    _print_table(("kind", "parameters", "description"), rows)


@commands.command(epilog=f"Example: streamlab task run report --param steps=10\n\n{WATCHED}")
def run(
    kind: Annotated[str, typer.Argument(help="The kind of task; `task kinds` prints them.", metavar="KIND")],
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", help="Set a parameter, as steps=10; may be repeated.", metavar="NAME=VALUE"),
    ] = None,
    url: UrlOption = LOCAL_URL,
) -> None:
    """Start a task, watch it, and print its result as JSON.

    Ctrl-C leaves it running.
    """
    body = {"kind": kind, "parameters": _parameters(param or ())}
    task = _complete(request_json("POST", _task_url(url), body))
    _complete(_watch(_task_url(url, task["id"])))


@commands.command(epilog=f"Example: streamlab task watch ID\n\n{WATCHED}")
def watch(id: Id, url: UrlOption = LOCAL_URL) -> None:  # noqa: A002
    """Watch a task to its end, and print its result as JSON.

    Ctrl-C leaves it running.
    """
    _complete(_watch(_task_url(url, id)))


@commands.command(epilog=f"Example: streamlab task cancel ID\n\n{CANCELLED}")
def cancel(id: Id, url: UrlOption = LOCAL_URL) -> None:  # noqa: A002
    """Cancel a task, and watch it end."""
    _complete(request_json("DELETE", _task_url(url, id)))
    _complete(_watch(_task_url(url, id), expected="cancelled"))


def _task_url(url: str, *id: str) -> str:  # noqa: A002
    return "/".join((url.rstrip("/"), "process/tasks", *id))


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts below their titles, in columns that are as wide as their widest cell."""
    cells = [[one_line(text) for text in row] for row in (titles, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _signature(schema: Mapping[str, Any]) -> str:
    """Return the parameters of a JSON Schema: `path=STRING [steps=100] [fail_at=INTEGER]`."""
    required = schema.get("required", ())
    texts = [f"{name}={_sample(parameter)}" for name, parameter in schema.get("properties", {}).items()]
    names = [text.partition("=")[0] for text in texts]
    return " ".join(text if name in required else f"[{text}]" for name, text in zip(names, texts, strict=True))


def _sample(parameter: Mapping[str, Any]) -> str:
    """Return the default of a parameter, or else its type in capitals."""
    default = parameter.get("default")
    if default is not None:
        return default if isinstance(default, str) else json.dumps(default)
    types = [choice.get("type") for choice in (parameter, *parameter.get("anyOf", ()))]
    return next((str(kind).upper() for kind in types if kind not in (None, "null")), "VALUE")


def _parameters(options: Sequence[str]) -> dict[str, Any]:
    """Parse `steps=10` as a number, `path=a.bin` as text; a name that is repeated has a list."""
    values: dict[str, list[Any]] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals:
            print_error(f"streamlab: {text!r} is not NAME=VALUE")
            raise typer.Exit(2)
        try:
            values.setdefault(name, []).append(json.loads(value))
        except ValueError:
            values.setdefault(name, []).append(value)
    return {name: several if len(several) > 1 else several[0] for name, several in values.items()}


def _complete(work: Coroutine[Any, Any, T]) -> T:
    """Run a request as `exit_on_error` does; rejected parameters count as invalid arguments."""
    with exit_on_error():
        try:
            return asyncio.run(work)
        except RequestRejected as rejected:
            if rejected.status == 422:
                raise ValueError(str(rejected)) from None
            raise


async def _watch(url: str, *, expected: str = "done") -> None:
    """Show a task until its end, across any number of connections; exit with 1 if it ends otherwise than expected.

    The bar and the messages of the task go to stderr, the result to stdout.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[figures]}")
    end: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task("queued", total=None, figures="")

        def note(text: str) -> None:
            console.print(escape(printable(text)), highlight=False)

        async with aclosing(follow(url, on_pause=lambda pause: note(str(pause)))) as events:
            async for event in events:
                data = json.loads(event.data)
                if event.event == "message":
                    note(data["message"])
                elif event.event == "progress":
                    _show(bar, row, data)
                elif event.event == "end":
                    end = data
                    _show(bar, row, data)
    if end.get("result") is not None:
        print(json.dumps(end["result"], ensure_ascii=False, indent=1))
    if (state := end.get("state", "unknown: its stream had ended before")) != expected:
        error = end.get("error") or {}
        print_error(f"streamlab: the task is {state}{': ' if error else ''}{error.get('detail', '')}")
        raise typer.Exit(1)


def _amount(task: Mapping[str, Any]) -> str:
    """Return how much of a task is done: `3/10 steps`."""
    total = task["total"]
    return f"{task['done']:,}{'' if total is None else f'/{total:,}'} {task['unit']}".rstrip()


def _show(bar: Progress, row: TaskID, task: dict[str, Any]) -> None:
    total, figures = task["total"], _amount(task)
    if task["rate"] is not None:
        figures += f"  {task['rate']:,.4g}/s"
    if task["eta_seconds"] is not None:
        figures += f"  {task['eta_seconds']:.0f} s left"
    description = printable(f"{task['kind']}: {task['message'] or task['state']}")
    bar.update(row, description=escape(description), completed=task["done"], total=total, figures=figures)


def show_task(terminal: Terminal) -> None:
    """A long task, with a progress bar; Ctrl-C leaves it running."""
    kind = prompt_choice(terminal.fetch_names("/process/kinds", "kinds", "kind"), "report")
    parameters = prompt("parameters, for example steps=50", hint="none")
    run(kind, parameters.split(), terminal.url)


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the command `task` with its subcommands."""
    cli.add_typer(commands, name="task")


@hookimpl
def register_views() -> Mapping[str, Callable[[Terminal], None]]:
    """Provide the view `task`."""
    return {"task": show_task}
