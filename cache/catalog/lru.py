"""Which block a tier gives up next: the least recently used one that nothing follows.

A block whose successors are in the tier is never given up before them, since
they could not be reached without it.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class _Resident:
    parent: bytes
    n_bytes: int
    last_used: int
    children: int
    group: object


class LeafLRU:
    """Keys with a size, a parent and a time of last use; not thread-safe.

    `touch` and `add` cost O(log n); the heap holds stale entries, dropped when
    they surface.
    """

    def __init__(self) -> None:
        self._residents: dict[bytes, _Resident] = {}
        self._orphans: dict[bytes, int] = {}  # children that came before their parent
        self._heaps: dict[object, list[tuple[int, bytes]]] = {}  # by group
        self._newest = 0  # the latest use there is
        self.n_bytes = 0

    def __contains__(self, key: object) -> bool:
        return key in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._residents)

    def size_of(self, key: bytes) -> int:
        return self._residents[key].n_bytes

    def add(self, key: bytes, parent: bytes, n_bytes: int, last_used: int, group: object = None) -> None:
        """Add a key that is not there yet; `group` is what it can be looked for in."""
        self._newest = max(self._newest, last_used)
        self._residents[key] = _Resident(parent, n_bytes, last_used, self._orphans.pop(key, 0), group)
        self.n_bytes += n_bytes
        above = self._residents.get(parent)
        if above is not None:
            above.children += 1
        else:
            self._orphans[parent] = self._orphans.get(parent, 0) + 1
        self._offer(key)

    def remove(self, key: bytes) -> int:
        """Take a key out; returns its size, 0 when it is not there."""
        resident = self._residents.pop(key, None)
        if resident is None:
            return 0
        self.n_bytes -= resident.n_bytes
        if resident.children:
            self._orphans[key] = resident.children
        above = self._residents.get(resident.parent)
        if above is not None:
            above.children -= 1
            self._offer(resident.parent)
        else:
            left = self._orphans[resident.parent] - 1
            if left:
                self._orphans[resident.parent] = left
            else:
                del self._orphans[resident.parent]
        return resident.n_bytes

    def touch(self, key: bytes, now: int) -> None:
        resident = self._residents.get(key)
        if resident is not None:
            resident.last_used = max(now, resident.last_used)
            self._newest = max(self._newest, now)
            self._offer(key)

    def clamp(self, now: int) -> None:
        """Make uses later than `now` older than one of now: a clock that was ahead and is right again noted them.

        Costs one comparison where there are none, as after the first of several uses at one moment.
        """
        if self._newest <= now:
            return
        self._newest = now - 1
        for key, resident in self._residents.items():
            if resident.last_used > now:
                resident.last_used = now - 1
                self._offer(key)

    def oldest_leaf(self, pinned: Container[bytes], group: object = None) -> bytes | None:
        """The key of a group to give up next, or None when every leaf of it is pinned."""
        heap = self._heaps.get(group, [])
        skipped = []
        found = None
        while heap:
            last_used, key = heap[0]
            resident = self._residents.get(key)
            if resident is None or resident.children or resident.last_used != last_used:
                heapq.heappop(heap)
            elif key in pinned:
                skipped.append(heapq.heappop(heap))
            else:
                found = key
                break
        for entry in skipped:
            heapq.heappush(heap, entry)
        return found

    def _offer(self, key: bytes) -> None:
        resident = self._residents[key]
        heap = self._heaps.setdefault(resident.group, [])
        if not resident.children:
            heapq.heappush(heap, (resident.last_used, key))
        if len(heap) > 64 + 4 * len(self._residents):
            group = resident.group
            heap[:] = [(r.last_used, k) for k, r in self._residents.items() if r.group is group and not r.children]
            heapq.heapify(heap)

    def last_used(self, key: bytes) -> int:
        return self._residents[key].last_used
