"""The cgroups of this process, version 1, 2 or both, with their limits of memory and processors.

`memory` reads memory limits from them, and the engine reads processor limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


class Level(NamedTuple):
    """One cgroup: the directory with its files, the version of cgroups, and its name for log messages."""

    path: Path
    version: int
    name: str


def levels(controller: str, membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> Iterator[Level]:
    """Yield every cgroup whose limits of a controller hold for this process, from its own up to the root.

    Args:
        controller: "memory" or "cpu".
        membership: the file with the process's cgroups, one "id:controllers:path" a line.
        mount: where the hierarchies are mounted, those of version 1 by the name of the controller.
    """
    for line in (read_text(membership) or "").splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if not controllers:
            yield from _upwards(mount, path, 2)
        elif controller in controllers.split(","):
            root = mount / controller
            yield from _upwards(root if root.is_dir() else mount / controllers, path, 1)


def _upwards(root: Path, path: str, version: int) -> Iterator[Level]:
    inner = PurePosixPath(path.lstrip("/"))
    # In a container the path may be the host's, while only its last level is mounted, as the root. The other levels
    # are then missing, or belong to other processes.
    if ".." in inner.parts or not (root / inner).is_dir():
        inner = PurePosixPath()
    for level in (inner, *inner.parents) if inner.parts else (inner,):
        yield Level(root / level, version, f"cgroup /{level}" if level.parts else "cgroup /")


def read_text(path: Path) -> str | None:
    """Return the text of a file; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """Return the number in a file; None if the file has no number, for example "max"."""
    text = (read_text(path) or "").strip()
    return int(text) if text.isdecimal() else None
