"""The gateway to the models: choose one for a request, and another where it fails before the first token."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter

from streamlab import Problem, Shared

from .completion import Completion
from .models import CHAT, Model, ModelSettings, Path
from .openai import Failure
from .upstream import REJECTED

log = logging.getLogger(__name__)

OF_THE_REQUEST = frozenset({400, 409, 413, 415, 422})
"""Statuses of an upstream about the request, which another model would not change."""


class Gateway:
    """The only path to the models, for routes and generations alike; the first one is the default."""

    def __init__(self, models: Sequence[ModelSettings], *, registry: CollectorRegistry, shared: Shared) -> None:
        self._models = {settings.name: Model(settings, self._account, shared) for settings in models}
        self._ended = Counter("streamlab_llm_generations", "Generations, by outcome.", ["outcome"], registry=registry)
        self._tokens = Counter("streamlab_llm_tokens", "Tokens, of prompts and responses.", ["kind"], registry=registry)
        self._fallbacks = Counter(
            "streamlab_llm_fallbacks", "Requests that another model took over, by the one that failed.", ["model"],
            registry=registry,
        )  # fmt: skip

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Run or connect every model while the block lasts."""
        async with AsyncExitStack() as stack:
            for model in self._models.values():
                await stack.enter_async_context(model.opened())
            yield

    @property
    def trouble(self) -> str | None:
        """Why a model is unavailable at present; its name is added where there are several."""
        for name, model in self._models.items():
            if reason := model.trouble:
                return f"{name}: {reason}" if len(self._models) > 1 else reason
        return None

    @asynccontextmanager
    async def complete(self, body: Mapping[str, Any], client: str, path: Path = CHAT) -> AsyncIterator[Completion]:
        """Call the model that `body` names, and yield the completion; leaving the block stops the work.

        Where the model fails before the first token, its fallbacks are called in turn; nothing of a failed response has
        been yielded then. After the first token a failure is the caller's: raised from reading the completion. Raises
        Failure where no slot becomes free, the prompt is too long, or the last model rejects the request or fails.
        """
        async with AsyncExitStack() as stack:
            yield await self._begin(stack, body, client, path)

    async def _begin(self, stack: AsyncExitStack, body: Mapping[str, Any], client: str, path: Path) -> Completion:
        chosen = self._models[body["model"]]
        chain = [(chosen, body)]
        for name in chosen.settings.fallback:
            try:
                chain.append((self._models[name], self._models[name].body_from(body, path)))
            except Problem as problem:  # images for a model of text, for example
                log.debug("%s cannot take over a request: %s", name, problem.detail)
        for number, (model, sent) in enumerate(chain):
            is_last = number == len(chain) - 1
            if not is_last and model.is_resting:
                self._fall_back(model, "it has requested a pause")
                continue
            try:
                return await stack.enter_async_context(model.complete(sent, client, path, replaceable=not is_last))
            except Failure as failure:
                if is_last or not _is_of_the_model(failure):
                    raise
                self._fall_back(model, failure.code)
        raise AssertionError("the last model returns or raises")

    def _fall_back(self, model: Model, reason: str) -> None:
        self._fallbacks.labels(model.settings.name).inc()
        log.warning("the model %s is replaced by its fallback: %s", model.settings.name, reason)

    def _account(self, model: str, completion: Completion, outcome: str, code: str | None) -> None:
        """Count a completion in the metrics, and log it."""
        usage = completion.usage
        self._ended.labels(outcome).inc()
        self._tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._tokens.labels("completion").inc(usage["completion_tokens"])
        fields = {
            "model": model,
            "outcome": outcome,
            **({"code": code} if code else {}),
            **usage,
            "finish_reason": completion.finish_reason,
            "ttft_ms": completion.ttft_ms,
        }
        log.info("generation", extra={"fields": fields})


def _is_of_the_model(failure: Failure) -> bool:
    """Return whether a failure is the model's, or a temporary one, and not about the request."""
    if failure.code == "context_length_exceeded":
        return False
    return not (failure.code == REJECTED and failure.status in OF_THE_REQUEST)
