"""Find the files that were written after a content: rotated since, and the followed path itself."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from . import disk
from .content import Content


def successors(followed: Path, here: os.stat_result | None, contents: Sequence[Content]) -> disk.Found:
    """Return the files written after the last of `contents`, oldest first.

    They are its rotated siblings that were not read, and the path itself. `here` is the status of `followed` at this
    look. The result is empty as well while a rotation is in progress. Raises OSError.
    """
    content = contents[-1]
    listed = _rotated_siblings(followed, here, content)
    for _ in range(10):
        before, listed = listed, _rotated_siblings(followed, here, content)
        # Two equal listings, and the same file at the path: no file was missed between them.
        if [(disk.identity(status), path) for status, path in before] == [
            (disk.identity(status), path) for status, path in listed
        ]:
            break
    else:
        return []
    now = disk.look(followed)
    if (now and disk.identity(now)) != (here and disk.identity(here)):
        return []
    ages = {disk.identity(status): disk.age(status, path) for status, path in listed}
    unknown = (content.modified, math.inf, "")
    age = unknown if content.file is None else ages.get(content.position.identity, unknown)
    read = {other.position.identity for other in contents if other.file is not None}
    after = [
        (status, path)
        for status, path in sorted(listed, key=lambda found: disk.age(*found))
        if status.st_size > 0 and disk.identity(status) not in read and disk.age(status, path) > age
    ]
    return after if now is None else [*after, (now, followed)]


def _rotated_siblings(followed: Path, here: os.stat_result | None, content: Content) -> disk.Found:
    """Return the siblings that look like earlier contents of the path, or of its link target."""
    current = here and disk.identity(here)
    old = disk.unrotated(Path(content.position.path))
    bases = {str(followed), os.path.realpath(followed), str(old)}
    return [
        (status, path)
        for status, path in disk.siblings(followed, content.position.path)
        if disk.identity(status) != current
        and (path == old or any(disk.is_rotation(path, Path(base)) for base in bases))
    ]
