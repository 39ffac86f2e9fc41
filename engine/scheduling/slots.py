"""The context's slots and cells: which running or parked sequence uses them.

A slot is one of the backend's sequence numbers. A sequence that ends is *parked*: it keeps its slot and cells until
they are needed. A request that begins with the same tokens shares its cells, or takes them over. Everything worth
keeping was saved before, so a parked sequence may be evicted at any time. Used by the model thread alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import common_prefix
from erllama.engine.backend import Backend
from erllama.engine.kv.prefill_slices import Provenance
from erllama.engine.scheduling.cells import Cells
from erllama.engine.scheduling.live_tier import LiveTier
from erllama.engine.scheduling.sequence import Sequence


@dataclass(slots=True, eq=False)
class Parked:
    """A finished sequence that is still in the context.

    Attributes:
        slot: its slot.
        namespace: the root key of the requests that may share it.
        tenant: the tenant of its session, if it has one.
        tokens: its tokens, int32, shape (n,).
        first_token: the first of them.
        provenance: how they were computed; None if another sequence was in the context.
        session_id: the session that it is kept for; None without a session.
        keys: the cache's keys of its blocks.
    """

    slot: int
    namespace: bytes
    tenant: bytes
    tokens: NDArray[np.int32]
    first_token: int
    provenance: Provenance | None
    session_id: str | None
    keys: tuple[bytes, ...]


class PrefixSource(NamedTuple):
    """A sequence in the context that has the first `n` tokens of another; None if no sequence has any."""

    sequence: Sequence | Parked | None
    n: int


NO_SOURCE = PrefixSource(None, 0)


class Allocation(NamedTuple):
    """A slot for a sequence.

    Attributes:
        slot: the slot.
        provenance: how the tokens that are in it already were computed; None if that is unknown.
    """

    slot: int
    provenance: Provenance | None


class Slots:
    """The slots and cells of one context.

    Args:
        backend: owns the context.
        parked_cells: cells that parked sequences may keep while others compute. They slow every decode a little,
            since attention passes over them.
        tier: shows parked cells to the cache; None if they cannot be shown.

    Attributes:
        cells: counts the cells.
        parked: the parked sequences, the least recently used first.
        pristine: whether everything computed since the context was last empty belongs to one sequence, so that its
            cells lie as those of any run from an empty context.
    """

    def __init__(self, backend: Backend, parked_cells: int, tier: LiveTier | None) -> None:
        limits = backend.limits
        self._backend = backend
        self._can_trim = limits.can_trim
        self._parked_cells = parked_cells
        self._tier = tier
        # Recurrent state takes no cells: there, each sequence has room of its own.
        self._capacity = limits.n_ctx * (limits.n_sequences if limits.whole_state else 1)
        self.cells = Cells(self._capacity)
        self._free_slots = list(range(limits.n_sequences))[::-1]
        self._n_slots = limits.n_sequences
        self.parked: list[Parked] = []
        self.pristine = True

    # --- finding a prefix

    def find_longest_prefix(self, sequence: Sequence, running: Iterable[Sequence]) -> PrefixSource:
        """Return the sequence in the context that has the longest prefix of the reusable tokens of another.

        Among equally long prefixes, prefers that of its own session. Memory that cannot be cut is reused only from
        parked sequences, and only as a whole.
        """
        wanted = sequence.reusable
        best, longest = NO_SOURCE
        for parked in self.parked:
            if parked.first_token == sequence.first_token and parked.namespace == sequence.namespace:
                n = common_prefix(parked.tokens, wanted)
                if not self._can_trim and n < len(parked.tokens):
                    continue
                own = parked.session_id is not None and parked.session_id == sequence.options.session_id
                if (n > longest or (own and n == longest > 0)) and (
                    own or self._can_trim or parked.session_id is None
                ):
                    best, longest = parked, n
        if self._can_trim:
            for other in running:
                if other.first_token != sequence.first_token or other.slot is None:
                    continue
                if other.namespace == sequence.namespace:
                    n = common_prefix(other.computed_tokens, wanted)
                    if n > longest:
                        best, longest = other, n
        return PrefixSource(best, longest)

    # --- slots

    def allocate(self, sequence: Sequence, source: PrefixSource) -> Allocation:
        """Allocate a slot for a sequence, with the tokens of `source` in it."""
        other, n = source
        if isinstance(other, Parked):
            own = other.session_id is not None and other.session_id == sequence.options.session_id
            mostly = other.session_id is None and 2 * n >= len(other.tokens)
            if own or mostly or not self._can_trim or not self._has_slot_besides(other):
                self._unpark(other)
                if n < len(other.tokens):
                    self._backend.cut(other.slot, n)
                    self.cells.cut(other.slot, n)
                return Allocation(other.slot, other.provenance)
        slot = self._take_slot(other)
        if other is not None:
            assert other.slot is not None
            if isinstance(other, Parked):  # now the most recently used
                self.parked.remove(other)
                self.parked.append(other)
            self._backend.share(other.slot, slot, n)
            self.cells.share(other.slot, slot, n)
        return Allocation(slot, None)

    def _has_slot_besides(self, source: Parked) -> bool:
        return bool(self._free_slots) or any(parked is not source for parked in self.parked)

    def _take_slot(self, source: Sequence | Parked | None) -> int:
        if not self._free_slots:
            self._evict(next(parked for parked in self._eviction_order() if parked is not source))
        if len(self._free_slots) == self._n_slots:
            # The context has no sequence: it is cleared, so that cells are taken in the same order every time.
            self.clear()
        else:
            self.pristine = False
        return self._free_slots.pop()

    def release(self, slot: int) -> None:
        """Free a slot and its cells."""
        self._backend.drop(slot)
        self.cells.drop(slot)
        self._free_slots.append(slot)

    def clear(self) -> None:
        """Empty the context. No sequence may be running in it."""
        for parked in list(self.parked):
            self._unpark(parked)
        self.cells = Cells(self._capacity)
        self._free_slots = list(range(self._n_slots))[::-1]
        self.pristine = True
        self._backend.clear()

    # --- cells

    def make_room(self, n: int) -> bool:
        """Evict parked sequences until `n` cells are free. Returns False if evicting all is not enough."""
        while self.cells.free < n and self.parked:
            self._evict(next(iter(self._eviction_order())))
        return self.cells.free >= n

    @property
    def room(self) -> int:
        """Cells that are free, or would be without parked sequences."""
        return self.cells.free + self.cells.exclusive(parked.slot for parked in self.parked)

    # --- parking

    def park(self, sequence: Sequence) -> None:
        """Keep the cells of a sequence that ended."""
        slot, session_id = sequence.slot, sequence.options.session_id
        assert slot is not None
        for older in self.parked:
            if session_id is not None and (older.tenant, older.session_id) == (sequence.tenant, session_id):
                self._evict(older)
                break
        if not sequence.n_computed:
            self.release(slot)
            return
        kv = sequence.kv
        provenance = kv.provenance if self.pristine else None
        keys = (*kv.keys, kv.finish_key) if kv.finish_key is not None else tuple(kv.keys)
        keys = tuple(dict.fromkeys(keys))  # a context of whole blocks is named by its last
        tokens = sequence.computed_tokens.copy()
        self.parked.append(
            Parked(
                slot,
                sequence.namespace,
                sequence.tenant,
                tokens,
                sequence.first_token,
                provenance,
                session_id,
                keys,
            )
        )
        if self._tier is not None:
            self._tier.add_parked(keys)

    def trim_parked(self, keep: Sequence | Parked | None = None) -> None:
        """Evict parked sequences until they use at most `parked_cells`.

        Sequences of sessions, and `keep`, stay and do not count.
        """
        while True:
            evictable = [parked for parked in self.parked if parked.session_id is None and parked is not keep]
            if not evictable or self.cells.exclusive(parked.slot for parked in evictable) <= self._parked_cells:
                return
            self._evict(evictable[0])

    def evict_parked(self) -> None:
        """Evict all parked sequences."""
        while self.parked:
            self._evict(self.parked[0])

    def evict_requested(self) -> None:
        """Evict the parked sequences whose blocks the cache has evicted."""
        if self._tier is not None and self._tier.evicted:
            evicted = self._tier.take_evicted()
            for parked in [parked for parked in self.parked if evicted.intersection(parked.keys)]:
                self._evict(parked)

    def end_session(self, tenant: bytes, session_id: str) -> bool:
        """Stop keeping the sequence of a session. Returns False if there is none."""
        for parked in self.parked:
            if (parked.tenant, parked.session_id) == (tenant, session_id):
                parked.session_id = None
                return True
        return False

    def _eviction_order(self) -> list[Parked]:
        """Return the parked sequences in eviction order: those of no session first, least recently used first."""
        return sorted(self.parked, key=lambda parked: parked.session_id is not None)

    def _evict(self, parked: Parked) -> None:
        self._unpark(parked)
        self.release(parked.slot)

    def _unpark(self, parked: Parked) -> None:
        self.parked.remove(parked)
        if self._tier is not None:
            self._tier.remove_parked(parked.keys)
