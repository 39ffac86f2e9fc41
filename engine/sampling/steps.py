"""The steps of a sampling chain: each takes candidates and gives those that are left, or with other logits.

They follow llama.cpp's samplers of the same names: the same candidates stay, with
the same probabilities. `min_keep` is the fewest that a step leaves, if it had them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from erllama.engine.sampling.candidates import Candidates, order
from erllama.errors import SamplingError

Step = Callable[[Candidates], Candidates]

_GROUP = 512  # of candidates, whose weights are summed before one is drawn
_A_FEW = 256  # how many are put in order at first, where they may do
_LARGE = 1e30  # less this, no float32 overflows


class LogitBias:
    """Adds to the logits of some tokens; -inf rules one out. `logit_bias` of OpenAI's API."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._tokens = np.array(sorted(biases), np.int32)
        self._biases = np.array([biases[token] for token in sorted(biases)], np.float32)

    def __call__(self, candidates: Candidates) -> Candidates:
        positions, which = candidates.at(self._tokens)
        logits = candidates.logits.copy()
        logits[positions] += self._biases[which]
        left = candidates.with_logits(logits)
        if not math.isfinite(left.best()):
            raise SamplingError("logit_bias and banned_tokens rule out every token that is possible here")
        return left


class Penalties:
    """Makes tokens of the last `last_n` less likely: logits divided by `repeat` (those below 0 multiplied), less
    `frequency` for each time one came, less `presence` if it came at all.

    Keskar et al., "CTRL: A Conditional Transformer Language Model", 2019, for `repeat`, with llama.cpp's way for
    logits below 0; OpenAI's API for the others.
    """

    def __init__(self, last_n: int, repeat: float, frequency: float, presence: float) -> None:
        self._last_n = last_n
        self._repeat, self._frequency, self._presence = map(np.float32, (repeat, frequency, presence))

    def __call__(self, candidates: Candidates) -> Candidates:
        tokens, counts = np.unique(candidates.context[-self._last_n :], return_counts=True)
        positions, which = candidates.at(tokens)
        logits = candidates.logits.copy()
        found = logits[positions]
        often = counts[which].astype(np.float32)
        with np.errstate(over="ignore"):  # of the lowest logits: minus infinity
            found = np.where(found <= 0, found * self._repeat, found / self._repeat)
            logits[positions] = found - (often * self._frequency + self._presence)
        return candidates.with_logits(logits)


class TopNSigma:
    """Keeps logits within `n` standard deviations of the largest.

    llama.cpp's leaves the others with logits of -inf, where later steps still count them: dynamic temperature in
    the most that the entropy could be, `min_keep` in what is left. Here they are gone.

    Tang et al., "Top-nσ: Not All Logits Are You Need", 2024.
    """

    def __init__(self, n: float) -> None:
        self._n = n

    def __call__(self, candidates: Candidates) -> Candidates:
        if len(candidates) == 1:
            return candidates
        logits = candidates.logits
        finite = logits[np.isfinite(logits)]
        with np.errstate(over="ignore"):  # of a huge `n`: minus infinity
            bound = np.float32(candidates.best() - self._n * float(finite.std(dtype=np.float64)))
        return candidates.keep(np.flatnonzero(logits >= bound))


class TopK:
    """Keeps the `k` most likely. Fan et al., "Hierarchical Neural Story Generation", 2018."""

    def __init__(self, k: int) -> None:
        self._k = k

    def __call__(self, candidates: Candidates) -> Candidates:
        return candidates.top(self._k)


class TypicalP:
    """Keeps those whose surprise is nearest to the expected one, until their probabilities exceed `p`.

    Meister et al., "Locally Typical Sampling", 2022.
    """

    def __init__(self, p: float, min_keep: int) -> None:
        self._p, self._min_keep = p, min_keep

    def __call__(self, candidates: Candidates) -> Candidates:
        probabilities = candidates.probabilities()
        possible = probabilities > 0
        surprise = np.full(len(candidates), np.inf)
        np.log(probabilities, out=surprise, where=possible)
        np.negative(surprise, out=surprise, where=possible)
        scores = np.abs(surprise - float((probabilities[possible] * surprise[possible]).sum()))
        nearest = order(-scores.astype(np.float32))
        n = int(probabilities[nearest].cumsum().searchsorted(self._p, side="right")) + 1
        left = candidates.keep(nearest[: max(n, self._min_keep)])
        left.in_order = False
        return left


class TopP:
    """Keeps the fewest most likely whose probabilities sum to `p`.

    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019.
    """

    def __init__(self, p: float, min_keep: int) -> None:
        self._p, self._min_keep = p, min_keep

    def __call__(self, candidates: Candidates) -> Candidates:
        weights = candidates.weights()
        target = self._p * float(weights.sum(dtype=np.float64))
        first = candidates if candidates.in_order else candidates.top(_A_FEW)
        n = self._n_kept(weights if first is candidates else first.weights(), target)
        if n <= len(first) or len(first) == len(candidates):
            return first.keep(slice(0, n))
        # Many stay: they are found by the least of their logits, and not put in order.
        falling = np.sort(candidates.logits)[::-1]
        n = min(self._n_kept(np.exp(falling - falling[0]), target), len(falling))
        above = np.flatnonzero(candidates.logits > falling[n - 1])
        equal = np.flatnonzero(candidates.logits == falling[n - 1])
        return candidates.keep(np.sort(np.concatenate([above, equal[: n - len(above)]])))

    def _n_kept(self, weights: NDArray[np.float32], target: float) -> int:
        """How many of those in order to keep; more than there are, where they are not enough."""
        return max(int(weights.cumsum(dtype=np.float64).searchsorted(target)) + 1, self._min_keep)


class MinP:
    """Keeps those at least `p` times as likely as the most likely.

    Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024.
    """

    def __init__(self, p: float, min_keep: int) -> None:
        self._log_p, self._min_keep = math.log(p), min_keep

    def __call__(self, candidates: Candidates) -> Candidates:
        bound = np.float32(candidates.best()) + np.float32(self._log_p)
        if candidates.in_order:
            n = int((-candidates.logits).searchsorted(-bound, side="right"))
            return candidates.keep(slice(0, max(n, self._min_keep)))
        found = np.flatnonzero(candidates.logits >= bound)
        if len(found) >= self._min_keep:
            return candidates.keep(found)
        return candidates.top(self._min_keep)


class XTC:
    """With a chance of `probability`, drops all but the least likely of those at least as likely as `threshold`.

    "Exclude Top Choices", by its author: github.com/oobabooga/text-generation-webui/pull/6335.
    """

    def __init__(self, probability: float, threshold: float, min_keep: int) -> None:
        self._probability, self._threshold, self._min_keep = probability, threshold, min_keep

    def __call__(self, candidates: Candidates) -> Candidates:
        if len(candidates) < 2 or candidates.random.random() > self._probability:
            return candidates
        candidates = candidates.ordered()
        likely = candidates.probabilities() >= self._threshold
        # A threshold of 0 does not let in what is ruled out.
        n = int((likely & (candidates.logits > -np.inf)).sum())
        if n > 1 and len(candidates) - (n - 1) >= self._min_keep:
            return candidates.keep(slice(n - 1, None))
        return candidates


class Temperature:
    """Divides logits by `temperature`, above 0: higher is more random."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, candidates: Candidates) -> Candidates:
        return _at(candidates, self._temperature)


class DynamicTemperature:
    """A temperature from `temperature - spread` to `temperature + spread`, by how uncertain the model is.

    Uncertainty is the entropy over its maximum, to the power of `exponent`.

    Zhang et al., "EDT: Improving LLMs' Generation by Entropy-based Dynamic Temperature Sampling", 2024.
    """

    def __init__(self, temperature: float, spread: float, exponent: float) -> None:
        self._least, self._most = max(0.0, temperature - spread), temperature + spread
        self._exponent = exponent

    def __call__(self, candidates: Candidates) -> Candidates:
        if len(candidates) < 2:
            return candidates
        # The entropy, by the logarithm of the weights' sum and the mean of their own.
        weights = candidates.weights()
        total = float(weights.sum(dtype=np.float64))
        logs = np.where(weights > 0, candidates.logits - np.float32(candidates.best()), np.float32(0))
        entropy = math.log(total) - float(np.dot(weights, logs)) / total
        uncertainty = max(entropy / math.log(len(candidates)), 0.0)
        temperature = self._least + (self._most - self._least) * uncertainty**self._exponent
        return _at(candidates, temperature) if temperature > 0 else candidates.top(1)


def _at(candidates: Candidates, temperature: float) -> Candidates:
    """Logits over a temperature. Penalties may come later and look at their signs, so they are shifted only where
    the largest could overflow: by that one, which leaves the distribution as it is.
    """
    logits, best = candidates.logits.astype(np.float64), candidates.best()
    if abs(best) / temperature > _LARGE:
        logits -= best
    with np.errstate(over="ignore"):  # of a tiny temperature: minus infinity, so no weight
        logits /= temperature
        found = logits.astype(np.float32)
    return candidates.with_logits(found, in_order=candidates.in_order)


# --- who draws --------------------------------------------------------------------------------------------


class Greedy:
    """Takes the most likely; of equals, the first."""

    def draw(self, candidates: Candidates) -> int:
        return int(candidates.ids[0 if candidates.in_order else candidates.logits.argmax()])


class Chance:
    """Draws by the softmax of what is left."""

    def draw(self, candidates: Candidates) -> int:
        return int(candidates.ids[_drawn(candidates)])


class Mirostat:
    """Keeps the surprise of what is drawn near `tau`: each token teaches it, at rate `eta`, how much to cut off.

    Basu et al., "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity", 2021: algorithm 1,
    where `version` is 1, over a vocabulary of `n_vocab`, and the simpler one of its authors' code where it is 2.

    Attributes:
        mu: the most surprise that is let through now, in bits.
    """

    _M = 100  # from how many of the most likely the shape of the distribution is guessed

    def __init__(self, version: int, tau: float, eta: float, n_vocab: int) -> None:
        self._version, self._tau, self._eta, self._n_vocab = version, tau, eta, n_vocab
        self.mu = 2 * tau

    def draw(self, candidates: Candidates) -> int:
        candidates = candidates.top(self._n_kept(candidates))
        at = _drawn(candidates)
        surprise = -math.log2(float(candidates.probabilities()[at]))
        self.mu -= self._eta * (surprise - self._tau)
        return int(candidates.ids[at])

    def _n_kept(self, candidates: Candidates) -> int:
        if self._version == 2:
            bound = 2.0**-self.mu
            return max(int((candidates.probabilities() >= bound).sum()), 1)
        # Probabilities are taken to fall by Zipf's law, with the exponent guessed from the first.
        first = candidates.top(self._M).weights().astype(np.float64)
        first = first[first > 0]
        ranks = np.arange(1, len(first))
        if not len(ranks):
            return 1
        steps = np.log((ranks + 1) / ranks)
        exponent = float((steps * np.log(first[:-1] / first[1:])).sum() / (steps**2).sum())
        epsilon = exponent - 1
        with np.errstate(all="ignore"):
            scale = 1 - np.float64(self._n_vocab) ** -epsilon
            k = np.float64(epsilon * 2**self.mu / scale) ** (1 / np.float64(exponent))
        return max(int(min(k, len(candidates))), 1) if math.isfinite(k) else len(candidates)


def _drawn(candidates: Candidates) -> int:
    """A position, by the softmax: one number of the request's generator."""
    weights = candidates.weights()
    start = 0
    share = candidates.random.random()
    if len(weights) <= _GROUP:
        target = share * float(weights.sum(dtype=np.float64))
    else:
        # First the group, then the one in it: running sums of all take far longer than sums of groups.
        whole = len(weights) // _GROUP * _GROUP
        groups = weights[:whole].reshape(-1, _GROUP).sum(axis=1, dtype=np.float64)
        sums = np.append(groups, weights[whole:].sum(dtype=np.float64)).cumsum()
        target = share * float(sums[-1])
        group = int(sums.searchsorted(target, side="right"))
        start = group * _GROUP
        target -= float(sums[group - 1]) if group else 0.0
        weights = weights[start : start + _GROUP]
    at = int(weights.cumsum(dtype=np.float64).searchsorted(target, side="right"))
    # Rounding may lead beyond the last that has any weight.
    return start + min(at, int(np.flatnonzero(weights)[-1]))
