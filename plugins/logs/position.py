"""Positions in log files: how far a content was read, with a checksum that recognizes the content again."""

import io
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from . import disk

CHECKED = 1024
"""Maximum number of bytes before a position that its checksum covers."""

Kind = Literal["rotated", "truncated"]
"""How a content ends: its file is renamed, replaced or deleted ("rotated"), or emptied ("truncated")."""

_FORMER_NAMES = {"turn": "ended_by", "told": "reported"}
"""Names of fields in the checkpoints of earlier versions."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a content has been read: to the start of a line, or of a chunk of a long line.

    Checkpoints contain positions as JSON objects: a field that is renamed needs its former name in `_FORMER_NAMES`.
    """

    path: str
    """Last known path of the content, links resolved."""
    device: int
    inode: int
    offset: int
    check: int
    """CRC-32 of the up to `CHECKED` bytes before the offset."""
    modified: int
    """Time of modification of the file at the last look, in nanoseconds."""
    ended_by: Kind = "rotated"
    """Kind of the rotation that ends this content."""
    reported: bool = False
    """Whether that rotation was reported; a file at the followed path is then another content."""

    @classmethod
    def of(
        cls, file: io.FileIO, path: Path, status: os.stat_result, *, offset: int = 0, ended_by: Kind = "rotated"
    ) -> Self:
        """Return a position in an open file. Reads the bytes before it."""
        start = max(0, offset - CHECKED)
        check = zlib.crc32(os.pread(file.fileno(), offset - start, start))
        return cls(os.path.realpath(path), *disk.identity(status), offset, check, status.st_mtime_ns, ended_by)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Return the position of a checkpoint, also of an earlier version. Raises TypeError for other objects."""
        return cls(**{_FORMER_NAMES.get(name, name): value for name, value in stored.items()})

    def to_json(self) -> dict[str, Any]:
        """Return the position as a JSON object."""
        return asdict(self)

    @property
    def identity(self) -> disk.Identity:
        """Return device and inode."""
        return self.device, self.inode

    @property
    def check_start(self) -> int:
        """Return the offset of the first byte that the checksum covers."""
        return max(0, self.offset - CHECKED)

    def matches(self, data: bytes) -> bool:
        """Return whether the bytes from `check_start` to the offset are those that were read."""
        return len(data) == self.offset - self.check_start and zlib.crc32(data) == self.check

    def is_in(self, file: io.FileIO) -> bool:
        """Return whether a file has the bytes before the offset that were read. Raises OSError."""
        return self.matches(os.pread(file.fileno(), self.offset - self.check_start, self.check_start))

    def advanced(self, data: bytes, end: int, modified: int) -> Self:
        """Return the position at the index `end` of `data`, which begins at `check_start`."""
        check = zlib.crc32(data[max(0, end - CHECKED) : end])
        return replace(self, offset=self.check_start + end, check=check, modified=modified)
