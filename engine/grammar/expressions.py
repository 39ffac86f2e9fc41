"""Expressions of grammars: interned, simplified when made, and processed without recursion.

An expression is an id, and its parts have smaller ids. So equal expressions share an id, a pass over expressions is
a loop over ids in order, and no nesting of a grammar exhausts Python's stack. `engine.grammar.gbnf` builds
expressions; `engine.grammar.lark_writer` and the modules that it uses rewrite them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from erllama.errors import GrammarError

MAX_CODE_POINT = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
# Steps for reading and writing one grammar: some seconds.
MAX_WORK = 3_000_000
# Limits on sizes are far below this. An expression that contains its part twice per level has size 2**levels.
_SIZE_CAP = 1 << 40

Ranges = tuple[tuple[int, int], ...]


class ExpressionKind(Enum):
    CHARS = "chars"
    SEQUENCE = "sequence"
    CHOICE = "choice"
    REPEAT = "repeat"
    REFERENCE = "reference"
    TOKEN = "token"
    TERMINAL = "terminal"


class TokenReference(NamedTuple):
    """A reference to a token, by id or by its text in angle brackets. `offset` is its position in the source."""

    id: int | None
    name: str
    negated: bool
    offset: int


class RepeatBounds(NamedTuple):
    """How often an expression is repeated; a `maximum` of None is without limit."""

    minimum: int
    maximum: int | None


ExpressionValue = Ranges | str | TokenReference | RepeatBounds | int | None


class Expression(NamedTuple):
    """The definition of an expression id.

    Attributes:
        parts: the ids of its parts.
        value: ranges of code points, the name of a rule, a token, bounds, or the id of the expression of a
            terminal.
        regular: whether it refers to no rule and to no token.
        nullable: whether its language has the empty text; set only for regular expressions.
        size: the number of character classes in it.
        depth: levels of parts.
        repetitions: the product of nested bounds.
        widest: the largest number of parts of a nullable sequence in it.
    """

    kind: ExpressionKind
    parts: tuple[int, ...]
    value: ExpressionValue
    regular: bool
    nullable: bool
    size: int
    depth: int
    repetitions: int
    widest: int


class ExpressionPool:
    """All expressions of one grammar.

    Attributes:
        work: steps taken so far, about one for each part and each range.
    """

    def __init__(self) -> None:
        self.work = 0
        self._expressions: list[Expression] = []
        self._single: dict[int, int] = {}
        self._ids: dict[tuple[ExpressionKind, tuple[int, ...], ExpressionValue], int] = {}
        self._nonempty: dict[int, int] = {}
        self.empty_set = self.chars(())
        self.empty_text = self._intern(ExpressionKind.SEQUENCE, (), None)

    def __getitem__(self, id: int) -> Expression:
        return self._expressions[id]

    def descendants(self, id: int) -> list[int]:
        """Return the ids of an expression and all its descendants, parts first."""
        found, pending = {id}, [id]
        while pending:
            for part in self._expressions[pending.pop()].parts:
                if part not in found:
                    found.add(part)
                    pending.append(part)
        self._count_steps(len(found))
        return sorted(found)

    def chars(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Return the expression of one character of some ranges of code points, both ends included."""
        found = normalize(ranges)
        self._count_steps(len(found))
        return self._intern(ExpressionKind.CHARS, (), found)

    def literal(self, code_points: Iterable[int]) -> int:
        return self.sequence(map(self._character, code_points))

    def _character(self, point: int) -> int:
        if point not in self._single:
            self._single[point] = self.chars([(point, point)])
        return self._single[point]

    def reference(self, rule: str) -> int:
        return self._intern(ExpressionKind.REFERENCE, (), rule)

    def token(self, token: TokenReference) -> int:
        return self._intern(ExpressionKind.TOKEN, (), token)

    def terminal(self, read: int) -> int:
        """Return a terminal, which the lexer reads as a unit: the language of `read` without the empty text."""
        return self._intern(ExpressionKind.TERMINAL, (), read)

    def sequence(self, parts: Iterable[int]) -> int:
        flat: list[int] = []
        for part in parts:
            if part == self.empty_set:
                return self.empty_set
            expression = self._expressions[part]
            inner = expression.parts if expression.kind is ExpressionKind.SEQUENCE else (part,)
            # The parts of a sequence are joined already. Only its first part may join the part before it.
            joined = self._join(flat[-1], inner[0]) if flat and inner else None
            if joined is None:
                flat += inner
            else:
                flat[-1] = joined
                flat += inner[1:]
        return flat[0] if len(flat) == 1 else self._intern(ExpressionKind.SEQUENCE, tuple(flat), None)

    def choice(self, options: Iterable[int]) -> int:
        flat: dict[int, None] = {}
        ranges: list[tuple[int, int]] = []
        for option in options:
            expression = self._expressions[option]
            for id in expression.parts if expression.kind is ExpressionKind.CHOICE else (option,):
                if self._expressions[id].kind is ExpressionKind.CHARS:
                    ranges += self.ranges(id)
                else:
                    flat[id] = None
        merged = [self.chars(ranges)] if ranges else []
        ids = (*merged, *flat)
        if len(ids) < 2:
            return ids[0] if ids else self.empty_set
        return self._intern(ExpressionKind.CHOICE, ids, None)

    def repeat(self, id: int, minimum: int, maximum: int | None) -> int:
        if maximum == 0 or id == self.empty_text or (id == self.empty_set and not minimum):
            return self.empty_text
        if id == self.empty_set or (minimum, maximum) == (1, 1):
            return id
        inner = self._expressions[id]
        if maximum is None and minimum < 2 and inner.value in (RepeatBounds(0, None), RepeatBounds(1, None)):
            return self.repeat(inner.parts[0], min(minimum, self.bounds(id).minimum), None)
        return self._intern(ExpressionKind.REPEAT, (id,), RepeatBounds(minimum, maximum))

    def nonempty(self, id: int) -> int:
        """Return the expression of a regular expression's language without the empty text."""
        # Parts first, so that a deep expression needs no recursion.
        for below in self.descendants(id):
            if below not in self._nonempty:
                self._nonempty[below] = self._without_empty(below)
        return self._nonempty[id]

    def character_classes(self) -> list[int]:
        return [id for id, expression in enumerate(self._expressions) if expression.kind is ExpressionKind.CHARS]

    def ranges(self, id: int) -> Ranges:
        value = self._expressions[id].value
        assert isinstance(value, tuple)
        assert not isinstance(value, TokenReference | RepeatBounds)
        return value

    def bounds(self, id: int) -> RepeatBounds:
        value = self._expressions[id].value
        assert isinstance(value, RepeatBounds)
        return value

    def rebuild(self, id: int, parts: Sequence[int]) -> int:
        """Return the same expression with other parts."""
        old = self._expressions[id]
        if old.kind is ExpressionKind.SEQUENCE:
            return self.sequence(parts)
        if old.kind is ExpressionKind.CHOICE:
            return self.choice(parts)
        if old.kind is ExpressionKind.REPEAT:
            return self.repeat(parts[0], *self.bounds(id))
        return id

    def _without_empty(self, id: int) -> int:
        expression = self._expressions[id]
        if not expression.nullable:
            return id
        parts = expression.parts
        if expression.kind is ExpressionKind.CHOICE:
            return self.choice([self._nonempty[part] for part in parts])
        if expression.kind is ExpressionKind.REPEAT:
            minimum, maximum = self.bounds(id)
            inner = self._nonempty[parts[0]]
            if inner == self.empty_set:
                return self.empty_set
            # A part that may be empty can take the place of missing repetitions, so one that is not empty is
            # enough.
            return self.repeat(inner, 1 if self._expressions[parts[0]].nullable else max(minimum, 1), maximum)
        return self.choice(self.sequence((self._nonempty[part], *parts[at + 1 :])) for at, part in enumerate(parts))

    def _count_steps(self, steps: int) -> None:
        self.work += steps
        if self.work > MAX_WORK:
            raise GrammarError(
                f"the grammar takes more than {MAX_WORK:,} steps to read; "
                "use fewer or shorter texts and fewer nested rules"
            )

    def _join(self, left: int, right: int) -> int | None:
        """Join x{a,b} x{c,d} to x{a+c,b+d}, so that `ws* ws*` has one reading. None if they are not joined."""
        other = self._expressions[right]
        if other.kind is not ExpressionKind.REPEAT:
            return None
        one = self._expressions[left]
        if one.kind is not ExpressionKind.REPEAT or one.parts != other.parts:
            return None
        a, b = self.bounds(left), self.bounds(right)
        # Only if one of them is unlimited: joining `x? x?` to `x{0,2}` has no advantage.
        if a.maximum is not None and b.maximum is not None:
            return None
        return self.repeat(one.parts[0], a.minimum + b.minimum, None)

    def _intern(self, kind: ExpressionKind, parts: tuple[int, ...], value: ExpressionValue) -> int:
        self._count_steps(1 + len(parts))
        key = (kind, parts, value)
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = len(self._expressions)
            self._expressions.append(self._describe(kind, parts, value))
        return found

    def _describe(self, kind: ExpressionKind, parts: tuple[int, ...], value: ExpressionValue) -> Expression:
        repetitions, size, depth, widest = 1, int(not parts), 0, 0
        regular = kind not in (ExpressionKind.REFERENCE, ExpressionKind.TOKEN, ExpressionKind.TERMINAL)
        any_nullable, all_nullable = False, True
        for part in parts:
            inner = self._expressions[part]
            repetitions = max(repetitions, inner.repetitions)
            size += inner.size
            depth = max(depth, inner.depth)
            widest = max(widest, inner.widest)
            regular = regular and inner.regular
            any_nullable = any_nullable or inner.nullable
            all_nullable = all_nullable and inner.nullable
        nullable = (kind is ExpressionKind.SEQUENCE and all_nullable) or (
            kind is ExpressionKind.CHOICE and any_nullable
        )
        if isinstance(value, RepeatBounds):
            nullable = all_nullable or value.minimum == 0
            repetitions *= max(value.minimum, value.maximum or 1)
        return Expression(
            kind,
            parts,
            value,
            regular=regular,
            nullable=nullable,
            size=min(_SIZE_CAP, size),
            depth=1 + depth,
            repetitions=min(_SIZE_CAP, repetitions),
            widest=max(widest, len(parts) if nullable else 0),
        )


def normalize(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return ranges of code points in order, merged where they touch. Surrogates are removed: no text has them."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted((low, min(high, MAX_CODE_POINT)) for low, high in ranges):
        if low > high:
            continue
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    around = [
        part
        for low, high in merged
        for part in ((low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high))
    ]
    return tuple((low, high) for low, high in around if low <= high)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return all code points outside of `ranges`."""
    outside: list[tuple[int, int]] = []
    start = 0
    for low, high in normalize(ranges):
        outside.append((start, low - 1))
        start = high + 1
    return normalize([*outside, (start, MAX_CODE_POINT)])


def referenced_rules(pool: ExpressionPool, id: int) -> list[str]:
    """Return the names of the rules that an expression refers to, each once."""
    values = (pool[below].value for below in pool.descendants(id) if pool[below].kind is ExpressionKind.REFERENCE)
    return [value for value in values if isinstance(value, str)]


def reachable_rules(pool: ExpressionPool, rules: dict[str, int], root: str) -> dict[str, int]:
    """Return the rules that `root` refers to, directly or not, and `root` itself, in their present order."""
    found, pending = {root}, [root]
    while pending:
        for name in referenced_rules(pool, rules[pending.pop()]):
            if name not in found:
                found.add(name)
                pending.append(name)
    return {name: id for name, id in rules.items() if name in found}


def satisfying(pool: ExpressionPool, rules: dict[str, int], leaf: Callable[[int], bool]) -> set[int]:
    """Return the expressions with a property that parts pass on.

    A sequence has the property if all its parts have it, a choice if one part has it. The result is the least fixed
    point over all expressions of the rules. Visits each expression once per part.

    Args:
        leaf: whether an expression without parts has the property.
    """
    ids = {id for rule in rules.values() for id in pool.descendants(rule)}
    above: dict[int, list[int]] = {id: [] for id in ids}
    missing: dict[int, int] = {}
    found: set[int] = set()
    pending: list[int] = []
    for id in ids:
        expression = pool[id]
        parts = expression.parts
        if expression.kind is ExpressionKind.REFERENCE:
            parts = (rules[str(expression.value)],)
        optional = expression.kind is ExpressionKind.REPEAT and not pool.bounds(id).minimum
        if optional or (not parts and (id == pool.empty_text or leaf(id))):
            pending.append(id)
        missing[id] = 1 if expression.kind is ExpressionKind.CHOICE else len(parts)
        for part in parts:
            above[part].append(id)
    while pending:
        id = pending.pop()
        if id not in found:
            found.add(id)
            for other in above[id]:
                missing[other] -= 1
                if not missing[other]:
                    pending.append(other)
    return found


def strongly_connected_components(edges: dict[int, list[int]]) -> list[list[int]]:
    """Return the strongly connected components of a graph, each after those that it leads to (Tarjan, 1972)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    result: list[list[int]] = []
    for start in edges:
        if start in order:
            continue
        work = [(start, iter(edges[start]))]
        order[start] = low[start] = len(order)
        stack.append(start)
        on_stack.add(start)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in order:
                    order[other] = low[other] = len(order)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(edges[other])))
                    break
                if other in on_stack:
                    low[node] = min(low[node], order[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component: list[int] = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                    on_stack.difference_update(component)
                    result.append(component)
    return result
