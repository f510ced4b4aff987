"""Requests of POST /v1/chat/completions: the accepted fields, their bounds, and what is sent to the model.

Only fields named here reach a model, so that no field that it understands and this server does not count can bypass the
server's limits. docs/openai.md has the table for clients and operators.

Source: https://platform.openai.com/docs/api-reference/chat/create (names, types and ranges).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictStr,
    StringConstraints,
    WithJsonSchema,
)

from .openai import OpenAIError
from .schema import check_schema

LimitField = Literal["max_tokens", "max_completion_tokens"]
"""The names under which upstreams take the maximum tokens; some reject the first, some ignore the second."""

DROPPED = frozenset({"metadata", "prompt_cache_retention", "service_tier", "store"})
"""Fields about the account that pays, which is the operator's: accepted, and not sent."""

UNUSED_WHEN_EMBEDDED = frozenset(
    {
        "function_call", "functions", "modalities", "parallel_tool_calls", "prompt_cache_key", "reasoning_effort",
        "safety_identifier", "tool_choice", "tools", "user", "verbosity",
    }
)  # fmt: skip
"""Fields that the embedded model does not use: accepted, and not sent to it."""

PROMPT_FIELDS = (
    "messages",
    "prompt",
    "suffix",
    "input",
    "tools",
    "functions",
    "tool_choice",
    "function_call",
    "response_format",
)
"""Fields whose content an upstream makes part of the prompt."""

LIMITS = re.compile(r"(max|num|n|t_max)_.*|.*_(tokens|last_n|ctx)|best_of|use_beam_search|ignore_eos|options|samplers")
"""Names of fields with which model servers set a limit or disable one."""

ShortText = Annotated[StrictStr, StringConstraints(max_length=512)]


def _content(content: Any) -> Any:
    if not isinstance(content, str | list | None):
        raise ValueError("must be a text or a list of parts")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise ValueError("each part must be an object with a type, as {'type': 'text', 'text': 'Hello'}")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ValueError("a part of type text needs a text")
    return content


def _stop(stop: Any) -> Any:
    texts = [stop] if isinstance(stop, str) else stop
    if texts is None:
        return None
    if not isinstance(texts, list) or len(texts) > 4:
        raise ValueError("must be a text or a list of at most 4 texts")
    if not all(isinstance(text, str) and 0 < len(text) <= 500 for text in texts):
        raise ValueError("each text must have 1 to 500 characters")
    return stop


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, str | None) and choice not in ("none", "auto", "required", None):
        raise ValueError("must be 'none', 'auto', 'required' or an object that names a tool")
    if not isinstance(choice, str | dict | None):
        raise ValueError("must be a text or an object")
    return choice


def _function_call(choice: Any) -> Any:
    if choice in ("none", "auto", None) or isinstance(choice, dict):
        return choice
    raise ValueError("must be 'none', 'auto' or an object that names a function")


Content = Annotated[
    Any,
    AfterValidator(_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "object", "required": ["type"]}},
                {"type": "null"},
            ]
        }
    ),
]
Stop = Annotated[
    Any,
    AfterValidator(_stop),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": 500},
                {
                    "type": "array",
                    "maxItems": 4,
                    "items": {"type": "string", "minLength": 1, "maxLength": 500},
                },
                {"type": "null"},
            ]
        }
    ),
]
_CHOICES = ["none", "auto", "required"]
ToolChoice = Annotated[
    Any,
    AfterValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"type": "string", "enum": _CHOICES}, {"type": "object"}, {"type": "null"}]}),
]
FunctionCall = Annotated[
    Any,
    AfterValidator(_function_call),
    WithJsonSchema({"anyOf": [{"type": "string", "enum": _CHOICES[:2]}, {"type": "object"}, {"type": "null"}]}),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]


class ChatMessage(BaseModel):
    """One message of a conversation; fields that are not named here belong to upstreams, and are counted."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None


class StreamOptions(BaseModel):
    """What a stream contains in addition to the response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class NamedSchema(BaseModel):
    """A JSON Schema for the response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: ShortText | None = None
    description: ShortText | None = None
    json_schema: dict[str, JsonValue] | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """The format of the response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class ChatCompletionRequest(BaseModel):
    """A request for a completion, as the OpenAI API defines it; unknown fields are rejected by name."""

    model_config = ConfigDict(
        extra="allow",  # `Rules` rejects unknown fields by name: an operator may allow further ones
        strict=True,
        json_schema_extra={
            "additionalProperties": False,
            "examples": [{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "stream": True}],
        },
    )

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000, description="The conversation so far.")
    model: ShortText | None = Field(None, description="The model's name, as /v1/models lists it.")
    stream: StrictBool | None = Field(None, description="Send the response as events while it is generated.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, description="Maximum tokens of a response.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same, under its newer name.")
    n: int | None = Field(None, ge=1, le=128, description="Number of responses; each takes a slot.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = Field(None, description="The response ends before one of these texts.")
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=300)
    logprobs: StrictBool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, JsonValue]] | None = Field(None, max_length=128)
    tool_choice: ToolChoice = None
    parallel_tool_calls: StrictBool | None = None
    functions: list[dict[str, JsonValue]] | None = Field(None, max_length=128)
    function_call: FunctionCall = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    reasoning_effort: ShortText | None = None
    verbosity: ShortText | None = None
    user: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_retention: ShortText | None = None
    service_tier: ShortText | None = None
    store: StrictBool | None = None
    metadata: dict[ShortText, ShortText] | None = Field(None, max_length=16)

    def upstream_body(self, rules: "Rules") -> dict[str, Any]:
        """Return the body to send to the model; raises OpenAIError, which names the field, for an invalid request."""
        return rules.upstream_body(self)


def check_extra_field(name: str) -> str:
    """Return the name of a field that an operator allows; raises ValueError where it cannot be allowed."""
    if LIMITS.fullmatch(name):
        raise ValueError(f"{name!r} sets a limit or disables one, and cannot be allowed")
    if name in ChatCompletionRequest.model_fields and name not in DROPPED:
        raise ValueError(f"{name!r} is already allowed, within its bounds")
    return name


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits and the fields of requests to one model."""

    model: str
    """The name under which clients know it."""
    max_tokens: int
    """Maximum tokens of a response."""
    max_choices: int
    """Maximum `n`."""
    embedded: bool
    limit_field: LimitField = "max_tokens"
    """Name under which the upstream is sent the maximum tokens."""
    extra_fields: frozenset[str] = frozenset()

    def upstream_body(self, request: ChatCompletionRequest) -> dict[str, Any]:
        """Return the body to send to the model; raises OpenAIError, which names the field, for an invalid request."""
        self._check(request)
        dropped = (DROPPED | UNUSED_WHEN_EMBEDDED if self.embedded else DROPPED) - self.extra_fields
        body = request.model_dump(by_alias=True, exclude_unset=True, exclude=set(dropped))
        limits = [body.pop(name) for name in ("max_tokens", "max_completion_tokens") if name in body]
        limit = min((tokens for tokens in limits if tokens is not None), default=self.max_tokens)
        body |= {"model": self.model, self.limit_field: limit}
        if self.embedded:
            body["messages"] = list(_plain(request.messages))
            if body.get("seed") is not None:
                body["seed"] %= 2**31  # llama.cpp's range
        return body

    def check_fields(self, request: BaseModel) -> None:
        """Raise OpenAIError for a field that is neither known nor allowed by the operator."""
        for name in request.model_extra or {}:
            if name not in self.extra_fields:
                raise rejected(name[:100], f"Unknown parameter: {name[:100]!r}.", code="unknown_parameter")

    def _check(self, request: ChatCompletionRequest) -> None:
        self.check_fields(request)
        for name in ("max_tokens", "max_completion_tokens"):
            if (getattr(request, name) or 0) > self.max_tokens:
                raise rejected(name, f"{name} must be at most {self.max_tokens}.")
        if (request.n or 1) > self.max_choices:
            raise rejected("n", f"n must be at most {self.max_choices}.")
        if request.top_logprobs is not None and not request.logprobs:
            raise rejected("top_logprobs", "top_logprobs needs logprobs to be true.")
        for number, message in enumerate(request.messages):
            if not message.content and message.role in ("system", "developer", "user"):
                raise rejected(f"messages[{number}].content", f"messages[{number}].content must not be empty.")
        if self.embedded:
            _check_embedded(request)


def _check_embedded(request: ChatCompletionRequest) -> None:
    """Reject what the embedded model cannot do; dropping it silently would look as if it had been done."""
    for number, message in enumerate(request.messages):
        for part in message.content if isinstance(message.content, list) else ():
            if part["type"] != "text":
                detail = f"This model accepts only text, not a part of type {part['type'][:100]!r}."
                raise rejected(f"messages[{number}].content", detail)
    for name in ("tool_choice", "function_call"):
        if getattr(request, name) not in (None, "none", "auto"):
            raise rejected(name, f"This model has no tools: {name} can only be 'none' or 'auto'.")
    if (form := request.response_format) and form.type == "json_schema":
        named = form.json_schema
        if named is None or named.json_schema is None:
            raise rejected("response_format", "response_format of type json_schema needs json_schema.schema.")
        try:
            check_schema(named.json_schema)
        except ValueError as error:
            raise rejected("response_format", f"response_format.json_schema.schema: {error}") from None


def _plain(messages: Iterable[ChatMessage]) -> Iterator[dict[str, str]]:
    """Yield messages in the form of the embedded model's template: a role and a text."""
    for message in messages:
        content = message.content or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        yield {"role": message.role, "content": content}


def rejected(param: str, detail: str, *, code: str | None = None) -> OpenAIError:
    """Return the 400 that names a field of the request."""
    return OpenAIError(400, detail, param=param, code=code)


def prompt_bytes(body: Mapping[str, Any], extra_fields: Iterable[str] = ()) -> int:
    """Return the size, in bytes of JSON, of all fields of an upstream's body that may become prompt."""
    return sum(len(msgspec.json.encode(body[name])) for name in (*PROMPT_FIELDS, *extra_fields) if body.get(name))
