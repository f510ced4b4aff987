"""Outcomes of streams, and the summary of one that has ended."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

OnStop = Literal["end", "finish"]


class Outcome(StrEnum):
    """How a stream ended."""

    FINISHED = "finished"
    CLIENT_LEFT = "client left"
    SERVER_STOPPED = "server stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """Summary of a stream that has ended; passed to the hook `on_stream_end`."""

    scenario: str
    route: str
    """Template of the route, as `/files/{path}`; never the requested path."""
    method: str
    status: int
    outcome: Outcome
    seconds: float
    """Seconds from `open_stream` to the end."""
    first_byte_seconds: float | None
    """Seconds from `open_stream` to the first byte of the body; None for an empty body."""
    bytes: int
    """Bytes of the body handed to the connection, after compression, without framing."""
    error: BaseException | None
    """Exception of the source, if the outcome is `failed`."""
