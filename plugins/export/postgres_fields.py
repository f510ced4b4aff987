"""The columns of a PostgreSQL result: their types, and the SQL that writes their values in each format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .encoder import Column, unique
from .formula_guard import guarded, guarded_json
from .postgres_csv import Guard

if TYPE_CHECKING:
    from asyncpg import Attribute

NAME_BYTES = 63
"""Maximum length of a name in PostgreSQL, in bytes."""

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
"""Types by OID; the OIDs are the same on every server. Source: PostgreSQL, src/include/catalog/pg_type.dat."""

NOT_FINITE = b"null\t"
"""Marker that PostgreSQL writes for a number that JSON cannot represent: nothing else in a line contains a tab."""

NOT_FINITE_SQL = "null\\t"
"""`NOT_FINITE` in an SQL string of the form E'...'."""

COMPRESSION = 1024
"""Upper bound of the compression ratio of a stored value; pglz reaches about 90, LZ4 255."""

_SIZED = (17, 25, 1042, 1043)  # bytea, text, bpchar, varchar

_CHAR, _OID, _JSON, _FLOAT4 = 18, 26, 114, 700
_TEXTS = (18, 19, 25, 1043)
_RECORDS = (2249, 2287)


@dataclass(frozen=True, slots=True)
class Field:
    """A column of a result as PostgreSQL describes it; `ref` is its name in the SQL around the query."""

    column: Column
    ref: str
    oid: int
    nested: bool
    """Whether it is an array or a composite."""

    def csv(self) -> str:
        """Return the SQL of its cells."""
        match self.column.type:
            case "boolean":
                return f"{self.ref}::text"
            case "blob":
                return _base64(self.ref)
            case "any" if self.nested:
                return f"to_json({self.ref})::text"
        return self.ref

    @property
    def guard(self) -> Guard | None:
        """What guards its cells in CSV against formulas; None if they cannot be one."""
        match self.column.type:
            case "json":
                return guarded_json
            case "any" if self.nested:
                return guarded_json
            case "text" | "any":
                return guarded
        return None

    def _text(self) -> str:
        """Return the SQL of its text as PostgreSQL shows it; a cast would trim a bpchar and make IPs nets."""
        if self.oid in _TEXTS:
            return f"{self.ref}::text"
        return f"CASE WHEN {self.ref} IS NOT NULL THEN concat({self.ref}) END"

    @property
    def has_numbers(self) -> bool:
        """Whether its values are numbers that may be NaN or infinity."""
        return self.column.type in ("real", "decimal")

    def json(self, marked: bool) -> str:
        """Return the SQL of its values in a JSON object; if `marked`, with NOT_FINITE for NaN and infinity."""
        match self.column.type:
            case "integer" if self.oid == _OID:
                return f"{self.ref}::int8"  # to_json would make it a string
            case "real" | "decimal" if marked:
                # Not 0 for NaN and infinity.
                finite = f"{self.ref} - {self.ref} = 0 OR {self.ref} IS NULL"
                return f"CASE WHEN {finite} THEN to_json({self.ref}) ELSE E'{NOT_FINITE_SQL}'::json END"
            case "blob":
                return _base64(self.ref)
        if self.oid == _JSON or self.column.type == "any":  # a json retains the white space between its tokens
            return f"translate(to_json({self.ref})::text, E'\\n\\r\\t', '   ')::json"
        return self.ref

    def size_check(self, limit: int) -> str:
        """Return the SQL that fails for a value of more than `limit` bytes; empty for types that cannot be that large.

        The failure is a cast to boolean: nothing else raises an error with a text in a plain query. Of types whose
        text has to be written first, the stored size is checked before: no compression of PostgreSQL saves more than a
        factor of COMPRESSION.
        """
        if self.column.type not in ("text", "blob", "json", "any"):
            return ""
        if self.oid in _SIZED:  # their length is known without reading them
            exact = f"octet_length({self.ref})"
            large = f"{exact} > {limit}"
        else:
            exact = f"octet_length({self.ref}::text)"
            large = f"pg_column_size({self.ref}) > {limit // COMPRESSION} AND {exact} > {limit}"
        message = _literal(f"streamlab: column {self.column.name!r} holds ") + f" || {exact} || ' bytes'"
        return f"CASE WHEN {large} THEN CAST({message} AS boolean) ELSE true END"

    def value(self, form: str) -> tuple[str, str]:
        """Return the SQL of its values for an encoder, and their type there: values that Python represents exactly."""
        match self.column.type:
            case "date" | "time" | "timestamp" | "timestamptz" if form == "json":
                return f"btrim(to_json({self.ref})::text, '\"')", "text"  # PostgreSQL's range is larger than Python's
            case "date" | "timestamp" | "timestamptz":
                # asyncpg would return the year 9999 for infinity; it raises an error for years beyond those of Python.
                return f"CASE WHEN isfinite({self.ref}) THEN {self.ref} ELSE '20000-01-01' END", self.column.type
            case "interval":
                return f"{self.ref}::text", "text"  # a timedelta cannot hold months
            case "text" if self.oid == _CHAR:
                return f"{self.ref}::text", "text"
            case "real" if self.oid == _FLOAT4:
                return f"{self.ref}::text::float8", "real"  # 0.1, not 0.10000000149011612
            case "any" if self.nested:
                return f"to_json({self.ref})::text", "json"
            case "any":
                return self._text(), "text"
        return self.ref, self.column.type


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _base64(ref: str) -> str:
    return f"replace(encode({ref}, 'base64'), E'\\n', '')"


def fields_of(attributes: Sequence["Attribute"]) -> Sequence[Field]:
    """Return the fields of a result from the attributes that PostgreSQL describes."""
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
    """Return unique names, short enough not to be truncated by PostgreSQL."""
    chosen = unique(names)
    if max(len(name.encode()) for name in chosen) > NAME_BYTES:
        chosen = unique([name.encode()[: NAME_BYTES - 9].decode(errors="ignore") for name in names])
    return chosen
