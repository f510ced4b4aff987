"""The columns of a PostgreSQL result: their types, and the SQL that writes their values in each format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .formats import GUARDED, Column, unique

if TYPE_CHECKING:
    from asyncpg import Attribute

NAME_BYTES = 63
"""What PostgreSQL keeps of a name."""

_TYPES: Mapping[int, str] = {
    **dict.fromkeys((20, 21, 23, 26), "integer"),  # int8, int2, int4, oid
    **dict.fromkeys((700, 701), "real"),
    **dict.fromkeys((18, 19, 25, 1042, 1043), "text"),  # "char", name, text, bpchar, varchar
    **dict.fromkeys((114, 3802), "json"),  # json, jsonb
    16: "boolean",
    17: "blob",
    1082: "date",
    1083: "time",
    1114: "timestamp",
    1184: "timestamptz",
    1186: "interval",
    1700: "decimal",
    2950: "uuid",
}
"""Types by their OIDs, which are the same everywhere. Source: PostgreSQL, src/include/catalog/pg_type.dat."""

_CHAR, _OID, _JSON, _FLOAT4 = 18, 26, 114, 700
_TEXTS = (18, 19, 25, 1043)
_RECORDS = (2249, 2287)

_FORMULA = ", ".join(str(ord(mark)) for mark in sorted(GUARDED))


@dataclass(frozen=True, slots=True)
class Field:
    """A column of a result as PostgreSQL knows it; `ref` is what it is called in the SQL around the query."""

    column: Column
    ref: str
    oid: int
    nested: bool
    """Whether it is an array or a composite."""

    def csv(self, *, formula_guard: bool) -> str:
        """The SQL of its cells."""
        match self.column.type:
            case "boolean":
                return f"{self.ref}::text"
            case "blob":
                return _base64(self.ref)
            case "any" if self.nested:
                return f"to_json({self.ref})::text"
            case "text" | "any" if formula_guard:
                text = self._text()
                return f"CASE WHEN ascii({text}) IN ({_FORMULA}) THEN '''' || {text} ELSE {text} END"
        return self.ref

    def _text(self) -> str:
        """The SQL of its text, just as PostgreSQL shows it: a cast cuts the blanks off a bpchar, and makes IPs nets."""
        if self.oid in _TEXTS:
            return f"{self.ref}::text"
        return f"CASE WHEN {self.ref} IS NOT NULL THEN concat({self.ref}) END"

    def json(self) -> str:
        """The SQL of its values in a JSON object."""
        match self.column.type:
            case "integer" if self.oid == _OID:
                return f"{self.ref}::int8"  # to_json makes a text of it
            case "real" | "decimal":
                return f"CASE WHEN {self.ref} - {self.ref} = 0 THEN {self.ref} END"  # NaN and infinity are not 0 then
            case "blob":
                return _base64(self.ref)
        return self.ref

    @property
    def may_break_lines(self) -> bool:
        """Whether its JSON may have line breaks: a json keeps those between its tokens."""
        return self.oid == _JSON or self.column.type == "any"

    def value(self, form: str) -> tuple[str, str]:
        """The SQL of its values for an encoder, and their type there: nothing that Python would round or not know."""
        match self.column.type:
            case "date" | "time" | "timestamp" | "timestamptz" if form == "json":
                return f"btrim(to_json({self.ref})::text, '\"')", "text"  # PostgreSQL's go further than Python's
            case "date" | "timestamp" | "timestamptz":
                # asyncpg would make the year 9999 of infinity; a year that Python does not have is refused.
                return f"CASE WHEN isfinite({self.ref}) THEN {self.ref} ELSE '20000-01-01' END", self.column.type
            case "interval":
                return f"{self.ref}::text", "text"  # a timedelta has no months
            case "text" if self.oid == _CHAR:
                return f"{self.ref}::text", "text"
            case "real" if self.oid == _FLOAT4:
                return f"{self.ref}::text::float8", "real"  # 0.1, not 0.10000000149011612
            case "any" if self.nested:
                return f"to_json({self.ref})::text", "json"
            case "any":
                return self._text(), "text"
        return self.ref, self.column.type


def _base64(ref: str) -> str:
    return f"replace(encode({ref}, 'base64'), E'\\n', '')"


def fields_of(attributes: Sequence["Attribute"]) -> Sequence[Field]:
    """The fields of a result whose columns PostgreSQL describes so."""
    names = _names([attribute.name for attribute in attributes])
    return [
        Field(
            Column(name, _TYPES.get(attribute.type.oid, "any")),
            f"c{number}",
            attribute.type.oid,
            attribute.type.kind in ("array", "composite") or attribute.type.oid in _RECORDS,
        )
        for number, (name, attribute) in enumerate(zip(names, attributes, strict=True), 1)
    ]


def _names(names: Sequence[str]) -> Sequence[str]:
    """Different names, short enough for PostgreSQL to keep them so."""
    chosen = unique(names)
    if max(len(name.encode()) for name in chosen) > NAME_BYTES:
        chosen = unique([name.encode()[: NAME_BYTES - 9].decode(errors="ignore") for name in names])
    return chosen
