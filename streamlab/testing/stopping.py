"""Cases for stopping: SIGTERM with a stream of each endpoint open."""

import asyncio
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from .promise import Broken, promise
from .samples import NoSample
from .server import DRAIN_SECONDS, Server
from .subject import Subject, parsed
from .wire import NotHTTP, StreamedResponse

FAREWELL_SECONDS = 0.5
"""Maximum time until an event stream ends, in seconds."""

SHORT_SECONDS = 0.2
"""Duration of a response that ends before the server could stop, in seconds."""

GRACE_SECONDS = 1.0
"""Maximum time of the process beyond `drain_seconds`, in seconds."""

SLACK_SECONDS = 0.5
"""Tolerance for a busy machine, in seconds."""


@dataclass
class Stopped:
    """How a server with an open stream of each endpoint stopped."""

    status: int | None
    """Its exit status; None where it had to be killed."""
    seconds: float
    """From SIGTERM to its end."""
    log: str
    responses: dict[str, StreamedResponse | str] = field(default_factory=dict)
    """By endpoint; a string is the reason why there is none."""
    waited: dict[str, float | None] = field(default_factory=dict)
    """The seconds from SIGTERM to the end of each; None if it had ended before."""


async def stopped(server: Server, subjects: Sequence[Subject]) -> Stopped:
    """Open a stream of each subject, stop the server with SIGTERM, and record how they end."""
    found = Stopped(None, 0, "")
    # A response that ends by itself must do so during the drain, and is compared with the complete one.
    short = {subject.form.label: await _is_short(subject) for subject in subjects}
    async with AsyncExitStack() as stack:
        for subject in subjects:
            label = subject.form.label
            try:
                response = await stack.enter_async_context(subject.request(long=not short[label]))
                await response.wait_for_first_byte(seconds=1)
                found.responses[label] = response
            except (NoSample, NotHTTP, OSError) as error:
                found.responses[label] = f"{type(error).__name__}: {error}"
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.TaskGroup() as group:
            for label, opened in found.responses.items():
                if isinstance(opened, StreamedResponse):
                    group.create_task(_read_to_end(label, opened, began, found.waited))
            group.create_task(_wait(server, found))
    found.log = server.log
    return found


async def _is_short(subject: Subject) -> bool:
    try:
        return await subject.stable_body() is not None and (await subject.response()).ended_after > SHORT_SECONDS
    except (NoSample, NotHTTP, OSError):
        return False


async def _read_to_end(label: str, response: StreamedResponse, began: float, waited: dict[str, float | None]) -> None:
    waited[label] = None
    if response.ending is None:
        try:
            async with asyncio.timeout(DRAIN_SECONDS + GRACE_SECONDS + 2 * SLACK_SECONDS):
                while await response.read_chunk():
                    if not response.media.startswith("text/"):
                        response.body.clear()
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
    """Cases for every endpoint, and for the server, when it stops."""

    @promise("streamlab: event streams end at once, others within drain_seconds; RFC 9112, 8")
    async def test_stop_ends_streams_visibly(self, subject: Subject) -> str:
        """At SIGTERM an event stream ends with `retry` and its last chunk in 0.5 s; no aborted body looks complete."""
        found = await asyncio.to_thread(subject.stopped)
        response, label = found.responses[subject.form.label], subject.form.label
        if isinstance(response, str):
            raise Broken(f"could not be opened: {response}")
        if response.status >= 400:
            return f"not open: {response.line}"
        waited = found.waited[label]
        if waited is None:
            return "ended before the server stopped"
        if response.ending is None:
            raise Broken(f"still open {waited:.1f} s after SIGTERM")
        if subject.form.carries_events:
            return _farewell(response, waited)
        expected = await subject.stable_body()
        looks_complete = response.ending == "complete" and response.get("content-length") is None
        if looks_complete and expected is not None and response.size < len(expected):
            raise Broken(
                f"{response.size} of {len(expected)} bytes, then the last chunk: a partial body that looks complete"
            )
        return f"{'ended' if response.ending == 'complete' else 'was cut'} after {waited:.1f} s"

    @promise("streamlab: the process exits within drain_seconds + 1 s; POSIX: exit status 0", once=True)
    async def test_server_stops_in_time(self, subject: Subject) -> str:
        """The server exits within drain_seconds + 1 s after SIGTERM, with status 0, without a traceback."""
        found = await asyncio.to_thread(subject.stopped)
        if found.status is None:
            raise Broken(f"still running {found.seconds:.1f} s after SIGTERM; drain_seconds is {DRAIN_SECONDS:g}")
        if found.seconds > DRAIN_SECONDS + GRACE_SECONDS + SLACK_SECONDS:
            raise Broken(f"ended after {found.seconds:.1f} s; drain_seconds is {DRAIN_SECONDS:g}")
        if found.status:
            raise Broken(f"exit status {found.status}: {found.log[-500:]}")
        if "Traceback" in found.log:
            raise Broken(f"a traceback in its log: {found.log[found.log.index('Traceback') :][:1000]}")
        return f"ended after {found.seconds:.1f} s, status 0"


def _farewell(response: StreamedResponse, waited: float) -> str:
    if response.ending != "complete":
        raise Broken(f"{response.ending} {waited:.1f} s after SIGTERM, without the last chunk")
    if waited > FAREWELL_SECONDS + SLACK_SECONDS:
        raise Broken(f"its last chunk came {waited:.1f} s after SIGTERM")
    events = parsed(response)
    last = events[-1] if events else None
    if last is not None and last.event == "end":
        return f"ended by itself {waited:.2f} s after SIGTERM"
    retry = last.get("retry") if last is not None else None
    if retry is None or not (retry.isascii() and retry.isdigit()):
        raise Broken(f"the last event has no retry, so all clients reconnect at once: {last or 'no event'}")
    return f"complete after {waited:.2f} s, retry: {retry}"
