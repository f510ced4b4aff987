"""The command line, as separate processes: output and exit status."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from streamlab.cli import cli
from streamlab.config import Config, Server
from streamlab.server.edge import reachable
from streamlab.server.preflight import written_paths
from streamlab.server.site import version
from tests.support.pytest_runs import OPTIONS
from tests.support.servers import (
    ENVIRONMENT,
    HELLO,
    REPOSITORY,
    Running,
    ended_at_exit,
    run_streamlab,
    write_plugins,
)

STREAMLAB = [sys.executable, "-m", "streamlab"]


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLAB_")}
    return {**inherited, **ENVIRONMENT, **variables}


def streamlab(folder: Path, *words: str, **variables: str) -> tuple[int, str, str]:
    """Run a command in a folder to its end; return exit status, stdout and stderr."""
    status, output, errors = run_streamlab(*words, cwd=folder, **variables)
    assert "Traceback" not in errors, errors
    return status, output, errors


def write_config(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(textwrap.dedent(text))
    return path


# -- faults


@pytest.mark.parametrize("command", ["run", "check", "routes"])
def test_a_missing_configuration_is_named_with_status_2(command: str, tmp_path: Path) -> None:
    assert streamlab(tmp_path, command, "--config", "absent.toml") == (
        2,
        "",
        "absent.toml: No such file or directory\nstreamlab: 1 fault; nothing was started\n",
    )


def test_run_reports_every_fault_at_once_with_status_2(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": HELLO})
    write_config(
        tmp_path,
        """
        [server]
        port = 99999
        prot = 1
        [scenarios.hello]
        wrd = "x"
        [scenarios.helo]
        """,
    )
    status, output, errors = streamlab(tmp_path, "run", STREAMLAB_SERVER__DRAIN_SECONDS="soon")
    assert (status, output) == (2, "")
    *faults, summary = errors.splitlines()
    assert sorted(faults) == [
        'STREAMLAB_SERVER__DRAIN_SECONDS: server.drain_seconds = "soon" - '
        "Input should be a valid number, unable to parse string as a number",
        "config.toml: scenarios.hello.wrd = \"x\" - unknown key; did you mean 'word'?",
        "config.toml: scenarios.helo - no plugin or scenario has this name; did you mean 'hello'?",
        "config.toml: server.port = 99999 - Input should be less than or equal to 65535",
        "config.toml: server.prot = 1 - unknown key; did you mean 'port'?",
    ]
    assert summary == "streamlab: 5 faults; nothing was started"


def test_run_on_a_port_in_use_fails_with_status_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, errors = streamlab(tmp_path, "run", "--port", str(port))
    assert status == 2
    assert (
        f"--port: server.port = {port} - another program listens on 127.0.0.1:{port}; "
        f"stop it, or use another port (--port {port + 1})\n"
    ) in errors
    assert errors.endswith("streamlab: 1 fault; nothing was started\n")


def test_run_on_an_address_of_another_machine_fails_with_status_2(tmp_path: Path) -> None:
    status, _, errors = streamlab(tmp_path, "run", "--host", "192.0.2.1", "--port", "0")
    assert status == 2
    assert 'server.host = "192.0.2.1" - cannot listen on it: ' in errors


def test_run_with_an_invalid_certificate_fails_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "server.pem").write_text("no certificate")
    write_config(tmp_path, '[server]\ntls_certificate = "server.pem"\ntls_key = "server.pem"\nlog_file = ""\n')
    status, _, errors = streamlab(tmp_path, "run", "--port", "0")
    assert status == 2
    assert "config.toml: server.tls_certificate = " in errors


def test_an_invalid_port_is_rejected_with_status_2(tmp_path: Path) -> None:
    status, _, errors = streamlab(tmp_path, "run", "--port", "65536")
    assert status == 2
    assert "invalid value for '--port'" in errors


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        ("nonsense", "streamlab: no such command 'nonsense' (see streamlab --help)"),
        ("chekc", "streamlab: no such command 'chekc'; did you mean 'check'? (see streamlab --help)"),
        ("task nonsense", "streamlab task: no such command 'nonsense' (see streamlab task --help)"),
        ("run extra", "streamlab run: got unexpected extra argument(s) (extra) (see streamlab run --help)"),
        ("new", "streamlab new: missing argument 'NAME' (see streamlab new --help)"),
        ("follow", "streamlab follow: missing argument 'URL' (see streamlab follow --help)"),
    ],
)
def test_invalid_arguments_are_one_line_with_status_2(words: str, reported: str, tmp_path: Path) -> None:
    assert streamlab(tmp_path, *words.split()) == (2, "", f"{reported}\n")


def test_run_where_it_cannot_write_is_one_fault(tmp_path: Path) -> None:
    (tmp_path / "var").write_text("")
    reason = f"cannot store events there: {tmp_path}/var/streamlab.db: {tmp_path}/var is not a folder"
    assert streamlab(tmp_path, "run", "--port", "0") == (
        2,
        "",
        f"defaults: events.url - {reason}; sqlite:// stores them in memory\nstreamlab: 1 fault; nothing was started\n",
    )


# -- check and routes


def test_check_exits_with_0_when_nothing_is_wrong(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": HELLO})
    status, output, errors = streamlab(tmp_path, "check")
    assert (status, errors) == (0, "")
    assert {"file: ready", "hello: ready"} <= set(output.splitlines())


def test_check_without_a_configuration_checks_the_defaults(tmp_path: Path) -> None:
    assert streamlab(tmp_path, "check")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_check_exits_with_2_on_a_fault(tmp_path: Path) -> None:
    write_config(tmp_path, "[server]\nport = 'many'\n")
    status, output, errors = streamlab(tmp_path, "check")
    assert (status, output) == (2, "")
    assert errors.startswith('config.toml: server.port = "many" - ')


def test_check_exits_with_2_when_a_plugin_is_broken_and_reports_why(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": HELLO, "broken": "import no_such_module_at_all\n"})
    status, output, errors = run_streamlab("check", cwd=tmp_path)
    assert status == 2
    assert "hello: ready" in output.splitlines()
    assert (
        "broken: failed - needs the Python module 'no_such_module_at_all': "
        "install the package that contains 'no_such_module_at_all'"
    ) in errors.splitlines()


IN_PART = (
    HELLO
    + """

    @hookimpl
    def health():
        return "the source 'app' cannot be read"
"""
)


def test_check_reports_what_would_work_only_in_part_and_exits_with_0(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": IN_PART})
    status, output, errors = streamlab(tmp_path, "check")
    assert (status, errors) == (0, "")
    assert {"hello: ready", "hello: degraded - the source 'app' cannot be read"} <= set(output.splitlines())


# Each configuration alone, and its faults; {base} is its folder.
CANNOT_WORK = {
    "a host that no machine has": (
        '[server]\nhost = "127.0.0.256"\n',
        ['server.host = "127.0.0.256" - cannot listen on it: Name or service not known'],
    ),
    "an address of another machine": (
        '[server]\nhost = "192.0.2.1"\n',
        ['server.host = "192.0.2.1" - cannot listen on it: Cannot assign requested address'],
    ),
    "TLS files that are missing": (
        '[server]\ntls_certificate = "no.pem"\ntls_key = "no.key"\n',
        [
            'server.tls_certificate = "{base}/no.pem" - No such file or directory',
            'server.tls_key = "{base}/no.key" - No such file or directory',
        ],
    ),
    "a certificate that is garbage": (
        '[server]\ntls_certificate = "garbage"\ntls_key = "server.key"\n',
        ['server.tls_certificate = "{base}/garbage" - contains no valid certificate in PEM format'],
    ),
    "a key that is garbage": (
        '[server]\ntls_certificate = "server.pem"\ntls_key = "garbage"\n',
        ['server.tls_key = "{base}/garbage" - contains no valid private key in PEM format'],
    ),
    "the key of another certificate": (
        '[server]\ntls_certificate = "server.pem"\ntls_key = "other.key"\n',
        ['server.tls_key = "{base}/other.key" - is not the key of tls_certificate'],
    ),
    "a key with a passphrase": (
        '[server]\ntls_certificate = "server.pem"\ntls_key = "encrypted.key"\n',
        [
            'server.tls_key = "{base}/encrypted.key" - is encrypted, and the server cannot ask for its passphrase; '
            "`openssl pkey -in FILE` decrypts it"
        ],
    ),
    "a plugin folder that is missing": (
        '[plugins]\npath = ["mine", "garbage"]\n',
        [
            "plugins.path - {base}/mine: there is no such folder",
            "plugins.path - {base}/garbage: is not a folder",
        ],
    ),
    "an event log and a log file below what is not a folder": (
        '[events]\nurl = "sqlite:///garbage/events.db"\n[server]\nlog_file = "garbage/server.log"\n',
        [
            "events.url - cannot store events there: {base}/garbage/events.db: {base}/garbage is not a folder; "
            "sqlite:// stores them in memory",
            "server.log_file - cannot be written: {base}/garbage/server.log: {base}/garbage is not a folder",
        ],
    ),
    "a scheme in allowed_hosts, with what is found on the disk": (
        '[server]\nallowed_hosts = ["https://a.example"]\n[plugins]\npath = ["mine"]\n',
        [
            'server.allowed_hosts.0 = "https://a.example" - must be a host name, without a scheme, a port or a path; '
            "did you mean 'a.example'?",
            "plugins.path - {base}/mine: there is no such folder",
        ],
    ),
}
REFUSED = [what for what, (text, _) in CANNOT_WORK.items() if "[plugins]" not in text and "[events]" not in text]


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files by name: a certificate, its key, that key encrypted, the key of another certificate, and garbage."""
    authority, folder = trustme.CA(), tmp_path_factory.mktemp("tls")
    issued, other = authority.issue_cert("localhost"), authority.issue_cert("localhost")
    key = folder / "server.key"
    issued.private_key_pem.write_to_path(key)
    encrypt = ["openssl", "pkcs8", "-topk8", "-in", str(key), "-passout", "pass:secret"]
    return {
        "server.pem": issued.cert_chain_pems[0].bytes(),
        "server.key": key.read_bytes(),
        "other.key": other.private_key_pem.bytes(),
        "encrypted.key": subprocess.run(encrypt, check=True, capture_output=True).stdout,
        "garbage": b"nonsense\n",
    }


@pytest.fixture
def broken(tmp_path: Path, tls_files: dict[str, bytes]) -> Callable[[str], list[str]]:
    """Write a configuration that cannot work, and return the lines that report it."""

    def writing(what: str) -> list[str]:
        for name, content in tls_files.items():
            (tmp_path / name).write_bytes(content)
        text, faults = CANNOT_WORK[what]
        write_config(tmp_path, text)
        count = f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'}"
        lines = [f"config.toml: {fault.format(base=tmp_path)}" for fault in faults]
        return [*lines, f"streamlab: {count}; nothing was started"]

    return writing


@pytest.mark.parametrize("what", CANNOT_WORK)
def test_check_reports_what_cannot_work_on_this_machine(
    what: str, tmp_path: Path, broken: Callable[[str], list[str]]
) -> None:
    expected, before = broken(what), sorted(tmp_path.iterdir())
    status, _, errors = streamlab(tmp_path, "check")
    assert (status, errors.splitlines()) == (2, expected)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("what", REFUSED)
def test_run_rejects_what_it_cannot_serve_with(what: str, tmp_path: Path, broken: Callable[[str], list[str]]) -> None:
    expected = broken(what)
    status, output, errors = streamlab(tmp_path, "run", "--port", "0")
    assert (status, output, errors.splitlines()) == (2, "", expected)


def test_check_accepts_a_certificate_with_its_key_and_a_port_in_use(
    tmp_path: Path, tls_files: dict[str, bytes]
) -> None:
    for name, content in tls_files.items():
        (tmp_path / name).write_bytes(content)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        tls = 'tls_certificate = "server.pem"\ntls_key = "server.key"\n'
        write_config(tmp_path, f"[server]\nport = {taken.getsockname()[1]}\n{tls}")
        assert streamlab(tmp_path, "check")[0] == 0


CHECKED = (
    HELLO.replace("class Hello(Scenario):", "class Hello(Scenario):\n        names: tuple[str, ...] = ()\n")
    + """

    @hookimpl
    def check():
        yield "names.first", "/there/is/no/file"
        yield "word", "is too short"
"""
)


def test_check_hook_reports_faults_that_run_warns_of(start: Callable[..., Running], tmp_path: Path) -> None:
    broken = CHECKED.replace("Hello", "Other").replace("/hello", "/other").replace('yield "word"', "raise OSError")
    server = start(hello=CHECKED, other=broken.replace(', "is too short"', '("a", "b")'))
    keys = f"{tmp_path}/config.toml: scenarios"
    faults = [
        f"{keys}.hello.names.first - /there/is/no/file",
        f"{keys}.hello.word - is too short",
        f"{keys}.other - it cannot be checked: OSError at line 25 of other.py: b",
    ]
    for fault in faults:
        server.wait_for_log(f" WARNING streamlab.server.app {fault}\n")
    assert server.get("/hello")[0] == 200
    status, output, errors = streamlab(tmp_path, "check", "-c", f"{tmp_path}/config.toml")
    assert (status, {"hello: 2 faults", "other: 1 fault"} <= set(output.splitlines())) == (2, True)
    assert errors.splitlines() == [*faults, "streamlab: 3 faults; nothing was started"]


def test_check_reads_the_configuration_it_is_given(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_plugins(other, {"hello": HELLO})
    write_config(other, "")
    status, output, _ = streamlab(tmp_path, "check", "-c", "other/config.toml")
    assert (status, "hello: ready" in output.splitlines()) == (0, True)


def test_routes_lists_every_route_with_a_command(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": HELLO})
    write_config(tmp_path, "[server]\nport = 9000\n")
    status, output, errors = streamlab(tmp_path, "routes")
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    place = next(number for number, line in enumerate(lines) if line.split()[:3] == ["GET", "/hello", "hello"])
    assert lines[place].endswith(" Say a word.")
    assert lines[place + 1] == "       curl -N http://127.0.0.1:9000/hello"
    assert sum(line.startswith("       curl ") for line in lines) * 2 == len(lines)


COMMAND_NAMES = ("run", "check", "routes", "new", "worker", "token", "follow", "doctor", "client", "chat", "task")
TASK_NAMES = ("list", "kinds", "run", "watch", "cancel")

VERBS = {
    "Allow", "Begin", "Exit", "Let", "Limit", "List", "Listen", "Observe", "Print", "Read", "Request", "Restart",
    "Send", "Set", "Show", "Start", "Take", "Use", "Write",
}  # fmt: skip
"""What options begin with, as commands do."""


@pytest.fixture
def help_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Return a function that returns the help of a command, in a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def showing(command: str) -> str:
        assert cli([*command.split(), "--help"], prog_name="streamlab", standalone_mode=False) == 0
        return capsys.readouterr().out

    return showing


def parameters_of(text: str, section: str) -> dict[str, str]:
    """Return the words of help of each parameter in a section of a help text."""
    lines = re.search(rf"^{section}:\n((?:  .*\n)+)", text, re.MULTILINE)
    joined = re.sub(r"\n {10,}", " ", lines[1]) if lines else ""
    found = re.findall(r"^  (\S.*?)  +(.*)$", joined, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}


@pytest.mark.parametrize("command", [*COMMAND_NAMES, *(f"task {name}" for name in TASK_NAMES)])
def test_every_command_that_requests_a_server_takes_a_token(command: str, help_of: Callable[[str], str]) -> None:
    options = parameters_of(help_of(command), "Options")
    assert ("--token TOKEN" in options) == ("--url URL" in options)
    assert ("--url URL" in options) == (
        command in ("follow", "doctor", "client", "chat") or command.startswith("task ")
    )


@pytest.mark.parametrize("command", ["", *COMMAND_NAMES, *(f"task {name}" for name in TASK_NAMES)])
def test_help_is_of_one_form(command: str, help_of: Callable[[str], str]) -> None:
    text, whole = help_of(command), f"streamlab {command}".strip()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    assert text.startswith(f"Usage: {whole} [OPTIONS]")
    assert re.search(r"^  [A-Z][a-z]+,? .{10,90}[.]$", text.splitlines()[2]), "a sentence on a line"
    assert "..." not in text.partition("\n\n")[2], "no sentence is shortened in a list of commands"
    (example,) = re.findall(r"^  Example: .*?(streamlab .*)$", text, re.MULTILINE)
    assert example.startswith(whole)
    assert [word for word in example.split() if word.startswith("--") and word not in help_of(command or "run")] == []
    assert re.fullmatch(r"[0t].*[.]\n", text.partition("\n\n  Exit status: ")[2], re.DOTALL)
    options, arguments = parameters_of(text, "Options"), parameters_of(text, "Arguments")
    assert "--help" in options
    for name, words in options.items():
        assert words.split()[0] in VERBS, name
    for name, words in (options | arguments).items():
        assert re.match(r"[A-Z].+?[.]( \[[^\]]+\])?$", words), name
        assert re.match(r"(-\w, )?--[a-z-]+( [A-Z]+(=[A-Z]+)?)?$|[A-Z]+ <", name) or name.startswith("[NAME]"), name


def test_options_of_the_same_name_have_the_same_help(help_of: Callable[[str], str]) -> None:
    texts = [help_of(command) for command in (*COMMAND_NAMES, *(f"task {name}" for name in TASK_NAMES))]
    for option, count in (("--url URL", 9), ("-c, --config FILE", 5)):
        shown = [found[option] for text in texts if option in (found := parameters_of(text, "Options"))]
        assert (len(shown), len(set(shown))) == (count, 1), option


def test_help_lists_commands_in_the_order_of_their_use(help_of: Callable[[str], str]) -> None:
    assert tuple(parameters_of(help_of(""), "Commands")) == COMMAND_NAMES
    assert tuple(parameters_of(help_of("task"), "Commands")) == TASK_NAMES


def test_help_names_every_command_and_no_command_is_an_error(tmp_path: Path) -> None:
    status, output, _ = streamlab(tmp_path, "--help")
    assert status == 0
    for command in ("run", "routes", "check", "new"):
        assert f"\n  {command} " in output
    assert streamlab(tmp_path)[0] == 2


def test_version_is_printed(tmp_path: Path) -> None:
    assert streamlab(tmp_path, "--version") == (0, f"streamlab {version()}\n", "")


def test_every_command_that_requests_a_server_has_the_option_url(tmp_path: Path) -> None:
    for words in (
        "follow",
        "doctor",
        "client",
        "chat",
        "task run",
        "task watch",
        "task cancel",
        "task list",
        "task kinds",
    ):
        status, output, _ = streamlab(tmp_path, *words.split(), "--help")
        assert (status, "  --url URL " in output, "STREAMLAB_URL" in output) == (0, True, True), words


# -- commands of plugins

COMMANDS = """
    import typer
    from streamlab import hookimpl


    @hookimpl
    def register_commands(cli):
        @cli.command()
        def greet(name: str):
            \"\"\"Greet somebody.\"\"\"
            typer.echo(f"hello {name}")

        @cli.command()
        def check():
            \"\"\"Never reached: the core has this name.\"\"\"
            raise SystemExit(9)


    @hookimpl
    def register_views():
        return {"hello": lambda terminal: terminal.print("shown")}
"""


def test_register_commands_adds_commands_of_a_plugin(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": COMMANDS})
    assert streamlab(tmp_path, "greet", "you") == (0, "hello you\n", "")
    status, output, _ = streamlab(tmp_path, "--help")
    assert (status, re.findall(r"\n  greet +(.*)", output)) == (0, ["Greet somebody."])
    assert streamlab(tmp_path, "check")[0] == 0


def test_terminal_commands_of_a_folder_are_loaded_without_the_rest_of_the_plugin(tmp_path: Path) -> None:
    folder = tmp_path / "plugins" / "hello"
    write_plugins(tmp_path, {"beside": "raise SystemExit('imported')\n"})
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    (folder / "words.py").write_text("WORD = 'hello'\n")
    (folder / "terminal.py").write_text("from .words import WORD as WORD\n" + textwrap.dedent(COMMANDS))
    assert streamlab(tmp_path, "greet", "you") == (0, "hello you\n", "")


def test_a_broken_plugin_costs_only_its_own_commands(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": COMMANDS, "broken": "def register_commands(cli): ...\nimport no_such_module\n"})
    reason = "plugin broken: no commands: ModuleNotFoundError: No module named 'no_such_module'"
    assert streamlab(tmp_path, "greet", "you") == (0, "hello you\n", f"streamlab: {reason}\n")
    assert run_streamlab("routes", cwd=tmp_path)[0] == 0
    status, output, errors = streamlab(tmp_path, "--help")
    assert (status, "\n  greet " in output, errors) == (0, True, f"streamlab: {reason}\n")


def test_register_views_adds_a_view_of_a_plugin(start: Callable[..., Running]) -> None:
    server = start(hello=COMMANDS)
    assert streamlab(server.base, "client", "hello", "--url", server.url) == (0, "shown\n", "")


# -- new


@pytest.mark.timeout(120)
def test_new_writes_a_plugin_that_serves_and_a_test_that_passes(start: Callable[..., Running], tmp_path: Path) -> None:
    status, output, errors = streamlab(tmp_path, "new", "price_feed")
    assert (status, errors) == (0, "")
    assert output == (
        f"wrote {tmp_path}/plugins/price_feed.py\n"
        f"wrote {tmp_path}/tests/test_price_feed.py\n"
        "try it: streamlab run, then curl -N http://127.0.0.1:8000/stream/price_feed\n"
        f"test it: pytest {tmp_path}/tests/test_price_feed.py\n"
    )
    quietly = [*OPTIONS, "-o", "asyncio_default_fixture_loop_scope=function"]
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", *quietly, "-W", "error", "tests/test_price_feed.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(),
    )
    assert tested.returncode == 0, tested.stdout
    assert re.search(r"^TestPriceFeed: (\d+) of \1 promises verified on 1 endpoint$", tested.stdout, re.MULTILINE)
    server = start("[scenarios.price_feed]\ninterval = 0.0\n")
    assert server.get("/stream/price_feed?times=2")[::2] == (200, b"hello 1\nhello 2\n")
    assert server.get("/stream/price_feed?times=0")[0] == 422


@pytest.mark.parametrize("options", [(), ("--task",)])
def test_new_writes_code_that_passes_the_lint_rules(options: tuple[str, ...], tmp_path: Path) -> None:
    streamlab(tmp_path, "new", "price_feed", *options)
    rules = str(REPOSITORY / "pyproject.toml")
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "--no-cache", "--config", rules, "plugins"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stdout


def test_new_writes_a_task_that_runs(start: Callable[..., Running], tmp_path: Path) -> None:
    status, output, errors = streamlab(tmp_path, "new", "price_feed", "--task")
    assert (status, errors) == (0, "")
    assert output.endswith(
        "try it: streamlab run, then streamlab task run price_feed --url http://127.0.0.1:8000\n"
        f"test it: pytest {tmp_path}/tests/test_price_feed.py\n"
    )
    server = start()
    status, output, errors = streamlab(tmp_path, "task", "run", "price_feed", "--url", server.url, "-p", "count=3")
    assert (status, json.loads(output)) == (0, {"sum": 14}), errors


@pytest.mark.parametrize("name", ["feed_2", "a__b"])
def test_new_writes_a_plugin_whose_scenario_has_its_name(name: str, tmp_path: Path) -> None:
    assert streamlab(tmp_path, "new", name)[0] == 0
    write_config(tmp_path, f"[scenarios.{name}]\nintervall = 1\n")
    status, _, errors = streamlab(tmp_path, "check")
    assert status == 2
    assert f"scenarios.{name}.intervall = 1 - unknown key; did you mean 'interval'?" in errors


@pytest.mark.parametrize("name", ["Price", "price-feed", "class", "_price", "../price", "2nd", "", "price feed"])
def test_new_rejects_an_invalid_name_and_writes_nothing(name: str, tmp_path: Path) -> None:
    status, output, errors = streamlab(tmp_path, "new", name)
    assert (status, output) == (2, "")
    assert errors == f"streamlab: {name!r} is not a valid plugin name (as `price_feed`)\n"
    assert list(tmp_path.iterdir()) == []


def test_new_rejects_the_name_of_a_plugin_that_exists(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": HELLO})
    before = (tmp_path / "plugins" / "hello.py").read_text()
    assert streamlab(tmp_path, "new", "hello") == (
        2,
        "",
        f"streamlab: a plugin 'hello' already exists: {tmp_path}/plugins/hello.py\n",
    )
    assert (tmp_path / "plugins" / "hello.py").read_text() == before
    assert not (tmp_path / "tests").exists()


def test_new_rejects_the_name_of_a_built_in_plugin(tmp_path: Path) -> None:
    status, _, errors = streamlab(tmp_path, "new", "file")
    assert status == 2
    assert errors.startswith("streamlab: a plugin 'file' already exists: ")
    assert list(tmp_path.iterdir()) == []


def test_new_overwrites_no_test(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_hello.py").write_text("mine\n")
    status, _, errors = streamlab(tmp_path, "new", "hello")
    assert (status, errors) == (2, f"streamlab: {tmp_path}/tests/test_hello.py already exists; nothing was written\n")
    assert (tmp_path / "tests" / "test_hello.py").read_text() == "mine\n"
    assert not (tmp_path / "plugins").exists()


# -- run


def test_run_announces_its_plugins_and_its_address(tmp_path: Path) -> None:
    write_plugins(tmp_path, {"hello": IN_PART, "broken": "import no_such_module_at_all\n"})
    process = subprocess.Popen(
        [*STREAMLAB, "run", "--port", "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    with ended_at_exit(process):
        assert process.stdout is not None
        shown = []
        for line in process.stdout:
            shown.append(line)
            if line.startswith("lab page: "):
                break
        process.terminate()
        assert process.wait(10) == 0
    text = "".join(shown)
    assert shown[-4].startswith(f"streamlab {version()} serves http://127.0.0.1:")
    assert [line.rstrip("\n") for line in shown[-3:]] == [
        "configuration: defaults (no config.toml), --port",
        f"data: {tmp_path}/var",
        f"lab page: {shown[-4].split()[-1]}/lab",
    ]
    assert [line.split()[:3] for line in shown if line.startswith("hello")] == [
        ["hello", "ready", "/hello"],
        ["hello", "degraded", "the"],
    ]
    assert "'no_such_module_at_all'" in text
    assert "failed" in text


@pytest.mark.parametrize(
    ("address", "host", "allowed", "expected"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", (), "http://127.0.0.1:8000"),
        ("https://127.0.0.1:8443", "127.0.0.1", (), "https://127.0.0.1:8443"),
        ("http://0.0.0.0:8000", "0.0.0.0", (), "http://127.0.0.1:8000"),
        ("http://[::]:8000", "::", (), "http://[::1]:8000"),
        ("http://[::1]:8000", "::1", (), "http://[::1]:8000"),
        ("http://127.0.0.1:8000", "localhost", ("a.example",), "http://127.0.0.1:8000"),
        ("http://0.0.0.0:8000", "0.0.0.0", ("*.example", "a.example"), "http://a.example:8000"),
        ("http://0.0.0.0:8000", "0.0.0.0", ("*.example",), "http://127.0.0.1:8000"),
    ],
)
def test_lab_page_has_an_address_that_a_browser_reaches(
    address: str, host: str, allowed: tuple[str, ...], expected: str
) -> None:
    assert reachable(address, Server(host=host, allowed_hosts=allowed)) == expected


@pytest.mark.parametrize(
    ("tables", "written"),
    [
        ({}, ["/srv/var"]),
        ({"events": {"url": "redis://a/0"}, "server": {"log_file": ""}}, ["/srv/var"]),
        ({"events": {"url": "sqlite://"}, "server": {"log_file": "/var/log/a.log"}}, ["/srv/var", "/var/log/a.log"]),
        ({"events": {"url": "sqlite:///events.db"}}, ["/srv/var", "/srv/events.db"]),
    ],
)
def test_paths_that_run_writes_are_announced(tables: dict[str, dict[str, str]], written: list[str]) -> None:
    assert [str(path) for path in written_paths(Config.of(tables, base=Path("/srv")))] == written


def test_run_writes_its_log_to_a_file_as_json_lines(start: Callable[..., Running]) -> None:
    server = start('[server]\nlog_format = "json"\n', hello=HELLO)
    assert server.get("/hello")[0] == 200
    file = server.base / "var" / "log" / "streamlab.log"
    server.wait_for_log('"/hello"')
    assert server.terminate()[0] == 0
    (line,) = [json.loads(line) for line in file.read_text().splitlines() if '"/hello"' in line]
    assert (line["message"], line["method"], line["path"], line["status"]) == ("request", "GET", "/hello", 200)
    assert file.read_text() == server.log


def test_run_writes_its_log_to_the_file_it_is_given(start: Callable[..., Running]) -> None:
    server = start('[server]\nlog_file = "elsewhere/server.log"\n', hello=HELLO)
    assert server.get("/hello")[0] == 200
    assert server.terminate()[0] == 0
    written = (server.base / "elsewhere" / "server.log").read_text()
    assert "INFO streamlab.access request method=GET path=/hello status=200" in written
    assert not (server.base / "var" / "log").exists()


def test_run_writes_no_log_file_when_it_is_disabled(start: Callable[..., Running]) -> None:
    server = start('[server]\nlog_file = ""\n', hello=HELLO)
    assert server.get("/hello")[0] == 200
    assert server.terminate()[0] == 0
    assert not (server.base / "var" / "log").exists()
