"""Log-probabilities in the two forms of OpenAI's API: of chats and of completions."""

from __future__ import annotations

from collections.abc import Sequence

from erllama._model.model import Model
from erllama.engine import TokenLogprobs
from erllama.server.conduct.bodies import Json
from erllama.server.replies.logprobs import LEAST, token_logprob


def chat_logprobs(model: Model, logprobs: Sequence[TokenLogprobs]) -> Json:
    """Return log-probabilities as chat completions have them."""
    return {
        "content": [
            {**_entry(model, each.token, each.logprob), "top_logprobs": [_entry(model, *top) for top in each.top]}
            for each in logprobs
        ],
        "refusal": None,
    }


def _entry(model: Model, token: int, logprob: float) -> Json:
    return {"id": token, **token_logprob(model, token, logprob)}  # llama-server's clients read the id


def completion_logprobs(model: Model, logprobs: Sequence[TokenLogprobs], offset: int) -> Json:
    """Return log-probabilities as completions have them.

    Args:
        offset: number of characters of the text before these tokens.
    """
    tokens, offsets = [], []
    for each in logprobs:
        text = model.token_bytes(each.token).decode("utf-8", "replace")
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    tops = [
        {model.token_bytes(id).decode("utf-8", "replace"): max(logprob, LEAST) for id, logprob in each.top}
        for each in logprobs
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [max(each.logprob, LEAST) for each in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
