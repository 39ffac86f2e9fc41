"""The pins of a cache in memory: which blocks of which root they protect from eviction.

`BlockCatalog` owns it and calls it under the cache's lock. `TierSet` keeps it in line with the directories, as it
does the list of blocks. Pins of the RAM tier are recorded here alone.
"""

from __future__ import annotations

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


class PinBook:
    """The pins of every root.

    Args:
        quota: maximum bytes that the pins of a tier may protect; None for half of the tier's budget.
    """

    def __init__(self, quota: int | None) -> None:
        self._quota = quota
        self._pins: dict[Tier, tuple[PinRecord, ...]] = {}  # values are replaced and never changed

    def set(self, root: Tier, pins: Iterable[PinRecord]) -> None:
        """Record all pins of a root."""
        found = tuple(pins)
        if found:
            self._pins[root] = found
        else:
            self._pins.pop(root, None)

    def pins(self, root: Tier) -> Sequence[PinRecord]:
        """Return the pins of a root, expired ones included."""
        return self._pins.get(root, ())

    def quota(self, ledger: TierLedger) -> int:
        """Return the maximum bytes that the pins of a tier may protect."""
        budget = sum(root.budget for root in ledger.roots if not root.read_only)
        return budget // 2 if self._quota is None else min(self._quota, budget)

    def admitted(self, ledger: TierLedger, root: Tier) -> list[PinRecord]:
        """Return the pins of a root that have not expired and are within the quota."""
        pins = self._pins.get(root)
        return [] if pins is None else admitted_pins(pins, _Sizes(ledger), self.quota(ledger), time.time())[0]

    def protected(self, ledger: TierLedger, root: Tier) -> frozenset[bytes]:
        """Return the keys of the blocks that the pins of a root protect, stored or not."""
        return frozenset[bytes]().union(*(pin.keys for pin in self.admitted(ledger, root)))

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
