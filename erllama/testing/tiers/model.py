"""Reference model of a tier: records the calls that a tier receives, and checks their result.

Used by the rules for tiers and by `CacheMachine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from erllama.cache import Block, Tier
from erllama.testing.rules import expect_success, require


class StoredBlock(NamedTuple):
    block: Block
    payload: bytes


class TierModel:
    """The blocks that a tier must hold.

    Attributes:
        stored: the newest version of each block, by key.
        unknown: keys of writes that failed. The tier may hold any version of these blocks, or none.
    """

    def __init__(self) -> None:
        self.stored: dict[bytes, StoredBlock] = {}
        self.unknown: set[bytes] = set()
        self._removed: set[bytes] = set()
        self._older: dict[bytes, list[StoredBlock]] = {}

    def record_write(self, block: Block, payload: bytes) -> None:
        """Record that `write` has returned."""
        if block.key in self.stored:
            self._older.setdefault(block.key, []).append(self.stored[block.key])
        self.stored[block.key] = StoredBlock(block, payload)
        self.unknown.discard(block.key)
        self._removed.discard(block.key)

    def record_failure(self, keys: Iterable[bytes]) -> None:
        """Record that `write` or `remove` has raised, or has not returned yet."""
        self.unknown.update(keys)

    def record_removal(self, keys: Iterable[bytes]) -> None:
        """Record that `remove` or `quarantine` has returned."""
        for key in keys:
            if self.stored.pop(key, None) is not None:
                self._removed.add(key)
            self.unknown.discard(key)

    def reset_from(self, tier: Tier) -> None:
        """Replace the model by what a tier holds now, after changes that the model did not record."""
        self.__init__()  # type: ignore[misc]
        for row in tier.rows():
            block, payload = tier.read(row.block)
            self.stored[block.key] = StoredBlock(block, bytes(payload))

    def observe(self, tier: Tier) -> None:
        """Record all calls that a tier receives from now on."""
        write, remove, quarantine = tier.write, tier.remove, tier.quarantine

        def spied_write(block: Block, payload: memoryview) -> None:
            before = bytes(payload)
            self.record_failure([block.key])
            write(block, payload)
            require(bytes(payload) == before, f"write() of {describe(block)} changed the caller's payload")
            self.record_write(block, before)

        def spied_remove(keys: Sequence[bytes]) -> None:
            key_list = list(keys)
            self.record_failure(key for key in key_list if key in self.stored)
            remove(keys)
            self.record_removal(key_list)

        def spied_quarantine(block: Block) -> None:
            quarantine(block)
            self.record_removal([block.key])

        tier.write = spied_write  # type: ignore[method-assign]
        tier.remove = spied_remove  # type: ignore[method-assign]
        tier.quarantine = spied_quarantine  # type: ignore[method-assign]

    def compare(self, tier: Tier, *, read: bool = True) -> None:
        """Check that a tier holds exactly this.

        Args:
            read: compare payloads, too.

        Raises:
            AssertionError: it does not. The message names the faulty method.
        """
        self._compare_rows(tier)
        if read:
            for key, stored in list(self.stored.items()):
                if key not in self.unknown:
                    self.compare_read(tier, stored.block)

    def _compare_rows(self, tier: Tier) -> None:
        with expect_success("rows() must list everything"):
            rows = list(tier.rows())
        seen: set[bytes] = set()
        for row in rows:
            with expect_success("rows() must return TierRow: a Block, bytes, and ns since 1970"):
                block, n_bytes, last_used = row
                require(isinstance(block, Block), f"rows() returns a block of type {type(block).__name__}")
                require(
                    isinstance(n_bytes, int) and isinstance(last_used, int),
                    f"rows() returns n_bytes={n_bytes!r}, last_used={last_used!r}; both must be int",
                )
            require(block.key not in seen, f"rows() lists {describe(block)} twice")
            seen.add(block.key)
            if block.key in self.unknown:
                continue
            stored = self.stored.get(block.key)
            if stored is None:
                raise AssertionError(
                    f"rows() lists {describe(block)}, which remove() or quarantine() has removed"
                    if block.key in self._removed
                    else f"rows() lists {describe(block)}, which was never written"
                )
            if block != stored.block:
                older = any(block == version.block for version in self._older.get(block.key, ()))
                if older:
                    raise AssertionError(
                        f"rows() lists an older version of {describe(block)}: write() did not replace it"
                    )
                raise AssertionError(
                    f"rows() lists another block than was written: {_difference(block, stored.block)}"
                )
            counted = tier.size(stored.block, len(stored.payload))
            require(
                n_bytes == counted,
                f"rows() counts {n_bytes} bytes for {describe(block)}; size() counts {counted}",
            )
            require(last_used >= 0, f"rows() returns last_used={last_used} for {describe(block)}")
        missing = [key for key in self.stored if key not in seen and key not in self.unknown]
        if missing:
            raise AssertionError(
                f"rows() lacks {len(missing)} of {len(self.stored)} blocks that were written and not removed, "
                f"as {describe(self.stored[missing[0]].block)}"
            )

    def compare_read(self, tier: Tier, asked: Block) -> memoryview:
        """Read a block, check that it is what was written, and return the payload."""
        stored = self.stored[asked.key]
        what = describe(stored.block)
        with expect_success(f"read() must return {what}, which was written and not removed"):
            found, payload = tier.read(asked)
        require(isinstance(found, Block), f"read() returns a block of type {type(found).__name__}")
        if found != stored.block:
            older = any(found == version.block for version in self._older.get(asked.key, ()))
            raise AssertionError(
                f"read() returns an older version of {what}: write() did not replace it"
                if older
                else f"read() returns another block than was written: {_difference(found, stored.block)}"
            )
        require(isinstance(payload, memoryview), f"read() returns a payload of type {type(payload).__name__}")
        require(
            payload.format == "B" and payload.ndim == 1 and payload.contiguous,
            f"read() returns a payload of format {payload.format!r}, shape {payload.shape}; it must be bytes, "
            "contiguous",
        )
        raw = bytes(payload)
        if raw != stored.payload:
            others = (version for key in self.stored for version in (self.stored[key], *self._older.get(key, ())))
            owner = next((describe(other.block) for other in others if other.payload == raw), None)
            raise AssertionError(
                f"read() of {what} returns {len(raw)} bytes, not the {len(stored.payload)} that were written"
                + (f": they are those of {owner}, or of an older version" if owner else "")
            )
        return payload


def describe(block: Block) -> str:
    """Return a description of a block for messages."""
    return f"block {block.key.hex()[:8]} ({block.n_tokens} tokens from {block.start})"


def _difference(found: Block, expected: Block) -> str:
    fields = ("key", "parent", "namespace", "start", "tokens", "reason", "recipe", "slice_end")
    wrong = [name for name in fields if getattr(found, name) != getattr(expected, name)]
    return f"the {' and the '.join(wrong)} of {describe(expected)} differ"
