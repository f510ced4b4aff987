"""Leases among the processes of one machine: locked files, which the kernel unlocks when their process ends."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from streamlab.threads import Threads

LOCK_SECONDS = 0.01
"""Interval between two attempts to get a lock that another process has, in seconds."""


class Leases:
    """The leases that this process holds, as files in a folder, which is created with the first."""

    def __init__(self, folder: Path, threads: Threads) -> None:
        self._folder = folder
        self._threads = threads
        self._held: dict[str, int] = {}
        """Descriptor of each locked file."""

    async def hold(self, lease: str) -> bool:
        """Take or renew a lease; return whether this process holds it."""
        if lease in self._held:
            if self._is_in_place(lease, self._held[lease]):  # two system calls of a microsecond each
                return True
            self.release(lease)  # its file was deleted, and another process can lock a new one
            return False
        descriptor = await self._threads.run(self._lock, lease, discard=partial(self._unlock, lease))
        if descriptor is None:
            return False
        self._held[lease] = descriptor
        return True

    def holds(self, lease: str) -> bool:
        """Return whether this process holds a lease, as far as it knows."""
        return lease in self._held

    def release(self, lease: str) -> None:
        """Release a lease."""
        self._unlock(lease, self._held.pop(lease, None))

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock of this folder in the block; block this thread until it is free."""
        while (descriptor := self._lock(name)) is None:
            time.sleep(LOCK_SECONDS)
        try:
            yield
        finally:
            self._unlock(name, descriptor)

    def _is_in_place(self, lease: str, descriptor: int) -> bool:
        """Return whether the file of a lease is still the one that is locked."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), self._file(lease).stat())
        return False

    def close(self) -> None:
        """Release all leases."""
        for lease in tuple(self._held):
            self.release(lease)

    def _lock(self, lease: str) -> int | None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._file(lease)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_in_place(lease, descriptor):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            os.close(descriptor)  # it was released meanwhile, and its file is deleted: this lock is void

    def _unlock(self, lease: str, descriptor: int | None) -> None:
        """Unlock a file that `_lock` has locked."""
        if descriptor is not None:
            if self._is_in_place(lease, descriptor):
                self._file(lease).unlink(
                    missing_ok=True
                )  # or files would pile up: many leases have names that are used once
            os.close(descriptor)

    def _file(self, lease: str) -> Path:
        name = re.sub(r"[^A-Za-z0-9]+", "-", lease)[:40]
        digest = hashlib.sha256(lease.encode()).hexdigest()[:12]
        return self._folder / f"{name}-{digest}"
