"""The interface of a tier: a store of payloads by key, within a budget that the cache enforces.

`RamTier` and `FileTier` implement it. A tier of your own derives from `Tier` and is passed to
`Cache(tiers=[...])`. A tier has no policy: the cache decides what to write, what to remove and when.
The cache also keeps the list of the blocks that each tier holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

from erllama.cache.blocks.block import Block
from erllama.errors import CacheError, OptionError


class TierRow(NamedTuple):
    """One stored block: its size in bytes as `Tier.size` counts, and its last use in ns since 1970."""

    block: Block
    n_bytes: int
    last_used: int


class Changes(NamedTuple):
    """Changes that others made to a tier: the blocks that they stored and the keys that they removed.

    If `complete` is set, `stored` lists the whole content of the tier.
    """

    stored: Sequence[TierRow]
    removed: Sequence[bytes]
    complete: bool


class Problem(NamedTuple):
    """A defect in the content of a tier: the tier's name, the location and a description."""

    tier: str
    location: str
    description: str


class SimulatedCrash(BaseException):
    """Ends the thread of the write queue at once, as if the process had been killed. For tests.

    A test raises it inside a call of a tier. The tier and the queue then clean up no state.
    """


class Tier(ABC):
    """A store of payloads.

    The cache calls `open` first, then `rows`, then the other methods. It calls `open` again after a call has
    failed and `usable` is False. Any thread may call `read`, `verify`, `in_flight` and `changes` at any time.
    One thread at a time calls the other methods. Requests wait for `read`, `changes` and `in_flight`, and for
    no other method. `changes` and `in_flight` must not wait. An error (OSError, sqlite3.Error, CacheError)
    fails that one save or load. The cache counts it and continues. It counts any other exception as a fault.

    Args:
        name: the name in counters, rows and hits. Tiers of the same name are the roots of one tier: each block
            is in one of them.
        budget: maximum bytes, as counted by `size`.
    """

    # True: the cache reads this tier and never writes to it, evicts no blocks and does not enforce the budget.
    read_only = False

    # How blocks are stored: "through" during the save, "behind" after it by the cache's own thread, or "external"
    # by the owner of the tier, who calls `Cache.report_stored`.
    write_mode: Literal["through", "behind", "external"] = "behind"

    def __init__(self, name: str, budget: int) -> None:
        if not name.isidentifier() or name == "pending":
            raise OptionError(
                f"tier name {name!r} is not an identifier or is reserved; use a word such as 'remote'"
            )
        self.name = name
        self.budget = budget
        self.damaged = 0  # files that the tier itself found damaged and quarantined; part of the cache's counter

    @property
    def usable(self) -> bool:
        """Whether the tier can be used now."""
        return True

    @property
    def problem(self) -> CacheError | None:
        """Why a tier that is open does not serve now; None if it does. It recovers by itself."""
        return None

    @property
    def unlisted(self) -> str | None:
        """Why there may be blocks that `rows` does not return, and that others follow; None if it returns all."""
        return None

    def counts(self) -> Mapping[str, int]:
        """Return counts of the tier's own, by their names in `Cache.counters`."""
        return {}

    @property
    def location(self) -> str:
        """The location of the tier, for messages."""
        return self.name

    def location_of(self, block: Block) -> str:
        """Return the location of a block, for messages."""
        return f"{self.location}, block {block.key.hex()}"

    @property
    def persistent(self) -> bool:
        """Whether its content outlives this process."""
        return True

    def open(self) -> None:  # noqa: B027 - an empty default suits many tiers
        """Open the tier and repair it after a crash. May be called again."""

    @abstractmethod
    def rows(self) -> Iterable[TierRow]:
        """List the whole content, each block once: the newest version as written, and its bytes as of `size`."""

    @abstractmethod
    def write(self, block: Block, payload: memoryview) -> None:
        """Store a block. Replaces a block of the same key. After this returns, `read` returns the block.

        The payload is bytes (format "B"), contiguous. Neither the cache nor the tier changes it afterwards.
        A newer version may have another reason, recipe and `slice_end`. They replace the old ones.
        """

    @abstractmethod
    def read(self, block: Block) -> tuple[Block, memoryview]:
        """Return a stored block as it was written, and its payload: bytes (format "B"), contiguous.

        The payload never changes: not by other reads, a newer version, `remove` or `close`.
        `block` identifies the block by its key; its other fields may be those of another version.

        Raises:
            CacheFormatError: the stored content differs from the written content.
            FileNotFoundError: the tier does not have the block.
            OSError: the block cannot be read now. The next save of the block writes it again.
        """

    @abstractmethod
    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove these blocks and no others. Ignores keys that are not stored."""

    def size(self, block: Block, payload_bytes: int) -> int:
        """Return the bytes that a block counts for: at least `payload_bytes`, and the same each time."""
        return payload_bytes

    def quarantine(self, block: Block) -> None:
        """Remove a block that `read` refused, or move it out of the way."""
        self.remove([block.key])

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:  # noqa: B027
        """Record when blocks were last used: pairs of key and ns since 1970. Some may have been removed."""

    def verify(self) -> Iterator[Problem]:
        """Read the whole content and yield each defect. Does not change the content."""
        for row in self.rows():
            try:
                found, _ = self.read(row.block)
                if found.key != row.block.key:
                    yield Problem(self.name, row.block.key.hex(), "the tier returned a different block")
            except Exception as error:
                yield Problem(self.name, row.block.key.hex(), str(error))

    def check(self) -> Iterable[Problem]:
        """Return the differences between `rows` and the real content, without reading payloads; in `exclusive`."""
        return ()

    def repair(self) -> None:  # noqa: B027
        """Repair what can be repaired. `Cache.gc` calls it."""

    def close(self) -> None:  # noqa: B027
        """Release all resources. A second call has no effect. The tier may be opened again."""

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all blocks that `write` was called with are stored; False if `timeout` seconds were too few.

        For a tier whose `write` returns earlier. Any thread may call it at any time.
        """
        return True

    def abandon(self) -> None:
        """Close as if the process had been killed: writes that wait are lost."""
        self.close()

    # --- for tiers whose content may change without the cache

    def watch(self, on_change: Callable[[], None]) -> None:  # noqa: B027
        """Call `on_change`, from any thread, when the content may have changed. The cache then calls `examine`."""

    def examine(self) -> bool:
        """Find out what changed, so that `changes` returns it. Return True to be called again a little later."""
        return False

    # --- for tiers that several processes share

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context manager that keeps other processes from changing the content or reserving room."""
        return nullcontext()

    def reserve(self, block: Block, n_bytes: int) -> bool:
        """Reserve room and the right to write a block, in `exclusive`. False: another process is writing it."""
        return True

    def release_stale_reservations(self) -> None:  # noqa: B027
        """Release the reservations of processes that have ended. Called before `exclusive`."""

    def reserved(self) -> int:
        """Return the bytes that are reserved and not stored yet."""
        return 0

    def uses(self) -> Iterable[tuple[bytes, int]]:
        """Return the uses that others recorded since the last call: pairs of key and ns since 1970."""
        return ()

    @property
    def shared(self) -> bool:
        """Whether another process uses the tier now."""
        return False

    def in_flight(self, key: bytes) -> bool:
        """Return whether another process is writing a block now. Must not wait."""
        return False

    def changes(self) -> Changes | None:
        """Return the changes of others since the last `rows` or `changes`; None for no change. Must not wait."""
        return None
