"""Which plugins exist, which are in force, and the scenarios built from them."""

import importlib.metadata
import importlib.util
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import pluggy
from aiohttp import web

from . import hookspecs
from .config import Config, ConfigError, Fault, nearest
from .scenario import Route, Scenario

log = logging.getLogger(__name__)

PROJECT = hookspecs.hookspec.project_name
HOOKS = frozenset(name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), f"{PROJECT}_spec"))

State = Literal["ready", "disabled", "failed"]


@dataclass(frozen=True, slots=True)
class Found:
    """A plugin that exists, not yet imported."""

    name: str
    origin: str
    """Its file, or the distribution that brought it."""
    load: Callable[[], Any]
    sources: Callable[[], Iterable[Path]]
    """Its Python files, to learn the routes of a plugin that cannot be imported."""


@dataclass(slots=True)
class Plugin:
    """A plugin as it stands in this server: in force, switched off, or failed with a reason."""

    name: str
    origin: str
    state: State = "ready"
    reason: str = ""
    """Why it failed, in words for clients: no path of this machine."""
    scenarios: list[Scenario] = field(default_factory=list)
    lost_routes: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of what a failed plugin would have served."""

    @property
    def routes(self) -> Iterator[Route]:
        """The routes of its scenarios."""
        return (route for scenario in self.scenarios for route in scenario.routes())


class Registry:
    """Every plugin of one server, and the hooks of those in force."""

    def __init__(self) -> None:
        self.plugins: list[Plugin] = []
        self._names: set[str] = set()
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(hookspecs)

    @property
    def hook(self) -> Any:
        """Call a hook of all plugins in force: `registry.hook.on_stream_end(...)`."""
        return self.manager.hook

    @classmethod
    def load(cls, config: Config) -> "Registry":
        """Find the plugins, leave out what is disabled, import the rest and build their scenarios.

        A plugin that cannot be imported fails alone. Raises ConfigError with everything that is wrong with the
        configuration, with names that two plugins claim, and with hooks that do not exist.
        """
        registry = cls()
        switches, faults = _switches(config)
        found = sorted(find(config), key=lambda plugin: (plugin.name, plugin.origin))
        for first, second in pairwise(found):
            if first.name == second.name:
                both = f"two plugins have the name {first.name!r}: {first.origin} and {second.origin}; rename one"
                faults.append(Fault(config.source, "plugins.path", both))
        for candidate in {plugin.name: plugin for plugin in reversed(found)}.values():
            faults += registry._admit(candidate, config, switches)
        registry.plugins.sort(key=lambda plugin: plugin.name)
        faults += registry._unknown_tables(config)
        if everything := [*config.faults, *faults]:
            raise ConfigError(everything)
        return registry

    def _admit(self, candidate: Found, config: Config, switches: Mapping[str, bool]) -> list[Fault]:
        """Decide about one plugin, import it if it is in force, and build its scenarios."""
        plugin = Plugin(candidate.name, candidate.origin)
        self.plugins.append(plugin)
        self._names.add(plugin.name)
        if not switches.get(plugin.name, True):
            plugin.state = "disabled"
            return []
        try:
            module = candidate.load()
            if misspelt := list(_misspelt_hooks(module)):
                return [Fault(plugin.origin, "", reason) for reason in misspelt]
            self.manager.register(module, name=plugin.name)
            classes = self._scenario_classes(plugin.name)
        except pluggy.PluginValidationError as error:
            return [Fault(plugin.origin, "", " ".join(str(error).split()))]
        except (Exception, SystemExit) as error:
            self.fail(plugin.name, error)
            plugin.lost_routes = list(_declared_routes(candidate.sources()))
            return []
        return self._build(plugin, classes, config, switches)

    def lifespans(self, app: web.Application) -> Iterator[tuple[str, Callable[[], AbstractAsyncContextManager[None]]]]:
        """Every lifespan in force, by the name it was registered under, ready to be entered."""
        for name in [implementation.plugin_name for implementation in self.hook.lifespan.get_hookimpls()]:
            others = [other for known, other in self.manager.list_name_plugin() if known != name]
            yield name, partial(self._lifespan, others, app)

    def _lifespan(self, others: list[Any], app: web.Application) -> AbstractAsyncContextManager[None]:
        (context,) = self.manager.subset_hook_caller("lifespan", others)(app=app)
        return cast(AbstractAsyncContextManager[None], context)

    def fail(self, name: str, error: BaseException) -> None:
        """Take a plugin out of service: its routes answer 503 with the reason, its hooks are not called any more."""
        owner = name.partition(":")[0]
        for plugin in self.plugins:
            if plugin.name == owner:
                plugin.state, plugin.reason = "failed", _reason(owner, error)
        log.error("plugin %s failed", owner, exc_info=error)
        for known, registered in self.manager.list_name_plugin():
            if known.partition(":")[0] == owner and registered is not None:
                self.manager.unregister(registered)

    def _scenario_classes(self, plugin: str) -> list[type[Scenario]]:
        others = [module for name, module in self.manager.list_name_plugin() if name != plugin]
        classes = list(chain.from_iterable(self.manager.subset_hook_caller("register_scenarios", others)()))
        for item in classes:
            if not (isinstance(item, type) and issubclass(item, Scenario)):
                raise TypeError(f"register_scenarios must return Scenario classes, not {item!r}")
        return classes

    def _build(
        self, plugin: Plugin, classes: list[type[Scenario]], config: Config, switches: Mapping[str, bool]
    ) -> list[Fault]:
        taken = {scenario.name for other in self.plugins for scenario in other.scenarios}
        faults: list[Fault] = []
        for scenario_class in classes:
            name = scenario_class.name
            faults += [
                Fault(plugin.origin, scenario_class.__name__, reason) for reason in _misspelt_hooks(scenario_class)
            ]
            if name in taken:
                faults.append(Fault(plugin.origin, "", f"there is a scenario {name!r} already; give this another name"))
            self._names.add(name)
            if faults or not switches.get(name, True):
                continue
            table = {key: value for key, value in config.scenarios.get(name, {}).items() if key != "enabled"}
            scenario, wrong = config.decode(scenario_class, table, "scenarios", name)
            faults += wrong
            if scenario is not None:
                plugin.scenarios.append(scenario)
                taken.add(name)
                self.manager.register(_ScenarioHooks(scenario), name=f"{plugin.name}:{name}")
        if classes and not plugin.scenarios and not faults:
            plugin.state = "disabled"
        return faults

    def _unknown_tables(self, config: Config) -> list[Fault]:
        if any(plugin.state == "failed" for plugin in self.plugins):
            return []  # a table may be meant for a scenario that could not be imported
        return [
            config.fault(("scenarios", name), f"no plugin or scenario has this name; {nearest(name, self._names)}")
            for name in sorted(set(config.scenarios) - self._names)
        ]


def _switches(config: Config) -> tuple[dict[str, bool], list[Fault]]:
    """Which tables say `enabled = false`; a variable says it as text."""
    words = {True: True, False: False, "true": True, "false": False}
    switches: dict[str, bool] = {}
    faults: list[Fault] = []
    for name, table in config.scenarios.items():
        value = table.get("enabled", True)
        value = value.lower() if isinstance(value, str) else value
        if isinstance(value, bool | str) and value in words:
            switches[name] = words[value]
        else:
            faults.append(config.fault(("scenarios", name, "enabled"), "must be true or false", value))
    return switches, faults


def find(config: Config) -> Iterator[Found]:
    """Find plugins without importing any: files that ship, files of the drop-in folders, entry points `streamlab`."""
    folders = dict.fromkeys(folder.resolve() for folder in (_shipped_folder(), *config.plugins.path))
    for folder in folders:
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if (source := _source_of(path)) is not None:
                    yield _file_plugin(path, source)
    for entry in importlib.metadata.entry_points(group=PROJECT):
        distribution = entry.dist.name if entry.dist else entry.value
        yield Found(entry.name, distribution, entry.load, lambda entry=entry: _installed_sources(entry.module))  # type: ignore[misc]


def _shipped_folder() -> Path:
    """Where the plugins that ship are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "plugins"
    return installed if installed.is_dir() else package.parent / "plugins"


def _source_of(path: Path) -> Path | None:
    """The file to execute for an entry of a plugin folder; None where it is no plugin."""
    if path.name.startswith((".", "_")):
        return None
    if path.suffix == ".py" and path.stem.isidentifier():
        return path
    package = path / "__init__.py"
    return package if path.name.isidentifier() and package.is_file() else None


def _file_plugin(path: Path, source: Path) -> Found:
    def load() -> ModuleType:
        # A module of its own at each load, so that two applications of one process share nothing. It is entered in
        # sys.modules before it runs: dataclasses look their annotations up there.
        name = f"streamlab.plugins.{path.stem}"
        for stale in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
            del sys.modules[stale]
        locations = [str(path)] if source != path else None
        spec = importlib.util.spec_from_file_location(name, source, submodule_search_locations=locations)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    return Found(path.stem, str(path), load, lambda: path.rglob("*.py") if path.is_dir() else [path])


def _installed_sources(module: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(module)
    except Exception:
        return []
    if spec is None or spec.origin is None:
        return []
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]


def _declared_routes(sources: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Read `@endpoint("GET", "/path"` out of source that may not even parse."""
    for source in sources:
        text = source.read_text(encoding="utf-8", errors="replace")
        for match in re.finditer(r"""^\s*@endpoint\(\s*["'](\w+)["']\s*,\s*["'](/[^"']*)["']""", text, re.MULTILINE):
            yield match[1].upper(), match[2]


def _marked(namespace: Any) -> dict[str, Any]:
    """The functions of a module or class that carry the mark `hookimpl`, by name."""
    mark = f"{PROJECT}_impl"
    return {name: value for name, value in vars(namespace).items() if hasattr(value, mark)}


def _misspelt_hooks(module: Any) -> Iterator[str]:
    for name in sorted(set(_marked(module)) - HOOKS):
        yield f"{name} is not a hook; {nearest(name, HOOKS)}"


class _ScenarioHooks:
    """The hooks a scenario answers itself, as methods: what pluggy registers in its place."""

    def __init__(self, scenario: Scenario) -> None:
        names = {name for base in type(scenario).__mro__ for name in _marked(base)}
        self.__dict__.update({name: getattr(scenario, name) for name in names})


def _reason(plugin: str, error: BaseException) -> str:
    """Why a plugin failed, for people who may not see this machine: no path, and what to do where that is known."""
    if isinstance(error, ImportError) and error.name:
        extras = importlib.metadata.metadata(PROJECT).get_all("Provides-Extra") or []
        remedy = f"pip install 'streamlab[{plugin}]'" if plugin in extras else f"install what provides {error.name!r}"
        return f"needs the Python module {error.name!r}: {remedy}"
    if isinstance(error, SyntaxError):
        return f"{error.msg} (line {error.lineno} of {Path(error.filename or plugin).name})"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
    detail = error.strerror if isinstance(error, OSError) else str(error)
    without_paths = re.sub(r"(?<![\w.])/[\w./-]+", "...", detail or "")
    return f"{type(error).__name__}{where}: {without_paths}".rstrip(": ")
