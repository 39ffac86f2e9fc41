"""Stub backends with one fault each, and the rule of `BackendConformance` that finds it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine import Batch, LargestLogits, Limits, PackedBlock
from erllama.engine.backends.stub import StubBackend, StubVocabulary
from erllama.engine.embedding import EmbeddingLimits
from erllama.errors import BackendError, CellsExhausted, StateError


class Peeks(StubBackend):
    """Tokens of other sequences change the logits."""

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        return super()._logits(sequence) + np.float32(sum(self._lengths) - self._lengths[sequence])


class Batches(StubBackend):
    """The logits of a row depend on the number of rows."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch) * np.float32(1 + len(batch.tokens) / 20)


class Reverses(StubBackend):
    """Rows are returned in another order."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch)[::-1]


class Sorts(StubBackend):
    """Rows are returned in the order of sequences."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        order = np.argsort(batch.sequences[batch.output != 0], kind="stable")
        return super().decode(batch)[order]


class Doubles(StubBackend):
    """Logits have another dtype."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch).astype(np.float64)  # type: ignore[return-value]


class Overflows(StubBackend):
    """One logit is infinite."""

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        logits = super()._logits(sequence)
        logits[7] = np.inf
        return logits


class ReturnsAllRows(StubBackend):
    """Every row has logits."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch._replace(output=np.ones_like(batch.output)))


class Jitters(StubBackend):
    """The last bits of logits change from call to call."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch) * np.float32(1 + 1e-6 * (self.tokens_decoded % 7))


class Ignores(StubBackend):
    """The first token has no effect."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        return super().decode(batch._replace(tokens=np.where(batch.positions == 0, 0, batch.tokens)))


class Selects(StubBackend):
    """Selects logits as numpy does."""

    def argmax(self, logits: NDArray[np.float32]) -> list[int]:
        best = logits.argmax(axis=1).tolist()
        return [int(token) if np.isfinite(row[token]) else -1 for token, row in zip(best, logits, strict=True)]

    def top_k(self, logits: NDArray[np.float32], out: LargestLogits) -> None:
        keys = np.where(np.isnan(logits), -np.inf, -logits)
        out.ids[:] = np.lexsort((~np.isnan(logits), keys))[:, : out.ids.shape[1]]
        out.logits[:] = np.take_along_axis(logits, out.ids, 1)


class SelectsLastOfEqual(Selects):
    """Of equal logits, the last one counts as the largest."""

    def argmax(self, logits: NDArray[np.float32]) -> list[int]:
        last = logits.shape[1] - 1
        return [last - token if token >= 0 else -1 for token in super().argmax(logits[:, ::-1])]


class SelectsUnstably(Selects):
    """Equal logits are in another order."""

    def top_k(self, logits: NDArray[np.float32], out: LargestLogits) -> None:
        out.ids[:] = np.argsort(logits, axis=1, kind="stable")[:, ::-1][:, : out.ids.shape[1]]
        out.logits[:] = np.take_along_axis(logits, out.ids, 1)


class SelectsBesideNaN(Selects):
    """NaN is not seen."""

    def top_k(self, logits: NDArray[np.float32], out: LargestLogits) -> None:
        super().top_k(np.nan_to_num(logits, nan=-np.inf, posinf=np.inf, neginf=-np.inf), out)


class AcceptsGaps(StubBackend):
    """Positions are not checked."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        at = {int(s): self._lengths[s] for s in batch.sequences}
        positions = batch.positions.copy()
        for row, sequence in enumerate(batch.sequences.tolist()):
            positions[row], at[sequence] = at[sequence], at[sequence] + 1
        return super().decode(batch._replace(positions=positions))


class AcceptsLargeBatches(StubBackend):
    """Batches may have any size."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        half = self.limits.n_batch // 2 + 1
        if len(batch.tokens) <= self.limits.n_batch or len(batch.tokens) > self.limits.n_ctx:
            return super().decode(batch)
        first = super().decode(Batch(*(column[:half] for column in batch)))
        return np.concatenate([first, super().decode(Batch(*(column[half:] for column in batch)))])


class ComputesSome(StubBackend):
    """The part of a batch that fits is computed."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        n = self.limits.n_ctx - self.cells_used
        if 0 < n < len(batch.tokens):
            super().decode(Batch(*(column[:n] for column in batch)))
            raise CellsExhausted("now there are none")
        return super().decode(batch)


class RestoresBadly(StubBackend):
    """The KV of the last restored position is wrong."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        self._kv[self._table[sequence, end - 1]] ^= np.uint64(1)


class RestoresFirstTogether(StubBackend):
    """Of several blocks restored together, only the first is right."""

    def restore_blocks(self, sequence: int, blocks: Sequence[PackedBlock]) -> None:
        for block in blocks:
            self.restore(sequence, *block)
        self._kv[self._table[sequence, blocks[0].end : blocks[-1].end]] ^= np.uint64(1)


class KeepsRestoredBlocks(StubBackend):
    """If one of several blocks restored together does not fit, those before it stay."""

    def restore_blocks(self, sequence: int, blocks: Sequence[PackedBlock]) -> None:
        for block in blocks:
            self.restore(sequence, *block)


class RestoresInPlace(StubBackend):
    """A payload restores only into the sequence that it was packed from."""

    packed_from = 0

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        self.packed_from = sequence
        return super().pack(sequence, start, end)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        if sequence != self.packed_from:
            raise StateError("the payload of another sequence")
        super().restore(sequence, start, end, payload)


class RestoresLater(StubBackend):
    """The payload is read at the next decode, when it may have changed."""

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
    """Any payload is accepted."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        raw = super().pack(0, 0, 1).tobytes()[:8] if self._lengths[0] else bytes(8)
        head = raw + np.array([start, end], np.uint32).tobytes()
        body = bytes(payload)[16:].ljust(8 * (end - start), b"\0")[: 8 * (end - start)]
        super().restore(sequence, start, end, memoryview(head + body))


class AcceptsOtherPositions(Trusts):
    """A payload of the right length is accepted for any positions."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        if len(payload) != 16 + 8 * (end - start):
            raise StateError("of another length")
        super().restore(sequence, start, end, payload)


class DropsOnRefusal(StubBackend):
    """A payload that does not fit empties the sequence."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        try:
            super().restore(sequence, start, end, payload)
        except StateError:
            self.drop(sequence)
            raise


class LeavesHoles(StubBackend):
    """A payload is restored at any position."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        self._lengths[sequence] = start
        super().restore(sequence, start, end, payload)


class PacksIntoOneBuffer(StubBackend):
    """The next `pack()` overwrites a payload."""

    buffer = np.zeros(1 << 16, np.uint8)

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        payload = super().pack(sequence, start, end)
        self.buffer[: len(payload)] = payload
        return self.buffer[: len(payload)]

    def close(self) -> None:
        self.buffer[:] = 0


class PackingForgets(StubBackend):
    """`pack()` changes the sequence."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        payload = super().pack(sequence, start, end)
        self._kv[self._table[sequence, start]] ^= np.uint64(1)
        return payload


class PacksMore(StubBackend):
    """Positions that are not held are packed."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        held, self._lengths[sequence] = self._lengths[sequence], end
        try:
            return super().pack(sequence, start, end)
        finally:
            self._lengths[sequence] = held


class CutsBadly(StubBackend):
    """A cut changes the last remaining position."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(sequence, end)
        if end:
            self._kv[self._table[sequence, end - 1]] ^= np.uint64(1)


class CutsUntrimmable(StubBackend):
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
    """A cell is free when the first of its holders releases it."""

    def _release(self, sequence: int, end: int) -> None:
        self._n_holders[self._table[sequence, end : self._lengths[sequence]]] = 0
        self._lengths[sequence] = end


class SharesAll(StubBackend):
    """The target writes into the table of its source."""

    def share(self, source: int, target: int, end: int) -> None:
        super().share(source, target, end)
        self._kv[self._table[target, end - 1]] ^= np.uint64(end != self._lengths[source])


class Leaks(StubBackend):
    """The cells of dropped sequences stay occupied."""

    def drop(self, sequence: int) -> None:
        self._lengths[sequence] = 0


class DropsAll(StubBackend):
    """`drop()` empties all sequences."""

    def drop(self, sequence: int) -> None:
        self.clear()


class ClearsOne(StubBackend):
    """`clear()` empties only the first sequence."""

    def clear(self) -> None:
        self._release(0, 0)


class IgnoresAbort(StubBackend):
    """Aborts have no effect."""

    def abort(self, on: bool) -> None:
        pass


class PackFailsDuringAbort(StubBackend):
    """During an abort, `pack()` fails."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        if self._aborted:
            raise BackendError("aborted")
        return super().pack(sequence, start, end)


class StaysAborted(StubBackend):
    """An abort cannot be reset."""

    def abort(self, on: bool) -> None:
        super().abort(True)


class ClosesOnce(StubBackend):
    """A second `close()` fails."""

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
    """Each instance has its own namespace."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64)
        self.namespace = {"backend": "stub", "instance": id(self)}


class ListedNamespace(StubBackend):
    """The namespace contains a list."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64)
        self.namespace = {"backend": "stub", "sizes": [64]}  # type: ignore[dict-item]


class LowerCase(StubBackend):
    """Texts are detokenized in lower case."""

    class Vocabulary(StubVocabulary):
        def tokenize(
            self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
        ) -> NDArray[np.int32]:
            return super().tokenize(source.lower())

    def __init__(self) -> None:
        super().__init__(n_ctx=64)
        self.vocabulary = self.Vocabulary()


class CountsEnds(StubBackend):
    """`is_eog` is a list of ids."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64)
        self.vocabulary.is_eog = np.flatnonzero(self.vocabulary.is_eog)  # type: ignore[assignment]


class NoRoom(StubBackend):
    """Sizes contradict each other."""

    def __init__(self) -> None:
        super().__init__(n_ctx=64, n_batch=16, n_ubatch=32)


class EndsEarly(StubBackend):
    """A position after the last cell raises another error."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        if batch.positions.max() >= self.limits.n_ctx:
            raise BackendError("a position out of range")
        return super().decode(batch)


class OneAtATime(StubBackend):
    """A batch cannot hold both the first rows of a sequence and later rows of another."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        begun = {self._lengths[sequence] > 0 for sequence in batch.sequences}
        return super().decode(batch) * np.float32(len(begun))


class RestoresOneBlock(StubBackend):
    """Only the first of several blocks is restored correctly."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if start:
            self._kv[self._table[sequence, start]] ^= np.uint64(1)


class PacksOnce(StubBackend):
    """Restored positions pack to a wrong payload."""

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
    """Shared cells are not packed."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        cells = self._table[sequence, start:end]
        kept = self._kv[cells]
        self._kv[cells[self._n_holders[cells] > 1]] = 0
        payload = super().pack(sequence, start, end)
        self._kv[cells] = kept
        return payload


class RunsOut(StubBackend):
    """A restore without enough cells raises another error."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        if self.limits.n_ctx - self.cells_used < end - start:
            raise CellsExhausted("no cells")
        super().restore(sequence, start, end, payload)


class CutsLonger(StubBackend):
    """A cut after the end makes the sequence longer."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(sequence, end)
        self._lengths[sequence] = end


class CutsSlices(StubBackend):
    """A cut is rounded to a multiple of four."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(sequence, end // 4 * 4)


# --- rare faults: in some calls, sequences, positions or payloads only ----------------------------


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
        self._append_cells(target, 40, self._table[source, 39 : end - 1].copy())


class PacksStale(Sometimes):
    """`pack()` returns a payload from before a cut."""

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
    """`pack()` returns a payload from before a drop."""

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
    """`restore()` is wrong for positions after 256."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if end > 256:
            self.spoil(sequence, end - 1)


class PacksTooFew(Sometimes):
    """The last of more than a hundred positions is packed like the one before it."""

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        payload = super().pack(sequence, start, end)
        if end - start > 100:
            payload[-8:] = payload[-16:-8]
        return payload


class RestoresInFirst(Sometimes):
    """`restore()` is right only for sequence 0."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if sequence:
            self.spoil(sequence, start)


class RestoresSeventhWrong(Sometimes):
    """Every seventh `restore()` is wrong."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if self.nth("restore", 7):
            self.spoil(sequence, end - 1)


class RestoresAfterClear(Sometimes):
    """After the second `clear()`, `restore()` is wrong."""

    def clear(self) -> None:
        super().clear()
        self.nth("clear", 1)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if vars(self).get("calls", Counter())["clear"] > 1:
            self.spoil(sequence, start)


class WipesPayload(Sometimes):
    """`restore()` changes the caller's payload if it is writable."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        if not payload.readonly:
            payload[0] ^= 1


class WipesBatch(Sometimes):
    """`decode()` increments the caller's positions."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        batch.positions[:] += 1
        return logits


class DecodesSeventhWrong(Sometimes):
    """Every seventh decode returns wrong logits."""

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
    """Two rows of logits are swapped in batches with four or more."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        if len(logits) >= 4:
            logits[[1, 2]] = logits[[2, 1]]
        return logits


class SeesNeighbour(Sometimes):
    """In a batch of several sequences, the last token of another one changes the logits."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        if len(set(batch.sequences.tolist())) > 2:
            logits[0] += np.float32(batch.tokens[-1])
        return logits


class ReturnsOldLogits(Sometimes):
    """A batch with as many rows as the last one returns its logits, unless one without output came between."""

    before: NDArray[np.float32] | None = None

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        given = logits
        if self.before is not None and len(batch.tokens) == 1 and batch.positions[0] % 16 == 15:
            given = self.before[-1:] if len(self.before) else logits
        self.before = logits
        return given


class SharesOneMore(Sometimes):
    """A target holds one position more than requested."""

    def share(self, source: int, target: int, end: int) -> None:
        super().share(source, target, min(end + 1, self._lengths[source]))


class SharesSwapped(Sometimes):
    """`share()` swaps source and target if both are empty or hold other tokens."""

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
    """The second target of a source has wrong KV."""

    def share(self, source: int, target: int, end: int) -> None:
        super().share(source, target, end)
        if self.nth("share", 2) and end:
            self._table[target, end - 1] = self._table[source, 0]
            self._n_holders[self._table[source, 0]] += 1
            self._n_holders[self._table[source, end - 1]] -= 1


class SharersWrite(Sometimes):
    """After a share of a whole sequence, the source also holds what the target computes."""

    def share(self, source: int, target: int, end: int) -> None:
        super().share(source, target, end)
        if end == self._lengths[source]:
            self._table[target] = self._table[source]

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        lengths = self._lengths
        twins = [s for s in range(1, len(lengths)) if lengths[s] and lengths[0] == lengths[s] - 1]
        for twin in twins:
            at = self._lengths[0]
            if at and self._table[0, at - 1] == self._table[twin, at - 1]:
                self._append_cells(0, at, self._table[twin, at : at + 1].copy())
        return logits


class CutsOneMore(Sometimes):
    """A cut at a multiple of 16 removes one position more."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(sequence, end - 1 if end and end % 16 == 0 else end)


class CutsFirst(Sometimes):
    """`cut()` always cuts sequence 0."""

    def cut(self, sequence: int, end: int) -> None:
        super().cut(0, end)


class CutKeepsCells(Sometimes):
    """After a cut, the cell of the first removed position stays occupied."""

    def cut(self, sequence: int, end: int) -> None:
        if end < self._lengths[sequence]:
            self._n_holders[self._table[sequence, end]] += 1
        super().cut(sequence, end)


class DropsNext(Sometimes):
    """`drop()` of an empty sequence drops the next one."""

    def drop(self, sequence: int) -> None:
        if not self._lengths[sequence]:
            sequence = (sequence + 1) % len(self._lengths)
        super().drop(sequence)


class ClearLeavesLast(Sometimes):
    """`clear()` keeps the last sequence."""

    def clear(self) -> None:
        for sequence in range(len(self._lengths) - 1):
            self._release(sequence, 0)


class CopiesOnRestore(Sometimes):
    """`restore()` occupies one cell too many."""

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        super().restore(sequence, start, end, payload)
        free = np.flatnonzero(self._n_holders == 0)
        if len(free):
            self._n_holders[free[0]] += 1


class DropsRefused(Sometimes):
    """A batch that does not fit empties the longest sequence."""

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        try:
            return super().decode(batch)
        except CellsExhausted:
            self._release(int(np.argmax(self._lengths)), 0)
            raise


class StaysBroken(Sometimes):
    """After a failed decode, logits stay wrong even after `clear()`."""

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
    """`limits` shows the cells that are free now."""

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
    """The vocabulary keeps its state in itself, where threads overwrite it."""

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
    """A text of more than twenty bytes loses its last byte."""

    class Vocabulary(StubVocabulary):
        def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
            return super().detokenize(tokens[:-1] if len(tokens) > 20 else tokens)

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.vocabulary = self.Vocabulary()


class SmallEmbedder:
    """A correct embedder: the sum over the tokens of a text."""

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
    """Three or more embeddings are returned in reverse order."""

    class kind(SmallEmbedder):  # noqa: N801
        def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
            found = super().embed(texts, pooling)
            return found[::-1] if len(found) > 2 else found


class EmbedsByLength(EmbeddingStub):
    """Embeddings are returned in the order of the texts' lengths."""

    class kind(SmallEmbedder):  # noqa: N801
        def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
            return super().embed(sorted(texts, key=len), pooling)


class EmbedsTogether(EmbeddingStub):
    """The first text's tokens change the last text's embedding."""

    class kind(SmallEmbedder):  # noqa: N801
        def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
            found = super().embed(texts, pooling)
            if len(texts) > 1:
                found[-1] = found[-1] + np.float32(texts[0][0])
            return found


class EmbedsPooled(EmbeddingStub):
    """Pooling "none" returns one row."""

    class kind(SmallEmbedder):  # noqa: N801
        def one(self, text: NDArray[np.int32], pooling: str) -> NDArray[np.float32]:
            return super().one(text, "mean")


class EmbedsDoubles(EmbeddingStub):
    """Embeddings have another dtype."""

    class kind(SmallEmbedder):  # noqa: N801
        def one(self, text: NDArray[np.int32], pooling: str) -> NDArray[np.float32]:
            return super().one(text, pooling).astype(np.float64)


class EmbedsOn(EmbeddingStub):
    """`abort()` of an embedder has no effect."""

    class kind(SmallEmbedder):  # noqa: N801
        def abort(self) -> None:
            pass


class EmbedderClosesOnce(EmbeddingStub):
    """A second `close()` of an embedder fails."""

    class kind(SmallEmbedder):  # noqa: N801
        def close(self) -> None:
            if self.closed:
                raise BackendError("closed")
            super().close()


# Faults that show in almost any call.
BACKEND_FAULTS: list[tuple[type[StubBackend], str]] = [
    (NoRoom, "test_limits_are_consistent"),
    (OwnNamespace, "test_the_namespace_is_constant"),
    (ListedNamespace, "test_the_namespace_is_constant"),
    (ShortRecipe, "test_recipe_and_limits_are_constant"),
    (LowerCase, "test_detokenize_restores_the_text"),
    (CountsEnds, "test_every_token_has_a_piece_and_a_flag"),
    (Doubles, "test_logits_are_in_batch_order"),
    (Overflows, "test_logits_are_in_batch_order"),
    (Reverses, "test_logits_are_in_batch_order"),
    (ReturnsAllRows, "test_rows_without_output_return_no_logits"),
    (Ignores, "test_every_token_affects_the_logits"),
    (Jitters, "test_equal_batches_return_equal_bits"),
    (SelectsLastOfEqual, "test_the_largest_logits_are_those_of_numpy"),
    (SelectsUnstably, "test_the_largest_logits_are_those_of_numpy"),
    (SelectsBesideNaN, "test_the_largest_logits_are_those_of_numpy"),
    (Batches, "test_a_prompt_may_be_split"),
    (Peeks, "test_sequences_are_independent"),
    (Sorts, "test_rows_of_sequences_may_be_interleaved"),
    (AcceptsGaps, "test_positions_must_be_consecutive"),
    (AcceptsLargeBatches, "test_a_batch_above_n_batch_is_refused"),
    (ComputesSome, "test_an_interleaved_batch_without_room_changes_nothing"),
    (PackingForgets, "test_pack_changes_nothing"),
    (PacksIntoOneBuffer, "test_a_packed_payload_does_not_change"),
    (RestoresBadly, "test_a_restored_sequence_has_the_same_bits"),
    (RestoresLater, "test_a_restored_sequence_has_the_same_bits"),
    (RestoresFirstTogether, "test_blocks_restore_together"),
    (KeepsRestoredBlocks, "test_blocks_restore_together"),
    (RestoresInPlace, "test_a_payload_restores_into_any_sequence"),
    (PacksMore, "test_only_held_positions_can_be_packed"),
    (Trusts, "test_an_invalid_payload_is_refused"),
    (DropsOnRefusal, "test_an_invalid_payload_is_refused"),
    (AcceptsOtherPositions, "test_a_payload_restores_only_its_positions"),
    (LeavesHoles, "test_a_payload_restores_only_at_the_end"),
    (CutsBadly, "test_cut_tokens_leave_no_trace"),
    (CutsUntrimmable, "test_memory_that_cannot_be_cut_refuses_it"),
    (DropsAll, "test_drop_empties_one_sequence"),
    (ClearsOne, "test_clear_empties_every_sequence"),
    (Leaks, "test_released_cells_are_free"),
    (SharesAll, "test_sharers_continue_like_their_source"),
    (CopiesShares, "test_share_takes_no_cells"),
    (FreesShared, "test_a_sharer_may_be_dropped"),
    (IgnoresAbort, "test_abort_stops_decodes_until_it_is_reset"),
    (StaysAborted, "test_abort_stops_decodes_until_it_is_reset"),
    (ClosesOnce, "test_close_may_be_called_twice"),
    (AcceptsGaps, "test_positions_must_not_repeat"),
    (ComputesSome, "test_a_batch_without_room_changes_nothing"),
    (EndsEarly, "test_a_sequence_holds_at_most_n_ctx_tokens"),
    (RestoresOneBlock, "test_blocks_restore_in_order"),
    (RestoresOneBlock, "test_any_range_can_be_packed"),
    (PacksOnce, "test_a_restored_sequence_can_be_packed_again"),
    (PacksOwn, "test_a_shared_sequence_can_be_packed"),
    (RunsOut, "test_restore_needs_free_cells"),
    (CutsLonger, "test_a_cut_at_or_after_the_end_changes_nothing"),
    (CutsSlices, "test_a_cut_may_split_a_slice"),
    (PackFailsDuringAbort, "test_abort_stops_nothing_but_decodes"),
    (IgnoresAbort, "test_abort_works_during_a_decode"),
    (OneAtATime, "test_prefill_and_decode_may_share_a_batch"),
    (LowerCase, "test_pieces_join_to_the_text"),
]

# Faults that show only in some calls, sequences, positions or payloads.
RARE_BACKEND_FAULTS: list[tuple[type[StubBackend], str]] = [
    (SharesForty, "test_any_length_can_be_shared"),
    (SharesOneMore, "test_any_length_can_be_shared"),
    (SharesSwapped, "test_any_length_can_be_shared"),
    (SharesNothing, "test_any_length_can_be_shared"),
    (SharesTwice, "test_any_length_can_be_shared"),
    (SharersWrite, "test_dropped_tokens_leave_no_trace"),
    (PacksStale, "test_dropped_tokens_leave_no_trace"),
    (PacksStaleAfterDrop, "test_dropped_tokens_leave_no_trace"),
    (PacksTooFew, "test_long_sequences_restore_at_each_length"),
    (RestoresFrom32, "test_long_sequences_restore_at_each_length"),
    (RestoresFrom256, "test_long_sequences_restore_at_each_length"),
    (RestoresInFirst, "test_long_sequences_restore_at_each_length"),
    (RestoresSeventhWrong, "test_long_sequences_restore_at_each_length"),
    (RestoresAfterClear, "test_long_sequences_restore_at_each_length"),
    (WipesPayload, "test_long_sequences_restore_at_each_length"),
    (CopiesOnRestore, "test_long_sequences_restore_at_each_length"),
    (WipesBatch, "test_a_long_prompt_may_be_split_anywhere"),
    (DecodesSeventhWrong, "test_a_long_prompt_may_be_split_anywhere"),
    (DecodesOdd, "test_a_long_prompt_may_be_split_anywhere"),
    (SwapsRows, "test_a_long_prompt_may_be_split_anywhere"),
    (ReturnsOldLogits, "test_a_long_prompt_may_be_split_anywhere"),
    (DecodesSecond, "test_all_sequences_generate_together"),
    (DecodesLast, "test_all_sequences_generate_together"),
    (SeesNeighbour, "test_all_sequences_generate_together"),
    (IgnoresOne, "test_every_token_of_a_long_prompt_matters"),
    (CutsOneMore, "test_a_long_sequence_can_be_cut_anywhere"),
    (CutsFirst, "test_sharers_are_independent"),
    (CutKeepsCells, "test_released_cells_are_free"),
    (DropsNext, "test_random_calls_agree_with_a_model"),
    (ClearLeavesLast, "test_clear_empties_every_sequence"),
    (DropsRefused, "test_a_batch_without_room_changes_nothing"),
    (StaysBroken, "test_a_batch_above_n_batch_is_refused"),
    (ChangesRecipe, "test_recipe_and_limits_are_constant"),
    (ChangesLimits, "test_recipe_and_limits_are_constant"),
    (TextsForOneThread, "test_any_thread_may_use_the_vocabulary"),
    (LosesLastByte, "test_detokenize_restores_the_text"),
    (EmbedsBackwards, "test_embeddings_are_in_text_order"),
    (EmbedsByLength, "test_embeddings_are_in_text_order"),
    (EmbedsTogether, "test_embeddings_are_in_text_order"),
    (EmbedsPooled, "test_embeddings_are_in_text_order"),
    (EmbedsDoubles, "test_embeddings_are_in_text_order"),
    (EmbedsOn, "test_embedding_can_be_aborted"),
    (EmbedderClosesOnce, "test_embedding_can_be_aborted"),
]
