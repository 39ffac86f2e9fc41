r"""Rules of characters as a Lark grammar for llguidance, of exactly the same language, in few lexemes.

llguidance reads text in two steps: a lexer takes the longest lexeme that any
lexeme possible at that place can be, and an Earley parser puts lexemes
together. With one lexeme per character the two are exact, whatever the
grammar, and slow. With long lexemes they are fast, and wrong as soon as a
lexeme that is complete could be read on: `[a-z]+ "x"` in two lexemes has no
text at all. So everything without recursion is made one lexeme, as large as
it can be, and then split where that is not exact:

- u is a whole text of lexeme A, which may be followed by a character that
  begins with byte b, and
- a lexeme B that is possible where A is, A itself among them, has a text
  that begins with u and then a character that begins with b: B is split.

Where nothing is left to split by, the lexer's longest match is the only one
that the rules allow. Characters are UTF-8, of which none begins another, so
single characters never need splitting. What is computed about A and B is
never too little, at worst too much: then more is split than need be, which
costs time and nothing else. Where it takes too long, every character is a
lexeme.

Called by `engine.grammar.grammar`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise

from erllama.engine.grammar.automata import Automata, TooLarge, members
from erllama.engine.grammar.expressions import (
    Bounds,
    Kind,
    Pool,
    Ranges,
    Token,
    components,
    holds,
    reached,
    referenced,
)

# A lexeme larger than this is split however exact it is: its states cost memory, and its texts time to compare.
_MAX_SIZE = 5000
# The parser of regular expressions that reads them in the end refuses 250 levels.
_MAX_DEPTH = 60
# States that counted repetitions within each other can have.
_MAX_COUNT = 20_000
# Parts that may each be empty: to say that not all of them are takes the square of their number.
_MAX_EMPTY_PARTS = 50
# llguidance refuses about 30 parentheses within each other; rules of their own take their place.
_MAX_PARENTHESES = 5
# Options from which on a choice that is split is split by how they begin.
_MANY_OPTIONS = 16
# How often: every time takes a few frames of Python's stack.
_MAX_FACTORED = 40
# Expressions looked at in all rounds of splitting, about a second's, and pairs of lexemes: past them every
# character becomes a lexeme.
_MAX_WORK = 100_000
_MAX_PAIRS = 200_000
# Characters that rules have where they stand in others: of a chain of rules, each holds all that follow.
_MAX_INLINED = 200_000
_HEADER = '%llguidance {"no_forcing": true}\n'


def lark(pool: Pool, rules: dict[str, int], root: str, spelled: Callable[[Token], str]) -> str:
    """The grammar in llguidance's Lark.

    Args:
        pool: where the expressions are.
        rules: by name; all that they refer to are among them, and each has a text.
        root: the rule that a whole text matches.
        spelled: a reference to a token as Lark writes it, as `<[12]>`.

    Returns:
        a text whose start symbol has the language of `root`.
    """
    rules = _without_tail_calls(pool, rules)
    rules = _inlined(pool, rules, root)
    if pool[rules[root]].regular and _fits(pool, rules[root]):
        # All of it is one lexeme, which nothing follows.
        return _HEADER + f"start: ALL\nALL: /{_pattern(pool, rules[root])}/\n"
    return _Writer(pool, _in_lexemes(pool, rules, root), root, spelled).text()


def _in_lexemes(pool: Pool, rules: dict[str, int], root: str) -> dict[str, int]:
    """The rules, of lexemes as large as is exact."""
    automata = Automata(pool)
    splits: dict[int, set[int]] = {}
    work = 0
    try:
        while work < _MAX_WORK:
            maker = _Maker(pool, splits)
            made = {name: maker.made(id) for name, id in rules.items()}
            near = _Neighbours(pool, made, root)
            found = _inexact(near, automata)
            if not found:
                return made
            splits.update(found)
            work += near.size + near.n_pairs // 2
    except TooLarge:
        pass
    maker = _Maker(pool, None)
    return {name: maker.made(id) for name, id in rules.items()}


def _without_tail_calls(pool: Pool, rules: dict[str, int]) -> dict[str, int]:
    """`x ::= x a | b x | c` as `x ::= b* c a*`: the same least fixed point, and no recursion of x there."""
    changed = {}
    for name, id in rules.items():
        itself = pool.reference(name)
        options = pool[id].parts if pool[id].kind is Kind.CHOICE else (id,)
        before: list[int] = []
        after: list[int] = []
        others: list[int] = []
        for option in options:
            parts = pool[option].parts if pool[option].kind is Kind.SEQUENCE else (option,)
            if parts == (itself,):
                continue
            if parts and parts[0] == itself and parts[-1] == itself:
                # Neither end is the only one to go on from.
                others = [id]
                before = after = []
                break
            if parts and parts[0] == itself:
                after.append(pool.sequence(parts[1:]))
            elif parts and parts[-1] == itself:
                before.append(pool.sequence(parts[:-1]))
            else:
                others.append(option)
        looped = [pool.repeat(pool.choice(loop), 0, None) if loop else pool.empty for loop in (before, after)]
        changed[name] = pool.sequence([looped[0], pool.choice(others), looped[1]])
    return changed


def _inlined(pool: Pool, rules: dict[str, int], root: str) -> dict[str, int]:
    """The rules that are left when all without recursion stand where they were referred to."""
    names = list(rules)
    number = {name: at for at, name in enumerate(names)}
    calls = {number[name]: [number[other] for other in referenced(pool, id)] for name, id in rules.items()}
    meaning: dict[int, int] = {}
    left: dict[str, int] = {}
    inlined = 0
    for component in components(calls):
        recursive = len(component) > 1 or component[0] in calls[component[0]]
        for at in component:
            id = _substituted(pool, rules[names[at]], meaning)
            alias = pool[id].kind in (Kind.REFERENCE, Kind.TOKEN)
            fits = pool[id].regular and _fits(pool, id) and inlined <= _MAX_INLINED
            if names[at] != root and not recursive and (alias or fits):
                inlined += pool[id].size
                meaning[pool.reference(names[at])] = id
            else:
                left[names[at]] = id
    return reached(pool, left, root)


def _substituted(pool: Pool, id: int, meaning: dict[int, int]) -> int:
    new: dict[int, int] = {}
    for below in pool.below(id):
        if below in meaning:
            new[below] = meaning[below]
        else:
            new[below] = pool.rebuilt(below, [new[part] for part in pool[below].parts])
    return new[id]


def _fits(pool: Pool, id: int) -> bool:
    """Whether something regular can be one lexeme."""
    expression = pool[id]
    return expression.size <= _MAX_SIZE and expression.depth <= _MAX_DEPTH and expression.repetitions <= _MAX_COUNT


class _Maker:
    """Makes expressions of lexemes out of those of characters.

    Args:
        splits: what must not be one lexeme, and before which of its parts to cut it; None splits everything.
    """

    def __init__(self, pool: Pool, splits: dict[int, set[int]] | None) -> None:
        self._pool, self._all = pool, splits is None
        self._splits = splits or {}
        self._level = 0

    def made(self, id: int) -> int:
        """The same language, with what is regular in lexemes, except for what is to be split."""
        pool = self._pool
        new: dict[int, int] = {}
        for below in pool.below(id):
            expression = pool[below]
            if self._whole(below):
                new[below] = self._lexeme(below)
            elif expression.kind is Kind.SEQUENCE:
                new[below] = pool.sequence(self._runs(expression.parts, new))
            elif expression.kind is Kind.CHOICE:
                new[below] = self._choice(below, new)
            else:
                new[below] = pool.rebuilt(below, [new[part] for part in expression.parts])
        return new[id]

    def _whole(self, id: int) -> bool:
        pool, expression = self._pool, self._pool[id]
        if self._all and expression.kind is not Kind.CHARS:
            return False
        if not expression.regular or id in self._splits or not _fits(pool, id):
            return False
        if not expression.nullable:
            return True
        return expression.widest <= _MAX_EMPTY_PARTS and _fits(pool, pool.nonempty(id))

    def _lexeme(self, id: int) -> int:
        pool = self._pool
        if id in (pool.empty, pool.nothing):
            return id
        read = pool.lexeme(id) if pool.nonempty(id) != pool.nothing else pool.nothing
        return pool.choice([read, pool.empty]) if pool[id].nullable else read

    def _runs(self, parts: tuple[int, ...], new: dict[int, int]) -> list[int]:
        """Neighbours that are regular are read together."""
        pool = self._pool
        made: list[int] = []
        for regular, group in groupby(parts, key=lambda part: pool[part].regular):
            run = tuple(group)
            made += self._run(run, new) if regular else [new[part] for part in run]
        return made

    def _run(self, run: tuple[int, ...], new: dict[int, int]) -> list[int]:
        made: list[int] = []
        open_ = [run]
        while open_:
            parts = open_.pop()
            together = self._pool.sequence(parts)
            if len(parts) == 1:
                made.append(new[parts[0]])
            elif self._whole(together):
                made.append(self._lexeme(together))
            else:
                # Joined repetitions make fewer parts of a sequence than were given: those are what is cut.
                whole = self._pool[together]
                parts = whole.parts if whole.kind is Kind.SEQUENCE else parts
                cuts = sorted(self._splits.get(together) or range(1, len(parts)))
                pieces = [parts[start:end] for start, end in pairwise([0, *cuts, len(parts)])]
                open_ += reversed(pieces)
        return made

    def _choice(self, id: int, new: dict[int, int]) -> int:
        """Options that are regular are read as one."""
        pool = self._pool
        parts = pool[id].parts
        regular = [part for part in parts if pool[part].regular]
        together = pool.choice(regular)
        if id not in self._splits and len(regular) > 1 and self._whole(together):
            return pool.choice([self._lexeme(together), *(new[part] for part in parts if not pool[part].regular)])
        factored = self._factored(parts) if len(parts) > _MANY_OPTIONS else id
        if factored == id or self._level == _MAX_FACTORED:
            return pool.choice([new[part] for part in parts])
        self._level += 1
        try:
            return self.made(factored)
        finally:
            self._level -= 1

    def _factored(self, options: tuple[int, ...]) -> int:
        """The same choice, of what begins alike once: a word list falls into its letters, which are few."""
        pool = self._pool
        groups: dict[int, list[tuple[int, ...]]] = {}
        for option in options:
            parts = pool[option].parts if pool[option].kind is Kind.SEQUENCE else (option,)
            groups.setdefault(parts[0] if parts else pool.empty, []).append(parts)
        return pool.choice(
            pool.sequence([first, pool.choice(pool.sequence(parts[1:]) for parts in group)])
            for first, group in groups.items()
        )


def _inexact(near: _Neighbours, automata: Automata) -> dict[int, set[int]]:
    """What the lexemes read that must be split, because the lexer would read on where the rules may not.

    By what was made a lexeme, before which parts to cut it.
    """
    near.join(automata)
    found: dict[int, set[int]] = {}
    for at, read in enumerate(near.reads):
        after = 0
        for other in members(near.follow[at]):
            after |= automata.begins(near.reads[other])
        if read is None or not after:
            continue
        for other in members(near.together[at]):
            longer = near.reads[other]
            if longer is not None and automata.goes_on(read, longer, after):
                source = near.sources[longer]
                # What may be empty reads something of another form, whose parts are others.
                cuts = automata.cuts(read, longer, after) if source == longer else set()
                found.setdefault(source, set()).update(cuts)
    return found


class _Neighbours:
    """Which lexemes follow which, and which are possible at one place. Sets of them are the bits of integers.

    Attributes:
        reads: by number, what a lexeme reads; None for a reference to a token.
        sources: what was made a lexeme, by what it reads.
        follow: by number, the lexemes that may come next.
        together: by number, those that are possible where it is.
        size: how many expressions there are.
        n_pairs: how many pairs of lexemes there are that follow each other, or are possible at one place.
    """

    def __init__(self, pool: Pool, rules: dict[str, int], root: str) -> None:
        self._pool, self._rules = pool, rules
        self._ids = sorted({id for rule in rules.values() for id in pool.below(rule)})
        self.size = len(self._ids)
        leaves = [id for id in self._ids if pool[id].kind in (Kind.LEXEME, Kind.TOKEN)]
        self._number = {leaf: at for at, leaf in enumerate(leaves)}
        self.sources: dict[int, int] = {}
        self.reads: list[int | None] = []
        for leaf in leaves:
            source = pool[leaf].value
            self.reads.append(pool.nonempty(source) if isinstance(source, int) else None)
            if isinstance(source, int):
                self.sources[pool.nonempty(source)] = source
        self._empty = holds(pool, rules, lambda id: False)
        first = self._first()
        follow = self._follow(first)
        self.follow = [follow[leaf] for leaf in leaves]
        self.together = [0] * len(leaves)
        if sum(map(int.bit_count, self.follow)) > _MAX_PAIRS:
            # A part of `n_pairs`, which `join` refuses: the rest of it takes as many steps.
            raise TooLarge
        for group in {first[rules[root]], *self.follow}:
            for at in members(group):
                self.together[at] |= group
        self.n_pairs = sum(map(int.bit_count, (*self.together, *self.follow)))

    def join(self, automata: Automata) -> None:
        """Add to `together` what follows lexemes that have a text in common: either of them may have been read."""
        if self.n_pairs > _MAX_PAIRS:
            raise TooLarge
        waiting = True
        done: set[tuple[int, int]] = set()
        while waiting:
            waiting = False
            for one, read in enumerate(self.reads):
                for other in members(self.together[one] >> one + 1, one + 1):
                    if self.follow[one] == self.follow[other] or (one, other) in done:
                        continue
                    done.add((one, other))
                    if automata.meet(read, self.reads[other]):
                        waiting |= self._joined(one, other) | self._joined(other, one)

    def _joined(self, one: int, other: int) -> bool:
        new = False
        for at in members(self.follow[one]):
            new = new or bool(self.follow[other] & ~self.together[at])
            self.together[at] |= self.follow[other]
        return new

    def _first(self) -> dict[int, int]:
        """By expression, the lexemes that it may begin with."""
        own, edges = {}, {}
        for id in self._ids:
            kind, parts = self._pool[id].kind, self._pool[id].parts
            own[id] = 1 << self._number[id] if id in self._number else 0
            edges[id] = list(parts)
            if kind is Kind.REFERENCE:
                edges[id] = [self._rules[str(self._pool[id].value)]]
            elif kind is Kind.SEQUENCE:
                end = next((at for at, part in enumerate(parts, 1) if part not in self._empty), len(parts))
                edges[id] = list(parts[:end])
        return _gathered(edges, own)

    def _follow(self, first: dict[int, int]) -> dict[int, int]:
        """By expression, the lexemes that may come after it."""
        own = dict.fromkeys(self._ids, 0)
        edges: dict[int, list[int]] = {id: [] for id in self._ids}
        for id in self._ids:
            kind, parts = self._pool[id].kind, self._pool[id].parts
            if kind is Kind.SEQUENCE:
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
                if kind is Kind.REPEAT and self._pool.bounds(id).most != 1:
                    own[part] |= first[part]
            if kind is Kind.REFERENCE:
                edges[self._rules[str(self._pool[id].value)]].append(id)
        return _gathered(edges, own)


def _gathered(edges: dict[int, list[int]], own: dict[int, int]) -> dict[int, int]:
    """By node of a graph, the union of what it and all that it leads to have."""
    total: dict[int, int] = {}
    for component in components(edges):
        union = 0
        for node in component:
            union |= own[node]
            for other in edges[node]:
                union |= total.get(other, 0)
        for node in component:
            total[node] = union
    return total


class _Writer:
    """Writes expressions of lexemes as Lark."""

    def __init__(self, pool: Pool, rules: dict[str, int], root: str, spelled: Callable[[Token], str]) -> None:
        self._pool, self._rules, self._root, self._spelled = pool, rules, root, spelled
        self._names = {name: f"r{at}" for at, name in enumerate(rules)}
        self._lexemes: dict[int, str] = {}
        self._groups: dict[int, str] = {}
        self._waiting: list[int] = []

    def text(self) -> str:
        lines = [f"start: {self._names[self._root]}"]
        lines += [f"{self._names[name]}: {self._body(id)}" for name, id in self._rules.items()]
        while self._waiting:
            id = self._waiting.pop()
            lines.append(f"{self._groups[id]}: {self._body(id)}")
        lines += [f"{name}: /{_pattern(self._pool, read)}/" for read, name in self._lexemes.items()]
        return _HEADER + "\n".join(lines) + "\n"

    def _body(self, id: int, level: int = 0) -> str:
        expression = self._pool[id]
        inner = [self._item(part, level) for part in expression.parts]
        if expression.kind is Kind.SEQUENCE:
            return " ".join(inner) or '""'
        if expression.kind is Kind.CHOICE:
            return " | ".join(inner)
        return self._item(id, level)

    def _item(self, id: int, level: int) -> str:
        expression, value = self._pool[id], self._pool[id].value
        if expression.kind is Kind.REFERENCE:
            return self._names[str(value)]
        if isinstance(value, Token):
            return self._spelled(value)
        if isinstance(value, int):
            return self._lexemes.setdefault(self._pool.nonempty(value), f"L{len(self._lexemes)}")
        if isinstance(value, Bounds):
            inner = expression.parts[0]
            again = self._pool[inner].kind is Kind.REPEAT
            return (self._group(inner) if again else self._item(inner, level)) + _times(value)
        if id == self._pool.empty:
            return '""'
        if id == self._pool.nothing:
            # Nothing is both.
            return "/[a&&b]/"
        return f"({self._body(id, level + 1)})" if level < _MAX_PARENTHESES else self._group(id)

    def _group(self, id: int) -> str:
        """The name of a rule for an expression."""
        if id not in self._groups:
            self._groups[id] = f"g{len(self._groups)}"
            self._waiting.append(id)
        return self._groups[id]


def _pattern(pool: Pool, id: int) -> str:
    """A regular expression's text."""
    texts: dict[int, str] = {}
    for below in pool.below(id):
        expression = pool[below]
        inner = [texts[part] for part in expression.parts]
        if expression.kind is Kind.CHARS:
            texts[below] = _char_class(pool.ranges(below))
        elif expression.kind is Kind.SEQUENCE:
            texts[below] = "".join(inner)
        elif expression.kind is Kind.CHOICE:
            texts[below] = f"(?:{'|'.join(inner)})"
        else:
            plain = pool[expression.parts[0]].kind in (Kind.CHARS, Kind.CHOICE)
            texts[below] = (inner[0] if plain else f"(?:{inner[0]})") + _times(pool.bounds(below))
    return texts[id]


def _char_class(ranges: Ranges) -> str:
    if not ranges:
        return "[a&&b]"
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _char(ranges[0][0])
    return "[" + "".join(_char(low) + (f"-{_char(high)}" if high > low else "") for low, high in ranges) + "]"


def _char(point: int) -> str:
    return chr(point) if point < 128 and chr(point).isalnum() else f"\\x{{{point:X}}}"


def _times(bounds: Bounds) -> str:
    signs = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    most = "" if bounds.most is None else bounds.most
    return signs.get(bounds) or f"{{{bounds.least},{most}}}"
