"""All open streams of one server: their limit, and how they end when it stops."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Protocol

from aiohttp import web

from streamlab.auth import client_of, may_be_proxy
from streamlab.problems import Problem
from streamlab.tally import Tally
from streamlab.threads import Threads

from .outcome import OnStop, Outcome, Stop, StreamSummary

CHECKED_AT_ONCE = 500
"""Number of open streams whose credentials are checked in one iteration of the event loop."""

FAREWELL_SECONDS = 0.5
"""Seconds in which event streams send their end at shutdown; a client that does not read it is cut then."""

UNSENT_BYTES = 64 * 1024
"""Maximum unsent bytes in the kernel for a client that does not read (its default grows to 4 MB)."""

COMPRESSING_THREADS = 2
"""Number of threads in which large chunks of all streams are compressed."""


class OpenStream(Protocol):
    """Interface of an open stream that a drain uses."""

    on_stop: OnStop
    outcome: Outcome | None
    scenario: str

    @property
    def request(self) -> web.Request:
        """The request that it responds to."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of the body handed to the connection."""

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that writes to it."""

    def stop(self, how: Stop) -> None:
        """Interrupt it."""

    def cut(self) -> None:
        """Close its connection."""

    def summary(self) -> StreamSummary:
        """Return its summary so far."""


class Streams:
    """The open streams of one server: at most `limit`, and all of them end when it drains.

    `on_end` is called once for each stream that has ended, `on_count` with their number whenever it changes; they must
    not raise. Where several processes serve together, `clients` counts in all of them, and `elsewhere` returns how many
    streams are open in the others.
    """

    def __init__(
        self,
        *,
        limit: int,
        limit_per_client: int = 0,
        limits_proxies: bool = False,
        stall_seconds: float,
        on_end: Callable[[web.Request, StreamSummary], None],
        on_count: Callable[[int], None] | None = None,
        clients: Tally | None = None,
        elsewhere: Callable[[], int] | None = None,
    ) -> None:
        self.draining = False
        self.drained_at: float | None = None
        """Time of the event loop by which every stream has ended, once the server drains."""
        self.compressing = Threads("compress", COMPRESSING_THREADS)
        """Threads that compress large chunks; opened by the owner of the streams."""
        self._limit = limit
        self._limit_per_client = limit_per_client
        self._limits_proxies = limits_proxies
        self._clients = clients or Tally()
        """The number of streams of each client, where there is a limit."""
        self._stall_milliseconds = int(stall_seconds * 1000)
        self._on_end, self._on_count = on_end, on_count
        self._elsewhere = elsewhere or (lambda: 0)
        self._open: set[OpenStream] = set()
        self._requests: dict[asyncio.Task[Any], web.Request] = {}
        self._changed = asyncio.Event()
        self._waits: set[asyncio.Timeout] = set()
        """The timeouts of requests that wait for something to happen."""
        self._used = asyncio.Event()
        """Set when a request began; cleared by whoever finds that none is in progress."""

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenStream]:
        return iter(tuple(self._open))

    @property
    def requests(self) -> Collection[web.Request]:
        """The requests in progress: those of open streams, and others, as of a WebSocket."""
        return tuple(self._requests.values())

    async def wait_until_used(self) -> None:
        """Wait until a request begins, if none is in progress: the first of many short ones wakes the caller."""
        if not self._requests:
            self._used.clear()
            await self._used.wait()

    def begin_request(self, request: web.Request) -> asyncio.Task[Any]:
        """Return the current task, a request in progress until `end_request`: a drain waits for it, then cancels it."""
        # Not a context manager: its generator would cost each open stream 400 bytes.
        task = asyncio.current_task()
        assert task is not None
        self._requests[task] = request
        self._used.set()
        return task

    def end_request(self, task: asyncio.Task[Any]) -> None:
        """Wait no longer for the task of a request."""
        self._requests.pop(task, None)
        self._changed.set()

    def register(self, request: web.Request, stream: OpenStream) -> None:
        """Add a stream.

        Raises Problem 503 at the limit, and while the server drains, and 429 at that of the client, with the fields of
        draft-ietf-httpapi-ratelimit-headers.
        """
        if self.draining:
            raise Problem(503, "The server is stopping.", headers={"Retry-After": "5", "Connection": "close"})
        if len(self._open) + self._elsewhere() >= self._limit:
            raise Problem(
                503, f"This server has {self._limit} streams open, its maximum.", headers={"Retry-After": "5"}
            )
        client = self._limited(request)
        if client is not None and not self._clients.add(client, self._limit_per_client):
            detail = f"This client has {self._limit_per_client} streams open, its maximum."
            policy = f'"streams";q={self._limit_per_client};qu="concurrent-requests"'
            limited = {"Retry-After": "5", "RateLimit-Policy": policy, "RateLimit": '"streams";r=0'}
            raise Problem(429, detail, headers=limited)
        self._open.add(stream)
        if self._on_count is not None:
            self._on_count(len(self._open))
        self._bound(request)

    def _limited(self, request: web.Request) -> str | None:
        """Return the client that a stream counts for; None where there is no limit for it."""
        if not self._limit_per_client:
            return None
        client = client_of(request)
        return client if self._limits_proxies or not may_be_proxy(client) else None

    def unregister(self, request: web.Request, stream: OpenStream) -> None:
        """Remove a stream that has ended, and report how."""
        if stream in self._open and (client := self._limited(request)) is not None:
            self._clients.remove(client)
        self._open.discard(stream)
        if self._on_count is not None:
            self._on_count(len(self._open))
        self._changed.set()
        if stream.outcome is not None:
            self._on_end(request, stream.summary())

    def _bound(self, request: web.Request) -> None:
        """Limit the kernel memory and the time that a client costs that does not read or has vanished."""
        sock = request.transport.get_extra_info("socket") if request.transport else None
        if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        with suppress(OSError):
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._stall_milliseconds)

    async def end_unauthorized(
        self, may_continue: Callable[[web.Request], bool], interrupted: Collection[OpenStream] = ()
    ) -> set[OpenStream]:
        """Interrupt every stream whose client may not have it any more, and return these.

        Those that were `interrupted` by an earlier call, whose handlers go on all the same, are cut, and so is every
        other request in progress, as a WebSocket.
        """
        found = set()
        for number, stream in enumerate(self, start=1):
            if stream in self._open and not may_continue(stream.request):
                found.add(stream)
                if stream in interrupted:
                    stream.cut()
                else:
                    stream.stop("unauthorized")
            if number % CHECKED_AT_ONCE == 0:
                await asyncio.sleep(0)
        if len(self._requests) > len(self._open):
            tasks = {stream.task for stream in self._open}
            for task, request in tuple(self._requests.items()):
                if task not in tasks and request.transport is not None and not may_continue(request):
                    request.transport.close()
        return found

    @asynccontextmanager
    async def waiting(self, seconds: float) -> AsyncIterator[None]:
        """Raise TimeoutError out of the block after `seconds`, or when the server begins to stop."""
        async with asyncio.timeout(0 if self.draining else seconds) as timeout:
            self._waits.add(timeout)
            try:
                yield
            finally:
                self._waits.discard(timeout)

    async def drain(self, seconds: float) -> None:
        """End every stream and request: event streams now, with a farewell, the others within `seconds`.

        Takes at most max(`seconds`, FAREWELL_SECONDS), and then FAREWELL_SECONDS / 2 to cut the rest, whether clients
        read or not. Does nothing on the second call.
        """
        if self.draining:
            return
        self.draining = True
        started = asyncio.get_running_loop().time()
        self.drained_at = started + seconds
        for timeout in self._waits:
            timeout.reschedule(started)
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
        """Interrupt every stream and every other request, so that none of them looks complete."""
        for stream in self:
            stream.stop("cut")
        for task in self._requests.keys() - {stream.task for stream in self}:
            task.cancel()

    async def _wait(self, seconds: float, reached: Callable[[], bool]) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not reached():
                    self._changed.clear()
                    await self._changed.wait()
        return reached()


STREAMS = web.AppKey("open_streams", Streams)


def waiting(request: web.Request, seconds: float) -> AbstractAsyncContextManager[None]:
    """Limit a block in which a request waits for something to happen, before it has a response (a long poll).

    TimeoutError is raised out of it after `seconds`, or when the server begins to stop, so that no drain waits for it.
    """
    return request.config_dict[STREAMS].waiting(seconds)
