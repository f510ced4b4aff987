"""The gateway to the model: count a prompt's tokens, wait for slots, call the upstream, account for the outcome."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter

from streamlab import Slots

from .completion import Completion
from .completion_request import prompt_bytes
from .embedded import EmbeddedModel
from .openai import Failure
from .upstream import Upstream

log = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Bytes assumed per token where the tokenizer is unknown, as an upstream's is."""

TEMPLATE_TOKENS = 32
"""Maximum tokens that the embedded model's template adds to each message, and once to all of them."""

STUCK = frozenset({"upstream_stalled", "upstream_timeout"})
"""Failures after which the embedded model is restarted: only a new process ends what occupies the old one."""


RETRY_SECONDS = 2
"""Retry-After of a request that got no slot, in seconds."""


class GenerationSlots(Slots):
    """The slots for generations; a rejection has a code, as every error of the gateway."""

    def rejection(self, reason: str, *, of_client: bool = False) -> Failure:
        """Return the Failure of a request that gets no slot."""
        headers = {"Retry-After": str(RETRY_SECONDS)}
        return Failure(429, "too_many_generations", f"Too many generations: {reason}.", headers=headers)


class Gateway:
    """The only path to the model, for routes and generations alike. `embedded` is None in front of an upstream."""

    def __init__(
        self,
        upstream: Upstream,
        slots: GenerationSlots,
        *,
        embedded: EmbeddedModel | None,
        max_prompt_tokens: int,
        extra_fields: Collection[str],
        registry: CollectorRegistry,
    ) -> None:
        self._upstream = upstream
        self._slots = slots
        self._embedded = embedded
        self._max_prompt_tokens = max_prompt_tokens
        self._extra_fields = extra_fields
        self._path = "/v1/chat/completions" if embedded else "/chat/completions"
        self._ended = Counter("streamlab_llm_generations", "Generations, by outcome.", ["outcome"], registry=registry)
        self._tokens = Counter("streamlab_llm_tokens", "Tokens, of prompts and responses.", ["kind"], registry=registry)

    @property
    def trouble(self) -> str | None:
        """Why there is no model at present: it is not running, or the upstream's last request failed."""
        return self._upstream.trouble if self._embedded is None else self._embedded.trouble

    @asynccontextmanager
    async def complete(self, body: Mapping[str, Any], client: str) -> AsyncIterator[Completion]:
        """Wait for slots of a client, call the upstream, and yield the completion; leaving the block stops the work.

        Every outcome is accounted for. Raises Failure where no slot becomes free, the prompt is too long, or the
        upstream rejects the request or fails.
        """
        prompt_tokens = await self._prompt_tokens(body)
        async with self._slots.held(body.get("n") or 1, client=client):
            completion, outcome, code = Completion(prompt_tokens), "failed", None
            request = self._upstream.post(self._path, msgspec.json.encode(body), events=bool(body.get("stream")))
            try:
                async with request as response:
                    completion.response = response
                    yield completion
                outcome = "finished"
            except (asyncio.CancelledError, ConnectionError):
                outcome = "stopped"
                raise
            except Failure as failure:
                code = failure.code
                if self._embedded is not None and code in STUCK:
                    self._embedded.restart()
                raise
            finally:
                self._account(completion, outcome, code)

    async def _prompt_tokens(self, body: Mapping[str, Any]) -> int:
        """Return the tokens of a prompt, and of all that becomes prompt; raises Failure where they are too many."""
        messages = body["messages"]
        size = prompt_bytes(body, self._extra_fields)
        tokens = size // BYTES_PER_TOKEN
        if self._embedded is not None:
            await self._embedded.check()
            if size + TEMPLATE_TOKENS * (len(messages) + 1) > self._max_prompt_tokens:  # a token has at least one byte
                others = size - len(msgspec.json.encode(messages))
                tokens = await self._count_tokens(messages) + others // BYTES_PER_TOKEN
        if tokens > self._max_prompt_tokens:
            about = "" if self._embedded else "about "
            detail = f"The prompt has {about}{tokens} tokens; the limit is {self._max_prompt_tokens}."
            raise Failure(422, "context_length_exceeded", detail, param="messages")
        return tokens

    async def _count_tokens(self, messages: Any) -> int:
        """Return the number of tokens that the embedded model counts, after its template has been applied."""
        prompt = await self._call_embedded("/apply-template", {"messages": messages}, "prompt")
        return len(await self._call_embedded("/tokenize", {"content": prompt, "parse_special": True}, "tokens"))

    async def _call_embedded(self, path: str, body: Any, name: str) -> Any:
        async with self._upstream.post(path, msgspec.json.encode(body)) as response:
            return msgspec.json.decode(await response.read())[name]

    def _account(self, completion: Completion, outcome: str, code: str | None) -> None:
        """Count a completion in the metrics, and log it."""
        usage = completion.usage
        self._ended.labels(outcome).inc()
        self._tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._tokens.labels("completion").inc(usage["completion_tokens"])
        fields = {
            "outcome": outcome,
            **({"code": code} if code else {}),
            **usage,
            "finish_reason": completion.finish_reason,
            "ttft_ms": completion.ttft_ms,
        }
        log.info("generation", extra={"fields": fields})
