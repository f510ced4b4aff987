"""Ownership of work that processes share: which process runs it, takeover from a dead process, and commands."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from .channel import Events
from .log import ORIGIN, Position, Retention


async def _until_cancelled() -> None:
    await asyncio.Event().wait()


class Ownership:
    """Work under one name that is divided among the processes of an event log; each has one of these.

    A process that holds its lease owns the work that is recorded under its id. Another one that gets this lease knows
    that the owner has died. Commands on the channel of that name reach every process; `commands` retains them.
    """

    def __init__(self, events: Events, name: str, commands: Retention) -> None:
        self._events = events
        self._name = name
        self.process = uuid.uuid4().hex
        """Id of this process, to be recorded with the work that it owns."""
        self._channel = events.channel(name, retention=commands)
        self._position: Position | None = None

    def lease(self, owner: str) -> str:
        """Return the lease of a process, or of a part of the work that is owned alone."""
        return f"{self._name}/{owner}"

    async def hold(self, work: Callable[[], Awaitable[None]] = _until_cancelled) -> None:
        """Hold the lease of this process until cancelled, and run `work` meanwhile; again after the lease was lost."""
        await self._events.run_as_leader(self.lease(self.process), work)

    async def take_over(self, owner: str, work: Callable[[], Awaitable[None]]) -> None:
        """Wait until an owner has died, and run `work` in its place: in one process at a time."""
        await self._events.run_as_leader(self.lease(owner), work)

    async def send(self, command: Mapping[str, str]) -> None:
        """Send a command to every process; raises EventLogError where the log is unavailable."""
        await self._channel.publish(command)

    async def stored_commands(self) -> AsyncIterator[dict[str, str]]:
        """Yield the commands that are stored; `commands` continues after them."""
        self._position = ORIGIN
        async for event in self._channel.read():
            self._position = event.position
            yield json.loads(event.data)

    async def commands(self) -> AsyncIterator[dict[str, str]]:
        """Yield commands, also those of this process, as they are sent: after the stored ones, or from now on."""
        position = await self._channel.last() if self._position is None else self._position
        async for event in self._channel.listen(position):
            yield json.loads(event.data)
