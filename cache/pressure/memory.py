"""Reads memory usage: of the machine, of the cgroups of this process, of each GPU, or from a callable.

A source is a callable that returns readings. `readings` validates each reading, and one invalid reading does not
hide the others. `PressureWatch` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from erllama.cache.pressure.cgroups import MEMBERSHIP, MOUNT, Level, levels, read_number, read_text
from erllama.checks import import_optional, real
from erllama.errors import OptionError

SOURCES = ("noop", "system", "nvidia")

# Version 1 of cgroups shows "no limit" as the largest multiple of a page below 2**63.
_NO_LIMIT = 2**60


class MemoryUsage(NamedTuple):
    """One reading: `used` of `total` bytes of the memory called `name`."""

    used: int
    total: int
    name: str = ""

    @property
    def fraction(self) -> float:
        """Used bytes divided by total bytes. May be above 1."""
        return self.used / self.total


Source = Callable[[], MemoryUsage | Iterable[MemoryUsage]]


def readings(source: Source) -> Iterator[MemoryUsage | str]:
    """Call a source, and yield each valid reading, or the error message of an invalid one."""
    found = source()
    for reading in [found] if isinstance(found, MemoryUsage) else found:
        try:
            yield _validate(reading)
        except OptionError as error:
            yield str(error)


def _validate(reading: object) -> MemoryUsage:
    if not isinstance(reading, MemoryUsage):
        raise OptionError(f"a source returned {reading!r}; it must return MemoryUsage(used, total) in bytes")
    of = f" of {reading.name}" if reading.name else ""
    used, total = int(real(f"used{of}", reading.used, 0)), int(real(f"total{of}", reading.total, 1))
    return MemoryUsage(used, total, reading.name)


def open_sources(source: str | Source) -> tuple[Source, ...]:
    """Return the sources of a name. Each is read separately, so that one that fails does not hide the others."""
    if callable(source):
        return (source,)
    if source == "system":
        return (_machine_source(), cgroup_memory)
    if source == "nvidia":
        return _gpu_sources()
    return ()


def _machine_source() -> Source:
    """Return the source of the machine's memory. Memory that is not available without swapping counts as used."""
    psutil = import_optional("psutil", needed_by="source='system'", package="psutil", install="psutil")

    def read() -> MemoryUsage:
        memory = psutil.virtual_memory()
        return MemoryUsage(memory.total - memory.available, memory.total, "system")

    return read


def _gpu_sources() -> tuple[Source, ...]:
    """Return one source for every GPU that the driver shows, because one GPU may fail while others work."""
    nvml = import_optional(
        "pynvml", needed_by="source='nvidia'", package="nvidia-ml-py", install="'erllama[nvidia]'"
    )
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        raise OptionError(
            f"source='nvidia' finds no NVIDIA driver ({error}); install the driver, or use source='system'"
        ) from error
    if not count:
        raise OptionError("source='nvidia' finds no GPU; use source='system'")
    return tuple(partial(_read_gpu, nvml, index) for index in range(count))


def _read_gpu(nvml: ModuleType, index: int) -> MemoryUsage:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    # From free memory: drivers differ in whether `used` includes the memory that they reserve.
    return MemoryUsage(memory.total - memory.free, memory.total, f"GPU {index} {nvml.nvmlDeviceGetName(handle)}")


class _CgroupFiles(NamedTuple):
    """File names of a version of cgroups, and the key of droppable page cache in `memory.stat`."""

    limit: str
    usage: str
    reclaimable: str


_V1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _CgroupFiles("memory.max", "memory.current", "inactive_file")


def cgroup_memory(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> list[MemoryUsage]:
    """Return the usage of every cgroup memory limit of this process, from its own cgroup up to the root.

    Empty if there is no limit, or there are no cgroups. Page cache that the kernel drops first (inactive_file) does
    not count as used. A level that cannot be read is skipped.

    Args:
        membership, mount: as of `cgroups.levels`.
    """
    found = (_usage(level) for level in levels("memory", membership, mount))
    return [usage for usage in found if usage is not None]


def available_memory(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> int:
    """Return the bytes that this process can still allocate: of the machine, within the limits of its cgroups.

    All page cache counts as available, because the kernel drops it for an allocation: it may be the very file of a
    model that was loaded before.

    Args:
        membership, mount: as of `cgroups.levels`.
    """
    machine = [usage for usage in readings(_machine_source()) if isinstance(usage, MemoryUsage)]
    limits = [_usage(level, all_page_cache=True) for level in levels("memory", membership, mount)]
    return min((max(each.total - each.used, 0) for each in (*machine, *limits) if each is not None), default=0)


def _usage(level: Level, *, all_page_cache: bool = False) -> MemoryUsage | None:
    files = _V1 if level.version == 1 else _V2
    limit, usage = read_number(level.path / files.limit), read_number(level.path / files.usage)
    if limit is None or usage is None or not 0 < limit < _NO_LIMIT:
        return None
    dropped = _reclaimable(level.path / "memory.stat", files.reclaimable)
    if all_page_cache:
        dropped += _reclaimable(level.path / "memory.stat", files.reclaimable.replace("inactive", "active"))
    return MemoryUsage(max(0, usage - dropped), limit, level.name)


def _reclaimable(stat: Path, key: str) -> int:
    for line in (read_text(stat) or "").splitlines():
        name, _, number = line.partition(" ")
        if name == key and number.strip().isdecimal():
            return int(number)
    return 0
