"""The DRY step, which makes it less likely that a reply continues a repetition.

`erllama.engine.sampling.steps` puts it into the chain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.checks import encodable
from erllama.engine.backend import Vocabulary
from erllama.engine.sampling.candidates import Candidates
from erllama.engine.sampling.declaration import ChainStep, Option, Step, StepContext
from erllama.errors import OptionError

_MAX_TEXTS = 64  # texts of dry_sequence_breakers
_MAX_BREAKER = 40  # bytes of a breaker's text that count
_MAX_TAIL = 20  # tokens of the rest of a breaker's text
_UNLIMITED = 1 << 30
_LOG_MAX = 88.7228391  # the logarithm of float32's largest number
_MAX_PENALTY = float(np.finfo(np.float32).max)  # in effect excludes a token, and is still a number


class SequenceBreakers:
    """The tokens that end a repetition: those that contain, or begin, one of the breaker texts.

    Attributes:
        tails: by token, the token sequences one of which must follow; the empty sequence always follows.
        heads: bool, shape (n_vocab,): the tokens that have a tail.
        alone: bool, shape (n_vocab,): the tokens that have the empty tail.
    """

    def __init__(self, vocabulary: Vocabulary, texts: Sequence[str]) -> None:
        self.heads, self.alone = np.zeros((2, vocabulary.n_tokens), bool)
        self.tails: dict[int, list[tuple[int, ...]]] = {}
        pieces = [
            # A control token has no text, but its name may be a breaker: "<|im_end|>".
            vocabulary.piece(token) or vocabulary.detokenize([token], special=True)
            for token in range(vocabulary.n_tokens)
        ]
        for text in texts:
            whole = text.encode()[:_MAX_BREAKER]
            rests: dict[bytes, tuple[int, ...]] = {}
            for token, piece in enumerate(pieces):
                if whole in piece:
                    self._add(token, ())
                    continue
                # Otherwise the token may end with the text's first bytes. Then the rest of the text must follow.
                for n in range(min(len(whole) - 1, len(piece)), 0, -1):
                    if piece.endswith(whole[:n]):
                        rest = whole[n:]
                        if rest not in rests:
                            ids = vocabulary.tokenize(rest, add_special=False).tolist()
                            rests[rest] = tuple(ids[:_MAX_TAIL])
                        self._add(token, rests[rest])

    def _add(self, token: int, tail: tuple[int, ...]) -> None:
        self.heads[token] = True
        self.alone[token] |= not tail
        tails = self.tails.setdefault(token, [])
        if tail not in tails:
            tails.append(tail)


def _check_breakers(value: object) -> Sequence[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) and text for text in value):
        raise OptionError(f"dry_sequence_breakers={value!r}; pass a list of texts, none of them empty")
    if len(value) > _MAX_TEXTS:
        raise OptionError(f"{len(value)} dry_sequence_breakers; pass at most {_MAX_TEXTS}")
    return tuple(encodable("dry_sequence_breakers", text) for text in value)


_DEFAULT_BREAKERS: Sequence[str] = ("\n", ":", '"', "*")


class DRY(ChainStep):
    """Lowers the logits of tokens that would make a repetition longer.

    The penalty is `multiplier` * `base` ** n, where n is the number of tokens by which the repetition is longer
    than `allowed_length`.

    "Don't Repeat Yourself", by its author: github.com/oobabooga/text-generation-webui/pull/5677.

    Args:
        last_n: how many of the last tokens are searched for repetitions.
        breakers: the tokens that end a repetition.
    """

    name = "dry"
    reads_context = True
    summary = "makes tokens that continue a repetition less likely; a longer repetition has a larger penalty"
    dry_multiplier = Option(0.0, 0.0, 1e6)
    dry_base = Option(1.75, 1.0, 1e6)
    dry_allowed_length = Option(2, 0)
    dry_penalty_last_n = Option(-1, -1)
    dry_sequence_breakers = Option(_DEFAULT_BREAKERS, check=_check_breakers)

    def __init__(
        self, multiplier: float, base: float, allowed_length: int, last_n: int, breakers: SequenceBreakers
    ) -> None:
        # In float32, as in libllama: the power makes differences of rounding visible.
        self._multiplier, self._base = float(np.float32(multiplier)), float(np.float32(base))
        self._allowed = allowed_length
        self._last_n, self._breakers = last_n, breakers
        # The penalty stops growing at this length, since it would overflow float32. With a base of 1 it never
        # grows.
        self._max_growth = 0
        if self._base > 1:
            growth = np.log(np.float32(base))
            self._max_growth = int(np.float32(_LOG_MAX) / growth) if self._base > 1.000001 else _UNLIMITED

    @classmethod
    def from_options(cls, options: object, context: StepContext) -> Step | None:
        multiplier = cls.dry_multiplier.of(options)
        last_n = context.last_n(cls.dry_penalty_last_n.of(options))
        if not multiplier or not last_n:
            return None
        texts = tuple(cls.dry_sequence_breakers.of(options))
        breakers = context.shared((cls.name, texts), lambda: SequenceBreakers(context.vocabulary, texts))
        return cls(multiplier, cls.dry_base.of(options), cls.dry_allowed_length.of(options), last_n, breakers)

    def __call__(self, candidates: Candidates) -> Candidates:
        recent = candidates.context[-self._last_n :]
        if len(recent) <= self._allowed:
            return candidates
        limit = self._n_after_breaker(recent)
        if limit < self._allowed:
            return candidates
        lengths = self._repetition_lengths(recent, limit)
        places = np.flatnonzero(lengths[:-1] >= self._allowed)
        # The token that followed there would continue the repetition. Of several places, the longest counts.
        tokens, which = np.unique(recent[places + 1], return_inverse=True)
        longest = np.zeros(len(tokens), np.intp)
        np.maximum.at(longest, which, lengths[places])
        continues = ~self._breakers.alone[tokens]
        tokens, over = tokens[continues], (longest[continues] - self._allowed).astype(np.float64)
        if not len(tokens):
            return candidates
        if self._max_growth:
            over = np.minimum(over, self._max_growth)
        with np.errstate(over="ignore"):
            penalties = np.minimum(self._multiplier * self._base**over, _MAX_PENALTY).astype(np.float32)
        positions, which = candidates.at(tokens)
        logits = candidates.logits.copy()
        logits[positions] -= penalties[which]
        return candidates.with_logits(logits)

    def _n_after_breaker(self, recent: NDArray[np.int32]) -> int:
        """Return how many tokens follow the last breaker."""
        n = len(recent)
        for at in np.flatnonzero(self._breakers.heads[recent])[::-1].tolist():
            after = recent[at + 1 : at + 1 + _MAX_TAIL].tolist()
            lengths = [
                len(tail) for tail in self._breakers.tails[int(recent[at])] if tuple(after[: len(tail)]) == tail
            ]
            if lengths:
                return n - 1 - int(at) - max(lengths)
        return n

    def _repetition_lengths(self, recent: NDArray[np.int32], limit: int) -> NDArray[np.intp]:
        """Return, for each position, how many tokens up to it equal the end of the context.

        Counts at most `limit`; shape (n,).
        """
        n = len(recent)
        lengths = np.zeros(n, np.intp)
        places = np.arange(n - 1)
        # Repetitions longer than this all have the same penalty.
        longest = min(limit, self._allowed + max(self._max_growth, 1))
        for length in range(longest):
            places = places[places >= length]
            places = places[recent[places - length] == recent[n - 1 - length]]
            if not len(places):
                break
            lengths[places] = length + 1
        return lengths
