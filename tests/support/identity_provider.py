"""An identity provider for tests: real keys, and a real HTTP server that publishes them, fails, and counts requests."""

import base64
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

ISSUER = "https://id.example.org/"
AUDIENCE = "streamlab"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def private_key(algorithm: str, name: str = "") -> PrivateKey:
    """Return the key of the provider for an algorithm; with a name, another one."""
    return _generated(algorithm, name)


@cache
def _generated(algorithm: str, _: str) -> PrivateKey:
    if algorithm.startswith(("RS", "PS")):
        return rsa.generate_private_key(65537, 2048)
    if algorithm.startswith("ES"):
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def pem(key: PrivateKey) -> bytes:
    """Return the public key as a PEM file has it."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def jwk(key: PrivateKey, **members: Any) -> dict[str, Any]:
    """Return the public key as a JWK."""
    forms: dict[type, Callable[..., Any]] = {
        rsa.RSAPrivateKey: RSAAlgorithm.to_jwk,
        ec.EllipticCurvePrivateKey: ECAlgorithm.to_jwk,
        ed25519.Ed25519PrivateKey: OKPAlgorithm.to_jwk,
    }
    (to_jwk,) = (form for kind, form in forms.items() if isinstance(key, kind))
    return {**to_jwk(key.public_key(), as_dict=True), **members}


def encoded(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def claims(**changes: Any) -> dict[str, Any]:
    """Return the claims of a token that is valid for a minute; None removes one."""
    now = int(time.time())
    all_claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "iat": now,
        "exp": now + 60,
        "scope": "openid ticker:read",
        **changes,
    }
    return {name: value for name, value in all_claims.items() if value is not None}


def token(algorithm: str = "ES256", kid: str | None = "", headers: dict[str, Any] | None = None, **changes: Any) -> str:
    """Return a token signed by the key of its algorithm, whose id is that of the algorithm unless `kid` is another."""
    ids = {} if kid is None else {"kid": kid or algorithm}
    return jwt.encode(claims(**changes), private_key(algorithm), algorithm, headers={**ids, **(headers or {})})


def key_set(*algorithms: str) -> bytes:
    """Return the JWKS of the keys of algorithms."""
    return json.dumps({"keys": [jwk(private_key(one), kid=one, use="sig", alg=one) for one in algorithms]}).encode()


class IdentityProvider:
    """The server of the keys: what it responds with can be replaced, and its requests are listed."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.status = 200
        self.body = key_set("RS256", "ES256", "EdDSA")
        self.headers: dict[str, str] = {"Content-Type": "application/json"}
        self.paths: list[str] = []
        """The path of each request so far."""
        self.may_respond = threading.Event()
        """Requests wait for it."""
        self.may_respond.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.paths.append(self.path)
                provider.may_respond.wait(20)
                self.send_response(provider.status)
                for name, value in {**provider.headers, "Content-Length": str(len(provider.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(provider.body)
                except ConnectionError:  # the body was too large, or came too late
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.origin = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_port}"
        self.url = f"{self.origin}/jwks.json"

    @contextmanager
    def running(self) -> Iterator["IdentityProvider"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.may_respond.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def table(self, **keys: Any) -> str:
        """Return the table of the configuration that lets its tokens in."""
        values = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": self.url, **keys}
        return "[auth.jwt]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
