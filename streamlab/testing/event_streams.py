"""Cases for event streams: complete events, resuming by id, heartbeats, and the end."""

import json

from .promise import Broken, promise
from .samples import EndpointForm
from .subject import WATCH_SECONDS, Subject, parsed, read_events
from .watching import HEARTBEAT_SECONDS
from .wire import Event

FIELDS = {"id", "event", "data", "retry"}

SAMPLE = 6
"""Number of events that are read; half of them are requested again."""

EVENT_SECONDS = 5.0
"""Maximum time for an event, in seconds; after it the case fails."""

NO_EVENTS_HINT = "publish some in `prepare`, or change `values` or `settings`"

BAD_IDS = ("nonsense", "0", "-1", "ffffffff-99999999999999999999", "9" * 200, "caf\xe9", "'; DROP TABLE events")
"""Invalid event ids."""


def carries_events(form: EndpointForm) -> bool:
    """Return whether the response is an event stream."""
    return form.carries_events


def has_last_event_id(form: EndpointForm) -> bool:
    """Return whether an event stream also accepts the last event id as a query parameter."""
    return form.carries_events and any(one["name"] == "last_event_id" for one in form.parameters)


class EventStreams:
    """Cases for event streams."""

    @promise("WHATWG HTML 9.2.5 and 9.2.6; RFC 8259; streamlab: ids are unique", of=carries_events)
    async def test_events_are_complete(self, subject: Subject) -> str:
        """Each event has data, JSON by default, and a unique id; the only other fields are event and retry."""
        async with subject.events(limit=20, seconds=WATCH_SECONDS) as (response, found):
            if response.get("content-length") is not None:
                raise Broken(f"Content-Length: {response.get('content-length')} on an event stream")
            if response.media != "text/event-stream":
                raise Broken(f"{response.line}, {response.media or 'no media type'}")
            found = found or await read_events(response, limit=1, seconds=EVENT_SECONDS)
        if not found:
            raise Broken(f"no event within {EVENT_SECONDS:g} s: {NO_EVENTS_HINT}")
        seen: set[str] = set()
        for event in found:
            if unknown := {name for name, _ in event.fields} - FIELDS:
                raise Broken(f"a field {', '.join(sorted(unknown))} in {event}")
            if (data := event.get("data")) is None:
                raise Broken(f"an event without data: {event}")
            if not event.id:
                raise Broken(f"an event without an id: {event}")
            if event.id in seen:
                raise Broken(f"the id {event.id} twice: {event}")
            seen.add(event.id)
            if subject.data_is_json:
                try:
                    json.loads(data)
                except ValueError:
                    raise Broken(f"data that is not JSON: {event}") from None
        return f"{len(found)} events, from {found[0]} on"

    @promise("WHATWG HTML 9.2.4 (Last-Event-ID)", of=carries_events)
    async def test_resumes_by_header(self, subject: Subject) -> str:
        """After the id in Last-Event-ID comes exactly the next event, with the same bytes: no gap, no repeat."""
        return await _resumes(subject, "headers", "Last-Event-ID")

    @promise("streamlab: last_event_id, where no header can be set (WHATWG HTML 9.2.4)", of=has_last_event_id)
    async def test_resumes_by_parameter(self, subject: Subject) -> str:
        """After the id in ?last_event_id= comes exactly the next event, with the same bytes."""
        return await _resumes(subject, "values", "last_event_id")

    @promise("streamlab: an invalid id gets `gap`, never an error", of=carries_events)
    async def test_bad_ids_get_a_gap_event(self, subject: Subject) -> str:
        """An invalid id gets `event: gap`, then the stream continues; never an error."""
        for id in BAD_IDS:  # noqa: A001
            async with subject.events(limit=1, seconds=EVENT_SECONDS, headers={"Last-Event-ID": id}) as (
                response,
                found,
            ):
                if response.status != 200:
                    raise Broken(f"{response.line} for Last-Event-ID: {id}")
                if not found or found[0].event != "gap":
                    first = found[0] if found else "nothing"
                    raise Broken(f"{first} for Last-Event-ID: {id}, expected an event `gap`")
        return f"an event `gap` for each of {len(BAD_IDS)} ids"

    @promise("WHATWG HTML 9.2.7 (a comment every 15 s)", of=carries_events, watches=True)
    async def test_heartbeats_arrive_in_time(self, subject: Subject) -> str:
        """An event or a comment arrives at least every 15 s."""
        watched = await subject.watched()
        if watched.silence >= HEARTBEAT_SECONDS:
            raise Broken(f"no byte for {HEARTBEAT_SECONDS:g} s")
        return f"at most {watched.silence:.1f} s of silence" + (", then the end" if watched.response.ending else "")

    @promise(
        "WHATWG HTML 9.2.3 (204 ends reconnection); streamlab: a finite stream ends with `end`",
        of=carries_events,
        watches=True,
    )
    async def test_finite_stream_ends_with_end_event(self, subject: Subject) -> str:
        """A finite stream ends with `event: end`; a client that reconnects with its id gets 204."""
        watched = await subject.watched()
        response, reconnected = watched.response, watched.reconnected
        if response.ending is None:
            return f"endless: still open after {HEARTBEAT_SECONDS:g} s"
        if response.ending == "cut":
            raise Broken("the connection was closed before the last chunk")
        found = parsed(response)
        if not found or found[-1].event != "end":
            raise Broken(f"the last event is {found[-1] if found else 'missing'}, not `end`")
        assert reconnected is not None
        if reconnected.status != 204 or reconnected.body:
            raise Broken(f"{reconnected.line} for a client that reconnects after the end: it would reconnect forever")
        return f"{len(found)} events, the last {found[-1]}; 204 after it"


async def _resumes(subject: Subject, name: str, field: str) -> str:
    """Read some events, and request again those after the first, and after the middle."""
    async with subject.request() as response:
        found = await read_events(response, limit=SAMPLE, seconds=WATCH_SECONDS)
        if len(found) < 2:
            found = await read_events(response, limit=2, seconds=EVENT_SECONDS)
        if len(found) < 2:
            raise Broken(f"{len(found)} events within {EVENT_SECONDS:g} s, two are needed: {NO_EVENTS_HINT}")
        for index in sorted({0, len(found) // 2 - 1}):
            last, expected = found[index].id, found[index + 1 :]
            options = {name: {field: last}}
            async with subject.events(limit=len(expected), seconds=EVENT_SECONDS, **options) as (again, received):
                if again.status != 200:
                    raise Broken(f"{again.line} after the id {last}")
            _compare(expected, received, last)
    return f"{len(found)} events, and the same after {found[0].id}"


def _compare(expected: list[Event], received: list[Event], last: str) -> None:
    for one, other in zip(expected, received, strict=False):
        if one.raw != other.raw:
            raise Broken(f"after the id {last} came {other}, expected {one}")
    if len(received) < len(expected):
        raise Broken(f"after the id {last} came {len(received)} events, expected next: {expected[len(received)]}")
