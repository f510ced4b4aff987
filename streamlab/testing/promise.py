"""A promise and its test: what was expected, what was observed, and the standard behind it."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from .samples import EndpointForm, NoSample
from .wire import NotHTTP

if TYPE_CHECKING:
    from .subject import Subject

Case = Callable[[Any, Any], Awaitable[str]]
"""A function that checks a subject and returns what it observed; raises Broken for a broken promise."""


class Broken(Exception):
    """A promise is broken; the message is what was observed instead."""


@dataclass(frozen=True)
class Promise:
    """What a case requires, and of which endpoints."""

    expected: str
    standard: str
    of: Callable[[EndpointForm], bool]
    once: bool
    """Whether it is checked once for all endpoints."""
    watches: bool
    """Whether it needs an event stream that is watched for longer than a heartbeat."""

    def label(self, form: EndpointForm) -> str:
        """Return what a result is about."""
        return "the server" if self.once else form.label

    def text(self, label: str, observed: str) -> str:
        """Return a result as text."""
        return f"{label}\n  expected  {self.expected}\n  observed  {observed}\n  standard  {self.standard}"


def every_endpoint(form: EndpointForm) -> bool:
    """Return True: the case applies to every endpoint."""
    return True


def promise(
    standard: str, *, of: Callable[[EndpointForm], bool] = every_endpoint, once: bool = False, watches: bool = False
) -> Callable[[Case], Callable[..., None]]:
    """Turn a case into a test for each endpoint that `of` accepts; its docstring is what is expected.

    `standard` names its source; a promise of the whole server is checked `once`. For a case that `watches`, an event
    stream is watched from the start of the class, while other cases run.
    """

    def mark(case: Case) -> Callable[..., None]:
        required = Promise(" ".join((inspect.getdoc(case) or "").split()), standard, of, once, watches)

        def test(self: Any, streamlab_subject: "Subject") -> None:
            subject, name = streamlab_subject, case.__name__.removeprefix("test_")
            try:
                observed, verified = asyncio.run(_first_error(case(self, subject))), True
            except (Broken, NoSample, NotHTTP) as error:
                observed, verified = str(error), False
            label = required.label(subject.form)
            text = required.text(label, observed)
            noun = subject.form.noun
            subject.report({"endpoint": label, "noun": noun, "case": name, "verified": verified, "text": text})
            if not verified:
                pytest.fail(text, pytrace=False)
            print(text)

        test.__name__, test.__doc__, test.__module__ = case.__name__, case.__doc__, case.__module__
        test.__qualname__ = case.__qualname__
        test.__dict__["promise"] = required
        return test

    return mark


def skip_reason(skipped: Mapping[tuple[str, str], str], case: str, form: EndpointForm) -> str | None:
    """Return why a case is skipped for an endpoint or one form of it; None if it is not."""
    keys = ((one, endpoint) for one in (case, "*") for endpoint in (form.label, form.endpoint))
    return next((skipped[key] for key in keys if key in skipped), None)


async def _first_error(case: Awaitable[str]) -> str:
    try:
        return await case
    except ExceptionGroup as group:
        fault = group.exceptions[0]
        if isinstance(fault, Broken | NotHTTP):
            raise fault from None
        raise
