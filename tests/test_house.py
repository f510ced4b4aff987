"""The architecture: imports between modules, and the table of modules in docs/architecture.md."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamlab
import streamlab.client
from tests.support.servers import REPOSITORY

CORE = REPOSITORY / "streamlab"
PLUGINS = REPOSITORY / "plugins"

# The parts that each part of the core may import; server and clients are connected only by the wire protocol.
CONTRACT = ("hookspecs", "scenario", "tasks")
WORDS = (
    "auth",
    "config",
    "negotiation",
    "pages",
    "problems",
    "request_body",
    "served_files",
    "slots",
    "sse",
    "tally",
    "threads",
    "ticks",
)
COMMAND_LINE = ("__main__", "cli", "commands", "scaffold", "supervisor", "workers")
PARTS = {
    "command line": {"server", "events", "client", "contract", "words"},
    "public names": {"server", "events", "streaming", "contract", "words"},
    "server": {"events", "streaming", "contract", "words"},
    "client": {"words"},
    "events": {"streaming", "words"},
    "contract": {"streaming", "words"},
    "streaming": {"words"},
    "words": set[str](),
}

# What plugins may import.
PUBLIC_NAMES = {"": streamlab.__all__, "client": streamlab.client.__all__}

SOURCES = [*CORE.rglob("*.py"), *PLUGINS.rglob("*.py")]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """Return the imports of a file from `package`: the full name of a module, and the imported name, if any."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def part_of(module: str) -> str:
    """Return the part of the core of a module, given by its dotted name below `streamlab`."""
    root = module.partition(".")[0]
    if root in PARTS:
        return root
    for part, modules in (("contract", CONTRACT), ("words", WORDS), ("command line", COMMAND_LINE)):
        if root in modules:
            return part
    return {"": "public names", "testing": "testing"}[root]


def core_imports(path: Path) -> set[str]:
    """Return the modules of the core that a module imports, anywhere in it, as dotted names below `streamlab`."""
    package = ".".join(("streamlab", *path.relative_to(CORE).parts[:-1]))
    found = set()
    for module, name in imports(path, package):
        if module.partition(".")[0] == "streamlab":
            inner = module.removeprefix("streamlab").removeprefix(".")
            below = ".".join(filter(None, [inner, name]))
            file = CORE.joinpath(*below.split("."))
            found.add(below if file.with_suffix(".py").exists() or file.is_dir() else inner)
    return found


def core_modules() -> dict[str, Path]:
    """Return every module of the core except those of `testing`, which may import anything, by its dotted name."""
    paths = [path for path in CORE.rglob("*.py") if path.relative_to(CORE).parts[0] != "testing"]
    return {
        ".".join(path.relative_to(CORE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in paths
    }


def test_the_core_imports_only_downward() -> None:
    pairs = [(name, other) for name, path in core_modules().items() for other in sorted(core_imports(path))]
    assert ("server.app", "streaming.drain") in pairs
    parts = [(name, other, part_of(name), part_of(other)) for name, other in pairs]
    assert [pair for *pair, part, other in parts if part != other and other not in PARTS[part]] == []


def test_no_modules_of_one_part_import_each_other_in_a_circle() -> None:
    graph = {name: core_imports(path) & core_modules().keys() - {name} for name, path in core_modules().items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("streaming.drain") < order.index("server.app")


def test_the_core_names_no_plugin() -> None:
    routes = {
        text
        for path in PLUGINS.rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "endpoint"
        for argument in node.args[1:2]
        if isinstance(argument, ast.Constant) and (text := str(argument.value))
    }
    assert "/stream/stock-ticker" in routes
    names = {path.stem for path in PLUGINS.iterdir() if not path.name.startswith(("_", "."))}
    strings = {
        (path.name, node.value)
        for path in core_modules().values()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert len(strings) > 1000
    assert [(name, text) for name, text in sorted(strings) if text in routes | names] == []


def test_a_plugin_imports_of_streamlab_only_its_names_for_authors() -> None:
    folders = [PLUGINS, REPOSITORY / "examples/browser"]
    taken = set()
    for folder in folders:
        for path in folder.rglob("*.py"):
            own = path.relative_to(folder).parts[0].removesuffix(".py")
            for module, name in imports(path, f"plugins.{own}"):
                root, _, inner = module.partition(".")
                assert root != "streamlab" or name in PUBLIC_NAMES.get(inner, ()), f"{path}: {module}.{name}"
                assert root != "plugins" or module.split(".")[1:2] == [own], f"{path}: {module}.{name}"
                taken.add((root, name))
    assert ("streamlab", "Scenario") in taken


def test_blocking_work_runs_in_threads_that_no_cancellation_abandons() -> None:
    """The threads of asyncio continue after their caller is cancelled, and may use what it then closes.

    Exempt are the threads themselves, and `streamlab.testing`, whose callers are tests.
    """
    forbidden = {"run_in_executor", "to_thread", "ThreadPoolExecutor", "set_default_executor"}
    users = {
        path.relative_to(REPOSITORY).as_posix()
        for path in SOURCES
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and node.attr in forbidden)
        or (isinstance(node, ast.alias) and node.name.rpartition(".")[2] in forbidden)
    }
    assert sorted(path for path in users if not path.startswith("streamlab/testing/")) == ["streamlab/threads.py"]
    # aiofiles runs its operations in threads of asyncio by default.
    wraps = [
        node
        for path in SOURCES
        if any(module.startswith("aiofiles") for module, _ in imports(path, ""))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "wrap"
    ]
    assert wraps
    assert all("executor" in {keyword.arg for keyword in call.keywords} for call in wraps)


# -- the table of modules


def owned(path: Path) -> str:
    """Return the first line of the docstring of a module; of a module of the lab page, its first comment."""
    if path.suffix == ".js":
        return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("// ")
    return (ast.get_docstring(tree(path)) or "").partition("\n")[0]


def table(title: str, paths: list[Path]) -> str:
    rows = []
    for path in paths:
        file = path.relative_to(REPOSITORY).as_posix()
        rows.append(f"| [{file.partition('/')[2]}](../{file}) | {owned(path)} |")
    return "\n".join([f"| {title} | what it owns |", "| --- | --- |", *rows])


def tables() -> str:
    """Return the tables of the modules of the core, by folder, and of each plugin."""
    groups = {"The contract, and what all parts use": sorted(CORE.glob("*.py"))}
    for folder in sorted(path.parent for path in CORE.glob("*/__init__.py")):
        groups[f"`streamlab.{folder.name}`"] = sorted(folder.rglob("*.py"))
    groups["The lab page"] = sorted(CORE.glob("web/*.js"))
    groups["The plugins that ship"] = sorted(PLUGINS.rglob("*.py"))
    return "\n\n".join(table(title, paths) for title, paths in groups.items())


def test_every_module_begins_with_a_sentence_on_what_it_owns() -> None:
    for path in [*SOURCES, *CORE.glob("web/*.js")]:
        line = owned(path)
        assert line.endswith("."), f"{path}: {line!r}"
        assert len(line) > 20, f"{path}: {line!r}"


def test_architecture_names_every_module_and_what_it_owns() -> None:
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    right = tables()
    if right not in page:
        pytest.fail(f"the tables of modules in docs/architecture.md are to be:\n\n{right}\n", pytrace=False)


def defined(path: Path) -> set[str]:
    """Return the functions and classes of a module, and the methods of its classes as `Class.method`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = set()
    for node in tree(path).body:
        if isinstance(node, kinds):
            names.add(node.name)
            names |= {f"{node.name}.{item.name}" for item in getattr(node, "body", ()) if isinstance(item, kinds)}
            names |= {  # attributes, as the function that loads a plugin
                f"{node.name}.{item.target.id}"
                for item in getattr(node, "body", ())
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    return names


def test_every_hop_of_the_walks_is_in_the_module_that_is_named() -> None:
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    walks = page.partition("## Four walks")[2].partition("## Modules")[0]
    hops = 0
    for item in re.findall(r"^[0-9]+\. .*(?:\n   .*)*", walks, re.MULTILINE):
        modules = [REPOSITORY / target for target in re.findall(r"\]\(\.\./([^)#]+)\)", item)]
        for name, module in re.findall(r"`([\w.]+)`,?\s+\(?\[[^\]]+\]\(\.\./([^)#]+)\)", item):
            assert name in defined(REPOSITORY / module), f"{name} is not in {module}"
            hops += 1
        for name in re.findall(r"`(_?[A-Z]\w+\.\w+)`", item):
            assert any(name in defined(module) for module in modules), f"{name} is in none of {modules}"
    assert hops > 60


def test_the_table_of_layers_is_that_of_the_imports() -> None:
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z ]+) \| ([a-z, ]+) \| `", page, re.MULTILINE)
    documented = {part: set(below.split(", ")) - {"nothing"} for part, below in rows}
    assert documented == PARTS
