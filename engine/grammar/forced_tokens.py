"""How a model's own tokenizer writes bytes that are certain to come.

A tokenizer's last tokens may change when text follows: `"na` is other tokens
than the beginning of `"name"`. So only those are certain that it writes
whatever comes next: what the whole has in common with every part of it that
ends where a longer token could begin. Called by `engine.grammar.grammar`, which
knows the bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from erllama.engine.backend import Vocabulary

# Bytes looked at together: what comes later is spelled later.
_MAX_BYTES = 512
# Tokens before that may join with what follows.
_CONTEXT = 4
# A character that no token joins with others, put before a text whose first word would get a space.
_FENCE = b"\x02"


class Spelling:
    """Spells bytes in the tokens of one vocabulary. Thread-safe.

    Args:
        vocabulary: tokenizes; all in it are tokens of text but for those whose bytes are empty.
        pieces: the bytes of all tokens, by id.
    """

    def __init__(self, vocabulary: Vocabulary, pieces: Sequence[bytes]) -> None:
        self._vocabulary, self._pieces = vocabulary, pieces
        self._sorted = sorted({piece for piece in pieces if piece})
        self._longest = max(map(len, self._sorted), default=0)
        # A vocabulary without texts has no tokenizer either.
        first = self._tokenized(b"a")[:1] if self._sorted else []
        spaced = bool(first) and pieces[first[0]].startswith(b" ")
        self._fence = self._tokenized(_FENCE) if spaced else []

    def certain(self, data: bytes, before: Sequence[int]) -> list[int]:
        """The tokens that bytes begin with, whatever comes after them.

        Args:
            data: bytes of a text; they may end within a character.
            before: the tokens that come before, the last of them at least.

        Returns:
            ids whose bytes are the beginning of `data`; [] where none is certain.
        """
        if not self._sorted:
            return []
        data = data[:_MAX_BYTES]
        for n in range(min(_CONTEXT, len(before)), -1, -1):
            context = list(before[len(before) - n :])
            start = b"".join(self._pieces[token] for token in context)
            text = _whole_characters(start + data)
            if len(text) <= len(start):
                continue
            ids = self._spelled(text)
            if ids is not None and ids[:n] == context:
                return self._kept(text, ids, len(start), n)
        return []

    def _kept(self, text: bytes, ids: list[int], start: int, n: int) -> list[int]:
        """Of the tokens of a text those that all its possible goings on have in common, without the first n."""
        for end in range(len(text) - 1, max(start, len(text) - self._longest) - 1, -1):
            if len(ids) <= n:
                return []
            # Within a character nothing can be tokenized: what is certain before it is.
            if text[end] & 0xC0 != 0x80 and self._begins_longer(text[end:]):
                ids = _in_common(ids, self._spelled(text[:end]) or [])
        kept = ids[n:]
        # A tokenizer that changes the text, as some do with spaces, cannot be followed.
        spelled = b"".join(self._pieces[token] for token in kept)
        return kept if text.startswith(spelled, start) and all(self._pieces[token] for token in kept) else []

    def _begins_longer(self, part: bytes) -> bool:
        """Whether a token begins with `part`, and has more. A character cut in two counts as begun."""
        at = bisect_right(self._sorted, part)
        return at < len(self._sorted) and self._sorted[at].startswith(part)

    def _spelled(self, text: bytes) -> list[int] | None:
        """A text's tokens where it does not begin a text; None where that cannot be told."""
        if not self._fence:
            return self._tokenized(text)
        ids = self._tokenized(_FENCE + text)
        n = len(self._fence)
        return ids[n:] if ids[:n] == self._fence else None

    def _tokenized(self, text: bytes) -> list[int]:
        ids: list[int] = self._vocabulary.tokenize(text, add_special=False, parse_special=False).tolist()
        return ids


def _in_common(ids: list[int], others: list[int]) -> list[int]:
    n = next((at for at, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), None)
    return ids[: min(len(ids), len(others)) if n is None else n]


def _whole_characters(text: bytes) -> bytes:
    """Without the beginning of a character at the end; empty where the rest is no text."""
    for cut in range(min(4, len(text) + 1)):
        part = text[: len(text) - cut]
        try:
            part.decode()
        except UnicodeDecodeError:
            continue
        return part
    return b""
