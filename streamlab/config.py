"""The configuration: config.toml and `STREAMLAB_*` variables as frozen models, or an error with file and key."""

import copy
import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from aiohttp import web
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .auth import Scope, without_tokens

PREFIX = "STREAMLAB_"

URL_VARIABLE = "STREAMLAB_URL"
"""The variable with the default of `--url`: it is read by clients, and is no part of the configuration."""

TOKEN_VARIABLE = "STREAMLAB_TOKEN"  # noqa: S105 - is a name
"""The variable with the token that clients send to the server at `--url`; no part of the configuration either."""

_Model = TypeVar("_Model", bound=BaseModel)


def _relative_to_config(path: Path, info: ValidationInfo) -> Path:
    base: Path = (info.context or {}).get("base", Path.cwd())
    return base / path.expanduser()


ConfigPath = Annotated[Path, AfterValidator(_relative_to_config)]
"""A path in the configuration; a relative one is relative to the folder of config.toml."""


class Table(BaseModel):
    """A table of config.toml: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def _host_pattern(text: str) -> str:
    """Reject what no Host can match: a URL, a port, a path."""
    with suppress(ValueError):
        ipaddress.IPv6Address(text)
        return text
    if re.fullmatch(r"[A-Za-z0-9._*?-]*[A-Za-z0-9_*?-]", text):
        return text
    name = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://|[/?#].*$", "", text)
    name = re.sub(r"(:[0-9]*|\.)$", "", name).strip("[]")
    hint = f"; did you mean {name!r}?" if re.fullmatch(r"[A-Za-z0-9._*:-]+", name) else ""
    raise ValueError(f"must be a host name, without a scheme, a port or a path{hint}")


SOCKET_PREFIX = "unix:"
"""The beginning of a `host` that is a Unix socket, before its path; in `trusted_proxies`, who connects to that."""


def _network(text: str) -> str:
    """Reject what is not a network, such as a host name."""
    return text if text == SOCKET_PREFIX else str(ipaddress.ip_network(text))


MAX_WORKERS = 128
"""Maximum number of workers of a server."""


def _workers(value: Any) -> Any:
    """Read a number that a variable or an option gives as text, and reject what is not a number of workers."""
    if value == "auto":
        return value
    number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}", value) else value
    if type(number) is not int or not 1 <= number <= MAX_WORKERS:
        raise ValueError(f'must be a number from 1 to {MAX_WORKERS}, or "auto": the number of usable processors')
    return number


def _host(text: str, info: ValidationInfo) -> str:
    if not text.startswith(SOCKET_PREFIX):
        return text
    if not (path := text.removeprefix(SOCKET_PREFIX)):
        raise ValueError("needs a path, as unix:/run/streamlab.sock")
    return f"{SOCKET_PREFIX}{_relative_to_config(Path(path), info)}"


class Server(Table):
    """`[server]`: address, TLS, timeouts, limits and logs."""

    host: Annotated[str, AfterValidator(_host)] = "127.0.0.1"
    """The address to listen on, or `unix:PATH` for a Unix socket; by default only local clients can connect."""
    port: int = Field(8000, ge=0, le=65535)
    """The TCP port; 0 is any free one."""
    workers: Annotated[int | Literal["auto"], BeforeValidator(_workers)] = 1
    """The number of processes that serve, at most 128; "auto": as many as there are usable processors."""
    drain_seconds: float = Field(5.0, ge=0, le=3600)
    """Maximum time for downloads and exports to end after SIGTERM, in seconds; event streams end at once."""
    hang_seconds: float = Field(30.0, ge=3, le=3600)
    """Maximum time for which a worker of several may hang, in seconds; then it is killed, and replaced."""
    start_seconds: float = Field(30.0, ge=0.1, le=3600)
    """Maximum time for a plugin to start, in seconds; after it the plugin is out of service, and the others serve."""
    stall_seconds: float = Field(120.0, ge=1, le=3600)
    """Maximum time that a client reads nothing or is unreachable, in seconds; then its connection is closed."""
    max_streams: int = Field(10_000, ge=1)
    """Maximum number of open streams; one more gets 503 with Retry-After."""
    allowed_hosts: tuple[Annotated[str, AfterValidator(_host_pattern)], ...] = ()
    """Allowed names in Host (`*.example.org` too). Empty: local names on loopback, any name on other addresses."""
    trusted_proxies: tuple[Annotated[str, AfterValidator(_network)], ...] = ()
    """Networks of proxies whose X-Forwarded-For, -Proto, -Host, -Prefix are believed; "unix:": at a Unix socket."""
    tls_certificate: ConfigPath | None = None
    """A PEM file with the certificate chain; with `tls_key`, the server uses HTTPS."""
    tls_key: ConfigPath | None = None
    """The PEM file with the certificate's private key."""
    log_format: Literal["text", "json"] = "text"
    """The format of log lines."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The lowest level of log lines that are written."""
    log_file: Annotated[ConfigPath | None, BeforeValidator(lambda value: value or None)] = Path("var/log/streamlab.log")
    """A file for log lines in addition to stderr, rotated at 10 MB, with five old files; "" for none."""

    @model_validator(mode="after")
    def _tls_needs_both(self) -> "Server":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both tls_certificate and tls_key")
        if self.socket is not None and self.tls_certificate is not None:
            raise ValueError("a Unix socket has no TLS: remove tls_certificate and tls_key, or use another host")
        return self

    @property
    def processes(self) -> int:
        """Return the number of processes that serve."""
        if self.workers != "auto":
            return self.workers
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(usable, MAX_WORKERS)

    @property
    def socket(self) -> Path | None:
        """Return the path of the Unix socket to listen on; None for TCP."""
        is_socket = self.host.startswith(SOCKET_PREFIX)
        return Path(self.host.removeprefix(SOCKET_PREFIX)) if is_socket else None


def _scope(text: str) -> str:
    Scope.parse(text)
    return text


AllowedScope = Annotated[str, AfterValidator(_scope)]
"""A scope `SCENARIO:ACTION[:RESOURCE]`."""


def _aware(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("must have a time zone, as 2027-01-31T00:00:00Z")
    return moment


class TokenSettings(Table):
    """`[auth.tokens.NAME]`: a token, by its hash; `streamlab token NAME` prints a new one with its lines."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """The SHA-256 of the token, 64 hexadecimal digits."""
    allow: tuple[AllowedScope, ...]
    """The scopes of the token."""
    expires: Annotated[datetime, AfterValidator(_aware)] | None = None
    """The time from which it is invalid, as 2027-01-31T00:00:00Z; by default it is valid until it is removed."""


ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures of JWTs that can be allowed: those whose verifier cannot sign (RFC 7518, section 3.1; RFC 8037)."""


def _algorithm(name: str) -> str:
    if name not in ALGORITHMS:
        reason = "; HMAC verifies with the key that signs, and none has no signature"
        raise ValueError(f"must be one of {', '.join(ALGORITHMS)}{reason * name.lower().startswith(('hs', 'none'))}")
    return name


def _any_algorithm(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("must name at least one")
    return names


class JwtSettings(Table):
    """`[auth.jwt]`: tokens of an identity provider, as signed JWTs; needs the extra `streamlab[jwt]`."""

    issuer: str = Field(min_length=1)
    """The identity provider, exactly as `iss` of its tokens names it."""
    audience: str = Field(min_length=1)
    """The name of this server in `aud` of the tokens: those for other servers are rejected."""
    jwks_url: str | None = None
    """The URL of the keys of the provider (JWKS); https, except on this machine. Either this or `public_key`."""
    public_key: ConfigPath | None = None
    """A PEM file with the public key of a provider that has only one."""
    algorithms: Annotated[tuple[Annotated[str, AfterValidator(_algorithm)], ...], AfterValidator(_any_algorithm)] = (
        "RS256",
        "ES256",
        "EdDSA",
    )
    """The allowed signatures: RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, ES512, EdDSA."""
    scope_claim: str = Field("scope", min_length=1)
    """The claim with the scopes: a text with spaces between them, or a list. Those of other servers are ignored."""
    leeway_seconds: float = Field(10.0, ge=0, le=300)
    """Time by which `nbf` and `iat` may be ahead of the clock of this machine, in seconds; `exp` is exact."""

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> "JwtSettings":
        if (self.jwks_url is None) == (self.public_key is None):
            raise ValueError("needs the keys of the provider: either jwks_url or public_key")
        return self


class Auth(Table):
    """`[auth]`: who may do what."""

    open: bool | None = None
    """Whether everybody may do everything. By default that is so only without tokens, on a loopback address."""
    anonymous: tuple[AllowedScope, ...] = ()
    """The scopes of requests without credentials."""
    tokens: Mapping[str, TokenSettings] = {}
    """The tokens by name, which is the name of the principal."""
    jwt: JwtSettings | None = None
    """Tokens of an identity provider; without this table there are none."""
    session_hours: float = Field(12.0, gt=0, le=366 * 24)
    """Maximum time for which a browser is signed in, and may repeat a request that a ticket has let in, in hours."""

    @field_validator("tokens", mode="after")
    @classmethod
    def _names(cls, tokens: Mapping[str, TokenSettings]) -> Mapping[str, TokenSettings]:
        for name in tokens:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name):
                raise ValueError(f"{name!r} is no name: 1 to 64 letters, digits and . _ @ -")
        owners: dict[str, str] = {}
        for name, token in tokens.items():
            if (owner := owners.setdefault(token.sha256, name)) != name:
                raise ValueError(f"{owner} and {name} have the same sha256: one token cannot be that of two principals")
        return tokens

    @model_validator(mode="after")
    def _open_needs_no_tokens(self) -> "Auth":
        if self.open and self.restricts:
            raise ValueError("open = true lets everybody do everything: remove it, or tokens, jwt and anonymous")
        return self

    @property
    def restricts(self) -> bool:
        """Return whether there is anything that says who may do what."""
        return bool(self.tokens or self.jwt or self.anonymous) or self.open is False


def _origin(text: str) -> str:
    """Reject what no browser sends as Origin: a path, a name without a scheme."""
    if text == "*" or re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?", text):
        return text.lower()
    raise ValueError("must be an origin, as https://app.example.org, without a path; or *")


class Cors(Table):
    """`[cors]`: which pages of other origins may use the server."""

    origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    """Origins of pages that may read responses, as https://app.example.org; "*" is every origin."""
    credentials: bool = False
    """Whether these pages may send cookies; not together with "*"."""

    @model_validator(mode="after")
    def _credentials_need_origins(self) -> "Cors":
        if self.credentials and "*" in self.origins:
            raise ValueError('credentials = true needs origins by name: "*" would let every page act for its user')
        return self


class Limits(Table):
    """`[limits]`: what one client may use; one with credentials is counted by its name, others by their address."""

    streams_per_client: int = Field(100, ge=0)
    """Maximum number of open streams of one client; one more gets 429 with Retry-After. 0: no limit."""
    connections_per_client: int = Field(1000, ge=0)
    """Maximum number of open connections of one address; one more is closed at once. 0: no limit."""
    requests_per_minute: int = Field(0, ge=0)
    """Maximum number of requests of one client in a minute; one more gets 429 with Retry-After. 0: no limit."""

    @property
    def limits_proxies(self) -> bool:
        """Return whether streams of clients that may be proxies are limited, too: only where the limit is given."""
        return "streams_per_client" in self.model_fields_set


class Plugins(Table):
    """`[plugins]`: folders of plugins in addition to the built-in and the installed ones."""

    path: tuple[ConfigPath, ...] = (Path("plugins"),)
    """Folders whose Python files are plugins; one that does not exist is ignored, with a warning."""


def _event_log_url(url: str, info: ValidationInfo) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("sqlite", "redis", "rediss", "unix"):
        raise ValueError("must begin with sqlite://, redis://, rediss:// or unix://")
    if scheme != "sqlite" or not rest:
        return url
    if not rest.startswith("/") or len(rest) < 2:
        raise ValueError("the URL of a file is sqlite:///relative/path.db or sqlite:////absolute/path.db")
    return f"sqlite:///{_relative_to_config(Path(rest[1:]), info)}"


class EventSettings(Table):
    """`[events]`: where events are stored, and for how long."""

    url: Annotated[str, AfterValidator(_event_log_url)] = "sqlite:///var/streamlab.db"
    """The event log: a file for one machine, `redis://host:port/0` for several, `sqlite://` for memory."""
    durability: Literal["process", "machine"] = "process"
    """What a stored event survives: `kill -9` of the server, or also a power failure (commits wait for the disk)."""
    keep_events: int = Field(10_000, ge=1, le=10_000_000)
    """Maximum number of events of a channel that are stored for clients that resume."""
    keep_seconds: float = Field(86_400.0, ge=1, le=366 * 86_400)
    """Maximum age of a stored event, in seconds."""
    max_filters: int = Field(100, ge=1, le=10_000)
    """Maximum number of distinct filters (as `grep` of a log) of one channel; one more gets 429 with Retry-After."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the configuration: where it is, the value, and why it is invalid."""

    source: str
    """The file, or the environment variable."""
    key: str
    """The TOML key path, as `server.port`; empty for a fault of the whole file."""
    reason: str
    value: str = ""

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.key}{f' = {self.value}' if self.value else ''}{' - ' * bool(self.key)}{self.reason}"
        )


class ConfigError(Exception):
    """The configuration is invalid; `faults` has everything that is wrong with it."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(map(str, self.faults)))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown `word`: the most similar known name, or all of them."""
    names = sorted(known)
    similar = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if similar:
        return f"did you mean {similar[0]!r}?"
    return f"known: {', '.join(names)}" if names else "there are none"


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration. The tables in `scenarios` are raw: the registry decodes each into its scenario.

    `faults` are those found so far; the registry adds those of the scenarios and raises all of them together.
    """

    server: Server
    auth: Auth
    cors: Cors
    limits: Limits
    events: EventSettings
    plugins: Plugins
    scenarios: Mapping[str, Mapping[str, Any]]
    base: Path
    """The folder that relative paths are relative to."""
    source: str
    """The file's name, for messages."""
    variables: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """The environment variable, or option of the command line, by the key path that it sets."""
    faults: tuple[Fault, ...] = ()

    @classmethod
    def read(cls, path: Path | None, environ: Mapping[str, str] = os.environ) -> "Config":
        """Read a TOML file and override it by `STREAMLAB_*` variables; without a file, all values are defaults.

        Raises ConfigError when the file cannot be read or is not TOML; every other fault is in `faults`.
        """
        if path is None:
            return cls.of({}, source="defaults", environ=environ)
        return cls.parse(Source.read(path, {}).text, path, environ)

    @classmethod
    def parse(cls, text: str, path: Path, environ: Mapping[str, str] = os.environ) -> "Config":
        """Return the configuration of a TOML file that has been read, as `read` does."""
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError([Fault(str(path), "", str(error))]) from None
        return cls.of(tables, base=path.absolute().parent, source=str(path), environ=environ)

    @classmethod
    def of(
        cls,
        tables: Mapping[str, Any],
        *,
        base: Path | None = None,
        source: str = "config",
        environ: Mapping[str, str] | None = None,
    ) -> "Config":
        """Return the configuration of tables in memory, for embedding applications and tests."""
        base = base or Path.cwd()
        merged: dict[str, Any] = copy.deepcopy(dict(tables))
        variables, faults = _apply_variables(merged, environ or {})
        context = {"base": base}
        default_events = EventSettings.model_validate({}, context=context)
        default_plugins = Plugins.model_validate({}, context=context)
        defaults = cls(Server(), Auth(), Cors(), Limits(), default_events, default_plugins, {}, base, source, variables)
        known = ("server", "auth", "cors", "limits", "events", "plugins", "scenarios")
        unknown = set(merged) - set(known)
        faults += [
            defaults.fault((name,), f"unknown table; {nearest(name, known)}", merged[name]) for name in sorted(unknown)
        ]
        server, server_faults = defaults.decode(Server, merged.get("server", {}), "server")
        auth, auth_faults = defaults.decode(Auth, merged.get("auth", {}), "auth")
        cors, cors_faults = defaults.decode(Cors, merged.get("cors", {}), "cors")
        limits, limits_faults = defaults.decode(Limits, merged.get("limits", {}), "limits")
        events, events_faults = defaults.decode(EventSettings, merged.get("events", {}), "events")
        plugins, plugins_faults = defaults.decode(Plugins, merged.get("plugins", {}), "plugins")
        scenarios = merged.get("scenarios", {})
        if not isinstance(scenarios, dict):
            faults.append(defaults.fault(("scenarios",), "must be a table", scenarios))
            scenarios = {}
        for name in [name for name, table in scenarios.items() if not isinstance(table, dict)]:
            faults.append(defaults.fault(("scenarios", name), "must be a table", scenarios.pop(name)))
        return cls(
            server=server or defaults.server,
            auth=auth or Auth(open=False),
            cors=cors or defaults.cors,
            limits=limits or defaults.limits,
            events=events or defaults.events,
            plugins=plugins or defaults.plugins,
            scenarios=scenarios,
            base=base,
            source=source,
            variables=variables,
            faults=(
                *faults,
                *server_faults,
                *auth_faults,
                *cors_faults,
                *limits_faults,
                *events_faults,
                *plugins_faults,
            ),
        )

    def decode(self, model: type[_Model], table: Any, *key: str) -> tuple[_Model | None, list[Fault]]:
        """Decode the table at `key` into its model; return it, or None and everything that is wrong with it."""
        faults = [
            self.fault((*key, name), "must be a number", value)  # pydantic would take true for 1
            for name, value in (table.items() if isinstance(table, dict) else ())
            if isinstance(value, bool) and name in model.model_fields
            if _without_none(model.model_fields[name].annotation) in (int, float)
        ]
        if faults:
            return None, faults
        try:
            return model.model_validate(table, context={"base": self.base}, extra="forbid"), []
        except ValidationError as error:
            return None, [self._explain(model, key, detail) for detail in error.errors(include_url=False)]

    def fault(self, key: tuple[str, ...], reason: str, value: Any = None) -> Fault:
        """Return a fault at a key path, with the variable that set it, if one did; only a path is never shortened."""
        shown = "" if value is None or isinstance(value, dict) else without_tokens(json.dumps(value, default=str))
        # The variable that set this key or a table around it; for a table, one that set a key in it.
        origins = [self.variables.get(key[:length]) for length in range(len(key), 0, -1)]
        origins += [variable for known, variable in self.variables.items() if known[: len(key)] == key]
        return Fault(
            source=next(filter(None, origins), self.source),
            key=".".join(key),
            reason=without_tokens(reason),
            value=shown if len(shown) <= 80 or isinstance(value, Path) else shown[:77] + "...",
        )

    def _explain(self, model: type[BaseModel], key: tuple[str, ...], detail: Any) -> Fault:
        location = tuple(str(part) for part in detail["loc"])
        reason = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            reason = f"unknown key; {nearest(location[-1], _keys_at(model, location[:-1]))}"
        elif detail["type"] == "missing":
            return self.fault((*key, *location), "is required")
        return self.fault((*key, *location), reason, detail["input"])


def _keys_at(model: Any, location: tuple[str, ...]) -> list[str]:
    """Return the keys that a model has at a location inside it, through nested models, lists and mappings."""
    for part in location:
        model = _without_none(model)
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation if part in model.model_fields else None
        else:
            model = next(iter(reversed(get_args(model))), None)
    model = _without_none(model)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


class Source(NamedTuple):
    """What a configuration is made from: a file as it was read, and options of the command line."""

    path: Path | None
    """None for the defaults."""
    text: str = ""
    options: Mapping[str, Any] = {}
    """Keys of `[server]`, in place of those of the file and of the variables."""

    @classmethod
    def read(cls, path: Path | None, options: Mapping[str, Any]) -> "Source":
        """Read a file; raises ConfigError where that is impossible. Options that are None are not given."""
        options = {name: value for name, value in options.items() if value is not None}
        try:
            return cls(path, "" if path is None else path.read_text(encoding="utf-8"), options)
        except OSError as error:
            raise ConfigError([Fault(str(path), "", error.strerror or "cannot be read")]) from None
        except UnicodeDecodeError as error:
            raise ConfigError([Fault(str(path), "", str(error))]) from None

    def config(self) -> Config:
        """Return the configuration; raises ConfigError when the text is not TOML, every other fault is in `faults`."""
        config = Config.parse(self.text, self.path) if self.path is not None else Config.read(None)
        if not self.options:
            return config
        keys: dict[tuple[str, ...], str] = {("server", name): f"--{name}" for name in self.options}
        config = replace(config, variables={**config.variables, **keys})
        given: dict[str, Any] = config.server.model_dump(exclude_unset=True)
        server, faults = config.decode(Server, given | dict(self.options), "server")
        return replace(config, server=server or config.server, faults=(*config.faults, *faults))


CONFIG = web.AppKey("config", Config)
"""Key of the application: the configuration as read, with `base`, the folder of config.toml."""


def _without_none(annotation: Any) -> Any:
    """Return `X` for `X | None`, and anything else unchanged."""
    choices = [choice for choice in get_args(annotation) if choice is not type(None)]
    return choices[0] if len(choices) == 1 and type(None) in get_args(annotation) else annotation


def _apply_variables(
    tables: dict[str, Any], environ: Mapping[str, str]
) -> tuple[dict[tuple[str, ...], str], list[Fault]]:
    """Set the keys of variables as `STREAMLAB_SERVER__PORT=8001`; a value that begins with [ or { is read as TOML."""
    variables: dict[tuple[str, ...], str] = {}
    faults: list[Fault] = []
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable in (URL_VARIABLE, TOKEN_VARIABLE):
            continue
        *parents, last = key = tuple(variable.removeprefix(PREFIX).lower().split("__"))
        value: Any = environ[variable]
        if value[:1] in ("[", "{"):
            try:
                value = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError as error:
                faults.append(Fault(variable, ".".join(key), f"is not a TOML value: {error}"))
                continue
        table = tables
        for name in parents:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                faults.append(Fault(variable, ".".join(key), f"{name} is not a table"))
                break
        else:
            table[last] = value
            variables[key] = variable
    return variables, faults
