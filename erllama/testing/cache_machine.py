"""Hypothesis state machine that searches for calls after which a cache returns wrong results.

In any order that Hypothesis finds, it saves, looks up, pins matches and prefixes, evicts, restarts, crashes in the
middle of a write, flips bytes, removes and copies files, works as a second process, and changes namespaces. After
every step it checks that:

* a loaded payload is one that was saved for that key, together with the block that was saved with it;
* a hit is as long as the stored blocks allow, and no longer than the tokens agree;
* each tier holds exactly the blocks that were written and not removed: the newest version of each, once, with its
  size; and the cache lists the same blocks;
* no budget is exceeded, by the cache's count, by the rows of the tier, and by the size of the files;
* the blocks of a match are not evicted, and pinned prefixes are found to the token, also after a restart;
* everything that was on disk before a crash is on disk after it, no half-written file remains, and `verify()` finds
  only the damage that the machine did itself;
* no call of a tier fails;
* `check_integrity()` succeeds.

Before that it checks, once, that each custom tier follows the rules of `TierConformance`.

To run it on your own cache:

    class Mine(CacheMachine):
        def make_cache(self, directory):
            return Cache(ram=4000, tiers=[MyTier(directory)], block_size=16)

    TestMine = Mine.TestCase
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import WeakKeyDictionary

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from erllama.cache import (
    Block,
    Cache,
    FileTier,
    Match,
    RamTier,
    SaveReason,
    Tier,
    namespace_key,
    token_bytes,
)
from erllama.cache.blocks.keys import TOKEN_BYTES, common_prefix
from erllama.cache.tiers.tier import SimulatedCrash
from erllama.errors import PinError
from erllama.testing.rules import check_rules
from erllama.testing.tiers.conformance import TierConformance
from erllama.testing.tiers.model import TierModel

# Few distinct tokens and short texts, so that many prefixes are shared.
contexts = st.lists(st.integers(0, 2), min_size=1, max_size=70)
namespaces = st.sampled_from([namespace_key({"model": name}) for name in "ab"])
picks = st.integers(0, 99)
steps = st.sampled_from(["reserved", "written", "published"])


class CacheMachine(RuleBasedStateMachine):
    """State machine for caches. Derive from it, define `make_cache`, and run `YourMachine.TestCase`.

    Attributes:
        can_trim: whether payloads are of memory that can be cut. A longer tail then replaces a shorter one, and
            blocks match in part.
        payload_bytes: size of a block's payload.
        shared: whether several caches may use one directory at once. False for a tier that does not report the
            changes of other processes (`Tier.changes`).
        n_blocks: blocks of the longer rules of `TierConformance`.
    """

    can_trim = True
    payload_bytes = 96
    shared = True
    n_blocks = TierConformance.n_blocks

    matches = Bundle("matches")

    def make_cache(self, directory: Path) -> Cache:
        """Return a cache that stores all its files under `directory`. Called for every start."""
        raise NotImplementedError("derive from CacheMachine and define make_cache(directory)")

    # --- starting and stopping ------------------------------------------------------------------------------------

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        # Within a draw, because Hypothesis does not count that time against the deadline of the example.
        data.draw(st.builds(self._check_tiers))
        self.directory = Path(tempfile.mkdtemp(prefix="erllama-test-"))
        self.copies = Path(tempfile.mkdtemp(prefix="erllama-test-"))
        self.versions: dict[bytes, dict[bytes, Block]] = {}  # of every saved block, by key and recipe
        self.pinned: list[Match] = []
        self.pins: dict[str, tuple[list[int], bytes]] = {}  # pinned prefixes that must be whole, by name
        self.tampered = False  # files were changed since the last gc
        self.n_saves = 0
        self.contexts: list[tuple[list[int], bytes]] = []  # saved so far
        self.step = 0
        self.tier_models: dict[tuple[str, str, int], TierModel] = {}  # by name and location of a tier, and number
        self.process_models: WeakKeyDictionary[Tier, TierModel] = (
            WeakKeyDictionary()
        )  # of tiers that do not persist
        self.cache = self._new_cache()

    def _check_tiers(self) -> None:
        """Check the rules for each custom tier, once for each type."""
        with TemporaryDirectory(prefix="erllama-test-") as directory, self.make_cache(Path(directory)) as cache:
            tiers = list(cache._tier_set)
        for index, tier in enumerate(tiers):
            kind = type(tier)
            if kind in (FileTier, RamTier) or kind in _checked_types.setdefault(type(self), set()):
                continue
            check_rules(_MachineRules(type(self), index))
            _checked_types[type(self)].add(kind)

    def _new_cache(self) -> Cache:
        cache = self.make_cache(self.directory / "cache")
        self._observe(cache)
        self.failures_before: dict[str, float] = {}  # failures that changed files caused
        return cache

    def _observe(self, cache: Cache) -> None:
        for model, tier in self._models_and_tiers(cache):
            model.observe(tier)

    def _models_and_tiers(self, cache: Cache) -> list[tuple[TierModel, Tier]]:
        """Return the tiers of a cache with their models. Persistent tiers share theirs across caches."""
        found: list[tuple[TierModel, Tier]] = []
        numbers: Counter[tuple[str, str]] = Counter()  # of tiers with the same name and location
        for tier in cache._tier_set:
            if tier.persistent:
                place = (tier.name, tier.location)
                model = self.tier_models.setdefault((*place, numbers[place]), TierModel())
                numbers[place] += 1
            else:
                model = self.process_models.setdefault(tier, TierModel())
            found.append((model, tier))
        return found

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            try:
                self.compare_tiers()
            finally:
                self.cache.close()
            shutil.rmtree(self.directory)
            shutil.rmtree(self.copies)

    @rule()
    def restart(self) -> None:
        """Close and start again. Persistent blocks must still be there."""
        self._release_all()
        self.cache.flush()
        before = self._persistent_keys()
        self.cache.close()
        self._start_and_compare(before)

    @rule(ids=contexts, namespace=namespaces, step=steps)
    def crash(self, ids: list[int], namespace: bytes, step: str) -> None:
        """Crash in the middle of a write. Earlier blocks must still be there, and no half-written file."""
        self._release_all()
        self.cache.flush()
        before = self._persistent_keys()
        evictions = self._evictions()
        crashed = threading.Event()

        def crash_at_step(name: str) -> None:
            if name == step:
                crashed.set()
                raise SimulatedCrash

        for tier in self._file_tiers():
            tier._step = crash_at_step  # type: ignore[method-assign]
        self._save(self.cache, ids, namespace)
        while not crashed.is_set() and not self.cache.flush(0.01):
            pass
        evicted = self._evictions() > evictions
        self.cache.abandon()
        superseded = {key for key in before if evicted or self._superseded(key)}
        self._start_and_compare(before - superseded)

    def _start_and_compare(self, before: set[bytes]) -> None:
        if not any(not tier.read_only for tier in self._file_tiers()):
            self.pins = {}  # they were in RAM
        self.cache = self._new_cache()
        for model, tier in self._models_and_tiers(self.cache):
            if not tier.persistent:
                model.reset_from(tier)
        if not self.tampered:
            self.compare_tiers()
            lost = before - self._persistent_keys()
            assert not lost, f"stored blocks are lost: {[self.versions[key] for key in lost]}"
            assert self.cache.verify() == [], "verify() reports a problem after a start"
        assert not list(self.directory.rglob("partial/*")), "a start leaves half-written files"

    @precondition(lambda self: self.shared)
    @rule(ids=contexts, namespace=namespaces, lookup=contexts)
    def another_process(self, ids: list[int], namespace: bytes, lookup: list[int]) -> None:
        """Use a second cache on the same directory, as another process would."""
        with self.make_cache(self.directory / "cache") as other:
            self._observe(other)
            self._save(other, ids, namespace)
            self._look_up(other, lookup, namespace)
            if any(not tier.read_only for tier in self._file_tiers()):
                self._pin_prefix(other, ids, namespace, "another's", None)

    @precondition(lambda self: self._saves_only_to_files())
    @rule(ids=contexts, namespace=namespaces, lookup=contexts)
    def process_of_a_model(self, ids: list[int], namespace: bytes, lookup: list[int]) -> None:
        """Use the cache that a model in a process of its own opens."""
        with Cache.of_spec(self.cache.share_with_process()) as other:
            self._observe(other)
            self._save(other, ids, namespace)
            self._look_up(other, lookup, namespace)

    def _saves_only_to_files(self) -> bool:
        """Return whether `share_with_process` adds no directory and the other process has no RAM tier."""
        tiers = list(self.cache._tier_set)
        in_memory = {tier.name for tier in tiers} & {"ram", "ram_file"}
        return in_memory != {"ram"} and all(type(tier) in (FileTier, RamTier) for tier in tiers)

    # --- use -------------------------------------------------------------------------------------

    @rule(ids=contexts, namespace=namespaces, replace=st.booleans())
    def save(self, ids: list[int], namespace: bytes, replace: bool) -> None:
        self._save(self.cache, ids, namespace, replace)

    @precondition(lambda self: self.contexts)
    @rule(pick=picks)
    def replace(self, pick: int) -> None:
        """Save a context again. The newer version must replace the old one."""
        self._save(self.cache, *self.contexts[pick % len(self.contexts)], replace=True)

    @rule(ids=contexts, namespace=namespaces)
    def look_up(self, ids: list[int], namespace: bytes) -> None:
        self._look_up(self.cache, ids, namespace)

    @rule(target=matches, ids=contexts, namespace=namespaces)
    def pin(self, ids: list[int], namespace: bytes) -> Match:
        match = self.cache.lookup(namespace, np.array(ids), whole=not self.can_trim)
        self.pinned.append(match)
        return match

    @rule(match=consumes(matches))
    def unpin(self, match: Match) -> None:
        match.release()
        if match in self.pinned:
            self.pinned.remove(match)

    @precondition(lambda self: self.contexts)
    @rule(pick=picks, name=st.sampled_from("xyz"))
    def pin_prefix(self, pick: int, name: str) -> None:
        """Pin a context that was saved. It may have been evicted since, or exceed what pins may protect."""
        ids, namespace = self.contexts[pick % len(self.contexts)]
        self._pin_prefix(self.cache, ids, namespace, name, None)

    @rule(ids=contexts, namespace=namespaces)
    def pin_new_prefix(self, ids: list[int], namespace: bytes) -> None:
        self._save(self.cache, ids, namespace)
        self._pin_prefix(self.cache, ids, namespace, "new", None)

    @precondition(lambda self: self.pins)
    @rule(pick=picks)
    def expire(self, pick: int) -> None:
        """Replace a pin by one that ends at once."""
        name = sorted(self.pins)[pick % len(self.pins)]
        self._pin_prefix(self.cache, *self.pins[name], name, time.time())

    @precondition(lambda self: self.pins)
    @rule(pick=picks)
    def unpin_prefix(self, pick: int) -> None:
        name = sorted(self.pins)[pick % len(self.pins)]
        del self.pins[name]
        assert self.cache.unpin(name)
        assert not self.cache.unpin(name)

    @rule(n_bytes=st.integers(0, 3000), data=st.data())
    def evict(self, n_bytes: int, data: st.DataObject) -> None:
        tier = data.draw(st.sampled_from(self.cache.tier_names))
        self.cache.flush()
        self.cache.rows()  # reads the changes of other caches
        n_before = self.cache.counters().get(f"bytes_{tier}", 0)
        freed = self.cache.evict_bytes(n_bytes, (tier,))
        assert freed == n_before - self.cache.counters().get(f"bytes_{tier}", 0)
        kept = self.pinned or self.cache.pins()
        assert freed >= min(n_bytes, n_before) or kept, "fewer bytes were freed than possible"

    @rule()
    def evict_all(self) -> None:
        """Evict all but the pinned blocks."""
        self.cache.evict_bytes(10**9, self.cache.tier_names)

    @rule()
    def flush(self) -> None:
        assert self.cache.flush()
        if not self.tampered:
            assert self.cache.verify() == []

    @rule()
    def gc(self) -> None:
        if self.tampered:
            self._release_all()  # pinned blocks may be lost to changed files
        self.cache.gc()
        if self.tampered:
            self.cache.flush()
            for model, tier in self._models_and_tiers(self.cache):
                model.reset_from(tier)
            self.failures_before = self._failures()
        self.tampered = False

    # --- changes to the files ---------------------------------------------------------------

    @precondition(lambda self: self._file_tiers())
    @rule(pick=picks, byte=st.integers(0, 2**16), bit=st.integers(0, 7))
    def flip(self, pick: int, byte: int, bit: int) -> None:
        for path in self._tamper(pick):
            content = bytearray(path.read_bytes())
            if content:
                content[byte % len(content)] ^= 1 << bit
                path.write_bytes(content)
                _backdate(path)

    @precondition(lambda self: self._file_tiers())
    @rule(pick=picks, keep=st.integers(0, 400))
    def truncate(self, pick: int, keep: int) -> None:
        for path in self._tamper(pick):
            path.write_bytes(path.read_bytes()[:keep])
            _backdate(path)

    @precondition(lambda self: self._file_tiers())
    @rule(pick=picks)
    def remove(self, pick: int) -> None:
        for path in self._tamper(pick):
            path.unlink()

    @precondition(lambda self: self._file_tiers())
    @rule(pick=picks)
    def copy_out(self, pick: int) -> None:
        for path in self._picked(self.files(), pick):
            shutil.copy(path, self.copies / path.name)

    @precondition(lambda self: self._file_tiers())
    @rule(pick=picks, which=picks, rightly_named=st.booleans())
    def copy_in(self, pick: int, which: int, rightly_named: bool) -> None:
        """Copy a file in, as from another machine. The next gc must adopt it within the budget."""
        for target in self._tamper(pick):
            for copy in self._picked(sorted(self.copies.iterdir()), which):
                path = target.parent / (copy.name if rightly_named else target.name)
                shutil.copy(copy, path)
                _backdate(path)
        self.gc()

    def files(self) -> list[Path]:
        """Return the files of stored blocks."""
        self.cache.flush()  # so that each run of an example finds the same files
        return sorted(self.directory.rglob("blocks/*.kvc"))

    def _tamper(self, pick: int) -> list[Path]:
        """Return one of the files, if there are any, and note that it is about to be changed."""
        found = self._picked(self.files(), pick)
        if found:
            self.tampered, self.pins = True, {}  # a pinned block may be among them
        return found

    def _picked(self, paths: list[Path], pick: int) -> list[Path]:
        return [paths[pick % len(paths)]] if paths else []

    # --- invariants -----------------------------------------------------------------------------

    @invariant()
    def integrity_holds(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            rows = self.cache.rows()
            assert len({(row.tier, row.key) for row in rows}) == len(rows), "a tier has a block twice"

    @invariant()
    def tiers_match_models(self) -> None:
        """Compare at every third step, so that writes are in progress during the others."""
        if hasattr(self, "cache"):
            self.step += 1
            if self.step % 3 == 0:
                self.compare_tiers()

    @rule()
    def compare_tiers(self) -> None:
        if self.tampered:
            return
        assert self.cache.flush()
        listed = {(row.tier, row.key): row.n_bytes for row in self.cache.rows()}
        assert self.cache.flush()
        stored: dict[tuple[str, bytes], int] = {}
        for model, tier in self._models_and_tiers(self.cache):
            model.compare(tier)
            rows = list(tier.rows())
            total = sum(row.n_bytes for row in rows)
            assert total <= tier.budget, f"{tier.location} has {total} bytes by rows(); its budget is {tier.budget}"
            stored |= {(tier.name, row.block.key): row.n_bytes for row in rows}
        assert listed == stored, "the cache lists other blocks or sizes than rows() of its tiers"

    @invariant()
    def no_call_fails(self) -> None:
        if hasattr(self, "cache") and not self.tampered:
            failed = {name: n - self.failures_before.get(name, 0) for name, n in self._failures().items()}
            assert not any(failed.values()), f"calls of a tier failed; see the log of 'erllama.cache': {failed}"

    @invariant()
    def budgets_hold(self) -> None:
        if not hasattr(self, "cache"):
            return
        for tier in self.cache.tiers():
            assert tier.n_bytes <= tier.budget, f"{tier.location} is over its budget"
        if not self.tampered:
            for files in self._file_tiers():
                there = [p for part in ("blocks", "partial") for p in (files.root / part).glob("*.kvc")]
                assert sum(map(_size, there)) <= files.budget, f"the files of {files.root} are over its budget"

    @invariant()
    def pinned_blocks_stay(self) -> None:
        if not self.tampered:
            for match in getattr(self, "pinned", []):
                for block in match.blocks:
                    assert self.cache.contains(block.key) or self._superseded(block.key), "a pinned block is gone"

    @invariant()
    def pinned_prefixes_stay(self) -> None:
        if not hasattr(self, "cache") or not self.pins:
            return
        found = {pin.name: pin for pin in self.cache.pins()}
        for name, (ids, namespace) in self.pins.items():
            assert name in found, "a pin is gone"
            assert found[name].complete, "a pin has lost a block"
            with self.cache.lookup(namespace, np.array(ids), whole=not self.can_trim) as match:
                assert match.n_tokens == len(ids), "a pinned prefix is not found to the token"

    @invariant()
    def pins_are_within_their_bound(self) -> None:
        if hasattr(self, "cache"):
            budgets: Counter[str] = Counter()
            for tier in self.cache.tiers():
                budgets[tier.tier] += tier.budget
            assert self.cache.counters()["bytes_pinned"] <= sum(budgets.values()) // 2

    # --- helpers -------------------------------------------------------------------------------------

    def _save(self, cache: Cache, ids: list[int], namespace: bytes, replace: bool = False) -> None:
        self.contexts.append((ids, namespace))
        for block in self._blocks(ids, namespace, cache.block_size):
            self.versions.setdefault(block.key, {})[block.recipe] = block
            cache.save(block, self._payload(block), replace=replace, trimmable=self.can_trim)

    def _pin_prefix(self, cache: Cache, ids: list[int], namespace: bytes, name: str, expires: float | None) -> None:
        """Pin a prefix. Where that is refused, a pin of the name stays as it was."""
        options = {"name": name, "model": "m", "model_key": namespace, "expires": expires}
        try:
            pin = cache.pin_prefix(namespace, np.array(ids), whole=not self.can_trim, **options)  # type: ignore[arg-type]
        except PinError as error:
            if expires is not None and "expired" in str(error):
                self.pins.pop(name, None)
            return
        assert pin.complete, "a pin is incomplete from the start"
        if not self.tampered:
            self.pins[name] = (ids, namespace)

    def _blocks(self, ids: list[int], namespace: bytes, size: int) -> list[Block]:
        """Return the chain of blocks of a context, with a recipe that is different for every save."""
        self.n_saves += 1
        recipe = self.n_saves.to_bytes(16, "little")
        return Block.chain(token_bytes(np.array(ids)), namespace, size, SaveReason.COLD, recipe)

    def _payload(self, block: Block) -> bytes:
        text = block.key + block.recipe
        return (text * (self.payload_bytes // len(text) + 1))[: self.payload_bytes]

    def _look_up(self, cache: Cache, ids: list[int], namespace: bytes) -> None:
        cache.rows()  # reads the changes of other caches, so that the lookup does not
        before = self._stored_keys(cache)
        with cache.lookup(namespace, np.array(ids), whole=not self.can_trim) as match:
            if before == self._stored_keys(cache):
                assert match.n_tokens == self._longest_prefix(before, namespace, token_bytes(np.array(ids)))
            found = b"".join(block.tokens for block in match.blocks)
            assert common_prefix(found, token_bytes(np.array(ids))) >= match.n_tokens, (
                "the blocks have other tokens than the lookup"
            )
            together = list(chain.from_iterable(cache.load_batches(match.blocks)))
            alone = [(block, cache.load(block)) for block in match.blocks]
            for block, loaded in [*zip(match.blocks, together, strict=False), *alone]:
                if loaded is not None:
                    assert loaded.block.key == block.key, "another block, or in another order"
                    assert loaded.block.recipe in self.versions[block.key], "a version that was never saved"
                    assert bytes(loaded.payload) == self._payload(loaded.block), "the payload of another block"

    def _stored_keys(self, cache: Cache) -> set[bytes]:
        return {key for key in self.versions if cache.contains(key)}

    def _longest_prefix(self, present: set[bytes], namespace: bytes, raw: bytes) -> int:
        """Return the length of the longest prefix in stored blocks, found by trying all of them."""
        best, parents = 0, {namespace: 0}
        known = [next(iter(self.versions[key].values())) for key in present]
        while parents:
            parent, at = parents.popitem()
            for block in known:
                if block.parent != parent:
                    continue
                shared = common_prefix(block.tokens, raw[at * TOKEN_BYTES :])
                if shared == block.n_tokens:
                    parents[block.key] = block.end
                elif not self.can_trim:
                    continue
                best = max(best, at + shared)
        return best

    def _superseded(self, key: bytes) -> bool:
        """Return whether a longer block with the same parent and these tokens was ever saved."""
        block = next(iter(self.versions[key].values()))
        return any(
            other.parent == block.parent and other.tokens.startswith(block.tokens) and other.key != key
            for versions in self.versions.values()
            for other in versions.values()
        )

    def _persistent_keys(self) -> set[bytes]:
        persistent = {tier.name for tier in self.cache._tier_set if tier.persistent}
        return {row.key for row in self.cache.rows() if row.tier in persistent}

    def _failures(self) -> dict[str, float]:
        counted = self.cache.counters()
        return {name: counted.get(name, 0) for name in ("disk_errors", "faults", "corrupt_files")}

    def _evictions(self) -> float:
        return sum(n for name, n in self.cache.counters().items() if name.startswith("evictions_"))

    def _file_tiers(self) -> list[FileTier]:
        return [tier for tier in self.cache._tier_set if isinstance(tier, FileTier)]

    def _release_all(self) -> None:
        for match in self.pinned:
            match.release()
        self.pinned = []


class _MachineRules(TierConformance):
    """The rules for one tier of a machine's cache."""

    def __init__(self, machine: type[CacheMachine], index: int) -> None:
        self._machine, self._index = machine(), index
        self.n_blocks, self.shared = machine.n_blocks, machine.shared

    def make_tier(self, directory: Path) -> Tier:
        with self._machine.make_cache(directory) as cache:
            return list(cache._tier_set)[self._index]


# Types of tiers that follow the rules, by machine.
_checked_types: WeakKeyDictionary[type[CacheMachine], set[type[Tier]]] = WeakKeyDictionary()


def _backdate(path: Path) -> None:
    """Set the mtime a minute back: a cache waits with files that changed just now, which may still be copied."""
    then = time.time() - 60
    os.utime(path, (then, then))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
