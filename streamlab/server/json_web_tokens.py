"""Tokens of an identity provider: a JWT that is verified becomes a principal (RFC 7519, RFC 8725, RFC 9068)."""

import hashlib
import json
import logging
import re
from collections.abc import Collection
from typing import Any, Self
from urllib.parse import urlsplit

import jwt

from streamlab.auth import JWT, Principal, Scope, unauthorized
from streamlab.config import Config, ConfigError, JwtSettings
from streamlab.problems import Problem

from .edge import is_loopback
from .signing_keys import SigningKeys, UnusableKeys, read_pem

log = logging.getLogger(__name__)

TYPES = ("jwt", "at+jwt", "application/at+jwt")
"""Allowed values of `typ`, which may also be missing; others are of tokens for other purposes (RFC 9068, 2.1)."""

SUBJECT = re.compile(r"[!-~]{1,255}")
"""A subject that can be a name: it appears in log lines, and owns tasks."""

MAX_PEM = 64 * 1024
"""Maximum size of the file of a public key, in bytes."""

LATEST = 253_402_300_799
"""The last second of the year 9999; a later `exp` is this one, since it might be no float."""

_DETAILS: dict[type[jwt.PyJWTError], str] = {
    jwt.ExpiredSignatureError: "This token has expired.",
    jwt.ImmatureSignatureError: "This token is not valid yet.",
    jwt.InvalidAudienceError: "This token is for another audience.",
    jwt.InvalidIssuerError: "This token is from another issuer.",
}
"""The reason that a client gets: only for a valid signature, since PyJWT verifies that before the claims."""


class JsonWebTokens:
    """Verifies the tokens of the identity provider in `[auth.jwt]`."""

    def __init__(self, settings: JwtSettings, keys: SigningKeys, *, fingerprint: str) -> None:
        self.settings = settings
        self.keys = keys
        self.fingerprint = fingerprint
        """What a token was verified by: a principal is valid as long as that is the same, also in another process."""

    @classmethod
    def of(cls, config: Config, settings: JwtSettings) -> Self:
        """Return what verifies the tokens; raises ConfigError for what cannot work. Reads the file of the key."""
        material = ""
        if settings.jwks_url is not None:
            if reason := _url_fault(settings.jwks_url):
                raise ConfigError([config.fault(("auth", "jwt", "jwks_url"), reason, settings.jwks_url)])
            keys = SigningKeys(url=settings.jwks_url, allowed=settings.algorithms)
        else:
            assert settings.public_key is not None
            try:
                with settings.public_key.open("rb") as file:
                    data = file.read(MAX_PEM)
                keys = SigningKeys(keys=[read_pem(data, settings.algorithms)])
            except (OSError, UnusableKeys) as error:
                reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
                raise ConfigError([config.fault(("auth", "jwt", "public_key"), reason, settings.public_key)]) from None
            material = hashlib.sha256(data).hexdigest()
        basis = [*settings.model_dump(include={"issuer", "audience", "jwks_url", "scope_claim"}).values(), material]
        digest = hashlib.sha256(json.dumps([*basis, sorted(settings.algorithms)]).encode())
        return cls(settings, keys, fingerprint=digest.hexdigest()[:32])

    def is_like(self, other: Self) -> bool:
        """Return whether another one verifies tokens in the same way."""
        return (self.settings, self.fingerprint) == (other.settings, other.fingerprint)

    async def verify(self, token: str) -> Principal:
        """Return the principal of a token, without its scopes (see `scopes_of`); it may have expired within the leeway.

        Raises Problem 401 for a token that is not valid, and 503 while the keys of the provider are not available.
        """
        try:
            header = jwt.get_unverified_header(token)
            algorithm = self._algorithm(header)
            key = await self.keys.find(header.get("kid"), algorithm)
            if key is None:
                raise jwt.InvalidKeyError("the provider has no such key for this algorithm")
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=self.settings.audience,
                issuer=self.settings.issuer,
                leeway=self.settings.leeway_seconds,
                options={"require": ["exp", "iss", "aud", "sub"], "enforce_minimum_key_length": True},
            )
            return self._principal(claims)
        except jwt.PyJWTError as error:
            raise _rejected(error) from None

    def _algorithm(self, header: dict[str, Any]) -> str:
        """Return the algorithm of a token, which must be allowed; keys that the header brings along are ignored."""
        algorithm, kind = header.get("alg"), header.get("typ", "JWT")
        if algorithm not in self.settings.algorithms:
            raise jwt.InvalidAlgorithmError("its alg is not allowed")
        if "crit" in header:  # no extension is known here (RFC 7515, 4.1.11)
            raise jwt.InvalidTokenError("it has critical header parameters")
        if not isinstance(kind, str) or kind.lower() not in TYPES:
            raise jwt.InvalidTokenError("its typ is that of a token for another purpose")
        return str(algorithm)

    def _principal(self, claims: dict[str, Any]) -> Principal:
        subject, expires = claims["sub"], claims["exp"]
        if not SUBJECT.fullmatch(subject):
            raise jwt.InvalidTokenError("its sub is not 1 to 255 printable ASCII characters without spaces")
        if isinstance(expires, bool) or not isinstance(expires, int | float):
            raise jwt.DecodeError("its exp is not a number")
        scopes = json.dumps(_texts(claims.get(self.settings.scope_claim)))
        credential = f"{JWT}{self.fingerprint} {scopes}"
        return Principal(f"{JWT}{subject}", (), float(min(expires, LATEST)), credential)

    def scopes_of(self, credential: str) -> tuple[Scope, ...] | None:
        """Return the scopes of a token that was verified earlier; None if tokens were verified in another way then."""
        fingerprint, _, scopes = credential.removeprefix(JWT).partition(" ")
        return tuple(map(Scope.parse, json.loads(scopes))) if fingerprint == self.fingerprint else None


def _rejected(error: jwt.PyJWTError) -> Problem:
    detail = _DETAILS.get(type(error), "This token is not known here.")
    if isinstance(error, jwt.MissingRequiredClaimError):
        detail = f"This token has no claim {error.claim}."
    log.info("a JWT was rejected: %s", str(error)[:200])
    return unauthorized(detail, error="invalid_token")


def _texts(value: Any) -> Collection[str]:
    """Return the scopes of a claim that are scopes of this server; tokens may have others for other servers."""
    found = []
    for text in value.split(" ") if isinstance(value, str) else value if isinstance(value, list) else ():
        try:
            Scope.parse(text)
        except (ValueError, AttributeError):  # or no text
            continue
        found.append(text)
    return found


def _url_fault(url: str) -> str:
    """Return why keys cannot be fetched from a URL; empty if they can."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        (host or "").encode("idna")  # as the look-up of its address does
    except ValueError as error:
        return f"is no URL: {error}"
    if parts.scheme not in ("https", "http") or not host or not re.fullmatch("[!-~]+", url):
        return "must be a URL that begins with https://, of printable ASCII characters without spaces"
    if parts.scheme == "http" and not is_loopback(host):
        return "must begin with https://: over http, anybody on the way could replace the keys"
    if "@" in parts.netloc or parts.fragment:
        return "must have no user, password or fragment"
    return ""
