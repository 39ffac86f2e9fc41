"""Expressions of grammars: interned, simplified as they are made, and never recursive.

An expression is an id; its parts have smaller ids. So equal expressions are
one, a pass over many is a loop over ids in order, and nothing here can exhaust
Python's stack, however deep a grammar nests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from erllama.errors import GrammarError

MAX_CODE_POINT = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
# Steps that reading and writing a grammar may take: some seconds.
MAX_WORK = 3_000_000
# Sizes are compared with limits far below; an expression that refers to itself twice per level has 2**levels.
_SIZE_CAP = 1 << 40

Ranges = tuple[tuple[int, int], ...]


class Kind(Enum):
    CHARS = "chars"
    SEQUENCE = "sequence"
    CHOICE = "choice"
    REPEAT = "repeat"
    REFERENCE = "reference"
    TOKEN = "token"
    LEXEME = "lexeme"


class Token(NamedTuple):
    """A reference to one token: by id, or by its text in angle brackets; `at` is its offset in the source."""

    token: int | None
    name: str
    negated: bool
    at: int


class Bounds(NamedTuple):
    """How often an expression is repeated; `most` None is without limit."""

    least: int
    most: int | None


Value = Ranges | str | Token | Bounds | int | None


class Expression(NamedTuple):
    """What an id stands for.

    Attributes:
        parts: ids of what it is made of.
        value: ranges of code points, the name of a rule, a token, bounds, or the id of what a lexeme reads.
        regular: no rule and no token is referred to below it.
        nullable: the empty text is in its language; only for regular ones.
        size: how many characters are written in it.
        depth: levels of parts.
        repetitions: the product of nested bounds.
        widest: the most parts of one sequence in it that may be empty.
    """

    kind: Kind
    parts: tuple[int, ...]
    value: Value
    regular: bool
    nullable: bool
    size: int
    depth: int
    repetitions: int
    widest: int


class Pool:
    """All expressions of one grammar.

    Attributes:
        work: steps taken so far: about one for every part, and for every range, that was looked at.
    """

    def __init__(self) -> None:
        self.work = 0
        self._all: list[Expression] = []
        self._single: dict[int, int] = {}
        self._ids: dict[tuple[Kind, tuple[int, ...], Value], int] = {}
        self._nonempty: dict[int, int] = {}
        self.nothing = self.chars(())
        self.empty = self._intern(Kind.SEQUENCE, (), None)

    def __getitem__(self, id: int) -> Expression:
        return self._all[id]

    def below(self, id: int) -> list[int]:
        """The ids of an expression and everything below it, parts first."""
        found, open_ = {id}, [id]
        while open_:
            for part in self._all[open_.pop()].parts:
                if part not in found:
                    found.add(part)
                    open_.append(part)
        self._count(len(found))
        return sorted(found)

    def chars(self, ranges: Iterable[tuple[int, int]]) -> int:
        """One character out of ranges of code points, both ends included."""
        found = normalized(ranges)
        self._count(len(found))
        return self._intern(Kind.CHARS, (), found)

    def literal(self, code_points: Iterable[int]) -> int:
        return self.sequence(map(self._character, code_points))

    def _character(self, point: int) -> int:
        if point not in self._single:
            self._single[point] = self.chars([(point, point)])
        return self._single[point]

    def reference(self, rule: str) -> int:
        return self._intern(Kind.REFERENCE, (), rule)

    def token(self, token: Token) -> int:
        return self._intern(Kind.TOKEN, (), token)

    def lexeme(self, read: int) -> int:
        """What is read at once: the language of `read` without the empty text."""
        return self._intern(Kind.LEXEME, (), read)

    def sequence(self, parts: Iterable[int]) -> int:
        flat: list[int] = []
        for part in parts:
            if part == self.nothing:
                return self.nothing
            expression = self._all[part]
            inner = expression.parts if expression.kind is Kind.SEQUENCE else (part,)
            # Within a sequence everything that can be joined is: only its first part may join what is before.
            joined = self._joined(flat[-1], inner[0]) if flat and inner else None
            if joined is None:
                flat += inner
            else:
                flat[-1] = joined
                flat += inner[1:]
        return flat[0] if len(flat) == 1 else self._intern(Kind.SEQUENCE, tuple(flat), None)

    def choice(self, options: Iterable[int]) -> int:
        flat: dict[int, None] = {}
        ranges: list[tuple[int, int]] = []
        for option in options:
            for id in self._all[option].parts if self._all[option].kind is Kind.CHOICE else (option,):
                if self._all[id].kind is Kind.CHARS:
                    ranges += self.ranges(id)
                else:
                    flat[id] = None
        merged = [self.chars(ranges)] if ranges else []
        ids = (*merged, *flat)
        if len(ids) < 2:
            return ids[0] if ids else self.nothing
        return self._intern(Kind.CHOICE, ids, None)

    def repeat(self, id: int, least: int, most: int | None) -> int:
        if most == 0 or id == self.empty or (id == self.nothing and not least):
            return self.empty
        if id == self.nothing or (least, most) == (1, 1):
            return id
        inner = self._all[id]
        if most is None and least < 2 and inner.value in (Bounds(0, None), Bounds(1, None)):
            return self.repeat(inner.parts[0], min(least, self.bounds(id).least), None)
        return self._intern(Kind.REPEAT, (id,), Bounds(least, most))

    def nonempty(self, id: int) -> int:
        """A regular expression's language without the empty text."""
        # Parts first, so that a deep one needs no stack.
        for below in self.below(id):
            if below not in self._nonempty:
                self._nonempty[below] = self._without_empty(below)
        return self._nonempty[id]

    def all_chars(self) -> list[int]:
        return [id for id, expression in enumerate(self._all) if expression.kind is Kind.CHARS]

    def ranges(self, id: int) -> Ranges:
        value = self._all[id].value
        assert isinstance(value, tuple)
        assert not isinstance(value, Token | Bounds)
        return value

    def bounds(self, id: int) -> Bounds:
        value = self._all[id].value
        assert isinstance(value, Bounds)
        return value

    def rebuilt(self, id: int, parts: Sequence[int]) -> int:
        """The same expression of other parts."""
        old = self._all[id]
        if old.kind is Kind.SEQUENCE:
            return self.sequence(parts)
        if old.kind is Kind.CHOICE:
            return self.choice(parts)
        if old.kind is Kind.REPEAT:
            return self.repeat(parts[0], *self.bounds(id))
        return id

    def _without_empty(self, id: int) -> int:
        expression = self._all[id]
        if not expression.nullable:
            return id
        parts = expression.parts
        if expression.kind is Kind.CHOICE:
            return self.choice([self._nonempty[part] for part in parts])
        if expression.kind is Kind.REPEAT:
            least, most = self.bounds(id)
            inner = self._nonempty[parts[0]]
            if inner == self.nothing:
                return self.nothing
            # Where the part may be empty, fewer of it that are not are as good as `least`.
            return self.repeat(inner, 1 if self._all[parts[0]].nullable else max(least, 1), most)
        return self.choice(self.sequence((self._nonempty[part], *parts[at + 1 :])) for at, part in enumerate(parts))

    def _count(self, steps: int) -> None:
        self.work += steps
        if self.work > MAX_WORK:
            raise GrammarError(
                f"the grammar takes more than {MAX_WORK:,} steps to read; "
                "use fewer or shorter texts, and fewer rules within each other"
            )

    def _joined(self, left: int, right: int) -> int | None:
        """x{a,b} x{c,d} as x{a+c,b+d}: so `ws* ws*` is read in one way."""
        other = self._all[right]
        if other.kind is not Kind.REPEAT:
            return None
        one = self._all[left]
        if one.kind is not Kind.REPEAT or one.parts != other.parts:
            return None
        a, b = self.bounds(left), self.bounds(right)
        # Only where one of them has no end: `x? x?` as `x{0,2}` would gain nothing.
        if a.most is not None and b.most is not None:
            return None
        return self.repeat(one.parts[0], a.least + b.least, None)

    def _intern(self, kind: Kind, parts: tuple[int, ...], value: Value) -> int:
        self._count(1 + len(parts))
        key = (kind, parts, value)
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = len(self._all)
            self._all.append(self._measured(kind, parts, value))
        return found

    def _measured(self, kind: Kind, parts: tuple[int, ...], value: Value) -> Expression:
        repetitions, size, depth, widest = 1, int(not parts), 0, 0
        regular = kind not in (Kind.REFERENCE, Kind.TOKEN, Kind.LEXEME)
        some, every = False, True
        for part in parts:
            inner = self._all[part]
            repetitions = max(repetitions, inner.repetitions)
            size += inner.size
            depth = max(depth, inner.depth)
            widest = max(widest, inner.widest)
            regular = regular and inner.regular
            some = some or inner.nullable
            every = every and inner.nullable
        nullable = (kind is Kind.SEQUENCE and every) or (kind is Kind.CHOICE and some)
        if isinstance(value, Bounds):
            nullable = every or value.least == 0
            repetitions *= max(value.least, value.most or 1)
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


def normalized(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges of code points in order, joined where they touch, without surrogates, which no text has."""
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


def inverted(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Every code point that is in none of `ranges`."""
    outside: list[tuple[int, int]] = []
    start = 0
    for low, high in normalized(ranges):
        outside.append((start, low - 1))
        start = high + 1
    return normalized([*outside, (start, MAX_CODE_POINT)])


def referenced(pool: Pool, id: int) -> list[str]:
    """The rules that an expression refers to, each once."""
    values = (pool[below].value for below in pool.below(id) if pool[below].kind is Kind.REFERENCE)
    return [value for value in values if isinstance(value, str)]


def reached(pool: Pool, rules: dict[str, int], root: str) -> dict[str, int]:
    """The rules that `root` leads to, itself among them, in the order that they have."""
    found, open_ = {root}, [root]
    while open_:
        for name in referenced(pool, rules[open_.pop()]):
            if name not in found:
                found.add(name)
                open_.append(name)
    return {name: id for name, id in rules.items() if name in found}


def holds(pool: Pool, rules: dict[str, int], leaf: Callable[[int], bool]) -> set[int]:
    """Where something holds that does for a sequence if for all its parts, and for a choice if for one.

    The least fixed point, over all expressions of the rules; `leaf` says it of
    what has no parts. Every expression is looked at once per part.
    """
    ids = {id for rule in rules.values() for id in pool.below(rule)}
    above: dict[int, list[int]] = {id: [] for id in ids}
    missing: dict[int, int] = {}
    found: set[int] = set()
    open_: list[int] = []
    for id in ids:
        expression = pool[id]
        parts = expression.parts
        if expression.kind is Kind.REFERENCE:
            parts = (rules[str(expression.value)],)
        optional = expression.kind is Kind.REPEAT and not pool.bounds(id).least
        if optional or (not parts and (id == pool.empty or leaf(id))):
            open_.append(id)
        missing[id] = 1 if expression.kind is Kind.CHOICE else len(parts)
        for part in parts:
            above[part].append(id)
    while open_:
        id = open_.pop()
        if id not in found:
            found.add(id)
            for other in above[id]:
                missing[other] -= 1
                if not missing[other]:
                    open_.append(other)
    return found


def components(edges: dict[int, list[int]]) -> list[list[int]]:
    """The strongly connected components of a graph, each after those that its nodes lead to (Tarjan, 1972)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    held: list[int] = []
    on_stack: set[int] = set()
    result: list[list[int]] = []
    for start in edges:
        if start in order:
            continue
        work = [(start, iter(edges[start]))]
        order[start] = low[start] = len(order)
        held.append(start)
        on_stack.add(start)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in order:
                    order[other] = low[other] = len(order)
                    held.append(other)
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
                        component.append(held.pop())
                    on_stack.difference_update(component)
                    result.append(component)
    return result
