"""Generations that can be left and come back to: each a channel of the event log, stopped by nobody but who may."""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from aiohttp import web

from streamlab import (
    END,
    ORIGIN,
    Channel,
    EventLogError,
    Events,
    Problem,
    Retention,
    encode_event,
    follow,
    open_event_stream,
    sse_event,
)

from .answer import Answer

log = logging.getLogger(__name__)

BEGIN_SECONDS = 1.0
"""How long a request waits for its generation to begin, so that one that is refused gets its real status."""

LAST_WORDS_SECONDS = 2.0
"""What a generation that is broken off may take to say so."""

MAX_EVENTS = 10_000_000
"""Events of a generation that are kept: all."""

UNKNOWN = "There is no generation with this id, or it is not kept any more."

CONTROL = "llm"
"""The channel on which processes that share the log ask each other to stop a generation, or not to abandon it."""

Ask = Callable[[Mapping[str, Any]], AbstractAsyncContextManager[Answer]]

State = Literal["unknown", "running", "ended"]


class Place(NamedTuple):
    """Where a client that comes back stands."""

    generation: str
    id: str
    """The id of the last event it has."""


def read_place(last_event_id: str) -> Place | None:
    """Read which generation an event's id belongs to; None where it is no such id."""
    match = re.fullmatch(r"([0-9a-f]{32}):.{1,100}", last_event_id)
    return Place(match[1], last_event_id) if match else None


@dataclass(slots=True, eq=False)
class Generation:
    """One that runs in this process."""

    id: str
    channel: Channel
    begun: "asyncio.Future[None]"
    """Done when the upstream has begun to answer, or has refused to while its client waited for that."""
    followers: int = 0
    reason: str = ""
    """Why it is broken off, once it is."""
    task: "asyncio.Task[None] | None" = None
    timer: asyncio.TimerHandle | None = None

    def begin(self, refusal: Exception | None = None) -> bool:
        """Tell the client that waits that it has begun, or why not; False where none waits any more."""
        if self.begun.done():
            return False
        if refusal is None:
            self.begun.set_result(None)
        else:
            self.begun.set_exception(refusal)
            self.begun.exception()  # its client may leave this very moment, and nobody else is going to look
        return True

    def stop(self, reason: str) -> None:
        """Break it off, unless it is about to end."""
        if self.task is not None and not self.reason:
            self.reason = reason
            self.task.cancel()


@dataclass
class Generations:
    """Those of this process, and the way to those of the others."""

    events: Events
    ask: Ask
    keep_seconds: float
    abandon_seconds: float
    _running: dict[str, Generation] = field(default_factory=dict)
    _process: str = field(default_factory=lambda: uuid.uuid4().hex)
    _group: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Let generations run while the block does; those that still do are broken off."""
        async with asyncio.TaskGroup() as self._group:
            # Whoever gets this lease knows that this process is gone.
            living = self._group.create_task(self.events.run_as_leader(_lease(self._process), _for_ever))
            heeding = self._group.create_task(self._heed())
            try:
                yield
            finally:
                heeding.cancel()
                for generation in tuple(self._running.values()):
                    generation.stop("server stopped")
                while left := [generation.task for generation in self._running.values() if generation.task]:
                    await asyncio.wait(left)
                living.cancel()

    @property
    def _control(self) -> Channel:
        return self.events.channel(CONTROL, keep=Retention(events=1000, seconds=60))

    def channel(self, id: str) -> Channel:  # noqa: A002
        """The channel of a generation."""
        keep = Retention(events=MAX_EVENTS, seconds=self.keep_seconds, idle_seconds=self.keep_seconds)
        return self.events.channel(f"llm/{id}", keep=keep, finite=True, id_prefix=f"{id}:")

    # -- running

    async def start(self, body: Mapping[str, Any]) -> Generation:
        """Start one; returns once it has begun, or has waited for that for BEGIN_SECONDS; raises Problem where not."""
        assert self._group is not None, "the server has not started, or is over"
        id = uuid.uuid4().hex  # noqa: A001 - whoever knows it may follow and stop it, so it cannot be guessed
        generation = Generation(id, self.channel(id), asyncio.get_running_loop().create_future())
        self._running[id] = generation
        generation.task = self._group.create_task(self._run(generation, body))
        self._abandon_later(generation)
        try:
            async with asyncio.timeout(BEGIN_SECONDS):
                await generation.begun  # a time-out cancels it: what fails from then on is an event
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            generation.stop("abandoned")  # its client has left without its id, so nobody can come back
            raise
        return generation

    async def _run(self, generation: Generation, body: Mapping[str, Any]) -> None:
        answer: Answer | None = None
        refused = False
        try:
            first = encode_event({"id": generation.id, "model": body["model"]}, "generation")
            await generation.channel.publish_all([first], checkpoint=("process", self._process))
            async with self.ask(body) as answer, aclosing(answer.texts()) as pieces:
                generation.begin()
                index = 0
                async for texts in pieces:
                    tokens = [encode_event({"text": t, "index": index + n}, "token") for n, t in enumerate(texts)]
                    await generation.channel.publish_all(tokens)
                    index += len(texts)
            last = [_end(answer.finish_reason or "stop", answer)]
        except Problem as problem:
            last = [encode_event(problem.document(), "error"), _end("error", answer)]
            refused = generation.begin(problem)
        except asyncio.CancelledError:
            last = [_end(generation.reason or "server stopped", answer)]
            refused = generation.begin(Problem(503, "The server is stopping.", headers={"Retry-After": "5"}))
        except Exception as error:
            if not isinstance(error, EventLogError):
                log.exception("a generation failed")
            failure = Problem(500, "The server failed to generate this answer; its log says why.")
            last = [encode_event(failure.document(), "error"), _end("error", answer)]
            refused = generation.begin(error)
        generation.reason = generation.reason or "over"
        try:
            with suppress(TimeoutError, EventLogError):
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    # A client that was refused has no id, and nobody else knows of it.
                    await (generation.channel.delete() if refused else generation.channel.publish_all(last))
        finally:
            del self._running[generation.id]
            if generation.timer is not None:
                generation.timer.cancel()

    # -- following

    async def follow(
        self,
        request: web.Request,
        id: str,  # noqa: A002
        after: str,
        headers: Mapping[str, str] | None = None,
        *,
        told_if_lost: bool = False,
    ) -> web.StreamResponse:
        """Send a generation from an id on, or from its beginning; for as long as it is followed, it runs.

        One of which nothing is stored is rejected (Problem 404), or, with `told_if_lost`, reported by a gap and an end.
        Nothing is written for it: whoever makes up ids must not fill the event log.
        """
        channel = self.channel(id)
        if generation := self._running.get(id):
            with self._followed(generation):
                return await follow(request, channel, after=after, headers=headers)
        state = await self.state(id)
        if state == "unknown" and not told_if_lost:
            raise Problem(404, UNKNOWN)
        if state == "unknown":
            return await _lost(request, id, request.headers.get("Last-Event-ID") or after, headers)
        if state != "running":
            return await follow(request, channel, after=after, headers=headers)
        assert self._group is not None
        attending = self._group.create_task(self._attend(id))
        try:
            return await follow(request, channel, after=after, headers=headers)
        finally:
            attending.cancel()

    @contextmanager
    def _followed(self, generation: Generation) -> Iterator[None]:
        generation.followers += 1
        if generation.timer is not None:
            generation.timer.cancel()
        try:
            yield
        finally:
            generation.followers -= 1
            if not generation.followers:
                self._abandon_later(generation)

    def _abandon_later(self, generation: Generation) -> None:
        if generation.timer is not None:
            generation.timer.cancel()
        if self._running.get(generation.id) is generation:
            loop = asyncio.get_running_loop()
            generation.timer = loop.call_later(self.abandon_seconds, generation.stop, "abandoned")

    async def state(self, id: str) -> State:  # noqa: A002
        """Whether a generation runs, somewhere."""
        channel = self.channel(id)
        last = await channel.last()
        if last == ORIGIN:
            return "unknown"
        async for event in channel.read(last._replace(offset=last.offset - 1)):
            if event.event == END:
                return "ended"
        return "running"

    # -- stopping

    async def stop(self, id: str) -> bool:  # noqa: A002
        """Stop a generation for all who follow it; False where another process is still to do it.

        Raises Problem 404 where nothing is kept of it.
        """
        generation = self._running.get(id)
        if generation is None:
            state = await self.state(id)
            if state == "unknown":
                raise Problem(404, UNKNOWN)
            if state == "running":
                await self._control.publish({"stop": id})
            return state != "running"
        generation.stop("cancelled")
        if generation.task is not None:
            await asyncio.wait({generation.task})
        return True

    # -- with other processes

    async def _heed(self) -> None:
        """Do what other processes ask on the control channel."""
        control = self._control
        async for event in control.listen(await control.last()):
            asked = json.loads(event.data)
            if generation := self._running.get(asked.get("stop", "")):
                generation.stop("cancelled")
            elif (generation := self._running.get(asked.get("followed", ""))) and not generation.followers:
                self._abandon_later(generation)

    async def _attend(self, id: str) -> None:  # noqa: A002
        """While a generation of another process is followed here, tell it so; and end it if that process is gone."""
        process = await self.channel(id).checkpoint("process")
        try:
            async with asyncio.TaskGroup() as group:
                telling = group.create_task(self._tell(id))
                await self.events.run_as_leader(_lease(process or id), lambda: self._bury(id))
                telling.cancel()
        except* EventLogError as errors:
            log.warning("a generation of another process is followed, but not attended: %s", errors.exceptions[0])

    async def _tell(self, id: str) -> None:  # noqa: A002
        while True:
            await self._control.publish({"followed": id})
            await asyncio.sleep(self.abandon_seconds / 3)

    async def _bury(self, id: str) -> None:  # noqa: A002
        if await self.state(id) == "running":
            problem = Problem(502, "The server that generated this answer is gone.")
            await self.channel(id).publish_all([encode_event(problem.document(), "error"), _end("error", None)])


async def _lost(request: web.Request, id: str, after: str, headers: Mapping[str, str] | None) -> web.StreamResponse:  # noqa: A002
    """Report to a client that its generation is not stored: a gap and the end, whose id gets 204 from then on."""
    last = f"{id}:lost"
    if after == last:
        return web.Response(status=204, headers={"Cache-Control": "no-store"})
    gap = {"reason": "the history of that id is lost", "missing": None, "after": after, "until": last}
    async with open_event_stream(request, headers=headers) as stream:
        end = sse_event({"finish_reason": "lost"}, END, id=last)
        await stream.write(sse_event(gap, "gap", id=f"{last}.gap") + end)
    return stream


async def _for_ever() -> None:
    await asyncio.Event().wait()


def _lease(process: str) -> str:
    return f"llm/{process}"


def _end(reason: str, answer: Answer | None) -> Any:
    """The last event: why it is the last, and what the answer took."""
    told: dict[str, Any] = {"finish_reason": reason}
    if answer is not None:
        told |= {"usage": answer.usage, "ttft_ms": answer.ttft_ms, "tokens_per_second": answer.tokens_per_second}
    return encode_event(told, END)
