"""The RAM tier: payloads in buffers of this process.

`Cache` makes one unless its budget is 0. The cache writes to it during the save, under the cache's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from erllama.cache.blocks.block import Block
from erllama.cache.tiers.tier import Tier, TierRow


class RamTier(Tier):
    """Payloads in the memory of this process. Its content ends with the process."""

    write_mode = "through"

    def __init__(self, budget: int) -> None:
        super().__init__("ram", budget)
        self._payloads: dict[bytes, tuple[Block, memoryview]] = {}

    @property
    def persistent(self) -> bool:
        return False

    def rows(self) -> Iterable[TierRow]:
        return [TierRow(block, payload.nbytes, 0) for block, payload in self._payloads.values()]

    def write(self, block: Block, payload: memoryview) -> None:
        self._payloads[block.key] = (block, payload)

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found = self._payloads.get(block.key)
        if found is None:
            raise FileNotFoundError("the block was evicted before it could be read")
        return found

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._payloads.pop(key, None)

    def close(self) -> None:
        self._payloads.clear()
