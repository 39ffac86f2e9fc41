"""Parts of OpenAI's answers that several endpoints share: token counts, timings, log-probabilities, finish reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from erllama.engine import Completion, TokenLogprobs
from erllama.server.conduct.bodies import Json
from erllama.server.replies.timings import timings

__all__ = ["finish_reason", "timings", "token_text", "usage"]

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


def token_text(raw: bytes) -> str:
    """Return the bytes of a token as text; bytes that are not UTF-8 become U+FFFD."""
    return raw.decode("utf-8", "replace")
