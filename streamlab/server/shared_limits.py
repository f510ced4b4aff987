"""What clients use of all workers together: counts and buckets of requests, in files that every worker has mapped."""

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, sha256
from pathlib import Path

from streamlab.tally import Shared, Tally

from .limits import Buckets
from .worker import Worker

_SETS, _WAYS = 4096, 8
"""Clients of a table: each has its place in one set, which has room for a number of them."""

_DIGEST = 16
"""Bytes of the digest that stands for a client."""

_HEADER = 64
"""Bytes before the first set."""

_FREE = bytes(_DIGEST)


def _digest(client: str) -> bytes:
    return blake2b(client.encode(errors="surrogatepass"), digest_size=_DIGEST).digest()


class _Table:
    """Values of `width` bytes by the digest of their client."""

    def __init__(self, path: Path, width: int) -> None:
        self._entry = _DIGEST + width
        size = _HEADER + _SETS * _WAYS * self._entry
        with path.open("a+b") as file:
            file.truncate(size)
            self.memory = mmap.mmap(file.fileno(), size)

    def set_of(self, digest: bytes) -> tuple[int, int]:
        """Return where the set of a client begins and ends."""
        start = _HEADER + int.from_bytes(digest[:4], "big") % _SETS * _WAYS * self._entry
        return start, start + _WAYS * self._entry

    def find(self, digest: bytes) -> int | None:
        """Return where the value of a client is."""
        start, end = self.set_of(digest)
        found = self.memory.find(digest, start, end)
        return None if found < 0 else found + _DIGEST

    def entries(self, digest: bytes) -> range:
        """Return where the entries begin that a client can have."""
        start, end = self.set_of(digest)
        return range(start, end, self._entry)


_COUNT = struct.Struct("=I")


class SharedTally(Tally):
    """Counts by client, in all workers: each writes its own table, and reads those of the others.

    A count is written before those of the others are read, so that two workers never admit what only one of them may.
    The table of a worker that has died is not counted any more. (Where more than eight clients have the same one of
    4096 places, some are counted by each worker for itself.)
    """

    is_shared = True

    def __init__(self, worker: Worker, what: str) -> None:
        super().__init__()
        self._worker, self._what = worker, what
        self._own = self._open(worker.row.number)
        memory = self._own.memory
        memory[:] = bytes(len(memory))
        memory[:4] = _COUNT.pack(worker.process)
        self._others: dict[int, _Table] = {}

    def _open(self, number: int) -> _Table:
        return _Table(self._worker.folder / f"{self._what}-{number}", _COUNT.size)

    def add(self, client: str, limit: int, count: int = 1) -> bool:
        """Count more of a client, unless it would have more than `limit` in all workers together."""
        if not super().add(client, limit, count):
            return False
        digest = _digest(client)
        self._publish(client, digest)
        if self._counts[client] + sum(self._elsewhere(digest)) <= limit:
            return True
        self.remove(client, count)
        return False

    def remove(self, client: str, count: int = 1) -> None:
        """Count less of a client."""
        super().remove(client, count)
        self._publish(client, _digest(client))

    def total(self, client: str) -> int:
        """Return the number of a client in all workers together."""
        return super().total(client) + sum(self._elsewhere(_digest(client)))

    def _publish(self, client: str, digest: bytes) -> None:
        count, memory = super().total(client), self._own.memory
        place = self._own.find(digest)
        if place is None:
            for entry in self._own.entries(digest):
                if memory[entry : entry + _DIGEST] == _FREE:
                    memory[entry : entry + _DIGEST + _COUNT.size] = digest + _COUNT.pack(count)
                    return
        elif count:
            memory[place : place + _COUNT.size] = _COUNT.pack(count)
        else:
            memory[place - _DIGEST : place + _COUNT.size] = _FREE + _COUNT.pack(0)

    def _elsewhere(self, digest: bytes) -> Iterator[int]:
        for row in self._worker.others:
            table = self._others.get(row.number)
            if table is None:
                table = self._others[row.number] = self._open(row.number)
            if row.process and _COUNT.unpack_from(table.memory)[0] == row.process:
                place = table.find(digest)
                if place is not None:
                    yield _COUNT.unpack_from(table.memory, place)[0]


class SharedByWorkers(Shared):
    """What a worker shares with the others."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.folder = worker.folder

    def tally(self, what: str) -> Tally:
        """Return counts of all workers together."""
        return SharedTally(self._worker, f"tally-{sha256(what.encode()).hexdigest()[:16]}")


_BUCKET = struct.Struct("=dd")


class SharedBuckets(Buckets):
    """Buckets of requests of all workers; the one of a set that was used the longest time ago is replaced first."""

    def __init__(self, worker: Worker) -> None:
        path = worker.folder / "requests"
        self._table = _Table(path, _BUCKET.size)
        self._locks = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        """Descriptor of the file, of which the first byte of a set is locked; open as long as this process runs."""

    @contextmanager
    def bucket(self, client: str, full: tuple[float, float]) -> Iterator[list[float]]:
        """Yield the bucket of a client, which no other worker can change meanwhile."""
        digest, memory = _digest(client), self._table.memory
        start, _ = self._table.set_of(digest)
        # Held for microseconds, and released by the kernel if this process dies.
        fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, start)
        try:
            place = self._table.find(digest)
            if place is None:
                entries = self._table.entries(digest)
                place = _DIGEST + min(entries, key=lambda entry: _BUCKET.unpack_from(memory, entry + _DIGEST)[1])
                memory[place - _DIGEST : place + _BUCKET.size] = digest + _BUCKET.pack(*full)
            bucket = list(_BUCKET.unpack_from(memory, place))
            yield bucket
            memory[place : place + _BUCKET.size] = _BUCKET.pack(*bucket)
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, start)
