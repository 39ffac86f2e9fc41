"""Shows a context's parked cells to the cache as its fastest tier, so that operators see and evict them.

The cache only counts them: what a request takes from cells, the engine finds by itself.
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
        cache: the cache to show them to.
        name: of the tier.
        place: whose context it is, for people.
        cell_bytes: bytes of one token's KV.
        n_cells: cells of the context.
    """

    write_mode = "external"

    def __init__(self, cache: Cache, name: str, place: str, cell_bytes: int, n_cells: int) -> None:
        super().__init__(name, cell_bytes * n_cells)
        self._cache = cache
        self._place = place
        self._cell_bytes = cell_bytes
        self._holders: Counter[bytes] = Counter()  # parked sequences that hold a block
        self._given_up: deque[bytes] = deque()
        attached = threading.Event()

        def attach() -> None:
            try:
                cache.attach(self)
            finally:
                attached.set()

        try:
            uninterrupted(attach)()
        except BaseException:
            # Ctrl-C ends the waiting and not the attaching: it is undone behind it.
            run_behind(lambda: self.detach() if attached.wait(_ATTACH_SECONDS) else None)
            raise

    # --- for the engine

    def hold(self, keys: Sequence[bytes]) -> None:
        """A sequence that holds these blocks was parked."""
        new = [key for key in keys if not self._holders[key]]
        self._holders.update(keys)
        with self._guarded():
            for key in new:
                block = self._cache.stored(key)
                if block is not None:
                    self._cache.hold(self, block, block.n_tokens * self._cell_bytes)

    def let_go(self, keys: Sequence[bytes]) -> None:
        """It is parked no longer."""
        self._holders.subtract(keys)
        gone = [key for key in keys if self._holders[key] <= 0]
        for key in gone:
            del self._holders[key]
        with self._guarded():
            self._cache.let_go(self, gone)

    @property
    def gave_up(self) -> bool:
        """Whether the cache has evicted any since `take_given_up`."""
        return bool(self._given_up)

    def take_given_up(self) -> set[bytes]:
        """Blocks that the cache has evicted since the last call."""
        return {self._given_up.popleft() for _ in range(len(self._given_up))}

    def detach(self) -> None:
        with self._guarded():
            self._cache.detach(self)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """What goes wrong in the cache costs its picture of the cells, and nothing else."""
        try:
            yield
        except BaseException:
            if not self._cache.closed:
                log.exception("showing the cache what is in cells failed")
                with suppress(BaseException):
                    self._cache.count_fault()

    # --- for the cache

    @property
    def place(self) -> str:
        return self._place

    @property
    def persistent(self) -> bool:
        return False

    def rows(self) -> Iterable[TierRow]:
        return ()

    def write(self, block: Block, payload: memoryview) -> None:
        raise OSError("cells are filled by their model")

    def read(self, block: Block) -> tuple[Block, memoryview]:
        raise FileNotFoundError("what is in cells is not read from them")

    def remove(self, keys: Sequence[bytes]) -> None:
        self._given_up.extend(keys)
