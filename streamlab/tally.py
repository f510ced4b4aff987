"""How much of something each client has at once, as open streams, up to a limit."""

from collections import Counter
from pathlib import Path

from aiohttp import web


class Tally:
    """Counts by client, or by anything else that has a name, in this process."""

    is_shared = False
    """Whether other processes change the counts as well."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, client: str, limit: int, count: int = 1) -> bool:
        """Count more of a client, unless it would have more than `limit`; return whether they are counted."""
        if self._counts[client] + count > limit:
            return False
        self._counts[client] += count
        return True

    def remove(self, client: str, count: int = 1) -> None:
        """Count less of a client."""
        self._counts[client] -= count
        if not self._counts[client]:
            del self._counts[client]

    def total(self, client: str) -> int:
        """Return the number of a client."""
        return self._counts.get(client, 0)


class Shared:
    """What this process shares with the other workers of its server: nothing, where it serves alone."""

    folder: Path | None = None
    """A folder for what they share, as sockets; it is deleted when the server ends. None where it serves alone."""

    def tally(self, what: str) -> Tally:
        """Return counts that are those of all workers together; those of one that has died are not counted."""
        return Tally()


SHARED = web.AppKey("shared", Shared)
"""Key of the application: what is shared with the other workers of the server."""
