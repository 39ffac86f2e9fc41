"""Finds texts in a text that comes in pieces, wherever the pieces are cut: stop strings, and markers of phases."""

from __future__ import annotations

from collections.abc import Sequence

# What belongs to nobody between the phases of a reply.
WHITE = " \t\r\n"


class TextFinder:
    """Finds the first of several texts.

    The first by position wins; of several that begin at one place, the shortest,
    or the `longest`. So where one is complete while another that wins over it may
    still become so, that is to be awaited. The outcome depends on the text alone,
    never on how it was cut into pieces.
    """

    def __init__(self, texts: Sequence[str], *, longest: bool = False) -> None:
        self._texts = tuple(dict.fromkeys(texts))
        self._sign = -1 if longest else 1
        self._first = {text[0] for text in self._texts}
        self._longest = max(map(len, self._texts), default=0)

    def __bool__(self) -> bool:
        return bool(self._texts)

    def find(self, held: str, *, ended: bool = False) -> tuple[int, str | None]:
        """Where the first text is, and which; or, and None, up to where there is none, whatever comes next.

        Args:
            ended: nothing comes next.
        """
        found = [(at, self._sign * len(text), text) for text in self._texts if (at := held.find(text)) >= 0]
        begun = len(held) if ended else self._begun(held)
        if found:
            at, _, text = min(found)
            if at < begun or (at == begun and self._sign > 0):
                return at, text
        return begun, None

    def _begun(self, held: str) -> int:
        """Where the first text begins that `held` ends within; the length of `held` if none does."""
        n = len(held)
        for at in range(max(n - self._longest + 1, 0), n):
            if held[at] in self._first:
                rest = held[at:]
                if any(len(text) > n - at and text.startswith(rest) for text in self._texts):
                    return at
        return n


class StopScanner:
    """Lets text through up to the first stop string.

    White space that is nobody's, before a text that follows another phase, is no
    place for a stop string of white space alone: what every thought ends with
    would else end the answer before it began.

    Attributes:
        matched: the stop string that was found; nothing comes after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = TextFinder(stops)
        self._written = TextFinder([text for text in stops if text.strip(WHITE)])
        self._leading = False
        self._held = ""
        self.matched: str | None = None

    @property
    def holding(self) -> bool:
        """Whether text is held back."""
        return bool(self._held)

    def begin(self) -> None:
        """Another text begins, and white space before it is nobody's."""
        self._leading = True

    def feed(self, text: str) -> str:
        """Take the next piece; the text that can be let go."""
        if not self._stops:
            return text
        return self._let_go(text, ended=False)

    def flush(self) -> str:
        """The end of a text: what was held back and is no stop string. Another text may follow."""
        return self._let_go("", ended=True)

    def _let_go(self, text: str, *, ended: bool) -> str:
        if self.matched is not None:
            return ""
        held = self._held + text
        at, self.matched = self._find(held, ended)
        self._held = "" if self.matched is not None else held[at:]
        return held[:at]

    def _find(self, held: str, ended: bool) -> tuple[int, str | None]:
        if not self._leading:
            return self._stops.find(held, ended=ended)
        begin = len(held) - len(held.lstrip(WHITE))
        at, found = self._written.find(held, ended=ended)
        if at < begin or begin == len(held):
            return at, found
        self._leading = False
        at, found = self._stops.find(held[begin:], ended=ended)
        return begin + at, found
