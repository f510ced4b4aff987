"""Observe a response as a browser receives it: its headers, and when which bytes of its unpacked body arrived."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from yarl import URL

from streamlab.sse import MEDIA_TYPE

from .credentials import authorization_header
from .http import CONNECT_SECONDS, ConnectionLost
from .sse import Event, Parser

HEADERS_SECONDS = 60.0
"""Timeout for the response headers, in seconds."""

BURST_SECONDS = 0.02
"""Maximum time between two chunks of one burst, in seconds."""

SAMPLE_BYTES = 4 * 1024 * 1024
"""Maximum size of the start of a body that is stored, in bytes."""

CELLS = 60
"""Width of the chart, in characters."""

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Burst:
    """Chunks that arrived together."""

    at: float
    """Seconds from the request to its first byte."""
    size: int
    """Number of its bytes."""


@dataclass(slots=True)
class Observation:
    """A response as it arrives: `observing` yields it with its headers, `read` observes its body."""

    url: URL
    status: int
    headers: Mapping[str, str]
    """Names in lower case; repeated fields are joined by commas."""
    started: float
    """Time of the request, of `time.perf_counter`."""
    headers_at: float
    """Seconds from the request to the headers."""
    content: aiohttp.StreamReader
    """The body that was not read yet."""
    arrivals: list[Burst] = field(default_factory=list)
    """Each read."""
    seconds: float = 0.0
    """Seconds from the request to the end of the observation."""
    complete: bool = False
    """Whether the body ended within that time."""
    error: str = ""
    """Why the body broke off, if it did."""
    body: bytearray = field(default_factory=bytearray)
    """The first SAMPLE_BYTES of the body."""

    async def read(self, seconds: float, *, is_enough: Callable[["Observation"], bool] = lambda _: False) -> None:
        """Read the body until it ends, `is_enough` is true, or `seconds` since the request are over."""
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + seconds - self._elapsed()):
                async for chunk in self.content.iter_any():
                    self.arrivals.append(Burst(self._elapsed(), len(chunk)))
                    self.body += chunk[: SAMPLE_BYTES - len(self.body)]
                    if is_enough(self):
                        break
                else:
                    self.complete = True
        except TimeoutError:
            pass
        except aiohttp.ClientError as error:
            self.error = type(error).__name__
        self.seconds = self._elapsed()

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def size(self) -> int:
        """Number of bytes received, unpacked."""
        return sum(burst.size for burst in self.arrivals)

    @property
    def media_type(self) -> str:
        """The Content-Type without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def is_event_stream(self) -> bool:
        """Whether this is an event stream."""
        return self.media_type == MEDIA_TYPE

    @property
    def coding(self) -> str:
        """How the body was compressed; empty if it was not."""
        coding = self.headers.get("content-encoding", "").strip().lower()
        return "" if coding == "identity" else coding

    def events(self) -> list[Event]:
        """Return the complete events of `body`."""
        return Parser().feed(bytes(self.body))

    def bursts(self) -> list[Burst]:
        """Return the reads, joined into bursts."""
        joined: list[Burst] = []
        last = float("-inf")
        for read in self.arrivals:
            if joined and read.at - last < BURST_SECONDS:
                joined[-1] = Burst(joined[-1].at, joined[-1].size + read.size)
            else:
                joined.append(read)
            last = read.at
        return joined

    def longest_silence(self) -> float:
        """Return the longest time without a byte, in seconds, from the headers to the end of the observation."""
        times = [self.headers_at, *(read.at for read in self.arrivals), *([] if self.complete else [self.seconds])]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)

    def chart(self) -> str:
        """Return when bytes arrived, as a bar chart of CELLS characters over the observed time."""
        cells = [0] * CELLS
        for read in self.arrivals:
            cells[min(CELLS - 1, int(read.at / max(self.seconds, 1e-9) * CELLS))] += read.size
        most = max(cells, default=0) or 1
        return "".join(BLOCKS[0 if not count else max(1, round(count / most * 8))] for count in cells)


@asynccontextmanager
async def open_session() -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a session that uses a new connection for each request."""
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS)
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


@asynccontextmanager
async def observing(
    session: aiohttp.ClientSession, url: URL, seconds: float, headers: Mapping[str, str] | None = None
) -> AsyncIterator[Observation]:
    """Send a request, and yield the response, none of whose body was read.

    Without an `Accept-Encoding` the request accepts what browsers accept, of which aiohttp can unpack: gzip, deflate,
    and brotli and zstd where their packages are installed. Raises ConnectionLost where no headers arrive within
    HEADERS_SECONDS, or `seconds` if that is longer.
    """
    started = time.perf_counter()
    try:
        async with asyncio.timeout(max(seconds, HEADERS_SECONDS)):
            accepted = {"Accept": f"{MEDIA_TYPE}, */*;q=0.5", **authorization_header(url)}
            received = await session.get(url, headers={**accepted, **(headers or {})})
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ConnectionLost(url, f"no response: {str(error) or type(error).__name__}") from error
    try:
        joined = {name.lower(): ", ".join(received.headers.getall(name)) for name in received.headers}
        elapsed = time.perf_counter() - started
        yield Observation(received.url, received.status, joined, started, elapsed, received.content)
    finally:
        received.close()
