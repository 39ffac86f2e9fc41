"""How much memory is used: of the machine, of the limits this process is under, of each GPU, or as a caller says.

A source gives readings when it is called. Each reading is checked before it is
believed, and a source that fails hides no other.
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

# v1 has no word for "no limit": it is the largest multiple of a page in 63 bits.
_NO_LIMIT = 2**60


class MemoryUsage(NamedTuple):
    """One reading: `used` of `total` bytes of the memory called `name`."""

    used: int
    total: int
    name: str = ""

    @property
    def fraction(self) -> float:
        """Used bytes over total bytes; above 1 where more is used than there should be."""
        return self.used / self.total


Source = Callable[[], MemoryUsage | Iterable[MemoryUsage]]


def readings(source: Source) -> Iterator[MemoryUsage | str]:
    """What `source` gives, checked; what is no reading as a text that says why, so that the others count."""
    found = source()
    for reading in [found] if isinstance(found, MemoryUsage) else found:
        try:
            yield _checked(reading)
        except OptionError as error:
            yield str(error)


def _checked(reading: object) -> MemoryUsage:
    if not isinstance(reading, MemoryUsage):
        raise OptionError(f"a source gave {reading!r}, not MemoryUsage(used, total) in bytes")
    of = f" of {reading.name}" if reading.name else ""
    used, total = int(real(f"used{of}", reading.used, 0)), int(real(f"total{of}", reading.total, 1))
    return MemoryUsage(used, total, reading.name)


def open_sources(source: str | Source) -> tuple[Source, ...]:
    """The sources of that name, each read and failing on its own."""
    if callable(source):
        return (source,)
    if source == "system":
        return (_machine(), cgroup_memory)
    if source == "nvidia":
        return _gpus()
    return ()


def _machine() -> Source:
    """The machine's memory: what is not available without swapping is used."""
    psutil = import_optional("psutil", needed_by="source='system'", package="psutil", install="psutil")

    def read() -> MemoryUsage:
        memory = psutil.virtual_memory()
        return MemoryUsage(memory.total - memory.available, memory.total, "system")

    return read


def _gpus() -> tuple[Source, ...]:
    """The memory of every GPU that the driver shows, each a source: one may be lost while others work."""
    nvml = import_optional(
        "pynvml", needed_by="source='nvidia'", package="nvidia-ml-py", install="'erllama[nvidia]'"
    )
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        raise OptionError(
            f"source='nvidia' finds no NVIDIA driver ({error}); install the driver, or take source='system'"
        ) from error
    if not count:
        raise OptionError("source='nvidia' finds no GPU; take source='system'")
    return tuple(partial(_read_gpu, nvml, index) for index in range(count))


def _read_gpu(nvml: ModuleType, index: int) -> MemoryUsage:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    # By what is free: drivers differ in whether `used` has what they keep for themselves.
    return MemoryUsage(memory.total - memory.free, memory.total, f"GPU {index} {nvml.nvmlDeviceGetName(handle)}")


class _Files(NamedTuple):
    """What a version of cgroups calls its files, and in `memory.stat` the droppable page cache, children's too."""

    limit: str
    usage: str
    reclaimable: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def cgroup_memory(membership: Path = MEMBERSHIP, mount: Path = MOUNT) -> list[MemoryUsage]:
    """Usage of every memory limit this process is under, from its own cgroup up to the root: v1, v2 or both.

    Empty where there is no limit, or there are no cgroups. Page cache that the
    kernel drops first (inactive_file) is not counted as used. A level that
    cannot be read is left out.

    Args:
        membership, mount: as of `cgroups.levels`.
    """
    found = (_usage(level) for level in levels("memory", membership, mount))
    return [usage for usage in found if usage is not None]


def _usage(level: Level) -> MemoryUsage | None:
    files = _V1 if level.version == 1 else _V2
    limit, usage = read_number(level.path / files.limit), read_number(level.path / files.usage)
    if limit is None or usage is None or not 0 < limit < _NO_LIMIT:
        return None
    dropped = _reclaimable(level.path / "memory.stat", files.reclaimable)
    return MemoryUsage(max(0, usage - dropped), limit, level.name)


def _reclaimable(stat: Path, key: str) -> int:
    for line in (read_text(stat) or "").splitlines():
        name, _, number = line.partition(" ")
        if name == key and number.strip().isdecimal():
            return int(number)
    return 0
