"""Outcomes of streams, and the summary of one that has ended."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

OnStop = Literal["end", "finish"]

Stop = Literal["end", "cut", "unauthorized"]
"""How a stream is interrupted: `end` with a last chunk, `cut` without one; `unauthorized` for its own reason.

An event stream that is `unauthorized` ends with an event that says so; others are cut.
"""


class Outcome(StrEnum):
    """How a stream ended."""

    FINISHED = "finished"
    """The body is complete, and handed to the kernel."""
    CLIENT_LEFT = "client left"
    """The client disconnected, or did not read for `stall_seconds`."""
    SERVER_STOPPED = "server stopped"
    """The server ended or cut it because it stops."""
    UNAUTHORIZED = "unauthorized"
    """The server ended or cut it because its credentials expired, were removed, or do not suffice any more."""
    FAILED = "failed"
    """Its source raised an exception, or sent a body of another length than declared."""


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """Summary of a stream that has ended; passed to the hook `on_stream_end`."""

    scenario: str
    """Name of the scenario; empty for a route that has none."""
    route: str
    """Template of the route, as `/files/{path}`; never the requested path."""
    method: str
    """Method of the request."""
    status: int
    """Status that the client got."""
    outcome: Outcome
    """How it ended."""
    seconds: float
    """Seconds from `open_stream` to the end."""
    first_byte_seconds: float | None
    """Seconds from `open_stream` to the first byte of the body; None for an empty body."""
    bytes: int
    """Bytes of the body handed to the connection, after compression, without framing."""
    error: BaseException | None
    """Exception of the source, if the outcome is `failed`."""
