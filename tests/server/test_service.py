"""What a server reports to systemd; several workers do in test_workers.py."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from streamlab.server.service import Service
from tests.support.servers import Running
from tests.support.service_manager import service_manager

LOADED_PLUGINS: tuple[str, ...] = ()


def test_a_server_reports_that_it_serves_reloads_works_and_stops(start: Callable[..., Running], tmp_path: Path) -> None:
    with service_manager(f"{tmp_path}/notify") as manager:
        server = start(environ={**manager.environ, "WATCHDOG_USEC": "40000"})
        process, report = manager.next("READY")
        assert (process, report) == (server.process.pid, {"READY": "1", "STATUS": f"serves {server.url}"})
        times = []
        for _ in range(5):
            assert manager.receive() == (process, {"WATCHDOG": "1"})
            times.append(time.monotonic())
        assert times[-1] - times[0] > 0.06  # each 0.02 s
        before = time.monotonic_ns() // 1000
        server.process.send_signal(signal.SIGHUP)
        _, report = manager.next("RELOADING")
        assert before <= int(report["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert manager.next("READY") == (process, {"READY": "1", "STATUS": f"serves {server.url}"})
        server.process.send_signal(signal.SIGTERM)
        assert manager.next("STOPPING") == (process, {"STOPPING": "1"})
        assert server.process.wait(10) == 0


def test_without_its_variables_a_server_reports_nothing_and_expects_no_watchdog() -> None:
    variables = {"WATCHDOG_USEC": "30000000", "OTHER": "kept"}
    service = Service(variables)
    assert (service.alive_seconds, variables) == (None, {"OTHER": "kept"})
    service.ready("serves")


def test_the_watchdog_of_another_process_is_not_that_of_this_one() -> None:
    variables = {"NOTIFY_SOCKET": "/no/such/socket", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}
    assert Service(variables).alive_seconds is None
    assert variables == {}
