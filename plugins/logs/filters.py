"""Filters of lines: by level, by a regular expression that takes linear time, and by time."""

import json
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import re2

from streamlab import Event

from .lines import LEVELS

_AGO = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])")
_CLASS = re.compile(r"\\[pP]")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

PATTERN_BYTES = 64 * 1024
"""Memory for the compiled program of a pattern, in bytes: bounds how long compiling takes (a few milliseconds)."""

PATTERN_SIZE = 2000
"""Maximum number of instructions of a compiled pattern; a Unicode class such as \\pL has about a hundred."""

CLASSES = 10
"""Maximum number of classes of Unicode characters in a pattern: each takes a tenth of a millisecond to parse."""

MATCHING_BYTES = 256 * 1024
"""Memory for fast matching, in bytes. If a hostile pattern needs more, RE2 takes up to `STEPS` steps per line."""

STEPS = 4_000_000
"""Maximum work per line, as instructions of the pattern times characters that are searched: at most 0.4 s."""


class BadPattern(ValueError):
    """A regular expression that is not accepted, with the reason."""


def compile_pattern(text: str) -> Any:
    """Compile a regular expression (RE2: no look-around, no references, so linear time).

    Takes milliseconds at most, but is not for the event loop. Raises BadPattern.
    """
    compiled = _compiled(text)
    if isinstance(compiled, str):
        raise BadPattern(compiled)
    return compiled


@lru_cache(maxsize=256)
def _compiled(text: str) -> Any:
    """Return a pattern, or the reason why it is not accepted."""
    if (classes := len(_CLASS.findall(text))) > CLASSES:
        return f"has {classes} classes of Unicode characters (at most {CLASSES})"
    try:
        size = _compile(text, PATTERN_BYTES).programsize
        if size > PATTERN_SIZE:
            return f"is too large: it has {size} instructions (at most {PATTERN_SIZE})"
        return _compile(text, MATCHING_BYTES)
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        return f"is not a valid regular expression of RE2: {reason}"


def _compile(text: str, size: int) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = size
    return re2.compile(text, options)


@lru_cache(maxsize=64)
def _line(data: bytes) -> str:
    """Return the text of an event's line. It is cached, since several patterns are matched against the same event."""
    return str(json.loads(data).get("line", ""))


@dataclass(frozen=True, slots=True)
class LineFilter:
    """Lines of a level, or above it, that match a pattern. Equal filters share their work.

    `STEPS` limits how far a long line is searched: 2,000 characters for the largest pattern, 360,000 for `user=1`.
    """

    level: int
    grep: str
    pattern: Any = field(compare=False)

    def __call__(self, event: Event) -> bool:
        """Return whether an event is selected; events about the log itself (a rotation) always are."""
        if event.event:
            return True
        return self.accepts(event.key, lambda: _line(event.data))

    def accepts(self, level: str, text: Any) -> bool:
        """Return whether a line of a level is selected; `text` is called for its text if the pattern is needed."""
        if LEVELS.get(level, 0) < self.level:
            return False
        return self.pattern is None or self.pattern.search(text()[: STEPS // self.pattern.programsize]) is not None


def moment(text: str) -> float:
    """Return a time as Unix seconds: ISO 8601 (without an offset: UTC), Unix seconds, or an age such as `15m`.

    Raises ValueError.
    """
    if match := _AGO.fullmatch(text):
        return time.time() - float(match[1]) * _SECONDS[match[2]]
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text):
        return float(text)
    try:
        # A "+" that was not escaped is decoded as a space: "2026-11-25T12:00:00 02:00".
        parsed = datetime.fromisoformat(re.sub(r" ([0-9]{2}:?[0-9]{2})$", r"+\1", text) if "T" in text else text)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(
            "is not a valid time: 2026-11-25T12:00:00Z, Unix seconds, or an age such as 90s, 15m, 2h or 3d"
        ) from None
