"""What every stream promises: its first byte early, its cost bounded, its work stopped when nobody wants it."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Coroutine
from contextlib import AsyncExitStack, ExitStack, closing, suppress
from typing import Any

from . import wire
from .promise import NotKept, promise
from .server import State
from .subject import FULL, MOST_BYTES, Subject
from .wire import Answer, NotHTTP

LEAVERS = 10
"""Clients that leave at once."""

CROWD = 50
"""Clients that ask at once."""

STALLED = 5
"""Clients that read nothing."""

STALL_SECONDS = 1.0
"""How long a stalled client's cost is watched."""

STALL_LOOKS = 5
"""How often it is looked at until it is quiet."""

STALLED_BYTES = 16 * 1024 * 1024
"""What stalled clients may cost together."""

STALLED_CPU = 0.1
"""Seconds of a processor that they may take in a second."""

LEAVE_SECONDS = 0.1
"""How soon the work for a client that has left stops."""

PATIENCE_SECONDS = 15.0
"""What a first byte, or an end, may take before nothing more is expected."""

SHORT_SECONDS = 0.25
"""What takes less has no halves worth telling apart."""

HEALTH_SECONDS = 0.25
"""How long the server may keep others waiting because of one stream."""


class Streams:
    """What is asked of every endpoint, though it shows in those that stream."""

    @promise("streamlab: the first byte comes in the first half of the time")
    async def test_first_byte_comes_before_the_end(self, subject: Subject) -> str:
        """The first byte of the body comes in the first half of the time that the whole takes."""
        answer = await subject.answered()
        for long in (False, True, True):  # what is made when it is first asked for is late once
            if not _is_late(answer, subject.asked.carries_events):
                return _beginning(answer)
            async with subject.ask(long=long) as answer:
                await answer.read(seconds=PATIENCE_SECONDS, most=MOST_BYTES)
        if not _is_late(answer, subject.asked.carries_events):
            return _beginning(answer)
        raise NotKept(f"held back: {_beginning(answer)}")

    @promise("streamlab: a client that leaves stops its work within 100 ms")
    async def test_client_that_leaves_stops_its_work(self, subject: Subject) -> str:
        """The work for ten clients that leave stops within 100 ms; no stream, task, file, thread or child is left."""
        if await subject.fits():
            return "nothing to leave: the whole answer comes at once"
        delays: list[float] = []
        for _ in range(3):  # what is made once and kept has been made after the first time
            before = await _settled(subject, seconds=1)
            left = await _open_and_leave(subject)
            after = await _settled(subject, before, seconds=2)
            route = subject.asked.template
            ended = [one for one in after.ended if one["at"] >= left and _is_route(one["route"], route)]
            if failed := [one for one in ended if one["outcome"] == "failed"]:
                raise NotKept(f"{len(failed)} of {LEAVERS} streams ended as `failed`: leaving is no failure")
            delays = [one["at"] - left for one in ended if one["outcome"] == "client left"]
            if not (grown := _grown(before, after)) and (not delays or statistics.median(delays) <= LEAVE_SECONDS):
                took = f", half of it within {_ms(statistics.median(delays))}" if delays else ""
                return f"{LEAVERS} left, and nothing of their work is left{took}"
        if grown:
            raise NotKept(f"2 s after {LEAVERS} have left there are more than before: {grown}")
        raise NotKept(f"half of the work went on for {_ms(statistics.median(delays))} and more")

    @promise("streamlab: a client that does not read costs a bounded amount, and no processor time")
    async def test_client_that_stalls_costs_little(self, subject: Subject) -> str:
        """Five clients that read nothing cost 16 MiB of memory at most, no growth, and next to no processor time."""
        if await subject.fits():
            return "nothing to stall: the whole answer comes at once"
        before = await _settled(subject, seconds=1)
        if subject.known.idle_cpu is None:
            await asyncio.sleep(STALL_SECONDS)
            subject.known.idle_cpu = (await _now(subject)).cpu - before.cpu
        message, idle = subject.message(long=True), subject.known.idle_cpu
        with ExitStack() as stack:
            for _ in range(STALLED):
                stack.enter_context(closing(await asyncio.to_thread(wire.stalled, subject.server.port, message)))
            early = await _now(subject)
            for _ in range(STALL_LOOKS):  # what a source does before it can begin is no fault
                await asyncio.sleep(STALL_SECONDS)
                late = await _now(subject)
                cost, growth = late.memory - before.memory, late.memory - early.memory
                cpu, early = max(0.0, late.cpu - early.cpu - idle), late
                if cost > STALLED_BYTES or (growth <= STALLED_BYTES / 4 and cpu <= STALLED_CPU * STALL_SECONDS):
                    break
        if cost > STALLED_BYTES:
            raise NotKept(f"{cost / 1e6:.1f} MB of memory for {STALLED} clients that read nothing")
        if growth > STALLED_BYTES / 4:
            raise NotKept(f"{growth / 1e6:.1f} MB more of memory in a second in which nobody read anything")
        if cpu > STALLED_CPU * STALL_SECONDS:
            raise NotKept(f"{cpu:.2f} s of a processor in a second in which nobody read anything")
        after = await _settled(subject, before, seconds=3)
        if grown := _grown(before, after):
            raise NotKept(f"3 s after {STALLED} stalled clients have left there are more than before: {grown}")
        return f"{max(cost, 0) / 1e6:.1f} MB, {cpu:.2f} s of a processor in a second, and nothing left of it"

    @promise("streamlab: many clients at once; RFC 9110, 15.6.4 and RFC 6585, 4 (429) where there is no place")
    async def test_fifty_clients_at_once_get_the_same_as_one(self, subject: Subject) -> str:
        """Fifty clients get what one gets; one that has no place is told so by 429 or 503 with Retry-After."""
        usual = await subject.answered()
        if usual.status not in subject.asked.statuses:
            raise NotKept(f"{usual.line} for one alone: see answers_as_described")
        answers: list[Answer | str] = []

        async def one() -> None:
            try:
                async with subject.ask() as answer:
                    answers.append(answer)
                    if usual.ending is None:
                        await answer.begin(seconds=PATIENCE_SECONDS if usual.body else 0.1)
                    else:
                        await answer.read(seconds=PATIENCE_SECONDS, most=len(usual.body) + 1)
            except (NotHTTP, OSError) as error:
                answers.append(f"{type(error).__name__}: {error}")

        async with asyncio.TaskGroup() as group:
            for _ in range(CROWD):
                group.create_task(one())
        for answer in answers:
            if fault := await _of_the_crowd(subject, usual, answer):
                raise NotKept(f"{fault} for one of {CROWD}")
        served = sum(isinstance(answer, Answer) and answer.status not in FULL for answer in answers)
        late = max((a.first_after or 0.0 for a in answers if isinstance(a, Answer)), default=0.0)
        # Where places are few, and others are told so, some wait for theirs.
        if served == CROWD and usual.ending and usual.ended_after > SHORT_SECONDS and late > usual.ended_after * 3 + 2:
            raise NotKept(f"the last of {CROWD} waited {late:.1f} s for its first byte: one after the other")
        return f"{served} served, {CROWD - served} told to come back; the last first byte after {_ms(late)}"

    @promise("streamlab: nothing blocks the loop; asyncio, Developing with asyncio: running blocking code")
    async def test_stream_keeps_nobody_else_waiting(self, subject: Subject) -> str:
        """While it streams, /health is answered within 250 ms."""
        if await subject.fits():
            return "over at once"
        longest = usual = 0.0
        for _ in range(3):  # a machine that is busy otherwise may be late once
            usual = await _longest_health(subject, asyncio.sleep(0.2))
            longest = await _longest_health(subject, _streamed(subject))
            if longest <= HEALTH_SECONDS + 3 * usual:
                return f"the longest /health took {_ms(longest)}, and {_ms(usual)} without it"
        raise NotKept(f"/health took {_ms(longest)}, and {_ms(usual)} without it")


async def _of_the_crowd(subject: Subject, usual: Answer, answer: Answer | str) -> str:
    """What is wrong with an answer to one of many, beside that to one alone; nothing where all is well."""
    if isinstance(answer, str):
        return f"no answer ({answer})"
    if answer.status in FULL:
        return f"{answer.line}, without Retry-After," if answer.get("retry-after") is None else ""
    if answer.status not in subject.asked.statuses:
        return f"{answer.line}, which is not declared,"
    if usual.body and not answer.body:
        return f"no first byte within {PATIENCE_SECONDS:g} s"
    if usual.ending == "whole" and answer.ending not in ("whole", None):
        return "a body that was cut"
    if answer.status == usual.status and (difference := await subject.differs(bytes(answer.body))):
        return f"another body ({difference})"
    return ""


def _is_late(answer: Answer, carries_events: bool) -> bool:
    """Whether the first byte came in the second half of the time, or has not come; an event may be long in coming."""
    if answer.first_after is None:
        return answer.ending is None and not carries_events
    return (
        answer.ending is not None
        and answer.ended_after >= SHORT_SECONDS
        and (answer.first_after > answer.ended_after / 2)
    )


def _beginning(answer: Answer) -> str:
    end = f"of {_ms(answer.ended_after)}" if answer.ending else "and no end yet"
    if answer.first_after is None:
        return f"headers after {_ms(answer.head_after)}, without a body " + end
    return f"the first byte after {_ms(answer.first_after)} {end}"


async def _longest_health(subject: Subject, meanwhile: Coroutine[Any, Any, None]) -> float:
    """Ask for /health all the time while something else goes on; the longest that it took, in seconds."""
    longest, message = 0.0, wire.request("GET", "/health", host=subject.host)
    async with asyncio.TaskGroup() as group:
        going = group.create_task(meanwhile)
        while not going.done():
            async with wire.asked(subject.server.port, message) as health:
                await health.read(seconds=PATIENCE_SECONDS)
            longest = max(longest, health.ended_after)
            await asyncio.wait({going}, timeout=0.01)
    return longest


async def _streamed(subject: Subject) -> None:
    async with subject.ask(long=True) as answer:
        await answer.read(seconds=1, most=1 << 30)


async def _open_and_leave(subject: Subject) -> float:
    """Let ten clients come, and leave when they have their first byte, half of them by a reset; when they left."""
    async with AsyncExitStack() as stack:
        answers = []
        for _ in range(LEAVERS):
            with suppress(NotHTTP):
                answers.append(await stack.enter_async_context(subject.ask(long=True)))
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                group.create_task(answer.begin(seconds=0.5))
        left = time.monotonic()
        for number, answer in enumerate(answers):
            answer.leave(reset=number % 2 == 0)
    return left


async def _now(subject: Subject) -> State:
    return await asyncio.to_thread(subject.server.state)


async def _settled(subject: Subject, before: State | None = None, *, seconds: float) -> State:
    """Wait until nothing is open, or no more than before."""

    def reached(now: State) -> bool:
        return not _grown(before, now) if before is not None else not now.streams

    return await asyncio.to_thread(subject.server.settled, reached, seconds=seconds)


def _grown(before: State, after: State) -> str:
    """What there is more of, for at least half of those who have left; nothing where there is no such thing."""
    found = [f"{after.streams - before.streams} streams"] if after.streams > before.streams else []
    for what in ("tasks", "files", "threads", "children"):
        more = Counter(getattr(after, what)) - Counter(getattr(before, what))
        if more.total() - (Counter(getattr(before, what)) - Counter(getattr(after, what))).total() >= LEAVERS // 2:
            found.append(f"{more.total()} {what} ({', '.join(sorted(more))[:200]})")
    return ", ".join(found)


def _is_route(canonical: str, template: str) -> bool:
    return canonical == template or canonical.partition("{")[0] == template.partition("{")[0]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
