"""Parts of OpenAI's answers that several endpoints share: token counts, timings, finish reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from erllama.engine import Completion
from erllama.engine.requests.request import Timings
from erllama.server.conduct.bodies import Json

# "context_full" and "cancelled" have no counterpart: the reply is cut short, as by max_tokens.
_FINISH_REASONS: Mapping[str, str] = {"stop": "stop", "tool_calls": "tool_calls"}


def finish_reason(completion: Completion) -> str:
    """Return OpenAI's word for how a reply ended."""
    return _FINISH_REASONS.get(completion.finish_reason, "length")


def usage(completions: Sequence[Completion]) -> Json:
    """Return the token counts of the replies to one prompt.

    The prompt counts once. `cached_tier` is an extension: the slowest tier that a part of it was read from.
    """
    first = completions[0]
    n_prompt = len(first.context_tokens) - len(first.tokens)
    n_reply = sum(len(each.tokens) for each in completions)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_reply,
        "total_tokens": n_prompt + n_reply,
        "prompt_tokens_details": {"cached_tokens": first.cache.tokens, "cached_tier": first.cache.tier},
    }


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


def token_text(raw: bytes) -> str:
    """Return the bytes of a token as text; bytes that are not UTF-8 become U+FFFD."""
    return raw.decode("utf-8", "replace")
