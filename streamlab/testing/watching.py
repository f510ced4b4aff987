"""An event stream that is watched for longer than the heartbeat interval, and resumed after its end."""

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import wire
from .wire import StreamedResponse

if TYPE_CHECKING:
    from .subject import Subject

HEARTBEAT_SECONDS = 15.0
"""Maximum silence of an event stream, in seconds."""

END_SECONDS = 3.0
"""Maximum time for which the response to a reconnect after the end is read, in seconds."""

MAXIMUM_BYTES = 1 << 24
"""Maximum body of a stream that is stored, in bytes."""


@dataclass(frozen=True)
class Watched:
    """What an event stream sent in `HEARTBEAT_SECONDS` + 1 s."""

    response: StreamedResponse
    silence: float
    """The longest time without a byte, in seconds."""
    reconnected: StreamedResponse | None
    """The response to a reconnect with the id of the last event, if the stream has ended."""


async def watch(subject: "Subject") -> Watched:
    """Read an event stream to its end, or for longer than the heartbeat interval; reconnect after an end."""
    reconnected = None
    async with subject.request(without=("limit",)) as response:
        silence = await _longest_silence(response)
    if response.ending in ("complete", "closed") and (found := wire.events(bytes(response.body), errors="replace")):
        async with subject.request(without=("limit",), headers={"Last-Event-ID": found[-1].id}) as reconnected:
            await reconnected.read(seconds=END_SECONDS)
    return Watched(response, silence, reconnected)


async def _longest_silence(response: StreamedResponse) -> float:
    began, longest = time.monotonic(), 0.0
    while response.ending is None and time.monotonic() - began < HEARTBEAT_SECONDS + 1:
        started = time.monotonic()
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await response.read_chunk()
        except TimeoutError:
            return HEARTBEAT_SECONDS
        if len(response.body) > MAXIMUM_BYTES:
            response.body.clear()
        longest = max(longest, time.monotonic() - started)
    return longest
