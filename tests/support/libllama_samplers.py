"""Compares a sampler step of the engine with that of libllama on the same candidates.

Where libllama's choice is decided by the rounding of its float32 sums, the same sums are made here in float32 and
in float64, and the sides may differ as far as these do. Where equal logits are at a cut, logits are compared and
not ids. Results of libllama that divide by zero, or convert a float to an int that cannot hold it, are undefined
and not compared; comments mark these places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from erllama.engine.sampling.candidates import Candidates
from erllama.engine.sampling.declaration import Step
from erllama.engine.sampling.dry import DRY, SequenceBreakers
from erllama.engine.sampling.steps import (
    XTC,
    DynamicTemperature,
    MinP,
    Penalties,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    TypicalP,
)
from erllama.llama_ffi import Vocabulary
from erllama.llama_ffi.samplers import LlamaSampler, SamplerOutput

Logits = NDArray[np.float32]
CLOSE = 1e-5  # of probabilities
LOWEST = float(np.finfo(np.float32).min)
N_VOCAB = 3000
NOTHING = np.empty(0, np.int32)


class Row(NamedTuple):
    """The candidates with which both sides start."""

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
    # libllama sorts more than 128 candidates by buckets, whose numbers must be ints.
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
        logits[random.integers(n)] = 1.5  # but not all
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
    """Return the largest error of cumulative probabilities in float32."""
    exact, rounded = softmax(falling).cumsum(), rounded_softmax(falling).cumsum(dtype=np.float32)
    return 2 * float(np.abs(exact - rounded).max()) + 1e-6


def entropies(logits: Logits) -> tuple[float, float]:
    """Return the entropy in float64, and as a float32 sum."""
    exact, rounded = softmax(logits), rounded_softmax(logits)
    exact, rounded = exact[exact > 0], rounded[rounded > 0]
    return float(-(exact * np.log(exact)).sum()), float(-(rounded * np.log(rounded)).cumsum(dtype=np.float32)[-1])


def libllamas_probabilities(left: Row | SamplerOutput) -> Logits:
    """Return the probabilities that libllama's last sampler computes."""
    with LlamaSampler("dist", 1) as dist:
        return dist.apply(left.ids, left.logits, in_order=left.in_order).probabilities


def by_id(ids: NDArray[np.integer], values: NDArray[np.floating]) -> NDArray[np.float64]:
    dense = np.zeros(int(ids.max()) + 1)
    dense[ids] = values
    return dense


# --- one step of both ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A step of the engine and the step of libllama with the same parameters.

    Attributes:
        undecided: whether float32 rounding may decide between keeping `fewer` and `more` of a row whose descending
            logits are given; None if no candidate is dropped.
        slack: the amount beyond CLOSE by which the probabilities of a row may differ.
        defined: whether the result of libllama for a row is defined.
        history: whether libllama's step receives the context.
    """

    name: str
    ours: Step
    theirs: LlamaSampler
    undecided: Callable[[Logits, int, int], bool] | None = None
    slack: Callable[[Row], float] = lambda row: 0.0
    defined: Callable[[Row], bool] = lambda row: True
    history: bool = False


def compare(pair: Pair, row: Row, ours: Candidates, theirs: SamplerOutput) -> None:
    """Fail if they differ more than allowed."""
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
            # The most likely are kept, or, with xtc, the least likely.
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


def compare_probabilities(ours: Candidates, theirs: SamplerOutput, close: float) -> None:
    found, expected = ours.probabilities(), libllamas_probabilities(theirs)
    if set(ours.ids.tolist()) == set(theirs.ids.tolist()):
        np.testing.assert_allclose(by_id(ours.ids, found), by_id(theirs.ids, expected), rtol=0, atol=close)
    else:  # of equal logits at a cut, each side kept its own
        np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=0, atol=close)


def without_ruled_out(left: SamplerOutput) -> SamplerOutput:
    """Drop candidates whose logit libllama sets to minus infinity, as the engine does."""
    which = left.logits > -np.inf
    return left._replace(ids=left.ids[which], logits=left.logits[which])


def both(
    pair: Pair, row: Row, context: NDArray[np.int32] = NOTHING, candidates: Candidates | None = None
) -> tuple[Candidates, SamplerOutput]:
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
        # It may keep all because of min_keep, so more than one candidate may depend on an undecided one.
        near = np.abs(softmax(falling) - threshold) <= 1e-5 * threshold + 1e-7
        return bool(near.any())

    # With a threshold of 0, libllama keeps the last candidate, even an excluded one.
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

    # Squares beyond float32 give libllama no information.
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
        # As for `temperature`. At 0, both keep the most likely.
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
    """Return the effect of the largest logit's last bit on a probability; one side may use fused multiply-add."""
    return float(np.spacing(np.abs(row.logits[np.isfinite(row.logits)]).max()))


def typical(p: float, min_keep: int) -> Pair:
    def defined(row: Row) -> bool:
        return bool((rounded_softmax(row.logits) > 0).all())  # otherwise the entropy of libllama is NaN

    return Pair("typical", TypicalP(p, min_keep), LlamaSampler("typical", p, min_keep), defined=defined)


def compare_typical(pair: Pair, row: Row, ours: Candidates, theirs: SamplerOutput) -> None:
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
    # Both keep candidates nearer than the cut. Rounding decides about the others.
    surely = set(row.ids[scores[row.ids] < cut - rounding].tolist())
    assert surely <= set(ours.ids.tolist())
    assert surely <= set(theirs.ids.tolist())
    beyond = farther[scores[farther] > cut + rounding]
    if len(beyond):
        sums = float(shares[nearer].sum()), float(shares[farther].sum() - shares[beyond].min())
        assert abs(sums[0] - p) <= sums_rounding(row.falling)
        assert sums[1] <= p + sums_rounding(row.falling) + shares[beyond].max()


# --- breakers of repetitions --------------------------------------------------------------------------------

# The key keeps the vocabulary alive, so that no other object gets its id.
_BREAKERS: dict[tuple[Vocabulary, tuple[str, ...]], SequenceBreakers] = {}


def dry(
    vocabulary: Vocabulary, texts: Sequence[str], multiplier: float, base: float, allowed: int, last_n: int
) -> Pair:
    key = (vocabulary, tuple(texts))
    if key not in _BREAKERS:
        _BREAKERS[key] = SequenceBreakers(vocabulary, texts)
    return Pair(
        "dry",
        DRY(multiplier, base, allowed, last_n, _BREAKERS[key]),
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
