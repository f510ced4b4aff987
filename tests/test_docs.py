"""The pages in docs/ match the code: their plugins, their configuration, their links and all their commands are run."""

import ast
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from streamlab.cli import cli
from streamlab.config import Config
from streamlab.server.app import create_app
from streamlab.server.site import REGISTRY
from tests.support import node
from tests.support.connections import EventStream
from tests.support.docs import COUNTDOWN, PAGES, README, THUMBNAILS, VOTES, blocks
from tests.support.node import node_command
from tests.support.servers import REPOSITORY, Running, disabled, run_streamlab, starting_in, write_plugins
from tools.reference import Reference

# A page with commands that need a server of their own has its own tests: tests/test_quickstart.py.
CURLS = {
    page: lines
    for page, text in PAGES.items()
    if page != "docs/quickstart.md"
    and (lines := [line.strip("`") for line in re.findall(r"^curl .*$|`curl [^`]*`", text, re.MULTILINE)])
}
"""The curl commands of each page: lines that begin with it, and those in backticks."""

TOMLS = [(page, table) for page in PAGES for table in blocks(page, "toml")]

PLUGINS = [
    (page, block)
    for page in PAGES
    for block in blocks(page, "python")
    if re.search("def register_(scenarios|tasks)", block)
]

PUBLIC = ("streamlab", "streamlab.client", "streamlab.testing")
"""The modules whose names are public."""

COMMANDS = [
    (page, *found)
    for page, text in PAGES.items()
    for found in re.findall(
        r"^ {4,8}((?:\w+=\S+ )*)(?:\S*/)?streamlab ([a-z].*?)(?: +#.*| >> .*)?$", text, re.MULTILINE
    )
]
"""The commands of streamlab on each page: the page, the variables before the command, and its words."""

LINKS = re.compile(r"(?<!!)\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)\)")


def numbered(items: list[tuple[str, str]]) -> list[str]:
    """Return an identifier for each item: its page, and its number on all pages."""
    return [f"{page}-{number}" for number, (page, _) in enumerate(items)]


# -- commands


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield a server with everything that the curl commands request; its model is ready, and gives short responses."""
    folder = tmp_path_factory.mktemp("docs")
    with starting_in(folder) as starting:
        server = starting(
            "[scenarios.countdown]\ninterval = 0.01\n[scenarios.file]\nsample_mb = 3\n"
            "[scenarios.export]\nsample_rows = 2000\n[scenarios.llm]\nmax_tokens = 60\n",
            countdown=COUNTDOWN,
        )
        server.wait_for_log("is ready", seconds=60)
        yield server


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield a server whose ticker accepts prices."""
    with starting_in(tmp_path_factory.mktemp("pushed"), ["ticker"]) as starting:
        yield starting('[scenarios.ticker]\nsource = "push"')


@pytest.fixture(scope="module")
def worked() -> set[str]:
    """Return the commands that write no file and have worked: several pages have the same ones."""
    return set()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", CURLS)
def test_every_curl_command_works(
    shared: Running, worked: set[str], tmp_path: Path, request: pytest.FixtureRequest, page: str
) -> None:
    for line in CURLS[page]:
        if line in worked:
            continue
        if "-C -" in line:
            os.truncate(tmp_path / "large-file", 1_234_567)
        pushes = "--json" in line and "ticker" in line
        url = request.getfixturevalue("pushed").url if pushes else shared.url
        command = line.replace("http://127.0.0.1:8000", url).replace("curl ", "curl -sS -f ", 1)
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b""), line
        if not re.search(r" -\w*[oOC]", line):
            worked.add(line)
        if "-C -" in line:
            assert (tmp_path / "large-file").read_bytes() == (shared.base / "var/files/large-file.bin").read_bytes()
        if "-r 0-99" in line:
            assert [path.stat().st_size for path in tmp_path.iterdir() if path.stat().st_size == 100] == [100]


@pytest.mark.parametrize("client", ["@durable-streams/client", "aiohttp", "durable_streams"])
def test_clients_of_the_streams_page_append_and_read(shared: Running, client: str) -> None:
    (code,) = (
        block
        for language in ("js", "python")
        for block in blocks("docs/streams.md", language)
        if re.search(rf"^(import|from|import \{{.*\}} from) \"?{client}\b", block, re.MULTILINE)
    )
    if client.startswith("@"):
        command = [node_command("-", package=client)[0], "--input-type=module", "-"]
    else:
        pytest.importorskip(client, reason=f"{client} is not installed")
        command = [sys.executable, "-"]
    code = code.replace("http://127.0.0.1:8000", shared.url)
    # Node searches packages from its folder on.
    done = subprocess.run(command, input=code, cwd=node.FOLDER, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tea\nmilk\n", "")


def test_pages_with_curl_commands_are_found() -> None:
    assert {"README.md", "docs/files.md", "docs/events.md", "docs/exports.md", "docs/llm.md"} <= CURLS.keys()
    assert sum(map(len, CURLS.values())) > 30


def test_follow_command_works(shared: Running, tmp_path: Path) -> None:
    (line,) = re.findall(r"^    \.venv/bin/streamlab (follow .*?)(?: +#.*)?$", PAGES["docs/events.md"], re.MULTILINE)
    arguments = line.replace("http://127.0.0.1:8000", shared.url).split()
    status, out, err = run_streamlab(*arguments, cwd=tmp_path)
    assert (status, err, len(out.splitlines())) == (0, "", 20)


@pytest.mark.parametrize(("page", "variables", "words"), COMMANDS)
def test_command_has_its_options(tmp_path: Path, page: str, variables: str, words: str) -> None:
    """A command that starts a server or needs one is parsed here, and run by the tests of that command."""
    name, *arguments = shlex.split(words)
    command: Any = typer.main.get_command(cli)
    while hasattr(command, "get_command"):
        group, command = command, command.get_command(command.context_class(command), name)
        assert command is not None, f"{group.name} has no command {name}"
        if hasattr(command, "get_command"):
            name, *arguments = arguments
    command.make_context(name, arguments)
    environ = dict(variable.split("=", 1) for variable in shlex.split(variables))
    if environ:
        assert create_app(Config.of({}, base=tmp_path, environ=environ)) is not None


def test_commands_are_found() -> None:
    assert {words.split()[0] for _, _, words in COMMANDS} >= {
        "check",
        "client",
        "doctor",
        "follow",
        "run",
        "task",
        "worker",
    }


@pytest.mark.parametrize("command", ["check", "routes"])
def test_commands_of_the_configuration_work(tmp_path: Path, command: str) -> None:
    assert f".venv/bin/streamlab {command} " in PAGES["docs/configuration.md"]
    status, _, err = run_streamlab(command, cwd=tmp_path)
    assert (status, err) == (0, "")


# -- configuration and plugins


@pytest.mark.parametrize(("page", "table"), TOMLS, ids=numbered(TOMLS))
def test_configuration_is_valid(tmp_path: Path, page: str, table: str) -> None:
    write_plugins(tmp_path, {"countdown": COUNTDOWN})
    (tmp_path / "config.toml").write_text(table)
    app = create_app(Config.read(tmp_path / "config.toml", {"STREAMLAB_SERVER__LOG_FILE": ""}))
    assert app is not None


@pytest.mark.parametrize(("page", "plugin"), PLUGINS, ids=numbered(PLUGINS))
def test_plugin_is_loaded(tmp_path: Path, page: str, plugin: str) -> None:
    write_plugins(tmp_path, {"shown": plugin})
    app = create_app(Config.of({"scenarios": disabled()}, base=tmp_path))
    (shown,) = (found for found in app[REGISTRY].plugins if found.name == "shown")
    assert (shown.state, shown.reason) == ("ready", "")
    assert shown.scenarios or shown.tasks


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_compiles(page: str) -> None:
    for block in blocks(page, "python"):
        compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_votes_are_cast_and_watched_from_any_id(start: Callable[..., Running]) -> None:
    server = start(votes=VOTES)
    body = b'{"choice": "tea"}'
    status, _, document = server.get("/votes", {"Content-Type": "application/json"}, method="POST", body=body)
    first = json.loads(document)["id"]
    assert status == 201
    with EventStream(server, "/votes") as stream:
        assert [(event.id, event.json) for event in stream.take(1)] == [(first, {"choice": "tea"})]
        server.get("/votes", {"Content-Type": "application/json"}, method="POST", body=b'{"choice": "coffee"}')
        (second,) = stream.take(1)
    with EventStream(server, "/votes", after=first) as stream:
        assert stream.take(1) == [second]


def test_thumbnails_are_created_and_continue_after_a_crash(start: Callable[..., Running]) -> None:
    server = start(thumbnails=THUMBNAILS)
    with EventStream(server, "/process/long-task?kind=thumbnails&count=200") as stream:
        first = next(event for event in stream if event.event == "progress" and event.json["done"] > 20)
    server.terminate(signal.SIGKILL)
    server = start(thumbnails=THUMBNAILS)
    with EventStream(server, "/process/long-task", first.id) as stream:
        end = list(stream)[-1].json
    assert (end["state"], end["attempts"], end["result"]) == ("done", 2, {"made": 200})


# -- links and names


def anchors(text: str) -> set[str]:
    """Return the anchors of a page: its headings, as code hosts derive them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "bench/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = REPOSITORY / page
    text = path.read_text(encoding="utf-8")
    links = LINKS.findall(re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if "://" in link:
            continue
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_readme_links_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in LINKS.findall(README)}
    reached = linked | {
        f"docs/{link.partition('#')[0]}" for page in linked & PAGES.keys() for link in LINKS.findall(PAGES[page])
    }
    assert PAGES.keys() - reached == {"README.md"}


def test_every_route_is_on_a_page() -> None:
    app = create_app(Config.of({}))
    text = "".join(PAGES.values())
    paths = {route.endpoint.template for plugin in app[REGISTRY].plugins for route in plugin.routes}
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not re.search(rf"{re.escape(path)}(?![\w/{{-])", text)] == []


def test_declared_statuses_are_on_the_page_of_their_route() -> None:
    app = create_app(Config.of({}))
    missing = [
        (page, endpoint.path, status)
        for plugin in app[REGISTRY].plugins
        for route in plugin.routes
        for page, text in PAGES.items()
        if page != "README.md"
        and re.search(rf"^\| .*`[A-Z, `]*{re.escape((endpoint := route.endpoint).template)}`", text, re.MULTILINE)
        for status in endpoint.responses
        if not re.search(rf"\b{status}\b", text)
    ]
    assert missing == []


def test_tables_are_those_of_the_code() -> None:
    reference = Reference()
    outdated = [page for page, text in PAGES.items() if reference.filled(text) != text]
    assert outdated == [], "run `python -m tools.reference`"


def test_every_key_is_on_the_page_of_configuration() -> None:
    """The keys of config.toml, which has all of them, have a row each, in the section of their table."""
    sections = dict(re.findall(r"^### `\[([\w.]+)\]`\n(.*?)(?=^#|\Z)", PAGES["docs/configuration.md"], re.M | re.S))
    table, keys = "", []
    for line in (REPOSITORY / "config.toml").read_text().splitlines():
        if found := re.match(r"\[([\w.]+)\]$", line):
            table = found[1]
        elif found := re.match(r"# (\w+) = ", line):
            keys.append((table, found[1]))
    assert len(keys) > 60
    assert [key for key in keys if f"\n| `{key[1]}` |" not in sections[key[0]]] == []


def test_every_public_name_is_imported_once_in_the_reference() -> None:
    text = PAGES["docs/api.md"]
    for module in PUBLIC:
        found = re.findall(rf"^from {re.escape(module)} import \(?([^`)]*)", text, re.MULTILINE)
        names = [name for block in found for name in re.findall(r"\w+", block)]
        assert sorted(names) == sorted(importlib.import_module(module).__all__)


def test_every_public_name_is_explained_in_the_reference() -> None:
    text = PAGES["docs/api.md"]
    rows = "".join(re.findall(r"^\| .*? \|", text, re.MULTILINE))
    names = {name for module in PUBLIC for name in importlib.import_module(module).__all__}
    assert [name for name in sorted(names) if not re.search(rf"`{name}\b", rows)] == []


def test_every_metric_is_on_its_page() -> None:
    page = PAGES["docs/metrics.md"]
    sources = [*(REPOSITORY / "streamlab").rglob("*.py"), *(REPOSITORY / "plugins").rglob("*.py")]
    source = "".join(path.read_text() for path in sources)
    metrics = re.findall(r'(?:Counter|Gauge|Histogram|Family)\(\s*"(streamlab_\w+)"', source)
    assert len(metrics) == len(re.findall(r"^\| `streamlab_\w+` \|", page, re.MULTILINE))
    for metric in metrics:
        assert re.search(rf"`{metric}(_total)?`", page), metric
