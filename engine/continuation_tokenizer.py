"""The tokenizer for text that continues other text, without the space before a first word.

SentencePiece-like tokenizers put a space before a text. A text that continues another one must not get that space.
So it is tokenized behind a fence, a character that no token joins with others, and the fence's tokens are removed.
The chat's history and the forced tokens of grammars use it.
"""

from __future__ import annotations

from erllama.engine.backend import Vocabulary

_FENCE = b"\x02"


class ContinuationTokenizer:
    """Tokenizes texts that continue others. Thread-safe.

    Args:
        vocabulary: a vocabulary with a tokenizer.

    Attributes:
        adds_space: whether the tokenizer puts a space before a text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._word = self._tokenize(b"a")
        self.adds_space = bool(self._word) and vocabulary.piece(self._word[0]).startswith(b" ")
        self._fence = self._tokenize(_FENCE) if self.adds_space else []

    def tokenize(self, text: bytes, *, parse_special: bool = False) -> list[int] | None:
        """Return the tokens of a text that does not begin a text; None if the fence joins with the text.

        Args:
            parse_special: read the text of special tokens as those tokens.
        """
        if not self._fence:
            return self._tokenize(text, parse_special=parse_special)
        ids = self._tokenize(_FENCE + text, parse_special=parse_special)
        n = len(self._fence)
        return ids[n:] if ids[:n] == self._fence else None

    def adds_space_after(self, token: int, text: bytes) -> bool:
        """Return whether the tokenizer also puts a space before the text that follows a token.

        Args:
            text: the token's text, with special tokens written out.
        """
        return self._tokenize(_FENCE + text + b"a", parse_special=True) == [*self._fence, token, *self._word]

    def _tokenize(self, text: bytes, *, parse_special: bool = False) -> list[int]:
        ids: list[int] = self._vocabulary.tokenize(text, add_special=False, parse_special=parse_special).tolist()
        return ids
