"""Send the same rows buffered and streamed, and measure what either way costs."""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from pathlib import Path

from aiohttp import web
from pydantic import BaseModel, Field, PrivateAttr

from streamlab import (
    EventStream,
    Problem,
    Scenario,
    Stream,
    endpoint,
    hookimpl,
    open_event_stream,
    open_stream,
    sse_event,
)

from . import memory, ways
from .measure import Failed, measure
from .report import EventLines, Table, Teller, reported

log = logging.getLogger(__name__)

MOST_ROWS = 100_000_000

FREE_SHARE = 0.5
"""The part of the memory that is free now that what is collected may take."""


class Wanted(BaseModel):
    """How many rows are wanted."""

    rows: int = Field(10_000, ge=0, le=MOST_ROWS, description="How many rows.")


class Asked(BaseModel):
    """How much is to be measured."""

    rows: int = Field(
        100_000, ge=100, le=MOST_ROWS, description="The largest size; a tenth and a hundredth of it are measured, too."
    )
    repeats: int = Field(3, ge=1, le=9, description="How often each size is measured in each way; medians are told.")
    last_event_id: str = Field(
        "", max_length=100, description="The last event a client has; the header Last-Event-ID says the same, and wins."
    )


class Comparison(Scenario):
    """The same rows collected in memory first, or sent as they are made; and what either way costs."""

    max_rows: int = Field(1_000_000, ge=1000, le=MOST_ROWS)
    """How many rows may be collected in memory, or measured; more are refused."""
    max_buffered: int = Field(4, ge=1, le=1000)
    """Collected answers at once; one more is answered 503 with Retry-After."""
    max_reports: int = Field(1, ge=1, le=100)
    """Reports at once; one more is answered 503 with Retry-After."""
    max_seconds: float = Field(120.0, gt=0, le=3600)
    """How long a report may take; then it is cut."""

    _held: list[int] = PrivateAttr(default_factory=list)
    """Bytes of memory that each collected answer and each report may take."""
    _buffered: list[None] = PrivateAttr(default_factory=list)
    _reports: list[None] = PrivateAttr(default_factory=list)

    @endpoint("GET", "/demo/comparison/buffered", query=Wanted, sends="application/json", curl="{url}")
    async def buffered(self, request: web.Request, query: Wanted) -> web.StreamResponse:
        """Send rows as one JSON array that is collected in memory first.

        Its length is known, and so is what it took, in Server-Timing; nothing leaves before all is there.
        """
        with self._memory(query.rows), _place(self._buffered, self.max_buffered, "collected answers"):
            started = time.perf_counter()
            body = await ways.collect(query.rows)
            headers = _timing("collect", started, f"{query.rows} rows made and held")
            async with open_stream(request, "application/json", length=len(body), headers=headers) as stream:
                await ways.send_collected(body, stream.write)
        return stream

    @endpoint("GET", "/demo/comparison/streamed", query=Wanted, sends="application/json")
    async def streamed(self, request: web.Request, query: Wanted) -> web.StreamResponse:
        """Send the same rows, byte for byte, each as soon as it is made.

        Memory does not grow with their number; Server-Timing says when the first were there.
        """
        started = time.perf_counter()
        made = ways.pieces(query.rows)
        first = next(made)
        headers = _timing("first", started, "the first rows made")
        async with open_stream(request, "application/json", headers=headers) as stream:
            await stream.write(first)
            await ways.send_as_made(made, stream.write)
        return stream

    @endpoint(
        "GET",
        "/demo/comparison/report",
        query=Asked,
        starts_work=True,
        sends=("text/plain", "text/event-stream"),
        responses={204: "The client has the end of the report already."},
    )
    async def report(self, request: web.Request, query: Asked) -> web.StreamResponse:
        """Measure both ways at three sizes, and say when streaming pays: a table, or events where Accept names them.

        Each answer is given by a fresh process on a unix socket, so that memory and processor time are its own. A
        report belongs to the request: it stops when its reader leaves, and one that comes back gets a new one.
        """
        wants_events = "text/event-stream" in request.headers.get("Accept", "")
        last = (request.headers.get("Last-Event-ID") or query.last_event_id) if wants_events else ""
        if last.endswith(".end"):
            return web.Response(status=204, headers={"Cache-Control": "no-store"})
        if not Path("/proc/self/status").exists():  # noqa: ASYNC240 - no disk
            raise Problem(503, "Memory is measured as Linux tells it, and this is another system.")
        with self._memory(query.rows), _place(self._reports, self.max_reports, "reports"):
            events = EventLines(secrets.token_hex(8))
            teller: Teller = events if wants_events else Table()
            headers = {"Vary": "Accept"}
            opened: AbstractAsyncContextManager[Stream, bool] = (
                open_event_stream(request, headers=headers)
                if wants_events
                else open_stream(request, teller.content_type, headers=headers)
            )
            async with opened as stream:
                if isinstance(stream, EventStream):
                    stream.event_id = events.place
                if last:
                    gap = {"reason": "that report ended when its reader left; this is a new one", "missing": None}
                    await stream.write(sse_event(gap, "gap", id=events.place("gap")))
                await self._tell(stream, teller, query)
        return stream

    async def _tell(self, stream: Stream, teller: Teller, query: Asked) -> None:
        """Measure, and send each moment of it; raises Problem where that fails or takes too long."""
        try:
            async with (
                asyncio.timeout(self.max_seconds),
                aclosing(reported(query.rows, query.repeats, measure)) as told,
            ):
                async for moment in told:
                    await stream.write(teller.tell(moment))
        except TimeoutError:
            detail = (
                f"The report took more than the {self.max_seconds:g} seconds it may: ask for fewer rows, or repeats."
            )
            failure = Problem(503, detail)
        except Failed as error:
            log.error("a process that was to be measured failed: %s", error)
            failure = Problem(500, "A process that was to be measured failed; the server's log says why.")
        else:
            return
        await stream.write(teller.fail(failure.detail))
        raise failure

    @contextmanager
    def _memory(self, rows: int) -> Iterator[None]:
        """Hold what so many rows may take in memory; raises Problem where they do not fit."""
        need, free = ways.collected_bytes(rows), memory.available()
        if rows > self.max_rows:
            raise _too_many(f"must be at most {self.max_rows}, as many as this server collects in memory")
        if free is not None and need > free * FREE_SHARE:
            megabytes, left = need // 1_000_000, free // 1_000_000
            raise _too_many(
                f"would take up to {megabytes} MB of memory, and half of the {left} MB that are free is allowed"
            )
        if free is not None and need + sum(self._held) > free * FREE_SHARE:
            raise Problem(503, "Others have the memory that these rows would take.", headers={"Retry-After": "5"})
        self._held.append(need)
        try:
            yield
        finally:
            self._held.remove(need)


@contextmanager
def _place(taken: list[None], limit: int, what: str) -> Iterator[None]:
    """Hold one of so many places; raises Problem where there is none."""
    if len(taken) >= limit:
        raise Problem(503, f"All places for {what} ({limit}) are taken.", headers={"Retry-After": "5"})
    taken.append(None)
    try:
        yield
    finally:
        taken.pop()


def _too_many(detail: str) -> Problem:
    errors = [{"in": "query", "name": "rows", "detail": detail}]
    return Problem(422, "So many rows do not fit into memory at once.", errors=errors)


def _timing(name: str, started: float, description: str) -> dict[str, str]:
    """Source: W3C Server Timing, section 3."""
    return {"Server-Timing": f'{name};dur={(time.perf_counter() - started) * 1000:.3f};desc="{description}"'}


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Bring the comparison."""
    return [Comparison]
