"""Downloads into files, complete or not at all, resumed across connections and restarts.

An incomplete file is `NAME.part`, with its entity-tag in `NAME.part.etag`, so that the next download resumes it.
"""

import asyncio
import base64
import hashlib
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
