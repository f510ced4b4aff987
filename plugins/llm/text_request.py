"""Requests of POST /v1/completions and POST /v1/embeddings: the accepted fields and their bounds.

As for chat completions, only fields named here reach a model.

Source: https://platform.openai.com/docs/api-reference/completions/create and .../embeddings/create.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, WithJsonSchema

from .completion_request import Bias, Rules, ShortText, Stop, StreamOptions, TokenId, rejected

TOKEN_IDS = 2**31
"""Exclusive maximum of the number of a token."""


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(token) is int and 0 <= token < TOKEN_IDS for token in value)
    )


def _texts(value: Any) -> Any:
    """Return a text, or texts; tokens instead of each are accepted."""
    if (isinstance(value, str) and value) or _is_tokens(value):
        return value
    if isinstance(value, list) and 0 < len(value) <= 2048:
        texts = all(isinstance(text, str) and text for text in value)
        if texts or all(map(_is_tokens, value)):
            return value
    raise ValueError("must be a text that is not empty, a list of 1 to 2048 of them, or of lists of token numbers")


_TEXT = {"type": "string", "minLength": 1}
_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": TOKEN_IDS}}
_MANY = [{"type": "array", "minItems": 1, "maxItems": 2048, "items": item} for item in (_TEXT, _TOKENS)]
Texts = Annotated[Any, AfterValidator(_texts), WithJsonSchema({"anyOf": [_TEXT, _TOKENS, *_MANY]})]


def texts_of(value: Any) -> list[Any]:
    """Return the texts of a `prompt` or an `input`; each is a str or a list of tokens."""
    return value if isinstance(value, list) and not _is_tokens(value) else [value]


class TextRequest(BaseModel):
    """What both requests have."""

    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra={"additionalProperties": False})

    model: ShortText | None = Field(None, description="The model's name, as /v1/models lists it.")
    user: ShortText | None = None


class CompletionRequest(TextRequest):
    """A request to continue a text, as the OpenAI API defines it; unknown fields are rejected by name."""

    model_config = ConfigDict(
        json_schema_extra={
            "additionalProperties": False,
            "examples": [{"prompt": "Once upon a time", "max_tokens": 9, "stream": True}],
        }
    )

    prompt: Texts = Field(description="The text to continue, or several; each takes a slot.")
    stream: StrictBool | None = Field(None, description="Send the response as events while it is generated.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, description="Maximum tokens of a response.")
    n: int | None = Field(None, ge=1, le=128, description="Number of responses to each prompt; each takes a slot.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = Field(None, description="The response ends before one of these texts.")
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=300)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: StrictBool | None = None
    suffix: str | None = None

    def upstream_body(self, rules: Rules) -> dict[str, Any]:
        """Return the body to send to the model; raises OpenAIError, which names the field, for an invalid request."""
        rules.check_fields(self)
        if (self.max_tokens or 0) > rules.max_tokens:
            raise rejected("max_tokens", f"max_tokens must be at most {rules.max_tokens}.")
        prompts = len(texts_of(self.prompt))
        if prompts * (self.n or 1) > rules.max_choices:
            name = "n" if prompts == 1 else "prompt"
            raise rejected(name, f"n times the number of prompts must be at most {rules.max_choices}.")
        body = self.model_dump(by_alias=True, exclude_unset=True)
        if rules.embedded:
            if self.suffix is not None:
                raise rejected("suffix", "This model has no suffix.")
            body.pop("user", None)
            if self.seed is not None:
                body["seed"] = self.seed % 2**31  # llama.cpp's range
        return body | {"model": rules.model, "max_tokens": self.max_tokens or rules.max_tokens}


class EmbeddingRequest(TextRequest):
    """A request for the embeddings of texts, as the OpenAI API defines it; unknown fields are rejected by name."""

    model_config = ConfigDict(
        json_schema_extra={"additionalProperties": False, "examples": [{"input": ["red", "blue"]}]}
    )

    input: Texts = Field(description="The text, or texts.")
    dimensions: int | None = Field(None, ge=1, le=100_000)
    encoding_format: Literal["float", "base64"] | None = None

    def upstream_body(self, rules: Rules) -> dict[str, Any]:
        """Return the body to send to the model; raises OpenAIError, which names the field, for an invalid request."""
        rules.check_fields(self)
        if rules.embedded:
            raise rejected("model", f"{rules.model!r} has no embeddings.", code="unsupported")
        return self.model_dump(exclude_unset=True) | {"model": rules.model}
