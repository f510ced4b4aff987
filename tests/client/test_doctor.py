"""`streamlab doctor`: its findings about streamlab, about another server, and about a proxy in between."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.servers import REPOSITORY, Running, free_port, run_streamlab

STRANGER = '''
"""A server of somebody else, as tutorials write it."""

import asyncio
import json
import time

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

app = FastAPI()


async def events():
    for number in range(10_000):
        yield f"data: {json.dumps({'number': number, 'filler': 'x' * 90})}\\n\\n"
        await asyncio.sleep(0.02)


@app.get("/events")
async def endless():
    return StreamingResponse(events(), media_type="text/event-stream")


@app.get("/forgetful")
async def forgetful(request: Request):
    async def from_the_start():
        for number in range(10_000):
            yield f"id: {number}\\ndata: {number}\\n\\n"
            await asyncio.sleep(0.02)

    return StreamingResponse(from_the_start(), media_type="text/event-stream")


@app.get("/silent")
async def silent():
    async def once():
        yield "id: 1\\ndata: 1\\n\\n"
        await asyncio.sleep(60)

    return StreamingResponse(once(), media_type="text/event-stream")


@app.get("/collected")
async def collected():
    await asyncio.sleep(1)
    return JSONResponse([{"number": number} for number in range(1000)])


@app.get("/lines")
async def lines():
    async def some():
        for number in range(20):
            yield f"{number}\\n"
            await asyncio.sleep(0.05)

    return StreamingResponse(some(), media_type="text/plain")


@app.get("/ranges")
async def ranges(request: Request):
    """Promise ranges, and send the wrong bytes of them."""
    headers = {"Accept-Ranges": "bytes", "ETag": '"one"'}
    body = b"".join(b"%07d\\n" % number for number in range(10_000))
    if "range" in request.headers:
        start, end = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        part = body[start + 8 : end + 9]
        return PlainTextResponse(part, 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(body)}"})
    return PlainTextResponse(body, headers=headers)


@app.get("/up")
async def up():
    return "yes"
'''

NGINX = """
daemon off; master_process off; pid '{folder}/nginx.pid'; error_log stderr; {user}
events {{ }}
http {{
    access_log off;
    client_body_temp_path '{folder}/a'; proxy_temp_path '{folder}/b'; fastcgi_temp_path '{folder}/c';
    uwsgi_temp_path '{folder}/d'; scgi_temp_path '{folder}/e';
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://127.0.0.1:{upstream}; {settings} }}
    }}
}}
"""
RIGHT = "proxy_http_version 1.1; proxy_set_header Connection ''; proxy_buffering off;"

ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONPATH": str(REPOSITORY), "SSL_CERT_FILE": os.devnull}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a FastAPI application."""
    folder, port = tmp_path_factory.mktemp("stranger"), free_port()
    (folder / "stranger.py").write_text(STRANGER)
    words = [sys.executable, "-m", "uvicorn", "--port", str(port), "--log-level", "warning", "stranger:app"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log)
    try:
        wait_until_there(port, process, folder / "log")
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """`nginx(upstream, settings)`: the port of a proxy in front of another port."""
    path = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.skip("nginx is not installed")
    processes: list[subprocess.Popen[bytes]] = []

    def starting(upstream: int, settings: str = "") -> int:
        port, user = free_port(), "user root root;" if os.geteuid() == 0 else ""
        text = NGINX.format(folder=tmp_path, port=port, upstream=upstream, settings=settings, user=user)
        (tmp_path / "nginx.conf").write_text(text)
        with (tmp_path / "nginx.log").open("wb") as log:
            words = [path, "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
            processes.append(subprocess.Popen(words, stdout=log, stderr=log))
        wait_until_there(port, processes[-1], tmp_path / "nginx.log")
        return port

    yield starting
    for process in processes:
        process.terminate()
        process.wait(10)


def wait_until_there(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a server responds on a port."""
    with contextlib.suppress(subprocess.CalledProcessError):
        words = ["curl", "-s", "-o", os.devnull, "--retry", "100", "--retry-connrefused", "--retry-delay", "0"]
        subprocess.run([*words, "--max-time", "20", f"http://127.0.0.1:{port}/up"], check=True)
    assert process.poll() is None, log.read_text()


def doctor(port: int, path: str, seconds: float = 2) -> tuple[int, list[str]]:
    """The exit status, and the findings."""
    words = ("doctor", f"127.0.0.1:{port}{path}", "--seconds", str(seconds))
    status, output, errors = run_streamlab(*words, cwd=Path.cwd())
    assert errors == ""
    url, _, chart, *findings = output.splitlines()
    assert url == f"http://127.0.0.1:{port}{path}"
    assert chart[0] == chart[61] == "|"
    return status, findings


def has(findings: list[str], *beginnings: str) -> bool:
    return all(any(finding.startswith(beginning) for finding in findings) for beginning in beginnings)


def test_streamlab_has_no_bad_finding(start: Callable[..., Running]) -> None:
    server = start("[scenarios.ticker]\ninterval = 0.05\n[scenarios.file]\nsample_mb = 3\n")
    status, found = doctor(server.port, "/stream/stock-ticker")
    assert status == 0, found
    assert has(
        found, "yes It streams: the first byte after", "yes It resumes: after Last-Event-ID: ", "yes X-Accel-Buf"
    )
    status, found = doctor(server.port, "/download/large-file?rate=2000000", 1)
    assert status == 0, found
    assert has(found, "yes It streams", "yes It resumes: a range has the same bytes, and If-Range guards")


def test_a_path_is_examined_at_the_server_that_is_set(stranger: int) -> None:
    status, output, _ = run_streamlab(
        "doctor", "/lines", "--seconds", "0.5", "--url", f"127.0.0.1:{stranger}", cwd=Path.cwd()
    )
    assert (status, output.splitlines()[0]) == (0, f"http://127.0.0.1:{stranger}/lines")


def test_what_another_server_lacks_is_reported(stranger: int) -> None:
    status, found = doctor(stranger, "/events")
    assert status == 0, found
    assert has(
        found, "yes It streams", "    Its events have no ids", "    No X-Accel-Buffering", "    No Cache-Control"
    )
    status, found = doctor(stranger, "/forgetful")
    assert status == 1, found
    assert has(found, "no  It does not resume: after Last-Event-ID: ")
    status, found = doctor(stranger, "/collected")
    assert status == 1, found
    assert has(
        found,
        "no  All 14,891 bytes arrived at once",
        "    It cannot be resumed: it has neither event ids nor ranges.",
    )
    status, found = doctor(stranger, "/lines")
    assert (status, has(found, "yes It streams")) == (0, True), found
    status, found = doctor(stranger, "/ranges")
    assert (status, has(found, "no  It resumes wrongly")) == (1, True), found


def test_a_proxy_that_buffers_is_found(stranger: int, nginx: Callable[..., int]) -> None:
    status, found = doctor(nginx(stranger), "/events", 4)
    assert status == 1, found
    assert has(found, "no  "), found
    assert any("bursts end in the middle of an event" in finding for finding in found), found
    assert has(found, "    Served by a proxy or nginx: nginx")
    status, found = doctor(nginx(stranger, RIGHT), "/events")
    assert (status, has(found, "yes It streams")) == (0, True), found


def test_an_idle_timeout_of_a_proxy_is_found(stranger: int, nginx: Callable[..., int]) -> None:
    status, found = doctor(nginx(stranger, f"{RIGHT} proxy_read_timeout 2s;"), "/silent", 8)
    assert status == 1, found
    assert has(found, "no  It was closed after "), found


def test_a_proxy_that_compresses_is_found(stranger: int, nginx: Callable[..., int]) -> None:
    squeezing = f"{RIGHT} gzip on; gzip_proxied any; gzip_types text/event-stream; gzip_min_length 1;"
    _, found = doctor(nginx(stranger, squeezing), "/events")
    assert any("compress" in finding for finding in found), found


def test_streamlab_needs_no_setting_of_nginx(start: Callable[..., Running], nginx: Callable[..., int]) -> None:
    server = start("[scenarios.ticker]\ninterval = 0.05\n")
    status, found = doctor(nginx(server.port), "/stream/stock-ticker")
    assert (status, has(found, "yes It streams", "yes It resumes")) == (0, True), found


def test_a_url_that_cannot_be_examined_is_reported(stranger: int) -> None:
    def run(url: str) -> tuple[int, str]:
        words = [sys.executable, "-m", "streamlab", "doctor", url]
        done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=50, check=False)
        return done.returncode, done.stderr

    assert run("ftp://x") == (2, "streamlab: 'ftp://x' is not an http(s) URL\n")
    assert run(f"127.0.0.1:{stranger}/nothing") == (
        1,
        f"streamlab: http://127.0.0.1:{stranger}/nothing returned 404\n",
    )
    status, error = run(f"127.0.0.1:{free_port()}/")
    assert (status, ": no response: " in error) == (1, True)
