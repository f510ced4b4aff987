"""Connections to clients, and what is written to many of them at once."""

import asyncio
from typing import Any, Protocol

from aiohttp import web

HIGH_WATER = 64 * 1024
"""What may wait in this process for a client before `push` passes it by."""


class Piece:
    """Bytes framed once and pushed to many streams: as they are, and as one chunk (RFC 9112 section 7.1)."""

    __slots__ = ("body", "chunk")

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.chunk = b"%x\r\n%b\r\n" % (len(body), body)


class Pusher:
    """Somebody else who writes to the connection of a stream: what they wrote so far is counted."""

    __slots__ = ("pushed",)

    def __init__(self) -> None:
        self.pushed = 0

    def fall_behind(self) -> None:
        """Hear, from within a write, that more than HIGH_WATER bytes wait for the client now: write no more."""


class Connection(web.RequestHandler):
    """A connection of aiohttp that says when its client falls behind, so that a pusher need not ask at each write."""

    __slots__ = ("pusher",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pusher: Pusher | None = None

    def pause_writing(self) -> None:
        """Pass on what the transport says when more than HIGH_WATER bytes (its own default, too) wait."""
        super().pause_writing()
        if self.pusher is not None:
            self.pusher.fall_behind()


class _Asked:
    """A transport of a connection that does not say it (aiohttp's own, under TestServer): it is asked instead."""

    def __init__(self, transport: asyncio.Transport, pusher: Pusher) -> None:
        self._transport = transport
        self._pusher = pusher

    def write(self, data: bytes) -> None:
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > HIGH_WATER:
            self._pusher.fall_behind()


class Writer(Protocol):
    """Where a pusher writes."""

    def write(self, data: bytes) -> None:
        """Send some bytes, or keep them until the client takes them; never waits."""
