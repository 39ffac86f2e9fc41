"""The steps of a sampling chain leave what libllama's samplers of the same names leave.

Both sides get the same candidates. Where libllama's choice is decided by the rounding of its float32 sums, the same
sums are made here in float32 and in float64, and the sides may differ as far as these do. Where equal logits are at
a cut, logits are compared and not ids. Where libllama divides by zero, or turns a float that no int holds into an
int, there is nothing to compare with; each such place is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.engine.candidates import Candidates
from erllama.engine.dry import DRY, Breakers
from erllama.engine.sampling import SamplerFactory, SamplingOptions
from erllama.engine.steps import (
    XTC,
    Chance,
    DynamicTemperature,
    Greedy,
    LogitBias,
    MinP,
    Mirostat,
    Penalties,
    Step,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    TypicalP,
)
from erllama.llama_ffi import LlamaError, LlamaModel, Vocabulary
from erllama.llama_ffi.samplers import Left, LlamaSampler
from erllama.testing.models import FIRST_BYTE, SPACE, TINY, write_llama
from support import SHARED, Letters

Logits = NDArray[np.float32]
CLOSE = 1e-5  # of probabilities
LOWEST = float(np.finfo(np.float32).min)
N_VOCAB = 3000
NOTHING = np.empty(0, np.int32)


class Row(NamedTuple):
    """Candidates that both sides begin with."""

    ids: NDArray[np.int32]
    logits: Logits
    in_order: bool = False

    @property
    def falling(self) -> Logits:
        return np.sort(self.logits)[::-1]

    def candidates(self, context: NDArray[np.int32] = NOTHING) -> Candidates:
        random = np.random.default_rng(0)
        return Candidates(self.ids.astype(np.intp), self.logits.copy(), context, random, in_order=self.in_order)

    def keep(self, which: NDArray[np.bool_]) -> Row:
        return Row(self.ids[which], self.logits[which], self.in_order)


# --- rows ------------------------------------------------------------------------------------------------

_KINDS: dict[str, Callable[[np.random.Generator, int], NDArray[np.floating]]] = {
    "bell": lambda random, n: random.standard_normal(n) * random.choice([0.1, 1, 4, 20]),
    "ties": lambda random, n: random.choice([-1.0, 0.0, 0.5, 2.0], n),
    "equal": lambda random, n: np.full(n, random.choice([-7.5, 0.0, 3.0])),
    "a peak": lambda random, n: np.where(np.arange(n) == random.integers(n), 30.0, random.standard_normal(n)),
    "neighbours": lambda random, n: 5 + random.integers(-3, 4, n) * 2.0**-21,  # differ by a few of the last bits
    "steep": lambda random, n: -np.sort(random.exponential(5, n)).cumsum(),
    # libllama sorts more than 128 by buckets, whose numbers must be ints.
    "huge": lambda random, n: random.standard_normal(n) * 10.0 ** random.integers(3, 38 if n <= 128 else 8),
}


@st.composite
def rows(draw: st.DrawFn, most: int = N_VOCAB, kinds: Sequence[str] = tuple(_KINDS)) -> Row:
    edges = [n for n in (1, 2, 64, 128, 129, 256, 257, 1023, 1024, 1025, 2999) if n <= most]
    n = draw(st.integers(1, 12) | st.integers(1, most) | st.sampled_from(edges))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = _KINDS[draw(st.sampled_from(kinds))](random, n).astype(np.float32)
    ruled_out = draw(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0]))
    if ruled_out:
        logits[random.random(n) < ruled_out] = -np.inf
        logits[random.integers(n)] = 1.5  # but never all
    ids = np.arange(n)
    if draw(st.booleans()):
        ids = np.sort(random.choice(most, n, replace=False))
    row = Row(ids.astype(np.int32), logits)
    if draw(st.booleans()):
        order = np.argsort(-logits, kind="stable")
        row = Row(row.ids[order], logits[order], in_order=True)
    return row


def a_row(*logits: float) -> Row:
    return Row(np.arange(len(logits), dtype=np.int32), np.array(logits, np.float32))


# --- probabilities, in float64 and as float32 sums give them ----------------------------------------------


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def rounded_softmax(logits: Logits) -> Logits:
    with np.errstate(over="ignore"):
        weights = np.exp(logits - logits.max(), dtype=np.float32)
    found: Logits = weights / weights.cumsum(dtype=np.float32)[-1]
    return found


def sums_rounding(falling: Logits) -> float:
    """How far float32 takes the running sums of probabilities from where they are."""
    exact, rounded = softmax(falling).cumsum(), rounded_softmax(falling).cumsum(dtype=np.float32)
    return 2 * float(np.abs(exact - rounded).max()) + 1e-6


def entropies(logits: Logits) -> tuple[float, float]:
    """In float64, and as a float32 sum."""
    exact, rounded = softmax(logits), rounded_softmax(logits)
    exact, rounded = exact[exact > 0], rounded[rounded > 0]
    return float(-(exact * np.log(exact)).sum()), float(-(rounded * np.log(rounded)).cumsum(dtype=np.float32)[-1])


def libllamas_probabilities(left: Row | Left) -> Logits:
    """By its own last sampler."""
    with LlamaSampler("dist", 1) as dist:
        return dist.apply(left.ids, left.logits, in_order=left.in_order).probabilities


def by_id(ids: NDArray[np.integer], values: NDArray[np.floating]) -> NDArray[np.float64]:
    dense = np.zeros(int(ids.max()) + 1)
    dense[ids] = values
    return dense


# --- one step of both ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A step of ours and libllama's, made with the same numbers.

    Attributes:
        undecided: whether float32 rounding may decide between leaving `fewer` and `more` of a row whose falling
            logits are given; None where nothing is dropped.
        slack: by how much more than CLOSE the probabilities may differ, on a row.
        defined: whether libllama's result on a row is.
        history: whether it is to be told the context.
    """

    name: str
    ours: Step
    theirs: LlamaSampler
    undecided: Callable[[Logits, int, int], bool] | None = None
    slack: Callable[[Row], float] = lambda row: 0.0
    defined: Callable[[Row], bool] = lambda row: True
    history: bool = False


def compare(pair: Pair, row: Row, ours: Candidates, theirs: Left) -> None:
    """Fails where they differ more than they may."""
    assert len(set(ours.ids.tolist())) == len(ours)
    if ours.in_order:
        assert (ours.logits[1:] <= ours.logits[:-1]).all()
    if pair.name == "typical":
        compare_typical(pair, row, ours, theirs)
        return
    if pair.undecided is not None:
        before = by_id(row.ids, row.logits)
        falling, n = row.falling, len(row.ids)
        for ids in (ours.ids, theirs.ids):
            # The most likely are left, or, by xtc, the least likely.
            expected = falling[n - len(ids) :] if pair.name == "xtc" else falling[: len(ids)]
            assert np.array_equal(np.sort(before[ids])[::-1], expected)
        fewer, more = sorted((len(ours), len(theirs.ids)))
        if fewer < more:
            assert pair.undecided(falling, fewer, more), (
                f"{pair.name} left {len(ours)}, and libllama's {len(theirs.ids)}, of {n}"
            )
            return
    elif pair.name != "temp_ext":
        found, expected = by_id(ours.ids, ours.logits), by_id(theirs.ids, theirs.logits)
        if pair.name == "dry":  # a penalty that overflows is infinite there, and the largest number here
            found, expected = np.maximum(found, LOWEST), np.maximum(expected, LOWEST)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2 * last_bits(row))
    compare_probabilities(ours, theirs, CLOSE + pair.slack(row))


def compare_probabilities(ours: Candidates, theirs: Left, close: float) -> None:
    found, expected = ours.probabilities(), libllamas_probabilities(theirs)
    if set(ours.ids.tolist()) == set(theirs.ids.tolist()):
        np.testing.assert_allclose(by_id(ours.ids, found), by_id(theirs.ids, expected), rtol=0, atol=close)
    else:  # of equal logits at a cut, each side left its own
        np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=0, atol=close)


def without_ruled_out(left: Left) -> Left:
    """Where ours drops, and libllama's puts the logit at minus infinity."""
    which = left.logits > -np.inf
    return left._replace(ids=left.ids[which], logits=left.logits[which])


def both(
    pair: Pair, row: Row, context: NDArray[np.int32] = NOTHING, candidates: Candidates | None = None
) -> tuple[Candidates, Left]:
    candidates = candidates or row.candidates(context)
    candidates.logits.flags.writeable = False  # a step must not
    ours = pair.ours(candidates)
    if pair.history:
        pair.theirs.accept(context)
    theirs = pair.theirs.apply(row.ids, row.logits, in_order=row.in_order)
    if pair.name == "top_n_sigma" or (pair.name == "temp_ext" and len(ours) == 1):
        theirs = without_ruled_out(theirs)
    return ours, theirs


# --- what rounding may decide, step by step --------------------------------------------------------------


def top_k(k: int) -> Pair:
    return Pair("top_k", TopK(k), LlamaSampler("top_k", k), lambda falling, fewer, more: False)


def top_p(p: float, min_keep: int) -> Pair:
    def undecided(falling: Logits, fewer: int, more: int) -> bool:
        sums = softmax(falling).cumsum()[fewer - 1 : more - 1]
        return bool((np.abs(sums - p) <= sums_rounding(falling)).all())

    return Pair("top_p", TopP(p, min_keep), LlamaSampler("top_p", p, min_keep), undecided)


def min_p(p: float, min_keep: int) -> Pair:
    def undecided(falling: Logits, fewer: int, more: int) -> bool:
        # Two libraries' logarithms may differ in the last bit; that of 1 does not.
        log = np.float32(math.log(p))
        least, most = (falling[0] + np.nextafter(log, towards, dtype=np.float32) for towards in (-np.inf, 0))
        return bool(((falling[fewer:more] >= least) & (falling[fewer:more] < most)).all())

    return Pair("min_p", MinP(p, min_keep), LlamaSampler("min_p", p, min_keep), undecided)


def xtc(probability: float, threshold: float, min_keep: int) -> Pair:
    def undecided(falling: Logits, fewer: int, more: int) -> bool:
        # It may leave all for want of min_keep, so more than one may hang on one that is undecided.
        near = np.abs(softmax(falling) - threshold) <= 1e-5 * threshold + 1e-7
        return bool(near.any())

    # With a threshold of 0, libllama leaves the last of all, be it ruled out.
    return Pair(
        "xtc",
        XTC(probability, threshold, min_keep),
        LlamaSampler("xtc", probability, threshold, min_keep, 1),
        undecided,
        defined=lambda row: threshold > 0 or bool(np.isfinite(row.logits).all()),
    )


def top_n_sigma(n: float) -> Pair:
    def deviations(logits: Logits) -> tuple[float, float]:
        logits = logits[np.isfinite(logits)]
        with np.errstate(over="ignore", invalid="ignore"):
            mean = np.float32(logits.cumsum(dtype=np.float32)[-1] / len(logits))
            squares = (logits.astype(np.float64) - float(mean)) ** 2
            rounded = squares.astype(np.float32).cumsum(dtype=np.float32)[-1] / len(logits)
        return float(logits.std(dtype=np.float64)), math.sqrt(rounded)

    def undecided(falling: Logits, fewer: int, more: int) -> bool:
        exact, rounded = deviations(falling)
        bound = falling[0] - n * exact
        rounding = 2 * n * abs(exact - rounded) + 1e-6 * (abs(float(falling[0])) + n * exact)
        return bool((np.abs(falling[fewer:more] - bound) <= rounding).all())

    # Squares that leave float32 tell libllama nothing.
    return Pair(
        "top_n_sigma",
        TopNSigma(n),
        LlamaSampler("top_n_sigma", n),
        undecided,
        defined=lambda row: math.isfinite(deviations(row.logits)[1]),
    )


def temperature(t: float) -> Pair:
    # Where the largest logit overflows, libllama's probabilities are NaN; ours keep to the softmax (below).
    defined = partial(no_overflow, t=t)
    return Pair("temp", Temperature(t), LlamaSampler("temp", t), defined=defined)


def no_overflow(row: Row, t: float) -> bool:
    return abs(float(row.logits.max())) / t < 1e30


def dynamic_temperature(t: float, spread: float, exponent: float) -> Pair:
    least, most = max(0.0, t - spread), t + spread

    def temperatures(row: Row) -> list[float]:
        shares = [entropy / math.log(len(row.ids)) for entropy in entropies(row.falling)]
        return [least + (most - least) * max(share, 0.0) ** exponent for share in shares]

    def slack(row: Row) -> float:
        if len(row.ids) == 1:
            return 0.0
        exact, rounded = temperatures(row)
        rounding = 2 * abs(exact - rounded) + 1e-6 * most
        falling = row.falling.astype(np.float64)
        spread_out, narrow = (softmax(falling / x) for x in (exact + rounding, max(exact - rounding, 1e-9)))
        return float(np.abs(spread_out - narrow).max())

    def defined(row: Row) -> bool:
        # As for `temperature`. At 0, both leave the most likely.
        return len(row.ids) == 1 or all(x == 0 or (x > 1e-6 and no_overflow(row, x)) for x in temperatures(row))

    theirs = LlamaSampler("temp_ext", t, spread, exponent)
    return Pair("temp_ext", DynamicTemperature(t, spread, exponent), theirs, slack=slack, defined=defined)


def penalties(last_n: int, repeat: float, frequency: float, presence: float) -> Pair:
    return Pair(
        "penalties",
        Penalties(last_n, repeat, frequency, presence),
        LlamaSampler("penalties", N_VOCAB, last_n, repeat, frequency, presence),
        slack=last_bits,
        history=True,
    )


def last_bits(row: Row) -> float:
    """What the last bit of the largest logit does to a probability: one side may multiply and add in one."""
    return float(np.spacing(np.abs(row.logits[np.isfinite(row.logits)]).max()))


def typical(p: float, min_keep: int) -> Pair:
    def defined(row: Row) -> bool:
        return bool((rounded_softmax(row.logits) > 0).all())  # else libllama's entropy is NaN

    return Pair("typical", TypicalP(p, min_keep), LlamaSampler("typical", p, min_keep), defined=defined)


def compare_typical(pair: Pair, row: Row, ours: Candidates, theirs: Left) -> None:
    before = by_id(row.ids, row.logits)
    if np.array_equal(np.sort(before[ours.ids]), np.sort(before[theirs.ids])):
        compare_probabilities(ours, theirs, CLOSE)
        return
    p = pair.ours._p  # type: ignore[attr-defined]
    exact, rounded = entropies(row.falling)
    shares = by_id(row.ids, softmax(row.logits))
    surprise = -np.log(shares[row.ids])
    scores = by_id(row.ids, np.abs(surprise - exact))
    rounding = 2 * abs(exact - rounded) + sums_rounding(row.falling) + 1e-6 * (exact + float(surprise.max()))
    nearer, farther = sorted((ours.ids, theirs.ids), key=lambda ids: float(scores[ids].max()))
    cut = float(scores[nearer].max())
    # Whoever is nearer than the cut is left by both, and it is rounding that decides who else is.
    surely = set(row.ids[scores[row.ids] < cut - rounding].tolist())
    assert surely <= set(ours.ids.tolist())
    assert surely <= set(theirs.ids.tolist())
    beyond = farther[scores[farther] > cut + rounding]
    if len(beyond):
        sums = float(shares[nearer].sum()), float(shares[farther].sum() - shares[beyond].min())
        assert abs(sums[0] - p) <= sums_rounding(row.falling)
        assert sums[1] <= p + sums_rounding(row.falling) + shares[beyond].max()


# --- strategies of steps ------------------------------------------------------------------------------------

share = st.floats(0, 1, width=32, exclude_max=True, allow_subnormal=False)
above_0 = st.floats(2.0**-20, 1, width=32) | st.sampled_from([1.0, 0.5, 0.05])
few = st.sampled_from([0, 1, 1, 2, 5, 100, 4000])
positive = st.floats(0.0625, 8, width=32)
STEPS: dict[str, st.SearchStrategy[Pair]] = {
    "top_k": st.builds(top_k, st.integers(1, 20) | st.integers(1, 3100) | st.sampled_from([128, 129])),
    "top_p": st.builds(top_p, share | st.sampled_from([0.0, 0.5, 0.875]), few),
    "min_p": st.builds(min_p, above_0, few),
    "typical": st.builds(typical, share, few),
    "xtc": st.builds(xtc, st.sampled_from([0.0, 1.0, 1.0]), st.floats(0, 0.5, width=32), few),
    "top_n_sigma": st.builds(top_n_sigma, st.floats(0.0078125, 4, width=32)),
    "temp": st.builds(temperature, positive | st.floats(0.0009765625, 0.0625, width=32)),
    "temp_ext": st.builds(dynamic_temperature, positive, positive, st.floats(0, 4, width=32)),
    "penalties": st.builds(
        penalties,
        st.integers(1, 40),
        st.floats(0.5, 2, width=32),
        st.floats(-2, 2, width=32),
        st.floats(-2, 2, width=32),
    ),
}
contexts = st.lists(st.integers(0, 5) | st.integers(0, 200), max_size=60).map(lambda ids: np.array(ids, np.int32))
NO_HISTORY = [name for name in STEPS if name != "penalties"]


@pytest.mark.parametrize("name", NO_HISTORY)
def test_a_step_leaves_what_libllamas_leaves(name: str) -> None:
    @given(STEPS[name], rows())
    @settings(max_examples=250)
    def check(pair: Pair, row: Row) -> None:
        assume(pair.defined(row))
        compare(pair, row, *both(pair, row))

    check()


@given(rows(most=300), st.integers(0, 299), st.sampled_from([0.9995, 1.0005]), few)
@settings(max_examples=300)
def test_a_threshold_just_beside_a_candidate_is_on_the_same_side(row: Row, at: int, beside: float, k: int) -> None:
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
def test_a_sum_that_is_exactly_the_threshold_counts_as_libllamas_does(
    make: Callable[..., Pair], numbers: tuple[float, ...], n_left: int, in_order: bool
) -> None:
    """Four equal logits: nothing is rounded."""
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
def test_a_step_leaves_what_libllamas_leaves_of_a_large_vocabulary(
    make: Callable[..., Pair], numbers: tuple[float, ...]
) -> None:
    random = np.random.default_rng(3)
    row = Row(np.arange(128_256, dtype=np.int32), (random.standard_normal(128_256) * 2.5).astype(np.float32))
    pair = make(*numbers)
    compare(pair, row, *both(pair, row))


@given(rows(), st.dictionaries(st.integers(0, N_VOCAB - 1), st.floats(-100, 100, width=32) | st.just(-np.inf)))
def test_biases_are_added_as_libllamas_adds_them(row: Row, biases: dict[int, float]) -> None:
    biases = {int(row.ids[0]): 2.0, **biases}
    numbers = [number for item in biases.items() for number in item]
    # Given candidates in order, libllama's takes them to be in order afterwards.
    row = row._replace(in_order=False)
    pair = Pair("logit_bias", LogitBias(biases), LlamaSampler("logit_bias", N_VOCAB, *numbers), slack=last_bits)
    ruled_out = [token for token, bias in biases.items() if bias == -np.inf]
    assume(np.isfinite(row.logits[~np.isin(row.ids, ruled_out)]).any())
    compare(pair, row, *both(pair, row))


@given(STEPS["penalties"], rows(), contexts)
@settings(max_examples=400)
def test_penalties_are_libllamas(pair: Pair, row: Row, context: NDArray[np.int32]) -> None:
    compare(pair, row, *both(pair, row, context))


# --- where libllama's result is not defined, or a matter of overflow --------------------------------------


@given(STEPS["typical"], rows(kinds=("bell", "ties", "steep", "huge")))
def test_what_is_ruled_out_does_not_change_what_is_typical(pair: Pair, row: Row) -> None:
    """libllama's entropy of such rows is NaN: it is given the rest."""
    possible = rounded_softmax(row.logits) > 0
    ours = pair.ours(row.candidates())
    rest = row.keep(possible)
    ours = ours.keep(np.isin(ours.ids, rest.ids))
    compare(pair, rest, ours, pair.theirs.apply(rest.ids, rest.logits, in_order=rest.in_order))


@given(rows(), st.sampled_from([1e-3, 1e-30, 1e-44, 1e-320]))
def test_no_temperature_is_too_low(row: Row, t: float) -> None:
    """Where logits overflow, libllama's probabilities are NaN."""
    shifted = row.logits.astype(np.float64) - float(row.logits.max())
    with np.errstate(over="ignore"):
        weights = np.exp(shifted / t)
    for step in (Temperature(t), DynamicTemperature(t, t / 2, 0.0)):
        if isinstance(step, DynamicTemperature):
            with np.errstate(over="ignore"):
                weights = np.exp(shifted / (t * 1.5))
        found = step(row.candidates())
        np.testing.assert_allclose(found.probabilities(), weights / weights.sum(), rtol=0, atol=1e-3)


def test_numbers_that_float32_does_not_hold_are_infinite() -> None:
    row = a_row(3e38, -3.3e38, 1.0)
    context = np.array([0, 1], np.int32)
    assert Penalties(5, 1.5, 0, 0)(row.candidates(context)).logits[1] == -np.inf
    assert len(TopNSigma(1e300)(row.candidates())) == 3


@pytest.mark.parametrize("logits", [(2.0, 1.0, -np.inf), (2.0, 1.0, -np.inf, 0.0, -np.inf)])
def test_xtc_leaves_one_that_can_be_drawn(logits: tuple[float, ...]) -> None:
    """With a threshold of 0 libllama's leaves the last, which is ruled out."""
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


BREAKERS: dict[tuple[int, tuple[str, ...]], Breakers] = {}


def dry(
    vocabulary: Vocabulary, texts: Sequence[str], multiplier: float, base: float, allowed: int, last_n: int
) -> Pair:
    key = (id(vocabulary), tuple(texts))
    if key not in BREAKERS:
        BREAKERS[key] = Breakers(vocabulary, texts)
    return Pair(
        "dry",
        DRY(multiplier, base, allowed, last_n, BREAKERS[key]),
        LlamaSampler("dry", multiplier, base, allowed, last_n, texts=texts, vocabulary=vocabulary),
        slack=last_bits,
        history=True,
    )


def dries(vocabulary: Vocabulary, texts: Sequence[Sequence[str]]) -> st.SearchStrategy[Pair]:
    return st.builds(
        dry,
        st.just(vocabulary),
        st.sampled_from(texts),
        st.floats(0.125, 4, width=32),
        st.floats(1, 4, width=32) | st.sampled_from([1.0, 2.0**-20 + 1, 100.0, 1e6]),
        st.integers(0, 5),
        st.integers(1, 30) | st.just(500),
    )


@given(st.data())
@settings(max_examples=800)
def test_a_chain_in_any_order_leaves_what_libllamas_leaves(vocabulary: Vocabulary, data: st.DataObject) -> None:
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
        # Each goes on with its own, unless there was something to decide.
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
@settings(max_examples=600)
def test_dry_is_libllamas(vocabulary: Vocabulary, data: st.DataObject, context: list[int], row: Row) -> None:
    if data.draw(st.booleans()):
        row = Row(np.arange(320, dtype=np.int32), np.zeros(320, np.float32))
    pair = data.draw(dries(vocabulary, TEXTS))
    compare(pair, row, *both(pair, row, np.array(context, np.int32)))


@given(st.data(), st.integers(2, 200), st.integers(0, 8))
def test_dry_of_long_repetitions_is_libllamas(
    vocabulary: Vocabulary, data: st.DataObject, n: int, period: int
) -> None:
    context = np.array(data.draw(st.lists(letters, max_size=4)) + [A, B, A, C, B, WORD, A, A][: period + 1] * n)
    pair = data.draw(dries(vocabulary, TEXTS))
    row = Row(np.arange(320, dtype=np.int32), np.zeros(320, np.float32))
    compare(pair, row, *both(pair, row, context.astype(np.int32)))


@pytest.mark.parametrize("text", ["</s>", "/s", "a</", "b</s>", "</s>b"])
def test_the_name_of_a_control_token_breaks_as_text_does(vocabulary: Vocabulary, text: str) -> None:
    pair = dry(vocabulary, [text], 1.0, 1.5, 1, 500)
    row = Row(np.arange(320, dtype=np.int32), np.zeros(320, np.float32))
    compare(pair, row, *both(pair, row, np.array([A, B, C, A, 2, B, C, A, B, C, A, 2, B, C, A], np.int32)))


@pytest.mark.parametrize("n", range(17, 28))
def test_of_a_long_breaker_its_first_tokens_must_match(vocabulary: Vocabulary, n: int) -> None:
    """One token and the twenty after it."""
    pair = dry(vocabulary, ["a" + "b" * 24], 1.0, 1.5, 1, 500)
    row = Row(np.arange(320, dtype=np.int32), np.zeros(320, np.float32))
    compare(pair, row, *both(pair, row, np.array([B] * 30 + [A] + [B] * n, np.int32)))


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "qwen2"])
def test_dry_with_a_real_vocabulary_is_libllamas(name: str) -> None:
    """No text begins with a space: libllama reads each token of some vocabularies without its first space, or with
    the one before a full stop gone, and so misses such breakers. Ours finds them.
    """
    path = SHARED / "vocab" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    parts = ["the", " end", ".\n", "\n\n", "User:", " User", '":', "é", "<|im_end|>", "a", "*", "#" * 40]
    texts = [["\n", ":", '"', "*"], ["User:", "the e", "é", "<|im_end|>", "</s>"]]
    long = ["#" * 45]  # 40 bytes are looked at, and two of the vocabularies have a token of as many
    with LlamaModel(path, vocab_only=True) as model:
        vocabulary = model.vocabulary
        ids = np.unique(np.concatenate([vocabulary.tokenize(part, parse_special=True) for part in parts]))

        @given(st.data(), st.lists(st.sampled_from(parts), max_size=20))
        @settings(max_examples=15)
        def check(data: st.DataObject, said: list[str]) -> None:
            context = vocabulary.tokenize("".join(said), parse_special=True)
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


# --- who draws ------------------------------------------------------------------------------------------------


class Told:
    """In place of random numbers: those that make a draw what another's was."""

    share = 0.5

    def random(self) -> float:
        return self.share

    def choose(self, candidates: Candidates, token: int) -> None:
        shares = candidates.probabilities()
        at = int(np.flatnonzero(candidates.ids == token)[0])
        self.share = float(shares[:at].sum() + shares[at] / 2)


@given(rows())
def test_greedy_takes_the_token_that_libllamas_takes(row: Row) -> None:
    with LlamaSampler("greedy") as greedy:
        left = greedy.apply(row.ids, row.logits, in_order=row.in_order)
    assert Greedy().draw(row.candidates()) == left.ids[left.selected]


@given(rows(kinds=("bell", "ties", "equal", "a peak")), st.integers(0, 1000))
def test_a_draw_finds_the_token_that_its_share_falls_on(row: Row, seed: int) -> None:
    with LlamaSampler("dist", seed) as dist:
        left = dist.apply(row.ids, row.logits, in_order=row.in_order)
    candidates, told = row.candidates(), Told()
    assume(left.probabilities[left.selected] > 1e-7)
    told.choose(candidates, int(left.ids[left.selected]))
    candidates.random = told  # type: ignore[assignment]
    assert Chance().draw(candidates) == left.ids[left.selected]


def zipf(falling: Logits, n_vocab: int, mu: float) -> tuple[float, float]:
    """How many of the most likely mirostat 1 leaves, before it is made whole; in float64 and in float32."""
    found = []
    for kind, shares in ((np.float64, softmax(falling)), (np.float32, rounded_softmax(falling))):
        with np.errstate(all="ignore"):
            ranks = np.arange(1, min(len(shares), 100), dtype=kind)
            steps = np.log((ranks + kind(1)) / ranks)
            drops = np.log(shares[: len(ranks)] / shares[1 : len(ranks) + 1]).astype(kind)
            exponent = kind((steps * drops).cumsum(dtype=kind)[-1] / (steps**2).cumsum(dtype=kind)[-1])
            top = (exponent - kind(1)) * kind(2) ** kind(mu)
            found.append(float((top / (kind(1) - kind(n_vocab) ** (kind(1) - exponent))) ** (kind(1) / exponent)))
    return found[0], found[1]


def compare_kept(version: int, mu: float, row: Row, n_ours: int, n_theirs: int) -> None:
    """Fails unless they are the same number, or rounding decides between them."""
    if n_ours == n_theirs:
        return
    if version == 2:
        fewer, more = sorted((n_ours, n_theirs))
        surprises = -np.log2(softmax(row.falling)[fewer:more])
        assert (np.abs(surprises - mu) <= 10 * sums_rounding(row.falling)).all()
    else:
        exact, rounded = zipf(row.falling, N_VOCAB, mu)
        rounding = 2 * abs(exact - rounded) + 1e-5 * exact
        for n in (n_ours, n_theirs):
            assert min(max(int(exact - rounding), 1), len(row.ids)) <= n <= max(exact + rounding, 1)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_leaves_and_learns_what_libllamas_does(version: int) -> None:
    """Given the same draws: what it learned shows in what it leaves next."""

    @given(
        st.lists(rows(kinds=("bell", "ties", "equal", "a peak", "steep")), min_size=1, max_size=8),
        st.floats(0.5, 8, width=32),
        st.floats(0, 1, width=32),
        st.integers(0, 2**32 - 2),
    )
    @settings(max_examples=200)
    def check(given_rows: list[Row], tau: float, eta: float, seed: int) -> None:
        ours, mu, told = Mirostat(version, tau, eta, N_VOCAB), 2 * tau, Told()
        numbers = (N_VOCAB, seed, tau, eta, 100) if version == 1 else (seed, tau, eta)
        with LlamaSampler("mirostat" if version == 1 else "mirostat_v2", *numbers) as theirs:
            for row in given_rows:
                if version == 1 and not defined(row, mu):
                    return
                candidates = row.candidates()
                candidates.random = told  # type: ignore[assignment]
                left = theirs.apply(row.ids, row.logits, in_order=row.in_order)
                kept = candidates.top(ours._n_kept(candidates))
                compare_kept(version, mu, row, len(kept), len(left.ids))
                token, probability = int(left.ids[left.selected]), float(left.probabilities[left.selected])
                if len(kept) != len(left.ids) or token not in kept.ids:
                    return  # rounding decided, or equal logits: they have not the same to draw from
                compare_probabilities(kept, left, CLOSE)
                told.choose(kept, token)
                assert ours.draw(candidates) == token
                mu -= eta * (-math.log2(probability) - tau)
                assert ours.mu == pytest.approx(mu, abs=1e-4)

    def defined(row: Row, mu: float) -> bool:
        # One candidate has no slope, one of no probability an infinite one, and no int holds NaN or a huge float.
        first = rounded_softmax(row.falling)[:100]
        n = zipf(row.falling, N_VOCAB, mu) if len(first) > 1 and (first > 0).all() else (math.nan, math.nan)
        return all(abs(x) < 2**31 for x in n)

    check()


def rarely_exceeded(n_free: int) -> float:
    """What chi-squared of so many degrees of freedom exceeds about once in a thousand times (Wilson, Hilferty)."""
    part = 2 / (9 * n_free)
    return float(n_free * (1 - part + 3.09 * math.sqrt(part)) ** 3)


DRAWS = 4000


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_draws_are_as_frequent_as_libllamas_probabilities(version: int, seed: int) -> None:
    """Version 0 is the plain draw; of mirostat the first draw."""
    random = np.random.default_rng(seed)
    row = Row(np.arange(40, dtype=np.int32), (random.standard_normal(40) * 0.8).astype(np.float32))
    tau = 2.5  # leaves some of the forty, and not all
    theirs_by_version = ("dist", 1), ("mirostat", 40, 1, tau, 0.1, 100), ("mirostat_v2", 1, tau, 0.1)
    with LlamaSampler(*theirs_by_version[version]) as theirs:
        left = theirs.apply(row.ids, row.logits)
    assert version == 0 or 1 < len(left.ids) < 40
    counts = np.zeros(40)
    for _ in range(DRAWS):
        drawing = Mirostat(version, tau, 0.1, 40) if version else Chance()
        candidates = row.candidates()
        candidates.random = random
        counts[drawing.draw(candidates)] += 1
    expected = by_id(left.ids, left.probabilities) * DRAWS
    expected = np.pad(expected, (0, 40 - len(expected)))
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < rarely_exceeded(len(expected) - 1)


@given(rows(most=60), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_rows_that_are_no_distribution_are_refused(row: Row, number: float, data: st.DataObject) -> None:
    logits = row.logits.copy()
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
    sampler = SamplerFactory(Letters(len(logits)), n_ctx=64).make(SamplingOptions(seed=1, **options))  # type: ignore[arg-type]
    with pytest.raises(erllama.SamplingError):
        sampler.sample(logits, NOTHING)


# --- the binding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("top_q",), "no sampler 'top_q'"),
        (("top_k",), "it takes k"),
        (("top_k", -1), "whole number, 0 to"),
        (("top_k", 1.5), "whole number"),
        (("temp", math.nan), "float32"),
        (("temp", 1e39), "float32"),
        (("dist", 2**32 - 1), "seed="),
        (("logit_bias", 10, 10, 1.0), "token 10 is outside"),
        (("logit_bias", 10, 1), "it takes"),
        (("dry", 1, 2, 2, 10), "vocabulary"),
        (("grammar",), "0 texts"),
    ],
)
def test_samplers_that_cannot_be_are_errors(arguments: tuple[str, float], words: str) -> None:
    with pytest.raises(LlamaError, match=words):
        LlamaSampler(*arguments)


@pytest.mark.parametrize(
    ("ids", "logits", "words"),
    [
        ([], [], "one of each or more"),
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
    for token in (A, B):
        left = grammar.apply(everything, np.zeros(len(everything)))
        assert np.flatnonzero(left.logits == 0).tolist() == [token]
        grammar.accept([token])
    left = grammar.apply(everything, np.zeros(len(everything)))
    assert left.ids[left.logits == 0].tolist() == [2], "the end"
    with pytest.raises(LlamaError):
        grammar.accept([C])
    grammar.close()
    grammar.close()
    with pytest.raises(LlamaError, match="closed"):
        LlamaSampler("grammar", texts=['root ::= "ab"', "root"], vocabulary=vocabulary)
