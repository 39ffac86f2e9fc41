"""Stub backends with one fault each, and the rule of `BackendConformance` that finds it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine import Batch, Limits
from erllama.engine.backends.stub import StubBackend, StubVocabulary
from erllama.engine.embedding import EmbeddingLimits
from erllama.errors import BackendError, CellsExhausted, StateError


class Peeks(StubBackend):
    """What other sequences hold shows in the logits."""

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        return super()._logits(sequence) + np.float32(sum(self._held) - self._held[sequence])


class Batches(StubBackend):
    """A row's logits depend on how many rows there are."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch) * np.float32(1 + len(batch.tokens) / 20)


class Reverses(StubBackend):
    """Rows come in another order."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch)[::-1]


class Sorts(StubBackend):
    """Rows come in the order of sequences."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        order = np.argsort(batch.sequences[batch.output != 0], kind="stable")
        return super().decode(batch)[order]


class Doubles(StubBackend):
    """Logits are of another type."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch).astype(np.float64)  # type: ignore[return-value]


class Overflows(StubBackend):
    """One logit is infinite."""

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        logits = super()._logits(sequence)
        logits[7] = np.inf
        return logits


class GivesAll(StubBackend):
    """Every row gives logits."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch._replace(output=np.ones_like(batch.output)))


class Jitters(StubBackend):
    """The last bits differ from time to time."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch) * np.float32(1 + 1e-6 * (self.tokens_decoded % 7))


class Ignores(StubBackend):
    """The first token has no effect."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch._replace(tokens=np.where(batch.positions == 0, 0, batch.tokens)))


class TakesGaps(StubBackend):
    """Positions are not looked at."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        at = {int(s): self._held[s] for s in batch.sequences}
        positions = batch.positions.copy()
        for row, sequence in enumerate(batch.sequences.tolist()):
            positions[row], at[sequence] = at[sequence], at[sequence] + 1
        return super().decode(batch._replace(positions=positions))


class TakesMuch(StubBackend):
    """Batches are as large as one likes."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        half = self.limits.n_batch // 2 + 1
        if len(batch.tokens) <= self.limits.n_batch or len(batch.tokens) > self.limits.n_ctx:
            return super().decode(batch)
        first = super().decode(Batch(*(column[:half] for column in batch)))
        return np.concatenate([first, super().decode(Batch(*(column[half:] for column in batch)))])


class ComputesSome(StubBackend):
    """Of a batch that does not fit, what fits is kept."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        n = self.limits.n_ctx - self.cells_used
        if 0 < n < len(batch.tokens):
            super().decode(Batch(*(column[:n] for column in batch)))
            raise CellsExhausted("now there are none")
        return super().decode(batch)


class RestoresBadly(StubBackend):
    """The last restored position's KV is wrong."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        self._kv[self._table[sequence, end - 1]] ^= np.uint64(1)


class RestoresInPlace(StubBackend):
    """A payload serves only the sequence that it was packed from."""

    packed_from = 0

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        self.packed_from = sequence
        return super().pack(sequence, start, end)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        if sequence != self.packed_from:
            raise StateError("the payload of another sequence")
        super().restore(sequence, start, end, payload)


class RestoresLater(StubBackend):
    """The payload is read at the next decode, when it may be gone."""

    late: Sequence[tuple[int, int, int, memoryview]] = ()

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        self.late = [*self.late, (sequence, start, end, payload)]

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        for sequence, start, end, payload in self.late:
            self._kv[self._table[sequence, start:end]] = np.frombuffer(payload, np.uint64, offset=16)
        self.late = ()
        return super().decode(batch)


class Trusts(StubBackend):
    """Any payload is taken."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        raw = super().pack(0, 0, 1).tobytes()[:8] if self._held[0] else bytes(8)
        head = raw + np.array([start, end], np.uint32).tobytes()
        body = bytes(payload)[16:].ljust(8 * (end - start), b"\0")[: 8 * (end - start)]
        super().restore(sequence, start, end, memoryview(head + body))


class TakesOthers(Trusts):
    """A payload of the right length is taken for any positions."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        if len(payload) != 16 + 8 * (end - start):
            raise StateError("of another length")
        super().restore(sequence, start, end, payload)


class DropsWhatItRefuses(StubBackend):
    """A payload that does not fit empties the sequence."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        try:
            super().restore(sequence, start, end, payload)
        except StateError:
            self.drop(sequence)
            raise


class LeavesHoles(StubBackend):
    """Restores wherever it is told to."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        self._held[sequence] = start
        super().restore(sequence, start, end, payload)


class PacksIntoOneBuffer(StubBackend):
    """What was packed is overwritten by the next."""

    buffer = np.zeros(1 << 16, np.uint8)

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        payload = super().pack(sequence, start, end)
        self.buffer[: len(payload)] = payload
        return self.buffer[: len(payload)]

    def close(self) -> None:
        self.buffer[:] = 0


class PackingForgets(StubBackend):
    """A sequence that is packed is spoilt."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        payload = super().pack(sequence, start, end)
        self._kv[self._table[sequence, start]] ^= np.uint64(1)
        return payload


class PacksMore(StubBackend):
    """Positions that are not held are packed, too."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        held, self._held[sequence] = self._held[sequence], end
        try:
            return super().pack(sequence, start, end)
        finally:
            self._held[sequence] = held


class CutsBadly(StubBackend):
    """A cut spoils the last position that is left."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(sequence, end)
        if end:
            self._kv[self._table[sequence, end - 1]] ^= np.uint64(1)


class CutsWhatCannotBe(StubBackend):
    """Memory that cannot be cut is cut."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64, can_trim=False)

    def cut(self, sequence: int, end: int) -> None:
        self._release(sequence, end)


class CopiesShares(StubBackend):
    """Sharing takes cells."""

    def share(self, source: int, target: int, end: int) -> None:
        for at in range(0, end, 8):
            packed = self.pack(source, at, min(at + 8, end))
            self.restore(target, at, min(at + 8, end), memoryview(packed.tobytes()))


class FreesShared(StubBackend):
    """A cell is free when the first of its holders lets go."""

    def _release(self, sequence: int, end: int) -> None:
        self._holders[self._table[sequence, end : self._held[sequence]]] = 0
        self._held[sequence] = end


class SharesAll(StubBackend):
    """The target writes into the source's table."""

    def share(self, source: int, target: int, end: int) -> None:
        super().share(source, target, end)
        self._kv[self._table[target, end - 1]] ^= np.uint64(end != self._held[source])


class Leaks(StubBackend):
    """Cells of dropped sequences stay taken."""

    def drop(self, sequence: int) -> None:
        self._held[sequence] = 0


class DropsAll(StubBackend):
    """Dropping one sequence empties all."""

    def drop(self, sequence: int) -> None:
        self.clear()


class ClearsOne(StubBackend):
    """Clearing empties the first sequence."""

    def clear(self) -> None:
        self._release(0, 0)


class Deaf(StubBackend):
    """Aborts are not heard."""

    def abort(self, on: bool) -> None:
        pass


class HoldsItsBreath(StubBackend):
    """While it is aborted, nothing can be packed."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        if self._aborted:
            raise BackendError("aborted")
        return super().pack(sequence, start, end)


class StaysAborted(StubBackend):
    """An abort cannot be taken back."""

    def abort(self, on: bool) -> None:
        super().abort(True)


class ClosesOnce(StubBackend):
    """A second close fails."""

    def close(self) -> None:
        if self._aborted:
            raise BackendError("closed")
        super().close()


class ShortRecipe(StubBackend):
    """The recipe is too short."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64)
        self.recipe = self.recipe[:8]


class OwnNamespace(StubBackend):
    """No two instances share anything."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64)
        self.namespace = {"backend": "stub", "instance": id(self)}


class ListedNamespace(StubBackend):
    """The namespace has a list in it."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64)
        self.namespace = {"backend": "stub", "sizes": [64]}  # type: ignore[dict-item]


class LowerCase(StubBackend):
    """Texts come back in small letters."""

    class Vocabulary(StubVocabulary):
        def tokenize(
            self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
        ) -> NDArray[np.int32]:
            return super().tokenize(source.lower())

    def __init__(self) -> None:
        super().__init__(n_ctx=64)
        self.vocabulary = self.Vocabulary()


class CountsEnds(StubBackend):
    """is_eog is a list of ids."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64)
        self.vocabulary.is_eog = np.flatnonzero(self.vocabulary.is_eog)  # type: ignore[assignment]


class NoRoom(StubBackend):
    """Sizes contradict each other."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64, n_batch=16, n_ubatch=32)


class EndsEarly(StubBackend):
    """After the last cell comes another error."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        if batch.positions.max() >= self.limits.n_ctx:
            raise BackendError("a position out of range")
        return super().decode(batch)


class OneAtATime(StubBackend):
    """Rows that begin a sequence and rows that go on with one are not mixed."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        begun = {self._held[sequence] > 0 for sequence in batch.sequences}
        return super().decode(batch) * np.float32(len(begun))


class RestoresOneBlock(StubBackend):
    """Only the first of several blocks comes back as it was."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if start:
            self._kv[self._table[sequence, start]] ^= np.uint64(1)


class PacksOnce(StubBackend):
    """What was restored packs to nonsense."""

    nonsense = np.uint64(0)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        self.nonsense = np.uint64(1)

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        self._kv[self._table[sequence, start]] ^= self.nonsense
        payload = super().pack(sequence, start, end)
        self._kv[self._table[sequence, start]] ^= self.nonsense
        return payload


class PacksOwn(StubBackend):
    """Cells that others hold, too, are not packed."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        cells = self._table[sequence, start:end]
        kept = self._kv[cells]
        self._kv[cells[self._holders[cells] > 1]] = 0
        payload = super().pack(sequence, start, end)
        self._kv[cells] = kept
        return payload


class RunsOut(StubBackend):
    """Too few cells for a restore raise another error."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        if self.limits.n_ctx - self.cells_used < end - start:
            raise CellsExhausted("no cells")
        super().restore(sequence, start, end, payload)


class CutsLonger(StubBackend):
    """A cut after the end makes the sequence longer."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(sequence, end)
        self._held[sequence] = end


class CutsSlices(StubBackend):
    """A cut falls on multiples of four."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(sequence, end // 4 * 4)


# --- faults that show in some calls, sequences, positions and payloads only ----------------------------


class Sometimes(StubBackend):
    """Counts calls."""

    calls: Counter[str]

    def nth(self, name: str, n: int) -> bool:
        """Whether this is one of every n-th calls."""
        if "calls" not in vars(self):
            self.calls = Counter()
        self.calls[name] += 1
        return self.calls[name] % n == 0

    def spoil(self, sequence: int, position: int) -> None:
        """Make a position's KV wrong."""
        self._kv[self._table[sequence, position]] ^= np.uint64(1)


class SharesForty(Sometimes):
    """Sharing is wrong from the fortieth position on."""

    def share(self, source: int, target: int, end: int) -> None:
        super().share(source, target, min(end, 40))
        if end > 40:
            self.copy(source, target, end)

    def copy(self, source: int, target: int, end: int) -> None:
        self._hold(target, 40, self._table[source, 39 : end - 1].copy())


class PacksStale(Sometimes):
    """`pack()` gives what it packed before a cut."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.kept: dict[tuple[int, int, int], NDArray[np.uint8]] = {}

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        place = (sequence, start, end)
        if place not in self.kept:
            self.kept[place] = super().pack(sequence, start, end)
        return self.kept[place].copy()

    def drop(self, sequence: int) -> None:
        super().drop(sequence)
        self.kept = {place: kept for place, kept in self.kept.items() if place[0] != sequence}

    def clear(self) -> None:
        super().clear()
        self.kept.clear()


class PacksStaleAfterDrop(PacksStale):
    """`pack()` gives what it packed before a drop."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(sequence, end)
        self.kept.clear()

    def drop(self, sequence: int) -> None:
        StubBackend.drop(self, sequence)


class RestoresFrom32(Sometimes):
    """`restore()` is wrong from position 32 on."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        for position in range(max(start, 32), end):
            self.spoil(sequence, position)


class RestoresFrom256(Sometimes):
    """`restore()` of positions after 256 is wrong."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if end > 256:
            self.spoil(sequence, end - 1)


class PacksTooFew(Sometimes):
    """The last of more than a hundred positions is packed as the one before it."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        payload = super().pack(sequence, start, end)
        if end - start > 100:
            payload[-8:] = payload[-16:-8]
        return payload


class RestoresInFirst(Sometimes):
    """`restore()` is right for sequence 0 only."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if sequence:
            self.spoil(sequence, start)


class RestoresSeventhNot(Sometimes):
    """Every seventh `restore()` is wrong."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if self.nth("restore", 7):
            self.spoil(sequence, end - 1)


class RestoresAfterClear(Sometimes):
    """After the second `clear()`, what is restored is wrong."""

    def clear(self) -> None:
        super().clear()
        self.nth("clear", 1)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if vars(self).get("calls", Counter())["clear"] > 1:
            self.spoil(sequence, start)


class WipesPayload(Sometimes):
    """`restore()` changes the caller's payload, where it can."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if not payload.readonly:
            payload[0] ^= 1


class WipesBatch(Sometimes):
    """`decode()` counts up the caller's positions."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        batch.positions[:] += 1
        return logits


class DecodesSeventhNot(Sometimes):
    """Every seventh decode gives other logits."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        return -logits if self.nth("decode", 7) else logits


class DecodesSecond(Sometimes):
    """Logits of sequence 1 are wrong."""

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        logits = super()._logits(sequence)
        return -logits if sequence == 1 else logits


class DecodesLast(Sometimes):
    """Logits of the last sequence are wrong."""

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        logits = super()._logits(sequence)
        return -logits if sequence == self.limits.n_sequences - 1 else logits


class DecodesOdd(Sometimes):
    """A slice that begins at an odd position after 64 is computed wrongly."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        first = int(batch.positions[0])
        return -logits if first > 64 and first % 2 else logits


class IgnoresOne(Sometimes):
    """The token at position 100 has no effect."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch._replace(tokens=np.where(batch.positions == 100, 0, batch.tokens)))


class SwapsRows(Sometimes):
    """Two rows of logits of one batch are swapped where there are four and more."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        if len(logits) >= 4:
            logits[[1, 2]] = logits[[2, 1]]
        return logits


class SeesNeighbour(Sometimes):
    """In a batch of several sequences, the last token of another shows."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        if len(set(batch.sequences.tolist())) > 2:
            logits[0] += np.float32(batch.tokens[-1])
        return logits


class ReturnsOldLogits(Sometimes):
    """A batch of as many rows as the last one without output between gives the last one's logits."""

    before: NDArray[np.float32] | None = None

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        given = logits
        if self.before is not None and len(batch.tokens) == 1 and batch.positions[0] % 16 == 15:
            given = self.before[-1:] if len(self.before) else logits
        self.before = logits
        return given


class SharesOneMore(Sometimes):
    """A target holds one position more than it was told."""

    def share(self, source: int, target: int, end: int) -> None:
        super().share(source, target, min(end + 1, self._held[source]))


class SharesSwapped(Sometimes):
    """`share()` takes its source for its target where both are empty or hold something else."""

    def share(self, source: int, target: int, end: int) -> None:
        if source > target:
            source, target = target, source
        super().share(source, target, end)


class SharesNothing(Sometimes):
    """`share()` of no positions fails."""

    def share(self, source: int, target: int, end: int) -> None:
        if not end:
            raise BackendError("nothing to share")
        super().share(source, target, end)


class SharesTwice(Sometimes):
    """The second target of a source holds wrong KV."""

    def share(self, source: int, target: int, end: int) -> None:
        super().share(source, target, end)
        if self.nth("share", 2) and end:
            self._table[target, end - 1] = self._table[source, 0]
            self._holders[self._table[source, 0]] += 1
            self._holders[self._table[source, end - 1]] -= 1


class SharersWrite(Sometimes):
    """What a target computes after a share of a whole sequence, its source holds, too."""

    def share(self, source: int, target: int, end: int) -> None:
        super().share(source, target, end)
        if end == self._held[source]:
            self._table[target] = self._table[source]

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        twins = [s for s in range(1, len(self._held)) if self._held[s] and self._held[0] == self._held[s] - 1]
        for twin in twins:
            at = self._held[0]
            if at and self._table[0, at - 1] == self._table[twin, at - 1]:
                self._hold(0, at, self._table[twin, at : at + 1].copy())
        return logits


class CutsOneMore(Sometimes):
    """A cut at a multiple of 16 takes one position more."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(sequence, end - 1 if end and end % 16 == 0 else end)


class CutsFirst(Sometimes):
    """`cut()` cuts sequence 0, whatever it is told."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(0, end)


class CutKeepsCells(Sometimes):
    """After a cut, the cells of the first position that is dropped stay taken."""

    def cut(self, sequence: int, end: int) -> None:
        if end < self._held[sequence]:
            self._holders[self._table[sequence, end]] += 1
        super().cut(sequence, end)


class DropsNext(Sometimes):
    """`drop()` of an empty sequence drops the next one."""

    def drop(self, sequence: int) -> None:
        if not self._held[sequence]:
            sequence = (sequence + 1) % len(self._held)
        super().drop(sequence)


class ClearLeavesLast(Sometimes):
    """`clear()` leaves the last sequence."""

    def clear(self) -> None:
        for sequence in range(len(self._held) - 1):
            self._release(sequence, 0)


class CopiesOnRestore(Sometimes):
    """`restore()` takes one cell more than it needs."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        free = np.flatnonzero(self._holders == 0)
        if len(free):
            self._holders[free[0]] += 1


class DropsRefused(Sometimes):
    """A batch that does not fit empties the sequence that has the most."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        try:
            return super().decode(batch)
        except CellsExhausted:
            self._release(int(np.argmax(self._held)), 0)
            raise


class StaysBroken(Sometimes):
    """After a decode that failed, `clear()` does not make the logits right again."""

    broken = False

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        try:
            logits = super().decode(batch)
        except CellsExhausted:
            raise
        except BackendError:
            self.broken = True
            raise
        return -logits if self.broken else logits


class ChangesRecipe(Sometimes):
    """The recipe changes with use."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        self.recipe = bytes([len(batch.tokens) % 256]) * 16
        return logits


class ChangesLimits(Sometimes):
    """`limits` gives the cells that are free now."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        sizes = self.limits
        self.limits = Limits(
            sizes.n_ctx - 1,
            sizes.n_batch,
            sizes.n_ubatch,
            sizes.n_vocab,
            sizes.can_trim,
            n_sequences=sizes.n_sequences,
        )
        return logits


class TextsForOneThread(Sometimes):
    """The vocabulary keeps what it works on in itself."""

    class Vocabulary(StubVocabulary):
        source: str | bytes = ""

        def tokenize(
            self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
        ) -> NDArray[np.int32]:
            self.source = source
            time.sleep(0)
            return super().tokenize(self.source)

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.vocabulary = self.Vocabulary()


class LosesLastByte(Sometimes):
    """A text of more than twenty bytes loses its last one."""

    class Vocabulary(StubVocabulary):
        def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
            return super().detokenize(tokens[:-1] if len(tokens) > 20 else tokens)

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.vocabulary = self.Vocabulary()


class SmallEmbedder:
    """A correct embedder: the sum of what its text's tokens give."""

    limits = EmbeddingLimits(n_tokens=64, n_batch=64, n_sequences=8, pooling="mean")
    aborted = closed = False

    def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
        if self.aborted or self.closed:
            raise BackendError("aborted")
        return [self.one(text, pooling) for text in texts]

    def one(self, text: NDArray[np.int32], pooling: str) -> NDArray[np.float32]:
        rows = np.array([np.random.Generator(np.random.PCG64(int(t))).random(4) for t in text], np.float32)
        return rows if pooling == "none" else rows.mean(axis=0, dtype=np.float32)

    def pair(self, query: str, document: str) -> NDArray[np.int32]:
        raise BackendError("it does not rank")

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True


class EmbeddingStub(StubBackend):
    """A stub that embeds."""

    kind = SmallEmbedder

    def embedder(self) -> SmallEmbedder:
        return self.kind()


class EmbedsBackwards(EmbeddingStub):
    """Embeddings come in reverse order where there are three texts and more."""

    class kind(SmallEmbedder):  # noqa: N801
        def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
            found = super().embed(texts, pooling)
            return found[::-1] if len(found) > 2 else found


class EmbedsByLength(EmbeddingStub):
    """Embeddings come in the order of the texts' lengths."""

    class kind(SmallEmbedder):  # noqa: N801
        def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
            return super().embed(sorted(texts, key=len), pooling)


class EmbedsTogether(EmbeddingStub):
    """The first text's tokens show in the last text's embedding."""

    class kind(SmallEmbedder):  # noqa: N801
        def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
            found = super().embed(texts, pooling)
            if len(texts) > 1:
                found[-1] = found[-1] + np.float32(texts[0][0])
            return found


class EmbedsPooled(EmbeddingStub):
    """Pooling "none" gives one row."""

    class kind(SmallEmbedder):  # noqa: N801
        def one(self, text: NDArray[np.int32], pooling: str) -> NDArray[np.float32]:
            return super().one(text, "mean")


class EmbedsDoubles(EmbeddingStub):
    """Embeddings are of another type."""

    class kind(SmallEmbedder):  # noqa: N801
        def one(self, text: NDArray[np.int32], pooling: str) -> NDArray[np.float32]:
            return super().one(text, pooling).astype(np.float64)


class EmbedsOn(EmbeddingStub):
    """`abort` of an embedder is not heard."""

    class kind(SmallEmbedder):  # noqa: N801
        def abort(self) -> None:
            pass


class EmbedderClosesOnce(EmbeddingStub):
    """A second `close` of an embedder fails."""

    class kind(SmallEmbedder):  # noqa: N801
        def close(self) -> None:
            if self.closed:
                raise BackendError("closed")
            super().close()


# Those that show in almost any call.
FAULTY_BACKENDS: list[tuple[type[StubBackend], str]] = [
    (NoRoom, "test_limits_are_sane"),
    (OwnNamespace, "test_the_namespace_is_of_plain_values_and_stays"),
    (ListedNamespace, "test_the_namespace_is_of_plain_values_and_stays"),
    (ShortRecipe, "test_the_recipe_is_sixteen_bytes_and_stays"),
    (LowerCase, "test_texts_come_back"),
    (CountsEnds, "test_every_token_has_bytes_and_may_end_a_reply"),
    (Doubles, "test_rows_with_output_give_logits_in_their_order"),
    (Overflows, "test_rows_with_output_give_logits_in_their_order"),
    (Reverses, "test_rows_with_output_give_logits_in_their_order"),
    (GivesAll, "test_rows_without_output_give_none"),
    (Ignores, "test_every_token_counts"),
    (Jitters, "test_the_same_batch_gives_the_same_bits"),
    (Batches, "test_a_prompt_may_come_in_parts"),
    (Peeks, "test_sequences_do_not_see_each_other"),
    (Sorts, "test_rows_of_sequences_may_be_mixed"),
    (TakesGaps, "test_positions_follow_on"),
    (TakesMuch, "test_a_batch_is_no_larger_than_n_batch"),
    (ComputesSome, "test_a_mixed_batch_that_does_not_fit_changes_no_sequence"),
    (PackingForgets, "test_packing_changes_nothing"),
    (PacksIntoOneBuffer, "test_a_payload_is_the_callers"),
    (RestoresBadly, "test_what_comes_back_has_the_bits_of_what_never_left"),
    (RestoresLater, "test_what_comes_back_has_the_bits_of_what_never_left"),
    (RestoresInPlace, "test_a_payload_may_go_anywhere"),
    (PacksMore, "test_only_what_is_held_can_be_packed"),
    (Trusts, "test_a_payload_that_does_not_fit_is_refused"),
    (DropsWhatItRefuses, "test_a_payload_that_does_not_fit_is_refused"),
    (TakesOthers, "test_a_payload_is_of_its_positions"),
    (LeavesHoles, "test_a_payload_goes_to_the_end"),
    (CutsBadly, "test_a_sequence_that_was_cut_was_never_longer"),
    (CutsWhatCannotBe, "test_memory_that_cannot_be_cut_says_so"),
    (DropsAll, "test_a_dropped_sequence_is_empty_and_alone"),
    (ClearsOne, "test_clear_empties_every_sequence"),
    (Leaks, "test_cells_that_are_let_go_are_free"),
    (SharesAll, "test_what_is_shared_goes_on_as_its_source_would"),
    (CopiesShares, "test_sharing_takes_no_cells"),
    (FreesShared, "test_who_shares_may_go"),
    (Deaf, "test_an_abort_ends_decodes_until_it_is_taken_back"),
    (StaysAborted, "test_an_abort_ends_decodes_until_it_is_taken_back"),
    (ClosesOnce, "test_closing_twice_does_no_harm"),
    (TakesGaps, "test_positions_do_not_repeat"),
    (ComputesSome, "test_a_batch_that_does_not_fit_changes_nothing"),
    (EndsEarly, "test_a_sequence_is_no_longer_than_the_context"),
    (RestoresOneBlock, "test_blocks_come_back_one_after_another"),
    (RestoresOneBlock, "test_any_range_can_be_packed"),
    (PacksOnce, "test_what_is_restored_can_be_packed_again"),
    (PacksOwn, "test_what_is_shared_can_be_packed"),
    (RunsOut, "test_restoring_takes_cells"),
    (CutsLonger, "test_cutting_what_is_not_there_changes_nothing"),
    (CutsSlices, "test_cutting_in_the_middle_of_a_slice"),
    (HoldsItsBreath, "test_an_abort_ends_decodes_alone"),
    (Deaf, "test_an_abort_may_come_at_any_time"),
    (OneAtATime, "test_a_prompt_may_be_read_while_others_are_answered"),
    (LowerCase, "test_pieces_make_up_the_text"),
]

# Those that show in some calls, sequences, positions and payloads only.
RARELY_FAULTY_BACKENDS: list[tuple[type[StubBackend], str]] = [
    (SharesForty, "test_any_length_can_be_shared"),
    (SharesOneMore, "test_any_length_can_be_shared"),
    (SharesSwapped, "test_any_length_can_be_shared"),
    (SharesNothing, "test_any_length_can_be_shared"),
    (SharesTwice, "test_any_length_can_be_shared"),
    (SharersWrite, "test_nothing_is_remembered_of_what_was_dropped"),
    (PacksStale, "test_nothing_is_remembered_of_what_was_dropped"),
    (PacksStaleAfterDrop, "test_nothing_is_remembered_of_what_was_dropped"),
    (PacksTooFew, "test_long_sequences_come_back_at_each_length"),
    (RestoresFrom32, "test_long_sequences_come_back_at_each_length"),
    (RestoresFrom256, "test_long_sequences_come_back_at_each_length"),
    (RestoresInFirst, "test_long_sequences_come_back_at_each_length"),
    (RestoresSeventhNot, "test_long_sequences_come_back_at_each_length"),
    (RestoresAfterClear, "test_long_sequences_come_back_at_each_length"),
    (WipesPayload, "test_long_sequences_come_back_at_each_length"),
    (CopiesOnRestore, "test_long_sequences_come_back_at_each_length"),
    (WipesBatch, "test_long_prompts_may_come_in_any_slices"),
    (DecodesSeventhNot, "test_long_prompts_may_come_in_any_slices"),
    (DecodesOdd, "test_long_prompts_may_come_in_any_slices"),
    (SwapsRows, "test_long_prompts_may_come_in_any_slices"),
    (ReturnsOldLogits, "test_long_prompts_may_come_in_any_slices"),
    (DecodesSecond, "test_all_sequences_generate_together"),
    (DecodesLast, "test_all_sequences_generate_together"),
    (SeesNeighbour, "test_all_sequences_generate_together"),
    (IgnoresOne, "test_every_token_of_a_long_prompt_counts"),
    (CutsOneMore, "test_a_long_sequence_can_be_cut_anywhere"),
    (CutsFirst, "test_sharers_go_their_own_ways"),
    (CutKeepsCells, "test_cells_that_are_let_go_are_free"),
    (DropsNext, "test_many_calls_in_any_order_agree_with_a_model"),
    (ClearLeavesLast, "test_clear_empties_every_sequence"),
    (DropsRefused, "test_a_batch_that_does_not_fit_changes_nothing"),
    (StaysBroken, "test_a_batch_is_no_larger_than_n_batch"),
    (ChangesRecipe, "test_the_recipe_is_sixteen_bytes_and_stays"),
    (ChangesLimits, "test_the_recipe_is_sixteen_bytes_and_stays"),
    (TextsForOneThread, "test_the_vocabulary_is_for_any_thread"),
    (LosesLastByte, "test_texts_come_back"),
    (EmbedsBackwards, "test_texts_are_embedded_in_their_order"),
    (EmbedsByLength, "test_texts_are_embedded_in_their_order"),
    (EmbedsTogether, "test_texts_are_embedded_in_their_order"),
    (EmbedsPooled, "test_texts_are_embedded_in_their_order"),
    (EmbedsDoubles, "test_texts_are_embedded_in_their_order"),
    (EmbedsOn, "test_embedding_can_be_aborted"),
    (EmbedderClosesOnce, "test_embedding_can_be_aborted"),
]
