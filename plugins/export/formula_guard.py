"""The formula guard: which texts a spreadsheet would run as formulas, how to change them, and how to find them fast."""

import re
from typing import Final

# Some spreadsheet starts a formula at these characters: those of OWASP, and their wide and small variants. Source:
# https://owasp.org/www-community/attacks/CSV_Injection. They may be preceded by characters that a spreadsheet may trim,
# drop or not show: white space, control characters, the Default_Ignorable_Code_Point of Unicode 16
# (DerivedCoreProperties.txt), and a quote. A cell starts at the start of a text and, in spreadsheets that separate by
# semicolon or tab, after each of these: quotes around the text do not prevent that, as a quote counts only at the start
# of a cell.
_WIDE_MARKS: Final = "\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b"
IGNORED_RANGES: Final = (
    (0x01, 0x08), (0x0A, 0x20), (0x22, 0x22), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C),
    (0x115F, 0x1160), (0x1680, 0x1680), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2000, 0x200F), (0x2028, 0x202F),
    (0x205F, 0x206F), (0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
"""Ranges of code points that may precede a formula; so may 0, which PostgreSQL does not have."""

_IGNORED: Final = "\0" + "".join(f"{chr(first)}-{chr(last)}" for first, last in IGNORED_RANGES)
_FORMULA: Final = f"[{_IGNORED}]*[=+\\-@{_WIDE_MARKS}]"
_AT_START: Final = re.compile(_FORMULA)
_AFTER_SEPARATOR: Final = re.compile(f"(?<=[;\t])(?={_FORMULA})")
_AFTER_SEMICOLON: Final = re.compile(f"(?<=;)(?={_FORMULA})")
_LEADING: Final = frozenset("\t\r\n")
"""Characters that OWASP wants guarded at the start of a cell, whatever follows."""


def guarded(text: str) -> str:
    """Put an apostrophe before each formula that a spreadsheet would run."""
    if ";" in text or "\t" in text:
        text = _AFTER_SEPARATOR.sub("'", text)
    return "'" + text if text[:1] in _LEADING or _AT_START.match(text) else text


def guarded_json(text: str) -> str:
    """Do the same with JSON: it is never a formula itself, and white space in it means nothing."""
    return _AFTER_SEMICOLON.sub("'", text)


# To find what `guarded` may change in megabytes of UTF-8, each byte gets a class: M starts a formula, or is a line
# break, which is guarded at the start of a cell; B may precede one, or separates cells; o is any other. The first M of
# a formula is then always after a B. Tabs are both, and all bytes of the wide marks B: both are rare, and found alone.
_IGNORED_BYTES: Final = {code for first, last in IGNORED_RANGES for code in range(first, last + 1) if code < 0x80}
_CLASSES: Final = bytes(
    ord("M" if byte in b"=+-@\r\n" else "B" if byte > 0x7F or byte in _IGNORED_BYTES or byte in b"\0;,\t" else "o")
    for byte in range(256)
)
_WIDE_BYTES: Final = tuple(mark.encode() for mark in _WIDE_MARKS)


def may_have_formulas(data: bytes) -> bool:
    """Return whether `suspects` may find anything; takes nanoseconds for most columns."""
    return (
        b"-" in data or b"@" in data or b"=" in data or b"+" in data or b"\n" in data or b"\r" in data or b"\t" in data
        or b"\xef" in data
    )  # fmt: skip


def suspects(data: bytes) -> list[int]:
    """Return a position in every cell that `guarded` changes, and in some that it does not, in order.

    `data` are cells in UTF-8, plain or as CSV, with a comma or a NUL between two.
    """
    classes = data.translate(_CLASSES)
    places = found(classes, b"BM", 1)
    if classes.startswith(b"M"):
        places.insert(0, 0)
    if b"\t" in data:
        places += found(data, b"\t")
    if b"\xef" in data:  # the first byte of every wide mark
        for mark in _WIDE_BYTES:
            places += found(data, mark)
    return sorted(places)


def found(data: bytes, part: bytes, offset: int = 0) -> list[int]:
    """Return each position of a part, plus an offset."""
    find, places = data.find, []
    at = find(part)
    while at >= 0:
        places.append(at + offset)
        at = find(part, at + 1)
    return places
