"""The peer of the gateway: a proxy as usually written with FastAPI and httpx."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

URL = os.environ["BENCH_UPSTREAM"]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the client while the application runs."""
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as app.state.client:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def completions(request: Request) -> StreamingResponse:
    """Forward a response, line by line."""
    body = await request.body()

    async def lines() -> AsyncIterator[str]:
        headers = {"Content-Type": "application/json"}
        async with app.state.client.stream("POST", URL, content=body, headers=headers) as response:
            async for line in response.aiter_lines():
                yield line + "\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
