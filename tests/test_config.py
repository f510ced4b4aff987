"""config.toml and the environment, read into models: precedence, and the report of faults."""

import json
import re
import tomllib
from inspect import isclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import ValidationError

from streamlab.config import Config, ConfigError, Fault, JwtSettings, Server, Table, nearest
from streamlab.scenario import Scenario
from streamlab.server.registry import Registry
from tests.support.servers import REPOSITORY, write_plugins

NO_DEFAULT = {
    ("auth", "open"),
    ("server", "tls_certificate"),
    ("server", "tls_key"),
    ("scenarios", "file", "large_file"),
    ("scenarios", "ticker", "file"),
}
"""Keys that config.toml shows with an example, since their default is empty."""

TABLES = {("auth", "tokens"), ("auth", "jwt")}
"""Tables in tables of the core, which config.toml shows as indented examples."""

NESTED = """
    from pydantic import BaseModel
    from streamlab import Scenario, hookimpl


    class Upstream(BaseModel):
        address: str = "localhost"
        weight: int = 1


    class Relay(Scenario):
        first: Upstream = Upstream()
        second: Upstream | None = None
        many: list[Upstream] = []
        named: dict[str, Upstream] = {}


    @hookimpl
    def register_scenarios():
        return [Relay]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(config: Config) -> list[str]:
    """Return every fault of a configuration as a line, including those that the registry finds."""
    with pytest.raises(ConfigError) as caught:
        Registry.load(config)
    return [str(fault) for fault in caught.value.faults]


def fault_of(config: Config) -> str:
    (fault,) = faults_of(config)
    return fault


# -- the file


def test_without_a_file_the_defaults_apply() -> None:
    config = Config.read(None, {})
    assert config.server == Server.model_validate({}, context={"base": Path.cwd()})
    assert (config.server.host, config.server.port, config.server.drain_seconds) == ("127.0.0.1", 8000, 5.0)
    assert (config.server.max_streams, config.server.allowed_hosts) == (10_000, ())
    assert config.plugins.path == (Path.cwd() / "plugins",)
    assert config.faults == ()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    config = Config.read(written(tmp_path, ""), {})
    assert (config.server.port, config.plugins.path, config.faults) == (8000, (tmp_path / "plugins",), ())


def test_a_value_of_the_file_overrides_the_default(tmp_path: Path) -> None:
    config = Config.read(written(tmp_path, "[server]\nport = 9000\nallowed_hosts = ['a.example']\n"), {})
    assert (config.server.port, config.server.allowed_hosts) == (9000, ("a.example",))


def test_a_configuration_cannot_be_changed_once_read(tmp_path: Path) -> None:
    config = Config.read(written(tmp_path, ""), {})
    with pytest.raises(ValidationError, match="frozen"):
        config.server.port = 1  # type: ignore[misc]


def test_tables_in_memory_are_not_changed_by_the_overlay() -> None:
    tables: dict[str, Any] = {"server": {"port": 1}}
    assert Config.of(tables, environ={"STREAMLAB_SERVER__PORT": "2"}).server.port == 2
    assert tables == {"server": {"port": 1}}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    with pytest.raises(ConfigError) as caught:
        Config.read(path, {})
    assert str(caught.value) == f"{path}: No such file or directory"


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.read(tmp_path, {})
    assert str(caught.value) == f"{tmp_path}: Is a directory"


def test_invalid_toml_is_reported_with_file_and_line(tmp_path: Path) -> None:
    path = written(tmp_path, "[server]\nport = = 1\n")
    with pytest.raises(ConfigError) as caught:
        Config.read(path, {})
    (fault,) = caught.value.faults
    assert fault.source == str(path)
    assert fault.key == ""
    assert "line 2" in fault.reason


def test_invalid_utf_8_is_reported_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b'[server]\nhost = "\xff"\n')
    with pytest.raises(ConfigError) as caught:
        Config.read(path, {})
    assert str(caught.value).startswith(f"{path}: ")


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = written(
        tmp_path,
        '[server]\nlog_file = "a.log"\ntls_certificate = "c.pem"\ntls_key = "/k.pem"\n[plugins]\npath = ["x", "/y"]\n'
        '[scenarios.file]\nroot = "here"\n',
    )
    config = Config.read(Path("..") / path.name, {})
    assert config.server.log_file == tmp_path / "elsewhere" / ".." / "a.log"
    assert config.server.log_file.resolve() == tmp_path / "a.log"
    assert config.server.tls_certificate is not None
    assert config.server.tls_certificate.resolve() == tmp_path / "c.pem"
    assert config.server.tls_key == Path("/k.pem")
    assert [folder.resolve() for folder in config.plugins.path] == [tmp_path / "x", Path("/y")]
    (file,) = [plugin for plugin in Registry.load(config).plugins if plugin.name == "file"]
    assert file.scenarios[0].root.resolve() == tmp_path / "here"  # type: ignore[attr-defined]


def test_a_default_path_starts_at_the_folder_of_the_file(tmp_path: Path) -> None:
    config = Config.read(written(tmp_path, ""), {})
    assert config.server.log_file == tmp_path / "var" / "log" / "streamlab.log"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = Config.of({"plugins": {"path": ["~/mine"]}}, base=tmp_path)
    assert config.plugins.path == (tmp_path / "home" / "mine",)


def test_an_empty_log_file_disables_it(tmp_path: Path) -> None:
    assert Config.of({"server": {"log_file": ""}}, base=tmp_path).server.log_file is None


# -- faults


def test_all_faults_are_reported_together_with_file_key_value_and_reason(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        [servr]
        [server]
        prot = 9000
        port = 99999
        log_format = "xml"
        [plugins]
        paths = ["p"]
        [scenarios.file]
        sample_mb = 0
        rot = "x"
        [scenarios.flie]
        """,
    )
    assert faults_of(Config.read(path, {})) == [
        f"{path}: servr - unknown table; did you mean 'server'?",
        f"{path}: server.port = 99999 - Input should be less than or equal to 65535",
        f"{path}: server.log_format = \"xml\" - Input should be 'text' or 'json'",
        f"{path}: server.prot = 9000 - unknown key; did you mean 'port'?",
        f"{path}: plugins.paths = [\"p\"] - unknown key; did you mean 'path'?",
        f"{path}: scenarios.file.sample_mb = 0 - Input should be greater than or equal to 1",
        f"{path}: scenarios.file.rot = \"x\" - unknown key; did you mean 'root'?",
        f"{path}: scenarios.flie - no plugin or scenario has this name; did you mean 'file'?",
    ]


def test_a_key_without_a_similar_one_is_reported_with_all_keys(tmp_path: Path) -> None:
    config = Config.of({"plugins": {"zzz": 1}}, base=tmp_path, source="config.toml")
    assert fault_of(config) == "config.toml: plugins.zzz = 1 - unknown key; known: path"


def test_nearest_names_one_similar_word_or_all_words() -> None:
    assert nearest("prot", ["port", "host"]) == "did you mean 'port'?"
    assert nearest("zzz", ["port", "host"]) == "known: host, port"
    assert nearest("zzz", []) == "there are none"


def test_a_fault_reads_as_file_key_value_and_reason() -> None:
    assert str(Fault("c.toml", "server.port", "is too large", "99999")) == "c.toml: server.port = 99999 - is too large"
    assert str(Fault("c.toml", "", "cannot be read")) == "c.toml: cannot be read"


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    fault = Config.of({"server": {"port": "9" * 500}}, base=tmp_path).faults[0]
    assert len(fault.value) == 80
    assert fault.value.endswith("...")


@pytest.mark.parametrize(
    ("tables", "key"),
    [
        ({"server": 5}, "server"),
        ({"plugins": 5}, "plugins"),
        ({"scenarios": 5}, "scenarios"),
        ({"scenarios": {"file": 5}}, "scenarios.file"),
    ],
)
def test_a_value_where_a_table_belongs_is_a_fault(tables: dict[str, Any], key: str, tmp_path: Path) -> None:
    assert [fault.key for fault in Config.of(tables, base=tmp_path).faults] == [key]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("port", 1.5),
        ("port", True),
        ("drain_seconds", -0.1),
        ("drain_seconds", float("nan")),
        ("drain_seconds", float("inf")),
        ("stall_seconds", 0),
        ("max_streams", 0),
        ("allowed_hosts", "stream.example.org"),
        ("log_level", "LOUD"),
        ("log_level", 10),
        ("host", 127),
    ],
)
def test_an_invalid_value_is_a_fault(name: str, value: Any, tmp_path: Path) -> None:
    assert [fault.key for fault in Config.of({"server": {name: value}}, base=tmp_path).faults] == [f"server.{name}"]


@pytest.mark.parametrize(
    ("host", "hint"),
    [
        ("https://a.example", "; did you mean 'a.example'?"),
        ("https://a.example:8443/path?x=1", "; did you mean 'a.example'?"),
        ("a.example:8000", "; did you mean 'a.example'?"),
        ("*.a.example/", "; did you mean '*.a.example'?"),
        ("a.example.", "; did you mean 'a.example'?"),
        ("[::1]", "; did you mean '::1'?"),
        ("a b", ""),
        ("", ""),
    ],
)
def test_an_allowed_host_that_no_request_can_have_is_a_fault(host: str, hint: str, tmp_path: Path) -> None:
    (fault,) = Config.of({"server": {"allowed_hosts": ["b.example", host]}}, base=tmp_path).faults
    assert (fault.key, fault.value) == ("server.allowed_hosts.1", json.dumps(host))
    assert fault.reason == f"must be a host name, without a scheme, a port or a path{hint}"


def test_host_names_and_patterns_are_allowed_hosts(tmp_path: Path) -> None:
    hosts = ["a.example", "*.B.example", "*", "localhost", "my_host", "10.0.0.1", "::1", "2001:db8::1"]
    assert Config.of({"server": {"allowed_hosts": hosts}}, base=tmp_path).faults == ()


def test_tls_with_a_certificate_alone_is_a_fault(tmp_path: Path) -> None:
    config = Config.of({"server": {"tls_certificate": "a.pem"}}, base=tmp_path)
    (fault,) = config.faults
    assert fault.key == "server"
    assert fault.reason == "TLS needs both tls_certificate and tls_key"


def test_enabled_that_is_neither_true_nor_false_is_a_fault(tmp_path: Path) -> None:
    config = Config.of({"scenarios": {"file": {"enabled": "perhaps"}}}, base=tmp_path)
    assert fault_of(config) == 'config: scenarios.file.enabled = "perhaps" - must be true or false'


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"first": {"adress": "x"}}, "first.adress"),
        ({"second": {"adress": "x"}}, "second.adress"),
        ({"many": [{}, {"adress": "x"}]}, "many.1.adress"),
        ({"named": {"a": {"adress": "x"}}}, "named.a.adress"),
    ],
)
def test_a_misspelt_key_in_the_table_of_a_scenario_is_reported_with_the_nearest(
    table: dict[str, Any], key: str, tmp_path: Path
) -> None:
    write_plugins(tmp_path, {"relay": NESTED})
    config = Config.of({"scenarios": {"relay": table}}, base=tmp_path)
    assert fault_of(config) == f"config: scenarios.relay.{key} = \"x\" - unknown key; did you mean 'address'?"


# -- the environment


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[server]\nport = 9000\nhost = '127.0.0.2'\n")
    config = Config.read(path, {"STREAMLAB_SERVER__PORT": "9001", "UNRELATED": "1", "STREAMLABX": "1"})
    assert (config.server.port, config.server.host, config.faults) == (9001, "127.0.0.2", ())


def test_the_environment_reaches_a_scenario(tmp_path: Path) -> None:
    config = Config.of({}, base=tmp_path, environ={"STREAMLAB_SCENARIOS__FILE__SAMPLE_MB": "7"})
    (file,) = [plugin for plugin in Registry.load(config).plugins if plugin.name == "file"]
    assert file.scenarios[0].sample_mb == 7  # type: ignore[attr-defined]


def test_the_environment_disables_a_scenario(tmp_path: Path) -> None:
    config = Config.of({}, base=tmp_path, environ={"STREAMLAB_SCENARIOS__FILE__ENABLED": "False"})
    assert {plugin.name: plugin.state for plugin in Registry.load(config).plugins}["file"] == "disabled"


def test_a_bad_value_of_the_environment_names_its_variable(tmp_path: Path) -> None:
    path = written(tmp_path, "[server]\nport = 9000\n")
    config = Config.read(path, {"STREAMLAB_SERVER__PORT": "many", "STREAMLAB_SCENARIOS__FILE__SAMPLE_MB": "0"})
    assert faults_of(config) == [
        'STREAMLAB_SERVER__PORT: server.port = "many" - '
        "Input should be a valid integer, unable to parse string as an integer",
        'STREAMLAB_SCENARIOS__FILE__SAMPLE_MB: scenarios.file.sample_mb = "0" - '
        "Input should be greater than or equal to 1",
    ]


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ("STREAMLAB_SERVER__PROT", "server.prot = \"1\" - unknown key; did you mean 'port'?"),
        ("STREAMLAB_SCENARIOS__FILE__ROT", "scenarios.file.rot = \"1\" - unknown key; did you mean 'root'?"),
        ("STREAMLAB_SERVE", "serve = \"1\" - unknown table; did you mean 'server'?"),
    ],
)
def test_a_misspelt_key_in_a_variable_names_the_variable_and_the_nearest(
    variable: str, line: str, tmp_path: Path
) -> None:
    assert fault_of(Config.of({}, base=tmp_path, environ={variable: "1"})) == f"{variable}: {line}"


@pytest.mark.parametrize(
    ("variable", "key", "known"),
    [
        ("STREAMLAB_SERVR__PORT", "servr", "server"),
        ("STREAMLAB_SCENARIOS__FLIE__ROOT", "scenarios.flie", "file"),
    ],
)
def test_a_misspelt_table_in_a_variable_names_the_variable_and_the_nearest(
    variable: str, key: str, known: str, tmp_path: Path
) -> None:
    line = fault_of(Config.of({}, base=tmp_path, environ={variable: "1"}))
    assert line.startswith(f"{variable}: {key}")
    assert line.endswith(f"did you mean {known!r}?")


def test_a_value_that_opens_a_list_or_a_table_is_read_as_toml(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"relay": NESTED})
    environ = {
        "STREAMLAB_SERVER__ALLOWED_HOSTS": '["a.example", "*.b.example"]',
        "STREAMLAB_SCENARIOS__RELAY__FIRST": '{address = "c.example", weight = 3}',
    }
    config = Config.of({}, base=tmp_path, environ=environ)
    (relay,) = [plugin for plugin in Registry.load(config).plugins if plugin.name == "relay"]
    assert config.server.allowed_hosts == ("a.example", "*.b.example")
    assert relay.scenarios[0].first.model_dump() == {"address": "c.example", "weight": 3}  # type: ignore[attr-defined]


def test_the_variable_of_the_clients_is_no_key(tmp_path: Path) -> None:
    assert Config.of({}, base=tmp_path, environ={"STREAMLAB_URL": "http://x.example"}).faults == ()


def test_a_list_that_is_not_toml_names_its_variable(tmp_path: Path) -> None:
    (fault,) = Config.of({}, base=tmp_path, environ={"STREAMLAB_SERVER__ALLOWED_HOSTS": "[a"}).faults
    assert (fault.source, fault.key) == ("STREAMLAB_SERVER__ALLOWED_HOSTS", "server.allowed_hosts")
    assert fault.reason.startswith("is not a TOML value: ")


def test_a_variable_below_a_value_names_itself(tmp_path: Path) -> None:
    config = Config.of({}, base=tmp_path, environ={"STREAMLAB_SERVER__PORT__X": "1", "STREAMLAB_SERVER__PORT": "1"})
    assert [fault.source for fault in config.faults] == ["STREAMLAB_SERVER__PORT__X"]


def test_a_plain_value_of_a_variable_stays_text(tmp_path: Path) -> None:
    config = Config.of({}, base=tmp_path, environ={"STREAMLAB_SCENARIOS__FILE__ROOT": "2024-01-01"})
    (file,) = [plugin for plugin in Registry.load(config).plugins if plugin.name == "file"]
    assert file.scenarios[0].root == tmp_path / "2024-01-01"  # type: ignore[attr-defined]


# -- config.toml of this repository documents every key


def uncommented() -> dict[str, Any]:
    text = (REPOSITORY / "config.toml").read_text(encoding="utf-8")
    return tomllib.loads(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))


def shipped_scenarios(tmp_path: Path) -> list[Scenario]:
    registry = Registry.load(Config.of({}, base=tmp_path))
    return [scenario for plugin in registry.plugins for scenario in plugin.scenarios]


def test_the_shipped_file_sets_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, (REPOSITORY / "config.toml").read_text(encoding="utf-8"))
    config = Config.read(path, {})
    Registry.load(config)
    defaults = Config.of({}, base=tmp_path)
    assert (config.server, config.events, config.plugins) == (defaults.server, defaults.events, defaults.plugins)
    assert all(not table for table in config.scenarios.values())


def test_the_shipped_file_is_valid_with_every_key_enabled(tmp_path: Path) -> None:
    text = (REPOSITORY / "config.toml").read_text(encoding="utf-8")
    path = written(tmp_path, re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))
    registry = Registry.load(Config.read(path, {}))
    assert {plugin.state for plugin in registry.plugins} == {"ready"}


@pytest.mark.parametrize(
    ("table", "model"),
    [(name, kind) for name, kind in get_type_hints(Config).items() if isclass(kind) and issubclass(kind, Table)],
)
def test_the_shipped_file_shows_every_key_of_the_core_and_no_other(table: str, model: Any) -> None:
    assert list(uncommented()[table]) == [key for key in model.model_fields if (table, key) not in TABLES]


def test_the_shipped_file_shows_valid_tables_of_who_may_come_in() -> None:
    section = (REPOSITORY / "config.toml").read_text(encoding="utf-8").partition("[cors]")[0]
    tables = tomllib.loads("\n".join(re.findall(r"^#   (\[auth.*|\w+ = .*)$", section, re.MULTILINE)))
    config = Config.of(tables)
    assert config.faults == ()
    assert list(config.auth.tokens) == ["alice"]
    assert list(tables["auth"]["jwt"]) == [key for key in JwtSettings.model_fields if key != "public_key"]
    for key, field in JwtSettings.model_fields.items():
        assert field.is_required() or key == "jwks_url" or getattr(config.auth.jwt, key) == field.default


def test_the_shipped_file_shows_every_key_of_every_scenario_and_no_other(tmp_path: Path) -> None:
    shown = {name: set(table) for name, table in uncommented()["scenarios"].items()}
    known = {scenario.name: {"enabled", *type(scenario).model_fields} for scenario in shipped_scenarios(tmp_path)}
    assert shown == known


def test_the_shipped_file_shows_the_defaults(tmp_path: Path) -> None:
    shown = uncommented()
    defaults: dict[tuple[str, ...], Any] = {
        ("server",): Config.of({}, base=tmp_path).server,
        ("auth",): Config.of({}, base=tmp_path).auth,
        ("cors",): Config.of({}, base=tmp_path).cors,
        ("limits",): Config.of({}, base=tmp_path).limits,
        ("events",): Config.of({}, base=tmp_path).events,
        ("plugins",): Config.of({}, base=tmp_path).plugins,
        **{("scenarios", scenario.name): scenario for scenario in shipped_scenarios(tmp_path)},
    }
    stale: list[str] = []
    for place, model in defaults.items():
        table = shown[place[0]] if len(place) == 1 else shown[place[0]][place[1]]
        values = {key: value for key, value in table.items() if key != "enabled" and (*place, key) not in NO_DEFAULT}
        decoded, faults = Config.of({}, base=tmp_path).decode(type(model), values, *place)
        assert faults == []
        stale += [
            f"{'.'.join(place)}.{key} = {json.dumps(values[key])}, but the default is {getattr(model, key)!r}"
            for key in values
            if getattr(decoded, key) != getattr(model, key)
        ]
        stale += [
            f"{'.'.join((*place, key))} has the default {getattr(model, key)!r}; it is to be shown"
            for key in table
            if (*place, key) in NO_DEFAULT and getattr(model, key) is not None
        ]
    assert stale == []


def test_the_shipped_file_shows_every_scenario_enabled() -> None:
    assert {name: table["enabled"] for name, table in uncommented()["scenarios"].items()} == dict.fromkeys(
        uncommented()["scenarios"], True
    )
