"""The tokens of a conversation: those that were really computed, as far as it is one that went on from here.

A reply that comes back as text may be other tokens than its text gives. So each
turn is remembered by its text, and the next turn's tokens are those of the
longest one remembered, followed by the tokens of what is new.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from erllama.cache import Cache
from erllama.engine import Vocabulary
from erllama.engine.phases import Script

# A character that no token joins with others, put before a text whose first word would get a space.
_FENCE = b"\x02"
# Tokens at the end of a context that a text which goes on from it need not have: a stop string's, at most.
_MOST_MISSING = 16


class History:
    """Texts and tokens of one model's conversations. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary, cache: Cache) -> None:
        self._vocabulary, self._cache = vocabulary, cache
        self._script = Script(vocabulary)
        plain = self._tokenize("a")
        whole = vocabulary.tokenize("a", add_special=True).tolist()
        at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        self._first: list[int] = whole[:at]  # BOS, where the model wants one
        spaced = bool(plain) and vocabulary.piece(plain[0]).startswith(b" ")
        self._fence = self._tokenize(_FENCE) if spaced else []

    def tokens(self, namespace: bytes, text: str, *, as_text: bool) -> NDArray[np.int32]:
        """The tokens of a rendered conversation, int32, shape (n,); special tokens are read, BOS comes once.

        Args:
            as_text: go by the text alone, whatever was computed before.
        """
        raw = text.encode()
        known = None if as_text else self._cache.longest_text(namespace, raw)
        if known is None:
            return self._of_whole(text)
        n_bytes, tokens = known
        return np.concatenate([tokens, np.array(self._following(raw[n_bytes:]), np.int32)])

    def going_on(self, context: NDArray[np.int32], text: str) -> NDArray[np.int32] | None:
        """The tokens of a text that goes on where a context ends; None where it does not.

        Args:
            context: the tokens of what was computed; the last few, such as those of a stop string, may be
                missing from the text.
        """
        raw, at, n = text.encode(), 0, 0
        tokens = context.tolist()
        if tokens[: len(self._first)] == self._first:
            n = len(self._first)
        for token in tokens[n:]:
            written = self._script.written(self._script.of_token(token))
            if not at and self._fence and written.startswith(b" ") and not raw.startswith(b" "):
                written = written[1:]  # the tokenizer's own
            if not raw.startswith(written, at):
                break
            at, n = at + len(written), n + 1
        if len(tokens) - n > _MOST_MISSING:
            return None
        return np.array(tokens[:n] + self._following(raw[at:]), np.int32)

    def remember(self, namespace: bytes, text: bytes, tokens: NDArray[np.int32]) -> None:
        """A text was computed as these tokens."""
        self._cache.remember_text(namespace, text, tokens)

    def _of_whole(self, text: str) -> NDArray[np.int32]:
        ids = self._tokenize(text)
        first = self._first if ids[: len(self._first)] != self._first else []
        return np.array(first + ids, np.int32)

    def _following(self, text: bytes) -> list[int]:
        """The tokens of a text that follows another."""
        if not text:
            return []
        n = len(self._fence)
        if n:
            ids = self._tokenize(_FENCE + text)
            if ids[:n] == self._fence:
                return ids[n:]
        return self._tokenize(text)

    def _tokenize(self, text: str | bytes) -> list[int]:
        ids: list[int] = self._vocabulary.tokenize(text, add_special=False, parse_special=True).tolist()
        return ids
