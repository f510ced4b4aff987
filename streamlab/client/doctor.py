"""Whether a URL streams, and what keeps it from that: probed as a client, told in plain words.

It looks at the answer from outside, so it works for any server, behind any proxy: when each part of a body arrived,
what the headers promise, and what the server does with a client that comes back.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

import aiohttp
from yarl import URL

from streamlab.sse import MEDIA_TYPE

from .http import CONNECT_SECONDS, Lost, Refused, target_of
from .sse import Parser

ANSWER_SECONDS = 60.0
"""What a server may take to begin its answer."""

BURST_SECONDS = 0.02
"""Parts that come closer together than this arrived together."""

EARLY = 0.5
"""A body streams when its first byte comes in the first half of its time (and a buffer gives it away all at once)."""

IDLE_SECONDS = 1.0
"""A silence of so long before the end of an event stream is what ended it."""

QUICK_SECONDS = 0.5
"""A body that is over so soon does not tell whether it was held back."""

KEPT_BYTES = 4 * 1024 * 1024
"""What is kept of a body, to compare it with what a resumed request brings."""

PROOF_BYTES = 4096
"""How much of a download is asked for twice."""

CELLS = 60
BLOCKS = " ▁▂▃▄▅▆▇█"

Mark = Literal["good", "bad", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found: a good one, a bad one, or a remark."""

    mark: Mark
    text: str


@dataclass(slots=True)
class Answer:
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
    """How long it was watched."""
    whole: bool = False
    """Whether it came to its end meanwhile."""
    broken: str = ""
    """Why it broke off, if it did."""
    body: bytearray = field(default_factory=bytearray)
    """Its first KEPT_BYTES."""

    @property
    def size(self) -> int:
        """Bytes that came."""
        return sum(count for _, count in self.arrivals)

    @property
    def media_type(self) -> str:
        """Its Content-Type without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def is_events(self) -> bool:
        """Whether it is an event stream."""
        return self.media_type == MEDIA_TYPE

    def bursts(self) -> list[tuple[float, int]]:
        """The reads, joined where they came together: when each burst began, and its bytes."""
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
        """When bytes arrived, over the time it was watched: a cell is a sixtieth of it."""
        cells = [0] * CELLS
        for at, count in self.arrivals:
            cells[min(CELLS - 1, int(at / max(self.seconds, 1e-9) * CELLS))] += count
        most = max(cells, default=0) or 1
        return "".join(BLOCKS[0 if not count else max(1, round(count / most * 8))] for count in cells)


@dataclass(frozen=True, slots=True)
class Report:
    """What a visit has found."""

    answer: Answer
    findings: Sequence[Finding]

    @property
    def streams(self) -> bool:
        """Whether nothing bad was found."""
        return all(finding.mark != "bad" for finding in self.findings)

    def lines(self) -> list[str]:
        """The report for a terminal: what answered, when its bytes came, and the findings, the bad ones first."""
        answer, marks = self.answer, {"bad": "no  ", "good": "yes ", "note": "    "}
        framing = "chunked" if "chunked" in answer.headers.get("transfer-encoding", "") else "until it closes"
        length = answer.headers.get("content-length")
        kind = answer.media_type or "no content type"
        return [
            f"{answer.url}",
            f"{kind}, {f'{int(length):,} bytes' if length and length.isascii() and length.isdigit() else framing}",
            f"|{answer.chart()}| {answer.size:,} bytes in {answer.seconds:.2f} s",
            *(f"{marks[mark]}{text}" for mark in ("bad", "good", "note") for text in self._texts(mark)),
        ]

    def _texts(self, mark: str) -> list[str]:
        return [finding.text for finding in self.findings if finding.mark == mark]


async def examine(url: str, *, seconds: float = 5.0) -> Report:
    """Watch a URL for so many seconds at most, then ask again in other ways, and tell what that shows.

    Raises ValueError for what is no URL, Lost where nobody answers, Refused for an answer without success.
    """
    target = target_of(url)
    async with _session() as session:
        answer = await _watched(session, target, seconds)
        if answer.status != 200:
            raise Refused(target, f"answered {answer.status}", status=answer.status)
        findings = [*_delivery(answer), *_promises(answer)]
        findings += await _compression(session, answer, seconds)
        findings += await _resumption(session, answer, seconds)
    return Report(answer, findings)


@asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        yield session


async def _watched(
    session: aiohttp.ClientSession,
    url: URL,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    *,
    enough: int | None = None,
) -> Answer:
    """Ask, and watch the answer until it ends, has brought `enough` bytes, or so many seconds are over."""
    asked = {"Accept": f"{MEDIA_TYPE}, */*;q=0.5", "Accept-Encoding": "identity", **(headers or {})}
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(max(seconds, ANSWER_SECONDS)):
            response = await session.get(url, headers=asked)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise Lost(url, f"no answer: {str(error) or type(error).__name__}") from error
    try:
        lower = {name.lower(): value for name, value in response.headers.items()}
        answer = Answer(response.url, response.status, lower, time.perf_counter() - begun)
        try:
            async with asyncio.timeout(max(0.0, seconds - answer.headers_at)):
                async for part in response.content.iter_any():
                    answer.arrivals.append((time.perf_counter() - begun, len(part)))
                    answer.body += part[: KEPT_BYTES - len(answer.body)]
                    if enough is not None and answer.size >= enough:
                        break
                else:
                    answer.whole = True
        except TimeoutError:
            pass
        except aiohttp.ClientError as error:
            answer.broken = type(error).__name__
        answer.seconds = time.perf_counter() - begun
        return answer
    finally:
        response.close()


# -- what one answer shows


def _delivery(answer: Answer) -> list[Finding]:
    """When things arrived, and what that means."""
    last = answer.arrivals[-1][0] if answer.arrivals else answer.headers_at
    if (answer.broken or answer.whole) and answer.is_events and answer.seconds - last > IDLE_SECONDS:
        silence = f"It was ended after {answer.seconds - last:.1f} s of silence"
        return [Finding("bad", f"{silence}: somebody's idle time-out. A comment every 15 s would keep it open.")]
    if answer.broken:
        return [Finding("bad", f"It broke off after {answer.size:,} bytes: what came is a part, and says so.")]
    if not answer.arrivals:
        if answer.whole:
            return [Finding("note", "The body is empty.")]
        heard = f"Nothing but headers came in {answer.seconds:.1f} s"
        return [Finding("note", f"{heard}: it is silent, or somebody holds it back. Watch it for longer (--seconds).")]
    first, bursts = answer.arrivals[0][0], answer.bursts()
    if answer.whole and answer.seconds < QUICK_SECONDS:
        return [Finding("note", f"All of it came within {answer.seconds * 1000:.0f} ms: too soon to tell a stream.")]
    if answer.whole and first > EARLY * answer.seconds and len(bursts) == 1:
        text = f"All {answer.size:,} bytes came at once, after {first:.2f} s: it is collected before it is sent."
        return [Finding("bad", text)]
    if answer.is_events and (torn := _torn(answer)):
        text = f"{torn} of {len(bursts)} bursts end in the middle of an event: a buffer on the way is filled first."
        return [Finding("bad", text)]
    if answer.whole and first > EARLY * answer.seconds:
        return [
            Finding("bad", f"The first byte came after {first:.2f} s of {answer.seconds:.2f}: half of it was waiting.")
        ]
    texts = [f"It streams: the first byte after {first * 1000:.0f} ms, then "]
    texts.append(f"{len(bursts)} bursts" if len(bursts) > 1 else "without a pause")
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(bursts)]
    if gaps:
        texts.append(f", {min(gaps):.2f} to {max(gaps):.2f} s apart")
    return [Finding("good", "".join(texts) + ".")]


def _torn(answer: Answer) -> int:
    """How many bursts, of two at least, end within an event, if most do: servers send whole ones."""
    ends = list(itertools.accumulate(count for _, count in answer.bursts()))
    inner = [end for end in ends[: None if not answer.whole else -1] if 0 < end <= len(answer.body)]
    torn = sum(not answer.body[:end].endswith((b"\n\n", b"\r\n\r\n", b"\r\r")) for end in inner)
    return torn if len(inner) > 1 and torn * 2 > len(inner) else 0


def _promises(answer: Answer) -> list[Finding]:
    """What the headers say to whoever is on the way."""
    headers, found = answer.headers, list[Finding]()
    if answer.is_events and "content-length" in headers:
        found.append(Finding("bad", "An event stream has a Content-Length: it was collected before it was sent."))
    if answer.is_events and "no-store" not in (said := headers.get("cache-control", "")) and "no-cache" not in said:
        found.append(Finding("note", "No Cache-Control: a cache on the way may keep an event stream."))
    if headers.get("x-accel-buffering", "").lower() == "no":
        found.append(Finding("good", "X-Accel-Buffering: no - nginx passes it on as it comes."))
    elif answer.is_events:
        found.append(Finding("note", "No X-Accel-Buffering: no - behind an unchanged nginx it would be held back."))
    if via := headers.get("via") or (headers.get("server") if headers.get("server", "").startswith("nginx") else None):
        found.append(Finding("note", f"A proxy or nginx answers: {via}."))
    return found


# -- asked again


async def _compression(session: aiohttp.ClientSession, answer: Answer, seconds: float) -> list[Finding]:
    """Whether somebody compresses, and whether that holds the first byte back."""
    again = await _watched(session, answer.url, seconds, {"Accept-Encoding": "gzip, deflate, br, zstd"}, enough=1)
    coding = again.headers.get("content-encoding", "identity")
    if coding == "identity":
        return []
    if not again.arrivals and answer.arrivals:
        return [Finding("bad", f"With compression ({coding}) nothing came in {again.seconds:.1f} s: it is held back.")]
    if answer.is_events:
        return [Finding("note", f"Event streams are compressed ({coding}): whoever does must flush after each event.")]
    return [Finding("note", f"It is compressed ({coding}) for clients that take it.")]


async def _resumption(session: aiohttp.ClientSession, answer: Answer, seconds: float) -> list[Finding]:
    if answer.is_events:
        return await _resumed_events(session, answer, seconds)
    if answer.media_type and "accept-ranges" in answer.headers:
        return await _resumed_bytes(session, answer, seconds)
    return [Finding("note", "It cannot be resumed: it has neither event ids nor ranges.")]


async def _resumed_events(session: aiohttp.ClientSession, answer: Answer, seconds: float) -> list[Finding]:
    """Come back with the id of an event that is followed by another, and see whether that comes next."""
    events = [event for event in Parser().feed(bytes(answer.body)) if event.id]
    if len(events) < 2:
        return [Finding("note", "Its events have no ids: a client that comes back has missed what was sent meanwhile.")]
    last, expected = events[-2], events[-1]
    again = await _watched(session, answer.url, seconds, {"Last-Event-ID": last.id}, enough=KEPT_BYTES)
    if again.status == 204:
        return [Finding("good", "It resumes: after its last id, 204 tells clients to stay away.")]
    came = Parser().feed(bytes(again.body))
    if not came:
        return [Finding("note", f"After Last-Event-ID: {last.id} nothing came in {again.seconds:.1f} s.")]
    if (came[0].id, came[0].data) == (expected.id, expected.data):
        return [Finding("good", f"It resumes: after Last-Event-ID: {last.id} came {expected.id}, the same as before.")]
    if came[0].id == last.id:
        return [Finding("bad", f"It repeats: after Last-Event-ID: {last.id} that event came again.")]
    if any(event.event == "gap" for event in came[:2]):
        return [Finding("note", "It resumes with a gap, and says so.")]
    what = f"{came[0].id or 'an event without an id'}"
    return [Finding("bad", f"It does not resume: after Last-Event-ID: {last.id} came {what}, not {expected.id}.")]


async def _resumed_bytes(session: aiohttp.ClientSession, answer: Answer, seconds: float) -> list[Finding]:
    """Ask for a part that is known already, on the condition that the file is the same."""
    validator = answer.headers.get("etag") or answer.headers.get("last-modified", "")
    if answer.headers["accept-ranges"] == "none" or not answer.body:
        return [Finding("note", "It cannot be resumed: Accept-Ranges: none.")]
    if not validator or validator.startswith("W/"):
        return [Finding("note", "Ranges, but no strong ETag and no date: a resumed download may mix two versions.")]
    start = len(answer.body) // 2
    end = min(len(answer.body), start + PROOF_BYTES) - 1
    asked = {"Range": f"bytes={start}-{end}", "If-Range": validator}
    again = await _watched(session, answer.url, seconds, asked, enough=end - start + 1)
    if again.status != 206:
        return [Finding("bad", f"It does not resume: a range that exists was answered {again.status}.")]
    if bytes(again.body) != bytes(answer.body[start : end + 1]):
        return [Finding("bad", "It resumes wrongly: the bytes of a range differ from those that came before.")]
    return [Finding("good", "It resumes: a range brings the same bytes, and If-Range guards against another version.")]
