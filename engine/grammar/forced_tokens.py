"""The tokens in which the model's own tokenizer writes bytes that a grammar forces.

The last tokens of a text may change when more text follows: `"na` has other tokens than the beginning of `"name"`.
So a token is forced only if the tokenizer writes it before every continuation. These tokens are the common prefix
of the whole text's tokens and of the tokens of each part that ends where a longer token could begin.
`engine.grammar.matcher` calls this with the forced bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from erllama.engine.backend import Vocabulary
from erllama.engine.continuation_tokenizer import ContinuationTokenizer

# Bytes that one call looks at. A later call handles the rest.
_MAX_BYTES = 512
# Preceding tokens that may join with the text that follows.
_CONTEXT = 4


class ForcedTokenizer:
    """Finds the forced tokens of one vocabulary. Thread-safe.

    Args:
        vocabulary: the model's vocabulary.
        pieces: the bytes of all tokens, by id; empty for tokens without text.
    """

    def __init__(self, vocabulary: Vocabulary, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._sorted = sorted({piece for piece in pieces if piece})
        self._longest = max(map(len, self._sorted), default=0)
        # A vocabulary without texts has no tokenizer.
        self._tokenizer = ContinuationTokenizer(vocabulary) if self._sorted else None

    def tokenize(self, data: bytes, preceding: Sequence[int]) -> list[int]:
        """Return the tokens that bytes begin with, for every continuation of the bytes.

        Args:
            data: bytes of a text; they may end within a character.
            preceding: the preceding tokens, at least the last one.

        Returns:
            ids whose bytes are the beginning of `data`; [] if no token is forced.
        """
        if self._tokenizer is None:
            return []
        data = data[:_MAX_BYTES]
        for n in range(min(_CONTEXT, len(preceding)), -1, -1):
            context = list(preceding[len(preceding) - n :])
            start = b"".join(self._pieces[token] for token in context)
            text = _whole_characters(start + data)
            if len(text) <= len(start):
                continue
            ids = self._tokenizer.tokenize(text)
            if ids is not None and ids[:n] == context:
                return self._common_tokens(self._tokenizer, text, ids, len(start), n)
        return []

    def _common_tokens(
        self, tokenizer: ContinuationTokenizer, text: bytes, ids: list[int], start: int, n: int
    ) -> list[int]:
        """Return the tokens of a text that all its possible continuations share, without the first n."""
        for end in range(len(text) - 1, max(start, len(text) - self._longest) - 1, -1):
            if len(ids) <= n:
                return []
            # A text cannot be tokenized up to the middle of a character. The tokens before the character are
            # enough.
            if text[end] & 0xC0 != 0x80 and self._begins_longer(text[end:]):
                ids = _shared_start(ids, tokenizer.tokenize(text[:end]) or [])
        forced = ids[n:]
        # Some tokenizers change the text, for example its spaces. Their tokens cannot be forced.
        written = b"".join(self._pieces[token] for token in forced)
        unchanged = text.startswith(written, start) and all(self._pieces[token] for token in forced)
        return forced if unchanged else []

    def _begins_longer(self, part: bytes) -> bool:
        """Return whether a token begins with `part` and is longer. It may be the first bytes of a character."""
        at = bisect_right(self._sorted, part)
        return at < len(self._sorted) and self._sorted[at].startswith(part)


def _shared_start(ids: list[int], others: list[int]) -> list[int]:
    n = next((at for at, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), None)
    return ids[: min(len(ids), len(others)) if n is None else n]


def _whole_characters(text: bytes) -> bytes:
    """Return the text without an incomplete character at its end; empty if the rest is not UTF-8."""
    for cut in range(min(4, len(text) + 1)):
        part = text[: len(text) - cut]
        try:
            part.decode()
        except UnicodeDecodeError:
            continue
        return part
    return b""
