"""`streamlab doctor`: its findings about streamlab, about another server, and about a proxy in between."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import proxies
from tests.support.servers import REPOSITORY, Running, free_port, run_streamlab, starting_in

OTHER = '''
"""A server of another framework, as in tutorials."""

import asyncio
import json
import random

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


@app.get("/large-first")
async def large_first():
    async def some():
        for _ in range(200):
            yield f"data: {random.randbytes(500).hex()}\\n\\n"
        async for event in events():
            yield event

    return StreamingResponse(some(), media_type="text/event-stream")


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
    """Declare ranges, and send wrong bytes."""
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

UNBUFFERED = "proxy_http_version 1.1; proxy_set_header Connection ''; proxy_buffering off;"

TICKER = "/stream/stock-ticker"

ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONPATH": str(REPOSITORY), "SSL_CERT_FILE": os.devnull}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Yield the port of a FastAPI application."""
    folder, port = tmp_path_factory.mktemp("other"), free_port()
    (folder / "other.py").write_text(OTHER)
    words = [sys.executable, "-m", "uvicorn", "--port", str(port), "--log-level", "warning", "other:app"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log)
    try:
        wait_until_there(port, process, folder / "log")
        yield port
    finally:
        process.kill()
        process.wait()


def wait_until_there(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a server responds on a port."""
    with contextlib.suppress(subprocess.CalledProcessError):
        words = ["curl", "-s", "-o", os.devnull, "--retry", "100", "--retry-connrefused", "--retry-delay", "0"]
        subprocess.run([*words, "--max-time", "20", f"http://127.0.0.1:{port}/up"], check=True)
    assert process.poll() is None, log.read_text()


def doctor(port: int, path: str, seconds: float = 2) -> tuple[int, list[str]]:
    """Return the exit status and the findings."""
    words = ("doctor", f"127.0.0.1:{port}{path}", "--seconds", str(seconds))
    status, output, errors = run_streamlab(*words, cwd=Path.cwd())
    assert errors == ""
    url, _, chart, *findings = output.splitlines()
    assert url == f"http://127.0.0.1:{port}{path}"
    assert chart[0] == chart[61] == "|"
    return status, findings


def has(findings: list[str], *beginnings: str) -> bool:
    return all(any(finding.startswith(beginning) for finding in findings) for beginning in beginnings)


@pytest.fixture(scope="module")
def ticker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Yield a server with prices of five symbols every 20 ms."""
    with starting_in(tmp_path_factory.mktemp("ticker")) as starting:
        yield starting("[scenarios.ticker]\ninterval = 0.02\n[scenarios.file]\nsample_mb = 3\n")


def line_for(proxy: str) -> str:
    """Return the line of the configuration of a proxy in docs/operating.md."""
    (line,) = re.findall(rf"^\| {proxy} \| `([^`]+)`", (REPOSITORY / "docs/operating.md").read_text(), re.MULTILINE)
    return str(line)


def test_streamlab_has_no_bad_finding(ticker: Running) -> None:
    status, found = doctor(ticker.port, TICKER)
    assert status == 0, found
    assert has(
        found, "yes It streams: the first byte after", "yes It resumes: after Last-Event-ID: ", "yes X-Accel-Buf"
    )
    status, found = doctor(ticker.port, "/download/large-file?rate=2000000", 1)
    assert status == 0, found
    assert has(found, "yes It streams", "yes It resumes: a range has the same bytes, and If-Range guards")


def test_a_path_is_examined_at_the_configured_server(other: int) -> None:
    status, output, _ = run_streamlab(
        "doctor", "/lines", "--seconds", "0.5", "--url", f"127.0.0.1:{other}", cwd=Path.cwd()
    )
    assert (status, output.splitlines()[0]) == (0, f"http://127.0.0.1:{other}/lines")


def test_defects_of_another_server_are_reported(other: int) -> None:
    status, found = doctor(other, "/events")
    assert status == 0, found
    assert has(
        found, "yes It streams", "    Its events have no ids", "    No X-Accel-Buffering", "    No Cache-Control"
    )
    status, found = doctor(other, "/forgetful")
    assert status == 1, found
    assert has(found, "no  It does not resume: after Last-Event-ID: ")
    status, found = doctor(other, "/collected")
    assert status == 1, found
    assert has(
        found,
        "no  All 14,891 bytes arrived at once",
        "    It cannot be resumed: it has neither event ids nor ranges.",
    )
    status, found = doctor(other, "/lines")
    assert (status, has(found, "yes It streams")) == (0, True), found
    status, found = doctor(other, "/ranges")
    assert (status, has(found, "no  It resumes wrongly")) == (1, True), found


# -- through proxies


def test_a_proxy_that_buffers_is_found(other: int, tmp_path: Path) -> None:
    with proxies.nginx_to(tmp_path, other) as nginx:
        status, found = doctor(nginx.port, "/events", 4)
    assert status == 1, found
    assert any("bursts end in the middle of an event: a proxy fills a buffer" in finding for finding in found), found
    assert has(found, "    Served by nginx/"), found
    with proxies.nginx_to(tmp_path, other, UNBUFFERED) as nginx:
        status, found = doctor(nginx.port, "/events")
    assert (status, has(found, "yes It streams")) == (0, True), found


def test_an_idle_timeout_of_a_proxy_is_found(other: int, tmp_path: Path) -> None:
    with proxies.nginx_to(tmp_path, other, f"{UNBUFFERED} proxy_read_timeout 2s;") as nginx:
        status, found = doctor(nginx.port, "/silent", 8)
    assert status == 1, found
    assert has(found, "no  It was closed after "), found


def test_compression_that_does_not_delay_is_a_note(other: int, tmp_path: Path) -> None:
    settings = f"{UNBUFFERED} gzip on; gzip_proxied any; gzip_types text/event-stream; gzip_min_length 1;"
    with proxies.nginx_to(tmp_path, other, settings) as nginx:
        status, found = doctor(nginx.port, "/events")
    assert status == 0, found
    assert has(
        found, "yes It streams", "    It is compressed (gzip) for clients that accept that, which does not delay"
    )


def test_nginx_needs_no_setting_and_is_not_misread(ticker: Running, tmp_path: Path) -> None:
    with proxies.nginx_to(tmp_path, ticker.port) as nginx:
        status, found = doctor(nginx.port, TICKER)
    assert status == 0, found
    streams, resumes, nginx_note = found
    assert streams.startswith("yes It streams")
    assert resumes.startswith("yes It resumes")
    assert re.fullmatch(
        r"    Served by nginx/[\d.]+, which removes X-Accel-Buffering from what it forwards\.", nginx_note
    )


def test_caddy_that_compresses_sends_browsers_nothing_without_its_line(ticker: Running, tmp_path: Path) -> None:
    with proxies.caddy(tmp_path, ticker.port, "encode gzip") as caddy:
        status, found = doctor(caddy.port, TICKER, 1)
    assert status == 1, found
    assert re.fullmatch(
        r"no  Browsers receive nothing: compressed \(gzip\), no event arrived in \d\.\d s; uncompressed, \d+ did\. "
        r"A proxy ignores `Cache-Control: no-transform`: exclude it from compression, "
        r"in Caddy by `match header !X-Accel-Buffering` inside `encode`\.",
        found[0],
    )
    assert has(found, "yes It resumes"), found
    assert not has(found, "yes It streams"), found
    with proxies.caddy(tmp_path, ticker.port, f"encode {{\ngzip\n{line_for('Caddy')}\n}}") as caddy:
        status, found = doctor(caddy.port, TICKER)
        assert caddy.get("/openapi.json", {"Accept-Encoding": "gzip"})[1]["content-encoding"] == "gzip"
    assert (status, has(found, "yes It streams", "yes It resumes")) == (0, True), found
    assert not any("compress" in finding for finding in found), found


def test_events_that_compression_delays_are_found(other: int, tmp_path: Path) -> None:
    """The first events fill the buffers of Caddy, which holds those that follow."""
    with proxies.caddy(tmp_path, other, "encode gzip") as caddy:
        status, found = doctor(caddy.port, "/large-first")
    assert status == 1, found
    assert re.fullmatch(
        r"no  Browsers receive it late: compressed \(gzip\), up to \d\.\d s pass without a byte; "
        r"uncompressed, 0\.\d s\. Send `Cache-Control: no-transform`, or exclude it from compression\.",
        found[0],
    ), found


def test_haproxy_delays_events_until_its_option_is_set(ticker: Running, tmp_path: Path) -> None:
    delayed = re.compile(
        r"    Events arrive (\d+) at a time, every 0\.[23] s: they are sent so, or a proxy delays them, "
        r"as HAProxy does without `option http-no-delay`\."
    )
    with proxies.haproxy(tmp_path, ticker.port) as haproxy:
        status, found = doctor(haproxy.port, TICKER)
    assert status == 0, found
    (match,) = filter(None, map(delayed.fullmatch, found))
    assert int(match[1]) > 5
    with proxies.haproxy(tmp_path, ticker.port, line_for("HAProxy")) as haproxy:
        status, found = doctor(haproxy.port, TICKER)
    assert (status, has(found, "yes It streams", "yes It resumes")) == (0, True), found
    assert not any(map(delayed.match, found)), found


def test_varnish_needs_its_line_for_several_ranges_only(ticker: Running, tmp_path: Path) -> None:
    ranges = {"Range": "bytes=0-9,20-29"}
    for receive, status_of_ranges in (("", 416), (line_for("Varnish"), 206)):
        with proxies.varnish(tmp_path, ticker.port, receive) as varnish:
            status, found = doctor(varnish.port, TICKER)
            assert varnish.get("/download/large-file?size_mb=1", ranges)[0] == status_of_ranges
        assert (status, has(found, "yes It streams", "yes It resumes")) == (0, True), found


def test_a_url_that_cannot_be_examined_is_reported(other: int) -> None:
    def run(url: str) -> tuple[int, str]:
        status, _, errors = run_streamlab("doctor", url, cwd=Path.cwd())
        return status, errors

    assert run("ftp://x") == (2, "streamlab: 'ftp://x' is not an http(s) URL\n")
    assert run(f"127.0.0.1:{other}/nothing") == (
        1,
        f"streamlab: http://127.0.0.1:{other}/nothing returned 404\n",
    )
    status, error = run(f"127.0.0.1:{free_port()}/")
    assert (status, ": no response: " in error) == (1, True)
