"""Start and stop whatever plugins do: lifespans that hang, handlers that block the event loop or a thread."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.connections import read_until
from tests.support.servers import Running, begin, disabled, ended_at_exit, write_plugins

LOADED_PLUGINS: tuple[str, ...] = ()

HANGS = """
    import asyncio
    from contextlib import asynccontextmanager
    from streamlab import Scenario, endpoint, hookimpl
    from aiohttp import web

    class Hangs(Scenario):
        name = "hangs"

        @hookimpl
        @asynccontextmanager
        async def lifespan(self, app):
            print("the lifespan has begun", flush=True)
            await asyncio.sleep(1e9)
            yield

        @endpoint("GET", "/hangs", sends="text/plain")
        async def go(self, request):
            return web.Response(text="never")

    @hookimpl
    def register_scenarios():
        return [Hangs]
"""

SERVES = """
    import asyncio
    import time
    from contextlib import asynccontextmanager
    from pathlib import Path
    from streamlab import Scenario, endpoint, hookimpl
    from aiohttp import web

    class Serves(Scenario):
        name = "serves"

        @hookimpl
        @asynccontextmanager
        async def lifespan(self, app):
            yield
            Path("closed").touch()

        @endpoint("GET", "/quick", sends="text/plain")
        async def quick(self, request):
            return web.Response(text="quick")

        @endpoint("GET", "/slow", sends="text/plain")
        async def slow(self, request):
            print("slow has begun", flush=True)
            await asyncio.sleep(1e9)
            return web.Response(text="never")

        @endpoint("GET", "/socket", sends="text/plain")
        async def socket(self, request):
            connection = web.WebSocketResponse()
            await connection.prepare(request)
            async for message in connection:
                await connection.send_str(message.data)
            return connection

        @endpoint("GET", "/computes", sends="text/plain")
        async def computes(self, request):
            print("computes has begun", flush=True)
            while True:
                pass

        @endpoint("GET", "/sleeps", sends="text/plain")
        async def sleeps(self, request):
            print("sleeps has begun", flush=True)
            time.sleep(1e6)

        @endpoint("GET", "/thread", sends="text/plain")
        async def thread(self, request):
            print("thread has begun", flush=True)
            await asyncio.to_thread(time.sleep, 1e6)

    @hookimpl
    def register_scenarios():
        return [Serves]
"""

ALONE = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in disabled())


def wait_for_output(server: Running, text: str) -> None:
    """Wait until a plugin has printed `text`."""
    assert server.process.stdout is not None
    assert any(text in line for line in server.process.stdout)


def test_a_plugin_that_does_not_start_is_reported_and_the_others_serve(start: Callable[..., Running]) -> None:
    server = start(f"[server]\nstart_seconds = 0.3\n{ALONE}", tracebacks=True, hangs=HANGS, serves=SERVES)
    assert server.get("/quick")[2] == b"quick"
    status, _, body = server.get("/hangs")
    assert status == 503
    assert b"The plugin hangs is out of service: It did not start within 0.3 s." in body
    assert b'"degraded"' in server.get("/health")[2]
    assert "waiting for the plugin hangs to start; its limit is 0.3 s" in server.log
    assert server.terminate()[0] == 0
    assert (server.base / "closed").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_the_server(tmp_path: Path, number: int) -> None:
    write_plugins(tmp_path, {"hangs": HANGS, "serves": SERVES})
    (tmp_path / "config.toml").write_text(f"[server]\nport = 0\nstart_seconds = 3600\n{ALONE}")
    with (
        (tmp_path / "log").open("w") as log,
        ended_at_exit(begin(["run"], environ={}, cwd=tmp_path, stderr=log)) as process,
    ):
        assert process.stdout is not None
        assert any("the lifespan has begun" in line for line in process.stdout)
        process.send_signal(number)
        assert process.wait(20) == 0
    lines = (tmp_path / "log").read_text()
    assert "stopped before the start was complete" in lines
    assert "Traceback" not in lines


STOPS = """
    import os
    import signal
    import socket
    from streamlab import Scenario, endpoint, hookimpl
    from aiohttp import web

    class Stops(Scenario):
        name = "stops"

        @endpoint("GET", "/stop", sends="text/plain")
        async def stop(self, request):
            with socket.create_connection(request.transport.get_extra_info("sockname")):
                os.kill(os.getpid(), signal.SIGTERM)
            return web.Response(text="stopping")

    @hookimpl
    def register_scenarios():
        return [Stops]
"""


def test_a_connection_that_is_accepted_while_the_server_stops_is_closed(start: Callable[..., Running]) -> None:
    server = start(ALONE, stops=STOPS)
    assert server.get("/stop")[2] == b"stopping"
    assert server.process.wait(10) == 0
    assert "unclosed" not in server.log


def test_sigterm_waits_once_for_a_handler_without_a_stream(start: Callable[..., Running]) -> None:
    server = start(f"[server]\ndrain_seconds = 1\n{ALONE}", serves=SERVES)
    with server.send("GET /slow HTTP/1.1\nHost: localhost"):
        wait_for_output(server, "slow has begun")
        status, seconds = server.terminate()
    assert status == 0
    assert seconds < 2


def test_sigterm_waits_once_for_a_websocket(start: Callable[..., Running]) -> None:
    server = start(f"[server]\ndrain_seconds = 1\n{ALONE}", serves=SERVES)
    request = """
        GET /socket HTTP/1.1
        Host: localhost
        Connection: Upgrade
        Upgrade: websocket
        Sec-WebSocket-Version: 13
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==
    """
    with server.send(request) as connection:
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        status, seconds = server.terminate()
    assert status == 0
    assert seconds < 2


def test_a_handler_that_blocks_the_event_loop_is_reported_with_its_stack(start: Callable[..., Running]) -> None:
    server = start(f"[server]\ndrain_seconds = 0.2\n{ALONE}", tracebacks=True, serves=SERVES)
    with server.send("GET /computes HTTP/1.1\nHost: localhost"):
        report = server.wait_for_log("in computes")
        assert "WARNING streamlab.server.watchdog the event loop is blocked for" in report
        status, _ = server.terminate()
    assert status == 1
    assert "CRITICAL streamlab.server.watchdog not stopped 1.2 s after the signal: killing the process" in server.log


@pytest.mark.parametrize("what", ["computes", "sleeps", "thread"])
def test_sigterm_ends_the_process_whatever_runs(start: Callable[..., Running], what: str) -> None:
    server = start(f"[server]\ndrain_seconds = 0.2\n{ALONE}", tracebacks=True, serves=SERVES)
    with server.send(f"GET /{what} HTTP/1.1\nHost: localhost"):
        wait_for_output(server, f"{what} has begun")
        status, seconds = server.terminate()
    assert status == 1
    assert seconds < 2.5
    assert "not stopped 1.2 s after the signal" in server.log


LISTENS = """
    import asyncio
    import os
    import signal
    from contextlib import asynccontextmanager
    from streamlab import Scenario, endpoint, hookimpl
    from aiohttp import web

    class Listens(Scenario):
        name = "listens"

        @hookimpl
        @asynccontextmanager
        async def lifespan(self, app):
            # Not by `print`: it may be called in the middle of that of the address, and the line would be in another.
            signal.signal(signal.SIGUSR1, lambda number, frame: os.write(1, b"SIGUSR1\\n"))
            if self.config.by_loop:
                asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, lambda: print("SIGUSR2", flush=True))
            yield

        @endpoint("GET", "/quick", sends="text/plain")
        async def quick(self, request):
            return web.Response(text="quick")

    @hookimpl
    def register_scenarios():
        return [Listens]
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_other_signals_belong_to_plugins(start: Callable[..., Running], number: signal.Signals) -> None:
    """Also where a plugin uses the loop's own handlers, which take over the interpreter's file descriptor."""
    by_loop = number == signal.SIGUSR2
    server = start(listens=LISTENS.replace("self.config.by_loop", str(by_loop)))
    server.process.send_signal(number)
    assert server.process.stdout is not None
    assert next(line for line in server.process.stdout if line.startswith("SIG")) == f"{number.name}\n"
    assert server.get("/quick")[2] == b"quick"
    assert server.terminate()[0] == 0


def test_a_second_signal_ends_a_process_that_hangs(start: Callable[..., Running]) -> None:
    server = start(f"[server]\ndrain_seconds = 3600\n{ALONE}", tracebacks=True, serves=SERVES)
    with server.send("GET /sleeps HTTP/1.1\nHost: localhost"):
        wait_for_output(server, "sleeps has begun")
        server.process.send_signal(signal.SIGTERM)
        status, _ = server.terminate(signal.SIGINT)
    assert status == 1


def test_a_plugin_that_does_not_close_does_not_prevent_others_from_closing(start: Callable[..., Running]) -> None:
    stays = """
        import asyncio
        from contextlib import asynccontextmanager
        from streamlab import hookimpl

        @hookimpl
        @asynccontextmanager
        async def lifespan(app):
            try:
                yield
            finally:
                await asyncio.sleep(1e9)
    """
    server = start(f"[server]\ndrain_seconds = 1\n{ALONE}", serves=SERVES, stays=stays)
    status, _ = server.terminate()
    assert "the plugin stays did not stop in time: its lifespan is cancelled" in server.log
    assert status == 0
    assert (server.base / "closed").exists()


WORKS = """
    from contextlib import asynccontextmanager
    from streamlab import hookimpl

    @asynccontextmanager
    async def working():
        yield

    @hookimpl
    def worker_lifespan(app):
        return working()
"""


def test_a_worker_that_stops_runs_no_garbage_collection_of_imports(tmp_path: Path) -> None:
    """Seconds on a busy machine; CPU time is the same on any."""
    write_plugins(tmp_path, {"works": WORKS})
    (tmp_path / "config.toml").write_text("[scenarios.progress]\nenabled = false\n")
    before = cpu_seconds_of_children()
    command = [sys.executable, "-m", "streamlab", "worker"]
    with ended_at_exit(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)) as worker:
        assert worker.stdout is not None
        assert " runs tasks: " in worker.stdout.readline()
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        worker.terminate()
        assert worker.wait(20) == 0
    assert cpu_seconds_of_children() - before - used < 0.1


def cpu_seconds_of_children() -> float:
    """Return the CPU time of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
