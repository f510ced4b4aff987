"""Tasks as plugins declare them, and the progress that their functions report."""

import asyncio
import math
import textwrap
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from streamlab import TASKS, Problem, Progress, Task
from streamlab.config import Config, ConfigError
from streamlab.server.app import create_app
from streamlab.server.site import REGISTRY
from streamlab.tasks import MAX_MESSAGES
from tests.support.servers import write_plugins


async def bake(progress: Progress, cakes: Annotated[int, Field(ge=1)], *, icing: list[str] = []) -> dict[str, Any]:  # noqa: B006
    """Bake some cakes.

    With icing, if there is some.
    """
    return {"cakes": cakes, "icing": icing, "attempt": progress.attempt}


async def test_a_task_is_described_by_its_function() -> None:
    task = Task(bake, unit="cakes", resumable=True)
    assert (task.name, task.unit, task.resumable) == ("bake", "cakes", True)
    assert task.description == "Bake some cakes.\n\nWith icing, if there is some."
    assert task.read({"cakes": "2"}, where="query") == {"cakes": 2, "icing": []}
    assert await task.run(Progress(attempt=3), {"cakes": 2}) == {"cakes": 2, "icing": [], "attempt": 3}
    with pytest.raises(Problem) as raised:
        task.read({"cakes": 0, "icing": "x", "cherries": 1}, where="body", prefix="parameters.")
    assert raised.value.errors == (
        {"in": "body", "name": "parameters.cakes", "detail": "input should be greater than or equal to 1"},
        {"in": "body", "name": "parameters.icing", "detail": "input should be a valid list"},
        {
            "in": "body",
            "name": "parameters.cherries",
            "detail": "unknown parameter of the task bake; known: cakes, icing",
        },
    )
    with pytest.raises(Problem, match="The parameters of this task are no longer valid"):
        await task.run(Progress(), {"cakes": 0})


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
def test_a_limit_that_is_not_a_number_of_seconds_is_rejected(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"max_seconds: .* is not a positive number of seconds"):
        Task(bake, max_seconds=seconds)


async def untyped(progress: Progress, cakes) -> None:  # type: ignore[no-untyped-def]
    """Lack an annotation."""


async def nameless(progress: Progress, *cakes: int) -> None:
    """Take what has no name."""


async def alone() -> None:
    """Lack a progress."""


def waits(progress: Progress) -> None:
    """Block."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (untyped, "the parameter 'cakes' of the task untyped needs an annotation"),
        (nameless, "the task nameless has a parameter without a name"),
        (alone, "the first parameter of the task alone must be its progress"),
        (waits, "a task must be an `async def` function"),
    ],
)
def test_a_function_that_cannot_be_a_task_is_rejected(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Task(function)


async def test_progress_retains_the_last_report_and_every_new_message() -> None:
    progress = Progress()
    await progress(1, 10, "first")
    await progress(2, message="first")
    await progress(3, 20, "second")
    assert (progress.done, progress.total, progress.messages) == (3, 20, ["first", "second"])
    assert progress.changed.is_set()


async def test_progress_accepts_json_values() -> None:
    progress = Progress()
    await progress(Decimal("1.5"), True)  # type: ignore[arg-type]
    assert (progress.done, progress.total) == (1.5, 1.0)
    for wrong in (math.nan, math.inf, 2**60):
        with pytest.raises(ValueError, match="is not a number from"):
            await progress(wrong)
    for nothing in ("many", None):
        with pytest.raises((TypeError, ValueError)):
            await progress(nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a message is longer"):
        await progress(1, message="x" * 10_001)
    with pytest.raises(UnicodeEncodeError):
        await progress(1, message="\ud800")
    assert (progress.done, progress.messages) == (1, [])


async def test_a_task_with_too_many_reports_waits_until_they_are_published() -> None:
    progress = Progress()
    for number in range(MAX_MESSAGES - 1):
        await progress(number, message=str(number))
    reporting = asyncio.ensure_future(progress(MAX_MESSAGES, message="the last"))
    await asyncio.sleep(0)
    assert not reporting.done()
    progress.messages = []
    progress.published.set()
    await reporting


async def test_a_task_that_never_waits_does_not_starve_others() -> None:
    progress, turns = Progress(), 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count())
    while turns < 3:
        await progress(0)
    counting.cancel()


def test_a_checkpoint_is_a_copy() -> None:
    progress = Progress()
    assert progress.checkpoint is None
    state = {"n": 1}
    progress.checkpoint = state
    state["n"] = 2
    assert progress.checkpoint == {"n": 1}
    with pytest.raises(TypeError):
        progress.checkpoint = object()
    with pytest.raises(ValueError, match="a checkpoint of 2000002 bytes is larger than 1048576"):
        progress.checkpoint = "x" * 2_000_000
    assert progress.checkpoint == {"n": 1}


PLUGIN = """
    from streamlab import Task, hookimpl


    async def bake(progress):
        pass


    @hookimpl
    def register_tasks():
        return {tasks}
"""


def made(tmp_path: Path, **plugins: str) -> Any:
    write_plugins(tmp_path, {name: textwrap.dedent(PLUGIN).format(tasks=tasks) for name, tasks in plugins.items()})
    return create_app(Config.of({"plugins": {"path": ["plugins"]}}, base=tmp_path))


def test_two_tasks_of_one_name_are_a_fault_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        made(tmp_path, one="[Task(bake)]", two="[Task(bake)]")
    assert [fault.reason for fault in raised.value.faults] == [
        "two plugins have a task 'bake': one and two; rename one"
    ]


def test_a_plugin_with_invalid_tasks_fails_alone(tmp_path: Path) -> None:
    app = made(tmp_path, one="[bake]", two="[Task(bake)]")
    assert "bake" in app[TASKS]
    states = {plugin.name: (plugin.state, plugin.reason) for plugin in app[REGISTRY].plugins}
    assert states["two"] == ("ready", "")
    assert states["one"][0] == "failed"
    assert "register_tasks must return Tasks, not <function bake" in states["one"][1]
