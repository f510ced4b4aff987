"""What happened, as metrics and as one log line a stream (both are plugins of the core's own hook)."""

import asyncio
import copy
import json
import logging
import logging.handlers
import queue
import re
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import prometheus_client
from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from .events import Events
from .hookspecs import hookimpl
from .streaming import Streams, StreamSummary

access_log = logging.getLogger("streamlab.access")

LAG_INTERVAL = 0.25
"""Seconds between two looks at how late the event loop is."""

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (0.01, 0.1, 1, 10, 60, 300, 900, 3600, 14400, 86400)


class Metrics(Collector):
    """The server's Prometheus metrics. How long streams live is never mixed into request latency.

    Names and labels are in README, "operate". Source: Prometheus text format 0.0.4, OpenMetrics 1.0 by Accept.
    """

    def __init__(self, streams: Streams, events: Events) -> None:
        self._streams = streams
        self._events = events
        self._bytes_of_ended: Tally[str] = Tally()
        self.registry = registry = prometheus_client.CollectorRegistry()
        """Where a plugin's own counters go: `Counter(..., registry=app[METRICS].registry)`."""
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
            "Requests answered without a stream, by route.",
            ["route", "status"],
            buckets=_FAST,
            registry=registry,
        )
        self._lag = prometheus_client.Histogram(
            "streamlab_event_loop_lag_seconds", "How late the event loop woke up.", buckets=_FAST, registry=registry
        )
        prometheus_client.ProcessCollector(registry=registry)
        registry.register(self)

    @hookimpl
    def on_stream_end(self, summary: StreamSummary) -> None:
        """Count a stream that is over."""
        self._ends.labels(summary.scenario, summary.outcome.value).inc()
        self._bytes_of_ended[summary.scenario] += summary.bytes
        self._duration.labels(summary.scenario).observe(summary.seconds)
        if summary.first_byte_seconds is not None:
            self._first_byte.labels(summary.scenario).observe(summary.first_byte_seconds)

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Watch the event loop's lag while the server serves."""
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch_lag())
            yield
            watch.cancel()

    async def _watch_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._lag.observe(max(0.0, time.monotonic() - due))

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered without a stream."""
        self._latency.labels(route, str(status)).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Read what is open right now; called by the registry at each scrape."""
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

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Everything measured, and its content type."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


METRICS = web.AppKey("metrics", Metrics)


class AccessLog:
    """One log line a stream, and one a request that needed none. Neither holds a query: prompts stay private."""

    @hookimpl
    def on_stream_end(self, request: web.Request, summary: StreamSummary) -> None:
        """Write the line of a stream that is over."""
        first_byte = summary.first_byte_seconds
        fields = {
            "scenario": summary.scenario,
            "method": summary.method,
            "path": request.path,
            "route": summary.route,
            "status": summary.status,
            "outcome": summary.outcome.value,
            "seconds": round(summary.seconds, 3),
            "first_byte_ms": None if first_byte is None else round(first_byte * 1000, 1),
            "bytes": summary.bytes,
            "client": request.remote,
        }
        access_log.info("stream", extra={"fields": fields})

    @staticmethod
    def request(request: web.Request, route: str, status: int, seconds: float) -> None:
        """Write the line of a request that was answered without a stream; probes only at DEBUG."""
        level = logging.DEBUG if route in ("/health", "/metrics") else logging.INFO
        fields = {
            "method": request.method,
            "path": request.path,
            "status": status,
            "seconds": round(seconds, 4),
            "client": request.remote,
        }
        access_log.log(level, "request", extra={"fields": fields})


# -- log lines


def _escape(text: str) -> str:
    """Return a text with each character escaped that is not printable, so that nobody's input can forge a log line.

    Those are controls, line separators, marks that reverse the direction of a text, and halves of surrogate pairs,
    which could not even be written.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


class LineFormatter(logging.Formatter):
    """A record as one line: `time LEVEL logger message key=value`, or a JSON object; tracebacks follow indented.

    `record.fields`, if there, are its structured part; `record.stack`, if there, is text that follows as a traceback.
    """

    def __init__(self, style: str) -> None:
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        trace = self.formatException(record.exc_info) if record.exc_info else getattr(record, "stack", "")
        if self._json:
            entry = {"time": when, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
            return json.dumps(entry | dict(fields) | ({"traceback": trace} if trace else {}), default=str)
        pairs = "".join(f" {name}={self._value(value)}" for name, value in fields.items() if value is not None)
        line = f"{when} {record.levelname} {record.name} {_escape(record.getMessage())}{pairs}"
        return line + "".join(f"\n    {_escape(row)}" for row in trace.splitlines())

    @staticmethod
    def _value(value: Any) -> str:
        text = str(value)
        return json.dumps(text) if re.search(r"[^!#-<>-~]", text) or not text else text


class BoundedQueueHandler(logging.handlers.QueueHandler):
    """Hands lines to the writing thread. When its queue is full, lines are dropped and counted, never waited for."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put a line into the queue, behind a note of those that were dropped, if any were."""
        try:
            if self.dropped:
                notice = copy.copy(record)
                notice.msg = notice.message = (
                    f"{self.dropped} log lines were dropped: they came faster than they could be written"
                )
                self.queue.put_nowait(notice)
                self.dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


@contextmanager
def logging_to(*, style: str, level: str, file: Path | None) -> Iterator[None]:
    """Write log lines to stderr, and to a file that rotates at 10 MB, while the block runs.

    A thread writes; the event loop never waits for a disk.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    complaint = ""
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(
                logging.handlers.RotatingFileHandler(file, maxBytes=10_000_000, backupCount=5, encoding="utf-8")
            )
        except OSError as error:
            complaint = f"{file} cannot be written ({error.strerror}): log lines go to stderr alone"
    entrance = BoundedQueueHandler(queue.Queue(10_000))
    entrance.setFormatter(LineFormatter(style))
    listener = logging.handlers.QueueListener(entrance.queue, *handlers)
    # It tells of every change it sees: with its lines in a file that is watched, it would never fall silent.
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    root = logging.getLogger()
    before = root.level
    root.addHandler(entrance)
    root.setLevel(level)
    listener.start()
    try:
        if complaint:
            logging.getLogger(__name__).warning(complaint)
        yield
    finally:
        listener.stop()
        root.removeHandler(entrance)
        root.setLevel(before)
        for handler in handlers:
            handler.close()
