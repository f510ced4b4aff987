"""Fake upstreams of a plugin under test: an aiohttp application, served in a thread of the tests."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from aiohttp import web

START_SECONDS = 10.0
"""Maximum time until an application is served, in seconds."""

CLOSE_SECONDS = 0.1
"""Time that open requests get at the end before they are cancelled, in seconds."""


@contextmanager
def serving_app(app: web.Application) -> Iterator[str]:
    """Serve an application at an unused port while the block runs, and yield its URL, as `http://127.0.0.1:40123`.

    Its handlers run in a thread. Open requests are cancelled at the end. Raises OSError if no port can be bound.
    """
    started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(app, started)), name="upstream", daemon=True)
    thread.start()
    url, loop, ended = started.result(START_SECONDS)
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()


async def _serve(app: web.Application, started: "Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]]") -> None:
    ended = asyncio.Event()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSE_SECONDS)
    try:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    except BaseException as error:
        started.set_exception(error)
    else:
        started.set_result((f"http://127.0.0.1:{runner.addresses[0][1]}", asyncio.get_running_loop(), ended))
        await ended.wait()
    finally:
        await runner.cleanup()
