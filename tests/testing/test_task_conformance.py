"""The conformance suite of long tasks: what `streamlab new --task` writes passes, and each defect fails its case."""

import re
from pathlib import Path

import pytest

from streamlab import TASKS, Problem
from streamlab.config import Config
from streamlab.scaffold import write_plugin
from streamlab.server.app import create_app
from streamlab.testing.samples import MISSING
from streamlab.testing.task_form import form_of
from tests.support.pytest_runs import OPTIONS
from tests.support.servers import write_plugins

pytestmark = pytest.mark.usefixtures("forked_servers")

DEFECTS = r'''
"""Tasks with one defect each."""

import asyncio
import threading
import time
from typing import Annotated

from pydantic import Field

from streamlab import Progress, Task, hookimpl

Count = Annotated[int, Field(ge=1, le=1_000_000, examples=[4])]


children = []


async def steps(progress, count, first=1):
    for number in range(first, count + 1):
        await progress(number, count)
        await asyncio.sleep(0.02)


async def sound(progress: Progress, count: Count = 4) -> int:
    await steps(progress, count)
    return count


async def unbounded(progress: Progress, count: int = 4, word: str = "") -> None:
    await steps(progress, count)


async def decreases(progress: Progress, count: Count = 4) -> None:
    await steps(progress, count)
    await progress(1, count)


async def reports_nothing(progress: Progress, count: Count = 4) -> None:
    await asyncio.sleep(0.02)


async def ignores_cancellation(progress: Progress, count: Count = 4) -> None:
    try:
        await steps(progress, count)
    except asyncio.CancelledError:
        await asyncio.sleep(4)


async def leaves_a_child(progress: Progress, count: Count = 4) -> None:
    children.append(await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE))  # ends with its server
    await steps(progress, count)


async def leaves_a_thread(progress: Progress, count: Count = 4) -> None:
    threading.Thread(target=time.sleep, args=(30,)).start()
    await steps(progress, count)


async def forgets_what_it_had(progress: Progress, count: Count = 4) -> int:
    made = 0
    for number in range(progress.checkpoint or 0, count):
        await progress(number + 1, count)
        await asyncio.sleep(0.02)
        made, progress.checkpoint = made + 1, number + 1
    return made


async def blocks_the_loop(progress: Progress, count: Count = 4) -> None:
    for number in range(count):
        await progress(number + 1, count)
        await asyncio.sleep(0.02) if count > 4 else time.sleep(0.4)


@hookimpl
def register_tasks():
    once = (sound, unbounded, decreases, reports_nothing, leaves_a_child, blocks_the_loop)
    again = (ignores_cancellation, leaves_a_thread, forgets_what_it_had)
    return [*map(Task, once), *(Task(function, resumable=True) for function in again)]
'''

TEST = """
from streamlab.testing import TaskConformance


class TestIt(TaskConformance):
    plugin = "it"
    large = {"count": 150}
"""


def write_ini(pytester: pytest.Pytester) -> None:
    (pytester.path / "config.toml").touch()
    (pytester.path / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")


def test_tasks_of_the_plugins_that_ship_have_bounds_and_reject_what_exceeds_them(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[scenarios.llm]\nenabled = false\n")
    app = create_app(Config.read(tmp_path / "config.toml", {"STREAMLAB_SERVER__LOG_FILE": ""}))
    assert {"checksum", "export", "rehearsal", "report"} <= app[TASKS].keys()
    for task in app[TASKS].values():
        form = form_of(task)
        assert list(form.unbounded()) == []
        for bad in form.invalid_values():
            given = {} if bad.value is MISSING else {bad.name: bad.value}
            with pytest.raises(Problem) as rejected:
                task.read(form.body({}) | given if given else {}, where="body", prefix="parameters.")
            names = [error["name"] for error in rejected.value.document()["errors"]]
            assert any(name.startswith(f"parameters.{bad.name}") for name in names), (task.name, bad)


@pytest.mark.timeout(120)
def test_task_that_new_writes_passes(pytester: pytest.Pytester) -> None:
    write_plugin("squares", folder=pytester.path / "plugins", tests=pytester.path / "tests", task=True)
    write_ini(pytester)
    done = pytester.runpytest_inprocess(*OPTIONS, "tests", "--promises")
    done.stdout.fnmatch_lines(["*with the result of one", "TestSquares: 8 of 8 promises verified on 1 kind of task"])


@pytest.mark.timeout(150)
def test_each_defect_is_caught(pytester: pytest.Pytester) -> None:
    write_plugins(pytester.path, {"it": DEFECTS})
    (pytester.path / "tests").mkdir()
    (pytester.path / "tests" / "test_it.py").write_text(TEST)
    write_ini(pytester)
    done = pytester.runpytest_inprocess(*OPTIONS, "tests")
    failed = [line for line in done.outlines if line.startswith("FAILED")]
    found = {match.groups() for line in failed if (match := re.search(r"::test_(\w+)\[(?:task )?(\w+)\]", line))}
    at_once = {"runs_to_its_end_and_reports_progress", "cancelled_task_ends", "crash_of_the_server_is_survived"}
    assert found == {
        ("parameters_have_bounds", "unbounded"),
        ("runs_to_its_end_and_reports_progress", "decreases"),
        *((case, "reports_nothing") for case in at_once),
        ("cancelled_task_ends", "ignores_cancellation"),
        ("cancelled_task_ends", "leaves_a_child"),
        ("crash_of_the_server_is_survived", "forgets_what_it_had"),
        ("server_stops_while_tasks_run", "server"),
        ("event_loop_is_never_blocked", "server"),
    }
