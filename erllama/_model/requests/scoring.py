"""Prompts and results of `Model.score` and `Model.infill`.

Pure functions over a vocabulary. `CompletionRequests` calls them and runs the requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from erllama.checks import shown
from erllama.engine import CacheHit, Completion, InfillTokens, Vocabulary
from erllama.errors import PromptError, Unsupported


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is.

    Attributes:
        logprob: natural logarithm of the continuation's probability: the sum of `logprobs`.
        tokens: token ids of the continuation.
        logprobs: logarithm of the probability of each token, given all tokens before it.
        is_greedy: whether each token was the most likely one at its position.
        cache: how much of the prompt came from the cache.
    """

    logprob: float
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: bool
    cache: CacheHit

    @classmethod
    def of(cls, completion: Completion) -> Score:
        """Return the score of a completion that has the logprobs of its last prompt tokens."""
        scored = completion.logprobs or ()
        return cls(
            logprob=float(np.sum([each.logprob for each in scored])),
            tokens=tuple(each.token for each in scored),
            logprobs=tuple(each.logprob for each in scored),
            is_greedy=all(each.top[0][0] == each.token for each in scored),
            cache=completion.cache,
        )


def with_continuation(
    prompt: object,
    continuation: object,
    vocabulary: Vocabulary,
    prompt_ids: Callable[[object], NDArray[np.int32]],
) -> tuple[NDArray[np.int32], int]:
    """Return the tokens of a prompt and its continuation, int32, shape (n,), and the continuation's length.

    Two texts are tokenized as one. A token that spans both belongs to the continuation. If either is token ids, the
    two are tokenized apart.

    Args:
        prompt_ids: returns the checked token ids of a prompt.
    """
    if isinstance(continuation, str) and not continuation:
        raise PromptError("the continuation is empty; pass at least one token")
    before = prompt_ids(prompt)
    if isinstance(prompt, str) and isinstance(continuation, str):
        whole = prompt_ids(prompt + continuation)
        n = min(len(before), len(whole) - 1)
        different = np.flatnonzero(before[:n] != whole[:n])
        n_before = int(different[0]) if len(different) else n
        if n_before == 0:
            raise PromptError("the tokenizer makes one token of the prompt and what follows it; pass token ids")
        return whole, len(whole) - n_before
    if isinstance(continuation, str):
        after = vocabulary.tokenize(continuation, add_special=False, parse_special=True)
    else:
        after = prompt_ids(continuation)
    return prompt_ids(np.concatenate([before, after])), len(after)


def infill_prompt(prefix: object, suffix: object, vocabulary: Vocabulary, id: str) -> NDArray[np.int32]:
    """Return the prompt, int32, shape (n,), that model `id` completes with the text between two texts."""
    marks: InfillTokens | None = getattr(vocabulary, "infill_tokens", None)
    if marks is None:
        raise Unsupported(
            f"model {id!r} cannot fill gaps: its vocabulary has no tokens that mark gaps (FIM); "
            "load a model that was trained for it"
        )
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(text, str):
            raise PromptError(f"{name}={shown(text)}; pass text")
    if not prefix and not suffix:
        raise PromptError("prefix and suffix are empty; pass some text around the gap")
    # The texts are mostly code: the spelling of a special token in them is plain text.
    before, after = (vocabulary.tokenize(str(text), add_special=False) for text in (prefix, suffix))
    parts = [*marks.begin, marks.prefix, *before, marks.suffix, *after, marks.middle]
    return np.array(parts, np.int32)
