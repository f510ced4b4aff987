"""The address on which the server listens: a TCP port, or a Unix socket with its file."""

import asyncio
import errno
import fcntl
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from streamlab.config import Config, ConfigError

ACCEPTS = 64
"""Maximum number of connections accepted in one iteration of the event loop: a burst delays others by milliseconds.

asyncio takes it from `backlog`, which also is the length of the kernel's queue until it is set to BACKLOG.
"""

BACKLOG = 1024
"""Maximum number of connections that wait in the kernel to be accepted; TCP of another client retries after 1 s."""

SOCKET_MODE = 0o660
"""Permissions of the file of a Unix socket, whatever the umask: its user and its group may connect."""

RETRY_SECONDS = 0.01
"""Interval at which a server looks whether another one has ended to bind a socket in the same folder, in seconds."""


class Listener:
    """The listening sockets of the server, and the file of a Unix socket."""

    def __init__(self, server: asyncio.Server, address: str, path: Path | None) -> None:
        self.address = address
        """The address that clients connect to, as `http://127.0.0.1:8000` or `unix:/run/streamlab.sock`."""
        self._server = server
        self._path = path
        self._file = None if path is None else _identity(path)

    async def stop(self) -> None:
        """Close the listening sockets, after what was accepted has become a connection that ends as all do.

        asyncio accepts in one iteration of the loop and attaches the connection to the listener in the next, which
        fails in silence if the listener was closed in between.
        """
        self._remove_file()
        for listening in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listening)
        await asyncio.sleep(0)
        self._server.close()

    def close(self) -> None:
        """Close the listening sockets, if they still are open."""
        self._remove_file()
        self._server.close()

    def _remove_file(self) -> None:
        """Remove the file of the socket, while this is open: then no other file can have its number."""
        if self._server.is_serving() and self._path is not None and _identity(self._path) == self._file:
            self._path.unlink(missing_ok=True)


@asynccontextmanager
async def listening(
    config: Config, protocol: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None
) -> AsyncIterator[Listener]:
    """Listen on the address of a configuration during the block; raises ConfigError where that is impossible."""
    path, loop = config.server.socket, asyncio.get_running_loop()
    try:
        if path is not None:
            server = await loop.create_server(protocol, sock=await _bound(path), ssl=tls, backlog=ACCEPTS)
            address = config.server.host
        else:
            host, port = config.server.host, config.server.port
            server = await loop.create_server(protocol, host, port, ssl=tls, backlog=ACCEPTS)
            host, port = server.sockets[0].getsockname()[:2]
            address = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    except OSError as error:
        raise _cannot_listen(config, error) from None
    listener = Listener(server, address, path)
    try:
        for listening in server.sockets:
            with socket.socket(fileno=os.dup(listening.fileno())) as duplicate:
                duplicate.listen(BACKLOG)
        yield listener
    finally:
        listener.close()


def _cannot_listen(config: Config, error: OSError) -> ConfigError:
    host, port = config.server.host, config.server.port
    if error.errno == errno.EADDRINUSE and config.server.socket is not None:
        return ConfigError([config.fault(("server", "host"), "another server listens on it", host)])
    if error.errno == errno.EADDRINUSE:
        free = port + 1 if port < 65535 else 8000
        reason = f"another program listens on {host}:{port}; stop it, or use another port (--port {free})"
        return ConfigError([config.fault(("server", "port"), reason, port)])
    return ConfigError([config.fault(("server", "host"), f"cannot listen on it: {error.strerror or error}", host)])


# -- the file of a Unix socket


async def _bound(path: Path) -> socket.socket:
    """Return a socket that listens on a path; raises OSError, EADDRINUSE where another server listens on it."""
    while (bound := _bind(path)) is None:  # noqa: ASYNC110 - of another process
        await asyncio.sleep(RETRY_SECONDS)
    return bound


def _bind(path: Path) -> socket.socket | None:
    """Return a socket that listens on a path, None while another server binds one in its folder.

    The file of a server that has died is replaced. The folder is locked meanwhile: of two servers that start, one would
    remove the file of the other. Permissions are set before anybody can connect.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _is_locked(folder):
            return None
        if _identity(path) is not None and not _has_listener(path):
            path.unlink()
        bound = socket.socket(socket.AF_UNIX)
        try:
            bound.bind(os.fspath(path))
            path.chmod(SOCKET_MODE)
            bound.listen(BACKLOG)
        except BaseException:
            bound.close()
            raise
        return bound
    finally:
        os.close(folder)


def _is_locked(folder: int) -> bool:
    """Lock a folder until its descriptor is closed; return whether that was possible."""
    with suppress(BlockingIOError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _has_listener(path: Path) -> bool:
    """Return whether a server listens on a socket; its queue may be full."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True
        return True


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what identifies the file of a socket; None where there is no socket at a path."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None
