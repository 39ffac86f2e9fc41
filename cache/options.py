"""What a caller gives a cache for directories and tiers, checked and made into tiers."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import platformdirs

from erllama.cache.sizes import parse_bytes
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.read_only import file_tier
from erllama.cache.tiers.tier import Tier
from erllama.errors import OptionError

OPTIONS = (
    "ram",
    "ram_file",
    "ram_file_quota",
    "disk",
    "disk_quota",
    "read_only",
    "tiers",
    "block_size",
    "write_queue",
    "pressure",
    "watch",
)

Directories = str | Path | bool | Sequence[str | Path] | Mapping[str | Path, str | int] | None


class Root(NamedTuple):
    """One directory of a tier of files, and its budget."""

    tier: str
    path: Path
    budget: int


def directories(name: str, given: object, quota: object) -> list[Root]:
    """The directories of an option: none, one, several, or a mapping to their quotas.

    Raises:
        OptionError: no directory, the same one twice, or one without room.
    """
    budget = parse_bytes(f"{name}_quota", quota)
    if given is None or given is False:
        return []
    if isinstance(given, Mapping):
        wanted = [(path, parse_bytes(f"{name}[{str(path)!r}]", size)) for path, size in given.items()]
    elif isinstance(given, list | tuple):
        wanted = [(path, budget) for path in given]
    else:
        wanted = [(given, budget)]
    roots = [Root(name, _directory(name, path), size) for path, size in wanted]
    for root in roots:
        if root.budget == 0:
            raise OptionError(f"{name}_quota=0 leaves {root.path} no room; give a size, or leave {name!r} out")
    return roots


def file_tiers(roots: Sequence[Root], watch: bool, read_only: bool) -> list[FileTier]:
    """The tiers of files of all options together.

    Raises:
        OptionError: one directory is, or lies in, another; or there is none to be read only.
    """
    if read_only and not roots:
        raise OptionError("read_only=True without a directory; give disk or ram_file, too")
    for i, root in enumerate(roots):
        for other in roots[:i]:
            a, b = Path(os.path.realpath(root.path)), Path(os.path.realpath(other.path))
            if a == b or a in b.parents or b in a.parents:
                raise OptionError(
                    f"{root.path} and {other.path}: one is or lies in the other; give separate directories"
                )
    return [file_tier(root.path, root.budget, name=root.tier, watch=watch, read_only=read_only) for root in roots]


def known_tiers(given: object) -> list[Tier]:
    """The caller's own tiers."""
    if not isinstance(given, list | tuple):
        raise OptionError(f"tiers={given!r}; give a list of objects derived from erllama.cache.Tier")
    for tier in given:
        if not isinstance(tier, Tier):
            raise OptionError(f"{tier!r} in tiers; give objects of a class derived from erllama.cache.Tier")
        if tier.write_mode != "behind" or tier.name in ("ram", "live"):
            raise OptionError(
                f"tiers has {tier.name!r} with write_mode={tier.write_mode!r}; give tiers with write_mode='behind' "
                "and a name other than 'ram' and 'live'"
            )
    if len({id(tier) for tier in given}) != len(given):
        raise OptionError("tiers has one tier twice")
    return list(given)


def _directory(name: str, given: object) -> Path:
    if given is True:
        return default_directory(name)
    if not isinstance(given, str | Path) or not str(given) or "\0" in str(given):
        raise OptionError(f"{name}={given!r}; give a directory, several, True for the usual one, or None")
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError as error:
        raise OptionError(f"{name}={given!r}: {error}") from None


def default_directory(name: str) -> Path:
    """What True means for an option.

    Raises:
        OptionError: this system has no such place.
    """
    if name == "disk":
        return Path(platformdirs.user_cache_dir("erllama"))
    if not sys.platform.startswith("linux"):
        raise OptionError(
            "ram_file=True needs /dev/shm, which this system lacks; give a directory on a file system in memory"
        )
    return Path(f"/dev/shm/erllama-{os.geteuid()}")
