"""A body of a server that becomes a file, whole or not at all: downloads that resume, and exports that are counted.

What is not whole yet is in `NAME.part`, beside the file that it will be. Of a download it is kept, with the entity-tag
it has in `NAME.part.etag`, so that the next one goes on with it; of an export it is removed.
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
from .http import CONNECT_SECONDS, Lost, Refused, answered

DIGEST_SECONDS = 600.0
"""A server may have to read a file of any size before it can tell its digest."""

PLAIN = {"Accept-Encoding": "identity"}
"""Bytes are counted, resumed and digested as they are stored."""


class Damaged(Exception):
    """A body came to its end, and is not what the server says that it sent; nothing of it is kept."""


@dataclass(slots=True)
class Moving:
    """How far a transfer is; told again and again, the same object."""

    done: int = 0
    """Bytes in the file."""
    total: int | None = None
    """Bytes it will have, where the server says so."""
    resumed_at: int = 0
    """The byte at which the last connection went on; 0 where it began anew."""
    rows: int = 0
    """Rows in the file; of exports."""


# -- downloads


async def download(
    url: str, path: Path, *, told: Callable[[Moving], None], on_pause: Callable[[Pause], None] | None = None
) -> str:
    """Download what is at `url` into `path`, across as many connections as it takes; say how it is proven to be whole.

    `told` hears of every connection and of every piece. Where the connection is lost, or the server is busy, `on_pause`
    hears it, and after the pause the rest is asked for by `Range`, with `If-Range`: a file that has changed meanwhile
    begins anew. So does one whose server gives it no strong entity-tag (RFC 9110 sections 13.1.5 and 14.2).

    Returns `"SHA-256"` where the server tells one (RFC 9530), or `"length"`. Raises Damaged where they differ, Refused
    and ValueError as `client.ask` does, OSError of the disk.
    """
    moving, failures = Moving(), 0
    while True:
        before = moving.done
        try:
            whole = await _fetch(url, path, moving, told)
            return await _prove(url, path, whole=whole)
        except Lost as lost:
            reason, retry_after = lost.reason, None
        except Refused as refused:
            if not refused.transient:
                raise
            reason, retry_after = refused.what, refused.retry_after
        failures = 0 if moving.done > before else failures + 1
        pause = Pause(reason, max(backoff(failures, RETRY_SECONDS), retry_after or 0.0), "")
        if on_pause is not None:
            on_pause(pause)
        await asyncio.sleep(pause.seconds)


async def _fetch(url: str, path: Path, moving: Moving, told: Callable[[Moving], None]) -> bool:
    """Add to the part what it lacks, in one connection; raises Lost where that breaks off.

    Returns whether a body came to its end, so that all is there; otherwise there was nothing more to be sent.
    """
    part, tag_file = _part(path), _tag_file(path)
    tag = tag_file.read_text() if tag_file.exists() and part.exists() else ""
    there = part.stat().st_size if tag else 0
    asking = {"Range": f"bytes={there}-", "If-Range": tag} if there else {}
    try:
        async with answered("GET", url, headers={**PLAIN, **asking}) as response:
            resumed = response.status == 206
            span = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
            if resumed and (span is None or int(span[1]) != there):
                raise Refused(response.url, "answered with another range than the one it was asked for")
            moving.done = moving.resumed_at = there if resumed else 0
            moving.total = int(span[2]) if span and span[2].isdigit() else None if resumed else response.content_length
            if not resumed:
                # Until the tag is there, too, a part is nothing to go on with.
                tag_file.unlink(missing_ok=True)
            with part.open("ab" if resumed else "wb") as file:
                if not resumed and (new := response.headers.get("ETag", "")).startswith('"'):
                    tag_file.write_text(new)
                told(moving)
                async for piece in response.content.iter_any():
                    file.write(piece)
                    file.flush()
                    moving.done += len(piece)
                    told(moving)
        return True
    except Refused as refused:
        if refused.status != 416:
            raise
        # A client that left between the last byte and the proof has all of it.
        moving.done = moving.resumed_at = there
        told(moving)
        return False


async def _prove(url: str, path: Path, *, whole: bool) -> str:
    """Compare the part with what the server says of the same state of the file, and give it its name."""
    part, tag_file = _part(path), _tag_file(path)
    headers = {**PLAIN, "Want-Repr-Digest": "sha-256=1"}
    if tag_file.exists():
        headers["If-Match"] = tag_file.read_text()
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=DIGEST_SECONDS)
    said: Mapping[str, str] = {}
    try:
        async with answered("HEAD", url, headers=headers, timeout=timeout) as response:
            said = response.headers
    except Refused as refused:
        if refused.transient:
            raise
        # It has changed meanwhile, or is not there any more: a body that came to its end is whole all the same.
    length, digest = said.get("Content-Length"), _digest(said.get("Repr-Digest", ""))
    size = part.stat().st_size
    wrong = ""
    if length is None and not whole:
        wrong = "nobody can tell whether it is whole"
    elif length is not None and int(length) != size:
        wrong = f"{size:,} bytes came, and the file has {int(length):,}"
    elif digest is not None and digest != await _sha256(part):
        wrong = "its SHA-256 is not the one that the server tells"
    if wrong:
        part.unlink()
        tag_file.unlink(missing_ok=True)
        raise Damaged(f"{path}: {wrong}; nothing of it is kept")
    part.replace(path)
    tag_file.unlink(missing_ok=True)
    return "SHA-256" if digest is not None else "length"


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _tag_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.part.etag")


def _digest(field: str) -> bytes | None:
    """The SHA-256 of a Repr-Digest (RFC 9530 section 3), where there is one."""
    found = re.search(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]+):", field)
    return base64.b64decode(found[1]) if found else None


async def _sha256(path: Path) -> bytes:
    """Hash a file in a thread; raises OSError."""
    given_up = threading.Event()

    def work() -> bytes:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not given_up.is_set() and (piece := file.read(1024 * 1024)):
                digest.update(piece)
        return digest.digest()

    async with Threads("digest", 1) as threads:
        return await threads.run(work, interrupt=given_up.set)


# -- exports


async def export(url: str, path: Path, *, told: Callable[[Moving], None]) -> str:
    """Write an export in CSV or JSON lines into `path`, counting its rows; say how it is proven to be whole.

    Where it has a last record `{"@end": {"rows": ..., "sha256": ...}}`, that is compared with what came, and left out
    of the file. Returns `"rows and SHA-256"` then, otherwise `"last chunk"`: a server that fails cuts the connection
    before it. Raises Damaged, Lost where it breaks off, Refused and ValueError as `client.ask` does, OSError of the
    disk; then, and where it is cancelled, no file is left.
    """
    part, moving = _part(path), Moving()
    try:
        with part.open("wb") as file:
            async with answered("GET", url, headers=PLAIN) as response:
                rows: _Lines | _Records = _Records(file) if response.content_type == "text/csv" else _Lines(file)
                told(moving)
                async for piece in response.content.iter_any():
                    rows.feed(piece)
                    moving.done, moving.rows = moving.done + len(piece), rows.count
                    told(moving)
            proof = rows.end()
            moving.done, moving.rows = file.tell(), rows.count
            told(moving)
        part.replace(path)
        return proof
    except Damaged as damaged:
        raise Damaged(f"{path}: {damaged}; nothing of it is kept") from None
    finally:
        part.unlink(missing_ok=True)


class _Records:
    """Counts the records of a CSV file (RFC 4180) while it writes them; a line break in quotes ends none."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ends = 0
        self._quoted = False

    @property
    def count(self) -> int:
        return max(self._ends - 1, 0)  # the first has the names of the columns

    def feed(self, piece: bytes) -> None:
        self._file.write(piece)
        # A quote that is doubled within quotes ends them and begins them anew, with nothing in between.
        first, *others = piece.split(b'"')
        for number, text in enumerate((first, *others)):
            self._quoted ^= number > 0
            self._ends += 0 if self._quoted else text.count(b"\n")

    def end(self) -> str:
        return "last chunk"


class _Lines:
    """Counts JSON lines while it writes them, and holds the last one back: it may be the end record."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._held = b""
        self._digest = hashlib.sha256()
        self.count = 0

    def feed(self, piece: bytes) -> None:
        text = self._held + piece
        cut = text.rfind(b"\n", 0, -1) + 1
        self._keep(text[:cut])
        self._held = text[cut:]

    def _keep(self, lines: bytes) -> None:
        self._file.write(lines)
        self._digest.update(lines)
        self.count += lines.count(b"\n")

    def end(self) -> str:
        """Compare with the end record, or keep the last line where it is none; raises Damaged where they differ."""
        said: object = None
        with suppress(ValueError, TypeError, KeyError):
            said = json.loads(self._held)["@end"]
        if not isinstance(said, dict):
            self._keep(self._held)
            return "last chunk"
        if said.get("rows") != self.count:
            raise Damaged(f"{self.count:,} rows came, and {said.get('rows')!r} were sent")
        if said.get("sha256") != self._digest.hexdigest():
            raise Damaged("its SHA-256 is not the one that the server tells")
        return "rows and SHA-256"
