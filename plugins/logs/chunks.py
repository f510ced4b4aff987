"""Split bytes into lines, and very long lines into chunks."""

from collections.abc import Iterator
from dataclasses import dataclass

CHUNK = 1024 * 1024
"""Maximum size of a line, in bytes; a longer one is split into chunks."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its line break, or a chunk of a line that is longer than `CHUNK` bytes."""

    text: str
    file: str
    """The base name of the path that is followed, even if its content was renamed."""
    continued: bool = False
    """Whether the same line continues in the next chunk."""


def split_lines(data: bytes, start: int, *, final: bool) -> Iterator[tuple[bytes, int, bool]]:
    """Split data, from `start`, into lines and chunks. Yield the text, its end, and whether the line continues.

    A line without a line break is not yielded yet, unless it is longer than a chunk, or `final`.
    """
    while start < len(data):
        end = data.find(b"\n", start)
        if end < 0:
            end, after = len(data), len(data)
            # Two bytes more than a chunk: with fewer it could still be a complete line with its line break.
            if end - start < CHUNK + 2 and not final:
                return
        else:
            after = end + 1
        if end > start and data[end - 1] == 13:
            end -= 1
        if end - start > CHUNK:
            after = start + CHUNK
            # Split between two characters of UTF-8; anywhere if it is not UTF-8.
            for index in range(after, after - 4, -1):
                if data[index] & 0xC0 != 0x80:
                    after = index
                    break
            yield data[start:after], after, True
        else:
            yield data[start:end], after, False
        start = after
