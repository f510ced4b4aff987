"""All open streams of one server: how many there may be, and how all of them end."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, Protocol

from aiohttp import web

from streamlab.problems import Problem
from streamlab.threads import Threads

from .outcome import OnStop, Outcome, StreamSummary

FAREWELL_SECONDS = 0.5
"""What an event stream may take to send its end at shutdown; a client that reads none of it is cut then."""

UNSENT_BYTES = 64 * 1024
"""What the kernel may hold unsent for a client that does not read (its default grows to 4 MB)."""

COMPRESSING_THREADS = 2
"""Threads in which long pieces of all streams are compressed."""


class OpenStream(Protocol):
    """What a drain needs of an open stream."""

    on_stop: OnStop
    outcome: Outcome | None
    scenario: str

    @property
    def bytes_sent(self) -> int:
        """Bytes of the body handed to the connection."""

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that writes to it."""

    def stop(self, how: Literal["end", "cut"]) -> None:
        """Interrupt it: `end` with a last chunk, `cut` without one."""

    def summary(self) -> StreamSummary:
        """Return what is known of it by now."""


class Streams:
    """The open streams of one server: how many there may be, which there are, and how all of them end.

    `on_end` is called once for each stream that is over; it must not raise.
    """

    def __init__(
        self,
        *,
        limit: int,
        stall_seconds: float,
        on_end: Callable[[web.Request, StreamSummary], None],
    ) -> None:
        self.draining = False
        self.drained_at: float | None = None
        """Time of the loop by which every stream has ended, once the server drains."""
        self.compressing = Threads("compress", COMPRESSING_THREADS)
        """Where long pieces of streams are compressed; opened by who owns the streams."""
        self._limit = limit
        self._stall_milliseconds = int(stall_seconds * 1000)
        self._on_end = on_end
        self._open: set[OpenStream] = set()
        self._requests: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenStream]:
        return iter(tuple(self._open))

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request in progress while the block runs: a drain waits for it, and cancels it at its limit."""
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            yield
        finally:
            self._requests.discard(task)
            self._changed.set()

    def admit(self, request: web.Request, stream: OpenStream) -> None:
        """Give a stream a place; raises Problem 503 where there is none."""
        if self.draining:
            raise Problem(503, "The server is stopping.", headers={"Retry-After": "5", "Connection": "close"})
        if len(self._open) >= self._limit:
            raise Problem(
                503, f"This server has {self._limit} streams open, which is all it takes.", headers={"Retry-After": "5"}
            )
        self._open.add(stream)
        self._bound(request)

    def dismiss(self, request: web.Request, stream: OpenStream) -> None:
        """Take its place back from a stream that is over, and tell how it ended."""
        self._open.discard(stream)
        self._changed.set()
        if stream.outcome is not None:
            self._on_end(request, stream.summary())

    def _bound(self, request: web.Request) -> None:
        """Bound what a client that does not read, or has vanished, costs: bytes in the kernel, and time."""
        sock = request.transport.get_extra_info("socket") if request.transport else None
        if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        with suppress(OSError):
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._stall_milliseconds)

    async def drain(self, seconds: float) -> None:
        """End every stream and request: event streams now and tidily, the others within `seconds`.

        Takes at most the larger of `seconds` and FAREWELL_SECONDS, and half of FAREWELL_SECONDS for what is cut then,
        whether clients read or not. Does nothing where the server has been drained before.
        """
        if self.draining:
            return
        self.draining = True
        started = asyncio.get_running_loop().time()
        self.drained_at = started + seconds
        for stream in self:
            if stream.on_stop == "end":
                stream.stop("end")
        if not await self._wait(FAREWELL_SECONDS, lambda: all(stream.on_stop == "finish" for stream in self)):
            for stream in self:
                if stream.on_stop == "end":
                    stream.stop("cut")
        left = self.drained_at - asyncio.get_running_loop().time()
        if not await self._wait(left, lambda: not self._open and not self._requests):
            self.cut()
            await self._wait(FAREWELL_SECONDS / 2, lambda: not self._open and not self._requests)

    def cut(self) -> None:
        """Interrupt every stream and every other request, so that none of them looks whole."""
        for stream in self:
            stream.stop("cut")
        for task in self._requests - {stream.task for stream in self}:
            task.cancel()

    async def _wait(self, seconds: float, reached: Callable[[], bool]) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not reached():
                    self._changed.clear()
                    await self._changed.wait()
        return reached()


STREAMS = web.AppKey("streams", Streams)
