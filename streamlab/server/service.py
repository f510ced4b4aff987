"""What a server reports to systemd, if that has started it: sd_notify(3) and sd_watchdog_enabled(3)."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager

log = logging.getLogger(__name__)


class Service:
    """The connection with the service manager; without one, reports go nowhere.

    It is taken out of the variables of this process, so that no child reports in its place.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        self._address = environ.pop("NOTIFY_SOCKET", "")
        period, process = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        is_watched = bool(self._address) and period.isdecimal() and process in ("", str(os.getpid()))
        self.alive_seconds = int(period) / 2_000_000 if is_watched else None
        """Interval at which it expects `alive`: half of the time after which it kills this process; None for never."""

    def ready(self, status: str) -> None:
        """Report that the server serves, for the first time or after `reloading`."""
        self._notify("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Report that a changed configuration is being taken, until `ready`."""
        self._notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Report that the server stops."""
        self._notify("STOPPING=1")

    def alive(self) -> None:
        """Report that this process works."""
        self._notify("WATCHDOG=1")

    @contextmanager
    def reload(self, status: str) -> Iterator[None]:
        """Report that a changed configuration is taken in the block."""
        self.reloading()
        try:
            yield
        finally:
            self.ready(status)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Report in the block, as often as expected, that the event loop runs."""
        async with asyncio.TaskGroup() as group:
            reporting = group.create_task(self._report_alive())
            yield
            reporting.cancel()

    async def _report_alive(self) -> None:
        while self.alive_seconds is not None:
            self.alive()
            await asyncio.sleep(self.alive_seconds)

    def _notify(self, *lines: str) -> None:
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            log.warning("%s: cannot notify the service manager of %s: %s", self._address, lines[0], error.strerror)
