"""What the context holds: the cells of running sequences, and of finished ones that stay for those who go on.

A finished sequence is *parked*: it keeps its cells until they are needed. A
request that begins as it did shares its cells, or takes it over. What was worth
keeping of it was saved before, so it may go at any time. Used by the model
thread alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.engine.backend import Backend
from erllama.engine.kv.slices import Provenance
from erllama.engine.scheduling.cells import Cells
from erllama.engine.scheduling.live_tier import LiveTier
from erllama.engine.scheduling.sequence import Sequence

log = logger("erllama.engine")


@dataclass(slots=True, eq=False)
class Parked:
    """A finished sequence that is still in the context.

    Attributes:
        number: the backend's for it.
        namespace: the root key of who may share it.
        tenant: whose session it is, if it is one's.
        tokens: what it holds, int32, shape (n,).
        as_computed: how, where nothing else was in the context; else None.
        session_id: the session that it is kept for; None for anybody.
        keys: the cache's names of the blocks among them.
    """

    number: int
    namespace: bytes
    tenant: bytes
    tokens: NDArray[np.int32]
    as_computed: Provenance | None
    session_id: str | None
    keys: tuple[bytes, ...]


class Slots:
    """The context's cells and sequence numbers, and who has them.

    Args:
        backend: whose context it is.
        parked_cells: cells that parked sequences may keep while others compute: they cost
            every decode a little, since attention passes over them.
        tier: shows the cache what is parked; None where it cannot be shown.

    Attributes:
        pristine: whether what was computed since the context was last empty is all one
            sequence's, so that its cells lie as those of any run from an empty context.
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
        self._numbers = list(range(limits.n_sequences))[::-1]
        self._n_sequences = limits.n_sequences
        self.parked: list[Parked] = []  # the least recently used first
        self.pristine = True

    # --- finding

    def longest(self, sequence: Sequence, running: Several[Sequence]) -> tuple[Sequence | Parked | None, int]:
        """Who holds the longest prefix of what a sequence need not compute, and how long it is.

        Of several, its own session's. Where memory cannot be cut, only what is parked, and only whole.
        """
        wanted = sequence.reusable
        best: Sequence | Parked | None = None
        most = 0
        for parked in self.parked:
            if parked.namespace == sequence.namespace:
                n = common_prefix(parked.tokens, wanted)
                if not self._can_trim and n < len(parked.tokens):
                    continue
                own = parked.session_id is not None and parked.session_id == sequence.options.session_id
                if (n > most or (own and n == most > 0)) and (own or self._can_trim or parked.session_id is None):
                    best, most = parked, n
        if self._can_trim:
            for other in running:
                if other.number is not None and other.namespace == sequence.namespace:
                    n = common_prefix(other.held, wanted)
                    if n > most:
                        best, most = other, n
        return best, most

    # --- sequence numbers and cells

    def take_in(
        self, sequence: Sequence, source: Sequence | Parked | None, n: int
    ) -> tuple[int, Provenance | None]:
        """A number for a sequence, which holds its first `n` tokens already: those of `source`.

        Returns:
            the number, and how those tokens were computed, where that is known.
        """
        if isinstance(source, Parked):
            own = source.session_id is not None and source.session_id == sequence.options.session_id
            mostly = source.session_id is None and 2 * n >= len(source.tokens)
            if own or mostly or not self._can_trim or not self._spare_number(source):
                self._unpark(source)
                self._cut(source.number, n, len(source.tokens))
                return source.number, source.as_computed
        number = self._new_number(source)
        if source is not None:
            assert source.number is not None
            if isinstance(source, Parked):  # it was used just now
                self.parked.remove(source)
                self.parked.append(source)
            self._backend.share(source.number, number, n)
            self.cells.share(source.number, number, n)
        return number, None

    def _cut(self, number: int, n: int, held: int) -> None:
        if n < held:
            self._backend.cut(number, n)
            self.cells.cut(number, n)

    def _spare_number(self, source: Parked) -> bool:
        return bool(self._numbers) or any(parked is not source for parked in self.parked)

    def _new_number(self, source: Sequence | Parked | None) -> int:
        if not self._numbers:
            self._drop_parked(next(parked for parked in self._dispensable() if parked is not source))
        if len(self._numbers) == self._n_sequences:
            # Nobody is in the context: it is cleared, so that cells are taken in the same order every time.
            self.clear()
        else:
            self.pristine = False
        return self._numbers.pop()

    def release(self, number: int) -> None:
        """A sequence leaves the context."""
        self._backend.drop(number)
        self.cells.drop(number)
        self._numbers.append(number)

    def make_room(self, n: int) -> bool:
        """See to `n` free cells; parked sequences go where they must. False if that is not enough."""
        while self.cells.free < n and self.parked:
            self._drop_parked(next(iter(self._dispensable())))
        return self.cells.free >= n

    @property
    def room(self) -> int:
        """Cells that can be had: free ones, and those of parked sequences alone."""
        return self.cells.free + self.cells.only_of(parked.number for parked in self.parked)

    # --- parking

    def park(self, sequence: Sequence) -> None:
        """Keep what a sequence that ended holds."""
        number, session_id = sequence.number, sequence.options.session_id
        assert number is not None
        for older in self.parked:
            if session_id is not None and (older.tenant, older.session_id) == (sequence.tenant, session_id):
                self._drop_parked(older)
                break
        if not sequence.n_held:
            self.release(number)
            return
        as_computed = sequence.warmth.as_computed if self.pristine else None
        warmth = sequence.warmth
        keys = (*warmth.keys, warmth.finish_key) if warmth.finish_key is not None else tuple(warmth.keys)
        keys = tuple(dict.fromkeys(keys))  # a context of whole blocks is named by its last
        held = sequence.held.copy()
        self.parked.append(Parked(number, sequence.namespace, sequence.tenant, held, as_computed, session_id, keys))
        if self._tier is not None:
            self._tier.hold(keys)

    def thin_out(self) -> None:
        """Drop what is parked beyond the cells that it may keep while others compute."""
        while True:
            free = [parked for parked in self.parked if parked.session_id is None]
            if not free or self.cells.only_of(parked.number for parked in free) <= self._parked_cells:
                return
            self._drop_parked(free[0])

    def end_session(self, tenant: bytes, session_id: str) -> bool:
        """What is kept for a session is anybody's; False where nothing is."""
        for parked in self.parked:
            if (parked.tenant, parked.session_id) == (tenant, session_id):
                parked.session_id = None
                return True
        return False

    def drop_all_parked(self) -> None:
        while self.parked:
            self._drop_parked(self.parked[0])

    def give_up(self) -> None:
        """Drop what the cache was asked to evict of what is parked."""
        if self._tier is not None and self._tier.gave_up:
            evicted = self._tier.take_given_up()
            for parked in [parked for parked in self.parked if evicted.intersection(parked.keys)]:
                self._drop_parked(parked)

    def clear(self) -> None:
        """Empty the context; nobody may be running in it."""
        for parked in list(self.parked):
            self._unpark(parked)
        self.cells = Cells(self._capacity)
        self._numbers = list(range(self._n_sequences))[::-1]
        self.pristine = True
        self._backend.clear()

    def _dispensable(self) -> list[Parked]:
        """What is parked, in the order in which it goes: what no session keeps first, then the longest unused."""
        return sorted(self.parked, key=lambda parked: parked.session_id is not None)

    def _drop_parked(self, parked: Parked) -> None:
        self._unpark(parked)
        self.release(parked.number)

    def _unpark(self, parked: Parked) -> None:
        self.parked.remove(parked)
        if self._tier is not None:
            self._tier.let_go(parked.keys)


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens agree from the first on."""
    n = min(len(a), len(b))
    if not n or a[0] != b[0]:
        return 0
    differ = a[:n] != b[:n]
    first = int(differ.argmax())
    return first if differ[first] else n
