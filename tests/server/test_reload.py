"""SIGHUP: what a running server takes from a changed configuration, under the streams that are open."""

import signal
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Pair
from tests.support.connections import EventStream
from tests.support.servers import Running, starting_in
from tests.support.tokens import bearer, table

LOADED_PLUGINS = ("ticker",)

Start = Callable[..., Running]

PRICES = "[scenarios.ticker]\ninterval = 0.05\n"


def reload(server: Running, expected: str) -> str:
    """Send SIGHUP, and return the log that the server writes until `expected` is in it."""
    before = len(server.log)
    server.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while expected not in (log := server.log[before:]):
        assert time.monotonic() < deadline, f"no {expected!r} in:\n{log}"
        time.sleep(0.01)
    return log


# -- certificates


def begin(connection: ssl.SSLSocket) -> None:
    connection.sendall(b"GET /stream/stock-ticker HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_certificate_is_replaced_under_open_streams_and_only_by_a_complete_pair(start: Start, tmp_path: Path) -> None:
    first, second = Pair(), Pair()
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"

    first.write(certificate, key)
    server = start(f'[server]\ntls_certificate = "server.pem"\ntls_key = "server.key"\n{PRICES}')
    with first.connected(server.port) as stream:
        begin(stream)
        for wrong, reason in (
            ((second.certificate, first.key), "is not the key of tls_certificate"),
            ((second.certificate[:400], second.key), "contains no valid certificate in PEM format"),
            ((second.certificate, second.key[:100]), "contains no valid private key in PEM format"),
        ):
            certificate.write_bytes(wrong[0])
            key.write_bytes(wrong[1])
            log = reload(server, "the configuration is not reloaded: what was in force before still is")
            assert reason in log
            with first.connected(server.port):
                pass
        second.write(certificate, key)
        reload(server, "reloaded")
        for sni in (True, False):
            with second.connected(server.port, sni=sni) as other:
                begin(other)
        with pytest.raises(ssl.SSLCertVerificationError), first.connected(server.port):
            pass
        for _ in range(3):
            assert b"data: " in stream.recv(65536)


# -- a configuration with faults


def test_what_a_restart_would_reject_is_not_taken(start: Start, tmp_path: Path) -> None:
    server = start(PRICES)
    for text, fault in (
        ('[scenarios.ticker]\ninterval = "often"\n', 'scenarios.ticker.interval = "often" - '),
        ("[scenarios.tickers]\n", "scenarios.tickers - no plugin or scenario has this name"),
        ('[server]\nhost = "0.0.0.0"\n', "others can connect to this address, and nothing says what they may do"),
        ('[events]\nurl = "sqlite:///config.toml/events.db"\n', "cannot store events there"),
    ):
        (tmp_path / "config.toml").write_text(f"{text}[auth]\nopen = false\n" if "host" not in text else text)
        log = reload(server, "the configuration is not reloaded: what was in force before still is")
        assert fault in log
        assert server.get("/stream/stock-ticker?limit=1")[0] == 200
    (tmp_path / "config.toml").write_text(f"[server]\nmax_streams = 5\n[auth]\nopen = false\n{PRICES}")
    assert "changes of [server] need a restart" in reload(server, "need a restart")
    assert server.get("/stream/stock-ticker?limit=1")[0] == 401


@pytest.mark.parametrize("text", ["", PRICES, '[server]\nhost = "127.0.0.1"\n', None])
def test_a_server_is_not_opened_by_what_is_missing(shared: Running, text: str | None) -> None:
    """The file may be empty because it is being written, and the server still listens on all addresses."""
    config = shared.base / "config.toml"
    if text is None:
        config.unlink()
        assert "No such file or directory" in reload(shared, "the configuration is not reloaded")
    else:
        config.write_text(text)
        assert "auth - nothing says any more who may do what" in reload(shared, "the configuration is not reloaded")
    assert shared.get("/stream/stock-ticker?limit=1")[0] == 401
    assert shared.get("/stream/stock-ticker?limit=1", bearer("alice"))[0] == 200


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with starting_in(tmp_path_factory.mktemp("reload"), LOADED_PLUGINS) as start:
        yield start(f'[server]\nhost = "0.0.0.0"\n{PRICES}{table("alice", "ticker:read")}')


def test_a_server_is_opened_by_the_statement_that_it_is(start: Start, tmp_path: Path) -> None:
    server = start(table("alice", "ticker:read"))
    (tmp_path / "config.toml").write_text("[auth]\nopen = true\n")
    reload(server, "reloaded")
    assert server.get("/stream/stock-ticker?limit=1")[0] == 200


def test_a_stream_of_an_open_server_ends_when_the_server_is_not_open_any_more(start: Start, tmp_path: Path) -> None:
    server = start(PRICES)
    with EventStream(server, "/stream/stock-ticker") as stream:
        stream.take(1)
        (tmp_path / "config.toml").write_text(f"[auth]\nopen = false\n{PRICES}")
        server.process.send_signal(signal.SIGHUP)
        assert list(stream)[-1].event == "unauthorized"


SLOW_START = """
    import asyncio
    import os
    import signal
    from contextlib import asynccontextmanager

    from streamlab import Scenario, hookimpl

    os.kill(os.getpid(), signal.SIGHUP)


    @hookimpl
    @asynccontextmanager
    async def lifespan(app):
        os.kill(os.getpid(), signal.SIGHUP)
        yield
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.01)
"""


def test_a_request_to_reload_ends_no_server_that_starts_or_stops(start: Start) -> None:
    server = start(PRICES, signals=SLOW_START)
    assert "reloaded" in server.wait_for_log("reloaded")
    assert server.terminate()[0] == 0
