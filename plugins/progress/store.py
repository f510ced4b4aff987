"""Stored tasks: each has a channel of the event log with its events, and a record that is saved with them."""

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

FOREVER = 10**9
"""Retention of a task that has not ended, in seconds."""

MAX_EVENTS = 10_000
"""Maximum events stored of a task: eight minutes at the highest rate."""

CLAIM_SECONDS = 10.0
"""Seconds a request with an Idempotency-Key may take to create its task, before another with that key does."""

MAX_CLAIMS = 10_000
"""Maximum claims stored of an Idempotency-Key: the most requests that may find it free at the same moment."""

UNKNOWN_TASK = "There is no task with this id."
"""The detail of a 404, also for a task of another principal."""

ID = r"^[0-9a-f]{32}$"
"""Pattern of an id: 12 digits for the time of creation in milliseconds, and 80 random bits."""


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The state of a task. Times are milliseconds since 1970."""

    id: str
    kind: str
    parameters: dict[str, Any]
    unit: str = ""
    created: int
    heartbeat: int
    """When it was last saved: at least every HEARTBEAT_SECONDS while it runs."""
    state: State = "queued"
    owner: str = ""
    """The process that queues or runs it; empty where tasks wait for any worker."""
    principal: str = ""
    """The name of the principal that started it."""
    client: str = ""
    """The client that it counts for when slots are shared."""
    ran_seconds: float = 0
    """Duration of all its runs, in seconds, up to the last heartbeat: compared with the deadline."""
    attempts: int = 0
    """Number of runs so far."""
    crashes: int = 0
    """Number of runs whose process died."""
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
    def has_ended(self) -> bool:
        return self.state in ENDED

    def progress_data(self) -> dict[str, Any]:
        """Return the data of an event `progress`."""
        names = ("id", "kind", "state", "done", "total", "unit", "rate", "eta_seconds", "message", "attempts")
        return {name: getattr(self, name) for name in names}

    def document(self) -> dict[str, Any]:
        """Return the complete task, for clients."""
        age = None if self.has_ended else max(0.0, round((now() - self.heartbeat) / 1000, 1))
        return {
            **self.progress_data(),
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
    """The claim of a request with an Idempotency-Key that is about to create a task."""

    id: str
    """The id of the task to be created."""
    request: str
    """A digest of the request."""


def now() -> int:
    """Return the time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def new_id() -> str:
    """Return a unique id; later ones are greater."""
    return f"{now():012x}{secrets.token_hex(10)}"


def task_of(event_id: str) -> str | None:
    """Return the id of the task that an event belongs to; None where the event id is not a task's."""
    match = re.fullmatch(r"([0-9a-f]{32}):.{1,100}", event_id)
    return match[1] if match else None


def _text(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


class Store:
    """The tasks of an event log. One process at a time writes to a task: the one that holds its lease."""

    def __init__(self, events: Events, keep_seconds: float) -> None:
        self._events = events
        self._keep_seconds = keep_seconds
        self._decoder = msgspec.json.Decoder(Record)

    def channel(self, id: str, *, ended: bool = False) -> Channel:  # noqa: A002
        """Return the channel of a task; publishing with `ended` starts its expiry."""
        idle = self._keep_seconds if ended else None
        retention = Retention(events=MAX_EVENTS, seconds=FOREVER, idle_seconds=idle)
        return self._events.channel(f"progress/{id}", retention=retention, finite=True, id_prefix=f"{id}:")

    async def save(self, record: Record, *events: EncodedEvent, retry_forever: bool = False) -> None:
        """Publish events of a task together with its record; raises EventLogError where that fails."""
        record.heartbeat = now()
        text = msgspec.json.encode(record).decode()
        channel = self.channel(record.id, ended=record.has_ended)
        await channel.publish_all(events, checkpoint=("task", text), retry_forever=retry_forever)

    async def end(self, record: Record, *events: EncodedEvent) -> None:
        """Publish the last events of a task, whose record has a final state."""
        record.ended, record.rate, record.eta_seconds = now(), None, None
        if record.error is not None:
            events = (*events, encode_event(record.error, "error"))
        await self.save(record, *events, encode_event(record.document(), END), retry_forever=True)

    async def find(self, id: str) -> Record | None:  # noqa: A002
        """Return a task; None where it is not stored."""
        text = await self.channel(id).checkpoint("task")
        return None if text is None else self._decoder.decode(text)

    async def get(self, id: str) -> Record:  # noqa: A002
        """Return a task; raises Problem 404 where it never existed, 410 where it may have expired."""
        if (record := await self.find(id)) is not None:
            return record
        if self.is_expired(id):
            raise Problem(
                410, f"This task has ended and expired: results are stored for {self._keep_seconds:g} seconds."
            )
        raise Problem(404, UNKNOWN_TASK)

    def is_expired(self, id: str) -> bool:  # noqa: A002
        """Return whether an unknown id may be of an expired task: it is older than any stored result."""
        return int(id[:12], 16) < now() - self._keep_seconds * 1000

    async def all(self) -> list[Record]:
        """Return every stored task, oldest first."""
        texts = await self._events.checkpoints("progress/", "task")
        return [self._decoder.decode(texts[name]) for name in sorted(texts)]

    async def claim(self, key: str, request: Mapping[str, Any], id: str) -> str | None:  # noqa: A002
        """Claim an Idempotency-Key for a new task; return the id of the task that already holds it, or None.

        Claims are events of one channel, so the log decides which was first. Raises Problem 409 while another request
        with that key creates its task, and 422 where that request was different. A request that finds the key held
        adds no claim, so a client may repeat it at any rate.

        Source: draft-ietf-httpapi-idempotency-key-header, section 2.
        """
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        channel = self._claims(digest)
        claim = _Claim(id=id, request=hashlib.sha256(msgspec.json.encode(request, order="deterministic")).hexdigest())
        holder, has_task = await self._holder(channel)
        if holder is None:
            await channel.publish(msgspec.structs.asdict(claim))
            holder, has_task = await self._holder(channel)
        if holder == claim:
            return None
        if holder is not None and holder.request != claim.request:
            raise Problem(422, "This Idempotency-Key was used for a different request.")
        if holder is None or not has_task:
            detail = "Another request with this Idempotency-Key is in progress."
            raise Problem(409, detail, headers={"Retry-After": "1"})
        return holder.id

    async def release(self, key: str) -> None:
        """Forget a claim whose task could not be created, so that rejected requests leave nothing behind."""
        await self._claims(hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()).delete()

    def _claims(self, digest: str) -> Channel:
        """Return the channel with the claims of an Idempotency-Key."""
        idle = max(self._keep_seconds, 2 * CLAIM_SECONDS)
        retention = Retention(events=MAX_CLAIMS, seconds=FOREVER, idle_seconds=idle)
        return self._events.channel(f"progress-key/{digest}", retention=retention)

    async def _holder(self, channel: Channel) -> tuple["_Claim | None", bool]:
        """Return the claim that holds a key, and whether its task exists; None where a new claim would hold it.

        A claim holds its key while its task exists, and for CLAIM_SECONDS in any case. A claim made meanwhile never
        does: the holder follows from the log alone, and is the same for every reader.
        """
        holder, until = None, 0.0
        async for event in channel.read():
            if event.time >= until:
                holder, until = msgspec.json.decode(event.data, type=_Claim), event.time + CLAIM_SECONDS * 1000
                if await self.find(holder.id) is not None:
                    return holder, True
        return (None if now() >= until else holder), False
