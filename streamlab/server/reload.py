"""What a running server takes from a changed configuration: tokens and scopes, origins, certificates."""

import asyncio
import logging
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from streamlab.config import CONFIG, Config, ConfigError
from streamlab.streaming.drain import STREAMS
from streamlab.threads import Threads

from . import preflight
from .authorization import AUTHORIZATION
from .cors import CORS

log = logging.getLogger(__name__)


@asynccontextmanager
async def reloading_at_sighup(
    app: web.Application, tls: ssl.SSLContext | None, read: Callable[[], Config] | None
) -> AsyncIterator[None]:
    """Take the configuration that `read` returns at every SIGHUP in the block; without `read`, ignore the signal."""
    requested, loop = asyncio.Event(), asyncio.get_running_loop()
    before = signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(requested.set))
    try:
        async with Threads("reload", 1) as threads, asyncio.TaskGroup() as group:
            reloading = group.create_task(_reload_when(requested, app, tls, read, threads))
            yield
            reloading.cancel()
    finally:
        signal.signal(signal.SIGHUP, before)


async def _reload_when(
    requested: asyncio.Event,
    app: web.Application,
    tls: ssl.SSLContext | None,
    read: Callable[[], Config] | None,
    threads: Threads,
) -> None:
    while True:
        await requested.wait()
        requested.clear()
        if read is not None:
            await reload(app, tls, read, threads)


async def reload(
    app: web.Application, tls: ssl.SSLContext | None, read: Callable[[], Config], threads: Threads
) -> None:
    """Take tokens, origins and certificates of a changed configuration; one with faults is logged and not taken.

    Streams that are still allowed go on. Others end at once, and so does nothing else: tables that only a start reads
    stay in force, which is logged.
    """

    def checked() -> Config:
        config = read()
        found = [*config.faults, *preflight.exposure_faults(config)]
        if tls is not None:
            preflight.tls_context(config)  # raises before the context in use is changed
        if found:
            raise ConfigError(found)
        return config

    before = app[CONFIG]
    try:
        config = await threads.run(checked)
        if tls is not None and config.server.tls_certificate is not None:
            tls.load_cert_chain(config.server.tls_certificate, config.server.tls_key)
    except ConfigError as error:
        for fault in error.faults:
            log.error("%s", fault)
        log.error("the configuration is not reloaded: what was in force before still is")
        return
    except OSError as error:  # the files of TLS changed since they were checked
        log.error("the certificate is not reloaded: %s", error)
        return
    app[AUTHORIZATION].configure(config)
    app[CORS].configure(config)
    app[STREAMS].end_unauthorized(app[AUTHORIZATION].may_continue)
    log.info("reloaded %s: tokens, origins and certificates", config.source)
    for warning in preflight.scope_warnings(config):
        log.warning("%s", warning)
    changed = [
        name
        for name in ("server", "limits", "events", "plugins", "scenarios")
        if getattr(config, name) != getattr(before, name)
    ]
    if changed:
        log.warning("changes of %s need a restart", ", ".join(f"[{name}]" for name in changed))
