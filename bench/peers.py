"""The peers that are Python applications: the same download as it is usually written with FastAPI and Starlette."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiofiles
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route

FILE = Path(os.environ["BENCH_FILE"])
SIZE = FILE.stat().st_size
CHUNK = 64 * 1024

fastapi_way = FastAPI()


@fastapi_way.get("/download/large-file")
async def stream() -> StreamingResponse:
    """Send the file as FastAPI's tutorial does: a StreamingResponse over an async generator, 64 KiB a chunk."""

    async def chunks() -> AsyncIterator[bytes]:
        async with aiofiles.open(FILE, "rb") as file:
            while chunk := await file.read(CHUNK):
                yield chunk

    # The tutorial leaves the length out. It is given here so that the client can check it; it spares chunked framing.
    return StreamingResponse(chunks(), media_type="application/octet-stream", headers={"Content-Length": str(SIZE)})


async def _whole(request: Request) -> FileResponse:
    return FileResponse(FILE, media_type="application/octet-stream")


starlette_file = Starlette(routes=[Route("/download/large-file", _whole)])
