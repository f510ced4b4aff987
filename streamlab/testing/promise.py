"""A promise, and the test that it becomes: what was expected, what came, and the standard behind it."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from .samples import Asked, NoSample
from .wire import NotHTTP

if TYPE_CHECKING:
    from .subject import Subject

Case = Callable[[Any, "Subject"], Awaitable[str]]
"""Asks a subject, and returns what came; raises NotKept where that is not what was promised."""


class NotKept(Exception):
    """A promise is broken; the text is what came."""


@dataclass(frozen=True)
class Promise:
    """What a case asks for, and of whom."""

    expected: str
    standard: str
    of: Callable[[Asked], bool]
    once: bool
    """Whether it is asked once for all endpoints."""
    watches: bool
    """Whether it needs an event stream that is watched for longer than a heartbeat."""


def everybody(asked: Asked) -> bool:
    """Every endpoint."""
    return True


def promise(
    standard: str, *, of: Callable[[Asked], bool] = everybody, once: bool = False, watches: bool = False
) -> Callable[[Case], Callable[..., None]]:
    """Make a test of a case, for each endpoint that `of` is true of: its docstring says what is expected.

    `standard` names where it is promised; what is promised by the server as a whole is asked `once`. For a case that
    `watches`, an event stream is watched from the start of its class on, while others are asked.
    """

    def mark(case: Case) -> Callable[..., None]:
        made = Promise(" ".join((inspect.getdoc(case) or "").split()), standard, of, once, watches)

        def test(self: Any, streamlab_subject: "Subject") -> None:
            subject, name = streamlab_subject, case.__name__.removeprefix("test_")
            try:
                came, kept = asyncio.run(_awaited(case(self, subject))), True
            except (NotKept, NoSample, NotHTTP) as error:
                came, kept = str(error), False
            label = "the server" if once else subject.asked.label
            text = f"{label}\n  expected  {made.expected}\n  came      {came}\n  promise   {made.standard}"
            subject.tell({"endpoint": label, "case": name, "kept": kept, "text": text})
            if not kept:
                pytest.fail(text, pytrace=False)
            print(text)

        test.__name__, test.__doc__, test.__module__ = case.__name__, case.__doc__, case.__module__
        test.__qualname__ = case.__qualname__
        test.__dict__["promise"] = made
        return test

    return mark


def excuse(excused: Mapping[tuple[str, str], str], case: str, asked: Asked) -> str | None:
    """Why an endpoint, or one form of it, is not asked for a case."""
    named = ((one, of) for one in (case, "*") for of in (asked.label, asked.endpoint))
    return next((excused[key] for key in named if key in excused), None)


async def _awaited(case: Awaitable[str]) -> str:
    try:
        return await case
    except ExceptionGroup as group:
        fault = group.exceptions[0]
        if isinstance(fault, NotKept | NotHTTP):
            raise fault from None
        raise
