"""What blocks the event loop of a server under test, measured by a thread next to it."""

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

BLOCKED_SECONDS = 0.25
"""Maximum time for which code may occupy the event loop, in seconds."""

CHECK_SECONDS = 0.05
"""Interval of the checks, in seconds."""

LOOK_SECONDS = 0.1
"""Interval at which the stack of a loop that does not respond is read, in seconds."""

MAX_FRAMES = 4
"""Number of frames of a stack that are reported: those of the code that blocks."""


class LoopWatch:
    """Records each time that code occupies the running event loop for more than BLOCKED_SECONDS.

    A context manager, entered in the loop's thread. The time in which that thread waited for a processor does not
    count, so the measure is the same on a busy machine (on Linux; elsewhere it does count). A block is measured from
    the first check in it, so up to CHECK_SECONDS of it are missed.
    """

    def __init__(self) -> None:
        self.blocks: deque[dict[str, Any]] = deque(maxlen=200)
        """Each with its `seconds`, its `code` (what equal stacks have in common), and its `stack`."""
        self._loop = asyncio.get_running_loop()
        self._ident, self._native_id = threading.get_ident(), threading.get_native_id()
        self._began = time.monotonic()
        self._closed = threading.Event()
        self._ran: tuple[float, float] = (0.0, 0.0)
        self._thread = threading.Thread(target=self._watch, name="loop-watch", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread."""
        self._closed.set()

    @property
    def seconds(self) -> float:
        """How long the loop has been watched, in seconds."""
        return time.monotonic() - self._began

    # -- in the thread

    def _watch(self) -> None:
        while not self._closed.wait(CHECK_SECONDS):
            ran, stack = threading.Event(), list[traceback.FrameSummary]()
            began, waited = time.monotonic(), _waited_seconds(self._native_id)
            try:
                self._loop.call_soon_threadsafe(self._note, ran)
            except RuntimeError:  # the loop is closed
                return
            while not ran.wait(LOOK_SECONDS):
                stack = _stack(sys._current_frames().get(self._ident))
                if self._closed.is_set():
                    return
            ended, waited_until = self._ran
            seconds = ended - began - (waited_until - waited)
            if seconds > BLOCKED_SECONDS and stack:
                code = [f"{frame.filename}:{frame.name}" for frame in stack]
                shown = "".join(traceback.format_list(stack[-MAX_FRAMES:])).rstrip()
                self.blocks.append({"seconds": seconds, "code": " ".join(code), "stack": shown})

    def _note(self, ran: threading.Event) -> None:
        self._ran = time.monotonic(), _waited_seconds(self._native_id)
        ran.set()


def _stack(frame: FrameType | None) -> list[traceback.FrameSummary]:
    return list(traceback.extract_stack(frame)) if frame is not None else []


def _waited_seconds(thread: int) -> float:
    """Return how long a thread of this process has waited for a processor so far, in seconds; 0 where unknown."""
    try:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
