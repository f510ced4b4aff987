"""Tasks as they are kept: a channel each, with its events, and a record of where it stands that comes with them."""

import hashlib
import re
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from streamlab import END, Channel, EncodedEvent, Events, Problem, Retention, encode_event

State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]

ENDED = frozenset({"done", "failed", "cancelled", "interrupted"})

FOR_EVER = 10**9
"""Seconds: a task that has not ended is kept, however long that takes."""

MAX_EVENTS = 10_000
"""Events of a task that are kept: eight minutes of a task that always has news."""

CLAIM_SECONDS = 10.0
"""How long a request with an Idempotency-Key may take to make its task, before another with that key does."""

MAX_CLAIMS = 10_000
"""Claims of an Idempotency-Key that are kept: at most as many requests may find it free at the same moment."""

ID = r"^[0-9a-f]{32}$"
"""An id begins with the time it was made at, 12 digits of milliseconds; the other 80 bits are random."""


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Where a task stands. Times are milliseconds since 1970."""

    id: str
    kind: str
    parameters: dict[str, Any]
    unit: str = ""
    created: int
    told: int
    """When it last gave a sign of life."""
    state: State = "queued"
    owner: str = ""
    """The process that has it in its queue, or runs it; empty where tasks wait for whichever worker takes them."""
    client: str = ""
    """Whom it counts for when slots are divided."""
    ran_seconds: float = 0
    """How long it has run, all its runs together, up to the last sign of life: what a deadline is compared with."""
    attempts: int = 0
    """Runs so far."""
    crashes: int = 0
    """Runs whose process died."""
    done: int | float = 0
    total: int | float | None = None
    rate: float | None = None
    eta_seconds: float | None = None
    message: str = ""
    checkpoint: msgspec.Raw = msgspec.Raw(b"null")
    result: Any = None
    error: dict[str, Any] | None = None
    started: int | None = None
    ended: int | None = None

    @property
    def over(self) -> bool:
        return self.state in ENDED

    def news(self) -> dict[str, Any]:
        """What an event `progress` tells."""
        names = ("id", "kind", "state", "done", "total", "unit", "rate", "eta_seconds", "message", "attempts")
        return {name: getattr(self, name) for name in names}

    def document(self) -> dict[str, Any]:
        """The whole of it, for clients."""
        age = None if self.over else max(0.0, round((now() - self.told) / 1000, 1))
        return {
            **self.news(),
            "parameters": self.parameters,
            "result": self.result,
            "error": self.error,
            "created": _text(self.created),
            "started": _text(self.started),
            "ended": _text(self.ended),
            "heartbeat_age": age,
            "url": f"/process/tasks/{self.id}",
        }


class _Claim(msgspec.Struct, frozen=True):
    """That a request with an Idempotency-Key is about to make a task."""

    id: str
    """The id that the task will have."""
    request: str
    """A digest of what is requested."""


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    """Make an id: later ones are greater, and no two processes make the same."""
    return f"{now():012x}{secrets.token_hex(10)}"


def read_id(event_id: str) -> str | None:
    """Read which task an event's id belongs to; None where it is no such id."""
    match = re.fullmatch(r"([0-9a-f]{32}):.{1,100}", event_id)
    return match[1] if match else None


def _text(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


class Store:
    """The tasks of an event log. One process at a time writes to a task: who runs it, or who may."""

    def __init__(self, events: Events, keep_seconds: float) -> None:
        self._events = events
        self._keep_seconds = keep_seconds
        self._decoder = msgspec.json.Decoder(Record)

    def channel(self, id: str, *, over: bool = False) -> Channel:  # noqa: A002
        """The channel of a task; what is published once it is over lets it expire."""
        idle = self._keep_seconds if over else None
        keep = Retention(events=MAX_EVENTS, seconds=FOR_EVER, idle_seconds=idle)
        return self._events.channel(f"progress/{id}", keep=keep, finite=True, id_prefix=f"{id}:")

    async def keep(self, record: Record, *drafts: EncodedEvent, retry_forever: bool = False) -> None:
        """Publish events of a task together with where it stands now; raises EventLogError where that fails."""
        record.told = now()
        text = msgspec.json.encode(record).decode()
        channel = self.channel(record.id, over=record.over)
        await channel.publish_all(drafts, checkpoint=("task", text), retry_forever=retry_forever)

    async def end(self, record: Record, *drafts: EncodedEvent) -> None:
        """Publish the last events of a task, whose record says that it is over."""
        record.ended, record.rate, record.eta_seconds = now(), None, None
        if record.error is not None:
            drafts = (*drafts, encode_event(record.error, "error"))
        await self.keep(record, *drafts, encode_event(record.document(), END), retry_forever=True)

    async def find(self, id: str) -> Record | None:  # noqa: A002
        """Return a task; None where nothing is kept of it."""
        text = await self.channel(id).checkpoint("task")
        return None if text is None else self._decoder.decode(text)

    async def get(self, id: str) -> Record:  # noqa: A002
        """Return a task; raises Problem 404 where there was none, 410 where it is not kept any more."""
        if (record := await self.find(id)) is not None:
            return record
        if self.expired(id):
            raise Problem(410, f"This task is over; results are kept for {self._keep_seconds:g} seconds.")
        raise Problem(404, "There is no task with this id.")

    def expired(self, id: str) -> bool:  # noqa: A002
        """Whether a task of this id, of which nothing is kept, may have been: it is older than any result kept."""
        return int(id[:12], 16) < now() - self._keep_seconds * 1000

    async def all(self) -> list[Record]:
        """Every task that is kept, oldest first."""
        texts = await self._events.checkpoints("progress/", "task")
        return [self._decoder.decode(texts[name]) for name in sorted(texts)]

    async def claimed(self, key: str, request: Mapping[str, Any], id: str) -> str | None:  # noqa: A002
        """Claim an Idempotency-Key for a task to be made; return the id of the task that has it already, if one does.

        Claims are events of one channel, so the log decides which was first. Raises Problem 409 while another request
        with that key makes its task, and 422 where that request was another one. A request that finds the key held
        leaves no claim behind, so a client may repeat it at any rate.

        Source: draft-ietf-httpapi-idempotency-key-header, section 2.
        """
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        keep = Retention(events=MAX_CLAIMS, seconds=FOR_EVER, idle_seconds=max(self._keep_seconds, 2 * CLAIM_SECONDS))
        channel = self._events.channel(f"progress-key/{digest}", keep=keep)
        claim = _Claim(id=id, request=hashlib.sha256(msgspec.json.encode(request, order="deterministic")).hexdigest())
        holder, made = await self._holder(channel)
        if holder is None:
            await channel.publish(msgspec.structs.asdict(claim))
            holder, made = await self._holder(channel)
        if holder == claim:
            return None
        if holder is not None and holder.request != claim.request:
            raise Problem(422, "This Idempotency-Key was given with another request; each needs its own.")
        if holder is None or not made:
            detail = "Another request with this Idempotency-Key is being answered."
            raise Problem(409, detail, headers={"Retry-After": "1"})
        return holder.id

    async def _holder(self, channel: Channel) -> tuple["_Claim | None", bool]:
        """Return the claim that holds a key, and whether its task exists; None where a new claim would hold it.

        A claim holds its key for as long as its task exists, and for CLAIM_SECONDS in any case. One that was made
        meanwhile never does: what holds a key follows from the log alone, and is the same for all who read it.
        """
        holder, until = None, 0.0
        async for event in channel.read():
            if event.time >= until:
                holder, until = msgspec.json.decode(event.data, type=_Claim), event.time + CLAIM_SECONDS * 1000
                if await self.find(holder.id) is not None:
                    return holder, True
        return (None if now() >= until else holder), False
