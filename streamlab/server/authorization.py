"""Who may come in: credentials become a principal, and a principal may use an endpoint or gets 401 or 403."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from aiohttp import web
from pydantic import BaseModel

from streamlab.auth import (
    EVERYBODY,
    JWT,
    NEEDS,
    PRINCIPAL,
    Need,
    Principal,
    Scope,
    denied,
    remember,
    require,
    unauthorized,
)
from streamlab.config import Config, ConfigError
from streamlab.scenario import ANY, Endpoint, Route, labels
from streamlab.streaming.drain import OpenStream, Streams
from streamlab.ticks import tick

from .edge import is_local

if TYPE_CHECKING:
    from .json_web_tokens import JsonWebTokens

CHECK_SECONDS = 0.5
"""Interval at which the credentials of open streams are checked, in seconds."""

OPEN_CHECK_SECONDS = 1.0
"""The same while everybody may do everything: a reload of the configuration, which ends that, checks by itself."""

MAX_TOKEN = 4096
"""Maximum length of a credential, in characters; a JWT has some hundreds."""

MAX_RESTORED = 10_000
"""Maximum number of principals of JWTs that are remembered."""


def load_verifier(config: Config) -> "JsonWebTokens | None":
    """Return what verifies the tokens of an identity provider, None without one. Blocks.

    Raises ConfigError for a missing library, and for what cannot work, as a file that does not exist.
    """
    if config.auth.jwt is None:
        return None
    try:
        from .json_web_tokens import JsonWebTokens
    except ModuleNotFoundError as error:
        reason = f"needs the Python module {error.name!r}: pip install 'streamlab[jwt]'"
        raise ConfigError([config.fault(("auth", "jwt"), reason)]) from None
    return JsonWebTokens.of(config, config.auth.jwt)


class Authorization:
    """Decides which principal a request has, and whether an open stream may go on."""

    def __init__(self, config: Config) -> None:
        self.is_open = False
        """Whether everybody may do everything."""
        self._anonymous = Principal("")
        self._tokens: dict[str, Principal] = {}
        """The principal of each token, by the SHA-256 of the token, which is the principal's credential."""
        self._verifier: JsonWebTokens | None = None
        self._verifier_changed = asyncio.Event()
        self.configure(config, load_verifier(config))

    def configure(self, config: Config, verifier: "JsonWebTokens | None") -> None:
        """Take the tokens of a configuration, and its verifier, in place of those that are in force."""
        if not (verifier and self._verifier and self._verifier.is_like(verifier)):  # the keys that it has are current
            self._verifier = verifier
            self._verifier_changed.set()
        self.is_open = is_open(config)
        self._anonymous = Principal("", tuple(map(Scope.parse, config.auth.anonymous)))
        self._tokens = {
            token.sha256: Principal(
                name,
                (*map(Scope.parse, token.allow), *self._anonymous.scopes),
                None if token.expires is None else token.expires.timestamp(),
                token.sha256,
            )
            for name, token in config.auth.tokens.items()
        }
        self._of_jwt = lru_cache(maxsize=MAX_RESTORED)(self._restore)  # each open stream needs it in every check

    async def authenticate(self, request: web.Request) -> Principal:
        """Return the principal of a request; raises Problem 401 for credentials that are unknown or have expired.

        Raises Problem 503 for a JWT while the keys of the identity provider are not available.
        """
        if self.is_open:
            return EVERYBODY
        given = request.headers.getall("Authorization", ())
        if not given:
            return self._anonymous
        scheme, _, token = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN:
            detail = f"The field Authorization must be: Bearer TOKEN, of at most {MAX_TOKEN} characters."
            raise unauthorized(detail, error="invalid_request")
        return await self.identify(token.strip(" "))

    async def identify(self, token: str) -> Principal:
        """Return the principal of a token; raises Problem 401 for one that is unknown or has expired.

        Raises Problem 503 for a JWT while the keys of the identity provider are not available.
        """
        principal = self._of_token(token)
        if principal is None and self._verifier and len(token) <= MAX_TOKEN and _is_jwt(token):
            verified = await self._verifier.verify(token)
            principal = self._of_jwt(verified.name, verified.expires, verified.credential)
        if principal is None:
            raise unauthorized("This token is not known here.", error="invalid_token")
        if principal.expires is not None and principal.expires <= time.time():
            raise unauthorized("This token has expired.", error="invalid_token")
        return principal

    def _of_token(self, token: str) -> Principal | None:
        """Return the principal of a token; the time that this takes does not tell how much of a hash is right."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for known, principal in self._tokens.items():
            if hmac.compare_digest(known, digest):
                found = principal
        return found

    def current(self, principal: Principal) -> Principal | None:
        """Return what a principal is in this configuration; None if its credentials are not valid any more.

        Name, `expires` and credential decide, so that one which was stored comes back as `Principal(name, (), expires,
        credential)`, also in another process: the scopes are found again.
        """
        if self.is_open:
            return EVERYBODY
        if not principal.credential:
            return self._anonymous
        found = self._tokens.get(principal.credential)
        if principal.credential.startswith(JWT):
            found = self._of_jwt(principal.name, principal.expires, principal.credential)
        return None if found is None or (found.expires is not None and found.expires <= time.time()) else found

    def _restore(self, name: str, expires: float | None, credential: str) -> Principal | None:
        """Return the principal of a JWT that was verified; None if it was by another verifier than that in force."""
        scopes = self._verifier.scopes_of(credential) if self._verifier else None
        return None if scopes is None else Principal(name, (*scopes, *self._anonymous.scopes), expires, credential)

    def deciding(self) -> Callable[[web.Request], bool]:
        """Return a function that returns whether the client of an open stream may still have it, as of now.

        It decides once about all streams with the same principal and needs, of which there may be thousands.
        """
        decided: dict[tuple[int, int], tuple[bool, object]] = {}

        def may_continue(request: web.Request) -> bool:
            both = request.get(PRINCIPAL), request.get(NEEDS)
            key = id(both[0]), id(both[1])
            if (found := decided.get(key)) is None:
                found = decided[key] = self._may_continue(request), both  # which keeps the ids theirs
            return found[0]

        return may_continue

    def _may_continue(self, request: web.Request) -> bool:
        before = request.get(PRINCIPAL)
        if self.is_open or before is None:
            return True
        if before is EVERYBODY:  # nobody recorded what the stream needs
            return False
        principal = self.current(before)
        return principal is not None and all(need.is_met_by(principal) for need in request.get(NEEDS, ()))

    @property
    def trouble(self) -> str:
        """Why JWTs cannot be verified, or only with keys that are not current; empty if they can."""
        return self._verifier.keys.trouble if self._verifier else ""

    async def keep_keys_current(self) -> NoReturn:
        """Fetch the keys of the identity provider that is configured, until cancelled."""
        while True:
            self._verifier_changed.clear()
            async with asyncio.TaskGroup() as group:
                fetching = group.create_task(self._verifier.keys.keep_current()) if self._verifier else None
                await self._verifier_changed.wait()
                if fetching is not None:
                    fetching.cancel()


def _is_jwt(token: str) -> bool:
    """Return whether a token has the form of a signed JWT (RFC 7515, section 3.1), which makes it none."""
    return token.isascii() and token.count(".") == 2


async def end_unauthorized(streams: Streams, authorization: Authorization) -> NoReturn:
    """End streams whose credentials expire, or do not suffice after a change of the configuration, within a second."""
    interrupted: Collection[OpenStream] = ()
    while True:
        await streams.wait_until_used()
        await tick(OPEN_CHECK_SECONDS if authorization.is_open else CHECK_SECONDS)
        if authorization.is_open:
            interrupted = ()
        else:
            interrupted = await streams.end_unauthorized(authorization.deciding(), interrupted)


AUTHORIZATION = web.AppKey("authorization", Authorization)


def is_open(config: Config) -> bool:
    """Return whether everybody may do everything: so it is configured, or only this machine can connect."""
    if config.auth.open is not None:
        return config.auth.open
    return not config.auth.restricts and is_local(config.server)


def may_use(request: web.Request, route: Route) -> bool:
    """Return whether a scope of the principal is for an endpoint, as far as the route alone decides."""
    endpoint, principal = route.endpoint, request[PRINCIPAL]
    return endpoint.public or principal.may_use(route.scenario, endpoint.action)


def authorize(request: web.Request, route: Route) -> None:
    """Raise Problem 401 or 403 where no scope of the principal is for the endpoint."""
    if request[PRINCIPAL] is EVERYBODY:
        return
    scope = Scope(route.scenario, route.endpoint.action)
    if not may_use(request, route):
        raise denied(request[PRINCIPAL], scope)
    if route.endpoint.resource == ANY and not route.endpoint.public:
        remember(request, Need(scope, "some"))


def authorize_resources(request: web.Request, route: Route, parameters: Mapping[str, BaseModel]) -> None:
    """Raise Problem 401 or 403 where the principal may not use the endpoint for every resource that a request names."""
    endpoint = route.endpoint
    if endpoint.public or request[PRINCIPAL] is EVERYBODY:
        return
    for resource in _resources(endpoint, parameters):
        require(request, Scope(route.scenario, endpoint.action, resource or None))


def _resources(endpoint: Endpoint, parameters: Mapping[str, BaseModel]) -> list[str]:
    """Return the resources that a request names; [""], the scenario as a whole, where it must name one and does not."""
    found: list[str] = []
    for model in parameters.values():
        for name, attribute in labels(type(model)).items():
            if endpoint.names_resource(name):
                value = getattr(model, attribute)
                several = isinstance(value, Collection) and not isinstance(value, str)
                found += [_name(one) for one in (value if several else [value]) if one not in (None, "")]
    return found or ([] if endpoint.resource == ANY else [""])


def _name(value: Any) -> str:
    """Return the name of a resource as a client sends it: that of an Enum is its value."""
    return str(value.value if isinstance(value, Enum) else value)
