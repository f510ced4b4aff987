"""Lines as PostgreSQL's `row_to_json` writes them, with null for the numbers that JSON cannot represent."""

import json
import re
from collections.abc import Sequence

from .postgres_fields import NOT_FINITE, Field
from .source import quoted

_TEXTS = [b'NaN"', b'Infinity"']


class JsonLines:
    """The SQL of an object per row, and what turns its chunks of whole lines into JSON lines.

    PostgreSQL writes a NaN as "NaN", a text. Such a text is found by the member before it: in a text, every quote has a
    backslash before it. Where a column may have members itself, PostgreSQL has to mark the numbers with NOT_FINITE
    instead, which takes it a tenth more time.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields = fields
        self._marks = any(field.column.type in ("json", "any") for field in fields)
        members = [_member(field.column.name) for field in fields if field.has_numbers]
        self._not_finite = re.compile(b'([{,](?:%b))"(?:NaN|-?Infinity)"' % b"|".join(map(re.escape, members)))
        self._hints = [member + b'"' for member in members] if len(members) <= len(_TEXTS) else _TEXTS
        """Bytes to look for in a chunk first, and few of them: each takes 0.06 microseconds a row."""
        if self._marks:
            self._not_finite, self._hints = re.compile(b"()" + re.escape(NOT_FINITE)), [NOT_FINITE[-1:]]

    def sql(self, rows: str) -> str:
        """Return the query of the objects of `rows`, the SQL from FROM on."""
        members = ", ".join(f"{field.json(self._marks)} AS {quoted(field.column.name)}" for field in self._fields)
        return f"SELECT row_to_json(r.*) FROM (SELECT {members} {rows}) AS r"  # noqa: S608 - names, quoted

    def lines(self, chunk: bytes) -> tuple[int, bytes]:
        """Return the number of numbers that became null, and the lines."""
        if not any(hint in chunk for hint in self._hints):
            return 0, chunk
        chunk, altered = self._not_finite.subn(rb"\1null", chunk)
        return altered, chunk


def _member(name: str) -> bytes:
    """Return a name as PostgreSQL writes it in an object. Source: escape_json in src/backend/utils/adt/json.c."""
    return json.dumps(name, ensure_ascii=False).encode() + b":"
