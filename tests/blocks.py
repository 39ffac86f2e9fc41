"""Chains of blocks, for tests and their children. Imports nothing but the cache, so that children start quickly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from erllama.cache import Block, SaveReason, namespace_key, token_bytes

NAMESPACE = namespace_key({"model": "a"})
SIZE = 16


def blocks_of(tokens: NDArray[np.int32], namespace: bytes = NAMESPACE) -> list[Block]:
    """The chain that a context is saved as: full blocks and a tail."""
    return Block.chain(token_bytes(tokens), namespace, SIZE, SaveReason.COLD)
