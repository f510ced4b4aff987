"""config.toml (and `STREAMLAB_*` variables) as frozen models, or an error naming file and key."""

import copy
import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from aiohttp import web
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

PREFIX = "STREAMLAB_"

_Model = TypeVar("_Model", bound=BaseModel)


def _beside_config(path: Path, info: ValidationInfo) -> Path:
    base: Path = (info.context or {}).get("base", Path.cwd())
    return base / path.expanduser()


ConfigPath = Annotated[Path, AfterValidator(_beside_config)]
"""A path in the configuration; a relative one starts at the folder of config.toml."""


class Table(BaseModel):
    """A table of config.toml: frozen once read, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Server(Table):
    """`[server]`: where to listen, how long to wait, how much to allow, what to write down."""

    host: str = "127.0.0.1"
    """The address to listen on. Loopback alone unless you say otherwise."""
    port: int = Field(8000, ge=0, le=65535)
    """The TCP port; 0 takes any free one."""
    drain_seconds: float = Field(5.0, ge=0, le=3600)
    """How long downloads and exports may go on after SIGTERM; event streams end at once."""
    start_seconds: float = Field(30.0, ge=0.1, le=3600)
    """Maximum time for a plugin to start, in seconds; beyond it the plugin is out of service, and the others serve."""
    stall_seconds: float = Field(120.0, ge=1, le=3600)
    """A client that takes nothing for so long, or has vanished without a word, is cut."""
    max_streams: int = Field(10_000, ge=1)
    """Streams open at once; one more is answered 503 with Retry-After."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names requests may ask for (`*.example.org` too). Empty: local names on loopback, any name elsewhere."""
    tls_certificate: ConfigPath | None = None
    """A PEM file with the certificate chain; with `tls_key`, the server speaks HTTPS."""
    tls_key: ConfigPath | None = None
    """The PEM file with the certificate's private key."""
    log_format: Literal["text", "json"] = "text"
    """How log lines are written."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least severity that is written."""
    log_file: Annotated[ConfigPath | None, BeforeValidator(lambda value: value or None)] = Path("var/log/streamlab.log")
    """Where log lines go besides stderr, rotated at 10 MB, five kept; "" for nowhere."""

    @model_validator(mode="after")
    def _tls_needs_both(self) -> "Server":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both tls_certificate and tls_key")
        return self


class Plugins(Table):
    """`[plugins]`: where scenarios come from besides those that ship and those that are installed."""

    path: tuple[ConfigPath, ...] = (Path("plugins"),)
    """Folders whose Python files are plugins; one that does not exist holds none."""


def _event_log_url(url: str, info: ValidationInfo) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("sqlite", "redis", "rediss", "unix"):
        raise ValueError("must begin with sqlite://, redis://, rediss:// or unix://")
    if scheme != "sqlite" or not rest:
        return url
    if not rest.startswith("/") or len(rest) < 2:
        raise ValueError("a file is named sqlite:///relative/path.db or sqlite:////absolute/path.db")
    return f"sqlite:///{_beside_config(Path(rest[1:]), info)}"


class EventLog(Table):
    """`[events]`: where events are kept, and for how long."""

    url: Annotated[str, AfterValidator(_event_log_url)] = "sqlite:///var/streamlab.db"
    """A file, shared by the processes of one machine; `redis://host:port/0` for many machines; `sqlite://`: memory."""
    keep_events: int = Field(10_000, ge=1, le=10_000_000)
    """How many events a channel keeps for clients that come back,"""
    keep_seconds: float = Field(86_400.0, ge=1, le=366 * 86_400)
    """and for how long at most."""
    max_filters: int = Field(100, ge=1, le=10_000)
    """Distinct filters (as `grep` of a log) on one channel at once; one more is answered 429 with Retry-After."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with the configuration: where, what it says, why that will not do."""

    source: str
    """The file, or the environment variable."""
    key: str
    """The TOML key path, as `server.port`; empty where the whole file is meant."""
    reason: str
    value: str = ""

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.key}{f' = {self.value}' if self.value else ''}{' - ' * bool(self.key)}{self.reason}"
        )


class ConfigError(Exception):
    """The configuration cannot be used; `faults` holds everything that is wrong with it, at once."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(map(str, self.faults)))


def nearest(word: str, known: Iterable[str]) -> str:
    """Say what is known instead of `word`: the most similar name, or all of them."""
    names = sorted(known)
    similar = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if similar:
        return f"did you mean {similar[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none is known here"


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration as read. `scenarios` keeps its tables raw: the registry decodes each into its scenario.

    `faults` is what is wrong so far; the registry adds what the scenarios find and raises everything at once.
    """

    server: Server
    events: EventLog
    plugins: Plugins
    scenarios: Mapping[str, Mapping[str, Any]]
    base: Path
    """The folder that relative paths start from."""
    source: str
    """The file's name for messages."""
    variables: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """Which key path came from which environment variable, or option of the command line."""
    faults: tuple[Fault, ...] = ()

    @classmethod
    def read(cls, path: Path | None, environ: Mapping[str, str] = os.environ) -> "Config":
        """Read a TOML file and lay `STREAMLAB_*` variables over it; without a file, defaults hold.

        Raises ConfigError when the file cannot be read or is not TOML; every other fault is in `faults`.
        """
        if path is None:
            return cls.of({}, source="defaults", environ=environ)
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError([Fault(str(path), "", error.strerror or "cannot be read")]) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
        """Make a configuration of tables in memory, as an embedding application or a test does."""
        base = base or Path.cwd()
        merged: dict[str, Any] = copy.deepcopy(dict(tables))
        variables, faults = _overlay(merged, environ or {})
        here = {"base": base}
        defaults = EventLog.model_validate({}, context=here), Plugins.model_validate({}, context=here)
        draft = cls(Server(), *defaults, {}, base, source, variables)
        known = ("server", "events", "plugins", "scenarios")
        unknown = set(merged) - set(known)
        faults += [
            draft.fault((name,), f"unknown table; {nearest(name, known)}", merged[name]) for name in sorted(unknown)
        ]
        server, server_faults = draft.decode(Server, merged.get("server", {}), "server")
        events, events_faults = draft.decode(EventLog, merged.get("events", {}), "events")
        plugins, plugins_faults = draft.decode(Plugins, merged.get("plugins", {}), "plugins")
        scenarios = merged.get("scenarios", {})
        if not isinstance(scenarios, dict):
            faults.append(draft.fault(("scenarios",), "must be a table", scenarios))
            scenarios = {}
        for name in [name for name, table in scenarios.items() if not isinstance(table, dict)]:
            faults.append(draft.fault(("scenarios", name), "must be a table", scenarios.pop(name)))
        return cls(
            server=server or draft.server,
            events=events or draft.events,
            plugins=plugins or draft.plugins,
            scenarios=scenarios,
            base=base,
            source=source,
            variables=variables,
            faults=(*faults, *server_faults, *events_faults, *plugins_faults),
        )

    def decode(self, model: type[_Model], table: Any, *key: str) -> tuple[_Model | None, list[Fault]]:
        """Decode the table found at `key` into its model, or say everything that is wrong with it."""
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
        """Name a fault at a key path, with the variable it came from if it did."""
        shown = "" if value is None or isinstance(value, dict) else json.dumps(value, default=str)
        # The variable that set this key, or a table around it; or for a table, one that set a key in it.
        origins = [self.variables.get(key[:length]) for length in range(len(key), 0, -1)]
        origins += [variable for known, variable in self.variables.items() if known[: len(key)] == key]
        return Fault(
            source=next(filter(None, origins), self.source),
            key=".".join(key),
            reason=reason,
            value=shown if len(shown) <= 80 else shown[:77] + "...",
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
    """The keys a model knows at a place inside it, through nested models, lists and mappings."""
    for part in location:
        model = _without_none(model)
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation if part in model.model_fields else None
        else:
            model = next(iter(reversed(get_args(model))), None)
    model = _without_none(model)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


CONFIG = web.AppKey("config", Config)


def _without_none(annotation: Any) -> Any:
    """`X` of `X | None`; anything else as it is."""
    choices = [choice for choice in get_args(annotation) if choice is not type(None)]
    return choices[0] if len(choices) == 1 and type(None) in get_args(annotation) else annotation


def _overlay(tables: dict[str, Any], environ: Mapping[str, str]) -> tuple[dict[tuple[str, ...], str], list[Fault]]:
    """Lay `STREAMLAB_SERVER__PORT=8001` over the tables; a value that opens with [ or { is read as TOML."""
    variables: dict[tuple[str, ...], str] = {}
    faults: list[Fault] = []
    for variable in sorted(environ):
        if not variable.startswith(PREFIX):
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
