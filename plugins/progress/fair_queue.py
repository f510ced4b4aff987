"""The order of waiting tasks: clients take turns, and the tasks of one client run in order of creation."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence

from .store import Record


class FairQueue:
    """Tasks that wait for a slot, by client. A slot goes to the client with the fewest running tasks.

    Among several such clients it goes to the one whose last turn is the oldest, so that a client with hundreds of tasks
    cannot delay the first task of another.
    """

    def __init__(self, turns: Mapping[str, int] | None = None) -> None:
        self._waiting: dict[str, deque[str]] = {}
        """Ids by client, oldest first."""
        self._clients: dict[str, str] = {}
        """Clients of the tasks in the queue, and of those with a reserved slot in it, by task id."""
        self._running: Counter[str] = Counter()
        self._turns = dict(turns or {})
        """When each client had its last turn: any number that grows. Clients without a turn come first."""

    def __len__(self) -> int:
        """Return the number of tasks in the queue, with the reserved slots."""
        return len(self._clients)

    def __contains__(self, id: str) -> bool:  # noqa: A002
        """Return whether a task is in the queue, or has a reserved slot."""
        return id in self._clients

    def count(self, client: str) -> int:
        """Return the number of a client's tasks in the queue, with the reserved slots."""
        return list(self._clients.values()).count(client)

    def reserve(self, client: str, id: str) -> None:  # noqa: A002
        """Count a task that is about to be added; `take` does not return it before."""
        self._clients[id] = client

    def withdraw(self, id: str) -> None:  # noqa: A002
        """Free the reserved slot of a task that is not added."""
        self._clients.pop(id, None)

    def add(self, client: str, id: str, *, first: bool = False) -> None:  # noqa: A002
        """Put a task after the others of its client, or before them."""
        self._clients[id] = client
        ids = self._waiting.setdefault(client, deque())
        if first:
            ids.appendleft(id)
        else:
            ids.append(id)

    def take(self) -> tuple[str, str]:
        """Return the client and the id of the next task, which occupies a slot until `release`; raises ValueError."""
        client = min(self._waiting, key=lambda client: (self._running[client], self._turns.get(client, 0)))
        id = self._waiting[client].popleft()  # noqa: A001
        del self._clients[id]
        if not self._waiting[client]:
            del self._waiting[client]
        self._turns[client] = max(self._turns.values(), default=0) + 1
        self.occupy(client)
        return client, id

    def occupy(self, client: str) -> None:
        """Count a running task of a client."""
        self._running[client] += 1

    def release(self, client: str) -> None:
        """Count a running task of a client as finished."""
        self._running[client] -= 1
        if not self._running[client] and client not in self._waiting:
            del self._running[client], self._turns[client]


def in_order(records: Sequence[Record]) -> Iterator[Record]:
    """Yield the unfinished tasks in the order in which they get slots; `records` are sorted by age.

    Tasks in the state "running" come first: their process may have died. The turns of clients follow from the times at
    which their tasks were started, so that processes which share the tasks also share the order.
    """
    turns: dict[str, int] = {}
    for record in records:
        turns[record.client] = max(turns.get(record.client, 0), record.started or 0)
    queue = FairQueue(turns)
    for record in records:
        if record.state == "running":
            queue.occupy(record.client)
            yield record
    queued = {record.id: record for record in records if record.state == "queued"}
    for record in queued.values():
        queue.add(record.client, record.id)
    for _ in queued:
        yield queued[queue.take()[1]]
