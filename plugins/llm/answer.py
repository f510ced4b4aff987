"""An answer under way: what has come of it, how fast, and how it ended."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from .openai import Block, Whole, read_whole
from .upstream import Reply


@dataclass(slots=True)
class Answer:
    """One generation of an upstream, read by one reader."""

    prompt_tokens: int
    """As counted before it was asked; replaced by what the upstream says."""
    started: float = field(default_factory=time.monotonic)
    reply: Reply | None = None
    completion_tokens: int = 0
    """Events with text so far, until the upstream says how many tokens they were."""
    finish_reason: str | None = None
    first: float | None = None
    last: float = 0.0

    async def blocks(self) -> AsyncGenerator[Block, None]:
        """Yield what comes, whole events at a time, and keep count; raises Failure where it breaks off."""
        assert self.reply is not None
        async with aclosing(self.reply.blocks()) as blocks:
            async for block in blocks:
                self._count(block)
                yield block

    async def texts(self) -> AsyncGenerator[list[str], None]:
        """Yield the texts that came together, each of whole characters."""
        whole = Whole()
        async with aclosing(self.blocks()) as blocks:
            async for block in blocks:
                if texts := [text for chunk in block.chunks if (text := whole.feed(chunk.text))]:
                    yield texts

    async def whole(self) -> bytes:
        """Return an answer that is not streamed: a `chat.completion` as the upstream wrote it."""
        assert self.reply is not None
        body = await self.reply.whole()
        self._count(read_whole(body))
        return body

    def _count(self, block: Block) -> None:
        for chunk in block.chunks:
            if chunk.text:
                self.completion_tokens += 1
                self.last = time.monotonic()
                self.first = self.first or self.last
            else:
                self.finish_reason = chunk.finish_reason or self.finish_reason
            if chunk.usage is not None:
                self.prompt_tokens = chunk.usage.prompt_tokens
                self.completion_tokens = chunk.usage.completion_tokens

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of prompt and answer, as the OpenAI API spells them."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds from asking the upstream to the first text; None where there was none."""
        return None if self.first is None else round((self.first - self.started) * 1000, 1)

    @property
    def tokens_per_second(self) -> float | None:
        """The rate from the first text to the last."""
        if self.first is None or self.last <= self.first:
            return None
        return round((self.completion_tokens - 1) / (self.last - self.first), 2)
