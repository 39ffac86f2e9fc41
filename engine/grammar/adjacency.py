"""The adjacency of terminals: which may follow each other, and which are possible together.

`engine.grammar.terminals` uses it to find the terminals that the lexer could read too far.
"""

from __future__ import annotations

from erllama.engine.grammar.automata import Automata, TooLarge, members
from erllama.engine.grammar.expressions import (
    ExpressionKind,
    ExpressionPool,
    satisfying,
    strongly_connected_components,
)

# Pairs of terminals, about a second's work. Beyond it every character becomes a terminal.
MAX_PAIRS = 200_000


class Adjacency:
    """Which terminals may follow each other, and which are possible at the same place, as bit sets by number.

    Attributes:
        expressions: by number, the expression that a terminal reads; None for a token reference.
        sources: by the expression that a terminal reads, the expression that became the terminal.
        follow: by number, the terminals that may come next.
        possible_with: by number, the terminals that are possible at the same place.
        size: the number of expressions.
        n_pairs: the number of pairs of terminals that may follow each other or are possible at the same place.
    """

    def __init__(self, pool: ExpressionPool, rules: dict[str, int], root: str) -> None:
        self._pool, self._rules = pool, rules
        self._ids = sorted({id for rule in rules.values() for id in pool.descendants(rule)})
        self.size = len(self._ids)
        leaves = [id for id in self._ids if pool[id].kind in (ExpressionKind.TERMINAL, ExpressionKind.TOKEN)]
        self._number = {leaf: at for at, leaf in enumerate(leaves)}
        self.sources: dict[int, int] = {}
        self.expressions: list[int | None] = []
        for leaf in leaves:
            source = pool[leaf].value
            self.expressions.append(pool.nonempty(source) if isinstance(source, int) else None)
            if isinstance(source, int):
                self.sources[pool.nonempty(source)] = source
        self._empty = satisfying(pool, rules, lambda id: False)
        first = self._first()
        follow = self._follow(first)
        self.follow = [follow[leaf] for leaf in leaves]
        self.possible_with = [0] * len(leaves)
        if sum(map(int.bit_count, self.follow)) > MAX_PAIRS:
            # `add_ambiguous` would refuse this part of `n_pairs`. Computing the rest takes as many steps.
            raise TooLarge
        for group in {first[rules[root]], *self.follow}:
            for at in members(group):
                self.possible_with[at] |= group
        self.n_pairs = sum(map(int.bit_count, (*self.possible_with, *self.follow)))

    def add_ambiguous(self, automata: Automata) -> None:
        """Add the followers of terminals that share a text to `possible_with`: the lexer may have read either."""
        if self.n_pairs > MAX_PAIRS:
            raise TooLarge
        changed = True
        done: set[tuple[int, int]] = set()
        while changed:
            changed = False
            for one, expression in enumerate(self.expressions):
                for other in members(self.possible_with[one] >> one + 1, one + 1):
                    if self.follow[one] == self.follow[other] or (one, other) in done:
                        continue
                    done.add((one, other))
                    if automata.overlap(expression, self.expressions[other]):
                        changed |= self._merge_followers(one, other) | self._merge_followers(other, one)

    def _merge_followers(self, one: int, other: int) -> bool:
        new = False
        for at in members(self.follow[one]):
            new = new or bool(self.follow[other] & ~self.possible_with[at])
            self.possible_with[at] |= self.follow[other]
        return new

    def _first(self) -> dict[int, int]:
        """Return, by expression, the terminals that it may begin with (FIRST)."""
        own, edges = {}, {}
        for id in self._ids:
            kind, parts = self._pool[id].kind, self._pool[id].parts
            own[id] = 1 << self._number[id] if id in self._number else 0
            edges[id] = list(parts)
            if kind is ExpressionKind.REFERENCE:
                edges[id] = [self._rules[str(self._pool[id].value)]]
            elif kind is ExpressionKind.SEQUENCE:
                end = next((at for at, part in enumerate(parts, 1) if part not in self._empty), len(parts))
                edges[id] = list(parts[:end])
        return _propagate(edges, own)

    def _follow(self, first: dict[int, int]) -> dict[int, int]:
        """Return, by expression, the terminals that may follow it (FOLLOW)."""
        own = dict.fromkeys(self._ids, 0)
        edges: dict[int, list[int]] = {id: [] for id in self._ids}
        for id in self._ids:
            kind, parts = self._pool[id].kind, self._pool[id].parts
            if kind is ExpressionKind.SEQUENCE:
                after, last = 0, True
                for part in reversed(parts):
                    own[part] |= after
                    if last:
                        edges[part].append(id)
                    last = last and part in self._empty
                    after = first[part] | (after if part in self._empty else 0)
                continue
            for part in parts:
                edges[part].append(id)
                if kind is ExpressionKind.REPEAT and self._pool.bounds(id).maximum != 1:
                    own[part] |= first[part]
            if kind is ExpressionKind.REFERENCE:
                edges[self._rules[str(self._pool[id].value)]].append(id)
        return _propagate(edges, own)


def _propagate(edges: dict[int, list[int]], own: dict[int, int]) -> dict[int, int]:
    """Return, by node of a graph, the union of the sets of the node and of all nodes that it leads to."""
    total: dict[int, int] = {}
    for component in strongly_connected_components(edges):
        union = 0
        for node in component:
            union |= own[node]
            for other in edges[node]:
                union |= total.get(other, 0)
        for node in component:
            total[node] = union
    return total
