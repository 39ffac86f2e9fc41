"""A token-exact, tiered store of KV blocks, usable without a model or libllama.

Users create a `Cache`, and the engine looks up, loads and saves blocks with it. `namespace_key`, `child_key` and
`Block` define blocks, `kvc` reads and writes their files, and user-defined tiers derive from `Tier`. Imports run
from `store` to `pipeline`, `sharing`, `catalog`, `remote`, `tiers`, `texts` and `blocks`. `store` also imports
`pressure`, and `admin` imports `tiers`, `catalog` and `blocks`. The package does not import the engine.
"""

from erllama.cache.blocks.block import Block, SaveReason
from erllama.cache.blocks.keys import KEY_BYTES, TOKEN_BYTES, child_key, namespace_key, token_bytes
from erllama.cache.blocks.match import Loaded, Match, Row, TierStatus
from erllama.cache.blocks.pins import Pin
from erllama.cache.catalog.block_log import BlockChange, BlockChanges, BlockLog
from erllama.cache.pressure.memory import MemoryUsage
from erllama.cache.pressure.pressure import Pressure
from erllama.cache.save_policy import Policy
from erllama.cache.sharing.members import CacheMember, MemberReport
from erllama.cache.sharing.spec import CacheSpec
from erllama.cache.store import Cache
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.ram_tier import RamTier
from erllama.cache.tiers.tier import Changes, Problem, Tier, TierRow

__all__ = [
    "KEY_BYTES",
    "TOKEN_BYTES",
    "Block",
    "BlockChange",
    "BlockChanges",
    "BlockLog",
    "Cache",
    "CacheMember",
    "CacheSpec",
    "Changes",
    "FileTier",
    "Loaded",
    "Match",
    "MemberReport",
    "MemoryUsage",
    "Pin",
    "Policy",
    "Pressure",
    "Problem",
    "RamTier",
    "Row",
    "SaveReason",
    "Tier",
    "TierRow",
    "TierStatus",
    "child_key",
    "namespace_key",
    "token_bytes",
]
