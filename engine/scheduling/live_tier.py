"""The parked cells of a context as a tier of the cache, so that operators see and evict them.

The cache only counts these blocks. Requests reuse parked cells through `Slots`, without the cache. An error of the
cache costs the accuracy of its counts; it never reaches a request.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from erllama._runtime.log import logger
from erllama.cache import Block, Cache
from erllama.cache.tiers.tier import Tier, TierRow
from erllama.cache.uninterrupted import run_behind, uninterrupted

log = logger("erllama.engine")

_ATTACH_SECONDS = 60.0


class LiveTier(Tier):
    """The parked cells of one context.

    Args:
        cache: the cache that shows them.
        name: of the tier.
        location: description of the context, for messages.
        cell_bytes: bytes of one token's KV.
        n_cells: cells of the context.
    """

    write_mode = "external"

    def __init__(self, cache: Cache, name: str, location: str, cell_bytes: int, n_cells: int) -> None:
        super().__init__(name, cell_bytes * n_cells)
        self._cache = cache
        self._location = location
        self._cell_bytes = cell_bytes
        self._n_parked: Counter[bytes] = Counter()  # parked sequences that contain a block
        self.evicted: deque[bytes] = deque()
        attached = threading.Event()

        def attach() -> None:
            try:
                cache.attach(self)
            finally:
                attached.set()

        try:
            uninterrupted(attach)()
        except BaseException:
            # Ctrl-C ends the wait and not the attach call: undo it when it is complete.
            run_behind(lambda: self.detach() if attached.wait(_ATTACH_SECONDS) else None)
            raise

    # --- called by the engine

    def add_parked(self, keys: Sequence[bytes]) -> None:
        """Add the blocks of a sequence that was parked."""
        new = [key for key in keys if not self._n_parked[key]]
        self._n_parked.update(keys)
        with self._guard():
            for key in new:
                block = self._cache.stored(key)
                if block is not None:
                    self._cache.report_stored(self, block, block.n_tokens * self._cell_bytes)

    def remove_parked(self, keys: Sequence[bytes]) -> None:
        """Remove the blocks of a sequence that is no longer parked."""
        self._n_parked.subtract(keys)
        gone = [key for key in keys if self._n_parked[key] <= 0]
        for key in gone:
            del self._n_parked[key]
        with self._guard():
            self._cache.report_removed(self, gone)

    def take_evicted(self) -> set[bytes]:
        """Return the keys of the blocks that the cache has evicted since the last call."""
        return {self.evicted.popleft() for _ in range(len(self.evicted))}

    def detach(self) -> None:
        """Detach the tier from the cache."""
        with self._guard():
            self._cache.detach(self)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Log and count any exception of the cache."""
        try:
            yield
        except BaseException:
            if not self._cache.closed:
                log.exception("updating the cache's view of the parked cells failed")
                with suppress(BaseException):
                    self._cache.count_fault()

    # --- called by the cache

    @property
    def location(self) -> str:
        return self._location

    @property
    def persistent(self) -> bool:
        return False

    def rows(self) -> Iterable[TierRow]:
        return ()

    def write(self, block: Block, payload: memoryview) -> None:
        raise OSError("the model fills its cells itself; the cache cannot write them")

    def read(self, block: Block) -> tuple[Block, memoryview]:
        raise FileNotFoundError("the cache cannot read blocks from a model's cells")

    def remove(self, keys: Sequence[bytes]) -> None:
        self.evicted.extend(keys)
