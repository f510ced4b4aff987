"""docs/plugins.md matches the code: its plugins pass the conformance suite, its hooks exist, its package installs."""

import ast
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import streamlab.client
from streamlab import hookspecs
from streamlab.scaffold import write_plugin
from streamlab.server.registry import HOOKS
from streamlab.testing import Conformance, TaskConformance
from streamlab.testing.plugin_test import PluginTest
from tests.support.connections import EventStream
from tests.support.pytest_runs import OPTIONS
from tests.support.servers import REPOSITORY, Running, write_plugins

GUIDE = (REPOSITORY / "docs" / "plugins.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)]
PLUGINS = {
    found[1].lower(): block
    for block in BLOCKS
    if "def register_scenarios" in block and (found := re.search(r"class (\w+)\(Scenario", block))
}


def table_of_promises(tested: type) -> str:
    """Return a table of the guide, as the code defines it."""
    rows = ["| case | what is promised | standard |", "| --- | --- | --- |"]
    for base in reversed(tested.__mro__):
        for name, case in vars(base).items():
            if name.startswith("test_"):
                rows.append(f"| `{name.removeprefix('test_')}` | {case.promise.expected} | {case.promise.standard} |")
    return "\n".join(rows)


INI = "[pytest]\nasyncio_default_fixture_loop_scope = function\n"


def write_test(folder: Path, test: str, **plugins: str) -> None:
    """Write plugins, their test, and the configuration of pytest."""
    write_plugins(folder, plugins)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_it.py").write_text(test)
    (folder / "pytest.ini").write_text(INI)


def pytest_in(folder: Path, *arguments: str, **environ: str) -> str:
    """Run pytest in a folder as an author does; return its output."""
    (folder / "pytest.ini").write_text(INI)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join([*filter(None, [environ.pop("site", "")]), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *arguments],
        cwd=folder,
        env={**inherited, **environ, "PYTHONPATH": path, "SSL_CERT_FILE": os.devnull},
        capture_output=True,
        text=True,
        timeout=140,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_unrelated_tests_do_not_load_the_suite(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n\n\ndef test_nothing_is_loaded(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.has_plugin('streamlab')\n"
        "    assert [name for name in sys.modules if name.startswith('streamlab.testing.')] == "
        "['streamlab.testing.plugin']\n"
    )
    assert "promises" not in pytest_in(tmp_path)


def test_hooks_of_the_guide_are_those_of_the_code() -> None:
    (block,) = re.findall(r"```python hooks\n(.*?)```", GUIDE, re.DOTALL)
    documented = {item.name: item for item in ast.parse(block).body if isinstance(item, ast.FunctionDef)}
    code = {
        item.name: item for item in ast.parse(inspect.getsource(hookspecs)).body if isinstance(item, ast.FunctionDef)
    }
    assert set(documented) == HOOKS
    for name, function in documented.items():
        written = code[name]
        assert ast.unparse(function.args) == ast.unparse(written.args), name
        assert ast.unparse(function.returns or ast.Constant(None)) == ast.unparse(written.returns or ast.Constant(None))
        first = (ast.get_docstring(written) or "").partition("\n")[0]
        assert (ast.get_docstring(function) or "").startswith(first.rstrip(".")), name


@pytest.mark.parametrize(("name", "tested"), [("promises", Conformance), ("task promises", TaskConformance)])
def test_promises_of_the_guide_are_those_of_the_suite(name: str, tested: type) -> None:
    table = GUIDE.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]
    assert table == table_of_promises(tested), f"docs/plugins.md should have:\n\n{table_of_promises(tested)}"


def test_attributes_of_the_guide_are_those_of_the_class() -> None:
    documented = set(re.findall(r"^\| `(\w+)(?: = False|\([\w, ]*\))?` \|", GUIDE, re.MULTILINE))
    names = {
        name for base in (Conformance, TaskConformance, PluginTest) for name in {*vars(base), *base.__annotations__}
    }
    assert {name for name in names if not name.startswith("_")} <= documented


@pytest.mark.timeout(150)
@pytest.mark.usefixtures("forked_servers")
@pytest.mark.parametrize("name", ["itself", "pulse"])
def test_plugins_of_the_guide_pass_the_conformance_suite(pytester: pytest.Pytester, name: str) -> None:
    test = BLOCKS[0].replace('"greeter"', '"mine"').replace("TestGreeter", "TestMine")
    write_test(pytester.path, test, mine=PLUGINS[name])
    done = pytester.runpytest_inprocess(*OPTIONS, "tests")
    assert done.ret == 0
    assert re.search(r"^TestMine: (\d+) of \1 promises", done.stdout.str(), re.MULTILINE)


def test_every_block_of_the_guide_is_python(tmp_path: Path) -> None:
    assert list(PLUGINS) == ["sensors", "itself", "pulse", "relay"]
    for block in BLOCKS:
        compile(block, "docs/plugins.md", "exec")
    for block in BLOCKS[1 : BLOCKS.index(PLUGINS["itself"])]:
        exec(compile(block, "docs/plugins.md", "exec"), {"__name__": "guide"})
    assert (REPOSITORY / "examples/streamlab-hello/tests/test_hello.py").read_text() in BLOCKS


def test_task_of_the_guide_is_what_new_writes(tmp_path: Path) -> None:
    assert "    streamlab new squares --task\n" in GUIDE
    _, test = write_plugin("squares", folder=tmp_path, tests=tmp_path, task=True)
    assert test.read_text() in BLOCKS


def test_names_of_the_client_are_in_the_guide() -> None:
    assert [name for name in streamlab.client.__all__ if f"`{name}" not in GUIDE] == []


def beats(stream: EventStream, count: int) -> list[tuple[str, int]]:
    return [(event.json["animal"], event.json["beat"]) for event in stream.take(count)]


def test_channel_of_the_guide_is_filtered_conflated_and_continues_after_a_crash(start: Callable[..., Running]) -> None:
    settings = "[scenarios.pulse]\ninterval = 0.02\n"
    server = start(settings, pulse=PLUGINS["pulse"])
    with EventStream(server, "/pulse?animals=whale&limit=5") as stream:
        followed = list(stream)
    assert [event.json["animal"] for event in followed] == ["whale"] * 5
    with EventStream(server, "/pulse?every=0.5") as stream:
        first, *_, last = (beat for animal, beat in beats(stream, 6) if animal == "mouse")
    assert last - first > 10, "conflated events are fewer than those published"
    server.terminate(signal.SIGKILL)
    server = start(settings, pulse=PLUGINS["pulse"])
    with EventStream(server, "/pulse?animals=whale", followed[-1].id) as stream:
        after = [beat for _, beat in beats(stream, last)]
    assert after == list(range(followed[-1].json["beat"] + 1, followed[-1].json["beat"] + 1 + last))


@pytest.mark.timeout(150)
@pytest.mark.usefixtures("forked_servers")
def test_upstream_of_the_guide_is_relayed_and_tested_without_another_machine(pytester: pytest.Pytester) -> None:
    (test,) = (block for block in BLOCKS if "serve_upstreams" in block)
    write_test(pytester.path, test, relay=PLUGINS["relay"])
    cases = "relays or events_are_complete or resumes"
    done = pytester.runpytest_inprocess(*OPTIONS, "tests", "-k", cases)
    done.stdout.fnmatch_lines(["TestRelay: 3 of 3 promises *"])
    assert done.parseoutcomes()["passed"] == 4


def test_relay_of_the_guide_reports_an_upstream_that_cannot_be_reached(start: Callable[..., Running]) -> None:
    server = start('[scenarios.relay]\nupstream = "127.0.0.1:1/events"\n', relay=PLUGINS["relay"])
    deadline = time.monotonic() + 20
    while b"the upstream is unavailable: cannot connect" not in (health := server.get("/health")[2]):
        assert time.monotonic() < deadline, health


@pytest.mark.timeout(180)
def test_package_of_the_guide_installs_and_passes_the_conformance_suite(tmp_path: Path) -> None:
    package, site = tmp_path / "streamlab-hello", tmp_path / "site"
    shutil.copytree(REPOSITORY / "examples" / "streamlab-hello", package, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        str(tmp_path / "dist"),
        str(package),
    ]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert f"dist/{wheel.name}" in GUIDE
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    (package / "streamlab_hello.py").unlink()  # the tests must import the installed package
    output = pytest_in(package, "--promises", "tests", site=str(site))
    assert re.search(r"^TestHello: (\d+) of \1 promises verified on 2 endpoints$", output, re.MULTILINE)
    for word in ("expected", "observed", "standard"):
        assert output.count(f"\n  {word:<10}") == output.count("\n  expected  ")
