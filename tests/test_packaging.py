"""The wheel serves from any folder, with the built-in plugins and those of that folder."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.docs import COUNTDOWN
from tests.support.servers import REPOSITORY, write_plugins


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("streamlab", "plugins"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_has_the_plugins_inside_the_package_and_no_other_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"streamlab", "streamlab-0.1.0.dist-info"}
    expected = {
        f"streamlab/{path.relative_to(REPOSITORY / 'streamlab')}" for path in (REPOSITORY / "streamlab").rglob("*")
    }
    expected |= {
        f"streamlab/plugins/{path.relative_to(REPOSITORY / 'plugins')}" for path in (REPOSITORY / "plugins").rglob("*")
    }
    suffixes = (".py", ".lua", ".html", ".css", ".js", ".svg", ".typed")
    assert {name for name in names if "dist-info" not in name} == {
        name for name in expected if name.endswith(suffixes) and "__pycache__" not in name
    }


def test_wheel_states_its_license_and_contains_it(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("MIT", ["LICENSE"])
    assert archive.read(name.replace("METADATA", "licenses/LICENSE")) == (REPOSITORY / "LICENSE").read_bytes()


def test_wheel_serves_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "anywhere"
    folder.mkdir()
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    write_plugins(folder, {"countdown": COUNTDOWN})
    environ = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import streamlab; print(streamlab.__file__)"],
        env=environ, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(site))
    listed = subprocess.run(
        [sys.executable, "-m", "streamlab", "check"],
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (listed.returncode, listed.stdout, listed.stderr) == (
        0,
        "comparison: ready\ncountdown: ready\nexport: ready\nfile: ready\n"
        "llm: ready\nlogs: ready\nprogress: ready\nticker: ready\n",
        "",
    )


def test_checkout_runs_without_being_installed(tmp_path: Path) -> None:
    for name in ("streamlab", "plugins"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_plugins(tmp_path, {"needy": "import no_such_module"})
    # Other installed packages are still found; only the metadata of streamlab is not.
    script = (
        "import importlib.metadata as m, runpy, sys; real = m.distribution\n"
        "def hidden(name):\n"
        "    if name == 'streamlab': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.distribution = hidden; sys.argv = ['streamlab', 'check']; runpy.run_module('streamlab', run_name='__main__')"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (
        done.stdout
        == "comparison: ready\nexport: ready\nfile: ready\nllm: ready\nlogs: ready\nprogress: ready\nticker: ready\n"
    )
    assert "needs the Python module 'no_such_module': install the package that contains" in done.stderr
