"""Which files a pattern means, what they are, and which are rotations of others: all that is asked of the disk."""

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
"""Regular files, and what they were when they were looked at."""

_ROTATED = re.compile(r"[.\-_]\d[\d.\-_:+TZ]*")
_ROTATION_OF = re.compile(rf"(.+?){_ROTATED.pattern}")
_MAGIC = re.compile(r"[*?\[]")


def look(path: Path) -> os.stat_result | None:
    """What a path is; None if there is no regular file."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def found(paths: Iterable[Path]) -> Found:
    """Those of some paths that are regular files, as far as the disk tells."""
    there = []
    for path in paths:
        with suppress(OSError):
            if (status := look(path)) is not None:
                there.append((status, path))
    return there


def identity(status: os.stat_result) -> Identity:
    """What a file is, under whatever name."""
    return status.st_dev, status.st_ino


def state(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file is written to or renamed."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def age(status: os.stat_result, path: Path) -> tuple[int, float, str]:
    """To sort by, the oldest content first; where the clock was too coarse, the higher number, or the lower date."""
    number = re.search(r"(?<!\d)[.\-_](\d{1,4})$", path.name)
    return status.st_mtime_ns, -int(number[1]) if number else 0, path.name


def open_file(path: Path, status: os.stat_result) -> io.FileIO | None:
    """Open a file that was seen a moment ago; None if the path is another one by now."""
    try:
        # A pipe may have taken the name: opening must not wait for its writer.
        file = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    if identity(os.fstat(file.fileno())) == identity(status):
        return file
    file.close()
    return None


def siblings(followed: Path, *others: str) -> Found:
    """The plain files whose names begin as that of a path, what it links to, or one of the others before rotation."""
    there: dict[Path, os.stat_result] = {}
    for base in {followed, Path(os.path.realpath(followed)), *(unrotated(Path(other)) for other in others)}:
        try:
            names = os.listdir(base.parent)  # noqa: PTH208 - names alone: most of them are not looked at
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        for name in names:
            path = base.with_name(name)
            if name.startswith(base.name) and path.suffix not in COMPRESSED and path not in there:
                with suppress(PermissionError):
                    status = look(path)
                    if status is not None:
                        there[path] = status
    return [(status, path) for path, status in there.items()]


def is_rotation(path: Path, base: Path) -> bool:
    """Whether the name of a path is that of another with what rotation adds: `.1`, `-20261101`."""
    return (
        path.parent == base.parent
        and path.name.startswith(base.name)
        and _ROTATED.fullmatch(path.name, len(base.name)) is not None
    )


def unrotated(path: Path) -> Path:
    """A path without what rotation has added to its name, if it has."""
    match = _ROTATION_OF.fullmatch(path.name)
    return path.with_name(match[1]) if match else path


def matches(pattern: Path, followed: Iterable[Path] = ()) -> list[Path]:
    """The paths a pattern means: no compressed ones, no links to others, no rotations of them or those followed."""
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


def means(pattern: Path, path: str) -> bool:
    """Whether a pattern, as far as its words go, means a path that may not be there."""
    # A star of fnmatch goes through folders, and `**/` may stand for none.
    said = str(pattern).replace("**/", "*")
    return path == str(pattern) or (_MAGIC.search(said) is not None and fnmatchcase(path, said))


def root(pattern: Path) -> Path | None:
    """The deepest folder of a pattern that is not a pattern itself."""
    for parent in pattern.parents:
        if not _MAGIC.search(str(parent)):
            return parent
    return None


def history(pattern: str | Path) -> list[Path]:
    """The files behind a pattern, rotated ones included, the oldest content of each path first; asks the disk.

    For each path that matches, in the order of names: its plain siblings that look like rotations (`name.1`,
    `name-20261101`), as they were last modified, then the path itself. What is missing or compressed is left out.
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
    """Why a log cannot be read, for clients: the status of an error response, and a reason without a folder's name."""

    status: int
    reason: str
    partly: bool = False
    """Whether other files of the pattern can be read."""


def fault(pattern: Path) -> Fault | None:
    """Return what is wrong with the files of a pattern, or None where all can be read; opens each of them."""
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
    """Return why nothing can be read of a pattern's files and their rotations, or None."""
    found = fault(pattern)
    return None if found is None or found.partly or (found.status == 404 and history(pattern)) else found
