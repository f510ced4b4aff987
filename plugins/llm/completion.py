"""A completion in progress: its texts, tokens, times, and how it ended."""

import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field

from .openai import EVENT_BYTES, Block, SurrogateJoiner, begins, read_completion
from .upstream import Response


@dataclass(slots=True)
class Completion:
    """The response of an upstream to one request, read by one reader."""

    prompt_tokens: int
    """As counted before the request; replaced by what the upstream reports."""
    started: float = field(default_factory=time.monotonic)
    response: Response | None = None
    completion_tokens: int = 0
    """Events with text so far, until the upstream reports the number of tokens."""
    finish_reason: str | None = None
    first: float | None = None
    last: float = 0.0
    _body: bytes | None = None
    """The response, where it is not streamed and has been read."""
    _begun: AsyncGenerator[Block, None] | None = None
    """The rest of a stream that has been read up to its first token."""
    _held: list[Block] = field(default_factory=list)
    """What was read of it."""

    def blocks(self) -> AsyncGenerator[Block, None]:
        """Yield blocks of whole events as they arrive, and count them; raises Failure where the stream breaks off."""
        assert self.response is not None
        return self.response.blocks(self._count) if self._begun is None else self._resumed(self._begun)

    async def _resumed(self, rest: AsyncGenerator[Block, None]) -> AsyncGenerator[Block, None]:
        for block in self._held:
            yield block
        self._held.clear()
        async for block in rest:
            yield block

    async def wait_for_token(self, stack: AsyncExitStack) -> None:
        """Read the stream up to its first token, and hold it for `blocks`; the stack closes it.

        Raises Failure where the stream breaks off before that. Events with a role only are not tokens.
        """
        assert self.response is not None
        rest = self._begun = await stack.enter_async_context(aclosing(self.response.blocks(self._count)))
        size = 0
        async for block in rest:
            if block.raw:  # silence is not held
                self._held.append(block)
            size += len(block.raw)
            if begins(block.raw) or size > EVENT_BYTES:
                return

    async def texts(self) -> AsyncGenerator[list[str], None]:
        """Yield the texts that arrived together, each of whole characters."""
        joiner = SurrogateJoiner()
        async with aclosing(self.blocks()) as blocks:
            async for block in blocks:
                if texts := [text for chunk in block.chunks if (text := joiner.feed(chunk.text))]:
                    yield texts

    async def read(self) -> bytes:
        """Return a response that is not streamed: a `chat.completion` as the upstream wrote it."""
        assert self.response is not None
        if self._body is None:
            self._body = await self.response.read()
            self._count(read_completion(self._body))
        return self._body

    def _count(self, block: Block) -> None:
        for chunk in block.chunks:
            if chunk.text:
                self.completion_tokens += 1
                self.last = time.monotonic()
                if self.first is None:
                    self.first = self.last
            else:
                self.finish_reason = chunk.finish_reason or self.finish_reason
            if chunk.usage is not None:
                self.prompt_tokens = chunk.usage.prompt_tokens
                if chunk.usage.completion_tokens is not None:
                    self.completion_tokens = chunk.usage.completion_tokens

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of prompt and completion, as the OpenAI API spells them."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds from the request to the first text; None before that."""
        return None if self.first is None else round((self.first - self.started) * 1000, 1)

    @property
    def tokens_per_second(self) -> float | None:
        """The rate from the first text to the last; None before the second."""
        if self.first is None or self.last <= self.first:
            return None
        return round((self.completion_tokens - 1) / (self.last - self.first), 2)
