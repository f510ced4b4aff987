"""Stop signals, and a thread next to the event loop that reports what blocks it and kills a process that hangs."""

import asyncio
import logging
import os
import select
import selectors
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from .logging import BufferedLines

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that stop the server: the first one drains it, the second one aborts what is open."""

TICK_SECONDS = 1.0
"""Interval at which the thread checks whether the event loop runs, in seconds."""

BLOCKED_SECONDS = 2.0
"""Time without a wait or a report of the event loop after which it counts as blocked, in seconds."""

_WAIT = selectors.DefaultSelector.select.__code__
"""What an event loop without work is in: it is left alone, so that an idle process does not wake it."""

SECOND_SIGNAL_SECONDS = 2.0
"""Maximum time from the second stop signal to the end of the process, in seconds."""

FLUSH_SECONDS = 0.2
"""Maximum time to write the last log lines before the process is killed, in seconds."""


class Stopped(Exception):
    """A stop signal arrived before the start was complete."""


class Watchdog:
    """The stop signals of this process, and a supervisor that works even when the event loop or a thread hangs.

    While the context is open, SIGTERM and SIGINT set `stopping`; `on_second` is called in the loop for every further
    one. A loop that is blocked for BLOCKED_SECONDS is reported with the stack of what blocks it. A process that still
    runs `stop_seconds` after the first signal is killed with status 1, and logs the stacks of its threads; this holds
    after the context is left too, until the process has ended. Must be entered in the main thread.

    `lifeline` is a descriptor that another process has opened, too: when that has died, this one stops as by a signal.

    `on_check` is called in the thread once a second, with the monotonic time at which the loop last ran or waited.

    Signals reach the thread by a file descriptor that the interpreter writes to at once (signal.set_wakeup_fd), so that
    they are handled even where no Python code of the main thread runs.
    """

    def __init__(
        self,
        *,
        stop_seconds: float,
        on_second: Callable[[], None] = lambda: None,
        lifeline: int | None = None,
        on_check: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.stopping = asyncio.Event()
        self._lifeline = lifeline
        self._stop_seconds = stop_seconds
        self._on_second = on_second
        self._on_check = on_check
        self._loop = asyncio.get_running_loop()
        self._main = threading.get_ident()
        self._start: asyncio.Timeout | None = None
        self._ran_at = time.monotonic()
        self._is_requested = False
        """Whether the loop has been requested to note that it runs, and has not yet."""
        self._open = True
        self._signals, self._signalled = -1, -1
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1

    def __enter__(self) -> Self:
        """Install the signal handlers, and start the thread."""
        self._signals, self._signalled = os.pipe()
        os.set_blocking(self._signalled, False)
        self._previous_fd = signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._on_python_signal) for number in STOP_SIGNALS}
        self._ran_at = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the signal handlers; the thread continues only if the process is about to end."""
        self._open = False
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._signalled)

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """Run a block that starts things; a stop signal cancels it, and Stopped is raised after it."""
        try:
            async with asyncio.timeout(None) as self._start:
                if self.stopping.is_set():
                    self._start.reschedule(self._loop.time())
                yield
        except TimeoutError:
            if self._start is None or not self._start.expired():
                raise
            raise Stopped from None
        finally:
            self._start = None

    def _on_python_signal(self, number: int, frame: FrameType | None) -> None:
        """Write the signal to the file descriptor where add_signal_handler of the loop has replaced that."""
        current = signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        if current != self._signalled:
            signal.set_wakeup_fd(current, warn_on_full_buffer=False)
            with suppress(OSError):
                os.write(self._signalled, bytes([number]))

    def _on_signal(self) -> None:
        if self.stopping.is_set():
            self._on_second()
            return
        self.stopping.set()
        if self._start is not None:
            self._start.reschedule(self._loop.time())

    def _note_run(self) -> None:
        self._ran_at, self._is_requested = time.monotonic(), False

    # -- in the thread

    def _check_loop(self) -> None:
        """Note that the event loop waits, or let it note that it runs."""
        frame = sys._current_frames().get(self._main)
        if frame is not None and frame.f_code is _WAIT:
            self._ran_at = time.monotonic()
        elif not self._is_requested:
            self._is_requested = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._note_run)
        self._on_check(self._ran_at)

    def _watch(self) -> None:
        ends_at: float | None = None
        reported_for: float | None = None
        overdue = False
        while True:
            wait = TICK_SECONDS if ends_at is None else max(0.0, min(TICK_SECONDS, ends_at - time.monotonic()))
            watched = [self._signals] if self._lifeline is None else [self._signals, self._lifeline]
            if self._open and (ready := select.select(watched, [], [], wait)[0]):
                if self._lifeline in ready:
                    self._lifeline = None
                    received = bytes([signal.SIGTERM] if ends_at is None else [])
                    log.error("the process that supervises this one has died: stopping")
                else:
                    received = os.read(self._signals, 64)
                for number in received:
                    if number not in STOP_SIGNALS:  # plugins may handle others
                        continue
                    now = time.monotonic()
                    ends_at = now + self._stop_seconds if ends_at is None else min(ends_at, now + SECOND_SIGNAL_SECONDS)
                    with suppress(RuntimeError):  # the loop is closed
                        self._loop.call_soon_threadsafe(self._on_signal)
            elif not self._open:
                if ends_at is None:
                    os.close(self._signals)
                    return
                time.sleep(wait)
            if ends_at is not None and time.monotonic() >= ends_at:
                self._kill()
            self._check_loop()
            # Twice in a row: a process that was stopped and continued does not have a blocked loop.
            was_overdue, overdue = overdue, time.monotonic() - self._ran_at > BLOCKED_SECONDS
            if self._open and overdue and was_overdue and reported_for != self._ran_at:
                reported_for = self._ran_at
                seconds = time.monotonic() - self._ran_at
                stack = _stack(sys._current_frames().get(self._main))
                log.warning("the event loop is blocked for %.1f s: all clients wait", seconds, extra={"stack": stack})

    def _kill(self) -> None:
        """Kill the process; what is unfinished is recovered at the next start."""
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        own = threading.get_ident()
        stacks = [f"thread {names.get(ident)}:\n{_stack(frame)}" for ident, frame in frames.items() if ident != own]
        report = "not stopped %g s after the signal: killing the process"
        log.critical(report, self._stop_seconds, extra={"stack": "\n".join(stacks)})
        for handler in logging.getLogger().handlers:
            if isinstance(handler, BufferedLines):
                handler.drain(FLUSH_SECONDS)
        os._exit(1)


def _stack(frame: FrameType | None) -> str:
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else ""
