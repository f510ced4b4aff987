"""Stream the tokens of a language model: a small embedded one, or any OpenAI-compatible upstream."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import cached_property
from typing import Annotated, Any, Literal, cast

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
    SHARED,
    ErrorFormat,
    Principal,
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
from .completion_request import ChatCompletionRequest, LimitField
from .embedded import MODEL, missing
from .gateway import Gateway
from .generations import Generations, generation_of
from .models import CHAT, LIMITS, ConfiguredModel, ExtraFields, ModelSettings, Name, Path, Url
from .openai import ErrorResponse, OpenAIError, openai_errors
from .text_request import CompletionRequest, EmbeddingRequest

BODY_BYTES = 256 * 1024
"""Maximum request body, in bytes."""

KEEP_ALIVE = b": the model is at work\n\n"
"""The comment that a client of /v1 receives while the upstream is silent."""


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

    url: Url = ""
    """URL of an OpenAI-compatible upstream, without /chat/completions; where it is empty, a small model runs here."""
    model: str = ""
    """Name of the upstream's model."""
    api_key_env: str = ""
    """Environment variable that holds the upstream's key."""
    fallback: list[Name] = Field([], max_length=10)
    """Models of the tables below that a request is sent to, in turn, where this one fails before the first token."""
    models: dict[Name, ConfiguredModel] = Field({}, max_length=100)
    """Models by the names under which clients know them. Without `url` above, the first is the default."""
    retry_seconds: float = Field(2.0, ge=0, le=60)
    """Maximum Retry-After of an upstream's 429 or 503 that is waited for, once; a longer one is passed on."""
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
    extra_fields: ExtraFields = Field([])
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
    def _models_are_complete(self) -> "Llm":
        if self.url and not self.model:
            raise ValueError("url needs model, the name of the upstream's model")
        if not self.url and (self.model or self.api_key_env):
            raise ValueError("model and api_key_env belong to an upstream; url is missing")
        if not self.url and not self.models and self.limit_field != "max_tokens":
            raise ValueError("limit_field belongs to an upstream; url is missing")
        if not self.url and self.models and self.fallback:
            raise ValueError("fallback belongs to the model of url, which is missing; each table of models has its own")
        self._check_models()
        return self

    def _check_models(self) -> None:
        """Raise ValueError, which names the table, where the models do not fit together."""
        if self.url and self.model in self.models:
            raise ValueError(f"models.{self.model}: the model of url has this name already")
        embedded = [name for name, model in self.models.items() if not model.url]
        if len(embedded) > 1:
            raise ValueError(f"models.{embedded[1]}: url is missing; only one model, {embedded[0]}, can be embedded")
        for name in embedded:
            if self.models[name].model or self.models[name].api_key_env:
                raise ValueError(f"models.{name}: model and api_key_env belong to an upstream; url is missing")
        for settings in self.model_settings:
            for other in settings.fallback:
                if other == settings.name or other not in self.models:
                    others = ", ".join(sorted(set(self.models) - {settings.name})) or "none"
                    raise ValueError(f"fallback of {settings.name}: {other!r} is not another model of models: {others}")

    @cached_property
    def model_settings(self) -> Sequence[ModelSettings]:
        """Every model with its limits; the first is the default."""
        tables = dict(self.models)
        if self.url or not tables:
            first = ConfiguredModel(
                url=self.url, model=self.model, api_key_env=self.api_key_env, fallback=self.fallback
            )
            tables = {self.model or MODEL: first, **tables}
        return [self._settings(name, table) for name, table in tables.items()]

    def _settings(self, name: str, table: ConfiguredModel) -> ModelSettings:
        limits = {key: getattr(self if getattr(table, key) is None else table, key) for key in LIMITS}
        return ModelSettings(
            name=name,
            url=table.url,
            model=(table.model or name) if table.url else MODEL,
            api_key_env=table.api_key_env,
            fallback=tuple(table.fallback),
            wait_seconds=self.wait_seconds,
            retry_seconds=self.retry_seconds,
            **{**limits, "extra_fields": tuple(limits["extra_fields"])},
        )

    def settings_of(self, name: str | None, principal: Principal) -> ModelSettings:
        """Return the settings of a model, or of the default one; raises OpenAIError 404, which has the names.

        The names are those of the models that the client may use.
        """
        every = self.model_settings
        if name is None:
            return every[0]
        if (found := next((settings for settings in every if settings.name == name), None)) is not None:
            return found
        names = ", ".join(map(repr, principal.visible(self.name, [settings.name for settings in every])))
        detail = f"Unknown model; this server has {names or 'none for you'}{' only' if len(every) == 1 else ''}."
        raise OpenAIError(404, detail, param="model", code="model_not_found")

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Run the embedded model, and hold connections to the upstreams, while the server runs."""
        gateway = Gateway(self.model_settings, registry=app[METRICS].registry, shared=app[SHARED])
        self._generations = Generations(app[EVENTS], gateway, self.keep_seconds, self.abandon_seconds, self.max_stored)
        async with gateway.opened(), self._generations.opened():
            self._gateway = gateway
            yield

    @hookimpl
    def check(self) -> Iterator[tuple[str, str]]:
        """Report missing keys; no upstream is connected to."""
        for settings in self.model_settings:
            if reason := settings.missing_key:
                is_table = settings.name in self.models
                yield (f"models.{settings.name}.api_key_env" if is_table else "api_key_env"), reason

    @hookimpl
    def health(self) -> str | None:
        """Return why a model is unavailable: not installed, not running, or its upstream's last request failed."""
        if self._gateway is not None:
            return self._gateway.trouble
        return None if all(settings.url for settings in self.model_settings) else missing()

    def _complete(
        self, request: web.Request, body: Mapping[str, Any], path: Path = CHAT
    ) -> AbstractAsyncContextManager[Completion]:
        assert self._gateway is not None, "the server has not started"
        return self._gateway.complete(body, client_of(request), path)

    def _requested_model(self, request: web.Request, name: str | None) -> ModelSettings:
        """Return the model that a request to /v1 names; it need not where there is only one.

        Raises Problem as `_require_model` does, and 400 where the name is missing.
        """
        if name is None and len(self.model_settings) > 1:
            detail = "model is missing, and this server has several: GET /v1/models lists them."
            raise OpenAIError(400, detail, param="model")
        return self._require_model(request, name)

    # -- text

    def _require_model(self, request: web.Request, name: str | None = None) -> ModelSettings:
        """Return the model of a name, or the default one.

        Raises Problem 401 or 403 unless the client may use it (it is the resource of its scopes), 404 for an unknown
        one.
        """
        settings = self.settings_of(name, request[PRINCIPAL])
        require(request, Scope(self.name, "write", settings.name))
        return settings

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
    async def list_models(self, request: web.Request) -> web.Response:
        """List the models that the client may use, as the OpenAI API does."""
        names = [settings.name for settings in self.model_settings]
        data = [_model_object(name) for name in request[PRINCIPAL].visible(self.name, names)]
        return web.json_response({"object": "list", "data": data}, headers={"Cache-Control": "no-cache"})

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
        settings = self.settings_of(path.id, request[PRINCIPAL])
        return web.json_response(_model_object(settings.name), headers={"Cache-Control": "no-cache"})

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
        settings = self._requested_model(request, body.model)
        return await self._respond(request, settings.rules.upstream_body(body), CHAT)

    @endpoint(
        "POST",
        "/v1/completions",
        body=CompletionRequest,
        resource=ANY,
        body_limit=BODY_BYTES,
        sends=("application/json", "text/event-stream"),
        responses={429: "Too many generations are running and waiting; see Retry-After."},
    )
    async def text_completions(self, request: web.Request, body: CompletionRequest) -> web.StreamResponse:
        """Continue a text, as the OpenAI API does, streaming or not, where the model's upstream can."""
        settings = self._requested_model(request, body.model)
        return await self._respond(request, body.upstream_body(settings.rules), "/completions")

    @endpoint(
        "POST",
        "/v1/embeddings",
        body=EmbeddingRequest,
        resource=ANY,
        body_limit=BODY_BYTES,
        sends="application/json",
        responses={429: "Too many requests are running and waiting; see Retry-After."},
    )
    async def embeddings(self, request: web.Request, body: EmbeddingRequest) -> web.StreamResponse:
        """Return the embeddings of texts, as the OpenAI API does, where the model's upstream has them."""
        settings = self._requested_model(request, body.model)
        return await self._respond(request, body.upstream_body(settings.rules), "/embeddings")

    async def _respond(self, request: web.Request, body: Mapping[str, Any], path: Path) -> web.StreamResponse:
        """Send what the model responds, unchanged; where that is a stream, as it arrives."""
        async with self._complete(request, body, path) as completion:
            if not body.get("stream"):
                return web.Response(body=await completion.read(), content_type="application/json")
            async with open_event_stream(request) as stream:
                with openai_errors():
                    async with aclosing(completion.blocks()) as blocks:
                        async for block in blocks:
                            await stream.write(block.raw or KEEP_ALIVE)
            return stream

    def _body(self, sampling: Sampling, messages: list[dict[str, str]]) -> dict[str, Any]:
        """Return the body of a request to the upstream; raises Problem 422 for more tokens than are allowed."""
        settings = self.model_settings[0]
        if sampling.max_tokens is not None and sampling.max_tokens > settings.max_tokens:
            raise Problem.parameter("max_tokens", f"must be at most {settings.max_tokens}")
        body = sampling.model_dump(include={"temperature", "seed"}, exclude_none=True)
        if sampling.stop:
            body["stop"] = sampling.stop
        return {
            "model": settings.name,
            "messages": messages,
            settings.limit_field: sampling.max_tokens or settings.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **body,
        }


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "streamlab"}


def _messages(body: ChatBody) -> list[dict[str, str]]:
    if body.messages is None:
        return [{"role": "user", "content": cast("str", body.prompt)}]
    return [message.model_dump() for message in body.messages]


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Return the scenario of the language model."""
    return [Llm]
