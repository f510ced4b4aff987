"""The files of export tasks: each is renamed when it is complete, has a maximum age, and counts toward a budget."""

import asyncio
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from streamlab import Problem, Threads

log = logging.getLogger(__name__)

THREADS = 4
"""Number of threads that write and delete files of exports."""

CLEANUP_SECONDS = 60.0
"""Maximum interval between two deletions of old files, in seconds."""

GRANT_BYTES = 16 * 1024 * 1024
"""Bytes that a file may grow by before the folder is measured again."""

PREFIX = ".unfinished-"
"""Prefix of the names of files that are being written, or that a dead process has left behind."""

_COMPLETE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}-[0-9a-f]{32}\.[a-z0-9]{1,16}")
"""Names of complete files of export tasks: NAME-TASK.FORMAT. No other file of the folder is ever deleted."""


class Files:
    """The folder of one or several servers' export tasks.

    A file is deleted `keep_seconds` after its completion. All files together have up to `keep_bytes`, and about
    GRANT_BYTES more for each that is being written: beyond, an export fails, because deleting a file of another task
    early would break the promise to its client. What a dead process has left is deleted at the next start, and
    within CLEANUP_SECONDS where other processes use the folder; a lock marks the files that are being written.
    """

    def __init__(self, folder: Path, *, keep_seconds: float, keep_bytes: int) -> None:
        self._folder = folder
        self._keep_seconds = keep_seconds
        self._keep_bytes = keep_bytes
        self._threads = Threads("export-files", THREADS)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Delete old and abandoned files, at once and periodically during the block."""
        async with self._threads:
            await self._threads.run(self._clean_up)
            async with asyncio.TaskGroup() as group:
                cleaning = group.create_task(self._clean_up_periodically())
                try:
                    yield
                finally:
                    cleaning.cancel()

    @asynccontextmanager
    async def writing(self, name: str) -> AsyncIterator["Writing"]:
        """Yield a new file that gets its name by `commit`; without that, it is deleted after the block.

        Raises Problem 507 if the disk or the budget has no capacity.
        """
        file = await self._threads.run(_Unfinished, self._folder, name, discard=_Unfinished.close)
        try:
            yield Writing(file, self, self._threads)
        finally:
            await self._threads.finish(file.close)

    def capacity(self, but: Path) -> int:
        """Return the maximum size of a file in bytes, given all others; runs in a thread, raises Problem 507."""
        others = [entry for entry in self._entries() if entry.name != but.name]
        capacity = self._keep_bytes - sum(status.st_size for _, status in _statuses(others))
        if capacity <= 0:
            raise self.over_budget()
        return capacity

    def over_budget(self) -> Problem:
        """Return the error response of an export that exceeds the budget; runs in a thread."""
        detail = f"The files of exports have reached their limit of {self._keep_bytes // 1_000_000} MB (keep_mb)"
        completed = (
            status.st_mtime for entry, status in _statuses(self._entries()) if not entry.name.startswith(PREFIX)
        )
        if (oldest := min(completed, default=None)) is not None:
            expires = datetime.fromtimestamp(oldest + self._keep_seconds, UTC)
            detail += f"; the oldest is deleted at {expires.isoformat(timespec='seconds')}"
        return Problem(507, f"{detail}.")

    async def _clean_up_periodically(self) -> None:
        while True:
            await asyncio.sleep(min(CLEANUP_SECONDS, self._keep_seconds / 2))
            await self._threads.run(self._clean_up)

    def _clean_up(self) -> None:
        """Delete files that are too old, and those of dead processes; runs in a thread."""
        before = time.time() - self._keep_seconds
        for entry, status in _statuses(self._entries()):
            try:
                if entry.name.startswith(PREFIX):
                    if _delete_if_abandoned(Path(entry.path)):
                        log.info("deleted %s, left by a process that died", entry.name)
                elif status.st_mtime < before:
                    Path(entry.path).unlink()
                    log.info("deleted %s, older than %g s", entry.name, self._keep_seconds)
            except FileNotFoundError:
                pass  # another process was first
            except OSError as error:
                log.warning("the file %s cannot be deleted: %s", entry.name, error.strerror)

    def _entries(self) -> list["os.DirEntry[str]"]:
        try:
            with os.scandir(self._folder) as entries:
                return [entry for entry in entries if entry.name.startswith(PREFIX) or _COMPLETE.fullmatch(entry.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("the folder of exports cannot be read: %s", error.strerror)
            return []


class Writing:
    """A file being written; used on the event loop."""

    def __init__(self, file: "_Unfinished", files: Files, threads: Threads) -> None:
        self._file = file
        self._files = files
        self._threads = threads
        self._granted = 0
        self.name = file.name

    @property
    def size(self) -> int:
        """Number of bytes written."""
        return self._file.size

    @property
    def sha256(self) -> str:
        """Digest of the bytes written, in hexadecimal."""
        return self._file.digest.hexdigest()

    async def write(self, data: bytes) -> None:
        """Append bytes; raises Problem 507 if the disk or the budget has no capacity for them."""
        await self._threads.run(self._write, data)

    def _write(self, data: bytes) -> None:
        size = self._file.size + len(data)
        if size > self._granted:
            capacity = self._files.capacity(self._file.path)
            if size > capacity:
                raise self._files.over_budget()
            self._granted = min(capacity, size + GRANT_BYTES)
        self._file.write(data)

    async def commit(self) -> None:
        """Flush the file to disk, then rename it to its name; raises Problem 507."""
        await self._threads.run(self._file.commit)


class _Unfinished:
    """A locked file with a temporary name. Its methods block: call them in threads."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.size = 0
        self.digest = hashlib.sha256()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, self.path = _locked(folder)
        except OSError as error:
            raise _write_error(error) from None

    def write(self, data: bytes) -> None:
        """Append bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            raise _write_error(error) from None
        self.digest.update(data)
        self.size += len(data)

    def commit(self) -> None:
        """Flush it to disk, then rename it to its name."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self.path.chmod(0o644)
            self.path.replace(self.path.with_name(self.name))
        except OSError as error:
            raise _write_error(error) from None

    def close(self) -> None:
        """Close it, which unlocks it; delete it unless it was committed."""
        try:
            self._file.close()
        except OSError:
            pass  # `write` or `commit` has reported what could not be flushed
        finally:
            self.path.unlink(missing_ok=True)


def _locked(folder: Path) -> tuple[BinaryIO, Path]:
    """Create a file that is locked while it is open: the lock ends with the process, however it ends."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=PREFIX)
        path = Path(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return os.fdopen(descriptor, "wb"), path
        except (BlockingIOError, FileNotFoundError):
            pass  # another process deleted it as abandoned before it was locked
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise
        os.close(descriptor)


def _delete_if_abandoned(path: Path) -> bool:
    """Delete an unfinished file if no process has locked it; return whether it was deleted. Raises OSError."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return False
        path.unlink()
        return True


def _write_error(error: OSError) -> Problem:
    return Problem(507, f"The file cannot be written: {error.strerror}.")


def _statuses(entries: Iterable["os.DirEntry[str]"]) -> Iterator[tuple["os.DirEntry[str]", os.stat_result]]:
    """Yield the entries that are still regular files, with their status."""
    for entry in entries:
        try:
            if entry.is_file(follow_symlinks=False):
                yield entry, entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
