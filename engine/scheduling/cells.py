"""Counts the cells of a context: how many are free, where sequences share some of them.

A backend need not tell: every cell is taken by a token that is computed or
restored, shared when a prefix is, and free again when its last holder lets go.
"""

from __future__ import annotations

from collections.abc import Iterable


class _Span:
    """Cells that follow one another in every sequence that holds them."""

    __slots__ = ("holders", "n")

    def __init__(self, n: int, holders: set[int]) -> None:
        self.n = n
        self.holders = holders


class Cells:
    """The cells of one context, `capacity` of them, held by numbered sequences.

    Attributes:
        capacity: how many there are; lowered where the backend turns out to have fewer.
        used: how many are held.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._spans: dict[int, list[_Span]] = {}

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def held(self, number: int) -> int:
        """Positions of a sequence."""
        return sum(span.n for span in self._spans.get(number, ()))

    def extend(self, number: int, n: int) -> None:
        """A sequence takes `n` more."""
        spans = self._spans.setdefault(number, [])
        if spans and len(spans[-1].holders) == 1:
            spans[-1].n += n
        elif n:
            spans.append(_Span(n, {number}))
        self.used += n

    def share(self, source: int, target: int, end: int) -> None:
        """A sequence that holds nothing gets the first `end` of another."""
        shared = self._spans.get(source, [])[: self._split(source, end)]
        for span in shared:
            span.holders.add(target)
        self._spans[target] = shared

    def cut(self, number: int, end: int) -> None:
        """A sequence lets go of all from `end` on."""
        kept = self._split(number, end)
        spans = self._spans.get(number, [])
        for span in spans[kept:]:
            span.holders.remove(number)
            if not span.holders:
                self.used -= span.n
        del spans[kept:]

    def drop(self, number: int) -> None:
        """A sequence lets go of everything."""
        self.cut(number, 0)
        self._spans.pop(number, None)

    def only_of(self, numbers: Iterable[int]) -> int:
        """Cells that nobody else holds: what dropping these sequences frees."""
        wanted = set(numbers)
        spans = {span for number in wanted for span in self._spans.get(number, ())}
        return sum(span.n for span in spans if span.holders <= wanted)

    def _split(self, number: int, end: int) -> int:
        """Make a span of `number` begin at `end`; the count of those before it."""
        position = 0
        for i, span in enumerate(self._spans.get(number, ())):
            if position == end:
                return i
            if position + span.n > end:
                self._divide(span, end - position)
                return i + 1
            position += span.n
        return len(self._spans.get(number, ()))

    def _divide(self, span: _Span, n: int) -> None:
        rest = _Span(span.n - n, set(span.holders))
        span.n = n
        for holder in span.holders:
            spans = self._spans[holder]
            spans.insert(spans.index(span) + 1, rest)
