"""The number of processors this process may use, by its affinity and the CPU quotas of its cgroups.

More threads than that wait for each other: libllama's threads spin at barriers, so a thread that the kernel stops
for its quota delays all others. Used for the default number of a model's threads.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from erllama.cache.pressure.cgroups import MEMBERSHIP, MOUNT, Level, levels, read_number, read_text


def default_threads(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> int:
    """Return the default number of threads, at least 1.

    Args:
        membership, mount: as of `cgroups.levels`.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(membership, mount)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cpu_quota(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> float | None:
    """Return the smallest CPU quota that this process is under, in processors; None for no quota."""
    return min((quota for level in levels("cpu", membership, mount) if (quota := _quota(level))), default=None)


def _quota(level: Level) -> float | None:
    """Return the quota of one cgroup. A level that cannot be read has none."""
    if level.version == 1:
        # -1 means no quota; read_number returns None for it.
        quota, period = read_number(level.path / "cpu.cfs_quota_us"), read_number(level.path / "cpu.cfs_period_us")
    else:
        first, _, second = (read_text(level.path / "cpu.max") or "").strip().partition(" ")
        quota, period = (int(text) if text.isdecimal() else None for text in (first, second))
    return quota / period if quota and period else None
