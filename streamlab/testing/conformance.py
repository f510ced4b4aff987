"""The class that a plugin's test inherits: which plugin, with which settings, and what each endpoint needs."""

import asyncio
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from streamlab.config import Config, ConfigError
from streamlab.server import openapi
from streamlab.server.app import create_app
from streamlab.server.site import REGISTRY, ROUTES

from .downloads import Downloads
from .event_streams import EventStreams
from .responses import EndpointCases
from .samples import EndpointForm, forms
from .server import Server, environment, serving, write_settings
from .stopping import Stopped, Stopping, stopped
from .streams import Streams
from .subject import Cache, Subject
from .watching import Watched, watch


class SetupError(Exception):
    """A conformance test cannot start; the message is the reason."""


class Conformance(Stopping, EventStreams, Downloads, Streams, EndpointCases):
    """The promises of every stream, checked for each endpoint of a plugin on its own server process.

    Inherit it in a test module, and name the plugin::

        class TestGreeter(Conformance):
            plugin = "greeter"

    The plugin is searched for in the folders of the nearest config.toml above the test, or in the nearest folder
    `plugins` above it, and among the installed ones. Requests are built from the examples in the OpenAPI document.
    """

    plugin: ClassVar[str]
    """Its name: that of its file, folder or entry point."""
    settings: ClassVar[str] = ""
    """The server's config.toml. Relative paths in it start at the server's temporary folder; other plugins are off
    unless they have a table here."""
    values: ClassVar[Mapping[str, Any]] = {}
    """Values of parameters by name, instead of the examples that the endpoints declare."""
    large: ClassVar[Mapping[str, Any]] = {}
    """Values that make responses as long as possible: for clients that disconnect or stall, and for the stop."""
    data_is_json: ClassVar[bool] = True
    """Whether the data of every event is JSON."""
    nondeterministic: ClassVar[Collection[str]] = ()
    """Endpoints, as `GET /x`, whose body may differ for the same request, as a language model's: bodies are checked to
    be complete, but not compared."""
    skipped: ClassVar[Mapping[tuple[str, str], str]] = {}
    """Why a case, named without `test_`, is skipped for an endpoint, as `("resumes_by_header", "GET /x")`; `*` means
    every case."""

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
    def prepare(cls, server: Server, form: EndpointForm) -> Mapping[str, Any]:
        """Create what an endpoint needs before each case, and return values for its request, such as an id."""
        return {}


class ConformanceRun:
    """The run of one conformance class: its endpoints, its servers, and their cached responses."""

    def __init__(self, case: type[Conformance], folder: Path) -> None:
        self.case = case
        self._folder = folder
        self._settings = write_settings(folder, case.settings)
        try:
            self._variables = environment(case.plugin, self._settings, _plugin_folders(case))
        except LookupError as error:
            raise SetupError(f"{case.__name__}: {error}; a package must be installed first") from None
        except ConfigError as error:
            raise self._unusable(error) from None
        self._cache = Cache(frozenset(case.nondeterministic))
        self._upstreams: Mapping[str, str] = {}
        self._second: Server | None = None
        self._closing = ExitStack()
        self._watched: dict[str, Future[Watched]] = {}
        self._stopped: Stopped | None = None
        self.forms = self._forms()
        """Every endpoint of the plugin, once for each of its forms."""

    def _unusable(self, error: ConfigError) -> SetupError:
        faults = "\n".join(f"  {fault.key}: {fault.reason}" for fault in error.faults)
        return SetupError(
            f"{self.case.__name__}: the attribute `settings`, the server's config.toml, is invalid:\n{faults}"
        )

    def _forms(self) -> list[EndpointForm]:
        """Return the endpoints in the OpenAPI document of the server. Raises SetupError if the plugin has none."""
        try:
            app = create_app(Config.read(self._settings, self._variables))
        except ConfigError as error:
            raise self._unusable(error) from None
        plugin = next(one for one in app[REGISTRY].plugins if one.name == self.case.plugin)
        if plugin.state != "ready":
            raise SetupError(f"{self.case.__name__}: the plugin {plugin.name} is {plugin.state}: {plugin.reason}")
        described = dict.fromkeys(plugin.scenario_names, "")
        routes = app[ROUTES]
        found = forms(openapi.document(routes, version="", described=described), frozenset(described))
        if not found:
            raise SetupError(f"{self.case.__name__}: the plugin {plugin.name} has no endpoint")
        return found

    @contextmanager
    def server(self) -> Iterator[Server]:
        """Run a server with the plugin while the block runs, and a second one once it is needed."""
        try:
            with self.case.serve_upstreams() as variables:
                self._upstreams = dict(variables)
                with self._serving("first") as server, self._closing:
                    yield server
        finally:
            self._second = None
            self._watched.clear()

    def _serving(self, name: str) -> AbstractContextManager[Server]:
        settings = write_settings(self._folder / name, self.case.settings)
        self.case.write_files(settings.parent)
        return serving(settings, {**self._variables, **self._upstreams})

    def _second_server(self) -> Server:
        """Return the server whose streams are watched and which is stopped at the end; the first call starts it."""
        if self._second is None:
            self._second = self._closing.enter_context(self._serving("second"))
        return self._second

    def subject(self, form: EndpointForm, server: Server, report: Any) -> Subject:
        """Return an endpoint with what its requests need."""
        prepared = self.case.prepare(server, form)
        case = self.case
        return Subject(
            form,
            server,
            {**case.values, **prepared},
            case.large,
            case.data_is_json,
            self._cache,
            report,
            self._watched.get(form.label),
            self.stopped,
        )

    def watch(self, streams: Iterable[EndpointForm]) -> None:
        """Watch event streams of the second server from now on, concurrently, while other cases run."""
        chosen = {form.label: form for form in streams}
        if chosen:
            threads = self._closing.enter_context(ThreadPoolExecutor(len(chosen)))
            server = self._second_server()  # it ends before the threads do, which ends what they read
            self._watched = {label: threads.submit(self._watch, form, server) for label, form in chosen.items()}

    def _watch(self, form: EndpointForm, server: Server) -> Watched:
        return asyncio.run(watch(self.subject(form, server, print)))

    def stopped(self) -> Stopped:
        """Stop the second server with a stream of each endpoint open, once its streams have been watched."""
        if self._stopped is None:
            wait(self._watched.values())
            server = self._second_server()
            subjects = [self.subject(form, server, print) for form in self.forms]
            self._stopped = asyncio.run(stopped(server, subjects))
        return self._stopped


def _plugin_folders(case: type[Conformance]) -> tuple[Path, ...]:
    """Return the plugin folders of the nearest config.toml above the test, or the nearest folder `plugins`."""
    file = sys.modules[case.__module__].__file__
    for folder in Path(file).resolve().parents if file else ():
        if (folder / "config.toml").is_file():
            return Config.read(folder / "config.toml", {}).plugins.path
        if (folder / "plugins").is_dir():
            return (folder / "plugins",)
    return ()
