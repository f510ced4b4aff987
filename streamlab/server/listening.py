"""The address on which the server listens: a TCP port, or a Unix socket with its file."""

import asyncio
import errno
import fcntl
import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from streamlab.config import Config, ConfigError

log = logging.getLogger(__name__)

ACCEPTS = 64
"""Maximum number of connections accepted in one iteration of the event loop: a burst delays others by milliseconds."""

YIELD_SECONDS = 0.001
"""Time in which a worker with fewer connections can accept one, before this one does, in seconds."""

EXHAUSTED_SECONDS = 1.0
"""Time until it is tried again to accept connections where there are too many open files, in seconds."""

BACKLOG = 1024
"""Maximum number of connections that wait in the kernel to be accepted; TCP of another client retries after 1 s."""

SOCKET_MODE = 0o660
"""Permissions of the file of a Unix socket, whatever the umask: its user and its group may connect."""

RETRY_SECONDS = 0.01
"""Interval at which a server looks whether another one has ended to bind a socket in the same folder, in seconds."""


class Listening:
    """The listening sockets of a server, and the file of a Unix socket, unless another process is its owner."""

    def __init__(self, config: Config, sockets: Sequence[socket.socket], *, owns_file: bool = True) -> None:
        self.sockets = sockets
        path, self.address = config.server.socket, config.server.host
        """The address that clients connect to, as `http://127.0.0.1:8000` or `unix:/run/streamlab.sock`."""
        if path is None:
            host, port = sockets[0].getsockname()[:2]
            scheme = "http" if config.server.tls_certificate is None else "https"
            self.address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        self._path = path if owns_file else None
        self._file = None if path is None else _identity(path)

    def remove_file(self) -> None:
        """Remove the file of the socket, while this is open: then no other file can have its number."""
        if self.sockets[0].fileno() >= 0 and self._path is not None and _identity(self._path) == self._file:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the sockets of this process, after the file is removed; those of other processes stay open."""
        self.remove_file()
        for bound in self.sockets:
            bound.close()


def listen(config: Config) -> Listening | None:
    """Listen on the address of a configuration; None while another server binds a socket in the same folder. Blocks.

    Raises ConfigError where that is impossible. What connects waits until something accepts it.
    """
    path = config.server.socket
    try:
        if path is None:
            return Listening(config, _bind_port(config.server.host, config.server.port))
        return None if (bound := _bind_file(path)) is None else Listening(config, [bound])
    except OSError as error:
        raise _cannot_listen(config, error) from None


async def listening(config: Config) -> Listening:
    """Listen as `listen` does, once no other server binds a socket in the same folder."""
    while (found := listen(config)) is None:  # noqa: ASYNC110 - of another process
        await asyncio.sleep(RETRY_SECONDS)
    return found


class Acceptor:
    """What accepts the connections of this process, and lets another worker go first that has fewer of them.

    Whoever is awake first would get most of them: the kernel wakes every process that waits for the same socket.
    """

    def __init__(
        self, protocol: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None, is_ahead: Callable[[int], bool]
    ) -> None:
        self._protocol, self._tls, self._is_ahead = protocol, tls, is_ahead
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}
        self._beginning: set[asyncio.Task[Any]] = set()
        """What makes connections of those that were accepted."""

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accept the connections of listening sockets."""
        for listener in sockets:
            listener.setblocking(False)
            self._sockets.append(listener)
            self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket, *, others_had_time: bool = False) -> None:
        for _ in range(ACCEPTS):
            if not others_had_time and self._is_ahead(len(self._beginning)):
                self._pause(listener, YIELD_SECONDS)
                return
            others_had_time = False
            try:
                accepted, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.error("cannot accept connections for %g s: %s", EXHAUSTED_SECONDS, error.strerror)
                self._pause(listener, EXHAUSTED_SECONDS)
                return
            accepted.setblocking(False)
            task = self._loop.create_task(self._begin(accepted))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def _begin(self, accepted: socket.socket) -> None:
        # A handshake of TLS that fails is not an error of the server.
        with suppress(OSError):
            await self._loop.connect_accepted_socket(self._protocol, accepted, ssl=self._tls)

    def _pause(self, listener: socket.socket, seconds: float) -> None:
        self._loop.remove_reader(listener)
        self._paused[listener] = self._loop.call_later(seconds, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        del self._paused[listener]
        self._loop.add_reader(listener, self._accept, listener)
        self._accept(listener, others_had_time=True)

    async def stop(self) -> None:
        """Accept no more, after what was accepted has become a connection that ends as all do."""
        self._stop()
        await asyncio.sleep(0)

    def _stop(self) -> None:
        for listener in self._sockets:
            self._loop.remove_reader(listener)
            listener.close()
        for timer in self._paused.values():
            timer.cancel()
        self._sockets.clear()
        self._paused.clear()

    def close(self) -> None:
        """Close the listening sockets of this process, and give up what has not become a connection."""
        self._stop()
        for task in self._beginning:
            task.cancel()


@contextmanager
def accepting(
    sockets: Sequence[socket.socket],
    protocol: Callable[[], asyncio.Protocol],
    tls: ssl.SSLContext | None,
    is_ahead: Callable[[int], bool] = lambda accepted: False,
) -> Iterator[Acceptor]:
    """Accept connections of listening sockets during the block, and close the sockets after it.

    `is_ahead` is called with the number of those that were accepted and are no connections yet; it returns whether this
    process has more than others.
    """
    acceptor = Acceptor(protocol, tls, is_ahead)
    acceptor.start(sockets)
    try:
        yield acceptor
    finally:
        acceptor.close()


def _cannot_listen(config: Config, error: OSError) -> ConfigError:
    host, port = config.server.host, config.server.port
    if error.errno == errno.EADDRINUSE and config.server.socket is not None:
        return ConfigError([config.fault(("server", "host"), "another server listens on it", host)])
    if error.errno == errno.EADDRINUSE:
        free = port + 1 if port < 65535 else 8000
        reason = f"another program listens on {host}:{port}; stop it, or use another port (--port {free})"
        return ConfigError([config.fault(("server", "port"), reason, port)])
    return ConfigError([config.fault(("server", "host"), f"cannot listen on it: {error.strerror or error}", host)])


def _bind_port(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address of a host, bound to a port, as asyncio binds them."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with ExitStack() as failed:
        sockets = []
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                bound = failed.enter_context(socket.socket(family, kind, protocol))
            except OSError:
                continue  # a system without IPv6
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # of 0.0.0.0 there is another one
            bound.bind(address)
            bound.listen(BACKLOG)  # or another server could bind the same port
            sockets.append(bound)
        failed.pop_all()
        return sockets


# -- the file of a Unix socket


def _bind_file(path: Path) -> socket.socket | None:
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
