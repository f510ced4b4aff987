"""Downloads to the letter of RFC 9110: validators, conditions, ranges, and bytes that are never wrong."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient

from streamlab.config import Config
from streamlab.server.app import create_app
from tests.support.connections import read_all, read_until
from tests.support.servers import Running, disabled, plugin_module, run_streamlab

LOADED_PLUGINS = ("file",)

BODY = bytes(range(256)) * 1000
MODIFIED = 1_700_000_000
DATE = formatdate(MODIFIED, usegmt=True)

Client = TestClient[Any, Any]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(BODY)
    os.utime(path, (MODIFIED, MODIFIED))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
async def client(aiohttp_client: Any, tmp_path: Path, file: Path, root: Path) -> Client:
    tables = {"scenarios": {**disabled(but="file"), "file": {"large_file": str(file), "root": str(root)}}}
    client: Client = await aiohttp_client(create_app(Config.of(tables, base=tmp_path)), auto_decompress=False)
    return client


async def get(client: Client, headers: dict[str, str] | None = None, **options: Any) -> tuple[ClientResponse, bytes]:
    response = await client.request(
        options.pop("method", "GET"), options.pop("path", "/download/large-file"), headers=headers, **options
    )
    return response, await response.read()


async def etag(client: Client) -> str:
    return (await get(client, method="HEAD"))[0].headers["ETag"]


# -- the complete file


async def test_download_has_every_header_it_needs_to_be_resumed(client: Client, file: Path) -> None:
    response, body = await get(client)
    status = file.stat()
    assert body == BODY
    assert {name.lower(): value for name, value in response.headers.items()} == {
        "content-type": "application/octet-stream",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
        "etag": f'"{status.st_ino:x}-{len(BODY):x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"',
        "last-modified": DATE,
        "accept-ranges": "bytes",
        "content-disposition": 'attachment; filename="data.bin"',
        "content-length": str(len(BODY)),
        "date": response.headers["Date"],
        "server": "streamlab",
        "x-content-type-options": "nosniff",
    }


async def test_head_has_the_headers_of_get_and_ignores_range(client: Client) -> None:
    whole, _ = await get(client)
    head, body = await get(client, {"Range": "bytes=0-3"}, method="HEAD")
    assert (head.status, body, head.headers["Content-Length"]) == (200, b"", whole.headers["Content-Length"])


async def test_empty_file_is_a_complete_response(client: Client, file: Path) -> None:
    file.write_bytes(b"")
    for field, status in ((None, 200), ("bytes=0-", 416), ("bytes=-5", 200), ("bytes=-0", 416)):
        response, body = await get(client, {"Range": field} if field else {})
        assert (response.status, response.headers.get("Content-Range")) == (
            status,
            "bytes */0" if status == 416 else None,
        )
        assert status == 416 or body == b""


# -- ranges: RFC 9110 section 14


@pytest.mark.parametrize(
    ("field", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-99", 0, 99),
        ("bytes=255999-", 255_999, 255_999),
        ("bytes=1000-", 1000, 255_999),
        ("bytes=-1", 255_999, 255_999),
        ("bytes=-999999999", 0, 255_999),
        ("bytes=10-999999999", 10, 255_999),
        ("BYTES=5-9", 5, 9),
        ("bytes = 5-9", 5, 9),
        ("bytes=,5-9,,", 5, 9),
        ("bytes=5-9, 7-20", 5, 20),
        ("bytes=0-9,10-19,20-29", 0, 29),
        ("bytes=5-9,999999999-", 5, 9),
        ("bytes=0-", 0, 255_999),
    ],
)
async def test_one_range_is_206_with_exactly_those_bytes(client: Client, field: str, first: int, last: int) -> None:
    response, body = await get(client, {"Range": field})
    assert (response.status, response.headers["Content-Range"]) == (206, f"bytes {first}-{last}/256000")
    assert body == BODY[first : last + 1]


@pytest.mark.parametrize(
    "field",
    [
        "lines=0-9",
        "bytes",
        "bytes=",
        "bytes=,",
        "bytes=abc",
        "bytes=9-0",
        "bytes=0-9-",
        "bytes=--5",
        "bytes=0x1-2",
        "=0-1",
    ]
    + ["bytes=1-2;3-4", "bytes=²-3", "bytes=" + "9" * 100 + "-", "bytes=+1-2"]
    + ["bytes=\u0660-\u0663", "bytes=0-\u0663", "bytes=-\u0665", "bytes=\uff10-\uff13", "bytes=\u0967-\u0968"],
)
async def test_range_that_is_malformed_or_of_another_unit_is_ignored(client: Client, field: str) -> None:
    response, body = await get(client, {"Range": field})
    assert (response.status, body) == (200, BODY)


@pytest.mark.parametrize("field", ["bytes=-0", "bytes=256000-", "bytes=256000-256001", "bytes=-0,300000-"])
async def test_range_beyond_the_end_is_416_with_the_size(client: Client, field: str) -> None:
    response, body = await get(client, {"Range": field})
    assert (response.status, response.headers["Content-Range"]) == (416, "bytes */256000")
    assert (response.content_type, json.loads(body)["status"]) == ("application/problem+json", 416)


async def test_several_ranges_are_multipart_in_the_requested_order(client: Client) -> None:
    response, body = await get(client, {"Range": "bytes=1000-1009,0-1,-3"})
    boundary = re.fullmatch(r"multipart/byteranges; boundary=(\w+)", response.headers["Content-Type"])[1]  # type: ignore[index]
    assert "Content-Range" not in response.headers
    parts = [(1000, 1009), (0, 1), (255_997, 255_999)]
    expected = b"".join(
        f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Range: bytes {first}-{last}/256000\r\n\r\n".encode()
        + BODY[first : last + 1]
        for first, last in parts
    )
    assert (response.status, body) == (206, expected + f"\r\n--{boundary}--\r\n".encode())
    assert response.headers["Content-Length"] == str(len(body))


async def test_a_thousand_ranges_send_no_more_than_the_file(client: Client) -> None:
    tiny = "bytes=" + ",".join("0-" for _ in range(1000))
    response, body = await get(client, {"Range": tiny})
    assert (response.status, body) == (206, BODY)
    scattered = "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 100_000, 200))
    response, body = await get(client, {"Range": scattered})
    assert (response.status, body) == (200, BODY)


# -- conditions: RFC 9110 section 13


async def test_if_range_resumes_only_the_same_version_of_the_file(client: Client) -> None:
    tag = await etag(client)
    same, other = formatdate(MODIFIED, usegmt=True), formatdate(MODIFIED + 1, usegmt=True)
    for condition, status in (
        (tag, 206),
        (f"W/{tag}", 200),
        ('"another"', 200),
        (same, 206),
        (other, 200),
        (formatdate(MODIFIED - 1, usegmt=True), 200),
        ("rubbish", 200),
        ("", 200),
    ):
        response, body = await get(client, {"Range": "bytes=0-3", "If-Range": condition})
        assert (response.status, body) == (status, BODY[:4] if status == 206 else BODY), condition


async def test_changed_file_is_not_resumed_into_the_old_one(client: Client, file: Path) -> None:
    tag = await etag(client)
    file.write_bytes(b"new" * 100_000)
    response, body = await get(client, {"Range": "bytes=100-", "If-Range": tag})
    assert (response.status, body) == (200, b"new" * 100_000)


EARLIER, LATER = formatdate(MODIFIED - 1, usegmt=True), formatdate(MODIFIED + 1, usegmt=True)
ARABIC = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
"""Digits that `int` accepts, but the grammar of HTTP does not."""


async def test_file_overwritten_with_its_time_reset_is_another_version(client: Client, file: Path) -> None:
    tag = await etag(client)
    before = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    response, body = await get(client, {"Range": "bytes=100-", "If-Range": tag})
    assert (response.status, body) == (200, b"other" + BODY[5:])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-None-Match": "TAG"}, 304),
        ({"If-None-Match": "W/TAG"}, 304),
        ({"If-None-Match": '"a", TAG ,"b"'}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"a,b"'}, 200),
        ({"If-None-Match": "rubbish"}, 200),
        ({"If-Modified-Since": DATE}, 304),
        ({"If-Modified-Since": LATER}, 304),
        ({"If-Modified-Since": EARLIER}, 200),
        ({"If-Modified-Since": "rubbish"}, 200),
        ({"If-Modified-Since": LATER.translate(ARABIC)}, 200),
        ({"If-None-Match": '"a"', "If-Modified-Since": LATER}, 200),
        ({"If-Match": "TAG"}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": "W/TAG"}, 412),
        ({"If-Match": '"a"'}, 412),
        ({"If-Match": "rubbish"}, 412),
        ({"If-Unmodified-Since": DATE}, 200),
        ({"If-Unmodified-Since": EARLIER}, 412),
        ({"If-Unmodified-Since": "rubbish"}, 200),
        ({"If-Unmodified-Since": EARLIER.translate(ARABIC)}, 200),
        ({"If-Match": "TAG", "If-Unmodified-Since": EARLIER}, 200),
        ({"If-Match": '"a"', "If-None-Match": "TAG"}, 412),
        ({"If-Match": "TAG", "If-None-Match": "TAG"}, 304),
        ({"If-None-Match": "TAG", "Range": "bytes=0-3"}, 304),
        ({"If-Match": "TAG", "Range": "bytes=0-3"}, 206),
    ],
)
async def test_conditions_are_evaluated_in_the_order_of_the_standard(
    client: Client, headers: dict[str, str], status: int
) -> None:
    tag = await etag(client)
    response, body = await get(client, {name: value.replace("TAG", tag) for name, value in headers.items()})
    assert response.status == status
    if status == 304:
        assert (response.headers["ETag"], body) == (tag, b"")


# -- digests: RFC 9530


async def test_digest_of_the_complete_file_is_sent_on_request(client: Client) -> None:
    expected = f"sha-256=:{base64.b64encode(hashlib.sha256(BODY).digest()).decode()}:"
    for headers in ({}, {"Range": "bytes=5-9"}):
        for want, digest in (
            ("sha-256=1", expected),
            ("sha-512=3, sha-256=10", expected),
            ("sha-256=0", None),
            ("sha-256=\u0661", None),
            ("sha-256=" + "9" * 5000, None),
        ):
            response, _ = await get(client, {**headers, "Want-Repr-Digest": want})
            assert response.headers.get("Repr-Digest") == digest
    response, _ = await get(client)
    assert "Repr-Digest" not in response.headers


async def test_digest_follows_the_file(client: Client, file: Path) -> None:
    await get(client, {"Want-Repr-Digest": "sha-256=1"})
    file.write_bytes(b"new")
    response, _ = await get(client, {"Want-Repr-Digest": "sha-256=1"}, method="HEAD")
    assert response.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(b'new').digest()).decode()}:"


async def test_digest_of_generated_bytes_is_that_of_the_body(client: Client) -> None:
    response, body = await get(client, {"Want-Repr-Digest": "sha-256=1"}, params={"size_mb": "3"})
    assert response.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


# -- generated bytes


async def test_generated_bytes_have_the_requested_size_and_can_be_resumed(client: Client) -> None:
    response, whole = await get(client, params={"size_mb": "3"})
    assert (len(whole), response.headers["Content-Length"]) == (3_000_000, "3000000")
    tag = response.headers["ETag"]
    for first in (1, 1_048_575, 1_048_576, 2_999_999):
        response, rest = await get(client, {"Range": f"bytes={first}-", "If-Range": tag}, params={"size_mb": "3"})
        assert (response.status, rest) == (206, whole[first:])


@pytest.mark.parametrize(
    "query", ["size_mb=0", "size_mb=100001", "size_mb=x", "rate=1", "rate=-5", "speed=3", "rate=5000&rate=6000"]
)
async def test_query_out_of_bounds_is_422(client: Client, query: str) -> None:
    response, body = await get(client, path=f"/download/large-file?{query}")
    assert (response.status, json.loads(body)["errors"][0]["in"]) == (422, "query")


async def test_the_average_rate_is_the_requested_one(client: Client) -> None:
    started = time.monotonic()
    _, body = await get(client, params={"rate": "512000"})
    assert body == BODY
    assert 0.3 < time.monotonic() - started < 5


def test_a_paced_download_that_arrived_completely_is_finished(start: Callable[..., Running], tmp_path: Path) -> None:
    server = start()
    status, _, body = server.get("/download/large-file?size_mb=1&rate=4000000")
    assert (status, len(body)) == (200, 1_000_000)
    assert "bytes=1000000" in server.wait_for_log("outcome=finished")


# -- a folder


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("plain.txt", 'attachment; filename="plain.txt"'),
        ("two words.txt", 'attachment; filename="two words.txt"'),
        ("grüße 猫.txt", "attachment; filename=\"gr__e _.txt\"; filename*=UTF-8''gr%C3%BC%C3%9Fe%20%E7%8C%AB.txt"),
        ('quo"te\\.txt', "attachment; filename=\"quo_te_.txt\"; filename*=UTF-8''quo%22te%5C.txt"),
        ("per%cent+plus&?#.txt", 'attachment; filename="per%cent+plus&?#.txt"'),
    ],
)
async def test_files_of_any_name_are_found_and_saved_under_it(
    client: Client, root: Path, name: str, field: str
) -> None:
    (root / name).write_text("content")
    _, listing = await get(client, {"Accept": "application/json"}, path="/files/")
    (entry,) = json.loads(listing)["entries"]
    response, body = await get(client, path=entry["url"])
    assert (entry["name"], body, response.headers["Content-Disposition"]) == (name, b"content", field)


async def test_name_that_is_not_utf_8_is_listed_and_served(client: Client, root: Path) -> None:
    (root / os.fsdecode(b"caf\xe9")).write_text("content")
    _, listing = await get(client, {"Accept": "application/json"}, path="/files/")
    (entry,) = json.loads(listing)["entries"]
    assert entry["url"] == "/files/caf%E9"
    assert (await get(client, {"Accept": "text/html"}, path="/files/"))[0].status == 200


async def test_media_type_follows_the_name_and_compressed_files_stay_compressed(client: Client, root: Path) -> None:
    for name, media_type in (
        ("a.json", "application/json"),
        ("a.tar.gz", "application/gzip"),
        ("a.html", "text/html"),
        ("a.unknown", "application/octet-stream"),
    ):
        (root / name).write_bytes(b"x")
        response, _ = await get(client, {"Accept-Encoding": "gzip"}, path=f"/files/{name}")
        assert (response.headers["Content-Type"], "Content-Encoding" in response.headers) == (media_type, False)


async def test_folder_is_listed_in_order_and_in_pages(client: Client, root: Path) -> None:
    for name in ("b.txt", "a.txt", ".hidden", "c.txt"):
        (root / name).write_text("12345")
    (root / "sub").mkdir()
    os.utime(root / "a.txt", (MODIFIED, MODIFIED))
    response, body = await get(client, {"Accept": "application/json"}, path="/files/")
    listing = json.loads(body)
    assert listing["entries"][0] == {
        "name": "a.txt",
        "type": "file",
        "modified": "2023-11-14T22:13:20+00:00",
        "url": "/files/a.txt",
        "size": 5,
    }
    assert [entry["name"] for entry in listing["entries"]] == ["a.txt", "b.txt", "c.txt", "sub"]
    assert response.headers["Vary"] == "Accept"
    _, body = await get(client, {"Accept": "application/json"}, path="/files/?limit=2&after=a.txt")
    page = json.loads(body)
    assert ([entry["name"] for entry in page["entries"]], page["next_after"]) == (["b.txt", "c.txt"], "c.txt")


async def test_folder_is_html_for_a_browser_and_names_cannot_inject(client: Client, root: Path) -> None:
    (root / "<script>alert(1)<").write_text("x")
    (root / "sub").mkdir()
    response, body = await get(client, {"Accept": "text/html,*/*"}, path="/files/")
    assert response.content_type == "text/html"
    assert b"<script>alert" not in body
    assert b"&lt;script&gt;" in body
    assert b'<a href="../">All routes</a>' in body
    response, body = await get(client, {"Accept": "text/html"}, path="/files/sub")
    assert (response.status, b'<a href="../">Parent folder</a>' in body) == (200, True)


async def test_served_folder_that_cannot_be_created_is_503(client: Client, root: Path) -> None:
    root.rmdir()
    root.write_text("")
    response, body = await get(client, path="/files/")
    assert (response.status, json.loads(body)["detail"]) == (503, "The served folder cannot be created: File exists.")


async def test_file_with_a_slash_after_it_is_a_file(client: Client, root: Path) -> None:
    (root / "a.txt").write_text("x")
    assert (await get(client, path="/files/a.txt/"))[0].status == 200


@pytest.fixture
def walled(start: Callable[..., Running], tmp_path: Path) -> Running:
    """Start a server with a secret next to its folder, and links to it inside."""
    root = tmp_path / "served"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "in.txt").write_text("inside")
    (root / ".env").write_text("hidden")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "served-too").mkdir()
    (tmp_path / "served-too" / "secret.txt").write_text("secret")
    (root / "out").symlink_to(tmp_path / "secret.txt")
    (root / "out-folder").symlink_to(tmp_path)
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "loop").symlink_to(root / "loop")
    (root / "in").symlink_to("sub/in.txt")
    os.mkfifo(root / "pipe")
    return start('[scenarios.file]\nroot = "served"')


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "sub/../../secret.txt",
        "sub/%2e%2e%2f%2e%2e%2fsecret.txt",
        "..%252fsecret.txt",
        "..\\secret.txt",
        "../served-too/secret.txt",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "//etc/passwd",
        "sub//in.txt",
        "./sub/in.txt",
        "sub/in.txt%00.png",
        "%00",
        "out",
        "out-folder/secret.txt",
        "out-folder/",
        "absolute",
        "loop",
        "pipe",
        ".env",
        "sub/in.txt/more",
        "missing",
        "a" * 300,
        "%ff%fe",
        "%zz",
    ],
)
def test_no_path_leads_out_of_the_folder(walled: Running, path: str) -> None:
    received = read_all(walled.send(f"GET /files/{path} HTTP/1.1\nHost: localhost\nConnection: close"))
    assert received.startswith(b"HTTP/1.1 404 Not Found\r\n"), received
    assert b"secret" not in received.partition(b"\r\n\r\n")[2]


def test_link_that_stays_inside_is_followed_and_others_are_not_listed(walled: Running) -> None:
    assert walled.get("/files/in")[2] == b"inside"
    names = [entry["name"] for entry in json.loads(walled.get("/files/", {"Accept": "application/json"})[2])["entries"]]
    assert names == ["in", "sub"]


def test_folder_swapped_for_a_link_after_the_check_does_not_leak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_app(Config.of({}, base=tmp_path))  # imports the plugins
    open_beneath = sys.modules["streamlab.plugins.file.representation"].open_beneath
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "folder", outside):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    (root / "link").symlink_to(root / "folder")  # without a link, nothing has to be resolved
    resolve = os.path.realpath

    def resolve_and_swap(path: Path, *, strict: bool = False) -> str:
        resolved = resolve(path, strict=strict)
        if Path(path).name == "file":
            (root / "folder").rename(root / "kept")
            (root / "folder").symlink_to(outside)
        return resolved

    monkeypatch.setattr(os.path, "realpath", resolve_and_swap)
    with pytest.raises(OSError, match="folder"):
        open_beneath(root, ("link", "file"))


def test_a_small_file_is_read_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_app(Config.of({}, base=tmp_path))  # imports the plugins
    representation = sys.modules["streamlab.plugins.file.representation"]
    file = tmp_path / "file.txt"
    file.write_bytes(b"12345")
    pread = os.pread
    with file.open("rb") as opened:
        small = representation.read_small(opened.fileno(), "file.txt")
        assert (small.data, small.size, small.media_type) == (b"12345", 5, "text/plain")
        assert (
            small.validators
            == representation.FileRepresentation(os.fstat(opened.fileno()), "", opened, None).validators
        )

        def append_and_read(descriptor: int, count: int, offset: int) -> bytes:
            with file.open("ab") as other:
                other.write(b"6")
            return pread(descriptor, count, offset)

        monkeypatch.setattr(os, "pread", append_and_read)
        assert representation.read_small(opened.fileno(), "file.txt") is None
        monkeypatch.undo()
        os.truncate(file, representation.SMALL_BYTES + 1)
        assert representation.read_small(opened.fileno(), "file.txt") is None
    folder = os.open(tmp_path, os.O_RDONLY)
    assert representation.read_small(folder, "folder") is None
    os.close(folder)


async def test_the_end_of_a_file_that_the_kernel_has_not_in_memory_is_read_in_a_thread(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def not_cached(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        tried.append(offset)
        if len(tried) == 1:
            return len(buffers[0]) - 1
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", not_cached)
    for _ in range(2):
        assert (await get(client))[1] == file.read_bytes()
    assert len(tried) == 2


# -- files that change while they are sent


def slowly(server: Running, path: str) -> tuple[socket.socket, bytes]:
    """Begin a download on a connection with a small receive buffer."""
    connection = server.send(f"GET {path} HTTP/1.1\nHost: localhost\nConnection: close", receive_buffer=65536)
    return connection, read_until(connection, b"\r\n\r\n")


@pytest.fixture
def big(start: Callable[..., Running], tmp_path: Path) -> tuple[Running, Path]:
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(1_000_000) * 40)
    return start('[scenarios.file]\nlarge_file = "big.bin"', tracebacks=True), path


def test_check_reports_a_large_file_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[scenarios.file]\nlarge_file = "later.bin"\n')
    status, _, errors = run_streamlab("check", cwd=tmp_path)
    key = "config.toml: scenarios.file.large_file"
    assert (status, errors.splitlines()[0]) == (2, f"{key} - {tmp_path}/later.bin is not a file")
    (tmp_path / "later.bin").touch()
    assert run_streamlab("check", cwd=tmp_path)[0] == 0


@pytest.mark.parametrize("query", ["", "?rate=1000000000"])
def test_file_truncated_during_a_download_fails_visibly(big: tuple[Running, Path], query: str) -> None:
    server, path = big
    whole = path.read_bytes()
    connection, begun = slowly(server, f"/download/large-file{query}")
    os.truncate(path, 20_000_000)
    body = (begun + read_all(connection)).partition(b"\r\n\r\n")[2]
    assert len(body) < len(whole)
    assert whole.startswith(body)
    server.wait_for_log("outcome=failed")


@pytest.mark.parametrize("query", ["", "?rate=1000000000"])
def test_file_overwritten_during_a_download_fails_visibly(big: tuple[Running, Path], query: str) -> None:
    server, path = big
    connection, begun = slowly(server, f"/download/large-file{query}")
    with path.open("r+b") as file:
        file.seek(39_000_000)
        file.write(b"changed")
    body = (begun + read_all(connection)).partition(b"\r\n\r\n")[2]
    assert len(body) < 40_000_000
    server.wait_for_log("outcome=failed")


@pytest.mark.parametrize("query", ["", "?rate=1000000000"])
def test_file_overwritten_with_its_time_reset_during_a_download_fails_visibly(
    big: tuple[Running, Path], query: str
) -> None:
    server, path = big
    before = path.stat()
    connection, begun = slowly(server, f"/download/large-file{query}")
    with path.open("r+b") as file:
        file.seek(39_000_000)
        file.write(b"changed")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    body = (begun + read_all(connection)).partition(b"\r\n\r\n")[2]
    assert len(body) < 40_000_000
    server.wait_for_log("outcome=failed")


def test_file_linked_or_deleted_during_a_download_is_sent_as_it_was(big: tuple[Running, Path], tmp_path: Path) -> None:
    server, path = big
    whole = path.read_bytes()
    changes: tuple[Callable[[], None], ...] = (lambda: os.link(path, tmp_path / "backup.bin"), path.unlink)
    for change in changes:
        connection, begun = slowly(server, "/download/large-file")
        change()
        assert (begun + read_all(connection)).partition(b"\r\n\r\n")[2] == whole


def test_file_replaced_during_a_download_is_sent_as_it_was(big: tuple[Running, Path], tmp_path: Path) -> None:
    server, path = big
    whole = path.read_bytes()
    connection, begun = slowly(server, "/download/large-file")
    (tmp_path / "new.bin").write_bytes(b"new")
    (tmp_path / "new.bin").replace(path)
    assert (begun + read_all(connection)).partition(b"\r\n\r\n")[2] == whole
    assert server.get("/download/large-file")[2] == b"new"


def test_missing_file_is_404_until_it_exists(start: Callable[..., Running], tmp_path: Path) -> None:
    server = start('[scenarios.file]\nlarge_file = "later.bin"')
    status, _, body = server.get("/download/large-file")
    assert (status, str(tmp_path).encode() in body) == (404, False)
    (tmp_path / "later.bin").write_bytes(b"here")
    assert server.get("/download/large-file")[2] == b"here"


def test_sample_is_created_once_for_concurrent_requests(start: Callable[..., Running], tmp_path: Path) -> None:
    server = start("[scenarios.file]\nsample_mb = 5")
    responses: list[tuple[int, dict[str, str], bytes]] = []
    threads = [threading.Thread(target=lambda: responses.append(server.get("/download/large-file"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(status, headers["etag"], len(body)) for status, headers, body in responses} == {
        (200, responses[0][1]["etag"], 5_000_000)
    }
    assert responses[0][2] == (tmp_path / "var/files/large-file.bin").read_bytes()
    assert [path.name for path in (tmp_path / "var/files").iterdir()] == ["large-file.bin"]


async def test_sample_that_does_not_fit_is_503_and_leaves_nothing(aiohttp_client: Any, tmp_path: Path) -> None:
    tables = {"scenarios": {"file": {"sample_mb": 5}}}
    client = await aiohttp_client(create_app(Config.of(tables, base=tmp_path)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        response, body = await get(client)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (response.status, b"Set large_file to a file of yours" in body) == (503, True)
    assert list((tmp_path / "var/files").iterdir()) == []
    assert len((await get(client))[1]) == 5_000_000


# -- real clients


@pytest.mark.parametrize(
    "command", [["curl", "-sS", "-C", "-", "-o", "OUT", "URL"], ["wget", "-q", "-c", "-O", "OUT", "URL"]]
)
def test_client_resumes_byte_for_byte(big: tuple[Running, Path], tmp_path: Path, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    server, path = big
    out = tmp_path / "resumed.bin"
    out.write_bytes(path.read_bytes()[:12_345_678])
    words = {"OUT": str(out), "URL": f"{server.url}/download/large-file"}
    subprocess.run([words.get(word, word) for word in command], check=True, timeout=30)
    assert out.read_bytes() == path.read_bytes()
    assert "status=206" in server.wait_for_log("outcome=finished")


def test_aria2c_resumes_four_ranges_at_once_byte_for_byte(big: tuple[Running, Path], tmp_path: Path) -> None:
    if shutil.which("aria2c") is None:
        pytest.skip("aria2c is not installed")
    server, path = big
    out, notes = tmp_path / "resumed.bin", tmp_path / "resumed.bin.aria2"
    command = [
        "aria2c",
        "-q",
        "-c",
        "-x4",
        "-s4",
        "-k1M",
        "--file-allocation=none",
        f"--dir={tmp_path}",
        f"--out={out.name}",
    ]
    with subprocess.Popen([*command, f"{server.url}/download/large-file?rate=3000000"]) as broken_off:
        deadline = time.monotonic() + 20
        while not (out.exists() and out.stat().st_size > 1_000_000):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        broken_off.send_signal(signal.SIGINT)
    assert (notes.exists(), out.read_bytes() == path.read_bytes()) == (True, False)
    subprocess.run([*command, f"{server.url}/download/large-file"], check=True, timeout=30)
    assert (notes.exists(), out.read_bytes() == path.read_bytes()) == (False, True)
    assert "status=206" in server.wait_for_log("outcome=finished")


def test_download_killed_in_the_middle_is_resumed_by_curl(big: tuple[Running, Path], tmp_path: Path) -> None:
    server, path = big
    out = tmp_path / "out.bin"
    url = f"{server.url}/download/large-file"
    first = subprocess.run(["curl", "-sS", "--max-time", "1", "-o", str(out), f"{url}?rate=20000000"], check=False)
    assert (first.returncode, 0 < out.stat().st_size < 40_000_000) == (28, True)
    subprocess.run(["curl", "-sS", "-C", "-", "-o", str(out), url], check=True)
    assert out.read_bytes() == path.read_bytes()


def test_download_over_tls_is_byte_for_byte(start: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(os.urandom(1_000_000) * 5)
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "server.key")
    server = start(
        '[server]\ntls_certificate = "server.pem"\ntls_key = "server.key"\n[scenarios.file]\nlarge_file = "big.bin"'
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with server.connect() as plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(b"GET /download/large-file HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        body = read_all(connection).partition(b"\r\n\r\n")[2]
    assert server.url.startswith("https://")
    assert body == (tmp_path / "big.bin").read_bytes()


def test_memory_does_not_grow_with_the_file(start: Callable[..., Running], tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads peak memory from /proc, which this system does not have")
    with (tmp_path / "sparse.bin").open("wb") as file:
        file.truncate(1 << 28)
    server = start('[scenarios.file]\nlarge_file = "sparse.bin"', fresh=True)

    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())[1])  # type: ignore[index]

    server.get("/download/large-file", {"Range": "bytes=0-99999"})
    before = peak()
    received = 0
    with server.send("GET /download/large-file HTTP/1.1\nHost: localhost\nConnection: close") as connection:
        while chunk := connection.recv(1 << 20):
            received += len(chunk)
    assert received > 1 << 28
    assert peak() - before < 8 * 1024


async def test_file_is_closed_when_its_client_disconnects(client: Client, file: Path) -> None:
    def is_open() -> bool:
        return any(os.path.realpath(link) == str(file) for link in Path("/proc/self/fd").glob("*"))

    if not Path("/proc/self/fd").exists():
        pytest.skip("looks for open files in /proc, which this system does not have")
    response = await client.get("/download/large-file", params={"rate": "10000"})
    await response.content.readany()
    assert is_open()
    response.close()
    async with asyncio.timeout(5):
        while is_open():
            await asyncio.sleep(0)


# -- digests of large files: interrupted, bounded, and independent of each other

DIGESTS = "".join(f"[scenarios.{name}]\nenabled = false\n" for name in disabled(but="file"))

WANTED = "Host: 127.0.0.1\nWant-Repr-Digest: sha-256=1"

HUGE_MB = 9_900
"""Size in MB that takes many seconds to hash, but is within the default of `digest_mb`."""


def processor_seconds(server: Running) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_busy(server: Running, seconds: float) -> None:
    """Wait until the process has used this much more processor time."""
    enough, deadline = processor_seconds(server) + seconds, time.monotonic() + 20
    while processor_seconds(server) < enough:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_digests_whose_clients_disconnected_stop_and_delay_nothing(start: Callable[..., Running]) -> None:
    """Seven of them once blocked all disk access, and prevented SIGTERM from ending the server."""
    server = start(DIGESTS)
    for number in range(7):
        with server.send(f"HEAD /download/large-file?size_mb={HUGE_MB + number} HTTP/1.1\n{WANTED}"):
            wait_until_busy(server, 0.05)
    assert server.get("/files/")[0] == 200
    used = processor_seconds(server)
    time.sleep(0.5)
    assert processor_seconds(server) - used < 0.25
    status, seconds = server.terminate()
    assert status == 0
    assert seconds < 5


def test_a_digest_of_a_small_file_does_not_wait_for_that_of_a_large_one(start: Callable[..., Running]) -> None:
    server = start(DIGESTS)
    served = server.base / "var/files"
    served.mkdir(parents=True)
    (served / "small.txt").write_bytes(b"small")
    with contextlib.ExitStack() as stack:
        for number in range(4):
            stack.enter_context(server.send(f"HEAD /download/large-file?size_mb={HUGE_MB + number} HTTP/1.1\n{WANTED}"))
        wait_until_busy(server, 0.2)
        started = time.monotonic()
        status, headers, body = server.get("/files/small.txt", {"Want-Repr-Digest": "sha-256=1"})
        assert (status, body) == (200, b"small")
        assert headers["repr-digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(b'small').digest()).decode()}:"
        assert time.monotonic() - started < 3  # four slices, on a busy machine; the four files take over 20 s
    server.wait_for_log("streamlab.access request method=GET path=/files/small.txt status=200")  # it was no stream


def test_sigterm_ends_the_server_in_time_while_digests_are_computed(start: Callable[..., Running]) -> None:
    server = start(DIGESTS + "[server]\ndrain_seconds = 0.5\n")
    with server.send(f"HEAD /download/large-file?size_mb={HUGE_MB} HTTP/1.1\n{WANTED}"):
        wait_until_busy(server, 0.1)
        status, seconds = server.terminate()
    assert status == 0
    assert seconds < 0.5 + 1 + 1  # plus one second for a busy machine


async def test_a_response_beyond_the_bounds_has_no_digest(aiohttp_client: Any, tmp_path: Path) -> None:
    for bounds, sizes in (
        ({"digest_mb": 2}, {"2": True, "3": False}),
        ({"digest_seconds": 0.5}, {"1": True, str(HUGE_MB): False}),
    ):
        tables = {"scenarios": {**disabled(but="file"), "file": bounds}}
        client = await aiohttp_client(create_app(Config.of(tables, base=tmp_path)))
        for size, sent in sizes.items():
            headers = {"Want-Repr-Digest": "sha-256=1"}
            response = await client.head("/download/large-file", params={"size_mb": size}, headers=headers)
            assert (response.status, "Repr-Digest" in response.headers) == (200, sent), (bounds, size)


class Counted:
    """A representation whose readers are counted, and wait for a gate in their thread."""

    def __init__(self, module: Any, size: int) -> None:
        self.whole = module.Generated(size)
        self.size, self.validators = size, self.whole.validators
        self.gate = threading.Event()
        self.opened = self.closed = 0

    def reader(self) -> "Counted":
        self.opened += 1
        return self

    def read(self, offset: int) -> Any:
        self.gate.wait(10)
        return self.whole.reader().read(offset)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


async def test_a_digest_is_computed_once_for_all_waiting_requests_and_not_for_disconnected_ones() -> None:
    digests, representation = plugin_module("file", "digests"), plugin_module("file", "representation")
    computing = digests.Digests(seconds=30, limit=10**9)
    async with computing.opened():
        file = Counted(representation, 3_000_000)
        waiting = [asyncio.create_task(computing.of(file)) for _ in range(10)]
        while not file.opened:
            await asyncio.sleep(0)
        for task in waiting[:9]:
            task.cancel()
        file.gate.set()
        expected = hashlib.sha256(b"".join(representation.block(number) for number in range(3))[:3_000_000]).digest()
        assert await waiting[9] == expected
        assert await computing.of(file) == expected
        assert file.opened == 1

        left = Counted(representation, 4_000_000)
        alone = asyncio.create_task(computing.of(left))
        while not left.opened:
            await asyncio.sleep(0)
        alone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await alone
        left.gate.set()
        assert len(await computing.of(left) or b"") == 32
        assert left.opened == 2
    assert (file.closed, left.closed) == (1, 2)
