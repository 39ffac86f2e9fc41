"""`LlamaTokenizer`: the tokenizer of a loaded model, in llama-cpp-python's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class _Tokenizes(Protocol):
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes: ...


class LlamaTokenizer:
    """Converts text to tokens and back, with the vocabulary of a `Llama`."""

    def __init__(self, llama: _Tokenizes) -> None:
        self._llama = llama

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """Return the ids of a text in UTF-8."""
        return self._llama.tokenize(text, add_bos, special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of tokens."""
        return self._llama.detokenize(tokens, prev_tokens, special)

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        """Return the ids of a text."""
        return self.tokenize(text.encode("utf-8", "ignore"), add_bos, special)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without incomplete characters."""
        return self.detokenize(tokens).decode("utf-8", "ignore")
