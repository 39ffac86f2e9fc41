"""Chains of blocks, for tests and their children. Imports only the cache, so that children start quickly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import support.encrypted_caches  # noqa: F401 - in children, too
from erllama.cache import Block, Cache, SaveReason, namespace_key, token_bytes

NAMESPACE = namespace_key({"model": "a"})
SIZE = 16


def blocks_of(tokens: NDArray[np.int32], namespace: bytes = NAMESPACE) -> list[Block]:
    """Return the chain of blocks of a context: full blocks and a tail."""
    return Block.chain(token_bytes(tokens), namespace, SIZE, SaveReason.COLD)


OTHER = namespace_key({"model": "b"})


def payload_of(block: Block, n_bytes: int = 64) -> NDArray[np.uint8]:
    return np.frombuffer(block.key * (n_bytes // 32), np.uint8)


def save(
    cache: Cache, tokens: NDArray[np.int32], namespace: bytes = NAMESPACE, n_bytes: int = 64, trimmable: bool = True
) -> None:
    for block in blocks_of(tokens, namespace):
        cache.save(block, payload_of(block, n_bytes), trimmable=trimmable)


def hit(cache: Cache, tokens: NDArray[np.int32], namespace: bytes = NAMESPACE, whole: bool = False) -> int:
    """Return how many tokens are found, after checking every payload."""
    with cache.lookup(namespace, tokens, whole=whole) as match:
        for block in match.blocks:
            loaded = cache.load(block)
            assert loaded is not None
            assert bytes(loaded.payload[:32]) == block.key, "the payload of another block"
        return match.n_tokens
