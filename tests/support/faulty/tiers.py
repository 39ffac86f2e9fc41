"""Small tiers with one fault each, and the rule of `TierConformance` that finds it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress

from erllama.cache import Block, Changes, Problem, SaveReason, Tier, TierRow
from erllama.errors import CacheFormatError

SHELVES: dict[str, dict[bytes, tuple[Block, bytes, int]]] = {}


class SmallTier(Tier):
    """A correct tier as a user writes one: a remote store that notes uses."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__("remote", budget)
        self.shelf = SHELVES.setdefault(where, {})
        self.calls: Counter[str] = Counter()

    def rows(self) -> Iterable[TierRow]:
        return [TierRow(block, self.size(block, len(payload)), at) for block, payload, at in self.shelf.values()]

    def write(self, block: Block, payload: memoryview) -> None:
        self.shelf[block.key] = (block, bytes(payload), time.time_ns())

    def read(self, block: Block) -> tuple[Block, memoryview]:
        if block.key not in self.shelf:
            raise FileNotFoundError(block.key.hex())
        found, payload, _ = self.shelf[block.key]
        return found, memoryview(payload)

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.shelf.pop(key, None)

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        for key, at in used:
            if key in self.shelf:
                self.shelf[key] = (*self.shelf[key][:2], at)

    def nth(self, name: str, n: int) -> bool:
        """Whether this is one of every n-th calls."""
        self.calls[name] += 1
        return self.calls[name] % n == 0


# --- remove -----------------------------------------------------------------------------------------


class KeepsAll(SmallTier):
    """`remove()` does nothing."""

    def remove(self, keys: Sequence[bytes]) -> None:
        pass


class RemovesFirst(SmallTier):
    """`remove()` forgets the first of several keys only."""

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys[:1])


class StopsAtStranger(SmallTier):
    """`remove()` stops at a key that is not there."""

    def remove(self, keys: Sequence[bytes]) -> None:
        with suppress(KeyError):
            for key in keys:
                del self.shelf[key]


class RaisesForStranger(SmallTier):
    """`remove()` raises for a key that is not there."""

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            del self.shelf[key]


class RemovesSiblings(SmallTier):
    """`remove()` takes the blocks that follow with it."""

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove([*keys, *(k for k, (block, _, _) in self.shelf.items() if block.parent in keys)])


class RemovesSeventhNot(SmallTier):
    """Every seventh `remove()` does nothing."""

    def remove(self, keys: Sequence[bytes]) -> None:
        if not self.nth("remove", 7):
            super().remove(keys)


class Unhides(SmallTier):
    """`remove()` of a block that was replaced brings back the old version."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.old: dict[bytes, tuple[Block, bytes, int]] = {}

    def write(self, block: Block, payload: memoryview) -> None:
        if block.key in self.shelf:
            self.old[block.key] = self.shelf[block.key]
        super().write(block, payload)

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys)
        for key in keys:
            if key in self.old:
                self.shelf[key] = self.old.pop(key)


class EmptiesOnNone(SmallTier):
    """`remove([])` forgets everything."""

    def remove(self, keys: Sequence[bytes]) -> None:
        super().remove(keys or list(self.shelf))


class SharesPayloads(SmallTier):
    """Blocks with equal payloads are removed together."""

    def remove(self, keys: Sequence[bytes]) -> None:
        payloads = {self.shelf[key][1] for key in keys if key in self.shelf}
        super().remove([key for key, (_, payload, _) in self.shelf.items() if payload in payloads])


class RemovesAtClose(SmallTier):
    """What was removed is back when the tier is opened again."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.gone: dict[bytes, tuple[Block, bytes, int]] = {}

    def remove(self, keys: Sequence[bytes]) -> None:
        self.gone |= {key: self.shelf[key] for key in keys if key in self.shelf}
        super().remove(keys)

    def open(self) -> None:
        self.shelf |= self.gone


# --- read -------------------------------------------------------------------------------------------


class ReadsShort(SmallTier):
    """`read()` is a byte short for some keys."""

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
    """`read()` gives the payload that was read before."""

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
    """Of payloads over 64 KiB the length is kept in 16 bits."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        return found, payload[: len(payload) % 65536 or None]


class RaisesKeyError(SmallTier):
    """`read()` of what is not there raises KeyError."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload, _ = self.shelf[block.key]
        return found, memoryview(payload)


class CallsItDamage(SmallTier):
    """`read()` of what is not there raises CacheFormatError."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        if block.key not in self.shelf:
            raise CacheFormatError("nothing there")
        return super().read(block)


class ReadsEmpty(SmallTier):
    """`read()` of what is not there gives an empty payload."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        return super().read(block) if block.key in self.shelf else (block, memoryview(b""))


class EchoesBlock(SmallTier):
    """`read()` gives the block that it was asked with, not the one that was written."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        return block, super().read(block)[1]


class GivesBytes(SmallTier):
    """`read()` gives bytes, not a memoryview."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        return found, bytes(payload)  # type: ignore[return-value]


class ReusesBuffer(SmallTier):
    """What `read()` gave is overwritten by the next `read()`."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.buffer = bytearray(1 << 20)

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found, payload = super().read(block)
        self.buffer[: len(payload)] = payload
        return found, memoryview(self.buffer)[: len(payload)]


class WritesInPlace(SmallTier):
    """A newer version of equal length is written over what `read()` gave of the old one."""

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
    """What `read()` gave cannot be used after `close()`."""

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


class TakesWhatItGives(SmallTier):
    """`read()` gives a block once."""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found = super().read(block)
        del self.shelf[block.key]
        return found


class ReadsForOneThread(SmallTier):
    """`read()` keeps what it looks for in the tier itself."""

    wanted = b""

    def read(self, block: Block) -> tuple[Block, memoryview]:
        self.wanted = block.key
        time.sleep(0)
        if self.wanted not in self.shelf:
            raise FileNotFoundError(block.key.hex())
        found, payload, _ = self.shelf[self.wanted]
        return found, memoryview(payload)


class ReadsInOwnThread(SmallTier):
    """`read()` fails in another thread than the one that opened the tier."""

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
        if block.key not in self.shelf:
            super().write(block, payload)


class KeepsOldBlock(SmallTier):
    """`write()` takes a newer payload, and keeps the old block beside it."""

    def write(self, block: Block, payload: memoryview) -> None:
        old = self.shelf.get(block.key)
        super().write(old[0] if old else block, payload)


class KeepsLonger(SmallTier):
    """A newer version that is shorter leaves the end of the old one."""

    def write(self, block: Block, payload: memoryview) -> None:
        old = self.shelf[block.key][1] if block.key in self.shelf else b""
        super().write(block, memoryview(bytes(payload) + old[len(payload) :]))


class WritesLate(SmallTier):
    """What `write()` took can be read from the next write on."""

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
    """`write()` changes the caller's payload, where it can."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        if not payload.readonly:
            payload[0] = 0


class WantsWritable(SmallTier):
    """`write()` refuses memory that is read-only."""

    def write(self, block: Block, payload: memoryview) -> None:
        if payload.readonly:
            raise TypeError("read-only")
        super().write(block, payload)


class WritesWholeBuffer(SmallTier):
    """Of a payload that is a part of a buffer, all of the buffer is written."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, memoryview(payload.obj))  # type: ignore[arg-type]


class ShortKeys(SmallTier):
    """Keys are told apart by their first byte."""

    def write(self, block: Block, payload: memoryview) -> None:
        self.remove([key for key in self.shelf if key[0] == block.key[0] and key != block.key])
        super().write(block, payload)


class KeyedByTokens(SmallTier):
    """Blocks of equal tokens at equal positions are one, whatever their namespace."""

    def write(self, block: Block, payload: memoryview) -> None:
        for key, (other, _, _) in list(self.shelf.items()):
            if key != block.key and (other.tokens, other.start) == (block.tokens, block.start):
                del self.shelf[key]
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
    """It drops its oldest block when it holds more than a hundred."""

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        if len(self.shelf) > 100:
            del self.shelf[next(iter(self.shelf))]


# --- rows and sizes -----------------------------------------------------------------------------------


class ListsTwice(SmallTier):
    """`rows()` lists a block twice."""

    def rows(self) -> Iterable[TierRow]:
        rows = list(super().rows())
        return [*rows, *rows[:1]]


class ListsFewer(SmallTier):
    """`rows()` leaves out what comes after a hundred blocks."""

    def rows(self) -> Iterable[TierRow]:
        return list(super().rows())[:100]


class ListsWrongSizes(SmallTier):
    """`rows()` counts a byte less than `size()`."""

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
    """`rows()` gives what is new since it was called last."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.listed: set[bytes] = set()

    def rows(self) -> Iterable[TierRow]:
        new = [row for row in super().rows() if row.block.key not in self.listed]
        self.listed |= {row.block.key for row in new}
        return new


class ListsStale(SmallTier):
    """`rows()` gives a list that only a `write()` renews."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.listed = list(super().rows())

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        self.listed = list(super().rows())

    def rows(self) -> Iterable[TierRow]:
        return self.listed


class CountsNothing(SmallTier):
    """`size()` counts 0, so that no budget is kept."""

    def size(self, block: Block, payload_bytes: int) -> int:
        return 0


class CountsChanging(SmallTier):
    """`size()` counts more each time."""

    def size(self, block: Block, payload_bytes: int) -> int:
        self.nth("size", 2)
        return payload_bytes + self.calls["size"]


# --- uses, set_aside, verify, mend -----------------------------------------------------------------------


class NotesNothing(SmallTier):
    """`touch()` notes nothing."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        pass


class NotesSeconds(SmallTier):
    """`touch()` takes its times for seconds."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        super().touch((key, at // 10**9) for key, at in used)


class NotesFirst(SmallTier):
    """`touch()` notes the first of several uses only."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        super().touch(list(used)[:1])


class NotesForAll(SmallTier):
    """`touch()` of one block notes a use of all."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        for _, at in used:
            super().touch((key, at) for key in list(self.shelf))


class NotesStrangers(SmallTier):
    """`touch()` raises for a block that is gone."""

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        for key, at in used:
            self.shelf[key] = (*self.shelf[key][:2], at)


class SetsNothingAside(SmallTier):
    """`set_aside()` does nothing."""

    def set_aside(self, block: Block) -> None:
        pass


class SetsAllAside(SmallTier):
    """`set_aside()` removes everything."""

    def set_aside(self, block: Block) -> None:
        self.shelf.clear()


class FindsProblems(SmallTier):
    """`verify()` tells of blocks that are well."""

    def verify(self) -> Iterator[Problem]:
        for row in self.rows():
            yield Problem(self.name, row.block.key.hex(), "it looks odd")


class VerifyRemoves(SmallTier):
    """`verify()` removes what it has looked at."""

    def verify(self) -> Iterator[Problem]:
        yield from super().verify()
        self.shelf.clear()


class MendsTooMuch(SmallTier):
    """`mend()` removes blocks that nothing follows."""

    def mend(self) -> None:
        parents = {block.parent for block, _, _ in self.shelf.values()}
        self.remove([key for key in self.shelf if key not in parents])


# --- life -------------------------------------------------------------------------------------------


class ForgetsAtClose(SmallTier):
    """`close()` forgets everything, though the tier says that it persists."""

    def close(self) -> None:
        self.shelf.clear()


class ForgetsVersions(SmallTier):
    """After a restart the first version of a block is there."""

    firsts: dict[int, dict[bytes, tuple[Block, bytes, int]]] = {}  # noqa: RUF012

    def write(self, block: Block, payload: memoryview) -> None:
        super().write(block, payload)
        self.firsts.setdefault(id(self.shelf), {}).setdefault(block.key, self.shelf[block.key])

    def open(self) -> None:
        first = self.firsts.get(id(self.shelf), {})
        for key in self.shelf:
            self.shelf[key] = first.get(key, self.shelf[key])


class OpensEmpty(SmallTier):
    """A second `open()` empties the tier."""

    def open(self) -> None:
        if self.nth("open", 2):
            self.shelf.clear()


class ClosesOnce(SmallTier):
    """A second `close()` raises."""

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        if not self.is_open:
            raise OSError("it is closed")
        self.is_open = False


class StaysClosed(SmallTier):
    """A tier that was closed is not usable when it is opened again."""

    closed = False

    @property
    def usable(self) -> bool:
        return not self.closed

    def close(self) -> None:
        self.closed = True


class WearsOut(SmallTier):
    """After twenty writes it is not usable."""

    @property
    def usable(self) -> bool:
        return self.calls["write"] < 20

    def write(self, block: Block, payload: memoryview) -> None:
        self.nth("write", 1)
        super().write(block, payload)


# --- others ------------------------------------------------------------------------------------------


class SaysInFlight(SmallTier):
    """`in_flight()` is True for some keys, though no other process writes."""

    def in_flight(self, key: bytes) -> bool:
        return key[0] % 4 == 1


class RefusesRoom(SmallTier):
    """Every fifth `reserve()` is refused."""

    def reserve(self, block: Block, n_bytes: int) -> bool:
        return not self.nth("reserve", 5)


class KeepsReservation(SmallTier):
    """What was reserved stays reserved after the write."""

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


class TellsOfRemovals(SmallTier):
    """`changes()` tells that stored blocks were removed."""

    def changes(self) -> Changes | None:
        return Changes([], list(self.shelf)[:1], complete=False)


class TellsHalf(SmallTier):
    """`changes()` says that it is complete, and lists half of what is stored."""

    def changes(self) -> Changes | None:
        rows = list(self.rows())
        return Changes(rows[: len(rows) // 2], [], complete=True)


class SaysShared(SmallTier):
    """`shared` is True, though no other process uses the tier."""

    @property
    def shared(self) -> bool:
        return True


class CountsDamage(SmallTier):
    """`damaged` counts blocks that are well."""

    def mend(self) -> None:
        self.damaged += len(self.shelf)


class RemembersRemovals(SmallTier):
    """A block that was removed cannot be written again."""

    def __init__(self, where: str, budget: int = 10**6) -> None:
        super().__init__(where, budget)
        self.gone: set[bytes] = set()

    def remove(self, keys: Sequence[bytes]) -> None:
        self.gone |= {key for key in keys if key in self.shelf}
        super().remove(keys)

    def write(self, block: Block, payload: memoryview) -> None:
        if block.key not in self.gone:
            super().write(block, payload)


class KeyedByText(SmallTier):
    """Blocks of equal tokens at several positions are one."""

    def write(self, block: Block, payload: memoryview) -> None:
        self.remove([key for key, (other, _, _) in self.shelf.items() if other.tokens == block.tokens])
        super().write(block, payload)


class LeaksReservations(SmallTier):
    """What was reserved and not written stays reserved after `tidy()`."""

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
    """While one block is written, the others cannot be read."""

    def write(self, block: Block, payload: memoryview) -> None:
        others = dict(self.shelf)
        self.shelf.clear()
        time.sleep(0.001)
        self.shelf.update(others)
        super().write(block, payload)


class LosesRarely(SmallTier):
    """After five removals, every write of a version with an even number keeps the old payload."""

    def remove(self, keys: Sequence[bytes]) -> None:
        self.nth("remove", 1)
        super().remove(keys)

    def write(self, block: Block, payload: memoryview) -> None:
        old = self.shelf.get(block.key)
        if old and self.calls["remove"] > 5 and block.recipe[0] % 2 == 0:
            payload = memoryview(old[1])
        super().write(block, payload)


FAULTY_TIERS: list[tuple[type[SmallTier], str]] = [
    (KeepsAll, "test_what_is_removed_is_gone"),
    (RemovesFirst, "test_what_is_removed_is_gone"),
    (StopsAtStranger, "test_what_is_removed_is_gone"),
    (RaisesForStranger, "test_what_is_removed_is_gone"),
    (RemovesSiblings, "test_removing_a_parent_leaves_its_children"),
    (RemovesSeventhNot, "test_what_is_removed_is_gone"),
    (Unhides, "test_a_replaced_block_does_not_come_back"),
    (EmptiesOnNone, "test_what_is_removed_is_gone"),
    (SharesPayloads, "test_equal_payloads_are_apart"),
    (RemovesAtClose, "test_a_tier_may_be_opened_again"),
    (RemembersRemovals, "test_what_was_removed_can_be_written_again"),
    (ReadsShort, "test_what_is_written_is_read"),
    (ReadsOneKeyWrong, "test_a_key_may_be_any_bytes"),
    (ReadsOther, "test_what_is_written_is_read"),
    (Strips, "test_what_is_written_is_read"),
    (Translates, "test_what_is_written_is_read"),
    (Truncates, "test_what_is_written_is_read"),
    (WrapsLong, "test_what_is_written_is_read"),
    (RaisesKeyError, "test_reading_what_is_not_there_says_so"),
    (CallsItDamage, "test_reading_what_is_not_there_says_so"),
    (ReadsEmpty, "test_reading_what_is_not_there_says_so"),
    (EchoesBlock, "test_a_newer_version_takes_the_place_of_the_old_one"),
    (GivesBytes, "test_what_is_written_is_read"),
    (ReusesBuffer, "test_what_was_read_stays"),
    (WritesInPlace, "test_what_was_read_stays"),
    (ReleasesAtClose, "test_what_was_read_stays"),
    (TakesWhatItGives, "test_what_is_written_is_read"),
    (ReadsForOneThread, "test_read_is_for_any_thread"),
    (ReadsInOwnThread, "test_read_is_for_any_thread"),
    (KeepsOld, "test_a_newer_version_takes_the_place_of_the_old_one"),
    (KeepsOldBlock, "test_a_newer_version_takes_the_place_of_the_old_one"),
    (KeepsLonger, "test_a_newer_version_takes_the_place_of_the_old_one"),
    (WritesLate, "test_what_is_written_is_read"),
    (LosesSome, "test_what_is_written_is_read"),
    (LosesRarely, "test_many_calls_in_any_order_agree_with_a_model"),
    (RewritesAll, "test_reads_go_on_during_writes"),
    (WipesPayload, "test_a_payload_is_lent"),
    (WantsWritable, "test_what_is_written_is_read"),
    (WritesWholeBuffer, "test_a_payload_is_lent"),
    (ShortKeys, "test_a_key_may_be_any_bytes"),
    (KeyedByTokens, "test_namespaces_are_apart"),
    (KeyedByText, "test_a_long_chain_is_held"),
    (ForgetsReason, "test_blocks_come_back_as_they_were_written"),
    (ShortSlices, "test_blocks_come_back_as_they_were_written"),
    (EvictsByItself, "test_many_blocks_are_held_at_once"),
    (ListsTwice, "test_many_blocks_are_held_at_once"),
    (ListsFewer, "test_many_blocks_are_held_at_once"),
    (ListsWrongSizes, "test_sizes_add_up"),
    (ListsOldSizes, "test_a_newer_version_takes_the_place_of_the_old_one"),
    (ListsOnce, "test_what_is_written_is_read"),
    (ListsStale, "test_what_is_removed_is_gone"),
    (CountsNothing, "test_sizes_add_up"),
    (CountsChanging, "test_sizes_add_up"),
    (NotesNothing, "test_uses_are_noted"),
    (NotesSeconds, "test_uses_are_noted"),
    (NotesFirst, "test_uses_are_noted"),
    (NotesForAll, "test_uses_are_noted"),
    (NotesStrangers, "test_uses_are_noted"),
    (SetsNothingAside, "test_what_is_set_aside_is_gone"),
    (SetsAllAside, "test_what_is_set_aside_is_gone"),
    (FindsProblems, "test_a_sound_tier_has_no_problems"),
    (VerifyRemoves, "test_a_sound_tier_has_no_problems"),
    (MendsTooMuch, "test_a_sound_tier_has_no_problems"),
    (CountsDamage, "test_a_sound_tier_has_no_problems"),
    (ForgetsAtClose, "test_what_persists_is_there_after_a_restart"),
    (ForgetsVersions, "test_what_persists_is_there_after_a_restart"),
    (OpensEmpty, "test_a_tier_may_be_opened_again"),
    (ClosesOnce, "test_a_tier_may_be_opened_again"),
    (StaysClosed, "test_a_tier_may_be_opened_again"),
    (WearsOut, "test_what_is_written_is_read"),
    (SaysInFlight, "test_nobody_else_is_at_work"),
    (RefusesRoom, "test_what_is_written_is_read"),
    (KeepsReservation, "test_what_is_written_is_read"),
    (LeaksReservations, "test_a_reservation_may_be_given_up"),
    (Swallows, "test_exclusive_lets_go"),
    (TellsOfRemovals, "test_nobody_else_is_at_work"),
    (TellsHalf, "test_nobody_else_is_at_work"),
    (SaysShared, "test_a_tier_says_what_it_is"),
]
