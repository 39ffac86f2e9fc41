"""DRY: what would go on repeating a long passage is made less likely."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Vocabulary
from erllama.engine.sampling.candidates import Candidates

_LONGEST_BREAKER = 40  # bytes of a text that breaks repetitions
_LONGEST_TAIL = 20  # tokens of its rest
_ANY_LENGTH = 1 << 30
_LOG_MAX = 88.7228391  # of float32's largest number
_HUGE = float(np.finfo(np.float32).max)  # as good as ruled out, and still a number


class Breakers:
    """The tokens at which a repetition does not count on: those that contain, or begin, one of some texts.

    Attributes:
        tails: for a token, the sequences of tokens of which one must follow; the empty one always does.
        heads: bool, shape (n_vocab,): the tokens that have any.
        alone: bool, shape (n_vocab,): those that have the empty one.
    """

    def __init__(self, vocabulary: Vocabulary, texts: Sequence[str]) -> None:
        self.heads, self.alone = np.zeros((2, vocabulary.n_tokens), bool)
        self.tails: dict[int, list[tuple[int, ...]]] = {}
        pieces = [
            # A control token is no text, but its name may be a breaker: "<|im_end|>".
            vocabulary.piece(token) or vocabulary.detokenize([token], special=True)
            for token in range(vocabulary.n_tokens)
        ]
        for text in texts:
            whole = text.encode()[:_LONGEST_BREAKER]
            rests: dict[bytes, tuple[int, ...]] = {}
            for token, piece in enumerate(pieces):
                if whole in piece:
                    self._add(token, ())
                    continue
                # Else it may end with the text's first bytes; what is left of the text must follow.
                for n in range(min(len(whole) - 1, len(piece)), 0, -1):
                    if piece.endswith(whole[:n]):
                        rest = whole[n:]
                        if rest not in rests:
                            ids = vocabulary.tokenize(rest, add_special=False).tolist()
                            rests[rest] = tuple(ids[:_LONGEST_TAIL])
                        self._add(token, rests[rest])

    def _add(self, token: int, tail: tuple[int, ...]) -> None:
        self.heads[token] = True
        self.alone[token] |= not tail
        tails = self.tails.setdefault(token, [])
        if tail not in tails:
            tails.append(tail)


class DRY:
    """Lowers the logits of tokens that would make a repetition longer: by `multiplier` * `base` to the power of how
    many tokens it is longer than `allowed_length`.

    "Don't Repeat Yourself", by its author: github.com/oobabooga/text-generation-webui/pull/5677.

    Args:
        last_n: how many of the last tokens are looked at.
        breakers: where a repetition is taken to begin.
    """

    def __init__(
        self, multiplier: float, base: float, allowed_length: int, last_n: int, breakers: Breakers
    ) -> None:
        # All in float32, as libllama has it: powers tell apart what is rounded otherwise.
        self._multiplier, self._base = float(np.float32(multiplier)), float(np.float32(base))
        self._allowed = allowed_length
        self._last_n, self._breakers = last_n, breakers
        # Beyond this the penalty does not grow: it would leave float32. For 1, it never does.
        self._most = 0
        if self._base > 1:
            growth = np.log(np.float32(base))
            self._most = int(np.float32(_LOG_MAX) / growth) if self._base > 1.000001 else _ANY_LENGTH

    def __call__(self, candidates: Candidates) -> Candidates:
        recent = candidates.context[-self._last_n :]
        if len(recent) <= self._allowed:
            return candidates
        limit = self._unbroken(recent)
        if limit < self._allowed:
            return candidates
        lengths = self._repeated(recent, limit)
        places = np.flatnonzero(lengths[:-1] >= self._allowed)
        # What followed there would go on here; of several, the longest counts.
        tokens, which = np.unique(recent[places + 1], return_inverse=True)
        longest = np.zeros(len(tokens), np.intp)
        np.maximum.at(longest, which, lengths[places])
        going_on = ~self._breakers.alone[tokens]
        tokens, over = tokens[going_on], (longest[going_on] - self._allowed).astype(np.float64)
        if not len(tokens):
            return candidates
        if self._most:
            over = np.minimum(over, self._most)
        with np.errstate(over="ignore"):
            penalties = np.minimum(self._multiplier * self._base**over, _HUGE).astype(np.float32)
        positions, which = candidates.at(tokens)
        logits = candidates.logits.copy()
        logits[positions] -= penalties[which]
        return candidates.with_logits(logits)

    def _unbroken(self, recent: NDArray[np.int32]) -> int:
        """How many tokens there are after the last breaker."""
        n = len(recent)
        for at in np.flatnonzero(self._breakers.heads[recent])[::-1].tolist():
            after = recent[at + 1 : at + 1 + _LONGEST_TAIL].tolist()
            found = [
                len(tail) for tail in self._breakers.tails[int(recent[at])] if tuple(after[: len(tail)]) == tail
            ]
            if found:
                return n - 1 - int(at) - max(found)
        return n

    def _repeated(self, recent: NDArray[np.int32], limit: int) -> NDArray[np.intp]:
        """For each position, how many tokens up to it equal the last ones of all, at most `limit`; shape (n,)."""
        n = len(recent)
        lengths = np.zeros(n, np.intp)
        places = np.arange(n - 1)
        # Longer ones than this all have the same penalty.
        most = min(limit, self._allowed + max(self._most, 1))
        for length in range(most):
            places = places[places >= length]
            places = places[recent[places - length] == recent[n - 1 - length]]
            if not len(places):
                break
            lengths[places] = length + 1
        return lengths
