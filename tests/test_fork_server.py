"""The fork server: its processes start and end like those of `python -m streamlab`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fork_server import ForkedProcess, ForkServer
from tests.support.servers import REPOSITORY, Running, command, disabled, ended_at_exit, free_port, starting_in

pytestmark = pytest.mark.skipif(not ForkServer.possible, reason="servers are not forked on this system")

Start = Callable[..., Running]

MIRROR = '''
    """A server that reports its state."""

    import gc
    import os
    import signal
    import sys
    import warnings
    from pathlib import Path

    from aiohttp import web

    from streamlab import Scenario, endpoint, hookimpl


    class Mirror(Scenario):
        @endpoint("GET", "/mirror")
        async def look(self, request: web.Request) -> web.Response:
            """Report the state of the process."""
            main = sys.modules["__main__"]
            links = [os.path.realpath(link) for link in Path("/proc/self/fd").glob("*")]
            handlers = map(signal.getsignal, sorted(signal.valid_signals()))
            return web.json_response(
                {
                    "argv": sys.argv,
                    "collector": gc.get_threshold(),
                    "cwd": os.getcwd(),
                    "descriptors": sorted(Path(link).name.partition(":")[0] for link in links if "/fd/" in link),
                    "environ": dict(os.environ),
                    "files": sorted(link for link in links if "/fd/" not in link),
                    "flags": list(sys.flags),
                    "main": [main.__name__, main.__file__, main.__spec__.name],
                    "modules": sorted(sys.modules),
                    "path": sys.path,
                    "signals": [getattr(handler, "__name__", str(handler)) for handler in handlers],
                    "streams": [str(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)],
                    "warnings": list(map(str, warnings.filters)),
                }
            )


        @endpoint("GET", "/broken")
        async def fail(self, request: web.Request) -> web.Response:
            """Fail."""
            raise ZeroDivisionError("the glass is broken")


    @hookimpl
    def register_scenarios():
        return [Mirror]
'''


ALONE = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in disabled())
"""No scenario but the mirror: nothing else opens files or imports modules while it looks."""


def test_a_forked_server_equals_a_fresh_one(tmp_path: Path) -> None:
    seen = []
    for fresh in (False, True):
        base = tmp_path / "same"
        base.mkdir()
        with starting_in(base) as start:
            server = start(ALONE, fresh=fresh, mirror=MIRROR)
            assert isinstance(server.process, subprocess.Popen if fresh else ForkedProcess)
            seen.append(json.loads(server.get("/mirror")[2]))
        base.rename(tmp_path / f"seen-{fresh}")
    forked, interpreter = seen
    # It has also imported what the plugins that ship need; they themselves are not to be seen.
    more = set(forked.pop("modules")) - set(interpreter.pop("modules"))
    assert not [name for name in more if name.startswith("streamlab.plugins")]
    assert forked == interpreter


def test_a_forked_server_loads_the_plugins_that_a_fresh_one_does(tmp_path: Path) -> None:
    seen = []
    for fresh in (False, True):
        base = tmp_path / str(fresh)
        base.mkdir()
        with starting_in(base) as start:
            server = start("[scenarios.export]\nenabled = false", fresh=fresh, mirror=MIRROR)
            modules = json.loads(server.get("/mirror")[2])["modules"]
            seen.append([name for name in modules if name.startswith("streamlab.")])
    assert seen[0] == seen[1]
    assert "streamlab.plugins.ticker.prices" in seen[0]
    assert "streamlab.plugins.export" not in seen[0]


UNCLOSED = """
import socket

from streamlab import hookimpl

never_closed = socket.socket()


@hookimpl
def register_scenarios():
    return []
"""


def test_a_forked_server_reports_at_its_exit_what_a_fresh_one_does(tmp_path: Path) -> None:
    logs = []
    for fresh in (False, True):
        base = tmp_path / str(fresh)
        base.mkdir()
        with starting_in(base) as start:
            server = start(ALONE, fresh=fresh, unclosed=UNCLOSED)
            assert server.terminate()[0] == 0
            logs.append([line.partition(" fd=")[0] for line in server.log.splitlines() if "Warning" in line])
    assert logs[0] == logs[1] == ["ResourceWarning: unclosed <socket.socket"]


def test_a_process_is_forked_from_one_that_has_imported_what_it_will_import(start: Start) -> None:
    for imports in ((), ("plistlib",), ()):
        server = start(ALONE, imports=imports, mirror=MIRROR)
        assert isinstance(server.process, ForkedProcess)
        assert ("plistlib" in json.loads(server.get("/mirror")[2])["modules"]) == bool(imports)


def test_interpreter_variables_require_a_fresh_server(start: Start) -> None:
    start(ALONE)
    server = start(ALONE, environ={"PYTHONUTF8": "1"}, mirror=MIRROR)
    assert isinstance(server.process, subprocess.Popen)
    assert json.loads(server.get("/mirror")[2])["environ"]["PYTHONUTF8"] == "1"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_its_end_is_reported(start: Start, number: int, status: int) -> None:
    process = start(ALONE).process
    assert isinstance(process, ForkedProcess)
    assert (process.poll(), process.returncode) == (None, None)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(number)
    assert (process.wait(10), process.poll(), process.returncode) == (status, status, status)
    process.send_signal(signal.SIGTERM)  # the process has ended, which is not an error


def test_a_server_that_does_not_start_fails_its_test_with_its_output(tmp_path: Path) -> None:
    message = r"did not start:\n.*server.drain_seconds = -1 - .*\n.*streamlab: 1 fault; nothing was started\n"
    with starting_in(tmp_path) as start, pytest.raises(AssertionError, match=message):
        start("[server]\ndrain_seconds = -1")


def test_a_traceback_fails_its_test(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError: the glass is broken"), starting_in(tmp_path) as start:
        assert start(mirror=MIRROR).get("/broken")[0] == 500


class Aborted(Exception):
    """Raised by a signal anywhere in a test, as its timeout is."""


@pytest.fixture
def aborting() -> Iterator[None]:
    def abort(number: int, frame: object) -> None:
        raise Aborted

    before = signal.signal(signal.SIGUSR1, abort)
    yield
    signal.signal(signal.SIGUSR1, before)


HANGS = '''
    """Aborts the test, and starts forever."""

    import os, signal
    from pathlib import Path

    Path("pid").write_text(str(os.getpid()))
    os.kill({test}, signal.SIGUSR1)
    signal.pause()
'''


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.usefixtures("aborting")
def test_a_server_ends_with_the_test_that_is_aborted_while_it_starts(tmp_path: Path, fresh: bool) -> None:
    with pytest.raises(Aborted), starting_in(tmp_path) as start:
        start(ALONE, fresh=fresh, hangs=HANGS.format(test=os.getpid()))
    assert not lives(Path("/proc", (tmp_path / "pid").read_text(), "stat"))


def test_a_process_ends_with_its_block_and_leaves_no_pipe_open() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    with pytest.raises(Aborted), ended_at_exit(process):
        raise Aborted
    assert process.returncode == -signal.SIGKILL
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdin.closed
    assert process.stdout.closed
    assert process.stderr.closed


def test_a_free_port_is_for_those_who_ask_for_it(start: Start) -> None:
    """No other program gets it between two servers: a listener that shares no port is what any port is given to."""
    port = free_port()
    for _ in range(2):
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        server = start(ALONE, port=port)
        assert server.get("/health")[0] == 200
        server.terminate(signal.SIGKILL)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from tests.support.fork_server import ForkedProcess
from tests.support.servers import ENVIRONMENT, FORK_SERVER, starting_in

FORK_SERVER.environ = {**os.environ, **ENVIRONMENT}
with starting_in(Path(sys.argv[1])) as start:
    process = start().process
    assert isinstance(process, ForkedProcess)
    print(process.pid, flush=True)
    signal.pause()
"""


def test_no_server_outlives_the_process_of_its_test(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environ
    ) as process:
        assert process.stdout is not None
        server = Path("/proc", process.stdout.readline().strip(), "stat")
        assert lives(server)
        process.kill()
    deadline = time.monotonic() + 10
    while lives(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lives(stat: Path) -> bool:
    """Whether a process is there, and not merely waits for the system to bury it."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_command_is_forked_with_three_pipes(start: Start, tmp_path: Path) -> None:
    with command("client", "--url", start(ALONE).url, cwd=tmp_path) as process:
        assert isinstance(process, ForkedProcess)
        out, err = process.communicate("nothing\nquit\n", timeout=20)
    assert (process.returncode, out.splitlines()[-2:]) == (0, ["view: nothing", "view: quit"])
    assert err == "'nothing' is not in the menu\n"


def test_a_command_that_does_not_end_in_time_is_killed_with_its_block(tmp_path: Path) -> None:
    with (
        command("follow", f"127.0.0.1:{free_port()}/", cwd=tmp_path) as process,
        pytest.raises(subprocess.TimeoutExpired),
    ):
        process.communicate(timeout=0.1)
    assert process.returncode == -signal.SIGKILL
