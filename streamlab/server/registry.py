"""Which plugins exist, which are active, and the scenarios built from them."""

import importlib.metadata
import importlib.util
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import lru_cache, partial
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
    """A plugin that has been found, but not imported yet."""

    name: str
    origin: str
    """Its file, or the distribution that contains it."""
    load: Callable[[], Any]
    sources: Callable[[], Iterable[Path]]
    """A function that lists its Python files, to find the routes of a plugin that cannot be imported."""


@dataclass(slots=True)
class Plugin:
    """A plugin and its state in this server: active, disabled, or failed with a reason."""

    name: str
    origin: str
    state: State = "ready"
    reason: str = ""
    """Why it failed, for clients: without absolute paths."""
    scenarios: list[Scenario] = field(default_factory=list)
    disabled: list[str] = field(default_factory=list)
    """Names of its scenarios that are not built although the plugin is imported."""
    tasks: list[Task] = field(default_factory=list)
    """The kinds of long tasks that it registers."""
    lost_routes: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of what a failed plugin would have served."""

    @property
    def scenario_names(self) -> list[str]:
        """Return the names of its scenarios, built or not."""
        return [*(scenario.name for scenario in self.scenarios), *self.disabled]

    def state_of(self, scenario: str, reason: str) -> Mapping[str, str]:
        """Return the state of one of its scenarios, with a reason if it is degraded, as it reports, or failed."""
        if scenario in self.disabled:
            return {"state": "disabled"}
        if reason:
            return {"state": "degraded", "reason": reason}
        return {"state": self.state, **({"reason": self.reason} if self.reason else {})}

    @property
    def routes(self) -> Iterator[Route]:
        """Return the routes of its scenarios."""
        return (route for scenario in self.scenarios for route in scenario.routes())


class Registry:
    """Every plugin of one server, and the hooks of those that are active."""

    def __init__(self) -> None:
        self.plugins: list[Plugin] = []
        self._hooks = pluggy.PluginManager(PROJECT)
        self._hooks.add_hookspecs(hookspecs)
        self._found: dict[str, Sequence[tuple[str, Callable[..., Any]]]] = {}
        """The calls of each hook that was called since a plugin was last registered or taken out of service."""
        self._states: tuple[Mapping[str, str], Mapping[str, Mapping[str, str]]] | None = None
        """The states of the scenarios, with the reasons that they reported then; None once a plugin has failed."""

    @classmethod
    def load(cls, config: Config) -> "Registry":
        """Find the plugins, skip those that are disabled, import the others and build their scenarios.

        A plugin that cannot be imported does not affect the others. Raises ConfigError with every fault of the
        configuration, with names that two plugins have, and with hooks that do not exist.
        """
        registry = cls()
        switches, faults = _switches(config)
        by_name: dict[str, Found] = {}
        for found in sorted(find(config), key=lambda found: (found.name, found.origin)):
            first = by_name.setdefault(found.name, found)
            if first is not found:
                reason = (
                    f"two plugins have the name {found.name!r}: {first.origin} and {found.origin}; rename or remove one"
                )
                faults.append(Fault(config.source, "plugins.path", reason))
        for found in by_name.values():
            faults += registry._load_plugin(found, config, switches)
        faults += registry._unknown_tables(config)
        if all_faults := [*config.faults, *faults]:
            raise ConfigError(all_faults)
        return registry

    # -- loading plugins

    def _load_plugin(self, found: Found, config: Config, switches: Mapping[str, bool]) -> list[Fault]:
        """Import a plugin and build its scenarios, unless it is disabled; return what is wrong with it."""
        plugin = Plugin(found.name, found.origin)
        self.plugins.append(plugin)
        if not switches.get(plugin.name, True):
            plugin.state = "disabled"
            return []
        try:
            module = found.load()
            if misspelt := list(_misspelt_hooks(module)):
                return [Fault(plugin.origin, "", reason) for reason in misspelt]
            self.add(plugin.name, _Hooks(module, _marked(module)))
            classes = self._scenario_classes(plugin.name)
            faults = [fault for item in classes for fault in self._build(plugin, item, config, switches)]
        except pluggy.PluginValidationError as error:
            return [Fault(plugin.origin, "", " ".join(str(error).split()))]
        except (Exception, SystemExit) as error:
            plugin.lost_routes = list(_declared_routes(found.sources()))
            self.fail(plugin.name, error)
            return []
        if plugin.disabled and not plugin.scenarios:
            plugin.state = "disabled"
        return faults

    def _scenario_classes(self, plugin: str) -> list[type[Scenario]]:
        for name, call in self._calls("register_scenarios"):
            if name == plugin:
                returned = call()
                if returned is None:
                    raise TypeError("register_scenarios must return Scenario classes, not None")
                for item in (classes := list(returned)):
                    if not (isinstance(item, type) and issubclass(item, Scenario)):
                        raise TypeError(f"register_scenarios must return Scenario classes, not {item!r}")
                return classes
        return []

    def _build(
        self, plugin: Plugin, scenario_class: type[Scenario], config: Config, switches: Mapping[str, bool]
    ) -> list[Fault]:
        """Build a scenario from its class and its table, and register the hooks among its methods."""
        name = scenario_class.name
        faults = [Fault(plugin.origin, scenario_class.__name__, reason) for reason in _misspelt_hooks(scenario_class)]
        if any(name == known for other in self.plugins for known in other.scenario_names):
            faults.append(Fault(plugin.origin, "", f"there already is a scenario {name!r}; rename this one"))
        if not faults and not switches.get(name, True):
            plugin.disabled.append(name)
        elif not faults:
            scenario, faults = _decode(scenario_class, config)
            if scenario is not None:
                plugin.scenarios.append(scenario)
                names = [name for base in type(scenario).__mro__ for name in _marked(base)]
                hooks = _Hooks(scenario, {name: getattr(scenario, name) for name in names})
                self.add(f"{plugin.name}:{name}", hooks)
            else:
                plugin.disabled.append(name)
        return faults

    def faults(self, config: Config) -> list[Fault]:
        """Return what is wrong with the tables of scenarios in another configuration, as far as what is loaded knows.

        Tables may belong to plugins that are new, and are read at the next start.
        """
        _, faults = _switches(config)
        for scenario in (scenario for plugin in self.plugins for scenario in plugin.scenarios):
            faults += _decode(type(scenario), config)[1]
        has_new = {found.name for found in find(config)} - {plugin.name for plugin in self.plugins}
        return faults if has_new else [*faults, *self._unknown_tables(config)]

    def _unknown_tables(self, config: Config) -> list[Fault]:
        """Return faults for tables that nothing reads, and for keys of tables that can only disable a plugin."""
        if self.has_failed:
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
                reason = f"a plugin has only the key `enabled`; tables of its scenarios: {', '.join(own) or 'none'}"
                keys = (key for key in table if key != "enabled")
                faults += [config.fault(("scenarios", name, key), reason, table[key]) for key in keys]
        return faults

    # -- calling hooks

    def add(self, name: str, plugin: object) -> None:
        """Register hooks: those of a plugin, or of the core itself, as of its metrics and its access log."""
        self._hooks.register(plugin, name=name)
        self._found.clear()

    def tasks(self) -> dict[str, Task]:
        """Return every kind of task of the active plugins, by name; a plugin whose hook raises fails.

        Raises ConfigError where two of them have the same name.
        """
        tasks: dict[str, Task] = {}
        owners: dict[str, str] = {}
        faults: list[Fault] = []
        for name, call in self._calls("register_tasks"):
            try:
                kinds = list(call() or ())
                for task in kinds:
                    if not isinstance(task, Task):
                        raise TypeError(f"register_tasks must return Tasks, not {task!r}")
            except Exception as error:
                self.fail(name, error)
                continue
            next(one for one in self.plugins if one.name == name.partition(":")[0]).tasks += kinds
            for task in kinds:
                if owner := owners.get(task.name):
                    reason = f"two plugins have a task {task.name!r}: {owner} and {name}; rename one"
                    faults.append(Fault(name, "", reason))
                tasks[task.name], owners[task.name] = task, name
        if faults:
            raise ConfigError(faults)
        return tasks

    def worker_lifespans(self, app: web.Application) -> list[AbstractAsyncContextManager[None]]:
        """Return the worker context managers of the active plugins."""
        contexts = [call(app=app) for _, call in self._calls("worker_lifespan")]
        return [context for context in contexts if context is not None]

    def lifespans(self, app: web.Application) -> Iterator[tuple[str, Callable[[], AbstractAsyncContextManager[None]]]]:
        """Yield the lifespans of the active plugins, in their order, each with the name to pass to `fail`."""
        for name, call in self._calls("lifespan"):
            yield name, partial(self._lifespan, call, app)

    @staticmethod
    def _lifespan(call: Callable[..., Any], app: web.Application) -> AbstractAsyncContextManager[None]:
        context = call(app=app)
        if not isinstance(context, AbstractAsyncContextManager):
            raise TypeError(f"lifespan must return an async context manager, not {type(context).__name__}")
        return context

    def degraded(self) -> dict[str, str]:
        """Return the degraded scenarios by name, each with the reason that it reports.

        A hook of a plugin's module reports for all scenarios of the plugin. One that raises, or returns anything but
        text or None, is itself a reason.
        """
        reasons: dict[str, str] = {}
        for name, call in reversed(self._calls("health")):
            try:
                reason = call()
                if not isinstance(reason, str | None):
                    raise TypeError(f"health must return text or None, not {type(reason).__name__}")
            except Exception as error:
                reason = f"its health is unknown: {_reason(name, error)}"
            owner, _, scenario = name.partition(":")
            if reason:
                scenarios = [s.name for p in self.plugins if p.name == owner for s in p.scenarios]
                reasons |= dict.fromkeys([scenario] if scenario else scenarios, " ".join(reason.split()))
        return reasons

    def states(self, reasons: Mapping[str, str]) -> Mapping[str, Mapping[str, str]]:
        """Return the state of each scenario, with a reason where it is degraded (`reasons`) or failed."""
        if self._states is None or self._states[0] != reasons:
            states = {
                name: plugin.state_of(name, reasons.get(name, ""))
                for plugin in self.plugins
                for name in (plugin.scenario_names or [plugin.name])
            }
            self._states = reasons, states
        return self._states[1]

    @property
    def has_failed(self) -> bool:
        """Return whether a plugin is out of service."""
        return any(plugin.state == "failed" for plugin in self.plugins)

    def check(self, config: Config) -> Iterator[tuple[str, Fault]]:
        """Yield what cannot work on this machine, by the hook `check`, each with the name of its plugin. Blocks.

        A hook that raises is itself a fault.
        """
        for name, call in self._calls("check"):
            owner, _, scenario = name.partition(":")
            table = ("scenarios", scenario or owner)
            try:
                found = [config.fault((*table, *key.split(".")), reason) for key, reason in call() or ()]
            except Exception as error:
                found = [config.fault(table, f"it cannot be checked: {_reason(owner, error)}")]
            yield from ((owner, fault) for fault in found)

    def on_stream_end(self, request: web.Request, summary: StreamSummary) -> None:
        """Notify the active plugins that a stream has ended; one that raises does not affect the others."""
        for name, call in self._calls("on_stream_end"):
            try:
                call(request=request, summary=summary)
            except Exception:
                log.exception("on_stream_end of the plugin %s failed", name)

    def fail(self, name: str, error: BaseException) -> None:
        """Take a plugin out of service: its routes respond with 503 and the reason, its hooks are no longer called."""
        owner = name.partition(":")[0]
        for plugin in self.plugins:
            if plugin.name == owner:
                plugin.state, plugin.reason = "failed", _reason(owner, error)
                plugin.lost_routes += [(route.endpoint.method, route.endpoint.path) for route in plugin.routes]
        if isinstance(_cause(error), Problem):  # its reason is complete
            log.error("plugin %s failed: %s", owner, _reason(owner, error))
        else:
            log.error("plugin %s failed", owner, exc_info=error)
        for known, registered in self._hooks.list_name_plugin():
            if known.partition(":")[0] == owner and registered is not None:
                self._hooks.unregister(registered)
        self._found.clear()
        self._states = None

    def _calls(self, hook: str) -> Sequence[tuple[str, Callable[..., Any]]]:
        """Return each implementation of a hook with the name of its plugin, in the order of registration.

        A call takes all arguments of the hook and returns what the implementation returns.
        """
        if (calls := self._found.get(hook)) is None:
            calls = self._found[hook] = tuple(self._find_calls(hook))
        return calls

    def _find_calls(self, hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        for implementation in getattr(self._hooks.hook, hook).get_hookimpls():
            name = implementation.plugin_name
            if implementation.wrapper or implementation.hookwrapper:
                others = [plugin for known, plugin in self._hooks.list_name_plugin() if known != name]
                yield name, partial(_first, self._hooks.subset_hook_caller(hook, others))
            else:
                yield name, partial(_call, implementation.function, implementation.argnames)


def _call(function: Callable[..., Any], names: Sequence[str], **arguments: Any) -> Any:
    """Call an implementation with the arguments that it takes, as pluggy does."""
    return function(*[arguments[name] for name in names])


def _first(call: Callable[..., list[Any]], **arguments: Any) -> Any:
    """Call a hook that one plugin implements; pluggy leaves a None out of the results."""
    return next(iter(call(**arguments)), None)


def _decode(scenario_class: type[Scenario], config: Config) -> tuple[Scenario | None, list[Fault]]:
    """Return a scenario with the keys of its table; None and everything that is wrong with them otherwise."""
    name = scenario_class.name
    table = {key: value for key, value in config.scenarios.get(name, {}).items() if key != "enabled"}
    return config.decode(scenario_class, table, "scenarios", name)


def _switches(config: Config) -> tuple[dict[str, bool], list[Fault]]:
    """Return the value of `enabled` by table; in a variable it is text."""
    values = {True: True, False: False, "true": True, "false": False}
    switches: dict[str, bool] = {}
    faults: list[Fault] = []
    for name, table in config.scenarios.items():
        value = table.get("enabled", True)
        value = value.lower() if isinstance(value, str) else value
        if isinstance(value, bool | str) and value in values:
            switches[name] = values[value]
        else:
            faults.append(config.fault(("scenarios", name, "enabled"), "must be true or false", value))
    return switches, faults


def find(config: Config) -> Iterator[Found]:
    """Find plugins without importing any: built-in files, files of the drop-in folders, entry points `streamlab`."""
    folders = dict.fromkeys(folder.resolve() for folder in (builtin_folder(), *config.plugins.path))
    for folder in folders:
        if folder.is_dir():
            yield from filter(None, map(found_in, sorted(folder.iterdir())))
    for entry in _entry_points():
        distribution = entry.dist.name if entry.dist else entry.value
        yield Found(entry.name, distribution, entry.load, lambda entry=entry: _installed_sources(entry.module))  # type: ignore[misc]


def _entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    """Yield the entry points `streamlab`; parsing those of every installed package would take three times as long."""
    names = [name for folder in sys.path for name in _distributions_in(folder)]
    # Of several distributions of one name, the first on the path counts; the rest of a deleted one has no name.
    for name in dict.fromkeys(filter(None, names)):
        yield from importlib.metadata.distribution(name).entry_points.select(group=PROJECT)


@lru_cache
def _distributions_in(folder: str) -> list[str]:
    """Return the names of the distributions of a folder of sys.path that have entry points `streamlab`."""
    return [
        found.name
        for found in importlib.metadata.distributions(path=[folder])
        if f"[{PROJECT}]" in (found.read_text("entry_points.txt") or "")
    ]


def builtin_folder() -> Path:
    """Return the folder of the built-in plugins: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "plugins"
    return installed if installed.is_dir() else package.parent / "plugins"


def found_in(path: Path) -> Found | None:
    """Return the plugin that an entry of a plugin folder is; None where it is not a plugin."""
    source = _source_of(path)
    if source is None:
        return None

    def load() -> ModuleType:
        # A new module at each load, so that two applications of one process share nothing. It is put into sys.modules
        # before it runs: dataclasses look up their annotations there.
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


def _source_of(path: Path) -> Path | None:
    """Return the file to execute for an entry of a plugin folder; None where it is not a plugin."""
    if path.name.startswith((".", "_")):
        return None
    if path.suffix == ".py" and path.stem.isidentifier():
        return path
    package = path / "__init__.py"
    return package if path.name.isidentifier() and package.is_file() else None


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
    """Yield the routes of `@endpoint("GET", "/path"` in source that may not even parse."""
    for source in sources:
        text = source.read_text(encoding="utf-8", errors="replace")
        for match in re.finditer(r"""^\s*@endpoint\(\s*["'](\w+)["']\s*,\s*["'](/[^"']*)["']""", text, re.MULTILINE):
            yield match[1].upper(), match[2]


def _marked(namespace: Any) -> dict[str, Any]:
    """Return the functions of a module or class that are marked with `hookimpl`, by name."""
    mark = f"{PROJECT}_impl"
    return {name: value for name, value in vars(namespace).items() if hasattr(value, mark)}


def _misspelt_hooks(module: Any) -> Iterator[str]:
    for name in sorted(set(_marked(module)) - HOOKS):
        yield f"{name} is not a hook; {nearest(name, HOOKS)}"


class _Hooks:
    """The hooks of a module or a scenario: pluggy registers this instead, and so examines no other attribute."""

    def __init__(self, owner: Any, functions: Mapping[str, Any]) -> None:
        self.__dict__.update(functions)
        self._owner = owner  # it lives as long as its hooks are registered

    def __dir__(self) -> list[str]:
        return [name for name in self.__dict__ if name != "_owner"]


def _extras() -> list[str]:
    """Return the extras of streamlab; one with a plugin's name installs what that plugin needs."""
    try:
        return importlib.metadata.metadata(PROJECT).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _cause(error: BaseException) -> BaseException:
    """Return the exception of groups that have no other."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _reason(plugin: str, error: BaseException) -> str:
    """Return why a plugin failed, for clients: without absolute paths, and with the remedy where it is known."""
    error = _cause(error)
    if isinstance(error, Problem):
        return error.detail
    if isinstance(error, ModuleNotFoundError) and error.name:
        known = plugin in _extras()
        remedy = f"pip install 'streamlab[{plugin}]'" if known else f"install the package that contains {error.name!r}"
        return f"needs the Python module {error.name!r}: {remedy}"
    if isinstance(error, SyntaxError):
        return f"{error.msg} (line {error.lineno} of {Path(error.filename or plugin).name})"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
    return f"{type(error).__name__}{where}: {public_message(error)}".rstrip(": ")
