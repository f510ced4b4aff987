"""The terminal view `logs`: the lines of a log file, filtered by level and pattern."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing

from streamlab import hookimpl
from streamlab.client import Terminal, describe_event, printable, prompt, prompt_number

LEVEL_STYLES = {"DEBUG": "dim", "INFO": "", "WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold white on red"}


def show_logs(terminal: Terminal) -> None:
    """Lines of a log, by level and pattern."""
    source = prompt("log", hint="the first")
    level = prompt("minimum level: DEBUG, INFO, WARNING, ERROR or CRITICAL", hint="all").upper()
    grep = prompt("only lines that match", hint="all")
    limit = prompt_number("lines", None, hint="until Ctrl-C")
    query = {"source": source, "level": level, "grep": grep, "limit": limit}
    asyncio.run(_follow_lines(terminal, query, limit))


async def _follow_lines(terminal: Terminal, query: Mapping[str, object], limit: int | None) -> None:
    count = 0
    async with aclosing(terminal.events("/stream/live-logs", query)) as events:
        async for name, line in events:
            if name == "message":
                style = LEVEL_STYLES.get(str(line.get("level")), "")
                terminal.print(printable(str(line.get("line"))), style=style)
            else:
                terminal.note(describe_event(name, line))
            count += 1
            if count == limit:
                return


@hookimpl
def register_views() -> Mapping[str, Callable[[Terminal], None]]:
    """Provide the view `logs`."""
    return {"logs": show_logs}
