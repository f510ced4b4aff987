"""Several streams on one connection: their events carry the positions of all of them, from which all are resumed."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Any

from aiohttp import web

from streamlab import ORIGIN, EventLogError, Position, Problem, open_event_stream, resume_id

from .protocol import NOW, START, format_offset
from .reading import COMMON, PAGE_BYTES, Page, Reader
from .store import Stream

MAX_STREAMS = 50
"""Maximum number of streams of one connection."""

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def encode_vector(positions: Sequence[Position]) -> str:
    """Return the positions of some streams, in their order, as the id of an event: short, since each event has it."""
    return "~".join(f"{_encode(position.epoch)}-{_encode(position.offset)}" for position in positions)


def decode_vector(text: str, count: int) -> list[Position | None]:
    """Return the positions in an id or an offset, None for the end of a stream; raises Problem 400."""
    if text in (START, NOW):
        return [ORIGIN if text == START else None] * count
    try:
        positions = [Position(*(int(number, 36) for number in part.split("-"))) for part in text.split("~")]
        if len(positions) == count and encode_vector(positions) == text and max(map(max, positions)) < 10**16:
            return [*positions]
    except (TypeError, ValueError):
        pass
    raise Problem(400, f"offset: must be the id of an event of the same {count} streams, -1, or now.")


def _encode(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits or "0"


async def follow_all(request: web.Request, reader: Reader, paths: Sequence[str], offset: str) -> web.StreamResponse:
    """Send what streams have after their positions, and what comes, until all are closed or the time is over.

    Each event is a JSON object with the `stream`, its `messages` (or `text`, or `base64`), `streamNextOffset`,
    `upToDate` and `streamClosed`. Raises Problem as reading each of them does.
    """
    resumed = resume_id(request).partition(".")[0]  # of an event about the connection, as ID.stop
    after = decode_vector(resumed or offset, len(paths))
    size = PAGE_BYTES // len(paths)  # all together hold as much as one
    begun = [await reader.begin(path, position, size) for path, position in zip(paths, after, strict=True)]
    if resumed and all(page.closed and not page.messages for _, page in begun):
        return web.Response(status=204, headers={**COMMON, "Cache-Control": "no-store"})
    positions = [page.after for _, page in begun]
    came: asyncio.Queue[tuple[int, Page] | None] = asyncio.Queue(maxsize=1)

    async def read(number: int, stream: Stream, page: Page) -> None:
        with suppress(Problem, EventLogError):  # the client gets the reason when it reconnects
            async with aclosing(reader.pages(stream, page, size)) as pages:
                async for one in pages:
                    await came.put((number, one))
        await came.put(None)

    async with open_event_stream(request, headers=COMMON) as events:
        with suppress(TimeoutError):
            async with asyncio.timeout(reader.sse_seconds), asyncio.TaskGroup() as group:
                for number, (stream, page) in enumerate(begun):
                    group.create_task(read(number, stream, page))
                left = len(begun)
                while left:
                    if (one := await came.get()) is None:
                        left -= 1
                        continue
                    number, page = one
                    if page.next == positions[number] and not page.closed:
                        continue  # nothing new: the client has this id
                    positions[number] = page.next
                    data = {"stream": paths[number], **_members(page)}
                    await events.send(data, id=encode_vector(positions), event="data")
    return events


def _members(page: Page) -> dict[str, Any]:
    """Return what an event has of a page."""
    data = page.content.event_data(page.messages)
    members: dict[str, Any] = {
        page.content.member: json.loads(data) if page.content.member == "messages" else data.decode()
    }
    members["streamNextOffset"] = format_offset(page.next)
    members |= {"upToDate": True} if page.at_end else {}
    return members | ({"streamClosed": True} if page.closed else {})
