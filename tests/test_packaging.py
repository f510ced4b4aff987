"""Both distributions are whole, and the wheel serves from any folder, with the built-in plugins and its own."""

import email
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.docs import COUNTDOWN
from tests.support.servers import REPOSITORY, WITHOUT_MODEL, write_plugins
from tools import dist

EPOCH = 1_800_000_000


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the wheel and the source distribution, with EPOCH as the time of the last commit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))
        return dist.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture
def wheel(distributions: tuple[Path, Path]) -> Path:
    return distributions[0]


@pytest.fixture(scope="module")
def site(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, without what it needs, into an empty folder."""
    site = tmp_path_factory.mktemp("installed") / "site"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(distributions[0])]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    return site


def test_source_distribution_has_every_file_of_the_repository(distributions: tuple[Path, Path]) -> None:
    top = f"streamlab-{dist.version()}"
    with tarfile.open(distributions[1]) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        names = {member.name.removeprefix(f"{top}/") for member in members}
        scripts = {member.name.removeprefix(f"{top}/") for member in members if member.mode & stat.S_IXUSR}
    made = {name for name in names if name == "PKG-INFO" or name.startswith("streamlab.egg-info/")}
    assert names - made == set(dist.sources())
    assert {"LICENSE", "Makefile", "config.toml", "tests/test_packaging.py", ".ci/run"} <= names
    assert ".ci/run" in scripts


def test_distributions_have_no_traces_of_the_machine_that_built_them(distributions: tuple[Path, Path]) -> None:
    wheel, sdist = distributions
    time = (2027, 1, 15, 8, 0, 0)  # EPOCH
    assert {entry.date_time for entry in zipfile.ZipFile(wheel).infolist()} == {time}
    with tarfile.open(sdist) as archive:
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(EPOCH, 0, "")}
        assert {member.mode for member in archive if member.isfile()} == {0o644, 0o755}
    assert int.from_bytes(sdist.read_bytes()[4:8], "little") == EPOCH  # of gzip


def test_wheel_has_the_plugins_inside_the_package_and_no_other_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"streamlab", f"streamlab-{dist.version()}.dist-info"}
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


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Return time of change and size of everything below a folder, by path."""
    status = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {path: (found.st_mtime_ns, found.st_size) for path, found in status.items()}


def test_server_in_an_empty_folder_writes_only_below_var(site: Path, tmp_path: Path) -> None:
    folder, home, temporary = (tmp_path / name for name in ("folder", "home", "temporary"))
    for made in (folder, home, temporary):
        made.mkdir()
    variables = {
        "HOME": str(home), "TMPDIR": str(temporary), "PATH": os.environ["PATH"], "PYTHONPATH": str(site),
        "STREAMLAB_SCENARIOS__FILE__SAMPLE_MB": "1", "STREAMLAB_SCENARIOS__EXPORT__SAMPLE_ROWS": "100",
        **WITHOUT_MODEL,
    }  # fmt: skip
    paths = (
        "/download/large-file",
        "/stream/stock-ticker?limit=1",
        "/stream/live-logs?source=demo&tail=0&limit=1",
        "/export/users/csv",
        "/process/long-task?kind=export&name=users",
        "/lab",
    )
    before = files_in(site)
    dist.try_out([sys.executable, "-m", "streamlab"], folder, variables, paths)
    assert files_in(site) == before
    assert (list(home.iterdir()), list(temporary.iterdir())) == ([], [])
    assert {path.partition("/")[0] for path in files_in(folder)} == {"var"}
    assert {"log", "files", "demo", "streamlab.db", "sample.db"} <= {path.name for path in (folder / "var").iterdir()}


@pytest.mark.parametrize(
    ("main", "reason"),
    [
        ("import sys; sys.exit('no such library')", r"--version: status 1\nno such library$"),
        ("print('streamlab 0.0.1')", r"^streamlab --version: 'streamlab 0\.0\.1\\n' instead of "),
        ("import sys; print('streamlab VERSION') if '--version' in sys.argv else sys.exit('x: port is in use')",
         r"^the server did not start: status 1\nx: port is in use$"),
        ("import sys, signal; print('streamlab VERSION', flush=True); '--version' in sys.argv or "
         "print('it serves http://127.0.0.1:9', flush=True); '--version' in sys.argv or signal.pause()",
         r"^curl .*http://127\.0\.0\.1:9/health: status 7\n"),
    ],
    ids=["does not start", "another version", "does not serve", "no response"],
)  # fmt: skip
def test_dist_fails_with_what_the_installed_program_does_wrong(main: str, reason: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(main.replace("VERSION", dist.version()))
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(dist.DistError, match=reason):
        dist.try_out([sys.executable, program], folder, {"PATH": os.environ["PATH"]})


def test_wheel_serves_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "anywhere"
    folder.mkdir()
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
        "llm: ready\nlogs: ready\nprogress: ready\nstreams: ready\nticker: ready\n",
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
        done.stdout == "comparison: ready\nexport: ready\nfile: ready\nllm: ready\nlogs: ready\n"
        "progress: ready\nstreams: ready\nticker: ready\n"
    )
    assert "needs the Python module 'no_such_module': install the package that contains" in done.stderr
