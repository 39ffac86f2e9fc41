"""What a tier must do, rule by rule, and a test of each.

The docstrings of the methods are the rules. `CacheMachine` checks them for each tier of its cache, and then
looks for the order of calls in which a cache on that tier goes wrong.

To run it on a tier of your own, under pytest:

    class TestMine(TierConformance):
        def make_tier(self, directory):
            return MyTier(directory, budget=100_000)
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from unittest import SkipTest, mock

import numpy as np

from erllama.cache import Block, Changes, FileTier, SaveReason, Tier, namespace_key, token_bytes
from erllama.errors import CacheFormatError
from erllama.testing.rules import must, promised, quick_switches
from erllama.testing.tiers.model import TierModel, name_of

_NAMESPACES = [namespace_key({"model": f"conformance {i}"}) for i in range(3)]
# Around powers of two, and around pages: where buffers end.
_SIZES = (1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 16385, 65537, 262145)
_LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 600)
_THREADS = 4


class _Driven:
    """A tier that is called as a cache calls it, beside the model of what it must hold."""

    def __init__(self, tier: Tier) -> None:
        self.tier, self.model = tier, TierModel()

    def write(self, block: Block, payload: bytes | bytearray) -> bool:
        """Make room, reserve it and write; False for a block that the budget has no room for."""
        tier = self.tier
        n_bytes = tier.size(block, len(payload))
        if n_bytes > tier.budget:
            return False
        self._make_room(block, n_bytes)
        with promised("tidy() must not fail where all is well"):
            tier.tidy()
        with promised("exclusive() must give a context manager, and reserve() the room"), tier.exclusive():
            must(
                tier.reserve(block, n_bytes) is True,
                f"reserve() refuses {name_of(block)}, which no other process writes",
            )
            claimed = tier.reserved()
        must(claimed in (0, n_bytes), f"reserved() counts {claimed} bytes after {n_bytes} were reserved")
        before = bytes(payload)
        with promised(f"write() must store {name_of(block)} with a payload of {len(payload)} bytes"):
            tier.write(block, memoryview(payload))
        must(bytes(payload) == before, f"write() of {name_of(block)} changed the caller's payload")
        must(tier.reserved() == 0, f"reserved() counts {tier.reserved()} bytes after write() has stored them")
        must(tier.usable is True, "usable is not True after a write() that succeeded")
        self.model.note_write(block, before)
        return True

    def _make_room(self, block: Block, n_bytes: int) -> None:
        held = self.model.held
        sizes = {key: self.tier.size(stored.block, len(stored.payload)) for key, stored in held.items()}
        left = self.tier.budget - sum(sizes.values()) - n_bytes
        while left < 0:
            parents = {stored.block.parent for stored in held.values()} | {block.parent, block.key}
            victim = next((key for key in held if key not in parents), None)
            if victim is None:
                raise SkipTest(f"a rule for tiers of more than {self.tier.budget} bytes")
            left += sizes[victim]
            self.remove([victim])

    def remove(self, keys: Sequence[bytes]) -> None:
        with promised(f"remove() must forget {len(keys)} blocks, and pass over those that are not there"):
            self.tier.remove(keys)
        self.model.note_removal(keys)

    def compare(self) -> None:
        self.model.compare(self.tier)

    def must_lack(self, block: Block, why: str) -> None:
        """`read` must raise FileNotFoundError."""
        try:
            self.tier.read(block)
        except FileNotFoundError:
            return
        except Exception as error:
            raise AssertionError(
                f"read() of a block {why} must raise FileNotFoundError; it raised {type(error).__name__}: {error}"
            ) from error
        raise AssertionError(f"read() of a block {why} must raise FileNotFoundError; it returned")


@contextmanager
def _clock_at(now_ns: int) -> Iterator[None]:
    """Within, the time is `now_ns`, in ns since 1970."""
    with mock.patch.multiple(time, time_ns=lambda: now_ns, time=lambda: now_ns / 10**9):
        yield


class TierConformance:
    """Derive from it, name the class Test…, give `make_tier`, and let pytest run it.

    It needs no pytest: a method that returns has passed, one that raises `unittest.SkipTest` was skipped.

    Attributes:
        n_blocks: blocks of the longer rules: fewer find less, and cost less where a write is slow.
        shared: whether several instances may use one directory at once: not where a tier does not tell what
            others did to it (`Tier.changes`).
    """

    n_blocks = 520
    shared = False

    def make_tier(self, directory: Path) -> Tier:
        """A tier that keeps everything under `directory`: one that holds what an earlier one left there."""
        raise NotImplementedError("derive from TierConformance and define make_tier(directory)")

    # --- what it says of itself -----------------------------------------------------------------------

    def test_a_tier_says_what_it_is(self) -> None:
        """A new tier has a name, a budget and a place, is usable, shared with nobody, and holds nothing."""
        with self._tier() as driven:
            tier, block = driven.tier, self._flat(1)[0]
            must(isinstance(tier.name, str) and tier.name.isidentifier(), f"name is {tier.name!r}")
            must(isinstance(tier.budget, int) and tier.budget >= 0, f"budget is {tier.budget!r}")
            must(tier.write_mode in ("through", "behind"), f"write_mode is {tier.write_mode!r}")
            must(isinstance(tier.place, str) and tier.place, f"place is {tier.place!r}")
            must(isinstance(tier.where(block), str) and tier.where(block), "where() gives no text")
            must(isinstance(tier.persistent, bool), f"persistent is {tier.persistent!r}")
            self._at_rest(driven, [block.key])
            driven.compare()

    def test_reading_what_is_not_there_says_so(self) -> None:
        """`read` raises FileNotFoundError for a block that was never written, whatever else is stored."""
        with self._tier() as driven:
            first, child = self._chain(2)
            sibling = _block(first.parent, _NAMESPACES[0], 0, [999])
            driven.must_lack(first, "in an empty tier")
            driven.write(first, b"payload")
            driven.must_lack(child, "that follows a stored one")
            driven.must_lack(sibling, "beside a stored one")
            driven.must_lack(self._flat(1, namespace=1)[0], "of another namespace")
            driven.compare()

    # --- write and read -------------------------------------------------------------------------------

    def test_what_is_written_is_read(self) -> None:
        """After `write`, `read` gives that very block and payload, again and again, whatever its size and bytes."""
        with self._tier() as driven:
            at = 0
            for size in _SIZES:
                for content in (_payload(b"%d" % size, size), bytes(size), b"\xff" * size, _text(size)):
                    block = self._numbered(at)
                    at += 1
                    if driven.write(block, content):
                        for _ in range(2):
                            driven.model.compare_read(driven.tier, block)
                if size <= 4097:
                    driven.compare()

    def test_blocks_come_back_as_they_were_written(self) -> None:
        """`read` and `rows` give every field of the block: of each length, at each place, of each kind."""
        with self._tier() as driven:
            for i, (length, reason) in enumerate(zip(_LENGTHS, list(SaveReason) * 3, strict=False)):
                random = np.random.Generator(np.random.PCG64(i))
                tokens = random.integers(0, 2**32, length, np.uint64)
                tokens[-1] = (0, 2**32 - 1)[i % 2]
                start, slice_end = (0, 1, 255, 256, 2**33, 2**62)[i % 6], (0, 1, 256, 2**32, 2**62)[i % 5]
                block = Block.following(
                    _NAMESPACES[i % 3],
                    _NAMESPACES[i % 3],
                    start,
                    token_bytes(tokens),
                    reason,
                    random.bytes(16),
                    slice_end,
                )
                driven.write(block, _payload(block.key, 64 + i))
                driven.compare()

    def test_a_key_may_be_any_bytes(self) -> None:
        """Blocks are told apart by their whole keys: each value of a key's first and last byte occurs."""
        with self._tier() as driven:
            blocks = _blocks_of_all_keys(self.n_blocks)
            for block in blocks:
                driven.write(block, _payload(block.key, 40))
                driven.model.compare_read(driven.tier, block)
            driven.compare()
            driven.remove([block.key for block in blocks[::2]])
            driven.compare()

    def test_many_blocks_are_held_at_once(self) -> None:
        """As many as `budget` has room for, as `size` counts them: all are listed, and all can be read."""
        with self._tier() as driven:
            for block in self._flat(self.n_blocks):
                driven.write(block, b"%d" % block.start + block.key[:3])
            driven.compare()
            for stored in reversed(list(driven.model.held.values())):
                driven.model.compare_read(driven.tier, stored.block)

    def test_a_long_chain_is_held(self) -> None:
        """Blocks that follow each other, hundreds of tokens deep; the same tokens again, at other positions too."""
        with self._tier() as driven:
            left = driven.tier.budget
            for block in self._chain(40, repeated=True):
                left -= driven.tier.size(block, 24)
                if left >= 0:
                    driven.write(block, _payload(block.key, 24))
            driven.compare()

    def test_namespaces_are_apart(self) -> None:
        """The same tokens in several namespaces are several blocks; removing one leaves the others."""
        with self._tier() as driven:
            for i in range(3):
                for block in self._flat(4, namespace=i):
                    driven.write(block, _payload(block.key, 32))
            driven.compare()
            driven.remove([block.key for block in self._flat(4, namespace=1)])
            driven.compare()

    def test_equal_payloads_are_apart(self) -> None:
        """Two blocks with the same payload are two blocks; removing or replacing one leaves the other."""
        with self._tier() as driven:
            blocks = self._flat(6)
            for block in blocks:
                driven.write(block, b"the same payload")
            driven.compare()
            driven.remove([blocks[0].key])
            driven.write(_newer(blocks[1], 1), b"another payload!")
            driven.compare()

    def test_a_payload_is_lent(self) -> None:
        """`write` leaves the payload as it is, and takes writable, read-only and partial memory."""
        with self._tier() as driven:
            for i, block in enumerate(self._flat(30)):
                payload = _payload(block.key, 50 + i)
                driven.write(block, bytearray(payload) if i % 2 else payload)
            whole = _payload(b"whole", 300)
            for i, block in enumerate(self._flat(3, namespace=1)):
                driven._make_room(block, driven.tier.size(block, 100))
                with driven.tier.exclusive():
                    driven.tier.reserve(block, driven.tier.size(block, 100))
                part = memoryview(whole)[100 * i : 100 * (i + 1)]
                with promised("write() must take a part of a larger buffer"):
                    driven.tier.write(block, part)
                driven.model.note_write(block, bytes(part))
            driven.compare()

    def test_what_was_read_stays(self) -> None:
        """A payload that `read` gave stays when blocks are read, replaced or removed, and after `close`."""
        with self._tier() as driven:
            blocks = self._flat(8)
            for block in blocks:
                driven.write(block, _payload(block.key, 80))
            blocks = [block for block in blocks if block.key in driven.model.held]
            views = [driven.model.compare_read(driven.tier, block) for block in blocks]
            expected = [_payload(block.key, 80) for block in blocks]

            def compare(what: str) -> None:
                for block, view, raw in zip(blocks, views, expected, strict=True):
                    with promised(f"what read() gave must stay readable after {what}"):
                        must(bytes(view) == raw, f"what read() gave of {name_of(block)} changed after {what}")

            compare("reading other blocks")
            for i, block in enumerate(blocks[:4]):
                driven.write(_newer(block, 1), _payload(b"newer", 80 + i % 2))
            compare("replacing")
            driven.remove([block.key for block in blocks[2:6]])
            compare("removing")
            for block in self._flat(8, namespace=1):
                driven.write(block, _payload(block.key, 80))
            compare("writing other blocks")
            driven.tier.close()
            compare("closing")

    # --- replacing ------------------------------------------------------------------------------------

    def test_a_newer_version_takes_the_place_of_the_old_one(self) -> None:
        """`write` of a key that is stored puts the new block and payload in place of the old, of any length."""
        with self._tier() as driven:
            blocks = self._flat(24)
            for block in blocks:
                driven.write(block, _payload(block.key, 64))
            # First one version of all, then more of some, so that one fault in several calls shows.
            for version in range(1, 4):
                for i, block in enumerate(blocks):
                    newer = _newer(block, version)
                    driven.write(newer, _payload(newer.recipe + newer.key, 64 + (i + version) % 3 - 1))
                    if block.key in driven.model.held:
                        driven.model.compare_read(driven.tier, block)  # asked for by the old one, whose key it is
                driven.compare()
            same = _newer(blocks[-1], 3)
            driven.write(same, b"the same block with another payload")
            driven.compare()

    def test_a_replaced_block_does_not_come_back(self) -> None:
        """A block that was replaced and then removed is gone; written again, it is the new one."""
        with self._tier() as driven:
            block, other = self._flat(2)
            driven.write(other, b"other")
            for version in range(3):
                driven.write(_newer(block, version), b"version %d" % version)
            driven.remove([block.key])
            driven.must_lack(block, "that was replaced and removed")
            driven.compare()
            driven.write(_newer(block, 9), b"version 9")
            driven.compare()

    # --- remove and set aside -------------------------------------------------------------------------

    def test_what_is_removed_is_gone(self) -> None:
        """`remove` forgets one block or many, and no other; those that are not there are none."""
        with self._tier() as driven:
            blocks = self._flat(30)
            strangers = [block.key for block in self._flat(3, namespace=2)]
            for block in blocks:
                driven.write(block, _payload(block.key, 30))
            blocks = [block for block in blocks if block.key in driven.model.held]
            keys = [block.key for block in blocks]

            def gone(wanted: Sequence[bytes]) -> None:
                driven.remove(wanted)
                driven.compare()
                for block in blocks:
                    if block.key not in driven.model.held:
                        driven.must_lack(block, "that was removed")

            gone([])
            gone([keys[0]])
            gone([keys[0]])
            gone((keys[-1],))
            gone([strangers[0], keys[1], strangers[1], keys[2]])
            gone([keys[3], keys[3]])
            gone(strangers)
            for key in keys[4:12]:
                gone([key])
            gone(keys[12:])
            gone(keys)

    def test_what_was_removed_can_be_written_again(self) -> None:
        """Removed and written, again and again, a block is there each time, as it was written last."""
        with self._tier() as driven:
            for turn in range(12):
                for block in self._flat(4):
                    driven.write(_newer(block, turn), b"%d of " % turn + block.key)
                driven.compare()
                driven.remove([block.key for block in self._flat(4)][turn % 4 :])
                driven.compare()

    def test_removing_a_parent_leaves_its_children(self) -> None:
        """`remove` forgets the blocks that it names; what follows them stays until the cache names that."""
        with self._tier() as driven:
            chain = self._chain(5)
            for block in chain:
                driven.write(block, _payload(block.key, 30))
            for at in (2, 0, 1):
                driven.remove([chain[at].key])
                driven.compare()

    def test_what_is_set_aside_is_gone(self) -> None:
        """`set_aside` takes one block out of the way: it is not listed and not read, and can be written again."""
        with self._tier() as driven:
            blocks = self._flat(6)
            for block in blocks:
                driven.write(block, _payload(block.key, 30))
            for block in (blocks[1], blocks[4]):
                with promised("set_aside() must take a block out of the way"):
                    driven.tier.set_aside(block)
                driven.model.note_removal([block.key])
                driven.must_lack(block, "that was set aside")
                driven.compare()
            driven.write(blocks[1], b"again")
            driven.compare()

    # --- sizes, uses, verify and mend -----------------------------------------------------------------

    def test_sizes_add_up(self) -> None:
        """`size` gives the bytes that a block counts for, no fewer than its payload, the same each time."""
        with self._tier() as driven:
            tier = driven.tier
            for block in (self._flat(1)[0], self._chain(9)[-1]):
                before = 0
                for n_bytes in _SIZES:
                    counted = tier.size(block, n_bytes)
                    must(isinstance(counted, int), f"size() gives {counted!r}")
                    must(counted >= n_bytes, f"size() counts {counted} bytes for a payload of {n_bytes}")
                    must(counted >= before, f"size() counts less for {n_bytes} bytes than for fewer")
                    must(counted == tier.size(block, n_bytes), "size() gives another number the second time")
                    before = counted
            for i, block in enumerate(self._flat(40)):
                driven.write(block, _payload(block.key, 1 + i))
            driven.compare()
            total = sum(row.n_bytes for row in tier.rows())
            must(total <= tier.budget, f"rows() count {total} bytes; the budget is {tier.budget}")

    def test_uses_are_noted(self) -> None:
        """`touch` notes when blocks were last used, in ns since 1970: of those that it names, and no others."""
        with self._tier() as driven:
            tier, blocks = driven.tier, self._flat(8)
            for block in blocks:
                driven.write(block, _payload(block.key, 20))
            notes = type(tier).touch is not Tier.touch
            before = {row.block.key: row.last_used for row in tier.rows()}
            now = time.time_ns()
            used = {block.key: now + (i + 1) * 3600 * 10**9 for i, block in enumerate(blocks[:5])}
            stranger = self._flat(1, namespace=2)[0].key
            with (
                promised("touch() must take any pairs of key and time, also of blocks that are gone"),
                _clock_at(now + 24 * 3600 * 10**9),  # a tier may clamp uses in the future, as of a wrong clock
            ):
                tier.touch([])
                tier.touch(iter([*used.items(), (stranger, now)]))
                rows = list(tier.rows())
            for row in rows:
                expected = used[row.block.key] if notes and row.block.key in used else before[row.block.key]
                must(
                    abs(row.last_used - expected) <= 2 * 10**9,
                    f"rows() gives last_used={row.last_used} for {name_of(row.block)}; touch() told {expected}",
                )
            driven.compare()

    def test_a_sound_tier_has_no_problems(self) -> None:
        """`verify` finds nothing wrong with what was written, and changes nothing; nor does `mend`."""
        with self._tier() as driven:
            must(list(driven.tier.verify()) == [], "verify() finds something wrong with an empty tier")
            for block in [*self._flat(12), *self._chain(6)]:
                driven.write(block, _payload(block.key, 30))
            driven.write(_newer(self._flat(1)[0], 1), b"newer")
            for _ in range(2):
                with promised("verify() must not fail where all is well"):
                    found = list(driven.tier.verify())
                must(found == [], f"verify() finds something wrong with a sound tier: {found[:1]}")
                driven.compare()
                with promised("mend() must not fail where all is well"):
                    driven.tier.mend()
                driven.compare()
            must(driven.tier.damaged == 0, f"damaged is {driven.tier.damaged}; nothing was damaged")

    def test_a_problem_is_found(self) -> None:
        """`read` raises CacheFormatError for what is damaged; `verify` tells of that block and of no other."""
        with self._tier() as driven:
            tier, blocks = driven.tier, self._flat(5)
            for block in blocks:
                driven.write(block, _payload(block.key, 30))
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
            found = sorted(problem.place for problem in tier.verify())
            expected = sorted(str(tier.path_of(block.key)) for block in blocks[1:3])
            must(found == expected, f"verify() tells of {found}; the damage is in {expected}")

    # --- the life of a tier ---------------------------------------------------------------------------

    def test_a_tier_may_be_opened_again(self) -> None:
        """`open` may come again, also without a `close`; `close` may come twice. What persists is there then."""
        with self._tier() as driven:
            self._write_some(driven)
            with promised("open() must not fail when it comes again"):
                driven.tier.open()
            driven.compare()
            self._reopened(driven, lambda: driven.tier)

    def test_what_persists_is_there_after_a_restart(self) -> None:
        """What a tier that is `persistent` holds, a new instance holds, too: replaced and removed as it was."""
        with self._directory() as directory:
            driven = self._opened(directory)
            if not driven.tier.persistent:
                driven.tier.close()
                raise SkipTest("a rule for tiers that persist")
            for _ in range(3):
                self._write_some(driven)
                self._reopened(driven, lambda: self.make_tier(directory))
            driven.remove(list(driven.model.held))
            self._reopened(driven, lambda: self.make_tier(directory))
            driven.tier.close()

    def _write_some(self, driven: _Driven) -> None:
        blocks = [*self._flat(10), *self._chain(4)]
        for block in blocks:
            driven.write(block, _payload(block.key, 30))
        for block in blocks[:3]:
            driven.write(_newer(block, 1), _payload(b"newer", 31))
        driven.remove([blocks[2].key, blocks[5].key])
        driven.compare()

    def _reopened(self, driven: _Driven, again: Callable[[], Tier]) -> None:
        persistent = driven.tier.persistent
        with promised("close() must not fail, also when it comes twice"):
            driven.tier.close()
            driven.tier.close()
        driven.tier = again()
        with promised("open() must make a closed tier usable again"):
            driven.tier.open()
        if persistent:
            driven.compare()
        else:  # what it lists can be read
            driven.model.take_from(driven.tier)
        self._at_rest(driven, list(driven.model.held)[:3])

    def test_nobody_else_is_at_work(self) -> None:
        """Alone, a tier reports no other process: none shares it, and none writes or changes anything."""
        with self._tier() as driven:
            blocks = self._flat(20)
            for i, block in enumerate(blocks):
                driven.write(block, _payload(block.key, 20))
                self._at_rest(driven, [block.key, blocks[-1].key])
                if i % 4 == 3:
                    driven.remove([blocks[i - 1].key])
                    self._at_rest(driven, [block.key, blocks[i - 1].key])
            driven.compare()

    def test_exclusive_lets_go(self) -> None:
        """`exclusive` is a context manager that ends with an exception as well, and does not swallow it."""
        with self._tier() as driven:
            for _ in range(3):
                try:
                    with driven.tier.exclusive():
                        raise KeyError("from within")
                except KeyError:
                    pass
                else:
                    raise AssertionError("exclusive() swallows an exception")
            driven.write(self._flat(1)[0], b"payload")
            driven.compare()

    def test_a_reservation_may_be_given_up(self) -> None:
        """What was reserved and not written is no longer counted after `tidy`, and can be written then."""
        with self._tier() as driven:
            block = self._flat(1)[0]
            with driven.tier.exclusive():
                must(driven.tier.reserve(block, 100) is True, "reserve() refuses what no other process writes")
            driven.tier.tidy()
            must(driven.tier.reserved() == 0, f"reserved() counts {driven.tier.reserved()} bytes after tidy()")
            driven.compare()
            driven.write(block, b"payload")
            driven.compare()

    def test_instances_see_each_other(self) -> None:
        """Where several processes share a tier, `changes` tells each what others stored and removed."""
        if not self.shared:
            raise SkipTest("a rule for tiers that several processes share")
        with self._directory() as directory:
            one, other = self._opened(directory), self._opened(directory)
            try:
                if not one.tier.persistent or one.tier.write_mode == "through":
                    raise SkipTest("a rule for tiers that several processes share")
                blocks = self._flat(9)
                list(other.tier.rows())
                other.tier.changes()
                for i, block in enumerate(blocks):
                    one.write(block, _payload(block.key, 20))
                    self._learns(other, one, stored={block.key})
                    if i % 3 == 2:
                        one.remove([blocks[i - 1].key])
                        self._learns(other, one, removed={blocks[i - 1].key})
                one.write(_newer(blocks[0], 1), _payload(b"newer", 40))
                self._learns(other, one, stored={blocks[0].key})
                must(other.tier.shared is True, "shared is False while another instance uses it")
            finally:
                one.tier.close()
                other.tier.close()

    def _learns(
        self, other: _Driven, one: _Driven, *, stored: set[bytes] | None = None, removed: set[bytes] | None = None
    ) -> None:
        found = other.tier.changes()
        must(found is not None, "changes() is None after another instance has changed something")
        assert found is not None
        told = {row.block.key for row in found.stored}
        must((stored or set()) <= told, "changes() does not tell of a block that another instance stored")
        gone = set(found.removed)
        if not found.complete:
            must((removed or set()) <= gone, "changes() does not tell of a block that another instance removed")
        other.model.held = dict(one.model.held)
        self._rightly_told(other, found)
        other.compare()

    # --- threads, and many calls ----------------------------------------------------------------------

    def test_read_is_for_any_thread(self) -> None:
        """`read` and `verify` may come from several threads at once, each of which gets what it asked for."""
        with self._tier() as driven:
            blocks = self._flat(16)
            for block in blocks:
                driven.write(block, _payload(block.key, 100))
            blocks = [block for block in blocks if block.key in driven.model.held]
            start = threading.Barrier(_THREADS)

            def read(first: int) -> None:
                start.wait()
                for turn in range(60):
                    driven.model.compare_read(driven.tier, blocks[(first + turn) % len(blocks)])
                must(list(driven.tier.verify()) == [], "verify() finds something wrong during reads")

            with quick_switches(), ThreadPoolExecutor(_THREADS) as pool:
                for found in [pool.submit(read, 5 * i) for i in range(_THREADS)]:
                    found.result()

    def test_reads_go_on_during_writes(self) -> None:
        """`read` from another thread gives the block that it asks for while others are written and removed."""
        with self._tier() as driven:
            kept, others = self._flat(4), self._flat(24, namespace=1)
            for block in kept:
                driven.write(block, _payload(block.key, 60))
            if sum(driven.tier.size(block, 60) for block in [*kept, *others[:4]]) > driven.tier.budget:
                raise SkipTest(f"a rule for tiers of more than {driven.tier.budget} bytes")
            done = threading.Event()
            model = TierModel()
            model.held = dict(driven.model.held)

            def read() -> None:
                while not done.is_set():
                    for block in kept:
                        model.compare_read(driven.tier, block)

            with quick_switches(), ThreadPoolExecutor(1) as pool:
                reading = pool.submit(read)
                try:
                    for block in others:
                        while len(driven.model.held) >= len(kept) + 4:
                            driven.remove([list(driven.model.held)[len(kept)]])
                        driven.write(block, _payload(block.key, 60))
                finally:
                    done.set()
                reading.result()
            driven.compare()

    def test_many_calls_in_any_order_agree_with_a_model(self) -> None:
        """Whatever was written, replaced and removed before: after each call, a tier holds what it was given."""
        random = np.random.Generator(np.random.PCG64(1))
        with self._directory() as directory:
            driven = self._opened(directory)
            pool = [*self._flat(12), *self._flat(6, namespace=1)]
            try:
                for turn in range(self.n_blocks):
                    block, kind = pool[random.integers(len(pool))], random.integers(10)
                    if kind < 6:
                        newer = _newer(block, turn)
                        driven.write(newer, _payload(newer.key + newer.recipe, int(random.integers(1, 120))))
                    elif kind < 8:
                        driven.remove([block.key])
                    elif kind == 8:
                        driven.remove([other.key for other in pool if random.integers(3) == 0])
                    elif driven.tier.persistent and turn % 3 == 0:
                        self._reopened(driven, lambda: self.make_tier(directory))
                    driven.compare()
            finally:
                driven.tier.close()

    # --- how ------------------------------------------------------------------------------------------

    @contextmanager
    def _directory(self) -> Iterator[Path]:
        directory = Path(tempfile.mkdtemp(prefix="erllama-test-"))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _opened(self, directory: Path) -> _Driven:
        tier = self.make_tier(directory)
        with promised("open() must make a tier usable"):
            tier.open()
        must(tier.usable is True, "usable is not True after open()")
        driven = _Driven(tier)
        left = [row.block.key for row in tier.rows()]
        if left:  # of another rule: the tier keeps things elsewhere than under its directory
            tier.remove(left)
        return driven

    @contextmanager
    def _tier(self) -> Iterator[_Driven]:
        with self._directory() as directory:
            driven = self._opened(directory)
            try:
                yield driven
            finally:
                with suppress(Exception):
                    driven.tier.open()
                    driven.tier.remove([row.block.key for row in driven.tier.rows()])
                driven.tier.close()

    def _at_rest(self, driven: _Driven, keys: Sequence[bytes]) -> None:
        tier = driven.tier
        must(tier.usable is True, "usable is not True though no call has failed")
        must(tier.shared is False, "shared is not False though no other process uses the tier")
        must(tier.reserved() == 0, f"reserved() counts {tier.reserved()} bytes; no write is under way")
        for key in keys:
            must(tier.in_flight(key) is False, "in_flight() is not False though no other process writes")
        with promised("changes() must give Changes or None"):
            changes = tier.changes()
        if changes is not None:
            self._rightly_told(driven, changes)
        with promised("examine() must give a bool"):
            must(isinstance(tier.examine(), bool), "examine() gives no bool")
        with promised("uses() must give pairs of key and ns since 1970"):
            for key, at in tier.uses():
                must(isinstance(key, bytes) and isinstance(at, int), f"uses() gives {(key, at)!r}")

    def _rightly_told(self, driven: _Driven, changes: Changes) -> None:
        held = driven.model.held
        for row in changes.stored:
            stored = held.get(row.block.key)
            must(stored is not None, f"changes() tells that {name_of(row.block)} is stored, which it is not")
            assert stored is not None
            must(row.block == stored.block, f"changes() tells of another {name_of(row.block)} than is stored")
            must(
                row.n_bytes == driven.tier.size(stored.block, len(stored.payload)),
                f"changes() counts {row.n_bytes} bytes for {name_of(row.block)}",
            )
        for key in changes.removed:
            must(key not in held, f"changes() tells that block {key.hex()[:8]} was removed, which is stored")
        if changes.complete:
            told = {row.block.key for row in changes.stored}
            must(told == set(held), "changes() is complete and does not tell of all blocks")

    def _flat(self, n: int, *, namespace: int = 0) -> list[Block]:
        """Blocks that begin contexts; those of each namespace have the same tokens."""
        return [self._numbered(i, namespace) for i in range(n)]

    def _numbered(self, i: int, namespace: int = 0) -> Block:
        return _block(_NAMESPACES[namespace], _NAMESPACES[namespace], 0, [i, i + 1])

    def _chain(self, n: int, *, repeated: bool = False) -> list[Block]:
        """Blocks of 16 tokens that follow each other."""
        chain: list[Block] = []
        for i in range(n):
            parent = chain[-1].key if chain else _NAMESPACES[0]
            chain.append(
                _block(parent, _NAMESPACES[0], 16 * i, [7] * 16 if repeated else range(16 * i, 16 * i + 16))
            )
        return chain


def _block(parent: bytes, namespace: bytes, start: int, tokens: Sequence[int]) -> Block:
    return Block.following(parent, namespace, start, token_bytes(list(tokens)), SaveReason.COLD)


def _newer(block: Block, version: int) -> Block:
    """Another version of a block: what does not count towards its key differs."""
    return Block.following(
        block.parent,
        block.namespace,
        block.start,
        block.tokens,
        list(SaveReason)[version % 5],
        version.to_bytes(16, "little"),
        block.start + version,
    )


@cache
def _blocks_of_all_keys(most: int) -> tuple[Block, ...]:
    """Blocks whose keys have each first byte and each last byte, as far as `most` allows."""
    found: list[Block] = []
    first, last = set(range(256)), set(range(256))
    for i in range(1_000_000):
        block = _block(_NAMESPACES[0], _NAMESPACES[0], 0, [10_000 + i])
        if block.key[0] in first or block.key[-1] in last:
            found.append(block)
            first.discard(block.key[0])
            last.discard(block.key[-1])
        if len(found) >= most or not (first or last):
            break
    return tuple(found)


def _payload(text: bytes, n_bytes: int) -> bytes:
    """Bytes that differ from those of another text in every part."""
    return np.random.Generator(np.random.PCG64(list(text))).bytes(n_bytes)


def _text(n_bytes: int) -> bytes:
    """What a tier that takes payloads for text would change."""
    return (b" \r\n\0\x1a\xff\xfe'\"\\%s{}\n" * (n_bytes // 16 + 1))[:n_bytes]
