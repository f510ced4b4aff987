"""How a stream ends, and what is known of it then."""

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
    """What is known of a stream when it is over; handed to the hook `on_stream_end`."""

    scenario: str
    route: str
    """The route's template, as `/files/{path}`; never the path asked for."""
    method: str
    status: int
    outcome: Outcome
    seconds: float
    """From open_stream to the end."""
    first_byte_seconds: float | None
    """From open_stream to the first byte of the body; None where there was none."""
    bytes: int
    """Bytes of the body handed to the connection, after compression, without framing."""
    error: BaseException | None
    """What the source raised, where the outcome is `failed`."""
