"""Diagnose whether a URL streams, and what prevents it: probed as a client, reported in plain words.

The response is observed from outside, so this works for any server, behind any proxy: when each chunk of the body
arrived, what the headers promise, and what the server does with a client that resumes.
"""

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import aiohttp
from yarl import URL

from streamlab.sse import MEDIA_TYPE

from .http import CONNECT_SECONDS, ConnectionLost, RequestRejected, parse_url
from .sse import Parser

HEADERS_SECONDS = 60.0
"""Timeout for the response headers, in seconds."""

BURST_SECONDS = 0.02
"""Maximum time between two chunks of one burst, in seconds."""

EARLY = 0.5
"""Latest first byte of a body that streams, as a fraction of its duration; a buffer sends everything at the end."""

IDLE_SECONDS = 1.0
"""Silence before the end of an event stream that indicates an idle timeout, in seconds."""

QUICK_SECONDS = 0.5
"""Minimum duration of a body that can be classified as streamed or buffered, in seconds."""

SAMPLE_BYTES = 4 * 1024 * 1024
"""Maximum size of the body that is stored to compare it with a resumed response, in bytes."""

PROOF_BYTES = 4096
"""Size of the range of a download that is requested again, in bytes."""

CELLS = 60
"""Width of the chart, in characters."""

BLOCKS = " ▁▂▃▄▅▆▇█"

Mark = Literal["good", "bad", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of the examination: good, bad, or a note."""

    mark: Mark
    text: str


_good, _bad, _note = partial(Finding, "good"), partial(Finding, "bad"), partial(Finding, "note")


@dataclass(slots=True)
class Response:
    """A response as it arrived."""

    url: URL
    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    headers_at: float
    """Seconds from the request to the headers."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """Seconds from the request, and bytes, of each read."""
    seconds: float = 0.0
    """Seconds from the request to the end of the observation."""
    complete: bool = False
    """Whether the body ended within that time."""
    error: str = ""
    """Why the body broke off, if it did."""
    body: bytearray = field(default_factory=bytearray)
    """The first SAMPLE_BYTES of the body."""

    @property
    def size(self) -> int:
        """Number of bytes received."""
        return sum(count for _, count in self.arrivals)

    @property
    def media_type(self) -> str:
        """The Content-Type without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def is_event_stream(self) -> bool:
        """Whether this is an event stream."""
        return self.media_type == MEDIA_TYPE

    def bursts(self) -> list[tuple[float, int]]:
        """Return the reads, joined into bursts: the start of each in seconds, and its bytes."""
        joined: list[tuple[float, int]] = []
        last = float("-inf")
        for at, count in self.arrivals:
            if joined and at - last < BURST_SECONDS:
                joined[-1] = joined[-1][0], joined[-1][1] + count
            else:
                joined.append((at, count))
            last = at
        return joined

    def chart(self) -> str:
        """Return when bytes arrived, as a bar chart of CELLS characters over the observed time."""
        cells = [0] * CELLS
        for at, count in self.arrivals:
            cells[min(CELLS - 1, int(at / max(self.seconds, 1e-9) * CELLS))] += count
        most = max(cells, default=0) or 1
        return "".join(BLOCKS[0 if not count else max(1, round(count / most * 8))] for count in cells)


@dataclass(frozen=True, slots=True)
class Report:
    """The results of an examination."""

    response: Response
    findings: Sequence[Finding]

    @property
    def is_streaming(self) -> bool:
        """Whether no finding is bad."""
        return all(finding.mark != "bad" for finding in self.findings)

    def lines(self) -> list[str]:
        """Return the report for a terminal: the response, when its bytes arrived, and the findings, bad ones first."""
        response, marks = self.response, {"bad": "no  ", "good": "yes ", "note": "    "}
        framing = "chunked" if "chunked" in response.headers.get("transfer-encoding", "") else "until close"
        length = response.headers.get("content-length")
        kind = response.media_type or "no content type"
        return [
            f"{response.url}",
            f"{kind}, {f'{int(length):,} bytes' if length and length.isascii() and length.isdigit() else framing}",
            f"|{response.chart()}| {response.size:,} bytes in {response.seconds:.2f} s",
            *(f"{marks[mark]}{text}" for mark in ("bad", "good", "note") for text in self._texts(mark)),
        ]

    def _texts(self, mark: str) -> list[str]:
        return [finding.text for finding in self.findings if finding.mark == mark]


async def examine(url: str, *, seconds: float = 5.0) -> Report:
    """Observe a URL for up to `seconds`, request it again in other variants, and report the findings.

    Raises ValueError for an invalid URL, ConnectionLost where there is no response, RequestRejected for a status other
    than 200.
    """
    target = parse_url(url)
    async with _session() as session:
        response = await _observe(session, target, seconds)
        if response.status != 200:
            raise RequestRejected(target, f"returned {response.status}", status=response.status)
        findings = [*_timing(response), *_header_findings(response)]
        findings += await _compression(session, response, seconds)
        findings += await _resumption(session, response, seconds)
    return Report(response, findings)


@asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        yield session


async def _observe(
    session: aiohttp.ClientSession,
    url: URL,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    *,
    max_bytes: int | None = None,
) -> Response:
    """Send a request, and read the response until it ends, `max_bytes` have arrived, or `seconds` are over."""
    sent = {"Accept": f"{MEDIA_TYPE}, */*;q=0.5", "Accept-Encoding": "identity", **(headers or {})}
    started = time.perf_counter()
    try:
        async with asyncio.timeout(max(seconds, HEADERS_SECONDS)):
            received = await session.get(url, headers=sent)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ConnectionLost(url, f"no response: {str(error) or type(error).__name__}") from error
    try:
        lower = {name.lower(): value for name, value in received.headers.items()}
        response = Response(received.url, received.status, lower, time.perf_counter() - started)
        try:
            async with asyncio.timeout(max(0.0, seconds - response.headers_at)):
                async for chunk in received.content.iter_any():
                    response.arrivals.append((time.perf_counter() - started, len(chunk)))
                    response.body += chunk[: SAMPLE_BYTES - len(response.body)]
                    if max_bytes is not None and response.size >= max_bytes:
                        break
                else:
                    response.complete = True
        except TimeoutError:
            pass
        except aiohttp.ClientError as error:
            response.error = type(error).__name__
        response.seconds = time.perf_counter() - started
        return response
    finally:
        received.close()


# -- findings of one response


def _timing(response: Response) -> list[Finding]:
    """Classify when the bytes arrived."""
    last = response.arrivals[-1][0] if response.arrivals else response.headers_at
    if (response.error or response.complete) and response.is_event_stream and response.seconds - last > IDLE_SECONDS:
        silence = f"It was closed after {response.seconds - last:.1f} s of silence"
        return [_bad(f"{silence}: an idle timeout. A comment every 15 s would keep it open.")]
    if response.error:
        return [_bad(f"It broke off after {response.size:,} bytes: the body is incomplete, and clients can detect it.")]
    if not response.arrivals:
        if response.complete:
            return [_note("The body is empty.")]
        received = f"Only headers arrived in {response.seconds:.1f} s"
        return [_note(f"{received}: it is idle, or a proxy buffers it. Observe it for longer (--seconds).")]
    first, bursts = response.arrivals[0][0], response.bursts()
    if response.complete and response.seconds < QUICK_SECONDS:
        return [_note(f"The whole body arrived within {response.seconds * 1000:.0f} ms: too fast to classify.")]
    if response.complete and first > EARLY * response.seconds and len(bursts) == 1:
        at_once = f"All {response.size:,} bytes arrived at once, after {first:.2f} s"
        return [_bad(f"{at_once}: the body is buffered before it is sent.")]
    if response.is_event_stream and (torn := _torn(response)):
        split = f"{torn} of {len(bursts)} bursts end in the middle of an event"
        return [_bad(f"{split}: a proxy fills a buffer before it forwards.")]
    if response.complete and first > EARLY * response.seconds:
        return [_bad(f"The first byte arrived after {first:.2f} of {response.seconds:.2f} s: more than half of them.")]
    texts = [f"It streams: the first byte after {first * 1000:.0f} ms, then "]
    texts.append(f"{len(bursts)} bursts" if len(bursts) > 1 else "without a pause")
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(bursts)]
    if gaps:
        texts.append(f", {min(gaps):.2f} to {max(gaps):.2f} s apart")
    return [_good("".join(texts) + ".")]


def _torn(response: Response) -> int:
    """Return how many bursts (of at least two) end within an event, 0 unless most do: servers send whole events."""
    ends = list(itertools.accumulate(count for _, count in response.bursts()))
    inner = [end for end in ends[: None if not response.complete else -1] if 0 < end <= len(response.body)]
    torn = sum(not response.body[:end].endswith((b"\n\n", b"\r\n\r\n", b"\r\r")) for end in inner)
    return torn if len(inner) > 1 and torn * 2 > len(inner) else 0


def _header_findings(response: Response) -> list[Finding]:
    """Check the headers for proxies and caches."""
    headers, found = response.headers, list[Finding]()
    if response.is_event_stream and "content-length" in headers:
        found.append(_bad("An event stream has a Content-Length: it was buffered before it was sent."))
    if response.is_event_stream and not re.search("no-store|no-cache", headers.get("cache-control", "")):
        found.append(_note("No Cache-Control: a cache may store an event stream."))
    if headers.get("x-accel-buffering", "").lower() == "no":
        found.append(_good("X-Accel-Buffering: no - nginx forwards it without buffering."))
    elif response.is_event_stream:
        found.append(_note("No X-Accel-Buffering: no - nginx with default settings would buffer it."))
    if via := headers.get("via") or (headers.get("server") if headers.get("server", "").startswith("nginx") else None):
        found.append(_note(f"Served by a proxy or nginx: {via}."))
    return found


# -- findings of further requests


async def _compression(session: aiohttp.ClientSession, response: Response, seconds: float) -> list[Finding]:
    """Check whether the response is compressed, and whether that delays its first byte."""
    again = await _observe(session, response.url, seconds, {"Accept-Encoding": "gzip, deflate, br, zstd"}, max_bytes=1)
    coding = again.headers.get("content-encoding", "identity")
    if coding == "identity":
        return []
    if not again.arrivals and response.arrivals:
        return [_bad(f"With compression ({coding}) nothing arrived in {again.seconds:.1f} s: it is buffered.")]
    if response.is_event_stream:
        return [_note(f"Event streams are compressed ({coding}): the compressor must flush after each event.")]
    return [_note(f"It is compressed ({coding}) for clients that accept that.")]


async def _resumption(session: aiohttp.ClientSession, response: Response, seconds: float) -> list[Finding]:
    if response.is_event_stream:
        return await _resumed_events(session, response, seconds)
    if response.media_type and "accept-ranges" in response.headers:
        return await _resumed_bytes(session, response, seconds)
    return [_note("It cannot be resumed: it has neither event ids nor ranges.")]


async def _resumed_events(session: aiohttp.ClientSession, response: Response, seconds: float) -> list[Finding]:
    """Resume after the second last event, and check that the last one follows."""
    events = [event for event in Parser().feed(bytes(response.body)) if event.id]
    if len(events) < 2:
        return [_note("Its events have no ids: a client that reconnects misses the events in between.")]
    last, expected = events[-2], events[-1]
    again = await _observe(session, response.url, seconds, {"Last-Event-ID": last.id}, max_bytes=SAMPLE_BYTES)
    if again.status == 204:
        return [_good("It resumes: 204 after the last id, which stops reconnects.")]
    received = Parser().feed(bytes(again.body))
    if not received:
        return [_note(f"After Last-Event-ID: {last.id} nothing arrived in {again.seconds:.1f} s.")]
    if (received[0].id, received[0].data) == (expected.id, expected.data):
        return [_good(f"It resumes: after Last-Event-ID: {last.id} follows {expected.id}, as in the first response.")]
    if received[0].id == last.id:
        return [_bad(f"It repeats: after Last-Event-ID: {last.id} that event is repeated.")]
    if any(event.event == "gap" for event in received[:2]):
        return [_note("It resumes with a gap, and reports it.")]
    what = f"{received[0].id or 'an event without an id'}"
    return [_bad(f"It does not resume: after Last-Event-ID: {last.id} follows {what}, not {expected.id}.")]


async def _resumed_bytes(session: aiohttp.ClientSession, response: Response, seconds: float) -> list[Finding]:
    """Request a known range again, on the condition that the file is unchanged, and compare it."""
    validator = response.headers.get("etag") or response.headers.get("last-modified", "")
    if response.headers["accept-ranges"] == "none" or not response.body:
        return [_note("It cannot be resumed: Accept-Ranges: none.")]
    if not validator or validator.startswith("W/"):
        return [_note("Ranges, but no strong ETag and no date: a resumed download may mix two versions.")]
    start = len(response.body) // 2
    end = min(len(response.body), start + PROOF_BYTES) - 1
    headers = {"Range": f"bytes={start}-{end}", "If-Range": validator}
    again = await _observe(session, response.url, seconds, headers, max_bytes=end - start + 1)
    if again.status != 206:
        return [_bad(f"It does not resume: a request for a satisfiable range returned {again.status}.")]
    if bytes(again.body) != bytes(response.body[start : end + 1]):
        return [_bad("It resumes wrongly: the bytes of a range differ from the first response.")]
    return [_good("It resumes: a range has the same bytes, and If-Range guards against another version.")]
