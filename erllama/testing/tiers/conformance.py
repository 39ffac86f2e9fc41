"""Rules for cache tiers: what a tier must do, one test method per rule.

The docstrings of the methods state the rules. `CacheMachine` checks them for each tier of its cache, and then
searches for a sequence of calls after which a cache on that tier returns wrong results.

To run the rules on your own tier, under pytest:

    class TestMine(TierConformance):
        def make_tier(self, directory):
            return MyTier(directory, budget=100_000)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import SkipTest, mock

import numpy as np

from erllama.cache import Block, FileTier, SaveReason, Tier, token_bytes
from erllama.errors import CacheFormatError
from erllama.testing.rules import expect_success, require
from erllama.testing.tiers.lifecycle_rules import LifecycleRules
from erllama.testing.tiers.model import describe
from erllama.testing.tiers.rules import (
    NAMESPACES,
    blocks_of_all_keys,
    make_block,
    newer_version,
    payload_bytes,
    text_like_bytes,
)

# Around powers of two and around page sizes, where buffers end.
_SIZES = (1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 16385, 65537, 262145)
_LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 600)


@contextmanager
def _clock_at(now_ns: int) -> Iterator[None]:
    """Set the clock to `now_ns`, in ns since 1970, during the `with` block."""
    with mock.patch.multiple(time, time_ns=lambda: now_ns, time=lambda: now_ns / 10**9):
        yield


class TierConformance(LifecycleRules):
    """Tests of every rule for tiers. Derive a class Test… from it, define `make_tier`, and run pytest.

    pytest is not required: a rule that holds returns, one that does not apply raises `unittest.SkipTest`, and a
    broken one raises AssertionError.

    Attributes:
        n_blocks: number of blocks in the longer rules. Lower it if writes are slow; the rules then find less.
        shared: whether several instances may use one directory at once. False for a tier that does not report
            the changes of other instances (`Tier.changes`).
    """

    # --- attributes -----------------------------------------------------------------------------------

    def test_a_new_tier_is_usable_and_empty(self) -> None:
        """A new tier has a name, a budget and a location, is usable, is not shared, and holds no blocks."""
        with self._open_tier() as checked:
            tier, block = checked.tier, self._first_blocks(1)[0]
            require(isinstance(tier.name, str) and tier.name.isidentifier(), f"name is {tier.name!r}")
            require(isinstance(tier.budget, int) and tier.budget >= 0, f"budget is {tier.budget!r}")
            require(tier.write_mode in ("through", "behind"), f"write_mode is {tier.write_mode!r}")
            require(isinstance(tier.location, str) and tier.location, f"location is {tier.location!r}")
            location = tier.location_of(block)
            require(isinstance(location, str) and location, "location_of() returns no text")
            require(isinstance(tier.persistent, bool), f"persistent is {tier.persistent!r}")
            self._check_idle(checked, [block.key])
            checked.compare()

    def test_read_of_a_missing_block_raises(self) -> None:
        """`read` raises FileNotFoundError for a block that was never written, regardless of other blocks."""
        with self._open_tier() as checked:
            first, child = self._chain(2)
            sibling = make_block(first.parent, NAMESPACES[0], 0, [999])
            checked.require_missing(first, "in an empty tier")
            checked.write(first, b"payload")
            checked.require_missing(child, "that follows a stored one")
            checked.require_missing(sibling, "beside a stored one")
            checked.require_missing(self._first_blocks(1, namespace=1)[0], "of another namespace")
            checked.compare()

    # --- write and read -------------------------------------------------------------------------------

    def test_read_returns_what_was_written(self) -> None:
        """After `write`, `read` returns that block and payload, each time, for payloads of any size and content."""
        with self._open_tier() as checked:
            at = 0
            for size in _SIZES:
                for content in (
                    payload_bytes(b"%d" % size, size),
                    bytes(size),
                    b"\xff" * size,
                    text_like_bytes(size),
                ):
                    block = self._first_block(at)
                    at += 1
                    if checked.write(block, content):
                        for _ in range(2):
                            checked.model.compare_read(checked.tier, block)
                if size <= 4097:
                    checked.compare()

    def test_every_field_of_a_block_is_stored(self) -> None:
        """`read` and `rows` return every field of a block, for blocks of each length, position and save reason."""
        with self._open_tier() as checked:
            for i, (length, reason) in enumerate(zip(_LENGTHS, list(SaveReason) * 3, strict=False)):
                random = np.random.Generator(np.random.PCG64(i))
                tokens = random.integers(0, 2**32, length, np.uint64)
                tokens[-1] = (0, 2**32 - 1)[i % 2]
                start, slice_end = (0, 1, 255, 256, 2**33, 2**62)[i % 6], (0, 1, 256, 2**32, 2**62)[i % 5]
                block = Block.following(
                    NAMESPACES[i % 3],
                    NAMESPACES[i % 3],
                    start,
                    token_bytes(tokens),
                    reason,
                    random.bytes(16),
                    slice_end,
                )
                checked.write(block, payload_bytes(block.key, 64 + i))
                checked.compare()

    def test_a_key_may_be_any_bytes(self) -> None:
        """The whole key identifies a block. The keys here have every first byte and every last byte."""
        with self._open_tier() as checked:
            blocks = blocks_of_all_keys(self.n_blocks)
            for block in blocks:
                checked.write(block, payload_bytes(block.key, 40))
                checked.model.compare_read(checked.tier, block)
            checked.compare()
            checked.remove([block.key for block in blocks[::2]])
            checked.compare()

    def test_many_blocks_are_stored_at_once(self) -> None:
        """A tier holds as many blocks as fit in `budget`, as `size` counts them. All are listed and readable."""
        with self._open_tier() as checked:
            for block in self._first_blocks(self.n_blocks):
                checked.write(block, b"%d" % block.start + block.key[:3])
            checked.compare()
            for stored in reversed(list(checked.model.stored.values())):
                checked.model.compare_read(checked.tier, stored.block)

    def test_a_long_chain_is_stored(self) -> None:
        """A tier holds blocks that follow each other over hundreds of tokens, also where their tokens repeat."""
        with self._open_tier() as checked:
            left = checked.tier.budget
            for block in self._chain(40, repeated=True):
                left -= checked.tier.size(block, 24)
                if left >= 0:
                    checked.write(block, payload_bytes(block.key, 24))
            checked.compare()

    def test_namespaces_are_separate(self) -> None:
        """The same tokens in several namespaces are separate blocks. Removing one keeps the others."""
        with self._open_tier() as checked:
            for i in range(3):
                for block in self._first_blocks(4, namespace=i):
                    checked.write(block, payload_bytes(block.key, 32))
            checked.compare()
            checked.remove([block.key for block in self._first_blocks(4, namespace=1)])
            checked.compare()

    def test_equal_payloads_are_separate(self) -> None:
        """Two blocks with equal payloads are separate. Removing or replacing one keeps the other."""
        with self._open_tier() as checked:
            blocks = self._first_blocks(6)
            for block in blocks:
                checked.write(block, b"the same payload")
            checked.compare()
            checked.remove([blocks[0].key])
            checked.write(newer_version(blocks[1], 1), b"another payload!")
            checked.compare()

    def test_write_does_not_change_the_payload(self) -> None:
        """`write` does not change the payload. It accepts writable and read-only buffers, and parts of buffers."""
        with self._open_tier() as checked:
            for i, block in enumerate(self._first_blocks(30)):
                payload = payload_bytes(block.key, 50 + i)
                checked.write(block, bytearray(payload) if i % 2 else payload)
            whole = payload_bytes(b"whole", 300)
            for i, block in enumerate(self._first_blocks(3, namespace=1)):
                checked.make_room(block, checked.tier.size(block, 100))
                with checked.tier.exclusive():
                    checked.tier.reserve(block, checked.tier.size(block, 100))
                part = memoryview(whole)[100 * i : 100 * (i + 1)]
                with expect_success("write() must accept a part of a larger buffer"):
                    checked.tier.write(block, part)
                checked.model.record_write(block, bytes(part))
            checked.compare()

    def test_a_payload_that_was_read_stays_valid(self) -> None:
        """A payload that `read` returned never changes: not by reads, writes or removals, and not by `close`."""
        with self._open_tier() as checked:
            blocks = self._first_blocks(8)
            for block in blocks:
                checked.write(block, payload_bytes(block.key, 80))
            blocks = [block for block in blocks if block.key in checked.model.stored]
            views = [checked.model.compare_read(checked.tier, block) for block in blocks]
            expected = [payload_bytes(block.key, 80) for block in blocks]

            def compare(what: str) -> None:
                for block, view, raw in zip(blocks, views, expected, strict=True):
                    with expect_success(f"the payload that read() returned must stay readable after {what}"):
                        require(
                            bytes(view) == raw,
                            f"the payload that read() returned for {describe(block)} changed after {what}",
                        )

            compare("reading other blocks")
            for i, block in enumerate(blocks[:4]):
                checked.write(newer_version(block, 1), payload_bytes(b"newer", 80 + i % 2))
            compare("replacing")
            checked.remove([block.key for block in blocks[2:6]])
            compare("removing")
            for block in self._first_blocks(8, namespace=1):
                checked.write(block, payload_bytes(block.key, 80))
            compare("writing other blocks")
            checked.tier.close()
            compare("closing")

    # --- replacing ------------------------------------------------------------------------------------

    def test_a_newer_version_replaces_the_old_one(self) -> None:
        """`write` of a stored key replaces the old block and payload with the new ones, of any length."""
        with self._open_tier() as checked:
            blocks = self._first_blocks(24)
            for block in blocks:
                checked.write(block, payload_bytes(block.key, 64))
            # All blocks in each version, so that a fault in one of several calls shows.
            for version in range(1, 4):
                for i, block in enumerate(blocks):
                    newer = newer_version(block, version)
                    checked.write(newer, payload_bytes(newer.recipe + newer.key, 64 + (i + version) % 3 - 1))
                    if block.key in checked.model.stored:
                        checked.model.compare_read(
                            checked.tier, block
                        )  # read by the old version, which has the same key
                checked.compare()
            same = newer_version(blocks[-1], 3)
            checked.write(same, b"the same block with another payload")
            checked.compare()

    def test_a_replaced_version_does_not_reappear(self) -> None:
        """A block that was replaced and then removed is missing. Written again, it is the new version."""
        with self._open_tier() as checked:
            block, other = self._first_blocks(2)
            checked.write(other, b"other")
            for version in range(3):
                checked.write(newer_version(block, version), b"version %d" % version)
            checked.remove([block.key])
            checked.require_missing(block, "that was replaced and removed")
            checked.compare()
            checked.write(newer_version(block, 9), b"version 9")
            checked.compare()

    # --- remove and quarantine -------------------------------------------------------------------------

    def test_remove_removes_exactly_the_named_blocks(self) -> None:
        """`remove` removes one block or many, and no others. It ignores keys that are not stored."""
        with self._open_tier() as checked:
            blocks = self._first_blocks(30)
            unknown_keys = [block.key for block in self._first_blocks(3, namespace=2)]
            for block in blocks:
                checked.write(block, payload_bytes(block.key, 30))
            blocks = [block for block in blocks if block.key in checked.model.stored]
            keys = [block.key for block in blocks]

            def remove(removed: Sequence[bytes]) -> None:
                checked.remove(removed)
                checked.compare()
                for block in blocks:
                    if block.key not in checked.model.stored:
                        checked.require_missing(block, "that was removed")

            remove([])
            remove([keys[0]])
            remove([keys[0]])
            remove((keys[-1],))
            remove([unknown_keys[0], keys[1], unknown_keys[1], keys[2]])
            remove([keys[3], keys[3]])
            remove(unknown_keys)
            for key in keys[4:12]:
                remove([key])
            remove(keys[12:])
            remove(keys)

    def test_a_removed_block_can_be_written_again(self) -> None:
        """A block that is removed and written repeatedly is there each time, as it was written last."""
        with self._open_tier() as checked:
            for turn in range(12):
                for block in self._first_blocks(4):
                    checked.write(newer_version(block, turn), b"%d of " % turn + block.key)
                checked.compare()
                checked.remove([block.key for block in self._first_blocks(4)][turn % 4 :])
                checked.compare()

    def test_removing_a_parent_keeps_its_children(self) -> None:
        """`remove` removes the named blocks. Blocks that follow them stay until the cache names them, too."""
        with self._open_tier() as checked:
            chain = self._chain(5)
            for block in chain:
                checked.write(block, payload_bytes(block.key, 30))
            for at in (2, 0, 1):
                checked.remove([chain[at].key])
                checked.compare()

    def test_quarantine_removes_one_block(self) -> None:
        """`quarantine` removes one block: it is not listed, cannot be read, and can be written again."""
        with self._open_tier() as checked:
            blocks = self._first_blocks(6)
            for block in blocks:
                checked.write(block, payload_bytes(block.key, 30))
            for block in (blocks[1], blocks[4]):
                with expect_success("quarantine() must remove a block"):
                    checked.tier.quarantine(block)
                checked.model.record_removal([block.key])
                checked.require_missing(block, "that was quarantined")
                checked.compare()
            checked.write(blocks[1], b"again")
            checked.compare()

    # --- sizes, uses, verify and repair -----------------------------------------------------------------

    def test_sizes_are_consistent(self) -> None:
        """`size` returns the bytes that a block counts for: at least its payload's, and the same each time."""
        with self._open_tier() as checked:
            tier = checked.tier
            for block in (self._first_blocks(1)[0], self._chain(9)[-1]):
                before = 0
                for n_bytes in _SIZES:
                    counted = tier.size(block, n_bytes)
                    require(isinstance(counted, int), f"size() returns {counted!r}")
                    require(counted >= n_bytes, f"size() counts {counted} bytes for a payload of {n_bytes}")
                    require(counted >= before, f"size() counts less for {n_bytes} bytes than for a smaller payload")
                    require(counted == tier.size(block, n_bytes), "size() returns another number the second time")
                    before = counted
            for i, block in enumerate(self._first_blocks(40)):
                checked.write(block, payload_bytes(block.key, 1 + i))
            checked.compare()
            total = sum(row.n_bytes for row in tier.rows())
            require(total <= tier.budget, f"rows() count {total} bytes; the budget is {tier.budget}")

    def test_touch_records_uses(self) -> None:
        """`touch` records when the named blocks were last used, in ns since 1970, and changes no other block."""
        with self._open_tier() as checked:
            tier, blocks = checked.tier, self._first_blocks(8)
            for block in blocks:
                checked.write(block, payload_bytes(block.key, 20))
            notes = type(tier).touch is not Tier.touch
            before = {row.block.key: row.last_used for row in tier.rows()}
            now = time.time_ns()
            used = {block.key: now + (i + 1) * 3600 * 10**9 for i, block in enumerate(blocks[:5])}
            unknown_key = self._first_blocks(1, namespace=2)[0].key
            with (
                expect_success("touch() must accept any pairs of key and time, also of blocks that are not stored"),
                _clock_at(now + 24 * 3600 * 10**9),  # so that no use lies in the future, which a tier may clamp
            ):
                tier.touch([])
                tier.touch(iter([*used.items(), (unknown_key, now)]))
                rows = list(tier.rows())
            for row in rows:
                expected = used[row.block.key] if notes and row.block.key in used else before[row.block.key]
                require(
                    abs(row.last_used - expected) <= 2 * 10**9,
                    f"rows() returns last_used={row.last_used} for {describe(row.block)}; touch() set {expected}",
                )
            checked.compare()

    def test_a_sound_tier_has_no_problems(self) -> None:
        """`verify` reports no problem in a sound tier. Neither `verify` nor `repair` changes it."""
        with self._open_tier() as checked:
            require(list(checked.tier.verify()) == [], "verify() reports a problem in an empty tier")
            for block in [*self._first_blocks(12), *self._chain(6)]:
                checked.write(block, payload_bytes(block.key, 30))
            checked.write(newer_version(self._first_blocks(1)[0], 1), b"newer")
            for _ in range(2):
                with expect_success("verify() must not fail in a sound tier"):
                    found = list(checked.tier.verify())
                require(found == [], f"verify() reports a problem in a sound tier: {found[:1]}")
                checked.compare()
                with expect_success("repair() must not fail in a sound tier"):
                    checked.tier.repair()
                checked.compare()
            require(checked.tier.damaged == 0, f"damaged is {checked.tier.damaged}; nothing was damaged")

    def test_damage_is_detected(self) -> None:
        """`read` raises CacheFormatError for a damaged block. `verify` reports that block and no other."""
        with self._open_tier() as checked:
            tier, blocks = checked.tier, self._first_blocks(5)
            for block in blocks:
                checked.write(block, payload_bytes(block.key, 30))
            if not isinstance(tier, FileTier):
                raise SkipTest("a rule for tiers of files")
            for block in blocks[1:3]:
                path = tier.path_of(block.key)
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
                try:
                    tier.read(block)
                except CacheFormatError:
                    continue
                raise AssertionError("read() of a damaged file must raise CacheFormatError; it returned")
            found = sorted(problem.location for problem in tier.verify())
            expected = sorted(str(tier.path_of(block.key)) for block in blocks[1:3])
            require(found == expected, f"verify() reports {found}; the damage is in {expected}")
