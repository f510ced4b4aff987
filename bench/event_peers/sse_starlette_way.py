"""sse-starlette's EventSourceResponse on Starlette alone, which is lighter than FastAPI; a queue a client."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from . import FAR_OFF_SECONDS, PATH

queues: set[asyncio.Queue[Any]] = set()


async def publish(request: Request) -> Response:
    """Hand every line to every client's queue."""
    for line in (await request.body()).splitlines():
        event = json.loads(line)
        for queue in queues:
            queue.put_nowait(event)
    return Response(status_code=202)


async def follow(request: Request) -> EventSourceResponse:
    """Stream what comes out of this client's queue."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    queues.add(queue)

    async def events() -> AsyncIterator[dict[str, str]]:
        try:
            while True:
                yield {"data": json.dumps(await queue.get())}
        finally:
            queues.discard(queue)

    return EventSourceResponse(events(), ping=FAR_OFF_SECONDS)


app = Starlette(routes=[Route(PATH, publish, methods=["POST"]), Route(PATH, follow)])
