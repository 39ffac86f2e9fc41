"""Finds stop strings in a text that comes in pieces, wherever the pieces are cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Lets text through up to the first stop string.

    The first by position wins; of several that begin at one place, the shortest.
    So where a stop string is complete while a longer one that began before it
    may still become so, both are held back until that is known. The outcome
    depends on the text alone, never on how it was cut into pieces.

    Attributes:
        matched: the stop string that was found; nothing comes after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._first = {stop[0] for stop in self._stops}
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    @property
    def holding(self) -> bool:
        """Whether text is held back."""
        return bool(self._held)

    def feed(self, text: str) -> str:
        """Take the next piece; the text that can be let go."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        self._held += text
        found = self._complete()
        begun = self._begun()
        if found is not None and found[0] <= begun:
            return self._stop(*found)
        released, self._held = self._held[:begun], self._held[begun:]
        return released

    def finish(self) -> str:
        """The end of the text: what was held back and is no stop string."""
        if self.matched is None and (found := self._complete()) is not None:
            return self._stop(*found)
        released, self._held = self._held, ""
        return released

    def _stop(self, at: int, stop: str) -> str:
        released, self._held = self._held[:at], ""
        self.matched = stop
        return released

    def _complete(self) -> tuple[int, str] | None:
        """The first stop string that is there as a whole, and where."""
        found = [(at, len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        at, _, stop = min(found)
        return at, stop

    def _begun(self) -> int:
        """Where the first stop string begins that the held text ends within; the text's length if none does."""
        n = len(self._held)
        for at in range(max(n - self._longest + 1, 0), n):
            if self._held[at] in self._first:
                rest = self._held[at:]
                if any(len(stop) > n - at and stop.startswith(rest) for stop in self._stops):
                    return at
        return n
