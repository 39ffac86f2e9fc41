"""Speculation as callers ask for it: by the name of a way to draft, a smaller model, or a function of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from erllama.engine import Vocabulary
from erllama.engine.speculation import Drafter, NgramDrafter
from erllama.errors import OptionError

if TYPE_CHECKING:
    pass

_compared: WeakKeyDictionary[Vocabulary, WeakKeyDictionary[Vocabulary, bool]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Verification:
    """What a model makes of tokens that were proposed to it.

    Attributes:
        accepted: how many of them, from the first on, are those that it would have taken.
        next_token: the one it takes after those; None where it ends.
        end: whether it ends there.
    """

    accepted: int
    next_token: int | None
    end: bool


def drafters(given: object, vocabulary: Vocabulary) -> Callable[[NDArray[np.int32]], Drafter] | None:
    """What makes a drafter for a prompt.

    Raises:
        OptionError: `given` is no way to draft, or a model with another vocabulary.
    """
    if given is None:
        return None
    if given == "ngram":
        return NgramDrafter
    draft = getattr(given, "draft", None)
    if callable(draft):
        theirs = given._backend.vocabulary  # type: ignore[attr-defined]
        if theirs is vocabulary:
            raise OptionError("speculative is the model itself; give a smaller one")
        if not _same(vocabulary, theirs):
            raise OptionError(
                f"speculative is a model with another vocabulary, of {theirs.n_tokens} tokens; "
                f"this one has {vocabulary.n_tokens}: their texts must be the same"
            )
        return lambda prompt: draft
    if callable(given):
        return lambda prompt: given
    raise OptionError(
        f'speculative={given!r:.80}; give "ngram", a model of the same vocabulary, or a function of all tokens '
        "and a number that gives at most so many"
    )


def _same(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether all tokens are the same. Remembered: a vocabulary may be large."""
    known = _compared.setdefault(one, WeakKeyDictionary())
    if other not in known:
        known[other] = (
            one.n_tokens == other.n_tokens
            and bool((np.asarray(one.is_eog) == np.asarray(other.is_eog)).all())
            and all(one.piece(token) == other.piece(token) for token in range(one.n_tokens))
        )
    return known[other]


def fixed(candidates: Sequence[int], n_prompt: int) -> Drafter:
    """Drafts tokens that are given, as long as they come."""

    def draft(tokens: NDArray[np.int32], most: int) -> Sequence[int]:
        said = tokens[n_prompt:].tolist()
        n = len(said)
        return list(candidates[n : n + most]) if said == list(candidates[:n]) else ()

    return draft
