"""The event log: positions, events, and the protocol of every engine."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

END = "end"
"""Name of the last event of a channel: followers end after it, and a client that has it gets 204."""

BATCH_BYTES = 1024 * 1024
"""Default of the maximum bytes of one read."""


class Position(NamedTuple):
    """A position in a channel, as text `<epoch>-<offset>`; ordered.

    Offsets of an epoch are consecutive and begin at 1. The epoch, milliseconds since 1970 when it began, changes when
    history is lost, so that an old position is never that of a new event.
    """

    epoch: int
    """Milliseconds since 1970 when the history of the channel began."""
    offset: int
    """Number of the event in its epoch, from 1 on; 0 before the first."""

    def __str__(self) -> str:
        return f"{self.epoch}-{self.offset}"

    @classmethod
    def parse(cls, text: str) -> "Position | None":
        """Return the position in an event's id; None for an invalid id. A dot and a name may follow it."""
        match = _ID.fullmatch(text)
        return cls(int(match[1]), int(match[2])) if match else None

    def precedes(self, other: "Position") -> bool:
        """Return whether `other` directly follows this position."""
        return other.offset == self.offset + 1 and (other.epoch == self.epoch or self == ORIGIN)


_ID = re.compile(r"([0-9]{1,15})-([0-9]{1,15})(?:\.[a-z]{1,16})?")

ORIGIN = Position(0, 0)
"""Position before the first event of a channel, whatever its epoch."""

LATEST = Position(10**15 - 1, 10**15 - 1)
"""Position after every possible event."""


def is_replaced(position: Position, last: Position) -> bool:
    """Return whether a position is of a lost history, and the channel began again with an earlier epoch.

    Engines make every epoch greater than those they know of; one that lost its data while its clock is behind may not
    know. All events of the channel follow that position then, from the first on.
    """
    return position.epoch > last.epoch > 0 and position != LATEST


class EncodedEvent(NamedTuple):
    """An event that is not in the log yet, encoded."""

    data: bytes
    """UTF-8 text."""
    event: str = ""
    """Name; empty for a plain message."""
    key: str = ""
    """Subject, as the symbol of a price: views choose by it."""


class Event(NamedTuple):
    """An event of the log."""

    position: Position
    """Its position in the channel, which is its id without the prefix of the channel."""
    time: int
    """Time of the append, in milliseconds since 1970."""
    data: bytes
    """UTF-8 text, JSON unless its publisher chose another format."""
    event: str
    """Name; empty for a plain message."""
    key: str
    """Subject, by which views choose; it is not sent to clients."""


class Batch(NamedTuple):
    """Result of a read: events in order, the last position of the channel, and checkpoints, all of one moment."""

    events: Sequence[Event]
    last: Position
    checkpoints: Mapping[str, str] = MappingProxyType({})
    """Those of the names that were read which the channel has."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a channel retains its events: until the first of these limits."""

    events: int = 10_000
    """Maximum number of events."""
    seconds: float = 86_400
    """Maximum age of an event, in seconds."""
    idle_seconds: float | None = None
    """Seconds without a new event, or a call of `extend`, after which the channel is deleted; None for never."""
    expires_at: float | None = None
    """Unix time at which the whole channel is deleted, in seconds; None for never."""


FOREVER = Retention(2**31 - 1, 3e9)
"""Retention of a channel whose events are deleted only with it."""


class Copy(NamedTuple):
    """The events of another channel up to a position, to which they keep; its last event, if named `end`, is left out.

    The events that follow have a new epoch, so that no position ever names two events of one channel.
    """

    channel: str
    until: Position


class Append(NamedTuple):
    """Events to be added to a channel together with checkpoints, in order, or not at all.

    Without events it makes an empty channel exist, at offset 0 of its epoch.
    """

    channel: str
    drafts: Sequence[EncodedEvent]
    retention: Retention
    checkpoints: Mapping[str, str | None] = MappingProxyType({})
    """Texts by name, stored with the events or not at all, as the state of their producers; None deletes one."""
    expected: Mapping[str, str | None] = MappingProxyType({})
    """Texts that checkpoints must have before, None for one that must not exist: compare and set."""
    counts: Mapping[str, int] = MappingProxyType({})
    """Numbers by which checkpoints, which count, are increased: whoever else increases them, none is lost."""
    located: str = ""
    """Name of a checkpoint before whose text the position of the last event is stored, and a space; "" for none."""
    copy: Copy | None = None
    """Events that precede the others; only for a channel that does not exist yet."""
    lease: str = ""
    """Lease that the publisher must hold, from the call of `append` on; empty for none."""
    fence: str = ""
    """Identifies this holding of the lease; for the engine alone."""

    @property
    def size(self) -> int:
        """Return its approximate size, in bytes."""
        return sum(len(draft.data) for draft in self.drafts) + 64 * (len(self.drafts) + len(self.checkpoints))


def within(events: Iterable[Event], size: int) -> list[Event]:
    """Return the first events that have at most `size` bytes of data together, but at least one."""
    taken: list[Event] = []
    for event in events:
        size -= len(event.data)
        if taken and size < 0:
            break
        taken.append(event)
    return taken


Deliver = Callable[[Sequence[Event]], None]


class EventLogError(Exception):
    """The log could not write or read; the message can be sent to a client."""


class LeaseLost(EventLogError):
    """The events were published under a lease that this process no longer holds."""

    def __init__(self) -> None:
        super().__init__("This process has lost the lease that it needs to publish this.")


class Conflict(EventLogError):
    """A checkpoint had not the expected text, or there is nothing to copy, or no place for it: nothing was stored."""

    def __init__(self, found: Mapping[str, str | None]) -> None:
        super().__init__("Another client has changed this meanwhile.")
        self.found = found
        """The texts that the expected checkpoints had, by name; None for one that does not exist."""


class EventLog(Protocol):
    """The protocol of every engine. All methods are called on the event loop and do not block it."""

    def opened(self) -> AbstractAsyncContextManager[None]:
        """Hold the log open; raises EventLogError if it cannot be opened."""

    async def append(self, append: Append) -> Position:
        """Add events (or only checkpoints) and return the position of the last one, once they are stored.

        Waits while the server of the engine is unavailable, and is never applied twice. Raises EventLogError if it was
        not applied: LeaseLost if it names a lease that this process has not held since the call, Conflict if a
        checkpoint has not the expected text.
        """

    async def read(
        self, channel: str, after: Position, limit: int, size: int = BATCH_BYTES, names: Sequence[str] = ()
    ) -> Batch:
        """Return up to `limit` events after a position, with at most `size` bytes of data, but at least one.

        The checkpoints with the given names come with them. A channel that has expired does not exist. Waits while the
        server of the engine is unavailable.
        """

    async def extend(self, channel: str, seconds: float) -> None:
        """Delete a channel not before `seconds` from now: a retention with `idle_seconds` that reads extend."""

    def watch(self, channel: str, after: Position, deliver: Deliver) -> None:
        """Call `deliver`, from now on, with the events after a position: in order, each once.

        They are consecutive unless history was lost. One watch per channel; the publisher may be any process.
        """

    def unwatch(self, channel: str) -> None:
        """End a watch."""

    def is_shared(self) -> bool:
        """Return whether other processes may follow channels of this log, as far as is known."""

    async def checkpoint(self, channel: str, name: str) -> str | None:
        """Return the text that was last appended under a name."""

    async def checkpoints(self, prefix: str, name: str) -> Mapping[str, str]:
        """Return the texts last appended under a name, by channel, of all channels whose names begin with a prefix.

        Waits while the server of the engine is unavailable.
        """

    async def trim(self, channel: str, retention: Retention) -> None:
        """Delete the events beyond the retention; engines do it by themselves, periodically."""

    async def delete(self, channel: str) -> None:
        """Delete a channel with its checkpoints. A later channel of the same name begins a new epoch."""

    async def hold(self, lease: str) -> bool:
        """Take or renew a lease; return whether this process holds it."""

    async def release(self, lease: str) -> None:
        """Release a lease, so that another process need not wait for its expiry."""

    def state(self) -> Mapping[str, object]:
        """Return the state of the engine for /health: `engine`, `state`, and `reason` unless the state is `ok`.

        `disconnected`: its server does not respond. `degraded`: events cannot be written or read.
        """


LEASE_SECONDS = 6.0
"""Seconds after which a lease that is not renewed expires."""

RENEW_SECONDS = 2.0
"""Interval at which a holder renews its lease, and other processes try to take it, in seconds."""
