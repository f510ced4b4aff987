"""Tokens of an identity provider: which JWTs are let in, where their keys come from, and when they end."""

import asyncio
import hashlib
import hmac
import json
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp.test_utils import make_mocked_request
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from streamlab.auth import Principal
from streamlab.config import Config, ConfigError
from streamlab.problems import Problem
from streamlab.server import signing_keys
from streamlab.server.app import create_app
from streamlab.server.authorization import Authorization
from streamlab.server.signing_keys import SigningKeys
from tests.support.connections import EventStream
from tests.support.identity_provider import (
    AUDIENCE,
    ISSUER,
    IdentityProvider,
    claims,
    encoded,
    jwk,
    key_set,
    pem,
    private_key,
    token,
)
from tests.support.servers import WITHOUT_MODEL, Running, disabled, run_streamlab, starting_in

Start = Callable[..., Running]

LOADED_PLUGINS = {"ticker"}

IMPORTS = ("streamlab.server.json_web_tokens",)

TICKER = "/stream/stock-ticker?limit=1"

WHO = """
    from aiohttp import web

    from streamlab import PRINCIPAL, Scenario, endpoint, hookimpl


    class Who(Scenario):
        @endpoint("GET", "/who")
        async def who(self, request: web.Request) -> web.Response:
            "Return who sent the request, and the scopes."
            principal = request[PRINCIPAL]
            return web.json_response([principal.name, *map(str, principal.scopes)])


    @hookimpl
    def register_scenarios():
        return [Who]
"""


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def forged(header: dict[str, Any], sign: Callable[[bytes], bytes] = lambda _: b"", **changes: Any) -> str:
    """Return a token that no library would make."""
    parts = (json.dumps(header).encode(), json.dumps(claims(**changes)).encode())
    signed = ".".join(map(encoded, parts))
    return f"{signed}.{encoded(sign(signed.encode()))}"


def hmac_signed(secret: bytes) -> str:
    header = {"alg": "HS256", "typ": "JWT", "kid": "RS256"}
    return forged(header, lambda signed: hmac.digest(secret, signed, hashlib.sha256))


def eddsa(name: str = "") -> Callable[[bytes], bytes]:
    """Return what signs with a key of the provider, or with another one."""
    key = private_key("EdDSA", name)
    assert isinstance(key, Ed25519PrivateKey)
    return key.sign


@pytest.fixture(scope="module")
def provider() -> Iterator[IdentityProvider]:
    with IdentityProvider().running() as running:
        yield running


@pytest.fixture(scope="module")
def server(provider: IdentityProvider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with starting_in(tmp_path_factory.mktemp("jwt"), LOADED_PLUGINS) as start:
        yield start(f'[auth]\nanonymous = ["who:read"]\n{provider.table()}', imports=IMPORTS, who=WHO)


# -- which tokens are let in


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_token_of_the_provider_is_a_principal_with_its_scopes(server: Running, algorithm: str) -> None:
    status, _, body = server.get("/who", bearer(token(algorithm)))
    assert (status, json.loads(body)) == (200, ["jwt:alice", "ticker:read", "who:read"])
    assert server.get(TICKER, bearer(token(algorithm)))[0] == 200
    assert "principal=jwt:alice" in server.wait_for_log("principal=jwt:alice")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (["ticker:read", "who:read:two words", "profile", 7], ["ticker:read", "who:read:two words"]),
        ("email ticker:* who:list :read", ["ticker:*"]),
        ("", []),
        (None, []),
        (7, []),
    ],
)
def test_scopes_are_a_text_or_a_list_and_those_of_other_servers_are_ignored(
    server: Running, scope: Any, expected: list[str]
) -> None:
    assert json.loads(server.get("/who", bearer(token(scope=scope)))[2]) == ["jwt:alice", *expected, "who:read"]
    if not expected:
        status, headers, body = server.get(TICKER, bearer(token(scope=scope)))
        assert (status, json.loads(body)["detail"]) == (403, "jwt:alice needs the scope ticker:read for this.")
        assert 'error="insufficient_scope", scope="ticker:read"' in headers["www-authenticate"]


@pytest.mark.parametrize("kind", ["JWT", "at+jwt", "application/at+JWT"])
def test_a_type_of_access_tokens_is_let_in(server: Running, kind: str) -> None:
    assert server.get(TICKER, bearer(token(headers={"typ": kind})))[0] == 200


def test_one_of_several_audiences_suffices(server: Running) -> None:
    assert server.get(TICKER, bearer(token(aud=["other", AUDIENCE])))[0] == 200


FORGED: dict[str, Callable[[], str]] = {
    "no signature (none)": lambda: forged({"alg": "none", "kid": "RS256"}),
    "no signature (None)": lambda: forged({"alg": "None", "kid": "RS256"}),
    "no signature at all": lambda: token("RS256").rpartition(".")[0] + ".",
    "no algorithm": lambda: forged({"kid": "RS256"}),
    "a list as algorithm": lambda: forged({"alg": ["RS256"], "kid": "RS256"}),
    "HMAC with the PEM": lambda: hmac_signed(pem(private_key("RS256"))),
    "HMAC with the JWK": lambda: hmac_signed(json.dumps(jwk(private_key("RS256"), kid="RS256")).encode()),
    "HMAC with the JWK as published": lambda: hmac_signed(
        json.dumps(jwk(private_key("RS256"), kid="RS256", use="sig", alg="RS256")).encode()
    ),
    "HMAC with nothing": lambda: hmac_signed(b""),
    "an algorithm that is not allowed": lambda: token("PS256", "RS256"),
    "an unknown key": lambda: token(kid="unknown"),
    "no key id": lambda: token(kid=None),
    "a number as key id": lambda: forged({"alg": "RS256", "kid": 7}),
    "the key id of another family": lambda: token("RS256", "ES256"),
    "the key id of another key": lambda: token("ES256", "RS256"),
    "RS256 declared with an EC key": lambda: forged({"alg": "RS256", "kid": "ES256"}, lambda _: b"x" * 256),
    "another's key": lambda: forged({"alg": "EdDSA", "kid": "EdDSA"}, eddsa("attacker")),
    "a critical parameter": lambda: token(headers={"crit": ["exp"], "exp": 1}),
    "a critical parameter that the library knows": lambda: forged(
        {"alg": "EdDSA", "kid": "EdDSA", "b64": True, "crit": ["b64"]}, eddsa()
    ),
    "an unencoded payload": lambda: forged({"alg": "ES256", "kid": "ES256", "b64": False, "crit": ["b64"]}),
    "another type": lambda: token(headers={"typ": "logout+jwt"}),
    "no type of text": lambda: token(headers={"typ": ["JWT"]}),
    "changed claims": lambda: ".".join(
        [token().split(".")[0], encoded(json.dumps(claims(sub="admin")).encode()), token().split(".")[2]]
    ),
    "no header": lambda: f"{encoded(b'[]')}.{encoded(b'{}')}.{encoded(b'x')}",
    "no JSON": lambda: "a.b.c",
    "dots": lambda: "..",
    "deep JSON": lambda: f"{encoded(b'[' * 2500)}.{encoded(b'{}')}.",
    "a subject with a space": lambda: token(sub="alice bob"),
    "a subject with a line break": lambda: token(sub="alice\nprincipal=root"),
    "a subject beyond ASCII": lambda: token(sub="al\u0456ce"),
    "an empty subject": lambda: token(sub=""),
    "a long subject": lambda: token(sub="a" * 256),
    "a number as subject": lambda: forged({"alg": "EdDSA", "kid": "EdDSA"}, eddsa(), sub=7),
    "a text as expiry": lambda: token(exp=str(int(time.time()) + 60)),
    "no number as expiry": lambda: token(exp=float("nan")),
    "an infinite expiry": lambda: token(exp=float("inf")),
}


@pytest.mark.parametrize("attack", FORGED)
def test_a_forged_token_is_rejected_without_a_reason(server: Running, attack: str) -> None:
    status, headers, body = server.get(TICKER, bearer(FORGED[attack]()))
    assert (status, json.loads(body)["detail"]) == (401, "This token is not known here.")
    assert headers["www-authenticate"] == 'Bearer realm="streamlab", error="invalid_token"'


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"exp": -1}, "This token has expired."),
        ({"exp": -1_000_000_000}, "This token has expired."),
        ({"nbf": 30}, "This token is not valid yet."),
        ({"iat": 30}, "This token is not valid yet."),
        ({"iss": "https://id.example.org"}, "This token is from another issuer."),
        ({"iss": "https://evil.example/"}, "This token is from another issuer."),
        ({"aud": "another"}, "This token is for another audience."),
        ({"aud": ["another"]}, "This token is for another audience."),
        ({"aud": "streamlab2"}, "This token is for another audience."),
        *(({claim: None}, f"This token has no claim {claim}.") for claim in ("exp", "sub", "iss", "aud")),
    ],
)
def test_a_token_with_a_valid_signature_is_rejected_with_the_reason(
    server: Running, changes: dict[str, Any], detail: str
) -> None:
    now = int(time.time())
    changes = {name: now + value if isinstance(value, int) else value for name, value in changes.items()}
    status, headers, body = server.get(TICKER, bearer(token(**changes)))
    assert (status, json.loads(body)["detail"]) == (401, detail)
    assert headers["www-authenticate"] == 'Bearer realm="streamlab", error="invalid_token"'


def test_the_clock_of_the_provider_may_be_ahead(server: Running) -> None:
    begin = int(time.time()) + 6
    assert server.get(TICKER, bearer(token(iat=begin, nbf=begin)))[0] == 200


def test_a_token_longer_than_the_limit_is_rejected_unread(server: Running) -> None:
    long = token(extra="x" * 4000)
    status, headers, body = server.get(TICKER, bearer(long))
    assert (status, json.loads(body)["detail"]) == (
        401,
        "The field Authorization must be: Bearer TOKEN, of at most 4096 characters.",
    )
    assert headers["www-authenticate"] == 'Bearer realm="streamlab", error="invalid_request"'


def test_keys_and_addresses_in_a_token_are_ignored(server: Running, provider: IdentityProvider) -> None:
    attacker = private_key("EdDSA", "attacker")
    before = list(provider.paths)
    for headers in (
        {"jwk": jwk(attacker, kid="EdDSA")},
        {"jku": f"{provider.origin}/evil.json"},
        {"x5u": f"{provider.origin}/evil.pem"},
        {"x5c": [encoded(pem(attacker))]},
    ):
        for kid in ("EdDSA", "evil"):
            evil = forged({"alg": "EdDSA", "kid": kid, **headers}, eddsa("attacker"))
            assert server.get(TICKER, bearer(evil))[0] == 401
    assert set(provider.paths[len(before) :]) <= {"/jwks.json"}


def test_unknown_keys_do_not_make_the_server_flood_the_provider(server: Running, provider: IdentityProvider) -> None:
    started, before = time.monotonic(), len(provider.paths)
    for number in range(50):
        assert server.get(TICKER, bearer(token(kid=f"unknown-{number}")))[0] == 401
    assert len(provider.paths) - before <= 1 + (time.monotonic() - started) / signing_keys.MIN_INTERVAL_SECONDS


def test_the_name_of_a_token_cannot_be_that_of_a_subject() -> None:
    allow = {"sha256": "0" * 64, "allow": ["*"]}
    (fault,) = Config.of({"auth": {"tokens": {"jwt:alice": allow}}}).faults
    assert "'jwt:alice' is no name" in str(fault)


# -- the keys of the provider


def quick(**seconds: float) -> str:
    """Return a plugin that shortens what the fetches of keys wait for."""
    lines = [f"signing_keys.{name} = {value}" for name, value in {"MIN_INTERVAL_SECONDS": 0.05, **seconds}.items()]
    return "\n".join(["from streamlab.server import signing_keys", *lines])


def test_a_server_without_keys_asks_its_clients_to_retry(start: Start) -> None:
    with IdentityProvider().running() as provider:
        provider.status, provider.body = 500, b"out of order"
        provider.may_respond.clear()
        server = start(f'{provider.table()}[auth]\nanonymous = ["site:read"]\n', imports=IMPORTS, quick=quick())
        assert "not fetched yet" in server.get("/health")[2].decode()
        provider.may_respond.set()
        status, headers, body = server.get(TICKER, bearer(token()))
        assert status == 503
        assert int(headers["retry-after"]) >= 0
        assert "The keys of the identity provider are not available" in json.loads(body)["detail"]
        assert server.get(TICKER)[0] == 401
        health = json.loads(server.get("/health")[2])
        assert (health["status"], health["jwt"]) == (
            "degraded",
            {"state": "degraded", "reason": f"{provider.url}: status 500"},
        )
        provider.status, provider.body = 200, key_set("ES256")
        server.wait_for_log("the keys of the identity provider are available again")
        assert server.get(TICKER, bearer(token()))[0] == 200
        assert server.get(TICKER, bearer(token(kid=None)))[0] == 200  # there is only one
        assert "jwt" not in json.loads(server.get("/health")[2])
    assert server.log.count("the keys of the identity provider are not available") == 1


def test_keys_rotate_and_outlast_the_provider(start: Start) -> None:
    with IdentityProvider().running() as provider:
        provider.body = key_set("ES256")
        server = start(f'{provider.table()}[auth]\nanonymous = ["site:read"]\n', imports=IMPORTS, quick=quick())
        assert server.get(TICKER, bearer(token("ES256")))[0] == 200
        provider.body = key_set("ES256", "EdDSA")
        _wait_for(lambda: server.get(TICKER, bearer(token("EdDSA")))[0] == 200)
        provider.body = key_set("EdDSA")
        _wait_for(
            lambda: (
                server.get(TICKER, bearer(token("RS256")))[0] == 401
                and server.get(TICKER, bearer(token("ES256")))[0] == 401
            )
        )
    _wait_for(lambda: server.get(TICKER, bearer(token("RS256")))[0] == 503)
    assert server.get(TICKER, bearer(token("EdDSA")))[0] == 200
    assert json.loads(server.get("/health")[2])["status"] == "degraded"
    log = server.wait_for_log("not available, and those of the last fetch are used")
    assert log.count("are not available") == 1


def _wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline


def test_requests_share_one_fetch(start: Start) -> None:
    with IdentityProvider().running() as provider:
        provider.may_respond.clear()
        server = start(provider.table(), imports=IMPORTS)
        waiting = [
            server.send(f"GET {TICKER} HTTP/1.1\nHost: localhost:{{port}}\nAuthorization: Bearer {token()}")
            for _ in range(20)
        ]
        waiting.pop().close()  # its fetch goes on for the others
        _wait_for(lambda: len(provider.paths) == 1)
        provider.may_respond.set()
        for connection in waiting:
            with connection:
                assert connection.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
        assert provider.paths == ["/jwks.json"]


@asynccontextmanager
async def fetching(provider: IdentityProvider) -> AsyncIterator[SigningKeys]:
    keys = SigningKeys(url=provider.url, allowed=("ES256", "RS256"))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(keys.keep_current())
        with suppress(Problem):
            await keys.find("ES256", "ES256")
        yield keys
        task.cancel()


REDIRECT = "http://127.0.0.1:1/keys"

GOOD = jwk(private_key("ES256"), kid="ES256")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": 302, "headers": {"Location": REDIRECT}}, f"status 302, a redirect to {REDIRECT}"),
        ({"status": 404}, "status 404"),
        ({"body": b"{" * 100_000}, "is no JWKS: an object with a list `keys`"),
        ({"body": b"[]"}, "is no JWKS: an object with a list `keys`"),
        ({"body": b"\xff"}, "is no JWKS: an object with a list `keys`"),
        ({"body": b'{"keys": {}}'}, "is no JWKS: `keys` is not a list"),
        ({"body": json.dumps({"keys": [GOOD] * 101}).encode()}, "has 101 keys, more than 100"),
        ({"body": json.dumps({"keys": [GOOD], "x": "x" * 262_144}).encode()}, "is larger than 262144 bytes"),
        ({"headers": {"Content-Encoding": "gzip"}}, "has the Content-Encoding gzip, though identity was requested"),
        ({"body": b'{"keys": []}'}, "has no key for ES256, RS256"),
        ({"body": key_set("EdDSA")}, "has no key for ES256, RS256"),
    ],
)
async def test_what_cannot_be_used_as_keys_is_a_reason(
    provider: IdentityProvider, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setattr(provider, name, value)
    async with fetching(provider) as keys:
        assert keys.trouble == f"{provider.url}: {reason}"
        with pytest.raises(Problem, match="are not available") as caught:
            await keys.find("ES256", "ES256")
        assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "10"})


def test_the_certificate_of_the_provider_is_verified(start: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    with IdentityProvider(tls).running() as provider:
        for trusted, status in ((os.devnull, 503), (str(tmp_path / "ca.pem"), 200)):
            server = start(provider.table(), imports=IMPORTS, environ={"SSL_CERT_FILE": trusted})
            assert server.get(TICKER, bearer(token()))[0] == status
            if status == 503:
                assert "certificate verify failed" in server.wait_for_log("are not available")


async def test_a_slow_provider_is_waited_for_a_limited_time(
    provider: IdentityProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing_keys, "FETCH_SECONDS", 0.1)
    provider.may_respond.clear()
    try:
        async with fetching(provider) as keys:
            assert keys.trouble == f"{provider.url}: no complete response within 0.1 s"
    finally:
        provider.may_respond.set()


async def test_keys_are_fetched_again_when_they_are_old_and_do_not_outlast_a_day(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signing_keys, "MIN_INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(signing_keys, "MAX_AGE_SECONDS", 0.02)
    with IdentityProvider().running() as provider:
        async with fetching(provider) as keys:
            async with asyncio.timeout(10):
                while len(provider.paths) < 5:
                    await asyncio.sleep(0)
                provider.status = 500
                while not keys.trouble:
                    await asyncio.sleep(0)
            assert await keys.find("ES256", "ES256")
            monkeypatch.setattr(signing_keys, "MAX_STALE_SECONDS", 0.0)
            async with asyncio.timeout(10):
                before = len(provider.paths)
                while len(provider.paths) < before + 2:
                    await asyncio.sleep(0)
            with pytest.raises(Problem, match="are not available"):
                await keys.find("ES256", "ES256")


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "use": "enc"},
        {**GOOD, "key_ops": ["sign"]},
        {**GOOD, "key_ops": "verify"},
        {**GOOD, "kid": 7},
        {**GOOD, "alg": "ES384"},
        {**GOOD, "d": GOOD["x"]},
        {**GOOD, "x": 7},
        {**GOOD, "x": GOOD["y"]},
        {**GOOD, "crv": "P-384"},
        {**GOOD, "kty": ["EC"]},
        {"kty": "oct", "k": encoded(b"secret" * 8), "kid": "ES256", "alg": "HS256"},
        {"kty": "RSA", "n": encoded(b"\xff" * 128), "e": "AQAB", "kid": "ES256"},
        {"kty": "RSA", "n": "", "e": "", "kid": "ES256"},
        {},
        "ES256",
        None,
    ],
)
def test_keys_that_cannot_verify_are_ignored(entry: Any) -> None:
    body = json.dumps({"keys": [entry, jwk(private_key("RS256"), kid="RS256")]}).encode()
    assert [key.id for key in signing_keys.read_jwks(body, ("RS256", "ES256"))] == ["RS256"]


# -- the end of a token


def test_a_stream_ends_with_its_token(server: Running) -> None:
    expires = int(time.time()) + 2
    with EventStream(server, "/stream/stock-ticker", headers=bearer(token(exp=expires))) as stream:
        *_, last = stream
        ended = time.time()
    assert last.event == "unauthorized"
    assert 0 <= ended - expires < 1
    with EventStream(server, "/stream/stock-ticker?limit=1", last.id, headers=bearer(token())) as stream:
        assert stream.status == 200


def test_a_reload_ends_what_the_provider_may_not_let_in_any_more(
    start: Start, provider: IdentityProvider, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    server = start(f'[auth]\nanonymous = ["who:read"]\n{provider.table()}', imports=IMPORTS, who=WHO)

    def reload(text: str, line: str = "reloaded") -> None:
        reloads = server.log.count(line)
        config.write_text(text)
        server.process.send_signal(signal.SIGHUP)
        _wait_for(lambda: server.log.count(line) > reloads)

    with EventStream(server, "/stream/stock-ticker", headers=bearer(token())) as stream:
        stream.take(1)
        fetches = len(provider.paths)
        reload(provider.table(leeway_seconds=10.0))
        reload(provider.table(jwks_url="http://id.example.org/"), "the configuration is not reloaded")
        assert server.get("/who", bearer(token()))[0] == 403  # nobody has that scope any more
        assert all(event.event == "" for event in stream.take(2))
        assert len(provider.paths) == fetches  # the keys were kept
        reload(provider.table(audience="another"))
        assert list(stream)[-1].event == "unauthorized"
    assert server.get(TICKER, bearer(token()))[0] == 401
    assert server.get(TICKER, bearer(token(aud="another")))[0] == 200
    reload("[auth]\nopen = false\n")
    assert server.get(TICKER, bearer(token(aud="another")))[0] == 401


async def test_a_stored_principal_is_found_again_until_it_expires_or_the_provider_changes(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(pem(private_key("ES256")))
    table = {"issuer": ISSUER, "audience": AUDIENCE, "public_key": "key.pem"}

    def authorization(**changes: str) -> Authorization:
        tables = {"auth": {"jwt": {**table, **changes}, "anonymous": ["who:read"]}}
        return Authorization(Config.of(tables, base=tmp_path))

    request = make_mocked_request("GET", "/", headers=bearer(token(scope="ticker:read logs:read")))
    principal = await authorization().authenticate(request)
    stored = Principal(principal.name, (), principal.expires, principal.credential)
    found = authorization().current(stored)
    assert found == principal
    assert found.name == "jwt:alice"
    assert [str(scope) for scope in found.scopes] == ["ticker:read", "logs:read", "who:read"]
    assert authorization().current(Principal("jwt:alice", (), time.time() - 1, stored.credential)) is None
    assert authorization(audience="another").current(stored) is None
    assert authorization(issuer="another").current(stored) is None
    assert Authorization(Config.of({"auth": {"open": False}})).current(stored) is None
    (tmp_path / "key.pem").write_bytes(pem(private_key("ES256", "the next one")))
    assert authorization().current(stored) is None


def test_a_session_that_a_token_began_needs_neither_its_key_nor_its_server(start: Start, tmp_path: Path) -> None:
    with IdentityProvider().running() as provider:
        server = start(provider.table(), imports=IMPORTS, who=WHO)
        status, headers, _ = server.get("/auth/session", bearer(token(scope="who:read")), method="POST")
        assert status == 200
        cookie = {"Cookie": headers["set-cookie"].partition(";")[0]}
        server.terminate()
    for changes, expected in (({}, (200, b'["jwt:alice", "who:read"]')), ({"audience": "another"}, (401, None))):
        server = start(provider.table(**changes), imports=IMPORTS, who=WHO)
        status, _, body = server.get("/who", cookie)
        assert (status, body if status == 200 else None) == expected


# -- the configuration


def test_the_public_key_of_a_file_needs_no_ids(start: Start, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(pem(private_key("RS256")))
    server = start(
        f'[auth.jwt]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\npublic_key = "key.pem"\nscope_claim = "scp"\n',
        imports=IMPORTS,
    )
    assert server.get(TICKER, bearer(token("RS256", None, scp=["ticker:read"])))[0] == 200
    assert server.get(TICKER, bearer(token("RS256", "any", scp="ticker:read")))[0] == 200
    assert server.get(TICKER, bearer(token("RS256")))[0] == 403
    assert server.get(TICKER, bearer(token("ES256", scp="ticker:read")))[0] == 401
    assert server.get(TICKER, bearer(hmac_signed(pem(private_key("RS256")))))[0] == 401


SMALL = b"""\
-----BEGIN PUBLIC KEY-----
MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDlu6wt5DhLAkvvYbWTBe4qRPa8
B0Z0WZcKoGu4BxhcYAZrODbafS/l+v/46dqydbN6NmQbLXoIZKij13XypI4a9sMI
KSr37hPTwIk4xJF44EzQm69kdegI1EPo0M52Wb5zjMH0AQoOot30jLCf9jWrkSQn
b1CWa4BdyRo2JQJ8FQIDAQAB
-----END PUBLIC KEY-----
"""
"""A key of 1024 bits."""

URL = {"jwks_url": "https://id.example.org/jwks.json"}


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({}, "auth.jwt - needs the keys of the provider: either jwks_url or public_key"),
        ({**URL, "public_key": "key.pem"}, "auth.jwt - needs the keys of the provider: either jwks_url or public_key"),
        ({**URL, "algorithms": ["HS256"]}, 'auth.jwt.algorithms.0 = "HS256" - must be one of RS256, RS384, '),
        (
            {**URL, "algorithms": ["RS256", "none"]},
            "; HMAC verifies with the key that signs, and none has no signature",
        ),
        ({**URL, "algorithms": []}, "auth.jwt.algorithms = [] - must name at least one"),
        ({**URL, "issuer": ""}, 'auth.jwt.issuer = "" - String should have at least 1 character'),
        ({**URL, "leeway_seconds": 301}, "auth.jwt.leeway_seconds = 301 - Input should be less than or equal to 300"),
        ({**URL, "jwks": ""}, "auth.jwt.jwks = \"\" - unknown key; did you mean 'jwks_url'?"),
        (
            {"jwks_url": "http://id.example.org/"},
            "must begin with https://: over http, anybody on the way could replace",
        ),
        ({"jwks_url": "id.example.org/jwks.json"}, "must be a URL that begins with https://"),
        ({"jwks_url": "https://id example.org/"}, "of printable ASCII characters without spaces"),
        ({"jwks_url": "https://id..example.org/"}, "is no URL: "),
        ({"jwks_url": "https:///jwks.json"}, "must be a URL that begins with https://"),
        ({"jwks_url": "https://id.example.org:port/"}, "is no URL: Port could not be cast"),
        ({"jwks_url": "https://user:secret@id.example.org/"}, "must have no user, password or fragment"),
        ({"public_key": "missing.pem"}, 'missing.pem" - No such file or directory'),
        ({"public_key": "text.pem"}, "contains no valid public key in PEM format"),
        ({"public_key": "private.pem"}, "contains a private key, which no verifier should have"),
        ({"public_key": "small.pem"}, "contains no key for RS256, ES256, EdDSA; RSA keys must have 2048 bits or more"),
        ({"public_key": "ec.pem", "algorithms": ["RS256"]}, "contains no key for RS256; RSA keys must"),
    ],
)
def test_a_configuration_that_cannot_work_is_a_fault(keys: dict[str, Any], fault: str, tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("-----BEGIN PUBLIC KEY-----\nnone\n-----END PUBLIC KEY-----\n")
    (tmp_path / "private.pem").write_text("-----BEGIN PRIVATE KEY-----\nnone\n-----END PRIVATE KEY-----\n")
    (tmp_path / "small.pem").write_bytes(SMALL)
    (tmp_path / "ec.pem").write_bytes(pem(private_key("ES256")))
    jwt = {"issuer": ISSUER, "audience": AUDIENCE, **keys}
    with pytest.raises(ConfigError) as caught:
        create_app(Config.of({"auth": {"jwt": jwt}, "scenarios": disabled()}, base=tmp_path))
    (found,) = caught.value.faults
    assert fault in str(found)


def test_check_reports_what_cannot_work(tmp_path: Path) -> None:
    table = f'[auth.jwt]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\npublic_key = "missing.pem"\n'
    (tmp_path / "config.toml").write_text(table)
    status, _, errors = run_streamlab("check", cwd=tmp_path, **WITHOUT_MODEL)
    assert status == 2
    assert 'missing.pem" - No such file or directory' in errors


def test_it_needs_a_library_that_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "streamlab.server.json_web_tokens", raising=False)
    monkeypatch.setitem(sys.modules, "jwt", None)
    jwt = {"issuer": ISSUER, "audience": AUDIENCE, **URL}
    with pytest.raises(ConfigError, match=r"auth.jwt - needs the Python module .jwt.: pip install .streamlab\[jwt\]"):
        create_app(Config.of({"auth": {"jwt": jwt}, "scenarios": disabled()}))
