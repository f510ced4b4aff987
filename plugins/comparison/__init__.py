"""Send the same rows buffered and streamed, and measure the cost of both modes."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import BaseModel, Field, PrivateAttr

from streamlab import (
    Problem,
    ResumeQuery,
    Scenario,
    Slots,
    client_of,
    endpoint,
    hookimpl,
    no_more_events,
    open_event_stream,
    open_stream,
    resume_id,
    wants_events,
)

from . import memory, modes
from .measure import Failed, measuring
from .report import TABLE_HEADER, End, Update, measure_all, table_line

log = logging.getLogger(__name__)

MAX_ROWS = 100_000_000
"""Upper limit of the number of rows in any configuration."""

FREE_SHARE = 0.5
"""Maximum share of the available memory that buffered responses may take."""


class RowsQuery(BaseModel):
    """The query of the rows."""

    rows: int = Field(10_000, ge=0, le=MAX_ROWS, description="Number of rows.")


class ReportQuery(ResumeQuery):
    """The query of the report."""

    rows: int = Field(
        100_000, ge=100, le=MAX_ROWS, description="The largest size; a tenth and a hundredth of it are measured, too."
    )
    repeats: int = Field(
        3, ge=1, le=9, description="Number of measurements of each size in each mode; the medians are reported."
    )


class Comparison(Scenario):
    """The same rows buffered in memory first, or streamed as they are generated; and the cost of both modes."""

    max_rows: int = Field(1_000_000, ge=1000, le=MAX_ROWS)
    """Maximum number of rows that may be buffered or measured; more are rejected."""
    max_buffered: int = Field(4, ge=1, le=1000)
    """Maximum number of buffered responses at once; more are rejected with 503 and Retry-After."""
    max_reports: int = Field(1, ge=1, le=100)
    """Maximum number of reports at once; more are rejected with 503 and Retry-After."""
    max_seconds: float = Field(120.0, gt=0, le=3600)
    """Maximum duration of a report, in seconds; then it is aborted."""

    _reserved: list[int] = PrivateAttr(default_factory=list)
    """Memory reserved for each buffered response and each report, in bytes."""
    _response_slots: Slots = PrivateAttr()
    _report_slots: Slots = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Create the slots."""
        self._response_slots = Slots(self.max_buffered, what="buffered responses")
        self._report_slots = Slots(self.max_reports, what="reports")

    @endpoint("GET", "/demo/comparison/buffered", query=RowsQuery, sends="application/json", curl="{url}")
    async def buffered(self, request: web.Request, query: RowsQuery) -> web.StreamResponse:
        """Send rows as one JSON array that is buffered in memory first.

        Content-Length has its size and Server-Timing the time to generate it; no byte is sent before the last row.
        """
        with self._memory(query.rows):
            async with self._response_slots.held(client=client_of(request)):
                started = time.perf_counter()
                body = await modes.collect(query.rows)
                headers = _timing("collect", started, f"{query.rows} rows generated and buffered")
                async with open_stream(request, "application/json", length=len(body), headers=headers) as stream:
                    await modes.send_collected(body, stream.write)
        return stream

    @endpoint("GET", "/demo/comparison/streamed", query=RowsQuery, sends="application/json")
    async def streamed(self, request: web.Request, query: RowsQuery) -> web.StreamResponse:
        """Send the same rows, byte for byte, as soon as they are generated.

        Memory does not grow with their number; Server-Timing has the time to generate the first ones.
        """
        started = time.perf_counter()
        chunks = modes.chunks(query.rows)
        first = next(chunks)
        headers = _timing("first", started, "first rows generated")
        async with open_stream(request, "application/json", headers=headers) as stream:
            await stream.write(first)
            await modes.send_streamed(chunks, stream.write)
        return stream

    @endpoint(
        "GET",
        "/demo/comparison/report",
        query=ReportQuery,
        starts_work=True,
        sends=("text/plain", "text/event-stream"),
        responses={204: "The client has received the end of the report."},
    )
    async def report(self, request: web.Request, query: ReportQuery) -> web.StreamResponse:
        """Measure both modes at three sizes, and report when streaming pays: as a table, or as events if preferred.

        Each response is sent by a new process on a unix socket, so that memory and CPU time are its own. The report
        stops when its client disconnects; a client that reconnects gets a new one.
        """
        as_events = wants_events(request)
        last_id = resume_id(request, query.last_event_id) if as_events else ""
        if last_id.endswith(".end"):
            return no_more_events()
        if not Path("/proc/self/status").exists():  # noqa: ASYNC240 - no disk
            raise Problem(503, "A report requires Linux, which exposes the memory of a process in /proc.")
        with self._memory(query.rows):
            async with self._report_slots.held(client=client_of(request)):
                if as_events:
                    return await self._send_events(request, query, resumes=bool(last_id))
                return await self._send_table(request, query)

    async def _send_events(self, request: web.Request, query: ReportQuery, *, resumes: bool) -> web.StreamResponse:
        """Send the report as events: `progress`, `measurement`, and `end` with the verdict."""
        report, number = secrets.token_hex(8), 0
        async with open_event_stream(request, headers={"Vary": "Accept"}, position=f"{report}-0") as stream:
            if resumes:
                await stream.gap("the report ended when its client disconnected; this is a new one")
            async with self._updates(query) as updates:
                async for update in updates:
                    number += 1
                    id = f"{report}-{number}" + (".end" if isinstance(update, End) else "")  # noqa: A001
                    await stream.send(asdict(update), id, type(update).__name__.lower())
        return stream

    async def _send_table(self, request: web.Request, query: ReportQuery) -> web.StreamResponse:
        """Send the report as plain text, a line per measurement; a failure is the last line."""
        async with open_stream(request, "text/plain; charset=utf-8", headers={"Vary": "Accept"}) as stream:
            await stream.write(TABLE_HEADER)
            try:
                async with self._updates(query) as updates:
                    async for update in updates:
                        await stream.write(table_line(update))
            except Problem as problem:
                await stream.write(f"\n{problem.detail}\n".encode())
                raise
        return stream

    @asynccontextmanager
    async def _updates(self, query: ReportQuery) -> AsyncIterator[AsyncIterator[Update]]:
        """Yield the updates of a report; raises Problem if measuring fails or takes too long."""
        try:
            async with (
                asyncio.timeout(self.max_seconds),
                measuring() as measure,
                aclosing(measure_all(query.rows, query.repeats, measure)) as updates,
            ):
                yield updates
        except TimeoutError:
            detail = f"The report took longer than {self.max_seconds:g} s (max_seconds). Request fewer rows or repeats."
            raise Problem(503, detail) from None
        except Failed as error:
            log.error("a measured process failed: %s", error)
            raise Problem(500, "A measured process failed; see the server's log.") from None

    @contextmanager
    def _memory(self, rows: int) -> Iterator[None]:
        """Reserve the memory that `rows` rows may take; raises Problem if they do not fit."""
        need, free = modes.collected_bytes(rows), memory.available()
        if rows > self.max_rows:
            raise Problem.parameter("rows", f"must be at most {self.max_rows} (max_rows)")
        if free is not None and need > free * FREE_SHARE:
            megabytes, left = need // 1_000_000, free // 1_000_000
            detail = f"would take up to {megabytes} MB of memory; the limit is half of the available {left} MB"
            raise Problem.parameter("rows", detail)
        if free is not None and need + sum(self._reserved) > free * FREE_SHARE:
            detail = "Other requests are using the memory that these rows would take."
            raise Problem(503, detail, headers={"Retry-After": "5"})
        self._reserved.append(need)
        try:
            yield
        finally:
            self._reserved.remove(need)


def _timing(name: str, started: float, description: str) -> dict[str, str]:
    """Return the header Server-Timing with the time since `started`. Source: W3C Server Timing, section 3."""
    return {"Server-Timing": f'{name};dur={(time.perf_counter() - started) * 1000:.3f};desc="{description}"'}


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Register the comparison."""
    return [Comparison]
