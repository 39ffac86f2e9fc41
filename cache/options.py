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

from erllama.cache.blocks.encryption import Encryption
from erllama.cache.pressure.pressure import Pressure
from erllama.cache.remote.options import DEFAULT_QUOTA, RemoteOptions, remote_options
from erllama.cache.sizes import parse_bytes
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.read_only import create_file_tier, is_read_only
from erllama.cache.tiers.tier import Tier
from erllama.checks import boolean, integer, reject_unknown
from erllama.errors import CacheError, OptionError

OPTIONS = (
    "ram",
    "ram_file",
    "ram_file_quota",
    "disk",
    "disk_quota",
    "remote",
    "remote_key_file",
    "remote_quota",
    "remote_lifetime",
    "key_file",
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


def check_options(options: Mapping[str, object]) -> list[Root]:
    """Check options of `Cache` without opening a directory; return its directories.

    Raises:
        OptionError: an option is unknown, has the wrong type, is out of range, or contradicts another option.
        CacheKeyError: the key file cannot be used.
        MissingPackage: there is a key file, and the package `cryptography` is not installed.
    """
    reject_unknown({name: options[name] for name in options if name not in OPTIONS}, OPTIONS, "Cache")
    for name in ("ram", "write_queue", *(name for name in OPTIONS if name.endswith("_quota"))):
        if options.get(name) is not None:
            parse_bytes(name, options[name])
    if "block_size" in options:
        checked_block_size(options["block_size"])
    boolean("watch", options.get("watch", True))
    key_file = checked_key_file(options.get("key_file"))
    roots = [
        root
        for name in ("ram_file", "disk")
        for root in directories(name, options.get(name), options.get(f"{name}_quota", 1))
    ]
    read_only = boolean("read_only", options.get("read_only", False))
    remote = remote_options(
        options.get("remote"),
        options.get("remote_key_file"),
        options.get("remote_quota", DEFAULT_QUOTA),
        options.get("remote_lifetime"),
        read_only,
        key_file,
    )
    if read_only:
        roots = as_read_only(roots, remote is not None)
    check_separate([*roots, *remote_root(remote)])
    custom_tiers(options.get("tiers", ()))
    Pressure.of(options.get("pressure"))
    return roots


def checked_block_size(value: object) -> int:
    """Return a block size in tokens. Raise OptionError if it is not valid."""
    size = integer("block_size", value, 16, 4096)
    if size & (size - 1):
        raise OptionError(f"block_size={size}; it must be a power of two from 16 to 4096")
    return size


def checked_key_file(value: object) -> Path | None:
    """Return the path of a key file after reading it; None for None.

    Raises:
        OptionError: it is not a path.
        CacheKeyError: the file cannot be used.
        MissingPackage: the package `cryptography` is not installed.
    """
    if value is None:
        return None
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise OptionError(
            f"key_file={value!r}; pass the path of a file that `erllama cache new-key` wrote, or None"
        )
    path = Path(value).expanduser().absolute()
    Encryption.of_file(path)
    return path


def check_usable(root: Root) -> None:
    """Raise CacheError if a directory can neither be written nor, holding a cache, be read."""
    if root.read_only or is_read_only(root.path):
        return
    existing = next(path for path in (root.path, *root.path.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise CacheError(f"{root.tier}: {existing} is not a directory; pass another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CacheError(f"{root.tier}: {existing} is not writable; make it so, or pass another directory")


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


def as_read_only(roots: Sequence[Root], has_remote: bool = False) -> list[Root]:
    """Return the roots, to be read only.

    Raises:
        OptionError: `roots` is empty, and there is no remote tier.
    """
    if not roots and not has_remote:
        raise OptionError("read_only=True without a directory; pass disk or ram_file, too")
    return [root._replace(read_only=True) for root in roots]


def check_separate(roots: Sequence[Root]) -> None:
    """Raise OptionError if two directories are equal, or one lies in another."""
    for i, root in enumerate(roots):
        for other in roots[:i]:
            a, b = Path(os.path.realpath(root.path)), Path(os.path.realpath(other.path))
            if a == b or a in b.parents or b in a.parents:
                raise OptionError(
                    f"{root.tier}: {root.path} and {other.path} are equal, or one lies in the other; "
                    "pass separate directories"
                )


def remote_root(remote: RemoteOptions | None) -> list[Root]:
    """Return the directory of a remote tier, for `check_separate`; none if it is in a bucket."""
    if remote is None or "://" in remote.address:
        return []
    return [Root("remote", Path(remote.address), remote.quota)]


def file_tiers(roots: Sequence[Root], watch: bool, key_file: Path | None = None) -> list[FileTier]:
    """Return the file tiers of all options together.

    Raises:
        OptionError: two directories are equal, or one lies in another.
    """
    check_separate(roots)
    return [
        create_file_tier(
            root.path, root.budget, name=root.tier, watch=watch, read_only=root.read_only, key_file=key_file
        )
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
