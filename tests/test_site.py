"""The documentation site: it builds without a warning and without a network, and has an entry for every public name."""

import fcntl
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.servers import REPOSITORY

if TYPE_CHECKING:
    from playwright.async_api import Browser

DOCS = REPOSITORY / "docs"
PUBLIC = ("streamlab", "streamlab.client", "streamlab.testing")

MISSING = [name for name in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -e '.[docs]'"),
    pytest.mark.timeout(180),
]


def build(source: Path, target: Path) -> "subprocess.CompletedProcess[str]":
    """Build the site as `make docs` does."""
    options = ["-q", "-n", "-W", "--keep-going", "-d", str(target / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(target / "html")]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Build the site once, also where a second worker runs the tests of this module that need a browser."""
    own = tmp_path_factory.getbasetemp()
    target = (own if worker_id == "master" else own.parent) / "site"  # the folder of all workers of this run
    target.mkdir(exist_ok=True)
    with (target / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "built").exists():
            done = build(DOCS, target)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            (target / "built").touch()
    return target / "html"


class Page(HTMLParser):
    """What a page loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found["id"]} if "id" in found else set()
        if tag == "link" or "src" in found:
            self.loaded.append(found.get("src") or found.get("href", ""))


def loaded_by_styles(folder: Path) -> Iterator[str]:
    for style in folder.rglob("*.css"):
        yield from re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", style.read_text(encoding="utf-8"))


def test_every_page_is_in_the_site(site: Path) -> None:
    assert {page.stem for page in DOCS.glob("*.md")} <= {page.stem for page in site.glob("*.html")}


def test_nothing_is_loaded_from_other_servers(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    loaded = [target for page in pages for target in Page(page).loaded]
    assert len(loaded) > len(pages)
    styled = [part for found in loaded_by_styles(site) for part in found if part]
    assert [target for target in (*loaded, *styled) if re.match(r"(\w+:)?//", target)] == []


def test_every_public_name_has_its_entry(site: Path) -> None:
    names = [f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__]
    entries = Page(site / "api.html").ids
    assert [name for name in names if name not in entries] == []


async def test_every_page_fits_a_phone(site: Path, browser: "Browser") -> None:
    page = await browser.new_page(viewport={"width": 390, "height": 844})
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    for path in sorted(site.glob("*.html")):
        await page.goto(path.as_uri())
        assert await page.evaluate("document.documentElement.scrollWidth") <= 390, path.name
    assert [url for url in requested if not url.startswith("file:")] == []


BROKEN = """# A page

[a page](missing.md), [an anchor](index.md#missing), [a file](../missing.py), [a folder](../docs)

![a picture](missing.png)
"""


def test_broken_references_are_errors(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    (source / "_static").mkdir(parents=True)
    shutil.copy(DOCS / "conf.py", source)
    (source / "index.md").write_text("# Index\n\n## Pages\n\n[a page](page.md)\n")
    (source / "page.md").write_text(BROKEN)
    (source / "lonely.md").write_text("# A page that the index does not name\n")
    done = build(source, tmp_path)
    assert done.returncode != 0
    for word in ("missing.md", "'missing'", "missing.py", "missing.png", "lonely.md"):
        assert word in done.stderr, word
    assert "a folder" not in done.stderr
    assert "../docs'" not in done.stderr
