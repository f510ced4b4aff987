"""A long task: its function, what it may be given, and the progress that it tells."""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, get_type_hints

import msgspec
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from .problems import Problem, faults, public_message

log = logging.getLogger(__name__)

TURN_SECONDS = 0.005
"""How long a task that only tells its progress may keep the event loop before others get a turn."""

MOST = 2**53
"""How much may be done: what every client of JSON can count."""

MESSAGE_BYTES = 10_000

CHECKPOINT_BYTES = 1024 * 1024
"""What a task may leave for the run that goes on where it was broken off."""

RESULT_BYTES = 1024 * 1024
"""What a task may return, as JSON."""

MESSAGES = 100
"""Messages that may wait to be told; a task that has more waits for them."""


class Progress:
    """How far a task is: called by its function, read by whoever runs it.

    A call costs microseconds: what is told is joined into some events a second, the last of them always sent.
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
        """The task's, the same in all its runs."""
        self.done = done
        """In the task's unit."""
        self.total = total
        """None as long as nobody knows."""
        self.message = ""
        self.attempt = attempt
        """1 in the first run, one more in each that goes on after one that was broken off."""
        self.saved = checkpoint
        """The checkpoint as JSON; empty where there is none."""
        self.messages: list[str] = []
        """What has been said and is still to be told."""
        self.changed = asyncio.Event()
        self.told = asyncio.Event()
        """Set by who tells, whenever it has told everything."""
        self._turn = time.monotonic()

    async def __call__(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Tell that so much is done, of a total where that is known, and what is being done in words.

        A message is told each time it changes, in an event of its own. Raises TypeError or ValueError for what is no
        number up to MOST or no text of MESSAGE_BYTES.
        """
        self.done = _number(done)
        if total is not None:
            self.total = _number(total)
        if message is not None and message != self.message:
            if len(message.encode()) > MESSAGE_BYTES:
                raise ValueError(f"a message is longer than {MESSAGE_BYTES} bytes")
            self.message = message
            self.messages.append(message)
            if len(self.messages) >= MESSAGES:
                self.told.clear()
                self.changed.set()
                await self.told.wait()
        if not self.changed.is_set():
            self.changed.set()
        if (now := time.monotonic()) - self._turn > TURN_SECONDS:
            await asyncio.sleep(0)
            self._turn = now

    @property
    def checkpoint(self) -> Any:
        """What the run before this one has left; None in the first, or where it left nothing.

        What is assigned is kept with the progress that is told next: JSON, of CHECKPOINT_BYTES at most. Raises
        TypeError and ValueError for other things.
        """
        return msgspec.json.decode(self.saved) if self.saved else None

    @checkpoint.setter
    def checkpoint(self, value: Any) -> None:
        saved = msgspec.json.encode(value)
        if len(saved) > CHECKPOINT_BYTES:
            raise ValueError(f"a checkpoint of {len(saved)} bytes is larger than {CHECKPOINT_BYTES}")
        self.saved = saved


def _number(value: float) -> float:
    """A number as JSON has it, whatever library it is of."""
    plain = value if type(value) is int or type(value) is float else float(value)
    if not -MOST <= plain <= MOST:
        raise ValueError(f"{value} is more than can be done")
    return plain


class Task:
    """A kind of task that a plugin brings: `async def NAME(progress, ...)`, or a method, and how it is to be run.

    The function's parameters behind the first, with annotations and defaults as in a pydantic model, are what a client
    may give; its docstring tells of it, and what it returns, JSON, is the result. It is cancelled where a client says
    so or the server stops, and raises where it fails: the words of a `Problem` are for clients as they are. What
    computes or waits for a disk belongs into a thread (`Threads`).

    A function must end when it is cancelled: one that does not keeps its place, and its server from stopping.

    `resumable` says that it goes on from `progress.checkpoint`, and may run twice from there on; one that is not is
    never begun anew. `unit` is what is counted. A task that has run longer than `max_seconds`, all its runs together,
    is cancelled and fails; the server has a limit for all kinds, and the smaller one counts. Raises TypeError for a
    function that is none of this kind, and ValueError for a limit that is not a positive number.
    """

    def __init__(
        self,
        function: Callable[..., Awaitable[Any]],
        *,
        unit: str = "",
        resumable: bool = False,
        max_seconds: float | None = None,
    ) -> None:
        if max_seconds is not None and not 0 < max_seconds < math.inf:
            raise ValueError(f"max_seconds: {max_seconds!r} is not a positive number of seconds")
        self.function = function
        self.name = getattr(function, "__name__", "")
        self.unit = unit
        self.resumable = resumable
        self.max_seconds = max_seconds
        """How long a task of this kind may run, in seconds; None where only the server's limit counts."""
        self.description = inspect.cleandoc(function.__doc__ or "")
        self.parameters = _parameters(self.name, function)
        """What a client may give, as a model."""

    def read(self, given: Mapping[str, Any], *, place: str, prefix: str = "") -> dict[str, Any]:
        """Validate parameters that stand in a request's `place`, under names behind `prefix`.

        Returns all of them, with defaults, as JSON has them; raises Problem 422 that names every fault.
        """
        try:
            return self.parameters.model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            found = faults(error, place)
        for fault in found:
            if fault["name"] in given and fault["name"] not in self.parameters.model_fields:
                known = ", ".join(self.parameters.model_fields) or "it has none"
                fault["detail"] = f"unknown parameter of the task {self.name}; known: {known}"
            fault["name"] = prefix + fault["name"]
        raise Problem.of_parameters(found)

    async def run(self, progress: Progress, parameters: Mapping[str, Any]) -> Any:
        """Run the function with parameters that its model takes, and return its result, as JSON has it.

        Raises Problem for whatever the function raises, and for a result that is no JSON or larger than RESULT_BYTES.
        """
        try:
            valid = self.parameters.model_validate(parameters)
        except ValidationError:
            raise Problem(422, "The parameters of this task are not valid any more.") from None
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
            raise Problem(500, f"The result has {len(encoded)} bytes; {RESULT_BYTES} is what a task may return.")
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
"""Key of the application: every kind of task that its plugins bring, by name."""
