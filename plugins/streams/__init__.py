"""Serve streams that clients create, append to and follow: the Durable Streams protocol on the event log."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints
from yarl import URL

from streamlab import EVENTS, ErrorFormat, Problem, Scenario, Scope, endpoint, hookimpl, public_path, read_body, require

from .protocol import CLOSED, NEXT_OFFSET, format_offset, read_append, read_creation
from .reading import Reader
from .several import MAX_STREAMS, follow_all
from .store import Limits, Store, Stream
from .writing import Writer

PATH = "/v1/stream"

TYPES = ("application/json", "text/plain", "application/octet-stream")
"""Examples of media types; a stream may have any."""


StreamName = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]+$")]


class StreamPath(BaseModel):
    """The path of a stream."""

    path: StreamName = Field(description="The name of the stream; it may have slashes.", examples=["demo"])


class ReadQuery(BaseModel):
    """From where a stream is read, and whether the response waits for more; unknown parameters are ignored."""

    model_config = ConfigDict(extra="allow")

    offset: list[str] | None = Field(
        None,
        description="A Stream-Next-Offset, -1 for the start (the default), or now for the end.",
        examples=[["-1"]],
    )
    live: list[str] | None = Field(None, description="long-poll or sse: wait for more.", examples=[["sse"]])
    cursor: list[str] | None = Field(None, description="The Stream-Cursor of the response before.")


class SeveralQuery(BaseModel):
    """Which streams to follow, and from where."""

    stream: list[StreamName] = Field(
        min_length=1, max_length=MAX_STREAMS, description="The paths of streams, repeated.", examples=[["demo"]]
    )
    offset: str = Field("-1", max_length=4000, description="The id of an event, -1 for the start, or now for the end.")
    live: Literal["sse"] = Field("sse", description="How they are followed: as events.")


class StreamProblem(BaseModel):
    """Why a request to a stream was rejected (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] | None = None


def _as_protocol(problem: Problem) -> Problem:
    """Return a problem with the status that the protocol has for it: an invalid parameter is 400."""
    if problem.status == 422:
        return Problem(400, problem.detail, errors=problem.errors, headers=problem.headers)
    return problem


class Streams(Scenario):
    """Streams of your own: create, append and follow them over HTTP, resumable from any offset (Durable Streams)."""

    path: Annotated[str, StringConstraints(pattern=r"^(/[A-Za-z0-9._~-]+)+$")] = PATH
    """Path below which streams are served."""
    long_poll_seconds: float = Field(30.0, ge=0.1, le=300)
    """Time after which a long poll without news ends, in seconds."""
    sse_seconds: float = Field(60.0, ge=1, le=86_400)
    """Time after which an event stream ends, so that its client reconnects, in seconds."""
    max_streams: int = Field(10_000, ge=1, le=1_000_000)
    """Maximum number of streams; one more gets 429."""
    max_stream_bytes: int = Field(64 * 1024 * 1024, ge=1024, le=2**40)
    """Maximum bytes of a stream; more gets 413."""
    max_message_bytes: int = Field(1024 * 1024, ge=1024, le=8 * 1024 * 1024)
    """Maximum bytes of a request, which is one message; more gets 413."""
    max_producers: int = Field(1000, ge=1, le=100_000)
    """Maximum number of idempotent producers of a stream; one more gets 429."""

    channels: dict[StreamName, str] = Field({}, max_length=1000)
    """Channels of the event log that can be read as streams, by the path of the stream."""

    _store: Store = PrivateAttr()
    _writer: Writer = PrivateAttr()
    _reader: Reader = PrivateAttr()

    def routes(self) -> list[Any]:
        """Return the endpoints below the path, and with the body limit, of this configuration."""
        form = ErrorFormat(self.path, "application/problem+json", StreamProblem, _as_protocol)
        routes = []
        for route in super().routes():
            path = self.path + route.endpoint.path.removeprefix(PATH)
            declared = replace(route.endpoint, path=path, body_limit=self.max_message_bytes)
            routes.append(replace(route, endpoint=declared, error_format=form))
        return routes

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Open the streams of the event log."""
        limits = Limits(self.max_streams, self.max_stream_bytes, self.max_producers)
        self._store = Store(app[EVENTS], limits, self.channels)
        self._writer = Writer(self._store)
        self._reader = Reader(self._store, long_poll_seconds=self.long_poll_seconds, sse_seconds=self.sse_seconds)
        yield

    @endpoint(
        "PUT",
        "/v1/stream/{path:.+}",
        path_model=StreamPath,
        resource="path",
        takes=TYPES,
        responses={
            201: "The stream is created.",
            405: "The stream is a channel, which can only be read.",
            409: "It exists with another configuration.",
            429: "There are too many streams.",
        },
        curl="-H 'Content-Type: application/json' {url}",
    )
    async def create(self, request: web.Request, path: StreamPath) -> web.StreamResponse:
        """Create a stream, or make sure that it exists.

        The body, if any, is its first content. `Stream-TTL` or `Stream-Expires-At` limit its life, `Stream-Closed`
        creates it complete, `Stream-Forked-From` as a copy of another.
        """
        self._store.require_writable(path.path)
        wanted = read_creation(request, f"{self.path}/")
        if wanted.fork is not None:
            require(request, Scope(self.name, "read", wanted.fork.source))
        stream, is_new = await self._store.create(path.path, wanted, await _body(request))
        headers = {"Content-Type": stream.config.content_type, **_state(stream)}
        if is_new:
            headers["Location"] = str(_url(request))
        return web.Response(status=201 if is_new else 200, headers=headers)

    @endpoint(
        "POST",
        "/v1/stream/{path:.+}",
        path_model=StreamPath,
        resource="path",
        takes=TYPES,
        responses={
            204: "It is stored, or was stored before.",
            403: "The epoch of the producer has ended.",
            404: "There is no such stream.",
            409: "The stream is closed, or has another content type, or a sequence number is wrong.",
            410: "The stream was deleted.",
            413: "The body is too large, or the stream would be.",
        },
        curl='--json \'{"hello": "world"}\' {url}',
    )
    async def append(self, request: web.Request, path: StreamPath) -> web.StreamResponse:
        """Append the body to a stream, close it with `Stream-Closed: true`, or both at once.

        It is stored when the response comes; with `Producer-Id`, `Producer-Epoch` and `Producer-Seq`, it is stored
        once, however often it is sent.
        """
        self._store.require_writable(path.path)
        return await self._writer.append(path.path, read_append(request, await _body(request)))

    @endpoint(
        "GET",
        "/v1/stream/{path:.+}",
        path_model=StreamPath,
        query=ReadQuery,
        resource="path",
        sends=(*TYPES, "text/event-stream"),
        responses={
            204: "Nothing came before the timeout of a long poll, or nothing will come any more.",
            304: "The client has it already.",
            404: "There is no such stream.",
            410: "What follows the offset is not stored any more.",
        },
        curl="-N {url}",
    )
    async def read(self, request: web.Request, path: StreamPath, query: ReadQuery) -> web.StreamResponse:
        """Read a stream from an offset on: what there is, or with `live` also what comes.

        `Stream-Next-Offset` is where the next request continues. HEAD returns where the stream ends, and its lifetime.
        """
        if request.method == "HEAD":
            return await self._reader.metadata(path.path)
        return await self._reader.read(request, path.path, query.model_dump(include={"offset", "live", "cursor"}))

    @endpoint(
        "GET",
        "/v1/streams",
        query=SeveralQuery,
        resource="stream",
        sends="text/event-stream",
        responses={
            204: "All of the streams are closed, and the client has them.",
            404: "One of the streams does not exist.",
            410: "What follows the position in one of them is not stored any more.",
        },
        curl="-N {url}",
    )
    async def follow(self, request: web.Request, query: SeveralQuery) -> web.StreamResponse:
        """Follow several streams on one connection; the id of an event resumes all of them."""
        return await follow_all(request, self._reader, query.stream, query.offset)

    @endpoint(
        "DELETE",
        "/v1/stream/{path:.+}",
        path_model=StreamPath,
        resource="path",
        responses={204: "The stream is deleted.", 404: "There is no such stream.", 410: "It was deleted before."},
        curl="{url}",
    )
    async def delete(self, request: web.Request, path: StreamPath) -> web.StreamResponse:
        """Delete a stream; its forks remain."""
        self._store.require_writable(path.path)
        await self._store.delete(path.path)
        return web.Response(status=204)


async def _body(request: web.Request) -> bytes:
    """Return the body of a request, whatever its type."""
    return await read_body(request, (request.content_type,)) if request.body_exists else b""


def _state(stream: Stream) -> dict[str, str]:
    closed = {CLOSED: "true"} if stream.is_closed else {}
    return {NEXT_OFFSET: format_offset(stream.batch.last), **closed}


def _url(request: web.Request) -> URL:
    """Return the absolute URL of a stream, as its client has it."""
    return request.url.origin().join(URL(public_path(request, request.rel_url.raw_path), encoded=True))


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Return the streams."""
    return [Streams]
