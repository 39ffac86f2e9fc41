"""Finds stop strings and markers in text that arrives in pieces, however it is cut.

`TextFinder` searches for several texts at once. `StopScanner` releases text up to the first stop string. Used by
`Reply` and `PhaseTracker`, in the model thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from erllama.engine.output.text import WHITE


class TextFinder:
    """Finds the first of several texts.

    The first by position wins. Of several that begin at one position, the shortest wins, or the `longest`. So while
    a text that would win may still be completed by the next piece, the finder waits for that piece. The outcome
    depends on the text alone, never on how it was cut into pieces.
    """

    def __init__(self, texts: Sequence[str], *, longest: bool = False) -> None:
        self._texts = tuple(dict.fromkeys(texts))
        self._sign = -1 if longest else 1
        self._first = {text[0] for text in self._texts}
        self._longest = max(map(len, self._texts), default=0)

    def __bool__(self) -> bool:
        return bool(self._texts)

    def find(self, buffer: str, *, ended: bool = False) -> tuple[int, str | None]:
        """Return the position of the first text, and the text.

        If no text matches, return None and the position before which no text can begin, even with more input.

        Args:
            ended: whether no more text follows.
        """
        found = [(at, self._sign * len(text), text) for text in self._texts if (at := buffer.find(text)) >= 0]
        partial = len(buffer) if ended else self._find_partial(buffer)
        if found:
            at, _, text = min(found)
            if at < partial or (at == partial and self._sign > 0):
                return at, text
        return partial, None

    def _find_partial(self, buffer: str) -> int:
        """Return where the first text begins that `buffer` ends within; the buffer's length if no text begins."""
        n = len(buffer)
        for at in range(max(n - self._longest + 1, 0), n):
            if buffer[at] in self._first:
                rest = buffer[at:]
                if any(len(text) > n - at and text.startswith(rest) for text in self._texts):
                    return at
        return n


class StopScanner:
    """Releases text up to the first stop string.

    A stop string of white space alone is not searched for in the white space between another phase and a text.
    Otherwise the white space that ends every thought would end the answer before it began.

    Attributes:
        matched: the stop string that was found; all text after it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = TextFinder(stops)
        self._visible_stops = TextFinder([text for text in stops if text.strip(WHITE)])
        self._in_leading_white = False
        self._buffer = ""
        self.matched: str | None = None

    @property
    def holding(self) -> bool:
        """Whether some text is not released yet."""
        return bool(self._buffer)

    def begin(self) -> None:
        """Begin a text that follows another phase."""
        self._in_leading_white = True

    def feed(self, text: str) -> str:
        """Add the next piece. Returns the text that is released."""
        if not self._stops:
            return text
        return self._release(text, ended=False)

    def flush(self) -> str:
        """End a text. Returns the rest of it, which is not a stop string. Another text may follow."""
        return self._release("", ended=True)

    def _release(self, text: str, *, ended: bool) -> str:
        if self.matched is not None:
            return ""
        buffer = self._buffer + text
        at, self.matched = self._find(buffer, ended)
        self._buffer = "" if self.matched is not None else buffer[at:]
        return buffer[:at]

    def _find(self, buffer: str, ended: bool) -> tuple[int, str | None]:
        if not self._in_leading_white:
            return self._stops.find(buffer, ended=ended)
        begin = len(buffer) - len(buffer.lstrip(WHITE))
        at, found = self._visible_stops.find(buffer, ended=ended)
        if at < begin or begin == len(buffer):
            return at, found
        self._in_leading_white = False
        at, found = self._stops.find(buffer[begin:], ended=ended)
        return begin + at, found
