"""The binding returns right results, and the process survives any call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erllama import llama_ffi
from erllama.llama_ffi import LlamaContext, LlamaError, LlamaModel
from erllama.llama_ffi.samplers import LlamaSampler
from erllama.testing.models import FIRST_BYTE, TINY, write_llama
from support.examples import examples
from support.paths import SHARED
from support.subprocesses import must_run
from support.threads import in_threads

CONTEXT = {"n_ctx": 512, "n_batch": 256, "n_ubatch": 64, "n_seq_max": 3, "n_threads": 1, "n_threads_batch": 1}


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[LlamaModel]:
    with LlamaModel(tiny_gguf) as found:
        yield found


@pytest.fixture
def context(model: LlamaModel) -> Iterator[LlamaContext]:
    with LlamaContext(model, **CONTEXT) as found:
        yield found


@pytest.fixture(scope="module")
def selecting(model: LlamaModel) -> Iterator[LlamaContext]:
    with LlamaContext(model, **CONTEXT) as found:
        yield found


def decode(context: LlamaContext, tokens: list[int], start: int = 0, sequence: int = 0) -> NDArray[np.float32]:
    n = len(tokens)
    output = np.zeros(n, np.int8)
    output[-1] = 1
    context.decode(
        np.array(tokens, np.int32),
        np.arange(start, start + n, dtype=np.int32),
        np.full(n, sequence, np.int32),
        output,
    )
    return context.logits()[0].copy()


# --- models and vocabularies ------------------------------------------------------------------


def test_a_model_reports_its_shape_and_metadata(model: LlamaModel) -> None:
    assert (model.shape.n_layer, model.shape.n_embd, model.shape.n_head, model.shape.n_head_kv) == (2, 64, 2, 1)
    assert model.shape.n_params == 115008
    assert model.shape.has_decoder
    assert not model.shape.recurrent
    assert model.metadata["general.architecture"] == "llama"
    assert model.metadata["llama.block_count"] == "2"
    assert "llama" in model.description
    assert model.chat_template() is None


def test_loading_reports_progress_and_can_be_cancelled(tiny_gguf: Path) -> None:
    seen: list[float] = []
    LlamaModel(tiny_gguf, on_progress=seen.append).close()
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    assert seen == sorted(seen)
    for cancel_at in (0.0, 1.0):
        with pytest.raises(llama_ffi.LoadCancelledError):
            LlamaModel(tiny_gguf, on_progress=lambda fraction, at=cancel_at: fraction < at)
    with pytest.raises(llama_ffi.LoadCancelledError):
        LlamaModel(tiny_gguf, on_progress=lambda _: False)
    with pytest.raises(ZeroDivisionError):
        LlamaModel(tiny_gguf, on_progress=lambda _: 1 / 0)


@given(text=st.text(max_size=60))
def test_text_round_trips_through_its_tokens(model: LlamaModel, text: str) -> None:
    vocabulary = model.vocabulary
    ids = vocabulary.tokenize(text, add_special=False)
    assert ids.dtype == np.int32
    # This kind of tokenizer writes a space as "▁", so it is read as a space.
    assert vocabulary.detokenize(ids).decode() == text.replace("▁", " ")
    assert b"".join(vocabulary.piece(int(token)) for token in ids).decode() == text.replace("▁", " ")


def test_special_tokens_are_parsed_only_on_request(model: LlamaModel) -> None:
    vocabulary = model.vocabulary
    assert vocabulary.tokenize("a").tolist() == [1, 3 + ord("a")]
    assert vocabulary.tokenize("a", add_special=False).tolist() == [3 + ord("a")]
    assert vocabulary.tokenize("</s>", add_special=False, parse_special=True).tolist() == [2]
    assert len(vocabulary.tokenize("</s>", add_special=False)) == 4
    assert vocabulary.detokenize([1, 3 + ord("a"), 2]) == b"a"
    assert vocabulary.detokenize([1, 3 + ord("a"), 2], special=True) == b"<s>a</s>"
    assert (vocabulary.piece(2), vocabulary.piece(2, special=True)) == (b"", b"</s>")
    assert vocabulary.is_eog.nonzero()[0].tolist() == [2]
    assert vocabulary.is_control.nonzero()[0].tolist() == [1, 2]
    assert (vocabulary.bos, vocabulary.eos, vocabulary.type) == (1, 2, "spm")
    assert vocabulary.text(2) == "</s>"
    assert vocabulary.tokenize(b"\xff\x00", add_special=False).tolist() == [3 + 0xFF, 3]


def test_texts_longer_than_estimated_are_complete(tmp_path: Path) -> None:
    """Ten bytes per token: more than the first buffer holds."""
    shape = replace(TINY, n_vocab=2000)
    with LlamaModel(write_llama(tmp_path / "words.gguf", shape), vocab_only=True) as found:
        words = list(range(1500, 1900))
        text = found.vocabulary.detokenize(words)
        assert text.decode() == "".join(f"⟨{i - 260}⟩" for i in words)
        assert len(text) > 8 * len(words) + 64
        long = "x" * 100_000
        assert found.vocabulary.detokenize(found.vocabulary.tokenize(long)).decode() == long


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "qwen2"])
def test_real_vocabularies_produce_the_expected_ids(name: str) -> None:
    path = SHARED / "vocab" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().splitlines()
    with LlamaModel(path, vocab_only=True) as found:
        assert len(lines) > 20
        assert texts[len(lines) :] == [""], "the file of inputs ends with a separator"
        for text, line in zip(texts, lines, strict=False):
            ids = found.vocabulary.tokenize(text, add_special=False)
            assert ids.tolist() == [int(i) for i in line.split()]
            assert found.vocabulary.detokenize(ids).decode().lstrip(" ") == text.lstrip(" ")
        with pytest.raises(LlamaError, match="vocab_only"):
            LlamaContext(found, n_ctx=64)


def test_a_header_is_read_without_the_model(tiny_gguf: Path) -> None:
    header = llama_ffi.read_header(tiny_gguf)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.attention.head_count"] == 2
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    types = header.metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, np.ndarray)
    assert types.tolist()[:4] == [2, 3, 3, 6]
    assert header.tensors[0].name == "token_embd.weight"
    last = header.tensors[-1]
    assert header.data_offset + last.offset + last.n_bytes <= tiny_gguf.stat().st_size


def test_models_without_attention_may_have_no_heads(tmp_path: Path) -> None:
    """Converters write recurrent models with zero heads and with the sizes of their state."""
    for name, key, accepted in (("mamba", "ssm.state_size", True), ("llama", "feed_forward_length", False)):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", name)
        writer.add_block_count(2)
        writer.add_head_count(0)
        writer.add_uint32(f"{name}.{key}", 16)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        metadata = llama_ffi.check_header(tmp_path / f"{name}.gguf").metadata
        if accepted:
            llama_ffi.check_hyperparameters(metadata)
        else:
            with pytest.raises(LlamaError, match="head_count is 0"):
                llama_ffi.check_hyperparameters(metadata)


# --- decoding and memory ---------------------------------------------------------------------------


def test_logits_are_a_read_only_view_in_the_order_of_the_batch(context: LlamaContext) -> None:
    tokens = np.array([5, 6, 7], np.int32)
    positions, sequences = np.arange(3, dtype=np.int32), np.zeros(3, np.int32)
    context.decode(tokens, positions, sequences, np.ones(3, np.int8))
    rows = context.logits()
    assert rows.shape == (3, 320)
    assert rows.dtype == np.float32
    assert not rows.flags.writeable
    assert not rows.flags.owndata
    each = rows.copy()
    context.clear()
    for i in range(3):
        assert np.allclose(decode(context, [int(tokens[i])], i), each[i], atol=1e-4)


def test_sequences_are_independent(context: LlamaContext) -> None:
    alone = decode(context, [5, 6, 7])
    context.clear()
    decode(context, [9, 9, 9, 9], sequence=1)
    assert np.allclose(decode(context, [5, 6, 7]), alone, atol=1e-4)
    assert [context.last_position(s) for s in range(3)] == [2, 3, -1]
    assert [context.first_position(s) for s in range(3)] == [0, 0, -1]


def test_state_moves_between_sequences_and_contexts(model: LlamaModel, context: LlamaContext) -> None:
    tokens = list(range(10, 60))
    decode(context, tokens[:-1])
    state = context.state(0)
    expected = decode(context, tokens[-1:], 49)
    with LlamaContext(model, **CONTEXT) as other:
        other.set_state(2, state.data)
        assert other.last_position(2) == 48
        assert decode(other, tokens[-1:], 49, 2).tobytes() == expected.tobytes()


def test_part_of_a_sequence_can_be_copied_cut_and_packed(context: LlamaContext) -> None:
    tokens = list(range(10, 60))
    expected = decode(context, tokens)
    context.clear()
    decode(context, tokens[:40])
    parts = []
    for start, end in ((0, 25), (25, 40)):
        context.copy(0, 1, start, end)
        parts.append(context.state(1))
        context.cut(1, 0)
    context.clear()
    for part in parts:
        context.set_state(1, part.data)
        context.copy(1, 0)
        assert context.cut(1, 0)
    assert context.last_position(0) == 39
    assert context.cut(0, 30)
    assert context.last_position(0) == 29
    assert np.allclose(decode(context, tokens[30:], 30), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": [320]}, "token id 320"),
        ({"tokens": [-1]}, "token id -1"),
        ({"positions": [-1]}, "position"),
        ({"positions": [512]}, "position"),
        ({"sequences": [3]}, "sequence"),
        ({"sequences": [-1]}, "sequence"),
        ({"tokens": [1] * 257}, "257 tokens"),
        ({"tokens": []}, "0 tokens"),
        ({"positions": [0, 1]}, "positions must be"),
    ],
)
def test_calls_that_would_abort_are_refused(
    context: LlamaContext, change: dict[str, list[int]], words: str
) -> None:
    tokens = np.array(change.get("tokens", [5]), np.int32)
    n = len(tokens)
    given_positions = change.get("positions", list(range(n)))
    with pytest.raises(LlamaError, match=words):
        context.decode(
            tokens,
            np.array(given_positions, np.int32),
            np.array(change.get("sequences", [0] * n), np.int32),
            np.ones(n, np.int8),
        )
    assert decode(context, [5]).shape == (320,)


def test_logits_before_a_decode_are_refused(context: LlamaContext) -> None:
    with pytest.raises(LlamaError, match="no logits"):
        context.logits()
    context.decode(np.array([5], np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int8))
    with pytest.raises(LlamaError, match="no logits"):
        context.logits()


def test_positions_that_do_not_follow_are_refused(context: LlamaContext) -> None:
    decode(context, [5, 6])
    with pytest.raises(LlamaError):
        decode(context, [7], 5)
    assert decode(context, [7], 2).shape == (320,)


def test_running_out_of_cells_has_its_own_error(context: LlamaContext) -> None:
    for start in (0, 256):
        decode(context, [5] * 256, start)
    with pytest.raises(llama_ffi.NoCellsError):
        decode(context, [5], 0, sequence=1)
    assert context.last_position(0) == 511


def test_a_held_logits_view_prevents_a_larger_batch(context: LlamaContext) -> None:
    """libllama moves the buffer when it grows; a view of the old one would show freed memory."""
    n = 64
    batch = (np.full(n, 5, np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.ones(n, np.int8))
    decode(context, [5])
    context.clear()
    context.decode(*(array[:1] for array in batch))
    view = context.logits()
    context.clear()
    with pytest.raises(LlamaError, match="views"):
        context.decode(*batch)
    del view
    context.decode(*batch)
    assert context.logits().shape == (64, 320)


@given(st.binary(max_size=400))
def test_invalid_state_bytes_are_refused(model: LlamaModel, junk: bytes) -> None:
    with LlamaContext(model, **CONTEXT) as context:
        with pytest.raises(LlamaError, match="does not fit"):
            context.set_state(0, junk)
        assert context.last_position(0) == -1
        assert decode(context, [5]).shape == (320,)


def test_an_aborted_decode_has_its_own_error(context: LlamaContext) -> None:
    context.abort()
    with pytest.raises(llama_ffi.AbortedError):
        decode(context, [5] * 200)
    context.abort(False)
    context.clear()
    assert decode(context, [5] * 200).shape == (320,)


@pytest.mark.parametrize(
    "options", [{"n_ctx": 0}, {"n_seq_max": 0}, {"n_seq_max": 100_000}, {"n_threads": 0}, {"n_ctx": 2**31 - 1}]
)
def test_impossible_contexts_raise_errors(model: LlamaModel, options: dict[str, int]) -> None:
    with pytest.raises(LlamaError):
        LlamaContext(model, **{**CONTEXT, **options})


def test_the_log_of_libllama_is_passed_to_logging(
    tiny_gguf: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, "erllama.llama"):
        LlamaModel(tiny_gguf).close()
    assert any("llama" in record.message for record in caplog.records)
    assert all(record.name == "erllama.llama" for record in caplog.records)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_build_is_described() -> None:
    assert "CPU" in llama_ffi.system_info()
    assert llama_ffi.build_info()["backend"] in ("cpu", "cuda", "metal", "vulkan", "hip")
    assert any(device.name == "CPU" for device in llama_ffi.devices())
    assert llama_ffi.ggml_type("q8_0") == 8
    assert llama_ffi.ggml_type("nonsense") == -1
    assert llama_ffi.ggml_block_size(8) == 32


# --- the largest logits ------------------------------------------------------------------------------


def top_k(
    context: LlamaContext, rows: NDArray[np.float32], k: int, n: int | None = None
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    shape = len(rows) if n is None else n, k
    positions, numbers = np.full(shape, -1, np.intp), np.zeros(shape, np.float32)
    context.top_k(rows, (positions, numbers))
    return positions, numbers


ROWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], NDArray[np.floating]]] = {
    "bell": lambda dice, shape: dice.standard_normal(shape),
    "ties": lambda dice, shape: dice.choice([-1.0, 0.0, -0.0, 0.5], shape),
    "equal": lambda dice, shape: np.full(shape, dice.choice([-7.5, 0.0, np.inf, -np.inf])),
    "rising": lambda dice, shape: np.sort(dice.standard_normal(shape)),
    "falling": lambda dice, shape: -np.sort(dice.standard_normal(shape)),
    "few possible": lambda dice, shape: np.where(dice.random(shape) < 0.02, dice.standard_normal(shape), -np.inf),
    "infinite": lambda dice, shape: dice.choice([np.inf, -np.inf, 1.0, 3.4e38, -3.4e38, 1e-45], shape),
    "not a number": lambda dice, shape: np.where(dice.random(shape) < 0.01, np.nan, dice.standard_normal(shape)),
}
widths = st.integers(1, 100) | st.sampled_from([127, 128, 129, 255, 257, 1000, 4099])


@given(
    st.sampled_from(list(ROWS)),
    st.integers(0, 5),
    widths,
    st.sampled_from([1, 2, 31, 40, 4099]),
    st.integers(0, 99),
)
@settings(max_examples=examples(100))
def test_the_largest_numbers_are_those_of_numpy(
    selecting: LlamaContext, kind: str, n: int, width: int, k: int, seed: int
) -> None:
    rows = ROWS[kind](np.random.default_rng(seed), (n, width)).astype(np.float32)
    best = rows.argmax(axis=1).tolist()
    finite = [bool(np.isfinite(row[at])) for row, at in zip(rows, best, strict=True)]
    assert selecting.argmax(rows) == [at if ok else -1 for at, ok in zip(best, finite, strict=True)]
    k = min(k, width)
    positions, numbers = top_k(selecting, rows, k)
    for row, found, largest in zip(rows, positions, numbers, strict=True):
        if np.isnan(row).any():
            assert found[0] == np.flatnonzero(np.isnan(row))[0]
            assert np.isnan(largest[0])
        else:
            assert np.array_equal(found, np.argsort(-row, kind="stable")[:k])
            assert largest.tobytes() == row[found].tobytes()


def test_the_largest_logits_of_a_decode_are_found_in_place(context: LlamaContext) -> None:
    n = 20
    batch = (np.arange(5, 5 + n, dtype=np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.int32))
    for flags in (np.ones(n, np.int8), np.arange(n, dtype=np.int8) % 2, np.ones(n, np.int8)):
        context.clear()
        logits = context.decode(*batch, flags)
        for rows in (logits, logits[:3], logits[::2], np.asfortranarray(logits), logits[:, 7:200]):
            assert context.argmax(rows) == rows.argmax(axis=1).tolist()
            positions, numbers = top_k(context, rows, 3)
            assert np.array_equal(positions, np.argsort(-rows, axis=1, kind="stable")[:, :3])
            assert np.array_equal(numbers, np.take_along_axis(rows, positions, 1))
        del logits, rows  # a larger batch moves them


def test_impossible_selections_are_refused(context: LlamaContext) -> None:
    rows = np.zeros((2, 5), np.float32)
    for n, k in ((2, 0), (2, 6), (1, 5), (3, 5)):
        with pytest.raises(LlamaError, match=f"{n}, {k}"):
            top_k(context, rows, k, n)
    for positions, numbers in (
        (np.empty((2, 3), np.int32), np.empty((2, 3), np.float32)),
        (np.empty((2, 3), np.intp), np.empty((2, 3), np.float64)),
        (np.empty((2, 3), np.intp), np.empty((2, 2), np.float32)),
        (np.empty(6, np.intp), np.empty(6, np.float32)),
    ):
        with pytest.raises(LlamaError, match="results of type"):
            context.top_k(rows, (positions, numbers))  # type: ignore[arg-type]
    for change in (lambda array: array[:, :3], lambda array: array.view()):
        positions, numbers = change(np.empty((2, 5), np.intp)), change(np.empty((2, 5), np.float32))
        numbers.flags.writeable = False
        with pytest.raises((ValueError, BufferError)):
            context.top_k(rows, (positions, numbers))
    with pytest.raises(LlamaError, match="no largest"):
        context.argmax(rows[:, :0])
    assert context.argmax(rows[:0]) == []


# --- samplers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("top_q",), "unknown sampler 'top_q'"),
        (("top_k",), "it takes k"),
        (("top_k", -1), "pass an integer, 0 to"),
        (("top_k", 1.5), "pass an integer"),
        (("temp", math.nan), "float32"),
        (("temp", 1e39), "float32"),
        (("dist", 2**32 - 1), "seed="),
        (("logit_bias", 10, 10, 1.0), "token 10 is outside"),
        (("logit_bias", 10, 1), "it takes"),
        (("dry", 1, 2, 2, 10), "vocabulary"),
        (("grammar",), "0 texts"),
    ],
)
def test_impossible_samplers_raise_errors(arguments: tuple[str, float], words: str) -> None:
    with pytest.raises(LlamaError, match=words):
        LlamaSampler(*arguments)


@pytest.mark.parametrize(
    ("ids", "logits", "words"),
    [
        ([], [], "as many of each, at least one"),
        ([1], [0.0, 1.0], "shape"),
        ([[1]], [[0.0]], "one dimension"),
        ([10], [0.0], "token id 10 is outside"),
        ([-1], [0.0], "token id -1"),
        ([1, 2], [0.0, math.nan], "nan"),
        ([1, 2], [0.0, math.inf], "inf"),
        ([1], [-math.inf], "-inf"),
    ],
)
def test_candidates_that_would_abort_are_refused(ids: list[int], logits: list[float], words: str) -> None:
    with LlamaSampler("penalties", 10, 5, 1.5, 0, 0) as sampler:
        with pytest.raises(LlamaError, match=words):
            sampler.apply(ids, logits)
        with pytest.raises(LlamaError, match="do not fall"):
            sampler.apply([1, 2], [0.0, 1.0], in_order=True)
        with pytest.raises(LlamaError, match="token id 10"):
            sampler.accept([1, 10])
        assert sampler.apply([1, 2], [0.0, 1.0]).ids.tolist() == [1, 2]
    with pytest.raises(LlamaError, match="closed"):
        sampler.apply([1], [0.0])


def test_a_grammar_keeps_its_model(tiny_gguf: Path) -> None:
    model = LlamaModel(tiny_gguf, vocab_only=True)
    vocabulary = model.vocabulary
    with pytest.raises(LlamaError, match="grammar"):
        LlamaSampler("grammar", texts=["root ::= (", "root"], vocabulary=vocabulary)
    grammar = LlamaSampler("grammar", texts=['root ::= "ab"', "root"], vocabulary=vocabulary)
    model.close()
    everything = np.arange(vocabulary.n_tokens)
    a, b, c = (FIRST_BYTE + ord(letter) for letter in "abc")
    for token in (a, b):
        left = grammar.apply(everything, np.zeros(len(everything)))
        assert np.flatnonzero(left.logits == 0).tolist() == [token]
        grammar.accept([token])
    left = grammar.apply(everything, np.zeros(len(everything)))
    assert left.ids[left.logits == 0].tolist() == [2], "the end"
    with pytest.raises(LlamaError):
        grammar.accept([c])
    grammar.close()
    grammar.close()
    with pytest.raises(LlamaError, match="closed"):
        LlamaSampler("grammar", texts=['root ::= "ab"', "root"], vocabulary=vocabulary)


# --- lifetimes: each in a child process, which must exit normally -------------------------------------

SETUP = """
import gc, sys, threading, numpy as np
from erllama.llama_ffi import LlamaContext, LlamaError, LlamaModel
def decode(context, n=1):
    zeros = np.zeros(n, np.int32)
    context.decode(zeros + 5, np.arange(n, dtype=np.int32), zeros, np.ones(n, np.int8))
model = LlamaModel(sys.argv[1])
context = LlamaContext(model, n_ctx=4096, n_batch=4096, n_threads=1)
"""


@pytest.mark.parametrize(
    "code",
    {
        "nothing is closed": "decode(context)",
        "model first": "model.close(); decode(context); context.close(); context.close(); model.close()",
        "collected model": "del model; gc.collect(); decode(context)",
        "collected context": "decode(context); del context; gc.collect(); model.close()",
        "logits outlive the context": """
decode(context)
view = context.logits(); expected = view.copy()
context.close(); model.close(); del context, model; gc.collect()
assert (view == expected).all(); del view; gc.collect()""",
        "logits outlive everything": "decode(context); keep = context.logits(); context.close()",
        "logits are selected after a close": """
decode(context); keep = context.logits(); expected = [int(keep[0].argmax())]
assert context.argmax(keep) == expected; context.close(); model.close(); gc.collect()
results = np.zeros((1, 1), np.intp), np.zeros((1, 1), np.float32)
assert context.argmax(keep) == expected; context.top_k(keep, results)
assert results[0].tolist() == [expected]""",
        "logits are selected after a decode that failed": """
decode(context); keep = context.logits(); expected = [int(keep[0].argmax())]; context.abort()
try: decode(context)
except LlamaError: pass
results = np.zeros((1, 40), np.intp), np.zeros((1, 40), np.float32)
assert len(context.argmax(keep)) == 1; context.top_k(keep, results)""",
        "slices of logits": """
decode(context); keep = context.logits()[0][5:]; del context, model; gc.collect(); keep.sum()""",
        "vocabulary outlives": """
vocabulary = model.vocabulary; model.close(); context.close()
try: vocabulary.tokenize("x"); raise SystemExit("not refused")
except LlamaError: pass""",
        "closed is refused": """
context.close(); model.close()
for use in (lambda: decode(context), lambda: context.logits(), lambda: context.clear(), lambda: context.state(0),
            lambda: context.copy(0, 0), lambda: context.cut(0, 0), lambda: context.last_position(0),
            lambda: LlamaContext(model, n_ctx=64), lambda: model.metadata, lambda: model.description):
    try: use()
    except LlamaError as error: assert "closed" in str(error), error
    else: raise SystemExit("not refused")
context.abort()""",
        "a cycle": "context.me = context; model.me = model; del context, model; gc.collect()",
        "exit during a decode": """
threading.Thread(target=lambda: decode(context, 4096), daemon=True).start()
import time; time.sleep(0.05)""",
        "close during a decode": """
def work():
    try: decode(context, 4096)
    except LlamaError: pass
thread = threading.Thread(target=work); thread.start()
import time; time.sleep(0.02); context.close(); model.close(); thread.join()""",
        "abort while it is closed": """
for _ in range(300):
    context = LlamaContext(model, n_ctx=256, n_threads=1)
    threads = [threading.Thread(target=context.abort) for _ in range(3)] + [threading.Thread(target=context.close)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    context.abort()""",
        "exit during a load": "threading.Thread(target=lambda: LlamaModel(sys.argv[1]), daemon=True).start()",
        "a fork": """
import os
pid = os.fork()
if pid == 0:
    try: decode(context); os._exit(1)
    except LlamaError as error: ok = "fork" in str(error)
    try: LlamaModel(sys.argv[1]); os._exit(2)
    except LlamaError as error: ok = ok and "fork" in str(error)
    del context, model; gc.collect(); os._exit(0 if ok else 3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
decode(context)""",
    }.items(),
    ids=lambda item: item[0] if isinstance(item, tuple) else None,
)
def test_native_objects_can_be_freed_in_any_order(tiny_gguf: Path, code: tuple[str, str]) -> None:
    must_run(f"{SETUP}\n{code[1]}\n", tiny_gguf)


def test_threads_can_share_a_context(context: LlamaContext) -> None:
    """Threads wait for each other, and each gets its own results."""

    def work(sequence: int) -> None:
        for i in range(20):
            decode(context, [5 + sequence], i, sequence)

    in_threads(work, 3)
    assert [context.last_position(s) for s in range(3)] == [19, 19, 19]
