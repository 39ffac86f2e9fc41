"""Backends keep the rules: the stub, libllama on every kind of memory, and the example in numpy.

And the rules notice backends that break them; and the example computes what libllama does.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

import erllama
from erllama.engine import Backend, Batch
from erllama.engine.backends.stub import StubBackend, StubVocabulary
from erllama.errors import BackendError, CellsExhausted, StateError
from erllama.testing import BackendConformance, BackendMachine, models
from erllama.testing.models import (
    TINY,
    LlamaShape,
    Quantization,
    write_gemma3,
    write_lfm2,
    write_llama,
    write_mamba,
)
from support import llama_backend

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "numpy_backend.py"
GUIDE = ROOT / "docs" / "backends.md"
SEVERAL_HEADS = LlamaShape(n_layer=3, n_embd=96, n_ff=160, n_head=6, n_head_kv=2)


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("numpy_backend", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["numpy_backend"] = module
    spec.loader.exec_module(module)
    return module


NumpyBackend = load_example().NumpyBackend


# --- who keeps the rules ------------------------------------------------------------------------------


class TestStub(BackendConformance):
    tolerance = 0.0

    def make_backend(self) -> Backend:
        return StubBackend(n_ctx=256)


class TestStubThatCannotBeCut(BackendConformance):
    tolerance = 0.0

    def make_backend(self) -> Backend:
        return StubBackend(n_ctx=256, can_trim=False)


class TestNumpy(BackendConformance):
    """Without tolerance: its rows have the same bits in any batch, and in any cells."""

    tolerance = 0.0

    @pytest.fixture(autouse=True)
    def model(self, tiny_gguf: Path) -> None:
        self.path = tiny_gguf

    def make_backend(self) -> Backend:
        return NumpyBackend(self.path, n_ctx=256, n_ubatch=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


class Native(BackendConformance):
    """libllama, with the model that `write` writes."""

    write: Callable[..., Path]

    @pytest.fixture(autouse=True)
    def model(self, place: Path) -> None:
        self.path = place / f"{self.write.__name__}.gguf"
        if not self.path.exists():
            self.write(self.path, seed=1)

    def make_backend(self) -> Backend:
        return llama_backend(self.path, n_ctx=256, n_ubatch=32, n_sequences=8, n_threads=1)


class TestLlama(Native):
    write = staticmethod(write_llama)


class TestSlidingWindow(Native):
    write = staticmethod(write_gemma3)


class TestRecurrent(Native):
    write = staticmethod(write_mamba)


class TestHybrid(Native):
    write = staticmethod(write_lfm2)


def test_numpy_computes_alike_whatever_it_is_put_through(tiny_gguf: Path) -> None:
    class Numpy(BackendMachine):
        def make_backend(self) -> Backend:
            return NumpyBackend(tiny_gguf, n_ctx=64)

    run_state_machine_as_test(
        Numpy, settings=settings(max_examples=20, stateful_step_count=30, phases=[Phase.generate])
    )


# --- who does not, each in one way ----------------------------------------------------------------------


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


LIES: list[tuple[type[StubBackend], str]] = [
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


@pytest.mark.parametrize(("liar", "rule"), LIES)
def test_a_rule_notices_who_breaks_it(liar: type[StubBackend], rule: str) -> None:
    class Rules(BackendConformance):
        def make_backend(self) -> Backend:
            return liar(n_ctx=64, n_batch=48, n_ubatch=32) if liar.__init__ is StubBackend.__init__ else liar()

    with pytest.raises((AssertionError, BackendError)):
        getattr(Rules(), rule)()


def test_most_rules_have_someone_who_breaks_them() -> None:
    rules = {name for name in dir(BackendConformance) if name.startswith("test_")}
    assert rules - {rule for _, rule in LIES} == {"test_the_vocabulary_is_for_any_thread"}


# --- the example computes what libllama does ---------------------------------------------------------------


def batch_of(*parts: tuple[int, int, Sequence[int]], mixed: bool = False) -> Batch:
    """Parts (sequence, start, ids), one after another or row about row; each row gives logits."""
    rows = [(token, start + at, sequence) for sequence, start, ids in parts for at, token in enumerate(ids)]
    if mixed:
        rows.sort(key=lambda row: row[1])
    tokens, positions, sequences = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return Batch(tokens, positions, sequences, np.ones(len(rows), np.int8))


def ids_of(seed: int, n: int, n_vocab: int = 300) -> list[int]:
    found: list[int] = np.random.Generator(np.random.PCG64(seed)).integers(3, n_vocab, n).tolist()
    return found


def apart(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Root of the mean square of the difference, as a part of that of the logits."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def both(path: Path) -> tuple[Backend, Backend]:
    """The example, and libllama where it computes with full precision, too."""
    full = {"kv_type_k": "f32", "kv_type_v": "f32", "flash_attn": False, "n_sequences": 8, "n_threads": 1}
    return NumpyBackend(path), llama_backend(path, **full)


def assert_agreement(path: Path, tolerance: float) -> None:
    ours, theirs = both(path)
    a, b, c = ids_of(1, 200), ids_of(2, 40), ids_of(3, 70)
    for batch in (
        batch_of((0, 0, [5])),
        batch_of((0, 1, a)),
        batch_of((1, 0, b[:20]), (2, 0, c)),
        batch_of((0, 201, [7]), (1, 20, b[20:]), (2, 70, [8]), (7, 0, a[:30]), mixed=True),
    ):
        assert apart(ours.decode(batch), theirs.decode(batch)) < tolerance
    ours.close()
    theirs.close()


# libllama rounds what it multiplies by weights of 16 and 8 bits to the same type; the example does not.
@pytest.mark.parametrize(("quantization", "tolerance"), [("F32", 1e-4), ("F16", 1e-2), ("Q8_0", 0.2)])
def test_numpy_agrees_with_libllama(quantization: Quantization, tolerance: float, tmp_path: Path) -> None:
    assert_agreement(write_llama(tmp_path / "m.gguf", TINY, seed=3, quantization=quantization), tolerance)


def test_numpy_agrees_on_groups_of_heads(tmp_path: Path) -> None:
    assert_agreement(write_llama(tmp_path / "m.gguf", SEVERAL_HEADS, seed=3), 1e-4)


def test_numpy_agrees_on_tied_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = models._ModelFile.matrix

    def all_but_output(self: models._ModelFile, name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        if name != "output":
            matrix(self, name, n_out, n_in, gain)

    monkeypatch.setattr(models._ModelFile, "matrix", all_but_output)
    assert_agreement(write_llama(tmp_path / "m.gguf", TINY, seed=3), 1e-4)


def test_numpy_agrees_on_another_base_of_rope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = gguf.GGUFWriter.add_rope_freq_base
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda writer, _: base(writer, 500000.0))
    path = write_llama(tmp_path / "m.gguf", TINY, seed=3)
    monkeypatch.undo()
    assert_agreement(path, 1e-4)
    # And it is the base that does it.
    ours, plain = NumpyBackend(path), NumpyBackend(write_llama(tmp_path / "plain.gguf", TINY, seed=3))
    batch = batch_of((0, 0, ids_of(1, 50)))
    assert apart(ours.decode(batch), plain.decode(batch)) > 1e-2


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose vocabulary has pieces to merge, and puts a space before a text."""
    words = {"▁": -9.0, **dict.fromkeys("helotné", -8.0), "he": -2.0, "hel": -4.0, "ll": -1.0, "llo": -3.0}
    words |= {"▁he": -5.0, "▁hell": -0.5, "▁t": -1.5, "th": -1.5, "the": -1.7, "▁the": -0.1, "▁▁": -0.2}

    def add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
        kinds, special = gguf.TokenType, ["<unk>", "<s>", "</s>", "<|mark|>"]
        tokens = [*special, *(f"<0x{b:02X}>" for b in range(256)), *words]
        tokens += [f"⟨{i}⟩" for i in range(n_vocab - len(tokens))]
        types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.USER_DEFINED] + [kinds.BYTE] * 256
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types(types + [kinds.NORMAL] * (n_vocab - len(types)))
        scores = [0.0] * 260 + list(words.values())
        writer.add_token_scores(scores + [-1000.0] * (n_vocab - len(scores)))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_add_byte_vocabulary", add_vocabulary)
        return write_llama(tmp_path_factory.mktemp("merging") / "m.gguf", TINY, seed=1)


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def vocabularies(request: pytest.FixtureRequest) -> tuple[Backend, Backend]:
    names = {"bytes": "tiny_gguf", "pieces": "merging"}
    return both(request.getfixturevalue(names[request.param]))


def test_numpy_has_libllamas_tokens(vocabularies: tuple[Backend, Backend]) -> None:
    ours, theirs = (backend.vocabulary for backend in vocabularies)
    assert ours.n_tokens == theirs.n_tokens
    assert np.array_equal(ours.is_eog, theirs.is_eog)
    for token in range(ours.n_tokens):
        assert ours.piece(token) == theirs.piece(token)


FRAGMENTS = st.sampled_from(
    ["hello", " hello", " the", "then", "  ", "héllo", "<s>", "</s>", "<|mark|>", "▁", "⟨1⟩"]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=4), max_size=8).map("".join)


# Broken in all ways: first bytes of characters with nothing, a space or a special token after them.
HEADS = [b"\xc0", b"\xe2", b"\xe2\x96", b"\xf0\x9f", b"\xff"]
BROKEN_FRAGMENTS = st.sampled_from([*HEADS, b"\x80", b" ", b"the", b"<s>"])
BROKEN = st.lists(BROKEN_FRAGMENTS, max_size=6).map(b"".join)


@settings(max_examples=150)
@example(b"\xc0 ", False, False)
@example(b"\xe2 the\xf0<s>", True, True)
@given(TEXTS | st.binary(max_size=12) | BROKEN, st.booleans(), st.booleans())
def test_numpy_reads_text_as_libllama_does(
    vocabularies: tuple[Backend, Backend], text: str | bytes, add_special: bool, parse_special: bool
) -> None:
    ours, theirs = (backend.vocabulary for backend in vocabularies)
    found = ours.tokenize(text, add_special=add_special, parse_special=parse_special)
    assert found.dtype == np.int32
    expected = theirs.tokenize(text, add_special=add_special, parse_special=parse_special)
    assert found.tolist() == expected.tolist()
    for special in (False, True):
        assert ours.detokenize(found, special=special) == theirs.detokenize(found, special=special)


# --- the example's rows do not depend on their batch -----------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, SEVERAL_HEADS, LlamaShape(2, 128, 352, 4, 4)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(shape: LlamaShape, tmp_path: Path) -> None:
    path, rng = write_llama(tmp_path / "m.gguf", shape, seed=5), np.random.Generator(np.random.PCG64(6))
    backend, alone = NumpyBackend(path), NumpyBackend(path)
    prompts = [ids_of(seed, n) for seed, n in enumerate((90, 1, 17, 64, 33, 90, 5, 128))]
    expected = [alone.decode(batch_of((i, 0, ids))) for i, ids in enumerate(prompts)]
    for _ in range(3):
        backend.clear()
        held = [0] * len(prompts)
        while any(n < len(ids) for n, ids in zip(held, prompts, strict=True)):
            ends = [min(n + int(rng.integers(0, 40)), len(ids)) for n, ids in zip(held, prompts, strict=True)]
            parts = [(i, held[i], prompts[i][held[i] : end]) for i, end in enumerate(ends) if end > held[i]]
            if not parts:
                continue
            batch = batch_of(*parts, mixed=bool(rng.integers(2)))
            for row, logits in enumerate(backend.decode(batch)):
                wanted = expected[batch.sequences[row]][batch.positions[row]]
                assert logits.tobytes() == wanted.tobytes(), (parts, row)
            held = ends


def test_a_seeded_reply_is_the_same_among_others(tiny_gguf: Path) -> None:
    prompts = ["once", "upon a time", "there", "was a model", "that", "answered", "eight", "requests at a time"]

    def reply(i: int) -> tuple[int, ...]:
        return model.complete(prompts[i], max_tokens=12, temperature=1.5, seed=i).tokens

    with erllama.Cache(ram=0) as cache, ThreadPoolExecutor(8) as pool:
        with erllama.load_backend(NumpyBackend(tiny_gguf), cache=cache) as model:
            alone = [reply(i) for i in range(8)]
            assert list(pool.map(reply, range(8))) == alone
            assert len(set(alone)) == 8


# --- the guide ------------------------------------------------------------------------------------------


def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "model.gguf", TINY, seed=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks:
        exec(block, names)
    for kind in (names["TestMine"], names["Mine"]):
        backend = kind().make_backend()  # type: ignore[operator]
        assert backend.limits.n_sequences >= 3
        backend.close()


# --- what the example refuses ----------------------------------------------------------------------------


def test_numpy_refuses_what_it_would_get_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(erllama.ModelLoadError, match="'gemma3'"):
        NumpyBackend(write_gemma3(tmp_path / "gemma3.gguf"))
    (tmp_path / "text.gguf").write_text("GGUF, or is it?" * 20)
    with pytest.raises(erllama.ModelLoadError, match="cannot be read"):
        NumpyBackend(tmp_path / "text.gguf")
    with pytest.raises(erllama.ModelLoadError, match="cannot be read"):
        NumpyBackend(tmp_path / "none.gguf")
    norm = models._ModelFile.norm

    def and_a_bias(self: models._ModelFile, name: str, n: int, value: float = 1.0) -> None:
        norm(self, name, n, value)
        if name == "blk.1.attn_norm":
            self.constant("blk.1.attn_q.bias", np.zeros(n))

    monkeypatch.setattr(models._ModelFile, "norm", and_a_bias)
    with pytest.raises(erllama.ModelLoadError, match=r"blk\.1\.attn_q\.bias"):
        NumpyBackend(write_llama(tmp_path / "bias.gguf"))
    monkeypatch.undo()
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_rope_freq_base", lambda writer, _: writer.add_rope_scaling_factor(2.0)
    )
    with pytest.raises(erllama.ModelLoadError, match="its RoPE"):
        NumpyBackend(write_llama(tmp_path / "scaled.gguf"))


def test_the_models_names_differ_where_the_files_do(tmp_path: Path) -> None:
    names = [
        NumpyBackend(write_llama(tmp_path / f"{name}.gguf", seed=seed)).namespace
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert names[0] == names[1] != names[2]
