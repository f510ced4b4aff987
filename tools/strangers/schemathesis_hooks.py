"""Hooks of schemathesis: bounds for endless or long requests, and accepted failures.

Endless streams must not block the run: in a valid request, the parameters that make it long (`limit`, `rows`, `steps`)
are capped before it is sent. Values that are invalid on purpose are sent unchanged.
"""

import contextlib
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import re2
import schemathesis
from schemathesis import Case, HookContext, Response
from schemathesis.core.failures import Failure

# -- bounds


class Cap(NamedTuple):
    """The cap of a number: valid values are from `minimum` to `maximum`, and `cap` is the largest that is sent."""

    cap: float
    minimum: float
    maximum: float
    is_required: bool = False
    """Whether to add it if the tool omits it, since the default of the server is long."""


QUERY_CAPS: dict[str, dict[str, Cap]] = {
    "GET /stream/stock-ticker": {"limit": Cap(3, 1, 1_000_000, True), "conflate": Cap(0.05, 0, 3600)},
    "GET /stream/live-logs": {"limit": Cap(2, 1, 1_000_000, True)},
    "GET /demo/comparison/buffered": {"rows": Cap(500, 0, 100_000_000, True)},
    "GET /demo/comparison/streamed": {"rows": Cap(500, 0, 100_000_000, True)},
    "GET /demo/comparison/report": {"rows": Cap(100, 100, 100_000_000, True), "repeats": Cap(1, 1, 9, True)},
    "GET /download/large-file": {"size_mb": Cap(1, 1, 100_000)},
    "GET /ai/chat-stream": {"max_tokens": Cap(4, 1, 1_000_000, True)},
    "GET /ai/chat-stream-sse": {"max_tokens": Cap(4, 1, 1_000_000, True)},
    "GET /process/long-task": {"steps": Cap(3, 1, 1_000_000, True)},
}
"""Caps by operation: the largest values that are sent, not those that the server allows."""

BODY_CAPS: dict[str, dict[str, Cap]] = {
    "POST /ai/chat-stream": {"max_tokens": Cap(4, 1, 1_000_000, True)},
    "POST /ai/chat-stream-sse": {"max_tokens": Cap(4, 1, 1_000_000, True)},
    "POST /v1/chat/completions": {"max_tokens": Cap(4, 1, 1_000_000, True), "max_completion_tokens": Cap(4, 1, 1e6)},
}

REHEARSAL_CAPS = {"steps": Cap(3, 1, 1_000_000, True), "delay": Cap(0.01, 0, 60, True)}
"""Caps of the parameters of the task `rehearsal`, which only waits."""


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    """Cap the parameters that make a valid request long."""
    operation = case.operation.label
    if isinstance(case.query, MutableMapping):
        _cap(case.query, QUERY_CAPS.get(operation, {}))
        if _number(case.query.get("rate")) is not None:
            del case.query["rate"]  # slow on purpose
        if operation == "GET /stream/live-logs":
            _remove_filters(case.query)
    if isinstance(case.body, MutableMapping):
        _cap(case.body, BODY_CAPS.get(operation, {}))
        parameters = case.body.get("parameters")
        if case.body.get("kind") == "rehearsal" and isinstance(parameters, MutableMapping):
            _cap(parameters, REHEARSAL_CAPS)


def _cap(values: MutableMapping[str, Any], caps: dict[str, Cap]) -> None:
    for name, (cap, minimum, maximum, is_required) in caps.items():
        original = values.get(name)
        value = _number(original)
        if (value is not None and minimum <= value <= maximum and value > cap) or (original is None and is_required):
            values[name] = cap


def _number(value: object) -> float | None:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return None


def _remove_filters(query: MutableMapping[str, Any]) -> None:
    """Replace valid filters that may match no line in a reasonable time."""
    options = re2.Options()
    options.log_errors = False
    with contextlib.suppress(re2.error, TypeError, UnicodeError):
        re2.compile(query.get("grep", "("), options)
        query["grep"] = ""
    if query.get("level") in ("INFO", "WARNING", "ERROR", "CRITICAL"):
        query["level"] = "DEBUG"


# -- accepted failures


@dataclass(frozen=True)
class Accepted:
    """Failures that are not defects, selected as narrowly as possible, with the reason."""

    codes: str
    """Code of the failure as schemathesis prints it, or several codes."""
    status: int
    operations: str
    """Regular expression of the request, as `GET /files/{path}`."""
    reason: str
    parameters: frozenset[str] = frozenset()
    """The response rejects one or more of these parameters, and no others."""
    detail: str = ""
    """A part of the response's `detail`."""

    def applies(self, code: str, operation: str, response: Response) -> bool:
        """Return whether it accepts this failure."""
        if (
            code not in self.codes
            or response.status_code != self.status
            or not re.fullmatch(self.operations, operation)
        ):
            return False
        if not self.parameters and not self.detail:
            return True
        body = response.json()
        named = _named(body)
        return (not self.parameters or bool(named)) and named <= self.parameters and self.detail in str(body)


def _named(body: dict[str, Any]) -> set[str]:
    """Return the parameters that an error response names, as problem details or in the form of OpenAI."""
    names = [error["name"] for error in body.get("errors", [])]
    if isinstance(error := body.get("error"), dict) and error.get("param"):
        names.append(error["param"])
    return {re.split(r"[.\[]", name)[0] for name in names}


ACCEPTED = (
    Accepted(
        "ST101 ST204",
        501,
        r"QUERY .*",
        "RFC 9110, 15.6.2: 501 is for methods that a server does not know; 405 is for those that it knows.",
    ),
    Accepted(
        "ST202",
        422,
        r"GET /export/\{name\}(/\{format\})?|GET /stream/database-results",
        "The columns depend on the export, and `end` belongs to one of the formats: the schema of one parameter cannot "
        "express that.",
        parameters=frozenset({"columns", "end"}),
    ),
    Accepted(
        "ST202",
        422,
        r"GET /stream/live-logs|GET /logs/download",
        "The document describes in words which times, sources and patterns are valid.",
        parameters=frozenset({"since", "source", "grep"}),
    ),
    Accepted(
        "ST202",
        422,
        r"GET /stream/stock-ticker",
        "The configuration determines the symbols.",
        parameters=frozenset({"symbols"}),
    ),
    Accepted(
        "ST202",
        422,
        r"POST /stream/stock-ticker",
        "The document has an example of a price, and no schema: it may have any other fields.",
        parameters=frozenset({"body", "symbol", "price", "time", "change"}),
    ),
    Accepted(
        "ST202",
        422,
        r"POST /process/tasks|GET /process/long-task",
        "Plugins determine the kinds and their parameters; GET /process/kinds has their schemas.",
        parameters=frozenset({"kind", "parameters", "path", "steps"}),
    ),
    Accepted(
        "ST202",
        422,
        r"(GET|POST) /ai/chat-stream(-sse)?",
        "Either prompt or messages, and not empty: the document describes that in words.",
        parameters=frozenset({"body", "prompt", "messages"}),
    ),
    Accepted(
        "ST202",
        422,
        r"(GET|POST) /ai/chat-stream(-sse)?",
        "A prompt is limited in tokens, which a schema cannot express.",
        detail="tokens",
    ),
    Accepted(
        "ST202",
        400,
        r"POST /v1/chat/completions",
        "The document has the fields of the OpenAI API; what its schemas do not describe is rejected by name.",
        parameters=frozenset(
            {"function_call", "functions", "messages", "n", "response_format", "tool_choice", "tools", "top_logprobs"}
        ),
    ),
    Accepted(
        "ST202",
        410,
        r"(GET|DELETE) /process/tasks/\{id\}",
        "An id contains its time, so one that is older than all stored tasks is 410, even if it never existed.",
    ),
    Accepted(
        "ST301",
        200,
        r"(GET|DELETE) /process/tasks/\{id\}",
        "DELETE cancels a task, as documented: its record remains.",
    ),
    Accepted(
        "ST301",
        200,
        r"(GET|DELETE) /ai/generations/\{id\}",
        "DELETE stops a generation, as documented: its events remain for its followers.",
    ),
)


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: Case[Any], response: Response) -> bool:
    """Return whether a failure counts."""
    operation = f"{case.method} {case.path}"
    return not any(accepted.applies(failure.code, operation, response) for accepted in ACCEPTED)
