"""Maintenance of one cache directory: lists, verifies, repairs and removes its blocks.

Works on the directory itself, without a `Cache`, a budget or a model. Other processes may use the directory
meanwhile: `CacheFiles` follows their protocol, with transactions short enough not to delay them. The command
`erllama cache` calls it.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from erllama.cache.blocks.block import Block
from erllama.cache.blocks.encryption import ContentKey
from erllama.cache.blocks.pins import Pin, PinRecord
from erllama.cache.catalog.eviction_order import LeafLRU
from erllama.cache.tiers.directory import is_cache
from erllama.cache.tiers.file_names import INDEX_NAME
from erllama.cache.tiers.key_state import KeyState
from erllama.cache.tiers.read_only import create_file_tier
from erllama.cache.tiers.tier import Problem, TierRow
from erllama.errors import CacheError

NO_BUDGET = 2**62  # each cache that uses a directory sets its own budget
_BATCH = 500  # blocks removed in one transaction: a few hundredths of a second on a local disk


class ContextSummary(NamedTuple):
    """One stored context, identified by its last block. A block that contexts share counts for each of them.

    Attributes:
        key, namespace: those of its last block.
        n_tokens, n_blocks, n_bytes: totals from its first token on, as far as stored.
        complete: whether all of its blocks are stored, so that lookups find it.
        last_used: in ns since 1970.
    """

    key: bytes
    namespace: bytes
    n_tokens: int
    n_blocks: int
    n_bytes: int
    complete: bool
    last_used: int


class NamespaceSummary(NamedTuple):
    """The blocks that one model, with its options and a salt, can use. Each counts once."""

    key: bytes
    n_contexts: int
    n_blocks: int
    n_tokens: int
    n_bytes: int
    last_used: int


class BlockTotals(NamedTuple):
    """Blocks and bytes, such as those that were removed."""

    n_blocks: int
    n_bytes: int


class GcResult(NamedTuple):
    """Result of `gc`.

    Attributes:
        adopted: files that the index lacked.
        forgotten: rows of the index without a file.
        leftovers: files of ended processes that were removed.
        removed: blocks that were removed.
    """

    adopted: int
    forgotten: int
    leftovers: int
    removed: BlockTotals


class CacheFiles:
    """One open cache directory. Close it, or use it in a `with`.

    Args:
        root: the directory; it must exist.
        in_memory: whether it is on a tmpfs, where files need not be made durable.
        key_file: file of the keys that encrypt the directory; None for a directory that is not encrypted.

    Raises:
        CacheError: there is no cache, or it cannot be used. The message says why.
        CacheKeyError: the key is missing or wrong.
    """

    def __init__(self, root: Path, *, in_memory: bool = False, key_file: Path | None = None) -> None:
        if not is_cache(root):
            raise CacheError(f"{root} holds no cache; use the directory of one")
        self.root = root
        self._tier = create_file_tier(
            root, NO_BUDGET, name="ram_file" if in_memory else "disk", watch=False, key_file=key_file
        )
        try:
            # Before `open`, which removes the files of ended processes.
            self._partials = set() if self._tier.read_only else _names_in(root / "partial")
            self._tier.open()
        except (OSError, sqlite3.Error) as error:
            raise CacheError(f"{root} cannot be used: {error}") from error
        # The first call returns the rows as of before `open`, the next ones those that `open` adopted, too.
        self._tier.rows()
        self.n_quarantined = self._tier.damaged  # files that `open` moved to damaged/

    def close(self) -> None:
        """Close the directory. Idempotent."""
        self._tier.close()

    def __enter__(self) -> CacheFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- listing --------------------------------------------------------------------------

    @property
    def tier(self) -> str:
        """The name of the tier that uses such a directory."""
        return self._tier.name

    @property
    def read_only(self) -> bool:
        """Whether the directory can only be read. Methods that change it then raise CacheError."""
        return self._tier.read_only

    def _require_writable(self) -> None:
        if self.read_only:
            raise CacheError(f"{self.root} is read-only and cannot be changed; use a process that may write to it")

    @property
    def in_use(self) -> bool:
        """Whether another process has the directory open."""
        return self._tier.shared

    def rows(self) -> list[TierRow]:
        """Return every stored block, parents first."""
        return sorted(self._tier.rows(), key=lambda row: row.block.start)

    def contexts(self) -> list[ContextSummary]:
        """Return the stored contexts that no stored context continues, the latest used first."""
        rows = {row.block.key: row for row in self.rows()}
        parents = {row.block.parent for row in rows.values()}
        found = []
        for key, row in rows.items():
            if key in parents:
                continue
            path = [row]
            while (above := rows.get(path[-1].block.parent)) is not None:
                path.append(above)
            found.append(
                ContextSummary(
                    key,
                    row.block.namespace,
                    row.block.end,
                    len(path),
                    sum(each.n_bytes for each in path),
                    path[-1].block.parent == row.block.namespace,
                    row.last_used,
                )
            )
        return sorted(found, key=lambda context: context.last_used, reverse=True)

    def namespaces(self) -> list[NamespaceSummary]:
        """Return the namespaces of stored blocks, the latest used first."""
        rows = self.rows()
        parents = {row.block.parent for row in rows}
        found: dict[bytes, NamespaceSummary] = {}
        for row in rows:
            key, leaf = row.block.namespace, row.block.key not in parents
            before = found.get(key, NamespaceSummary(key, 0, 0, 0, 0, 0))
            found[key] = NamespaceSummary(
                key,
                before.n_contexts + leaf,
                before.n_blocks + 1,
                before.n_tokens + row.block.n_tokens,
                before.n_bytes + row.n_bytes,
                max(before.last_used, row.last_used),
            )
        return sorted(found.values(), key=lambda namespace: namespace.last_used, reverse=True)

    # --- pins -----------------------------------------------------------------------------

    def pins(self) -> list[Pin]:
        """Return the pins that have not expired, the oldest first."""
        sizes = {row.block.key: row.n_bytes for row in self.rows()}
        return [pin.describe(sizes, sizes) for pin in sorted(self._pin_records(), key=lambda pin: pin.created)]

    def pinned_keys(self) -> frozenset[bytes]:
        """Return the keys of the blocks that pins protect, stored or not."""
        return frozenset[bytes]().union(*(pin.keys for pin in self._pin_records()))

    def pinned(self) -> BlockTotals:
        """Return how many stored blocks and bytes pins protect. Each block counts once."""
        keys = self.pinned_keys()
        sizes = [row.n_bytes for row in self.rows() if row.block.key in keys]
        return BlockTotals(len(sizes), sum(sizes))

    def unpin(self, name: str) -> bool:
        """Remove a pin, so that its blocks may be removed. Return False if no pin has this name."""
        self._require_writable()
        return self._tier.remove_pin(name)

    def _pin_records(self) -> list[PinRecord]:
        now = time.time()
        return [pin for pin in self._tier.pins() if not pin.expired(now)]

    # --- verifying and repairing ----------------------------------------------------------

    def verify(
        self, *, repair: bool = False, on_read: Callable[[float], object] = lambda done: None
    ) -> list[Problem]:
        """Read every file, and return the problems.

        Args:
            repair: move damaged files to damaged/, adopt unlisted ones, and remove leftovers of ended processes.
            on_read: called with the fraction read.
        """
        if repair:
            self._require_writable()
        n_bytes = max(sum(row.n_bytes for row in self.rows()), 1)
        done = 0

        def read(n: int) -> None:
            nonlocal done
            done += n
            on_read(min(done / n_bytes, 1.0))

        problems = list(self._tier.verify(read))
        if repair and problems:
            wrong = {problem.location for problem in problems}
            for row in self.rows():
                if self._tier.location_of(row.block) in wrong:
                    self._tier.quarantine(row.block)
            self._tier.repair()
        return problems

    def gc(self, budget: int | None = None) -> GcResult:
        """Make the index fit the files, remove unreachable blocks, and evict to `budget`; None for no limit."""
        self._require_writable()
        before = {row.block.key for row in self.rows()}
        self._tier.repair()
        rows = self.rows()
        after, pinned = {row.block.key for row in rows}, self.pinned_keys()
        removed = self._remove([row for row in _unreachable_rows(rows) if row.block.key not in pinned])
        if budget is not None:
            removed = _sum(removed, self.shrink(budget))
        left = self._partials - _names_in(self.root / "partial")
        return GcResult(len(after - before), len(before - after), len(left), removed)

    # --- removing -------------------------------------------------------------------------

    def evict(
        self, namespaces: Iterable[bytes] | None = None, *, used_before: int | None = None, pinned: bool = False
    ) -> BlockTotals:
        """Remove blocks of some namespaces that were not used since a time; by default all blocks.

        Args:
            namespaces: keys of namespaces; None for all.
            used_before: in ns since 1970. A block stays as long as one of its successors does.
            pinned: remove pinned blocks, too.
        """
        rows = self.rows()
        among = None if namespaces is None else set(namespaces)
        spared = frozenset[bytes]() if pinned else self.pinned_keys()
        victims = {
            row.block.key: row
            for row in rows
            if (among is None or row.block.namespace in among) and row.block.key not in spared
        }
        if used_before is not None:
            kept: set[bytes] = set()
            for row in reversed(rows):  # successors of a block before the block
                if row.last_used >= used_before or row.block.key in kept:
                    kept |= {row.block.key, row.block.parent}
            victims = {key: row for key, row in victims.items() if key not in kept}
        return self._remove(list(victims.values()))

    def shrink(self, n_bytes: int) -> BlockTotals:
        """Remove the least recently used blocks until at most `n_bytes` remain, with reservations.

        Pinned blocks stay, even if they take more bytes. The caches that use the directory limit the bytes of pins.
        """
        rows = {row.block.key: row for row in self.rows()}
        order = LeafLRU()
        for row in rows.values():
            order.add(row.block.key, row.block.parent, row.n_bytes, row.last_used)
        reserved, pinned = self._tier.reserved(), self.pinned_keys()
        victims = []
        while order.n_bytes + reserved > n_bytes and (key := order.oldest_leaf(pinned)) is not None:
            order.remove(key)
            victims.append(rows[key])
        return self._remove(victims)

    def remove_pins_texts_and_damaged(self) -> None:
        """Remove the pins, the tokens of texts and the damaged files, which contain parts of prompts, too."""
        self._require_writable()
        for pin in self._tier.pins():
            self._tier.remove_pin(pin.name)
        self._tier.forget_texts()
        for path in [*(self.root / "damaged").iterdir(), *self.root.glob(f"{INDEX_NAME}.damaged-*")]:
            path.unlink(missing_ok=True)

    def _remove(self, rows: Sequence[TierRow]) -> BlockTotals:
        self._require_writable()
        # Successors first, so that every stored block stays reachable meanwhile.
        keys = [row.block.key for row in sorted(rows, key=lambda row: row.block.start, reverse=True)]
        for at in range(0, len(keys), _BATCH):
            self._tier.remove(keys[at : at + _BATCH])
        return BlockTotals(len(rows), sum(row.n_bytes for row in rows))

    # --- keys -----------------------------------------------------------------------------

    @property
    def keys(self) -> KeyState | None:
        """The ids of the keys that the directory is encrypted with; None if it is not encrypted."""
        return self._tier.keys

    def file_name(self, block: Block) -> tuple[str, ContentKey | None]:
        """Return the name of a block's file, and the key that a file of this name is encrypted with."""
        return self._tier.file_name(block)

    def key_of_name(self, name: bytes) -> tuple[bytes, ContentKey]:
        """Return the key of the block whose encrypted key is `name`, and the key that encrypted it.

        Raises:
            CacheKeyError: no key of the key file has encrypted it.
        """
        return self._tier.key_of_name(name)

    # --- single blocks --------------------------------------------------------------------

    def read(self, block: Block) -> tuple[Block, memoryview]:
        """Read a stored block and its payload, and verify them.

        Raises:
            CacheFormatError, OSError: as of `FileTier.read`.
        """
        return self._tier.read(block)

    def put(self, block: Block, payload: memoryview) -> bool:
        """Store a block. Return False if it is stored already, or another process is writing it.

        Raises:
            CacheError, OSError: it cannot be written.
        """
        self._require_writable()
        self._tier.release_stale_reservations()
        with self._tier.exclusive():
            n_bytes = self._tier.size(block, payload.nbytes)
            if self._tier.holds(block.key) or not self._tier.reserve(block, n_bytes):
                return False
        self._tier.write(block, payload)
        return True


def _names_in(directory: Path) -> set[str]:
    """Return the names in a directory; the empty set where the directory does not exist."""
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()


def _unreachable_rows(rows: Sequence[TierRow]) -> list[TierRow]:
    """Return those rows whose parent is missing or unreachable. `rows` has parents first."""
    reached: set[bytes] = set()
    unreachable = []
    for row in rows:
        if row.block.parent == row.block.namespace or row.block.parent in reached:
            reached.add(row.block.key)
        else:
            unreachable.append(row)
    return unreachable


def _sum(a: BlockTotals, b: BlockTotals) -> BlockTotals:
    return BlockTotals(a.n_blocks + b.n_blocks, a.n_bytes + b.n_bytes)
