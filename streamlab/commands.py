"""Commands and terminal views of plugins, imported only when one of them may be needed."""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pluggy
import typer
from typer.core import TyperGroup

from . import hookspecs
from .client.credentials import use_token
from .client.terminal import print_error
from .config import TOKEN_VARIABLE, Config, ConfigError
from .server.registry import PROJECT, Found, find

DEFAULT_CONFIG = Path("config.toml")
"""Configuration file of commands that are given none."""

View = Callable[..., None]


class CommandGroup(TyperGroup):
    """The commands of the core; those of plugins are loaded for --help and for names that the core does not have."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names for --help: the core's first."""
        return [*super().list_commands(ctx), *sorted(plugin_commands().keys() - self.commands.keys())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command of the core, else of a plugin, or None; those that have --url have --token, too."""
        command = super().get_command(ctx, cmd_name) or plugin_commands().get(cmd_name)
        if command is not None:
            _add_token(command)
        return command


def _add_token(command: Any) -> None:
    """Add the option --token to a command, or to those of a group, that requests a server."""
    for one in getattr(command, "commands", {}).values():
        _add_token(one)
    names = {parameter.name for parameter in command.params}
    if "url" in names and "token" not in names:
        command.params.append(_token_option())


@cache
def _token_option() -> Any:
    # Typer makes options of the parameters of a function only; this one is not passed to that of the command.
    template = typer.Typer()

    @template.command()
    def _(
        token: Annotated[
            str | None,
            typer.Option(
                help=f"Send this token, or that in @FILE; without it, {TOKEN_VARIABLE} to the server at --url.",
                metavar="TOKEN",
                callback=_use_token,
            ),
        ] = None,
    ) -> None: ...

    (option,) = [one for one in typer.main.get_command(template).params if one.name == "token"]
    option.expose_value = False
    return option


def _use_token(token: str | None) -> None:
    try:
        if token is not None:
            use_token(token)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


@cache
def plugin_commands() -> dict[str, Any]:
    """Return the commands of every plugin by name; the plugin that is first in the alphabet wins a name."""
    commands: dict[str, Any] = {}

    def register(hooks: pluggy.HookRelay) -> None:
        cli = typer.Typer(rich_markup_mode=None)
        hooks.register_commands(cli=cli)
        commands.update({**typer.main.get_group(cli).commands, **commands})

    _for_each_plugin(register)
    return commands


def plugin_views() -> dict[str, View]:
    """Return the views of every plugin by name, in alphabetical order."""
    views: dict[str, View] = {}

    def register(hooks: pluggy.HookRelay) -> None:
        for provided in hooks.register_views():
            views.update({**provided, **views})

    _for_each_plugin(register)
    return dict(sorted(views.items()))


def _for_each_plugin(register: Callable[[pluggy.HookRelay], None]) -> None:
    """Call `register` with the hooks of each plugin; a plugin that fails is reported on stderr and left out."""
    for found in sorted(find(_config()), key=lambda found: (found.name, found.origin)):
        try:
            if (hooks := _hooks(found)) is not None:
                register(hooks)
        except (Exception, SystemExit) as error:
            print_error(f"streamlab: plugin {found.name}: no commands: {type(error).__name__}: {error}")


def _config() -> Config:
    """Return the configuration of this folder, for its plugin folders; the default where it is invalid."""
    try:
        return Config.read(DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    except ConfigError:
        return Config.read(None, environ={})


def _hooks(found: Found) -> pluggy.HookRelay | None:
    """Return the terminal hooks of a plugin; None where its sources contain none, so that it is not imported."""
    sources = sorted(found.sources(), key=lambda path: len(path.parts))
    terminal = next((path for path in sources if path.name == "terminal.py"), None)
    if terminal is None and not any(_has_terminal_hooks(path) for path in sources):
        return None
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(found.load() if terminal is None else _load_terminal(found.name, terminal))
    manager.check_pending()
    return manager.hook


def _has_terminal_hooks(source: Path) -> bool:
    text = source.read_text(encoding="utf-8", errors="replace")
    return "def register_commands(" in text or "def register_views(" in text


def _load_terminal(plugin: str, source: Path) -> ModuleType:
    """Import `terminal.py` of a plugin without its `__init__`, which imports what only a server needs."""
    package = f"{PROJECT}.terminals.{plugin}"
    if (module := sys.modules.get(f"{package}.terminal")) is not None:
        return module
    stub = ModuleType(package)
    stub.__path__ = [str(source.parent)]
    sys.modules[package] = stub  # so that the relative imports of terminal.py find its neighbours
    spec = importlib.util.spec_from_file_location(f"{package}.terminal", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module
