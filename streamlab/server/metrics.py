"""Metrics of the server, in the format of Prometheus."""

import asyncio
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext

import prometheus_client
from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from streamlab.events.channel import Events
from streamlab.hookspecs import hookimpl
from streamlab.streaming.drain import Streams
from streamlab.streaming.outcome import StreamSummary
from streamlab.ticks import until_tick

from .worker import Worker
from .worker_metrics import WorkerMetrics

LAG_INTERVAL = 2.0
"""Interval between two measurements of the event loop's lag, in seconds."""

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

_LONG = (0.01, 0.1, 1, 10, 60, 300, 900, 3600, 14400, 86400)


class Metrics(Collector):
    """The server's Prometheus metrics. The duration of streams is not part of the request latency.

    Names and labels are in docs/metrics.md. Source: Prometheus text format 0.0.4, OpenMetrics 1.0 by Accept.
    """

    def __init__(self, streams: Streams, events: Events, worker: Worker | None = None) -> None:
        self._streams = streams
        self._events = events
        self._bytes_of_ended: Tally[str] = Tally()
        self.registry = registry = prometheus_client.CollectorRegistry()
        """The registry for metrics of plugins: `Counter(..., registry=app[METRICS].registry)`."""
        self._ends = prometheus_client.Counter(
            "streamlab_streams", "Streams that ended, by outcome.", ["scenario", "outcome"], registry=registry
        )
        self._first_byte = prometheus_client.Histogram(
            "streamlab_stream_first_byte_seconds",
            "From opening a stream to the first byte of its body.",
            ["scenario"],
            buckets=_FAST,
            registry=registry,
        )
        self._duration = prometheus_client.Histogram(
            "streamlab_stream_duration_seconds",
            "From opening a stream to its end.",
            ["scenario"],
            buckets=_LONG,
            registry=registry,
        )
        self._latency = prometheus_client.Histogram(
            "streamlab_request_seconds",
            "Requests without a stream, by route.",
            ["route", "status"],
            buckets=_FAST,
            registry=registry,
        )
        self._latencies: dict[tuple[str, int], prometheus_client.Histogram] = {}
        """The same by route and status, as found before: there are as many as the metric has."""
        self._rejected = prometheus_client.Counter(
            "streamlab_rejected_requests",
            "Requests that their client may not make, or not now: 401, 403, 429.",
            ["scenario", "status"],
            registry=registry,
        )
        self._lag = prometheus_client.Histogram(
            "streamlab_event_loop_lag_seconds", "How late the event loop woke up.", buckets=_FAST, registry=registry
        )
        prometheus_client.ProcessCollector(registry=registry)
        registry.register(self)
        self._all = None if worker is None else WorkerMetrics(worker, registry)
        """Those of all workers, if this is one of several."""

    @hookimpl
    def on_stream_end(self, summary: StreamSummary) -> None:
        """Count a stream that has ended."""
        self._ends.labels(summary.scenario, summary.outcome.value).inc()
        self._bytes_of_ended[summary.scenario] += summary.bytes
        self._duration.labels(summary.scenario).observe(summary.seconds)
        if summary.first_byte_seconds is not None:
            self._first_byte.labels(summary.scenario).observe(summary.first_byte_seconds)

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Measure the event loop's lag while the server serves, and let other workers have the metrics."""
        async with nullcontext() if self._all is None else self._all.shared(), asyncio.TaskGroup() as group:
            measuring = group.create_task(self._measure_lag())
            yield
            measuring.cancel()

    async def _measure_lag(self) -> None:
        while True:
            wait = until_tick(LAG_INTERVAL)
            due = time.monotonic() + wait
            await asyncio.sleep(wait)
            self._lag.observe(max(0.0, time.monotonic() - due))

    def observe_request(self, scenario: str, route: str, status: int, seconds: float) -> None:
        """Count a request whose response was not a stream."""
        latency = self._latencies.get((route, status))
        if latency is None:
            latency = self._latencies[route, status] = self._latency.labels(route, str(status))
        latency.observe(seconds)
        if status in (401, 403, 429):
            self._rejected.labels(scenario, str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of what is open now; called by the registry at each scrape."""
        open_now = GaugeMetricFamily("streamlab_open_streams", "Streams open now.", labels=["scenario"])
        sent = CounterMetricFamily("streamlab_stream_bytes", "Bytes of stream bodies sent.", labels=["scenario"])
        bytes_sent, open_streams = self._bytes_of_ended.copy(), Tally[str]()
        for stream in self._streams:
            open_streams[stream.scenario] += 1
            bytes_sent[stream.scenario] += stream.bytes_sent
        for scenario in sorted(bytes_sent.keys() | open_streams.keys()):
            open_now.add_metric([scenario], open_streams[scenario])
            sent.add_metric([scenario], bytes_sent[scenario])
        yield open_now
        yield sent
        yield GaugeMetricFamily("streamlab_asyncio_tasks", "Tasks of the event loop.", value=len(asyncio.all_tasks()))
        followers = GaugeMetricFamily("streamlab_followers", "Clients that follow a channel.", labels=["state"])
        live = sum(follower.live for follower in self._events.followers)
        followers.add_metric(["live"], live)
        followers.add_metric(["behind"], len(self._events.followers) - live)
        yield followers

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics of the server in the format that `accept` prefers, and its content type."""
        encoder, content_type = choose_encoder(accept)
        if self._all is None:
            return encoder(self.registry), content_type
        await self._all.update()
        return encoder(self._all), content_type


METRICS = web.AppKey("metrics", Metrics)
"""Key of the application: its metrics; those of a plugin are created with `registry=app[METRICS].registry`."""
