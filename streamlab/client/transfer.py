"""Transfers into files, complete or not at all: downloads that resume, and exports whose rows are counted.

An incomplete file is `NAME.part`. A download keeps it, with its entity-tag in `NAME.part.etag`, so that the next one
resumes it; an export deletes it.
"""

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import aiohttp

from streamlab.threads import Threads

from .follow import RETRY_SECONDS, Pause, backoff
from .http import CONNECT_SECONDS, ConnectionLost, RequestRejected, stream_response

DIGEST_SECONDS = 600.0
"""Timeout for a digest, in seconds: the server may have to read a file of any size first."""

IDENTITY = {"Accept-Encoding": "identity"}
"""Header that disables compression: bytes are counted, resumed and digested as they are stored."""


class IntegrityError(Exception):
    """A body is complete and does not match what the server reports; the file was deleted."""


@dataclass(slots=True)
class TransferProgress:
    """The progress of a transfer; callbacks receive the same object each time."""

    done: int = 0
    """Bytes in the file."""
    total: int | None = None
    """Total bytes, where the server reports them."""
    resumed_at: int = 0
    """Offset at which the last connection resumed; 0 where it started from the beginning."""
    rows: int = 0
    """Rows in the file (exports only)."""


# -- downloads


async def download(
    url: str,
    path: Path,
    *,
    on_progress: Callable[[TransferProgress], None],
    on_pause: Callable[[Pause], None] | None = None,
) -> str:
    """Download `url` into `path`, across any number of connections, verify the file, and return how.

    `on_progress` is called for each connection and each chunk. Where the connection is lost, or the server is busy,
    `on_pause` is called, and after the pause the rest is requested by `Range` with `If-Range`. A file that has changed
    meanwhile, or that has no strong entity-tag, is downloaded from the beginning (RFC 9110 sections 13.1.5 and 14.2).

    Returns `"SHA-256"` where the server sends one (RFC 9530), otherwise `"length"`. Raises IntegrityError where they
    differ, RequestRejected and ValueError as `stream_response` does, OSError of the disk.
    """
    progress, failures = TransferProgress(), 0
    while True:
        before = progress.done
        try:
            complete = await _fetch(url, path, progress, on_progress)
            return await _verify(url, path, is_complete=complete)
        except ConnectionLost as lost:
            reason, retry_after = lost.reason, None
        except RequestRejected as rejected:
            if not rejected.is_transient:
                raise
            reason, retry_after = rejected.reason, rejected.retry_after
        failures = 0 if progress.done > before else failures + 1
        pause = Pause(reason, max(backoff(failures, RETRY_SECONDS), retry_after or 0.0), "")
        if on_pause is not None:
            on_pause(pause)
        await asyncio.sleep(pause.seconds)


async def _fetch(
    url: str, path: Path, progress: TransferProgress, on_progress: Callable[[TransferProgress], None]
) -> bool:
    """Append the missing bytes to the part file, in one connection; raises ConnectionLost where that breaks off.

    Returns whether a body was received to its end, so that the file is complete; False where the server had nothing
    more to send.
    """
    part, tag_file = _part(path), _tag_file(path)
    tag = tag_file.read_text() if tag_file.exists() and part.exists() else ""
    offset = part.stat().st_size if tag else 0
    conditions = {"Range": f"bytes={offset}-", "If-Range": tag} if offset else {}
    try:
        async with stream_response("GET", url, headers={**IDENTITY, **conditions}) as response:
            resumed = response.status == 206
            span = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
            if resumed and (span is None or int(span[1]) != offset):
                raise RequestRejected(response.url, "returned a different range than requested")
            progress.done = progress.resumed_at = offset if resumed else 0
            size = int(span[2]) if span and span[2].isdigit() else None
            progress.total = size if resumed else response.content_length
            if not resumed:
                # A part file without its tag cannot be resumed.
                tag_file.unlink(missing_ok=True)
            with part.open("ab" if resumed else "wb") as file:
                if not resumed and (new := response.headers.get("ETag", "")).startswith('"'):
                    tag_file.write_text(new)
                on_progress(progress)
                async for chunk in response.content.iter_any():
                    file.write(chunk)
                    file.flush()
                    progress.done += len(chunk)
                    on_progress(progress)
        return True
    except RequestRejected as rejected:
        if rejected.status != 416:
            raise
        # A client that stopped between the last byte and the verification has the whole file.
        progress.done = progress.resumed_at = offset
        on_progress(progress)
        return False


async def _verify(url: str, path: Path, *, is_complete: bool) -> str:
    """Compare the part file with the length and digest of the same version, and rename it to its final name."""
    part, tag_file = _part(path), _tag_file(path)
    headers = {**IDENTITY, "Want-Repr-Digest": "sha-256=1"}
    if tag_file.exists():
        headers["If-Match"] = tag_file.read_text()
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=DIGEST_SECONDS)
    reported: Mapping[str, str] = {}
    try:
        async with stream_response("HEAD", url, headers=headers, timeout=timeout) as response:
            reported = response.headers
    except RequestRejected as rejected:
        if rejected.is_transient:
            raise
        # The file was changed or deleted meanwhile: a body that was received to its end is complete all the same.
    length, digest = reported.get("Content-Length"), _digest(reported.get("Repr-Digest", ""))
    size = part.stat().st_size
    fault = ""
    if length is None and not is_complete:
        fault = "the server does not report its length"
    elif length is not None and int(length) != size:
        fault = f"received {size:,} bytes, expected {int(length):,}"
    elif digest is not None and digest != await _sha256(part):
        fault = "the SHA-256 does not match the server's"
    if fault:
        part.unlink()
        tag_file.unlink(missing_ok=True)
        raise IntegrityError(f"{path}: {fault}; the file was deleted")
    part.replace(path)
    tag_file.unlink(missing_ok=True)
    return "SHA-256" if digest is not None else "length"


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _tag_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.etag")


def _digest(field: str) -> bytes | None:
    """Return the SHA-256 of a Repr-Digest (RFC 9530 section 3), or None."""
    found = re.search(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]+):", field)
    return base64.b64decode(found[1]) if found else None


async def _sha256(path: Path) -> bytes:
    """Hash a file in a thread; raises OSError."""
    cancelled = threading.Event()

    def compute() -> bytes:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not cancelled.is_set() and (chunk := file.read(1024 * 1024)):
                digest.update(chunk)
        return digest.digest()

    async with Threads("digest", 1) as threads:
        return await threads.run(compute, interrupt=cancelled.set)


# -- exports


async def export(url: str, path: Path, *, on_progress: Callable[[TransferProgress], None]) -> str:
    """Write an export in CSV or JSON lines into `path`, count its rows, verify it, and return how.

    A last record `{"@end": {"rows": ..., "sha256": ...}}` is compared with the rows received, and left out of the
    file. Returns `"row count and SHA-256"` then, otherwise `"last chunk"`: a server that fails closes the connection
    before it. Raises IntegrityError, ConnectionLost where it breaks off, RequestRejected and ValueError as
    `stream_response` does, OSError of the disk; then, and on cancellation, no file is left.
    """
    part, progress = _part(path), TransferProgress()
    try:
        with part.open("wb") as file:
            async with stream_response("GET", url, headers=IDENTITY) as response:
                rows: _Lines | _Records = _Records(file) if response.content_type == "text/csv" else _Lines(file)
                on_progress(progress)
                async for chunk in response.content.iter_any():
                    rows.feed(chunk)
                    progress.done, progress.rows = progress.done + len(chunk), rows.count
                    on_progress(progress)
            proof = rows.finish()
            progress.done, progress.rows = file.tell(), rows.count
            on_progress(progress)
        part.replace(path)
        return proof
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}; the file was deleted") from None
    finally:
        part.unlink(missing_ok=True)


class _Records:
    """Writes a CSV file (RFC 4180) and counts its records; a line break in quotes does not end one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ends = 0
        self._quoted = False

    @property
    def count(self) -> int:
        return max(self._ends - 1, 0)  # the first is the header

    def feed(self, chunk: bytes) -> None:
        self._file.write(chunk)
        # A doubled quote within quotes closes and reopens them, with nothing in between.
        first, *others = chunk.split(b'"')
        for number, text in enumerate((first, *others)):
            self._quoted ^= number > 0
            self._ends += 0 if self._quoted else text.count(b"\n")

    def finish(self) -> str:
        return "last chunk"


class _Lines:
    """Writes JSON lines and counts them; holds the last one back, because it may be the end record."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._held = b""
        self._digest = hashlib.sha256()
        self.count = 0

    def feed(self, chunk: bytes) -> None:
        text = self._held + chunk
        start = text.rfind(b"\n", 0, -1) + 1
        self._write(text[:start])
        self._held = text[start:]

    def _write(self, lines: bytes) -> None:
        self._file.write(lines)
        self._digest.update(lines)
        self.count += lines.count(b"\n")

    def finish(self) -> str:
        """Compare with the end record, or write the last line if it is not one; may raise IntegrityError."""
        end: object = None
        with suppress(ValueError, TypeError, KeyError):
            end = json.loads(self._held)["@end"]
        if not isinstance(end, dict):
            self._write(self._held)
            return "last chunk"
        if end.get("rows") != self.count:
            raise IntegrityError(f"received {self.count:,} rows, expected {end.get('rows')!r}")
        if end.get("sha256") != self._digest.hexdigest():
            raise IntegrityError("the SHA-256 does not match the server's")
        return "row count and SHA-256"
