"""A server at a Unix socket: its file, who may connect, and nginx in front of it."""

import contextlib
import json
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import proxies
from tests.support.connections import read_until
from tests.support.docs import blocks
from tests.support.servers import Command, begin, ended_at_exit, free_port, run_streamlab, without

PRICES = "/stream/stock-ticker?limit=2"


@contextlib.contextmanager
def serving(base: Path, config: str = "", *options: str) -> Iterator[tuple[Command, list[str]]]:
    """Run a server at `unix:lab.sock`, or at another host of `options`; yield its process and what it has announced."""
    (base / "config.toml").write_text(config)
    arguments = ["run", "--config", str(base / "config.toml"), *(options or ("--host", "unix:lab.sock"))]
    with (
        (base / "stderr").open("a") as errors,
        ended_at_exit(
            begin(arguments, environ=without("", ("ticker", "file")), cwd=base.parent, stderr=errors)
        ) as process,
    ):
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith(("try it: ", "lab page: ")):
                break
        assert lines, (base / "stderr").read_text()
        yield process, lines


def curl(path: Path, target: str, *options: str) -> tuple[int, str]:
    """Send a request to a Unix socket by curl; return the status, 0 without a response, and the body."""
    words = ["curl", "-sS", "-m", "20", "-w", "\n%{http_code}", "--unix-socket", str(path), *options]
    done = subprocess.run([*words, f"http://localhost{target}"], capture_output=True, text=True, check=False)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def logged_client(base: Path, path: str) -> str:
    """Return the client in the line of the access log about a path, which may be written after the response."""
    deadline = time.monotonic() + 10
    while not (found := re.findall(rf" path={path} .*client=(\S+)", (base / "stderr").read_text())):
        assert time.monotonic() < deadline, (base / "stderr").read_text()
        time.sleep(0.01)
    return str(found[-1])


def test_a_server_listens_on_a_unix_socket_beside_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "lab.sock"
    (tmp_path / "var/files").mkdir(parents=True)
    (tmp_path / "var/files/a.bin").write_bytes(bytes(1_000_000))
    with serving(tmp_path, '[server]\nhost = "unix:lab.sock"\nport = 1\n', "--port", "2") as (process, lines):
        assert any(re.fullmatch(rf"streamlab \S+ serves unix:{re.escape(str(path))}", line) for line in lines)
        assert lines[-1] == f"try it: curl --unix-socket {path} http://localhost/"
        assert stat.filemode(path.lstat().st_mode) == "srw-rw----"
        status, events = curl(path, PRICES, "-N")
        assert (status, events.count("data: ")) == (200, 2)
        assert len(curl(path, "/files/a.bin")[1]) == 1_000_000
        assert curl(path, "/health", "-H", "Host: stream.example.org")[0] == 200  # a proxy sends any
        assert "       curl -N 'http://localhost/stream/stock-ticker?" in curl(path, "/")[1]
        assert logged_client(tmp_path, "/stream/stock-ticker") == "unix"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert not path.exists()
    status, listed, _ = run_streamlab("routes", cwd=tmp_path, **without("", ("file",)))
    assert (status, f"       curl --unix-socket {path} http://localhost/health\n" in listed) == (0, True)


def test_the_file_of_a_dead_server_is_replaced_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "lab.sock"
    with serving(tmp_path) as (process, _):
        process.kill()
        process.wait(10)
    assert path.is_socket()
    with serving(tmp_path) as (process, _):
        status, _, errors = run_streamlab("run", "--host", "unix:lab.sock", cwd=tmp_path, **without("", ()))
        assert status == 2
        assert re.match('--host: server.host = "unix:/.* - another server listens on it\n', errors)
        assert run_streamlab("check", cwd=tmp_path, STREAMLAB_SERVER__HOST="unix:lab.sock", **without("", ()))[0] == 0
        assert curl(path, "/health")[0] == 200
        path.rename(tmp_path / "moved.sock")
        with serving(tmp_path) as (_, _):  # as of an operator who starts a new server first
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            assert curl(path, "/health")[0] == 200


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("unix:", "needs a path, as unix:/run/streamlab.sock"),
        ("unix:file", "cannot listen on it: there is a file of this name that is not a socket"),
        ("unix:link", "cannot listen on it: there is a file of this name that is not a socket"),
        ("unix:no/lab.sock", "cannot listen on it: there is no folder {base}/no"),
        (f"unix:{'x' * 108}", "cannot listen on it: the path is longer than 107 bytes"),
    ],
)
def test_a_path_that_cannot_be_a_socket_is_a_fault(tmp_path: Path, host: str, reason: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "config.toml").write_text(f'[server]\nhost = "{host}"\n')
    for command in ("run", "check"):
        status, _, errors = run_streamlab(command, cwd=tmp_path, **without("", ()))
        assert status == 2
        assert reason.format(base=tmp_path) in errors
    assert (tmp_path / "file").read_text() == "kept"


def test_a_unix_socket_has_no_tls(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        '[server]\nhost = "unix:lab.sock"\ntls_certificate = "a.pem"\ntls_key = "a.key"\n'
    )
    status, _, errors = run_streamlab("run", cwd=tmp_path, **without("", ()))
    assert (status, "server - a Unix socket has no TLS: remove tls_certificate and tls_key" in errors) == (2, True)


def test_the_name_to_which_a_client_binds_its_end_is_not_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = '[server]\nallowed_hosts = ["stream.example.org"]\ntrusted_proxies = ["127.0.0.1/32"]\n'
    with serving(tmp_path, config), socket.socket(socket.AF_UNIX) as client:
        client.bind("127.0.0.1")
        client.connect("lab.sock")
        client.sendall(b"GET /no HTTP/1.1\r\nHost: stream.example.org\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n")
        assert read_until(client, b"\r\n").startswith(b"HTTP/1.1 404 ")
        assert logged_client(tmp_path, "/no") == "unix"
        assert curl(tmp_path / "lab.sock", "/health")[0] == 421  # localhost is not in the list


def test_nginx_forwards_to_the_socket_and_reports_its_clients(tmp_path: Path) -> None:
    base, folder, port = tmp_path / "server", tmp_path / "nginx", free_port()
    base.mkdir()
    folder.mkdir()
    location = f"""location / {{
        proxy_pass http://unix:{base}/lab.sock;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $http_x_client;
        proxy_set_header X-Forwarded-Prefix /stream;
    }}"""
    (table,) = (block for block in blocks("docs/operating.md", "toml") if "unix:" in block)
    table = table.replace("/run/streamlab/streamlab.sock", f"{base}/lab.sock")
    config = f"{table}[limits]\nstreams_per_client = 1\n[scenarios.ticker]\ninterval = 0.05\n"
    with (
        serving(base, config, "--port", "1"),
        proxies.nginx(folder, f"server {{ listen 127.0.0.1:{port}; {location} }}", port=port) as proxy,
    ):
        request = "GET /stream/stock-ticker HTTP/1.1\nHost: localhost\nX-Client: 203.0.113.7"
        with proxy.send(request) as stream:
            read_until(stream, b"data: ")
            assert proxy.get(PRICES, {"X-Client": "203.0.113.7"})[0] == 429
            assert proxy.get(PRICES, {"X-Client": "203.0.113.8"})[0] == 200
            read_until(stream, b"data: ")
        assert proxy.get("/files", {"X-Client": "203.0.113.9"})[1]["location"] == "/stream/files/"
        assert logged_client(base, "/files") == "203.0.113.9"
        assert json.loads(proxy.get("/health")[2])["status"] == "ok"
