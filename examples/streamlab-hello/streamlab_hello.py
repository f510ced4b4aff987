"""Greet everybody who says their name, for all to see."""

from aiohttp import web
from pydantic import BaseModel, Field

from streamlab import EVENTS, Channel, Problem, Scenario, endpoint, follow, hookimpl


class Guest(BaseModel):
    """Who is greeted."""

    name: str = Field(min_length=1, max_length=50, description="The name of who is greeted.", examples=["Ada"])


class Watching(BaseModel):
    """From where on, and how many."""

    limit: int | None = Field(None, ge=1, le=1000, description="End after so many greetings.", examples=[2])
    last_event_id: str = Field("", max_length=200, description="Go on after this id, as the header Last-Event-ID does.")


class Hello(Scenario):
    """Greet everybody who says their name, for all to see."""

    greeting: str = "Hello"  # [scenarios.hello] greeting = "Good morning"
    unwelcome: tuple[str, ...] = ()

    @endpoint("POST", "/hello", body=Guest, sends="application/json", responses={201: "The greeting is kept."})
    async def greet(self, request: web.Request, body: Guest) -> web.Response:
        """Say a name, and have it greeted."""
        if body.name in self.unwelcome:
            raise Problem(403, f"{body.name} is not welcome here.")
        greeting = {"greeting": f"{self.greeting}, {body.name}!"}
        identity = await _greetings(request).publish(greeting)
        return web.json_response({"id": identity, **greeting}, status=201)

    @endpoint("GET", "/hello", query=Watching, sends="text/event-stream")
    async def watch(self, request: web.Request, query: Watching) -> web.StreamResponse:
        """Follow the greetings: the last hundred, then each as it is said."""
        return await follow(request, _greetings(request), after=query.last_event_id, tail=100, limit=query.limit)


def _greetings(request: web.Request) -> Channel:
    return request.app[EVENTS].channel("hello")


@hookimpl
def register_scenarios() -> list[type[Scenario]]:
    """Bring the greetings."""
    return [Hello]
