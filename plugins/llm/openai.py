"""The OpenAI API: the events that upstreams send, and the errors that clients receive.

Source: https://platform.openai.com/docs/api-reference/chat (objects `chat.completion` and `chat.completion.chunk`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from pydantic import BaseModel

from streamlab import Problem

EVENT_BYTES = 1024 * 1024
"""Maximum size of one event of an upstream, in bytes; more without a blank line is not an event stream."""


class Failure(Problem):
    """An error response with a code for programs, and the field of the request that caused it."""

    def __init__(
        self, status: int, code: str, detail: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail, headers=headers)
        self.code = code
        self.param = param

    def document(self) -> dict[str, Any]:
        """Return the problem document with the code."""
        return {**super().document(), "code": self.code}


# -- errors, as clients of the OpenAI API read them


class OpenAIError(Problem):
    """An error response in the form `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, headers=headers)
        self.param = param
        self.code = code

    @classmethod
    def of(cls, problem: Problem) -> "OpenAIError":
        """Return a problem in this form; 422 becomes 400 here, and only the first invalid parameter is reported."""
        if isinstance(problem, cls):
            return problem
        param, detail = getattr(problem, "param", None), problem.detail
        if problem.errors:
            first = problem.errors[0]
            param = re.sub(r"\.([0-9]+)(?=\.|$)", r"[\1]", str(first["name"]).removesuffix(".[key]"))
            detail = f"{param}: {first['detail']}"
        status = 400 if problem.status == 422 else problem.status
        return cls(status, detail, param=param, code=getattr(problem, "code", None), headers=problem.headers)

    def document(self) -> dict[str, Any]:
        """Return the error object."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        """Return the complete response; it is never cached."""
        text = json.dumps(self.document(), ensure_ascii=False) + "\n"
        headers = {"Cache-Control": "no-store", **self.headers}
        return web.Response(status=self.status, text=text, content_type="application/json", headers=headers)


class ErrorObject(BaseModel):
    """An error: `param` names the field of the request, `code` is for programs."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error response of the OpenAI API."""

    error: ErrorObject


@contextmanager
def openai_errors() -> Iterator[None]:
    """Convert every Problem of the block to the form of the OpenAI API."""
    try:
        yield
    except Problem as problem:
        raise OpenAIError.of(problem) from problem.__cause__


# -- events of an upstream


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    """Of `text_completion`, which has no delta."""
    finish_reason: str | None = None


Tokens = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]


class Usage(msgspec.Struct):
    """Tokens of a prompt and its completion; a report with absurd numbers is ignored."""

    prompt_tokens: Tokens
    completion_tokens: Tokens | None = None
    """None for embeddings."""


class Chunk(msgspec.Struct):
    """One event of a completion: the members that are read here."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def text(self) -> str:
        """The text that it adds to the first of the choices."""
        text = ""
        for choice in self.choices:  # nearly always one: no generator and no join
            if choice.index:
                continue
            if choice.delta is not None and choice.delta.content:
                text += choice.delta.content
            elif choice.text:
                text += choice.text
        return text

    @property
    def finish_reason(self) -> str | None:
        """Why the completion ended; None before that."""
        return next((choice.finish_reason for choice in self.choices if choice.finish_reason), None)


_decoder = msgspec.json.Decoder(Chunk)


@dataclass(slots=True)
class Block:
    """Whole events that arrived together: their bytes and their decoded content."""

    raw: bytes = b""
    """The events as they arrived, with lines ended by LF."""
    chunks: list[Chunk] = field(default_factory=list)
    done: bool = False
    """Whether `[DONE]` was among them; nothing follows it."""
    error: str = ""
    """Why the next event is not passed on: the upstream's error message, or what is invalid about the event."""


def read_completion(body: bytes) -> Block:
    """Decode a response that was not streamed, as one event; raises Failure where it is not valid."""
    try:
        return Block(body, [_decoder.decode(body)])
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return Block(body, [_decode_leniently(body)])
    except ValueError:
        raise Failure(502, "upstream_failed", "The upstream's response is not JSON.") from None


class EventSplitter:
    """Splits the bytes of an upstream's event stream into blocks of whole events, whatever the network's chunks are."""

    def __init__(self) -> None:
        self._tail = b""
        self._ends_in_cr = False

    def feed(self, data: bytes) -> Block:
        """Return the events that these bytes complete. Lines may end in LF, CR or CRLF."""
        if self._ends_in_cr or b"\r" in data:
            data = (b"\r" if self._ends_in_cr else b"") + data
            self._ends_in_cr = data.endswith(b"\r")  # an LF of the same line end may follow
            data = (data[:-1] if self._ends_in_cr else data).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if self._tail:
            data = self._tail + data
        if not data.endswith(b"\n\n"):
            end = data.rfind(b"\n\n") + 2
            if end < 2:
                self._tail = data
                return Block(error="an event that does not end" if len(data) > EVENT_BYTES else "")
            self._tail = data[end:]
            return self._block(data[:end])
        self._tail = b""
        return self._block(data)

    @staticmethod
    def _block(whole: bytes) -> Block:
        block = Block()
        passed = 0
        for event in whole[:-2].split(b"\n\n"):
            try:
                chunk = _decode(event)
            except ValueError as error:
                block.error = str(error)
                break
            passed += len(event) + 2
            if chunk is _DONE:
                block.done = True
                break
            if chunk is not None:
                block.chunks.append(chunk)
        block.raw = whole if passed == len(whole) else whole[:passed]
        return block


def begins(events: bytes) -> bool:
    """Return whether events contain more than the role of a message: text, a tool call, a reason to end, usage."""
    for line in events.split(b"\n"):
        if not line.startswith(b"data:"):
            continue
        try:
            chunk = json.loads(line[5:])
            deltas = [
                {**choice.get("delta", {}), "text": choice.get("text"), "end": choice.get("finish_reason")}
                for choice in chunk["choices"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return True  # `[DONE]`, or nothing that is known
        if not deltas or any(value for delta in deltas for name, value in delta.items() if name != "role"):
            return True
    return False


_DONE = Chunk()


def _decode(event: bytes) -> Chunk | None:
    """Decode one event; None where it has no data. Raises ValueError for an error, and for data that is not JSON."""
    if event.startswith(b"data: ") and b"\n" not in event:
        data = event[6:]
    else:
        lines = [line.partition(b":") for line in event.split(b"\n") if line and not line.startswith(b":")]
        fields = [(name, value.removeprefix(b" ")) for name, _, value in lines]
        if failed := b"\n".join(value for name, value in fields if name == b"error"):  # some versions of llama.cpp
            raise ValueError(error_message(failed))
        data = b"\n".join(value for name, value in fields if name == b"data")
    if not data:
        return None
    if data.strip() == b"[DONE]":
        return _DONE
    try:
        chunk = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _decode_leniently(data)
    if chunk.error:
        raise ValueError(error_message(data))
    return chunk


def _decode_leniently(data: bytes) -> Chunk:
    """Decode the usable part of JSON that has an unexpected shape, or half of a surrogate pair."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("an event that is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("an event that is not a JSON object")
    if value.get("error"):
        raise ValueError(error_message(data))
    chunk = Chunk()
    choices = value.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        text = delta.get("content") if isinstance(delta, dict) else None
        if isinstance(text, str):
            chunk.choices.append(_Choice(delta=_Delta(text)))
    return chunk


def error_message(data: bytes) -> str:
    """Return the message of an error object, for people."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = data.decode(errors="replace")
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):  # `message`: the OpenAI API; the others: problem documents (RFC 9457)
        texts = (error.get(name) for name in ("message", "detail", "title"))
        error = next((text for text in texts if isinstance(text, str) and text), None) or json.dumps(error)
    return str(error)[:500]


class SurrogateJoiner:
    """Joins the halves of surrogate pairs that arrive in two events, so that no character is split."""

    def __init__(self) -> None:
        self._half = ""

    def feed(self, text: str) -> str:
        """Return the text that is complete with this addition."""
        text = self._half + text
        self._half = ""
        if not _SURROGATE.search(text):
            return text
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_SURROGATE = re.compile("[\ud800-\udfff]")
