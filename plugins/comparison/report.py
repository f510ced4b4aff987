"""A report of both ways at growing sizes: what is measured in which order, what follows from it, and how it is told."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Protocol

from streamlab import sse_event

from .measure import Run
from .ways import Way

WAYS: tuple[Way, Way] = ("buffered", "streamed")

MEGABYTE = 1_000_000

HEARTBEAT_SECONDS = 10.0
"""How often a reader hears something while one measurement goes on."""

TIMES_BETTER = 2.0
"""Streaming pays where its first byte comes so many times sooner, or it takes so many times less memory,"""

MILLISECONDS_BETTER = 50.0
"""and that is so many milliseconds (a tenth of a second is what people notice),"""

MEGABYTES_BETTER = 1.0
"""or megabytes: less is noise, and is not felt even by a server with hundreds of clients."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is measured next."""

    done: int
    total: int
    """Measurements in all."""
    message: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one way took at one size: of each number, the median of all repeats."""

    way: Way
    rows: int
    bytes: int
    """Of the body."""
    ttfb_ms: float
    """From the request to the first byte of the body."""
    total_ms: float
    """From the request to the last byte."""
    peak_rss_mb: float
    """Memory that the answer took at most, above what its process has when it is idle."""
    idle_rss_mb: float
    cpu_ms: float
    """Of the process that answers."""
    mb_per_s: float
    """Megabytes of the body a second."""

    @classmethod
    def of(cls, way: Way, rows: int, runs: Sequence[Run]) -> "Measurement":
        """Make one of its repeats."""
        seconds = median(run.seconds for run in runs)
        return cls(
            way=way,
            rows=rows,
            bytes=runs[0].bytes,
            ttfb_ms=round(median(run.first_byte_seconds for run in runs) * 1000, 3),
            total_ms=round(seconds * 1000, 3),
            peak_rss_mb=round(median(run.usage.peak_rss - run.usage.idle_rss for run in runs) / MEGABYTE, 3),
            idle_rss_mb=round(median(run.usage.idle_rss for run in runs) / MEGABYTE, 3),
            cpu_ms=round(median(run.usage.cpu_seconds for run in runs) * 1000, 3),
            mb_per_s=round(runs[0].bytes / MEGABYTE / seconds, 1),
        )


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing new: a measurement goes on."""


@dataclass(frozen=True, slots=True)
class End:
    """What follows from all measurements, in one sentence."""

    verdict: str


Moment = Progress | Measurement | Waiting | End


def sizes(rows: int) -> list[int]:
    """The sizes that lead up to so many rows, from 100 on."""
    return [rows // 100, rows // 10, rows]


async def reported(
    rows: int, repeats: int, measure: Callable[[Way, int], Awaitable[Run]]
) -> AsyncGenerator[Moment, None]:
    """Measure both ways at every size, in turns, and tell each step of it; ends with the verdict."""
    measured: list[Measurement] = []
    done, total = 0, len(sizes(rows)) * len(WAYS) * repeats
    for size in sizes(rows):
        runs: dict[Way, list[Run]] = {way: [] for way in WAYS}
        # In turns, so that what else the machine does meanwhile falls on both.
        for way in WAYS * repeats:
            count = f" ({len(runs[way]) + 1} of {repeats})" if repeats > 1 else ""
            yield Progress(done, total, f"measuring {size:,} rows, {way}{count}")
            # Not in a TaskGroup: a generator must not hold one over a yield (PEP 789).
            task = asyncio.ensure_future(measure(way, size))
            try:
                while not (await asyncio.wait({task}, timeout=HEARTBEAT_SECONDS))[0]:
                    yield Waiting()
                runs[way].append(task.result())
            finally:
                task.cancel()
                await asyncio.wait({task})
            done += 1
        for way in WAYS:
            measured.append(Measurement.of(way, size, runs[way]))
            yield measured[-1]
    yield End(verdict(measured))


# -- what follows


def verdict(measured: Sequence[Measurement]) -> str:
    """Say in one sentence when streaming pays, from measurements of both ways at sizes that grow."""
    buffered, streamed = ([one for one in measured if one.way == way] for way in WAYS)
    pairs = list(zip(buffered, streamed, strict=True))
    pays = [bool(list(_gains(*pair))) for pair in pairs]
    begin = len(pays)
    while begin and pays[begin - 1]:
        begin -= 1
    if begin == len(pays):
        return (
            f"Streaming does not pay up to {_amount(buffered[-1])}: there the first byte came after "
            f"{streamed[-1].ttfb_ms:,.1f} ms streamed and {buffered[-1].ttfb_ms:,.1f} ms buffered, and the answer took "
            f"{streamed[-1].peak_rss_mb:,.1f} MB of memory streamed and {buffered[-1].peak_rss_mb:,.1f} MB buffered."
        )
    largest = f"with {_amount(buffered[-1])} " if begin < len(pays) - 1 else ""
    gains = " and ".join(_gains(*pairs[-1]))
    longer = streamed[-1].total_ms / buffered[-1].total_ms
    below = f"; with {_amount(buffered[begin - 1])} or fewer, buffering is as good" if begin else ""
    return (
        f"Streaming pays from {_amount(buffered[begin])} on: {largest}{gains}, while the whole took "
        f"{longer:.2f} times as long{below}."
    )


def _gains(buffered: Measurement, streamed: Measurement) -> Iterator[str]:
    """What streaming is better at, where that is felt."""
    before, after = buffered.ttfb_ms, streamed.ttfb_ms
    if before - after >= MILLISECONDS_BETTER and before >= TIMES_BETTER * after:
        yield f"the first byte came {before / after:,.0f} times sooner ({after:,.1f} ms, not {before:,.1f} ms)"
    heavy, light = buffered.peak_rss_mb, streamed.peak_rss_mb
    if heavy - light >= MEGABYTES_BETTER and heavy >= TIMES_BETTER * light:
        yield f"the answer took {heavy - light:,.1f} MB less memory ({light:,.1f} MB, not {heavy:,.1f} MB)"


def _amount(measurement: Measurement) -> str:
    size = measurement.bytes
    told = f"{size / MEGABYTE:,.1f} MB" if size >= MEGABYTE else f"{size / 1000:,.0f} kB"
    return f"{measurement.rows:,} rows ({told})"


# -- how it is told


class Teller(Protocol):
    """A form of the report."""

    content_type: str

    def tell(self, moment: Moment) -> bytes:
        """Return what there is to send of a moment; often nothing."""

    def fail(self, reason: str) -> bytes:
        """Return what says that no verdict follows, before the connection is cut."""


class Table:
    """The report as a table of plain text, a line as soon as it is measured."""

    content_type = "text/plain; charset=utf-8"

    _LINE = "{:>12}  {:8}  {:>14}  {:>12}  {:>12}  {:>11}  {:>12}  {:>10}\n"

    def __init__(self) -> None:
        self._begun = False

    def tell(self, moment: Moment) -> bytes:
        """Measurements are lines, the verdict is the last."""
        text = ""
        if not self._begun:
            self._begun = True
            names = ("rows", "way", "bytes", "first byte", "total", "peak memory", "CPU", "throughput")
            text = self._LINE.format(*names).replace(" \n", "\n")
        if isinstance(moment, Measurement):
            text += self._LINE.format(
                f"{moment.rows:,}",
                moment.way,
                f"{moment.bytes:,}",
                f"{moment.ttfb_ms:,.1f} ms",
                f"{moment.total_ms:,.1f} ms",
                f"{moment.peak_rss_mb:,.1f} MB",
                f"{moment.cpu_ms:,.1f} ms",
                f"{moment.mb_per_s:,.1f} MB/s",
            )
        elif isinstance(moment, End):
            text += f"\n{moment.verdict}\n"
        return text.encode()

    def fail(self, reason: str) -> bytes:
        """A last line says why."""
        return f"\n{reason}\n".encode()


class EventLines:
    """The report as events: `progress`, `measurement`, and `end` with the verdict."""

    content_type = "text/event-stream"

    def __init__(self, report: str) -> None:
        self._report = report
        self._count = 0

    def place(self, kind: str) -> str:
        """The id of an event that is not one of the numbered: where this one stands, and what it is."""
        return f"{self._report}-{self._count}.{kind}"

    def tell(self, moment: Moment) -> bytes:
        """Every moment is an event, but for those without news."""
        if isinstance(moment, Waiting):
            return b":\n"
        self._count += 1
        if isinstance(moment, End):
            return sse_event(asdict(moment), "end", id=self.place("end"))
        return sse_event(asdict(moment), type(moment).__name__.lower(), id=f"{self._report}-{self._count}")

    def fail(self, reason: str) -> bytes:
        """Nothing: the stream says `error` by itself."""
        return b""
