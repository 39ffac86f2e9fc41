"""The processors that this process may use, and the default number of a model's threads.

The default is the number of physical cores: two threads on the same core share its arithmetic units. It is limited
by the affinity of the process and the CPU quotas of its cgroups. Where cores differ, only the fast ones count,
because the threads of a model wait for the slowest one.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

from erllama.cache.pressure.cgroups import MEMBERSHIP, MOUNT, Level, levels, read_number, read_text

DEVICES = Path("/sys/devices")
# Of the greatest capacity of a core. Slower cores would delay the threads on the fast ones.
_FAST = 0.5


class ThreadDefault(NamedTuple):
    """The default number of threads, at least 1, and the limit that determined it, for people to read."""

    n: int
    reason: str


def default_threads(membership: Path = MEMBERSHIP, mount: Path = MOUNT, devices: Path = DEVICES) -> ThreadDefault:
    """Return the default number of threads.

    Args:
        membership, mount: as of `cgroups.levels`.
        devices: the kernel's directory of devices.
    """
    allowed = allowed_processors()
    fast = _fast_processors(allowed, devices)
    n = _n_cores(fast, devices)
    kind = "performance core" if len(fast) < len(allowed) else "core" if n < len(fast) else "processor"
    reason = f"{n} {kind}{'s' if n > 1 else ''}"
    quota = cpu_quota(membership, mount)
    if quota is not None and math.ceil(quota) < n:
        return ThreadDefault(max(1, math.ceil(quota)), f"CPU quota of {quota:g}, {reason}")
    return ThreadDefault(n, reason)


def allowed_processors() -> frozenset[int]:
    """Return the numbers of the logical processors in the affinity of this process."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


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


def _fast_processors(allowed: frozenset[int], devices: Path) -> frozenset[int]:
    """Return the processors of the performance cores; all of them if the kernel does not distinguish cores."""
    performance = _numbers(read_text(devices / "cpu_core/cpus"))  # of Intel's hybrid processors
    if performance & allowed:
        return performance & allowed
    capacities = {n: read_number(_processor(n, devices) / "cpu_capacity") or 0 for n in allowed}
    greatest = max(capacities.values())
    return frozenset(n for n, capacity in capacities.items() if capacity > _FAST * greatest) or allowed


def _n_cores(processors: frozenset[int], devices: Path) -> int:
    """Return the number of physical cores of these logical processors."""
    cores = set()
    for n in processors:
        topology = _processor(n, devices) / "topology"
        siblings = read_text(topology / "core_cpus_list") or read_text(topology / "thread_siblings_list")
        cores.add(_numbers(siblings) or frozenset([n]))
    return len(cores)


def _processor(n: int, devices: Path) -> Path:
    return devices / f"system/cpu/cpu{n}"


def _numbers(text: str | None) -> frozenset[int]:
    """Return the numbers of a list such as "0-3,8"; an empty set for any other text."""
    found: set[int] = set()
    try:
        for part in (text or "").strip().split(","):
            first, dash, last = part.partition("-")
            found.update(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        return frozenset()
    return frozenset(found)
