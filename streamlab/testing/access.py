"""Cases for who may use an endpoint: credentials and scopes, what belongs to others, streams that end with a token."""

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from streamlab.auth import new_token
from streamlab.scenario import ANY, Endpoint

from .promise import Broken, promise
from .samples import EndpointForm
from .server import Server, State
from .streams import is_route, what_grew
from .subject import Subject, parsed
from .wire import StreamedResponse

HOLDER, OTHER, READER, WRITER, STRANGER = "holder", "other", "reader", "writer", "stranger"
"""Names of tokens: two with all scopes of the plugin, two with those of one action, and one with none of them."""

ACTIONS = {READER: "read", WRITER: "write"}

EXPIRED, EXPIRING, REMOVED = "expired", "expiring", "removed"
"""Names of tokens with all scopes of the plugin that are not valid any more, or cease to be while streams are open."""

ROUNDS = 3
"""Number of times that each kind of rejected request is sent."""

OPEN_SECONDS = 10.0
"""Maximum time in which the streams begin whose tokens cease to be valid then, in seconds."""

LIFE_SECONDS = 0.5
"""Time from the reload that lets a token expire to its expiry, in seconds."""

END_SECONDS = 1.0
"""Maximum time from the end of a token to the end of its streams, in seconds."""

SLACK_SECONDS = 0.5
"""Tolerance for a busy machine, in seconds."""

RELOAD_SECONDS = 5.0
"""Maximum time in which the server takes a changed configuration, in seconds."""

READ_SECONDS = 0.3
"""Maximum time for the first byte of a stream, in seconds."""

PAUSE_SECONDS = 0.01
"""Pause between two reads before the token ends, in seconds: a fast stream must not occupy a processor."""

SAFE = frozenset({"GET", "HEAD"})

ANONYMOUS = {"STREAMLAB_AUTH__ANONYMOUS": '["conformance_probe:read"]'}
"""The variable that lets the cases see the state of the server."""


@dataclass
class Ended:
    """A stream of a token that ceased to be valid."""

    why: str
    """What became of its token."""
    response: StreamedResponse | str = "not requested"
    """A string is the reason why there is none."""
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the response has begun, or there is none."""
    waited: float | None = None
    """The seconds from the end of the token to its own; None if it had ended before."""
    was_finished: bool = False
    """Whether the server had finished such a response by then."""


@dataclass
class Access:
    """A server that decides by tokens, and how the endpoints are requested with each of them."""

    settings: Path
    """Its config.toml."""
    scenarios: Sequence[str]
    """The scenarios of the plugin."""
    scopes: Collection[str]
    """Scopes of other scenarios that its endpoints need."""
    public: Collection[str]
    """Endpoints that are public on purpose."""
    endpoints: Mapping[str, Endpoint]
    """The declarations of the endpoints, as `GET /x`."""
    server: Server = field(init=False)
    """The server, once it runs; its requests have the token of HOLDER."""
    _text: str = ""
    _tables: dict[str, str] = field(default_factory=dict)
    _secrets: dict[str, str] = field(default_factory=dict)
    _ended: dict[str, list[Ended]] | None = None

    def __post_init__(self) -> None:
        """Create the tokens, and add them to the configuration."""
        self._text = self.settings.read_text(encoding="utf-8")
        every = [*(f"{name}:*" for name in self.scenarios), *self.scopes]
        for name in (HOLDER, OTHER, EXPIRING, REMOVED):
            self._add(name, every)
        for name, action in ACTIONS.items():
            self._add(name, [*(f"{scenario}:{action}" for scenario in self.scenarios), *self.scopes])
        self._add(STRANGER, ["site:*"])
        self._add(EXPIRED, every, datetime(2020, 1, 1, tzinfo=UTC))
        self._write()

    def _add(self, name: str, scopes: Sequence[str], expires: datetime | None = None) -> None:
        self._secrets[name], self._tables[name] = new_token(name, scopes, None)
        if expires is not None:
            self._tables[name] += f"expires = {expires.isoformat()}\n"

    def _write(self) -> None:
        self.settings.write_text("\n".join([self._text, *self._tables.values()]), encoding="utf-8")

    def as_(self, name: str) -> Server:
        """Return the server, to send requests with a token; "" sends none."""
        return replace(self.server, token=self._secrets.get(name, name))

    def endpoint(self, form: EndpointForm) -> Endpoint:
        """Return the declaration of an endpoint."""
        return self.endpoints[form.endpoint]

    async def ended(
        self, forms: Sequence[EndpointForm], subject: Callable[[EndpointForm, Server], Subject]
    ) -> dict[str, list[Ended]]:
        """Return how streams of each endpoint ended whose token expired, and was removed; they are opened once."""
        if self._ended is None:
            begun_at = time.monotonic()
            at = {EXPIRING: math.inf, REMOVED: math.inf}
            found = {form.label: [Ended(name) for name in (EXPIRING, REMOVED)] for form in forms}
            async with asyncio.TaskGroup() as group:
                for form in forms:
                    for one in found[form.label]:
                        group.create_task(self._watch(one, form, subject, at))
                opened = [one.opened.wait() for listed in found.values() for one in listed]
                await asyncio.wait([group.create_task(one) for one in opened], timeout=OPEN_SECONDS)
                expires = datetime.now(UTC) + timedelta(seconds=LIFE_SECONDS)
                self._tables[EXPIRING] += f"expires = {expires.isoformat()}\n"
                del self._tables[REMOVED]
                at[REMOVED] = await self._reload()
                at[EXPIRING] = time.monotonic() + expires.timestamp() - time.time()
            state = await asyncio.to_thread(self.server.state)
            ended = [one for one in state.ended if one["at"] >= begun_at]
            finished = [one["route"] for one in ended if one["outcome"] == "finished"]
            for form in forms:
                for one in found[form.label]:
                    one.was_finished = any(is_route(route, form.template) for route in finished)
            self._ended = found
        return self._ended

    async def _watch(
        self,
        ended: Ended,
        form: EndpointForm,
        subject: Callable[[EndpointForm, Server], Subject],
        at: Mapping[str, float],
    ) -> None:
        """Open a stream with a token, and read it to its end, or until that is overdue."""
        try:
            opened = await asyncio.to_thread(subject, form, self.as_(ended.why))
            async with opened.request(long=True) as response:
                ended.response = response
                await response.wait_for_first_byte(seconds=READ_SECONDS)
                ended.opened.set()
                began = time.monotonic()
                while (left := max(began, at[ended.why]) + END_SECONDS + 2 * SLACK_SECONDS - time.monotonic()) > 0:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(min(left, READ_SECONDS)):
                            if not await response.read_chunk():
                                break
                    if not response.media.startswith("text/event-stream"):
                        response.body.clear()
                    if time.monotonic() < at[ended.why]:
                        await asyncio.sleep(PAUSE_SECONDS)
                waited = time.monotonic() - max(began, at[ended.why])
                ended.waited = None if waited < 0 else waited
        except Exception as error:  # also of `prepare`, of a plugin that needs its token for longer
            ended.response = f"{type(error).__name__}: {error}"
        finally:
            ended.opened.set()

    async def _reload(self) -> float:
        """Have the server read its configuration; return when the signal was sent. Raises Broken if it is not taken."""
        before = self.server.log.count("reloaded ")
        self._write()
        began = time.monotonic()
        self.server.reload()
        deadline = began + RELOAD_SECONDS
        while self.server.log.count("reloaded ") == before:
            if time.monotonic() > deadline or "is not reloaded" in self.server.log:
                raise Broken(f"the configuration was not taken at SIGHUP: {self.server.log[-500:]}")
            await asyncio.sleep(0.01)
        return began


def has_path_parameter(form: EndpointForm) -> bool:
    """Return whether the path of an endpoint names a resource."""
    return any(one["in"] == "path" for one in form.parameters)


class AccessCases:
    """Cases for every endpoint: who may use it, and for how long."""

    @promise("RFC 6750, 3 and 3.1; RFC 9110, 15.5.2 and 15.5.4")
    async def test_credentials_with_the_scope_are_required(self, subject: Subject) -> str:
        """Without a valid token 401, without the scope 403, and nothing runs; public endpoints are listed, and safe."""
        access, form = await asyncio.to_thread(subject.access), subject.form
        endpoint = access.endpoint(form)
        changes = endpoint.starts_work or form.method not in SAFE
        if endpoint.public:
            return await _check_public(access, subject, changes)
        allowed = await asyncio.to_thread(subject.on, access.server)
        for _ in range(3):  # what a server that starts creates is no work for a client
            before = await asyncio.to_thread(access.server.state)
            for _ in range(ROUNDS):
                await _check_rejections(access, allowed, READER if endpoint.action == "write" or changes else WRITER)
            if not (left := await asyncio.to_thread(_left, access.server, before)):
                break
        else:
            raise Broken(f"after {ROUNDS} rejected requests of each kind there are more than before: {left}")
        async with allowed.request() as response:
            if response.status in (401, 403):
                await response.read(seconds=1)
                text = bytes(response.body[:300]).decode(errors="replace")
                raise Broken(f"{response.line} for a token with the scopes of the plugin: {text}; see `scopes`")
        return f"401 and 403 with a challenge, and {response.line} for {form.endpoint} with the scope"

    @promise("streamlab: ids are no credentials; OWASP API Security, API1:2023", of=has_path_parameter)
    async def test_what_another_client_created_does_not_exist(self, subject: Subject) -> str:
        """What `prepare` created for one client gets 404 for another with the same scopes."""
        access, form = await asyncio.to_thread(subject.access), subject.form
        endpoint, allowed = access.endpoint(form), await asyncio.to_thread(subject.on, access.server)
        own = [one["name"] for one in form.parameters if one["in"] == "path" and one["name"] in allowed.prepared]
        if not own or endpoint.public:
            return "no resource that a client created"
        if endpoint.resource in own and endpoint.resource != ANY:
            return f"scopes name its {endpoint.resource}"
        async with replace(allowed, server=access.as_(OTHER)).request() as response:
            if response.status != 404:
                raise Broken(f"{response.line} for the {own[0]} of another client, expected 404")
        async with allowed.request() as response:
            if response.status >= 400:
                raise Broken(f"{response.line} for the client that created it")
        return f"404 for another client, {response.line} for the one that created it"

    @promise("streamlab: a stream ends within 1 s of the expiry or removal of its token; RFC 9112, 8")
    async def test_stream_ends_with_its_token(self, subject: Subject) -> str:
        """A stream whose token expires or is removed ends within 1 s: with `unauthorized`, or visibly incomplete."""
        access = await asyncio.to_thread(subject.access)
        if access.endpoint(subject.form).public:
            return "public"
        await asyncio.to_thread(subject.on, access.server)  # what the first request creates takes time
        found = await subject.ended()
        return ", ".join(_check_end(subject, one) for one in found)


async def _check_public(access: Access, subject: Subject, changes: bool) -> str:
    form = subject.form
    if form.endpoint not in access.public:
        raise Broken("everybody may use it; if that is meant, `public` of the test lists it")
    if changes:
        raise Broken("everybody may use it, and it starts or changes something")
    async with replace(subject, server=access.as_("")).request() as response:
        if response.status in (401, 403):
            raise Broken(f"{response.line} without credentials, although it is public")
        return f"public, {response.line}"


async def _check_rejections(access: Access, subject: Subject, lacking: str) -> None:
    """Send a request with each kind of credentials that do not suffice. Raises Broken where it is not rejected."""
    for name, status, error, what in (
        ("", 401, "", "without credentials"),
        ("wrong", 401, "invalid_token", "for an unknown token"),
        (EXPIRED, 401, "invalid_token", "for a token that has expired"),
        (STRANGER, 403, "insufficient_scope", "for a token of another scenario"),
        (lacking, 403, "insufficient_scope", f"for a token that may only {ACTIONS[lacking]}"),
    ):
        async with replace(subject, server=access.as_(name)).request() as response:
            challenge = response.get("www-authenticate") or ""
            if response.status != status:
                raise Broken(f"{response.line} {what}, expected {status}")
            if not challenge.startswith("Bearer") or error not in challenge:
                raise Broken(f"WWW-Authenticate: {challenge or 'none'} with {status} {what}")


def _left(server: Server, before: State) -> str:
    """Return what there is more of than before, once that has settled; empty if nothing is."""
    return what_grew(before, server.wait_for_state(lambda now: not what_grew(before, now), seconds=1))


def _check_end(subject: Subject, ended: Ended) -> str:
    """Return how a stream ended. Raises Broken if it did not, or as if it were complete."""
    response, why = ended.response, f"its token {'expired' if ended.why == EXPIRING else 'was removed'}"
    if isinstance(response, str):
        return f"not open: {response}"
    if response.status == 401:
        raise Broken(f"could not be opened in {OPEN_SECONDS:g} s, in which its token was valid")
    if response.status >= 400:
        return f"not open: {response.line}"
    if ended.waited is None:
        return "ended before"
    if response.ending is None or ended.waited > END_SECONDS + SLACK_SECONDS:
        raise Broken(f"still open {ended.waited:.1f} s after {why}")
    if not subject.form.carries_events:
        if response.ending == "complete":
            if response.get("content-length") is not None or ended.was_finished:
                return "ended before"
            raise Broken(f"complete after {why}: its client takes a part for the whole")
        return f"{response.ending} {max(0.0, ended.waited):.1f} s after {why}"
    events = parsed(response)
    last = events[-1] if events else None
    if response.ending != "complete" or last is None or last.event not in ("unauthorized", "end"):
        if response.ending == "complete" and ended.was_finished and not any(event.id for event in events):
            return "ended before"  # in a form that has no event `end`, as OpenAI's
        raise Broken(f"{response.ending} after {why}; the last event is {last or 'missing'}, not `unauthorized`")
    if not last.id and any(event.id for event in events[:-1]):
        raise Broken(f"the event `unauthorized` has no id to resume from: {last}")
    return f"`{last.event}` {max(0.0, ended.waited):.1f} s after {why}"
