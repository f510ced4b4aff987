"""Who sent a request, and what they may do: principals, and the scopes that they have."""

import hashlib
import ipaddress
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Literal, Self, cast

from aiohttp import web

from .problems import Problem

Action = Literal["read", "write"]
"""What an endpoint does: `read` returns what exists, `write` starts or changes something."""

ACTIONS = ("read", "write")


@dataclass(frozen=True, slots=True)
class Scope:
    """A permission `SCENARIO:ACTION[:RESOURCE]`, as `export:read:orders`, `progress:*` or `file:read:reports/*`.

    Scenario and action are names or `*`; a resource, as the name of an export, may end with `*`. Without a resource it
    is for all resources, except those that belong to the principal that created them: a task of another is named by
    `progress:read:*` only. `*` alone is for everything.
    """

    scenario: str
    action: str
    resource: str | None = None
    """None: the scope names no resource."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the scope of a text; raises ValueError with what is wrong with it."""
        if text == "*":
            return cls("*", "*", "*")
        scenario, separator, rest = text.partition(":")
        action, with_resource, resource = rest.partition(":")
        if not scenario or not separator:
            raise ValueError(f"{text!r} must be SCENARIO:ACTION, SCENARIO:ACTION:RESOURCE or *")
        if action not in (*ACTIONS, "*"):
            raise ValueError(f"the action of {text!r} must be read, write or *")
        if with_resource and not resource:
            raise ValueError(f"the resource of {text!r} is empty; leave out the last colon for all resources")
        for part in (scenario, resource):
            if "*" in part[:-1]:
                raise ValueError(f"{text!r} has a * that is not at the end of a part")
        return cls(scenario, action, resource if with_resource else None)

    @classmethod
    def needed(cls, text: str) -> Self:
        """Return what is needed for one resource, whose name may have any characters: a `*` in it is no pattern.

        Without a name it is for all resources. Raises ValueError for a text without an action.
        """
        scenario, action, *resource = text.split(":", 2)
        if action not in ACTIONS:
            raise ValueError(f"the action of {text!r} must be read or write")
        return cls(scenario, action, "".join(resource) or None)

    def __str__(self) -> str:
        text = f"{self.scenario}:{self.action}"
        return text if self.resource is None else f"{text}:{self.resource}"

    def covers(self, scenario: str, action: str) -> bool:
        """Return whether it is for an action of a scenario, on some resource at least."""
        return self.action in ("*", action) and _matches(self.scenario, scenario)

    def allows(self, scenario: str, action: str, resource: str) -> bool:
        """Return whether it is for an action on a resource; "" for the scenario as a whole, as all its resources."""
        return self.covers(scenario, action) and (self.resource is None or _matches(self.resource, resource))

    def names(self, scenario: str, action: str, resource: str) -> bool:
        """Return whether it is for an action on a resource that belongs to another principal."""
        return self.resource is not None and self.allows(scenario, action, resource)


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sent a request; `request[PRINCIPAL]` in a handler."""

    name: str
    """Name of the token, or `jwt:` and the subject of the JWT; "" for a request without credentials."""
    scopes: tuple[Scope, ...] = ()
    expires: float | None = None
    """Unix time at which its credentials expire, in seconds; None for never."""
    credential: str = field(default="", repr=False)
    """Which credentials it has, without their secret: the SHA-256 of a token; `jwt:`, by what a JWT was verified, and
    its scopes; or "" for none. `Authorization.current` returns what they are worth now.
    """

    def may_use(self, scenario: str, action: Action) -> bool:
        """Return whether it may do an action on at least one resource of a scenario."""
        return any(scope.covers(scenario, action) for scope in self.scopes)

    def has(self, scope: Scope) -> bool:
        """Return whether its scopes include another."""
        return self is EVERYBODY or any(
            own.allows(scope.scenario, scope.action, scope.resource or "") for own in self.scopes
        )

    def may(self, scenario: str, action: Action, resource: str = "") -> bool:
        """Return whether it may do an action on a resource; on all of them, without one."""
        return self is EVERYBODY or self.has(Scope(scenario, action, resource or None))

    def may_below(self, scenario: str, action: Action, prefix: str) -> bool:
        """Return whether it may do an action on a resource whose name begins with a prefix, as that of a folder."""
        return any(
            scope.covers(scenario, action) and (scope.resource or "").startswith(prefix) for scope in self.scopes
        ) or self.may(scenario, action, prefix)

    def may_use_of(self, owner: str, scenario: str, action: Action, resource: str) -> bool:
        """Return whether it may do an action on a resource that a principal created, as a task.

        That is its own, which it may also follow where it may only create one, or one that a scope names: an id is no
        credential.
        """
        if owner == self.name:
            return self.may_use(scenario, action) or (action == "read" and self.may_use(scenario, "write"))
        return any(scope.names(scenario, action, resource) for scope in self.scopes)

    def visible(self, scenario: str, resources: Iterable[str]) -> list[str]:
        """Return the resources of a scenario that it may read, in their order, for a list of them."""
        return [resource for resource in resources if self.may(scenario, "read", resource)]


JWT = "jwt:"
"""The beginning of names and credentials that a JWT has: the name of a token has no colon, so no subject can be one."""

EVERYBODY = Principal("", (Scope.parse("*"),))
"""The principal of every request to an open server, who may do everything."""

PRINCIPAL = web.RequestKey("principal", Principal)
"""Key of the request: who sent it."""


@dataclass(frozen=True, slots=True)
class Need:
    """What the principal of a request must be able to do, from its beginning to its end."""

    scope: Scope
    on: Literal["it", "some", "another's"] = "it"
    """Whether a scope must be for the resource, for some resource of the scenario, or name one of another principal."""

    def is_met_by(self, principal: Principal) -> bool:
        """Return whether a principal has what it takes."""
        scenario, action, resource = self.scope.scenario, self.scope.action, self.scope.resource or ""
        if self.on == "some":
            return any(own.covers(scenario, action) for own in principal.scopes)
        if self.on == "it":
            return principal.has(self.scope)
        return any(own.names(scenario, action, resource) for own in principal.scopes)


NEEDS = web.RequestKey("needs", tuple[Need, ...])
"""Key of the request: what its principal must still be able to do while it is served."""


TICKET_PARAMETER = "ticket"
"""Name of the query parameter with a ticket; no handler sees it."""


def client_of(request: web.Request) -> str:
    """Return what a client counts as when limits are applied: its name, or its address, for IPv6 its 64-bit network.

    One host has all addresses of such a network. It is "" for a client without credentials at a Unix socket.
    """
    if PRINCIPAL in request and (name := request[PRINCIPAL].name):
        return name
    return network_of(request.remote or "")


def may_be_proxy(client: str) -> bool:
    """Return whether a client may be a reverse proxy, for any number of others: it is on this machine, without a name.

    Where `trusted_proxies` of [server] lists the proxy, its clients have their own addresses.
    """
    return client == "" or client == "::/64" or client.startswith("127.")


@lru_cache(maxsize=10_000)
def network_of(address: str) -> str:
    """Return an IPv4 address as it is, for IPv6 its 64-bit network, and "" for what is no address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a Unix socket has no address
        return ""
    if parsed.version == 6 and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((int(parsed), 64), strict=False))


REALM = 'Bearer realm="streamlab"'
"""The challenge of a response that needs credentials (RFC 6750, section 3)."""


def require(request: web.Request, scope: Scope) -> None:
    """Raise Problem 401 or 403 unless the principal of a request has a scope.

    For what the server cannot decide before the handler runs: a resource that only the handler knows, or one of another
    scenario.
    """
    principal = request[PRINCIPAL]
    if not principal.has(scope):
        raise denied(principal, scope)
    remember(request, Need(scope))


def require_own(request: web.Request, owner: str, scope: Scope, missing: str) -> None:
    """Raise Problem 404 with the detail `missing` unless the client may use a resource that `owner` created.

    That is its own, or one that a scope names; for all others it does not exist. `scope` has its scenario, action and
    resource.
    """
    principal = request[PRINCIPAL]
    if not principal.may_use_of(owner, scope.scenario, cast("Action", scope.action), scope.resource or ""):
        raise Problem(404, missing)
    if owner != principal.name:
        remember(request, Need(scope, "another's"))


def remember(request: web.Request, need: Need) -> None:
    """End the stream of a request as soon as its principal does not have what it needs."""
    if request[PRINCIPAL] is not EVERYBODY:
        request[NEEDS] = _shared((*request.get(NEEDS, ()), need))


@lru_cache(maxsize=1000)
def _shared(needs: tuple[Need, ...]) -> tuple[Need, ...]:
    """Return the same object for equal needs: each open stream has some, and they are decided on together."""
    return needs


def unauthorized(detail: str, *, error: str = "") -> Problem:
    """Return the Problem 401, with the challenge that names what credentials there are (RFC 6750, section 3)."""
    challenge = f'{REALM}, error="{error}"' if error else REALM
    return Problem(401, detail, headers={"WWW-Authenticate": challenge})


def denied(principal: Principal, scope: Scope) -> Problem:
    """Return the Problem of a request that needs a scope: 401 without credentials, 403 with them."""
    if not principal.name:
        return unauthorized(f"This needs a token with the scope {scope}: Authorization: Bearer TOKEN.")
    quotable = re.sub(r"[^!#-\[\]-~]", "?", str(scope))  # in a quoted string of a header field
    headers = {"WWW-Authenticate": f'{REALM}, error="insufficient_scope", scope="{quotable}"'}
    return Problem(403, f"{principal.name} needs the scope {scope} for this.", headers=headers)


def new_token(name: str, allow: Iterable[str], expires: datetime | None) -> tuple[str, str]:
    """Return a new token of 256 random bits, and the table of config.toml that lets it in, with its SHA-256 only."""
    secret = f"{TOKEN_PREFIX}{secrets.token_urlsafe(32)}"
    lines = [
        f"[auth.tokens.{json.dumps(name) if not re.fullmatch('[A-Za-z0-9_-]+', name) else name}]",
        f'sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"',
        f"allow = {json.dumps(list(allow))}",
        *([] if expires is None else [f"expires = {expires:%Y-%m-%dT%H:%M:%SZ}"]),
    ]
    return secret, "\n".join(lines) + "\n"


TOKEN_PREFIX = "slt_"  # noqa: S105 - is no secret
"""The beginning of every token, by which tools find those that were published by mistake."""


def without_tokens(text: str) -> str:
    """Return a text for people in which no token can be read, as one that was written where its hash belongs."""
    return re.sub(rf"{TOKEN_PREFIX}[A-Za-z0-9_-]+", f"{TOKEN_PREFIX}...", text)
