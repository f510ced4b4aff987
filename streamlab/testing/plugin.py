"""The pytest plugin of conformance tests: endpoints as parameters, the server, and a summary.

Installed as the entry point `pytest11`, so that a test module only has to inherit the class.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .plugin_test import PluginRun, PluginTest
    from .samples import EndpointForm
    from .server import Server
    from .subject import Subject
    from .tasks import TaskSubject

NO_ENDPOINT = "no endpoint of this kind"
"""The parameter of a case that applies to none of a plugin's endpoints."""

_PROPERTY = "streamlab conformance"

_tested = pytest.StashKey[dict[type, "PluginRun"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--promises`."""
    group = parser.getgroup("streamlab", "conformance of streamlab plugins")
    group.addoption(
        "--promises", action="store_true", help="report every promise: what was expected and observed, and the standard"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Create the storage for the conformance classes of this session."""
    config.stash[_tested] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize each case with the endpoints that it applies to."""
    promise = getattr(metafunc.function, "promise", None)
    if metafunc.cls is None or promise is None or "streamlab_subject" not in metafunc.fixturenames:
        return
    found = [one for one in _run_of(metafunc.config, metafunc.cls).forms if promise.of(one)]
    if promise.once:
        metafunc.parametrize("streamlab_subject", found[:1], ids=["server"], indirect=True)
    elif found:
        metafunc.parametrize("streamlab_subject", found, ids=[one.label for one in found], indirect=True)
    else:
        metafunc.parametrize("streamlab_subject", [None], ids=[NO_ENDPOINT], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases that apply to none of a plugin's endpoints; the others are broken until they report."""
    absent = [item for item in items if item.name.endswith(f"[{NO_ENDPOINT}]")]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in set(absent)]
    for item in items:
        if isinstance(item, pytest.Function) and (promise := item.function.__dict__.get("promise")) and item.cls:
            form: Any = item.callspec.params["streamlab_subject"]
            text = promise.text(label := promise.label(form), "an error before the case, in `prepare` for example")
            found = {"endpoint": label, "noun": form.noun, "case": _case(item), "verified": False, "text": text}
            _report(item, found)


def _case(item: pytest.Function) -> str:
    return item.originalname.removeprefix("test_")


def _report(item: pytest.Item, found: Mapping[str, Any]) -> None:
    """Record the result of a case for the summary; the last one counts."""
    assert isinstance(item, pytest.Function)
    assert item.cls is not None
    item.user_properties.append((_PROPERTY, json.dumps({"class": item.cls.__name__, **found})))


def _run_of(config: pytest.Config, case: "type[PluginTest]") -> "PluginRun":
    from .plugin_test import SetupError

    found = config.stash[_tested]
    if case not in found:
        folder = tempfile.TemporaryDirectory(prefix="streamlab-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        try:
            found[case] = case._create_run(Path(folder.name))
        except SetupError as error:
            raise pytest.Collector.CollectError(str(error)) from None
    return found[case]


@pytest.fixture(scope="class")
def streamlab_server(request: pytest.FixtureRequest) -> "Iterator[Server]":
    """Yield the server process of a conformance class, also for its other tests."""
    tested = _run_of(request.config, request.cls)
    with ExitStack() as stack:
        try:
            server = stack.enter_context(tested.server())
            tested.watch(_watched(request.session.items, request.cls))
        except RuntimeError as error:
            pytest.fail(str(error), pytrace=False)
        yield server


def _watched(items: Iterable[pytest.Item], case: "type[PluginTest]") -> "Iterator[EndpointForm]":
    """Yield the event streams that the selected tests of a class need to have watched."""
    from .promise import skip_reason

    for item in items:
        if isinstance(item, pytest.Function) and item.cls is case and item.function.__dict__.get("promise"):
            form: Any = item.callspec.params["streamlab_subject"]
            if item.function.promise.watches and not skip_reason(case.skipped, _case(item), form):
                yield form


@pytest.fixture
def streamlab_subject(request: pytest.FixtureRequest, streamlab_server: "Server") -> "Subject | TaskSubject":
    """Return the endpoint or the kind of task of a case."""

    from .promise import skip_reason

    if reason := skip_reason(request.cls.skipped, _case(request.node), request.param):
        pytest.skip(reason)
    run = _run_of(request.config, request.cls)
    subject: Subject | TaskSubject = run.subject(request.param, streamlab_server, partial(_report, request.node))
    return subject


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Report how many promises of each plugin were checked, and which are broken."""
    by_test: dict[str, dict[str, Any]] = {}
    for report in [one for kind in ("passed", "failed", "error") for one in terminalreporter.stats.get(kind, ())]:
        properties = getattr(report, "user_properties", ())
        found = [json.loads(text) for name, text in properties if name == _PROPERTY][-1:]
        for one in found:
            by_test[report.nodeid] = {**one, "verified": one["verified"] and report.passed}
    results = list(by_test.values())
    if not results:
        return
    terminalreporter.section("streamlab promises")
    if config.getoption("promises"):
        for one in results:
            terminalreporter.write_line(one["text"])
    for plugin in dict.fromkeys(one["class"] for one in results):
        mine = [one for one in results if one["class"] == plugin]
        verified = sum(one["verified"] for one in mine)
        endpoints, noun = len({one["endpoint"] for one in mine} - {"the server"}), mine[0]["noun"]
        noun = noun if endpoints == 1 else noun.replace("kind", "kinds") if "kind" in noun else f"{noun}s"
        broken = ", ".join(dict.fromkeys(one["case"] for one in mine if not one["verified"]))
        line = f"{plugin}: {verified} of {len(mine)} promises verified on {endpoints} {noun}"
        terminalreporter.write_line(f"{line}; broken: {broken}" if broken else line)
