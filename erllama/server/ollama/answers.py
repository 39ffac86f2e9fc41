"""What the answers of chat and generate have in common: counts, durations, and log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Sequence

from erllama._model.model import Model
from erllama.engine import Completion, TokenLogprobs
from erllama.server.conduct.bodies import Json
from erllama.server.endpoints import Call
from erllama.server.ollama.facts import now
from erllama.server.replies.logprobs import token_logprobs


def head(model: str) -> Json:
    """Return the beginning of each line of an answer."""
    return {"model": model, "created_at": now()}


def ending(call: Call, completion: Completion) -> Json:
    """Return the fields of the last line.

    `prompt_eval_count` counts the whole prompt. `prompt_cached_count` and `prompt_cached_tier` are additions: how
    much of it was not computed again, and the slowest tier that it was read from.
    """
    timings = completion.timings
    return {
        "done": True,
        "done_reason": "length" if completion.finish_reason in ("length", "context_full") else "stop",
        "total_duration": elapsed(call),
        "load_duration": nanoseconds(call.record.load_seconds + timings.queued),
        "prompt_eval_count": completion.n_prompt,
        "prompt_eval_duration": nanoseconds(timings.restore + timings.prefill),
        "eval_count": len(completion.tokens),
        "eval_duration": nanoseconds(timings.decode),
        "prompt_cached_count": completion.cache.tokens,
        "prompt_cached_tier": completion.cache.tier,
    }


def elapsed(call: Call) -> int:
    """Return the nanoseconds since a call began."""
    return nanoseconds(time.monotonic() - call.record.began)


def nanoseconds(seconds: float) -> int:
    """Return seconds as Ollama has them."""
    return round(seconds * 1e9)


def logprobs_json(model: Model, logprobs: Sequence[TokenLogprobs]) -> list[Json]:
    """Return log-probabilities as Ollama has them."""
    return [token_logprobs(model, each) for each in logprobs]
