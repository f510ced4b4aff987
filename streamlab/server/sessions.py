"""Sessions and tickets of browsers: their records in the event log, valid on every process that shares it."""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, Self

from aiohttp import web
from pydantic import BaseModel, ValidationError

from streamlab.auth import Principal
from streamlab.config import Config
from streamlab.events.channel import Channel, Events, encode_event
from streamlab.events.log import EventLogError, Position, Retention
from streamlab.streaming.drain import OpenStream, Streams
from streamlab.ticks import tick

from .authorization import CHECK_SECONDS, Authorization

log = logging.getLogger(__name__)

TICKET_SECONDS = 30.0
"""Time for which a ticket can be redeemed, in seconds."""

MAX_SESSIONS = 1000
"""Maximum number of sessions of one principal: one more ends the oldest."""

MAX_TICKETS = 10_000
"""Maximum number of tickets of one principal, redeemed ones included: one more ends the oldest."""

MAX_ENDED = 10_000
"""Maximum number of the latest ends of sessions that are stored, and that a process remembers."""

MAX_KNOWN = 10_000
"""Maximum number of sessions whose record a process remembers."""

FRESH_SECONDS = 0.25
"""Time for which a process relies on what it last read of sessions that ended, in seconds."""

RECORD_SECONDS = 60.0
"""Time for which a process remembers the record of a session, in seconds."""

LOG_SECONDS = 5.0
"""Maximum time for which a request waits for the event log because of its session, in seconds."""


@dataclass(frozen=True, slots=True)
class Session:
    """What a browser may do since its user signed in, or since it redeemed a ticket."""

    key: str
    """Names its record; no secret."""
    principal: Principal
    """As stored, without scopes: see `Authorization.current`."""
    expires: float
    """Unix time at which it ends, in seconds."""
    parent: str
    """The key of the session whose end ends this one; empty for none."""
    generation: int
    """That of `Sessions` when its record was read."""
    read_at: float
    """Monotonic time at which its record was read, in seconds."""


SESSION = web.RequestKey("session", Session)
"""Key of the request: the session that its cookie or ticket names."""


class _Record(BaseModel):
    """A session or ticket as it is stored: of its secrets, the SHA-256 only."""

    digest: str
    name: str
    credential: str
    credential_expires: float | None
    expires: float
    """When the session ends; that of a ticket begins when it is redeemed."""
    redeem_until: float = 0
    url: str = ""
    """The only URL that it is for; empty for all."""
    cookie: str = ""
    """The SHA-256 of the cookie of a redeemed ticket."""
    parent: str = ""

    @property
    def principal(self) -> Principal:
        return Principal(self.name, (), self.credential_expires, self.credential)


class _Place(NamedTuple):
    """Where a record is, and what proves that a client may use it: `OWNER.SLOT.PROOF`."""

    owner: str
    """Hash of the principal's name."""
    slot: int
    proof: str
    """The secret, which the client has; its SHA-256 in a key."""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = re.fullmatch(r"([0-9a-f]{16})\.([0-9]{1,5})\.([A-Za-z0-9_-]{32,64})", text)
        return cls(match[1], int(match[2]), match[3]) if match else None

    def __str__(self) -> str:
        return f"{self.owner}.{self.slot}.{self.proof}"

    @property
    def key(self) -> str:
        return str(self._replace(proof=_sha256(self.proof)))


class _Ring:
    """The newest records of each principal, `size` at most, each in a slot: one more replaces the oldest.

    They are checkpoints of one channel for each principal, whose events count them. It is deleted `seconds` after the
    last of them was stored, when all have expired.
    """

    def __init__(self, events: Events, kind: str, size: int) -> None:
        self._events, self._kind, self._size = events, kind, size
        self.seconds = 0.0

    def _channel(self, owner: str) -> Channel:
        retention = Retention(1, self.seconds, self.seconds + TICKET_SECONDS)
        return self._events.channel(f"auth:{self._kind}:{owner}", retention=retention)

    async def add(self, owner: str, record: _Record) -> tuple[int, _Record | None]:
        """Store a record; return its slot, and the record that it replaces."""
        position = Position.parse(await self._channel(owner).publish({}))
        assert position is not None
        slot = position.offset % self._size
        replaced = await self.get(owner, slot)
        await self.put(owner, slot, record)
        return slot, replaced

    async def get(self, owner: str, slot: int) -> _Record | None:
        """Return the record in a slot, unless it has expired."""
        text = await self._channel(owner).checkpoint(str(slot))
        try:
            record = _Record.model_validate_json(text or "")
        except ValidationError:
            return None
        return record if record.expires > time.time() else None

    async def put(self, owner: str, slot: int, record: _Record | None) -> None:
        """Replace the record in a slot."""
        text = "" if record is None else record.model_dump_json(exclude_defaults=True)
        await self._channel(owner).publish_all([], checkpoint=(str(slot), text))


class Sessions:
    """The sessions and tickets of one event log.

    A secret is sent to one client and stored nowhere. Methods raise EventLogError where the log does not respond within
    LOG_SECONDS.
    """

    def __init__(self, config: Config, events: Events, authorization: Authorization) -> None:
        self._events = events
        self._authorization = authorization
        self._sessions = _Ring(events, "sessions", MAX_SESSIONS)
        self._tickets = _Ring(events, "tickets", MAX_TICKETS)
        self._seconds = 0.0
        self._known: OrderedDict[str, Session] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        """Keys of the sessions that ended last."""
        self._position: Position | None = None
        """That of the last event of the channel of ended sessions which was read."""
        self._generation = 0
        """Number of times that events of that channel were lost: what was known before is not relied on."""
        self._fresh_until = 0.0
        self._refreshing = asyncio.Lock()
        self.are_used = False
        """Whether any request to this process had one."""
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take the lifetime of new sessions from a configuration."""
        self._seconds = self._sessions.seconds = self._tickets.seconds = config.auth.session_hours * 3600

    # -- sessions

    async def begin(self, principal: Principal) -> tuple[str, float]:
        """Begin a session of a principal with credentials; return its secret, and the time at which it ends."""
        async with _in_time():
            now = time.time()
            record = _record(principal, _earliest(now + self._seconds, principal.expires))
            return await self._add(self._sessions, record), record.expires

    async def find(self, secret: str) -> Session | None:
        """Return the session of a secret; None if there is none, or it has ended, or its principal is not valid."""
        place = _Place.parse(secret)
        if place is None:
            return None
        async with _in_time():
            await self._refresh()
            session = self._known.get(place.key)
            if session is None or time.monotonic() - session.read_at > RECORD_SECONDS:
                session = await self._read(place)
            while session is not None and session.generation != self._generation:
                session = await self._read(place)
        return session if session is not None and self.is_live(session) else None

    async def _read(self, place: _Place) -> Session | None:
        generation = self._generation
        record = await self._sessions.get(place.owner, place.slot)
        if record is None or not _matches(record.digest, place.proof):
            self._known.pop(place.key, None)
            return None
        session = Session(place.key, record.principal, record.expires, "", generation, time.monotonic())
        self._known[place.key] = session
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        self.are_used = True
        return session

    async def end(self, session: Session) -> None:
        """End a session, on every process within FRESH_SECONDS and the time of its next check."""
        place = _Place.parse(session.key)
        assert place is not None
        async with _in_time():
            record = await self._sessions.get(place.owner, place.slot)
            if record is not None and record.digest == place.proof:
                await self._sessions.put(place.owner, place.slot, None)
            await self._announce_end(session.key)

    def is_live(self, session: Session) -> bool:
        """Return whether a session has not ended, as far as this process has read; see `run`."""
        return (
            session.expires > time.time()
            and session.generation == self._generation
            and not ({session.key, session.parent} & self._ended.keys())
            and self._authorization.current(session.principal) is not None
        )

    # -- tickets

    async def issue(self, principal: Principal, url: str, parent: Session | None) -> tuple[str, float]:
        """Return a new ticket of a principal for a URL, and the time until which it can be redeemed.

        It ends with `parent`, the session that requested it.
        """
        async with _in_time():
            now = time.time()
            ends = _earliest(now + self._seconds, principal.expires, parent.expires if parent else None)
            record = _record(principal, ends)
            record.url, record.redeem_until = url, min(now + TICKET_SECONDS, ends)
            record.parent = parent.key if parent else ""
            return await self._add(self._tickets, record), record.redeem_until

    async def redeem(self, ticket: str, url: str, cookie: str) -> tuple[Session, str] | None:
        """Return the session that a ticket begins, with the secret of its cookie; None if it is not valid for the URL.

        A ticket that was redeemed is valid with that cookie only; then there is no new secret, but "".
        """
        place = _Place.parse(ticket)
        if place is None:
            return None
        async with _in_time():
            await self._refresh()
            generation, record = self._generation, await self._tickets.get(place.owner, place.slot)
            if record is None or not _matches(record.digest, place.proof) or record.url != url:
                return None
            if record.parent and not await self._is_session(record.parent):
                return None
            fresh = ""
            if record.cookie:
                if not _matches(record.cookie, cookie):
                    return None
            else:
                if record.redeem_until <= time.time() or not await self._is_first_use(place):
                    return None
                fresh = secrets.token_urlsafe(32)
                record.cookie = _sha256(fresh)
                await self._tickets.put(place.owner, place.slot, record)
        session = Session(place.key, record.principal, record.expires, record.parent, generation, time.monotonic())
        self.are_used = True
        return (session, fresh) if self.is_live(session) else None

    async def _is_first_use(self, place: _Place) -> bool:
        """Return whether a ticket had not been used: of all processes that append to its channel, one is the first.

        The channel is there for as long as the ticket could be redeemed.
        """
        channel = self._events.channel(
            f"auth:used:{_sha256(place.proof)}", retention=Retention(idle_seconds=2 * TICKET_SECONDS)
        )
        mine = await channel.publish({})
        first = [str(event.position) async for event in channel.read()][:1]
        return first == [mine]

    async def _is_session(self, key: str) -> bool:
        """Return whether the session of a key has not ended."""
        place = _Place.parse(key)
        assert place is not None
        record = await self._sessions.get(place.owner, place.slot)
        return record is not None and record.digest == place.proof

    # -- records

    async def _add(self, ring: _Ring, record: _Record) -> str:
        """Store a record with a new secret, which is returned; the session that it replaces ends."""
        owner, secret = _sha256(record.name)[:16], secrets.token_urlsafe(32)
        record.digest = _sha256(secret)
        slot, replaced = await ring.add(owner, record)
        if replaced is not None:
            await self._announce_end(str(_Place(owner, slot, replaced.digest)))
        return str(_Place(owner, slot, secret))

    # -- ends

    @property
    def _ends(self) -> Channel:
        retention = Retention(MAX_ENDED, self._seconds, self._seconds + TICKET_SECONDS)
        return self._events.channel("auth:ended", retention=retention)

    async def _announce_end(self, key: str) -> None:
        self._note_end(key)
        await self._ends.publish_all([encode_event(key)])

    def _note_end(self, key: str) -> None:
        self._known.pop(key, None)
        self._ended[key] = None
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    async def _refresh(self) -> None:
        """Read which sessions have ended, unless that was done within FRESH_SECONDS: one read for all of them."""
        async with self._refreshing:
            if (begun := time.monotonic()) < self._fresh_until:
                return
            if self._position is None:
                self._position = await self._ends.last()
            async for event in self._ends.read(self._position):
                if not self._position.precedes(event.position):
                    self._generation += 1
                    self._known.clear()
                self._position = event.position
                self._note_end(event.data.decode())
            self._fresh_until = begun + FRESH_SECONDS

    async def run(self, streams: Streams) -> NoReturn:
        """End the streams of sessions that have ended, or were replaced, within a second."""
        interrupted: Collection[OpenStream] = ()
        while True:
            await streams.wait_until_used()
            await tick(CHECK_SECONDS if self.are_used else 2 * CHECK_SECONDS)
            if self.are_used and any(SESSION in request for request in streams.requests):
                try:
                    async with _in_time():
                        await self._refresh()
                except EventLogError as error:
                    log.debug("which sessions have ended is not known: %s", error)
                interrupted = await streams.end_unauthorized(self._may_continue, interrupted)
            else:
                interrupted = ()

    def _may_continue(self, request: web.Request) -> bool:
        session = request.get(SESSION)
        return session is None or self.is_live(session)


SESSIONS = web.AppKey("sessions", Sessions)


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    """Raise EventLogError where the block takes longer than LOG_SECONDS: the log waits for a server to respond."""
    try:
        async with asyncio.timeout(LOG_SECONDS):
            yield
    except TimeoutError:
        raise EventLogError("The event log, which has the sessions, does not respond.") from None


def _record(principal: Principal, expires: float) -> _Record:
    return _Record(
        digest="",
        name=principal.name,
        credential=principal.credential,
        credential_expires=principal.expires,
        expires=expires,
    )


def _earliest(*times: float | None) -> float:
    return min(moment for moment in times if moment is not None)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _matches(digest: str, secret: str) -> bool:
    return hmac.compare_digest(digest, _sha256(secret))
