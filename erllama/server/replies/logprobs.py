"""Log-probabilities of tokens in the form that most APIs share."""

from __future__ import annotations

from erllama._model.model import Model
from erllama.engine import TokenLogprobs
from erllama.server.conduct.bodies import Json

LEAST = -9999.0  # OpenAI's number for a token that cannot occur; JSON has no infinity


def token_logprob(model: Model, token: int, logprob: float) -> Json:
    """Return a token with its text, its bytes and its log-probability."""
    raw = model.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw), "logprob": max(logprob, LEAST)}


def token_logprobs(model: Model, logprobs: TokenLogprobs) -> Json:
    """Return a token of a reply, and the most likely tokens at its place."""
    tops = [token_logprob(model, *top) for top in logprobs.top]
    return {**token_logprob(model, logprobs.token, logprobs.logprob), "top_logprobs": tops}
