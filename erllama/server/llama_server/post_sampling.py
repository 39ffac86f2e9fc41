"""`post_sampling_probs`: the probabilities of tokens after the steps of the sampler chain.

The engine reports probabilities before the chain. Here the chain runs again, on the most likely tokens that the engine
reports. That is exact as long as the chain keeps no other token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from erllama._model.model import Model
from erllama.engine import SamplingOptions, TokenLogprobs
from erllama.engine.sampling.candidates import Candidates
from erllama.engine.sampling.sampler import SamplerFactory
from erllama.server.conduct.errors import ApiError


class TokenProbability(NamedTuple):
    """A token that was drawn, with its probability, and the tokens that could have been drawn, most likely first."""

    token: int
    probability: float
    top: list[tuple[int, float]]


def check_post_sampling(options: Mapping[str, object]) -> None:
    """Raise ApiError if the probabilities after the chain cannot be computed for these options."""
    checked = _sampling_options(options)
    top_k, mirostat, xtc = (getattr(checked, name) for name in ("top_k", "mirostat", "xtc_probability"))
    n_most = 100
    if not checked.greedy and ("top_k" not in checked.samplers or not 0 < top_k <= n_most):
        raise ApiError(
            "unsupported", f"post_sampling_probs needs top_k of 1 to {n_most}, and it is {top_k}", param="top_k"
        )
    if mirostat or xtc:
        raise ApiError("unsupported", "post_sampling_probs with mirostat or XTC; leave out one of them")


def post_sampling_probabilities(
    model: Model, options: Mapping[str, object], logprobs: Sequence[TokenLogprobs], context: Sequence[int]
) -> list[TokenProbability]:
    """Return the probabilities of tokens after the chain.

    Args:
        options: of `Model.complete`.
        logprobs: of the tokens, with the most likely ones.
        context: the tokens before the first of them.
    """
    checked = _sampling_options(options)
    sampler = SamplerFactory(model._vocabulary, model.n_ctx).make(checked)
    tokens = list(context)
    found = []
    for each in logprobs:
        pairs = dict(each.top) | {each.token: each.logprob}
        ranked = sorted((item for item in pairs.items() if item[1] > -math.inf), key=lambda item: -item[1])
        ids, logits = np.array([id for id, _ in ranked]), np.array([value for _, value in ranked], np.float32)
        candidates = Candidates(ids, logits, np.array(tokens, np.int32), np.random.default_rng(0), in_order=True)
        for step in sampler.steps:
            candidates = step(candidates)
        found.append(_probability(each.token, candidates, greedy=checked.greedy))
        tokens.append(each.token)
    return found


def _sampling_options(options: Mapping[str, object]) -> SamplingOptions:
    known = SamplingOptions.__dataclass_fields__
    return SamplingOptions(**{name: value for name, value in options.items() if name in known})  # type: ignore[arg-type]


def _probability(token: int, candidates: Candidates, *, greedy: bool) -> TokenProbability:
    if greedy:
        return TokenProbability(token, 1.0, [(token, 1.0)])
    weights = np.exp(candidates.logits.astype(np.float64) - candidates.logits.max())
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    top = [(int(candidates.ids[at]), float(weights[at])) for at in order if weights[at] > 0]
    return TokenProbability(token, dict(top).get(token, 0.0), top)
