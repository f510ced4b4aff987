"""Every error response as `application/problem+json` (RFC 9457)."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ValidationError

MEDIA_TYPE = "application/problem+json"

_PHRASES = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}
"""The phrases of RFC 9110, section 15, where a supported Python has older ones."""

MAX_ERRORS = 50
"""Maximum number of faults that an error response lists."""


class Problem(Exception):
    """An error response, raised by a handler: an HTTP status from 400 on, what is wrong, and what is allowed.

    `errors` lists every bad parameter as `{"in": "query", "name": "start", "detail": "..."}`. `detail` is read by
    clients: no path of this machine, no traceback, no secret.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Sequence[Mapping[str, Any]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # What a client sent may have bytes that are no UTF-8, as lone surrogates, which no response can carry.
        detail = encodable(detail)
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})

    @staticmethod
    def parameter(name: str, detail: str, where: str = "query", status: int = 422) -> "Problem":
        """Return the Problem of a request with one bad parameter; `where` is `query`, `path` or `body`."""
        return Problem.of_parameters([{"in": where, "name": name, "detail": detail}], status)

    @staticmethod
    def of_parameters(errors: Sequence[Mapping[str, Any]], status: int = 422) -> "Problem":
        """Return the Problem of a request with bad parameters, as for those that an endpoint's models reject."""
        listed = errors[:MAX_ERRORS]
        names = ", ".join(dict.fromkeys(str(error["name"]) for error in listed))
        more = f" and {len(errors) - MAX_ERRORS} more" if len(errors) > MAX_ERRORS else ""
        return Problem(status, f"Invalid parameters: {names}{more}.", errors=listed)

    def document(self) -> dict[str, Any]:
        """Return the members of the problem document: type, title, status, detail and, if there are any, errors."""
        members: dict[str, Any] = {
            "type": "about:blank",
            "title": phrase(self.status),
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            members["errors"] = [dict(error) for error in self.errors]
        return members

    def response(self) -> web.Response:
        """Return the complete response; it is never cached."""
        headers = {"Content-Type": f"{MEDIA_TYPE}; charset=utf-8", "Cache-Control": "no-store", **self.headers}
        is_usual = type(self) is Problem and not self.errors
        body = _body_of(self.status, self.detail) if is_usual else self._body()
        return web.Response(status=self.status, reason=phrase(self.status), body=body, headers=headers)

    def _body(self) -> bytes:
        return encodable(json.dumps(self.document(), ensure_ascii=False) + "\n").encode()


@lru_cache(maxsize=100)
def _body_of(status: int, detail: str) -> bytes:
    """Return the body of a problem without errors; many requests get the same, as that of an unknown path."""
    return Problem(status, detail)._body()


def encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: each lone surrogate becomes "?"."""
    return text.encode("utf-8", "replace").decode()


def phrase(status: int) -> str:
    """Return the reason phrase of a status code as RFC 9110 has it, on every version of Python."""
    return _PHRASES.get(status) or HTTPStatus(status).phrase


@dataclass(frozen=True, slots=True)
class ErrorFormat:
    """The form of error responses under a path, where another protocol than problem documents prescribes one.

    It holds for every response with 400 or more whose path begins with `prefix`, also where no route or no handler
    is reached: unknown paths, wrong methods, rejected hosts, bodies that are too large.
    """

    prefix: str
    """The beginning of the paths, as `/v1/`."""
    media_type: str
    model: type[BaseModel]
    """The model of the body, for the OpenAPI document."""
    convert: Callable[[Problem], Problem]
    """A function that returns a problem in this form, whose `response` is overridden."""


ERROR_FORMATS = web.AppKey("error_formats", Sequence[ErrorFormat])


def error_format_of(path: str, formats: Sequence[ErrorFormat]) -> ErrorFormat | None:
    """Return the form of error responses at a path: that of the longest prefix; None for problem documents."""
    matching = (each for each in formats if path.startswith(each.prefix))
    return max(matching, key=lambda each: len(each.prefix), default=None)


_PATH = re.compile(r"""'/[^']*'|"/[^"]*"|\(/[^)]*\)|(?<![\w.])/[^\s'",;:)]+""")
"""An absolute path in the message of an exception: quoted, spaces included, or bare."""


def public_message(error: BaseException) -> str:
    """Return the message of an exception for clients: without absolute paths or traceback."""
    detail = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return _PATH.sub("...", detail)


_DETAILS = {
    404: "Nothing is served at this path. GET / lists every route.",
    413: "The body is too large.",
}


def from_aiohttp(error: Exception) -> Problem | None:
    """Return the Problem of what aiohttp itself rejects (no such route, wrong method, a broken or too large body).

    Returns None for other exceptions.
    """
    if isinstance(error, web.RequestPayloadError):
        detail = "The body cannot be read: it does not match its Content-Encoding or its framing."
        return Problem(400, detail, headers={"Connection": "close"})
    if not isinstance(error, web.HTTPException):
        return None
    headers = {name: error.headers[name] for name in ("Allow", "Retry-After", "Location") if name in error.headers}
    detail = _DETAILS.get(error.status, error.reason)
    if isinstance(error, web.HTTPMethodNotAllowed):
        detail = f"Allowed methods: {', '.join(sorted(error.allowed_methods))}."
    return Problem(error.status, detail, headers=headers)


def faults(error: ValidationError, where: str) -> list[dict[str, Any]]:
    """Return what a model rejects, as the `errors` of a problem document; `where` is `query`, `path` or `body`."""
    found = []
    for detail in error.errors(include_url=False, include_input=False):
        name = ".".join(str(part) for part in detail["loc"])[:100] or where
        message = detail["msg"].removeprefix("Value error, ")
        found.append({"in": where, "name": name, "detail": message[:1].lower() + message[1:]})
    return found
