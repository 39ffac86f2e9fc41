"""Speculative decoding: the `speculative` option and the result of `Model.verify`.

The option takes the name of a drafter, a smaller model, or a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from erllama._types import Prompt
from erllama.engine import Completion, Vocabulary
from erllama.engine.speculation import Drafter, NgramDrafter
from erllama.errors import OptionError

# Results of `_same_vocabulary`, which compares every token of vocabularies that may be large.
_compared: WeakKeyDictionary[Vocabulary, WeakKeyDictionary[Vocabulary, bool]] = WeakKeyDictionary()


class DraftModel(Protocol):
    """A model that drafts tokens for another one: an `erllama.Model`."""

    @property
    def _vocabulary(self) -> Vocabulary: ...

    def draft(self, prefix: Prompt, n: int) -> list[int]:
        """Return up to `n` tokens that most likely follow a prefix."""
        ...


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `Model.verify`.

    Attributes:
        accepted: number of proposed tokens, counted from the first, that the model would have sampled.
        next_token: the token that the model samples after those; None if its reply ends there.
        end: whether its reply ends after the accepted tokens.
    """

    accepted: int
    next_token: int | None
    end: bool

    @classmethod
    def of(cls, reply: Completion, proposed: Sequence[int]) -> Verification:
        """Compare a reply with the tokens that were proposed for it."""
        pairs = zip(reply.tokens, proposed, strict=False)
        accepted = next((i for i, (token, other) in enumerate(pairs) if token != other), None)
        if accepted is None:
            accepted = min(len(reply.tokens), len(proposed))
        end = accepted == len(reply.tokens) and reply.finish_reason == "stop"
        return cls(accepted, reply.tokens[accepted] if accepted < len(reply.tokens) else None, end)


def drafter_factory(speculative: object, vocabulary: Vocabulary) -> Callable[[NDArray[np.int32]], Drafter] | None:
    """Return a function that makes the drafter for a prompt; None if `speculative` is None.

    Args:
        speculative: the option's value.
        vocabulary: of the model that verifies the drafts.

    Raises:
        OptionError: the value names no drafter, or is a model with another vocabulary.
    """
    if speculative is None:
        return None
    if speculative == "ngram":
        return NgramDrafter
    draft = getattr(speculative, "draft", None)
    if callable(draft):
        _check_vocabulary(speculative._vocabulary, vocabulary)  # type: ignore[attr-defined]
        return lambda prompt: draft
    if callable(speculative):
        return lambda prompt: speculative
    raise OptionError(
        f'speculative={speculative!r:.80}; pass "ngram", a model with the same vocabulary, or a function of all '
        "tokens and a number n that returns up to n tokens"
    )


def _check_vocabulary(drafting: Vocabulary, verifying: Vocabulary) -> None:
    if drafting is verifying:
        raise OptionError("speculative is the model itself; pass a smaller model")
    if not _same_vocabulary(verifying, drafting):
        raise OptionError(
            f"speculative is a model with another vocabulary, of {drafting.n_tokens} tokens; "
            f"this one has {verifying.n_tokens}: the texts of all tokens must be equal"
        )


def _same_vocabulary(one: Vocabulary, other: Vocabulary) -> bool:
    results = _compared.setdefault(one, WeakKeyDictionary())
    if other not in results:
        results[other] = (
            one.n_tokens == other.n_tokens
            and bool((np.asarray(one.is_eog) == np.asarray(other.is_eog)).all())
            and all(one.piece(token) == other.piece(token) for token in range(one.n_tokens))
        )
    return results[other]
