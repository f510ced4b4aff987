"""One of several processes that serve together: what its supervisor assigns to it, and what it reports."""

import json
import os
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from aiohttp import web

from streamlab.config import Config, Fault, Source

from .board import Board, Row
from .listening import Listening


class Assignment(NamedTuple):
    """What a worker needs to serve. The supervisor writes it into a file, which is the standard input of the worker."""

    number: int
    """Number of the worker, from 1 on; no other one that runs has it."""
    processes: int
    """Number of workers of the server."""
    sockets: Sequence[int]
    """Descriptors of the listening sockets."""
    folder: Path
    """A folder for what the workers share, which is deleted when they have ended."""
    source: Source

    def write(self, file: IO[bytes]) -> None:
        """Write it to the beginning of a file."""
        path, text, options = self.source
        source = [None if path is None else str(path), text, options]
        file.write(json.dumps([self.number, self.processes, list(self.sockets), str(self.folder), source]).encode())
        file.seek(0)

    @classmethod
    def read(cls, file: IO[bytes]) -> "Assignment":
        """Read what `write` has written."""
        number, processes, sockets, folder, (path, text, options) = json.loads(file.read())
        source = Source(None if path is None else Path(path), text, options)
        return cls(number, processes, sockets, Path(folder), source)


class Report(NamedTuple):
    """What a worker reports: that it serves, or why it does not."""

    announcement: str = ""
    """What the server prints once it serves."""
    faults: Sequence[Fault] = ()

    def encode(self) -> bytes:
        """Return it as a line."""
        return json.dumps([self.announcement, [_fields(fault) for fault in self.faults]]).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> "Report":
        """Return the report of a line."""
        announcement, faults = json.loads(line)
        return cls(announcement, tuple(Fault(*fields) for fields in faults))


def _fields(fault: Fault) -> list[Any]:
    return [fault.source, fault.key, fault.reason, fault.value]


class Worker:
    """This process as a worker."""

    def __init__(self, assignment: Assignment, lifeline: int) -> None:
        self.assignment = assignment
        self.lifeline = lifeline
        """Descriptor of a socket that is connected with the supervisor, until that dies."""
        for inherited in (lifeline, *assignment.sockets):
            os.set_inheritable(inherited, False)
        self.folder = assignment.folder
        self.board = Board(self.folder)
        self.process = os.getpid()
        self.row = self.board.row(assignment.number)

    def listening(self, config: Config) -> Listening:
        """Return what the supervisor listens on."""
        sockets = [socket.socket(fileno=descriptor) for descriptor in self.assignment.sockets]
        return Listening(config, sockets, owns_file=False)

    def count_streams(self, count: int) -> None:
        """Let the others know how many streams are open."""
        self.row.streams = count

    def is_ahead(self, accepted: int) -> bool:
        """Return whether this worker, with so many accepted connections more, has more than others."""
        return self.board.is_ahead(self.row.connections + accepted)

    @property
    def others(self) -> list[Row]:
        """The other workers."""
        return [row for row in self.board.rows() if row.number != self.row.number]

    @property
    def are_complete(self) -> bool:
        """Whether as many workers serve as are configured."""
        return sum(row.state == "serving" for row in self.board.rows()) >= self.assignment.processes

    def states(self) -> list[dict[str, Any]]:
        """Return what `/health` reports of every worker."""
        return [
            {
                "number": row.number,
                "state": "degraded" if row.state == "serving" and row.is_degraded else row.state,
                "process": row.process or None,
                "connections": row.connections,
                "open_streams": row.streams,
            }
            for row in self.board.rows()
        ]

    def close(self) -> None:
        """Delete the shared folder if the supervisor, which would, has died."""
        with socket.socket(fileno=os.dup(self.lifeline)) as connection:
            connection.setblocking(False)
            with suppress(BlockingIOError):
                if not connection.recv(1):
                    shutil.rmtree(self.folder, ignore_errors=True)

    def report(self, report: Report) -> None:
        """Send a report to the supervisor, if that still runs."""
        # A supervisor that has died is noticed by the lifeline.
        with socket.socket(fileno=os.dup(self.lifeline)) as connection, suppress(ConnectionError):
            connection.sendall(report.encode())


WORKER = web.AppKey("worker", Worker)
"""Key of the application: this process as one of several workers; absent where one process serves alone."""
