"""The models of a server: where each is served, within which limits, and one generation of it."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from streamlab import Problem, Shared, Slots

from .completion import Completion
from .completion_request import ChatCompletionRequest, LimitField, Rules, check_extra_field, prompt_bytes
from .embedded import EmbeddedModel
from .openai import Failure
from .text_request import CompletionRequest, EmbeddingRequest, texts_of
from .upstream import REJECTED, Response, Upstream

BYTES_PER_TOKEN = 4
"""Bytes assumed per token where the tokenizer is unknown, as an upstream's is."""

TEMPLATE_TOKENS = 32
"""Maximum tokens that the embedded model's template adds to each message, and once to all of them."""

STUCK = frozenset({"upstream_stalled", "upstream_timeout"})
"""Failures after which the embedded model is restarted: only a new process ends what occupies the old one."""

Path = Literal["/chat/completions", "/completions", "/embeddings"]
"""The paths of upstreams that requests are sent to."""

CHAT: Path = "/chat/completions"

REQUESTS: Mapping[Path, type[ChatCompletionRequest | CompletionRequest | EmbeddingRequest]] = {
    CHAT: ChatCompletionRequest, "/completions": CompletionRequest, "/embeddings": EmbeddingRequest,
}  # fmt: skip
"""The requests that each path takes."""

INTERRUPTED_TOKENS = 128
"""Tokens of an abandoned prompt above which the embedded model is restarted: about a second of its work, as a restart.

llama.cpp cannot cancel the evaluation of a prompt: it notices a closed connection only at the first token.
"""

RETRY_SECONDS = 2
"""Retry-After of a request that got no slot, in seconds."""


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError("must be an http:// or https:// URL, without /chat/completions")
    if parts.username or parts.password:
        raise ValueError("must not contain a password: api_key_env names the variable that holds the key")
    if parts.query or parts.fragment:
        raise ValueError("must not have a query or a fragment")
    return url


Url = Annotated[str, AfterValidator(_base_url)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
ExtraFields = Annotated[list[Annotated[str, AfterValidator(check_extra_field)]], Field(max_length=50)]


class ConfiguredModel(BaseModel):
    """A model. A limit that it lacks is that of `[scenarios.llm]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Url = ""
    """URL of an OpenAI-compatible upstream, without /chat/completions; empty for the embedded model."""
    model: str = ""
    """Name of the upstream's model; where it is empty, the name of this table."""
    api_key_env: str = ""
    """Environment variable that holds the upstream's key."""
    fallback: list[Name] = Field([], max_length=10)
    """Models that a request is sent to, in turn, where this one fails before the first token."""
    max_generations: int | None = Field(None, ge=1, le=1000)
    """Maximum concurrent generations."""
    max_waiting: int | None = Field(None, ge=0, le=10_000)
    """Maximum requests that wait for a slot."""
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    """Maximum tokens of a response."""
    limit_field: LimitField | None = None
    """Name under which the upstream takes that limit."""
    max_prompt_tokens: int | None = Field(None, ge=1, le=10_000_000)
    """Maximum tokens of a prompt."""
    extra_fields: ExtraFields | None = None
    """Fields of requests to /v1 that are sent to the model although docs/openai.md does not list them."""
    max_seconds: float | None = Field(None, ge=0.1, le=86_400)
    """Maximum duration of a generation, in seconds."""
    stall_seconds: float | None = Field(None, ge=0.1, le=3600)
    """Seconds without data after which the upstream has failed."""


LIMITS = (
    "max_generations", "max_waiting", "max_tokens", "limit_field", "max_prompt_tokens", "extra_fields", "max_seconds",
    "stall_seconds",
)  # fmt: skip
"""Keys of a model whose defaults are those of the scenario."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """A model as it is configured, with every limit; `url` is empty for the embedded one."""

    name: str
    """The name under which clients know it."""
    url: str
    model: str
    """The name under which the upstream knows it."""
    api_key_env: str
    fallback: tuple[str, ...]
    max_generations: int
    max_waiting: int
    wait_seconds: float
    max_tokens: int
    limit_field: LimitField
    max_prompt_tokens: int
    extra_fields: tuple[str, ...]
    max_seconds: float
    stall_seconds: float
    retry_seconds: float

    @property
    def rules(self) -> Rules:
        """The limits and the fields of requests to it."""
        return Rules(
            model=self.name,
            max_tokens=self.max_tokens,
            max_choices=self.max_generations,
            embedded=not self.url,
            limit_field=self.limit_field,
            extra_fields=frozenset(self.extra_fields),
        )

    @property
    def key(self) -> str:
        """The upstream's key; empty where there is none."""
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""

    @property
    def missing_key(self) -> str | None:
        """Why there is no key for the upstream; None where there is one, or none is needed."""
        if self.api_key_env and not self.key:
            return f"the environment variable {self.api_key_env} does not hold the upstream's key"
        return None


class GenerationSlots(Slots):
    """The slots for generations; a rejection has a code, as every error of the gateway."""

    def rejection(self, reason: str, *, of_client: bool = False) -> Failure:
        """Return the Failure of a request that gets no slot."""
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return Failure(429, "too_many_generations", f"Too many generations: {reason}.", headers=headers)


Account = Callable[[str, Completion, str, str | None], None]
"""Accounts for a generation: the model's name, the completion, its outcome, and the code of its failure."""


class Model:
    """A model that serves requests: it counts a prompt's tokens, waits for slots, and calls the upstream."""

    def __init__(self, settings: ModelSettings, account: Account, shared: Shared) -> None:
        self.settings = settings
        self._shared = shared
        self._account = account
        self._slots = GenerationSlots(
            settings.max_generations,
            settings.max_waiting,
            wait_seconds=settings.wait_seconds,
            tally=shared.tally(f"model {settings.name}"),
        )
        self._prefix = "" if settings.url else "/v1"
        self._running = 0
        """Requests that the upstream works on."""
        self._upstream: Upstream
        self._embedded: EmbeddedModel | None = None
        self._resting_until = 0.0
        """Time of the loop until which the upstream has requested not to be called."""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Run the embedded model, or hold connections to the upstream, while the block lasts."""
        settings = self.settings
        async with AsyncExitStack() as stack:
            if settings.url:
                if reason := settings.missing_key:
                    raise Problem(503, reason)
                self._upstream = Upstream(settings.url, key=settings.key)
            else:
                context = settings.max_prompt_tokens + settings.max_tokens
                self._embedded = EmbeddedModel(
                    slots=settings.max_generations, context=context, folder=self._shared.folder
                )
                await stack.enter_async_context(self._embedded.running())
                self._upstream = Upstream("http://localhost", socket=self._embedded.socket)
            self._upstream.stall_seconds, self._upstream.max_seconds = settings.stall_seconds, settings.max_seconds
            await stack.enter_async_context(self._upstream.opened())
            yield

    @property
    def trouble(self) -> str | None:
        """Why it is unavailable at present: it is not running, or the upstream's last request failed."""
        return self._upstream.trouble if self._embedded is None else self._embedded.trouble

    @property
    def is_resting(self) -> bool:
        """Whether the upstream has requested, by Retry-After, not to be called yet."""
        return asyncio.get_running_loop().time() < self._resting_until

    def body_from(self, body: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Return the body for this model of a request to another; raises Problem where this one cannot do it."""
        rules, kind = self.settings.rules, REQUESTS[path]
        fields = {name: value for name, value in body.items() if name in kind.model_fields}
        fields |= {name: body[name] for name in rules.extra_fields if name in body} | {"model": self.settings.name}
        for name in ("max_tokens", "max_completion_tokens"):
            if fields.get(name) is not None:
                fields[name] = min(fields[name], rules.max_tokens)
        try:
            request = kind.model_validate(fields)
            return (
                rules.upstream_body(request)
                if isinstance(request, ChatCompletionRequest)
                else request.upstream_body(rules)
            )
        except ValidationError as error:  # a field of the other model's `extra_fields`, out of its range here
            raise Problem(400, f"The request is invalid for {self.settings.name!r}.") from error

    @asynccontextmanager
    async def complete(
        self, body: Mapping[str, Any], client: str, path: Path, *, replaceable: bool = False
    ) -> AsyncIterator[Completion]:
        """Wait for slots of a client, call the upstream, and yield the completion; leaving the block stops the work.

        Every outcome is accounted for. Raises Failure where no slot becomes free, the prompt is too long, or the
        upstream rejects the request or fails. With `replaceable`, another model can take over until the block begins:
        it begins with the first token, or with the complete response where it is not streamed. Otherwise a 429 or 503
        whose Retry-After is at most `retry_seconds` is retried once.
        """
        prompt_tokens = await self._prompt_tokens(body)
        async with self._slots.held((body.get("n") or 1) * len(texts_of(body.get("prompt"))), client=client):
            completion, outcome, code = Completion(prompt_tokens), "failed", None
            self._running += 1
            try:
                async with AsyncExitStack() as stack:
                    await self._begin(stack, completion, body, path, replaceable=replaceable)
                    yield completion
                outcome = "finished"
            except (asyncio.CancelledError, ConnectionError):
                outcome = "stopped"
                self._interrupt(completion)
                raise
            except Failure as failure:
                code = failure.code
                if self._embedded is not None and code in STUCK:
                    self._embedded.restart()
                raise
            finally:
                self._running -= 1
                self._account(self.settings.name, completion, outcome, code)

    def _interrupt(self, completion: Completion) -> None:
        """Stop the embedded model where it evaluates a long prompt that nobody waits for, and does nothing else."""
        in_prompt = completion.first is None and completion.prompt_tokens > INTERRUPTED_TOKENS
        if self._embedded is not None and in_prompt and self._running == 1:
            self._embedded.interrupt()

    async def _begin(
        self, stack: AsyncExitStack, completion: Completion, body: Mapping[str, Any], path: Path, *, replaceable: bool
    ) -> None:
        """Call the upstream until its response has begun; the stack ends it."""
        encoded = msgspec.json.encode({**body, "model": self.settings.model})
        events = bool(body.get("stream"))

        def post() -> AbstractAsyncContextManager[Response]:
            return self._upstream.post(f"{self._prefix}{path}", encoded, events=events, is_optional=path != CHAT)

        try:
            completion.response = await stack.enter_async_context(post())
        except Failure as failure:
            pause = _retry_after(failure)
            if pause is None:
                raise
            self._resting_until = asyncio.get_running_loop().time() + pause
            if replaceable or pause > self.settings.retry_seconds:
                raise
            await asyncio.sleep(pause)
            completion.response = await stack.enter_async_context(post())
        if replaceable:
            await (completion.wait_for_token(stack) if events else completion.read())

    async def _prompt_tokens(self, body: Mapping[str, Any]) -> int:
        """Return the tokens of a prompt, and of all that becomes prompt; raises Failure where they are too many."""
        limit = self.settings.max_prompt_tokens
        size = prompt_bytes(body, self.settings.extra_fields)
        tokens = size // BYTES_PER_TOKEN
        if self._embedded is not None:
            await self._embedded.check()
            if size + TEMPLATE_TOKENS * (len(body.get("messages", ())) + 1) > limit:  # a token has at least one byte
                tokens = await self._count_tokens(body, size)
        if tokens > limit:
            about = "" if self._embedded else "about "
            detail = f"The prompt has {about}{tokens} tokens; the limit is {limit}."
            param = next(name for name in ("messages", "prompt", "input") if name in body)
            raise Failure(422, "context_length_exceeded", detail, param=param)
        return tokens

    async def _count_tokens(self, body: Mapping[str, Any], size: int) -> int:
        """Return the tokens that the embedded model counts in a body of which `size` bytes become prompt."""
        if "messages" not in body:  # of several prompts, each has a slot; the longest has to fit
            prompts = texts_of(body["prompt"])
            return max([await self._count_text(one) if isinstance(one, str) else len(one) for one in prompts])
        prompt = await self._call_embedded("/apply-template", {"messages": body["messages"]}, "prompt")
        others = size - len(msgspec.json.encode(body["messages"]))
        return await self._count_text(prompt) + others // BYTES_PER_TOKEN

    async def _count_text(self, text: str) -> int:
        return len(await self._call_embedded("/tokenize", {"content": text, "parse_special": True}, "tokens"))

    async def _call_embedded(self, path: str, body: Any, name: str) -> Any:
        async with self._upstream.post(path, msgspec.json.encode(body)) as response:
            return msgspec.json.decode(await response.read())[name]


def _retry_after(failure: Failure) -> float | None:
    """Return the seconds after which an upstream has requested a retry, at most an hour; None where it has not."""
    value = failure.headers.get("Retry-After", "")
    if failure.code != REJECTED or failure.status not in (429, 503) or not value.isdecimal():
        return None
    return min(float(value), 3600.0)
