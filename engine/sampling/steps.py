"""The steps of a sampler chain, and their default order.

A step takes candidates and returns those that remain, or changes their logits. Each follows llama.cpp's sampler of
the same name: it keeps the same candidates with the same probabilities. `min_keep` is the fewest candidates that a
step leaves, as far as it received them. To add a step, write its class here and add it to `CHAIN`. A step may have
other forms, for the rows of many requests, and for a few candidates: see `OrderedRowsStep`, `WholeRowsStep` and
`ListStep`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import neg

import numpy as np
from numpy.typing import NDArray

from erllama.engine.sampling.candidates import (
    LARGE,
    Candidates,
    list_weights,
    order,
    round_to_float32,
    row_weights,
    running_sums,
)
from erllama.engine.sampling.declaration import (
    ChainStep,
    ListStep,
    Option,
    OrderedRowsStep,
    Step,
    StepContext,
    WholeRowsStep,
)
from erllama.engine.sampling.dry import DRY
from erllama.errors import SamplingError

MIN_KEEP = Option(0, 0, shared=True)
_FIRST_ORDERED = 256  # candidates that top_p sorts first; it sorts the rest only if they are too few


class LogitBias(WholeRowsStep):
    """Adds to the logits of some tokens; -inf excludes a token. `logit_bias` of OpenAI's API."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens = np.array(sorted(biases), np.int32)
        self._biases = np.array([biases[token] for token in sorted(biases)], np.float32)

    def __call__(self, candidates: Candidates) -> Candidates:
        positions, which = candidates.at(self._tokens)
        logits = candidates.logits.copy()
        logits[positions] += self._biases[which]
        biased = candidates.with_logits(logits)
        if not math.isfinite(biased.best()):
            raise SamplingError("logit_bias and banned_tokens exclude every token that is possible here")
        return biased

    @classmethod
    def change_rows(
        cls, steps: Sequence[LogitBias], logits: NDArray[np.float32], contexts: Sequence[NDArray[np.int32]]
    ) -> None:
        for step, row in zip(steps, logits, strict=True):
            row[step._tokens] += step._biases


class Penalties(ChainStep, WholeRowsStep):
    """Makes the tokens among the last `last_n` less likely.

    It divides their logits by `repeat` (and multiplies logits below 0), subtracts `frequency` for each occurrence,
    and subtracts `presence` once.

    `repeat` is from Keskar et al., "CTRL: A Conditional Transformer Language Model", 2019, with llama.cpp's
    treatment of logits below 0; `frequency` and `presence` are from OpenAI's API.
    """

    name = "penalties"
    reads_context = True
    summary = "makes tokens among the last `repeat_last_n` of prompt and reply less likely"
    repeat_penalty = Option(1.0, 1e-3, 1e3)
    repeat_last_n = Option(64, -1)
    frequency_penalty = Option(0.0, -100.0, 100.0)
    presence_penalty = Option(0.0, -100.0, 100.0)

    def __init__(self, last_n: int, repeat: float, frequency: float, presence: float) -> None:
        self._last_n = last_n
        self._repeat, self._frequency, self._presence = map(np.float32, (repeat, frequency, presence))

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        last_n = context.last_n(cls.repeat_last_n.of(options))
        repeat = cls.repeat_penalty.of(options)
        frequency, presence = cls.frequency_penalty.of(options), cls.presence_penalty.of(options)
        if not last_n or (repeat == 1 and not frequency and not presence):
            return None
        return cls(last_n, repeat, frequency, presence)

    def __call__(self, candidates: Candidates) -> Candidates:
        recent = candidates.context[-self._last_n :]
        logits = candidates.logits.copy()
        positions: NDArray[np.integer] = recent
        occurrences: np.float32 | NDArray[np.float32] = np.float32(1)
        # Without `frequency`, each occurrence of a token writes the same number, so they need not be counted.
        if self._frequency or not candidates.is_vocabulary:
            tokens, counts = np.unique(recent, return_counts=True)
            positions, which = candidates.at(tokens)
            occurrences = counts[which].astype(np.float32)
        with np.errstate(over="ignore"):  # the lowest logits become minus infinity
            penalized = _penalize(logits[positions], self._repeat)
            logits[positions] = penalized - (occurrences * self._frequency + self._presence)
        return candidates.with_logits(logits)

    @classmethod
    def change_rows(
        cls, steps: Sequence[Penalties], logits: NDArray[np.float32], contexts: Sequence[NDArray[np.int32]]
    ) -> None:
        recent = [context[-step._last_n :] for step, context in zip(steps, contexts, strict=True)]
        rows = np.repeat(np.arange(len(steps)), list(map(len, recent)))
        tokens: NDArray[np.integer] = np.concatenate(recent)
        repeat = np.array([step._repeat for step in steps])
        frequency = np.array([step._frequency for step in steps])
        presence = np.array([step._presence for step in steps])
        if frequency.any():
            # One number for each token of a row, so that one call counts the tokens of all rows.
            n_vocab = logits.shape[1]
            places, counts = np.unique(rows * n_vocab + tokens, return_counts=True)
            rows, tokens = np.divmod(places, n_vocab)
            subtracted = counts.astype(np.float32) * frequency[rows] + presence[rows]
        else:
            subtracted = presence[rows]
        logits[rows, tokens] = _penalize(logits[rows, tokens], repeat[rows]) - subtracted


def _penalize(logits: NDArray[np.float32], repeat: np.float32 | NDArray[np.float32]) -> NDArray[np.float32]:
    """Return logits of tokens that occurred, with the penalty `repeat`."""
    return np.where(logits <= 0, logits * repeat, logits / repeat)


class TopNSigma(ChainStep):
    """Keeps logits within `n` standard deviations of the largest.

    llama.cpp keeps the other tokens with logits of -inf, and later steps still count them: dynamic temperature in
    the maximum of the entropy, `min_keep` in the number of candidates. This step removes them.

    Tang et al., "Top-nσ: Not All Logits Are You Need", 2024.
    """

    name = "top_n_sigma"
    summary = "keeps logits within this many standard deviations of the largest"
    drops_candidates = True
    keeps_best = True
    top_n_sigma = Option(0.0, 0.0)

    def __init__(self, n: float) -> None:
        self._n = n

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        n = cls.top_n_sigma.of(options)
        return cls(n) if n > 0 else None

    def __call__(self, candidates: Candidates) -> Candidates:
        logits, best = candidates.logits, candidates.best()
        if len(candidates) == 1 or not math.isfinite(best):  # penalties may have excluded every token
            return candidates
        finite = logits[np.isfinite(logits)]
        with np.errstate(over="ignore"):  # with a huge `n`, the bound is minus infinity
            bound = np.float32(best - self._n * float(finite.std(dtype=np.float64)))
        return candidates.keep(np.flatnonzero(logits >= bound))


class TopK(ChainStep, OrderedRowsStep):
    """Keeps the `k` most likely. Fan et al., "Hierarchical Neural Story Generation", 2018."""

    name = "top_k"
    summary = "keeps this many of the most likely"
    drops_candidates = True
    keeps_best = True
    top_k = Option(40, 0, neutral=0)

    def __init__(self, k: int) -> None:
        self.k = k

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        k = cls.top_k.of(options)
        return cls(k) if k else None

    def __call__(self, candidates: Candidates) -> Candidates:
        return candidates.top(self.k)

    @classmethod
    def change_ordered_rows(cls, steps: Sequence[TopK], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        ks = [step.k for step in steps]
        if min(ks) >= logits.shape[1]:
            return logits
        kept = np.arange(logits.shape[1]) < np.array(ks)[:, np.newaxis]
        return np.where(kept, logits, np.float32(-np.inf))


class TypicalP(ChainStep):
    """Keeps the tokens whose surprise is nearest to the expected surprise, until their probabilities exceed `p`.

    Meister et al., "Locally Typical Sampling", 2022.
    """

    name = "typical_p"
    summary = "keeps the tokens whose surprise is nearest to the expected surprise, up to this probability"
    drops_candidates = True
    typical_p = Option(1.0, 0.0, 1.0)
    min_keep = MIN_KEEP

    def __init__(self, p: float, min_keep: int) -> None:
        self._p, self._min_keep = p, min_keep

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        p = cls.typical_p.of(options)
        return cls(p, cls.min_keep.of(options)) if p < 1 else None

    def __call__(self, candidates: Candidates) -> Candidates:
        probabilities = candidates.probabilities()
        possible = probabilities > 0
        surprise = np.full(len(candidates), np.inf)
        np.log(probabilities, out=surprise, where=possible)
        np.negative(surprise, out=surprise, where=possible)
        scores = np.abs(surprise - float((probabilities[possible] * surprise[possible]).sum()))
        nearest = order(-scores.astype(np.float32))
        n = int(probabilities[nearest].cumsum().searchsorted(self._p, side="right")) + 1
        kept = candidates.keep(nearest[: max(n, self._min_keep)])
        kept.in_order = False
        return kept


class TopP(ChainStep, OrderedRowsStep, ListStep):
    """Keeps the fewest most likely tokens whose probabilities sum to `p`.

    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019.
    """

    name = "top_p"
    summary = "keeps the fewest most likely tokens whose probabilities sum to this"
    drops_candidates = True
    keeps_best = True
    top_p = Option(0.95, 0.0, 1.0, neutral=1.0)
    min_keep = MIN_KEEP

    def __init__(self, p: float, min_keep: int) -> None:
        self._p, self._min_keep = p, min_keep

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        p = cls.top_p.of(options)
        return cls(p, cls.min_keep.of(options)) if p < 1 else None

    def __call__(self, candidates: Candidates) -> Candidates:
        if candidates.in_order:
            sums = running_sums(candidates.weights())
            return candidates.keep(slice(0, self._n_kept(sums, self._p * float(sums[-1]))))
        weights = candidates.weights()
        target = self._p * float(weights.sum(dtype=np.float64))
        first = candidates.top(_FIRST_ORDERED)
        n = self._n_kept(running_sums(first.weights()), target)
        if n <= len(first) or len(first) == len(candidates):
            return first.keep(slice(0, n))
        # Many remain. The smallest of their logits selects them, without sorting candidates.
        falling = np.sort(candidates.logits)[::-1]
        with np.errstate(over="ignore"):  # as in `Candidates.weights`
            sums = running_sums(np.exp(falling - falling[0]))
        n = min(self._n_kept(sums, target), len(falling))
        above = np.flatnonzero(candidates.logits > falling[n - 1])
        equal = np.flatnonzero(candidates.logits == falling[n - 1])
        return candidates.keep(np.sort(np.concatenate([above, equal[: n - len(above)]])))

    def _n_kept(self, sums: Sequence[float] | NDArray[np.float64], target: float) -> int:
        """Return how many ordered candidates to keep; more than exist if their weights do not reach the target."""
        return max(bisect_left(sums, target) + 1, self._min_keep)

    def change_list(self, logits: list[float]) -> list[float]:
        sums = list(accumulate(list_weights(logits)))
        return logits[: self._n_kept(sums, self._p * sums[-1])]

    @classmethod
    def change_ordered_rows(cls, steps: Sequence[TopP], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        sums = running_sums(row_weights(logits))
        targets = _numbers([step._p for step in steps]) * sums[:, -1]
        kept = np.ones(logits.shape, np.bool_)
        np.less(sums[:, :-1], targets[:, np.newaxis], out=kept[:, 1:])
        return _kept_in_rows(logits, kept, [step._min_keep for step in steps])


class MinP(ChainStep, OrderedRowsStep, ListStep):
    """Keeps the tokens at least `p` times as likely as the most likely one.

    Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024.
    """

    name = "min_p"
    summary = "keeps tokens at least this many times as likely as the most likely one"
    drops_candidates = True
    keeps_best = True
    min_p = Option(0.05, 0.0, 1.0, neutral=0.0)
    min_keep = MIN_KEEP

    def __init__(self, p: float, min_keep: int) -> None:
        self._log_p, self._min_keep = round_to_float32(math.log(p)), min_keep

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        p = cls.min_p.of(options)
        return cls(p, cls.min_keep.of(options)) if p > 0 else None

    def __call__(self, candidates: Candidates) -> Candidates:
        bound = np.float32(candidates.best()) + np.float32(self._log_p)
        if candidates.in_order:
            n = bisect_right(candidates.logits, -float(bound), key=neg)
            return candidates.keep(slice(0, max(n, self._min_keep)))
        kept = np.flatnonzero(candidates.logits >= bound)
        if len(kept) >= self._min_keep:
            return candidates.keep(kept)
        return candidates.top(self._min_keep)

    def change_list(self, logits: list[float]) -> list[float]:
        bound = round_to_float32(logits[0] + self._log_p)
        return logits[: max(bisect_right(logits, -bound, key=neg), self._min_keep)]

    @classmethod
    def change_ordered_rows(cls, steps: Sequence[MinP], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        bounds = logits[:, 0] + _numbers([step._log_p for step in steps]).astype(np.float32)
        return _kept_in_rows(logits, logits >= bounds[:, np.newaxis], [step._min_keep for step in steps])


class XTC(ChainStep):
    """With probability `probability`, drops the tokens that reach `threshold`, except the least likely of them.

    "Exclude Top Choices", by its author: github.com/oobabooga/text-generation-webui/pull/6335.
    """

    name = "xtc"
    summary = "with this probability, drops the tokens that reach the threshold, except the least likely of them"
    drops_candidates = True
    xtc_probability = Option(0.0, 0.0, 1.0)
    xtc_threshold = Option(0.1, 0.0, 0.5)
    min_keep = MIN_KEEP

    def __init__(self, probability: float, threshold: float, min_keep: int) -> None:
        self._probability, self._threshold, self._min_keep = probability, threshold, min_keep

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        probability = cls.xtc_probability.of(options)
        if probability <= 0:
            return None
        return cls(probability, cls.xtc_threshold.of(options), cls.min_keep.of(options))

    def __call__(self, candidates: Candidates) -> Candidates:
        if len(candidates) < 2 or candidates.random.random() > self._probability:
            return candidates
        candidates = candidates.ordered()
        likely = candidates.probabilities() >= self._threshold
        # With a threshold of 0, excluded tokens still do not count.
        n = int((likely & (candidates.logits > -np.inf)).sum())
        if n > 1 and len(candidates) - (n - 1) >= self._min_keep:
            return candidates.keep(slice(n - 1, None))
        return candidates


class Temperature(ChainStep, OrderedRowsStep, ListStep):
    """Divides logits by `temperature`, above 0: higher is more random."""

    name = "temperature"
    summary = "divides logits; higher is more random, and 0 takes the most likely token that remains"
    keeps_best = True
    temperature = Option(0.8, 0.0, neutral=1.0)
    dynatemp_range = Option(0.0, 0.0)
    dynatemp_exponent = Option(1.0, 0.0)

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        temperature, spread = cls.temperature.of(options), cls.dynatemp_range.of(options)
        if spread > 0:
            return DynamicTemperature(temperature, spread, cls.dynatemp_exponent.of(options))
        return cls(temperature) if temperature != 1 else None

    def __call__(self, candidates: Candidates) -> Candidates:
        return _scale_logits(candidates, self._temperature)

    def change_list(self, logits: list[float]) -> list[float]:
        temperature = self._temperature
        if max(abs(logits[0]), abs(logits[-1])) / temperature > LARGE:
            return []
        scaled: list[float] = np.array([logit / temperature for logit in logits], np.float32).tolist()
        return scaled

    @classmethod
    def change_ordered_rows(cls, steps: Sequence[Temperature], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        temperatures = _numbers([step._temperature for step in steps])
        scaled, best = logits.astype(np.float64), logits[:, 0].astype(np.float64)
        large = np.abs(best) / temperatures > LARGE
        if large.any():
            scaled -= np.where(large, best, 0.0)[:, np.newaxis]
        scaled /= temperatures[:, np.newaxis]
        return scaled.astype(np.float32)


class DynamicTemperature:
    """Chooses a temperature between `temperature - spread` and `temperature + spread` by the model's uncertainty.

    The uncertainty is the entropy divided by its maximum, to the power of `exponent`.

    Zhang et al., "EDT: Improving LLMs' Generation by Entropy-based Dynamic Temperature Sampling", 2024.
    """

    def __init__(self, temperature: float, spread: float, exponent: float) -> None:
        self._least, self._most = max(0.0, temperature - spread), temperature + spread
        self._exponent = exponent

    def __call__(self, candidates: Candidates) -> Candidates:
        if len(candidates) < 2:
            return candidates
        # The entropy is the logarithm of the sum of the weights minus the mean of their logarithms.
        weights = candidates.weights()
        total = float(weights.sum(dtype=np.float64))
        logs = np.where(weights > 0, candidates.logits - np.float32(candidates.best()), np.float32(0))
        entropy = math.log(total) - float(np.dot(weights, logs)) / total
        uncertainty = max(entropy / math.log(len(candidates)), 0.0)
        temperature = self._least + (self._most - self._least) * uncertainty**self._exponent
        return _scale_logits(candidates, temperature) if temperature > 0 else candidates.top(1)


def _numbers(values: Sequence[float]) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def _kept_in_rows(
    logits: NDArray[np.float32], kept: NDArray[np.bool_], min_keep: Sequence[int]
) -> NDArray[np.float32]:
    """Return the logits with -inf where not kept; each row keeps its first `min_keep` in any case."""
    if any(min_keep):
        kept |= np.arange(logits.shape[1]) < np.array(min_keep)[:, np.newaxis]
    return np.where(kept, logits, np.float32(-np.inf))


def _scale_logits(candidates: Candidates, temperature: float) -> Candidates:
    """Return the candidates with their logits divided by a temperature.

    Penalties may follow and depend on the signs of logits. So logits are shifted, by the largest one, only where
    that one could overflow. The shift leaves the distribution as it is.
    """
    logits, best = candidates.logits, candidates.best()
    if candidates.in_order and max(abs(best), abs(float(logits[-1]))) / temperature <= LARGE:
        scaled = np.empty(len(logits), np.float32)
        np.divide(logits, temperature, out=scaled, dtype=np.float64, casting="same_kind")
    else:
        precise = logits.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # with a tiny temperature, minus infinity: no weight
            if abs(best) / temperature > LARGE:
                precise -= best
            precise /= temperature
            scaled = precise.astype(np.float32)
    return candidates.with_logits(scaled, in_order=candidates.in_order)


# The default order, which is llama.cpp's.
CHAIN: tuple[type[ChainStep], ...] = (Penalties, DRY, TopNSigma, TopK, TypicalP, TopP, MinP, XTC, Temperature)
