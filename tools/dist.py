"""Build the wheel and the source distribution into dist/, and try the wheel in an empty environment: `make dist`.

Both are built from what is committed, with the time of the last commit: two builds of a commit have the same bytes.
Whatever fails ends it with status 1 and the reason.
"""

import configparser
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET = REPOSITORY / "dist"

START_SECONDS = 60.0
"""Maximum time from the start of the installed server to its address, in seconds."""

STOP_SECONDS = 20.0
"""Maximum time from SIGTERM to its end, in seconds."""


class DistError(Exception):
    """The distributions cannot be built, or the installed server does not work."""


def run(*command: str | Path, folder: Path = REPOSITORY, environ: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output; raises DistError with its errors if it fails."""
    environ = os.environ if environ is None else environ
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environ, umask=0o022, capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = " ".join(map(str, command))
        raise DistError(f"{words}: status {done.returncode}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def version() -> str:
    """Return the version in setup.cfg."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    return settings["metadata"]["version"]


# -- build


def sources() -> list[str]:
    """Return the files of the repository, without those that git ignores, or those of a source distribution."""
    if (REPOSITORY / ".git").exists():
        tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        return sorted(name for name in tracked if name and (REPOSITORY / name).is_file())
    listed = (REPOSITORY / "streamlab.egg-info/SOURCES.txt").read_text(encoding="utf-8").splitlines()
    return sorted(name for name in listed if not name.startswith("streamlab.egg-info/"))


def epoch() -> int:
    """Return the time that all files of the distributions have: SOURCE_DATE_EPOCH, else that of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    if (REPOSITORY / ".git").exists():
        return int(run("git", "log", "-1", "--format=%ct"))
    return int((REPOSITORY / "PKG-INFO").stat().st_mtime)


def build(target: Path) -> tuple[Path, Path]:
    """Build both distributions into a folder; return the wheel and the source distribution."""
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch)
        for name in sources():
            file = staged / name
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, file)
            file.chmod(0o755 if os.access(REPOSITORY / name, os.X_OK) else 0o644)
        time = epoch()
        environ = {**os.environ, "SOURCE_DATE_EPOCH": str(time)}
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, staged, environ=environ)
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    _repack(sdist, time)
    return wheel, sdist


def _repack(sdist: Path, time: int) -> None:
    """Rewrite a source distribution with one time, and without the user who built it."""
    content = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, "", ""
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    with sdist.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=time) as packed:
        packed.write(content.getvalue())


# -- try


def try_out(
    command: Sequence[str | Path], folder: Path, environ: Mapping[str, str], paths: Sequence[str] = ("/health",)
) -> None:
    """Run the server that `command` starts in an empty folder, request paths with curl, and end it by SIGTERM.

    Raises DistError for whatever is not as the documentation promises.
    """
    printed = run(*command, "--version", folder=folder, environ=environ)
    _expect(printed, f"streamlab {version()}\n", "streamlab --version")
    with _serving(command, folder, environ) as (process, url):
        for path in paths:
            run("curl", "-fsS", "--max-time", "60", "-o", os.devnull, url + path, environ=environ)
        health = json.loads(run("curl", "-fsS", "--max-time", "60", f"{url}/health", environ=environ))
        _expect(health["version"], version(), "the version of /health")
        failed = {name: state for name, state in health["scenarios"].items() if state["state"] == "failed"}
        _expect(failed, {}, "failed scenarios")
        process.terminate()
        _expect(process.wait(STOP_SECONDS), 0, "the exit status after SIGTERM")
    _expect(sorted(path.name for path in folder.iterdir()), ["var"], "what it wrote into its folder")


def _expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise DistError(f"{what}: {found!r} instead of {expected!r}")


@contextmanager
def _serving(
    command: Sequence[str | Path], folder: Path, environ: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server on any free port while the block runs, and yield it with its address."""
    words = [*map(str, command), "run", "--port", "0"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(words, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        timer = threading.Timer(START_SECONDS, process.kill)
        timer.start()
        try:
            url = next((line.split()[-1] for line in process.stdout if " serves http" in line), None)
            timer.cancel()
            if url is None:
                errors.seek(0)
                raise DistError(f"the server did not start: status {process.wait()}\n{errors.read()}".rstrip())
            yield process, url
        finally:
            timer.cancel()
            process.kill()


def main() -> None:
    """Build, install into an empty environment, and try."""
    if changed := run("git", "status", "--porcelain"):
        raise DistError(f"commit these changes first, or remove them:\n{changed}".rstrip())
    shutil.rmtree(TARGET, ignore_errors=True)
    distributions = build(TARGET)
    with tempfile.TemporaryDirectory() as scratch:
        environment, folder, home = (Path(scratch, name) for name in ("environment", "folder", "home"))
        run(sys.executable, "-m", "venv", environment)
        pip = environment / "bin" / "pip"
        constraints = REPOSITORY / "constraints.txt"
        run(pip, "install", "-q", "--disable-pip-version-check", "-c", constraints, distributions[0], folder=Path("/"))
        folder.mkdir()
        home.mkdir()
        environ = {"PATH": os.environ["PATH"], "HOME": str(home)}
        try_out([environment / "bin" / "streamlab"], folder, environ)
        _expect(sorted(home.iterdir()), [], "what it wrote into the home of its user")
    for path in distributions:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size:,} bytes, SHA-256 {digest}")
    print(f"streamlab {version()} was installed, served and stopped in an empty environment")


if __name__ == "__main__":
    try:
        main()
    except DistError as error:
        print(f"make dist: {error}", file=sys.stderr)
        sys.exit(1)
