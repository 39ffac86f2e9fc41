"""GBNF, the grammar language of llama.cpp, read as llama.cpp reads it.

What `parse` takes and what it means is what `src/llama-grammar.cpp` of
llama.cpp makes of it, oddities included: `[]` and `[^]` are the empty text,
a range written backwards matches nothing, of two rules of one name the last
counts, a repetition applies to a whole string. Stricter is one thing: a
bound of more than 2000 repetitions is refused where llama.cpp takes some for
no bound. Wider is another: left recursion, which llama.cpp refuses, is fine.

Two differences follow from texts here being UTF-8: surrogates and numbers
past U+10FFFF are no characters, and U+0000 is one like any other.

Called by `engine.grammar.grammar`; what becomes of the rules is `engine.grammar.lark_writer`'.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

from erllama.engine.grammar.expressions import (
    MAX_CODE_POINT,
    SURROGATES,
    Kind,
    Pool,
    Token,
    holds,
    inverted,
    normalized,
    reached,
)
from erllama.errors import GrammarError

# llama.cpp's MAX_REPETITION_THRESHOLD.
_MAX_REPETITIONS = 2000
# Parentheses within parentheses; every level takes a few frames of Python's stack later on.
_MAX_NESTING = 100
_MAX_RULES = 20_000
# Separate ranges of a character class. All letters of Unicode are about 700.
_MAX_RANGES = 10_000
_NAME = re.compile(r"[A-Za-z0-9-]+")
_DIGITS = re.compile(r"[0-9]+")
_HEX = {"x": 2, "u": 4, "U": 8}
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_NEWLINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_TOKEN = re.compile(r"<(?:\[([0-9]+)\]|(?!\[)[^>]*)>")
# What stands for itself: in a string, and in a class, where it is not the start of a range.
_PLAIN_TEXT = re.compile(r'[^"\\]+')
_PLAIN_CLASS = re.compile(r"[^\]\\-]+(?!-)")
_NEWLINE = re.compile(r"\r\n|\r|\n")


class Rules(NamedTuple):
    """A grammar that was read and found sound: every rule that `root` needs is there and has a text."""

    pool: Pool
    rules: dict[str, int]
    root: str

    @property
    def tokens(self) -> list[Token]:
        """The references to tokens, in no particular order."""
        found = {id for rule in self.rules.values() for id in self.pool.below(rule)}
        return [value for id in found if isinstance(value := self.pool[id].value, Token)]


def parse(source: str, root: str = "root") -> Rules:
    """Read a grammar.

    Args:
        source: the grammar in GBNF.
        root: the rule that a whole text matches.

    Returns:
        the rules that `root` leads to.

    Raises:
        GrammarError: it is no GBNF, a rule is missing, or one matches no text that ends; with line and column.
    """
    parser = _Parser(source)
    parser.read()
    if not parser.rules:
        raise GrammarError('the grammar is empty; it needs a rule, such as root ::= "yes" | "no"')
    if root not in parser.rules:
        raise GrammarError(f"the grammar has no rule {root!r}; it has {_some(parser.rules)}")
    parser.check_references()
    rules = reached(parser.pool, parser.rules, root)
    have_texts = holds(parser.pool, rules, lambda id: id != parser.pool.nothing)
    for name, id in rules.items():
        if id not in have_texts:
            parser.fail(f"no text ever ends rule {name!r}", parser.defined[name])
    return Rules(parser.pool, rules, root)


def _place(source: str, at: int) -> tuple[int, int]:
    """Line and column, from 1, of an offset in a text."""
    before = list(_NEWLINE.finditer(source, 0, at))
    return len(before) + 1, at - (before[-1].end() if before else 0) + 1


def error_at(source: str, at: int, problem: str) -> GrammarError:
    """An error that tells where, and shows what is there."""
    line, column = _place(source, at)
    shown = _NEWLINE.split(source[at : at + 40])[0]
    problem = f"{problem}: {shown!r}" if shown else problem
    return GrammarError(f"line {line}, column {column}: {problem}", line=line, column=column)


class _Group(NamedTuple):
    """What is open between parentheses, or in a rule outside of any."""

    options: list[int]
    items: list[int]
    at: int


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.pool = Pool()
        self.rules: dict[str, int] = {}
        self.defined: dict[str, int] = {}
        self.references: dict[str, int] = {}

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        raise error_at(self.source, self.at if at is None else at, problem)

    def read(self) -> None:
        bad = re.search("[\0\ud800-\udfff]", self.source)
        if bad is not None:
            self.fail("a character that no text has", bad.start())
        self._space(newlines=True)
        while self.at < len(self.source):
            self._rule()

    def check_references(self) -> None:
        for id in sorted({id for rule in self.rules.values() for id in self.pool.below(rule)}):
            name = self.pool[id].value
            if self.pool[id].kind is Kind.REFERENCE and isinstance(name, str) and name not in self.rules:
                self.fail(f"there is no rule {name!r}", self.references[name])

    def _rule(self) -> None:
        start = self.at
        name = self._take(_NAME, "the name of a rule was expected")
        self._space()
        if not self.source.startswith("::=", self.at):
            self.fail("::= was expected")
        self.at += 3
        self._space(newlines=True)
        # Of two definitions the last counts.
        self.rules[name] = self._alternatives()
        self.defined[name] = start
        if len(self.rules) > _MAX_RULES:
            self.fail(f"more than {_MAX_RULES} rules", start)
        if self.at < len(self.source) and not _NEWLINE.match(self.source, self.at):
            self.fail("a new line was expected, or something that can stand in a rule")
        self._space(newlines=True)

    def _alternatives(self) -> int:
        """Everything after ::=, up to what cannot be part of it."""
        open_ = [_Group([], [], self.at)]
        while True:
            nested, next_ = len(open_) > 1, self.source[self.at : self.at + 1]
            group = open_[-1]
            if next_ == "(":
                if len(open_) > _MAX_NESTING:
                    self.fail(f"nested too deeply: more than {_MAX_NESTING} parentheses are open")
                open_.append(_Group([], [], self.at))
                self.at += 1
                self._space(newlines=True)
            elif next_ == "|":
                group.options.append(self.pool.sequence(group.items))
                group.items.clear()
                self.at += 1
                self._space(newlines=True)
            elif next_ == ")" and nested:
                open_.pop()
                self.at += 1
                open_[-1].items.append(self._closed(group))
                self._space(newlines=len(open_) > 1)
            elif next_ and next_ in "*+?{":
                self._repetition(group.items, nested)
            elif (item := self._item(next_)) is not None:
                group.items.append(item)
                self._space(newlines=nested)
            elif nested:
                self.fail("')' was expected" if next_ else "it is never closed", None if next_ else group.at)
            else:
                return self._closed(group)

    def _closed(self, group: _Group) -> int:
        return self.pool.choice([*group.options, self.pool.sequence(group.items)])

    def _item(self, next_: str) -> int | None:
        if next_ == '"':
            return self._string()
        if next_ == "[":
            return self._class()
        if next_ == ".":
            self.at += 1
            return self.pool.chars([(0, MAX_CODE_POINT)])
        if next_ and next_ in "<!":
            return self._token()
        if _NAME.match(next_):
            at = self.at
            name = self._take(_NAME, "")
            self.references.setdefault(name, at)
            return self.pool.reference(name)
        return None

    def _repetition(self, items: list[int], nested: bool) -> None:
        at, sign = self.at, self.source[self.at]
        if not items:
            self.fail("there is nothing before it to repeat")
        self.at += 1
        self._space(newlines=nested)
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign) or self._bounds(nested)
        for bound in (least, most or 0):
            if bound > _MAX_REPETITIONS:
                self.fail(f"at most {_MAX_REPETITIONS} repetitions can be counted", at)
        if most is not None and most < least:
            self.fail(f"at least {least} repetitions, and at most {most}", at)
        items[-1] = self.pool.repeat(items[-1], least, most)

    def _bounds(self, nested: bool) -> tuple[int, int | None]:
        least = self._number(nested)
        most: int | None = least
        if self.source.startswith(",", self.at):
            self.at += 1
            self._space(newlines=nested)
            most = self._number(nested) if _DIGITS.match(self.source, self.at) else None
        if not self.source.startswith("}", self.at):
            self.fail("'}' was expected")
        self.at += 1
        self._space(newlines=nested)
        return least, most

    def _number(self, nested: bool) -> int:
        digits = self._take(_DIGITS, "a number was expected").lstrip("0")
        self._space(newlines=nested)
        # Nine digits are past every limit, and Python refuses thousands of them.
        return int(digits[:9] or "0")

    def _string(self) -> int:
        start = self.at
        self.at += 1
        points: list[int] = []
        while not self.source.startswith('"', self.at):
            if (plain := _PLAIN_TEXT.match(self.source, self.at)) is not None:
                points += map(ord, plain.group())
                self.at = plain.end()
                continue
            at = self.at
            point = self._char(start)
            if point > MAX_CODE_POINT or SURROGATES[0] <= point <= SURROGATES[1]:
                self.fail(f"U+{point:04X} is no character; one past U+FFFF is written as \\U0001F600", at)
            points.append(point)
        self.at += 1
        return self.pool.literal(points)

    def _class(self) -> int:
        start = self.at
        negated = self.source.startswith("[^", start)
        self.at += 2 if negated else 1
        ranges: list[tuple[int, int]] = []
        while not self.source.startswith("]", self.at):
            if (plain := _PLAIN_CLASS.match(self.source, self.at)) is not None:
                ranges += ((point, point) for point in map(ord, set(plain.group())))
                self.at = plain.end()
                continue
            low = high = self._char(start)
            if self.source.startswith("-", self.at) and not self.source.startswith("-]", self.at):
                self.at += 1
                high = self._char(start)
            ranges.append((low, high))
        self.at += 1
        if not ranges:
            return self.pool.empty
        ranges = list(normalized(ranges))
        if len(ranges) > _MAX_RANGES:
            self.fail(
                f"a character class of {len(ranges)} separate ranges; at most {_MAX_RANGES} are supported", start
            )
        return self.pool.chars(inverted(ranges) if negated else ranges)

    def _char(self, start: int) -> int:
        """One character of a string or class that begins at `start`."""
        if self.at >= len(self.source):
            self.fail("it is never closed", start)
        char = self.source[self.at]
        if char != "\\":
            self.at += 1
            return ord(char)
        escape = self.source[self.at + 1 : self.at + 2]
        if escape in _ESCAPES:
            self.at += 2
            return ord(_ESCAPES[escape])
        if escape not in _HEX:
            self.fail("an escape that there is not")
        digits = self.source[self.at + 2 : self.at + 2 + _HEX[escape]]
        if not re.fullmatch(f"[0-9a-fA-F]{{{_HEX[escape]}}}", digits):
            self.fail(f"\\{escape} takes {_HEX[escape]} hexadecimal digits")
        self.at += 2 + len(digits)
        return int(digits, 16)

    def _token(self) -> int:
        at = self.at
        negated = self.source.startswith("!", at)
        found = _TOKEN.match(self.source, at + int(negated))
        if found is None:
            self.fail("a token was expected, as <[1234]> or <|name|>")
        self.at = found.end()
        number = found.group(1)
        return self.pool.token(Token(None if number is None else int(number[:18]), found.group(), negated, at))

    def _take(self, pattern: re.Pattern[str], problem: str) -> str:
        found = pattern.match(self.source, self.at)
        if found is None:
            self.fail(problem)
        self.at = found.end()
        return found.group()

    def _space(self, newlines: bool = False) -> None:
        found = (_SPACE_AND_NEWLINES if newlines else _SPACE).match(self.source, self.at)
        assert found is not None
        self.at = found.end()


def _some(names: dict[str, int]) -> str:
    shown = list(names)[:5]
    return ", ".join(map(repr, shown)) + (" and others" if len(names) > len(shown) else "")
