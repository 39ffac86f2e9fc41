"""What a tier is: a place that keeps payloads by key, within a budget that the cache enforces.

`RamTier` and `FileTier` are ours; a tier of your own derives from `Tier` and is
given to `Cache(tiers=[...])`. A tier has no policy. What goes in, what goes
out and when is the cache's, which keeps the list of what every tier holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

from erllama.cache.blocks.block import Block
from erllama.errors import OptionError


class TierRow(NamedTuple):
    """One stored block: the bytes it counts for, and when it was last used, in ns since 1970."""

    block: Block
    n_bytes: int
    last_used: int


class Changes(NamedTuple):
    """What others did to a tier: blocks that are there now, keys that are not.

    Where `complete` is set, `stored` is everything there is.
    """

    stored: Sequence[TierRow]
    removed: Sequence[bytes]
    complete: bool


class Problem(NamedTuple):
    """Something wrong with what a tier holds: its tier, where, and what."""

    tier: str
    place: str
    what: str


class Tier(ABC):
    """A place for payloads.

    The cache calls `open` once, and again when a call has failed and
    `usable` is False; then `rows`; then the rest. `read`, `verify`, `in_flight`
    and `changes` may be called from any thread at any time, everything else by
    one thread at a time. Requests wait for `read`, and for `changes` and
    `in_flight`, which must not wait themselves; for nothing else. An error (OSError, sqlite3.Error,
    CacheError) costs the one save or load, is counted, and is no reason to
    stop; any other exception is counted as a fault.

    Args:
        name: what counters, rows and hits call it. Tiers of one name are the
            roots of one tier: each block is in one of them.
        budget: most bytes, as `size` counts them.
    """

    # Nothing is written to it: it is read, its blocks are not evicted, and its budget is not enforced.
    read_only = False

    # How blocks get here: during the save ("through"), after it in the cache's own thread ("behind"), or by the
    # tier's owner, who calls `Cache.hold` ("external").
    write_mode: Literal["through", "behind", "external"] = "behind"

    def __init__(self, name: str, budget: int) -> None:
        if not name.isidentifier() or name == "pending":
            raise OptionError(f"tier name {name!r}; give a word such as 'remote'")
        self.name = name
        self.budget = budget
        self.damaged = 0  # what its own looks have set aside, for the cache's counters

    @property
    def usable(self) -> bool:
        """Whether it can be used now."""
        return True

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self.name

    def where(self, block: Block) -> str:
        """Where a block is, for people."""
        return f"{self.place}, block {block.key.hex()}"

    @property
    def persistent(self) -> bool:
        """Whether what it holds outlives this process."""
        return True

    def open(self) -> None:  # noqa: B027 - nothing to do is a fine default
        """Make it usable, and mend what a crash left. May be called again."""

    @abstractmethod
    def rows(self) -> Iterable[TierRow]:
        """Everything it holds, each block once: the newest version as it was written, and its bytes by `size`."""

    @abstractmethod
    def write(self, block: Block, payload: memoryview) -> None:
        """Store a block, in place of one of the same key. When this returns, `read` gives it.

        The payload is bytes (format "B"), contiguous, and is not changed any more: not by the tier either.
        The reason, recipe and `slice_end` of a newer version may differ, and replace the old ones.
        """

    @abstractmethod
    def read(self, block: Block) -> tuple[Block, memoryview]:
        """A stored block as it was written, and its payload: bytes (format "B"), contiguous.

        The payload stays as it is: other reads, a newer version, `remove` and `close` do not change it.
        `block` has the key; its other fields may be those of another version.

        Raises:
            CacheFormatError: what is stored is not what was written.
            FileNotFoundError: it is not there.
            OSError: it cannot be read now. The next save of the block writes it anew.
        """

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Forget these blocks and no others. Keys that are not there are passed over."""

    def size(self, block: Block, payload_bytes: int) -> int:
        """The bytes that a block counts for: at least `payload_bytes`, and the same each time."""
        return payload_bytes

    def set_aside(self, block: Block) -> None:
        """Take a block that `read` refused out of the way."""
        self.remove([block.key])

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:  # noqa: B027
        """Note when blocks were last used: pairs of key and ns since 1970. Some may be gone."""

    def verify(self) -> Iterator[Problem]:
        """Read everything and tell what is wrong; change nothing."""
        for row in self.rows():
            try:
                found, _ = self.read(row.block)
                if found.key != row.block.key:
                    yield Problem(self.name, row.block.key.hex(), "another block is in its place")
            except Exception as error:
                yield Problem(self.name, row.block.key.hex(), str(error))

    def check(self) -> Iterable[Problem]:
        """Where `rows` and what is really there differ, found without reading payloads; within `exclusive`."""
        return ()

    def mend(self) -> None:  # noqa: B027
        """Put right what can be: `gc` calls it."""

    def close(self) -> None:  # noqa: B027
        """Let go of everything; a second call has no effect. May be opened again."""

    # --- where what is stored may change behind the cache's back

    def watch(self, alarm: Callable[[], None]) -> None:  # noqa: B027
        """Call `alarm`, from any thread, when something may have changed; the cache then calls `examine`, soon."""

    def examine(self) -> bool:
        """Look at what raised the alarm, so that `changes` tells of it; True to be called again a little later."""
        return False

    # --- where several processes share the tier

    def exclusive(self) -> AbstractContextManager[object]:
        """No other process changes what is stored, or reserves room, while this is held."""
        return nullcontext()

    def reserve(self, block: Block, n_bytes: int) -> bool:
        """Claim room and the right to write a block, within `exclusive`; False where another is writing it."""
        return True

    def tidy(self) -> None:  # noqa: B027
        """Give up what processes had reserved that are no more; before `exclusive`."""

    def reserved(self) -> int:
        """Bytes that are claimed and not stored yet."""
        return 0

    def uses(self) -> Iterable[tuple[bytes, int]]:
        """Uses that others have noted since this was last called: pairs of key and ns since 1970."""
        return ()

    @property
    def shared(self) -> bool:
        """Whether another process uses it now."""
        return False

    def in_flight(self, key: bytes) -> bool:
        """Whether another process is writing a block now. Must not wait."""
        return False

    def changes(self) -> Changes | None:
        """What was stored or removed since `rows` or this was last called; None for nothing. Must not wait."""
        return None


class RamTier(Tier):
    """Buffers of this process. The cache writes to it at once and under its lock."""

    write_mode = "through"

    def __init__(self, budget: int) -> None:
        super().__init__("ram", budget)
        self._payloads: dict[bytes, tuple[Block, memoryview]] = {}

    @property
    def persistent(self) -> bool:
        return False

    def rows(self) -> Iterable[TierRow]:
        return [TierRow(block, payload.nbytes, 0) for block, payload in self._payloads.values()]

    def write(self, block: Block, payload: memoryview) -> None:
        self._payloads[block.key] = (block, payload)

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found = self._payloads.get(block.key)
        if found is None:
            raise FileNotFoundError("evicted meanwhile")
        return found

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._payloads.pop(key, None)

    def close(self) -> None:
        self._payloads.clear()
