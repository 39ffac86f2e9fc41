"""The terminals of a grammar: as few and as large as the lexer of llguidance reads exactly.

llguidance reads text in two steps. A lexer takes the longest match of all terminals that are possible at a place,
and an Earley parser combines the terminals. With one terminal per character the two steps are exact for every
grammar, and slow. With long terminals they are fast, but wrong where the lexer can read past the end of a terminal:
`[a-z]+ "x"` in two terminals has no text at all. So this module makes every part without recursion one terminal, as
large as possible, and then splits the terminals that are not exact. It splits a terminal B if, for a terminal A:

- u is a whole text of A, and a character that begins with byte b may follow A, and
- B is possible where A is (B may be A itself), and has a text that begins with u and then a character that begins
  with b.

When no terminal is left to split, the lexer's longest match is the only match that the rules allow. Characters are
UTF-8, in which no character begins another, so single characters never need splitting. The results about A and B
may include too much but never too little. Too much splitting costs time and keeps the language. If the analysis
takes too long, every character becomes a terminal.

Called by `engine.grammar.lark_writer`.
"""

from __future__ import annotations

from itertools import groupby, pairwise

from erllama.engine.grammar.adjacency import Adjacency
from erllama.engine.grammar.automata import Automata, TooLarge, members
from erllama.engine.grammar.expressions import ExpressionKind, ExpressionPool

# A larger terminal is split even if it is exact: its states cost memory, and its texts take time to compare.
_MAX_SIZE = 5000
# llguidance's parser of regular expressions refuses 250 levels.
_MAX_DEPTH = 60
# States of nested counted repetitions.
_MAX_COUNT = 20_000
# Parts that may each be empty. To express that not all of them are takes the square of their number.
_MAX_EMPTY_PARTS = 50
# Options from which on a split choice is grouped by first parts.
_MANY_OPTIONS = 16
# Nested groupings. Each takes a few frames of Python's stack.
_MAX_FACTORINGS = 40
# Expressions visited in all rounds of splitting, about a second's work. Beyond it every character becomes a
# terminal.
_MAX_WORK = 100_000


def split_into_terminals(pool: ExpressionPool, rules: dict[str, int], root: str) -> dict[str, int]:
    """Return the rules, built of the largest terminals that are exact."""
    automata = Automata(pool)
    splits: dict[int, set[int]] = {}
    work = 0
    try:
        while work < _MAX_WORK:
            builder = _TerminalBuilder(pool, splits)
            made = {name: builder.build(id) for name, id in rules.items()}
            adjacency = Adjacency(pool, made, root)
            found = _find_inexact(adjacency, automata)
            if not found:
                return made
            splits.update(found)
            work += adjacency.size + adjacency.n_pairs // 2
    except TooLarge:
        pass
    builder = _TerminalBuilder(pool, None)
    return {name: builder.build(id) for name, id in rules.items()}


def fits_terminal(pool: ExpressionPool, id: int) -> bool:
    """Return whether a regular expression is small enough for one terminal."""
    expression = pool[id]
    return expression.size <= _MAX_SIZE and expression.depth <= _MAX_DEPTH and expression.repetitions <= _MAX_COUNT


class _TerminalBuilder:
    """Builds expressions of terminals from expressions of characters.

    Args:
        splits: the expressions that must not be one terminal, with the parts before which to cut each; None splits
            everything into characters.
    """

    def __init__(self, pool: ExpressionPool, splits: dict[int, set[int]] | None) -> None:
        self._pool, self._splits_all = pool, splits is None
        self._splits = splits or {}
        self._level = 0

    def build(self, id: int) -> int:
        """Return the same language, with regular parts as terminals, except for the parts in `splits`."""
        pool = self._pool
        new: dict[int, int] = {}
        for below in pool.descendants(id):
            expression = pool[below]
            if self._fits_terminal(below):
                new[below] = self._terminal(below)
            elif expression.kind is ExpressionKind.SEQUENCE:
                new[below] = pool.sequence(self._build_runs(expression.parts, new))
            elif expression.kind is ExpressionKind.CHOICE:
                new[below] = self._choice(below, new)
            else:
                new[below] = pool.rebuild(below, [new[part] for part in expression.parts])
        return new[id]

    def _fits_terminal(self, id: int) -> bool:
        pool, expression = self._pool, self._pool[id]
        if self._splits_all and expression.kind is not ExpressionKind.CHARS:
            return False
        if not expression.regular or id in self._splits or not fits_terminal(pool, id):
            return False
        if not expression.nullable:
            return True
        return expression.widest <= _MAX_EMPTY_PARTS and fits_terminal(pool, pool.nonempty(id))

    def _terminal(self, id: int) -> int:
        pool = self._pool
        if id in (pool.empty_text, pool.empty_set):
            return id
        terminal = pool.terminal(id) if pool.nonempty(id) != pool.empty_set else pool.empty_set
        return pool.choice([terminal, pool.empty_text]) if pool[id].nullable else terminal

    def _build_runs(self, parts: tuple[int, ...], new: dict[int, int]) -> list[int]:
        """Merge neighbouring regular parts into terminals."""
        pool = self._pool
        made: list[int] = []
        for regular, group in groupby(parts, key=lambda part: pool[part].regular):
            run = tuple(group)
            made += self._build_run(run, new) if regular else [new[part] for part in run]
        return made

    def _build_run(self, run: tuple[int, ...], new: dict[int, int]) -> list[int]:
        made: list[int] = []
        pending = [run]
        while pending:
            parts = pending.pop()
            together = self._pool.sequence(parts)
            if len(parts) == 1:
                made.append(new[parts[0]])
            elif self._fits_terminal(together):
                made.append(self._terminal(together))
            else:
                # Joining repetitions may have reduced the parts. The cuts refer to the joined sequence.
                whole = self._pool[together]
                parts = whole.parts if whole.kind is ExpressionKind.SEQUENCE else parts
                cuts = sorted(self._splits.get(together) or range(1, len(parts)))
                pieces = [parts[start:end] for start, end in pairwise([0, *cuts, len(parts)])]
                pending += reversed(pieces)
        return made

    def _choice(self, id: int, new: dict[int, int]) -> int:
        """Merge the regular options into one terminal."""
        pool = self._pool
        parts = pool[id].parts
        regular = [part for part in parts if pool[part].regular]
        together = pool.choice(regular)
        if id not in self._splits and len(regular) > 1 and self._fits_terminal(together):
            return pool.choice([self._terminal(together), *(new[part] for part in parts if not pool[part].regular)])
        factored = self._factor(parts) if len(parts) > _MANY_OPTIONS else id
        if factored == id or self._level == _MAX_FACTORINGS:
            return pool.choice([new[part] for part in parts])
        self._level += 1
        try:
            return self.build(factored)
        finally:
            self._level -= 1

    def _factor(self, options: tuple[int, ...]) -> int:
        """Return the choice with options grouped by their first part. A word list is reduced to its few letters."""
        pool = self._pool
        groups: dict[int, list[tuple[int, ...]]] = {}
        for option in options:
            parts = pool[option].parts if pool[option].kind is ExpressionKind.SEQUENCE else (option,)
            groups.setdefault(parts[0] if parts else pool.empty_text, []).append(parts)
        return pool.choice(
            pool.sequence([first, pool.choice(pool.sequence(parts[1:]) for parts in group)])
            for first, group in groups.items()
        )


def _find_inexact(adjacency: Adjacency, automata: Automata) -> dict[int, set[int]]:
    """Return the terminals to split, because the lexer could read past the end that the rules require.

    Returns:
        by the expression of each such terminal, the parts before which to cut it.
    """
    adjacency.add_ambiguous(automata)
    found: dict[int, set[int]] = {}
    for at, expression in enumerate(adjacency.expressions):
        after = 0
        for other in members(adjacency.follow[at]):
            after |= automata.first_bytes(adjacency.expressions[other])
        if expression is None or not after:
            continue
        for other in members(adjacency.possible_with[at]):
            longer = adjacency.expressions[other]
            if longer is not None and automata.can_extend(expression, longer, after):
                source = adjacency.sources[longer]
                # A terminal that may be empty reads another expression, which has other parts.
                cuts = automata.cut_points(expression, longer, after) if source == longer else set()
                found.setdefault(source, set()).update(cuts)
    return found
