"""What is stored where, in memory: the blocks, the RAM tier's payloads, sizes, uses and pins.

Owned by one `Cache` and used under its lock; does no input or output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks import Block
from erllama.cache.counters import Counters
from erllama.cache.keys import TOKEN_BYTES, child_key
from erllama.cache.lru import LeafLRU
from erllama.cache.match import Row
from erllama.cache.tree import BlockTree

RAM, DISK, PENDING = "ram", "disk", "pending"
TIERS = (RAM, DISK)  # from fast to slow


class Residents:
    """The places of every block. `pending` is a place, too: a save on its way to the disk."""

    def __init__(self, block_size: int, counters: Counters) -> None:
        self.tree = BlockTree()
        self.payloads: dict[bytes, NDArray[np.uint8]] = {}  # of the RAM tier
        self._lru = {tier: LeafLRU() for tier in TIERS}
        self._pins: Counter[bytes] = Counter()
        self._block_size = block_size
        self._counters = counters

    # --- finding ---------------------------------------------------------------------------

    def walk(self, namespace: bytes, raw: bytes, whole: bool) -> tuple[list[Block], int]:
        """The blocks of the longest stored prefix of the tokens `raw`, and its length in tokens."""
        blocks: list[Block] = []
        parent, at, step = namespace, 0, self._block_size * TOKEN_BYTES
        while at < len(raw):
            full = raw[at : at + step]
            entry = self.tree.get(child_key(parent, full)) if len(full) == step else None
            shared = self._block_size
            if entry is None and whole:
                entry = self.tree.longest_whole(parent, raw[at:])
                shared = entry.block.n_tokens if entry else 0
            elif entry is None:
                entry, shared = self.tree.longest_shared(parent, raw[at:]) or (None, 0)
            if entry is None or entry.block.namespace != namespace or entry.block.start != at // TOKEN_BYTES:
                break
            blocks.append(entry.block)
            at += shared * TOKEN_BYTES
            if shared < entry.block.n_tokens:
                break
            parent = entry.block.key
        return blocks, at // TOKEN_BYTES

    def holds(self, tier: str, key: bytes) -> bool:
        return key in self._lru[tier]

    def n_bytes(self, tier: str) -> int:
        return self._lru[tier].n_bytes

    def n_blocks(self, tier: str) -> int:
        return len(self._lru[tier])

    def keys(self, tier: str) -> list[bytes]:
        return list(self._lru[tier])

    def rows(self) -> list[Row]:
        return [
            Row(key, tier, entry.block.start, entry.block.n_tokens, lru.size_of(key), self._pins[key])
            for tier, lru in self._lru.items()
            for key in lru
            if (entry := self.tree.get(key)) is not None
        ]

    # --- placing -----------------------------------------------------------------------------

    def put(self, tier: str, block: Block, n_bytes: int, now: int) -> None:
        """Note that a tier holds a block of this many bytes, in place of an older one of the same key."""
        self._lru[tier].remove(block.key)
        self._lru[tier].add(block.key, block.parent, n_bytes, now)
        entry = self.tree.add(block, tier)
        if tier == RAM or entry.places == {tier}:
            entry.block = block

    def learn(self, block: Block) -> None:
        """Take over what is known now of how a stored block was computed, unless RAM or the queue has its own."""
        entry = self.tree.get(block.key)
        if entry is not None and entry.places == {DISK}:
            entry.block = block

    def put_in_ram(self, block: Block, payload: NDArray[np.uint8], budget: int, now: int) -> bool:
        """Keep a payload in RAM if it fits the budget after evicting others; False if it does not."""
        if self.holds(RAM, block.key):
            return True
        if payload.nbytes > budget:
            return False
        self.evict(RAM, budget - payload.nbytes, keep=block.parent)
        if self.n_bytes(RAM) + payload.nbytes > budget:
            return False
        self.payloads[block.key] = payload
        self.put(RAM, block, payload.nbytes, now)
        return True

    def drop(self, tier: str, key: bytes) -> None:
        """Note that a place no longer holds a block."""
        if tier in self._lru:
            self._lru[tier].remove(key)
        if tier == RAM:
            self.payloads.pop(key, None)
        self.tree.discard(key, tier)

    def evict(self, tier: str, target: int, keep: bytes = b"") -> list[tuple[bytes, int]]:
        """Drop the least recently used blocks until a tier holds `target` bytes, or only pinned ones are left.

        Args:
            keep: a key that stays, as if it were pinned.

        Returns:
            keys and sizes of what was dropped.
        """
        lru = self._lru[tier]
        kept = {*self._pins, keep}
        victims = []
        while lru.n_bytes > max(target, 0) and (key := lru.oldest_leaf(kept)) is not None:
            victims.append((key, lru.size_of(key)))
            self.drop(tier, key)
            self._counters.add(f"evictions_{tier}")
        return victims

    def room_with(self, tier: str, block: Block, n_bytes: int) -> int:
        """Bytes a tier would hold with the block added, or put in place of its older version."""
        held = self._lru[tier].size_of(block.key) if self.holds(tier, block.key) else 0
        return self.n_bytes(tier) - held + n_bytes

    # --- using ---------------------------------------------------------------------------------

    def touch(self, key: bytes, now: int) -> None:
        for lru in self._lru.values():
            lru.touch(key, now)

    def pin(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self._pins[block.key] += 1

    def unpin(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self._pins[block.key] -= 1
            if self._pins[block.key] <= 0:
                del self._pins[block.key]

    def pinned(self, key: bytes) -> bool:
        return key in self._pins
