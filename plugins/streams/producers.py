"""Appends: what the state of a stream allows, and what it is afterwards; producers, sequences and closing."""

from collections.abc import Mapping
from dataclasses import dataclass

from streamlab import EncodedEvent, Problem

from .content import InvalidContent
from .protocol import CLOSED as CLOSED_FIELD
from .protocol import (
    EXPECTED_SEQ,
    PRODUCER_EPOCH,
    PRODUCER_SEQ,
    RECEIVED_SEQ,
    SEQ,
    AppendRequest,
    Producer,
    media_type,
)
from .store import BYTES, CLOSED, CLOSING, CONFIG, Limits, decode_config

LAST_SEQ = "seq"
"""Checkpoint: the last `Stream-Seq` of a stream."""

PRODUCERS = "producers"
"""Checkpoint that counts the producers of a stream."""

State = Mapping[str, str]
"""The checkpoints of a stream that an append depends on, by name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An append that the state of a stream allows."""

    drafts: tuple[EncodedEvent, ...]
    checkpoints: Mapping[str, str]
    expected: Mapping[str, str | None]
    """The part of the state that the decision was made on."""
    counts: Mapping[str, int]
    fields: Mapping[str, str]
    """Header fields of the response."""
    status: int

    @property
    def is_duplicate(self) -> bool:
        """Return whether there is nothing to be done, because it was done before."""
        return not self.expected


def names_for(request: AppendRequest) -> tuple[str, ...]:
    """Return the checkpoints that an append depends on."""
    names = [CONFIG, CLOSED, BYTES]
    if request.producer is not None:
        names += [PRODUCERS, checkpoint_of(request.producer)]
    return (*names, LAST_SEQ) if request.seq else tuple(names)


def checkpoint_of(producer: Producer) -> str:
    """Return the checkpoint with the epoch and sequence number of the last append of a producer."""
    return f"producer/{producer.id}"


def plan_append(state: State, request: AppendRequest, limits: Limits) -> Plan:
    """Decide about an append; raises Problem for one that the state does not allow.

    In this order: an old epoch of the producer (403), an append that was stored before (a duplicate), a closed stream
    (409), then all other conflicts. Source: PROTOCOL.md, 5.2 and 5.2.1.
    """
    config, producer = decode_config(state[CONFIG]), request.producer
    checkpoints, counts = dict[str, str](), dict[str, int]()
    expected: dict[str, str | None] = {CONFIG: state[CONFIG], CLOSED: None}
    fields = {CLOSED_FIELD: "true"} if request.closes else {}
    gap: Problem | None = None
    if producer is not None:
        name = checkpoint_of(producer)
        before = expected[name] = state.get(name)
        done, gap = _judge(before, producer)
        if done is not None:
            fields = {CLOSED_FIELD: "true"} if CLOSED in state else {}
            return Plan((), {}, {}, {}, {**fields, **_fields(producer.epoch, done)}, 204)
        checkpoints[name] = f"{producer.epoch} {producer.seq}"
        fields = {**fields, **_fields(producer.epoch, producer.seq)}
        if before is None:
            expected[PRODUCERS] = state.get(PRODUCERS)
            counts[PRODUCERS] = 1
    if CLOSED in state:
        if request.closes and not request.body and producer is None:
            return Plan((), {}, {}, {}, {CLOSED_FIELD: "true"}, 204)
        raise Problem(409, "The stream is closed.", headers={CLOSED_FIELD: "true"})
    if gap is not None:
        raise gap
    if counts and int(state.get(PRODUCERS, 0)) >= limits.producers:
        raise Problem(429, f"The stream has {limits.producers} producers, their maximum.")
    if request.seq:
        last = expected[LAST_SEQ] = state.get(LAST_SEQ)
        if last is not None and request.seq <= last:
            raise Problem(409, f"{SEQ}: {request.seq!r} must be greater than {last!r}, byte by byte.")
        checkpoints[LAST_SEQ] = request.seq
    drafts = list[EncodedEvent]()
    if request.body:
        if media_type(request.content_type) != media_type(config.content_type):
            raise Problem(409, f"The content type of the stream is {config.content_type}.")
        try:
            message = config.content.message(request.body)
        except InvalidContent as error:
            raise Problem(400, str(error)) from None
        if not message:
            raise Problem(400, "The body is an empty array, which appends nothing.")
        if int(state.get(BYTES, 0)) + len(message) > limits.stream_bytes:
            raise Problem(413, f"The stream would have more than {limits.stream_bytes} bytes, its maximum.")
        drafts.append(EncodedEvent(message))
        counts[BYTES] = len(message)
    if request.closes:
        drafts.append(CLOSING)
        checkpoints[CLOSED] = ""
    status = 200 if producer is not None and request.body else 204
    return Plan(tuple(drafts), checkpoints, expected, counts, fields, status)


def _judge(before: str | None, producer: Producer) -> tuple[int | None, Problem | None]:
    """Return the sequence number up to which a producer has done it before, if so, or what its number lacks.

    Raises Problem 403 for an epoch that another process of the producer has ended.
    """
    if before is None:
        return None, (_gap(0, producer.seq) if producer.seq else None)
    epoch, seq = map(int, before.split())
    if producer.epoch < epoch:
        detail = f"{PRODUCER_EPOCH}: {producer.epoch} was ended by epoch {epoch}."
        raise Problem(403, detail, headers={PRODUCER_EPOCH: str(epoch)})
    if producer.epoch > epoch:
        detail = f"{PRODUCER_SEQ}: a new epoch begins with 0."
        return None, (Problem(400, detail) if producer.seq else None)
    if producer.seq <= seq:
        return seq, None
    return None, (_gap(seq + 1, producer.seq) if producer.seq > seq + 1 else None)


def _gap(expected: int, received: int) -> Problem:
    headers = {EXPECTED_SEQ: str(expected), RECEIVED_SEQ: str(received)}
    return Problem(409, f"{PRODUCER_SEQ}: {received} must be {expected}.", headers=headers)


def _fields(epoch: int, seq: int) -> dict[str, str]:
    return {PRODUCER_EPOCH: str(epoch), PRODUCER_SEQ: str(seq)}
