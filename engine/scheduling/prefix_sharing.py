"""The sources of an admitted sequence's prefix: another sequence's cells, the cache, or a wait.

The scheduler asks `PrefixSharing` which sequence is computing a prefix now, whether a wait is over, and whether a
request may be admitted. `PrefixSharing` changes no state.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from erllama.cache.blocks.keys import common_prefix
from erllama.engine.scheduling.model_context import ModelContext
from erllama.engine.scheduling.sequence import HEADROOM, Sequence
from erllama.engine.scheduling.slots import NO_SOURCE, Parked, PrefixSource, Slots

# Shorter prefixes are computed again rather than waited for: that takes less than a tick of the sequence's own.
_MIN_AWAITED = 16


class Leader(NamedTuple):
    """A running sequence that is about to compute the first `n` tokens of another; None if there is none."""

    sequence: Sequence | None
    n: int


_NO_LEADER = Leader(None, 0)


class PrefixSharing:
    """Decides which prefixes sequences share.

    Args:
        context: what all sequences of the model share.
        slots: the context's slots.
        running: the admitted sequences, in the order of admission; the scheduler's own list.
    """

    def __init__(self, context: ModelContext, slots: Slots, running: list[Sequence]) -> None:
        self._prefix_cache = context.prefix_cache
        self._limits = context.backend.limits
        self._slots = slots
        self._running = running

    def find_source(self, sequence: Sequence) -> PrefixSource:
        """Return the sequence in the context whose cells have the longest prefix of this one."""
        if sequence.options.reproducible or not self._prefix_cache.weights.intact():
            return NO_SOURCE
        return self._slots.find_longest_prefix(sequence, self._running)

    def find_leader(self, sequence: Sequence, n_available: int) -> Leader:
        """Return the sequence admitted before that is about to compute the longest prefix of this one.

        Args:
            n_available: tokens of the prefix that are available now. A prefix that is hardly longer has no leader.
        """
        leader, n_shared = None, n_available + _MIN_AWAITED - 1
        if sequence.options.reproducible or not self._prefix_cache.weights.intact():
            return _NO_LEADER
        for other in self._running:
            if other is sequence:
                break
            if other.first_token != sequence.first_token or other.namespace != sequence.namespace:
                continue
            if other.n_computed >= other.n_tokens:
                continue
            n = common_prefix(other.tokens, sequence.reusable)
            if not self._limits.can_trim:
                n -= n % self._prefix_cache.slicing.block_size  # only packed blocks are reused
            if n > max(n_shared, other.n_computed):
                leader, n_shared = other, n
        return Leader(leader, n_shared) if leader is not None else _NO_LEADER

    def is_ready(self, sequence: Sequence) -> bool:
        """Return whether an admitted sequence waits no longer for its leader, its fetch, or its parent's save."""
        leader = sequence.leader
        if leader is not None:
            return leader.n_computed >= sequence.n_from_leader or leader not in self._running
        if sequence.fetch is not None and not sequence.fetch.done:
            return False
        key = sequence.options.parent_key
        late = time.perf_counter() >= sequence.parent_deadline
        return key is None or late or not self._prefix_cache.awaits(key)

    def may_run(self, sequence: Sequence, n_seq_max: int) -> bool:
        """Return whether a waiting sequence may run beside the running ones. At most `n_seq_max` run at once."""
        running = self._running
        if not running:
            return True
        return (
            len(running) < n_seq_max
            # A reproducible request has the context to itself.
            and not sequence.options.reproducible
            and not running[0].options.reproducible
            # A decode has one set of adapters: another set waits, as do all requests behind it.
            and sequence.adapters == running[0].adapters
            and self._has_room(sequence)
        )

    def _has_room(self, sequence: Sequence) -> bool:
        """Return whether the cells have room for its prompt, all running prompts, and some of each reply."""
        source, n_shared = self._slots.find_longest_prefix(sequence, self._running)
        if isinstance(source, Parked):
            n_shared = 0  # its cells count as room
        n_from_leader = self.find_leader(sequence, n_shared).n
        needed = sequence.n_tokens - max(n_shared, n_from_leader) + min(sequence.headroom, sequence.n_remaining)
        for other in self._running:
            needed += other.n_tokens - max(other.n_computed, other.n_from_leader if other.waiting else 0)
            needed += min(HEADROOM, other.n_remaining)
        return needed <= self._slots.room
