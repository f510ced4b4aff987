"""Requests with an Idempotency-Key: published once, however often they are sent, to whichever process."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from streamlab import LATEST, Channel, Conflict, Position, Problem

REMEMBERED = 10_000
"""Number of requests with a key that are remembered, the last ones."""

COUNT = "keys"
"""Checkpoint that counts the requests with a key."""

MAX_LENGTH = 255
"""Maximum length of a key, in characters."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What is stored with the events of a request, so that they are stored once: arguments of `Channel.append`."""

    checkpoints: Mapping[str, str | None]
    expected: Mapping[str, str | None]
    located: str


class Keys:
    """The keys of the last requests of a channel, in checkpoints of it: each stored with the events of its request.

    A request that finds its key gets the ids that the first one got; the events of a request that is in progress in
    another process are a Conflict, after which it looks again.
    """

    def __init__(self, channel: Channel, remembered: int = REMEMBERED) -> None:
        self._channel = channel
        self._remembered = remembered
        self._turn = asyncio.Lock()

    async def once(
        self, client: str, key: str, body: bytes, count: int, publish: Callable[[Claim], Awaitable[list[str]]]
    ) -> list[str]:
        """Publish the `count` events of a request, unless they are, and return their ids.

        A key belongs to its client. Raises Problem 400 for an invalid key, and 422 for one that was used with another
        body. Source: draft-ietf-httpapi-idempotency-key-header, section 2.
        """
        if not 0 < len(key) <= MAX_LENGTH:
            raise Problem(400, f"An Idempotency-Key must have 1 to {MAX_LENGTH} characters.")
        name = "key/" + _digest(f"{client}\n{key}".encode(errors="surrogateescape"))
        request = f"{_digest(body)} {count}"
        async with self._turn:
            while True:
                found = (await self._channel.look(LATEST, (name, COUNT), limit=1)).checkpoints
                if name in found:
                    return self._ids(found[name], request)
                try:
                    return await publish(await self._claim(name, request, found.get(COUNT)))
                except Conflict:
                    continue

    async def _claim(self, name: str, request: str, count: str | None) -> Claim:
        """Return the claim of a request, in place of the oldest that is remembered."""
        slot = f"key-slot/{int(count or 0) % self._remembered}"
        oldest = (await self._channel.look(LATEST, (slot,), limit=1)).checkpoints.get(slot)
        forgotten = {} if oldest is None else {oldest: None}
        checkpoints = {**forgotten, name: request, slot: name, COUNT: str(int(count or 0) + 1)}
        return Claim(checkpoints, {COUNT: count, name: None}, name)

    def _ids(self, text: str, request: str) -> list[str]:
        """Return the ids of the events of a request that was published."""
        last, first_request = text.split(" ", 1)
        if first_request != request:
            raise Problem(422, "This Idempotency-Key was used for a different request.")
        position = Position.parse(last)
        assert position is not None
        return self._channel.ids(position, int(request.split(" ")[1]))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
