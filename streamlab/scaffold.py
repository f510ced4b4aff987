"""The plugins and the tests that `streamlab new` writes."""

import keyword
from pathlib import Path

from .scenario import snake_case

PLUGIN = '''"""{title}: say hello a number of times."""

import asyncio

from aiohttp import web
from pydantic import BaseModel, Field, NonNegativeFloat

from streamlab import Scenario, endpoint, hookimpl, open_stream


class Greeting(BaseModel):
    """How often to greet."""

    times: int = Field(3, ge=1, le=1000, description="How many lines to send.", examples=[3])


class {title}(Scenario):
    """Say hello, a line at a time."""
{explicit_name}
    interval: NonNegativeFloat = 0.5  # [scenarios.{name}] interval = 1.0

    @endpoint("GET", "/stream/{name}", query=Greeting, sends="text/plain")
    async def greet(self, request: web.Request, query: Greeting) -> web.StreamResponse:
        """Send a line at a time, with a pause between."""
        async with open_stream(request, "text/plain") as response:
            for number in range(1, query.times + 1):
                await response.write(f"hello {{number}}\\n".encode())
                await asyncio.sleep(self.interval)
        return response


@hookimpl
def register_scenarios():
    """Return the scenario of this plugin."""
    return [{title}]
'''

TASK = '''"""{title}: add up squares, as a long task."""

import asyncio
from typing import Annotated

from pydantic import Field

from streamlab import Progress, Task, hookimpl

Count = Annotated[int, Field(ge=1, le=1_000_000, description="How many squares to add.", examples=[3])]


async def {name}(progress: Progress, count: Count = 100) -> dict[str, int]:
    """Add the squares up to a number."""
    state = progress.checkpoint or {{"next": 1, "sum": 0}}  # where the run before this one was interrupted
    for number in range(state["next"], count + 1):
        await progress(number - 1, count, "adding")
        await asyncio.sleep(0.02)  # the work; what blocks belongs into `streamlab.Threads`
        state = {{"next": number + 1, "sum": state["sum"] + number**2}}
        progress.checkpoint = state  # stored with the next progress
    await progress(count, count)
    return {{"sum": state["sum"]}}


@hookimpl
def register_tasks():
    """Return the task of this plugin."""
    return [Task({name}, unit="squares", resumable=True)]
'''

TASK_TEST = '''"""The task {name} conforms to what streamlab promises of every task."""

from streamlab.testing import TaskConformance


class Test{title}(TaskConformance):
    plugin = "{name}"
    large = {{"count": 200}}  # for several seconds, in which it is cancelled, and its server killed
'''

TEST = '''"""The scenario {name} conforms to what streamlab promises of every stream."""

from streamlab.testing import Conformance


class Test{title}(Conformance):
    plugin = "{name}"
'''


def write_plugin(name: str, *, folder: Path, tests: Path, task: bool = False) -> list[Path]:
    """Write `folder/NAME.py` and `tests/test_NAME.py`, with a scenario or a long task, and return both paths.

    Raises ValueError for a name that is not a lower-case Python identifier, FileExistsError rather than overwrite.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or name.startswith("_"):
        raise ValueError(f"{name!r} is not a valid plugin name (as `price_feed`)")
    title = "".join(part.capitalize() for part in name.split("_"))
    explicit_name = "" if snake_case(title) == name else f'\n    name = "{name}"'
    plugin, test = (TASK, TASK_TEST) if task else (PLUGIN, TEST)
    files = {folder / f"{name}.py": plugin, tests / f"test_{name}.py": test}
    for path in (*files, folder / name):
        if path.exists():
            raise FileExistsError(f"{path} already exists; nothing was written")
    for path, template in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.format(name=name, title=title, explicit_name=explicit_name), encoding="utf-8")
    return list(files)
