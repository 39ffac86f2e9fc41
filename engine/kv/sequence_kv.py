"""The KV of one sequence: restores its prefix from the cache, and saves its blocks.

Owns the chain of keys of the sequence's tokens, and knows which blocks are stored and how each was computed. The
scheduler reports what was decoded; `SequenceKV` packs blocks as they complete. Where the cache fails, the
sequence continues as if the cache were empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
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
from erllama.engine.backend import BlockRestorer, PackedBlock
from erllama.engine.kv.prefill_slices import Provenance, canonical_prefix
from erllama.engine.kv.prefix_cache import PrefixCache
from erllama.engine.requests.request import CacheHit, HitKind
from erllama.errors import StateError

log = logger("erllama.engine")

LIVE = "live"  # the tier of KV that is still in the context


class TokenRange(NamedTuple):
    """Token positions [start, end); empty where `start` is larger."""

    start: int
    end: int

    def union(self, other: TokenRange) -> TokenRange:
        """Return the smallest range that covers both."""
        return TokenRange(min(self.start, other.start), max(self.end, other.end))


NO_TOKENS = TokenRange(1 << 62, 0)


class Restored(NamedTuple):
    """The prefix that a sequence starts with.

    Attributes:
        hit: for the caller.
        n_shared: tokens in cells that the sequence shares with another, or took over from it.
    """

    hit: CacheHit
    n_shared: int


class SequenceKV:
    """Restores and saves the KV of one sequence.

    Args:
        prefix_cache: the model's.
        slot: the sequence's number in the backend.
        namespace: the root key of the KV that it may share.
        n_prompt: tokens of the prompt.
        recipe: how it is computed.

    Attributes:
        cold_tail_end: where memory that cannot be cut is packed, for the next request with the same prompt.
        finish_key: names the stored context; None if it is not stored.
        stored: the positions that were saved for this sequence and were not in the cache before.
    """

    def __init__(
        self, prefix_cache: PrefixCache, slot: int, namespace: bytes, n_prompt: int, recipe: bytes
    ) -> None:
        self._prefix_cache = prefix_cache
        self._cache, self._backend = prefix_cache.cache, prefix_cache.backend
        self._namespace, self._slicing, self._n_prompt = namespace, prefix_cache.slicing, n_prompt
        self._policy = prefix_cache.policy
        self._can_trim = self._backend.limits.can_trim
        self._cold_end = self._policy.cold_end(n_prompt)
        self.cold_tail_end = 0 if self._can_trim else min(self._cold_end, n_prompt - 1)
        # A cut that only this policy makes: KV from there to the next window is canonical for no other policy.
        own_cut = not self._slicing.is_cut(self.cold_tail_end, n_prompt)
        self._own_cut = self.cold_tail_end if own_cut else None
        self._slot = slot
        self._recipe = recipe
        self._provenance = Provenance(self._slicing, recipe)
        self._keys: list[bytes] = []  # of the full blocks
        self._saving = True
        self.finish_key: bytes | None = None
        self.stored = NO_TOKENS

    @property
    def provenance(self) -> Provenance:
        """How the sequence's KV was computed."""
        return self._provenance

    @property
    def keys(self) -> Sequence[bytes]:
        """Keys of the full blocks."""
        return self._keys

    # --- restoring ----------------------------------------------------------------------

    def restore(
        self,
        tokens: NDArray[np.int32],
        match: Match | None,
        *,
        reproducible: bool = False,
        n_shared: int = 0,
        room: int,
        provenance: Provenance | None = None,
    ) -> Restored:
        """Fill the sequence with the longest available prefix of `tokens`, without the last token.

        Args:
            tokens: the sequence's tokens, int32, shape (n,).
            match: their longest stored prefix; None if no prefix is stored.
            reproducible: restore only KV that has the bits of a cold run.
            n_shared: tokens that the sequence has already, in cells of another sequence.
            room: free cells.
            provenance: how those tokens were computed; None if that is unknown.
        """
        last = len(tokens) - 1
        n_computed, tiers = n_shared, {LIVE} if n_shared else set()
        if provenance is None or provenance.recipe != self._recipe:
            provenance = self._provenance
        self._provenance = provenance.fork(n_shared)
        if match is not None:
            try:
                n_computed, n_shared = self._restore_match(match, reproducible, n_shared, room, tiers)
            except BaseException:
                self._prefix_cache.record_fault(
                    f"restoring the prefix of a prompt of {len(tokens)} tokens from the cache"
                )
                self._backend.drop(self._slot)
                self._provenance = Provenance(self._slicing, self._recipe)
                n_computed = n_shared = 0
        try:
            self._collect_keys(token_bytes(tokens[:n_computed]))
            slowest = self._slowest(tiers)
        except BaseException:
            self._prefix_cache.record_fault("looking up the stored blocks of a prompt")
            self._saving, slowest = False, LIVE
        kind: HitKind = "cold" if n_computed == 0 else "exact" if n_computed == last else "partial"
        return Restored(CacheHit(kind, slowest if n_computed else None, n_computed), n_shared)

    def count_request(self, hit: CacheHit, parent_key: bytes | None, match: Match | None) -> None:
        """Count the request in the cache's statistics."""
        blocks = match.blocks if match is not None else ()
        resumed = any(block.key == parent_key and block.end <= hit.tokens for block in blocks)
        try:
            self._cache.count_request(hit.kind, hit.tokens, resumed=resumed)
        except BaseException:
            self._prefix_cache.record_fault("counting a request")

    def _slowest(self, tiers: set[str]) -> str:
        # Blocks in the write queue are read from "ram", also in a cache without a RAM tier.
        slower = [name for name in self._cache.tier_names if name not in (LIVE, "ram")]
        return next((name for name in (*reversed(slower), "ram") if name in tiers), LIVE)

    def _restore_match(
        self, match: Match, reproducible: bool, n_shared: int, room: int, tiers: set[str]
    ) -> tuple[int, int]:
        """Restore the stored tokens beyond `n_shared`.

        Returns:
            the tokens in the sequence then, and how many of them are still in shared cells.
        """
        wanted = match.n_tokens
        if reproducible:
            wanted = self._canonical(match.blocks, wanted)
        blocks = [block for block in match.blocks if block.end > n_shared]
        if wanted <= n_shared or not blocks:
            return n_shared, n_shared
        if blocks[0].start < n_shared:
            if not self._can_trim or min(blocks[0].end, wanted) > blocks[0].start + room:
                return n_shared, n_shared
            # A part of the block is shared: the whole block is restored in its place.
            n_shared = blocks[0].start
            self._backend.cut(self._slot, n_shared)
        blocks, restored = self._restore_blocks(blocks, wanted, n_shared, n_shared + room, tiers)
        if reproducible:
            # Again, for the loaded blocks: one may have been missing, or another process may have saved it again.
            restored = self._trim_to_canonical(blocks, restored)
        self._provenance.add_restored([block for block in blocks if block.start < restored], restored)
        return restored, min(n_shared, restored)

    def _restore_blocks(
        self, candidates: Sequence[Block], wanted: int, position: int, room: int, tiers: set[str]
    ) -> tuple[list[Block], int]:
        """Restore up to `wanted` tokens from `position` on. Stops at the first block that cannot be restored.

        Returns:
            the blocks as they were loaded, and the tokens in the sequence.
        """
        usable = list(takewhile(lambda b: b.start < wanted and self._fits(b, wanted, room), candidates))
        if self._backend.limits.whole_state:
            return self._restore_last(usable, tiers)
        blocks: list[Block] = []
        with closing(self._cache.load_batches(usable, local=True)) as batches:
            for batch in batches:
                n_restored = self._restore_batch(usable[len(blocks) :], batch)
                for loaded in batch[:n_restored]:
                    blocks.append(loaded.block)
                    tiers.add(loaded.tier)
                if n_restored < len(batch):
                    break
        if blocks:
            position = usable[len(blocks) - 1].end
        if position > wanted:
            self._backend.cut(self._slot, wanted)
            position = wanted
        return blocks, position

    def _restore_last(self, usable: list[Block], tiers: set[str]) -> tuple[list[Block], int]:
        """Restore the last block that can be loaded. It has the state of all blocks before it."""
        while usable:
            block = usable.pop()
            loaded = self._cache.load(block, local=True)
            if loaded is not None and self._restore_block(block, loaded):
                tiers.add(loaded.tier)
                return [*usable, loaded.block], block.end
        return [], 0

    def _restore_batch(self, blocks: Sequence[Block], batch: Sequence[Loaded]) -> int:
        """Append loaded blocks to the sequence. Returns how many the backend accepted, up to the first refusal."""
        if len(batch) > 1 and self._can_trim and isinstance(self._backend, BlockRestorer):
            try:
                self._backend.restore_blocks(
                    self._slot,
                    [PackedBlock(b.start, b.end, loaded.payload) for b, loaded in zip(blocks, batch, strict=False)],
                )
            except StateError as error:
                # The sequence is unchanged. One by one, the blocks before the refused one are restored.
                log.info("%d blocks could not be restored together: %s", len(batch), error)
            else:
                return len(batch)
        for n_restored, (block, loaded) in enumerate(zip(blocks, batch, strict=False)):
            if not self._restore_block(block, loaded):
                return n_restored
        return len(batch)

    def _restore_block(self, block: Block, loaded: Loaded) -> bool:
        """Append a block to the sequence. Returns False, and rejects the block, if the backend refuses it."""
        try:
            self._backend.restore(self._slot, block.start, block.end, loaded.payload)
        except StateError as error:
            self._cache.reject(block, error)
            return False
        return True

    def _fits(self, block: Block, wanted: int, room: int) -> bool:
        return block.end <= min(self._backend.limits.n_ctx, room) and (block.end <= wanted or self._can_trim)

    def _trim_to_canonical(self, blocks: list[Block], restored: int) -> int:
        """Trim restored KV that is not canonical, to a position where a cold run cuts, too."""
        kept = self._canonical(blocks, restored)
        if kept < restored:
            if kept and self._can_trim:
                self._backend.cut(self._slot, kept)
            else:
                self._backend.drop(self._slot)
                kept = 0
        return kept

    def _canonical(self, blocks: Sequence[Block], n_matched: int) -> int:
        kept = canonical_prefix(blocks, n_matched, self._n_prompt, self._slicing, self._recipe)
        if self._own_cut is not None and self._slicing.window:
            kept = min(kept, self._own_cut // self._slicing.window * self._slicing.window)
        return kept

    def _collect_keys(self, raw: bytes) -> None:
        """Collect the keys of the restored blocks, so that saving continues after them."""
        size = self._slicing.block_size * TOKEN_BYTES
        parent = self._namespace
        for at in range(0, len(raw) - size + 1, size):
            parent = child_key(parent, raw[at : at + size])
            if not self._cache.contains(parent):
                # Saved with blocks of another size: save them again, if the memory can still be packed.
                self._saving = self._can_trim
                break
            self._keys.append(parent)

    # --- recording ------------------------------------------------------------------------

    def add_ordered(self, start: int, end: int) -> None:
        """Record that positions [start, end) were decoded while no other sequence was in the context."""
        self._provenance.add_ordered(start, end)

    def add_slice(self, start: int, end: int) -> None:
        """Record that a slice of prefill [start, end) was decoded, in such a context."""
        if end != self._own_cut:
            self._provenance.add_slice(start, end)

    # --- saving --------------------------------------------------------------------------

    def save_prefill(self, tokens: NDArray[np.int32]) -> None:
        """Save the blocks that are due while the prompt is read.

        Args:
            tokens: the first tokens of the prompt, all of them in the sequence.
        """
        if self._can_trim:
            self._save_blocks(tokens[: self._cold_end], SaveReason.COLD)
            return
        # This memory can be packed only now. Later blocks need this one, so the policy does not apply.
        self._save_blocks(tokens, SaveReason.COLD)
        if len(tokens) == self.cold_tail_end:
            self._save_tail(tokens, SaveReason.COLD)

    @property
    def next_save_at(self) -> float:
        """Tokens in the sequence at which `save_reply` next has a block to save."""
        saved, interval = len(self._keys) * self._slicing.block_size, self._policy.continued_interval
        if not self._can_trim:
            return saved + self._slicing.block_size
        return max(saved + interval, self._policy.min_tokens) if interval else math.inf

    def save_reply(self, tokens: NDArray[np.int32]) -> None:
        """Save the full blocks of `tokens`, all of them in the sequence, the last of them sampled."""
        self._save_blocks(tokens, SaveReason.CONTINUED)

    def save_all(self, tokens: NDArray[np.int32], reason: SaveReason) -> None:
        """Save the blocks of `tokens` that are not saved yet; `tokens` are all tokens of the sequence."""
        self.finish_key = None
        if len(tokens) >= self._policy.min_tokens:
            self._save_blocks(tokens, reason)
            try:
                self._save_tail(tokens, reason)
            except BaseException:
                self._prefix_cache.record_fault("saving the end of a context")
                self.finish_key = None

    def _save_blocks(self, tokens: NDArray[np.int32], reason: SaveReason) -> None:
        """Save the full blocks among `tokens` that are not saved yet."""
        size = self._slicing.block_size
        while self._saving and (end := (len(self._keys) + 1) * size) <= len(tokens):
            block = self._save(end - size, tokens[end - size : end], reason)
            self._keys.append(block.key)

    def _save_tail(self, tokens: NDArray[np.int32], reason: SaveReason) -> None:
        """Save the tokens after the last full block; `tokens` are all tokens of the sequence."""
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
            if not self._prefix_cache.weights.intact():
                self._saving, self.finish_key = False, None
                return block
            older = self._cache.stored(block.key)
            replace = older is not None and self._is_better(block, older)
            if replace or self._cache.wants(block.key):
                with self._cache.expecting(block.key):
                    with self._cache.packing():
                        payload = self._backend.pack(self._slot, block.start, block.end)
                    self._cache.save(
                        block,
                        payload,
                        replace=replace,
                        trimmable=self._can_trim,
                        kept_tail=self._prompt_tail_in(block),
                    )
                if older is None:
                    self.stored = self.stored.union(TokenRange(start, block.end))
            self.finish_key = block.key if self._cache.contains(block.key) else None
        except BaseException:
            self._prefix_cache.record_fault(f"saving a block of {block.n_tokens} tokens")
            self._saving = False
            self.finish_key = None
        return block

    def _prompt_tail_in(self, block: Block) -> bytes | None:
        """Return the key of the tail that was packed for the next request with the same prompt.

        Returns None unless the prompt itself completes `block` after the tail: the block, which cannot be cut, does
        not serve that request. A block that the reply completes supersedes the tail, so that a conversation stores
        each token once.
        """
        if self._can_trim or not block.start < self.cold_tail_end < block.end <= self._n_prompt:
            return None
        return child_key(block.parent, block.tokens[: (self.cold_tail_end - block.start) * TOKEN_BYTES])

    def _is_better(self, new: Block, old: Block) -> bool:
        """Return whether `new` is canonical for more prompts.

        A block from a full slice is canonical for all longer prompts. Another canonical block is canonical only for
        prompts that end with its slice.
        """
        window = self._slicing.window
        if not window or (new.recipe, new.slice_end) == (old.recipe, old.slice_end):
            return False
        full = (new.start // window + 1) * window
        return new.slice_end == full or (new.slice_end > 0 and old.slice_end == 0)
