"""The eviction order of a tier: least recently used leaf first.

A leaf is a block without successors in the tier. A block is evicted after its successors, because lookups
reach them only through it. `TierLedger` uses it under the cache's lock.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class _Node:
    parent: bytes
    n_bytes: int
    last_used: int
    children: int
    group: object


class LeafLRU:
    """Keys with a size, a parent and a time of last use. Not thread-safe.

    `touch` and `add` cost O(log n). The heap holds stale entries; `oldest_leaf` drops those that it meets.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        self._orphans: dict[bytes, int] = {}  # number of children, by the key of a parent that is not stored
        self._heaps: dict[object, list[tuple[int, bytes]]] = {}  # by group
        self._newest = 0  # the latest use of any key
        self.n_bytes = 0

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._nodes)

    def size_of(self, key: bytes) -> int:
        return self._nodes[key].n_bytes

    def add(self, key: bytes, parent: bytes, n_bytes: int, last_used: int, group: object = None) -> None:
        """Add a new key. `oldest_leaf` searches one `group` of keys."""
        self._newest = max(self._newest, last_used)
        self._nodes[key] = _Node(parent, n_bytes, last_used, self._orphans.pop(key, 0), group)
        self.n_bytes += n_bytes
        parent_node = self._nodes.get(parent)
        if parent_node is not None:
            parent_node.children += 1
        else:
            self._orphans[parent] = self._orphans.get(parent, 0) + 1
        self._push(key)

    def remove(self, key: bytes) -> int:
        """Remove a key. Returns its size, or 0 for an unknown key."""
        node = self._nodes.pop(key, None)
        if node is None:
            return 0
        self.n_bytes -= node.n_bytes
        if node.children:
            self._orphans[key] = node.children
        parent_node = self._nodes.get(node.parent)
        if parent_node is not None:
            parent_node.children -= 1
            self._push(node.parent)
        else:
            left = self._orphans[node.parent] - 1
            if left:
                self._orphans[node.parent] = left
            else:
                del self._orphans[node.parent]
        return node.n_bytes

    def touch(self, key: bytes, now: int) -> None:
        node = self._nodes.get(key)
        if node is not None:
            node.last_used = max(now, node.last_used)
            self._newest = max(self._newest, now)
            self._push(key)

    def clamp(self, now: int) -> None:
        """Lower uses later than `now` to just before it. A clock that was ahead recorded them.

        Takes one comparison if no use is later.
        """
        if self._newest <= now:
            return
        self._newest = now - 1
        for key, node in self._nodes.items():
            if node.last_used > now:
                node.last_used = now - 1
                self._push(key)

    def oldest_leaf(self, pinned: Container[bytes], group: object = None) -> bytes | None:
        """Return the next key of a group to evict; None if all its leaves are pinned."""
        heap = self._heaps.get(group, [])
        skipped = []
        found = None
        while heap:
            last_used, key = heap[0]
            node = self._nodes.get(key)
            if node is None or node.children or node.last_used != last_used:
                heapq.heappop(heap)
            elif key in pinned:
                skipped.append(heapq.heappop(heap))
            else:
                found = key
                break
        for entry in skipped:
            heapq.heappush(heap, entry)
        return found

    def _push(self, key: bytes) -> None:
        node = self._nodes[key]
        heap = self._heaps.setdefault(node.group, [])
        if not node.children:
            heapq.heappush(heap, (node.last_used, key))
        if len(heap) > 64 + 4 * len(self._nodes):
            group = node.group
            heap[:] = [(n.last_used, k) for k, n in self._nodes.items() if n.group is group and not n.children]
            heapq.heapify(heap)

    def last_used(self, key: bytes) -> int:
        return self._nodes[key].last_used
