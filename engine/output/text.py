"""Decodes the bytes of tokens as text, without ever splitting a character.

Used by `Reply` and the chats' history. Also defines the white space between the parts of a reply.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from erllama.engine.backend import Vocabulary

# The white space that belongs to no phase of a reply, and to no tool call.
WHITE = " \t\r\n"
# Bytes of the longest character, without its last.
_MAX_BEGUN = 3


def unfinished(pieces: Iterable[bytes]) -> bytes:
    """Return the bytes of the character that a text ends within; empty if it ends with a complete one.

    Args:
        pieces: of the text, the last one first.
    """
    end = b""
    for piece in pieces:
        end = piece + end
        if not piece or len(end) > _MAX_BEGUN:
            break
    for n in range(1, min(len(end), _MAX_BEGUN) + 1):
        if end[-n] & 0xC0 != 0x80:
            decoder = TextDecoder()
            decoder.feed(end[-n:])
            return end[-n:] if decoder.within else b""
    return b""


class TextDecoder:
    """Decodes UTF-8 as it arrives, and buffers the start of a character until its end arrives.

    Args:
        partial: the bytes of a character that the next bytes may complete; they are no text of their own.

    Attributes:
        within: whether a character has begun and is not complete.
    """

    def __init__(self, partial: bytes = b"") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(partial)
        self.within = bool(partial)

    def feed(self, piece: bytes) -> str:
        """Return the text that is complete now. Bytes that cannot be UTF-8 become U+FFFD."""
        if not self.within and piece.isascii():
            return piece.decode()
        text = self._decoder.decode(piece)
        self.within = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        """Return the rest: U+FFFD for a character that never ended."""
        self.within = False
        return self._decoder.decode(b"", final=True)


class TokenDecoder:
    """Decodes the tokens of one reply as text.

    Args:
        vocabulary: the model's vocabulary.
        partial: as for `TextDecoder`.
    """

    def __init__(self, vocabulary: Vocabulary, partial: bytes = b"") -> None:
        self._vocabulary = vocabulary
        self._text = TextDecoder(partial)

    def feed(self, token: int) -> str:
        """Return the text that is complete now."""
        return self._text.feed(self._vocabulary.piece(token))

    def finish(self) -> str:
        """Return the rest, as `TextDecoder.finish` does."""
        return self._text.finish()
