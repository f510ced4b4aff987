"""The conformance test of a plugin's endpoints: what each needs, its servers, and their cached responses."""

import asyncio
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from streamlab.server import openapi
from streamlab.server.site import ROUTES

from .access import ANONYMOUS, HOLDER, Access, AccessCases, Ended
from .downloads import Downloads
from .event_streams import EventStreams
from .plugin_test import PluginRun, PluginTest, SetupError
from .process import ServerProcess
from .promise import skip_reason
from .responses import EndpointCases
from .samples import EndpointForm, forms
from .server import Server
from .stopping import Stopped, Stopping, stopped
from .streams import Streams
from .subject import Cache, Subject
from .watching import Watched, watch


class Conformance(ServerProcess, Stopping, EventStreams, Downloads, Streams, AccessCases, EndpointCases, PluginTest):
    """The promises of every stream, checked for each endpoint of a plugin on its own server process.

    Inherit it in a test module, and name the plugin::

        class TestGreeter(Conformance):
            plugin = "greeter"

    Requests are built from the examples in the OpenAPI document.
    """

    large: ClassVar[Mapping[str, Any]] = {}
    """Values that make responses as long as possible: for clients that disconnect or stall, and for the stop."""
    data_is_json: ClassVar[bool] = True
    """Whether the data of every event is JSON."""
    nondeterministic: ClassVar[Collection[str]] = ()
    """Endpoints, as `GET /x`, whose body may differ for the same request, as a language model's: bodies are checked to
    be complete, but not compared."""
    public: ClassVar[Collection[str]] = ()
    """Endpoints, as `GET /x`, that everybody may use, also without credentials, on purpose."""
    scopes: ClassVar[Collection[str]] = ()
    """Scopes of other scenarios that its endpoints need, as `export:read:orders`."""

    @classmethod
    def prepare(cls, server: Server, form: EndpointForm) -> Mapping[str, Any]:
        """Create what an endpoint needs before each case, and return values for its request, such as an id."""
        return {}

    @classmethod
    def _create_run(cls, folder: Path) -> "ConformanceRun":
        return ConformanceRun(cls, folder)


class ConformanceRun(PluginRun):
    """The run of one conformance class: its endpoints, its servers, and their cached responses."""

    case: type[Conformance]

    def __init__(self, case: type[Conformance], folder: Path) -> None:
        super().__init__(case, folder)
        self._cache = Cache(frozenset(case.nondeterministic))
        self._access: Access | None = None
        self._closing = ExitStack()
        self._watched: dict[str, Future[Watched]] = {}
        self._stopped: Stopped | None = None

    def _forms(self) -> list[EndpointForm]:
        """Return each endpoint in the OpenAPI document of the server, once for each of its forms."""
        plugin, app = self._loaded()
        described = dict.fromkeys(plugin.scenario_names, "")
        routes = app[ROUTES]
        self._scenarios = tuple(plugin.scenario_names)
        self._endpoints = {f"{r.endpoint.method} {r.endpoint.template}": r.endpoint for r in routes}
        found = forms(openapi.document(routes, version="", described=described), frozenset(described))
        if not found:
            hint = "; its tasks are tested by TaskConformance" if plugin.tasks else ""
            raise SetupError(f"{self.case.__name__}: the plugin {plugin.name} has no endpoint{hint}")
        return found

    @contextmanager
    def server(self) -> Iterator[Server]:
        """Run a server with the plugin while the block runs, and a second one once it is needed."""
        try:
            with super().server() as server, self._closing:
                yield server
        finally:
            self._access = None
            self._watched.clear()

    def access(self) -> Access:
        """Return the second server, which decides by tokens; the first call starts it.

        It is also the one whose streams are watched, and which is stopped at the end.
        """
        if self._access is None:
            settings, case = self._prepared("second"), self.case
            access = Access(settings, self._scenarios, case.scopes, case.public, self._endpoints)
            access.server = self._closing.enter_context(self._serving(settings, ANONYMOUS))
            access.server = access.as_(HOLDER)
            self._access = access
        return self._access

    async def _ended(self, form: EndpointForm) -> Sequence[Ended]:
        tested = [form for form in self.forms if not skip_reason(self.case.skipped, "stream_ends_with_its_token", form)]
        found = await self.access().ended(tested, lambda form, server: self.subject(form, server, print))
        return found[form.label]

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
            self.access,
            partial(self._ended, form),
            lambda server: self.subject(form, server, report),
            prepared,
        )

    def watch(self, streams: Iterable[EndpointForm]) -> None:
        """Watch event streams of the second server from now on, concurrently, while other cases run."""
        chosen = {form.label: form for form in streams}
        if chosen:
            threads = self._closing.enter_context(ThreadPoolExecutor(len(chosen)))
            server = self.access().server  # it ends before the threads do, which ends what they read
            self._watched = {label: threads.submit(self._watch, form, server) for label, form in chosen.items()}

    def _watch(self, form: EndpointForm, server: Server) -> Watched:
        return asyncio.run(watch(self.subject(form, server, print)))

    def stopped(self) -> Stopped:
        """Stop the second server with a stream of each endpoint open, once its streams have been watched."""
        if self._stopped is None:
            wait(self._watched.values())
            server = self.access().server
            subjects = [self.subject(form, server, print) for form in self.forms]
            self._stopped = asyncio.run(stopped(server, subjects))
        return self._stopped
