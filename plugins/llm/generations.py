"""Generations that can be resumed: each is a channel of the event log, and continues without its client for a while."""

import asyncio
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from aiohttp import web

from streamlab import (
    END,
    ORIGIN,
    PRINCIPAL,
    Channel,
    EncodedEvent,
    EventLogError,
    Events,
    Ownership,
    Problem,
    Retention,
    Scope,
    client_of,
    encode_event,
    follow,
    may_be_proxy,
    no_more_events,
    open_event_stream,
    require_own,
    resume_id,
)

from .completion import Completion
from .gateway import Gateway
from .openai import Failure

log = logging.getLogger(__name__)

BEGIN_SECONDS = 1.0
"""Seconds a request waits for its generation to begin, so that an early failure gets its real status."""

FULL_SECONDS = 60
"""Retry-After of a request for which too many generations are stored, in seconds."""

END_SECONDS = 2.0
"""Timeout for publishing the last events of a generation, in seconds."""

MAX_EVENTS = 10_000_000
"""Maximum events stored of a generation: more than any has."""

UNKNOWN = "There is no generation with this id, or its events have expired."

COMMANDS = Retention(events=1000, seconds=60)
"""Retention of the commands with which processes request each other to stop or continue a generation."""

State = Literal["unknown", "running", "ended"]


def generation_of(event_id: str) -> str | None:
    """Return the id of the generation that an event belongs to; None where the event id is not a generation's."""
    match = re.fullmatch(r"([0-9a-f]{32}):.{1,100}", event_id)
    return match[1] if match else None


class _Origin(msgspec.Struct, frozen=True):
    """Where a generation runs, and for whom."""

    process: str = ""
    principal: str = ""


@dataclass(slots=True, eq=False)
class Generation:
    """A generation that runs in this process."""

    id: str
    principal: str
    """The name of the principal that started it."""
    client: str
    """The client that it counts for when slots are shared."""
    channel: Channel
    begun: "asyncio.Future[None]"
    """Done when the upstream has begun to respond, or has failed while the client waited for that."""
    followers: int = 0
    reason: str = ""
    """Why it was stopped; empty until then."""
    task: "asyncio.Task[None] | None" = None
    timer: asyncio.TimerHandle | None = None

    def begin(self, failure: Exception | None = None) -> bool:
        """Notify the waiting client that it has begun, or has failed; return whether a client still waited."""
        if self.begun.done():
            return False
        if failure is None:
            self.begun.set_result(None)
        else:
            self.begun.set_exception(failure)
            self.begun.exception()  # retrieved here: its client may disconnect at this moment
        return True

    def stop(self, reason: str) -> None:
        """Cancel it, unless it is about to end."""
        if self.task is not None and not self.reason:
            self.reason = reason
            self.task.cancel()


@dataclass
class Generations:
    """The generations of this process, and access to those of other processes."""

    events: Events
    gateway: Gateway
    keep_seconds: float
    abandon_seconds: float
    max_stored: int
    """Maximum generations that this process has started and that are stored; one client has half of them."""
    _running: dict[str, Generation] = field(default_factory=dict)
    _stored: OrderedDict[str, tuple[float, str]] = field(default_factory=OrderedDict)
    """When each stored generation was started, and by which client, the oldest first."""
    _group: asyncio.TaskGroup | None = None

    def __post_init__(self) -> None:
        self._ownership = Ownership(self.events, "llm", COMMANDS)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Run generations while the block lasts; those that run at its end are stopped."""
        async with asyncio.TaskGroup() as self._group:
            lease = self._group.create_task(self._ownership.hold())
            commands = self._group.create_task(self._handle_commands())
            try:
                yield
            finally:
                commands.cancel()
                for generation in tuple(self._running.values()):
                    generation.stop("server stopped")
                while tasks := [generation.task for generation in self._running.values() if generation.task]:
                    await asyncio.wait(tasks)
                lease.cancel()

    def channel(self, id: str) -> Channel:  # noqa: A002
        """Return the channel of a generation."""
        retention = Retention(events=MAX_EVENTS, seconds=self.keep_seconds, idle_seconds=self.keep_seconds)
        return self.events.channel(f"llm/{id}", retention=retention, finite=True, id_prefix=f"{id}:")

    # -- running

    async def start(self, request: web.Request, body: Mapping[str, Any]) -> Generation:
        """Start a generation of the principal of a request; return once it has begun, or after BEGIN_SECONDS.

        Raises Problem for an early failure.
        """
        assert self._group is not None, "the server has not started, or has stopped"
        id, client = uuid.uuid4().hex, client_of(request)  # noqa: A001 - it cannot be guessed
        self._check_stored(client)
        begun = asyncio.get_running_loop().create_future()
        generation = Generation(id, request[PRINCIPAL].name, client, self.channel(id), begun)
        self._running[id], self._stored[id] = generation, (time.monotonic(), client)
        generation.task = self._group.create_task(self._run(generation, body))
        try:
            with self._followed(generation):
                async with asyncio.timeout(BEGIN_SECONDS):
                    await generation.begun  # a timeout cancels it: later failures are events
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            generation.stop("abandoned")  # its client has disconnected without its id, so it cannot be resumed
            raise
        return generation

    def _check_stored(self, client: str) -> None:
        """Raise Failure 429 where one more generation of a client would be one too many."""
        while self._stored and time.monotonic() - next(iter(self._stored.values()))[0] > self.keep_seconds:
            self._stored.popitem(last=False)
        own, share = sum(owner == client for _, owner in self._stored.values()), -(-self.max_stored // 2)
        if len(self._stored) >= self.max_stored or (own >= share and not may_be_proxy(client)):
            detail = f"Too many generations are stored: {own} of this client, and {len(self._stored)} in total."
            raise Failure(429, "too_many_generations", detail, headers={"Retry-After": str(FULL_SECONDS)})

    async def _run(self, generation: Generation, body: Mapping[str, Any]) -> None:
        completion: Completion | None = None
        rejected = False
        try:
            first = encode_event({"id": generation.id, "model": body["model"]}, "generation")
            origin = _Origin(self._ownership.process, generation.principal)
            text = msgspec.json.encode(origin).decode()
            await generation.channel.publish_all([first], checkpoint=("origin", text))
            async with (
                self.gateway.complete(body, generation.client) as completion,
                aclosing(completion.texts()) as batches,
            ):
                generation.begin()
                index = 0
                async for texts in batches:
                    tokens = [encode_event({"text": t, "index": index + n}, "token") for n, t in enumerate(texts)]
                    await generation.channel.publish_all(tokens)
                    index += len(texts)
            last = [_end(completion.finish_reason or "stop", completion)]
        except Problem as problem:
            last = [encode_event(problem.document(), "error"), _end("error", completion)]
            rejected = generation.begin(problem)
        except asyncio.CancelledError:
            last = [_end(generation.reason or "server stopped", completion)]
            rejected = generation.begin(Problem(503, "The server is stopping.", headers={"Retry-After": "5"}))
        except Exception as error:
            if not isinstance(error, EventLogError):
                log.exception("a generation failed")
            failure = Problem(500, "The generation failed; the server's log says why.")
            last = [encode_event(failure.document(), "error"), _end("error", completion)]
            rejected = generation.begin(error)
        generation.reason = generation.reason or "ended"
        try:
            with suppress(TimeoutError, EventLogError):
                async with asyncio.timeout(END_SECONDS):
                    # A rejected client has no id, and no other client knows the generation.
                    await (generation.channel.delete() if rejected else generation.channel.publish_all(last))
        finally:
            del self._running[generation.id]
            if rejected:
                self._stored.pop(generation.id, None)
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
        gap_if_unknown: bool = False,
    ) -> web.StreamResponse:
        """Send a generation from its beginning, or after an event; a follower keeps it running.

        An unknown generation is rejected (Problem 404), or, with `gap_if_unknown`, reported as a gap and an end.
        Nothing is written for it: clients that invent ids must not fill the event log.
        """
        channel = self.channel(id)
        allowed = await self._is_allowed(request, id)
        if allowed and (generation := self._running.get(id)):
            with self._followed(generation):
                return await follow(request, channel, after=after, headers=headers)
        state = await self.state(id) if allowed else "unknown"
        if state == "unknown" and not gap_if_unknown:
            raise Problem(404, UNKNOWN)
        if state == "unknown":
            return await _send_lost(request, id, resume_id(request, after), headers)
        if state != "running":
            return await follow(request, channel, after=after, headers=headers)
        assert self._group is not None
        watch = self._group.create_task(self._watch_remote(id))
        try:
            return await follow(request, channel, after=after, headers=headers)
        finally:
            watch.cancel()

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

    async def _owner(self, id: str) -> str:  # noqa: A002
        """Return the name of the principal that started a generation."""
        generation = self._running.get(id)
        return generation.principal if generation else (await self._origin(id)).principal

    async def _is_allowed(self, request: web.Request, id: str) -> bool:  # noqa: A002
        """Return whether the client may follow a generation: its own, or one that a scope names."""
        try:
            require_own(request, await self._owner(id), Scope("llm", "read", id), UNKNOWN)
        except Problem:
            return False
        return True

    async def _origin(self, id: str) -> _Origin:  # noqa: A002
        text = await self.channel(id).checkpoint("origin")
        return _Origin() if text is None else msgspec.json.decode(text, type=_Origin)

    async def state(self, id: str) -> State:  # noqa: A002
        """Return whether a generation runs in any process, has ended, or is unknown."""
        channel = self.channel(id)
        last = await channel.last()
        if last == ORIGIN:
            return "unknown"
        async for event in channel.read(last._replace(offset=last.offset - 1)):
            if event.event == END:
                return "ended"
        return "running"

    # -- stopping

    async def stop(self, request: web.Request, id: str) -> bool:  # noqa: A002
        """Stop a generation for all its followers; return False where another process has been requested to.

        Raises Problem 404 for an unknown generation, and for one of another principal.
        """
        require_own(request, await self._owner(id), Scope("llm", "write", id), UNKNOWN)
        generation = self._running.get(id)
        if generation is None:
            state = await self.state(id)
            if state == "unknown":
                raise Problem(404, UNKNOWN)
            if state == "running":
                await self._ownership.send({"stop": id})
            return state != "running"
        generation.stop("cancelled")
        if generation.task is not None:
            await asyncio.wait({generation.task})
        return True

    # -- with other processes

    async def _handle_commands(self) -> None:
        """Handle the commands of other processes."""
        async for command in self._ownership.commands():
            if generation := self._running.get(command.get("stop", "")):
                generation.stop("cancelled")
            elif (generation := self._running.get(command.get("followed", ""))) and not generation.followers:
                self._abandon_later(generation)

    async def _watch_remote(self, id: str) -> None:  # noqa: A002
        """Keep a generation of another process alive while it is followed here; end it if that process has died."""
        origin = await self._origin(id)
        try:
            async with asyncio.TaskGroup() as group:
                keepalive = group.create_task(self._send_keepalives(id))
                await self._ownership.take_over(origin.process or id, lambda: self._fail_orphan(id))
                keepalive.cancel()
        except* EventLogError as errors:
            log.warning("cannot keep a generation of another process alive: %s", errors.exceptions[0])

    async def _send_keepalives(self, id: str) -> None:  # noqa: A002
        while True:
            await self._ownership.send({"followed": id})
            await asyncio.sleep(self.abandon_seconds / 3)

    async def _fail_orphan(self, id: str) -> None:  # noqa: A002
        if await self.state(id) == "running":
            problem = Problem(502, "The server process of this generation has died.")
            await self.channel(id).publish_all([encode_event(problem.document(), "error"), _end("error", None)])


async def _send_lost(
    request: web.Request,
    id: str,  # noqa: A002
    after: str,
    headers: Mapping[str, str] | None,
) -> web.StreamResponse:
    """Send a gap and the end of a generation that is not stored; resuming after that end gets 204."""
    last = f"{id}:lost"
    if after == last:
        return no_more_events()
    async with open_event_stream(request, headers=headers) as stream:
        await stream.gap("the history of that id is lost", id=f"{last}.gap", after=after, until=last)
        await stream.send({"finish_reason": "lost"}, id=last, event=END)
    return stream


def _end(reason: str, completion: Completion | None) -> EncodedEvent:
    """Return the event `end`: why the generation ended, its tokens and its times."""
    data: dict[str, Any] = {"finish_reason": reason}
    if completion is not None:
        data["usage"] = completion.usage
        data |= {"ttft_ms": completion.ttft_ms, "tokens_per_second": completion.tokens_per_second}
    return encode_event(data, END)
