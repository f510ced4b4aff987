"""The metrics of all workers of a server: collected at each scrape, and summed."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from streamlab.threads import Threads

from .worker import Worker

log = logging.getLogger(__name__)

REPLY_SECONDS = 1.0
"""Maximum time for another worker to send its metrics, in seconds; then what it sent before is used."""

REPLY_BYTES = 16 * 1024 * 1024
"""Maximum size of the metrics of a worker, in bytes."""

CUMULATIVE = ("counter", "histogram", "summary")
"""Types of metrics that must never decrease: those of a worker that has ended still count."""


class WorkerMetrics:
    """The metrics of this worker, at a socket for the others, and in a file for when it has ended.

    Each is in the folder of the supervisor, with the number of the worker. A worker that takes the number of one that
    has ended begins with its counts, so that sums never decrease: what was scraped once is in the file.
    """

    def __init__(self, worker: Worker, registry: CollectorRegistry) -> None:
        self._worker, self._registry = worker, registry
        self._threads = Threads("metrics", 1)
        self._before = list(_cumulative(self._read(worker.row.number)))
        """What those with the same number have counted before."""
        self._collected: list[Metric] = []

    def _file(self, number: int) -> Path:
        return self._worker.folder / f"{number}.json"

    def _socket(self, number: int) -> Path:
        return self._worker.folder / f"{number}.sock"

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Send the metrics of this worker to the others during the block."""
        path = self._socket(self._worker.row.number)
        path.unlink(missing_ok=True)
        async with self._threads, AsyncExitStack() as stack:
            try:
                server = await asyncio.start_unix_server(self._reply, path)
                stack.callback(server.close)
            except OSError as error:  # the folder for temporary files has a path that is too long
                log.warning("other workers cannot ask for the metrics of this one at %s: %s", path, error)
            try:
                yield
            finally:
                await self._own()

    async def _reply(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(await self._own())
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _own(self) -> bytes:
        """Return the metrics of this worker, encoded, once they are in its file."""
        data = _encode(_sum([self._before, self._registry.collect()]))
        await self._threads.run(self._write, data)
        return data

    def _write(self, data: bytes) -> None:
        file = self._file(self._worker.row.number)
        new = file.with_suffix(".new")
        with suppress(FileNotFoundError):  # all end, since the supervisor has died, and another has deleted the folder
            new.write_bytes(data)
            new.replace(file)

    def _read(self, number: int) -> list[Metric]:
        try:
            return _decode(self._file(number).read_bytes())
        except FileNotFoundError:
            return []

    def collect(self) -> Iterable[Metric]:
        """Return what `update` has collected; called by an encoder."""
        return self._collected

    async def update(self) -> None:
        """Collect the metrics of all workers."""
        own = self._worker.row.number
        rows = {row.number: row for row in self._worker.board.rows()}
        found = await asyncio.gather(*(self._of(number, number in rows) for number in self._numbers() if number != own))
        self._collected = _sum([_decode(await self._own()), *found])

    def _numbers(self) -> set[int]:
        """Return the numbers of all workers that there are or have been."""
        return {int(path.stem) for path in self._worker.folder.glob("*.json")} | {
            row.number for row in self._worker.board.rows()
        }

    async def _of(self, number: int, runs: bool) -> Iterable[Metric]:
        """Return the metrics of another worker; of one that has ended, only its counts."""
        if runs:
            try:
                async with asyncio.timeout(REPLY_SECONDS):
                    reader, writer = await asyncio.open_unix_connection(self._socket(number), limit=REPLY_BYTES)
                    try:
                        return _decode(await reader.read())
                    finally:
                        writer.close()
            except (OSError, TimeoutError, ValueError):
                pass  # it starts, has just ended, or hangs
        return _cumulative(await self._threads.run(self._read, number))


def _encode(metrics: Iterable[Metric]) -> bytes:
    return json.dumps(
        [
            [
                metric.name,
                metric.documentation,
                metric.type,
                metric.unit,
                [list(sample[:3]) for sample in metric.samples],
            ]
            for metric in metrics
        ]
    ).encode()


def _decode(data: bytes) -> list[Metric]:
    metrics = []
    for name, documentation, kind, unit, samples in json.loads(data):
        metric = Metric(name, documentation, kind, unit)
        metric.samples = [Sample(*sample) for sample in samples]
        metrics.append(metric)
    return metrics


def _cumulative(metrics: Iterable[Metric]) -> Iterable[Metric]:
    return (metric for metric in metrics if metric.type in CUMULATIVE)


def _sum(collections: Iterable[Iterable[Metric]]) -> list[Metric]:
    """Return the sum of metrics; of times at which something began, the first."""
    metrics: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for collected in collections:
        for metric in collected:
            metrics.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit))
            sums = values.setdefault(metric.name, {})
            for name, labels, value, *_ in metric.samples:
                key = name, tuple(labels.items())
                if name.endswith(("_created", "_start_time_seconds")):
                    sums[key] = min(value, sums.get(key, math.inf))
                elif metric.type in ("info", "stateset"):
                    sums[key] = max(value, sums.get(key, 0.0))
                else:
                    sums[key] = value + sums.get(key, 0.0)
    for name, metric in metrics.items():
        metric.samples = [Sample(key[0], dict(key[1]), value) for key, value in values[name].items()]
    return list(metrics.values())
