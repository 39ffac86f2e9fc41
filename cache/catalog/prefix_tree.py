"""The prefix tree of the stored blocks, for lookups in memory.

`BlockCatalog` owns it. A lookup follows the chain of keys from one full block to the next. At the end of the
chain, bisection finds the block that shares the most tokens with the rest: in an ordered list, a neighbour
has the longest common prefix.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from erllama.cache.blocks.block import Block
from erllama.cache.blocks.keys import KEY_BYTES, TOKEN_BYTES, common_prefix

_AFTER_ANY_KEY = b"\xff" * (KEY_BYTES + 1)


@dataclass(slots=True)
class Entry:
    """A stored block and the names of the places that hold it."""

    block: Block
    places: set[str] = field(default_factory=set)


def any_entry(_: Entry) -> bool:
    return True


class Sibling(NamedTuple):
    tokens: bytes
    key: bytes


class PrefixTree:
    """Entries by key, and the ordered children of each parent. Not thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}
        self._children: dict[bytes, list[Sibling]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def add(self, block: Block, place: str) -> Entry:
        """Record that `place` holds the block."""
        entry = self._entries.get(block.key)
        if entry is None:
            entry = self._entries[block.key] = Entry(block)
            insort(self._children.setdefault(block.parent, []), Sibling(block.tokens, block.key))
        entry.places.add(place)
        return entry

    def discard(self, key: bytes, place: str) -> None:
        """Record that `place` no longer holds the block. Removes the entry of a block without a place."""
        entry = self._entries.get(key)
        if entry is None:
            return
        entry.places.discard(place)
        if entry.places:
            return
        del self._entries[key]
        siblings = self._children[entry.block.parent]
        del siblings[bisect_left(siblings, Sibling(entry.block.tokens, key))]
        if not siblings:
            del self._children[entry.block.parent]

    def longest_shared(
        self, parent: bytes, tokens: bytes, usable: Callable[[Entry], bool] = any_entry
    ) -> tuple[Entry, int] | None:
        """Return the usable child of `parent` that shares the most tokens with `tokens`, and their number.

        The number is at least 1. Returns None if no usable child shares a token.
        """
        siblings = self._children.get(parent)
        if not siblings:
            return None
        at = bisect_left(siblings, Sibling(tokens, b""))
        best: tuple[Entry, int] | None = None
        for beside in (range(at - 1, -1, -1), range(at, len(siblings))):
            for i in beside:  # the number of shared tokens falls with the distance from `tokens`
                shared = common_prefix(siblings[i].tokens, tokens)
                if not shared or (best is not None and shared <= best[1]):
                    break
                entry = self._entries[siblings[i].key]
                if usable(entry):
                    best = (entry, shared)
                    break
        return best

    def longest_whole(
        self, parent: bytes, tokens: bytes, usable: Callable[[Entry], bool] = any_entry
    ) -> Entry | None:
        """Return the longest usable child of `parent` whose tokens are a prefix of `tokens`."""
        return next(filter(usable, self._prefixes(parent, tokens, Sibling(tokens, _AFTER_ANY_KEY))), None)

    def superseded_by(self, block: Block) -> list[Block]:
        """Return the siblings of `block` whose tokens are a proper prefix of its tokens."""
        return [e.block for e in self._prefixes(block.parent, block.tokens, Sibling(block.tokens, b""))]

    def _prefixes(self, parent: bytes, tokens: bytes, bound: Sibling) -> Iterator[Entry]:
        """Yield the children of `parent` before `bound` whose tokens are a prefix of `tokens`, longest first."""
        siblings = self._children.get(parent, [])
        while (at := bisect_left(siblings, bound) - 1) >= 0:
            sibling = siblings[at]
            shared = tokens[: common_prefix(sibling.tokens, tokens) * TOKEN_BYTES]
            if shared == sibling.tokens:
                yield self._entries[sibling.key]
                bound = sibling
            else:
                # Each prefix of `tokens` that sorts before this sibling is a prefix of the tokens that both share.
                bound = Sibling(shared, _AFTER_ANY_KEY)
            if not shared:
                return

    def contradictions(self) -> Iterator[str]:
        """Yield each inconsistency between the entries and the lists of children."""
        listed = {sibling.key for siblings in self._children.values() for sibling in siblings}
        if listed != self._entries.keys():
            yield f"{len(listed ^ self._entries.keys())} blocks have an entry or are listed as children, not both"
        for parent, siblings in self._children.items():
            if siblings != sorted(siblings) or len(set(siblings)) != len(siblings):
                yield f"the children of {parent.hex()} are out of order"
        for entry in self._entries.values():
            if not entry.places:
                yield f"block {entry.block.key.hex()} has no place"
