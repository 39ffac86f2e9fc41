"""Draws match those of libllama: the same token for the same random number, at the same frequencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from erllama.engine.sampling.candidates import Candidates
from erllama.engine.sampling.draws import Categorical, Greedy, Mirostat
from erllama.llama_ffi.samplers import LlamaSampler
from support.examples import examples
from support.libllama_samplers import (
    CLOSE,
    N_VOCAB,
    Logits,
    Row,
    by_id,
    compare_probabilities,
    rounded_softmax,
    rows,
    softmax,
    sums_rounding,
)


class ReplayedRandom:
    """Replaces random numbers by those that reproduce another draw."""

    share = 0.5

    def random(self) -> float:
        return self.share

    def choose(self, candidates: Candidates, token: int) -> None:
        shares = candidates.probabilities()
        at = int(np.flatnonzero(candidates.ids == token)[0])
        self.share = float(shares[:at].sum() + shares[at] / 2)


@given(rows())
def test_greedy_sampling_takes_the_token_of_libllama(row: Row) -> None:
    with LlamaSampler("greedy") as greedy:
        left = greedy.apply(row.ids, row.logits, in_order=row.in_order)
    assert Greedy().draw(row.candidates()) == left.ids[left.selected]


@given(rows(kinds=("bell", "ties", "equal", "a peak")), st.integers(0, 1000))
def test_a_draw_selects_the_token_at_its_cumulative_share(row: Row, seed: int) -> None:
    with LlamaSampler("dist", seed) as dist:
        left = dist.apply(row.ids, row.logits, in_order=row.in_order)
    candidates, replayed = row.candidates(), ReplayedRandom()
    assume(left.probabilities[left.selected] > 1e-7)
    replayed.choose(candidates, int(left.ids[left.selected]))
    candidates.random = replayed  # type: ignore[assignment]
    assert Categorical().draw(candidates) == left.ids[left.selected]


def zipf(falling: Logits, n_vocab: int, mu: float) -> tuple[float, float]:
    """Return how many candidates mirostat 1 keeps, before rounding to an integer, in float64 and float32."""
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
    """Fail unless they are the same number, or rounding decides between them."""
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
def test_mirostat_matches_libllama(version: int) -> None:
    """With the same draws. What mirostat learned shows in the candidates that it keeps next."""

    @given(
        st.lists(rows(kinds=("bell", "ties", "equal", "a peak", "steep")), min_size=1, max_size=8),
        st.floats(0.5, 8, width=32),
        st.floats(0, 1, width=32),
        st.integers(0, 2**32 - 2),
    )
    @settings(max_examples=examples(50))
    def check(given_rows: list[Row], tau: float, eta: float, seed: int) -> None:
        ours, mu, replayed = Mirostat(version, tau, eta, N_VOCAB), 2 * tau, ReplayedRandom()
        numbers = (N_VOCAB, seed, tau, eta, 100) if version == 1 else (seed, tau, eta)
        with LlamaSampler("mirostat" if version == 1 else "mirostat_v2", *numbers) as theirs:
            for row in given_rows:
                if version == 1 and not defined(row, mu):
                    return
                candidates = row.candidates()
                candidates.random = replayed  # type: ignore[assignment]
                left = theirs.apply(row.ids, row.logits, in_order=row.in_order)
                kept = candidates.top(ours._n_kept(candidates))
                compare_kept(version, mu, row, len(kept), len(left.ids))
                token, probability = int(left.ids[left.selected]), float(left.probabilities[left.selected])
                if len(kept) != len(left.ids) or token not in kept.ids:
                    return  # rounding or equal logits decided, so both sides draw from different candidates
                compare_probabilities(kept, left, CLOSE)
                replayed.choose(kept, token)
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
    """Return the value that chi-squared exceeds about once in a thousand times (Wilson, Hilferty)."""
    part = 2 / (9 * n_free)
    return float(n_free * (1 - part + 3.09 * math.sqrt(part)) ** 3)


DRAWS = 4000


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_draw_frequencies_match_the_probabilities_of_libllama(version: int, seed: int) -> None:
    """Version 0 is the plain draw. For mirostat, the first draw is compared."""
    random = np.random.default_rng(seed)
    row = Row(np.arange(40, dtype=np.int32), (random.standard_normal(40) * 0.8).astype(np.float32))
    tau = 2.5  # keeps some of the forty, but not all
    theirs_by_version = ("dist", 1), ("mirostat", 40, 1, tau, 0.1, 100), ("mirostat_v2", 1, tau, 0.1)
    with LlamaSampler(*theirs_by_version[version]) as theirs:
        left = theirs.apply(row.ids, row.logits)
    assert version == 0 or 1 < len(left.ids) < 40
    counts = np.zeros(40)
    for _ in range(DRAWS):
        drawing = Mirostat(version, tau, 0.1, 40) if version else Categorical()
        candidates = row.candidates()
        candidates.random = random
        counts[drawing.draw(candidates)] += 1
    expected = by_id(left.ids, left.probabilities) * DRAWS
    expected = np.pad(expected, (0, 40 - len(expected)))
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < rarely_exceeded(len(expected) - 1)
