"""Starts servers by forking a process that has already executed their modules, which saves most of a start.

A forked server is a process like any other, with its own sockets, signals, output and exit status. It runs
`streamlab/__main__.py` as `python -m streamlab` does, and exits as the interpreter exits.
"""

import atexit
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from streamlab.server.registry import Found

NUMBER = struct.Struct("i")


# -- in the tests


class ForkedProcess:
    """The part of `subprocess.Popen` that tests need, for a process whose parent is the fork server."""

    def __init__(
        self, stdin: IO[str] | None, stdout: IO[str], stderr: IO[str] | None, status_socket: socket.socket
    ) -> None:
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.returncode: int | None = None
        self._status = status_socket
        pid = status_socket.recv(NUMBER.size)
        assert pid, "the fork server has ended"
        (self.pid,) = NUMBER.unpack(pid)

    def __enter__(self) -> "ForkedProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for its end, as `Popen` does, and close its resources."""
        self.stdout.close()
        if self.stderr is not None:
            self.stderr.close()
        self._close_stdin()
        self.wait()
        self._status.close()

    def _close_stdin(self) -> None:
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it reads no more
                self.stdin.close()

    def communicate(self, text: str = "", timeout: float | None = None) -> tuple[str, str]:
        """Write `text` to its stdin, close that, and return what it writes to stdout and stderr until its end."""
        assert self.stdin is not None
        assert self.stderr is not None
        outputs = {"stdout": "", "stderr": ""}

        def read(name: str, stream: IO[str]) -> None:
            outputs[name] = stream.read()

        readers = [
            threading.Thread(target=read, args=(name, stream), daemon=True)
            for name, stream in (("stdout", self.stdout), ("stderr", self.stderr))
        ]
        for reader in readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(text)
        self._close_stdin()
        deadline = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.join(deadline and max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired("streamlab", timeout or 0)
        self.wait(deadline and max(0, deadline - time.monotonic()))
        return outputs["stdout"], outputs["stderr"]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                status = self._status.recv(NUMBER.size, socket.MSG_PEEK)  # remains for other waiting threads
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("streamlab", timeout or 0) from None
            assert status, "the fork server has ended"
            (self.returncode,) = NUMBER.unpack(status)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The fork server of this process, started with its first server; all of them end when this process ends.

    It detects that by its socket alone, which the kernel closes however this process ends.
    """

    possible = hasattr(os, "pidfd_open")
    """Whether this is Linux: on other systems, a system library may not survive a fork."""

    def __init__(self, imports: tuple[str, ...] = ()) -> None:
        self.environ: Mapping[str, str] = os.environ
        """The environment in which it starts."""
        self._imports = imports
        """The modules that it has imported, besides those that every server imports."""
        self._others: dict[tuple[str, ...], ForkServer] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def is_suitable(self, environ: Mapping[str, str]) -> bool:
        """Return whether an interpreter in this environment starts like the fork server."""
        return self.possible and _outer(environ) == _outer(self.environ)

    def importing(self, *modules: str) -> "ForkServer":
        """Return the fork server for processes that also import these modules, at their start."""
        if modules == self._imports:
            return self
        other = self._others.setdefault(modules, ForkServer(modules))
        other.environ = self.environ
        return other

    def start(
        self, arguments: Sequence[str], *, environ: Mapping[str, str], cwd: Path, stderr: IO[str] | None = None
    ) -> ForkedProcess:
        """Start `python -m streamlab ARGUMENTS...` in a suitable environment.

        Its stdout is a pipe. Without a file for its stderr, that and its stdin are pipes, too; otherwise its stdin is
        empty.
        """
        control = self._control or self._begin()
        own, other = socket.socketpair()
        request = json.dumps({"arguments": list(arguments), "environ": dict(environ), "cwd": str(cwd)})
        with contextlib.ExitStack() as theirs:
            theirs.enter_context(other)
            out, output = os.pipe()
            theirs.callback(os.close, output)
            if stderr is None:
                (given, into), (err, errors) = os.pipe(), os.pipe()
                theirs.callback(os.close, errors)
            else:
                given, into, err, errors = os.open(os.devnull, os.O_RDONLY), None, None, stderr.fileno()
            theirs.callback(os.close, given)
            socket.send_fds(control, [request.encode()], [given, output, errors, other.fileno()])
        return ForkedProcess(
            None if into is None else os.fdopen(into, "w", encoding="utf-8"),
            os.fdopen(out, encoding="utf-8", newline=""),
            None if err is None else os.fdopen(err, encoding="utf-8"),
            own,
        )

    def end(self) -> None:
        for other in self._others.values():
            other.end()
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.wait(10)
            self._process = self._control = None

    def _begin(self) -> socket.socket:
        self._control, other = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *self._imports],
                stdin=other.fileno(),
                stdout=subprocess.PIPE,  # as that of its processes: no position, which their `sys.stdout` inherits
                env=_outer(self.environ),
            )
            assert self._process.stdout is not None
            self._process.stdout.close()
        return self._control


def _outer(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the interpreter or a library may have read before the first line of streamlab runs.

    Those are all except its configuration, the API keys that it names, and the width of the terminal.
    """
    later = ("STREAMLAB_", "UPSTREAM_", "PYTEST_", "COLUMNS")
    return {name: value for name, value in environ.items() if not name.startswith(later)}


# -- in the fork server

COMMON_MODULES = (
    "streamlab.cli",
    "anyio._backends._asyncio",
    "encodings.idna",
    "rich._emoji_codes",
    "typer._adapters",
    "typer._click.decorators",
)
"""The modules that every server imports while it starts, unless it has no plugin."""


def fork_for_each(control: socket.socket) -> tuple[bytes, list[int]] | None:
    """Fork for each request; return it, with its descriptors, in the new process, and None when the tests have ended.

    It has no threads and no signal handlers, so that a new process starts like an interpreter.
    """
    living: dict[int, tuple[int, int]] = {}
    """Of each process, by the descriptor that is ready at its end: its pid, and the socket that reports its exit."""
    ready = select.poll()  # unlike other selectors it has no own descriptor
    ready.register(control, select.POLLIN)
    while True:
        for descriptor, _ in ready.poll():
            if descriptor in living:
                pid, status_socket = living.pop(descriptor)
                ready.unregister(descriptor)
                os.close(descriptor)
                _report(status_socket, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(status_socket)
                continue
            request, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 4)
            if not request:
                for pid, _ in living.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            pid = os.fork()
            if not pid:
                for ended, (_, status_socket) in living.items():
                    os.close(ended)
                    os.close(status_socket)
                return request, descriptors
            *streams, status_socket = descriptors
            for stream in streams:
                os.close(stream)
            _report(status_socket, pid)
            ended = os.pidfd_open(pid)
            living[ended] = pid, status_socket
            ready.register(ended, select.POLLIN)


def _report(status_socket: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the process that started it has ended
        os.write(status_socket, NUMBER.pack(number))


def become(request: bytes, given: int, output: int, errors: int, status_socket: int) -> int:
    """Give this process the state of `python -m streamlab` at its first line, run that, and return its exit status."""
    for standard, stream in enumerate((given, output, errors)):
        os.dup2(stream, standard)
        if stream != standard:
            os.close(stream)
    os.close(status_socket)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = json.loads(request)
    os.environ.clear()
    os.environ.update(options["environ"])
    time.tzset()
    os.chdir(options["cwd"])
    sys.path[0] = options["cwd"]
    sys.argv[1:] = options["arguments"]
    try:
        runpy.run_module("streamlab", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        return ended.code or 0
    return 0


def execute_plugins() -> list[str]:
    """Execute the modules of all built-in plugins, which then are not executed at each start; return their names.

    That would be half of the cost of a start. Scenarios are built at each start, with its own configuration.
    """
    from streamlab.config import Config
    from streamlab.server import registry, site

    site.version()  # which it reads from disk once
    find_in = registry.found_in
    executed: dict[Path, dict[str, ModuleType]] = {}
    for found in registry.find(Config.of({"plugins": {"path": []}})):
        with contextlib.suppress(Exception):  # it fails in each process as well, which reports it
            executed[Path(found.origin)] = _modules_of(found.load())
    names = [name for modules in executed.values() for name in modules]
    hide(names)

    def found_in(path: Path) -> "Found | None":
        found = find_in(path)
        if found is None or path not in executed:
            return found

        def load() -> ModuleType:
            modules = executed[path]
            sys.modules.update(modules)
            return modules[min(modules)]

        return dataclasses.replace(found, load=load)

    registry.found_in = found_in
    return names


def _modules_of(plugin: ModuleType) -> dict[str, ModuleType]:
    """Return the modules of a plugin that was just loaded, by name."""
    name = plugin.__name__
    return {known: module for known, module in sys.modules.items() if known == name or known.startswith(f"{name}.")}


AT_EXIT = {"builtins", "sys", "warnings", "linecache"}
"""The modules that the interpreter uses to report something while it exits."""


class LastObject:
    """Ends the process as soon as the interpreter destroys it.

    As an attribute of `sys`, it outlives all objects that report something at their end. The interpreter would go on
    to free memory, most of it shared, and so copy it: a tenth of the cost of a short process.
    """

    def __init__(self, status: int) -> None:
        self._status = status
        self._exit = os._exit  # by now, the module may be empty

    def __del__(self) -> None:
        self._exit(self._status)


def hide(modules: Iterable[str]) -> None:
    """Hide modules from the interpreter, which otherwise empties each of them when it exits."""
    for name in modules:
        sys.modules.pop(name, None)


def leave(shared: Iterable[str], statuses: Iterable[int]) -> None:
    """Have the interpreter destroy all but the shared modules, and end this process with its status, if known."""
    hide(shared)
    with contextlib.suppress(OSError, ValueError):  # which the interpreter reports, with another status
        for status in statuses:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.__dict__["_last_object"] = LastObject(status)


if __name__ == "__main__":
    # Ctrl-C is for the servers; the tests end this process when they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A process that exits would copy the memory of all that it shares to destroy it: half of its cost. It destroys
    # what it has imported and created itself, reports as ever what it did not close, and ends.
    shared: list[str] = []
    statuses: list[int] = []
    atexit.register(leave, shared, statuses)  # registered first, so called last
    for module in (*COMMON_MODULES, *sys.argv[1:]):
        importlib.import_module(module)
    shared += execute_plugins()
    shared += sys.modules.keys() - AT_EXIT
    forever: list[object] = [*sys.modules.values()]
    forever.append(forever)  # a cycle, which is never collected once it is frozen
    # The garbage collector of a new process would touch, and so copy, the shared memory: most of its cost. A server
    # lets it run as seldom once it serves.
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    with socket.socket(fileno=sys.stdin.fileno()) as control:
        request = fork_for_each(control)
    if request is not None:
        statuses.append(become(request[0], *request[1]))
        sys.exit(statuses[0])
