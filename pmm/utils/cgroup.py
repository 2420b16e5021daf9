"""The CPU quota of the control groups of a process on Linux, as containers and schedulers set it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUP = re.compile(r"^\d+:([^:]*):(/.*)$", re.MULTILINE)
"""A line of /proc/self/cgroup: controllers (version 1; none in version 2), and the group."""
_MOUNT = re.compile(r"^\S+ \S+ \S+ (/\S*) (/\S*) .*? - (cgroup2?) \S+ (\S+)$", re.MULTILINE)
"""A line of /proc/self/mountinfo: the mounted group, its folder, the version, and controllers among the options."""


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU time that this process may use, in cores: the least quota of its groups (version 1 and 2) and their parents.
    None if there is no quota; a file that cannot be read or parsed counts as none.

    `root` is where /proc and /sys are.
    """
    quotas = (_quota(folder) for folder in _groups(root))
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups and of those around them, as far as they are mounted."""
    lines = _GROUP.findall(_read(root / "proc/self/cgroup"))
    groups = {name: group for names, group in lines for name in names.split(",")}
    for mounted, folder, version, options in _MOUNT.findall(_read(root / "proc/self/mountinfo")):
        if version == "cgroup2" or "cpu" in options.split(","):
            top = root / _unescaped(folder).lstrip("/")
            path = top / _inside(_unescaped(mounted), groups.get("" if version == "cgroup2" else "cpu", "/"))
            yield from (each for each in (path, *path.parents) if each.is_relative_to(top))


def _inside(mounted: str, group: str) -> PurePosixPath:
    """The path of `group` below the mounted group. A container may see the name that its group has outside, of which no
    folder is visible: then the mounted group is the container's."""
    try:
        path = PurePosixPath(group).relative_to(mounted)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in path.parts else path


def _quota(folder: Path) -> float | None:
    """The quota of one group, in cores: `cpu.max` is version 2's file, the others are version 1's."""
    text = _read(folder / "cpu.max") or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
    try:
        quota, period = map(int, text.split())
    except ValueError:  # "max 100000", or no such files, as in the root group
        return None
    return quota / period if quota > 0 and period > 0 else None  # version 1 has -1 for none


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _unescaped(path: str) -> str:
    """mountinfo writes a space as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
