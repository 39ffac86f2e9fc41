"""How much memory is used: of the machine, of the limits this process is under, of each GPU, or as a caller says.

A source gives readings when it is called. Each reading is checked before it is
believed, and a source that fails hides no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import NamedTuple

from erllama.errors import OptionError, real

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
    psutil = _import("psutil", "source='system' needs psutil: pip install psutil")

    def read() -> MemoryUsage:
        memory = psutil.virtual_memory()
        return MemoryUsage(memory.total - memory.available, memory.total, "system")

    return read


def _gpus() -> tuple[Source, ...]:
    """The memory of every GPU that the driver shows, each a source: one may be lost while others work."""
    nvml = _import("pynvml", "source='nvidia' needs nvidia-ml-py: pip install erllama[nvidia]")
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


def _import(name: str, missing: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise OptionError(missing) from error


class _Files(NamedTuple):
    """What a version of cgroups calls its files, and in `memory.stat` the droppable page cache, children's too."""

    limit: str
    usage: str
    reclaimable: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def cgroup_memory(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> list[MemoryUsage]:
    """Usage of every memory limit this process is under, from its own cgroup up to the root: v1, v2 or both.

    Empty where there is no limit, or there are no cgroups. Page cache that the
    kernel drops first (inactive_file) is not counted as used. A level that
    cannot be read is left out.

    Args:
        membership: the file with the process's cgroups, one "id:controllers:path" a line.
        mount: where the hierarchies are mounted, those of v1 by the name of the controller.
    """
    found: list[MemoryUsage] = []
    for line in (_text(membership) or "").splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if not controllers:
            found += _levels(mount, path, _V2)
        elif "memory" in controllers.split(","):
            found += _levels(mount / "memory", path, _V1)
    return found


def _levels(root: Path, path: str, files: _Files) -> Iterator[MemoryUsage]:
    inner = PurePosixPath(path.lstrip("/"))
    # In a container the path may be the host's, of which only the end is
    # mounted, as the root: then its other levels are not ours, or not there.
    if ".." in inner.parts or not (root / inner).is_dir():
        inner = PurePosixPath()
    for level in (inner, *inner.parents) if inner.parts else (inner,):
        limit, usage = _number(root / level / files.limit), _number(root / level / files.usage)
        if limit is not None and usage is not None and 0 < limit < _NO_LIMIT:
            dropped = _reclaimable(root / level / "memory.stat", files.reclaimable)
            yield MemoryUsage(max(0, usage - dropped), limit, f"cgroup /{level}" if level.parts else "cgroup /")


def _reclaimable(stat: Path, key: str) -> int:
    for line in (_text(stat) or "").splitlines():
        name, _, number = line.partition(" ")
        if name == key and number.strip().isdecimal():
            return int(number)
    return 0


def _number(path: Path) -> int | None:
    """The file's number; None where there is none, as for "max"."""
    text = (_text(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
