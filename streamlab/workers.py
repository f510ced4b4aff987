"""The process of `run` with several workers: it listens, starts and stops them, and restarts those that die."""

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from .config import Config, ConfigError, Source
from .server.app import STOP_SECONDS
from .server.authorization import is_open
from .server.board import Board
from .server.listening import Listening
from .server.reload import Terminal, opening_faults
from .server.service import Service
from .server.watchdog import SECOND_SIGNAL_SECONDS, STOP_SIGNALS
from .server.worker import Assignment, Report

log = logging.getLogger(__name__)

SHORTEST_DELAY, LONGEST_DELAY = 0.1, 10.0
"""Time after which a worker is restarted that has died, in seconds; it doubles each time that it dies again."""

STEADY_SECONDS = 10.0
"""Time for which a worker has to run for the next restart to have the shortest delay again, in seconds."""

KILL_SECONDS = 0.5
"""Maximum time for a worker to kill itself, as its watchdog does, before it is killed, in seconds."""

CHECK_SECONDS = 1.0
"""Interval at which it is checked whether workers hang, in seconds."""

KILL_AGAIN_SECONDS = 60.0
"""Time after which a process is killed again that the kernel has not ended, in seconds."""

_HANDLED = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD)


@dataclass(eq=False)
class _Process:
    """A process of a worker."""

    number: int
    generation: int
    """Of its configuration: it grows with every reload."""
    process: subprocess.Popen[bytes]
    connection: socket.socket
    started_at: float
    drain_seconds: float
    received: bytes = b""
    report: Report | None = None
    """None while it starts."""
    kill_at: float | None = None
    """When it is killed; None unless it stops."""
    beat: int = 0
    """What its row had when it was last seen to run, or to start, and the time of that."""
    ran_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.ran_at = self.started_at

    @property
    def is_ready(self) -> bool:
        """Whether it has reported that it serves."""
        return self.report is not None and not self.report.faults

    def __str__(self) -> str:
        return f"worker {self.number} (process {self.process.pid})"


class Supervisor:
    """The workers of a server, from their start until all have ended. One thread, in which nothing blocks.

    `on_ready` is called with what a worker announces once all of them serve; `service` is notified, too. `read` is
    called at a SIGHUP: each worker is replaced by one with the configuration that it returns, one after the other,
    unless that is invalid. With `may_restart`, all of them end where the server has to listen elsewhere; `restarts` is
    set then.
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        listening: Listening,
        *,
        service: Service,
        read: Callable[[], Source],
        on_ready: Callable[[str], None],
        may_restart: bool = False,
    ) -> None:
        self.restarts = False
        self._source, self._config, self._generation = source, config, 0
        """What is in force: a worker that dies is restarted with it, whatever the file has become."""
        self._listening, self._read, self._on_ready, self._may_restart = listening, read, on_ready, may_restart
        self._folder = tempfile.TemporaryDirectory(prefix="streamlab-workers-")
        """For what the workers share."""
        self._board = Board(Path(self._folder.name))
        self._service, self._alive_at = service, 0.0
        self._checked_at = 0.0
        self._terminal = Terminal()
        self._selector = selectors.DefaultSelector()
        self._processes: list[_Process] = []
        self._delays: dict[int, float] = {}
        self._due: dict[int, float] = {}
        """The times at which workers that have died are restarted, by number."""
        self._is_serving = self._is_stopping = False
        self._failed: Report | None = None
        """Set when a worker could not start, and so the server."""
        self._reload_requested = self._is_reloading = False
        self._next: tuple[Source, Config] | None = None
        self._trial: _Process | None = None
        """The first worker with the next configuration: it decides whether that can be used."""
        self._status = 0

    def run(self) -> int:
        """Supervise until a stop signal, and until all workers have ended; return the exit status.

        Raises ConfigError where a worker could not start. A second signal aborts what is still open.
        """
        with self._signals() as signals, self._folder:
            self._selector.register(signals, selectors.EVENT_READ)
            for _ in range(self._config.server.processes):
                if self._start(self._source, self._config) is None:
                    self._status = 1
                    self._stop()
                    break
            while self._processes or not self._is_stopping:
                for key, _ in self._selector.select(self._seconds_to_wait()):
                    if key.data is None:
                        for number in os.read(signals, 64):
                            self._handle(number)
                    else:
                        self._receive(key.data)
                self._reap()
                self._kill_hung(time.monotonic())
                self._step(time.monotonic())
                self._report_alive()
        if self._failed is not None and self._failed.faults:
            raise ConfigError(self._failed.faults)
        return self._status

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """Yield a descriptor that every signal is written to, also one that came since `hold_reload_requests`."""

        def ignore(number: int, frame: FrameType | None) -> None: ...

        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in _HANDLED:
            signal.signal(number, ignore)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        yield reader

    def _handle(self, number: int) -> None:
        if number in STOP_SIGNALS or (number == signal.SIGHUP and self._terminal.is_closed()):
            self._stop()
        elif number == signal.SIGHUP:
            self._reload_requested = True

    def _seconds_to_wait(self) -> float | None:
        times = [process.kill_at for process in self._processes if process.kill_at is not None]
        times += () if self._is_stopping else self._due.values()
        if self._is_serving and not self._is_stopping:
            times.append(self._checked_at + CHECK_SECONDS)
        if self._service.alive_seconds is not None:
            times.append(self._alive_at + self._service.alive_seconds)
        return max(0.0, min(times) - time.monotonic()) if times else None

    # -- one process

    def _start(self, source: Source, config: Config, number: int | None = None) -> _Process | None:
        """Start a worker; return None, and try it later, where the system has no resources for it."""
        taken = {process.number for process in self._processes} | self._due.keys()
        number = number or next(free for free in range(1, len(taken) + 2) if free not in taken)
        sockets = [listening.fileno() for listening in self._listening.sockets]
        assignment = Assignment(number, config.server.processes, sockets, Path(self._folder.name), source)
        try:
            popen, connection = _spawn(assignment)
        except OSError as error:
            self._retry(number, 0.0, f"worker {number} cannot be started: {error.strerror}")
            return None
        drain_seconds = config.server.drain_seconds
        process = _Process(number, self._generation, popen, connection, time.monotonic(), drain_seconds)
        self._processes.append(process)
        self._board.row(number).set("starting", popen.pid)
        self._selector.register(connection, selectors.EVENT_READ, process)
        return process

    def _retry(self, number: int, ran: float, reason: str) -> None:
        """Start a worker again after a delay, which grows unless it ran for a while."""
        before = self._delays.get(number, 0) if ran < STEADY_SECONDS else 0
        delay = self._delays[number] = min(LONGEST_DELAY, max(SHORTEST_DELAY, 2 * before))
        self._due[number] = time.monotonic() + delay
        self._board.row(number).set("restarting")
        log.error("%s: restarting it in %g s", reason, delay)

    def _receive(self, process: _Process) -> None:
        """Read what a worker reports."""
        try:
            while data := process.connection.recv(65536):
                process.received += data
            self._close(process)  # its end follows by SIGCHLD
        except BlockingIOError:
            pass
        except ConnectionError:
            self._close(process)
        if process.report is None and process.received.endswith(b"\n"):
            process.report = Report.decode(process.received)
            if process.is_ready and process.kill_at is None:
                self._board.row(process.number).set("serving", process.process.pid)

    def _close(self, process: _Process) -> None:
        """Close the connection with a worker, if it is open."""
        if process.connection.fileno() >= 0:
            self._selector.unregister(process.connection)
            process.connection.close()

    def _terminate(self, process: _Process) -> None:
        """Let a worker drain, or abort what it drains; kill it if it takes longer than its watchdog allows."""
        now = time.monotonic()
        kill_at = now + process.drain_seconds + STOP_SECONDS + KILL_SECONDS
        if process.kill_at is not None:
            kill_at = min(process.kill_at, now + SECOND_SIGNAL_SECONDS + KILL_SECONDS)
        process.kill_at = kill_at
        self._board.row(process.number).set("stopping", process.process.pid)
        process.process.terminate()

    def _reap(self) -> None:
        """Take note of the processes that have ended, and kill those that should have."""
        for process in tuple(self._processes):
            if process.process.poll() is not None:
                if process.connection.fileno() >= 0:
                    self._receive(process)
                self._close(process)
                self._processes.remove(process)
                self._board.row(process.number).set("none")
                self._note_end(process)
            elif process.kill_at is not None and (now := time.monotonic()) >= process.kill_at:
                log.error("%s has not stopped: killing it", process)
                process.process.kill()
                process.kill_at = now + KILL_AGAIN_SECONDS

    def _kill_hung(self, now: float) -> None:
        """Kill workers whose event loops have not run for too long: their connections are lost, but no others wait."""
        if now < self._checked_at + CHECK_SECONDS:
            return
        was_suspended = now > self._checked_at + 2 * CHECK_SECONDS  # this process, and maybe all others with it
        self._checked_at = now
        for process in self._processes:
            beat = self._board.row(process.number).beat
            if not process.is_ready or was_suspended or beat != process.beat:
                process.beat, process.ran_at = beat, now
            elif process.kill_at is None and now - process.ran_at > (seconds := self._config.server.hang_seconds):
                log.error("%s has not run for %g s: killing it", process, seconds)
                process.process.kill()
                process.ran_at = now + KILL_AGAIN_SECONDS

    def _note_end(self, process: _Process) -> None:
        """Decide what follows the end of a process."""
        status = process.process.returncode
        how = f"was killed by {_name(-status)}" if status < 0 else f"ended with status {status}"
        if process.kill_at is not None:  # as it should
            if self._is_stopping and status in (1, -signal.SIGKILL):
                self._status = 1
            log.info("%s has stopped", process)
            return
        if not self._is_serving:
            if self._failed is None:
                self._failed, self._status = process.report or Report(), 1
                if not self._failed.faults:
                    log.error("%s %s before it served; nothing was started", process, how)
                self._stop()
            return
        for fault in process.report.faults if process.report is not None else ():
            log.error("%s", fault)
        if process is self._trial:
            self._trial = self._next = None
            log.error("%s %s before it served", process, how)
            log.error("the configuration is not reloaded: what was in force before still is")
            return
        self._retry(process.number, time.monotonic() - process.started_at, f"{process} {how}")

    # -- all of them

    def _stop(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._service.stopping()
            self._listening.close()
        for process in self._processes:
            self._terminate(process)

    def _step(self, now: float) -> None:
        """Start and stop at most what is needed next to have as many workers as configured, all with what is in force.

        One at a time: there are never more than one worker too many, and never fewer that serve than are configured.
        """
        if self._is_stopping:
            return
        active = [process for process in self._processes if process.kill_at is None]
        if not self._is_serving:
            if not all(process.is_ready for process in active):
                return
            self._is_serving = True
            assert active[0].report is not None
            self._on_ready(active[0].report.announcement)
            self._report_ready()
        if self._trial is not None and self._trial.is_ready:
            self._take_next(self._trial)
        if self._reload_requested and self._trial is None:
            self._reload_requested, self._is_reloading = False, True
            self._service.reloading()
            self._reload()
        target = self._config.server.processes
        for number, due in tuple(self._due.items()):
            if len(active) >= target:
                del self._due[number]
                self._board.row(number).set("none")
            elif due <= now:
                del self._due[number]
                if (restarted := self._start(self._source, self._config, number)) is not None:
                    active.append(restarted)
        if self._due or len(active) < len(self._processes) or not all(process.is_ready for process in active):
            return
        old = [process for process in active if process.generation < self._generation]
        if len(active) > target:
            self._terminate((old or active)[0])
        elif self._next is not None:
            self._trial = self._start(*self._next)
        elif old or len(active) < target:
            self._start(self._source, self._config)
        elif self._is_reloading:
            self._is_reloading = False
            self._report_ready()

    def _report_ready(self) -> None:
        self._service.ready(f"serves {self._listening.address} with {self._config.server.processes} workers")

    def _report_alive(self) -> None:
        if self._service.alive_seconds is not None and time.monotonic() >= self._alive_at + self._service.alive_seconds:
            self._alive_at = time.monotonic()
            self._service.alive()

    def _reload(self) -> None:
        """Read the configuration again: its first worker decides whether it is taken."""
        before = self._config
        try:
            source = self._read()
            config = source.config()
            if found := [*config.faults, *opening_faults(config, is_open(before))]:
                raise ConfigError(found)
        except ConfigError as error:
            for fault in error.faults:
                log.error("%s", fault)
            log.error("the configuration is not reloaded: what was in force before still is")
            return
        address = {"host": before.server.host, "port": before.server.port}
        if address != {"host": config.server.host, "port": config.server.port}:
            if self._may_restart:
                log.info("restarting with the changes of host and port of [server]")
                self.restarts = True
                self._stop()
                return
            log.warning("changes of host and port of [server] need a restart")
            source = source._replace(options={**source.options, **address})
            config = source.config()
        self._next = source, config

    def _take_next(self, first: _Process) -> None:
        """Put the next configuration into force, with which a first worker serves."""
        assert self._next is not None
        (self._source, self._config), self._next, self._trial = self._next, None, None
        self._generation += 1
        first.generation = self._generation
        log.info("reloaded %s: replacing the workers by those with its configuration", self._config.source)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _spawn(assignment: Assignment) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the process of a worker; return it, and the socket at which it reports. Raises OSError."""
    connection, inherited = socket.socketpair()
    connection.setblocking(False)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # one to all processes must not end it
    try:
        with inherited, tempfile.TemporaryFile() as file:
            assignment.write(file)
            process = subprocess.Popen(  # noqa: S603 - this very program
                [sys.executable, "-m", "streamlab", "run", "--worker", str(inherited.fileno())],
                stdin=file,
                pass_fds=[inherited.fileno(), *assignment.sockets],
                start_new_session=True,  # Ctrl-C of a terminal is for the supervisor
            )
    except OSError:
        connection.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return process, connection
