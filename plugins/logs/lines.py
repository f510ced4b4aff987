"""The level and the time of a log line.

Only the beginning of a line is parsed (and the end of a JSON line), with patterns in which no repetition can
match in two ways: the cost of a line is bounded, whatever its content.
"""

import math
import re
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Final

LEVELS: Final = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
"""All levels, with numbers that order them; an unknown level, "", is below them all."""

HEAD = 512
"""Number of characters of a line that are parsed."""

_ALIASES = {
    "DEBUG": ("debug", "trace", "verbose", "dbg", "fine", "finer", "finest"),
    "INFO": ("info", "information", "informational", "inf", "notice"),
    "WARNING": ("warning", "warn", "wrn"),
    "ERROR": ("error", "err", "severe"),
    "CRITICAL": ("critical", "crit", "fatal", "alert", "emerg", "emergency", "panic"),
}
_LEVEL = {alias: level for level, aliases in _ALIASES.items() for alias in aliases} | {"log": "INFO"}

# RFC 5424 section 6.2.1, from "emergency" to "debug".
_SEVERITIES = ("CRITICAL", "CRITICAL", "CRITICAL", "ERROR", "WARNING", "INFO", "INFO", "DEBUG")

_MONTH = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_MONTHS = {name: number for number, name in enumerate(_MONTH.split("|"), 1)}

_CLOCK = r"(\d\d):(\d\d):(\d\d)"
_ISO = re.compile(
    rf"(\d{{4}})[-/](\d\d)[-/](\d\d)[T ]{_CLOCK}(?:[.,](\d{{1,9}}))?(?: ?(Z|UTC|GMT|[+-]\d\d:?\d\d)(?![\d:]))?"
)
_COMMON = re.compile(rf"\[(\d\d)/({_MONTH})/(\d{{4}}):{_CLOCK} ([+-]\d{{4}})\]")
_SYSLOG = re.compile(r"<(\d{1,3})>")
_BSD = re.compile(rf"(?:<\d{{1,3}}>)?({_MONTH}) ([ \d]\d) {_CLOCK}")
_KLOG = re.compile(rf"([IWEF])(\d\d)(\d\d) {_CLOCK}\.(\d{{1,9}})")

_UPPER = "|".join(sorted((alias.upper() for alias in _LEVEL), key=len, reverse=True))
# "Error:" is not among them: stack traces of JavaScript start with it.
_ANY = f"{_UPPER}|{_UPPER.lower()}"
# Not within a path or a name: a level stands alone, or at the end of a channel ("production.ERROR:").
_WORD = re.compile(rf"(?<![^\s\[(<|:.])({_UPPER})(?=[\s\])>|:,]|$)")
_FIRST = re.compile(rf"[\s\[(<|\-]{{0,8}}(?:({_ANY})(?=[\])>|:,])|({_UPPER})(?=\s|$))")
_AFTER_TIME = re.compile(rf"[\s\])|\-]{{0,4}}({_ANY})(?=[\s:])")
_BRACKETED = re.compile(rf"[\[(<]({_ANY})[\])>]")

_PAIR_LEVEL = re.compile(r'(?<![^\s])(?:level|lvl|severity)="?([A-Za-z]{1,16})')
_PAIR_TIME = re.compile(r'(?<![^\s])(?:time|timestamp|ts|t)="?(\d[\d.]{8,30})(?=["\s]|$)')
_JSON_LEVEL = re.compile(
    r'"(?:level|severity|lvl|levelname|log\.level)" ?: ?(?:"([A-Za-z]{1,16})"|(\d{1,3})(?=\s{0,4}[,}]))', re.IGNORECASE
)
_JSON_TIME = re.compile(
    r'"(?:time|ts|timestamp|@timestamp|asctime)" ?: ?(?:"([^"\\]{1,48})"|(\d[\d.]{0,30}(?:[eE]\+?\d{1,2})?))'
)
_COLOUR = re.compile(r"\x1b\[[\d;]{0,16}m")


class Reader:
    """Reads the lines of one file in order: a line that continues a record has its level and its time."""

    def __init__(self) -> None:
        self._record: tuple[str, float | None] = ("", None)

    def read(self, text: str) -> tuple[str, float | None]:
        """Return the level of a line, one of `LEVELS` or "" if unknown, and its time in Unix seconds, or None.

        A line continues the record before it if it begins with white space, "Traceback (most recent call last):" or
        "Caused by", or if it has neither level nor time. A time without a zone is UTC; one without a year
        is the latest that is not in the future.
        """
        if not text or text[0].isspace() or text.startswith(("Traceback (most recent call last):", "Caused by")):
            return self._record
        head = text[:HEAD]
        if "\x1b" in head:
            head = _COLOUR.sub("", head)
        level, moment = _json(text, head) if head.startswith("{") else _plain(head)
        if level or moment is not None:
            self._record = (level, moment)
        return self._record


def _json(text: str, head: str) -> tuple[str, float | None]:
    """Return level and time of a JSON text, from its beginning or, if a long message comes first, from its end."""
    level, moment = _members(head)
    if len(text) > HEAD and (not level or moment is None):
        later_level, later_moment = _members(text[-HEAD:])
        level = level or later_level
        moment = later_moment if moment is None else moment
    return level, moment


def _members(part: str) -> tuple[str, float | None]:
    level, moment = "", None
    if match := _JSON_LEVEL.search(part):
        name, number = match.groups()
        level = _LEVEL.get(name.lower(), "") if name else _numbered(int(number))
    if match := _JSON_TIME.search(part):
        written, number = match.groups()
        moment = _epoch(number) if number else _iso(written)
        if moment is None and written:
            moment = _epoch(written)
    return level, moment


def _numbered(number: int) -> str:
    """Return the level of a number: 0 to 7 as in GELF and syslog, 10 (trace) to 60 (fatal) as in bunyan and pino."""
    if number < len(_SEVERITIES):
        return _SEVERITIES[number]
    return ("DEBUG", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")[min(max(number // 10, 1), 6) - 1]


def _plain(head: str) -> tuple[str, float | None]:
    if match := _KLOG.match(head):
        letter, month, day, *clock, fraction = match.groups()
        level = {"I": "INFO", "W": "WARNING", "E": "ERROR", "F": "CRITICAL"}[letter]
        moment = _yearless(int(month), int(day), *map(int, clock))
        return level, None if moment is None else moment + float(f"0.{fraction}")
    moment, end = _time(head)
    level = ""
    if head[0] == "<" and (match := _SYSLOG.match(head)) and int(match[1]) < 192:
        level = _SEVERITIES[int(match[1]) % 8]
    level = level or _level(head, end)
    if moment is None and "=" in head and (match := _PAIR_TIME.search(head)):
        moment = _epoch(match[1])
    # A container's own prefix before what the program wrote.
    if not level and (start := head.find("{")) >= 0:
        level = _members(head[start:])[0]
    return level, moment


def _level(head: str, end: int) -> str:
    """Return the level of a line whose time ends at `end`. Without a time, `end` is 0 and the level must come first."""
    pair = _PAIR_LEVEL.search(head) if "=" in head else None
    word = _FIRST.match(head)
    if word is None and end:
        # Lower case counts only right after the time, or in brackets, where no other word is expected.
        word = (
            _AFTER_TIME.match(head, end) or _WORD.search(head, end, end + 100) or _BRACKETED.search(head, end, end + 40)
        )
    if pair is not None and (word is None or pair.start() < word.start()):
        return _LEVEL.get(pair[1].lower(), "")
    if word is None:
        return ""
    return _LEVEL[word[word.lastindex or 1].lower()]


def _time(head: str) -> tuple[float | None, int]:
    """Return the time at, or near, the beginning of a line, and the index of its end."""
    if match := _ISO.search(head, 0, 96):
        return _moment(match), match.end()
    if match := _COMMON.search(head):
        day, month, year, hour, minute, second, zone = match.groups()
        return _unix(int(year), _MONTHS[month], int(day), int(hour), int(minute), int(second), zone), match.end()
    if match := _BSD.match(head):
        month, day, *clock = match.groups()
        return _yearless(_MONTHS[month], int(day), *map(int, clock)), match.end()
    return None, 0


def _iso(written: str) -> float | None:
    match = _ISO.match(written)
    return _moment(match) if match else None


def _moment(match: re.Match[str]) -> float | None:
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    whole = _unix(int(year), int(month), int(day), int(hour), int(minute), int(second), zone)
    return whole if whole is None or not fraction else whole + float(f"0.{fraction}")


def _unix(year: int, month: int, day: int, hour: int, minute: int, second: int, zone: str | None) -> float | None:
    try:
        # A leap second, 60, is the first of the next minute, as in the system clock.
        leap = second == 60
        moment = datetime(year, month, day, hour, minute, second - leap, tzinfo=_zone(zone))
        return moment.timestamp() + leap
    except (ValueError, OverflowError):
        return None


def _zone(written: str | None) -> timezone:
    if written is None or written[0] not in "+-":
        return UTC
    offset = timedelta(hours=int(written[1:3]), minutes=int(written[-2:]))
    return timezone(-offset if written[0] == "-" else offset)


def _yearless(month: int, day: int, hour: int, minute: int, second: int) -> float | None:
    now = time.time()
    year = time.gmtime(now).tm_year
    # Up to a day ahead may be another time zone; older years are tried for the 29th of February.
    for candidate in (year + 1, year, year - 1, year - 2, year - 3, year - 4):
        moment = _unix(candidate, month, day, hour, minute, second, None)
        if moment is not None and moment < now + 86400:
            return moment
    return None


def _epoch(written: str) -> float | None:
    """Return Unix seconds from a number of seconds, milli-, micro- or nanoseconds, distinguished by magnitude."""
    try:
        number = float(written)
    except ValueError:
        return None
    if not math.isfinite(number) or number < 1e8:
        return None
    for unit, limit in ((1, 1e11), (1e3, 1e14), (1e6, 1e17), (1e9, 1e20)):
        if number < limit:
            return number / unit
    return None
