"""Encodes tokens as strings in which markers are found across the borders of tokens.

An encoded string has one character for each byte of text (0 to 255), and one character of its own for each token
that has no text: a special token. So a marker is found however it is split into tokens, a special token is never
mistaken for its name written out, and one search serves both. Used by the output parsers and by chats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from erllama.engine.backend import Vocabulary
from erllama.errors import OptionError

_SPECIAL = 0x100  # the characters from here on encode special tokens


class TokenCodec:
    """Encodes and decodes the tokens of one vocabulary. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    # --- encoding

    def encode_token(self, token: int) -> str:
        """Encode one token."""
        piece = self._vocabulary.piece(token)
        return piece.decode("latin-1") if piece else chr(_SPECIAL + token)

    def encode_tokens(self, tokens: Iterable[int]) -> str:
        """Encode several tokens."""
        return "".join(map(self.encode_token, tokens))

    def encode_marker(self, text: str) -> str:
        """Encode a text in which special tokens are spelled out.

        Raises:
            OptionError: it has no tokens.
        """
        return self._encode(text, self.tokenize(text))

    def encode_text(self, text: str) -> str:
        """Encode a text in which special tokens are spelled out; one that has no tokens is encoded as bytes."""
        ids = self._vocabulary.tokenize(text, add_special=False, parse_special=True)
        return self._encode(text, ids.tolist())

    def _encode(self, text: str, ids: Iterable[int]) -> str:
        rest, encoded = text.encode(), ""
        for token in ids:
            if not self._vocabulary.piece(token):
                name = self._vocabulary.detokenize([token], special=True)
                before, found, after = rest.partition(name) if name else (rest, b"", b"")
                if found:
                    encoded += before.decode("latin-1") + chr(_SPECIAL + token)
                    rest = after
        return encoded + rest.decode("latin-1")

    # --- tokens

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a marker, or of a text that is inserted into a reply.

        Raises:
            OptionError: the tokenizer returns no tokens.
        """
        ids: list[int] = self._vocabulary.tokenize(text, add_special=False, parse_special=True).tolist()
        if not ids:
            raise OptionError(f"the marker {text!r} has no tokens in this model's vocabulary")
        return ids

    def exact_tokens(self, encoded: str) -> list[int]:
        """Return tokens that encode to exactly this string; [] if the tokenizer returns others."""
        try:
            ids: list[int] = self._vocabulary.tokenize(
                self.decode(encoded).decode(), add_special=False, parse_special=True
            ).tolist()
        except UnicodeDecodeError:
            return []
        return ids if self.encode_tokens(ids) == encoded else []

    def special_token(self, character: str) -> int:
        """Return the special token that a character encodes."""
        return ord(character) - _SPECIAL

    # --- decoding

    def text_bytes(self, encoded: str) -> bytes:
        """Return the text alone, without special tokens."""
        if encoded.isascii():
            return bytes(map(ord, encoded))
        return bytes([c for c in map(ord, encoded) if c < _SPECIAL])

    def decode(self, encoded: str) -> bytes:
        """Return the text, special tokens spelled out."""
        if encoded.isascii():
            return encoded.encode()
        return b"".join(
            bytes([code]) if code < _SPECIAL else self._vocabulary.detokenize([code - _SPECIAL], special=True)
            for code in map(ord, encoded)
        )

    def split(self, encoded: str) -> Iterator[bytes | int]:
        """Yield the texts and the special tokens, in order."""
        text = bytearray()
        for code in map(ord, encoded):
            if code < _SPECIAL:
                text.append(code)
                continue
            if text:
                yield bytes(text)
                text.clear()
            yield code - _SPECIAL
        if text:
            yield bytes(text)
