"""Speculation: likely next tokens are computed in one decode, and kept while they equal the samples.

Every token is still sampled from the model's own logits, in order and with the request's own generator. So the
reply is the same as without speculation, and a draft only decides how many tokens one decode yields. The engine
measures whether speculation saves time: how long decodes take by their rows, and how many drafts are accepted.
`Sequence` owns a `Speculator`; the scheduler owns `DecodeCosts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Drafter = Callable[[NDArray[np.int32], int], Sequence[int]]
"""Called with all tokens so far, int32, shape (n,), and a maximum. Returns at most that many likely next tokens."""

# The lengths of the n-grams, the longest first.
_SIZES = (4, 2)
# The weight of older measurements of decodes beside a new one.
_DECAY = 0.95
# Tokens after which drafts that did not pay are tried again, at first. Each failed try doubles them.
_PAUSE = 32
_LONGEST_PAUSE = 1024


@dataclass(frozen=True, slots=True)
class ProposedTokens:
    """Makes drafters that propose given tokens, while the reply equals their beginning.

    Attributes:
        tokens: the proposed reply.
    """

    tokens: tuple[int, ...]

    def __call__(self, prompt: NDArray[np.int32]) -> Drafter:
        """Return the drafter for a prompt."""
        n_prompt, proposed = len(prompt), self.tokens

        def draft(tokens: NDArray[np.int32], max_tokens: int) -> Sequence[int]:
            reply = tuple(tokens[n_prompt:].tolist())
            n = len(reply)
            return proposed[n : n + max_tokens] if reply == proposed[:n] else ()

        return draft


class NgramDrafter:
    """Drafts the tokens that followed the last occurrence of the last few tokens: for replies that repeat text."""

    def __init__(self, prompt: NDArray[np.int32]) -> None:
        self._ends: dict[bytes, int] = {}  # the end of the last occurrence of each n-gram, by its bytes
        self._n_indexed = 0
        self._index(prompt.tobytes(), len(prompt))

    def __call__(self, tokens: NDArray[np.int32], max_tokens: int) -> Sequence[int]:
        raw, n = tokens.tobytes(), len(tokens)
        self._index(raw, n)
        for size in _SIZES:
            end = self._ends.get(raw[-4 * size :])
            if n > size and end is not None:
                following: list[int] = tokens[end : end + max_tokens].tolist()
                return following
        return ()

    def _index(self, raw: bytes, n: int) -> None:
        """Index all n-grams except those at the end, which no token follows yet."""
        for end in range(max(self._n_indexed, 1), n):
            for size in _SIZES:
                if end >= size:
                    self._ends[raw[4 * (end - size) : 4 * end]] = end
        self._n_indexed = n


class DecodeCosts:
    """How long decodes take by the number of their rows: a line fitted to recent decodes."""

    def __init__(self) -> None:
        # Sums over decodes of 1, rows, seconds, rows squared, rows times seconds; later decodes have more weight.
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def record(self, n_rows: int, seconds: float) -> None:
        """Add the measurement of one decode."""
        self._n = _DECAY * self._n + 1.0
        self._x = _DECAY * self._x + n_rows
        self._y = _DECAY * self._y + seconds
        self._xx = _DECAY * self._xx + n_rows * n_rows
        self._xy = _DECAY * self._xy + n_rows * seconds

    def ratio(self, n_rows: int, more: int) -> float | None:
        """Return how many times longer a decode takes with `more` rows beside `n_rows`; None if that is unknown."""
        n, x, y, xx, xy = self._n, self._x, self._y, self._xx, self._xy
        spread = n * xx - x * x
        if n < 2 or spread <= 1e-6 * n * n:
            return None
        slope = (n * xy - x * y) / spread
        base = (y - slope * x) / n + slope * n_rows
        return max(1.0, (base + slope * more) / base) if base > 0 else None


@dataclass(frozen=True, slots=True)
class Drafts:
    """The results of speculation for one reply.

    Attributes:
        drafted: tokens computed ahead.
        accepted: drafted tokens that equalled the samples.
    """

    drafted: int
    accepted: int


class Speculator:
    """Chooses the tokens of one request that are computed ahead.

    Args:
        drafter: proposes tokens. An exception that it raises ends speculation for the request, not the request.
        max_drafts: maximum number of tokens ahead.
        n_vocab: width of the vocabulary, for checking the drafter's tokens.

    Attributes:
        drafted, accepted: as in `Drafts`, so far.
    """

    def __init__(self, drafter: Drafter, max_drafts: int, n_vocab: int) -> None:
        self._drafter, self._max_drafts, self._n_vocab = drafter, max_drafts, n_vocab
        self._length = min(2, max_drafts)
        self._rate = 0.5  # of recent drafts that were accepted
        self._resume_at = 0
        self._pause = _PAUSE
        self.drafted = self.accepted = 0

    def draft(self, tokens: NDArray[np.int32], max_drafts: int, n_rows: int, costs: DecodeCosts) -> list[int]:
        """Return the tokens to compute ahead; [] for none.

        Args:
            tokens: all tokens so far, int32, shape (n,).
            max_drafts: maximum number of tokens to return.
            n_rows: rows of the decode without drafts.
            costs: how long decodes take.

        Raises:
            Exception: any exception of the drafter, or a ValueError if it returns ids outside the vocabulary.
        """
        n = min(max_drafts, self._length)
        if n < 1 or len(tokens) < self._resume_at or not self._pays(n, n_rows, costs, len(tokens)):
            return []
        drafts = [int(token) for token in self._drafter(tokens, n)][:n]
        if any(not 0 <= token < self._n_vocab for token in drafts):
            raise ValueError(f"a draft of tokens outside the vocabulary of {self._n_vocab}")
        return drafts

    def _pays(self, n: int, n_rows: int, costs: DecodeCosts, n_tokens: int) -> bool:
        ratio = costs.ratio(n_rows, n)
        expected = 1 + sum(self._rate**i for i in range(1, n + 1))
        if ratio is None or expected >= ratio:
            return True
        self._resume_at = n_tokens + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        # The next try starts with a neutral rate and a short draft.
        self._rate, self._length = max(self._rate, 0.5), min(2, self._max_drafts)
        return False

    def record(self, drafted: int, accepted: int) -> None:
        """Record how many tokens of a draft were accepted."""
        self.drafted += drafted
        self.accepted += accepted
        for success in [True] * accepted + [False] * (accepted < drafted):
            self._rate += 0.1 * (success - self._rate)
        if accepted == drafted:
            self._length, self._pause = min(2 * drafted, self._max_drafts), _PAUSE
        else:
            self._length = max(1, accepted)
