"""The command and view `chat`: a conversation with an OpenAI-compatible server in a terminal."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any

import aiohttp
import typer

from streamlab import hookimpl
from streamlab.client import (
    LOCAL_URL,
    Parser,
    Terminal,
    UrlOption,
    ViewError,
    authorization_header,
    print_error,
    printable,
    prompt,
    prompt_number,
)

CONNECT_SECONDS = 15.0
"""Timeout of the connection attempt, in seconds."""

READ_SECONDS = 300.0
"""Timeout of each read, in seconds: a server that sends nothing for this time, not even a comment, is disconnected."""

MAX_ERROR_BYTES = 64 * 1024
"""Maximum size of an error response that is read, in bytes."""


class ChatError(ViewError):
    """There is no response, or it is incomplete; the message is the server's own, if there is one."""


def completions_url(url: str) -> str:
    """Return the URL of chat completions for a server's address, with or without its `/v1`."""
    base = (url if "://" in url else f"http://{url}").rstrip("/")
    return f"{base.removesuffix('/v1')}/v1/chat/completions"


class Conversation:
    """The messages exchanged with the model of a server; each response is printed as it is streamed."""

    def __init__(self, url: str, *, model: str = "", system: str = "", max_tokens: int | None = None) -> None:
        self._url = completions_url(url)
        self._model = model
        self._max_tokens = max_tokens
        self._messages = [{"role": "system", "content": system}] if system else []

    def send(self, text: str) -> None:
        """Send a message and print the response; Ctrl-C stops it, and the part received stays in the conversation.

        Raises ChatError and ValueError as `stream_texts` does; a message without any response is dropped.
        """
        self._messages.append({"role": "user", "content": text})
        received: list[str] = []
        try:
            asyncio.run(self._print_response(received))
        except KeyboardInterrupt:
            print_error(" [stopped]")
        finally:
            if received:
                self._messages.append({"role": "assistant", "content": "".join(received)})
            else:
                self._messages.pop()

    async def _print_response(self, received: list[str]) -> None:
        """Print a response as it is streamed, and append each text to `received`."""
        texts = stream_texts(self._url, self._messages, model=self._model, max_tokens=self._max_tokens)
        async with aclosing(texts):
            async for text in texts:
                received.append(text)
                typer.echo(printable(text), nl=False)
        typer.echo()


async def stream_texts(
    url: str, messages: Sequence[Mapping[str, str]], *, model: str = "", max_tokens: int | None = None
) -> AsyncGenerator[str, None]:
    """Yield the texts of the response to `messages`; closing the generator stops the work at the server.

    Raises ChatError where there is no response, or it ends before its `[DONE]`; ValueError for an invalid `url`.
    """
    body: dict[str, Any] = {"messages": list(messages), "stream": True}
    body |= {"model": model} if model else {}
    body |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), timeout=timeout) as session:
        try:
            headers = authorization_header(url)
            response = await session.post(url, json=body, headers=headers, allow_redirects=False)
        except aiohttp.InvalidURL:
            raise ValueError(f"{url!r} is not an http(s) URL") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ChatError(f"{url}: no response: {str(error) or type(error).__name__}") from None
        try:
            if response.status != 200:
                document = (await response.content.read(MAX_ERROR_BYTES)).decode(errors="replace")
                raise ChatError(_error_message(document) or f"{url} returned {response.status}")
            parser = Parser()
            async for chunk in response.content.iter_any():
                for event in parser.feed(chunk):
                    if event.data == "[DONE]":
                        return
                    if text := _text(event.data):
                        yield text
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ChatError(f"the response broke off: {type(error).__name__}") from None
        finally:
            response.close()
    raise ChatError("the response ended without [DONE]")


def _text(data: str) -> str:
    """Return the text of an event; raises ChatError for an error event, or one that is not a completion chunk."""
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise ChatError(_error_message(data) or data)
        return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ChatError(f"invalid completion chunk: {data[:200]}") from None


def _error_message(document: str) -> str:
    """Return the message of an OpenAI error or the detail of a problem document; empty if there is neither."""
    try:
        members = json.loads(document)
        error = members.get("error", members)
        return str(error if isinstance(error, str) else error.get("message") or error.get("detail") or "")
    except (ValueError, AttributeError):
        return ""


CHAT_EPILOG = """Example: echo Hello | streamlab chat --max-tokens 50

Exit status: 0 at the end of the input; from a pipe, 1 if a response is missing or incomplete, and 2 for an invalid URL;
130 after Ctrl-C at the prompt."""


def chat(
    url: UrlOption = LOCAL_URL,
    model: Annotated[
        str, typer.Option(help="Use this model, if the server has several.", metavar="NAME", show_default=False)
    ] = "",
    system: Annotated[
        str, typer.Option(help="Begin the conversation with this system prompt.", metavar="TEXT", show_default=False)
    ] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Limit each response to N tokens.", metavar="N")] = None,
) -> None:
    """Chat with the model of any OpenAI-compatible server.

    Ctrl-C stops a response, Ctrl-D ends the chat. From a pipe, each line is a message.
    """
    interactive = sys.stdin.isatty()
    conversation = Conversation(url, model=model, system=system, max_tokens=max_tokens)
    while (line := _read_line("> " if interactive else "")) is not None:
        if not line.strip():
            continue
        try:
            conversation.send(line)
        except (ChatError, ValueError) as error:
            print_error(f"streamlab: {error}")
            if not interactive:
                raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def _read_line(text: str) -> str | None:
    """Return a line of input, or None at its end."""
    try:
        return input(text)
    except EOFError:
        return None
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(130) from None


def show_chat(terminal: Terminal) -> None:
    """Chat with a model; an empty line ends it."""
    conversation = Conversation(terminal.url, max_tokens=prompt_number("maximum tokens of a response", 200))
    while text := prompt("you"):
        conversation.send(text)


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    """Add the command `chat`."""
    cli.command(epilog=CHAT_EPILOG)(chat)


@hookimpl
def register_views() -> Mapping[str, Callable[[Terminal], None]]:
    """Provide the view `chat`."""
    return {"chat": show_chat}
