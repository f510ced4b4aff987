"""The public keys of an identity provider: that of a file, or its JWKS, fetched and cached within limits (RFC 7517)."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from streamlab.problems import Problem

log = logging.getLogger(__name__)

MAX_BYTES = 256 * 1024
"""Maximum size of a JWKS, in bytes; a key has some hundreds."""

MAX_KEYS = 100
"""Maximum number of keys in a JWKS."""

MAX_AGE_SECONDS = 600.0
"""Age at which keys are fetched again, in seconds: after that, a key that the provider removed is not accepted."""

MIN_INTERVAL_SECONDS = 10.0
"""Minimum time from the end of a fetch to the next one, in seconds, however many tokens have unknown keys."""

FETCH_SECONDS = 5.0
"""Maximum time of a fetch, in seconds."""

MAX_STALE_SECONDS = 86_400.0
"""Age until which keys are used while the provider is unavailable, in seconds."""

RSA_BITS = range(2048, 16_384 + 1)
"""Allowed sizes of RSA keys (RFC 7518, section 3.3); larger ones would occupy the server."""

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A public key, and which signatures it can verify."""

    id: str | None
    """Its `kid`; None if it has none."""
    algorithms: frozenset[str]
    key: PublicKey


class UnusableKeys(Exception):
    """Keys that cannot be used, with the reason."""


def algorithms_of(key: object) -> frozenset[str]:
    """Return the signatures that a key can verify: a key is never used for an algorithm of another family."""
    match key:
        case RSAPublicKey() if key.key_size in RSA_BITS:
            return frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
        case EllipticCurvePublicKey():
            curves = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
            return frozenset({curves[key.curve.name]} if key.curve.name in curves else ())
        case Ed25519PublicKey() | Ed448PublicKey():
            return frozenset({"EdDSA"})
    return frozenset()


def read_pem(data: bytes, allowed: Collection[str]) -> SigningKey:
    """Return the key of a PEM file; raises UnusableKeys where it has none for the allowed algorithms."""
    if b"PRIVATE KEY" in data:
        raise UnusableKeys(
            "contains a private key, which no verifier should have: `openssl pkey -pubout` prints its public key"
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise UnusableKeys("contains no valid public key in PEM format") from None
    algorithms = algorithms_of(key) & frozenset(allowed)
    if not algorithms or not isinstance(key, PublicKey):
        raise UnusableKeys(f"contains no key for {', '.join(allowed)}; RSA keys must have 2048 bits or more")
    return SigningKey(None, algorithms, key)


def read_jwks(body: bytes, allowed: Collection[str]) -> list[SigningKey]:
    """Return the keys of a JWKS that verify signatures of the allowed algorithms; raises UnusableKeys for no JWKS.

    Others are ignored: keys for encryption, private and symmetric ones, and those of an unknown form (RFC 7517,
    section 5).
    """
    try:
        entries = json.loads(body)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UnusableKeys("is no JWKS: an object with a list `keys`") from None
    if not isinstance(entries, list):
        raise UnusableKeys("is no JWKS: `keys` is not a list")
    if len(entries) > MAX_KEYS:
        raise UnusableKeys(f"has {len(entries)} keys, more than {MAX_KEYS}")
    keys = (_read_jwk(entry) for entry in entries if isinstance(entry, dict))
    return [
        SigningKey(key.id, fitting, key.key) for key in keys if key and (fitting := key.algorithms & frozenset(allowed))
    ]


_FORMS: dict[str, Callable[[dict[str, Any]], object]] = {
    "RSA": RSAAlgorithm.from_jwk,
    "EC": ECAlgorithm.from_jwk,
    "OKP": OKPAlgorithm.from_jwk,
}
"""What reads a public key, by its `kty`; symmetric keys (`oct`) are not among them."""


def _read_jwk(entry: dict[str, Any]) -> SigningKey | None:
    kid, operations = entry.get("kid"), entry.get("key_ops")
    if not (isinstance(kid, str) or kid is None) or entry.get("use", "sig") != "sig" or "d" in entry:
        return None
    if operations is not None and not (isinstance(operations, list) and "verify" in operations):
        return None
    try:
        key = _FORMS[entry["kty"]](entry)
    except Exception:  # what it raises is not documented for every malformed key; the others are used
        return None
    algorithms = algorithms_of(key)
    if "alg" in entry:
        algorithms = frozenset(one for one in algorithms if one == entry["alg"])
    return SigningKey(kid, algorithms, key) if isinstance(key, PublicKey) else None


class SigningKeys:
    """The keys that are in force: those given, or those at a URL, which `keep_current` fetches.

    One task fetches for all requests, so that neither a client that disconnects nor many at once change how often.
    """

    def __init__(self, *, keys: Iterable[SigningKey] = (), url: str = "", allowed: Collection[str] = ()) -> None:
        self.trouble = f"{url}: not fetched yet" if url else ""
        """Why there are no current keys; empty if there are."""
        self._keys = list(keys)
        self._url = url
        self._allowed = allowed
        self._fetched_at = 0.0
        self._has_failed = False
        self._is_resting = False
        """Whether the last fetch ended less than MIN_INTERVAL_SECONDS ago."""
        self._wanted = asyncio.Event()
        self._fetched = asyncio.Event()
        """Set at the end of the fetch in progress, or of the next one."""

    async def find(self, kid: str | None, algorithm: str) -> SigningKey | None:
        """Return the key of a token by its header; None if there is none.

        An unknown key is fetched. Raises Problem 503 if the keys are not available.
        """
        if (key := self._known(kid, algorithm)) is None and self._url:
            await self._fetch_soon()
            key = self._known(kid, algorithm)
            if key is None and self.trouble:
                detail = "The keys of the identity provider are not available, so this token cannot be verified."
                raise Problem(503, detail, headers={"Retry-After": str(round(MIN_INTERVAL_SECONDS))})
        return key

    def _known(self, kid: str | None, algorithm: str) -> SigningKey | None:
        """Return a key by its id. One that is the only key is also found if it, or the token, has no id."""
        is_only = len(self._keys) == 1
        for key in self._keys:
            is_named = key.id == kid if key.id is not None and kid is not None else is_only
            if is_named and algorithm in key.algorithms:
                return key
        return None

    async def _fetch_soon(self) -> None:
        """Wait for the end of the fetch in progress, or of a new one; not at all within MIN_INTERVAL_SECONDS of one."""
        if not self._is_resting:
            self._wanted.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(FETCH_SECONDS + 1):
                    await self._fetched.wait()

    async def keep_current(self) -> None:
        """Fetch the keys: now, when they are old, when a token has an unknown key, and often while that fails."""
        if not self._url:
            return
        try:
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=1, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=FETCH_SECONDS),
                headers={"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"},
                auto_decompress=False,
            ) as session:
                while True:
                    await self._fetch(session)
                    self._wanted.clear()
                    self._is_resting = True
                    self._fetched.set()
                    self._fetched = asyncio.Event()
                    await asyncio.sleep(MIN_INTERVAL_SECONDS)
                    self._is_resting = False
                    if not self.trouble:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(MAX_AGE_SECONDS - MIN_INTERVAL_SECONDS):
                                await self._wanted.wait()
        finally:
            self._fetched.set()

    async def _fetch(self, session: aiohttp.ClientSession) -> None:
        """Replace the keys by those of the provider; while that fails, those that are known stay in force for a day."""
        try:
            keys = read_jwks(await self._read(session), self._allowed)
        except (aiohttp.ClientError, OSError, UnicodeError, UnusableKeys) as error:  # a TimeoutError is an OSError
            if time.monotonic() - self._fetched_at > MAX_STALE_SECONDS:
                self._keys = []
            self._report(str(error) or f"no complete response within {FETCH_SECONDS:g} s")
        else:
            self._keys, self._fetched_at = keys, time.monotonic()
            self._report("" if keys else f"has no key for {', '.join(self._allowed)}")

    def _report(self, reason: str) -> None:
        """Store why the last fetch failed, and log the first failure and the first success after one."""
        failed_before, self._has_failed = self._has_failed, bool(reason)
        self.trouble = f"{self._url}: {reason}" if reason else ""
        if reason and not failed_before:
            then = "those of the last fetch are used" if self._keys else "JWTs are rejected with 503"
            log.warning("the keys of the identity provider are not available, and %s: %s", then, self.trouble)
        elif failed_before and not reason:
            log.info("the keys of the identity provider are available again: %s", self._url)

    async def _read(self, session: aiohttp.ClientSession) -> bytes:
        # A redirect could lead to any host, also to one of this network.
        async with session.get(self._url, allow_redirects=False) as response:
            if response.status != 200:
                target = response.headers.get("Location", "")
                raise UnusableKeys(f"status {response.status}{f', a redirect to {target}' if target else ''}")
            if (coding := response.headers.get("Content-Encoding", "identity")) != "identity":
                raise UnusableKeys(f"has the Content-Encoding {coding}, though identity was requested")
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise UnusableKeys(f"is larger than {MAX_BYTES} bytes")
        return bytes(body)
