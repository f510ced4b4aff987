"""aiohttp-sse's sse_response, with a queue and a json.dumps per client."""

import asyncio
import json
import sys
from typing import Any

from aiohttp import web
from aiohttp_sse import sse_response

from . import PATH, PING_SECONDS

queues: set[asyncio.Queue[Any]] = set()


async def publish(request: web.Request) -> web.Response:
    """Put every line into the queue of every client."""
    for line in (await request.read()).splitlines():
        event = json.loads(line)
        for queue in queues:
            queue.put_nowait(event)
    return web.Response(status=202)


async def follow(request: web.Request) -> web.StreamResponse:
    """Stream the events of this client's queue."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    queues.add(queue)
    try:
        async with sse_response(request, ping_interval=PING_SECONDS) as response:
            while True:
                await response.send(json.dumps(await queue.get()))
    finally:
        queues.discard(queue)


def main(port: int) -> None:
    """Serve; with handler_cancellation, as streamlab, so that a disconnected client releases its queue."""
    app = web.Application()
    app.add_routes([web.post(PATH, publish), web.get(PATH, follow)])
    web.run_app(
        app,
        host="127.0.0.1",
        port=port,
        backlog=2048,
        access_log=None,
        print=None,
        handler_cancellation=True,
        shutdown_timeout=0.1,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
