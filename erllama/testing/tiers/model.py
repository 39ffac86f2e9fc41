"""A simple model of a tier, which the calls that the tier got are written to, and which it is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from erllama.cache import Block, Tier
from erllama.testing.rules import must, promised


class _Stored(NamedTuple):
    block: Block
    payload: bytes


class TierModel:
    """What a tier must hold.

    Attributes:
        held: the newest version of each block, by key.
        unknown: keys of writes that failed: the tier may hold any version of those, or none.
    """

    def __init__(self) -> None:
        self.held: dict[bytes, _Stored] = {}
        self.unknown: set[bytes] = set()
        self._removed: set[bytes] = set()
        self._older: dict[bytes, list[_Stored]] = {}

    def note_write(self, block: Block, payload: bytes) -> None:
        """`write` has returned."""
        if block.key in self.held:
            self._older.setdefault(block.key, []).append(self.held[block.key])
        self.held[block.key] = _Stored(block, payload)
        self.unknown.discard(block.key)
        self._removed.discard(block.key)

    def note_failure(self, keys: Iterable[bytes]) -> None:
        """`write` or `remove` has raised."""
        self.unknown.update(keys)

    def note_removal(self, keys: Iterable[bytes]) -> None:
        """`remove` or `set_aside` has returned."""
        for key in keys:
            if self.held.pop(key, None) is not None:
                self._removed.add(key)
            self.unknown.discard(key)

    def take_from(self, tier: Tier) -> None:
        """Believe what a tier holds now: others have changed it."""
        self.__init__()  # type: ignore[misc]
        for row in tier.rows():
            block, payload = tier.read(row.block)
            self.held[block.key] = _Stored(block, bytes(payload))

    def spy_on(self, tier: Tier) -> None:
        """Note what a tier is asked to do from now on."""
        write, remove, set_aside = tier.write, tier.remove, tier.set_aside

        def spied_write(block: Block, payload: memoryview) -> None:
            before = bytes(payload)
            self.note_failure([block.key])
            write(block, payload)
            must(bytes(payload) == before, f"write() of {name_of(block)} changed the caller's payload")
            self.note_write(block, before)

        def spied_remove(keys: Sequence[bytes]) -> None:
            wanted = list(keys)
            self.note_failure(key for key in wanted if key in self.held)
            remove(keys)
            self.note_removal(wanted)

        def spied_set_aside(block: Block) -> None:
            set_aside(block)
            self.note_removal([block.key])

        tier.write = spied_write  # type: ignore[method-assign]
        tier.remove = spied_remove  # type: ignore[method-assign]
        tier.set_aside = spied_set_aside  # type: ignore[method-assign]

    def compare(self, tier: Tier, *, read: bool = True) -> None:
        """Check that a tier holds exactly this.

        Args:
            read: compare payloads, too.

        Raises:
            AssertionError: it does not; the message names the method whose promise is broken.
        """
        self._compare_rows(tier)
        if read:
            for key, stored in list(self.held.items()):
                if key not in self.unknown:
                    self.compare_read(tier, stored.block)

    def _compare_rows(self, tier: Tier) -> None:
        with promised("rows() must list everything"):
            rows = list(tier.rows())
        seen: set[bytes] = set()
        for row in rows:
            with promised("rows() must give TierRow: a Block, bytes, and ns since 1970"):
                block, n_bytes, last_used = row
                must(isinstance(block, Block), f"rows() gives a block of type {type(block).__name__}")
                must(
                    isinstance(n_bytes, int) and isinstance(last_used, int),
                    f"rows() gives n_bytes={n_bytes!r}, last_used={last_used!r}; both must be int",
                )
            must(block.key not in seen, f"rows() lists {name_of(block)} twice")
            seen.add(block.key)
            if block.key in self.unknown:
                continue
            stored = self.held.get(block.key)
            if stored is None:
                raise AssertionError(
                    f"rows() lists {name_of(block)}, which remove() or set_aside() was to forget"
                    if block.key in self._removed
                    else f"rows() lists {name_of(block)}, which was never written"
                )
            if block != stored.block:
                older = any(block == version.block for version in self._older.get(block.key, ()))
                if older:
                    raise AssertionError(
                        f"rows() lists an older version of {name_of(block)}: "
                        "write() did not put the new one in its place"
                    )
                raise AssertionError(
                    f"rows() lists another block than was written: {_difference(block, stored.block)}"
                )
            counted = tier.size(stored.block, len(stored.payload))
            must(
                n_bytes == counted,
                f"rows() counts {n_bytes} bytes for {name_of(block)}; size() counts {counted}",
            )
            must(last_used >= 0, f"rows() gives last_used={last_used} for {name_of(block)}")
        missing = [key for key in self.held if key not in seen and key not in self.unknown]
        if missing:
            raise AssertionError(
                f"rows() lacks {len(missing)} of {len(self.held)} blocks that were written and not removed, "
                f"as {name_of(self.held[missing[0]].block)}"
            )

    def compare_read(self, tier: Tier, asked: Block) -> memoryview:
        """Read a block, and check that it is what was written; returns the payload."""
        stored = self.held[asked.key]
        what = name_of(stored.block)
        with promised(f"read() must give {what}, which was written and not removed"):
            found, payload = tier.read(asked)
        must(isinstance(found, Block), f"read() gives a block of type {type(found).__name__}")
        if found != stored.block:
            older = any(found == version.block for version in self._older.get(asked.key, ()))
            raise AssertionError(
                f"read() gives an older version of {what}: write() did not put the new one in its place"
                if older
                else f"read() gives another block than was written: {_difference(found, stored.block)}"
            )
        must(isinstance(payload, memoryview), f"read() gives a payload of type {type(payload).__name__}")
        must(
            payload.format == "B" and payload.ndim == 1 and payload.contiguous,
            f"read() gives a payload of format {payload.format!r}, shape {payload.shape}; it must be bytes, "
            "contiguous",
        )
        raw = bytes(payload)
        if raw != stored.payload:
            others = (version for key in self.held for version in (self.held[key], *self._older.get(key, ())))
            owner = next((name_of(other.block) for other in others if other.payload == raw), None)
            raise AssertionError(
                f"read() of {what} gives {len(raw)} bytes that are not the {len(stored.payload)} that were written"
                + (f": they are those of {owner}, or of an older version" if owner else "")
            )
        return payload


def name_of(block: Block) -> str:
    """A block, for people."""
    return f"block {block.key.hex()[:8]} ({block.n_tokens} tokens from {block.start})"


def _difference(found: Block, expected: Block) -> str:
    fields = ("key", "parent", "namespace", "start", "tokens", "reason", "recipe", "slice_end")
    wrong = [name for name in fields if getattr(found, name) != getattr(expected, name)]
    return f"the {' and the '.join(wrong)} of {name_of(expected)} differ"
