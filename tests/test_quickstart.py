"""The quick start works as it is written: its plugin, its file, its database and its upstream, on one server."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.docs import PAGES, blocks
from tests.support.fake_upstream import DONE, FINISH, USED, Exchange, event, fake_upstream
from tests.support.servers import REPOSITORY, Running

PAGE = PAGES["docs/quickstart.md"]

STEPS = re.findall(r"^```sh\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", PAGE, re.DOTALL | re.MULTILINE)
"""The commands of the page, each with its output, if the page shows it."""


def run(command: str, folder: Path) -> str:
    """Run a command in a folder, as a reader does in a shell; return its output."""
    command = command.replace(".venv/bin/python", sys.executable).replace("curl ", "curl -sS -f ")
    done = subprocess.run(["bash", "-ec", command], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), command
    return done.stdout


@pytest.mark.timeout(120)
def test_every_step_works_and_prints_what_the_page_shows(start: Callable[..., Running], tmp_path: Path) -> None:
    def respond(exchange: Exchange) -> None:
        exchange.respond(event("Good "), event("day."), FINISH, USED, DONE)

    for command, _ in STEPS:
        if "curl" not in command:
            run(command, tmp_path)
    (plugin,) = blocks("docs/quickstart.md", "python")
    (table,) = blocks("docs/quickstart.md", "toml")
    variables = dict(re.findall(r"^    export (\w+)=(.*)$", PAGE, re.MULTILINE))
    assert len(variables) == 4
    with fake_upstream({"Hello": respond}) as upstream:
        variables["STREAMLAB_SCENARIOS__LLM__URL"] = upstream.url
        server = start((REPOSITORY / "config.toml").read_text() + table, environ=variables, squares=plugin)
        shown = 0
        for command, output in STEPS:
            if "curl" in command:
                printed = run(command.replace("http://127.0.0.1:8000", server.url), tmp_path)
                assert not output or printed.replace("\r\n", "\n") == output, command
                shown += bool(output)
        assert shown == 3
        assert printed == "Good day."


def test_plugin_has_25_lines_of_code() -> None:
    (plugin,) = blocks("docs/quickstart.md", "python")
    assert len([line for line in plugin.splitlines() if line]) <= 25
