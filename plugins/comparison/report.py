"""The report on both modes at growing sizes: its measurements, its verdict, and its output as a table or events."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from .measure import Measure, Run
from .modes import Mode

MODES: tuple[Mode, Mode] = ("buffered", "streamed")

MEGABYTE = 1_000_000

TIMES_BETTER = 2.0
"""Minimum factor between the modes, in time to the first byte or in memory, from which streaming pays."""

MILLISECONDS_BETTER = 50.0
"""Minimum difference in time to the first byte, in milliseconds; people notice a tenth of a second."""

MEGABYTES_BETTER = 1.0
"""Minimum difference in memory, in megabytes; less is noise, even in a server with hundreds of clients."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The next measurement."""

    done: int
    total: int
    """Number of all measurements."""
    message: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurements of one mode at one size, each the median of all repeats."""

    mode: Mode
    rows: int
    bytes: int
    """Size of the body, in bytes."""
    ttfb_ms: float
    """Time from the request to the first byte of the body, in milliseconds."""
    total_ms: float
    """Time from the request to the last byte, in milliseconds."""
    peak_rss_mb: float
    """Peak memory of the response above that of its idle process, in megabytes."""
    idle_rss_mb: float
    """Memory of its idle process, in megabytes."""
    cpu_ms: float
    """CPU time of the process that sends the response, in milliseconds."""
    mb_per_s: float
    """Megabytes of the body per second."""

    @classmethod
    def of(cls, mode: Mode, rows: int, runs: Sequence[Run]) -> "Measurement":
        """Return the measurement with the medians of all repeats."""
        seconds = median(run.seconds for run in runs)
        return cls(
            mode=mode,
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
class End:
    """The verdict of all measurements, in one sentence."""

    verdict: str


Update = Progress | Measurement | End


def sizes(rows: int) -> list[int]:
    """Return the sizes to measure: a hundredth, a tenth and all of `rows`, which is at least 100."""
    return [rows // 100, rows // 10, rows]


async def measure_all(rows: int, repeats: int, measure: Measure) -> AsyncGenerator[Update, None]:
    """Measure both modes at every size, in turns, and yield each step; the last is the verdict."""
    measured: list[Measurement] = []
    done, total = 0, len(sizes(rows)) * len(MODES) * repeats
    for size in sizes(rows):
        runs: dict[Mode, list[Run]] = {mode: [] for mode in MODES}
        # In turns, so that other load of the machine affects both.
        for mode in MODES * repeats:
            count = f" ({len(runs[mode]) + 1} of {repeats})" if repeats > 1 else ""
            yield Progress(done, total, f"measuring {size:,} rows, {mode}{count}")
            runs[mode].append(await measure(mode, size))
            done += 1
        for mode in MODES:
            measured.append(Measurement.of(mode, size, runs[mode]))
            yield measured[-1]
    yield End(verdict(measured))


# -- verdict


def verdict(measured: Sequence[Measurement]) -> str:
    """Return in one sentence when streaming pays, from measurements of both modes at growing sizes."""
    buffered, streamed = ([one for one in measured if one.mode == mode] for mode in MODES)
    pairs = list(zip(buffered, streamed, strict=True))
    pays = [bool(list(_gains(*pair))) for pair in pairs]
    begin = len(pays)
    while begin and pays[begin - 1]:
        begin -= 1
    if begin == len(pays):
        return (
            f"Streaming does not pay up to {_amount(buffered[-1])}: there the first byte came after "
            f"{streamed[-1].ttfb_ms:,.1f} ms streamed and {buffered[-1].ttfb_ms:,.1f} ms buffered, and the "
            f"response took {streamed[-1].peak_rss_mb:,.1f} MB of memory streamed and "
            f"{buffered[-1].peak_rss_mb:,.1f} MB buffered."
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
    """Yield the advantages of streaming that are large enough to matter."""
    before, after = buffered.ttfb_ms, streamed.ttfb_ms
    if before - after >= MILLISECONDS_BETTER and before >= TIMES_BETTER * after:
        yield f"the first byte came {before / after:,.0f} times sooner ({after:,.1f} ms, not {before:,.1f} ms)"
    heavy, light = buffered.peak_rss_mb, streamed.peak_rss_mb
    if heavy - light >= MEGABYTES_BETTER and heavy >= TIMES_BETTER * light:
        yield f"the response took {heavy - light:,.1f} MB less memory ({light:,.1f} MB, not {heavy:,.1f} MB)"


def _amount(measurement: Measurement) -> str:
    size = measurement.bytes
    amount = f"{size / MEGABYTE:,.1f} MB" if size >= MEGABYTE else f"{size / 1000:,.0f} kB"
    return f"{measurement.rows:,} rows ({amount})"


# -- the table

_LINE = "{:>12}  {:8}  {:>14}  {:>12}  {:>12}  {:>11}  {:>12}  {:>10}\n"
_NAMES = ("rows", "mode", "bytes", "first byte", "total", "peak memory", "CPU", "throughput")

TABLE_HEADER = _LINE.format(*_NAMES).replace(" \n", "\n").encode()
"""The first line of a report as a table of plain text."""


def table_line(update: Update) -> bytes:
    """Return the line of an update in the table; empty for one that has none."""
    if isinstance(update, Measurement):
        line = _LINE.format(
            f"{update.rows:,}",
            update.mode,
            f"{update.bytes:,}",
            f"{update.ttfb_ms:,.1f} ms",
            f"{update.total_ms:,.1f} ms",
            f"{update.peak_rss_mb:,.1f} MB",
            f"{update.cpu_ms:,.1f} ms",
            f"{update.mb_per_s:,.1f} MB/s",
        )
        return line.encode()
    return f"\n{update.verdict}\n".encode() if isinstance(update, End) else b""
