"""llama-server's `timings` of a reply, which several APIs have."""

from __future__ import annotations

from erllama.engine import Completion
from erllama.server.conduct.bodies import Json


def timings(completion: Completion) -> Json:
    """Return the timings of a reply: milliseconds, and tokens per second.

    The first token of a reply comes with the prompt's last decode, so the rates of the reply leave it out.
    """
    times = completion.timings
    n_cached, n_reply = completion.cache.tokens, len(completion.tokens)
    n_prompt = completion.n_prompt - n_cached
    prompt_ms, reply_ms = (times.restore + times.prefill) * 1000, times.decode * 1000
    n_steps = max(n_reply - 1, 0)
    values: Json = {
        "cache_n": n_cached,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(n_prompt, 1),
        "prompt_per_second": n_prompt * 1000 / prompt_ms if prompt_ms else 0.0,
        **reply_timings(n_reply, reply_ms),
    }
    if n_steps and completion.drafts is not None:
        values |= {"draft_n": completion.drafts.drafted, "draft_n_accepted": completion.drafts.accepted}
    return values


def reply_timings(n_tokens: int, milliseconds: float) -> Json:
    """Return the timings of the tokens of a reply.

    Args:
        n_tokens: tokens so far.
        milliseconds: time from the first of them to the last.
    """
    n_steps = max(n_tokens - 1, 0)
    return {
        "predicted_n": n_tokens,
        "predicted_ms": milliseconds,
        "predicted_per_token_ms": milliseconds / n_steps if n_steps else 0.0,
        "predicted_per_second": n_steps * 1000 / milliseconds if n_steps and milliseconds else 0.0,
    }
