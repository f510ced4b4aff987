"""Bytes cut into lines, and lines that are too long into pieces."""

from collections.abc import Iterator
from dataclasses import dataclass

PIECE = 1024 * 1024
"""Bytes of one line that are given at once."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end, or a piece of one that is longer than `PIECE` bytes."""

    text: str
    file: str
    """The base name of the path that is followed, whatever its content is called by now."""
    continued: bool = False
    """Whether the same line goes on in the next piece."""


def cut_lines(data: bytes, start: int, *, final: bool) -> Iterator[tuple[bytes, int, bool]]:
    """Cut data, from `start`, into lines and pieces: the text, where it ends, and whether the line goes on.

    A line without its end is held back, unless it is longer than a piece, or `final`.
    """
    while start < len(data):
        end = data.find(b"\n", start)
        if end < 0:
            end, after = len(data), len(data)
            # Two bytes more than a piece: less could still turn out to be a whole line, with its end.
            if end - start < PIECE + 2 and not final:
                return
        else:
            after = end + 1
        if end > start and data[end - 1] == 13:
            end -= 1
        if end - start > PIECE:
            after = start + PIECE
            # Back to where a character of UTF-8 begins; in what is none, anywhere.
            for cut in range(after, after - 4, -1):
                if data[cut] & 0xC0 != 0x80:
                    after = cut
                    break
            yield data[start:after], after, True
        else:
            yield data[start:end], after, False
        start = after
