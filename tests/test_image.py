"""`make image`: both targets of the Dockerfile, built, and run as a container runs them.

It takes a minute of a processor, and the package index; therefore `make test` leaves it out.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.connections import EventStream
from tests.support.container import Buildah, Container, Image, missing
from tests.support.docs import COUNTDOWN
from tests.support.servers import write_plugins

pytestmark = [pytest.mark.image, pytest.mark.timeout(900)]

LIMITS = {"slim": 60_000_000, "full": 250_000_000}
"""Maximum size of each target in addition to that of its base, in bytes."""

GRACE_SECONDS = 10.0
"""Time from SIGTERM to SIGKILL that engines leave, in seconds."""

CONFIG = """
[scenarios.countdown]
interval = 0.001
[scenarios.export]
sample_rows = 100
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Image]]:
    """Return the base and both targets."""
    if reason := missing():
        pytest.skip(reason)
    with Buildah(tmp_path_factory.mktemp("buildah")) as buildah:
        yield {"base": buildah.import_base()} | {target: buildah.build(target) for target in LIMITS}


def test_each_target_is_small(images: dict[str, Image], capfd: pytest.CaptureFixture[str]) -> None:
    sizes = {name: image.sizes() for name, image in images.items()}
    base = sum(sizes.pop("base").values())
    added = {target: sum(files.values()) - base for target, files in sizes.items()}
    with capfd.disabled():
        print(f"\nbase (stand-in): {base / 1e6:.0f} MB")
        for target, files in sizes.items():
            parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in _largest(files))
            print(f"{target}: {added[target] / 1e6:.0f} MB above it; of these {parts}")
    assert all(0 < added[target] <= limit for target, limit in LIMITS.items()), added


def _largest(files: dict[str, int]) -> list[tuple[str, int]]:
    """Return the ten largest packages of the environment."""
    packages: dict[str, int] = {}
    for path, size in files.items():
        if found := re.match("opt/streamlab/.*/site-packages/([^/]+)", path):
            packages[found[1]] = packages.get(found[1], 0) + size
    return sorted(packages.items(), key=lambda item: -item[1])[:10]


@pytest.mark.parametrize("target", LIMITS)
def test_no_user_can_write_what_it_runs_and_no_installer_is_left(images: dict[str, Image], target: str) -> None:
    image = images[target]
    assert image.user == ("10001", "10001")
    assert re.search("^streamlab:[^:]*:10001:10001:", (image.root / "etc/passwd").read_text(), re.MULTILINE)
    files = list((image.root / "opt/streamlab").rglob("*"))
    assert all(path.is_symlink() or (path.stat().st_uid, path.stat().st_mode & 0o022) == (0, 0) for path in files)
    names = {path.name for path in files}
    assert "aiohttp" in names
    assert not {"pip", "setuptools", "swagger-ui-bundle.js.map", "swagger-editor-bundle.js"} & names
    assert any(path.match("swagger_ui/static/LICENSE") for path in files)
    (var,) = image.config["Volumes"]
    assert (image.root / var.lstrip("/")).stat().st_uid == 10001


def test_slim_serves_a_mounted_configuration_and_plugin(images: dict[str, Image], tmp_path: Path) -> None:
    write_plugins(tmp_path, {"countdown": COUNTDOWN})
    (tmp_path / "config.toml").write_text(CONFIG)
    mounts = {name: tmp_path / name for name in ("config.toml", "plugins")}
    with images["slim"].running(tmp_path, mounts) as container:
        _check(container)
        assert container.get("/stream/countdown?start=2")[2] == b"2\n1\n0\n"
        status, _, body = container.get("/export/users/csv")
        assert (status, len(list(csv.reader(io.StringIO(body.decode(), newline=""))))) == (200, 101)
        assert json.loads(container.get("/health")[2])["scenarios"]["llm"]["state"] == "disabled"
        _check_stop(container)


def test_full_serves_without_any_configuration_and_its_model_responds(images: dict[str, Image], tmp_path: Path) -> None:
    with images["full"].running(tmp_path) as container:
        _check(container)
        status, _, body = container.get("/ai/chat-stream?prompt=Hello&max_tokens=8&temperature=0")
        assert (status, bool(body.strip())) == (200, True), container.log
        assert container.run(["python", "-c", "import asyncpg, backports.zstd, docket, redis"]).stderr == ""
        _check_stop(container)


def _check(container: Container) -> None:
    """Check what both targets promise."""
    health = json.loads(container.get("/health")[2])
    assert health["status"] == "ok", health
    check = container.image.config["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    assert container.run(check[1:]).returncode == 0
    with EventStream(container, "/stream/stock-ticker?limit=1") as stream:
        assert [event.json["price"] > 0 for event in stream.take(1)] == [True]
    page = container.get("/docs")[2].decode()
    assets = re.findall(r'(?:href|src)="(assets/[^"]+)"', page)
    assert len(assets) > 3
    assert [container.get(f"/{path}")[0] for path in assets] == [200] * len(assets)
    facts = dict(re.findall(r"^(\w+):\t(.*)$", Path(f"/proc/{container.first}/status").read_text(), re.MULTILINE))
    assert facts["Uid"].split() == facts["Gid"].split() == ["10001"] * 4
    assert facts["NSpid"].split()[-1] == "1"
    rejected = container.run(["python", "-c", "open('x', 'w')"])
    assert "OSError: [Errno 30] Read-only file system: 'x'" in rejected.stderr
    # Libraries whose symbols were removed can be loaded.
    load = "import ctypes, pathlib, sys; [ctypes.CDLL(str(path)) for path in pathlib.Path(sys.prefix).rglob('*.so')]"
    assert container.run(["python", "-c", load]).stderr == ""


def _check_stop(container: Container) -> None:
    """Check that SIGTERM ends the server in time, also while a stream is open."""
    with EventStream(container, "/stream/stock-ticker") as stream:
        assert stream.take(1)
        assert container.stop(GRACE_SECONDS) == 0, container.log
    assert "Traceback" not in container.log
