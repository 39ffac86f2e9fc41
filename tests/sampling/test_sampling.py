"""Tokens are drawn from the distribution that the options describe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache
from erllama.engine.backends.stub import StubBackend
from erllama.engine.sampling.candidates import order, top_k
from erllama.engine.sampling.options import SamplingOptions
from erllama.engine.sampling.sampler import Sampler, SamplerFactory
from support.examples import examples
from support.recording_backend import LetterVocabulary

rows = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=300).map(lambda r: np.array(r, np.float32))
tied_rows = st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=1, max_size=300).map(
    lambda r: np.array(r, np.float32)
)


NOTHING = np.empty(0, np.int32)


def sampler_of(n_vocab: int, **options: object) -> Sampler:
    return SamplerFactory(LetterVocabulary(n_vocab), n_ctx=512).make(SamplingOptions(**options))  # type: ignore[arg-type]


def draw(logits: NDArray[np.float32], n: int = 4000, **options: float) -> NDArray[np.float64]:
    """Return the relative frequency of each token."""
    sampler = sampler_of(len(logits), seed=1, **{**NEUTRAL, **options})
    return np.bincount([sampler.sample(logits, NOTHING) for _ in range(n)], minlength=len(logits)) / n


NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SKEWED = np.log(np.array([0.5, 0.25, 0.15, 0.06, 0.04], np.float32))


@given(st.one_of(rows, tied_rows), st.integers(0, 310))
def test_top_k_takes_the_head_of_a_stable_sort(logits: NDArray[np.float32], k: int) -> None:
    expected = np.argsort(-logits, kind="stable")[: k or None]
    assert np.array_equal(top_k(logits, k).positions, expected)


def test_top_k_works_for_a_large_vocabulary() -> None:
    logits = np.random.default_rng(0).standard_normal(128_256).astype(np.float32)
    for k in (1, 40, 2003, 2004, 2005, 128_256):
        assert np.array_equal(top_k(logits, k).positions, np.argsort(-logits, kind="stable")[:k])


@given(st.one_of(rows, tied_rows), st.integers(0, 9))
def test_temperature_zero_takes_the_first_of_the_most_likely(logits: NDArray[np.float32], seed: int) -> None:
    sampler = sampler_of(len(logits), temperature=0, seed=seed)
    assert sampler.sample(logits, NOTHING) == int(np.argmax(logits))


def chi_squared(observed: NDArray[np.float64], expected: NDArray[np.float64], n: int) -> float:
    return float(n * ((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    weights = np.exp(SKEWED.astype(float) / temperature)
    # 4 degrees of freedom: chance exceeds 18.5 once in a thousand times. The seed is fixed.
    assert chi_squared(draw(SKEWED, temperature=temperature), weights / weights.sum(), 4000) < 18.5


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": 99}, 5),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.85}, 3),
        ({"top_p": 0.0}, 1),
        ({"min_p": 0.25}, 3),
        ({"min_p": 0.1}, 4),
        ({"min_p": 1.0}, 1),
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.4}, 2),
    ],
)
def test_kept_tokens_are_drawn_in_proportion(options: dict[str, float], kept: int) -> None:
    found = draw(SKEWED, **options)
    assert np.count_nonzero(found) == kept
    expected = np.exp(SKEWED[:kept].astype(float))
    assert np.allclose(found[:kept], expected / expected.sum(), atol=0.03)


def test_a_seed_fixes_the_draws_and_is_reported() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    first = sampler_of(1000)
    again = sampler_of(1000, seed=first.seed)
    other = sampler_of(1000, seed=(first.seed + 1) % 2**64)
    draws = [[sampler.sample(logits, NOTHING) for _ in range(50)] for sampler in (first, again, other)]
    assert draws[0] == draws[1] != draws[2]


def test_the_smallest_temperature_is_nearly_greedy() -> None:
    assert draw(SKEWED, n=50, temperature=1e-320)[0] == 1.0


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 0.0, -np.inf], np.float32)
    assert np.count_nonzero(draw(logits, temperature=50.0)[[1, 3]]) == 0


@given(rows | tied_rows, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_logits_without_a_distribution_are_refused(
    logits: NDArray[np.float32], number: float, data: st.DataObject
) -> None:
    logits = logits.copy()
    if number == -np.inf:
        logits[:] = number
    else:
        logits[data.draw(st.integers(0, len(logits) - 1))] = number
    options: dict[str, object] = data.draw(
        st.sampled_from(
            [
                {"temperature": 0},
                {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
                {"mirostat": 1},
                {"mirostat": 2},
                {"repeat_penalty": 1.5, "top_n_sigma": 1.0, "typical_p": 0.5, "xtc_probability": 1.0},
                {"temperature": 0, "logit_bias": {0: 1.0}},
            ]
        )
    )
    sampler = sampler_of(len(logits), seed=1, **options)
    with pytest.raises(erllama.SamplingError):
        sampler.sample(logits, NOTHING)


# --- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"repeat_last_n": -2}, "repeat_last_n"),
        ({"frequency_penalty": 101}, "at most 100"),
        ({"presence_penalty": float("nan")}, "finite"),
        ({"dry_base": 0.5}, "dry_base"),
        ({"dry_sequence_breakers": [""]}, "none of them empty"),
        ({"dry_sequence_breakers": "\n"}, "list"),
        ({"typical_p": 2}, "typical_p"),
        ({"xtc_threshold": 0.6}, "at most 0.5"),
        ({"mirostat": 3}, "at most 2"),
        ({"mirostat": 1, "temperature": 0}, "leave out temperature=0"),
        ({"mirostat": 2, "top_k": 5}, "top_k=5 has no effect: mirostat=2"),
        ({"min_keep": -1}, "min_keep"),
        ({"samplers": "top_k"}, "list"),
        ({"samplers": ["top_q"]}, "did you mean 'top_"),
        ({"samplers": ["top_k"], "top_p": 0.5}, "top_p=0.5 has no effect: 'top_p' is not among"),
        ({"temperature": 0, "dynatemp_range": 0.5}, "has no effect"),
        ({"logit_bias": [1]}, "mapping"),
        ({"logit_bias": {-1: 0.5}}, "at least 0"),
        ({"logit_bias": {1: float("inf")}}, "finite"),
        ({"logit_bias": {1: "much"}}, "number"),
        ({"logit_bias": {1: 1e39}}, "at most 1e+30"),
        ({"logit_bias": {10_000: 1}}, "logit_bias has token 10000; the vocabulary has 0 to"),
        ({"banned_tokens": [10_000]}, "banned_tokens has token 10000"),
        ({"banned_tokens": "abc"}, "list of token ids"),
        ({"sampling_state": 5}, "sampling_state of a Completion"),
    ],
)
def test_wrong_sampling_options_are_reported(stub: erllama.Model, options: dict[str, object], words: str) -> None:
    with pytest.raises(erllama.OptionError) as caught:
        stub.complete("x", max_tokens=1, **options)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.fixture
def stub() -> Iterator[erllama.Model]:
    with Cache() as cache, erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
        yield model


# --- what the steps do to replies --------------------------------------------------------------------------


def test_banned_tokens_never_appear_and_a_large_bias_wins(stub: erllama.Model) -> None:
    plain = stub.complete("x", max_tokens=100, temperature=3, seed=1)
    often = Counter(plain.tokens).most_common(20)
    banned = [token for token, _ in often]
    without = stub.complete("x", max_tokens=200, temperature=3, seed=1, banned_tokens=banned)
    assert set(banned).isdisjoint(without.tokens)
    biased = stub.complete("x", max_tokens=20, temperature=3, logit_bias={7: 1000.0})
    assert set(biased.tokens) == {7}
    as_text = stub.complete("x", max_tokens=20, temperature=3, logit_bias={"7": 1000.0})  # type: ignore[dict-item]
    assert set(as_text.tokens) == {7}
    never = dict.fromkeys(banned, -np.inf)
    assert stub.complete("x", max_tokens=200, temperature=3, seed=1, logit_bias=never).tokens == without.tokens


def test_penalties_count_prompt_and_reply(stub: erllama.Model) -> None:
    prompt = list(range(40))
    free = stub.complete(prompt, max_tokens=60, temperature=0)
    assert len({*prompt, *free.tokens}) < 100
    for options in ({"frequency_penalty": 100.0}, {"presence_penalty": 100.0}, {"repeat_penalty": 1000.0}):
        reply = stub.complete(prompt, max_tokens=60, temperature=0, repeat_last_n=-1, **options)  # type: ignore[arg-type]
        assert len({*prompt, *reply.tokens}) == 100, f"{options}: no token repeats"
    blind = stub.complete(prompt, max_tokens=60, temperature=0, repeat_last_n=0, presence_penalty=100.0)
    assert blind.tokens == free.tokens


def test_dry_penalizes_continued_repetition() -> None:
    logits = np.zeros(20, np.float32)
    context = np.array([5, 1, 2, 3, 4, 9, 1, 2, 3], np.int32)  # 4 would follow 1 2 3 again
    rows = []

    def look(candidates: erllama.Candidates) -> erllama.Candidates:
        rows.append(candidates.logits.copy())
        return candidates

    options = {"dry_multiplier": 0.8, "dry_base": 2.0, "samplers": ["dry", look, "temperature"], "seed": 1}
    neutral = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}
    sampler_of(20, **options, **neutral, dry_sequence_breakers=[]).sample(logits, context)
    assert rows[-1][4] == pytest.approx(-0.8 * 2)
    assert np.count_nonzero(rows[-1]) == 1
    # A breaker before the last two tokens of the repetition leaves those two. One after the first leaves too few.
    sampler_of(20, **options, **neutral, dry_sequence_breakers=["\x01"]).sample(logits, context)
    assert rows[-1][4] == pytest.approx(-0.8)
    sampler_of(20, **options, **neutral, dry_sequence_breakers=["\x02"]).sample(logits, context)
    assert not rows[-1].any()


def test_the_caller_sets_the_order_of_steps() -> None:
    # With temperature first, top_p keeps more.
    kept = [
        np.count_nonzero(draw(SKEWED, temperature=4.0, top_p=0.7, samplers=samplers))
        for samplers in (["top_p", "temperature"], ["temperature", "top_p"])
    ]
    assert kept == [2, 4]


def test_a_custom_step_sees_the_context_and_can_decide(stub: erllama.Model) -> None:
    contexts = []

    def even(candidates: erllama.Candidates) -> erllama.Candidates:
        contexts.append(candidates.context.tolist())
        return candidates.keep(candidates.ids % 2 == 0)

    reply = stub.complete([1, 2, 3], max_tokens=10, samplers=[even, "temperature"], seed=3)
    assert all(token % 2 == 0 for token in reply.tokens)
    assert contexts == [list(reply.context_tokens[:n]) for n in range(3, 13)]


def failing(candidates: erllama.Candidates) -> erllama.Candidates:
    raise ZeroDivisionError("oh")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (failing, "the step failing failed: ZeroDivisionError: oh"),
        (lambda candidates: None, "returned NoneType"),
        (lambda candidates: candidates.keep(slice(0, 0)), "shape (0,)"),
        (lambda candidates: candidates.with_logits(candidates.logits * np.nan), "nan"),
        (lambda candidates: candidates.with_logits(candidates.logits[:5]), "logits of (5,)"),
        (lambda c: erllama.Candidates(c.ids + 10**6, c.logits, c.context, c.random), "a token outside 0 to"),
    ],
)
def test_a_failing_custom_step_fails_only_its_request(
    stub: erllama.Model, step: Callable[[erllama.Candidates], erllama.Candidates], words: str
) -> None:
    with stub.stream("other", max_tokens=50, seed=1) as other:
        with pytest.raises(erllama.SamplingError) as caught:
            stub.complete("x", max_tokens=5, samplers=[step])
        assert words in str(caught.value)
        assert other.result().tokens == stub.complete("other", max_tokens=50, seed=1).tokens


@given(
    st.integers(0, 2**32),
    st.integers(0, 30),
    st.integers(1, 30),
    st.sampled_from([{}, {"mirostat": 1}, {"mirostat": 2}, {"xtc_probability": 0.5}, {"top_k": 0, "min_p": 0.0}]),
)
@settings(max_examples=examples(25))
def test_draws_continue_from_the_state_of_another_reply(
    seed: int, n: int, more: int, options: dict[str, object]
) -> None:
    options = {"temperature": 2.0, "repeat_penalty": 1.2, **options}
    with Cache() as cache, erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
        whole = model.complete("begin", max_tokens=n + more, seed=seed, **options)  # type: ignore[arg-type]
        first = model.complete("begin", max_tokens=max(n, 1), seed=seed, **options)  # type: ignore[arg-type]
        second = model.complete(
            list(first.context_tokens),
            max_tokens=n + more - max(n, 1),
            sampling_state=first.sampling_state,
            **options,  # type: ignore[arg-type]
        )
    assert first.tokens + second.tokens == whole.tokens
    if n + more > max(n, 1):
        assert second.seed == seed
        assert second.sampling_state == whole.sampling_state


@pytest.mark.parametrize("tau", [2.0, 4.0, 6.0])
@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_keeps_the_surprise_at_its_target(version: int, tau: float) -> None:
    logits = np.random.default_rng(2).standard_normal(5000).astype(np.float32) * 2
    shares = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    assert -(shares * np.log2(shares)).sum() > 9, "without mirostat, the surprise would be far from the target"
    falling = np.argsort(-logits, kind="stable")
    rank, sums = np.argsort(falling), shares[falling].cumsum()
    sampler = sampler_of(5000, mirostat=version, mirostat_tau=tau, mirostat_eta=0.1, temperature=1.0, seed=1)
    learned = []
    for _ in range(500):
        before = sampler.state.mu
        token = sampler.sample(logits, NOTHING)
        after = sampler.state.mu
        assert before is not None
        assert after is not None
        learned.append(tau + (before - after) / 0.1)
        # Mirostat learns from the surprise within the candidates that it kept, the drawn one included.
        left = 2 ** learned[-1] * shares[token]
        n = int(sums.searchsorted(left * (1 - 1e-4))) + 1
        assert sums[n - 1] == pytest.approx(left, rel=1e-4)
        assert rank[token] < n
    assert np.mean(learned[100:]) == pytest.approx(tau, abs=0.2)


def test_a_seed_must_match_the_sampling_state(stub: erllama.Model) -> None:
    first = stub.complete("x", max_tokens=3, seed=5)
    stub.complete("x", max_tokens=3, seed=5, sampling_state=first.sampling_state)
    with pytest.raises(erllama.OptionError, match="continues with seed 5"):
        stub.complete("x", max_tokens=3, seed=6, sampling_state=first.sampling_state)


@given(rows | tied_rows, st.integers(0, 5))
def test_large_and_small_candidate_sets_sort_alike(logits: NDArray[np.float32], seed: int) -> None:
    many = np.resize(np.append(logits, [np.float32(0.0), np.float32(-0.0), -np.inf]), 3000).astype(np.float32)
    np.random.default_rng(seed).shuffle(many)
    assert np.array_equal(order(many), (-many).argsort(kind="stable"))


def test_draws_from_many_candidates_follow_the_softmax() -> None:
    logits = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    logits[::3] = -np.inf
    found = draw(logits, n=20_000)
    assert not found[::3].any()
    weights = np.exp(logits.astype(float))
    by_group = [part.sum() for part in np.array_split(found, 30)]
    expected = [part.sum() for part in np.array_split(weights / weights.sum(), 30)]
    # 29 degrees of freedom: chance exceeds 58.3 once in a thousand times. The seed is fixed.
    assert chi_squared(np.array(by_group), np.array(expected), 20_000) < 58.3
