"""`streamlab run --reload`: what changes without a restart, what with one, and what not at all."""

import contextlib
import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.certificates import Pair
from tests.support.connections import read_until
from tests.support.servers import (
    ENVIRONMENT,
    HELLO,
    free_port,
    without,
    write_plugins,
)

SLOW = """
    import asyncio

    from streamlab import Scenario, endpoint, hookimpl, open_stream


    class Slow(Scenario):
        @endpoint("GET", "/slow", sends="text/plain")
        async def slow(self, request):
            \"\"\"Send a word ten times a second.\"\"\"
            async with open_stream(request, "text/plain") as stream:
                while True:
                    await stream.write(b"tick")
                    await asyncio.sleep(0.1)


    @hookimpl
    def register_scenarios():
        return [Slow]
"""


def write_config(folder: Path, text: str) -> None:
    (folder / "config.toml").write_text(text)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(reached: Callable[[], bool], what: str, *, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def reloading(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a server that restarts itself, as a background job of a script; its children end with the block.

    It loads none of the plugins that ship: each restart would import them, and load the model.
    """
    with (folder / "reload.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlab", "run", "--reload", "--port", str(port)],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, **without("", ())},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def serves(port: int, path: str, expected: str) -> Callable[[], bool]:
    def check() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
                return bool(response.read().decode() == expected)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False

    return check


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see which processes are left")
def test_reload_restarts_on_a_change_and_leaves_no_process_behind(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": HELLO})
    write_config(tmp_path, "")
    port = free_port()
    with reloading(tmp_path, port) as process:
        wait_for(serves(port, "/hello", "hello 1"), "the server serves")
        (first,) = children(process.pid)
        write_plugins(tmp_path, {"hello": HELLO.replace(" 1", " 2")})
        wait_for(serves(port, "/hello", "hello 2"), "a change of a plugin is served")
        wait_for(lambda: not is_running(first), "the previous process has exited")
        write_config(tmp_path, "[scenarios.hello]\nword = 'welcome'\n")
        wait_for(serves(port, "/hello", "welcome 2"), "a change of the configuration is served")
        (last,) = children(process.pid)
        process.terminate()
        assert process.wait(10) == 0
        wait_for(lambda: not is_running(last), "the child has exited")
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port)) != 0


def test_reload_as_a_background_job_does_not_let_the_server_ignore_its_restart(tmp_path: Path) -> None:
    reports = """
        import signal
        from pathlib import Path

        Path("handler").write_text(repr(signal.getsignal(signal.SIGINT)))
    """
    write_plugins(tmp_path, {"hello": HELLO, "reports": reports})
    port = free_port()
    with reloading(tmp_path, port):
        wait_for(serves(port, "/hello", "hello 1"), "the server serves")
    assert "SIG_IGN" not in (tmp_path / "handler").read_text()


def test_a_server_that_could_not_start_starts_once_its_configuration_is_right(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": HELLO})
    write_config(tmp_path, "[scenarios.hello]\nwod = 'welcome'\n")
    port = free_port()
    with reloading(tmp_path, port):
        wait_for(lambda: "nothing was started" in (tmp_path / "reload.log").read_text(), "the fault is reported")
        write_config(tmp_path, "")
        wait_for(serves(port, "/hello", "hello 1"), "the server serves")


def test_tokens_and_certificates_change_under_an_open_stream_and_faults_change_nothing(tmp_path: Path) -> None:
    first, second, port = Pair(), Pair(), free_port()
    first.write(tmp_path / "server.pem", tmp_path / "server.key")
    write_plugins(tmp_path, {"hello": HELLO, "slow": SLOW})
    tls = '[server]\ntls_certificate = "server.pem"\ntls_key = "server.key"\n'
    allowed = '[auth]\nanonymous = ["slow:read"]\n'
    digest = hashlib.sha256(b"alice-secret").hexdigest()
    token = f'[auth.tokens.alice]\nsha256 = "{digest}"\nallow = ["hello:read"]\n'
    log = tmp_path / "reload.log"

    def status(pair: Pair) -> int:
        try:
            with pair.connected(port) as connection:
                head = "GET /hello HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer alice-secret\r\n\r\n"
                connection.sendall(head.encode())
                return int(connection.recv(12).removeprefix(b"HTTP/1.1 "))
        except OSError:
            return 0

    def reports(text: str, before: int) -> bool:
        return text in log.read_text()[before:]

    rejected = "the configuration is not reloaded: what was in force before still is"
    write_config(tmp_path, tls + allowed)
    with reloading(tmp_path, port) as process:
        wait_for(lambda: status(first) == 401, "the server serves")
        (child,) = children(process.pid)
        with first.connected(port) as stream:
            stream.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
            read_until(stream, b"tick")
            write_config(tmp_path, tls + allowed + token)
            wait_for(lambda: status(first) == 200, "the token is known")
            second.write(tmp_path / "server.pem", tmp_path / "server.key")
            wait_for(lambda: status(second) == 200, "the certificate is used")
            assert status(first) == 0
            for fault, reason in (
                ("[scenarios.hello]\nwod = 'welcome'\n", 'scenarios.hello.wod = "welcome" - unknown key'),
                ("[server\n", "config.toml: Cannot declare"),
            ):
                before = len(log.read_text())
                write_config(tmp_path, tls + allowed + fault)
                wait_for(partial(reports, rejected, before), "the fault is reported")
                assert reports(reason, before)
                assert status(second) == 200
            read_until(stream, b"tick")
        assert children(process.pid) == [child]


def test_reload_sees_the_first_plugin_of_a_folder_that_did_not_exist(tmp_path: Path) -> None:
    write_config(tmp_path, "")
    port = free_port()
    with reloading(tmp_path, port):
        wait_for(lambda: "serves http" in (tmp_path / "reload.log").read_text(), "the server serves")
        write_plugins(tmp_path, {"hello": HELLO})
        wait_for(serves(port, "/hello", "hello 1"), "the new plugin is served", seconds=5)


@pytest.mark.parametrize("options", [(), ("--reload",)])
def test_a_server_ends_with_the_terminal_in_which_it_was_started(tmp_path: Path, options: tuple[str, ...]) -> None:
    port = free_port()
    master, slave = os.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlab", "run", "--port", str(port), *options],
            cwd=tmp_path,
            stdin=slave,
            stdout=output,
            stderr=output,
            env={**os.environ, **ENVIRONMENT, **without("", ())},
            preexec_fn=take_terminal,
        )
    os.close(slave)
    try:
        wait_for(lambda: "serves http" in (tmp_path / "output").read_text(), "the server serves")
        descendants = children(process.pid)
        process.send_signal(signal.SIGHUP)  # of its operator, who has not closed the terminal
        wait_for(lambda: "reloaded defaults" in (tmp_path / "output").read_text(), "it reads the configuration")
        os.close(master)
        assert process.wait(10) == 0
        wait_for(lambda: not any(map(is_running, descendants)), "its children have exited")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
