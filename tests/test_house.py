"""The house as a whole: who imports whom, and README's table of what every module owns."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

import streamlab

CORE = REPOSITORY / "streamlab"
PLUGINS = REPOSITORY / "plugins"

# From the outermost layer to the innermost. A module imports only from layers that stand below its own; beside that,
# the server and the clients know nothing of each other but what goes over the wire.
LAYERS = {
    "The command line": (
        ("__main__",),
        ("cli",),
        ("scaffold",),
    ),
    "The server": (
        ("__init__", "app"),
        ("site", "lifespans"),
        ("registry", "observe", "edge"),
        ("hookspecs", "events"),
        ("tasks", "replay"),
        ("hub",),
        ("openapi", "validation", "streaming", "views"),
        ("scenario", "config", "coding", "eventlog_redis", "eventlog_sqlite"),
        ("eventlog", "leases", "watchdog"),
    ),
    "The clients": (
        ("menu",),
        ("chat", "doctor", "longtask", "transfer"),
        ("terminal",),
        ("client",),
    ),
    "What both use": (("problems", "sse", "threads"),),
}
STOREYS = {name: storey for storey, layers in LAYERS.items() for layer in layers for name in layer}
ORDER = [layer for layers in LAYERS.values() for layer in layers]
HEIGHT = {name: -depth for depth, layer in enumerate(ORDER) for name in layer}

SOURCES = [*CORE.rglob("*.py"), *PLUGINS.rglob("*.py")]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, package: str) -> Iterator[tuple[str, str]]:
    """What a file imports that lies in `package`: the full name of a module, and a name taken from it, if one is."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def core_imports(path: Path) -> set[str]:
    """The modules of the core that one of them imports, wherever in it, for its types alone too."""
    found = set()
    for module, name in imports(path, "streamlab"):
        if module == "streamlab":
            found.add(name if (CORE / name).with_suffix(".py").exists() or (CORE / name).is_dir() else "__init__")
        elif module.startswith("streamlab."):
            found.add(module.split(".")[1])
    return found


def test_every_module_of_the_core_has_a_layer() -> None:
    assert sorted(STOREYS) == sorted(path.stem for path in CORE.glob("*.py"))


def test_the_core_imports_only_downward() -> None:
    pairs = [(name, imported) for name in STOREYS for imported in sorted(core_imports(CORE / f"{name}.py"))]
    assert ("cli", "app") in pairs
    assert [(name, other) for name, other in pairs if HEIGHT.get(other, 1) >= HEIGHT[name]] == []
    across = {"The server", "The clients"}
    assert [(name, other) for name, other in pairs if {STOREYS[name], STOREYS.get(other)} == across] == []


def test_the_server_names_no_plugin() -> None:
    routes = {
        word
        for path in PLUGINS.rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "endpoint"
        for argument in node.args[1:2]
        if isinstance(argument, ast.Constant) and (word := str(argument.value))
    }
    assert "/stream/stock-ticker" in routes
    names = {path.stem for path in PLUGINS.iterdir() if not path.name.startswith(("_", "."))}
    server = [name for name, storey in STOREYS.items() if storey in ("The server", "What both use")]
    said = {
        (name, node.value)
        for name in server
        for node in ast.walk(tree(CORE / f"{name}.py"))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert len(said) > 1000
    assert [(name, word) for name, word in sorted(said) if word in routes | names] == []


def test_a_plugin_imports_of_streamlab_only_its_names_for_authors() -> None:
    folders = [PLUGINS, REPOSITORY / "examples/browser"]
    taken = set()
    for folder in folders:
        for path in folder.rglob("*.py"):
            own = path.relative_to(folder).parts[0].removesuffix(".py")
            for module, name in imports(path, f"plugins.{own}"):
                root, _, inner = module.partition(".")
                assert root != "streamlab" or (not inner and name in streamlab.__all__), f"{path}: {module}.{name}"
                assert root != "plugins" or module.split(".")[1:2] == [own], f"{path}: {module}.{name}"
                taken.add((root, name))
    assert ("streamlab", "Scenario") in taken


def test_blocking_work_runs_in_threads_that_no_cancellation_abandons() -> None:
    """The threads of asyncio go on behind a cancelled caller's back: what they use may be closed under them.

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
    # aiofiles runs its operations in threads of asyncio, unless it is given others.
    wraps = [
        node
        for path in SOURCES
        if any(module.startswith("aiofiles") for module, _ in imports(path, ""))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "wrap"
    ]
    assert wraps
    assert all("executor" in {keyword.arg for keyword in call.keywords} for call in wraps)


# -- the table of README


def owned(path: Path) -> str:
    """The first line of a module's docstring; of a module of the lab page, its first comment."""
    if path.suffix == ".js":
        return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("// ")
    return (ast.get_docstring(tree(path)) or "").partition("\n")[0]


def table(title: str, paths: list[Path]) -> str:
    rows = []
    for path in paths:
        file = path.relative_to(REPOSITORY).as_posix()
        rows.append(f"| [{file.partition('/')[2]}]({file}) | {owned(path)} |")
    return "\n".join([f"| {title} | what it owns |", "| --- | --- |", *rows])


def tables() -> str:
    """Every module of the core, in the order of its layers, and of each plugin."""
    groups = {storey: [CORE / f"{name}.py" for layer in layers for name in layer] for storey, layers in LAYERS.items()}
    groups["The lab page"] = sorted(CORE.glob("web/*.js"))
    for folder in sorted(path.parent for path in CORE.glob("*/__init__.py")):
        groups[f"`streamlab.{folder.name}`"] = sorted(folder.rglob("*.py"))
    groups["The plugins that ship"] = sorted(PLUGINS.rglob("*.py"))
    return "\n\n".join(table(title, paths) for title, paths in groups.items())


def test_every_module_begins_with_a_sentence_on_what_it_owns() -> None:
    for path in [*SOURCES, *CORE.glob("web/*.js")]:
        line = owned(path)
        assert line.endswith("."), f"{path}: {line!r}"
        assert len(line) > 20, f"{path}: {line!r}"


def test_readme_names_every_module_and_what_it_owns() -> None:
    develop = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("\n## Develop\n")[2]
    right = tables()
    if right not in develop:
        pytest.fail(f"the tables of README's section Develop are to be:\n\n{right}\n", pytrace=False)
