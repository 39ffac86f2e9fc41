"""Finds conversations whose prompt does not begin as it did before, by comparing the tokens of prompts.

A client that writes the time into its first line defeats every prefix cache, and does not notice. `PrefixWatch`
keeps a few recent prompts of each client, and finds the one with which a new prompt shares the longest prefix. If
they differ before its end, and most of what follows in the earlier prompt occurs in the new one all the same, then
it is the same conversation with a changed prefix. Otherwise it is another conversation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

_PROMPTS_PER_CLIENT = 8
_MAX_TOKENS = 1 << 20  # of all prompts together: 4 MiB
# The end of a prompt begins a reply, and the next prompt may render it in another way.
_END = 32
_MIN_TOKENS = 128  # of a prompt that is kept
# Samples of the rest of an earlier prompt: their number, and the tokens of each. Most must occur in the new prompt.
_SAMPLES, _SAMPLE_TOKENS = 5, 12
_CANDIDATES = 2  # earlier prompts that are searched for


class PrefixChange(NamedTuple):
    """A prompt that should share more with an earlier one.

    Attributes:
        at: position of the first token that differs.
        n_tokens: tokens of the prompt.
    """

    at: int
    n_tokens: int


class PrefixWatch:
    """Keeps recent prompts, and compares new ones with them. Used by the event loop alone."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[tuple[str, str], list[Tokens]] = OrderedDict()  # least recent client first

    def add(self, client: tuple[str, str], prompt: Tokens) -> PrefixChange | None:
        """Keep a prompt; return its change if it is an earlier one with a changed prefix.

        Takes about 0.1 ms for 40,000 tokens, and up to 1 ms after a change.

        Args:
            client: the key, and the name of the model. Prompts of different clients are not compared.
            prompt: token ids, shape (n,). Must not change later.
        """
        if len(prompt) < _MIN_TOKENS:
            return None
        prompts = self._prompts.setdefault(client, [])
        self._prompts.move_to_end(client)
        earlier, change = _find_earlier(prompts, prompt)
        if earlier is not None:
            del prompts[earlier]
        prompts.append(prompt)
        del prompts[:-_PROMPTS_PER_CLIENT]
        self._bound()
        return change

    def _bound(self) -> None:
        """Drop the oldest prompts of the least recent clients, but not the newest prompt of all."""
        total = sum(len(prompt) for prompts in self._prompts.values() for prompt in prompts)
        while total > _MAX_TOKENS:
            client, prompts = next(iter(self._prompts.items()))
            if len(prompts) == 1 and len(self._prompts) == 1:
                return
            total -= len(prompts.pop(0))
            if not prompts:
                del self._prompts[client]


def _find_earlier(prompts: Sequence[Tokens], prompt: Tokens) -> tuple[int | None, PrefixChange | None]:
    """Return the index of the prompt that a new one continues, and how its prefix changed; None for neither."""
    shared = [_shared_prefix(each, prompt) for each in prompts]
    for index in sorted(range(len(prompts)), key=lambda i: (shared[i], i), reverse=True)[:_CANDIDATES]:
        earlier, at = prompts[index], shared[index]
        rest = earlier[at : len(earlier) - _END]
        if not len(rest):
            return index, None
        if _occurs(rest, prompt[at:]):
            return index, PrefixChange(at, len(prompt))
    return None, None


def _shared_prefix(a: Tokens, b: Tokens) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    at = int(np.argmax(differs)) if n else 0
    return at if n and differs[at] else n


def _occurs(rest: Tokens, prompt: Tokens) -> bool:
    """Return whether most samples of the rest of an earlier prompt occur in a prompt."""
    room = len(rest) - _SAMPLE_TOKENS
    if room < _SAMPLES * _SAMPLE_TOKENS:
        return False
    raw = prompt.tobytes()
    # The first samples are further from the change, which may be several tokens long.
    starts = np.linspace(_SAMPLE_TOKENS, room, _SAMPLES).astype(int)
    found = sum(_find(raw, rest[start : start + _SAMPLE_TOKENS].tobytes()) for start in starts)
    return found > _SAMPLES // 2


def _find(raw: bytes, sample: bytes) -> bool:
    """Return whether tokens, as bytes, contain others."""
    at = raw.find(sample)
    while at % 4 and at >= 0:
        at = raw.find(sample, at + 1)
    return at >= 0
