"""The OpenAI API as far as upstreams speak it: the events that they send; and its errors, which clients get.

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
"""What one event of an upstream may have; more without a blank line is no event stream."""


class Failure(Problem):
    """An error response with a code that programs can tell apart, and the field of the request that caused it."""

    def __init__(
        self, status: int, code: str, detail: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail, headers=headers)
        self.code = code
        self.param = param

    def document(self) -> dict[str, Any]:
        """The problem document, and the code."""
        return {**super().document(), "code": self.code}


# -- errors, as clients of the OpenAI API read them


class OpenAIError(Problem):
    """A refusal in the form `{"error": {"message", "type", "param", "code"}}`."""

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
        """Return a problem in this form; what is 422 elsewhere is 400 here, and reports its first parameter."""
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
        """The error object."""
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
    """What was wrong: `param` names the field of the request, `code` is for programs."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error response of the OpenAI API."""

    error: ErrorObject


@contextmanager
def openai_errors() -> Iterator[None]:
    """Raise every refusal of the block in the form of the OpenAI API."""
    try:
        yield
    except Problem as problem:
        raise OpenAIError.of(problem) from problem.__cause__


# -- what an upstream sends


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


Tokens = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]


class Usage(msgspec.Struct):
    """Tokens of a prompt and its answer; an upstream's report with absurd numbers is ignored."""

    prompt_tokens: Tokens
    completion_tokens: Tokens


class Chunk(msgspec.Struct):
    """One event of a completion, as far as it is looked at."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def text(self) -> str:
        """What it adds to the answer (the first, where several were asked for)."""
        first = (choice.delta for choice in self.choices if not choice.index)
        return "".join(delta.content for delta in first if delta and delta.content)

    @property
    def finish_reason(self) -> str | None:
        """Why the answer is over, once it is."""
        return next((choice.finish_reason for choice in self.choices if choice.finish_reason), None)


_decoder = msgspec.json.Decoder(Chunk)


@dataclass(slots=True)
class Block:
    """Whole events that came together: their bytes, and what they say."""

    raw: bytes = b""
    """As they came, lines ended by LF."""
    chunks: list[Chunk] = field(default_factory=list)
    done: bool = False
    """Whether `[DONE]` was among them; nothing follows it."""
    error: str = ""
    """Why the next event is none to be passed on: the upstream's own words, or what is wrong with it."""


def read_whole(body: bytes) -> Block:
    """Read an answer that was not streamed, as if it were one event; raises Failure where it is none."""
    try:
        return Block(body, [_decoder.decode(body)])
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return Block(body, [_leniently(body)])
    except ValueError:
        raise Failure(502, "upstream_failed", "The upstream's answer is not JSON.") from None


class Frames:
    """Cuts the bytes of an upstream's event stream into blocks of whole events, however the network cut them."""

    def __init__(self) -> None:
        self._tail = b""
        self._ends_in_cr = False

    def feed(self, part: bytes) -> Block:
        """Return the events that are whole with these bytes. Lines may end in LF, CR or CRLF."""
        if self._ends_in_cr or b"\r" in part:
            part = (b"\r" if self._ends_in_cr else b"") + part
            self._ends_in_cr = part.endswith(b"\r")  # an LF may follow, of the same line end
            part = (part[:-1] if self._ends_in_cr else part).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        data = self._tail + part
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            self._tail = data
            return Block(error="an event without an end" if len(data) > EVENT_BYTES else "")
        self._tail = data[end:]
        return self._block(data[:end])

    @staticmethod
    def _block(whole: bytes) -> Block:
        block = Block()
        passed = 0
        for event in whole[:-2].split(b"\n\n"):
            try:
                chunk = _read(event)
            except ValueError as error:
                block.error = str(error)
                break
            passed += len(event) + 2
            if chunk is _DONE:
                block.done = True
                break
            if chunk is not None:
                block.chunks.append(chunk)
        block.raw = whole[:passed]
        return block


_DONE = Chunk()


def _read(event: bytes) -> Chunk | None:
    """Read one event: None for one without data; raises ValueError for an error, and for what is no JSON object."""
    if event.startswith(b"data: ") and b"\n" not in event:
        data = event[6:]
    else:
        lines = [line.partition(b":") for line in event.split(b"\n") if line and not line.startswith(b":")]
        fields = [(name, value.removeprefix(b" ")) for name, _, value in lines]
        if failed := b"\n".join(value for name, value in fields if name == b"error"):  # llama.cpp once wrote it so
            raise ValueError(words(failed))
        data = b"\n".join(value for name, value in fields if name == b"data")
    if not data:
        return None
    if data.strip() == b"[DONE]":
        return _DONE
    try:
        chunk = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _leniently(data)
    if chunk.error:
        raise ValueError(words(data))
    return chunk


def _leniently(data: bytes) -> Chunk:
    """Read what has another shape than it should, or half of a surrogate pair: as much of it as can be used."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("an event that is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("an event that is no JSON object")
    if value.get("error"):
        raise ValueError(words(data))
    chunk = Chunk()
    choices = value.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        with_text = choice.get("delta") if isinstance(choice, dict) else None
        text = with_text.get("content") if isinstance(with_text, dict) else None
        if isinstance(text, str):
            chunk.choices.append(_Choice(delta=_Delta(text)))
    return chunk


def words(data: bytes) -> str:
    """What an error object says, for people."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = data.decode(errors="replace")
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):  # `message`: the OpenAI API; the others: problem documents (RFC 9457)
        texts = (error.get(name) for name in ("message", "detail", "title"))
        error = next((text for text in texts if isinstance(text, str) and text), None) or json.dumps(error)
    return str(error)[:500]


class Whole:
    """Joins halves of surrogate pairs that came in two events, so that no character is cut."""

    def __init__(self) -> None:
        self._half = ""

    def feed(self, text: str) -> str:
        """Return what can be encoded by now."""
        text = self._half + text
        self._half = ""
        if not _SURROGATE.search(text):
            return text
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_SURROGATE = re.compile("[\ud800-\udfff]")
