"""Recognize SQL that writes by its words, without a database."""

import re

_SKIPPED = re.compile(
    r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^\]]*\]|\$(\w*)\$.*?\$\1\$""", re.DOTALL
)
"""Comments, texts and quoted names, in the syntax of SQLite and PostgreSQL."""

_WRITE = re.compile(
    r"""
    \A [\s(]* (?P<first>ALTER|ATTACH|CALL|COPY|CREATE|DELETE|DETACH|DROP|GRANT|INSERT|MERGE|REINDEX|REPLACE|REVOKE
        |TRUNCATE|UPDATE|VACUUM) \b
    | [()] \s* (?P<inner>(?:INSERT|REPLACE|MERGE) (?= \s+ (?:OR \s+ \w+ \s+)? INTO \b)
        | DELETE (?= \s+ FROM \b)
        | UPDATE (?= \s+ [^()]+ \s SET \b))
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""A statement that writes: at the beginning, or as or after a common table expression."""


def writes(sql: str) -> str:
    """Return that an SQL statement writes, and by which word; empty if it does not seem to.

    This only explains: it is the database, opened read-only, that rejects such a statement, often as a syntax error.
    """
    match = _WRITE.search(_SKIPPED.sub(lambda skipped: " " if skipped[0][:2] in ("--", "/*") else " x ", sql))
    if match is None:
        return ""
    word = match["first"] or match["inner"]
    return f"{word.upper()} writes, but an export only reads: its SQL must be a SELECT"
