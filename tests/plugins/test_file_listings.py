"""Folders as listings: other people's tools copy them, every listed name can be downloaded, and the page is usable."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import fsspec
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from tests.support.servers import Running, starting_in

JSON = {"Accept": "application/json"}

NAMES: dict[bytes, str] = {
    b"plain.txt": "plain.txt",
    b"two words.txt": "two%20words.txt",
    b" leading": "%20leading",
    "grüße 猫.txt".encode(): "gr%C3%BC%C3%9Fe%20%E7%8C%AB.txt",
    b"plus+and&?#;=.txt": "plus%2Band%26%3F%23%3B%3D.txt",
    b"per%cent": "per%25cent",
    b"quo\"te'.txt": "quo%22te%27.txt",
    b"back\\slash": "back%5Cslash",
    b"a:b": "a%3Ab",
    b"-dash": "-dash",
    b"~tilde": "~tilde",
    b"?q=1": "%3Fq%3D1",
    b"<b>&amp;.txt": "%3Cb%3E%26amp%3B.txt",
    b"new\nline.txt": "new%0Aline.txt",
    b"bad\xff\xfe.txt": "bad%FF%FE.txt",
    b"bad%FF%FE.txt": "bad%25FF%25FE.txt",
    b"sub/deeper/x.bin": "sub/deeper/x.bin",
    b"caf\xe9/inside.txt": "caf%E9/inside.txt",
}
"""Files in the served folder, each with its link."""

UNSUPPORTED = {
    "rclone": {b"a:b"},  # it requests /files/./a:b
    "lftp": {b"~tilde"},  # it takes the name for a home directory
    "wget": {b"per%cent", b"bad%FF%FE.txt"},  # it decodes the percent sign twice
}
"""Names that a tool cannot copy from any server."""


def content(name: bytes) -> bytes:
    return b"content of " + name + b"\n" + bytes(range(256)) * 40


def files_of(folder: Path) -> dict[bytes, bytes]:
    """Return the bytes of all files below a folder by path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {os.fsencode(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("listings")
    for name in NAMES:
        path = base / "var/files" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(name))
    (base / "var/files/empty").mkdir()
    return base


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Running]:
    with starting_in(base) as start:
        yield start()


def links(page: bytes) -> list[str]:
    return [unescape(link) for link in re.findall(r'<a href="([^"]*)"', page.decode())]


# -- which form


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (None, "text/html"),
        ("*/*", "text/html"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
        ("text/html, application/json", "text/html"),
        ("text/*", "text/html"),
        ("application/json;q=0.5, text/html", "text/html"),
        ("image/png", "text/html"),
        ("application/json", "application/json"),
        ("application/json, text/plain, */*", "application/json"),
        ("application/*", "application/json"),
        ("application/json, text/html;q=0.9", "application/json"),
    ],
)
def test_a_listing_is_html_unless_json_is_preferred(server: Running, accept: str | None, media_type: str) -> None:
    status, headers, _ = server.get("/files/", {"Accept": accept} if accept else {})
    assert (status, headers["content-type"], headers["vary"]) == (200, f"{media_type}; charset=utf-8", "Accept")


def test_a_page_of_names_runs_no_script_and_is_in_no_frame(server: Running) -> None:
    policy = server.get("/files/")[1]["content-security-policy"]
    assert policy == "default-src 'none'; style-src 'self'; frame-ancestors 'none'"


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/files", "/files/"),
        ("/files?limit=2&after=a%26b", "/files/?limit=2&after=a%26b"),
        ("/files/sub", "/files/sub/"),
        ("/files/caf%E9", "/files/caf%E9/"),
    ],
)
def test_a_folder_without_a_slash_leads_to_its_page(server: Running, path: str, target: str) -> None:
    status, headers, _ = server.get(path)
    assert (status, headers["location"], headers["vary"]) == (308, target, "Accept")
    assert server.get(target)[0] == 200
    assert server.get(path, JSON)[::2] == server.get(target, JSON)[::2]


# -- every name


def test_every_listed_name_can_be_downloaded_by_its_link(server: Running) -> None:
    found: dict[str, bytes] = {}
    pages = ["/files/"]
    while pages:
        page = pages.pop()
        for link in links(server.get(page)[2]):
            url = urljoin(page, link)
            if url.endswith("/"):
                pages += [url] if link != "../" else []
                continue
            status, _, found[url.removeprefix("/files/")] = server.get(url)
            assert status == 200, url
    assert found == {link: content(name) for name, link in NAMES.items()}


def test_json_is_valid_unicode_and_its_urls_are_exact(server: Running) -> None:
    text = server.get("/files/", JSON)[2].decode()
    assert "\\ud" not in text.lower()  # half of a surrogate pair, which strict parsers reject
    entries = {entry["url"]: entry for entry in json.loads(text)["entries"]}
    assert entries["/files/bad%FF%FE.txt"]["name"] == "bad\ufffd\ufffd.txt"
    assert entries["/files/bad%25FF%25FE.txt"]["name"] == "bad%FF%FE.txt"
    assert entries["/files/new%0Aline.txt"]["name"] == "new\nline.txt"
    assert entries["/files/caf%E9/"] == entries["/files/caf%E9/"] | {"name": "caf\ufffd", "type": "folder"}


def test_pages_of_names_that_are_not_utf_8_have_every_name_once(server: Running) -> None:
    found: list[str] = []
    url: str | None = "/files/?limit=1"
    while url:
        listing = json.loads(server.get(url, JSON)[2])
        found += [entry["url"] for entry in listing["entries"]]
        url = listing["next"]
    assert found == [entry["url"] for entry in json.loads(server.get("/files/", JSON)[2])["entries"]]
    page, found_in_pages = "/files/?limit=1", []
    while page:
        (row,) = re.findall(rb'<tr><td><a href="([^"]*)"', body := server.get(page)[2])
        found_in_pages.append("/files/" + row.decode())
        page = next((urljoin(page, link) for link in links(body) if "?" in link), "")
    assert found_in_pages == found


def test_names_are_saved_as_they_are(server: Running) -> None:
    for url, field in (
        ("new%0Aline.txt", "attachment; filename=\"new_line.txt\"; filename*=UTF-8''new%0Aline.txt"),
        ("bad%FF%FE.txt", "attachment; filename=\"bad__.txt\"; filename*=UTF-8''bad%EF%BF%BD%EF%BF%BD.txt"),
    ):
        assert server.get(f"/files/{url}")[1]["content-disposition"] == field


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_what_cannot_be_read_is_not_listed(server: Running, base: Path) -> None:
    secret = base / "var/files/sub/secret.txt"
    secret.write_text("secret")
    secret.chmod(0)
    try:
        assert (server.get("/files/sub/secret.txt")[0], links(server.get("/files/sub/")[2])) == (
            404,
            ["../", "deeper/"],
        )
    finally:
        secret.unlink()


def test_a_page_lists_more_names_than_json_because_tools_read_one_page(server: Running, base: Path) -> None:
    many = base / "var/files/many"
    many.mkdir()
    try:
        for number in range(1001):
            (many / f"{number:04}").touch()
        assert len(links(server.get("/files/many/")[2])) == 1 + 1001
        listing = json.loads(server.get("/files/many/", JSON)[2])
        assert (len(listing["entries"]), listing["next"]) == (1000, "/files/many/?limit=1000&after=0999")
    finally:
        shutil.rmtree(many)


# -- other people's tools


@pytest.mark.parametrize(
    "command",
    [
        ["rclone", "--config", "/dev/null", "copy", ":http,url='URL/files/':", "OUT"],
        ["lftp", "-c", "set net:max-retries 1; set cmd:fail-exit yes; open URL/files/; mirror . OUT"],
        ["lftp", "-c", "set net:max-retries 1; set cmd:fail-exit yes; mirror URL/files OUT"],
        [
            "wget",
            "-q",
            "-r",
            "-np",
            "-nH",
            "--cut-dirs=1",
            "--restrict-file-names=nocontrol",
            "-P",
            "OUT",
            "URL/files/",
        ],
    ],
    ids=["rclone", "lftp", "lftp-without-slash", "wget"],
)
def test_a_tool_copies_the_folder_byte_for_byte(
    server: Running, base: Path, tmp_path: Path, command: list[str]
) -> None:
    tool, *arguments = command
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    words = [word.replace("URL", server.url).replace("OUT", str(tmp_path / "out")) for word in arguments]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "HOME": str(tmp_path)}
    subprocess.run([tool, *words], check=True, timeout=60, env=environment, cwd=tmp_path)
    copied = {name: data for name, data in files_of(tmp_path / "out").items() if b"index.html" not in name}
    expected = {name: data for name, data in files_of(base / "var/files").items() if name not in UNSUPPORTED[tool]}
    assert {name: copied.get(name) for name in expected} == expected
    if tool != "wget":
        assert copied == expected


@pytest.mark.parametrize("address", ["/files", "/files/"])
def test_fsspec_finds_and_reads_every_file(server: Running, address: str) -> None:
    files: Any = fsspec.filesystem("http", skip_instance_cache=True)
    found = {urlsplit(url).path.removeprefix("/files/"): url for url in files.find(server.url + address)}
    assert set(found) == set(NAMES.values())
    assert files.isdir(f"{server.url}/files/sub")
    assert files.glob(f"{server.url}/files/plain*") == [f"{server.url}/files/plain.txt"]
    assert {link: files.cat(url) for link, url in found.items()} == {
        link: content(name) for name, link in NAMES.items()
    }


# -- the page in a browser


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Browser) -> Page:
    return await browser.new_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)


async def test_the_page_fits_a_phone_and_leads_back(page: Page, server: Running) -> None:
    await page.goto(f"{server.url}/files/")
    assert await page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    main = page.get_by_role("main")
    await expect(main.get_by_role("heading", level=1)).to_have_text("/files/")
    await expect(main.get_by_role("link", name="Parent folder")).to_have_count(0)
    await main.get_by_role("link", name="sub/").click()
    await main.get_by_role("link", name="deeper/").click()
    await expect(main.get_by_role("heading", level=1)).to_have_text("/files/sub/deeper/")
    await main.get_by_role("link", name="Parent folder").click()
    await expect(page).to_have_url(f"{server.url}/files/sub/")


async def test_an_empty_folder_is_described(page: Page, server: Running) -> None:
    await page.goto(f"{server.url}/files/empty/")
    main = page.get_by_role("main")
    await expect(main).to_contain_text("This folder is empty.")
    await expect(main.get_by_role("table")).to_have_count(0)
    await page.goto(f"{server.url}/files/sub/?after=zzz")
    await expect(main).to_contain_text("There are no more names.")
    await main.get_by_role("link", name="First names").click()
    await expect(main.get_by_role("link", name="deeper/")).to_have_count(1)
