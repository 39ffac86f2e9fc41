"""Each step of a sampling chain keeps the candidates that the libllama sampler of the same name keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erllama.engine.sampling.steps import (
    XTC,
    DynamicTemperature,
    LogitBias,
    Penalties,
    Temperature,
    TopNSigma,
)
from erllama.llama_ffi import LlamaModel, Vocabulary
from erllama.llama_ffi.samplers import LlamaSampler
from erllama.testing.models import FIRST_BYTE, SPACE, TINY, write_llama
from support.examples import examples
from support.libllama_samplers import (
    N_VOCAB,
    STEPS,
    Pair,
    Row,
    a_row,
    both,
    compare,
    contexts,
    dries,
    dry,
    dynamic_temperature,
    few,
    last_bits,
    min_p,
    rounded_softmax,
    rows,
    softmax,
    temperature,
    top_k,
    top_n_sigma,
    top_p,
    typical,
    xtc,
)
from support.paths import SHARED

NO_HISTORY = [name for name in STEPS if name != "penalties"]


@pytest.mark.parametrize("name", NO_HISTORY)
def test_each_sampler_step_matches_libllama(name: str) -> None:
    @given(STEPS[name], rows())
    @settings(max_examples=examples(60))
    def check(pair: Pair, row: Row) -> None:
        assume(pair.defined(row))
        compare(pair, row, *both(pair, row))

    check()


@given(rows(most=300), st.integers(0, 299), st.sampled_from([0.9995, 1.0005]), few)
@settings(max_examples=examples(75))
def test_a_threshold_next_to_a_candidate_decides_as_in_libllama(row: Row, at: int, beside: float, k: int) -> None:
    falling = row.falling
    falling = falling[np.isfinite(falling)]
    at %= len(falling)
    shares, drop = softmax(falling), float(falling[0]) - float(falling[at])
    thresholds: list[tuple[Callable[..., Pair], float, float, tuple[int, ...]]] = [
        (top_p, shares.cumsum()[at], 1.0, (k,)),
        (min_p, math.exp(-drop), 1.0, (k,)),
        (partial(xtc, 1.0), shares[at], 0.5, (k,)),
        (top_n_sigma, drop / max(float(falling.std(dtype=np.float64)), 1e-30), 1e30, ()),
        (typical, shares.cumsum()[at], 1.0, (k,)),
    ]
    for make, threshold, most, others in thresholds:
        threshold = float(np.float32(threshold * beside))
        if 1e-30 < threshold < most:
            pair = make(threshold, *others)
            if pair.defined(row):
                compare(pair, row, *both(pair, row))


@pytest.mark.parametrize(
    ("make", "numbers", "n_left"),
    [
        (top_p, (0.5, 1), 2),
        (top_p, (0.75, 1), 3),
        (min_p, (1.0, 1), 4),
        (typical, (0.5, 1), 3),
        (typical, (0.25, 1), 2),
        (xtc, (1.0, 0.25, 1), 1),
        (top_n_sigma, (1.0,), 4),
    ],
)
@pytest.mark.parametrize("in_order", [False, True])
def test_a_sum_equal_to_the_threshold_counts_as_in_libllama(
    make: Callable[..., Pair], numbers: tuple[float, ...], n_left: int, in_order: bool
) -> None:
    """Four equal logits, so no sum is rounded."""
    row, pair = a_row(1.5, 1.5, 1.5, 1.5)._replace(in_order=in_order), make(*numbers)
    ours, theirs = both(pair, row)
    assert len(ours) == len(theirs.ids) == n_left


LARGE: list[tuple[Callable[..., Pair], tuple[float, ...]]] = [
    (top_k, (40,)),
    (top_k, (5000,)),
    (top_p, (0.95, 1)),
    (top_p, (0.9999, 0)),
    (min_p, (0.05, 1)),
    (min_p, (0.5, 300)),
    (typical, (0.5, 1)),
    (xtc, (1.0, 0.00001, 1)),
    (top_n_sigma, (1.0,)),
    (temperature, (0.7,)),
    (dynamic_temperature, (1.0, 0.5, 1.0)),
]


@pytest.mark.parametrize(("make", "numbers"), LARGE)
def test_sampler_steps_match_libllama_for_a_large_vocabulary(
    make: Callable[..., Pair], numbers: tuple[float, ...]
) -> None:
    random = np.random.default_rng(3)
    row = Row(np.arange(128_256, dtype=np.int32), (random.standard_normal(128_256) * 2.5).astype(np.float32))
    pair = make(*numbers)
    compare(pair, row, *both(pair, row))


@given(rows(), st.dictionaries(st.integers(0, N_VOCAB - 1), st.floats(-100, 100, width=32) | st.just(-np.inf)))
def test_biases_are_added_as_in_libllama(row: Row, biases: dict[int, float]) -> None:
    biases = {int(row.ids[0]): 2.0, **biases}
    numbers = [number for item in biases.items() for number in item]
    # With sorted candidates, libllama's step assumes that they stay sorted.
    row = row._replace(in_order=False)
    pair = Pair("logit_bias", LogitBias(biases), LlamaSampler("logit_bias", N_VOCAB, *numbers), slack=last_bits)
    ruled_out = [token for token, bias in biases.items() if bias == -np.inf]
    assume(np.isfinite(row.logits[~np.isin(row.ids, ruled_out)]).any())
    compare(pair, row, *both(pair, row))


@given(STEPS["penalties"], rows(), contexts)
@settings(max_examples=examples(100))
def test_penalties_match_libllama(pair: Pair, row: Row, context: NDArray[np.int32]) -> None:
    compare(pair, row, *both(pair, row, context))


# --- where libllama's result is not defined, or a matter of overflow --------------------------------------


@given(STEPS["typical"], rows(kinds=("bell", "ties", "steep", "huge")))
def test_excluded_tokens_do_not_change_typical_sampling(pair: Pair, row: Row) -> None:
    """The entropy of such rows is NaN in libllama, so it gets only the remaining candidates."""
    possible = rounded_softmax(row.logits) > 0
    ours = pair.ours(row.candidates())
    rest = row.keep(possible)
    ours = ours.keep(np.isin(ours.ids, rest.ids))
    compare(pair, rest, ours, pair.theirs.apply(rest.ids, rest.logits, in_order=rest.in_order))


@given(rows(), st.sampled_from([1e-3, 1e-30, 1e-44, 1e-320]))
def test_any_low_temperature_is_accepted(row: Row, t: float) -> None:
    """If logits overflow, the probabilities of libllama are NaN."""
    shifted = row.logits.astype(np.float64) - float(row.logits.max())
    with np.errstate(over="ignore"):
        weights = np.exp(shifted / t)
    for step in (Temperature(t), DynamicTemperature(t, t / 2, 0.0)):
        if isinstance(step, DynamicTemperature):
            with np.errstate(over="ignore"):
                weights = np.exp(shifted / (t * 1.5))
        found = step(row.candidates())
        np.testing.assert_allclose(found.probabilities(), weights / weights.sum(), rtol=0, atol=1e-3)


def test_numbers_beyond_float32_become_infinite() -> None:
    row = a_row(3e38, -3.3e38, 1.0)
    context = np.array([0, 1], np.int32)
    assert Penalties(5, 1.5, 0, 0)(row.candidates(context)).logits[1] == -np.inf
    assert len(TopNSigma(1e300)(row.candidates())) == 3


@pytest.mark.parametrize("logits", [(2.0, 1.0, -np.inf), (2.0, 1.0, -np.inf, 0.0, -np.inf)])
def test_xtc_keeps_at_least_one_candidate(logits: tuple[float, ...]) -> None:
    """With a threshold of 0, libllama keeps the last candidate, which is excluded."""
    found = XTC(1.0, 0.0, 1)(a_row(*logits).candidates())
    assert found.ids.tolist()[0] == int(np.argmin(np.where(np.isfinite(logits), logits, np.inf)))
    assert np.isfinite(found.best())


# --- chains -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vocabulary]:
    """Bytes, and words "⟨n⟩"."""
    path = write_llama(tmp_path_factory.mktemp("wide") / "wide.gguf", replace(TINY, n_vocab=N_VOCAB))
    with LlamaModel(path, vocab_only=True) as model:
        yield model.vocabulary


@given(st.data())
@settings(max_examples=examples(200))
def test_chains_in_any_order_match_libllama(vocabulary: Vocabulary, data: st.DataObject) -> None:
    steps = {**STEPS, "dry": dries(vocabulary, [[], ["\x01\x02", "\x03"]])}
    names = data.draw(st.lists(st.sampled_from(sorted(steps)), min_size=2, max_size=6, unique=True))
    row, context = data.draw(rows(kinds=("bell", "ties", "equal", "a peak", "steep"))), data.draw(contexts)
    candidates = row.candidates(context)
    for name in names:
        pair = data.draw(steps[name])
        if not pair.defined(row):
            return
        ours, theirs = both(pair, row, context, candidates)
        compare(pair, row, ours, theirs)
        # Each side continues with its own result, except where rounding decided.
        candidates, row = ours, Row(theirs.ids, theirs.logits, theirs.in_order)
        ours_by_id, row_by_id = np.argsort(ours.ids), np.argsort(row.ids)
        if not (
            np.array_equal(ours.ids[ours_by_id], row.ids[row_by_id])
            and np.array_equal(ours.logits[ours_by_id], row.logits[row_by_id])
        ):
            candidates = Row(row.ids[row_by_id], row.logits[row_by_id]).candidates(context)


# --- repetitions --------------------------------------------------------------------------------------------

A, B, C, NEWLINE = (FIRST_BYTE + ord(letter) for letter in "abc\n")
WORD = 260 + 5  # "⟨5⟩"
E_ACUTE = [FIRST_BYTE + byte for byte in "é".encode()]
TEXTS = (
    ["\n", ":", '"', "*"],
    [],
    ["a"],
    ["ab"],
    ["ab", "b"],
    ["aab", "ab", "c\n"],
    ["a b", "\n\n"],
    [" "],
    ["⟨5⟩"],
    ["5"],
    ["5⟩a", "⟩"],
    ["a⟨5", "b⟨"],
    ["é"],
    ["éa", "aé"],
    ["<s>"],
    ["</s>a", "s"],
    ["ba" * 25],
)
letters = st.sampled_from([A, A, B, B, C, NEWLINE, SPACE, FIRST_BYTE + ord(" "), WORD, *E_ACUTE, 1, 2])


@given(st.data(), st.lists(letters | st.sampled_from([A, B]), max_size=80), rows(most=320))
@settings(max_examples=examples(150))
def test_dry_matches_libllama(vocabulary: Vocabulary, data: st.DataObject, context: list[int], row: Row) -> None:
    if data.draw(st.booleans()):
        row = Row(np.arange(320, dtype=np.int32), np.zeros(320, np.float32))
    pair = data.draw(dries(vocabulary, TEXTS))
    compare(pair, row, *both(pair, row, np.array(context, np.int32)))


@given(st.data(), st.integers(2, 200), st.integers(0, 8))
def test_dry_with_long_repetitions_matches_libllama(
    vocabulary: Vocabulary, data: st.DataObject, n: int, period: int
) -> None:
    context = np.array(data.draw(st.lists(letters, max_size=4)) + [A, B, A, C, B, WORD, A, A][: period + 1] * n)
    pair = data.draw(dries(vocabulary, TEXTS))
    row = Row(np.arange(320, dtype=np.int32), np.zeros(320, np.float32))
    compare(pair, row, *both(pair, row, context.astype(np.int32)))


@pytest.mark.parametrize("base", [1.0000005, 1.000002, 1.1, 2.0, 4.0, 8.0, 16.0, 100.0])
def test_dry_penalties_are_capped_as_in_libllama(vocabulary: Vocabulary, base: float) -> None:
    pair = dry(vocabulary, [], 1.0, base, 0, 500)
    row = Row(np.arange(320, dtype=np.int32), np.zeros(320, np.float32))
    compare(pair, row, *both(pair, row, np.array([A] * 300, np.int32)))


@pytest.mark.parametrize("text", ["</s>", "/s", "a</", "b</s>", "</s>b"])
def test_a_control_token_name_works_as_a_dry_breaker(vocabulary: Vocabulary, text: str) -> None:
    pair = dry(vocabulary, [text], 1.0, 1.5, 1, 500)
    row = Row(np.arange(320, dtype=np.int32), np.zeros(320, np.float32))
    compare(pair, row, *both(pair, row, np.array([A, B, C, A, 2, B, C, A, B, C, A, 2, B, C, A], np.int32)))


@pytest.mark.parametrize("n", range(17, 28))
def test_a_long_dry_breaker_matches_by_its_first_tokens(vocabulary: Vocabulary, n: int) -> None:
    """One token and its twenty successors."""
    pair = dry(vocabulary, ["a" + "b" * 24], 1.0, 1.5, 1, 500)
    row = Row(np.arange(320, dtype=np.int32), np.zeros(320, np.float32))
    compare(pair, row, *both(pair, row, np.array([B] * 30 + [A] + [B] * n, np.int32)))


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "qwen2"])
def test_dry_with_a_real_vocabulary_matches_libllama(name: str) -> None:
    """No text begins with a space: in some vocabularies, libllama reads each token without its first space, or with
    the one before a full stop removed, and misses such breakers. The engine finds them.
    """
    path = SHARED / "vocab" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    parts = ["the", " end", ".\n", "\n\n", "User:", " User", '":', "é", "<|im_end|>", "a", "*", "#" * 40]
    texts = [["\n", ":", '"', "*"], ["User:", "the e", "é", "<|im_end|>", "</s>"]]
    long = ["#" * 45]  # 40 bytes are considered, and two of the vocabularies have a token of that length
    with LlamaModel(path, vocab_only=True) as model:
        vocabulary = model.vocabulary
        ids = np.unique(np.concatenate([vocabulary.tokenize(part, parse_special=True) for part in parts]))

        @given(st.data(), st.lists(st.sampled_from(parts), max_size=20))
        @settings(max_examples=examples(15))
        def check(data: st.DataObject, words: list[str]) -> None:
            context = vocabulary.tokenize("".join(words), parse_special=True)
            tokens = np.union1d(ids, context).astype(np.int32)
            row = Row(tokens, np.zeros(len(tokens), np.float32))
            pair = data.draw(dries(vocabulary, texts))
            compare(pair, row, *both(pair, row, context))

        check()
        context = vocabulary.tokenize(
            "the end" * 3 + "#" * 40 + "the end" * 3 + "#" * 40 + "the end", add_special=False
        )
        row = Row(np.unique(context), np.zeros(len(np.unique(context)), np.float32))
        pair = dry(vocabulary, long, 1.0, 1.5, 1, 500)
        compare(pair, row, *both(pair, row, context))
