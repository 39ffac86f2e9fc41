"""Base of the rules for tiers: opening a tier to test, checked calls, and blocks to store.

`TierConformance` and `LifecycleRules` derive from `TierRules`. `CheckedTier` calls a tier as a cache calls it and
compares it with a `TierModel`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from unittest import SkipTest

import numpy as np

from erllama.cache import Block, Changes, SaveReason, Tier, namespace_key, token_bytes
from erllama.testing.rules import expect_success, require
from erllama.testing.tiers.model import TierModel, describe

NAMESPACES = [namespace_key({"model": f"conformance {i}"}) for i in range(3)]


class CheckedTier:
    """A tier that is called as a cache calls it, and the model of what it must hold."""

    def __init__(self, tier: Tier) -> None:
        self.tier, self.model = tier, TierModel()

    def write(self, block: Block, payload: bytes | bytearray) -> bool:
        """Make room, reserve it and write. Return False if the block does not fit in the budget."""
        tier = self.tier
        n_bytes = tier.size(block, len(payload))
        if n_bytes > tier.budget:
            return False
        self.make_room(block, n_bytes)
        with expect_success("release_stale_reservations() must not fail in a sound tier"):
            tier.release_stale_reservations()
        with (
            expect_success("exclusive() must return a context manager, and reserve() a bool"),
            tier.exclusive(),
        ):
            require(
                tier.reserve(block, n_bytes) is True,
                f"reserve() refuses {describe(block)}, which no other process writes",
            )
            claimed = tier.reserved()
        require(claimed in (0, n_bytes), f"reserved() counts {claimed} bytes after {n_bytes} were reserved")
        before = bytes(payload)
        with expect_success(f"write() must store {describe(block)} with a payload of {len(payload)} bytes"):
            tier.write(block, memoryview(payload))
        require(bytes(payload) == before, f"write() of {describe(block)} changed the caller's payload")
        require(tier.reserved() == 0, f"reserved() counts {tier.reserved()} bytes after write() has stored them")
        require(tier.usable is True, "usable is not True after a write() that succeeded")
        self.model.record_write(block, before)
        return True

    def make_room(self, block: Block, n_bytes: int) -> None:
        contents = self.model.stored
        sizes = {key: self.tier.size(stored.block, len(stored.payload)) for key, stored in contents.items()}
        left = self.tier.budget - sum(sizes.values()) - n_bytes
        while left < 0:
            parents = {stored.block.parent for stored in contents.values()} | {block.parent, block.key}
            victim = next((key for key in contents if key not in parents), None)
            if victim is None:
                raise SkipTest(f"a rule for tiers of more than {self.tier.budget} bytes")
            left += sizes[victim]
            self.remove([victim])

    def remove(self, keys: Sequence[bytes]) -> None:
        with expect_success(f"remove() must remove {len(keys)} blocks, and ignore those that are not stored"):
            self.tier.remove(keys)
        self.model.record_removal(keys)

    def compare(self) -> None:
        self.model.compare(self.tier)

    def require_missing(self, block: Block, why: str) -> None:
        """Check that `read` raises FileNotFoundError."""
        try:
            self.tier.read(block)
        except FileNotFoundError:
            return
        except Exception as error:
            raise AssertionError(
                f"read() of a block {why} must raise FileNotFoundError; it raised {type(error).__name__}: {error}"
            ) from error
        raise AssertionError(f"read() of a block {why} must raise FileNotFoundError; it returned")


class TierRules:
    """Base class of the rules for tiers.

    Attributes:
        n_blocks: number of blocks in the longer rules. Lower it if writes are slow; the rules then find less.
        shared: whether several instances may use one directory at once. False for a tier that does not report
            the changes of other instances (`Tier.changes`).
    """

    n_blocks = 520
    shared = False

    def make_tier(self, directory: Path) -> Tier:
        """Return a tier that stores everything under `directory`, with what an earlier one stored there."""
        raise NotImplementedError("derive from TierConformance and define make_tier(directory)")

    # --- helpers ------------------------------------------------------------------------------------------

    @contextmanager
    def _temporary_directory(self) -> Iterator[Path]:
        directory = Path(tempfile.mkdtemp(prefix="erllama-test-"))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _open(self, directory: Path) -> CheckedTier:
        tier = self.make_tier(directory)
        with expect_success("open() must make a tier usable"):
            tier.open()
        require(tier.usable is True, "usable is not True after open()")
        checked = CheckedTier(tier)
        left = [row.block.key for row in tier.rows()]
        if left:  # of another rule: this tier does not store everything under its directory
            tier.remove(left)
        return checked

    @contextmanager
    def _open_tier(self) -> Iterator[CheckedTier]:
        with self._temporary_directory() as directory:
            checked = self._open(directory)
            try:
                yield checked
            finally:
                with suppress(Exception):
                    checked.tier.open()
                    checked.tier.remove([row.block.key for row in checked.tier.rows()])
                checked.tier.close()

    def _check_idle(self, checked: CheckedTier, keys: Sequence[bytes]) -> None:
        tier = checked.tier
        require(tier.usable is True, "usable is not True, though no call has failed")
        require(tier.shared is False, "shared is not False, though no other process uses the tier")
        require(tier.reserved() == 0, f"reserved() counts {tier.reserved()} bytes, though no write is in progress")
        for key in keys:
            require(tier.in_flight(key) is False, "in_flight() is not False, though no other process writes")
        with expect_success("changes() must return Changes or None"):
            changes = tier.changes()
        if changes is not None:
            self._check_changes(checked, changes)
        with expect_success("examine() must return a bool"):
            require(isinstance(tier.examine(), bool), "examine() does not return a bool")
        with expect_success("uses() must return pairs of key and ns since 1970"):
            for key, at in tier.uses():
                require(isinstance(key, bytes) and isinstance(at, int), f"uses() returns {(key, at)!r}")

    def _check_changes(self, checked: CheckedTier, changes: Changes) -> None:
        contents = checked.model.stored
        for row in changes.stored:
            stored = contents.get(row.block.key)
            require(stored is not None, f"changes() reports {describe(row.block)} as stored, which it is not")
            assert stored is not None
            require(
                row.block == stored.block,
                f"changes() reports other fields of {describe(row.block)}",
            )
            require(
                row.n_bytes == checked.tier.size(stored.block, len(stored.payload)),
                f"changes() counts {row.n_bytes} bytes for {describe(row.block)}",
            )
        for key in changes.removed:
            require(key not in contents, f"changes() reports block {key.hex()[:8]} as removed, which is stored")
        if changes.complete:
            reported = {row.block.key for row in changes.stored}
            require(reported == set(contents), "changes() is complete and does not list all blocks")

    def _first_blocks(self, n: int, *, namespace: int = 0) -> list[Block]:
        """Return blocks at position 0. The blocks of each namespace have the same tokens."""
        return [self._first_block(i, namespace) for i in range(n)]

    def _first_block(self, i: int, namespace: int = 0) -> Block:
        return make_block(NAMESPACES[namespace], NAMESPACES[namespace], 0, [i, i + 1])

    def _chain(self, n: int, *, repeated: bool = False) -> list[Block]:
        """Return blocks of 16 tokens that follow each other."""
        chain: list[Block] = []
        for i in range(n):
            parent = chain[-1].key if chain else NAMESPACES[0]
            chain.append(
                make_block(parent, NAMESPACES[0], 16 * i, [7] * 16 if repeated else range(16 * i, 16 * i + 16))
            )
        return chain


def make_block(parent: bytes, namespace: bytes, start: int, tokens: Sequence[int]) -> Block:
    return Block.following(parent, namespace, start, token_bytes(list(tokens)), SaveReason.COLD)


def newer_version(block: Block, version: int) -> Block:
    """Return another version of a block: the fields that its key does not cover differ."""
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
def blocks_of_all_keys(max_blocks: int) -> tuple[Block, ...]:
    """Return blocks whose keys have every first byte and every last byte, at most `max_blocks` of them."""
    found: list[Block] = []
    first, last = set(range(256)), set(range(256))
    for i in range(1_000_000):
        block = make_block(NAMESPACES[0], NAMESPACES[0], 0, [10_000 + i])
        if block.key[0] in first or block.key[-1] in last:
            found.append(block)
            first.discard(block.key[0])
            last.discard(block.key[-1])
        if len(found) >= max_blocks or not (first or last):
            break
    return tuple(found)


def payload_bytes(text: bytes, n_bytes: int) -> bytes:
    """Return random bytes that depend on `text`."""
    return np.random.Generator(np.random.PCG64(list(text))).bytes(n_bytes)


def text_like_bytes(n_bytes: int) -> bytes:
    """Return bytes that a tier would change if it treated payloads as text."""
    return (b" \r\n\0\x1a\xff\xfe'\"\\%s{}\n" * (n_bytes // 16 + 1))[:n_bytes]
