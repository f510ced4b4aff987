"""What every stream promises when its server stops: SIGTERM with a stream of each endpoint open."""

import asyncio
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from .promise import NotKept, promise
from .samples import NoSample
from .server import DRAIN_SECONDS, Server
from .subject import Subject, parsed
from .wire import Answer, NotHTTP

FAREWELL_SECONDS = 0.5
"""How soon an event stream ends."""

SHORT_SECONDS = 0.2
"""What takes less is over before the server could stop."""

GRACE_SECONDS = 1.0
"""What the process may take beyond `drain_seconds`."""

SLACK_SECONDS = 0.5
"""What a busy machine may add to the two above."""


@dataclass
class Stopped:
    """How a server stopped that had a stream of each endpoint open."""

    status: int | None
    """Its exit status; None where it had to be killed."""
    seconds: float
    """From SIGTERM to its end."""
    log: str
    answers: dict[str, Answer | str] = field(default_factory=dict)
    """By endpoint; a text says why there is none."""
    waited: dict[str, float | None] = field(default_factory=dict)
    """The seconds from SIGTERM to the end of each; None where it was over before."""


async def stopped(server: Server, subjects: Sequence[Subject]) -> Stopped:
    """Open a stream of each subject, stop the server with SIGTERM, and see how they end."""
    found = Stopped(None, 0, "")
    # What ends by itself is to end within the drain, and is compared with the whole; the rest is long.
    short = {subject.asked.label: await _is_short(subject) for subject in subjects}
    async with AsyncExitStack() as stack:
        for subject in subjects:
            label = subject.asked.label
            try:
                answer = await stack.enter_async_context(subject.ask(long=not short[label]))
                await answer.begin(seconds=1)
                found.answers[label] = answer
            except (NoSample, NotHTTP, OSError) as error:
                found.answers[label] = f"{type(error).__name__}: {error}"
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.TaskGroup() as group:
            for label, opened in found.answers.items():
                if isinstance(opened, Answer):
                    group.create_task(_read_on(label, opened, began, found.waited))
            group.create_task(_wait(server, found))
    found.log = server.log
    return found


async def _is_short(subject: Subject) -> bool:
    try:
        return await subject.steady() is not None and (await subject.answered()).ended_after > SHORT_SECONDS
    except (NoSample, NotHTTP, OSError):
        return False


async def _read_on(label: str, answer: Answer, began: float, waited: dict[str, float | None]) -> None:
    waited[label] = None
    if answer.ending is None:
        try:
            async with asyncio.timeout(DRAIN_SECONDS + GRACE_SECONDS + 2 * SLACK_SECONDS):
                while await answer.piece():
                    if not answer.media.startswith("text/"):
                        answer.body.clear()
        except TimeoutError:
            pass
        waited[label] = time.monotonic() - began


async def _wait(server: Server, found: Stopped) -> None:
    began = time.monotonic()
    try:
        found.status = await asyncio.to_thread(server.process.wait, DRAIN_SECONDS + GRACE_SECONDS + 5)
    except subprocess.TimeoutExpired:
        server.process.kill()
    found.seconds = time.monotonic() - began


class Stopping:
    """What is asked of every endpoint, and of the server, when it is told to stop."""

    @promise("streamlab: event streams end at once, others within drain_seconds; RFC 9112, 8")
    async def test_stop_ends_streams_truthfully(self, subject: Subject) -> str:
        """At SIGTERM an event stream ends whole, with `retry`, within 0.5 s; nothing that is cut looks whole."""
        found = await asyncio.to_thread(subject.stopped)
        answer, label = found.answers[subject.asked.label], subject.asked.label
        if isinstance(answer, str):
            raise NotKept(f"could not be opened: {answer}")
        if answer.status >= 400:
            return f"not open: {answer.line}"
        waited = found.waited[label]
        if waited is None:
            return "over before the server stopped"
        if answer.ending is None:
            raise NotKept(f"still open {waited:.1f} s after SIGTERM")
        if subject.asked.carries_events:
            return _farewell(answer, waited)
        whole = await subject.steady()
        looks_whole = answer.ending == "whole" and answer.get("content-length") is None
        if looks_whole and whole is not None and answer.size < len(whole):
            raise NotKept(f"{answer.size} of {len(whole)} bytes, and then the last chunk: a part that looks whole")
        return f"{'ended' if answer.ending == 'whole' else 'was cut'} after {waited:.1f} s"

    @promise("streamlab: the process is gone within drain_seconds + 1 s; POSIX: exit status 0", once=True)
    async def test_server_stops_in_time(self, subject: Subject) -> str:
        """The server is gone within drain_seconds and a second after SIGTERM, with status 0, without a traceback."""
        found = await asyncio.to_thread(subject.stopped)
        if found.status is None:
            raise NotKept(f"still running {found.seconds:.1f} s after SIGTERM; drain_seconds is {DRAIN_SECONDS:g}")
        if found.seconds > DRAIN_SECONDS + GRACE_SECONDS + SLACK_SECONDS:
            raise NotKept(f"gone after {found.seconds:.1f} s; drain_seconds is {DRAIN_SECONDS:g}")
        if found.status:
            raise NotKept(f"exit status {found.status}: {found.log[-500:]}")
        if "Traceback" in found.log:
            raise NotKept(f"a traceback in its log: {found.log[found.log.index('Traceback') :][:1000]}")
        return f"gone after {found.seconds:.1f} s, status 0"

    @promise("streamlab: what a client does is no fault of the server", once=True)
    async def test_log_has_no_traceback(self, subject: Subject) -> str:
        """After all of this, the server's log has no traceback and no warning of Python's."""
        log = subject.server.log
        for word in ("Traceback", "Warning: ", "never retrieved"):
            if word in log:
                raise NotKept(f"in its log: {log[max(0, log.index(word) - 500) :][:1500]}")
        return f"{len(log.splitlines())} lines, none of them a traceback"


def _farewell(answer: Answer, waited: float) -> str:
    if answer.ending != "whole":
        raise NotKept(f"{answer.ending} {waited:.1f} s after SIGTERM, without the last chunk")
    if waited > FAREWELL_SECONDS + SLACK_SECONDS:
        raise NotKept(f"its last chunk came {waited:.1f} s after SIGTERM")
    events = parsed(answer)
    last = events[-1] if events else None
    if last is not None and last.event == "end":
        return f"its own end {waited:.2f} s after SIGTERM"
    retry = last.get("retry") if last is not None else None
    if retry is None or not (retry.isascii() and retry.isdigit()):
        raise NotKept(f"the last event has no retry, so that all come back at once: {last or 'no event'}")
    return f"whole after {waited:.2f} s, retry: {retry}"
