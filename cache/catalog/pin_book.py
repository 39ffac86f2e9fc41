"""The pins of a cache in memory: which blocks of which root they protect from eviction.

`BlockCatalog` owns it and calls it under the cache's lock. `TierSet` keeps it in line with the directories, as it
does the list of blocks. Pins of the RAM tier are recorded here alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from erllama.cache.blocks.pins import Pin, PinRecord, admitted_pins
from erllama.cache.catalog.ledger import TierLedger
from erllama.cache.tiers.tier import Tier


class PinUsage(NamedTuple):
    """Bytes that the pins of a tier protect, and the maximum."""

    n_bytes: int
    quota: int


class _Admitted(NamedTuple):
    """The pins of a root that are in effect, the keys that they protect, and how long that holds.

    Attributes:
        since, until: between these times, in seconds since 1970, no pin ends.
        quota, version: as long as the quota and `TierLedger.watched_version` are these.
    """

    pins: list[PinRecord]
    keys: frozenset[bytes]
    since: float
    until: float
    quota: int
    version: int


class PinBook:
    """The pins of every root.

    Which pins are in effect is computed once, and again only after a change: of the pins, of the quota, or of the
    stored blocks that pins name. Each block that is written to a full tier asks for it.

    Args:
        quota: maximum bytes that the pins of a tier may protect; None for half of the tier's budget.
    """

    def __init__(self, quota: int | None) -> None:
        self._quota = quota
        self._pins: dict[Tier, tuple[PinRecord, ...]] = {}  # values are replaced and never changed
        self._keys: dict[Tier, frozenset[bytes]] = {}  # of all pins of a root, expired ones included
        self._admitted: dict[Tier, _Admitted] = {}

    def set(self, root: Tier, pins: Iterable[PinRecord]) -> None:
        """Record all pins of a root."""
        found = tuple(pins)
        self._admitted.pop(root, None)
        if found:
            self._pins[root] = found
            self._keys[root] = frozenset[bytes]().union(*(pin.keys for pin in found))
        else:
            self._pins.pop(root, None)
            self._keys.pop(root, None)

    def pins(self, root: Tier) -> Sequence[PinRecord]:
        """Return the pins of a root, expired ones included."""
        return self._pins.get(root, ())

    def quota(self, ledger: TierLedger) -> int:
        """Return the maximum bytes that the pins of a tier may protect."""
        budget = sum(root.budget for root in ledger.roots if not root.read_only)
        return budget // 2 if self._quota is None else min(self._quota, budget)

    def admitted(self, ledger: TierLedger, root: Tier) -> list[PinRecord]:
        """Return the pins of a root that have not expired and are within the quota."""
        return self._in_effect(ledger, root).pins if root in self._pins else []

    def protected(self, ledger: TierLedger, root: Tier) -> frozenset[bytes]:
        """Return the keys of the blocks that the pins of a root protect, stored or not."""
        return self._in_effect(ledger, root).keys if root in self._pins else frozenset()

    def protects(self, ledger: TierLedger, root: Tier, key: bytes) -> bool:
        """Return whether the pins of a root protect a block, stored or not."""
        return key in self._keys.get(root, ()) and key in self.protected(ledger, root)

    def _in_effect(self, ledger: TierLedger, root: Tier) -> _Admitted:
        """Return which pins of a root, which has some, are in effect."""
        now, quota, found = time.time(), self.quota(ledger), self._admitted.get(root)
        if found is None or not found.since <= now < found.until or (quota, ledger.watched_version) != found[-2:]:
            pins = self._pins[root]
            ledger.watch(root, self._keys[root])
            admitted, _ = admitted_pins(pins, _Sizes(ledger), quota, now)
            keys = frozenset[bytes]().union(*(pin.keys for pin in admitted))
            ends = [pin.expires for pin in pins if pin.expires is not None and not pin.expired(now)]
            version = ledger.watched_version
            found = self._admitted[root] = _Admitted(
                admitted, keys, now, min(ends, default=math.inf), quota, version
            )
        return found

    def usage(self, ledger: TierLedger) -> PinUsage:
        """Return the bytes of a tier that its pins protect, and the maximum. May be called without the lock."""
        quota = self.quota(ledger)
        _, n_bytes = admitted_pins(self._of(ledger).values(), _Sizes(ledger), quota, time.time())
        return PinUsage(n_bytes, quota)

    def usage_with(self, ledger: TierLedger, pin: PinRecord, sizes: Mapping[bytes, int]) -> PinUsage:
        """Return the usage of a tier if a pin is added, in the place of one of the same name.

        Args:
            sizes: bytes of the blocks of the pin that the tier may lack, by key.
        """
        others = [other for other in self._of(ledger).values() if other.name != pin.name]
        quota, stored = self.quota(ledger), _Sizes(ledger)
        admitted, n_bytes = admitted_pins(others, stored, quota, time.time())
        new = pin.keys.difference(*(other.keys for other in admitted))
        return PinUsage(n_bytes + sum(stored.get(key) or sizes.get(key, 0) for key in new), quota)

    def listed(self, ledgers: Iterable[TierLedger]) -> list[Pin]:
        """Return the pins that have not expired, the oldest first. The pins of slower tiers hide others."""
        now, found = time.time(), dict[str, Pin]()
        for ledger in ledgers:
            sizes = _Sizes(ledger)
            safe = {
                key for root in ledger.roots for key in self.protected(ledger, root) if ledger.root_of(key) is root
            }
            for pin in self._of(ledger).values():
                if not pin.expired(now):
                    found[pin.name] = pin.describe(sizes, safe)
        return sorted(found.values(), key=lambda pin: (pin.created, pin.name))

    def _of(self, ledger: TierLedger) -> dict[str, PinRecord]:
        """Return the pins of a tier by name. Each of its roots has all of them."""
        return {pin.name: pin for root in list(ledger.roots) for pin in self.pins(root)}


class _Sizes(Mapping[bytes, int]):
    """The sizes of the blocks of a tier, by key."""

    def __init__(self, ledger: TierLedger) -> None:
        self._ledger = ledger

    def __getitem__(self, key: bytes) -> int:
        return self._ledger.size_of(key)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._ledger)

    def __len__(self) -> int:
        return len(self._ledger)
