"""What the workers of a server know of each other: a row of numbers of each, in memory that they share."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from streamlab.config import MAX_WORKERS

MAX_ROWS = MAX_WORKERS + 2
"""Maximum number of rows: while workers are replaced there is one more than configured; the first has their number."""

State = Literal["none", "starting", "serving", "stopping", "restarting"]

_STATES: tuple[State, ...] = ("none", "starting", "serving", "stopping", "restarting")

_WIDTH = 16
"""Numbers of a row: 64 bytes, so that no two processors write to the same line of their caches."""

_STATE, _PROCESS, _CONNECTIONS, _STREAMS, _DEGRADED, _BEAT = range(6)


class Row:
    """The numbers of one worker: its state and process are written by the supervisor, all others by the worker."""

    def __init__(self, numbers: memoryview, number: int) -> None:
        self.number = number
        self._numbers = numbers[number * _WIDTH : (number + 1) * _WIDTH]

    @property
    def state(self) -> State:
        """What it does; `none` where there is no worker of this number."""
        return _STATES[self._numbers[_STATE]]

    @property
    def process(self) -> int:
        """Id of its process."""
        return self._numbers[_PROCESS]

    @property
    def connections(self) -> int:
        """Number of its open connections."""
        return self._numbers[_CONNECTIONS]

    @connections.setter
    def connections(self, count: int) -> None:
        self._numbers[_CONNECTIONS] = count

    @property
    def streams(self) -> int:
        """Number of its open streams."""
        return self._numbers[_STREAMS]

    @streams.setter
    def streams(self, count: int) -> None:
        self._numbers[_STREAMS] = count

    @property
    def is_degraded(self) -> bool:
        """Whether something does not work in it."""
        return bool(self._numbers[_DEGRADED])

    @is_degraded.setter
    def is_degraded(self, value: bool) -> None:
        self._numbers[_DEGRADED] = value

    @property
    def beat(self) -> int:
        """A number that changes every second or so while its event loop runs."""
        return self._numbers[_BEAT]

    def ran_at(self, moment: float) -> None:
        """Note when its event loop was last known to run: by the monotonic clock, in seconds."""
        self._numbers[_BEAT] = int(moment * 1000) & 0xFFFFFFFF

    def set(self, state: State, process: int = 0) -> None:
        """Set the state of its process; another process begins with nothing open."""
        if process != self.process:
            self._numbers[:] = memoryview(bytes(4 * _WIDTH)).cast("I")
            self._numbers[_PROCESS] = process
        self._numbers[_STATE] = _STATES.index(state)


class Board:
    """The rows of all workers, in a file of a folder that every process has mapped into its memory."""

    def __init__(self, folder: Path) -> None:
        size = 4 * MAX_ROWS * _WIDTH
        with (folder / "board").open("a+b") as file:
            file.truncate(size)
            self._numbers = memoryview(mmap.mmap(file.fileno(), size)).cast("I")
        self._rows = [Row(self._numbers, number) for number in range(MAX_ROWS)]

    def row(self, number: int) -> Row:
        """Return the row of a worker; the first call for a number is by the supervisor."""
        if number > self._numbers[0]:
            self._numbers[0] = number
        return self._rows[number]

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all workers, also of those that have died and are restarted."""
        return (row for row in self._rows[1 : self._numbers[0] + 1] if row.state != "none")

    def is_ahead(self, connections: int) -> bool:
        """Return whether a worker with this number of connections has more than another one that accepts them."""
        return any(connections > row.connections for row in self.rows() if row.state == "serving")
