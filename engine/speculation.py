"""Speculation: tokens that are likely to come are computed together, and kept as far as they are what is drawn.

Every token is still drawn from the model's own logits, in order and with the
request's own generator: so the reply is what it would have been, and a draft
only decides how many tokens one decode gives. Whether that pays is measured:
how long decodes take by their rows, and how many drafts come true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Drafter = Callable[[NDArray[np.int32], int], Sequence[int]]
"""Of all tokens so far, int32, shape (n,), and a number: at most so many that may come next; none for no idea."""

# Lengths of what is looked for in what came before, the longest first.
_SIZES = (4, 2)
# Of older measurements of decodes, what counts beside a new one.
_MEMORY = 0.95
# Tokens after which drafts that did not pay are tried again, at first; then twice as many, and so on.
_PAUSE = 32
_LONGEST_PAUSE = 1024


class NgramDrafter:
    """Drafts what followed the last few tokens when they last came: for replies that quote or repeat."""

    def __init__(self, prompt: NDArray[np.int32]) -> None:
        self._ends: dict[bytes, int] = {}  # where what is named by its bytes last ended
        self._n_known = 0
        self._learn(prompt.tobytes(), len(prompt))

    def __call__(self, tokens: NDArray[np.int32], most: int) -> Sequence[int]:
        raw, n = tokens.tobytes(), len(tokens)
        self._learn(raw, n)
        for size in _SIZES:
            end = self._ends.get(raw[-4 * size :])
            if n > size and end is not None:
                found: list[int] = tokens[end : end + most].tolist()
                return found
        return ()

    def _learn(self, raw: bytes, n: int) -> None:
        """All but what the tokens end with, which nothing follows yet."""
        for end in range(max(self._n_known, 1), n):
            for size in _SIZES:
                if end >= size:
                    self._ends[raw[4 * (end - size) : 4 * end]] = end
        self._n_known = n


class DecodeCosts:
    """How long decodes take, by the number of their rows: a line through those of late."""

    def __init__(self) -> None:
        # Sums over decodes of 1, rows, seconds, rows squared, rows times seconds; the latest count most.
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def measured(self, n_rows: int, seconds: float) -> None:
        self._n = _MEMORY * self._n + 1.0
        self._x = _MEMORY * self._x + n_rows
        self._y = _MEMORY * self._y + seconds
        self._xx = _MEMORY * self._xx + n_rows * n_rows
        self._xy = _MEMORY * self._xy + n_rows * seconds

    def ratio(self, n_rows: int, more: int) -> float | None:
        """How many times longer a decode takes with `more` rows beside `n_rows`; None where that is not known."""
        n, x, y, xx, xy = self._n, self._x, self._y, self._xx, self._xy
        spread = n * xx - x * x
        if n < 2 or spread <= 1e-6 * n * n:
            return None
        slope = (n * xy - x * y) / spread
        base = (y - slope * x) / n + slope * n_rows
        return max(1.0, (base + slope * more) / base) if base > 0 else None


@dataclass(frozen=True, slots=True)
class Drafts:
    """What speculation did for a reply.

    Attributes:
        drafted: tokens computed before it was known that they come.
        accepted: those of them that came.
    """

    drafted: int
    accepted: int


class Speculator:
    """Chooses what of one request is computed ahead.

    Args:
        drafter: proposes; whatever it raises ends speculation for this request, not the request.
        most: tokens ahead, at most.
        costs: of the model's decodes.
    """

    def __init__(self, drafter: Drafter, most: int, n_vocab: int) -> None:
        self._drafter, self._most, self._n_vocab = drafter, most, n_vocab
        self._length = min(2, most)
        self._rate = 0.5  # of drafts that come true, of late
        self._resume_at = 0
        self._pause = _PAUSE
        self.drafted = self.accepted = 0

    def draft(self, tokens: NDArray[np.int32], most: int, n_rows: int, costs: DecodeCosts) -> list[int]:
        """What to compute beside the next token, of a tick of `n_rows` without it; [] for nothing.

        Raises:
            Exception: whatever the drafter raises, or a ValueError where it proposes no tokens.
        """
        n = min(most, self._length)
        if n < 1 or len(tokens) < self._resume_at or not self._pays(n, n_rows, costs, len(tokens)):
            return []
        found = [int(token) for token in self._drafter(tokens, n)][:n]
        if any(not 0 <= token < self._n_vocab for token in found):
            raise ValueError(f"a draft of tokens outside the vocabulary of {self._n_vocab}")
        return found

    def _pays(self, n: int, n_rows: int, costs: DecodeCosts, n_tokens: int) -> bool:
        ratio = costs.ratio(n_rows, n)
        expected = 1 + sum(self._rate**i for i in range(1, n + 1))
        if ratio is None or expected >= ratio:
            return True
        self._resume_at = n_tokens + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        # When it is tried again, it gets a fair chance.
        self._rate, self._length = max(self._rate, 0.5), min(2, self._most)
        return False

    def judged(self, drafted: int, accepted: int) -> None:
        """So many of a draft came true."""
        self.drafted += drafted
        self.accepted += accepted
        for came in [True] * accepted + [False] * (accepted < drafted):
            self._rate += 0.1 * (came - self._rate)
        if accepted == drafted:
            self._length, self._pause = min(2 * drafted, self._most), _PAUSE
        else:
            self._length = max(1, accepted)
