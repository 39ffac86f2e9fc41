"""One sequence's dealings with the cache: what it restores, and what it saves.

Knows the chain of keys of the sequence's tokens, which blocks are stored, and
how each was computed. The runner tells it what was decoded; it packs blocks as
they complete. Where the cache fails, the sequence is as if nothing had been
stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.cache import (
    TOKEN_BYTES,
    Block,
    Loaded,
    Match,
    SaveReason,
    child_key,
    token_bytes,
)
from erllama.engine.kv.slices import Provenance, canonical_prefix
from erllama.engine.requests.request import CacheHit, HitKind
from erllama.engine.scheduling.model_context import ModelContext
from erllama.errors import StateError

log = logger("erllama.engine")

NOTHING_STORED = (1 << 62, 0)
LIVE = "live"  # the tier of what is still in the context


class Restored(NamedTuple):
    """What a sequence begins with.

    Attributes:
        hit: for the caller.
        n_shared: tokens still in cells that were another sequence's.
    """

    hit: CacheHit
    n_shared: int


class SequenceKV:
    """The cache's view of one sequence.

    Args:
        shared: the model's.
        sequence: the backend's number of it.
        namespace: the root key of what it may share.
        n_prompt: tokens of the prompt.
        recipe: how it is computed.
    """

    def __init__(self, shared: ModelContext, sequence: int, namespace: bytes, n_prompt: int, recipe: bytes) -> None:
        self._shared = shared
        self._cache, self._backend = shared.cache, shared.backend
        self._namespace, self._slicing, self._n_prompt = namespace, shared.slicing, n_prompt
        self._policy = shared.policy
        self._can_trim = shared.backend.limits.can_trim
        self._cold_end = shared.policy.cold_end(n_prompt)
        # Where memory that cannot be cut is packed for the same prompt's return.
        self.cold_tail_end = 0 if self._can_trim else min(self._cold_end, n_prompt - 1)
        # A cut that only this policy makes: KV from there to the next window is canonical for nobody.
        own_cut = not self._slicing.is_cut(self.cold_tail_end, n_prompt)
        self._own_cut = self.cold_tail_end if own_cut else None
        self._sequence = sequence
        self._recipe = recipe
        self._provenance = Provenance(shared.slicing, self._recipe)
        self._keys: list[bytes] = []  # of the full blocks
        self._saving = True
        self.finish_key: bytes | None = None
        self.stored = NOTHING_STORED  # from where to where the cache got what it did not have

    # --- restoring ----------------------------------------------------------------------

    def restore(
        self,
        tokens: NDArray[np.int32],
        match: Match | None,
        *,
        reproducible: bool = False,
        n_shared: int = 0,
        room: int,
        as_computed: Provenance | None = None,
    ) -> Restored:
        """Fill the sequence with the longest prefix of `tokens` that can be had, short of the last.

        Args:
            tokens: what is known of it, int32, shape (n,).
            match: what the cache has of it; None for nothing.
            reproducible: only what has the bits of a cold run.
            n_shared: how many of its tokens it holds already, in cells of another sequence.
            room: free cells.
            as_computed: how those that it holds were computed, where that is known.
        """
        last = len(tokens) - 1
        n_held, tiers = n_shared, {LIVE} if n_shared else set()
        if as_computed is None or as_computed.recipe != self._recipe:
            as_computed = self._provenance
        self._provenance = as_computed.fork(n_shared)
        if match is not None:
            try:
                n_held, n_shared = self._fill(match, reproducible, n_shared, room, tiers)
            except BaseException:
                self._shared.fault(f"restoring a prompt of {len(tokens)} tokens, which is read cold,")
                self._backend.drop(self._sequence)
                self._provenance = Provenance(self._slicing, self._recipe)
                n_held = n_shared = 0
        try:
            self._note_restored(token_bytes(tokens[:n_held]))
            slowest = self._slowest(tiers)
        except BaseException:
            self._shared.fault("looking for what is stored of a prompt")
            self._saving, slowest = False, LIVE
        kind: HitKind = "cold" if n_held == 0 else "exact" if n_held == last else "partial"
        return Restored(CacheHit(kind, slowest if n_held else None, n_held), n_shared)

    def count(self, hit: CacheHit, parent_key: bytes | None, match: Match | None) -> None:
        """Tell the cache how the request was served."""
        blocks = match.blocks if match is not None else ()
        resumed = any(block.key == parent_key and block.end <= hit.tokens for block in blocks)
        try:
            self._cache.count_request(hit.kind, hit.tokens, resumed=resumed)
        except BaseException:
            self._shared.fault("counting a request")

    def _slowest(self, tiers: set[str]) -> str:
        return next((name for name in reversed(self._cache.tier_names) if name in tiers), LIVE)

    def _fill(self, match: Match, reproducible: bool, n_shared: int, room: int, tiers: set[str]) -> tuple[int, int]:
        """Restore what the cache has beyond what is held; the tokens held then, and those of them still shared."""
        wanted = match.n_tokens
        if reproducible:
            wanted = self._canonical(match.blocks, wanted)
        blocks = [block for block in match.blocks if block.end > n_shared]
        if wanted <= n_shared or not blocks:
            return n_shared, n_shared
        if blocks[0].start < n_shared:
            if not self._can_trim or min(blocks[0].end, wanted) > blocks[0].start + room:
                return n_shared, n_shared
            # Held in part: the whole block is restored in its place.
            n_shared = blocks[0].start
            self._backend.cut(self._sequence, n_shared)
        blocks, restored = self._restore_blocks(blocks, wanted, n_shared, n_shared + room, tiers)
        if reproducible:
            # Again, by what was loaded: a block may have been missing, or saved anew by another process.
            restored = self._recut(blocks, restored)
        self._provenance.restored([block for block in blocks if block.start < restored], restored)
        return restored, min(n_shared, restored)

    def _restore_blocks(
        self, candidates: Sequence[Block], wanted: int, position: int, room: int, tiers: set[str]
    ) -> tuple[list[Block], int]:
        """Restore up to `wanted` tokens from `position` on; stops early at a block that cannot be had.

        Returns:
            the blocks as they were loaded, and the tokens held.
        """
        usable = list(takewhile(lambda b: b.start < wanted and self._fits(b, wanted, room), candidates))
        if self._backend.limits.whole_state:
            return self._restore_last(usable, tiers)
        blocks: list[Block] = []
        for block, loaded in zip(usable, self._cache.load_each(usable), strict=True):
            if loaded is None or not self._put_back(block, loaded):
                break
            blocks.append(loaded.block)
            tiers.add(loaded.tier)
            position = block.end
        if position > wanted:
            self._backend.cut(self._sequence, wanted)
            position = wanted
        return blocks, position

    def _restore_last(self, usable: list[Block], tiers: set[str]) -> tuple[list[Block], int]:
        """Restore the last of the blocks that can be had; it has the state of all before it."""
        while usable:
            block = usable.pop()
            loaded = self._cache.load(block)
            if loaded is not None and self._put_back(block, loaded):
                tiers.add(loaded.tier)
                return [*usable, loaded.block], block.end
        return [], 0

    def _put_back(self, block: Block, loaded: Loaded) -> bool:
        """Append a block to the sequence; forget it, and answer False, where the backend refuses it."""
        try:
            self._backend.restore(self._sequence, block.start, block.end, loaded.payload)
        except StateError as error:
            self._cache.reject(block, error)
            return False
        return True

    def _fits(self, block: Block, wanted: int, room: int) -> bool:
        return block.end <= min(self._backend.limits.n_ctx, room) and (block.end <= wanted or self._can_trim)

    def _recut(self, blocks: list[Block], restored: int) -> int:
        """Fall back to a position where a cold run cuts, too, where the restored KV is not canonical."""
        kept = self._canonical(blocks, restored)
        if kept < restored:
            if kept and self._can_trim:
                self._backend.cut(self._sequence, kept)
            else:
                self._backend.drop(self._sequence)
                kept = 0
        return kept

    def _canonical(self, blocks: Sequence[Block], n_matched: int) -> int:
        kept = canonical_prefix(blocks, n_matched, self._n_prompt, self._slicing, self._recipe)
        if self._own_cut is not None and self._slicing.window:
            kept = min(kept, self._own_cut // self._slicing.window * self._slicing.window)
        return kept

    def _note_restored(self, raw: bytes) -> None:
        """Take the restored blocks' keys, so that saving goes on after them."""
        size = self._slicing.block_size * TOKEN_BYTES
        parent = self._namespace
        for at in range(0, len(raw) - size + 1, size):
            parent = child_key(parent, raw[at : at + size])
            if not self._cache.contains(parent):
                # Saved with blocks of another size: save them anew, where that can still be done.
                self._saving = self._can_trim
                break
            self._keys.append(parent)

    # --- saving --------------------------------------------------------------------------

    @property
    def as_computed(self) -> Provenance:
        """How what the sequence holds was computed."""
        return self._provenance

    @property
    def keys(self) -> Sequence[bytes]:
        """Of the full blocks."""
        return self._keys

    def placed(self, start: int, end: int) -> None:
        """Positions [start, end) were decoded, in a context that has nobody else in it."""
        self._provenance.placed(start, end)

    def computed(self, start: int, end: int) -> None:
        """A slice of prefill [start, end) was decoded, in such a context."""
        if end != self._own_cut:
            self._provenance.computed(start, end)

    def prefilled(self, tokens: NDArray[np.int32]) -> None:
        """All of `tokens`, the prompt's first ones, are in the sequence: save what is to be saved as it is read."""
        if self._can_trim:
            self._save_blocks(tokens[: self._cold_end], SaveReason.COLD)
            return
        # Packed now or never: whatever the policy, since all that follows a block needs it.
        self._save_blocks(tokens, SaveReason.COLD)
        if len(tokens) == self.cold_tail_end:
            self._save_tail(tokens, SaveReason.COLD)

    @property
    def due(self) -> float:
        """How many tokens are held when `generated` next has something to save."""
        saved, interval = len(self._keys) * self._slicing.block_size, self._policy.continued_interval
        if not self._can_trim:
            return saved + self._slicing.block_size
        return max(saved + interval, self._policy.min_tokens) if interval else math.inf

    def generated(self, tokens: NDArray[np.int32]) -> None:
        """All of `tokens` are in the sequence, the last of them sampled, and they are due."""
        self._save_blocks(tokens, SaveReason.CONTINUED)

    def save_all(self, tokens: NDArray[np.int32], reason: SaveReason) -> None:
        """Save whatever is not saved yet of `tokens`, which are all that the sequence holds."""
        self.finish_key = None
        if len(tokens) >= self._policy.min_tokens:
            self._save_blocks(tokens, reason)
            try:
                self._save_tail(tokens, reason)
            except BaseException:
                self._shared.fault("saving the end of a context")
                self.finish_key = None

    def _save_blocks(self, tokens: NDArray[np.int32], reason: SaveReason) -> None:
        """Save the full blocks among `tokens` that are not saved yet."""
        size = self._slicing.block_size
        while self._saving and (end := (len(self._keys) + 1) * size) <= len(tokens):
            block = self._save(end - size, tokens[end - size : end], reason)
            self._keys.append(block.key)

    def _save_tail(self, tokens: NDArray[np.int32], reason: SaveReason) -> None:
        """Save what follows the last full block; `tokens` are all that the sequence holds."""
        start = len(self._keys) * self._slicing.block_size
        if self._saving and len(tokens) > start:
            self._save(start, tokens[start:], reason)
        elif self._saving and self._keys and len(tokens) == start and self._cache.contains(self._keys[-1]):
            self.finish_key = self._keys[-1]

    def _save(self, start: int, tokens: NDArray[np.int32], reason: SaveReason) -> Block:
        parent = self._keys[-1] if self._keys else self._namespace
        slice_end = self._provenance.slice_end(start, start + len(tokens))
        block = Block.following(
            parent, self._namespace, start, token_bytes(tokens), reason, self._recipe, slice_end
        )
        try:
            if not self._shared.weights.intact():
                self._saving, self.finish_key = False, None
                return block
            known = self._cache.stored(block.key)
            replace = known is not None and self._better(block, known)
            if replace or self._cache.wants(block.key):
                with self._cache.expecting(block.key):
                    with self._cache.packing():
                        payload = self._backend.pack(self._sequence, block.start, block.end)
                    self._cache.save(block, payload, replace=replace, trimmable=self._can_trim)
                if known is None:
                    self.stored = (min(start, self.stored[0]), max(block.end, self.stored[1]))
            self.finish_key = block.key if self._cache.contains(block.key) else None
        except BaseException:
            self._shared.fault(f"saving a block of {block.n_tokens} tokens, the last of its request,")
            self._saving = False
            self.finish_key = None
        return block

    def _better(self, new: Block, old: Block) -> bool:
        """Whether `new` is canonical for more prompts: for any at all, or, from a full slice, for longer ones."""
        window = self._slicing.window
        if not window or _computed_alike(new, old):
            return False
        full = (new.start // window + 1) * window
        return new.slice_end == full or (new.slice_end > 0 and old.slice_end == 0)


def _computed_alike(a: Block, b: Block) -> bool:
    return (a.recipe, a.slice_end) == (b.recipe, b.slice_end)
