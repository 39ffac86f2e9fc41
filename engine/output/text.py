"""Bytes of tokens to text that never splits a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

# Bytes of the longest character, without its last.
_MOST_BEGUN = 3


def unfinished(pieces: Iterable[bytes]) -> bytes:
    """The bytes of a character that some text ends within; empty where it ends with a whole one, or with none.

    Args:
        pieces: of the text, the last one first.
    """
    end = b""
    for piece in pieces:
        end = piece + end
        if not piece or len(end) > _MOST_BEGUN:
            break
    for n in range(1, min(len(end), _MOST_BEGUN) + 1):
        if end[-n] & 0xC0 != 0x80:
            decoder = TextDecoder()
            decoder.feed(end[-n:])
            return end[-n:] if decoder.within else b""
    return b""


class TextDecoder:
    """Decodes UTF-8 as it arrives; holds the start of a character back until its end is there.

    Args:
        begun: the bytes of a character that what comes may complete; they are no text of their own.

    Attributes:
        within: a character has begun and is not complete.
    """

    def __init__(self, begun: bytes = b"") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(begun)
        self.within = bool(begun)

    def feed(self, piece: bytes) -> str:
        """The text that is complete now; bytes that can be no UTF-8 become U+FFFD."""
        if not self.within and piece.isascii():
            return piece.decode()
        text = self._decoder.decode(piece)
        self.within = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never ended."""
        self.within = False
        return self._decoder.decode(b"", final=True)
