"""The OpenAI SDK: the calls that README documents, and errors as the SDK expects them.

Each docstring is a requirement, and its function asserts it of the objects of the SDK.
"""

import inspect
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
from openai import OpenAI

from .finding import Finding, Outcome

SHOWN = 500
"""Maximum length of a body that is shown, in characters."""

MESSAGES: Any = [{"role": "user", "content": "Say hello."}]


def run(server: str) -> Outcome:
    """Make all calls."""
    requests: list[httpx2.Request] = []
    with (
        httpx2.Client(event_hooks={"request": [requests.append]}, timeout=60) as http,
        OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):
        findings = []
        for call in CALLS:
            try:
                call(client)
            except (AssertionError, openai.OpenAIError) as error:
                wrong = f"{inspect.getdoc(call)} But: {type(error).__name__} {error}"
                findings.append(Finding(wrong, _curl(requests[-1])))
    return Outcome(f"{len(CALLS)} requirements, {len(requests)} requests of openai {openai.__version__}", findings)


def _curl(request: httpx2.Request) -> str:
    """Return the command that repeats a request."""
    body = request.read().decode()
    if len(body) > SHOWN:
        body = f"{body[:SHOWN]}... ({len(body)} characters)"
    return shlex.join(["curl", "-i", *(["--json", body] if body else ["-X", request.method]), str(request.url)])


def _model(client: OpenAI) -> str:
    return client.models.list().data[0].id


def _create(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": _model(client), "messages": MESSAGES, "max_tokens": 8, **options})


@contextmanager
def _rejected(kind: type[openai.APIStatusError], *, param: str | None = None) -> Iterator[None]:
    """Check that the block raises this kind of error, with a message, and with the name of the parameter if given."""
    error: openai.APIStatusError | None = None
    try:
        yield
    except kind as raised:
        error = raised
    assert error is not None, "the request was accepted"
    assert isinstance(error.body, dict), f"the error's body is {error.body!r}"
    assert error.body.get("message"), f"the error has no message: {error.body}"
    assert param is None or error.param == param, f"the error names the parameter {error.param!r}"


def list_models(client: OpenAI) -> None:
    """`models.list()` has a model, which `models.retrieve()` finds."""
    model = _model(client)
    assert client.models.retrieve(model).id == model


def retrieve_unknown_model(client: OpenAI) -> None:
    """`models.retrieve()` of an unknown model raises NotFoundError."""
    with _rejected(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def complete(client: OpenAI) -> None:
    """A completion has text, a finish reason, and a usage that adds up."""
    completion = _create(client)
    (choice,) = completion.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = completion.usage
    assert 0 < usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def complete_with_max_completion_tokens(client: OpenAI) -> None:
    """`max_completion_tokens` limits as `max_tokens` does."""
    completion = _create(client, max_tokens=openai.omit, max_completion_tokens=3)
    assert completion.usage.completion_tokens <= 3


def stream(client: OpenAI) -> None:
    """A stream has several chunks, one finish reason at its end, and no usage unless it is requested."""
    chunks = list(_create(client, stream=True, max_tokens=16))
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
    assert reasons in (["stop"], ["length"])
    assert not any(chunk.usage for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def stream_with_usage(client: OpenAI) -> None:
    """With `include_usage`, the last chunk has the usage and no choices."""
    *chunks, last = _create(client, stream=True, stream_options={"include_usage": True})
    assert chunks
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def close_a_stream_early(client: OpenAI) -> None:
    """A stream can be closed early, and the next request gets a response."""
    with _create(client, stream=True, max_tokens=200) as chunks:
        next(iter(chunks))
    assert _create(client, max_tokens=1).choices


def complete_as_json(client: OpenAI) -> None:
    """With a JSON schema as `response_format`, the text is JSON of that schema."""
    schema = {
        "type": "object",
        "properties": {"polite": {"type": "boolean"}},
        "required": ["polite"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "manners", "schema": schema}}
    response = json.loads(_create(client, response_format=shape, max_tokens=60).choices[0].message.content)
    assert isinstance(response["polite"], bool)


def reject_unknown_model(client: OpenAI) -> None:
    """A completion of an unknown model raises NotFoundError."""
    with _rejected(openai.NotFoundError):
        _create(client, model="no-such-model")


def reject_temperature(client: OpenAI) -> None:
    """A temperature out of range raises BadRequestError that names `temperature`."""
    with _rejected(openai.BadRequestError, param="temperature"):
        _create(client, temperature=9)


def reject_top_p(client: OpenAI) -> None:
    """A `top_p` out of range raises BadRequestError that names it."""
    with _rejected(openai.BadRequestError, param="top_p"):
        _create(client, top_p=2)


def reject_tokens(client: OpenAI) -> None:
    """More tokens than the server allows raise BadRequestError that names `max_tokens`."""
    with _rejected(openai.BadRequestError, param="max_tokens"):
        _create(client, max_tokens=10**6)


def reject_long_prompt(client: OpenAI) -> None:
    """A prompt that is too long raises BadRequestError that names `messages`."""
    with _rejected(openai.BadRequestError, param="messages"):
        _create(client, messages=[{"role": "user", "content": "word " * 20_000}])


def reject_no_messages(client: OpenAI) -> None:
    """No messages raise BadRequestError that names `messages`."""
    with _rejected(openai.BadRequestError, param="messages"):
        _create(client, messages=[])


def reject_image(client: OpenAI) -> None:
    """An image raises BadRequestError: the model reads text only."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with _rejected(openai.BadRequestError):
        _create(client, messages=[{"role": "user", "content": [image]}])


def reject_required_tool(client: OpenAI) -> None:
    """A required tool is called, or raises BadRequestError: it is not ignored."""
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    required = {"tools": [tool], "tool_choice": "required"}
    try:
        completion = _create(client, max_tokens=40, **required)
    except openai.BadRequestError:
        with _rejected(openai.BadRequestError, param="tool_choice"):
            _create(client, **required)
    else:
        assert completion.choices[0].message.tool_calls, "it was ignored"


def reject_embeddings(client: OpenAI) -> None:
    """A model without embeddings raises BadRequestError with a message."""
    with _rejected(openai.BadRequestError):
        client.embeddings.create(model=_model(client), input="hello")


def reject_moderations(client: OpenAI) -> None:
    """An API that is not served raises NotFoundError with a message."""
    with _rejected(openai.NotFoundError):
        client.moderations.create(input="hello")


CALLS: tuple[Callable[[OpenAI], None], ...] = (
    list_models,
    retrieve_unknown_model,
    complete,
    complete_with_max_completion_tokens,
    stream,
    stream_with_usage,
    close_a_stream_early,
    complete_as_json,
    reject_unknown_model,
    reject_temperature,
    reject_top_p,
    reject_tokens,
    reject_long_prompt,
    reject_no_messages,
    reject_image,
    reject_required_tool,
    reject_embeddings,
    reject_moderations,
)
