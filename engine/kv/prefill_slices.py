"""The slices in which prefill is computed, and which stored KV has the bits of a cold run.

The KV of a token depends, in its last bits, on the batch it was computed in. So a prompt of n tokens is always
computed in the same slices: cut at absolute multiples of a window (the backend's micro-batch), and before its
last token, which is a slice of its own. KV is *canonical* for a prompt when it was computed in the slices that a
cold run of that prompt would use, after a prefix that was canonical too. A block records where the slice ended
that computed its first token. From that record, the engine decides for any prompt which KV is canonical for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erllama.cache import Block


@dataclass(frozen=True, slots=True)
class Slicing:
    """How prefill is cut.

    Attributes:
        n_ubatch: the backend's micro-batch.
        block_size: tokens of a cache block.
        at_blocks: cut at the end of every block, too. For memory whose state must be packed the moment a block is
            complete.
        restores_bits: restored KV has the bits of KV that never left the context.
    """

    n_ubatch: int
    block_size: int
    at_blocks: bool
    restores_bits: bool = True

    @property
    def window(self) -> int:
        """Tokens of a full slice; 0 if slices have no fixed length, or restored bits are not guaranteed."""
        if not self.restores_bits:
            return 0
        if not self.at_blocks or self.block_size % self.n_ubatch == 0:
            return self.n_ubatch
        return self.block_size if self.n_ubatch % self.block_size == 0 else 0

    def next_cut(self, position: int, n_prompt: int, mark: int = 0) -> int:
        """Return the end of the slice that begins at `position` of a prompt of `n_prompt` tokens.

        Args:
            mark: a position where the prompt is cut, too.
        """
        if position >= n_prompt - 1:
            return n_prompt
        end = min((position // self.n_ubatch + 1) * self.n_ubatch, n_prompt - 1)
        if position < mark:
            end = min(end, mark)
        if self.at_blocks:
            end = min(end, (position // self.block_size + 1) * self.block_size)
        return end

    def next_mark(self, position: int, n_prompt: int, mark: int = 0) -> int:
        """Return the end of the longest slice from `position` on, for runs whose bits are not guaranteed.

        Memory that cannot be cut is packed at the ends of blocks and at `mark`, so the slice ends there.
        """
        if not self.at_blocks:
            return n_prompt
        end = min((position // self.block_size + 1) * self.block_size, n_prompt)
        return min(end, mark) if position < mark else end

    def is_cut(self, position: int, n_prompt: int) -> bool:
        """Return whether every cold run of such a prompt is cut at this position."""
        at_block = self.at_blocks and position % self.block_size == 0
        return at_block or position % self.n_ubatch == 0 or position >= n_prompt - 1


def canonical_prefix(
    blocks: Sequence[Block], n_matched: int, n_prompt: int, slicing: Slicing, recipe: bytes
) -> int:
    """Return how many tokens of a match can be restored with the bits of a cold run.

    Args:
        blocks, n_matched: a match for a prompt of `n_prompt` tokens.
        recipe: how the engine computes now.

    Returns:
        a position where a cold run cuts, too, at most `n_matched`.
    """
    window, last = slicing.window, n_prompt - 1
    if not window:
        return 0
    canonical = 0
    for block in blocks:
        # The slice of a cold run that would compute this block's first token.
        cold_end = min((block.start // window + 1) * window, last)
        if block.recipe != recipe or block.slice_end != cold_end:
            break
        canonical = min(block.slice_end, block.end, n_matched)
        if canonical < block.end and canonical < n_matched:
            break
    return canonical if canonical == last else canonical // window * window


class Provenance:
    """Records how one sequence was computed, and derives the `slice_end` of its blocks.

    A block is canonical for a prompt only if its cells lie in the order of its tokens, too. Restored in another
    order, they would be summed in that order.

    Attributes:
        recipe: how the sequence is computed.
        ordered: the number of leading tokens whose cells lie in order.
    """

    def __init__(self, slicing: Slicing, recipe: bytes) -> None:
        self._slicing = slicing
        self._window = slicing.window
        self.recipe = recipe
        self._slice_ends: dict[int, int] = {}  # by window
        self._canonical = 0  # everything before this position was computed in full windows
        self.ordered = 0

    def add_restored(self, blocks: Sequence[Block], n_tokens: int) -> None:
        """Record that `blocks` were restored, within positions [0, n_tokens)."""
        self.ordered = n_tokens
        if not self._window:
            return
        for block in blocks:
            index = block.start // self._window
            # A slice cut short by the restore continues with other tokens, in another slice.
            slice_end = block.slice_end if block.recipe == self.recipe and block.slice_end <= n_tokens else 0
            # Blocks of one window may come from different runs: the window is as good as its worst.
            if self._slice_ends.setdefault(index, slice_end) != slice_end:
                self._slice_ends[index] = 0
        while (end := self._canonical + self._window) <= n_tokens:
            if self._slice_ends.get(self._canonical // self._window) != end:
                break
            self._canonical = end

    def fork(self, n_tokens: int) -> Provenance:
        """Return the provenance of a sequence that continues the first `n_tokens` of this one."""
        other = Provenance(self._slicing, self.recipe)
        other.ordered = min(self.ordered, n_tokens)
        if self._window:
            for window in range(-(-n_tokens // self._window)):
                end = self._slice_ends.get(window, 0)
                other._slice_ends[window] = end if end <= n_tokens else 0
            other._canonical = min(self._canonical, n_tokens // self._window * self._window)
        return other

    def add_ordered(self, start: int, end: int) -> None:
        """Record that positions [start, end) were computed while no other sequence was in the context."""
        if self.ordered == start:
            self.ordered = end

    def add_slice(self, start: int, end: int) -> None:
        """Record that positions [start, end) were computed in one slice of prefill."""
        if self._window and start == self._canonical and end <= start + self._window:
            self._slice_ends[start // self._window] = end
            if end == start + self._window:
                self._canonical = end

    def slice_end(self, start: int, end: int) -> int:
        """Return the `slice_end` of the block of positions [start, end); 0 if its KV is canonical for no prompt."""
        if not self._window or end > self.ordered:
            return 0
        found = self._slice_ends.get(start // self._window, 0)
        return found if found > start else 0
