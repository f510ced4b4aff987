"""A peer in Python: handlers of aiohttp that do nothing but respond with JSON, and its FileResponse."""

import os
import sys
from pathlib import Path

from aiohttp import web

FILES = Path(os.environ["BENCH_FILES"])


async def health(request: web.Request) -> web.Response:
    """Respond with JSON of some size."""
    return web.json_response({"status": "ok", "version": "1", "seconds_up": 1.5, "open_streams": 0})


async def publish(request: web.Request) -> web.Response:
    """Parse JSON, and respond with JSON."""
    price = await request.json()
    return web.json_response({"ids": [f"1-{price['price']}"]}, status=202)


async def file(request: web.Request) -> web.FileResponse:
    """Send a file."""
    return web.FileResponse(FILES / request.match_info["name"])


def main(port: int) -> None:
    """Serve until SIGTERM."""
    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_post("/stream/stock-ticker", publish)
    app.router.add_get("/files/{name}", file)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
