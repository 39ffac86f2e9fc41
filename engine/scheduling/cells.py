"""Counts the cells of a context: how many are in use, while sequences share some of them.

The backend does not report its cells, so the engine counts: a cell is used by a token that is computed or restored,
shared when a prefix is, and free again when the last sequence drops it. Used by `Slots`.
"""

from __future__ import annotations

from collections.abc import Iterable


class _Span:
    """Consecutive cells that belong to the same sequences."""

    __slots__ = ("n", "slots")

    def __init__(self, n: int, slots: set[int]) -> None:
        self.n = n
        self.slots = slots


class Cells:
    """The cells of one context, shared by the sequences in numbered slots.

    Attributes:
        capacity: the number of cells; lowered if the backend turns out to have fewer.
        used: the number of cells in use.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._spans: dict[int, list[_Span]] = {}

    @property
    def free(self) -> int:
        """Cells that are not in use."""
        return self.capacity - self.used

    def n_tokens(self, slot: int) -> int:
        """Return the number of tokens of a sequence."""
        return sum(span.n for span in self._spans.get(slot, ()))

    def extend(self, slot: int, n: int) -> None:
        """Add `n` cells to a sequence."""
        spans = self._spans.setdefault(slot, [])
        if spans and len(spans[-1].slots) == 1:
            spans[-1].n += n
        elif n:
            spans.append(_Span(n, {slot}))
        self.used += n

    def share(self, source: int, target: int, end: int) -> None:
        """Share the first `end` cells of a sequence with one that has none."""
        shared = self._spans.get(source, [])[: self._split(source, end)]
        for span in shared:
            span.slots.add(target)
        self._spans[target] = shared

    def cut(self, slot: int, end: int) -> None:
        """Remove the cells of a sequence from position `end` on."""
        kept = self._split(slot, end)
        spans = self._spans.get(slot, [])
        for span in spans[kept:]:
            span.slots.remove(slot)
            if not span.slots:
                self.used -= span.n
        del spans[kept:]

    def drop(self, slot: int) -> None:
        """Remove all cells of a sequence."""
        self.cut(slot, 0)
        self._spans.pop(slot, None)

    def exclusive(self, slots: Iterable[int]) -> int:
        """Return the number of cells that only these sequences use: dropping them frees as many."""
        wanted = set(slots)
        spans = {span for slot in wanted for span in self._spans.get(slot, ())}
        return sum(span.n for span in spans if span.slots <= wanted)

    def _split(self, slot: int, end: int) -> int:
        """Make a span of a sequence begin at position `end`. Returns the number of spans before it."""
        position = 0
        for i, span in enumerate(self._spans.get(slot, ())):
            if position == end:
                return i
            if position + span.n > end:
                self._divide(span, end - position)
                return i + 1
            position += span.n
        return len(self._spans.get(slot, ()))

    def _divide(self, span: _Span, n: int) -> None:
        rest = _Span(span.n - n, set(span.slots))
        span.n = n
        for slot in span.slots:
            spans = self._spans[slot]
            spans.insert(spans.index(span) + 1, rest)
