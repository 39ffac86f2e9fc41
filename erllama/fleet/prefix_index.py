"""The prefix index: which replicas hold which prefixes, from their KV events and from the requests they were sent.

Prefixes are cut into short blocks. A block's key is a hash of its tokens and of the key before it, so it stands for
the whole prefix. Keys serve routing alone: a collision costs a longer prefill, never a wrong reply. Not
thread-safe; `PrefixRouter` guards it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from erllama.fleet.kv_events import BlockRemoved, BlockStored

Tokens = NDArray[np.int32]

# Bits of a replica's hold on a block: one for each medium of vLLM's events, and one for what no event has
# confirmed.
_MEDIA = {"GPU": 1, "CPU": 2, "DISK": 4}
_ASSUMED = 8
_FAST = 1 | 2 | _ASSUMED
_MAX_TOKEN = 2**31 - 1


class CachedPrefix(NamedTuple):
    """How much of a prompt a replica holds, in tokens.

    Attributes:
        fast: the part that is in its memory.
        total: with the part that it reads from files or a bucket.
    """

    fast: int
    total: int


NO_PREFIX = CachedPrefix(0, 0)


class PrefixIndex:
    """Finds the longest prefix of a prompt that each replica holds.

    Args:
        block_tokens: tokens per block. The blocks of events must have a multiple of it.
        max_blocks: blocks that each replica may have, of events and of assumptions each. Further blocks of events
            are ignored, and the oldest assumptions are dropped.
        assumed_seconds: how long a replica is assumed to hold the prompts it was sent, and the replies.
        clock: returns the time in seconds.

    Attributes:
        ignored_events: events without effect: the parent is unknown, the size of the blocks does not fit, or a
            number is no token id.
    """

    def __init__(
        self,
        block_tokens: int = 16,
        max_blocks: int = 1 << 20,
        assumed_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.block_tokens = block_tokens
        self._max_blocks, self._assumed_seconds, self._clock = max_blocks, assumed_seconds, clock
        self._holders: dict[bytes, dict[str, int]] = {}  # by key: the bits of each replica
        self._events: dict[str, dict[int, tuple[bytes, ...]]] = {}  # by replica and hash: the keys of a block
        self._assumed: dict[str, OrderedDict[bytes, float]] = {}  # by replica and key: when it expires
        self.ignored_events = 0

    def keys(self, tokens: Tokens, salt: str | None = None) -> list[bytes]:
        """Return the keys of the full blocks of a prompt, in order.

        Args:
            tokens: ids, shape (n,).
            salt: the request's cache salt. Prompts of different salts share no keys.
        """
        key = b"" if salt is None else b"\0" + salt.encode("utf-8", "surrogatepass")
        raw = tokens.astype("<i4", copy=False).tobytes()
        size, digest, found = 4 * self.block_tokens, xxhash.xxh3_128_digest, []
        for start in range(0, len(raw) - size + 1, size):
            key = digest(key + raw[start : start + size])
            found.append(key)
        return found

    # --- what replicas hold ------------------------------------------------------------------------

    def store(self, replica: str, event: BlockStored) -> None:
        """Add the blocks of an event. Each follows the one before it; the first follows the event's parent."""
        known = self._events.setdefault(replica, {})
        bit = _MEDIA.get(event.medium or "GPU", _MEDIA["DISK"])
        per_block, rest = divmod(event.block_size, self.block_tokens)
        parent = () if event.parent_block_hash is None else known.get(event.parent_block_hash)
        fits = not rest and per_block and len(event.token_ids) == len(event.block_hashes) * event.block_size
        are_ids = min(event.token_ids, default=0) >= 0 and max(event.token_ids, default=0) <= _MAX_TOKEN
        if not fits or not are_ids or parent is None or event.is_of_adapter:
            self.ignored_events += 1
            return
        key = parent[-1] if parent else b""
        raw = np.array(event.token_ids, "<i4").tobytes()
        size = 4 * self.block_tokens
        for number, block_hash in enumerate(event.block_hashes):
            keys = []
            for part in range(number * per_block, (number + 1) * per_block):
                key = xxhash.xxh3_128_digest(key + raw[part * size : (part + 1) * size])
                keys.append(key)
            if block_hash not in known and len(known) >= self._max_blocks:
                self.ignored_events += 1
                return
            known[block_hash] = tuple(keys)
            for each in keys:
                holders = self._holders.setdefault(each, {})
                holders[replica] = holders.get(replica, 0) | bit

    def remove(self, replica: str, event: BlockRemoved) -> None:
        """Remove the blocks of an event from its medium; from all media if it names none."""
        known = self._events.get(replica, {})
        bit = _MEDIA.get(event.medium, _MEDIA["DISK"]) if event.medium else _FAST | _MEDIA["DISK"]
        for block_hash in event.block_hashes:
            keys = known.get(block_hash)
            if keys is None:
                continue
            left = 0
            for key in keys:
                left |= self._clear(replica, key, bit)
            if not left & ~_ASSUMED:
                del known[block_hash]
                for key in keys:  # the replica has dropped what it was assumed to hold
                    self._drop_assumption(replica, key)

    def clear(self, replica: str) -> None:
        """Remove everything that a replica holds: it has cleared its cache, or is gone."""
        for keys in self._events.pop(replica, {}).values():
            for key in keys:
                self._clear(replica, key, ~0)
        for key in self._assumed.pop(replica, ()):
            self._clear(replica, key, ~0)

    def assume(self, replica: str, keys: Sequence[bytes]) -> None:
        """Assume for some time that a replica holds these blocks: it was sent a prompt with them."""
        assumed = self._assumed.setdefault(replica, OrderedDict())
        expiry = self._clock() + self._assumed_seconds
        for key in keys:
            assumed[key] = expiry
            assumed.move_to_end(key)
            holders = self._holders.setdefault(key, {})
            holders[replica] = holders.get(replica, 0) | _ASSUMED
        while len(assumed) > self._max_blocks:
            self._drop_assumption(replica, next(iter(assumed)))

    def _clear(self, replica: str, key: bytes, bits: int) -> int:
        """Clear bits of a replica's hold on a block; return the bits that are left."""
        holders = self._holders.get(key)
        if holders is None or replica not in holders:
            return 0
        left = holders[replica] & ~bits
        if left:
            holders[replica] = left
        else:
            del holders[replica]
            if not holders:
                del self._holders[key]
        return left

    def _drop_assumption(self, replica: str, key: bytes) -> None:
        assumed = self._assumed.get(replica)
        if assumed is not None and assumed.pop(key, None) is not None:
            self._clear(replica, key, _ASSUMED)

    def _expire(self) -> None:
        now = self._clock()
        for replica, assumed in self._assumed.items():
            while assumed and next(iter(assumed.values())) <= now:
                self._drop_assumption(replica, next(iter(assumed)))

    # --- lookups -----------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes]) -> dict[str, CachedPrefix]:
        """Return how much of a prompt each replica holds; replicas that hold no block are left out.

        Args:
            keys: of the prompt, from `keys`.
        """
        self._expire()
        found: dict[str, CachedPrefix] = {}
        alive: dict[str, bool] | None = None  # the replicas that hold all blocks so far, and whether in memory
        for number, key in enumerate(keys, 1):
            holders = self._holders.get(key)
            if not holders:
                break
            held = holders if alive is None else {name: holders[name] for name in alive if name in holders}
            if not held:
                break
            tokens = number * self.block_tokens
            now: dict[str, bool] = {}
            for name, bits in held.items():
                now[name] = bool(bits & _FAST) and (alive is None or alive[name])
                found[name] = CachedPrefix(tokens if now[name] else found.get(name, NO_PREFIX).fast, tokens)
            alive = now
        return found

    def n_blocks(self, replica: str) -> int:
        """Return how many blocks of a replica's events are indexed."""
        return len(self._events.get(replica, {}))

    def check_integrity(self) -> None:
        """Raise AssertionError if the tables contradict each other. For tests and operators."""
        expected: dict[bytes, set[str]] = {}
        for replica, events in self._events.items():
            for keys in events.values():
                for key in keys:
                    assert self._holders[key][replica] & ~_ASSUMED
                    expected.setdefault(key, set()).add(replica)
        for replica, assumed in self._assumed.items():
            assert len(assumed) <= self._max_blocks
            for key in assumed:
                assert self._holders[key][replica] & _ASSUMED
                expected.setdefault(key, set()).add(replica)
        assert {key: set(holders) for key, holders in self._holders.items()} == expected
