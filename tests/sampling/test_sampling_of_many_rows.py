"""Rows that are sampled together get the tokens and the errors of each row alone, and consume the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.engine import LargestLogits, RowSelector
from erllama.engine.backends.llama import LlamaBackend
from erllama.engine.sampling import batch
from erllama.engine.sampling.batch import sample_rows
from erllama.engine.sampling.candidates import LARGE, Candidates
from erllama.engine.sampling.draws import Categorical, draw_from_list
from erllama.engine.sampling.options import SamplingOptions
from erllama.engine.sampling.rows import draw_positions
from erllama.engine.sampling.sampler import Sampler, SamplerFactory
from erllama.engine.sampling.steps import MinP, Temperature, TopP
from support.examples import examples
from support.recording_backend import LetterVocabulary, llama_backend

Logits = NDArray[np.float32]
NOTHING = np.empty(0, np.int32)


class Sharpen(erllama.OrderedRowsStep):
    """Multiplies logits by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, candidates: Candidates) -> Candidates:
        logits = candidates.logits * np.float32(self.factor)
        return candidates.with_logits(logits, in_order=candidates.in_order)

    @classmethod
    def change_ordered_rows(cls, steps: Sequence[Sharpen], logits: Logits) -> Logits:
        factors = np.array([step.factor for step in steps], np.float32)
        return logits * factors[:, np.newaxis]


KINDS: dict[str, Callable[[np.random.Generator, int], NDArray[np.floating]]] = {
    "bell": lambda random, n: random.standard_normal(n) * random.choice([0.1, 1, 4, 20]),
    "ties": lambda random, n: random.choice([-1.0, 0.0, -0.0, 0.5, 2.0], n),
    "equal": lambda random, n: np.full(n, random.choice([-7.5, 0.0, 3.0])),
    "steep": lambda random, n: -random.permutation(random.exponential(5, n).cumsum()),
    "huge": lambda random, n: random.uniform(-3, 3, n) * 10.0 ** random.integers(20, 39),
    "largest": lambda random, n: random.choice([3.4e38, -3.4e38, 1.0], n),
    "few possible": lambda random, n: np.where(random.random(n) < 5 / n, random.standard_normal(n), -np.inf),
    "infinite": lambda random, n: np.where(random.random(n) < 2 / n, np.inf, 1.0),
    "not a number": lambda random, n: np.where(random.random(n) < 2 / n, np.nan, random.standard_normal(n)),
}
SIZES = [1, 2, 3, 40, 79, 80, 81, 150, 511, 513, 1000, 1024, 2777]

some_options = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-300, 0.3, 0.8, 1.0, 5.0, 1e6]),
        "top_k": st.sampled_from([0, 1, 2, 39, 40, 300, 600]),
        "top_p": st.sampled_from([0.0, 0.3, 0.9, 0.95, 0.999999, 1.0]),
        "min_p": st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
        "min_keep": st.sampled_from([0, 1, 3, 50]),
        "repeat_penalty": st.sampled_from([1.0, 1.1, 0.001, 1000.0]),
        "repeat_last_n": st.sampled_from([-1, 0, 1, 5, 64]),
        "frequency_penalty": st.sampled_from([0.0, 0.5, -2.0, 100.0]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -1.0]),
        "logit_bias": st.dictionaries(st.just(0), st.sampled_from([1.0, -1e30, 1e30, -np.inf])),
    },
)
other_options = st.sampled_from(
    [
        {"mirostat": 1},
        {"mirostat": 2},
        {"xtc_probability": 0.5},
        {"dry_multiplier": 0.8, "dry_allowed_length": 1},
        {"typical_p": 0.5},
        {"top_n_sigma": 1.0},
        {"dynatemp_range": 0.5},
        {"samplers": ["temperature", "top_k"], "top_p": 1.0, "min_p": 0.0},
        {"samplers": ["top_k", "temperature", "top_p", "top_k"], "min_p": 0.0},
        {"samplers": ["top_k", Sharpen(0.9), "top_p"], "top_p": 0.9},
        {"samplers": ["top_k", Sharpen(0.5), "top_p"], "top_p": 0.8, "top_k": 300},
        {"samplers": ["top_k", "min_p", "penalties"], "top_p": 1.0, "temperature": 1.0},
        {"samplers": [lambda candidates: candidates.keep(candidates.ids % 2 == 0), "top_k"], "top_p": 1.0},
    ]
).map(lambda options: {"min_p": 0.0, "temperature": 1.0, **options} if "samplers" in options else options)


@pytest.fixture(scope="module")
def backend(tiny_gguf: Path) -> Iterator[LlamaBackend]:
    found = llama_backend(tiny_gguf, n_ctx=256)
    yield found
    found.close()


@pytest.fixture(autouse=True, scope="module", params=["numpy", "libllama"])
def _selector(request: pytest.FixtureRequest, backend: LlamaBackend) -> Iterator[None]:
    """Compute rows together from two rows on. Select their largest logits in numpy, or in the backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "_MIN_ROWS", 2)
        if request.param != "numpy":
            patch.setattr(Ticks, "selector", backend)
        yield


class Ticks:
    """Rows of several ticks, and for each row two samplers with the same seed.

    Attributes:
        selector: selects the largest logits of rows that are sampled together; None for numpy.
    """

    selector: ClassVar[RowSelector | None] = None

    def __init__(self, n_vocab: int, options: list[dict[str, object]], seed: int) -> None:
        factory = SamplerFactory(LetterVocabulary(n_vocab), n_ctx=512)
        checked = [SamplingOptions(seed=seed + i, **given) for i, given in enumerate(options)]  # type: ignore[arg-type]
        self.n_vocab, self.random = n_vocab, np.random.default_rng(seed)
        self.alone, self.together = ([factory.make(given) for given in checked] for _ in range(2))

    def logits(self, kinds: Sequence[str]) -> Logits:
        """Return a row of each kind."""
        logits = np.empty((len(kinds), self.n_vocab), np.float32)
        for row, kind in zip(logits, kinds, strict=True):
            row[:] = KINDS[kind](self.random, self.n_vocab)
        return logits

    def compare(self, logits: Logits, *, masked: float = 0.0) -> list[int | erllama.Error]:
        """Sample once from each row, and fail unless both ways agree."""
        n = len(logits)
        contexts = [
            self.random.integers(0, self.n_vocab, self.random.integers(0, 100)).astype(np.int32) for _ in range(n)
        ]
        allowed = [
            self.random.random(self.n_vocab) < self.random.choice([0.0, 0.01, 0.5]) if chance < masked else None
            for chance in self.random.random(n)
        ]
        before = logits.copy()
        expected = [alone(*row) for row in zip(self.alone, logits, contexts, allowed, strict=True)]
        found = sample_rows(self.together, logits, contexts, allowed, self.selector)
        assert np.array_equal(logits, before, equal_nan=True), "logits are not changed"
        assert list(map(repr, found)) == list(map(repr, expected))
        assert [sampler.state for sampler in self.together] == [sampler.state for sampler in self.alone]
        return found


def alone(
    sampler: Sampler, logits: Logits, context: NDArray[np.int32], allowed: NDArray[np.bool_] | None
) -> int | erllama.Error:
    try:
        with np.errstate(all="ignore"):
            return sampler.sample(logits, context, allowed)
    except erllama.Error as error:
        return error


@given(
    st.sampled_from(SIZES),
    st.lists(st.tuples(some_options | some_options | other_options, st.sampled_from(list(KINDS))), max_size=10),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.0, 0.3, 1.0]),
)
@settings(max_examples=examples(100))
def test_rows_together_get_what_each_row_gets_alone(
    n_vocab: int, rows: list[tuple[dict[str, object], str]], seed: int, masked: float
) -> None:
    ticks = Ticks(n_vocab, [options for options, _ in rows], seed)
    for _ in range(3):
        ticks.compare(ticks.logits([kind for _, kind in rows]), masked=masked)


@given(
    st.sampled_from(SIZES),
    st.lists(st.tuples(some_options | other_options, st.sampled_from(list(KINDS))), max_size=7),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=examples(50))
def test_a_few_rows_get_what_each_row_gets_alone(
    n_vocab: int, rows: list[tuple[dict[str, object], str]], seed: int, masked: float
) -> None:
    """Too few to compute them together. A backend still selects the largest logits of all."""
    ticks = Ticks(n_vocab, [options for options, _ in rows], seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "_MIN_ROWS", 8)
        for _ in range(3):
            ticks.compare(ticks.logits([kind for _, kind in rows]), masked=masked)


@given(
    st.lists(some_options, min_size=2, max_size=12),
    st.sampled_from(["bell", "ties", "steep", "few possible"]),
    st.integers(0, 2**32),
    st.sampled_from([2, 100]),
)
@settings(max_examples=examples(25))
def test_many_draws_together_equal_those_of_rows_alone(
    options: list[dict[str, object]], kind: str, seed: int, min_rows: int
) -> None:
    """Also if the rows are too few to compute them together."""
    ticks = Ticks(300, options, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "_MIN_ROWS", min_rows)
        for _ in range(50):
            ticks.compare(ticks.logits([kind] * len(options)))


def test_a_chain_in_lists_computes_the_bits_of_arrays() -> None:
    """The logits after each step, and the draws; with numbers up to the largest that lists may have."""
    random = np.random.default_rng(1)
    for scale in (1e-30, 1e-3, 1.0, 10.0, 1e3, 1e20, 1e29):
        for _ in range(300):
            logits = -np.sort(-random.standard_normal(random.integers(1, 129)) * scale).astype(np.float32)
            row = Candidates(np.arange(len(logits)), logits, NOTHING, random, in_order=True)
            for step in (
                TopP(random.random(), int(random.integers(0, 3))),
                MinP(random.random(), int(random.integers(0, 3))),
                Temperature(float(random.exponential())),
            ):
                found = step.change_list(logits.tolist())
                expected = step(row).logits
                assert not found or np.array(found, np.float32).tobytes() == expected.tobytes()
                assert all(number == float(np.float32(number)) for number in found)
                assert found or np.abs(expected).max() > LARGE or np.abs(logits).max() > LARGE / 100
            share = random.random()
            fixed = cast(np.random.Generator, FixedRandom(share))
            candidates = Candidates(np.arange(len(logits)), logits, NOTHING, fixed, in_order=True)
            assert draw_from_list(logits.tolist(), share) == Categorical().draw(candidates)


@pytest.mark.parametrize("n_vocab", [32_000, 50_257, 65_536, 70_001])
@pytest.mark.parametrize("kind", ["bell", "ties", "equal", "steep", "few possible", "not a number"])
def test_rows_of_a_large_vocabulary_are_sampled_alike(n_vocab: int, kind: str) -> None:
    """More rows than are read together, with different values of each option."""
    options: list[dict[str, object]] = [
        {"temperature": 0.5 + i / 20, "top_k": 30 + i, "top_p": 0.9 + i / 400, "min_p": i / 1000} for i in range(20)
    ]
    options += [{"repeat_penalty": 1.1}, {"temperature": 0}, {"temperature": 0, "presence_penalty": 1.0}] * 3
    ticks = Ticks(n_vocab, options, 1)
    logits = np.stack([KINDS[kind](ticks.random, n_vocab) for _ in options]).astype(np.float32)
    logits[3, -1] = logits[4, 0] = 100.0  # beyond the groups, if the vocabulary has such tokens
    for _ in range(2):
        ticks.compare(logits, masked=0.1)


def test_rows_with_the_same_kinds_of_steps_are_sampled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, object]] = [
        {},
        {"temperature": 0.2, "top_p": 0.5},
        {"repeat_penalty": 1.5},
        {"presence_penalty": 1.0, "top_k": 3},
        {"temperature": 0, "repeat_penalty": 1.5},
        {"temperature": 0, "frequency_penalty": 1.0},
        {"xtc_probability": 0.5},
        {"xtc_probability": 0.5},
    ]
    alone: list[Sampler] = []
    sample = Sampler.sample

    def record(sampler: Sampler, *row: object) -> int:
        alone.append(sampler)
        return sample(sampler, *row)  # type: ignore[arg-type]

    ticks = Ticks(1000, options, 1)
    logits = ticks.random.standard_normal((len(options), 1000)).astype(np.float32)
    monkeypatch.setattr(Sampler, "sample", record)
    sample_rows(ticks.together, logits, [np.arange(5, dtype=np.int32)] * 8, [None] * 8)
    assert alone == ticks.together[6:]


class Faulty(Sharpen):
    """A step whose second form returns what `results` makes of the logits."""

    results: ClassVar[Callable[[Logits], object]]

    @classmethod
    def change_ordered_rows(cls, steps: Sequence[Sharpen], logits: Logits) -> Logits:
        return cls.results(logits)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "results",
    [
        lambda logits: logits[:, :1],
        lambda logits: None,
        lambda logits: 1 / 0,
        lambda logits: sys.exit(1),
        lambda logits: -logits,
        lambda logits: logits * np.nan,
        lambda logits: np.full_like(logits, -np.inf),
        np.zeros_like,
        lambda logits: logits.fill(0),
    ],
)
def test_a_faulty_form_for_many_rows_harms_no_row(results: Callable[[Logits], object]) -> None:
    Faulty.results = staticmethod(results)
    options: list[dict[str, object]] = [
        {"samplers": ["top_k", Faulty(1.0 + i), "temperature"], "top_p": 1.0, "min_p": 0.0} for i in range(4)
    ]
    ticks = Ticks(200, options, 1)
    logits = ticks.random.standard_normal((4, 200)).astype(np.float32)
    logits[0, 5:] = -np.inf
    found = ticks.compare(logits)
    assert not any(isinstance(token, erllama.Error) for token in found)


def test_custom_steps_of_one_class_are_sampled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, object]] = [
        {"samplers": ["top_k", Sharpen(1.0 + i), "temperature"], "top_p": 1.0, "min_p": 0.0} for i in range(4)
    ]
    ticks = Ticks(200, options, 1)
    logits = ticks.random.standard_normal((4, 200)).astype(np.float32)
    monkeypatch.setattr(Sampler, "sample", None)
    found = sample_rows(ticks.together, logits, [NOTHING] * 4, [None] * 4)
    assert all(isinstance(token, int) for token in found)


def test_a_row_without_a_token_fails_alone() -> None:
    ticks = Ticks(1000, [{}, {}, {"temperature": 0}, {"temperature": 0}, {}, {"top_k": 5}], 1)
    logits = ticks.random.standard_normal((6, 1000)).astype(np.float32)
    logits[1, 999], logits[2, 5], logits[4] = np.nan, np.inf, -np.inf
    found = ticks.compare(logits)
    failed = [isinstance(token, erllama.SamplingError) for token in found]
    assert failed == [False, True, True, False, True, False]
    assert str(found[1]) == "the model leaves no token to sample: the largest logit is nan"


def test_rows_need_not_be_in_one_piece_of_memory() -> None:
    ticks = Ticks(100, [{}] * 4, 1)
    wide = ticks.random.standard_normal((4, 200)).astype(np.float32)
    ticks.compare(wide[:, ::2])
    ticks.compare(wide[:, 100:])
    ticks.compare(np.asfortranarray(wide[:, :100]))
    wide.flags.writeable = False
    ticks.compare(wide[:, :100])


class FixedRandom:
    """Returns one number."""

    def __init__(self, share: float) -> None:
        self.share = share

    def random(self) -> float:
        return self.share


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.5, 0.75, 1 - 2**-53])
def test_draws_at_a_sum_and_at_the_end_agree(share: float) -> None:
    """Equal weights have sums that equal a share."""
    logits = np.full((5, 8), -np.inf, np.float32)
    for n, row in enumerate(logits, 1):
        row[:n] = 2.0
    expected = []
    for n, row in enumerate(logits, 1):
        random = cast(np.random.Generator, FixedRandom(share))
        candidates = Candidates(np.arange(n), row[:n], NOTHING, random, in_order=True)
        expected.append(Categorical().draw(candidates))
    assert draw_positions(logits, np.full(5, share)).tolist() == expected


def test_no_rows_give_no_tokens() -> None:
    assert sample_rows([], np.empty((0, 50), np.float32), [], []) == []


class Unselective:
    """A selector that fails."""

    def argmax(self, logits: Logits) -> list[int]:
        raise SystemExit(1)

    def top_k(self, logits: Logits, out: LargestLogits) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("n", [1, 12])
def test_a_selector_that_fails_harms_no_row(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ticks, "selector", Unselective())
    ticks = Ticks(200, [{"temperature": i % 2} for i in range(n)], 1)
    found = ticks.compare(ticks.random.standard_normal((n, 200)).astype(np.float32))
    assert not any(isinstance(token, erllama.Error) for token in found)
