"""Parts of OpenAI's answers that several endpoints share: token counts and finish reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from erllama.engine import Completion
from erllama.server.conduct.bodies import Json

# "context_full" and "cancelled" have no counterpart: the reply is cut short, as by max_tokens.
_FINISH_REASONS: Mapping[str, str] = {"stop": "stop", "tool_calls": "tool_calls"}


def finish_reason(completion: Completion) -> str:
    """Return OpenAI's word for how a reply ended."""
    return _FINISH_REASONS.get(completion.finish_reason, "length")


def usage(completions: Sequence[Completion]) -> Json:
    """Return the token counts of the replies to one prompt.

    The prompt counts once. `cached_tier` is an extension: the slowest tier that a part of it was read from. With
    several prompts, it is that of the first prompt that was cached.
    """
    return usage_of_prompts(completions, len(completions))


def usage_of_prompts(completions: Sequence[Completion], n: int) -> Json:
    """Return the token counts of the replies to several prompts.

    Args:
        completions: the `n` replies to the first prompt, then those to the second, and so on.
    """
    firsts = completions[::n]
    n_prompt = sum(each.n_prompt for each in firsts)
    n_reply = sum(len(each.tokens) for each in completions)
    tiers = [each.cache.tier for each in firsts if each.cache.tier is not None]
    cached = {
        "cached_tokens": sum(each.cache.tokens for each in firsts),
        "cached_tier": tiers[0] if tiers else None,
    }
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_reply,
        "total_tokens": n_prompt + n_reply,
        "prompt_tokens_details": cached,
    }
