"""The formats of an export by name.

csv      RFC 4180, a header row, quotes only where they are needed
jsonl    JSON Lines: an object a line
json     one array of the same objects, a line each
arrow    the Arrow IPC stream: a record batch per call
parquet  Apache Parquet: row groups of some 64k rows
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from .arrow_formats import Arrow, Parquet
from .csv_format import Csv
from .encoder import Column, Encoder, unique
from .json_formats import JsonArray, JsonLines
from .values import encodable

Format = Literal["csv", "jsonl", "json", "arrow", "parquet"]

FORMATS: Final[Mapping[Format, type[Csv | JsonLines | JsonArray | Arrow | Parquet]]] = {
    "csv": Csv,
    "jsonl": JsonLines,
    "json": JsonArray,
    "arrow": Arrow,
    "parquet": Parquet,
}
"""The encoder of each format by its name."""


def make(
    format: str,  # noqa: A002
    columns: Sequence[Column],
    *,
    formula_guard: bool = True,
    header: bool = True,
    strict: bool = False,
) -> Encoder:
    """Return an encoder of one of `FORMATS`, with unique column names.

    `formula_guard` and `header` are options of CSV. `strict` is one of JSON: raise ValueError for a value that it would
    have to alter, instead of counting it. Raises ValueError for an unknown format, and MissingLibrary.
    """
    names = unique(encodable(column.name) for column in columns)
    columns = [Column(name, column.type) for name, column in zip(names, columns, strict=True)]
    match format:
        case "csv":
            return Csv(columns, formula_guard=formula_guard, header=header)
        case "jsonl":
            return JsonLines(columns, strict=strict)
        case "json":
            return JsonArray(columns, strict=strict)
        case "arrow":
            return Arrow(columns)
        case "parquet":
            return Parquet(columns)
    raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
