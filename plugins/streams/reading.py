"""Reading streams: what is there, what comes within some seconds, and all that comes as events."""

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from aiohttp import web

from streamlab import (
    END,
    ORIGIN,
    PRINCIPAL,
    Event,
    EventStream,
    Position,
    Problem,
    open_event_stream,
    resume_id,
    waiting,
)

from .content import Content
from .protocol import (
    CLOSED,
    CURSOR,
    EXPIRES_AT,
    NEXT_OFFSET,
    NOW,
    SSE_ENCODING,
    TTL,
    UP_TO_DATE,
    format_offset,
    next_cursor,
    parse_offset,
)
from .store import Store, Stream

PAGE_BYTES = 256 * 1024
"""Maximum bytes of a response, unless one message has more."""

PAGE_EVENTS = 1000
"""Maximum number of messages of a response."""

CACHED = "max-age=60, stale-while-revalidate=300"
"""How long a cache may store what was read: at its offsets, a stream never changes, but it may be deleted."""

FRAMES = 16
"""Maximum number of pages whose events are remembered, for the other followers of the same stream."""

COMMON = {"Cross-Origin-Resource-Policy": "cross-origin"}


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What a GET asks for."""

    after: Position | None
    """Position to read after; None for the end, wherever that is."""
    live: str
    """"", `long-poll` or `sse`."""
    cursor: str


def read_query(query: Mapping[str, list[str]], resumed: str) -> ReadRequest:
    """Return what a GET asks for; `resumed` is the id from which an EventSource resumes. Raises Problem 400."""
    live, cursor = (_single(query, name) or "" for name in ("live", "cursor"))
    if live not in ("", "long-poll", "sse"):
        raise Problem(400, "live: must be long-poll or sse.")
    offset = _single(query, "offset")
    if live and offset is None:
        raise Problem(400, f"offset: is needed with live={live}; -1 is the start, now is the end.")
    if live == "sse" and resumed:
        offset = resumed.partition(".")[0]  # of an event about the connection, as ID.stop
    after = None if offset == NOW else parse_offset("-1" if offset is None else offset)
    return ReadRequest(after, live, cursor)


def _single(query: Mapping[str, list[str]], name: str) -> str | None:
    given = query.get(name) or []
    if len(given) > 1:
        raise Problem(400, f"{name}: is given {len(given)} times.")
    return given[0] if given else None


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a stream that was read at once."""

    content: Content
    after: Position
    messages: list[bytes]
    next: Position
    """Position after the messages."""
    at_end: bool
    closed: bool
    """Whether nothing follows, and nothing ever will."""

    @property
    def etag(self) -> str:
        """Return a tag that changes with what is there."""
        begin = "start" if self.after == ORIGIN else format_offset(self.after)
        return f'"{begin}:{format_offset(self.next)}{":closed" if self.closed else ""}"'


class Reader:
    """Reads of one process."""

    def __init__(self, store: Store, *, long_poll_seconds: float, sse_seconds: float) -> None:
        self._store = store
        self._long_poll_seconds = long_poll_seconds
        self.sse_seconds = sse_seconds
        """Time after which an event stream ends, in seconds."""
        self._frames: OrderedDict[object, bytes] = OrderedDict()

    async def metadata(self, path: str) -> web.Response:
        """Return the response to HEAD, which does not count as a read."""
        stream = await self._store.find(path)
        headers = {NEXT_OFFSET: format_offset(stream.batch.last), "Cache-Control": "no-store"}
        config = stream.config
        if config.ttl is not None:
            headers[TTL] = str(config.ttl)
        if config.expires_at:
            headers[EXPIRES_AT] = config.expires_at
        if stream.is_closed:
            headers[CLOSED] = "true"
        return web.Response(headers={"Content-Type": config.content_type, **COMMON, **headers})

    async def read(self, request: web.Request, path: str, query: Mapping[str, list[str]]) -> web.StreamResponse:
        """Return the response to GET."""
        resumed = resume_id(request)
        wanted = read_query(query, resumed)
        stream, page = await self.begin(path, wanted.after)
        if wanted.live == "sse":
            if page.closed and not page.messages and resumed:
                return web.Response(status=204, headers={**COMMON, "Cache-Control": "no-store"})
            return await self._send_events(request, stream, page, wanted.cursor)
        if wanted.live == "long-poll":
            return await self._poll(request, stream, page, wanted.cursor)
        return _respond(request, stream, page, {}, cached=wanted.after is not None)

    async def begin(self, path: str, after: Position | None, size: int = PAGE_BYTES) -> tuple[Stream, Page]:
        """Return a stream with what it has after a position, up to `size` bytes; None for its end.

        Raises Problem 404 or 410 for a stream that does not exist, 400 or 410 for a position that is not in it.
        """
        stream = await self._store.find(path, after or ORIGIN, size=1 if after is None else size)
        await self._store.extend(stream)
        return stream, _end_of(stream) if after is None else await self._page(stream, after)

    async def _page(self, stream: Stream, after: Position) -> Page:
        """Return what was read of a stream after a position; raises Problem 400 or 410 where that is not in it."""
        await self._require_position(stream, after)
        batch = stream.batch
        following = batch.events[-1].position if batch.events else batch.last
        # An epoch without messages begins where those before it end: a fork without messages of its own.
        if not batch.last.offset and batch.events and not (await stream.channel.look(following, limit=1)).events:
            following = batch.last
        messages = [event.data for event in batch.events if event.event != END]
        at_end = following == batch.last
        return Page(stream.config.content, after, messages, following, at_end, at_end and stream.is_closed)

    async def _require_position(self, stream: Stream, after: Position) -> None:
        """Raise Problem unless what was read directly follows a position that is, or was, in the stream."""
        batch = stream.batch
        if after == ORIGIN or after == batch.last or (batch.events and after.precedes(batch.events[0].position)):
            return
        if after.epoch == batch.last.epoch and after > batch.last:
            raise Problem(400, "offset: is beyond the end of the stream.")
        # At the end of an epoch, which a fork has where its own messages begin: it must be that of a message.
        if after < batch.last and after.offset:
            before = after._replace(offset=after.offset - 1)
            found = (await stream.channel.look(before, limit=1)).events
            if found and found[0].position == after:
                return
        raise Problem(410, "What follows this offset is not stored any more; -1 is the start of what is.")

    async def _poll(self, request: web.Request, stream: Stream, page: Page, cursor: str) -> web.StreamResponse:
        """Return the response to a long poll: what there is, or what comes before the timeout, or 204."""
        with suppress(TimeoutError):
            async with waiting(request, self._long_poll_seconds), stream.channel.watched(page.next) as wait_past:
                while not (page.messages or page.closed):
                    await wait_past(page.next)
                    stream = await self._store.find(stream.path, page.next, size=PAGE_BYTES)
                    page = await self._page(stream, page.next)
        fields = {} if page.closed else {CURSOR: next_cursor(cursor)}
        if page.messages:
            return _respond(request, stream, page, fields, cached=True)
        return _respond(request, stream, page, fields, cached=False, status=204)

    # -- events

    async def _send_events(self, request: web.Request, stream: Stream, page: Page, cursor: str) -> web.StreamResponse:
        """Send what there is and what comes, until the stream is closed, or the time of a connection is over."""
        headers = {**COMMON, "Cache-Control": "no-cache, no-store, no-transform"}
        if stream.config.content.sse_encoding:
            headers[SSE_ENCODING] = stream.config.content.sse_encoding
        cursor = next_cursor(cursor)
        async with open_event_stream(request, headers=headers) as events:
            # A stream that is deleted meanwhile ends: the client gets the reason when it reconnects.
            with suppress(TimeoutError, Problem):
                async with asyncio.timeout(self.sse_seconds), aclosing(self.pages(stream, page)) as pages:
                    async for one in pages:
                        await self._send(events, stream, one, cursor)
        return events

    async def pages(self, stream: Stream, page: Page, size: int = PAGE_BYTES) -> AsyncGenerator[Page, None]:
        """Yield a page of a stream and what comes after it, in pages of `size` bytes, until the stream is closed."""
        async with stream.channel.watched(page.next) as wait_past:
            yield page
            while not page.closed:
                # What came after the end is in memory, unless it was too much.
                came = await self._wait(stream, page.next, wait_past) if page.at_end else ()
                if came:
                    messages, closed = [event.data for event in came if event.event != END], came[-1].event == END
                    page = Page(page.content, page.next, messages, came[-1].position, True, closed)
                else:
                    stream = await self._store.find(stream.path, page.next, size=size)
                    page = await self._page(stream, page.next)
                if page.messages or page.closed:
                    yield page

    async def _wait(
        self, stream: Stream, after: Position, wait_past: Callable[[Position], Awaitable[Sequence[Event]]]
    ) -> Sequence[Event]:
        """Wait for what follows a position; meanwhile the stream is read, and its time to live does not end."""
        while True:
            await self._store.extend(stream)
            try:
                async with asyncio.timeout(stream.config.ttl and stream.config.ttl / 2):
                    return await wait_past(after)
            except TimeoutError:
                if not stream.config.ttl:
                    raise

    async def _send(self, events: EventStream, stream: Stream, page: Page, cursor: str) -> None:
        """Send a page; most followers of a stream get the same bytes."""
        key = stream.path, page.after, page.next, page.at_end, page.closed, cursor
        if (frame := self._frames.get(key)) is None:
            frame = self._frames[key] = _frame(page, cursor)
            if len(self._frames) > FRAMES:
                self._frames.popitem(last=False)
        await events.write(frame)
        events.position = format_offset(page.next)


def _end_of(stream: Stream) -> Page:
    last = stream.batch.last
    return Page(stream.config.content, last, [], last, True, stream.is_closed)


def _respond(
    request: web.Request, stream: Stream, page: Page, fields: Mapping[str, str], *, cached: bool, status: int = 200
) -> web.Response:
    """Return a response with a page, or 304 for a client that has it."""
    headers = {**COMMON, NEXT_OFFSET: format_offset(page.next), **fields}
    if page.at_end:
        headers[UP_TO_DATE] = "true"
    if page.closed:
        headers[CLOSED] = "true"
    headers["Cache-Control"] = "no-store"
    if cached:
        scope = "private" if request[PRINCIPAL].name else "public"
        headers |= {"Cache-Control": f"{scope}, {CACHED}", "ETag": page.etag}
        if page.etag in _tags(request.headers.get("If-None-Match", "")):
            return web.Response(status=304, headers=headers)
    if status == 204:
        return web.Response(status=204, headers=headers)
    headers["Content-Type"] = stream.config.content_type
    return web.Response(body=page.content.join(page.messages), headers=headers)


def _tags(field: str) -> list[str]:
    return [tag.strip().removeprefix("W/") for tag in field.split(",")]


_LINE_END = re.compile(rb"\r\n|\r|\n")


def _frame(page: Page, cursor: str) -> bytes:
    """Return the events of a page: its data, if any, and what follows it; with an id, from which both are resumed."""
    offset = format_offset(page.next)
    control: dict[str, str | bool] = {"streamNextOffset": offset}
    control |= {"streamClosed": True} if page.closed else {"streamCursor": cursor}
    control |= {"upToDate": True} if page.at_end else {}
    lines = [
        b"id: %b\nevent: control\ndata:%b\n\n" % (offset.encode(), json.dumps(control, separators=(",", ":")).encode())
    ]
    if page.messages:
        data = b"\ndata:".join(_LINE_END.split(page.content.event_data(page.messages)))
        lines.insert(0, b"id: %b\nevent: data\ndata:%b\n\n" % (offset.encode(), data))
    return b"".join(lines)
