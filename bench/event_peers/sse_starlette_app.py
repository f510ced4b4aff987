"""sse-starlette's EventSourceResponse on Starlette, which is lighter than FastAPI, with a queue per client."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import PATH, PING_SECONDS

queues: set[asyncio.Queue[Any]] = set()


async def publish(request: Request) -> Response:
    """Put every line into the queue of every client."""
    for line in (await request.body()).splitlines():
        event = json.loads(line)
        for queue in queues:
            queue.put_nowait(event)
    return Response(status_code=202)


async def follow(request: Request) -> EventSourceResponse:
    """Stream the events of this client's queue."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    queues.add(queue)

    async def events() -> AsyncIterator[dict[str, str]]:
        try:
            while True:
                yield {"data": json.dumps(await queue.get())}
        finally:
            queues.discard(queue)

    return EventSourceResponse(events(), ping=PING_SECONDS)


app = Starlette(routes=[Route(PATH, publish, methods=["POST"]), Route(PATH, follow)])
