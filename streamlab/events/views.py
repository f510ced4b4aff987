"""Views: which events of a channel a follower gets, decided in threads where a plugin's code decides."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from streamlab.auth import may_be_proxy
from streamlab.problems import Problem
from streamlab.tally import Tally
from streamlab.threads import Threads

from .log import END, Event

FILTER_THREADS = 2
"""Number of threads for quick filters, and of those for slow ones."""

SLICE_SECONDS = 0.05
"""Seconds after which a filter yields its thread to others; it has handled at least one event."""

SLOW_SECONDS = 0.01
"""Seconds for one event above which a filter is slow: slow filters wait only for each other."""

MAX_FILTERS = 100
"""Default of the maximum number of distinct concurrent filters per channel."""

RETRY_SECONDS = 5
"""Retry-After of a request with one filter too many, in seconds."""


@dataclass(frozen=True, slots=True)
class View:
    """Which events of a channel a follower gets. Followers with equal views share the work.

    Raises TypeError for `keys` that are one str, or `accepts` that is not hashable.
    """

    keys: Collection[str] | None = None
    """Only events with one of these keys; None for all. Stored as a frozenset."""
    accepts: Callable[[Event], bool] | None = None
    """Only events for which it returns True. It must be hashable, and equal to another that accepts the same events.

    It runs in a thread, so that it may be slow, but must be safe to call from several threads at once.
    """
    conflate: float = 0.0
    """Seconds in which at most one event of a key, the latest, is sent; 0 sends every event."""

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            raise TypeError(f"keys must be a collection of keys, not the str {self.keys!r}")
        if self.keys is not None:
            object.__setattr__(self, "keys", frozenset(self.keys))
        hash(self.accepts)

    def wants(self, event: Event) -> bool:
        """Return whether an event belongs to the view; the end of a channel belongs to every view."""
        return event.event == END or (
            (self.keys is None or event.key in self.keys) and (self.accepts is None or self.accepts(event))
        )


EVERYTHING = View()


@dataclass(slots=True)
class _Use:
    """A filter in use."""

    followers: Counter[str] = field(default_factory=Counter)
    """The number of its followers of each client."""
    slow: bool = False


class Filters:
    """The filters (`accepts`) of all views of one server: their threads, and their limit.

    An async context manager. A client may determine the cost of a filter (as with a regular expression), so none runs
    on the event loop: they share a few threads, in turns of SLICE_SECONDS. A filter that turns out to be slow moves to
    threads that only slow ones share.
    """

    def __init__(self, max_filters: int = MAX_FILTERS, tally: Tally | None = None) -> None:
        self.max_filters = max_filters
        self._tally = tally or Tally()
        """The number of filters in use of each channel, and of each client of it."""
        self._quick = Threads("filters", FILTER_THREADS)
        self._slow = Threads("slow-filters", FILTER_THREADS)
        self._used: dict[str, dict[View, _Use]] = {}
        """Filters in use, by channel."""

    async def __aenter__(self) -> Self:
        """Start to accept work."""
        await self._quick.__aenter__()
        await self._slow.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Accept no more work."""
        await self._slow.__aexit__(kind, error, trace)
        await self._quick.__aexit__(kind, error, trace)

    def admit(self, channel: str, view: View, client: str) -> None:
        """Count the filter of a client's follower until `leave`; raises Problem 429 above the limit of its channel.

        One client may use half of them, rounded up, unless it may be a proxy.
        """
        if view.accepts is None:
            return
        used, share = self._used.get(channel, {}), -(-self.max_filters // 2)
        headers = {"Retry-After": str(RETRY_SECONDS)}
        is_new = view not in used
        if is_new and not self._tally.add(channel, self.max_filters):
            detail = f"The streams of this channel use {self.max_filters} different filters, the maximum; try again."
            raise Problem(429, detail, headers=headers)
        if is_new or client not in used[view].followers:
            limit = sys.maxsize if may_be_proxy(client) else share
            if not self._tally.add(_part(channel, client), limit):
                if is_new:
                    self._tally.remove(channel)
                detail = f"Streams of this client use {share} different filters, its maximum."
                raise Problem(429, detail, headers=headers)
        self._used.setdefault(channel, used).setdefault(view, _Use()).followers[client] += 1

    def leave(self, channel: str, view: View, client: str) -> None:
        """Count the filter of an admitted follower no longer."""
        if view.accepts is None:
            return
        used = self._used[channel]
        used[view].followers[client] -= 1
        if not used[view].followers[client]:
            del used[view].followers[client]
            self._tally.remove(_part(channel, client))
        if not used[view].followers:
            del used[view]
            self._tally.remove(channel)
        if not used:
            del self._used[channel]

    async def chosen(self, channel: str, view: View, events: Sequence[Event]) -> list[Event]:
        """Return the events of a channel that belong to a view, in order; raises what its filter raises."""
        if view.accepts is None:
            return [event for event in events if view.wants(event)]
        use = self._used.get(channel, {}).get(view) or _Use()
        chosen: list[Event] = []
        start = 0
        while start < len(events):
            some, end, seconds = await (self._slow if use.slow else self._quick).run(_slice, view, events, start)
            use.slow = use.slow or seconds > SLOW_SECONDS * (end - start)
            chosen += some
            start = end
        return chosen


def _part(channel: str, client: str) -> str:
    """Return the name under which the filters of a client of a channel are counted."""
    return f"{channel}\n{client}"


def _slice(view: View, events: Sequence[Event], start: int) -> tuple[list[Event], int, float]:
    """Filter events from an index on, for SLICE_SECONDS or one event; return them, the end index and the seconds."""
    began = time.monotonic()
    chosen: list[Event] = []
    end, seconds = start, 0.0
    while end < len(events) and seconds < SLICE_SECONDS:
        if view.wants(events[end]):
            chosen.append(events[end])
        end += 1
        seconds = time.monotonic() - began
    return chosen, end, seconds
