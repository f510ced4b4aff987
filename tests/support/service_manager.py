"""The socket of a service manager, as systemd gives one to a service of Type=notify."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator


class ServiceManager:
    """Receives what processes report, with their ids, which the kernel adds."""

    def __init__(self, bound: socket.socket, address: str) -> None:
        self._socket = bound
        self.environ = {"NOTIFY_SOCKET": address}

    def receive(self) -> tuple[int, dict[str, str]]:
        """Return the process and the assignments of the next report."""
        data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(struct.calcsize("3i")))
        ((_, _, credentials),) = ancillary
        process, _, _ = struct.unpack("3i", credentials)
        return process, dict(line.split("=", 1) for line in data.decode().split("\n"))

    def next(self, name: str) -> tuple[int, dict[str, str]]:
        """Return the next report that is not WATCHDOG=1, which is an assignment to a name."""
        while "WATCHDOG" in (report := self.receive())[1]:
            pass
        assert name in report[1], report
        return report


@contextlib.contextmanager
def service_manager(address: str) -> Iterator[ServiceManager]:
    """Yield a service manager at the path of a socket, or with "@" at an abstract name (unix(7))."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        bound.settimeout(20)
        bound.bind(f"\0{address[1:]}" if address[0] == "@" else os.fspath(address))
        yield ServiceManager(bound, address)
