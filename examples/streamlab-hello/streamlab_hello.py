"""Greet each name that is posted, in a public event stream."""

from aiohttp import web
from pydantic import BaseModel, Field

from streamlab import EVENTS, Channel, Problem, Scenario, endpoint, follow, hookimpl


class Guest(BaseModel):
    """The guest to greet."""

    name: str = Field(min_length=1, max_length=50, description="The name to greet.", examples=["Ada"])


class WatchQuery(BaseModel):
    """Where to start, and how many greetings."""

    limit: int | None = Field(None, ge=1, le=1000, description="End after N greetings.", examples=[2])
    last_event_id: str = Field(
        "", max_length=200, description="Resume after this id, as the header Last-Event-ID does."
    )


class Hello(Scenario):
    """Greet each name that is posted, in a public event stream."""

    greeting: str = "Hello"  # [scenarios.hello] greeting = "Good morning"
    unwelcome: tuple[str, ...] = ()

    @endpoint("POST", "/hello", body=Guest, sends="application/json", responses={201: "The greeting is stored."})
    async def greet(self, request: web.Request, body: Guest) -> web.Response:
        """Greet a name."""
        if body.name in self.unwelcome:
            raise Problem(403, f"{body.name} is not welcome here.")
        greeting = {"greeting": f"{self.greeting}, {body.name}!"}
        event_id = await _greetings(request).publish(greeting)
        return web.json_response({"id": event_id, **greeting}, status=201)

    @endpoint("GET", "/hello", query=WatchQuery, sends="text/event-stream")
    async def watch(self, request: web.Request, query: WatchQuery) -> web.StreamResponse:
        """Follow the greetings: the last hundred, then each new one."""
        return await follow(request, _greetings(request), after=query.last_event_id, tail=100, limit=query.limit)


def _greetings(request: web.Request) -> Channel:
    return request.app[EVENTS].channel("hello")


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Register the scenario."""
    return [Hello]
