"""The peers of the exports: the same query as usually served with FastAPI, by sqlite3 and by SQLAlchemy."""

import csv
import io
import json
import os
import sqlite3
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

DATABASE = os.environ["BENCH_DATABASE"]
SQL = os.environ["BENCH_SQL"] + " LIMIT :limit"
WITH_SQLALCHEMY = "BENCH_SQLALCHEMY" in os.environ  # one application per process, to separate their memory
PARTITION = 1000

app = FastAPI()


@app.get("/health")
async def health() -> dict[str, str]:
    """Respond immediately, unless the event loop is blocked."""
    return {"status": "ok"}


if WITH_SQLALCHEMY:
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(f"sqlite+aiosqlite:///{DATABASE}")

    @app.get("/export/users/csv")
    async def partitions(limit: int = -1) -> StreamingResponse:
        """Send CSV from an asynchronous result, a chunk per partition."""

        async def chunks() -> AsyncIterator[str]:
            async with engine.connect() as connection:
                result = await connection.stream(text(SQL), {"limit": limit})
                buffer = io.StringIO()
                writer = csv.writer(buffer)
                writer.writerow(result.keys())
                async for rows in result.partitions(PARTITION):
                    writer.writerows(rows)
                    yield buffer.getvalue()
                    buffer.seek(0)
                    buffer.truncate()

        return StreamingResponse(chunks(), media_type="text/csv")

else:

    @app.get("/export/users/csv")
    async def csv_lines(limit: int = -1) -> StreamingResponse:
        """Send CSV as FastAPI's tutorial streams: an async generator that yields a line per row."""

        async def lines() -> AsyncIterator[str]:
            connection = sqlite3.connect(DATABASE)
            try:
                cursor = connection.execute(SQL, {"limit": limit})
                buffer = io.StringIO()
                writer = csv.writer(buffer)
                writer.writerow(entry[0] for entry in cursor.description)
                for row in cursor:
                    writer.writerow(row)
                    yield buffer.getvalue()
                    buffer.seek(0)
                    buffer.truncate()
            finally:
                connection.close()

        return StreamingResponse(lines(), media_type="text/csv")

    @app.get("/export/users/jsonl")
    async def json_lines(limit: int = -1) -> StreamingResponse:
        """Send JSON lines alike: a json.dumps per row."""

        async def lines() -> AsyncIterator[str]:
            connection = sqlite3.connect(DATABASE)
            connection.row_factory = sqlite3.Row
            try:
                for row in connection.execute(SQL, {"limit": limit}):
                    yield json.dumps(dict(row)) + "\n"
            finally:
                connection.close()

        return StreamingResponse(lines(), media_type="application/jsonl")
