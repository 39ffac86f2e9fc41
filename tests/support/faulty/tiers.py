"""Small tiers with one fault each, and the rule of `TierConformance` that finds it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress

from erllama.cache import Block, Changes, Problem, SaveReason, Tier, TierRow
from erllama.errors import CacheFormatError

STORES: dict[str, dict[bytes, tuple[Block, bytes, int]]] = {}


class SmallTier(Tier):
    """A correct tier as a user would write it: a remote store that records uses."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__("remote", budget)
        self.store = STORES.setdefault(where, {})
        self.calls: Counter[str] = Counter()

    def rows(self) -> Iterable[TierRow]:
        return [TierRow(block, self.size(block, len(payload)), at) for block, payload, at in self.store.values()]

    def write(self, block: Block, payload: memoryview) -> None:
        self.store[block.key] = (block, bytes(payload), time.time_ns())

    def read(self, block: Block) -> tuple[Block, memoryview]:
        if block.key not in self.store:
            raise FileNotFoundError(block.key.hex())
        found, payload, _ = self.store[block.key]
        return found, memoryview(payload)

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.store.pop(key, None)

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        for key, at in used:
            if key in self.store:
                self.store[key] = (*self.store[key][:2], at)

    def nth(self, name: str, n: int) -> bool:
        """Whether this is one of every n-th calls."""
        self.calls[name] += 1
        return self.calls[name] % n == 0


# --- remove -----------------------------------------------------------------------------------------


class KeepsAll(SmallTier):
    """`remove()` removes no block."""

    def remove(self, keys: Sequence[bytes]) -> None:
        pass


class RemovesFirst(SmallTier):
    """`remove()` removes only the first of several keys."""

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys[:1])


class StopsAtUnknownKey(SmallTier):
    """`remove()` stops at a key that is not stored."""

    def remove(self, keys: Sequence[bytes]) -> None:
        with suppress(KeyError):
            for key in keys:
                del self.store[key]


class RaisesForUnknownKey(SmallTier):
    """`remove()` raises for a key that is not stored."""

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            del self.store[key]


class RemovesSiblings(SmallTier):
    """`remove()` also removes the blocks that follow."""

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove([*keys, *(k for k, (block, _, _) in self.store.items() if block.parent in keys)])


class SkipsSeventhRemove(SmallTier):
    """Every seventh `remove()` removes no block."""

    def remove(self, keys: Sequence[bytes]) -> None:
        if not self.nth("remove", 7):
            super().remove(keys)


class RestoresOldVersion(SmallTier):
    """`remove()` of a replaced block restores the old version."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.old: dict[bytes, tuple[Block, bytes, int]] = {}

    def write(self, block: Block, payload: memoryview) -> None:
        if block.key in self.store:
            self.old[block.key] = self.store[block.key]
        super().write(block, payload)

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys)
        for key in keys:
            if key in self.old:
                self.store[key] = self.old.pop(key)


class EmptiesOnNone(SmallTier):
    """`remove([])` removes everything."""

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys or list(self.store))


class SharesPayloads(SmallTier):
    """Blocks with equal payloads are removed together."""

    def remove(self, keys: Sequence[bytes]) -> None:
        payloads = {self.store[key][1] for key in keys if key in self.store}
        super().remove([key for key, (_, payload, _) in self.store.items() if payload in payloads])


class RemovesAtClose(SmallTier):
    """Removed blocks are back when the tier is reopened."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.gone: dict[bytes, tuple[Block, bytes, int]] = {}

    def remove(self, keys: Sequence[bytes]) -> None:
        self.gone |= {key: self.store[key] for key in keys if key in self.store}
        super().remove(keys)

    def open(self) -> None:
        self.store |= self.gone


# --- read -------------------------------------------------------------------------------------------


class ReadsShort(SmallTier):
    """`read()` returns one byte less for some keys."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        return found, payload[:-1] if block.key[0] % 8 == 3 else payload


class ReadsOneKeyWrong(SmallTier):
    """`read()` changes a byte where a key's last byte is 0x5A."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        if block.key[-1] == 0x5A:
            payload = memoryview(bytes([payload[0] ^ 1]) + payload[1:])
        return found, payload


class ReadsOther(SmallTier):
    """`read()` returns the payload of the read before."""

    last = b""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        given, self.last = self.last or bytes(payload), bytes(payload)
        return found, memoryview(given)


class Strips(SmallTier):
    """Zeros at a payload's end are lost."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        return found, memoryview(bytes(payload).rstrip(b"\0") or b"\0")


class Translates(SmallTier):
    """A payload is treated as text: line ends change."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, memoryview(bytes(payload).replace(b"\r\n", b"\n")))


class Truncates(SmallTier):
    """Payloads are cut at 4096 bytes."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload[:4096])


class WrapsLong(SmallTier):
    """The length of payloads is stored in 16 bits."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        return found, payload[: len(payload) % 65536 or None]


class RaisesKeyError(SmallTier):
    """`read()` of a missing block raises KeyError."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload, _ = self.store[block.key]
        return found, memoryview(payload)


class ReportsMissingAsDamage(SmallTier):
    """`read()` of a missing block raises CacheFormatError."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        if block.key not in self.store:
            raise CacheFormatError("nothing there")
        return super().read(block)


class ReadsEmpty(SmallTier):
    """`read()` of a missing block returns an empty payload."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        return super().read(block) if block.key in self.store else (block, memoryview(b""))


class EchoesBlock(SmallTier):
    """`read()` returns the block of the call, not the one that was written."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        return block, super().read(block)[1]


class ReturnsBytes(SmallTier):
    """`read()` returns bytes, not a memoryview."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        return found, bytes(payload)  # type: ignore[return-value]


class ReusesBuffer(SmallTier):
    """A `read()` overwrites the payload that the last one returned."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.buffer = bytearray(1 << 20)

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        self.buffer[: len(payload)] = payload
        return found, memoryview(self.buffer)[: len(payload)]


class WritesInPlace(SmallTier):
    """A newer version of equal length overwrites the payload that `read()` returned of the old one."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.buffers: dict[bytes, bytearray] = {}

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        buffer = self.buffers.get(block.key)
        if buffer is None or len(buffer) != len(payload):
            self.buffers[block.key] = bytearray(payload)
        else:
            buffer[:] = payload

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        return found, memoryview(self.buffers.setdefault(block.key, bytearray(payload)))


class ReleasesAtClose(SmallTier):
    """A payload that `read()` returned cannot be used after `close()`."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.given: list[memoryview] = []

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        self.given.append(payload)
        return found, payload

    def close(self) -> None:
        for view in self.given:
            view.release()


class ReadsOnce(SmallTier):
    """`read()` returns a block only once."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found = super().read(block)
        del self.store[block.key]
        return found


class ReadsForOneThread(SmallTier):
    """`read()` keeps its state in the tier, where threads overwrite it."""

    wanted = b""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        self.wanted = block.key
        time.sleep(0)
        if self.wanted not in self.store:
            raise FileNotFoundError(block.key.hex())
        found, payload, _ = self.store[self.wanted]
        return found, memoryview(payload)


class ReadsInOwnThread(SmallTier):
    """`read()` fails in any thread but the one that opened the tier."""

    def open(self) -> None:
        self.thread = threading.get_ident()

    def read(self, block: Block) -> tuple[Block, memoryview]:
        if threading.get_ident() != self.thread:
            raise OSError("made in another thread")
        return super().read(block)


# --- write ------------------------------------------------------------------------------------------


class KeepsOld(SmallTier):
    """`write()` ignores a newer version."""

    def write(self, block: Block, payload: memoryview) -> None:
        if block.key not in self.store:
            super().write(block, payload)


class KeepsOldBlock(SmallTier):
    """`write()` stores a newer payload but keeps the old block."""

    def write(self, block: Block, payload: memoryview) -> None:
        old = self.store.get(block.key)
        super().write(old[0] if old else block, payload)


class KeepsLonger(SmallTier):
    """A shorter newer version leaves the end of the old one."""

    def write(self, block: Block, payload: memoryview) -> None:
        old = self.store[block.key][1] if block.key in self.store else b""
        super().write(block, memoryview(bytes(payload) + old[len(payload) :]))


class WritesLate(SmallTier):
    """A written block can be read only after the next write."""

    late: tuple[Block, bytes] | None = None

    def write(self, block: Block, payload: memoryview) -> None:
        if self.late is not None:
            super().write(self.late[0], memoryview(self.late[1]))
        self.late = (block, bytes(payload))


class LosesSome(SmallTier):
    """Every seventh `write()` is lost."""

    def write(self, block: Block, payload: memoryview) -> None:
        if not self.nth("write", 7):
            super().write(block, payload)


class WipesPayload(SmallTier):
    """`write()` changes the caller's payload if it is writable."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        if not payload.readonly:
            payload[0] = 0


class WantsWritable(SmallTier):
    """`write()` refuses read-only memory."""

    def write(self, block: Block, payload: memoryview) -> None:
        if payload.readonly:
            raise TypeError("read-only")
        super().write(block, payload)


class WritesWholeBuffer(SmallTier):
    """`write()` of a part of a buffer stores the whole buffer."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, memoryview(payload.obj))  # type: ignore[arg-type]


class ShortKeys(SmallTier):
    """Only the first byte of a key is used."""

    def write(self, block: Block, payload: memoryview) -> None:
        self.remove([key for key in self.store if key[0] == block.key[0] and key != block.key])
        super().write(block, payload)


class KeyedByTokens(SmallTier):
    """Blocks with equal tokens and positions are one block in all namespaces."""

    def write(self, block: Block, payload: memoryview) -> None:
        for key, (other, _, _) in list(self.store.items()):
            if key != block.key and (other.tokens, other.start) == (block.tokens, block.start):
                del self.store[key]
        super().write(block, payload)


class ForgetsReason(SmallTier):
    """The reason of a save is not stored."""

    def write(self, block: Block, payload: memoryview) -> None:
        plain = Block.following(
            block.parent, block.namespace, block.start, block.tokens, SaveReason.COLD, block.recipe, block.slice_end
        )
        super().write(plain, payload)


class ShortSlices(SmallTier):
    """`slice_end` is stored in 32 bits."""

    def write(self, block: Block, payload: memoryview) -> None:
        short = Block.following(
            block.parent,
            block.namespace,
            block.start,
            block.tokens,
            block.reason,
            block.recipe,
            block.slice_end % 2**32,
        )
        super().write(short, payload)


class EvictsByItself(SmallTier):
    """The tier removes its oldest block when it holds more than a hundred."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        if len(self.store) > 100:
            del self.store[next(iter(self.store))]


# --- rows and sizes -----------------------------------------------------------------------------------


class ListsTwice(SmallTier):
    """`rows()` lists a block twice."""

    def rows(self) -> Iterable[TierRow]:
        rows = list(super().rows())
        return [*rows, *rows[:1]]


class ListsFewer(SmallTier):
    """`rows()` lists at most a hundred blocks."""

    def rows(self) -> Iterable[TierRow]:
        return list(super().rows())[:100]


class ListsWrongSizes(SmallTier):
    """`rows()` counts one byte less than `size()`."""

    def rows(self) -> Iterable[TierRow]:
        return [row._replace(n_bytes=row.n_bytes - 1) for row in super().rows()]


class ListsOldSizes(SmallTier):
    """`rows()` counts the bytes of the first version of a block."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.sizes: dict[bytes, int] = {}

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        self.sizes.setdefault(block.key, len(payload))

    def rows(self) -> Iterable[TierRow]:
        return [row._replace(n_bytes=self.sizes.get(row.block.key, row.n_bytes)) for row in super().rows()]


class ListsOnce(SmallTier):
    """`rows()` lists only blocks that are new since the last call."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.listed: set[bytes] = set()

    def rows(self) -> Iterable[TierRow]:
        new = [row for row in super().rows() if row.block.key not in self.listed]
        self.listed |= {row.block.key for row in new}
        return new


class ListsStale(SmallTier):
    """`rows()` returns a list that only `write()` updates."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.listed = list(super().rows())

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        self.listed = list(super().rows())

    def rows(self) -> Iterable[TierRow]:
        return self.listed


class CountsNothing(SmallTier):
    """`size()` returns 0, so that budgets have no effect."""

    def size(self, block: Block, payload_bytes: int) -> int:
        return 0


class CountsChanging(SmallTier):
    """`size()` returns a larger number each time."""

    def size(self, block: Block, payload_bytes: int) -> int:
        self.nth("size", 2)
        return payload_bytes + self.calls["size"]


# --- uses, quarantine, verify, repair -----------------------------------------------------------------------


class IgnoresTouch(SmallTier):
    """`touch()` records no use."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        pass


class TouchesInSeconds(SmallTier):
    """`touch()` reads its times as seconds."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        super().touch((key, at // 10**9) for key, at in used)


class TouchesFirst(SmallTier):
    """`touch()` records only the first of several uses."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        super().touch(list(used)[:1])


class TouchesAll(SmallTier):
    """`touch()` of one block records a use of all blocks."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        for _, at in used:
            super().touch((key, at) for key in list(self.store))


class TouchRaisesForUnknownKey(SmallTier):
    """`touch()` raises for a block that is not stored."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        for key, at in used:
            self.store[key] = (*self.store[key][:2], at)


class IgnoresQuarantine(SmallTier):
    """`quarantine()` has no effect."""

    def quarantine(self, block: Block) -> None:
        pass


class QuarantinesAll(SmallTier):
    """`quarantine()` removes everything."""

    def quarantine(self, block: Block) -> None:
        self.store.clear()


class FindsProblems(SmallTier):
    """`verify()` reports problems of sound blocks."""

    def verify(self) -> Iterator[Problem]:
        for row in self.rows():
            yield Problem(self.name, row.block.key.hex(), "it looks odd")


class VerifyRemoves(SmallTier):
    """`verify()` removes the blocks that it has read."""

    def verify(self) -> Iterator[Problem]:
        yield from super().verify()
        self.store.clear()


class RepairsTooMuch(SmallTier):
    """`repair()` removes blocks without successors."""

    def repair(self) -> None:
        parents = {block.parent for block, _, _ in self.store.values()}
        self.remove([key for key in self.store if key not in parents])


# --- opening and closing
# -------------------------------------------------------------------------------------------


class ForgetsAtClose(SmallTier):
    """`close()` removes everything, though the tier is persistent."""

    def close(self) -> None:
        self.store.clear()


class ForgetsVersions(SmallTier):
    """After a restart the first version of a block is back."""

    firsts: dict[int, dict[bytes, tuple[Block, bytes, int]]] = {}  # noqa: RUF012

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        self.firsts.setdefault(id(self.store), {}).setdefault(block.key, self.store[block.key])

    def open(self) -> None:
        first = self.firsts.get(id(self.store), {})
        for key in self.store:
            self.store[key] = first.get(key, self.store[key])


class OpensEmpty(SmallTier):
    """A second `open()` empties the tier."""

    def open(self) -> None:
        if self.nth("open", 2):
            self.store.clear()


class ClosesOnce(SmallTier):
    """A second `close()` raises."""

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        if not self.is_open:
            raise OSError("it is closed")
        self.is_open = False


class StaysClosed(SmallTier):
    """A closed tier is not usable after `open()`."""

    closed = False

    @property
    def usable(self) -> bool:
        return not self.closed

    def close(self) -> None:
        self.closed = True


class WearsOut(SmallTier):
    """After twenty writes the tier is not usable."""

    @property
    def usable(self) -> bool:
        return self.calls["write"] < 20

    def write(self, block: Block, payload: memoryview) -> None:
        self.nth("write", 1)
        super().write(block, payload)


# --- other processes, threads, and rare faults
# ------------------------------------------------------------------------------------------


class ReportsInFlight(SmallTier):
    """`in_flight()` is True for some keys, though no other process writes."""

    def in_flight(self, key: bytes) -> bool:
        return key[0] % 4 == 1


class RefusesRoom(SmallTier):
    """Every fifth `reserve()` is refused."""

    def reserve(self, block: Block, n_bytes: int) -> bool:
        return not self.nth("reserve", 5)


class KeepsReservation(SmallTier):
    """A reservation stays after the write."""

    claimed = 0

    def reserve(self, block: Block, n_bytes: int) -> bool:
        self.claimed = n_bytes
        return True

    def reserved(self) -> int:
        return self.claimed


class Swallows(SmallTier):
    """`exclusive()` swallows exceptions."""

    def exclusive(self) -> AbstractContextManager[object]:
        return suppress(Exception)


class ReportsStoredAsRemoved(SmallTier):
    """`changes()` reports stored blocks as removed."""

    def changes(self) -> Changes | None:
        return Changes([], list(self.store)[:1], complete=False)


class ReportsHalf(SmallTier):
    """`changes()` is complete but lists half of the stored blocks."""

    def changes(self) -> Changes | None:
        rows = list(self.rows())
        return Changes(rows[: len(rows) // 2], [], complete=True)


class ReportsShared(SmallTier):
    """`shared` is True, though no other process uses the tier."""

    @property
    def shared(self) -> bool:
        return True


class CountsDamage(SmallTier):
    """`damaged` counts sound blocks."""

    def repair(self) -> None:
        self.damaged += len(self.store)


class RemembersRemovals(SmallTier):
    """A removed block cannot be written again."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.gone: set[bytes] = set()

    def remove(self, keys: Sequence[bytes]) -> None:
        self.gone |= {key for key in keys if key in self.store}
        super().remove(keys)

    def write(self, block: Block, payload: memoryview) -> None:
        if block.key not in self.gone:
            super().write(block, payload)


class KeyedByText(SmallTier):
    """Blocks with equal tokens are one block at all positions."""

    def write(self, block: Block, payload: memoryview) -> None:
        self.remove([key for key, (other, _, _) in self.store.items() if other.tokens == block.tokens])
        super().write(block, payload)


class LeaksReservations(SmallTier):
    """A reservation without a write stays after `release_stale_reservations()`."""

    claimed = 0

    def reserve(self, block: Block, n_bytes: int) -> bool:
        self.claimed = n_bytes
        return True

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        self.claimed = 0

    def reserved(self) -> int:
        return self.claimed


class RewritesAll(SmallTier):
    """During the write of one block, other blocks cannot be read."""

    def write(self, block: Block, payload: memoryview) -> None:
        others = dict(self.store)
        self.store.clear()
        time.sleep(0.001)
        self.store.update(others)
        super().write(block, payload)


class LosesRarely(SmallTier):
    """After five removals, every write of an even version keeps the old payload."""

    def remove(self, keys: Sequence[bytes]) -> None:
        self.nth("remove", 1)
        super().remove(keys)

    def write(self, block: Block, payload: memoryview) -> None:
        old = self.store.get(block.key)
        if old and self.calls["remove"] > 5 and block.recipe[0] % 2 == 0:
            payload = memoryview(old[1])
        super().write(block, payload)


FAULTY_TIERS: list[tuple[type[SmallTier], str]] = [
    (KeepsAll, "test_remove_removes_exactly_the_named_blocks"),
    (RemovesFirst, "test_remove_removes_exactly_the_named_blocks"),
    (StopsAtUnknownKey, "test_remove_removes_exactly_the_named_blocks"),
    (RaisesForUnknownKey, "test_remove_removes_exactly_the_named_blocks"),
    (RemovesSiblings, "test_removing_a_parent_keeps_its_children"),
    (SkipsSeventhRemove, "test_remove_removes_exactly_the_named_blocks"),
    (RestoresOldVersion, "test_a_replaced_version_does_not_reappear"),
    (EmptiesOnNone, "test_remove_removes_exactly_the_named_blocks"),
    (SharesPayloads, "test_equal_payloads_are_separate"),
    (RemovesAtClose, "test_a_tier_can_be_reopened"),
    (RemembersRemovals, "test_a_removed_block_can_be_written_again"),
    (ReadsShort, "test_read_returns_what_was_written"),
    (ReadsOneKeyWrong, "test_a_key_may_be_any_bytes"),
    (ReadsOther, "test_read_returns_what_was_written"),
    (Strips, "test_read_returns_what_was_written"),
    (Translates, "test_read_returns_what_was_written"),
    (Truncates, "test_read_returns_what_was_written"),
    (WrapsLong, "test_read_returns_what_was_written"),
    (RaisesKeyError, "test_read_of_a_missing_block_raises"),
    (ReportsMissingAsDamage, "test_read_of_a_missing_block_raises"),
    (ReadsEmpty, "test_read_of_a_missing_block_raises"),
    (EchoesBlock, "test_a_newer_version_replaces_the_old_one"),
    (ReturnsBytes, "test_read_returns_what_was_written"),
    (ReusesBuffer, "test_a_payload_that_was_read_stays_valid"),
    (WritesInPlace, "test_a_payload_that_was_read_stays_valid"),
    (ReleasesAtClose, "test_a_payload_that_was_read_stays_valid"),
    (ReadsOnce, "test_read_returns_what_was_written"),
    (ReadsForOneThread, "test_any_thread_may_read"),
    (ReadsInOwnThread, "test_any_thread_may_read"),
    (KeepsOld, "test_a_newer_version_replaces_the_old_one"),
    (KeepsOldBlock, "test_a_newer_version_replaces_the_old_one"),
    (KeepsLonger, "test_a_newer_version_replaces_the_old_one"),
    (WritesLate, "test_read_returns_what_was_written"),
    (LosesSome, "test_read_returns_what_was_written"),
    (LosesRarely, "test_random_calls_agree_with_a_model"),
    (RewritesAll, "test_reads_are_correct_during_writes"),
    (WipesPayload, "test_write_does_not_change_the_payload"),
    (WantsWritable, "test_read_returns_what_was_written"),
    (WritesWholeBuffer, "test_write_does_not_change_the_payload"),
    (ShortKeys, "test_a_key_may_be_any_bytes"),
    (KeyedByTokens, "test_namespaces_are_separate"),
    (KeyedByText, "test_a_long_chain_is_stored"),
    (ForgetsReason, "test_every_field_of_a_block_is_stored"),
    (ShortSlices, "test_every_field_of_a_block_is_stored"),
    (EvictsByItself, "test_many_blocks_are_stored_at_once"),
    (ListsTwice, "test_many_blocks_are_stored_at_once"),
    (ListsFewer, "test_many_blocks_are_stored_at_once"),
    (ListsWrongSizes, "test_sizes_are_consistent"),
    (ListsOldSizes, "test_a_newer_version_replaces_the_old_one"),
    (ListsOnce, "test_read_returns_what_was_written"),
    (ListsStale, "test_remove_removes_exactly_the_named_blocks"),
    (CountsNothing, "test_sizes_are_consistent"),
    (CountsChanging, "test_sizes_are_consistent"),
    (IgnoresTouch, "test_touch_records_uses"),
    (TouchesInSeconds, "test_touch_records_uses"),
    (TouchesFirst, "test_touch_records_uses"),
    (TouchesAll, "test_touch_records_uses"),
    (TouchRaisesForUnknownKey, "test_touch_records_uses"),
    (IgnoresQuarantine, "test_quarantine_removes_one_block"),
    (QuarantinesAll, "test_quarantine_removes_one_block"),
    (FindsProblems, "test_a_sound_tier_has_no_problems"),
    (VerifyRemoves, "test_a_sound_tier_has_no_problems"),
    (RepairsTooMuch, "test_a_sound_tier_has_no_problems"),
    (CountsDamage, "test_a_sound_tier_has_no_problems"),
    (ForgetsAtClose, "test_a_persistent_tier_survives_a_restart"),
    (ForgetsVersions, "test_a_persistent_tier_survives_a_restart"),
    (OpensEmpty, "test_a_tier_can_be_reopened"),
    (ClosesOnce, "test_a_tier_can_be_reopened"),
    (StaysClosed, "test_a_tier_can_be_reopened"),
    (WearsOut, "test_read_returns_what_was_written"),
    (ReportsInFlight, "test_a_single_process_sees_no_others"),
    (RefusesRoom, "test_read_returns_what_was_written"),
    (KeepsReservation, "test_read_returns_what_was_written"),
    (LeaksReservations, "test_stale_reservations_are_released"),
    (Swallows, "test_exclusive_ends_after_an_exception"),
    (ReportsStoredAsRemoved, "test_a_single_process_sees_no_others"),
    (ReportsHalf, "test_a_single_process_sees_no_others"),
    (ReportsShared, "test_a_new_tier_is_usable_and_empty"),
]
