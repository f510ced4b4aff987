"""Query the file system: files that match a pattern, their identity, and which are rotations of others."""

import io
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path
from typing import NamedTuple

COMPRESSED = {".gz", ".xz", ".zst", ".bz2", ".lz4", ".zip"}

Identity = tuple[int, int]
"""Device and inode."""
Found = list[tuple[os.stat_result, Path]]
"""Regular files, each with its status at the time of the look."""

_ROTATED = re.compile(r"[.\-_]\d[\d.\-_:+TZ]*")
_ROTATION_OF = re.compile(rf"(.+?){_ROTATED.pattern}")
_MAGIC = re.compile(r"[*?\[]")


def look(path: Path) -> os.stat_result | None:
    """Return the status of a path; None if it is not a regular file."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def found(paths: Iterable[Path]) -> Found:
    """Return the paths that are regular files; paths with an OSError are omitted."""
    files = []
    for path in paths:
        with suppress(OSError):
            if (status := look(path)) is not None:
                files.append((status, path))
    return files


def identity(status: os.stat_result) -> Identity:
    """Return the device and the inode of a file, which identify it under any name."""
    return status.st_dev, status.st_ino


def state(status: os.stat_result) -> tuple[int, int, int]:
    """Return the values that change when a file is written to or renamed."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def age(status: os.stat_result, path: Path) -> tuple[int, float, str]:
    """Return a sort key for the oldest content first; at equal times the higher number, or the lower date, is older."""
    number = re.search(r"(?<!\d)[.\-_](\d{1,4})$", path.name)
    return status.st_mtime_ns, -int(number[1]) if number else 0, path.name


def open_file(path: Path, status: os.stat_result) -> io.FileIO | None:
    """Open a file whose status was just read; None if the path is another file by now."""
    try:
        # A pipe may have replaced the file: opening must not wait for its writer.
        file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    if identity(os.fstat(file.fileno())) == identity(status):
        return file
    file.close()
    return None


def siblings(followed: Path, *others: str) -> Found:
    """Return the uncompressed files whose names start with that of a path, its link target, or an unrotated other."""
    files: dict[Path, os.stat_result] = {}
    for base in {followed, Path(os.path.realpath(followed)), *(unrotated(Path(other)) for other in others)}:
        try:
            names = os.listdir(base.parent)  # noqa: PTH208 - only names: most of them need no status
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        for name in names:
            path = base.with_name(name)
            if name.startswith(base.name) and path.suffix not in COMPRESSED and path not in files:
                with suppress(PermissionError):
                    status = look(path)
                    if status is not None:
                        files[path] = status
    return [(status, path) for path, status in files.items()]


def is_rotation(path: Path, base: Path) -> bool:
    """Return whether a path has the name of another with the suffix of a rotation: `.1`, `-20261101`."""
    return (
        path.parent == base.parent
        and path.name.startswith(base.name)
        and _ROTATED.fullmatch(path.name, len(base.name)) is not None
    )


def unrotated(path: Path) -> Path:
    """Return a path without the suffix of a rotation."""
    match = _ROTATION_OF.fullmatch(path.name)
    return path.with_name(match[1]) if match else path


def matches(pattern: Path, followed: Iterable[Path] = ()) -> list[Path]:
    """Return the paths that match, without compressed files, links to others, rotations of them or of `followed`."""
    if not _MAGIC.search(str(pattern)) or os.path.isfile(pattern):  # noqa: PTH113 - it never raises
        return [pattern]
    names = glob(str(pattern), recursive=True)  # noqa: PTH207 - the pattern may be absolute
    paths = {path for name in names if (path := Path(name)).suffix not in COMPRESSED}
    known = paths.union(followed)
    return sorted(
        path
        for path in paths
        if not ((base := unrotated(path)) != path and base in known)
        # As functions of os.path these never raise.
        and not (os.path.islink(path) and Path(os.path.realpath(path)) in paths)  # noqa: PTH114
        and not os.path.isdir(path)  # noqa: PTH112
    )


def is_match(pattern: Path, path: str) -> bool:
    """Return whether a pattern matches a path, by its text alone: the path need not exist."""
    # A star of fnmatch matches across folders, and `**/` may match no folder.
    text = str(pattern).replace("**/", "*")
    return path == str(pattern) or (_MAGIC.search(text) is not None and fnmatchcase(path, text))


def root(pattern: Path) -> Path | None:
    """Return the deepest folder of a pattern that is not a pattern itself."""
    for parent in pattern.parents:
        if not _MAGIC.search(str(parent)):
            return parent
    return None


def history(pattern: str | Path) -> list[Path]:
    """Return the files of a pattern, rotated ones included, the oldest content of each path first. Reads the disk.

    For each path that matches, in the order of names: its uncompressed rotations (`name.1`, `name-20261101`) by their
    time of modification, then the path itself. Missing files are omitted.
    """
    files: list[Path] = []
    for match in matches(Path(pattern).absolute()):
        base = Path(os.path.realpath(match))
        rotations = [
            (status, path)
            for status, path in siblings(match, str(base))
            if is_rotation(path, match) or is_rotation(path, base)
        ]
        files += [path for _, path in sorted(rotations, key=lambda rotation: age(*rotation))]
        files += [path for _, path in found([match])]
    return list(dict.fromkeys(files))


class Fault(NamedTuple):
    """Why a log cannot be read: the status of the error response, and a reason that names no folder."""

    status: int
    reason: str
    partly: bool = False
    """Whether other files of the pattern can be read."""


def fault(pattern: Path) -> Fault | None:
    """Return why files of a pattern cannot be read, or None if all can. Opens each of them."""
    readable, faults = 0, list[Fault]()
    for path in matches(pattern):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
            if look(path) is None:
                faults.append(Fault(404, f"{path.name} is not a regular file"))
            else:
                readable += 1
        except (FileNotFoundError, NotADirectoryError):
            faults.append(Fault(404, f"there is no file {path.name}"))
        except OSError as error:
            status = 403 if isinstance(error, PermissionError) else 503
            faults.append(Fault(status, f"{path.name} cannot be read: {error.strerror}"))
    if not readable and not faults:
        folder = root(pattern)
        if folder is not None and folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            return Fault(403, f"the folder of {pattern.name} cannot be read: Permission denied")
        return Fault(404, f"there is no file {pattern.name}")
    return faults[0]._replace(partly=readable > 0) if faults else None


def fault_of_history(pattern: Path) -> Fault | None:
    """Return why neither a pattern's files nor their rotations can be read, or None."""
    found = fault(pattern)
    return None if found is None or found.partly or (found.status == 404 and history(pattern)) else found
