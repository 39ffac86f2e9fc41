"""How likely a text is after another, and texts with a gap: what of a prompt `Model.score` and `Model.infill` make.

Pure functions over a vocabulary; the engine computes what they ask for.
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
        logprob: the natural logarithm of its probability: the sum of `logprobs`.
        tokens: ids of the continuation.
        logprobs: one for each of them, given all before it.
        is_greedy: whether each of them was the most likely one.
        cache: how much of the prompt was warm.
    """

    logprob: float
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: bool
    cache: CacheHit

    @classmethod
    def of(cls, completion: Completion) -> Score:
        """Of a request whose last tokens were scored, with the most likely one of each."""
        told = completion.logprobs or ()
        return cls(
            logprob=float(np.sum([each.logprob for each in told])),
            tokens=tuple(each.token for each in told),
            logprobs=tuple(each.logprob for each in told),
            is_greedy=all(each.top[0][0] == each.token for each in told),
            cache=completion.cache,
        )


def with_continuation(
    prompt: object,
    continuation: object,
    vocabulary: Vocabulary,
    prompt_ids: Callable[[object], NDArray[np.int32]],
) -> tuple[NDArray[np.int32], int]:
    """The tokens of both, int32, shape (n,), and how many of them are the continuation's.

    Two texts are tokenized as one; where the tokenizer joins characters of both in a token, that one is the
    continuation's. Otherwise each has its own tokens.

    Args:
        prompt_ids: makes checked ids of a prompt.
    """
    if isinstance(continuation, str) and not continuation:
        raise PromptError("the continuation is empty; give at least one token")
    before = prompt_ids(prompt)
    if isinstance(prompt, str) and isinstance(continuation, str):
        whole = prompt_ids(prompt + continuation)
        n = min(len(before), len(whole) - 1)
        unlike = np.flatnonzero(before[:n] != whole[:n])
        n_before = int(unlike[0]) if len(unlike) else n
        if n_before == 0:
            raise PromptError("the tokenizer makes one token of the prompt and what follows it; give token ids")
        return whole, len(whole) - n_before
    if isinstance(continuation, str):
        after = vocabulary.tokenize(continuation, add_special=False, parse_special=True)
    else:
        after = prompt_ids(continuation)
    return prompt_ids(np.concatenate([before, after])), len(after)


def around_gap(prefix: object, suffix: object, vocabulary: Vocabulary, id: str) -> NDArray[np.int32]:
    """The prompt, int32, shape (n,), that a model of name `id` answers with what is between two texts."""
    marks: InfillTokens | None = getattr(vocabulary, "infill_tokens", None)
    if marks is None:
        raise Unsupported(
            f"model {id!r} cannot fill gaps: its vocabulary has no tokens that mark them (FIM); "
            "load a model that was trained for it"
        )
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(text, str):
            raise PromptError(f"{name}={shown(text)}; give text")
    if not prefix and not suffix:
        raise PromptError("prefix and suffix are empty; give some text around the gap")
    # As code is written, special tokens in it are no more than their characters.
    before, after = (vocabulary.tokenize(str(text), add_special=False) for text in (prefix, suffix))
    parts = [*marks.begin, marks.prefix, *before, marks.suffix, *after, marks.middle]
    return np.array(parts, np.int32)
