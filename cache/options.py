"""Options of a cache for directories and tiers: checks them, and creates the tiers.

`Cache` calls these functions when it is created, and the command `erllama` for the default directories.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import platformdirs

from erllama.cache.sizes import parse_bytes
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.read_only import create_file_tier
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
    "pin_quota",
    "write_queue",
    "pressure",
    "watch",
)

Directories = str | Path | bool | Sequence[str | Path] | Mapping[str | Path, str | int] | None


class Root(NamedTuple):
    """One directory of a file tier, and its budget."""

    tier: str
    path: Path
    budget: int
    read_only: bool = False


def directories(name: str, value: object, quota: object) -> list[Root]:
    """Return the directories of an option: None, one, several, or a mapping from directories to quotas.

    Raises:
        OptionError: a value is not a directory, or a directory has a quota of 0.
    """
    budget = parse_bytes(f"{name}_quota", quota)
    if value is None or value is False:
        return []
    if isinstance(value, Mapping):
        wanted = [(path, parse_bytes(f"{name}[{str(path)!r}]", size)) for path, size in value.items()]
    elif isinstance(value, list | tuple):
        wanted = [(path, budget) for path in value]
    else:
        wanted = [(value, budget)]
    roots = [Root(name, _directory(name, path), size) for path, size in wanted]
    for root in roots:
        if root.budget == 0:
            raise OptionError(f"{name}_quota=0 leaves no room in {root.path}; pass a size, or omit {name!r}")
    return roots


def as_read_only(roots: Sequence[Root]) -> list[Root]:
    """Return the roots, to be read only.

    Raises:
        OptionError: `roots` is empty.
    """
    if not roots:
        raise OptionError("read_only=True without a directory; pass disk or ram_file, too")
    return [root._replace(read_only=True) for root in roots]


def check_separate(roots: Sequence[Root]) -> None:
    """Raise OptionError if two directories are equal, or one lies in another."""
    for i, root in enumerate(roots):
        for other in roots[:i]:
            a, b = Path(os.path.realpath(root.path)), Path(os.path.realpath(other.path))
            if a == b or a in b.parents or b in a.parents:
                raise OptionError(
                    f"{root.path} and {other.path} are equal, or one lies in the other; pass separate directories"
                )


def file_tiers(roots: Sequence[Root], watch: bool) -> list[FileTier]:
    """Return the file tiers of all options together.

    Raises:
        OptionError: two directories are equal, or one lies in another.
    """
    check_separate(roots)
    return [
        create_file_tier(root.path, root.budget, name=root.tier, watch=watch, read_only=root.read_only)
        for root in roots
    ]


def custom_tiers(value: object) -> list[Tier]:
    """Return the user's own tiers after checking them.

    Raises:
        OptionError: one is not a tier, is listed twice, or has a reserved name or another write mode than "behind".
    """
    if not isinstance(value, list | tuple):
        raise OptionError(f"tiers={value!r}; pass a list of objects derived from erllama.cache.Tier")
    for tier in value:
        if not isinstance(tier, Tier):
            raise OptionError(f"{tier!r} in tiers; pass objects of a class derived from erllama.cache.Tier")
        if tier.write_mode != "behind" or tier.name in ("ram", "live"):
            raise OptionError(
                f"tiers has {tier.name!r} with write_mode={tier.write_mode!r}; pass tiers with write_mode='behind' "
                "and a name other than 'ram' and 'live'"
            )
    if len({id(tier) for tier in value}) != len(value):
        raise OptionError("tiers contains one tier twice")
    return list(value)


def _directory(name: str, value: object) -> Path:
    if value is True:
        return default_directory(name)
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise OptionError(f"{name}={value!r}; pass a directory, several, True for the default one, or None")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise OptionError(f"{name}={value!r}: {error}") from None


def default_directory(name: str) -> Path:
    """Return the directory that True stands for.

    Raises:
        OptionError: this system has no such directory.
    """
    if name == "disk":
        return Path(platformdirs.user_cache_dir("erllama"))
    if not sys.platform.startswith("linux"):
        raise OptionError(
            "ram_file=True needs /dev/shm, which this system lacks; pass a directory on a file system in memory"
        )
    return Path(f"/dev/shm/erllama-{os.geteuid()}")
