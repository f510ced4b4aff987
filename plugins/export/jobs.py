"""Exports as long tasks: a report on the users of the sample, and a result written to a file."""

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from pydantic import Field

from streamlab import Progress

from .formats import Format
from .request import RowsQuery
from .source import Query, Selection, body

if TYPE_CHECKING:
    from . import Exports

TOTALS = """
    SELECT country, substr(created, 1, 7) AS month, count(*) AS users, sum(balance) AS balance
    FROM users WHERE id > :after AND id <= :until GROUP BY country, substr(created, 1, 7)
"""


class Jobs:
    """The tasks of an export scenario."""

    def __init__(self, exports: "Exports") -> None:
        self._exports = exports

    async def report(
        self,
        progress: Progress,
        steps: Annotated[int, Field(ge=1, le=100_000, description="Number of batches.")] = 100,
    ) -> dict[str, Any]:
        """Count the users of the sample database by country and by month, a batch at a time."""
        await progress(progress.done, message="preparing the sample database")
        first, last = await self._bounds()
        size = -(-(last - first) // steps) or 1
        state = progress.checkpoint or {"after": first, "users": 0, "countries": {}, "months": {}}
        while (after := state["after"]) < last:
            await progress(after - first, last - first, "counting users")
            until = min(last, after + size)
            for row in await self._rows(Query(TOTALS, {"after": after, "until": until})):
                for table, key in (("countries", row["country"]), ("months", row["month"])):
                    total = state[table].setdefault(key, {"users": 0, "balance": 0.0})
                    total["users"] += row["users"]
                    total["balance"] = round(total["balance"] + (row["balance"] or 0), 2)
                state["users"] += row["users"]
            state["after"] = until
            progress.checkpoint = state
        await progress(last - first, last - first)
        return {name: dict(sorted(state[name].items())) for name in ("countries", "months")} | {"users": state["users"]}

    async def _bounds(self) -> tuple[int, int]:
        (row,) = await self._rows(Query("SELECT min(id) - 1 AS first, max(id) AS last FROM users"))
        return int(row["first"] or 0), int(row["last"] or 0)

    async def _rows(self, query: Query) -> Sequence[Mapping[str, Any]]:
        async with self._exports.limited("report"):
            source = await self._exports.source()
            async with source.export(query, Selection(), "jsonl", formula_guard=False) as (export, _):
                text = b"".join([data async for data in export.chunks()])
        return [msgspec.json.decode(line) for line in text.splitlines()]

    async def export(
        self,
        progress: Progress,
        name: Annotated[str, Field(max_length=64, description="Name of the export; GET /export lists all.")] = "users",
        format: Annotated[Format, Field(description="The format.")] = "csv",  # noqa: A002
        columns: Annotated[
            list[Annotated[str, Field(max_length=200)]],
            Field(max_length=200, description="Only these columns; empty for all."),
        ] = [],  # noqa: B006
        limit: Annotated[int | None, Field(ge=0, le=10**12, description="Maximum number of rows.")] = None,
        strict: Annotated[bool, Field(description="Fail instead of altering values.")] = False,
    ) -> dict[str, Any]:
        """Write an export to a file, completely or not at all, for a later download."""
        query = RowsQuery(columns=columns, limit=limit, strict=strict)
        async with (
            self._exports.opened(name, format, query) as export,
            # The whole id: it begins with the time, which tasks of one millisecond share.
            self._exports.files.writing(f"{name}-{progress.id}.{export.encoder.extension}") as file,
        ):
            result = export.result
            await progress(0, limit, f"writing {file.name}")
            async with self._exports.limited(name, export.deadline), aclosing(body(result)) as chunks:
                async for data in chunks:
                    await file.write(data)
                    await progress(result.rows)
            altered = self._exports.report_altered(name, result)
            await file.write(export.encoder.end(result.rows, None, altered))
            await file.commit()
        await progress(result.rows, result.rows)
        return {
            "file": file.name,
            "url": self._exports.file_url(file.name),
            "rows": result.rows,
            "altered": altered,
            "bytes": file.size,
            "sha256": file.sha256,
        }
