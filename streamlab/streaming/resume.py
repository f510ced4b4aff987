"""Resuming an event stream: one parameter, one precedence, one response after the end."""

from aiohttp import web
from pydantic import BaseModel, Field


class ResumeQuery(BaseModel):
    """The query of an event stream that can be resumed: derive from it, and pass the value to `resume_id`."""

    last_event_id: str = Field(
        "", max_length=200, description="Resume after this event id; the header Last-Event-ID takes precedence."
    )


def resume_id(request: web.Request, last_event_id: str = "") -> str:
    """Return the id that the client resumes after: the header Last-Event-ID, or the parameter; "" for none.

    Source: WHATWG HTML 9.2.4.
    """
    return request.headers.get("Last-Event-ID") or last_event_id


def no_more_events() -> web.Response:
    """Return the 204 for a client that has the last event: it stops an EventSource from reconnecting.

    Source: WHATWG HTML 9.2.3.
    """
    return web.Response(status=204, headers={"Cache-Control": "no-store"})
