"""The terminal view `export`: the rows of a query, counted and verified, in a file of CSV or JSON lines."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from rich.progress import DownloadColumn, TextColumn, TimeElapsedColumn

from streamlab import hookimpl
from streamlab.client import (
    IntegrityError,
    Terminal,
    TransferProgress,
    ViewError,
    one_line,
    prompt_choice,
    prompt_file,
    prompt_number,
    stream_response,
    url_with_query,
)


def show_export(terminal: Terminal) -> None:
    """Rows of a query, counted, in a file of CSV or JSON lines."""
    name = prompt_choice(terminal.fetch_names("/export", "exports", "name"), "users")
    limit = prompt_number("rows", None, hint="all")
    target = prompt_file(f"{name}.jsonl")
    if target.suffix not in (".csv", ".jsonl"):
        raise ViewError(f"{target}: unknown format {target.suffix!r} (.csv or .jsonl)")
    end = {"end": "true"} if target.suffix == ".jsonl" else {}
    url = url_with_query(f"{terminal.url}/export/{name}/{target.suffix.removeprefix('.')}", {"limit": limit, **end})
    last, started = TransferProgress(), time.monotonic()
    columns = TextColumn("{task.fields[rows]}"), DownloadColumn(), TimeElapsedColumn()
    with terminal.progress_bar(target.name, *columns, total=limit) as update:

        def on_progress(progress: TransferProgress) -> None:
            nonlocal last
            last = progress
            speed = progress.done / max(time.monotonic() - started, 0.001) / 1e6
            update(completed=progress.rows, rows=f"{progress.rows:,} rows {progress.done:,} bytes {speed:,.1f} MB/s")

        proof = asyncio.run(receive_export(url, target, on_progress=on_progress))
    seconds = time.monotonic() - started
    terminal.print(
        one_line(
            f"{target}: {last.rows:,} rows, {last.done:,} bytes in {seconds:.1f} s"
            f" ({last.done / max(seconds, 0.001) / 1e6:,.1f} MB/s), verified by {proof}"
        )
    )


async def receive_export(url: str, path: Path, *, on_progress: Callable[[TransferProgress], None]) -> str:
    """Write an export in CSV or JSON lines into `path`, count its rows, verify it, and return how.

    A last record `{"@end": {"rows": ..., "sha256": ...}}` is compared with the rows received, and left out of the
    file. Returns `"row count and SHA-256"` then, otherwise `"last chunk"`: a server that fails closes the connection
    before it. Raises IntegrityError, ConnectionLost where it breaks off, RequestRejected and ValueError as
    `stream_response` does, OSError of the disk; then, and on cancellation, no file is left.
    """
    part, progress = path.with_name(f"{path.name}.part"), TransferProgress()
    try:
        with part.open("wb") as file:
            async with stream_response("GET", url, headers={"Accept-Encoding": "identity"}) as response:
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


@hookimpl
def register_views() -> Mapping[str, Callable[[Terminal], None]]:
    """Provide the view `export`."""
    return {"export": show_export}
