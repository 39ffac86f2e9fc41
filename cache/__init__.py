"""A token-exact, tiered store of KV blocks. Needs no model and no libllama.

`Cache` is what users make. The engine looks up, loads and saves blocks with
it; `kvc` reads and writes the files; `namespace_key`, `child_key` and `Block`
say what a block is.
"""

from erllama.cache.blocks import Block, SaveReason
from erllama.cache.keys import TOKEN_BYTES, child_key, namespace_key, token_bytes
from erllama.cache.match import Loaded, Match, Row
from erllama.cache.residents import TIERS
from erllama.cache.store import Cache

__all__ = [
    "TIERS",
    "TOKEN_BYTES",
    "Block",
    "Cache",
    "Loaded",
    "Match",
    "Row",
    "SaveReason",
    "child_key",
    "namespace_key",
    "token_bytes",
]
