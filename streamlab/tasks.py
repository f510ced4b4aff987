"""Long tasks: the function of a task, its parameters, and the progress that it reports."""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, get_type_hints

import msgspec
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from .problems import Problem, faults, public_message

log = logging.getLogger(__name__)

TURN_SECONDS = 0.005
"""Maximum time that a task which only reports progress runs without yielding to the event loop, in seconds."""

MAX_AMOUNT = 2**53
"""Maximum of a number that a task reports: every client of JSON represents integers up to it exactly."""

MESSAGE_BYTES = 10_000
"""Maximum size of a message, in bytes."""

CHECKPOINT_BYTES = 1024 * 1024
"""Maximum size of a checkpoint as JSON, in bytes."""

RESULT_BYTES = 1024 * 1024
"""Maximum size of a task's result as JSON, in bytes."""

MAX_MESSAGES = 100
"""Maximum number of unpublished messages; a task that reports more waits until they are published."""


class Progress:
    """The progress of a task: its function calls it, its runner publishes it.

    A call takes microseconds: reports are combined into a few events per second, and the last one is always published.
    """

    def __init__(
        self,
        id: str = "",  # noqa: A002
        *,
        done: float = 0,
        total: float | None = None,
        checkpoint: bytes = b"",
        attempt: int = 1,
    ) -> None:
        self.id = id
        """The id of the task, the same in all its runs."""
        self.done = done
        """The amount done, in the task's unit."""
        self.total = total
        """The total amount, in the task's unit; None while it is unknown."""
        self.message = ""
        self.attempt = attempt
        """1 in the first run, one more in each run that resumes an interrupted one."""
        self.saved = checkpoint
        """The checkpoint as JSON; empty where there is none."""
        self.messages: list[str] = []
        """Messages that are not published yet."""
        self.changed = asyncio.Event()
        self.published = asyncio.Event()
        """Set by the runner whenever it has published all messages."""
        self._turn = time.monotonic()

    async def __call__(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Report the amount done, the total if it is known, and a message about the current step.

        Each change of the message is published in its own event. Raises TypeError or ValueError for what is not a
        number up to MAX_AMOUNT or not a text of up to MESSAGE_BYTES.
        """
        self.done = _number(done)
        if total is not None:
            self.total = _number(total)
        if message is not None and message != self.message:
            if len(message.encode()) > MESSAGE_BYTES:
                raise ValueError(f"a message is longer than {MESSAGE_BYTES} bytes")
            self.message = message
            self.messages.append(message)
            if len(self.messages) >= MAX_MESSAGES:
                self.published.clear()
                self.changed.set()
                await self.published.wait()
        if not self.changed.is_set():
            self.changed.set()
        if (now := time.monotonic()) - self._turn > TURN_SECONDS:
            await asyncio.sleep(0)
            self._turn = now

    @property
    def checkpoint(self) -> Any:
        """The checkpoint of the run before this one; None in the first run, or if that run assigned none.

        An assigned value is stored with the progress that is published next. Raises TypeError or ValueError for what
        is not JSON of at most CHECKPOINT_BYTES.
        """
        return msgspec.json.decode(self.saved) if self.saved else None

    @checkpoint.setter
    def checkpoint(self, value: Any) -> None:
        saved = msgspec.json.encode(value)
        if len(saved) > CHECKPOINT_BYTES:
            raise ValueError(f"a checkpoint of {len(saved)} bytes is larger than {CHECKPOINT_BYTES}")
        self.saved = saved


def _number(value: float) -> float:
    """Return a number as an int or float that JSON can represent, whatever library it comes from."""
    plain = value if type(value) is int or type(value) is float else float(value)
    if not -MAX_AMOUNT <= plain <= MAX_AMOUNT:
        raise ValueError(f"{value} is not a number from -2^53 to 2^53")
    return plain


class Task:
    """A kind of task of a plugin: `async def NAME(progress, ...)`, or a method, and how it runs.

    The function's parameters after the first, with annotations and defaults as in a pydantic model, are those that a
    client may give; its docstring is the description, and what it returns, JSON, is the result. It is cancelled when
    a client cancels the task or the server stops, and raises when it fails: clients read the detail of a `Problem`.
    What computes or waits for a disk belongs into a thread (`Threads`).

    A function must end when it is cancelled: otherwise it holds its slot, and delays the stop of its server.

    `resumable`: it resumes from `progress.checkpoint`, and may run the same step twice; other tasks are never run
    again. `unit` is the unit of progress. A task that has run longer than `max_seconds`, over all its runs, is
    cancelled and fails; the server has a limit for all kinds, and the smaller one applies. Raises TypeError for a
    function of another form, and ValueError for a limit that is not a positive number.

    `needs` returns the scopes that a principal needs, besides that for starting the task, from its validated
    parameters: a task that reads an export needs `export:read:NAME`, or it would be a way around that.
    """

    def __init__(
        self,
        function: Callable[..., Awaitable[Any]],
        *,
        unit: str = "",
        resumable: bool = False,
        max_seconds: float | None = None,
        needs: Callable[[Mapping[str, Any]], Iterable[str]] | None = None,
    ) -> None:
        if max_seconds is not None and not 0 < max_seconds < math.inf:
            raise ValueError(f"max_seconds: {max_seconds!r} is not a positive number of seconds")
        self.function = function
        self.name = getattr(function, "__name__", "")
        self.unit = unit
        self.resumable = resumable
        self.max_seconds = max_seconds
        """Maximum time of a task of this kind, in seconds; None where only the server's limit applies."""
        self.needs = needs or (lambda parameters: ())
        self.description = inspect.cleandoc(function.__doc__ or "")
        self.parameters = _parameters(self.name, function)
        """The model of the parameters that a client may give."""

    def read(self, given: Mapping[str, Any], *, where: str, prefix: str = "") -> dict[str, Any]:
        """Validate parameters of a request's `where` (`query` or `body`), whose names there begin with `prefix`.

        Returns all of them, with defaults, as JSON values; raises Problem 422 that names every fault.
        """
        try:
            return self.parameters.model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            found = faults(error, where)
        for fault in found:
            if fault["name"] in given and fault["name"] not in self.parameters.model_fields:
                known = ", ".join(self.parameters.model_fields) or "it has none"
                fault["detail"] = f"unknown parameter of the task {self.name}; known: {known}"
            fault["name"] = prefix + fault["name"]
        raise Problem.of_parameters(found)

    async def run(self, progress: Progress, parameters: Mapping[str, Any]) -> Any:
        """Run the function with parameters that its model accepts, and return its result as a JSON value.

        Raises Problem for whatever the function raises, and for a result that is not JSON or exceeds RESULT_BYTES.
        """
        try:
            valid = self.parameters.model_validate(parameters)
        except ValidationError:
            raise Problem(422, "The parameters of this task are no longer valid.") from None
        try:
            values = {name: getattr(valid, name) for name in self.parameters.model_fields}
            result = await self.function(progress, **values)
            encoded = msgspec.json.encode(result)
        except Problem:
            raise
        except (Exception, SystemExit) as error:
            log.exception("a task %s failed", self.name)
            raise Problem(500, f"{type(error).__name__}: {public_message(error)}".rstrip(": ")) from None
        if len(encoded) > RESULT_BYTES:
            raise Problem(500, f"The result has {len(encoded)} bytes; the maximum is {RESULT_BYTES}.")
        return msgspec.json.decode(encoded)


def _parameters(name: str, function: Callable[..., Awaitable[Any]]) -> type[BaseModel]:
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"a task must be an `async def` function, not {function!r}")
    hints = get_type_hints(function, include_extras=True)
    first, *others = inspect.signature(function).parameters.values() or (None,)
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise TypeError(f"the first parameter of the task {name} must be its progress")
    fields: dict[str, Any] = {}
    for parameter in others:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"the task {name} has a parameter without a name: {parameter}")
        if parameter.name not in hints:
            raise TypeError(f"the parameter {parameter.name!r} of the task {name} needs an annotation")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


TASKS = web.AppKey("tasks", Mapping[str, Task])
"""Key of the application: every kind of task of its plugins, by name."""
