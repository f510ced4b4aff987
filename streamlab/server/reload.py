"""What a running server takes from a changed configuration: tokens and scopes, origins, certificates."""

import asyncio
import logging
import os
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from aiohttp import web

from streamlab.config import CONFIG, Config, ConfigError, Fault
from streamlab.streaming.drain import STREAMS
from streamlab.threads import Threads

from . import preflight
from .authorization import AUTHORIZATION, is_open, load_verifier
from .cors import CORS
from .sessions import SESSIONS
from .site import REGISTRY

if TYPE_CHECKING:
    from .json_web_tokens import JsonWebTokens

log = logging.getLogger(__name__)


def hold_reload_requests() -> None:
    """Let a SIGHUP wait until `reload_requests` accepts it: by default it ends a process, as one that still starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


class Terminal:
    """The terminal in which a process was started, if there is one."""

    def __init__(self) -> None:
        self._descriptor = next(filter(os.isatty, (0, 1, 2)), None)

    def is_closed(self) -> bool:
        """Return whether there was one that has been closed: that is the other reason for a SIGHUP."""
        return self._descriptor is not None and not os.isatty(self._descriptor)


@contextmanager
def reload_requests() -> Iterator[asyncio.Event]:
    """Yield an event that every SIGHUP in the block sets, and one that came since `hold_reload_requests`.

    A SIGHUP since the terminal was closed stops the process, as SIGTERM does.
    """
    requested, loop, terminal = asyncio.Event(), asyncio.get_running_loop(), Terminal()

    def request(*_: object) -> None:
        if terminal.is_closed():
            signal.raise_signal(signal.SIGTERM)
        else:
            loop.call_soon_threadsafe(requested.set)

    before = signal.signal(signal.SIGHUP, request)
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield requested
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        signal.signal(signal.SIGHUP, before)


@asynccontextmanager
async def reloading(
    requested: asyncio.Event,
    app: web.Application,
    tls: ssl.SSLContext | None,
    read: Callable[[], Config] | None,
    restart: Callable[[], None] | None = None,
    taking: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> AsyncIterator[None]:
    """Take the configuration that `read` returns at every request in the block; without `read`, ignore requests.

    `restart` is called, if it is given, where a change needs a restart; a configuration is taken in the context of
    `taking`.
    """
    async with Threads("reload", 1) as threads, asyncio.TaskGroup() as group:
        task = group.create_task(_reload_when(requested, app, tls, read, restart, taking, threads))
        yield
        task.cancel()


async def _reload_when(
    requested: asyncio.Event,
    app: web.Application,
    tls: ssl.SSLContext | None,
    read: Callable[[], Config] | None,
    restart: Callable[[], None] | None,
    taking: Callable[[], AbstractContextManager[None]],
    threads: Threads,
) -> None:
    while True:
        await requested.wait()
        requested.clear()
        if read is not None:
            with taking():
                await reload(app, tls, read, restart, threads)


async def reload(
    app: web.Application,
    tls: ssl.SSLContext | None,
    read: Callable[[], Config],
    restart: Callable[[], None] | None,
    threads: Threads,
) -> None:
    """Take tokens, origins and certificates of a changed configuration; one with faults is logged and not taken.

    Streams that are still allowed go on, and others end at once. Tables that only a start reads stay in force: where
    they have changed, `restart` is called, or without it a warning is logged.
    """

    def checked() -> "tuple[Config, ssl.SSLContext | None, JsonWebTokens | None]":
        config = read()
        found = [*config.faults, *app[REGISTRY].faults(config), *opening_faults(config, app[AUTHORIZATION].is_open)]
        try:
            context, verifier = preflight.startable(config), load_verifier(config)
        except ConfigError as error:
            raise ConfigError([*found, *error.faults]) from None
        if found:
            raise ConfigError(found)
        return config, context, verifier

    try:
        config, context, verifier = await threads.run(checked)
    except ConfigError as error:
        for fault in error.faults:
            log.error("%s", fault)
        log.error("the configuration is not reloaded: what was in force before still is")
        return
    changed = ", ".join(f"[{name}]" for name in _changed_for_a_start(app[CONFIG], config))
    if changed and restart is not None:
        log.info("restarting with the changes of %s", changed)
        restart()
        return
    if tls is not None and context is not None:
        _replace_certificate(tls, context)
    app[AUTHORIZATION].configure(config, verifier)
    app[SESSIONS].configure(config)
    app[CORS].configure(config)
    await app[STREAMS].end_unauthorized(app[AUTHORIZATION].deciding())
    log.info("reloaded %s: tokens, origins and certificates", config.source)
    for warning in preflight.scope_warnings(config):
        log.warning("%s", warning)
    if changed:
        log.warning("changes of %s need a restart", changed)


def opening_faults(config: Config, is_open_now: bool) -> Iterator[Fault]:
    """Yield a fault if a server that restricts its clients would be open only because nothing restricts them any more.

    That may be a file that was removed, or is being written; or its `host` has become a loopback address, while the
    server still listens on another.
    """
    if is_open(config) and config.auth.open is None and not is_open_now:
        reason = (
            "nothing says any more who may do what: set open = true to let everybody do everything, or restart the "
            "server"
        )
        yield config.fault(("auth",), reason)


def _changed_for_a_start(before: Config, after: Config) -> list[str]:
    """Return the tables that differ in what only a start reads: other files of TLS are read by a reload, too."""

    def read(config: Config) -> dict[str, Any]:
        uses_tls = config.server.tls_certificate is not None
        server = config.server.model_dump(exclude={"tls_certificate", "tls_key"}) | {"tls": uses_tls}
        tables = {name: getattr(config, name) for name in ("limits", "events", "plugins", "scenarios")}
        return {"server": server, **tables}

    old, new = read(before), read(after)
    return [name for name in old if old[name] != new[name]]


def _replace_certificate(tls: ssl.SSLContext, newer: ssl.SSLContext) -> None:
    """Let new handshakes of a context use the certificate and key of a newer one, which has been checked as a whole.

    `load_cert_chain` on the context in use would read the files once more: a file that has changed since the check
    would leave it with a certificate and another's key. OpenSSL calls this function for clients without SNI, too.
    """

    def use_newer(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = newer

    tls.sni_callback = use_newer
