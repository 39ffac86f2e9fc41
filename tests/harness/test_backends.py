"""Backends follow the rules: the stub, libllama on every kind of memory, and the example in numpy.

The rules find faulty backends, and the example agrees with libllama.
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
from erllama.engine.backends.stub import StubBackend
from erllama.errors import BackendError
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
from support.faulty.backends import BACKEND_FAULTS, RARE_BACKEND_FAULTS
from support.paths import ROOT
from support.recording_backend import llama_backend

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


# --- backends that follow the rules -------------------------------------------------------------------------


class TestStub(BackendConformance):
    tolerance = 0.0

    def make_backend(self) -> Backend:
        return StubBackend(n_ctx=256)


class TestStubThatCannotBeCut(BackendConformance):
    tolerance = 0.0

    def make_backend(self) -> Backend:
        return StubBackend(n_ctx=256, can_trim=False)


class TestNumpy(BackendConformance):
    """Without tolerance: rows have the same bits in any batch and in any cells."""

    tolerance = 0.0
    n_calls = 60
    n_tokens = 70

    @pytest.fixture(autouse=True)
    def model(self, tiny_gguf: Path) -> None:
        self.path = tiny_gguf

    def make_backend(self) -> Backend:
        return NumpyBackend(self.path, n_ctx=256, n_ubatch=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


class Native(BackendConformance):
    """Load the model that `write` writes on libllama."""

    write: Callable[..., Path]

    @pytest.fixture(autouse=True)
    def model(self, place: Path) -> None:
        self.path = place / f"{self.write.__name__}.gguf"
        if not self.path.exists():
            self.write(self.path, seed=1)

    n_calls = 60
    n_tokens = 140

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


def test_the_numpy_backend_computes_the_same_after_any_calls(tiny_gguf: Path) -> None:
    class Numpy(BackendMachine):
        checks_rules = False

        def make_backend(self) -> Backend:
            return NumpyBackend(tiny_gguf, n_ctx=64)

    run_state_machine_as_test(
        Numpy, settings=settings(max_examples=8, stateful_step_count=30, phases=[Phase.generate])
    )


# --- backends with one fault each ----------------------------------------------------------------------


@pytest.mark.parametrize(("faulty", "rule"), BACKEND_FAULTS)
def test_a_rule_finds_a_fault_of_a_backend(faulty: type[StubBackend], rule: str) -> None:
    class Rules(BackendConformance):
        def make_backend(self) -> Backend:
            return (
                faulty(n_ctx=64, n_batch=48, n_ubatch=32) if faulty.__init__ is StubBackend.__init__ else faulty()
            )

    with pytest.raises((AssertionError, BackendError)):
        getattr(Rules(), rule)()


@pytest.mark.parametrize(("faulty", "rule"), RARE_BACKEND_FAULTS)
def test_a_rule_finds_a_rare_fault_of_a_backend(faulty: type[StubBackend], rule: str) -> None:
    class Rules(BackendConformance):
        def make_backend(self) -> Backend:
            return faulty(n_ctx=600)

    with pytest.raises((AssertionError, BackendError)):
        getattr(Rules(), rule)()


def test_every_rule_for_backends_has_a_fault() -> None:
    rules = {name for name in dir(BackendConformance) if name.startswith("test_")}
    assert rules - {rule for _, rule in BACKEND_FAULTS + RARE_BACKEND_FAULTS} == {
        "test_equal_prompts_stay_separate"
    }


# --- the example agrees with libllama ---------------------------------------------------------------


def batch_of(*parts: tuple[int, int, Sequence[int]], mixed: bool = False) -> Batch:
    """Decode parts (sequence, start, ids), one after another or interleaved, with logits of each row."""
    rows = [(token, start + at, sequence) for sequence, start, ids in parts for at, token in enumerate(ids)]
    if mixed:
        rows.sort(key=lambda row: row[1])
    tokens, positions, sequences = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return Batch(tokens, positions, sequences, np.ones(len(rows), np.int8))


def ids_of(seed: int, n: int, n_vocab: int = 300) -> list[int]:
    found: list[int] = np.random.Generator(np.random.PCG64(seed)).integers(3, n_vocab, n).tolist()
    return found


def apart(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the root mean square of the difference, divided by that of the logits."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def both(path: Path) -> tuple[Backend, Backend]:
    """Open the example, and libllama with full precision."""
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


# libllama rounds activations to the type of 16-bit and 8-bit weights before it multiplies. The example does not.
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


def test_numpy_agrees_on_another_rope_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = gguf.GGUFWriter.add_rope_freq_base
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda writer, _: base(writer, 500000.0))
    path = write_llama(tmp_path / "m.gguf", TINY, seed=3)
    monkeypatch.undo()
    assert_agreement(path, 1e-4)
    # The base causes the difference.
    ours, plain = NumpyBackend(path), NumpyBackend(write_llama(tmp_path / "plain.gguf", TINY, seed=3))
    batch = batch_of((0, 0, ids_of(1, 50)))
    assert apart(ours.decode(batch), plain.decode(batch)) > 1e-2


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model whose vocabulary has pieces to merge, and adds a space before a text."""
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


def test_numpy_has_the_tokens_of_libllama(vocabularies: tuple[Backend, Backend]) -> None:
    ours, theirs = (backend.vocabulary for backend in vocabularies)
    assert ours.n_tokens == theirs.n_tokens
    assert np.array_equal(ours.is_eog, theirs.is_eog)
    for token in range(ours.n_tokens):
        assert ours.piece(token) == theirs.piece(token)


FRAGMENTS = st.sampled_from(
    ["hello", " hello", " the", "then", "  ", "héllo", "<s>", "</s>", "<|mark|>", "▁", "⟨1⟩"]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=4), max_size=8).map("".join)


# Invalid UTF-8: first bytes of characters, followed by the end, a space or a special token.
HEADS = [b"\xc0", b"\xe2", b"\xe2\x96", b"\xf0\x9f", b"\xff"]
BROKEN_FRAGMENTS = st.sampled_from([*HEADS, b"\x80", b" ", b"the", b"<s>"])
BROKEN = st.lists(BROKEN_FRAGMENTS, max_size=6).map(b"".join)


@settings(max_examples=150)
@example(b"\xc0 ", False, False)
@example(b"\xe2 the\xf0<s>", True, True)
@given(TEXTS | st.binary(max_size=12) | BROKEN, st.booleans(), st.booleans())
def test_numpy_tokenizes_text_like_libllama(
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


def test_a_seeded_reply_is_the_same_beside_other_requests(tiny_gguf: Path) -> None:
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


# --- models that the example refuses ----------------------------------------------------------------------------


def test_numpy_refuses_models_that_it_does_not_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_namespaces_of_models_differ_if_their_files_differ(tmp_path: Path) -> None:
    names = [
        NumpyBackend(write_llama(tmp_path / f"{name}.gguf", seed=seed)).namespace
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert names[0] == names[1] != names[2]
