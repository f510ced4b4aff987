"""Stream the tokens of a language model: a small one that comes along, or any OpenAI-compatible upstream."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import msgspec
from aiohttp import web
from prometheus_client import Counter
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
    EVENTS,
    METRICS,
    ErrorFormat,
    Problem,
    Scenario,
    endpoint,
    hookimpl,
    open_event_stream,
    open_stream,
)

from .answer import Answer
from .completion import ChatCompletion, LimitField, Rules, check_extra_field, prompt_bytes
from .engine import MODEL, Engine, missing
from .generations import Generations, read_place
from .openai import ErrorResponse, Failure, OpenAIError, openai_errors
from .places import Places
from .upstream import Upstream

log = logging.getLogger(__name__)

BODY_BYTES = 256 * 1024
"""What a request may have to say."""

KEEP_ALIVE = b": the model is at work\n\n"
"""What a client of /v1 hears while the upstream says nothing."""

BYTES_A_TOKEN = 4
"""What a token is taken for where nobody counts: the tokenizer of an upstream is not known."""

TEMPLATE_TOKENS = 32
"""What the embedded model's template adds to a message, and to all of them, at most."""


STUCK = frozenset({"upstream_stalled", "upstream_timeout"})
"""Failures after which the embedded model is restarted: nothing but a new process ends what occupies it."""


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError("must be http:// or https://, and end where /chat/completions begins")
    if parts.username or parts.password:
        raise ValueError("must hold no password: api_key_env names the variable that has the key")
    if parts.query or parts.fragment:
        raise ValueError("must have no query and no fragment")
    return url


def _several(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


Sentence = Annotated[str, StringConstraints(min_length=1, max_length=100)]


class Sampling(BaseModel):
    """How an answer is made."""

    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="Tokens of the answer at most.", examples=[40])
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token.")
    seed: int | None = Field(None, ge=0, lt=2**31, description="The same seed, the same answer, as far as possible.")
    stop: Annotated[list[Sentence], BeforeValidator(_several)] = Field(
        [], max_length=4, description="The answer ends before one of these."
    )


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


class Prompted(Sampling):
    """A prompt, in the address."""

    prompt: Text = Field(max_length=8000, description="What is said to the model.", examples=["Hello"])


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Conversation(Sampling):
    """A prompt, or the conversation so far, as a JSON document."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Hello", "max_tokens": 40}]})

    prompt: Text | None = Field(None, description="What is said to the model; or messages.")
    messages: list[Message] | None = Field(None, min_length=1, max_length=1000, description="The conversation so far.")

    @model_validator(mode="after")
    def _one_of_them(self) -> "Conversation":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either prompt or messages")
        return self


class Which(BaseModel):
    """Which generation is meant."""

    id: str = Field(pattern="^[0-9a-f]{32}$", description="The generation's id.", examples=["0" * 32])


class ModelPath(BaseModel):
    """Which model is meant."""

    id: str = Field(
        min_length=1, max_length=512, description="The model's name, as /v1/models lists it.", examples=[MODEL]
    )


class Again(BaseModel):
    """From where on a generation is followed."""

    last_event_id: str = Field(
        "", max_length=200, description="Go on after this event; the header Last-Event-ID says the same, and wins."
    )


class Followed(Again, Prompted):
    """A prompt, in the address, whose answer can be come back to."""


class Llm(Scenario):
    """Tokens of a language model as they are made, as text, as events that can be left and resumed, or as /v1."""

    name = "llm"

    error_formats = (ErrorFormat("/v1/", "application/json", ErrorResponse, OpenAIError.of),)

    url: Annotated[str, AfterValidator(_base_url)] = ""
    """An OpenAI-compatible upstream, up to where /chat/completions begins; without one, a small model runs here."""
    model: str = ""
    """The name of the upstream's model."""
    api_key_env: str = ""
    """The environment variable that has the upstream's key."""
    max_generations: int = Field(4, ge=1, le=1000)
    """Maximum generations at once; a request for several answers (`n`) counts as that many."""
    max_waiting: int = Field(16, ge=0, le=10_000)
    """Maximum requests that wait for their turn; one more gets 429 with Retry-After."""
    wait_seconds: float = Field(30.0, gt=0, le=3600)
    """Maximum wait for a turn, in seconds."""
    max_tokens: int = Field(512, ge=1, le=1_000_000)
    """Maximum tokens of an answer; where a request has no limit, the upstream is sent this one."""
    limit_field: LimitField = "max_tokens"
    """The name under which the upstream takes that limit."""
    max_prompt_tokens: int = Field(1024, ge=1, le=10_000_000)
    """Maximum tokens of a prompt, tools and schemas included; an upstream's count as four bytes each."""
    extra_fields: list[Annotated[str, AfterValidator(check_extra_field)]] = Field([], max_length=50)
    """Fields of requests to /v1 that are sent to the model although docs/openai.md does not name them."""
    max_seconds: float = Field(300.0, ge=0.1, le=86_400)
    """Maximum duration of a generation, in seconds, from the moment in which it has its slot."""
    stall_seconds: float = Field(120.0, ge=0.1, le=3600)
    """Seconds without data (comments are none) after which an upstream has failed."""
    abandon_seconds: float = Field(30.0, ge=0.1, le=3600)
    """A generation that can be resumed is stopped when nobody has followed it for so long."""
    keep_seconds: float = Field(3600.0, ge=1, le=7 * 86_400)
    """How long its events are kept for those who come back."""

    _upstream: Upstream | None = PrivateAttr(None)
    _engine: Engine | None = PrivateAttr(None)
    _places: Places = PrivateAttr()
    _generations: Generations = PrivateAttr()
    _ended: Counter = PrivateAttr()
    _tokens: Counter = PrivateAttr()

    @model_validator(mode="after")
    def _upstream_is_whole(self) -> "Llm":
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
            max_answers=self.max_generations,
            embedded=not self.url,
            limit_field=self.limit_field,
            extra_fields=frozenset(self.extra_fields),
        )

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.model or MODEL

    @hookimpl
    @asynccontextmanager
    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Run the embedded model, or hold connections to the upstream, while the server serves."""
        registry = app[METRICS].registry
        self._ended = Counter("streamlab_llm_generations", "Generations, by outcome.", ["outcome"], registry=registry)
        self._tokens = Counter("streamlab_llm_tokens", "Tokens, of prompts and answers.", ["kind"], registry=registry)
        self._places = Places(self.max_generations, self.max_waiting, self.wait_seconds)
        self._generations = Generations(app[EVENTS], self._asked, self.keep_seconds, self.abandon_seconds)
        async with AsyncExitStack() as stack:
            if self.url:
                if reason := self._missing():
                    raise RuntimeError(reason)
                upstream = Upstream(self.url, key=self._key())
            else:
                context = self.max_prompt_tokens + self.max_tokens
                self._engine = Engine(slots=self.max_generations, context=context)
                await stack.enter_async_context(self._engine.running())
                socket = self._engine.socket
                upstream = Upstream("http://localhost", socket=socket)
            upstream.stall_seconds, upstream.max_seconds = self.stall_seconds, self.max_seconds
            await stack.enter_async_context(upstream.opened())
            self._upstream = upstream
            await stack.enter_async_context(self._generations.opened())
            yield

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""

    def _missing(self) -> str | None:
        """Return what this configuration lacks to serve; None where nothing is known to be missing."""
        if not self.url:
            return missing()
        if self.api_key_env and not self._key():
            return f"the environment variable {self.api_key_env} does not hold the upstream's key"
        return None

    @hookimpl
    def health(self) -> str | None:
        """Return why there is no model: not installed, not running, no key, or the upstream's last request failed."""
        if self._engine is not None:
            return self._engine.trouble
        return self._upstream.trouble if self._upstream is not None else self._missing()

    # -- text

    @endpoint("GET", "/ai/chat-stream", query=Prompted, starts_work=True, sends="text/plain")
    async def text(self, request: web.Request, query: Prompted) -> web.StreamResponse:
        """Answer a prompt as plain text, word by word; leaving stops the work."""
        return await self._text(request, self._body(query, [{"role": "user", "content": query.prompt}]))

    @endpoint(
        "POST",
        "/ai/chat-stream",
        body=Conversation,
        body_limit=BODY_BYTES,
        sends="text/plain",
    )
    async def text_of(self, request: web.Request, body: Conversation) -> web.StreamResponse:
        """Answer a prompt, or go on with a conversation, as plain text."""
        return await self._text(request, self._body(body, _messages(body)))

    async def _text(self, request: web.Request, body: Mapping[str, Any]) -> web.StreamResponse:
        async with (
            self._asked(body) as answer,
            open_stream(request, "text/plain; charset=utf-8") as stream,
            aclosing(answer.texts()) as pieces,
        ):
            async for texts in pieces:
                await stream.write("".join(texts).encode())
        return stream

    # -- events

    @endpoint(
        "GET",
        "/ai/chat-stream-sse",
        query=Followed,
        starts_work=True,
        sends="text/event-stream",
        responses={204: "The client has the end of the answer already."},
    )
    async def events(self, request: web.Request, query: Followed) -> web.StreamResponse:
        """Answer a prompt as events: `token` with `text` and `index`, then `end` with usage and times.

        A client that comes back with an id goes on with the same generation, which runs on without it for a while.
        """
        body = self._body(query, [{"role": "user", "content": query.prompt}])
        return await self._events(request, body, query.last_event_id)

    @endpoint(
        "POST",
        "/ai/chat-stream-sse",
        body=Conversation,
        body_limit=BODY_BYTES,
        sends="text/event-stream",
        responses={204: "The client has the end of the answer already."},
    )
    async def events_of(self, request: web.Request, body: Conversation) -> web.StreamResponse:
        """Answer a prompt, or go on with a conversation, as events that can be left and come back to."""
        return await self._events(request, self._body(body, _messages(body)), "")

    async def _events(self, request: web.Request, body: Mapping[str, Any], after: str) -> web.StreamResponse:
        place = read_place(request.headers.get("Last-Event-ID") or after)
        id = place.generation if place else (await self._generations.start(body)).id  # noqa: A001
        headers = {"Location": f"/ai/generations/{id}"}
        return await self._generations.follow(request, id, after, headers, told_if_lost=True)

    @endpoint(
        "GET",
        "/ai/generations/{id}",
        path_model=Which,
        query=Again,
        sends="text/event-stream",
        responses={204: "The client has the end of the answer already.", 404: "There is no such generation."},
    )
    async def generation(self, request: web.Request, path: Which, query: Again) -> web.StreamResponse:
        """Follow a generation from its beginning, or from an id on; any number of clients may."""
        return await self._generations.follow(request, path.id, query.last_event_id)

    @endpoint(
        "DELETE",
        "/ai/generations/{id}",
        path_model=Which,
        sends=(),
        responses={
            202: "Another server of this event log has been told to stop it.",
            204: "It is stopped, or was over.",
            404: "There is no such generation.",
        },
        curl="{url}",
    )
    async def stop(self, request: web.Request, path: Which) -> web.StreamResponse:
        """Stop a generation, for everybody who follows it."""
        stopped = await self._generations.stop(path.id)
        return web.Response(status=204 if stopped else 202)

    # -- the OpenAI API

    @endpoint("GET", "/v1/models", sends="application/json", curl="{url}")
    async def models(self, request: web.Request) -> web.Response:
        """List the model, as the OpenAI API does."""
        listed = {"object": "list", "data": [self._described()]}
        return web.json_response(listed, headers={"Cache-Control": "no-cache"})

    @endpoint(
        "GET",
        "/v1/models/{id:.+}",
        path_model=ModelPath,
        sends="application/json",
        responses={404: "This server does not have the model."},
        curl="{url}",
    )
    async def model_of(self, request: web.Request, path: ModelPath) -> web.Response:
        """Describe the model, as the OpenAI API does."""
        if path.id != self.model_name:
            detail = f"This server has the model {self.model_name!r}, and no other."
            raise OpenAIError(404, detail, param="model", code="model_not_found")
        return web.json_response(self._described(), headers={"Cache-Control": "no-cache"})

    def _described(self) -> dict[str, Any]:
        return {"id": self.model_name, "object": "model", "created": 0, "owned_by": "streamlab"}

    @endpoint(
        "POST",
        "/v1/chat/completions",
        body=ChatCompletion,
        body_limit=BODY_BYTES,
        sends=("application/json", "text/event-stream"),
        responses={429: "Too many generations run and wait; Retry-After tells when to retry."},
    )
    async def completions(self, request: web.Request, body: ChatCompletion) -> web.StreamResponse:
        """Answer as the OpenAI API does, streaming or not; the events of the upstream are passed on as they are.

        Fields that this server does not know are rejected with 400; docs/openai.md lists those that it does.
        """
        async with self._asked(self._rules.upstream_body(body)) as answer:
            if not body.stream:
                return web.Response(body=await answer.whole(), content_type="application/json")
            async with open_event_stream(request) as stream:
                with openai_errors():
                    async with aclosing(answer.blocks()) as blocks:
                        async for block in blocks:
                            await stream.write(block.raw or KEEP_ALIVE)
            return stream

    # -- asking

    def _body(self, sampling: Sampling, messages: list[dict[str, str]]) -> dict[str, Any]:
        """What is asked of the upstream; raises Problem 422 for more tokens than are allowed."""
        if sampling.max_tokens is not None and sampling.max_tokens > self.max_tokens:
            detail = f"must be no more than {self.max_tokens}"
            errors = [{"in": "query", "name": "max_tokens", "detail": detail}]
            raise Problem(422, "This is more than the server allows.", errors=errors)
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

    @asynccontextmanager
    async def _asked(self, body: Mapping[str, Any]) -> AsyncIterator[Answer]:
        """Wait for slots, call the upstream, and yield the answer; leaving the block stops the work.

        It is counted in any case. Raises Failure where there is no slot, the prompt is too long, or the upstream
        rejects the request or fails.
        """
        assert self._upstream is not None, "the server has not started"
        prompt_tokens = await self._prompt_tokens(body)
        async with self._places.held(body.get("n") or 1):
            answer, outcome, code = Answer(prompt_tokens), "failed", None
            try:
                path = "/v1/chat/completions" if self._engine else "/chat/completions"
                asked = self._upstream.asked(path, msgspec.json.encode(body), events=bool(body.get("stream")))
                async with asked as answer.reply:
                    yield answer
                outcome = "finished"
            except (asyncio.CancelledError, ConnectionError):
                outcome = "stopped"
                raise
            except Failure as failure:
                code = failure.code
                if self._engine is not None and code in STUCK:
                    self._engine.restart()
                raise
            finally:
                self._account(answer, outcome, code)

    async def _prompt_tokens(self, body: Mapping[str, Any]) -> int:
        """Return the tokens of a prompt, and of all that becomes prompt; raises Failure where they are too many."""
        messages = body["messages"]
        size = prompt_bytes(body, self.extra_fields)
        tokens = size // BYTES_A_TOKEN
        if self._engine is not None:
            await self._engine.check()
            if size + TEMPLATE_TOKENS * (len(messages) + 1) > self.max_prompt_tokens:  # a token has a byte at least
                others = size - len(msgspec.json.encode(messages))
                tokens = await self._counted(messages) + others // BYTES_A_TOKEN
        if tokens > self.max_prompt_tokens:
            about = "" if self._engine else "about "
            detail = f"The prompt has {about}{tokens} tokens; this server accepts {self.max_prompt_tokens}."
            raise Failure(422, "context_length_exceeded", detail, param="messages")
        return tokens

    async def _counted(self, messages: Any) -> int:
        """Let the embedded model count, in the words that its template makes of the messages."""
        prompt = await self._tool("/apply-template", {"messages": messages}, "prompt")
        return len(await self._tool("/tokenize", {"content": prompt, "parse_special": True}, "tokens"))

    async def _tool(self, path: str, body: Any, name: str) -> Any:
        assert self._upstream is not None
        async with self._upstream.asked(path, msgspec.json.encode(body)) as reply:
            return msgspec.json.decode(await reply.whole())[name]

    def _account(self, answer: Answer, outcome: str, code: str | None) -> None:
        usage = answer.usage
        self._ended.labels(outcome).inc()
        self._tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._tokens.labels("completion").inc(usage["completion_tokens"])
        fields = {
            "outcome": outcome,
            **({"code": code} if code else {}),
            **usage,
            "finish_reason": answer.finish_reason,
            "ttft_ms": answer.ttft_ms,
        }
        log.info("generation", extra={"fields": fields})


def _messages(body: Conversation) -> list[dict[str, str]]:
    if body.messages is None:
        return [{"role": "user", "content": cast("str", body.prompt)}]
    return [message.model_dump() for message in body.messages]


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Bring the model."""
    return [Llm]
