"""Bytes of tokens to text that never splits a character."""

from __future__ import annotations

import codecs


class TextDecoder:
    """Decodes UTF-8 as it arrives; holds the start of a character back until its end is there.

    Attributes:
        within: a character has begun and is not complete.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.within = False

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
