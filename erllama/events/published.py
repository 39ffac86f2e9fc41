"""The blocks that subscribers know: turns changes of the cache into events, and lists all blocks for a snapshot.

Subscribers should know exactly what a lookup can find: blocks whose predecessors are all stored, in any tier. A
block without its predecessor is not announced until the predecessor is stored again.

The events' blocks may be shorter than the cache's. Their hashes are made of the same chain: the hash of the first n
tokens of a block is the start of `child_key(parent, those tokens)`. So blocks that begin with the same tokens share
the hashes of their beginnings, and a shared block is removed only with the last block that has it.

One thread owns a `PublishedBlocks`.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from erllama.cache import TOKEN_BYTES, Block, BlockChange
from erllama.cache.blocks.keys import common_prefix
from erllama.events.wire import BlockRemoved, BlockStored, Event

HASH_BYTES = 8
_MEDIA = {"live": "GPU", "ram": "CPU", "ram_file": "CPU"}
_SLOWEST_MEDIUM = "DISK"  # of the disk tier, remote tiers and tiers of the user
_ALL_MEDIA = ("GPU", "CPU", "DISK")
# Tokens of one event. vLLM's blocks and chains are of this order; a subscriber handles a batch at once.
_MAX_EVENT_TOKENS = 8192


def medium_of(tier: str) -> str:
    """Return the medium that events name for a tier: "GPU", "CPU" or "DISK"."""
    return _MEDIA.get(tier, _SLOWEST_MEDIUM)


def key_hash(key: bytes) -> int:
    """Return the hash that events have for a key: its first 8 bytes as an unsigned integer, big-endian."""
    return int.from_bytes(key[:HASH_BYTES], "big")


def block_hashes(block: Block, block_size: int) -> bytes:
    """Return the hashes of the events' blocks in a block of the cache, 8 bytes each.

    Args:
        block_size: tokens of the events' blocks; a divisor of the block's number of tokens.
    """
    digest, hashes, step = hashlib.sha256(block.parent), [], block_size * TOKEN_BYTES
    for at in range(0, len(block.tokens), step):
        digest.update(block.tokens[at : at + step])
        hashes.append(digest.copy().digest()[:HASH_BYTES])
    return b"".join(hashes)


class _Sibling(NamedTuple):
    tokens: bytes
    key: bytes


class _Held:
    """A block that some tiers hold. `reachable`: all its predecessors are held, so subscribers know it."""

    __slots__ = ("block", "hashes", "reachable", "tiers")

    def __init__(self, block: Block, hashes: bytes) -> None:
        self.block, self.hashes = block, hashes
        self.tiers: tuple[str, ...] = ()
        self.reachable = False

    @property
    def media(self) -> set[str]:
        return {medium_of(tier) for tier in self.tiers}


class Located(NamedTuple):
    """A block that subscribers know, its hashes and a medium that holds it."""

    block: Block
    hashes: bytes
    medium: str


class PublishedBlocks:
    """What subscribers know.

    Args:
        block_size: tokens of the events' blocks.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._held: dict[bytes, _Held] = {}
        self._children: dict[
            bytes, dict[bytes, None]
        ] = {}  # keys of held blocks, by the parent's key; a set in order
        # The announced blocks of each parent in each medium, in the order of their tokens: a neighbour has the
        # longest common prefix.
        self._siblings: dict[tuple[bytes, str], list[_Sibling]] = {}

    def __len__(self) -> int:
        return len(self._held)

    # --- changes -----------------------------------------------------------------------------------

    def apply(self, changes: Iterable[BlockChange]) -> list[Event]:
        """Record changes of the cache, and return the events that report them."""
        events: list[Event] = []
        for tier, block, stored in changes:
            if stored:
                self._store(tier, block, events)
            else:
                self._remove(tier, block.key, events)
        return events

    def replace(self, changes: Iterable[BlockChange]) -> None:
        """Forget everything, and record the whole content of the cache. `located` lists it."""
        self._held, self._children, self._siblings = {}, {}, {}
        self.apply(sorted(changes, key=lambda change: change.block.start))

    def _store(self, tier: str, block: Block, events: list[Event]) -> None:
        held = self._held.get(block.key)
        if held is None:
            held = self._held[block.key] = _Held(block, block_hashes(block, self._block_size))
            self._children.setdefault(block.parent, {})[block.key] = None
        if tier in held.tiers:
            return
        known = held.media
        held.tiers += (tier,)
        medium = medium_of(tier)
        if held.reachable:
            if medium not in known:
                self._announce(held, medium, events)
        elif self._is_reachable(block.parent, block.namespace):
            self._reach(held, events)

    def _is_reachable(self, parent: bytes, namespace: bytes) -> bool:
        if parent == namespace:
            return True
        held = self._held.get(parent)
        return held is not None and held.reachable

    def _reach(self, held: _Held, events: list[Event]) -> None:
        """Announce a block and those after it: all its predecessors are held now."""
        reached = [held]
        while reached:
            each = reached.pop()
            each.reachable = True
            for medium in sorted(each.media):
                self._announce(each, medium, events)
            reached += [self._held[key] for key in self._children.get(each.block.key, ())]

    def _remove(self, tier: str, key: bytes, events: list[Event]) -> None:
        held = self._held.get(key)
        if held is None or tier not in held.tiers:
            return
        held.tiers = tuple(other for other in held.tiers if other != tier)
        medium = medium_of(tier)
        if held.reachable and medium not in held.media:
            self._withdraw(held, medium, events)
        if held.tiers:
            return
        del self._held[key]
        children = self._children[held.block.parent]
        del children[key]
        if not children:
            del self._children[held.block.parent]
        if held.reachable:
            self._unreach(key, events)

    def _unreach(self, parent: bytes, events: list[Event]) -> None:
        """Withdraw the blocks after a block that is no longer held."""
        lost = list(self._children.get(parent, ()))
        while lost:
            each = self._held[lost.pop()]
            for medium in sorted(each.media):
                self._withdraw(each, medium, events)
            each.reachable = False
            lost += self._children.get(each.block.key, ())

    # --- events ------------------------------------------------------------------------------------

    def _announce(self, held: _Held, medium: str, events: list[Event]) -> None:
        block = held.block
        siblings = self._siblings.setdefault((block.parent, medium), [])
        first = self._n_shared(siblings, block.tokens)
        insort(siblings, _Sibling(block.tokens, block.key))
        self.append_stored(events, Located(block, held.hashes, medium), first)

    def _withdraw(self, held: _Held, medium: str, events: list[Event]) -> None:
        block = held.block
        siblings = self._siblings[block.parent, medium]
        del siblings[bisect_left(siblings, _Sibling(block.tokens, block.key))]
        if not siblings:
            del self._siblings[block.parent, medium]
        first = self._n_shared(siblings, block.tokens)
        hashes = _unpack(held.hashes[first * HASH_BYTES :])
        last = events[-1] if events else None
        if isinstance(last, BlockRemoved) and last.medium == medium:
            last.block_hashes += hashes
        else:
            events.append(BlockRemoved(hashes, medium))

    def _n_shared(self, siblings: list[_Sibling], tokens: bytes) -> int:
        """Return how many of the events' blocks at the start of `tokens` other announced blocks have, too."""
        at = bisect_left(siblings, _Sibling(tokens, b""))
        beside = siblings[max(at - 1, 0) : at + 1]
        return max((common_prefix(each.tokens, tokens) for each in beside), default=0) // self._block_size

    def append_stored(self, events: list[Event], located: Located, first: int = 0) -> None:
        """Append the event that a block is stored. Extends the last event if the block follows its blocks.

        Args:
            first: how many of the events' blocks at the start to leave out.
        """
        block, hashes, medium = located
        if first:
            parent: int | None = key_hash(hashes[(first - 1) * HASH_BYTES :])
        else:
            parent = None if block.parent == block.namespace else key_hash(block.parent)
        new = _unpack(hashes[first * HASH_BYTES :])
        tokens = np.frombuffer(block.tokens, "<u4")[first * self._block_size :].tolist()
        if not new:
            return
        before = None if parent is None else self._continued(events, parent, medium, len(tokens))
        if before is not None:
            before.block_hashes += new
            before.token_ids += tokens
        else:
            events.append(BlockStored(new, parent, tokens, self._block_size, None, medium, None))

    def _continued(self, events: list[Event], parent: int, medium: str, n_tokens: int) -> BlockStored | None:
        """Return the event that ends with a block's predecessor, if the block can be part of it."""
        for event in events[: -len(_ALL_MEDIA) - 1 : -1]:  # there is one of each medium at the end, or none
            if not isinstance(event, BlockStored):
                return None
            if (event.block_hashes[-1], event.medium) == (parent, medium):
                return event if len(event.token_ids) + n_tokens <= _MAX_EVENT_TOKENS else None
        return None

    # --- snapshots ---------------------------------------------------------------------------------

    def located(self) -> list[Located]:
        """Return every block that subscribers know, in each medium, predecessors first."""
        return list(self._walk())

    def _walk(self) -> Iterator[Located]:
        waiting = [held for held in self._held.values() if held.block.parent == held.block.namespace]
        while waiting:
            held = waiting.pop()
            for medium in sorted(held.media):
                yield Located(held.block, held.hashes, medium)
            waiting += [self._held[key] for key in self._children.get(held.block.key, ())]


def _unpack(hashes: bytes) -> list[int]:
    return list(struct.unpack(f">{len(hashes) // HASH_BYTES}Q", hashes))
