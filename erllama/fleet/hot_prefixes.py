"""The hottest prefixes: those that most requests begin with, for new replicas to load. Not thread-safe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from erllama.fleet.prefix_index import Tokens


class HotPrefix(NamedTuple):
    """A prefix that several requests began with.

    Attributes:
        salt: their cache salt.
        tokens: ids, shape (n,).
        uses: how many requests.
    """

    salt: str | None
    tokens: Tokens
    uses: int


class _Entry(NamedTuple):
    """A block.

    Attributes:
        uses: how many requests had it.
        number: its place in their prompts, from 1.
        parent: key of the block before it; None for the first.
        tokens: its own, as bytes of int32.
    """

    uses: int
    number: int
    parent: bytes | None
    salt: str | None
    tokens: bytes


class HotPrefixes:
    """Counts the prefixes of requests.

    Args:
        block_tokens: tokens per block; prefixes end at blocks.
        max_tracked: blocks that are counted. Beyond it, the block that was used longest ago is dropped.
    """

    def __init__(self, block_tokens: int, max_tracked: int = 1 << 16) -> None:
        self._block_tokens, self._max_tracked = block_tokens, max_tracked
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def count(self, keys: Sequence[bytes], tokens: Tokens, salt: str | None) -> None:
        """Count a request.

        Args:
            keys: of its prompt, from `PrefixIndex.keys`.
            tokens: of its prompt, shape (n,).
        """
        entries, size = self._entries, self._block_tokens
        for number, (parent, key) in enumerate(pairwise([None, *keys[: self._max_tracked]]), 1):
            assert key is not None
            entry = entries.get(key)
            if entry is None:
                own = tokens[(number - 1) * size : number * size].astype(np.int32, copy=False).tobytes()
                entries[key] = _Entry(1, number, parent, salt, own)
            else:
                entries[key] = entry._replace(uses=entry.uses + 1)
        for key in reversed(keys[: self._max_tracked]):
            entries.move_to_end(key)  # the beginning of a prompt is dropped last
        while len(entries) > self._max_tracked:
            entries.popitem(last=False)

    def hottest(self, n: int) -> list[HotPrefix]:
        """Return the prefixes with the most uses, at most `n`, each as long as possible for its uses.

        Prefixes of one request alone are left out.
        """
        shared = {key: entry for key, entry in self._entries.items() if entry.uses > 1}
        # A prefix is left out if a longer one has as many uses.
        longer = {
            entry.parent
            for entry in shared.values()
            if entry.parent in shared and shared[entry.parent].uses == entry.uses
        }
        longest = [entry for key, entry in shared.items() if key not in longer]
        longest.sort(key=lambda entry: (-entry.uses, -entry.number))
        return [HotPrefix(entry.salt, self._prefix(entry), entry.uses) for entry in longest[:n]]

    def _prefix(self, last: _Entry) -> Tokens:
        """Return the tokens up to the end of a block. The blocks before it are tracked: they are dropped later."""
        entry, blocks = last, [last.tokens]
        while entry.parent is not None:
            entry = self._entries[entry.parent]
            blocks.append(entry.tokens)
        return np.frombuffer(b"".join(reversed(blocks)), np.int32)
