"""Where events are kept: positions, events, and the protocol that every engine keeps."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

END = "end"
"""The name of a channel's last event: followers end after it, and a client that has it gets 204."""

BATCH_BYTES = 1024 * 1024
"""Bytes that one read brings, unless it is told otherwise."""


class Position(NamedTuple):
    """A place in a channel, in text `<epoch>-<offset>`; ordered.

    Offsets of an epoch are consecutive and begin at 1. The epoch, milliseconds since 1970 when it began, changes when
    history is lost, so that an old position never means a new event.
    """

    epoch: int
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.offset}"

    @classmethod
    def parse(cls, text: str) -> "Position | None":
        """Read a position out of an event's id; None where it is none. What follows a dot only names the event."""
        match = _ID.fullmatch(text)
        return cls(int(match[1]), int(match[2])) if match else None

    def precedes(self, other: "Position") -> bool:
        """Whether `other` is the very next position after this one: nothing lies between them."""
        return other.offset == self.offset + 1 and (other.epoch == self.epoch or self == ORIGIN)


_ID = re.compile(r"([0-9]{1,15})-([0-9]{1,15})(?:\.[a-z]{1,16})?")

ORIGIN = Position(0, 0)
"""Before the first event of a channel that has no epoch yet."""

LATEST = Position(10**15 - 1, 10**15 - 1)
"""After every event there can be."""


def is_replaced(position: Position, last: Position) -> bool:
    """Return whether a position is of a lost history, and the channel began again with an earlier epoch.

    Engines make every epoch greater than those they know of; one that lost its data while its clock is behind may not
    know. What the channel has then follows that position, from its first event on.
    """
    return position.epoch > last.epoch > 0 and position != LATEST


class EncodedEvent(NamedTuple):
    """An event that is not in the log yet."""

    data: bytes
    """UTF-8."""
    event: str = ""
    """Its name; empty for a plain message."""
    key: str = ""
    """What it is about, as the symbol of a price: views choose by it."""


class Event(NamedTuple):
    """An event of the log."""

    position: Position
    time: int
    """When it was appended: milliseconds since 1970."""
    data: bytes
    event: str
    key: str


class Batch(NamedTuple):
    """What reading gives: some events in order, and the last position that the channel has handed out."""

    events: Sequence[Event]
    last: Position


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a channel keeps its events: whichever bound is reached first."""

    events: int = 10_000
    seconds: float = 86_400
    idle_seconds: float | None = None
    """When set, the whole channel vanishes once nothing has been published for so long."""


class Append(NamedTuple):
    """Events to be added to a channel together, in order, or not at all."""

    channel: str
    drafts: Sequence[EncodedEvent]
    retention: Retention
    checkpoint: tuple[str, str] | None = None
    """A name and a text kept beside the events, stored with them or not at all: where their producer stands."""
    lease: str = ""
    """The lease that the publisher must hold, from the call of `append` on; empty for none."""
    fence: str = ""
    """What the engine knows this holding of the lease by; for the engine alone."""

    @property
    def size(self) -> int:
        """Roughly the bytes it takes."""
        return sum(len(draft.data) for draft in self.drafts) + 64 * len(self.drafts)


def within(events: Iterable[Event], size: int) -> list[Event]:
    """The first events of a reading that have no more than `size` bytes of data together, but one at least."""
    taken: list[Event] = []
    for event in events:
        size -= len(event.data)
        if taken and size < 0:
            break
        taken.append(event)
    return taken


Deliver = Callable[[Sequence[Event]], None]


class EventLogError(Exception):
    """The log did not take or give what it was asked for; the message is fit for a client."""


class LeaseLost(EventLogError):
    """What was to be published belongs to a lease that this process does not hold any more."""

    def __init__(self) -> None:
        super().__init__("This process has lost the lease that it needs to publish this.")


class EventLog(Protocol):
    """What every engine promises. All methods belong to the event loop and do not block it."""

    def opened(self) -> AbstractAsyncContextManager[None]:
        """Hold the log open; raises EventLogError where it cannot be."""

    async def append(self, append: Append) -> Position:
        """Add events (or only a checkpoint) and return the position of the last one, once they are kept.

        Waits while the engine's server is away, and is never applied twice. Raises EventLogError where it was not
        applied: LeaseLost where it names a lease that this process does not hold, or not without a break since then.
        """

    async def read(self, channel: str, after: Position, limit: int, size: int = BATCH_BYTES) -> Batch:
        """Return up to `limit` events that follow a position, no more than have `size` bytes of data, but one at least.

        Waits while the engine's server is away.
        """

    def watch(self, channel: str, after: Position, deliver: Deliver) -> None:
        """Call `deliver`, from now on, with the events after a position: in order, each once.

        They are consecutive unless history was lost. One watch a channel; the publisher may be any process.
        """

    def unwatch(self, channel: str) -> None:
        """End a watch."""

    async def checkpoint(self, channel: str, name: str) -> str | None:
        """Return the text that was last appended under a name."""

    async def checkpoints(self, prefix: str, name: str) -> Mapping[str, str]:
        """Return the texts last appended under a name, of all channels whose own names begin with a prefix, by those.

        Waits while the engine's server is away.
        """

    async def trim(self, channel: str, retention: Retention) -> None:
        """Forget what retention does not keep; engines do it by themselves, now and then."""

    async def delete(self, channel: str) -> None:
        """Forget a channel and all that belongs to it. One of the same name begins a new epoch."""

    async def hold(self, lease: str) -> bool:
        """Take a lease, or keep it: True while this process is the one that holds it."""

    async def release(self, lease: str) -> None:
        """Give a lease back, so that another process need not wait for its end."""

    def state(self) -> Mapping[str, object]:
        """Return how the engine is, for /health: `engine`, `state`, and `reason` unless the state is `ok`.

        `away`: its server does not answer. `degraded`: events cannot be written or read.
        """


LEASE_SECONDS = 6.0
"""How long a lease outlives a holder that does not say it is there."""

RENEW_SECONDS = 1.5
"""How often a holder says so, and how often the others look."""
