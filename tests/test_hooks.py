"""docs/hooks.md matches the code: it has every hook with its signature, and each of its plugins does what it says."""

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamlab import hookspecs
from streamlab.server.registry import HOOKS
from tests.support.servers import REPOSITORY, Running, begin, run_streamlab, starting_in, write_plugins

PAGE = (REPOSITORY / "docs" / "hooks.md").read_text(encoding="utf-8")

SECTIONS = {
    section.partition("\n")[0].removeprefix("## "): section
    for section in re.split(r"^(?=## )", PAGE, flags=re.MULTILINE)
    if section.startswith("## ")
}

EXAMPLES = {hook: re.findall(r"```python\n(.*?)```", section, re.DOTALL) for hook, section in SECTIONS.items()}

# Names of the files: the plugin of each example.
NAMES = {
    "register_scenarios": "hello",
    "register_tasks": "counting",
    "lifespan": "clock",
    "worker_lifespan": "scratch",
    "health": "forecast",
    "check": "atlas",
    "on_stream_end": "traffic",
    "register_commands": "sums",
    "register_views": "states",
}

LOADED_PLUGINS = ("progress",)


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {item.name: item for item in ast.parse(source).body if isinstance(item, ast.FunctionDef)}


def test_every_hook_has_its_heading_and_its_signature() -> None:
    assert set(SECTIONS) == HOOKS
    code = functions(inspect.getsource(hookspecs))
    for hook, section in SECTIONS.items():
        (block,) = re.findall(r"```python signature\n(.*?)```", section, re.DOTALL)
        (documented,) = functions(block).values()
        assert documented.name == hook
        assert ast.unparse(documented.args) == ast.unparse(code[hook].args)
        assert ast.unparse(documented.returns or ast.Constant(None)) == ast.unparse(
            code[hook].returns or ast.Constant(0)
        )


def test_every_hook_says_when_it_is_called_what_must_hold_and_who_uses_it() -> None:
    for hook, section in SECTIONS.items():
        for word in ("**Called**", "**Must hold:**", "**Used by**"):
            assert section.count(word) == 1, (hook, word)
        for target in re.findall(r"\]\(\.\./([^)#]+)\)", section):
            assert f"def {hook}(" in (REPOSITORY / target).read_text(encoding="utf-8"), (hook, target)


def test_every_hook_has_one_example() -> None:
    assert {hook: len(blocks) for hook, blocks in EXAMPLES.items()} == dict.fromkeys(NAMES, 1)
    for hook, (block,) in EXAMPLES.items():
        assert f"def {hook}(" in block


def example(hook: str) -> dict[str, str]:
    """Return the example of a hook, as plugins by name."""
    return {NAMES[hook]: EXAMPLES[hook][0]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Run one server with all examples."""
    with starting_in(tmp_path_factory.mktemp("hooks"), LOADED_PLUGINS) as starting:
        yield starting(**{NAMES[hook]: block for hook, (block,) in EXAMPLES.items()})


def document(server: Running, path: str) -> Any:
    return json.loads(server.get(path)[2])


def test_register_scenarios_serves_a_route(shared: Running) -> None:
    assert shared.get("/hello")[2] == b"hello\nworld\n"


def test_register_tasks_adds_a_kind(shared: Running) -> None:
    assert "count" in {kind["kind"] for kind in document(shared, "/process/kinds")["kinds"]}
    assert b'"result":{"counted":3}' in shared.get("/process/long-task?kind=count&count=3")[2]


def test_lifespan_runs_while_the_server_does(shared: Running) -> None:
    first = document(shared, "/clock")["ticks"]
    while document(shared, "/clock")["ticks"] == first:
        pass


def test_health_makes_a_scenario_degraded(shared: Running) -> None:
    assert shared.get("/forecast")[0] == 502
    assert "the upstream does not respond" in json.dumps(document(shared, "/health"))


def test_check_is_a_warning_of_a_server(shared: Running) -> None:
    assert "scenarios.atlas.map" in shared.log
    assert "map.svg is not a file" in shared.log


def test_check_is_a_fault_of_a_check(tmp_path: Path) -> None:
    write_plugins(tmp_path, example("check"))
    status, _, errors = run_streamlab("check", cwd=tmp_path)
    assert status == 2
    assert "scenarios.atlas.map - map.svg is not a file" in errors


def test_on_stream_end_counts_streams_of_all_plugins(shared: Running) -> None:
    shared.get("/hello")
    found = re.search(r'^traffic_bytes_total\{outcome="finished"\} (\S+)$', shared.get("/metrics")[2].decode(), re.M)
    assert found is not None
    assert float(found[1]) >= len("hello\nworld\n")


def test_worker_lifespan_is_open_while_a_worker_runs(tmp_path: Path) -> None:
    write_plugins(tmp_path, example("worker_lifespan"))
    mark = tmp_path / "worker-is-running"
    quiet = {"STREAMLAB_SCENARIOS__PROGRESS__ENABLED": "false", "STREAMLAB_SCENARIOS__LLM__ENABLED": "false"}
    errors = tmp_path / "log"
    with errors.open("w") as log, begin(["worker"], environ=quiet, cwd=tmp_path, stderr=log) as worker:
        assert worker.stdout is not None
        try:
            assert "runs tasks" in worker.stdout.readline(), errors.read_text()
            assert mark.exists()
        finally:
            worker.terminate()
        assert worker.wait(20) == 0
    assert not mark.exists()


def test_register_commands_adds_a_command(tmp_path: Path) -> None:
    write_plugins(tmp_path, example("register_commands"))
    assert run_streamlab("add", "1", "2", "3", cwd=tmp_path) == (0, "6\n", "")


def test_register_views_adds_a_view(start: Callable[..., Running], tmp_path: Path) -> None:
    server = start(**example("register_views"))
    done = run_streamlab("client", "state", "--url", server.url, cwd=tmp_path)
    assert done == (0, "the server is ok\n", "")
