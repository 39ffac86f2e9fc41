"""llama-server's timings of a reply, an extension of OpenAI's answers."""

from __future__ import annotations

from erllama.engine import Completion
from erllama.engine.requests.request import Timings
from erllama.server.conduct.bodies import Json


def timings(completion: Completion) -> Json:
    """Return llama-server's timings of a reply: milliseconds, and tokens per second."""
    times: Timings = completion.timings
    prompt_seconds = times.restore + times.prefill
    n_prompt, n_reply = times.prefill_tokens, len(completion.tokens)
    return {
        "cache_n": completion.cache.tokens,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_seconds * 1000,
        "prompt_per_token_ms": prompt_seconds * 1000 / max(n_prompt, 1),
        "prompt_per_second": n_prompt / prompt_seconds if prompt_seconds else 0.0,
        "predicted_n": n_reply,
        "predicted_ms": times.decode * 1000,
        "predicted_per_token_ms": times.decode * 1000 / max(n_reply, 1),
        "predicted_per_second": n_reply / times.decode if times.decode else 0.0,
    }
