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
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pluggy
from aiohttp import web

from streamlab import hookspecs
from streamlab.config import Config, ConfigError, Fault, nearest
from streamlab.problems import Problem, public_message
from streamlab.scenario import Route, Scenario
from streamlab.streaming.outcome import StreamSummary
from streamlab.tasks import Task

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
    switched_off: list[str] = field(default_factory=list)
    """Names of its scenarios that are not built, though the plugin is imported."""
    lost_routes: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of what a failed plugin would have served."""

    @property
    def scenario_names(self) -> list[str]:
        """Every scenario it brings, built or not."""
        return [*(scenario.name for scenario in self.scenarios), *self.switched_off]

    @property
    def routes(self) -> Iterator[Route]:
        """The routes of its scenarios."""
        return (route for scenario in self.scenarios for route in scenario.routes())


class Registry:
    """Every plugin of one server, and the hooks of those in force."""

    def __init__(self) -> None:
        self.plugins: list[Plugin] = []
        self._hooks = pluggy.PluginManager(PROJECT)
        self._hooks.add_hookspecs(hookspecs)

    @classmethod
    def load(cls, config: Config) -> "Registry":
        """Find the plugins, leave out what is disabled, import the rest and build their scenarios.

        A plugin that cannot be imported fails alone. Raises ConfigError with everything that is wrong with the
        configuration, with names that two plugins claim, and with hooks that do not exist.
        """
        registry = cls()
        switches, faults = _switches(config)
        chosen: dict[str, Found] = {}
        for found in sorted(find(config), key=lambda found: (found.name, found.origin)):
            first = chosen.setdefault(found.name, found)
            if first is not found:
                both = (
                    f"two plugins have the name {found.name!r}: {first.origin} and {found.origin}; rename or remove one"
                )
                faults.append(Fault(config.source, "plugins.path", both))
        for found in chosen.values():
            faults += registry._admit(found, config, switches)
        faults += registry._unknown_tables(config)
        if everything := [*config.faults, *faults]:
            raise ConfigError(everything)
        return registry

    # -- admitting plugins

    def _admit(self, found: Found, config: Config, switches: Mapping[str, bool]) -> list[Fault]:
        """Decide about one plugin, import it if it is in force, and build its scenarios."""
        plugin = Plugin(found.name, found.origin)
        self.plugins.append(plugin)
        if not switches.get(plugin.name, True):
            plugin.state = "disabled"
            return []
        try:
            module = found.load()
            if misspelt := list(_misspelt_hooks(module)):
                return [Fault(plugin.origin, "", reason) for reason in misspelt]
            self._hooks.register(module, name=plugin.name)
            classes = self._scenario_classes(plugin.name)
            faults = [fault for item in classes for fault in self._build(plugin, item, config, switches)]
        except pluggy.PluginValidationError as error:
            return [Fault(plugin.origin, "", " ".join(str(error).split()))]
        except (Exception, SystemExit) as error:
            plugin.lost_routes = list(_declared_routes(found.sources()))
            self.fail(plugin.name, error)
            return []
        if plugin.switched_off and not plugin.scenarios:
            plugin.state = "disabled"
        return faults

    def _scenario_classes(self, plugin: str) -> list[type[Scenario]]:
        for name, ask in self._implementations("register_scenarios"):
            if name == plugin:
                answer = next(iter(ask()), None)
                if answer is None:
                    raise TypeError("register_scenarios must return Scenario classes, not None")
                for item in (classes := list(answer)):
                    if not (isinstance(item, type) and issubclass(item, Scenario)):
                        raise TypeError(f"register_scenarios must return Scenario classes, not {item!r}")
                return classes
        return []

    def _build(
        self, plugin: Plugin, scenario_class: type[Scenario], config: Config, switches: Mapping[str, bool]
    ) -> list[Fault]:
        """Make a scenario of its class and its table, and register the hooks that it answers itself."""
        name = scenario_class.name
        faults = [Fault(plugin.origin, scenario_class.__name__, reason) for reason in _misspelt_hooks(scenario_class)]
        if any(name == known for other in self.plugins for known in other.scenario_names):
            faults.append(Fault(plugin.origin, "", f"there is a scenario {name!r} already; give this another name"))
        if not faults and not switches.get(name, True):
            plugin.switched_off.append(name)
        elif not faults:
            table = {key: value for key, value in config.scenarios.get(name, {}).items() if key != "enabled"}
            scenario, faults = config.decode(scenario_class, table, "scenarios", name)
            if scenario is not None:
                plugin.scenarios.append(scenario)
                self._hooks.register(_ScenarioHooks(scenario), name=f"{plugin.name}:{name}")
            else:
                plugin.switched_off.append(name)
        return faults

    def _unknown_tables(self, config: Config) -> list[Fault]:
        """Name the tables that no plugin and no scenario reads, and the keys of those that only switch a plugin."""
        if any(plugin.state == "failed" for plugin in self.plugins):
            return []  # a table may be meant for a scenario that could not be imported
        scenarios = {name for plugin in self.plugins for name in plugin.scenario_names}
        active = {plugin.name for plugin in self.plugins if plugin.state == "ready"}
        names = scenarios | {plugin.name for plugin in self.plugins}
        faults: list[Fault] = []
        for name, table in sorted(config.scenarios.items()):
            if name not in names:
                reason = f"no plugin or scenario has this name; {nearest(name, names)}"
                faults.append(config.fault(("scenarios", name), reason))
            elif name in active - scenarios:
                own = next(map(repr, plugin.scenario_names) for plugin in self.plugins if plugin.name == name)
                reason = f"only `enabled` counts for a plugin; its scenarios have tables: {', '.join(own) or 'none'}"
                keys = (key for key in table if key != "enabled")
                faults += [config.fault(("scenarios", name, key), reason, table[key]) for key in keys]
        return faults

    # -- calling hooks

    def add(self, name: str, plugin: object) -> None:
        """Register hooks of the core itself; its metrics and its log are plugins like others."""
        self._hooks.register(plugin, name=name)

    def tasks(self) -> dict[str, Task]:
        """Every kind of task that plugins in force bring, by name; a plugin that names none rightly fails alone.

        Raises ConfigError where two of them have one name.
        """
        tasks: dict[str, Task] = {}
        owners: dict[str, str] = {}
        faults: list[Fault] = []
        for name, ask in reversed(self._implementations("register_tasks")):
            try:
                answer = list(next(iter(ask()), ()))
                for task in answer:
                    if not isinstance(task, Task):
                        raise TypeError(f"register_tasks must return Tasks, not {task!r}")
            except Exception as error:
                self.fail(name, error)
                continue
            for task in answer:
                if owner := owners.get(task.name):
                    both = f"two plugins have a task {task.name!r}: {owner} and {name}; rename one"
                    faults.append(Fault(name, "", both))
                tasks[task.name], owners[task.name] = task, name
        if faults:
            raise ConfigError(faults)
        return tasks

    def worker_lifespans(self, app: web.Application) -> list[AbstractAsyncContextManager[None]]:
        """What plugins in force hold open in a process that only works."""
        answers = [next(iter(ask(app=app)), None) for _, ask in reversed(self._implementations("worker_lifespan"))]
        return [answer for answer in answers if answer is not None]

    def lifespans(self, app: web.Application) -> Iterator[tuple[str, Callable[[], AbstractAsyncContextManager[None]]]]:
        """Every lifespan in force, in the order of the plugins, with the name to give to `fail`."""
        for name, ask in reversed(self._implementations("lifespan")):
            yield name, partial(self._lifespan, ask, app)

    @staticmethod
    def _lifespan(ask: Callable[..., list[Any]], app: web.Application) -> AbstractAsyncContextManager[None]:
        context = next(iter(ask(app=app)), None)
        if not isinstance(context, AbstractAsyncContextManager):
            raise TypeError(f"lifespan must return an async context manager, not {type(context).__name__}")
        return context

    def degraded(self) -> dict[str, str]:
        """Return the scenarios in service that work only in part, by name, each with the reason that it reports.

        A hook of a plugin's module reports for all scenarios of the plugin. One that raises, or returns anything but
        text or None, is itself a reason.
        """
        reasons: dict[str, str] = {}
        for name, report in self._implementations("health"):
            try:
                reason = next(iter(report()), None)
                if not isinstance(reason, str | None):
                    raise TypeError(f"health must return text or None, not {type(reason).__name__}")
            except Exception as error:
                reason = f"its health is unknown: {_reason(name, error)}"
            owner, _, scenario = name.partition(":")
            if reason:
                scenarios = [s.name for p in self.plugins if p.name == owner for s in p.scenarios]
                reasons |= dict.fromkeys([scenario] if scenario else scenarios, " ".join(reason.split()))
        return reasons

    def on_stream_end(self, request: web.Request, summary: StreamSummary) -> None:
        """Tell every plugin in force that a stream is over; one that raises does not keep it from the others."""
        for name, tell in self._implementations("on_stream_end"):
            try:
                tell(request=request, summary=summary)
            except Exception:
                log.exception("on_stream_end of the plugin %s failed", name)

    def fail(self, name: str, error: BaseException) -> None:
        """Take a plugin out of service: its routes answer 503 with the reason, its hooks are not called any more."""
        owner = name.partition(":")[0]
        for plugin in self.plugins:
            if plugin.name == owner:
                plugin.state, plugin.reason = "failed", _reason(owner, error)
                plugin.lost_routes += [(route.endpoint.method, route.endpoint.path) for route in plugin.routes]
        log.error("plugin %s failed", owner, exc_info=error)
        for known, registered in self._hooks.list_name_plugin():
            if known.partition(":")[0] == owner and registered is not None:
                self._hooks.unregister(registered)

    def _implementations(self, hook: str) -> list[tuple[str, Callable[..., list[Any]]]]:
        """Each plugin's own answer to a hook, by the name it is registered under, last registered first."""
        registered = self._hooks.list_name_plugin()
        names = [implementation.plugin_name for implementation in getattr(self._hooks.hook, hook).get_hookimpls()]
        return [
            (name, self._hooks.subset_hook_caller(hook, [other for known, other in registered if known != name]))
            for name in reversed(names)
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
    package = Path(__file__).resolve().parent.parent
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


def _extras() -> list[str]:
    """The extras of streamlab; one that has a plugin's name brings what that plugin needs."""
    try:
        return importlib.metadata.metadata(PROJECT).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _reason(plugin: str, error: BaseException) -> str:
    """Why a plugin failed, for people who may not see this machine: no path, and what to do where that is known."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, Problem):
        return error.detail
    if isinstance(error, ModuleNotFoundError) and error.name:
        known = plugin in _extras()
        remedy = f"pip install 'streamlab[{plugin}]'" if known else f"install what provides {error.name!r}"
        return f"needs the Python module {error.name!r}: {remedy}"
    if isinstance(error, SyntaxError):
        return f"{error.msg} (line {error.lineno} of {Path(error.filename or plugin).name})"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
    return f"{type(error).__name__}{where}: {public_message(error)}".rstrip(": ")
