"""What another process needs to open the same cache, as plain values for a message between the two.

`Cache.share_with_process` returns a spec, and `Cache.of_spec` opens it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from erllama.cache.options import Root
from erllama.cache.remote.options import RemoteOptions
from erllama.cache.tiers.file_tier import FileTier
from erllama.checks import encodable


class RootSpec(NamedTuple):
    """One directory of a cache: name of its tier, path, budget in bytes, and whether it is only read."""

    tier: str
    path: str
    budget: int
    read_only: bool


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What another process needs to open a cache.

    Attributes:
        ram: budget of the RAM tier in bytes; 0 for none.
        roots: the directories, from fast to slow.
        block_size: tokens per block.
        write_queue: maximum bytes that may wait for the slower tiers.
        watch: notice files that others put into the directories or remove from them.
        pin_quota: maximum bytes that the pins of a tier may protect; None for half of its budget.
        remote: the remote tier; None for none.
        key_file: file of the keys that encrypt the directories; None for no encryption. The other process reads it.
    """

    ram: int
    roots: tuple[RootSpec, ...]
    block_size: int
    write_queue: int
    watch: bool
    pin_quota: int | None = None
    remote: RemoteOptions | None = None
    key_file: str | None = None

    def as_plain(self) -> dict[str, Any]:
        """Return the fields as numbers, texts, lists, tuples and booleans, by name."""
        plain = asdict(self) | {"roots": [tuple(root) for root in self.roots]}
        return plain | {"remote": None if self.remote is None else self.remote.as_plain()}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> CacheSpec:
        """Return the spec that `as_plain` was called on."""
        roots = tuple(RootSpec(*root) for root in plain["roots"])
        remote = None if plain["remote"] is None else RemoteOptions(*plain["remote"])
        return cls(**{**plain, "roots": roots, "remote": remote})

    def as_roots(self) -> list[Root]:
        """Return the directories as options of a cache."""
        return [Root(root.tier, Path(root.path), root.budget, root.read_only) for root in self.roots]


def root_specs(tiers: Iterable[FileTier]) -> tuple[RootSpec, ...]:
    """Return the specs of file tiers.

    Raises:
        OptionError: a path cannot be sent to another process, because UTF-8 cannot encode it.
    """
    return tuple(
        RootSpec(tier.name, encodable(tier.name, str(tier.root)), tier.budget, tier.read_only) for tier in tiers
    )
