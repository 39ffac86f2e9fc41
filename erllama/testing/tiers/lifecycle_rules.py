"""Rules for tiers about opening, closing, sharing, threads and many calls.

Part of `TierConformance`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import SkipTest

import numpy as np

from erllama.cache import Tier
from erllama.testing.rules import expect_success, frequent_thread_switches, require
from erllama.testing.tiers.model import TierModel
from erllama.testing.tiers.rules import CheckedTier, TierRules, newer_version, payload_bytes

_THREADS = 4


class LifecycleRules(TierRules):
    """Rules about opening, closing, sharing and threads."""

    # --- opening and closing ---------------------------------------------------------------------------

    def test_a_tier_can_be_reopened(self) -> None:
        """`open` may be called again, with or without `close` before it, `close` twice. Persistent blocks stay."""
        with self._open_tier() as checked:
            self._write_several(checked)
            with expect_success("open() must not fail when it is called again"):
                checked.tier.open()
            checked.compare()
            self._reopen(checked, lambda: checked.tier)

    def test_a_persistent_tier_survives_a_restart(self) -> None:
        """A new instance of a `persistent` tier holds what the last one held, after all changes."""
        with self._temporary_directory() as directory:
            checked = self._open(directory)
            if not checked.tier.persistent:
                checked.tier.close()
                raise SkipTest("a rule for tiers that persist")
            for _ in range(3):
                self._write_several(checked)
                self._reopen(checked, lambda: self.make_tier(directory))
            checked.remove(list(checked.model.stored))
            self._reopen(checked, lambda: self.make_tier(directory))
            checked.tier.close()

    def _write_several(self, checked: CheckedTier) -> None:
        blocks = [*self._first_blocks(10), *self._chain(4)]
        for block in blocks:
            checked.write(block, payload_bytes(block.key, 30))
        for block in blocks[:3]:
            checked.write(newer_version(block, 1), payload_bytes(b"newer", 31))
        checked.remove([blocks[2].key, blocks[5].key])
        checked.compare()

    def _reopen(self, checked: CheckedTier, again: Callable[[], Tier]) -> None:
        persistent = checked.tier.persistent
        with expect_success("close() must not fail when it is called twice"):
            checked.tier.close()
            checked.tier.close()
        checked.tier = again()
        with expect_success("open() must make a closed tier usable again"):
            checked.tier.open()
        if persistent:
            checked.compare()
        else:  # the tier may have lost blocks; those that it lists must be readable
            checked.model.reset_from(checked.tier)
        self._check_idle(checked, list(checked.model.stored)[:3])

    def test_a_single_process_sees_no_others(self) -> None:
        """With one process, a tier reports no other: it is not shared, and `changes` and `in_flight` say so."""
        with self._open_tier() as checked:
            blocks = self._first_blocks(20)
            for i, block in enumerate(blocks):
                checked.write(block, payload_bytes(block.key, 20))
                self._check_idle(checked, [block.key, blocks[-1].key])
                if i % 4 == 3:
                    checked.remove([blocks[i - 1].key])
                    self._check_idle(checked, [block.key, blocks[i - 1].key])
            checked.compare()

    def test_exclusive_ends_after_an_exception(self) -> None:
        """`exclusive` is a context manager that ends when an exception is raised, and does not swallow it."""
        with self._open_tier() as checked:
            for _ in range(3):
                try:
                    with checked.tier.exclusive():
                        raise KeyError("from within")
                except KeyError:
                    pass
                else:
                    raise AssertionError("exclusive() swallows an exception")
            checked.write(self._first_blocks(1)[0], b"payload")
            checked.compare()

    def test_stale_reservations_are_released(self) -> None:
        """`release_stale_reservations` drops a reservation without a write. The block can be written afterwards."""
        with self._open_tier() as checked:
            block = self._first_blocks(1)[0]
            with checked.tier.exclusive():
                require(
                    checked.tier.reserve(block, 100) is True,
                    "reserve() refuses a block of no other process",
                )
            checked.tier.release_stale_reservations()
            n_bytes = checked.tier.reserved()
            require(n_bytes == 0, f"reserved() counts {n_bytes} bytes after release_stale_reservations()")
            checked.compare()
            checked.write(block, b"payload")
            checked.compare()

    def test_instances_see_each_others_changes(self) -> None:
        """Where several processes share a tier, `changes` reports what the others stored and removed."""
        if not self.shared:
            raise SkipTest("a rule for tiers that several processes share")
        with self._temporary_directory() as directory:
            one, other = self._open(directory), self._open(directory)
            try:
                if not one.tier.persistent or one.tier.write_mode == "through":
                    raise SkipTest("a rule for tiers that several processes share")
                blocks = self._first_blocks(9)
                list(other.tier.rows())
                other.tier.changes()
                for i, block in enumerate(blocks):
                    one.write(block, payload_bytes(block.key, 20))
                    self._check_reported(other, one, stored={block.key})
                    if i % 3 == 2:
                        one.remove([blocks[i - 1].key])
                        self._check_reported(other, one, removed={blocks[i - 1].key})
                one.write(newer_version(blocks[0], 1), payload_bytes(b"newer", 40))
                self._check_reported(other, one, stored={blocks[0].key})
                require(other.tier.shared is True, "shared is False while another instance uses it")
            finally:
                one.tier.close()
                other.tier.close()

    def _check_reported(
        self,
        other: CheckedTier,
        one: CheckedTier,
        *,
        stored: set[bytes] | None = None,
        removed: set[bytes] | None = None,
    ) -> None:
        found = other.tier.changes()
        require(found is not None, "changes() is None after another instance has changed something")
        assert found is not None
        reported = {row.block.key for row in found.stored}
        require((stored or set()) <= reported, "changes() does not report a block that another instance stored")
        removals = set(found.removed)
        if not found.complete:
            require(
                (removed or set()) <= removals, "changes() does not report a block that another instance removed"
            )
        other.model.stored = dict(one.model.stored)
        self._check_changes(other, found)
        other.compare()

    # --- threads, and many calls ----------------------------------------------------------------------

    def test_any_thread_may_read(self) -> None:
        """Several threads may call `read` and `verify` at the same time. Each gets the block that it asked for."""
        with self._open_tier() as checked:
            blocks = self._first_blocks(16)
            for block in blocks:
                checked.write(block, payload_bytes(block.key, 100))
            blocks = [block for block in blocks if block.key in checked.model.stored]
            start = threading.Barrier(_THREADS)

            def read(first: int) -> None:
                start.wait()
                for turn in range(60):
                    checked.model.compare_read(checked.tier, blocks[(first + turn) % len(blocks)])
                require(list(checked.tier.verify()) == [], "verify() reports a problem during reads")

            with frequent_thread_switches(), ThreadPoolExecutor(_THREADS) as pool:
                for found in [pool.submit(read, 5 * i) for i in range(_THREADS)]:
                    found.result()

    def test_reads_are_correct_during_writes(self) -> None:
        """`read` in one thread returns the right block while another thread writes and removes other blocks."""
        with self._open_tier() as checked:
            stable, others = self._first_blocks(4), self._first_blocks(24, namespace=1)
            for block in stable:
                checked.write(block, payload_bytes(block.key, 60))
            if sum(checked.tier.size(block, 60) for block in [*stable, *others[:4]]) > checked.tier.budget:
                raise SkipTest(f"a rule for tiers of more than {checked.tier.budget} bytes")
            done = threading.Event()
            model = TierModel()
            model.stored = dict(checked.model.stored)

            def read() -> None:
                while not done.is_set():
                    for block in stable:
                        model.compare_read(checked.tier, block)

            with frequent_thread_switches(), ThreadPoolExecutor(1) as pool:
                reading = pool.submit(read)
                try:
                    for block in others:
                        while len(checked.model.stored) >= len(stable) + 4:
                            checked.remove([list(checked.model.stored)[len(stable)]])
                        checked.write(block, payload_bytes(block.key, 60))
                finally:
                    done.set()
                reading.result()
            checked.compare()

    def test_random_calls_agree_with_a_model(self) -> None:
        """After each of many random calls, the tier holds what the reference model holds."""
        random = np.random.Generator(np.random.PCG64(1))
        with self._temporary_directory() as directory:
            checked = self._open(directory)
            pool = [*self._first_blocks(12), *self._first_blocks(6, namespace=1)]
            try:
                for turn in range(self.n_blocks):
                    block, kind = pool[random.integers(len(pool))], random.integers(10)
                    if kind < 6:
                        newer = newer_version(block, turn)
                        checked.write(newer, payload_bytes(newer.key + newer.recipe, int(random.integers(1, 120))))
                    elif kind < 8:
                        checked.remove([block.key])
                    elif kind == 8:
                        checked.remove([other.key for other in pool if random.integers(3) == 0])
                    elif checked.tier.persistent and turn % 3 == 0:
                        self._reopen(checked, lambda: self.make_tier(directory))
                    checked.compare()
            finally:
                checked.tier.close()
