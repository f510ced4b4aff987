"""Stream the tokens of a language model: a small embedded one, or any OpenAI-compatible upstream."""

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from aiohttp import web
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    model_validator,
)

from streamlab import (
    ANY,
    EVENTS,
    METRICS,
    PRINCIPAL,
    ErrorFormat,
    Problem,
    ResumeQuery,
    Scenario,
    Scope,
    client_of,
    endpoint,
    hookimpl,
    open_event_stream,
    open_stream,
    require,
    resume_id,
)

from .completion import Completion
from .completion_request import ChatCompletionRequest, LimitField, Rules, check_extra_field
from .embedded import MODEL, EmbeddedModel, missing
from .gateway import Gateway, GenerationSlots
from .generations import Generations, generation_of
from .openai import ErrorResponse, OpenAIError, openai_errors
from .upstream import Upstream

BODY_BYTES = 256 * 1024
"""Maximum request body, in bytes."""

KEEP_ALIVE = b": the model is at work\n\n"
"""The comment that a client of /v1 receives while the upstream is silent."""


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError("must be an http:// or https:// URL, without /chat/completions")
    if parts.username or parts.password:
        raise ValueError("must not contain a password: api_key_env names the variable that holds the key")
    if parts.query or parts.fragment:
        raise ValueError("must not have a query or a fragment")
    return url


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


StopText = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class Sampling(BaseModel):
    """How a response is generated."""

    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="Maximum tokens to generate.", examples=[40])
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the most likely token.")
    seed: int | None = Field(None, ge=0, lt=2**31, description="The same seed gives the same response, if possible.")
    stop: Annotated[list[StopText], BeforeValidator(_as_list)] = Field(
        [], max_length=4, description="The response ends before one of these texts."
    )


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


class ChatQuery(Sampling):
    """A prompt, in the query."""

    prompt: Text = Field(max_length=8000, description="The text for the model.", examples=["Hello"])


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatBody(Sampling):
    """A prompt, or the conversation so far, as a JSON document."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Hello", "max_tokens": 40}]})

    prompt: Text | None = Field(None, description="The text for the model; either this or messages.")
    messages: list[Message] | None = Field(None, min_length=1, max_length=1000, description="The conversation so far.")

    @model_validator(mode="after")
    def _has_one_of_both(self) -> "ChatBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either prompt or messages")
        return self


class GenerationPath(BaseModel):
    """The path of a generation."""

    id: str = Field(pattern="^[0-9a-f]{32}$", description="The generation's id.", examples=["0" * 32])


class ModelPath(BaseModel):
    """The path of a model."""

    id: str = Field(
        min_length=1, max_length=512, description="The model's name, as /v1/models lists it.", examples=[MODEL]
    )


class ChatEventsQuery(ResumeQuery, ChatQuery):
    """A prompt, in the query, whose response can be resumed."""


class Llm(Scenario):
    """Tokens of a language model as they are generated: as text, as events that can be resumed, or as /v1."""

    name = "llm"

    error_formats = (ErrorFormat("/v1/", "application/json", ErrorResponse, OpenAIError.of),)

    url: Annotated[str, AfterValidator(_base_url)] = ""
    """URL of an OpenAI-compatible upstream, without /chat/completions; where it is empty, a small model runs here."""
    model: str = ""
    """Name of the upstream's model."""
    api_key_env: str = ""
    """Environment variable that holds the upstream's key."""
    max_generations: int = Field(4, ge=1, le=1000)
    """Maximum concurrent generations; a request for several responses (`n`) counts as that many."""
    max_waiting: int = Field(16, ge=0, le=10_000)
    """Maximum requests that wait for a slot; one more gets 429 with Retry-After. Clients take turns."""
    wait_seconds: float = Field(30.0, gt=0, le=3600)
    """Maximum wait for a slot, in seconds."""
    max_tokens: int = Field(512, ge=1, le=1_000_000)
    """Maximum tokens of a response; where a request has no limit, this one is sent to the upstream."""
    limit_field: LimitField = "max_tokens"
    """Name under which the upstream takes that limit."""
    max_prompt_tokens: int = Field(1024, ge=1, le=10_000_000)
    """Maximum tokens of a prompt, with tools and schemas; for an upstream, a token counts as four bytes."""
    extra_fields: list[Annotated[str, AfterValidator(check_extra_field)]] = Field([], max_length=50)
    """Fields of requests to /v1 that are sent to the model although docs/openai.md does not list them."""
    max_seconds: float = Field(300.0, ge=0.1, le=86_400)
    """Maximum duration of a generation, in seconds, from the moment it has its slot."""
    stall_seconds: float = Field(120.0, ge=0.1, le=3600)
    """Seconds without data (comments are not data) after which an upstream has failed."""
    abandon_seconds: float = Field(30.0, ge=0.1, le=3600)
    """Seconds without a follower after which a generation of /ai/chat-stream-sse is stopped."""
    max_stored: int = Field(10_000, ge=1, le=1_000_000)
    """Maximum stored generations of one process, half of them of one client; one more gets 429 with Retry-After."""
    keep_seconds: float = Field(3600.0, ge=1, le=7 * 86_400)
    """Retention of the events of a generation, in seconds."""

    _gateway: Gateway | None = PrivateAttr(None)
    _generations: Generations = PrivateAttr()

    @model_validator(mode="after")
    def _upstream_is_complete(self) -> "Llm":
        if self.url and not self.model:
            raise ValueError("url needs model, the name of the upstream's model")
        if not self.url and (self.model or self.api_key_env):
            raise ValueError("model and api_key_env belong to an upstream; url is missing")
        if not self.url and self.limit_field != "max_tokens":
            raise ValueError("limit_field belongs to an upstream; url is missing")
        return self

    @property
    def _rules(self) -> Rules:
        return Rules(
            model=self.model_name,
            max_tokens=self.max_tokens,
            max_choices=self.max_generations,
            embedded=not self.url,
            limit_field=self.limit_field,
            extra_fields=frozenset(self.extra_fields),
        )

    @property
    def model_name(self) -> str:
        """The name under which clients know the model."""
        return self.model or MODEL

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Run the embedded model, or hold connections to the upstream, while the server runs."""
        async with AsyncExitStack() as stack:
            embedded = None
            if self.url:
                if reason := self._missing_key():
                    raise Problem(503, reason)
                upstream = Upstream(self.url, key=self._key())
            else:
                embedded = EmbeddedModel(slots=self.max_generations, context=self.max_prompt_tokens + self.max_tokens)
                await stack.enter_async_context(embedded.running())
                upstream = Upstream("http://localhost", socket=embedded.socket)
            upstream.stall_seconds, upstream.max_seconds = self.stall_seconds, self.max_seconds
            await stack.enter_async_context(upstream.opened())
            gateway = self._gateway = Gateway(
                upstream,
                GenerationSlots(self.max_generations, self.max_waiting, wait_seconds=self.wait_seconds),
                embedded=embedded,
                max_prompt_tokens=self.max_prompt_tokens,
                extra_fields=self.extra_fields,
                registry=app[METRICS].registry,
            )
            self._generations = Generations(
                app[EVENTS], gateway, self.keep_seconds, self.abandon_seconds, self.max_stored
            )
            await stack.enter_async_context(self._generations.opened())
            yield

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""

    def _missing_key(self) -> str | None:
        """Return why there is no key for the upstream; None if there is one, or none is needed."""
        if self.api_key_env and not self._key():
            return f"the environment variable {self.api_key_env} does not hold the upstream's key"
        return None

    @hookimpl
    def check(self) -> Iterator[tuple[str, str]]:
        """Report a missing key; no upstream is connected to."""
        if reason := self._missing_key():
            yield "api_key_env", reason

    @hookimpl
    def health(self) -> str | None:
        """Return why there is no model: not installed, not running, or the upstream's last request failed."""
        if self._gateway is not None:
            return self._gateway.trouble
        return None if self.url else missing()

    def _complete(self, request: web.Request, body: Mapping[str, Any]) -> AbstractAsyncContextManager[Completion]:
        assert self._gateway is not None, "the server has not started"
        return self._gateway.complete(body, client_of(request))

    # -- text

    def _require_model(self, request: web.Request) -> None:
        """Raise Problem 401 or 403 unless the client may use the model, which is the resource of its scopes."""
        require(request, Scope(self.name, "write", self.model_name))

    @endpoint("GET", "/ai/chat-stream", query=ChatQuery, resource=ANY, starts_work=True, sends="text/plain")
    async def text(self, request: web.Request, query: ChatQuery) -> web.StreamResponse:
        """Stream the response to a prompt as plain text, token by token; disconnecting stops the work."""
        return await self._text(request, self._body(query, [{"role": "user", "content": query.prompt}]))

    @endpoint(
        "POST",
        "/ai/chat-stream",
        body=ChatBody,
        resource=ANY,
        body_limit=BODY_BYTES,
        sends="text/plain",
    )
    async def text_of_body(self, request: web.Request, body: ChatBody) -> web.StreamResponse:
        """Stream the response to a prompt or a conversation as plain text."""
        return await self._text(request, self._body(body, _messages(body)))

    async def _text(self, request: web.Request, body: Mapping[str, Any]) -> web.StreamResponse:
        self._require_model(request)
        async with (
            self._complete(request, body) as completion,
            open_stream(request, "text/plain; charset=utf-8") as stream,
            aclosing(completion.texts()) as batches,
        ):
            async for texts in batches:
                await stream.write("".join(texts).encode())
        return stream

    # -- events

    @endpoint(
        "GET",
        "/ai/chat-stream-sse",
        query=ChatEventsQuery,
        resource=ANY,
        starts_work=True,
        sends="text/event-stream",
        responses={204: "The client already has the end of the response."},
    )
    async def events(self, request: web.Request, query: ChatEventsQuery) -> web.StreamResponse:
        """Stream the response to a prompt as events: `token` with `text` and `index`, then `end` with usage and times.

        A client that reconnects with an id resumes the same generation, which continues for a while without followers.
        """
        body = self._body(query, [{"role": "user", "content": query.prompt}])
        return await self._events(request, body, query.last_event_id)

    @endpoint(
        "POST",
        "/ai/chat-stream-sse",
        body=ChatBody,
        resource=ANY,
        body_limit=BODY_BYTES,
        sends="text/event-stream",
        responses={204: "The client already has the end of the response."},
    )
    async def events_of_body(self, request: web.Request, body: ChatBody) -> web.StreamResponse:
        """Stream the response to a prompt or a conversation as events that can be resumed."""
        return await self._events(request, self._body(body, _messages(body)), "")

    async def _events(self, request: web.Request, body: Mapping[str, Any], after: str) -> web.StreamResponse:
        id = generation_of(resume_id(request, after))  # noqa: A001
        if id is None:
            self._require_model(request)
            id = (await self._generations.start(request, body)).id  # noqa: A001
        headers = {"Location": f"/ai/generations/{id}"}
        return await self._generations.follow(request, id, after, headers, gap_if_unknown=True)

    @endpoint(
        "GET",
        "/ai/generations/{id}",
        path_model=GenerationPath,
        resource=ANY,
        query=ResumeQuery,
        sends="text/event-stream",
        responses={204: "The client already has the end of the response.", 404: "The generation does not exist."},
    )
    async def generation(self, request: web.Request, path: GenerationPath, query: ResumeQuery) -> web.StreamResponse:
        """Follow a generation from its beginning, or after an event; any number of clients may."""
        return await self._generations.follow(request, path.id, query.last_event_id)

    @endpoint(
        "DELETE",
        "/ai/generations/{id}",
        path_model=GenerationPath,
        resource=ANY,
        sends=(),
        responses={
            202: "Another server on this event log has been requested to stop it.",
            204: "It is stopped, or had ended.",
            404: "The generation does not exist.",
        },
        curl="{url}",
    )
    async def stop(self, request: web.Request, path: GenerationPath) -> web.StreamResponse:
        """Stop a generation for all its followers."""
        stopped = await self._generations.stop(request, path.id)
        return web.Response(status=204 if stopped else 202)

    # -- the OpenAI API

    @endpoint("GET", "/v1/models", resource=ANY, sends="application/json", curl="{url}")
    async def models(self, request: web.Request) -> web.Response:
        """List the model if the client may use it, as the OpenAI API does."""
        visible = request[PRINCIPAL].visible(self.name, [self.model_name])
        models = {"object": "list", "data": [self._model_object() for _ in visible]}
        return web.json_response(models, headers={"Cache-Control": "no-cache"})

    @endpoint(
        "GET",
        "/v1/models/{id:.+}",
        path_model=ModelPath,
        resource="id",
        sends="application/json",
        responses={404: "This server does not have the model."},
        curl="{url}",
    )
    async def model_of(self, request: web.Request, path: ModelPath) -> web.Response:
        """Describe the model, as the OpenAI API does."""
        if path.id != self.model_name:
            detail = f"Unknown model; this server has {self.model_name!r} only."
            raise OpenAIError(404, detail, param="model", code="model_not_found")
        return web.json_response(self._model_object(), headers={"Cache-Control": "no-cache"})

    def _model_object(self) -> dict[str, Any]:
        return {"id": self.model_name, "object": "model", "created": 0, "owned_by": "streamlab"}

    @endpoint(
        "POST",
        "/v1/chat/completions",
        body=ChatCompletionRequest,
        resource=ANY,
        body_limit=BODY_BYTES,
        sends=("application/json", "text/event-stream"),
        responses={429: "Too many generations are running and waiting; see Retry-After."},
    )
    async def completions(self, request: web.Request, body: ChatCompletionRequest) -> web.StreamResponse:
        """Respond as the OpenAI API does, streaming or not; the events of the upstream are passed on unchanged.

        Unknown fields are rejected with 400; docs/openai.md lists the known ones.
        """
        self._require_model(request)
        async with self._complete(request, self._rules.upstream_body(body)) as completion:
            if not body.stream:
                return web.Response(body=await completion.read(), content_type="application/json")
            async with open_event_stream(request) as stream:
                with openai_errors():
                    async with aclosing(completion.blocks()) as blocks:
                        async for block in blocks:
                            await stream.write(block.raw or KEEP_ALIVE)
            return stream

    def _body(self, sampling: Sampling, messages: list[dict[str, str]]) -> dict[str, Any]:
        """Return the body of a request to the upstream; raises Problem 422 for more tokens than are allowed."""
        if sampling.max_tokens is not None and sampling.max_tokens > self.max_tokens:
            raise Problem.parameter("max_tokens", f"must be at most {self.max_tokens}")
        body = sampling.model_dump(include={"temperature", "seed"}, exclude_none=True)
        if sampling.stop:
            body["stop"] = sampling.stop
        return {
            "model": self.model_name,
            "messages": messages,
            self.limit_field: sampling.max_tokens or self.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **body,
        }


def _messages(body: ChatBody) -> list[dict[str, str]]:
    if body.messages is None:
        return [{"role": "user", "content": cast("str", body.prompt)}]
    return [message.model_dump() for message in body.messages]


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Return the scenario of the language model."""
    return [Llm]
