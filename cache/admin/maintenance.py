"""One cache directory in the hands of who looks after it: what it holds, what is wrong with it, what may go.

Works on the directory itself, without a `Cache`, a budget or a model, beside
any processes that use it: by their protocol, and in transactions short enough
not to hold them up. The command `erllama cache` is made of it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from erllama.cache.blocks.block import Block
from erllama.cache.catalog.lru import LeafLRU
from erllama.cache.tiers.directory import INDEX_NAME, is_cache
from erllama.cache.tiers.read_only import file_tier
from erllama.cache.tiers.tier import Problem, TierRow
from erllama.errors import CacheError

_NO_BUDGET = 2**62  # what a directory may hold, those who use it say
_BATCH = 500  # blocks removed in one transaction: some hundredths of a second on a local disk


class Context(NamedTuple):
    """One stored context, named by its last block; blocks that contexts share count for each.

    Attributes:
        key, namespace: of its last block.
        n_tokens, n_blocks, n_bytes: from its first token on, as far as that is stored.
        complete: whether all of it is: it can be found.
        last_used: in ns since 1970.
    """

    key: bytes
    namespace: bytes
    n_tokens: int
    n_blocks: int
    n_bytes: int
    complete: bool
    last_used: int


class Namespace(NamedTuple):
    """The blocks that one model, with its options and a salt, can use; each counts once."""

    key: bytes
    n_contexts: int
    n_blocks: int
    n_tokens: int
    n_bytes: int
    last_used: int


class Removed(NamedTuple):
    """What was removed."""

    n_blocks: int
    n_bytes: int


class Tidied(NamedTuple):
    """What was put right: files that the index lacked, rows without files, files of the dead, blocks that went."""

    adopted: int
    forgotten: int
    leftovers: int
    removed: Removed


class CacheFiles:
    """A hold on one cache directory; close it, or use it in a `with`.

    Args:
        root: the directory; it must exist.
        in_memory: it lies on a tmpfs, where files need not be made durable.

    Raises:
        CacheError: there is no cache, or it cannot be used; the message says why.
    """

    def __init__(self, root: Path, *, in_memory: bool = False) -> None:
        if not is_cache(root):
            raise CacheError(f"{root} holds no cache; give the directory of one")
        self.root = root
        self._tier = file_tier(root, _NO_BUDGET, name="ram_file" if in_memory else "disk", watch=False)
        try:
            # Before opening removes what the dead left.
            self._partials = set() if self._tier.read_only else _names_in(root / "partial")
            self._tier.open()
        except (OSError, sqlite3.Error) as error:
            raise CacheError(f"{root} cannot be used: {error}") from error
        self._tier.rows()  # as of before it was opened: what opening took in comes after
        self.set_aside = self._tier.damaged  # files that opening took out of the way

    def close(self) -> None:
        """Let go of the directory. Idempotent."""
        self._tier.close()

    def __enter__(self) -> CacheFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- looking --------------------------------------------------------------------------

    @property
    def tier(self) -> str:
        """The name of the tier that such a directory is."""
        return self._tier.name

    @property
    def read_only(self) -> bool:
        """Whether the directory can only be read; what would change it raises CacheError."""
        return self._tier.read_only

    def _must_be_writable(self) -> None:
        if self.read_only:
            raise CacheError(f"{self.root} is read-only and cannot be changed; use a process that may write to it")

    @property
    def in_use(self) -> bool:
        """Whether another process has the directory open."""
        return self._tier.shared

    def rows(self) -> list[TierRow]:
        """Every stored block, parents first."""
        return sorted(self._tier.rows(), key=lambda row: row.block.start)

    def contexts(self) -> list[Context]:
        """What is stored, by contexts that no other one goes on from; the latest used first."""
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
                Context(
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

    def namespaces(self) -> list[Namespace]:
        """What is stored, by namespace; the latest used first."""
        rows = self.rows()
        parents = {row.block.parent for row in rows}
        found: dict[bytes, Namespace] = {}
        for row in rows:
            key, leaf = row.block.namespace, row.block.key not in parents
            before = found.get(key, Namespace(key, 0, 0, 0, 0, 0))
            found[key] = Namespace(
                key,
                before.n_contexts + leaf,
                before.n_blocks + 1,
                before.n_tokens + row.block.n_tokens,
                before.n_bytes + row.n_bytes,
                max(before.last_used, row.last_used),
            )
        return sorted(found.values(), key=lambda namespace: namespace.last_used, reverse=True)

    # --- mending --------------------------------------------------------------------------

    def verify(
        self, *, repair: bool = False, on_read: Callable[[float], object] = lambda done: None
    ) -> list[Problem]:
        """Read every file and tell what is wrong; empty when all is well.

        Args:
            repair: put it right: damaged files are set aside, others adopted, what the dead left is removed.
            on_read: called with the fraction read.
        """
        if repair:
            self._must_be_writable()
        n_bytes = max(sum(row.n_bytes for row in self.rows()), 1)
        done = 0

        def read(n: int) -> None:
            nonlocal done
            done += n
            on_read(min(done / n_bytes, 1.0))

        problems = list(self._tier.verify(read))
        if repair and problems:
            wrong = {problem.place for problem in problems}
            for row in self.rows():
                if self._tier.where(row.block) in wrong:
                    self._tier.set_aside(row.block)
            self._tier.mend()
        return problems

    def gc(self, budget: int | None = None) -> Tidied:
        """Bring index and files in line, remove what nobody can reach, and keep to a budget where one is given."""
        self._must_be_writable()
        before = {row.block.key for row in self.rows()}
        self._tier.mend()
        rows = self.rows()
        after = {row.block.key for row in rows}
        removed = self._remove(_unreachable(rows))
        if budget is not None:
            removed = _sum(removed, self.shrink(budget))
        left = self._partials - _names_in(self.root / "partial")
        return Tidied(len(after - before), len(before - after), len(left), removed)

    # --- removing -------------------------------------------------------------------------

    def evict(self, namespaces: Iterable[bytes] | None = None, *, used_before: int | None = None) -> Removed:
        """Remove blocks: those of some namespaces, and not used since a time; all without either.

        Args:
            used_before: in ns since 1970. A block stays as long as one that goes on from it does.
        """
        rows = self.rows()
        among = None if namespaces is None else set(namespaces)
        going = {row.block.key: row for row in rows if among is None or row.block.namespace in among}
        if used_before is not None:
            stay: set[bytes] = set()
            for row in reversed(rows):  # whoever goes on from a block comes before it
                if row.last_used >= used_before or row.block.key in stay:
                    stay |= {row.block.key, row.block.parent}
            going = {key: row for key, row in going.items() if key not in stay}
        return self._remove(list(going.values()))

    def shrink(self, n_bytes: int) -> Removed:
        """Remove the least recently used blocks until the rest, with what is being written, takes so many bytes."""
        rows = {row.block.key: row for row in self.rows()}
        order = LeafLRU()
        for row in rows.values():
            order.add(row.block.key, row.block.parent, row.n_bytes, row.last_used)
        reserved = self._tier.reserved()
        going = []
        while order.n_bytes + reserved > n_bytes and (key := order.oldest_leaf(())) is not None:
            order.remove(key)
            going.append(rows[key])
        return self._remove(going)

    def forget_rest(self) -> None:
        """Remove what else is kept of prompts: the tokens of texts, and files that were set aside."""
        self._must_be_writable()
        self._tier.forget_texts()
        for path in [*(self.root / "damaged").iterdir(), *self.root.glob(f"{INDEX_NAME}.damaged-*")]:
            path.unlink(missing_ok=True)

    def _remove(self, rows: Sequence[TierRow]) -> Removed:
        self._must_be_writable()
        # Those that go on from others first: what is stored can be reached all the while.
        keys = [row.block.key for row in sorted(rows, key=lambda row: row.block.start, reverse=True)]
        for at in range(0, len(keys), _BATCH):
            self._tier.remove(keys[at : at + _BATCH])
        return Removed(len(rows), sum(row.n_bytes for row in rows))

    # --- blocks in and out ----------------------------------------------------------------

    def read(self, block: Block) -> tuple[Block, memoryview]:
        """A stored block and its payload, checked.

        Raises:
            CacheFormatError, OSError: as of `FileTier.read`.
        """
        return self._tier.read(block)

    def put(self, block: Block, payload: memoryview) -> bool:
        """Store a block as any process does; False where it is stored, or another process is writing it.

        Raises:
            CacheError, OSError: it cannot be written.
        """
        self._must_be_writable()
        self._tier.tidy()
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


def _unreachable(rows: Sequence[TierRow]) -> list[TierRow]:
    """Of rows, parents first, those that follow one that is gone."""
    reached: set[bytes] = set()
    lost = []
    for row in rows:
        if row.block.parent == row.block.namespace or row.block.parent in reached:
            reached.add(row.block.key)
        else:
            lost.append(row)
    return lost


def _sum(a: Removed, b: Removed) -> Removed:
    return Removed(a.n_blocks + b.n_blocks, a.n_bytes + b.n_bytes)
