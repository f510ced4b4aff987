"""The files that export tasks write: each gets its name when it is complete, has a maximum age, and fits a budget."""

import asyncio
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from streamlab import Problem, Threads

log = logging.getLogger(__name__)

THREADS = 4
"""Threads that write and delete files of exports."""

TIDY_SECONDS = 60.0
"""Maximum interval between two deletions of what is too old, in seconds."""

GRANT_BYTES = 16 * 1024 * 1024
"""Bytes that a file may grow by before the whole folder is measured again."""

PREFIX = ".unfinished-"
"""How names of files begin that are being written, or that a process that died has left."""

_KEPT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}-[0-9a-f]{32}\.[a-z0-9]{1,16}")
"""Names of files of export tasks: NAME-TASK.FORMAT. No other file of the folder is ever deleted."""


class Files:
    """The folder of one or several servers' export tasks.

    A file is deleted `keep_seconds` after it was completed. All files together have up to `keep_bytes`, and about
    GRANT_BYTES more for each that is being written: beyond, an export fails, because deleting a file of another task
    before its time would break what its client was promised. What a process that died has left is deleted at the next
    start, and within TIDY_SECONDS where other processes use the folder; a lock tells it from what is being written.
    """

    def __init__(self, folder: Path, *, keep_seconds: float, keep_bytes: int) -> None:
        self._folder = folder
        self._keep_seconds = keep_seconds
        self._keep_bytes = keep_bytes
        self._threads = Threads("export-files", THREADS)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Delete what nobody needs any more, at once and from time to time while the block lasts."""
        async with self._threads:
            await self._threads.run(self._tidy)
            async with asyncio.TaskGroup() as group:
                tidying = group.create_task(self._keep_tidy())
                try:
                    yield
                finally:
                    tidying.cancel()

    @asynccontextmanager
    async def writing(self, name: str) -> AsyncIterator["Writing"]:
        """Yield a new file that gets its name by `keep`; one that the block leaves without is deleted.

        Raises Problem 507 where the disk or the budget has no capacity.
        """
        file = await self._threads.run(_Unfinished, self._folder, name, discard=_Unfinished.close)
        try:
            yield Writing(file, self, self._threads)
        finally:
            await self._threads.finish(file.close)

    def capacity(self, but: Path) -> int:
        """Return how many bytes a file may have, considering all others; runs in a thread, raises Problem 507."""
        others = [entry for entry in self._entries() if entry.name != but.name]
        capacity = self._keep_bytes - sum(status.st_size for _, status in _statuses(others))
        if capacity <= 0:
            raise self.full()
        return capacity

    def full(self) -> Problem:
        """Make the error response of an export that does not fit into the budget; runs in a thread."""
        detail = f"The files of exports have {self._keep_bytes // 1_000_000} MB, which is all they may have (keep_mb)"
        kept = (status.st_mtime for entry, status in _statuses(self._entries()) if not entry.name.startswith(PREFIX))
        if (oldest := min(kept, default=None)) is not None:
            expires = datetime.fromtimestamp(oldest + self._keep_seconds, UTC)
            detail += f"; the oldest is deleted at {expires.isoformat(timespec='seconds')}"
        return Problem(507, f"{detail}.")

    async def _keep_tidy(self) -> None:
        while True:
            await asyncio.sleep(min(TIDY_SECONDS, self._keep_seconds / 2))
            await self._threads.run(self._tidy)

    def _tidy(self) -> None:
        """Delete files that are too old, and those of processes that died; runs in a thread."""
        before = time.time() - self._keep_seconds
        for entry, status in _statuses(self._entries()):
            try:
                if entry.name.startswith(PREFIX):
                    if _delete_if_abandoned(Path(entry.path)):
                        log.info("deleted %s, which a process that died has left", entry.name)
                elif status.st_mtime < before:
                    Path(entry.path).unlink()
                    log.info("deleted %s, which is older than %g s", entry.name, self._keep_seconds)
            except FileNotFoundError:
                pass  # another process was first
            except OSError as error:
                log.warning("the file %s cannot be deleted: %s", entry.name, error.strerror)

    def _entries(self) -> list["os.DirEntry[str]"]:
        try:
            with os.scandir(self._folder) as entries:
                return [entry for entry in entries if entry.name.startswith(PREFIX) or _KEPT.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("the folder of exports cannot be read: %s", error.strerror)
            return []


class Writing:
    """A file being written, from the event loop."""

    def __init__(self, file: "_Unfinished", files: Files, threads: Threads) -> None:
        self._file = file
        self._files = files
        self._threads = threads
        self._granted = 0
        self.name = file.name

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._file.size

    @property
    def sha256(self) -> str:
        """Digest of the bytes written, in hexadecimal."""
        return self._file.digest.hexdigest()

    async def write(self, data: bytes) -> None:
        """Add bytes; raises Problem 507 where the disk or the budget has no capacity for them."""
        await self._threads.run(self._write, data)

    def _write(self, data: bytes) -> None:
        size = self._file.size + len(data)
        if size > self._granted:
            capacity = self._files.capacity(self._file.path)
            if size > capacity:
                raise self._files.full()
            self._granted = min(capacity, size + GRANT_BYTES)
        self._file.write(data)

    async def keep(self) -> None:
        """Give the file its name, once all of it is on the disk; raises Problem 507."""
        await self._threads.run(self._file.keep)


class _Unfinished:
    """A locked file without its name yet. Its methods wait for the disk: they belong into threads."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.size = 0
        self.digest = hashlib.sha256()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, self.path = _locked(folder)
        except OSError as error:
            raise _refused(error) from None

    def write(self, data: bytes) -> None:
        """Add bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            raise _refused(error) from None
        self.digest.update(data)
        self.size += len(data)

    def keep(self) -> None:
        """Give it its name, once all of it is on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self.path.chmod(0o644)
            self.path.replace(self.path.with_name(self.name))
        except OSError as error:
            raise _refused(error) from None

    def close(self) -> None:
        """Close it, which unlocks it; what was not kept is deleted."""
        try:
            self._file.close()
        except OSError:
            pass  # what could not be flushed has been reported by `write` or `keep`
        finally:
            self.path.unlink(missing_ok=True)


def _locked(folder: Path) -> tuple[BinaryIO, Path]:
    """Create a file that is locked while it is open: the lock ends with its process, whatever ends that."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=PREFIX)
        path = Path(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return os.fdopen(descriptor, "wb"), path
        except (BlockingIOError, FileNotFoundError):
            pass  # another process took it for abandoned before it was locked
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise
        os.close(descriptor)


def _delete_if_abandoned(path: Path) -> bool:
    """Delete an unfinished file that no process holds locked; return whether it was one. Raises OSError."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return False
        path.unlink()
        return True


def _refused(error: OSError) -> Problem:
    return Problem(507, f"The file cannot be written: {error.strerror}.")


def _statuses(entries: list["os.DirEntry[str]"]) -> Iterator[tuple["os.DirEntry[str]", os.stat_result]]:
    """Yield the entries that are regular files still, with their status."""
    for entry in entries:
        try:
            if entry.is_file(follow_symlinks=False):
                yield entry, entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
