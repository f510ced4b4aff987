"""The event stream of the FastAPI tutorial: StreamingResponse over a generator, a queue and a json.dumps per client."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from . import PATH

app = FastAPI()
queues: set[asyncio.Queue[Any]] = set()


@app.post(PATH)
async def publish(request: Request) -> Response:
    """Put every line into the queue of every client."""
    for line in (await request.body()).splitlines():
        event = json.loads(line)
        for queue in queues:
            queue.put_nowait(event)
    return Response(status_code=202)


@app.get(PATH)
async def follow() -> StreamingResponse:
    """Stream the events of this client's queue."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    queues.add(queue)  # before the headers are sent: a client that has them misses no event

    async def events() -> AsyncIterator[str]:
        try:
            while True:
                yield f"data: {json.dumps(await queue.get())}\n\n"
        finally:
            queues.discard(queue)

    headers = {"Cache-Control": "no-cache", "Connection": "keep-alive"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)
