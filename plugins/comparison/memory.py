"""Available memory on Linux: of the machine, and of every control group that this process is in."""

import re
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available(proc: Path = PROC, groups: Path = GROUPS) -> int | None:
    """Return the bytes that can be allocated without swapping or being killed; None if the system does not report it.

    Source: proc_meminfo(5), MemAvailable; the kernel's cgroup-v2 and cgroup-v1/memory documents.
    """
    known = list(_left_in_groups(proc, groups))
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(proc / "meminfo"), re.MULTILINE)
    if found:
        known.append(int(found[1]) * 1024)
    return max(0, min(known)) if known else None


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Yield the bytes left in each control group of this process that has a limit."""
    for hierarchy in _read(proc / "self/cgroup").splitlines():
        _, controllers, name = hierarchy.split(":", 2)
        if not controllers:
            root, limit, usage, cache = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # A container often sees its own group as the root, whatever its name is outside.
        group = root / name.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            allowed, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if allowed.isdecimal() and used.isdecimal():
                # Pages of files count as used, and are reclaimed when they are needed.
                reclaimable = re.search(rf"^{cache} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                yield int(allowed) - int(used) + (int(reclaimable[1]) if reclaimable else 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
