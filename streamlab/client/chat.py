"""A conversation with an OpenAI-compatible server, an answer at a time, as a terminal shows it."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import aiohttp
import typer

from .http import CONNECT_SECONDS
from .sse import Parser
from .terminal import print_error, printable

SILENCE_SECONDS = 300.0
"""A server that says nothing for so long, not even a comment, is lost."""


class ChatError(Exception):
    """No answer, or none to its end; the message is the server's own, where it has one."""


def completions_url(url: str) -> str:
    """The address to ask, of a server's address, with or without its `/v1`."""
    base = (url if "://" in url else f"http://{url}").rstrip("/")
    return f"{base.removesuffix('/v1')}/v1/chat/completions"


class Conversation:
    """What was said so far with the model of a server, whose address is `url`; each answer is printed as it comes."""

    def __init__(self, url: str, *, model: str = "", system: str = "", max_tokens: int | None = None) -> None:
        self._url = completions_url(url)
        self._model = model
        self._max_tokens = max_tokens
        self._messages = [{"role": "system", "content": system}] if system else []

    def tell(self, text: str) -> None:
        """Say something and print what is answered; Ctrl-C stops the answer, and what came of it stays said.

        Raises ChatError and ValueError as `answer` does; what nobody answered was then never said.
        """
        self._messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            asyncio.run(self._print(said))
        except KeyboardInterrupt:
            print_error(" [stopped]")
        finally:
            if said:
                self._messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self._messages.pop()

    async def _print(self, said: list[str]) -> None:
        """Print an answer as it comes, and keep what came in `said`, whatever happens."""
        texts = answer(self._url, self._messages, model=self._model, max_tokens=self._max_tokens)
        async with aclosing(texts):
            async for text in texts:
                said.append(text)
                typer.echo(printable(text), nl=False)
        typer.echo()


async def answer(
    url: str, messages: Sequence[Mapping[str, str]], *, model: str = "", max_tokens: int | None = None
) -> AsyncGenerator[str, None]:
    """Yield the texts of an answer to `messages` as they come; closing the generator stops the work at the server.

    Raises ChatError where there is no answer, or it does not reach its `[DONE]`; ValueError where `url` is no address.
    """
    body: dict[str, Any] = {"messages": list(messages), "stream": True}
    body |= {"model": model} if model else {}
    body |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), timeout=timeout) as session:
        try:
            response = await session.post(url, json=body, allow_redirects=False)
        except aiohttp.InvalidURL:
            raise ValueError(f"{url} is no address") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ChatError(f"{url} does not answer: {str(error) or type(error).__name__}") from None
        try:
            if response.status != 200:
                said = (await response.content.read(64 * 1024)).decode(errors="replace")
                raise ChatError(_reason(said) or f"{url} answers {response.status}")
            parser = Parser()
            async for part in response.content.iter_any():
                for event in parser.feed(part):
                    if event.data == "[DONE]":
                        return
                    if text := _text(event.data):
                        yield text
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ChatError(f"the answer broke off: {type(error).__name__}") from None
        finally:
            response.close()
    raise ChatError("the answer ended before its end")


def _text(data: str) -> str:
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise ChatError(_reason(data) or data)
        return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ChatError(f"this is no event of an answer: {data[:200]}") from None


def _reason(said: str) -> str:
    """What a refusal says: the message of an OpenAI error, or the detail of a problem document."""
    try:
        document = json.loads(said)
        error = document.get("error", document)
        return str(error if isinstance(error, str) else error.get("message") or error.get("detail") or "")
    except (ValueError, AttributeError):
        return ""
