"""Diagnose whether a URL streams, and what prevents it: probed as a browser would, reported in plain words.

The response is observed from outside, so this works for any server, behind any proxy: when each chunk of the body
arrived, what the headers promise, and what the server does with a client that resumes. A compressed response is
compared with an uncompressed one of the same time.
"""

import asyncio
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import aiohttp
from yarl import URL

from .http import ConnectionLost, RequestRejected, parse_url
from .observation import SAMPLE_BYTES, Observation, observing, open_session
from .sse import Parser

EARLY = 0.5
"""Latest first byte of a body that streams, as a fraction of its duration; a buffer sends everything at the end."""

IDLE_SECONDS = 1.0
"""Silence before the end of an event stream that indicates an idle timeout, in seconds."""

QUICK_SECONDS = 0.5
"""Minimum duration of a body that can be classified as streamed or buffered, in seconds."""

HELD_SECONDS = 0.5
"""Silence that compression may add to twice that of the uncompressed body, in seconds."""

DELAY_SECONDS = (0.18, 0.45)
"""Shortest and longest time between packets that are held back until they are full, in seconds.

Linux holds them for 0.2 s, and the next event follows after no more than that.
"""

MIN_BATCHES = 4
"""Minimum number of bursts that show a rhythm."""

PROOF_BYTES = 4096
"""Size of the range of a download that is requested again, in bytes."""

Mark = Literal["good", "bad", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of the examination: good, bad, or a note."""

    mark: Mark
    text: str


_good, _bad, _note = partial(Finding, "good"), partial(Finding, "bad"), partial(Finding, "note")


@dataclass(frozen=True, slots=True)
class Report:
    """The results of an examination."""

    response: Observation
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
        size = f"{int(length):,} bytes" if length and length.isascii() and length.isdigit() else framing
        return [
            f"{response.url}",
            ", ".join(filter(None, (kind, response.coding, size))),
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
    async with open_session() as session:
        response, plain = await _observe(session, target, seconds)
        findings = [*_reception(response, plain), *_header_findings(response)]
        if plain is not None:
            findings += await _resumption(session, plain, seconds)
    return Report(response, findings)


async def _observe(session: aiohttp.ClientSession, url: URL, seconds: float) -> tuple[Observation, Observation | None]:
    """Observe what a browser receives and, at the same time, the uncompressed body: None if it cannot be had.

    Both are the same response if that is not compressed.
    """
    async with observing(session, url, seconds) as response:
        if response.status != 200:
            raise RequestRejected(url, f"returned {response.status}", status=response.status)
        if not response.coding:
            await response.read(seconds)
            return response, response
        async with asyncio.TaskGroup() as group:
            group.create_task(response.read(seconds))
            plain = group.create_task(_observe_plain(session, response.url, seconds))
    return response, plain.result()


async def _observe_plain(session: aiohttp.ClientSession, url: URL, seconds: float) -> Observation | None:
    try:
        plain = await _request(session, url, seconds)
    except ConnectionLost:
        return None
    return plain if plain.status == 200 else None


async def _request(
    session: aiohttp.ClientSession,
    url: URL,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    *,
    is_enough: Callable[[Observation], bool] = lambda _: False,
) -> Observation:
    """Observe an uncompressed response until it ends, `is_enough` is true, or `seconds` are over."""
    async with observing(session, url, seconds, {"Accept-Encoding": "identity", **(headers or {})}) as response:
        await response.read(seconds, is_enough=is_enough)
    return response


# -- findings of one response


def _reception(response: Observation, plain: Observation | None) -> list[Finding]:
    """Classify when the bytes arrived in a browser, and whether compression delays them."""
    if plain is not None and (held := _held(response, plain)):
        return [_bad(f"{held} {_advice(response)}")]
    found = [*_timing(response), *_batches(response)]
    if response.coding:
        effect = "which does not delay it" if plain is not None else "and not available without"
        found.append(_note(f"It is compressed ({response.coding}) for clients that accept that, {effect}."))
    return found


def _held(response: Observation, plain: Observation) -> str:
    """Return how compression holds back what arrives uncompressed at the same time; empty if it does not."""
    if not response.coding:
        return ""
    received, sent = len(response.events()), len(plain.events())
    if response.is_event_stream and sent > 1 and not received:
        nothing = f"no event arrived in {response.seconds:.1f} s"
        return f"Browsers receive nothing: compressed ({response.coding}), {nothing}; uncompressed, {sent} did."
    silence, usual = response.longest_silence(), plain.longest_silence()
    if plain.arrivals and silence > 2 * usual + HELD_SECONDS:
        held = f"compressed ({response.coding}), up to {silence:.1f} s pass without a byte"
        return f"Browsers receive it late: {held}; uncompressed, {usual:.1f} s."
    return ""


def _advice(response: Observation) -> str:
    """Return what the server or its proxy should do about compression."""
    headers = response.headers
    if "no-transform" not in headers.get("cache-control", ""):
        return "Send `Cache-Control: no-transform`, or exclude it from compression."
    is_caddy = "caddy" in headers.get("server", "").lower() and "x-accel-buffering" in headers
    caddy = ", in Caddy by `match header !X-Accel-Buffering` inside `encode`" if is_caddy else ""
    return f"A proxy ignores `Cache-Control: no-transform`: exclude it from compression{caddy}."


def _timing(response: Observation) -> list[Finding]:
    """Classify when the bytes arrived."""
    last = response.arrivals[-1].at if response.arrivals else response.headers_at
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
    first, bursts = response.arrivals[0].at, response.bursts()
    if response.complete and response.seconds < QUICK_SECONDS:
        return [_note(f"The whole body arrived within {response.seconds * 1000:.0f} ms: too fast to classify.")]
    if response.complete and first > EARLY * response.seconds and len(bursts) == 1:
        at_once = f"All {response.size:,} bytes arrived at once, after {first:.2f} s"
        return [_bad(f"{at_once}: the body is buffered before it is sent.")]
    if response.is_event_stream and (torn := _torn(response)):
        split = f"{torn} of {len(bursts)} bursts end in the middle of an event"
        setting = " (`proxy_buffering off`, or `X-Accel-Buffering: no`)" if _is_nginx(response) else ""
        return [_bad(f"{split}: a proxy fills a buffer before it forwards{setting}.")]
    if response.complete and first > EARLY * response.seconds:
        return [_bad(f"The first byte arrived after {first:.2f} of {response.seconds:.2f} s: more than half of them.")]
    texts = [f"It streams: the first byte after {first * 1000:.0f} ms, then "]
    texts.append(f"{len(bursts)} bursts" if len(bursts) > 1 else "without a pause")
    gaps = [later.at - earlier.at for earlier, later in itertools.pairwise(bursts)]
    if gaps:
        texts.append(f", {min(gaps):.2f} to {max(gaps):.2f} s apart")
    return [_good("".join(texts) + ".")]


def _batches(response: Observation) -> list[Finding]:
    """Report events that arrive several at a time, as far apart as packets that the kernel holds back."""
    bursts = response.bursts()
    if not response.is_event_stream or len(bursts) < MIN_BATCHES:
        return []
    parser, ends = Parser(), itertools.accumulate(burst.size for burst in bursts)
    counts = [len(parser.feed(bytes(response.body[start:end]))) for start, end in itertools.pairwise((0, *ends))]
    pause = median(later.at - earlier.at for earlier, later in itertools.pairwise(bursts))
    if median(counts) < 2 or not DELAY_SECONDS[0] <= pause <= DELAY_SECONDS[1]:
        return []
    batches = f"Events arrive {median(counts):.0f} at a time, every {pause:.1f} s"
    return [
        _note(f"{batches}: they are sent so, or a proxy delays them, as HAProxy does without `option http-no-delay`.")
    ]


def _torn(response: Observation) -> int:
    """Return how many bursts (of at least two) end within an event, 0 unless most do: servers send whole events."""
    ends = list(itertools.accumulate(burst.size for burst in response.bursts()))
    inner = [end for end in ends[: None if not response.complete else -1] if 0 < end <= len(response.body)]
    torn = sum(not response.body[:end].endswith((b"\n\n", b"\r\n\r\n", b"\r\r")) for end in inner)
    return torn if len(inner) > 1 and torn * 2 > len(inner) else 0


def _header_findings(response: Observation) -> list[Finding]:
    """Check the headers for proxies and caches."""
    headers, found = response.headers, list[Finding]()
    if response.is_event_stream and "content-length" in headers:
        found.append(_bad("An event stream has a Content-Length: it was buffered before it was sent."))
    if response.is_event_stream and not re.search("no-store|no-cache", headers.get("cache-control", "")):
        found.append(_note("No Cache-Control: a cache may store an event stream."))
    if headers.get("x-accel-buffering", "").lower() == "no":
        found.append(_good("X-Accel-Buffering: no - nginx forwards it without buffering."))
    elif response.is_event_stream and not _is_nginx(response):
        found.append(_note("No X-Accel-Buffering: no - nginx with default settings would buffer it."))
    if _is_nginx(response):
        found.append(_note(f"Served by {headers['server']}, which removes X-Accel-Buffering from what it forwards."))
    if "via" in headers:
        found.append(_note(f"Served by a proxy: {headers['via']}."))
    return found


def _is_nginx(response: Observation) -> bool:
    return response.headers.get("server", "").startswith("nginx")


# -- findings of further requests


async def _resumption(session: aiohttp.ClientSession, response: Observation, seconds: float) -> list[Finding]:
    if response.is_event_stream:
        return await _resumed_events(session, response, seconds)
    if response.media_type and "accept-ranges" in response.headers:
        return await _resumed_bytes(session, response, seconds)
    return [_note("It cannot be resumed: it has neither event ids nor ranges.")]


async def _resumed_events(session: aiohttp.ClientSession, response: Observation, seconds: float) -> list[Finding]:
    """Resume after the second last event, and check that the last one follows."""
    events = [event for event in response.events() if event.id]
    if len(events) < 2:
        return [_note("Its events have no ids: a client that reconnects misses the events in between.")]
    last, expected = events[-2], events[-1]
    again = await _request(session, response.url, seconds, {"Last-Event-ID": last.id}, is_enough=_has_two_events)
    if again.status == 204:
        return [_good("It resumes: 204 after the last id, which stops reconnects.")]
    received = again.events()
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


def _has_two_events(response: Observation) -> bool:
    """Return whether there is an event, and the one after a `gap`."""
    return len(response.events()) >= 2 or response.size >= SAMPLE_BYTES


async def _resumed_bytes(session: aiohttp.ClientSession, response: Observation, seconds: float) -> list[Finding]:
    """Request a known range again, on the condition that the file is unchanged, and compare it."""
    validator = response.headers.get("etag") or response.headers.get("last-modified", "")
    if response.headers["accept-ranges"] == "none" or not response.body:
        return [_note("It cannot be resumed: Accept-Ranges: none.")]
    if not validator or validator.startswith("W/"):
        return [_note("Ranges, but no strong ETag and no date: a resumed download may mix two versions.")]
    start = len(response.body) // 2
    end = min(len(response.body), start + PROOF_BYTES) - 1
    headers = {"Range": f"bytes={start}-{end}", "If-Range": validator}
    size = end - start + 1
    again = await _request(session, response.url, seconds, headers, is_enough=lambda part: part.size >= size)
    if again.status != 206:
        return [_bad(f"It does not resume: a request for a satisfiable range returned {again.status}.")]
    if bytes(again.body) != bytes(response.body[start : end + 1]):
        return [_bad("It resumes wrongly: the bytes of a range differ from the first response.")]
    return [_good("It resumes: a range has the same bytes, and If-Range guards against another version.")]
