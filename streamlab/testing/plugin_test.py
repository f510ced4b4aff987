"""What all test classes of plugins share: the plugin and its settings, and the run of a class with its servers."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from aiohttp import web

from streamlab.config import Config, ConfigError
from streamlab.server.app import create_app
from streamlab.server.registry import Plugin
from streamlab.server.site import REGISTRY

from .samples import EndpointForm
from .server import Server, environment, serving, write_settings


class SetupError(Exception):
    """A conformance test cannot start; the message is the reason."""


class PluginTest:
    """A test class of a plugin, with its own servers.

    The plugin is searched for in the folders of the nearest config.toml above the test, or in the nearest folder
    `plugins` above it, and among the installed ones.
    """

    plugin: ClassVar[str]
    """Its name: that of its file, folder or entry point."""
    settings: ClassVar[str] = ""
    """The server's config.toml. Relative paths in it start at the server's temporary folder; other plugins are off
    unless they have a table here."""
    values: ClassVar[Mapping[str, Any]] = {}
    """Values of parameters by name, instead of the examples that the plugin declares."""
    skipped: ClassVar[Mapping[tuple[str, str], str]] = {}
    """Why a case, named without `test_`, is skipped for an endpoint, as `("resumes_by_header", "GET /x")`, or a kind
    of task, as `("cancelled_task_ends", "task x")`; `*` means every case."""

    @classmethod
    def write_files(cls, folder: Path) -> None:
        """Write the files that the server needs into its folder before it starts."""

    @classmethod
    @contextmanager
    def serve_upstreams(cls) -> Iterator[Mapping[str, str]]:
        """Run what the plugin needs while its servers run, and yield environment variables for them.

        An upstream is served by `serving_app`, and its URL set as `STREAMLAB_SCENARIOS__NAME__KEY`.
        """
        yield {}

    @classmethod
    def _create_run(cls, folder: Path) -> "PluginRun":
        raise NotImplementedError


class PluginRun(ABC):
    """The run of one test class: what of the plugin is tested, and its servers.

    `needs` are further plugins that stay enabled, `variables` further environment variables of its servers.
    """

    def __init__(
        self,
        case: type[PluginTest],
        folder: Path,
        *,
        needs: Collection[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.case = case
        self._folder = folder
        self._settings = write_settings(folder, case.settings)
        self._upstreams: Mapping[str, str] = {}
        try:
            enabled = environment(case.plugin, self._settings, _plugin_folders(case), needs=needs)
        except LookupError as error:
            raise SetupError(f"{case.__name__}: {error}; a package must be installed first") from None
        except ConfigError as error:
            raise self._unusable(error) from None
        self._variables = {**enabled, **(variables or {})}
        self.forms = self._forms()
        """Everything that is tested."""

    def _unusable(self, error: ConfigError) -> SetupError:
        faults = "\n".join(f"  {fault.key}: {fault.reason}" for fault in error.faults)
        return SetupError(
            f"{self.case.__name__}: the attribute `settings`, the server's config.toml, is invalid:\n{faults}"
        )

    def _loaded(self) -> tuple[Plugin, web.Application]:
        """Return the plugin, and an application with it. Raises SetupError if it cannot be loaded."""
        try:
            app = create_app(Config.read(self._settings, self._variables))
        except ConfigError as error:
            raise self._unusable(error) from None
        plugin = next(one for one in app[REGISTRY].plugins if one.name == self.case.plugin)
        if plugin.state != "ready":
            raise SetupError(f"{self.case.__name__}: the plugin {plugin.name} is {plugin.state}: {plugin.reason}")
        return plugin, app

    @abstractmethod
    def _forms(self) -> Sequence[Any]:
        """Return what is tested. Raises SetupError if there is nothing."""

    @abstractmethod
    def subject(self, form: Any, server: Server, report: Any) -> Any:
        """Return the subject of a case, with what its requests need."""

    def watch(self, streams: Iterable[EndpointForm]) -> None:
        """Watch event streams from now on, concurrently, while other cases run."""
        assert not list(streams), "only endpoints have event streams"

    @contextmanager
    def server(self) -> Iterator[Server]:
        """Run a server with the plugin, and what it needs, while the block runs."""
        with self.case.serve_upstreams() as variables:
            self._upstreams = dict(variables)
            with self._serving(self._prepared("first")) as server:
                yield server

    def _prepared(self, name: str) -> Path:
        """Prepare the folder of a server, and return the path of its config.toml."""
        settings = write_settings(self._folder / name, self.case.settings)
        self.case.write_files(settings.parent)
        return settings

    def _serving(self, settings: Path, variables: Mapping[str, str] | None = None) -> AbstractContextManager[Server]:
        return serving(settings, {**self._variables, **self._upstreams, **(variables or {})})


def _plugin_folders(case: type[PluginTest]) -> tuple[Path, ...]:
    """Return the plugin folders of the nearest config.toml above the test, or the nearest folder `plugins`."""
    file = sys.modules[case.__module__].__file__
    for folder in Path(file).resolve().parents if file else ():
        if (folder / "config.toml").is_file():
            return Config.read(folder / "config.toml", {}).plugins.path
        if (folder / "plugins").is_dir():
            return (folder / "plugins",)
    return ()
