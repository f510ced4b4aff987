"""What every event stream promises: events that are whole, ids to resume by, signs of life, and an end."""

import json

from .promise import NotKept, promise
from .samples import Asked
from .subject import WATCH_SECONDS, Subject, parsed, taken
from .watching import HEARTBEAT_SECONDS
from .wire import Event

FIELDS = {"id", "event", "data", "retry"}

SAMPLE = 6
"""Events that are looked at; half of them are asked for again."""

SPEAK_SECONDS = 5.0
"""How long a stream may be silent before a case gives up on it."""

SPEAK = "let `prepare` publish some, or `values` and `settings` make it speak"

BAD_IDS = ("nonsense", "0", "-1", "ffffffff-99999999999999999999", "9" * 200, "caf\xe9", "'; DROP TABLE events")
"""Ids that no server has given."""


def carries_events(asked: Asked) -> bool:
    """Event streams."""
    return asked.carries_events


def has_last_event_id(asked: Asked) -> bool:
    """Event streams that take the id of the last event as a query parameter, too."""
    return asked.carries_events and any(one["name"] == "last_event_id" for one in asked.parameters)


class EventStreams:
    """What is asked of every event stream."""

    @promise("WHATWG HTML 9.2.5 and 9.2.6; RFC 8259; streamlab: ids are unique", of=carries_events)
    async def test_events_are_whole(self, subject: Subject) -> str:
        """Each event has data, JSON unless it is excused, and an id of its own; no other field but event and retry."""
        async with subject.events(most=20, seconds=WATCH_SECONDS) as (answer, found):
            if answer.get("content-length") is not None:
                raise NotKept(f"Content-Length: {answer.get('content-length')} on an event stream")
            if answer.media != "text/event-stream":
                raise NotKept(f"{answer.line}, {answer.media or 'no media type'}")
            found = found or await taken(answer, most=1, seconds=SPEAK_SECONDS)
        if not found:
            raise NotKept(f"no event within {SPEAK_SECONDS:g} s: {SPEAK}")
        seen: set[str] = set()
        for event in found:
            if unknown := {name for name, _ in event.fields} - FIELDS:
                raise NotKept(f"a field {', '.join(sorted(unknown))} in {event}")
            if (data := event.get("data")) is None:
                raise NotKept(f"an event without data: {event}")
            if not event.id:
                raise NotKept(f"an event without an id: {event}")
            if event.id in seen:
                raise NotKept(f"the id {event.id} twice: {event}")
            seen.add(event.id)
            if subject.data_is_json:
                try:
                    json.loads(data)
                except ValueError:
                    raise NotKept(f"data that is not JSON: {event}") from None
        return f"{len(found)} events, from {found[0]} on"

    @promise("WHATWG HTML 9.2.4 (Last-Event-ID)", of=carries_events)
    async def test_resumes_by_header(self, subject: Subject) -> str:
        """After the id in Last-Event-ID comes the very next event, with the same bytes: no gap, and no repeat."""
        return await _resumes(subject, "headers", "Last-Event-ID")

    @promise("streamlab: last_event_id, where no header can be set (WHATWG HTML 9.2.4)", of=has_last_event_id)
    async def test_resumes_by_parameter(self, subject: Subject) -> str:
        """After the id in ?last_event_id= comes the very next event, with the same bytes."""
        return await _resumes(subject, "values", "last_event_id")

    @promise("streamlab: an id that is none is told by `gap`, and is never an error", of=carries_events)
    async def test_bad_ids_are_told_and_do_no_harm(self, subject: Subject) -> str:
        """An id that no server gave is answered by `event: gap`, and the stream goes on; never by an error."""
        for id in BAD_IDS:  # noqa: A001
            async with subject.events(most=1, seconds=SPEAK_SECONDS, headers={"Last-Event-ID": id}) as (answer, found):
                if answer.status != 200:
                    raise NotKept(f"{answer.line} for Last-Event-ID: {id}")
                if not found or found[0].event != "gap":
                    first = found[0] if found else "nothing"
                    raise NotKept(f"{first} for Last-Event-ID: {id}, and not an event `gap`")
        return f"an event `gap` for each of {len(BAD_IDS)} ids"

    @promise("WHATWG HTML 9.2.7 (a comment every 15 s)", of=carries_events, watches=True)
    async def test_silence_is_never_long(self, subject: Subject) -> str:
        """Something, a comment at least, comes every 15 s."""
        watched = await subject.watched()
        if watched.silence >= HEARTBEAT_SECONDS:
            raise NotKept(f"not a byte for {HEARTBEAT_SECONDS:g} s")
        return f"{watched.silence:.1f} s of silence at most" + (", then its end" if watched.answer.ending else "")

    @promise(
        "WHATWG HTML 9.2.3 (204 ends reconnection); streamlab: a finite stream ends with `end`",
        of=carries_events,
        watches=True,
    )
    async def test_end_is_said_and_kept(self, subject: Subject) -> str:
        """A stream that is over ends with `event: end`; a client that comes back with its id is told 204."""
        watched = await subject.watched()
        answer, again = watched.answer, watched.again
        if answer.ending is None:
            return f"endless: it went on for {HEARTBEAT_SECONDS:g} s"
        if answer.ending == "cut":
            raise NotKept("the connection was closed before the last chunk")
        found = parsed(answer)
        if not found or found[-1].event != "end":
            raise NotKept(f"the last event is {found[-1] if found else 'none'}, and not `end`")
        assert again is not None
        if again.status != 204 or again.body:
            raise NotKept(f"{again.line} for a client that has the end: it would come back for ever")
        return f"{len(found)} events, the last {found[-1]}; 204 after it"


async def _resumes(subject: Subject, name: str, field: str) -> str:
    """Take some events, and ask again for those after the first, and after the middle."""
    async with subject.ask() as answer:
        found = await taken(answer, most=SAMPLE, seconds=WATCH_SECONDS)
        if len(found) < 2:
            found = await taken(answer, most=2, seconds=SPEAK_SECONDS)
        if len(found) < 2:
            raise NotKept(f"{len(found)} events within {SPEAK_SECONDS:g} s, and two are needed: {SPEAK}")
        for place in sorted({0, len(found) // 2 - 1}):
            last, wanted = found[place].id, found[place + 1 :]
            options = {name: {field: last}}
            async with subject.events(most=len(wanted), seconds=SPEAK_SECONDS, **options) as (again, got):
                if again.status != 200:
                    raise NotKept(f"{again.line} after the id {last}")
            _compare(wanted, got, last)
    return f"{len(found)} events, and the same after {found[0].id}"


def _compare(wanted: list[Event], got: list[Event], last: str) -> None:
    for should, is_ in zip(wanted, got, strict=False):
        if should.raw != is_.raw:
            raise NotKept(f"after the id {last} came {is_}, and {should} is next")
    if len(got) < len(wanted):
        raise NotKept(f"after the id {last} came {len(got)} events, and {wanted[len(got)]} is next")
