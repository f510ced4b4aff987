"""Real proxies in front of a server under test, as Debian packages them; a test skips where one is not installed."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.servers import Running, ended_at_exit, free_port

START_SECONDS = 20
"""Maximum time before a proxy accepts connections, in seconds; Varnish compiles its configuration by a C compiler."""


@contextlib.contextmanager
def nginx(folder: Path, http: str, *, port: int) -> Iterator[Running]:
    """Run nginx with these directives inside its `http`, which make it listen on a port."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr info; events {{}}\n"
        f"http {{ access_log off; {' '.join(f'{kind}_temp_path {folder}/{kind};' for kind in kinds)}\n{http}\n}}\n"
    )
    command = ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    with _running(command, folder, port) as proxy:
        yield proxy


@contextlib.contextmanager
def nginx_to(folder: Path, upstream: int, settings: str = "") -> Iterator[Running]:
    """Run nginx in front of a port; `settings` are directives of its location, and without any it has its defaults."""
    port = free_port()
    location = f"location / {{ proxy_pass http://127.0.0.1:{upstream}; {settings} }}"
    with nginx(folder, f"server {{ listen 127.0.0.1:{port}; {location} }}", port=port) as proxy:
        yield proxy


@contextlib.contextmanager
def caddy(folder: Path, upstream: int, site: str = "") -> Iterator[Running]:
    """Run Caddy in front of a port; `site` are further directives of its site."""
    port = free_port()
    (folder / "Caddyfile").write_text(
        f"{{\nadmin off\nauto_https off\n}}\n"
        f"http://127.0.0.1:{port} {{\n{site}\nreverse_proxy 127.0.0.1:{upstream}\n}}\n"
    )
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
    with _running(command, folder, port) as proxy:
        yield proxy


@contextlib.contextmanager
def haproxy(folder: Path, upstream: int, defaults: str = "") -> Iterator[Running]:
    """Run HAProxy in front of a port; `defaults` is a further line of its section `defaults`."""
    port = free_port()
    (folder / "haproxy.cfg").write_text(
        f"defaults\nmode http\ntimeout connect 5s\ntimeout client 60s\ntimeout server 60s\n{defaults}\n"
        f"listen streamlab\nbind 127.0.0.1:{port}\nserver streamlab 127.0.0.1:{upstream}\n"
    )
    with _running(["haproxy", "-db", "-f", str(folder / "haproxy.cfg")], folder, port) as proxy:
        yield proxy


@contextlib.contextmanager
def varnish(folder: Path, upstream: int, receive: str = "") -> Iterator[Running]:
    """Run Varnish in front of a port; `receive` is a statement of `vcl_recv`, before those of its default VCL."""
    port = free_port()
    (folder / "default.vcl").write_text(
        f'vcl 4.1;\nbackend default {{ .host = "127.0.0.1"; .port = "{upstream}"; }}\n'
        f"{f'sub vcl_recv {{ {receive} }}' if receive else ''}\n"
    )
    command = ["varnishd", "-F", "-j", "none", "-n", str(folder / "varnish"), "-a", f"127.0.0.1:{port}"]
    with _running([*command, "-s", "malloc,16m", "-f", str(folder / "default.vcl")], folder, port) as proxy:
        yield proxy


@contextlib.contextmanager
def _running(command: Sequence[str], folder: Path, port: int) -> Iterator[Running]:
    """Run a proxy until the block ends; its messages are in `log`."""
    name = command[0]
    # The PATH of a user often lacks the sbin folders.
    binary = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip(f"{name} is not installed")
    log = folder / f"{name}.log"
    with log.open("w") as messages:
        process = subprocess.Popen(
            [binary, *command[1:]],
            stdout=messages,
            stderr=messages,
            text=True,
            env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)},
        )
    proxy = Running(process, f"http://127.0.0.1:{port}", folder, log)
    with ended_at_exit(process):
        try:
            _wait_until_it_listens(proxy)
            yield proxy
        finally:
            process.terminate()
            assert process.wait(10) in (0, -signal.SIGTERM), proxy.log


def _wait_until_it_listens(proxy: Running) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert proxy.process.poll() is None, proxy.log
        assert time.monotonic() < deadline, proxy.log
        with contextlib.suppress(ConnectionRefusedError):
            proxy.connect().close()
            return
        time.sleep(0.01)
