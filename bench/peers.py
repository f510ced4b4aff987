"""Peers in Python: the same download as usually written with FastAPI and Starlette."""

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

fastapi_file = FastAPI()


@fastapi_file.get("/download/large-file")
async def stream() -> StreamingResponse:
    """Send the file as FastAPI's tutorial does: a StreamingResponse over an async generator of 64 KiB chunks."""

    async def chunks() -> AsyncIterator[bytes]:
        async with aiofiles.open(FILE, "rb") as file:
            while chunk := await file.read(CHUNK):
                yield chunk

    # The tutorial omits the length. It is set here so that the client can check it; it avoids chunked framing.
    return StreamingResponse(chunks(), media_type="application/octet-stream", headers={"Content-Length": str(SIZE)})


async def _file(request: Request) -> FileResponse:
    return FileResponse(FILE, media_type="application/octet-stream")


starlette_file = Starlette(routes=[Route("/download/large-file", _file)])
