"""Cases for streams: an early first byte, bounded cost, and work that stops when the client disconnects."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Coroutine
from contextlib import AsyncExitStack, ExitStack, closing, suppress
from typing import Any

from . import wire
from .promise import Broken, promise
from .server import State
from .subject import FULL, MAX_BYTES, Subject
from .wire import NotHTTP, StreamedResponse

DISCONNECTS = 10
"""Number of clients that disconnect at the same time."""

CONCURRENT = 50
"""Number of concurrent clients."""

FIRST_BYTE_SECONDS = 0.5
"""Maximum time from the headers of a client's response to its first byte before it disconnects, in seconds."""

STALLED = 5
"""Number of clients that read nothing."""

STALL_SECONDS = 1.0
"""Interval over which the cost of stalled clients is measured, in seconds."""

STALL_INTERVALS = 5
"""Maximum number of such intervals."""

STALLED_BYTES = 16 * 1024 * 1024
"""Maximum memory of all stalled clients, in bytes."""

STALLED_CPU = 0.1
"""Maximum processor time of all stalled clients, in seconds per second."""

STOP_WORK_SECONDS = 0.1
"""Maximum time until the work for a disconnected client stops, in seconds."""

TIMEOUT_SECONDS = 15.0
"""Maximum time for a first byte or an end, in seconds."""

SHORT_SECONDS = 0.25
"""Duration of a response below which its first byte cannot be late, in seconds."""

HEALTH_SECONDS = 0.25
"""Maximum time of /health while a stream is open, in seconds."""

HEALTH_INTERVAL = 0.025
"""Interval between two requests for /health, in seconds: what a block may last longer than is measured."""


class Streams:
    """Cases for every endpoint that concern streaming."""

    @promise("streamlab: the first byte arrives in the first half of the time")
    async def test_first_byte_arrives_before_the_end(self, subject: Subject) -> str:
        """The first byte of the body arrives in the first half of the time of the complete response."""
        response = await subject.response()
        for long in (False, True, True):  # what the first request creates delays only that one
            if not _is_late(response, subject.form.carries_events):
                return _first_byte_timing(response)
            async with subject.request(long=long) as response:
                await response.read(seconds=TIMEOUT_SECONDS, max_bytes=MAX_BYTES)
        if not _is_late(response, subject.form.carries_events):
            return _first_byte_timing(response)
        raise Broken(f"buffered: {_first_byte_timing(response)}")

    @promise("streamlab: a client that disconnects stops its work within 100 ms")
    async def test_disconnected_client_stops_its_work(self, subject: Subject) -> str:
        """The work for ten disconnected clients stops within 100 ms; no stream, task, file, thread or child remains."""
        if await subject.is_complete_at_once():
            return "no disconnect possible: the response is complete at once"
        delays: list[float] = []
        for _ in range(3):  # objects created once and cached exist after the first time
            before = await _settled(subject, seconds=1)
            disconnected_at = await _open_and_disconnect(subject)
            after = await _settled(subject, before, seconds=2)
            route = subject.form.template
            ended = [one for one in after.ended if one["at"] >= disconnected_at and is_route(one["route"], route)]
            if failed := [one for one in ended if one["outcome"] == "failed"]:
                raise Broken(f"{len(failed)} of {DISCONNECTS} streams ended as `failed`: a disconnect is not a failure")
            delays = [one["at"] - disconnected_at for one in ended if one["outcome"] == "client left"]
            grown = what_grew(before, after)
            if not grown and (not delays or statistics.median(delays) <= STOP_WORK_SECONDS):
                timing = f", half of it within {_ms(statistics.median(delays))}" if delays else ""
                return f"{DISCONNECTS} disconnected, and none of their work remains{timing}"
        if grown:
            raise Broken(f"2 s after {DISCONNECTS} clients disconnected there are more than before: {grown}")
        raise Broken(f"half of the work continued for {_ms(statistics.median(delays))} or longer")

    @promise("streamlab: a client that does not read costs a bounded amount of memory, and no processor time")
    async def test_stalled_client_uses_bounded_resources(self, subject: Subject) -> str:
        """Five clients that read nothing cost at most 16 MiB of memory, no growth, and almost no processor time."""
        if await subject.is_complete_at_once():
            return "no stall possible: the response is complete at once"
        before = await _settled(subject, seconds=1)
        if subject.cache.idle_cpu is None:
            await asyncio.sleep(STALL_SECONDS)
            subject.cache.idle_cpu = (await _now(subject)).cpu - before.cpu
        message, idle = subject.message(long=True), subject.cache.idle_cpu
        with ExitStack() as stack:
            for _ in range(STALLED):
                stack.enter_context(closing(await asyncio.to_thread(wire.stalled, subject.server.port, message)))
            early = await _now(subject)
            for _ in range(STALL_INTERVALS):  # preparing a source before its first data is allowed
                await asyncio.sleep(STALL_SECONDS)
                late = await _now(subject)
                cost, growth = late.memory - before.memory, late.memory - early.memory
                cpu, early = max(0.0, late.cpu - early.cpu - idle), late
                if cost > STALLED_BYTES or (growth <= STALLED_BYTES / 4 and cpu <= STALLED_CPU * STALL_SECONDS):
                    break
        if cost > STALLED_BYTES:
            raise Broken(f"{cost / 1e6:.1f} MB of memory for {STALLED} clients that read nothing")
        if growth > STALLED_BYTES / 4:
            raise Broken(f"{growth / 1e6:.1f} MB of memory growth in a second in which no client read")
        if cpu > STALLED_CPU * STALL_SECONDS:
            raise Broken(f"{cpu:.2f} s of processor time in a second in which no client read")
        after = await _settled(subject, before, seconds=3)
        if grown := what_grew(before, after):
            raise Broken(f"3 s after {STALLED} stalled clients disconnected there are more than before: {grown}")
        return f"{max(cost, 0) / 1e6:.1f} MB, {cpu:.2f} s of processor time per second, nothing left open"

    @promise("streamlab: many concurrent clients; RFC 9110, 15.6.4 and RFC 6585, 4 (429) beyond the limit")
    async def test_concurrent_clients_get_the_same_response(self, subject: Subject) -> str:
        """Fifty concurrent clients get the response of a single one, or 429 or 503 with Retry-After."""
        usual = await subject.response()
        if usual.status not in subject.form.statuses:
            raise Broken(f"{usual.line} for a single client: see responds_as_described")
        responses: list[StreamedResponse | str] = []

        async def one() -> None:
            try:
                async with subject.request() as response:
                    responses.append(response)
                    if usual.ending is None:
                        await response.wait_for_first_byte(seconds=TIMEOUT_SECONDS if usual.body else 0.1)
                    else:
                        await response.read(seconds=TIMEOUT_SECONDS, max_bytes=len(usual.body) + 1)
            except (NotHTTP, OSError) as error:
                responses.append(f"{type(error).__name__}: {error}")

        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENT):
                group.create_task(one())
        for response in responses:
            if fault := await _concurrent_fault(subject, usual, response):
                raise Broken(f"{fault} for one of {CONCURRENT} clients")
        served = sum(isinstance(response, StreamedResponse) and response.status not in FULL for response in responses)
        late = max((a.first_after or 0.0 for a in responses if isinstance(a, StreamedResponse)), default=0.0)
        # Where some clients get 429 or 503, others may wait for one of few slots.
        if (
            served == CONCURRENT
            and usual.ending
            and usual.ended_after > SHORT_SECONDS
            and late > usual.ended_after * 3 + 2
        ):
            raise Broken(f"the last of {CONCURRENT} waited {late:.1f} s for its first byte: served one after the other")
        return (
            f"{served} served, {CONCURRENT - served} rejected with Retry-After; the last first byte after {_ms(late)}"
        )

    @promise("streamlab: nothing blocks the loop; asyncio, Developing with asyncio: running blocking code")
    async def test_stream_does_not_block_other_requests(self, subject: Subject) -> str:
        """While it streams, /health responds within 250 ms."""
        if await subject.is_complete_at_once():
            return "complete at once"
        longest = usual = 0.0
        for _ in range(3):  # a busy machine may be late once
            await _settled(subject, seconds=1)
            usual = await _longest_health(subject, asyncio.sleep(0.2))
            longest = await _longest_health(subject, _streamed(subject))
            if longest <= HEALTH_SECONDS + 3 * usual:
                return f"the longest /health took {_ms(longest)}, and {_ms(usual)} without it"
        raise Broken(f"/health took {_ms(longest)}, and {_ms(usual)} without it")


async def _concurrent_fault(subject: Subject, usual: StreamedResponse, response: StreamedResponse | str) -> str:
    """Return what is wrong with a response under concurrency, compared with the usual one; empty if nothing is."""
    if isinstance(response, str):
        return f"no response ({response})"
    if response.status in FULL:
        return f"{response.line}, without Retry-After," if response.get("retry-after") is None else ""
    if response.status not in subject.form.statuses:
        return f"{response.line}, which is not declared,"
    if usual.body and not response.body:
        return f"no first byte within {TIMEOUT_SECONDS:g} s"
    if usual.ending == "complete" and response.ending not in ("complete", None):
        return "an incomplete body"
    if response.status == usual.status and (difference := await subject.differs(bytes(response.body))):
        return f"a different body ({difference})"
    return ""


def _is_late(response: StreamedResponse, carries_events: bool) -> bool:
    """Return whether the first byte came in the second half of the time, or has not come; events may be rare."""
    if response.first_after is None:
        return response.ending is None and not carries_events
    return (
        response.ending is not None
        and response.ended_after >= SHORT_SECONDS
        and (response.first_after > response.ended_after / 2)
    )


def _first_byte_timing(response: StreamedResponse) -> str:
    end = f"of {_ms(response.ended_after)}" if response.ending else "without an end"
    if response.first_after is None:
        return f"headers after {_ms(response.head_after)}, without a body " + end
    return f"the first byte after {_ms(response.first_after)} {end}"


async def _longest_health(subject: Subject, meanwhile: Coroutine[Any, Any, None]) -> float:
    """Request /health repeatedly while `meanwhile` runs; return the longest time, in seconds."""
    longest, message = 0.0, wire.request("GET", "/health", host=subject.host)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(meanwhile)
        while not running.done():
            async with wire.send(subject.server.port, message) as health:
                await health.read(seconds=TIMEOUT_SECONDS)
            longest = max(longest, health.ended_after)
            await asyncio.wait({running}, timeout=HEALTH_INTERVAL)
    return longest


async def _streamed(subject: Subject) -> None:
    async with subject.request(long=True) as response:
        await response.read(seconds=1, max_bytes=1 << 30)


async def _open_and_disconnect(subject: Subject) -> float:
    """Connect ten clients, disconnect them after their first byte, half of them by a reset; return the time of it.

    Those that still wait, as for one of few slots, disconnect half a second after the first that is served.
    """

    async def first_byte() -> StreamedResponse | None:
        with suppress(NotHTTP):
            response = await stack.enter_async_context(subject.request(long=True))
            await response.wait_for_first_byte(seconds=FIRST_BYTE_SECONDS)
            return response
        return None

    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        waiting = {group.create_task(first_byte()) for _ in range(DISCONNECTS)}
        responses: list[StreamedResponse] = []
        while waiting and all(response.status in FULL for response in responses):
            served, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            responses += filter(None, (client.result() for client in served))
        if waiting:
            served, waiting = await asyncio.wait(waiting, timeout=FIRST_BYTE_SECONDS)
            responses += filter(None, (client.result() for client in served))
        disconnected_at = time.monotonic()
        for client in waiting:
            client.cancel()
        for number, response in enumerate(responses):
            response.disconnect(reset=number % 2 == 0)
    return disconnected_at


async def _now(subject: Subject) -> State:
    return await asyncio.to_thread(subject.server.state)


async def _settled(subject: Subject, before: State | None = None, *, seconds: float) -> State:
    """Wait until no stream is open, or no more objects than before; return the state."""

    def accept(now: State) -> bool:
        return not what_grew(before, now) if before is not None else not now.streams

    return await asyncio.to_thread(subject.server.wait_for_state, accept, seconds=seconds)


def what_grew(before: State, after: State) -> str:
    """Return what has grown by at least half of the disconnected clients; empty if nothing has."""
    found = [f"{after.streams - before.streams} streams"] if after.streams > before.streams else []
    for what in ("tasks", "files", "threads", "children"):
        more = Counter(getattr(after, what)) - Counter(getattr(before, what))
        if more.total() - (Counter(getattr(before, what)) - Counter(getattr(after, what))).total() >= DISCONNECTS // 2:
            found.append(f"{more.total()} {what} ({', '.join(sorted(more))[:200]})")
    return ", ".join(found)


def is_route(canonical: str, template: str) -> bool:
    """Return whether a route of the server is that of an endpoint."""
    return canonical == template or canonical.partition("{")[0] == template.partition("{")[0]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
