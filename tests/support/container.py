"""The container image, built by buildah and run in namespaces of the kernel: no engine, and no image registry.

Both need root. The base image is a stand-in of this machine's files: the running Python, and the programs and libraries
that the Dockerfile needs. So the instructions are tested, not the base; `apt-get` does nothing, since what it would
install is copied too.
"""

import ast
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tests.support.servers import REPOSITORY, Running, free_port

PROGRAMS = ("sh", "cat", "find", "install", "ls", "rm", "strip", "useradd")
"""Programs that the instructions run, in addition to Python."""

LIBRARIES = (
    *("libdl.so.2", "libm.so.6", "libpthread.so.0", "librt.so.1", "libutil.so.1"),
    *("libgcc_s.so.1", "libgomp.so.1", "libstdc++.so.6", "libz.so.1"),
)
"""Libraries that wheels expect of the base image, or that the image installs."""

UNUSED = shutil.ignore_patterns(
    *("__pycache__", "test", "idlelib", "tkinter", "turtledemo", "site-packages", "dist-packages", "*.a", "EXTERNALLY*")
)
"""Parts of Python's library that the stand-in does not need."""

START_SECONDS = 60.0
"""Timeout for the start of a container, in seconds."""


def missing() -> str:
    """Return why an image cannot be built and run here; empty if it can."""
    if os.geteuid() != 0:
        return "building an image needs root"
    for program in ("buildah", "unshare", "nsenter", "ldd", "ldconfig", *PROGRAMS):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    for library in LIBRARIES:
        if not _library(library):
            return f"{library} is not installed"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    return f"namespaces cannot be had here: {tried.stderr.strip()}" if tried.returncode else ""


# -- the stand-in for the base image


def write_base(root: Path) -> None:
    """Write the root folder of the stand-in."""
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for name in ("dev", "etc", "proc", "run", "sys", "tmp", "usr/local/bin", "var/lib/apt/lists"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    shutil.copy("/etc/login.defs", root / "etc")  # the settings of useradd
    (root / "usr/bin/apt-get").write_text("#!/bin/sh\n")
    (root / "usr/bin/apt-get").chmod(0o755)
    python = _write_python(root / "usr/local")
    found = [python, *python.parent.parent.rglob("lib-dynload/*.so")]
    for name in PROGRAMS:
        program = root / "usr/bin" / name
        shutil.copy(str(shutil.which(name)), program)
        found.append(program)
    copies = {_library(name) for name in LIBRARIES}
    listed = subprocess.run(["ldd", *found, *copies], capture_output=True, text=True, check=True).stdout
    copies |= set(re.findall(r"^\t(?:\S+ => )?(/\S+) \(0x", listed, re.MULTILINE))
    for library in sorted(copies):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)


def _write_python(prefix: Path) -> Path:
    """Copy the base of the running Python below a prefix, with the pip of this environment; return the program."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library, program = prefix / "lib" / version, prefix / "bin" / version
    shutil.copytree(sysconfig.get_path("stdlib"), library, symlinks=True, ignore=UNUSED)
    pip = importlib.util.find_spec("pip")
    assert pip is not None
    assert pip.origin is not None
    shutil.copytree(Path(pip.origin).parent, library / "site-packages/pip", ignore=UNUSED)
    shutil.copy(Path(sys.executable).resolve(), program)
    for name in ("python", "python3"):
        (prefix / "bin" / name).symlink_to(version)
    return program


def _library(name: str) -> str:
    """Return the path of a shared library, as the dynamic linker finds it; empty if there is none."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    found = re.search(rf"^\t{re.escape(name)} \(.*\) => (\S+)$", listed, re.MULTILINE)
    return found[1] if found else ""


# -- build


def _pip_mounts(folder: Path) -> list[str]:
    """Return the options that give pip in the build the settings of pip on this machine, and the files they name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = dict(re.findall(r"^(?:global|install|wheel|:env:)\.([\w-]+)=(.*)$", listed, re.MULTILINE))
    values = {name: str(ast.literal_eval(value)) for name, value in settings.items()}
    config = folder / "pip.conf"
    config.touch(0o600)
    config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in values.items()))
    mounts = {str(config): "/etc/pip.conf"}
    for word in " ".join(values.values()).split():
        # Pages of an index name files beside it.
        path = Path(url2pathname(urlsplit(word).path)).parent if word.startswith("file:") else Path(word)
        if path.is_absolute() and path.exists():
            mounts[str(path)] = str(path)
    return [word for source, target in mounts.items() for word in ("--volume", f"{source}:{target}:ro")]


class Buildah:
    """buildah with a storage of its own, in a folder; a context that removes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._words = ["buildah", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self("umount", "--all")
        self("rm", "--all")
        shutil.rmtree(self._folder)  # a gigabyte, which pytest would retain

    def __call__(self, *arguments: str | Path) -> str:
        """Run a command of buildah, and return what it prints."""
        done = subprocess.run(
            [*self._words, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()

    def import_base(self) -> "Image":
        """Store the stand-in under the name of the base image, and return it."""
        (name,) = re.findall(r"^FROM (python:\S+)", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
        name = f"docker.io/library/{name}"
        with tempfile.TemporaryDirectory(dir=self._folder) as root:
            Path(root).chmod(0o755)
            write_base(Path(root))
            container = self("from", "scratch")
            self("copy", "--quiet", container, root, "/")
        self("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", container)
        self("commit", "--quiet", "--rm", container, name)
        return Image(self, name)

    def build(self, target: str) -> "Image":
        """Build a target of the Dockerfile."""
        options = ["--format", "docker", "--isolation", "chroot", "--network", "host", "--pull-never"]
        self("bud", *options, *_pip_mounts(self._folder), "--target", target, "--tag", target, ".")
        return Image(self, f"localhost/{target}")


def _children(pid: int) -> list[int]:
    """Return the children of a process; none if it has ended."""
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@dataclass
class Image:
    """An image that was built."""

    buildah: Buildah
    name: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its configuration: user, command, environment, labels."""
        config: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", self.name))["Docker"]["config"]
        return config

    @cached_property
    def environ(self) -> dict[str, str]:
        """Its environment variables."""
        return dict(variable.split("=", 1) for variable in self.config["Env"])

    @cached_property
    def root(self) -> Path:
        """A folder with its files."""
        return Path(self.buildah("mount", self.buildah("from", "--pull-never", self.name)))

    @property
    def user(self) -> tuple[str, str]:
        """The numbers of its user and group."""
        user, _, group = self.config["User"].partition(":")
        return user, group

    @property
    def as_user(self) -> list[str]:
        """The options of unshare and nsenter that select its user."""
        user, group = self.user
        return [f"--setuid={user}", f"--setgid={group}"]

    def sizes(self) -> dict[str, int]:
        """Return the sizes of its files, in bytes, by path."""
        files = (path for path in self.root.rglob("*") if not path.is_symlink() and path.is_file())
        return {str(path.relative_to(self.root)): path.stat().st_size for path in files}

    @contextlib.contextmanager
    def running(
        self, base: Path, mounts: Mapping[str, Path] | None = None, environ: Mapping[str, str] | None = None
    ) -> Iterator["Container"]:
        """Run its command as a container does: as process 1, with a read-only root, and with var/ and /tmp writable.

        `mounts` are files and folders of this machine at paths below the working directory.
        """
        port, var = free_port(), base / "var"
        var.mkdir()
        os.chown(var, *map(int, self.user))
        variables = {
            **self.environ,
            "STREAMLAB_SERVER__PORT": str(port),
            "STREAMLAB_AUTH__OPEN": "true",
            **(environ or {}),
        }
        work = f"{self.root}{self.config['WorkingDir']}"
        script = f"""
            set -e
            mount --bind {self.root} {self.root}
            mount -t tmpfs -o mode=1777 tmpfs {self.root}/tmp
            mount --rbind /dev {self.root}/dev
            mount --bind {var} {work}/var
            {"".join(f"mount --bind -o ro {source} {work}/{name}; " for name, source in (mounts or {}).items())}
            mount -o remount,bind,ro {self.root}
            exec "$@"
        """
        command = [
            "unshare", "--mount", "sh", "-c", script, "sh",
            *("unshare", "--pid", "--fork", "--mount-proc", f"--root={self.root}"),
            *(f"--wd={self.config['WorkingDir']}", *self.as_user, *self.config["Cmd"]),
        ]  # fmt: skip
        for name in mounts or {}:
            target = Path(work, name)
            if not target.exists():  # an engine creates it too
                target.mkdir() if (mounts or {})[name].is_dir() else target.touch()
        log = base / "stderr.log"
        with log.open("w") as errors:
            process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True)
        with process:
            try:
                assert process.stdout is not None
                assert any(" serves http" in line for line in process.stdout), log.read_text()
                yield Container(process, f"http://127.0.0.1:{port}", base, log, self, variables)
            finally:
                for child in _children(process.pid):  # the kernel does not, since it has another user
                    os.kill(child, signal.SIGKILL)
                process.kill()


@dataclass
class Container(Running):
    """A container, whose process 1 is the server."""

    image: Image
    environ: Mapping[str, str]

    @cached_property
    def first(self) -> int:
        """The number of its process 1, on this machine."""
        (child,) = _children(self.process.pid)
        return child

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as its user."""
        enter = ["nsenter", f"--target={self.first}", "--mount", "--pid", "--root", "--wd", *self.image.as_user]
        return subprocess.run([*enter, *command], env=self.environ, capture_output=True, text=True, check=False)

    def stop(self, seconds: float) -> int:
        """Send SIGTERM to process 1, as an engine does; return the exit status."""
        os.kill(self.first, signal.SIGTERM)
        return self.process.wait(seconds)
