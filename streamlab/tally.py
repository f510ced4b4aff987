"""How much of something each client has at once, as open streams, up to a limit."""

from collections import Counter


class Tally:
    """Counts by client, in this process."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, client: str, limit: int) -> bool:
        """Count one more of a client, unless it has `limit` already; return whether it is counted."""
        if self._counts[client] >= limit:
            return False
        self._counts[client] += 1
        return True

    def remove(self, client: str) -> None:
        """Count one less of a client."""
        self._counts[client] -= 1
        if not self._counts[client]:
            del self._counts[client]
