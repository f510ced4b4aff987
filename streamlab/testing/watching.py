"""An event stream that is watched for longer than it may be silent, and resumed after its end."""

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import wire
from .wire import StreamedResponse

if TYPE_CHECKING:
    from .subject import Subject

HEARTBEAT_SECONDS = 15.0
"""Maximum silence of an event stream."""

END_SECONDS = 3.0
"""How long a response to a client that has the end is read."""

MAXIMUM_BYTES = 1 << 24
"""Maximum body of a stream that is stored, in bytes."""


@dataclass(frozen=True)
class Watched:
    """What came of an event stream in `HEARTBEAT_SECONDS` and one more."""

    response: StreamedResponse
    silence: float
    """The longest time without a byte, in seconds."""
    again: StreamedResponse | None
    """The response to a client that comes back with the id of the last event, where the stream has ended whole."""


async def watch(subject: "Subject") -> Watched:
    """Read an event stream to its end, or until it could have been silent for too long; come back after an end."""
    again = None
    async with subject.request(without=("limit",)) as response:
        silence = await _longest_silence(response)
    if response.ending in ("whole", "closed") and (found := wire.events(bytes(response.body), errors="replace")):
        async with subject.request(without=("limit",), headers={"Last-Event-ID": found[-1].id}) as again:
            await again.read(seconds=END_SECONDS)
    return Watched(response, silence, again)


async def _longest_silence(response: StreamedResponse) -> float:
    began, longest = time.monotonic(), 0.0
    while response.ending is None and time.monotonic() - began < HEARTBEAT_SECONDS + 1:
        form = time.monotonic()
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await response.read_chunk()
        except TimeoutError:
            return HEARTBEAT_SECONDS
        if len(response.body) > MAXIMUM_BYTES:
            response.body.clear()
        longest = max(longest, time.monotonic() - form)
    return longest
