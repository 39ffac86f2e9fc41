"""Automata of regular expressions: whether one expression can extend a text of another.

Expressions become position automata (Glushkov, 1961). A walk over two automata makes them deterministic state by
state, as far as it needs. Large counted repetitions count as unlimited, so an answer may include too much but never
too little. `engine.grammar.terminals` calls this.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from erllama.engine.grammar.expressions import MAX_CODE_POINT, ExpressionKind, ExpressionPool, Ranges

# The first byte of a token reference: no character begins with it.
TOKEN = 1 << 0xFF
# Characters up to which counted repetitions are unrolled. Larger ones count as unlimited.
_MAX_UNROLLED = 64
# Positions and pairs of moves that all walks together may visit: about half a second.
_MAX_STEPS = 500_000


class TooLarge(Exception):  # noqa: N818 - not an error: the caller falls back to single characters
    """The walks would take too long."""


class Move(NamedTuple):
    """The positions that characters of some segments lead to. Both sets are bit sets."""

    segments: int
    state: int


def members(bits: int, start: int = 0) -> Iterator[int]:
    """Yield the members of a bit set, in order; the lowest bit stands for `start`."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1 + start
        bits ^= low


class Automata:
    """The automata of a grammar's expressions, with cached results for pairs of them."""

    def __init__(self, pool: ExpressionPool) -> None:
        self._pool = pool
        self._edges = self._segment_edges()
        self._automata: dict[int, _Automaton] = {}
        self._pairs: dict[tuple[int, int], tuple[set[int], bool]] = {}
        self._steps = 0

    def first_bytes(self, id: int | None) -> int:
        """Return the set of first bytes of the texts of an expression; None stands for a token."""
        return TOKEN if id is None else self._automaton(id).first_bytes(_START)

    def can_extend(self, left: int, right: int, after: int) -> bool:
        """Return whether `right` has a text that is a text of `left`, then a byte of `after`, and any rest."""
        ends, _ = self._pair(left, right)
        return any(self._automaton(right).first_bytes(state) & after for state in ends)

    def cut_points(self, left: int, right: int, after: int) -> set[int]:
        """Where to cut the sequence `right` so that it no longer extends a text of `left`.

        Returns:
            the indices of the parts that must begin a new terminal; empty if `right` is not a sequence.
        """
        ends, _ = self._pair(left, right)
        return self._automaton(right).cut_points(ends, after)

    def overlap(self, left: int | None, right: int | None) -> bool:
        """Return whether both expressions have a text in common."""
        if left is None or right is None:
            return left is right
        return self._pair(left, right)[1]

    def segments(self, ranges: Ranges) -> int:
        """Return ranges of code points as a bit set of segments.

        The edges of all the grammar's ranges delimit the segments.
        """
        bits = 0
        for low, high in ranges:
            bits |= (1 << bisect_left(self._edges, high + 1)) - (1 << bisect_left(self._edges, low))
        return bits

    def count_steps(self, n: int) -> None:
        """Count steps. Raises TooLarge beyond the limit."""
        self._steps += n
        if self._steps > _MAX_STEPS:
            raise TooLarge

    def _segment_edges(self) -> list[int]:
        edges = {0, MAX_CODE_POINT + 1}
        for id in self._pool.character_classes():
            for low, high in self._pool.ranges(id):
                edges |= {low, high + 1}
        return sorted(edges)

    def _automaton(self, id: int) -> _Automaton:
        if id not in self._automata:
            self._automata[id] = _Automaton(self, self._pool, id)
        return self._automata[id]

    def _pair(self, left: int, right: int) -> tuple[set[int], bool]:
        """Return the states of `right` after a text of `left`, and whether both may end in one of them."""
        if (left, right) not in self._pairs:
            a, b = self._automaton(left), self._automaton(right)
            if a.first_bytes(_START) & b.first_bytes(_START) or left == right:
                self._pairs[left, right] = self._walk(a, b)
            else:
                self._pairs[left, right] = (set(), False)
        return self._pairs[left, right]

    def _walk(self, a: _Automaton, b: _Automaton) -> tuple[set[int], bool]:
        ends: set[int] = set()
        start = (_START, _START)
        found, pending = {start}, [start]
        while pending:
            left, right = pending.pop()
            if left & a.last:
                ends.add(right)
            moves = b.moves(right)
            # An automaton walked beside itself is in one state.
            pairs = zip(moves, moves, strict=True) if a is b else product(a.moves(left), moves)
            for (left_segments, left_state), (right_segments, right_state) in pairs:
                self.count_steps(1)
                if left_segments & right_segments and (left_state, right_state) not in found:
                    found.add((left_state, right_state))
                    pending.append((left_state, right_state))
        return ends, any(state & b.last for state in ends)


# The state before the first character: the bit of no position.
_START = 1


class _Automaton:
    """The position automaton of an expression.

    Positions from 1 on are the characters of the expression. A state is the set of positions just read.
    """

    def __init__(self, automata: Automata, pool: ExpressionPool, id: int) -> None:
        self._automata, self._pool = automata, pool
        self._segments: list[int] = [0]
        self._bytes: list[int] = [0]
        self._follow: list[int] = [0]
        self._moves: dict[int, list[Move]] = {}
        # The first position of each part of a sequence.
        self._parts: list[int] = []
        expression = pool[id]
        if expression.kind is ExpressionKind.SEQUENCE:
            built = []
            for part in expression.parts:
                self._parts.append(len(self._segments))
                built.append(self._build(part))
            _, self._follow[0], self.last = self._concatenate(built)
        else:
            _, self._follow[0], self.last = self._build(id)
        self.everywhere = (1 << len(self._segments)) - 1

    def cut_points(self, states: set[int], after: int) -> set[int]:
        """Return the parts that continue from the states with a byte of `after`."""
        found: set[int] = set()
        for position in {position for state in states for position in members(state)}:
            for next_ in members(self._follow[position]):
                if self._bytes[next_] & after:
                    part, next_part = self._part(position), self._part(next_)
                    found |= {part, part + 1} if part == next_part else {part + 1}
        return {cut for cut in found if 0 < cut < len(self._parts)}

    def _part(self, position: int) -> int:
        return bisect_right(self._parts, position) - 1

    def first_bytes(self, state: int) -> int:
        """Return the set of first bytes of the characters that may come next."""
        bits = 0
        for position in members(self._next(state)):
            bits |= self._bytes[position]
        return bits

    def moves(self, state: int) -> list[Move]:
        if state not in self._moves:
            self._moves[state] = self._split_by_segment(self._next(state))
        return self._moves[state]

    def _next(self, state: int) -> int:
        self._automata.count_steps(state.bit_count())
        bits = 0
        for position in members(state):
            bits |= self._follow[position]
        return bits

    def _split_by_segment(self, positions: int) -> list[Move]:
        self._automata.count_steps(positions.bit_count())
        by_segments: dict[int, int] = {}
        for position in members(positions):
            segments = self._segments[position]
            by_segments[segments] = by_segments.get(segments, 0) | 1 << position
        moves: list[Move] = []
        for segments, state in by_segments.items():
            self._automata.count_steps(len(moves))
            rest, divided = segments, []
            for move in moves:
                if both := move.segments & segments:
                    divided.append(Move(both, move.state | state))
                if only := move.segments & ~segments:
                    divided.append(Move(only, move.state))
                rest &= ~move.segments
            moves = [*divided, Move(rest, state)] if rest else divided
        return moves

    def _build(self, id: int) -> tuple[bool, int, int]:
        """Add the positions of an expression. Recurses.

        Returns:
            whether it may be empty, and its first and last positions.
        """
        expression = self._pool[id]
        if expression.kind is ExpressionKind.CHARS:
            ranges = self._pool.ranges(id)
            self._segments.append(self._automata.segments(ranges))
            self._bytes.append(_lead_bytes(ranges))
            self._follow.append(0)
            here = 1 << len(self._segments) - 1
            return False, here, here
        if expression.kind is ExpressionKind.SEQUENCE:
            return self._concatenate([self._build(part) for part in expression.parts])
        if expression.kind is ExpressionKind.CHOICE:
            options = [self._build(part) for part in expression.parts]
            first = last = 0
            for _, begins, ends in options:
                first, last = first | begins, last | ends
            return any(option[0] for option in options), first, last
        return self._build_repeat(expression.parts[0], *self._pool.bounds(id))

    def _build_repeat(self, id: int, minimum: int, maximum: int | None) -> tuple[bool, int, int]:
        size = self._pool[id].size * self._pool[id].repetitions * max(minimum, maximum or 0, 1)
        if size > _MAX_UNROLLED and (minimum, maximum) != (0, 1):
            minimum, maximum = min(minimum, 1), None
        copies = [self._build(id) for _ in range(max(minimum, maximum or 0, 1))]
        if maximum is None:
            _, first, last = copies[-1]
            for position in members(last):
                self._follow[position] |= first
        return self._concatenate([(copy[0] or at >= minimum, *copy[1:]) for at, copy in enumerate(copies)])

    def _concatenate(self, parts: list[tuple[bool, int, int]]) -> tuple[bool, int, int]:
        empty, first, last = True, 0, 0
        for may_be_empty, begins, ends in parts:
            for position in members(last):
                self._follow[position] |= begins
            first |= begins if empty else 0
            last = ends | (last if may_be_empty else 0)
            empty = empty and may_be_empty
        return empty, first, last


def _lead_bytes(ranges: Ranges) -> int:
    """Return the set of first bytes of characters in UTF-8. The bytes rise with the code points."""
    bits = 0
    for low, high in ranges:
        first, last = (chr(point).encode()[0] for point in (low, high))
        bits |= (1 << last + 1) - (1 << first)
    return bits
