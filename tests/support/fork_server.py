"""Starts servers by forking a process that has imported what they all import: a start costs what is its own.

A forked server is a process as any other: its own sockets, signals, output and exit status. It goes through
`streamlab/__main__.py` as `python -m streamlab` does, and ends as the interpreter ends.
"""

import contextlib
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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

NUMBER = struct.Struct("i")


# -- in the tests


class ForkedProcess:
    """What tests need of `subprocess.Popen`, for a process whose parent is the fork server."""

    def __init__(self, stdout: IO[str], told: socket.socket) -> None:
        self.stdout = stdout
        self.returncode: int | None = None
        self._told = told
        pid = told.recv(NUMBER.size)
        assert pid, "the fork server has ended"
        (self.pid,) = NUMBER.unpack(pid)

    def __enter__(self) -> "ForkedProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for its end, as `Popen` does, and let go of what belongs to it."""
        self.stdout.close()
        self.wait()
        self._told.close()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._told.settimeout(timeout)
            try:
                status = self._told.recv(NUMBER.size, socket.MSG_PEEK)  # it stays there for other threads that wait
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
    """The fork server of this process: begun with its first server; it ends, with all of them, when this process does.

    Nothing but the socket to it tells it so: the kernel closes that, however this process ends.
    """

    possible = hasattr(os, "pidfd_open")
    """Elsewhere than on Linux, a system library may not survive a fork."""

    def __init__(self) -> None:
        self.environ: Mapping[str, str] = os.environ
        """What it begins in."""
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def suits(self, environ: Mapping[str, str]) -> bool:
        """Whether an interpreter in this environment begins as the fork server does."""
        return self.possible and _outer(environ) == _outer(self.environ)

    def start(self, words: Sequence[str], *, environ: Mapping[str, str], cwd: Path, stderr: IO[str]) -> ForkedProcess:
        """Start `python -m streamlab WORDS...`, in an environment that suits; its stdout is a pipe."""
        control = self._control or self._begin()
        ours, theirs = socket.socketpair()
        stdout, output = os.pipe()
        with theirs, os.fdopen(output):
            request = json.dumps({"words": list(words), "environ": dict(environ), "cwd": str(cwd)})
            socket.send_fds(control, [request.encode()], [output, stderr.fileno(), theirs.fileno()])
        return ForkedProcess(os.fdopen(stdout), ours)

    def end(self) -> None:
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.wait(10)
            self._process = self._control = None

    def _begin(self) -> socket.socket:
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=_outer(self.environ)
            )
        return self._control


def _outer(environ: Mapping[str, str]) -> dict[str, str]:
    """What the interpreter or a library may have read by the time the first line of streamlab runs.

    That is all but its configuration, and the keys of others that it names.
    """
    later = ("STREAMLAB_", "UPSTREAM_", "PYTEST_")
    return {name: value for name, value in environ.items() if not name.startswith(later)}


# -- in the fork server


def fork_for_each(control: socket.socket) -> tuple[bytes, list[int]] | None:
    """Fork for each request; returns it, with its descriptors, in the new process, and None when the tests have ended.

    There must be no thread here, and there is no signal handler: a new process begins as an interpreter does.
    """
    living: dict[int, tuple[int, int]] = {}
    """Of each process, by the descriptor that is ready at its end: its number, and where that end is told."""
    ready = select.poll()  # unlike other selectors it holds no descriptor of its own
    ready.register(control, select.POLLIN)
    while True:
        for descriptor, _ in ready.poll():
            if descriptor in living:
                pid, told = living.pop(descriptor)
                ready.unregister(descriptor)
                os.close(descriptor)
                _tell(told, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(told)
                continue
            request, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
            if not request:
                for pid, _ in living.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            pid = os.fork()
            if not pid:
                for ended, (_, told) in living.items():
                    os.close(ended)
                    os.close(told)
                return request, descriptors
            *streams, told = descriptors
            for stream in streams:
                os.close(stream)
            _tell(told, pid)
            ended = os.pidfd_open(pid)
            living[ended] = pid, told
            ready.register(ended, select.POLLIN)


def _tell(told: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever started it has left
        os.write(told, NUMBER.pack(number))


def become(request: bytes, output: int, errors: int, told: int) -> None:
    """Make this process what `python -m streamlab` is at its first line, and run that."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for standard, stream in enumerate((nothing, output, errors)):
        os.dup2(stream, standard)
        if stream != standard:
            os.close(stream)
    os.close(told)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted = json.loads(request)
    os.environ.clear()
    os.environ.update(wanted["environ"])
    time.tzset()
    os.chdir(wanted["cwd"])
    sys.path[0] = wanted["cwd"]
    sys.argv[1:] = wanted["words"]
    runpy.run_module("streamlab", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # Ctrl-C is for the servers; the tests end this process when they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    importlib.import_module("streamlab.cli")
    # The collector of a new process would touch, and so copy, what all have in common: most of what a process costs.
    gc.freeze()
    with socket.socket(fileno=sys.stdin.fileno()) as control:
        asked = fork_for_each(control)
    if asked is not None:
        become(asked[0], *asked[1])
