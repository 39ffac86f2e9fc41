"""The prompt cache as one model uses it: namespaces, lookups, and faults that never fail a request.

Every method catches what the cache raises: it logs and counts the error, and the request continues as if
the cache were empty. Used by the scheduler, by `SequenceKV` and, for `namespace`, by callers' threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.cache import Cache, Match, Policy, namespace_key
from erllama.cache.pipeline.fetcher import Fetch
from erllama.engine.adapters import AdapterSet, describe
from erllama.engine.backend import Backend, NamespaceValue
from erllama.engine.kv.prefill_cost import PrefillCost
from erllama.engine.kv.prefill_slices import Slicing
from erllama.engine.kv.weights_check import Weights

log = logger("erllama.engine")


def prompt_namespace(backend: Mapping[str, NamespaceValue], cache_salt: str | None, adapters: AdapterSet) -> bytes:
    """Return the root key of the KV that a request may share: one per model, cache salt and adapter set.

    Args:
        backend: the namespace of the model's backend.
    """
    parts = dict(backend)
    if cache_salt is not None:
        parts["cache_salt"] = cache_salt
    if adapters:
        parts["adapters"] = describe(adapters)
    return namespace_key(parts)


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """The cache of one model, and the rules for what the model saves and reuses.

    Attributes:
        cache: the cache, which other models may share.
        backend: computes, packs and restores KV.
        slicing: where prefill is cut.
        policy: what is saved, and when.
        weights: whether the model file is unchanged.
        prefill_cost: how long the model computes prompts.
    """

    cache: Cache
    backend: Backend
    slicing: Slicing
    policy: Policy
    weights: Weights
    prefill_cost: PrefillCost = field(default_factory=PrefillCost)

    @classmethod
    def of(cls, cache: Cache, backend: Backend, policy: Policy) -> PrefixCache:
        """Return the prefix cache of one model."""
        limits = backend.limits
        slicing = Slicing(
            min(limits.n_ubatch, limits.n_batch),
            cache.block_size,
            at_blocks=not limits.can_trim,
            # Of a block longer than the window only its end is packed; restored, it lies in other cells, which
            # changes the order of sums. Windows of a block's length and more were found to keep every bit.
            restores_bits=not 0 < limits.attention_window < cache.block_size,
        )
        return cls(cache, backend, slicing, policy, Weights(backend))

    def namespace(self, cache_salt: str | None, adapters: AdapterSet) -> bytes:
        """Return the root key of the KV that a request may share: one per model, cache salt and adapter set."""
        return prompt_namespace(self.backend.namespace, cache_salt, adapters)

    def fetch(self, match: Match | None, n_available: int) -> Fetch | None:
        """Begin to read what a match needs from a remote tier. Returns None if there is no match, or it fails.

        Args:
            n_available: leading tokens that are in the context already.
        """
        if match is None:
            return None
        blocks = [block for block in match.blocks if block.end > n_available]
        n_tokens = None
        if self.backend.limits.whole_state:
            blocks = blocks[-1:]  # it has the state of all blocks before it
            n_tokens = match.n_tokens - n_available
        try:
            return self.cache.fetch(blocks, self.prefill_cost.seconds_per_token, n_tokens) if blocks else None
        except BaseException:
            self.record_fault("fetching the blocks of a prompt")
            return None

    def warm_pins(self) -> None:
        """Read the blocks of the model's pins into memory, in the background."""
        try:
            self.cache.warm_pins(self.namespace(None, ()))
        except BaseException:
            self.record_fault("reading the pinned blocks of a model")

    def cached_prefix(self, namespace: bytes, tokens: NDArray[np.int32]) -> int:
        """Return how many tokens of a prompt are stored. KV that is only in the context does not count."""
        if self.weights.problem:
            return 0
        with self.cache.lookup(
            namespace, tokens[:-1], whole=not self.backend.limits.can_trim, loadable=True, count=False
        ) as match:
            return match.n_tokens

    def stored_context(self, key: bytes, namespace: bytes) -> NDArray[np.int32] | None:
        """Return the tokens of the stored context that ends with a block, int32, shape (n,); None if not stored."""
        block = self.cache.stored(key)
        if block is None or block.namespace != namespace:
            return None
        context = self.cache.context(key)
        return None if context is None else context.astype(np.int32)

    def find(self, namespace: bytes, tokens: NDArray[np.int32], parent_key: bytes | None) -> Match | None:
        """Return the longest stored prefix of `tokens`, which the caller releases.

        Returns None where the lookup fails, or the weights have changed.
        """
        if not self.weights.intact():
            return None
        try:
            return self.cache.lookup(
                namespace,
                tokens,
                whole=not self.backend.limits.can_trim,
                loadable=True,
                parent_key=parent_key,
                count=False,
            )
        except BaseException:
            self.record_fault(f"looking up a prompt of {len(tokens)} tokens in the cache")
            return None

    def awaits(self, key: bytes) -> bool:
        """Return whether a save of this block is in flight."""
        try:
            return self.cache.awaits(key)
        except BaseException:
            self.record_fault("checking for a save in flight")
            return False

    def record_fault(self, action: str) -> None:
        """Log and count the exception being handled. The request continues without the cache.

        Args:
            action: what failed, for the log.
        """
        log.exception("%s failed; the request continues without the cache", action)
        try:
            self.cache.count_fault()
        except BaseException:
            log.exception("counting the fault failed, too")
