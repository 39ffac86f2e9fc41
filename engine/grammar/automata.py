"""What two regular expressions read alike: whether one goes on where a text of the other ends.

Expressions become automata of positions (Glushkov, 1961), which are made
deterministic state by state, as far as two of them are walked side by side.
Counted repetitions are taken for endless where they are large: answers may be
too many, never too few.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from erllama.engine.grammar.expressions import MAX_CODE_POINT, Kind, Pool, Ranges

# What references to tokens begin with: a byte that no character does.
TOKEN = 1 << 0xFF
# Counted repetitions are written out up to so many characters, and taken for endless above.
_WRITTEN_OUT = 64
# Positions and pairs of moves that all walks together may look at: about half a second.
_MAX_STEPS = 500_000


class TooLarge(Exception):  # noqa: N818 - not an error: there is another way
    """The walks would take too long."""


class Move(NamedTuple):
    """The positions reached by characters of some segments; both sets are the bits of an integer."""

    segments: int
    state: int


def members(bits: int, start: int = 0) -> Iterator[int]:
    """The positions of the ones in an integer, in order, counted from `start`."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1 + start
        bits ^= low


class Automata:
    """The automata of a grammar's expressions, and what is known of pairs of them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._edges = self._segment_edges()
        self._automata: dict[int, _Automaton] = {}
        self._pairs: dict[tuple[int, int], tuple[set[int], bool]] = {}
        self._steps = 0

    def begins(self, id: int | None) -> int:
        """The bytes that texts of an expression begin with; None stands for a token."""
        return TOKEN if id is None else self._automaton(id).begins(_START)

    def goes_on(self, one: int, other: int, after: int) -> bool:
        """Whether `other` has a text that begins with a text of `one` and then a byte of `after`."""
        ends, _ = self._pair(one, other)
        return any(self._automaton(other).begins(state) & after for state in ends)

    def cuts(self, one: int, other: int, after: int) -> set[int]:
        """Where to cut `other`, a sequence, so that it ends where `goes_on` found it going on.

        Returns:
            indices of parts that are to begin something new; empty where it is no sequence.
        """
        ends, _ = self._pair(one, other)
        return self._automaton(other).cuts(ends, after)

    def meet(self, one: int | None, other: int | None) -> bool:
        """Whether both have some text in common."""
        if one is None or other is None:
            return one is other
        return self._pair(one, other)[1]

    def segments(self, ranges: Ranges) -> int:
        """Ranges of code points as a set of the segments between all edges of the grammar's ranges."""
        bits = 0
        for low, high in ranges:
            bits |= (1 << bisect_left(self._edges, high + 1)) - (1 << bisect_left(self._edges, low))
        return bits

    def step(self, n: int) -> None:
        """Count steps, or raise TooLarge."""
        self._steps += n
        if self._steps > _MAX_STEPS:
            raise TooLarge

    def _segment_edges(self) -> list[int]:
        edges = {0, MAX_CODE_POINT + 1}
        for id in self._pool.all_chars():
            for low, high in self._pool.ranges(id):
                edges |= {low, high + 1}
        return sorted(edges)

    def _automaton(self, id: int) -> _Automaton:
        if id not in self._automata:
            self._automata[id] = _Automaton(self, self._pool, id)
        return self._automata[id]

    def _pair(self, one: int, other: int) -> tuple[set[int], bool]:
        """The states of `other` where `one` has ended, and whether both may end in one."""
        if (one, other) not in self._pairs:
            a, b = self._automaton(one), self._automaton(other)
            if a.begins(_START) & b.begins(_START) or one == other:
                self._pairs[one, other] = self._walked(a, b)
            else:
                self._pairs[one, other] = (set(), False)
        return self._pairs[one, other]

    def _walked(self, a: _Automaton, b: _Automaton) -> tuple[set[int], bool]:
        ends: set[int] = set()
        start = (_START, _START)
        found, open_ = {start}, [start]
        while open_:
            one, other = open_.pop()
            if one & a.last:
                ends.add(other)
            moves = b.moves(other)
            # Side by side with itself, an automaton is in one state.
            pairs = zip(moves, moves, strict=True) if a is b else product(a.moves(one), moves)
            for (segments, state), (others, there) in pairs:
                self.step(1)
                if segments & others and (state, there) not in found:
                    found.add((state, there))
                    open_.append((state, there))
        return ends, any(state & b.last for state in ends)


# The state before the first character; the bit of no position.
_START = 1


class _Automaton:
    """Positions 1 and up are the characters of an expression; a state is the set of those just read."""

    def __init__(self, automata: Automata, pool: Pool, id: int) -> None:
        self._automata, self._pool = automata, pool
        self._segments: list[int] = [0]
        self._bytes: list[int] = [0]
        self._follow: list[int] = [0]
        self._moves: dict[int, list[Move]] = {}
        # The first position of each part of a sequence.
        self._parts: list[int] = []
        expression = pool[id]
        if expression.kind is Kind.SEQUENCE:
            built = []
            for part in expression.parts:
                self._parts.append(len(self._segments))
                built.append(self._built(part))
            _, self._follow[0], self.last = self._chained(built)
        else:
            _, self._follow[0], self.last = self._built(id)
        self.everywhere = (1 << len(self._segments)) - 1

    def cuts(self, states: set[int], after: int) -> set[int]:
        """The parts that begin, or hold, what goes on from the states with a byte of `after`."""
        found: set[int] = set()
        for position in {position for state in states for position in members(state)}:
            for next_ in members(self._follow[position]):
                if self._bytes[next_] & after:
                    ended, goes_on = self._part(position), self._part(next_)
                    found |= {ended, ended + 1} if ended == goes_on else {ended + 1}
        return {cut for cut in found if 0 < cut < len(self._parts)}

    def _part(self, position: int) -> int:
        return bisect_right(self._parts, position) - 1

    def begins(self, state: int) -> int:
        """The bytes that characters read next begin with."""
        bits = 0
        for position in members(self._next(state)):
            bits |= self._bytes[position]
        return bits

    def moves(self, state: int) -> list[Move]:
        if state not in self._moves:
            self._moves[state] = self._divided(self._next(state))
        return self._moves[state]

    def _next(self, state: int) -> int:
        self._automata.step(state.bit_count())
        bits = 0
        for position in members(state):
            bits |= self._follow[position]
        return bits

    def _divided(self, positions: int) -> list[Move]:
        self._automata.step(positions.bit_count())
        by_segments: dict[int, int] = {}
        for position in members(positions):
            segments = self._segments[position]
            by_segments[segments] = by_segments.get(segments, 0) | 1 << position
        moves: list[Move] = []
        for segments, state in by_segments.items():
            self._automata.step(len(moves))
            rest, divided = segments, []
            for move in moves:
                if both := move.segments & segments:
                    divided.append(Move(both, move.state | state))
                if only := move.segments & ~segments:
                    divided.append(Move(only, move.state))
                rest &= ~move.segments
            moves = [*divided, Move(rest, state)] if rest else divided
        return moves

    def _built(self, id: int) -> tuple[bool, int, int]:
        """Whether it may be empty, and the positions it begins and ends with. As deep as lexemes may be."""
        expression = self._pool[id]
        if expression.kind is Kind.CHARS:
            ranges = self._pool.ranges(id)
            self._segments.append(self._automata.segments(ranges))
            self._bytes.append(_lead_bytes(ranges))
            self._follow.append(0)
            here = 1 << len(self._segments) - 1
            return False, here, here
        if expression.kind is Kind.SEQUENCE:
            return self._chained([self._built(part) for part in expression.parts])
        if expression.kind is Kind.CHOICE:
            options = [self._built(part) for part in expression.parts]
            first = last = 0
            for _, begins, ends in options:
                first, last = first | begins, last | ends
            return any(option[0] for option in options), first, last
        return self._repeated(expression.parts[0], *self._pool.bounds(id))

    def _repeated(self, id: int, least: int, most: int | None) -> tuple[bool, int, int]:
        size = self._pool[id].size * self._pool[id].repetitions * max(least, most or 0, 1)
        if size > _WRITTEN_OUT and (least, most) != (0, 1):
            least, most = min(least, 1), None
        copies = [self._built(id) for _ in range(max(least, most or 0, 1))]
        if most is None:
            _, first, last = copies[-1]
            for position in members(last):
                self._follow[position] |= first
        return self._chained([(copy[0] or at >= least, *copy[1:]) for at, copy in enumerate(copies)])

    def _chained(self, parts: list[tuple[bool, int, int]]) -> tuple[bool, int, int]:
        empty, first, last = True, 0, 0
        for may_be_empty, begins, ends in parts:
            for position in members(last):
                self._follow[position] |= begins
            first |= begins if empty else 0
            last = ends | (last if may_be_empty else 0)
            empty = empty and may_be_empty
        return empty, first, last


def _lead_bytes(ranges: Ranges) -> int:
    """The first bytes of characters in UTF-8. They rise with the code point, so those of a range are a range."""
    bits = 0
    for low, high in ranges:
        first, last = (chr(point).encode()[0] for point in (low, high))
        bits |= (1 << last + 1) - (1 << first)
    return bits
