"""The parser of GBNF, the grammar language of llama.cpp.

`parse` accepts and interprets GBNF as `src/llama-grammar.cpp` of llama.cpp does, oddities included: `[]` and `[^]`
are the empty text, a range with its ends swapped has no character, the last of two rules of one name counts, and a
repetition applies to a whole string. The parser is stricter in one point: it refuses a bound of more than 2000
repetitions, some of which llama.cpp treats as no bound. It accepts more in one point: left recursion, which
llama.cpp refuses.

Two differences follow from texts being UTF-8 here: surrogates and numbers above U+10FFFF are not characters, and
U+0000 is an ordinary character.

Called by `engine.grammar.grammar`. `engine.grammar.lark_writer` translates the rules.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

from erllama.engine.grammar.expressions import (
    MAX_CODE_POINT,
    SURROGATES,
    ExpressionKind,
    ExpressionPool,
    TokenReference,
    complement,
    normalize,
    reachable_rules,
    satisfying,
)
from erllama.errors import GrammarError

# llama.cpp's MAX_REPETITION_THRESHOLD.
_MAX_REPETITIONS = 2000
# Nested parentheses. Each level takes a few frames of Python's stack later.
_MAX_NESTING = 100
_MAX_RULES = 20_000
# Separate ranges of a character class. All letters of Unicode have about 700.
_MAX_RANGES = 10_000
_NAME = re.compile(r"[A-Za-z0-9-]+")
_DIGITS = re.compile(r"[0-9]+")
_HEX = {"x": 2, "u": 4, "U": 8}
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]"}
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_NEWLINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_TOKEN = re.compile(r"<(?:\[([0-9]+)\]|(?!\[)[^>]*)>")
# Literal characters: in a string, and in a class, where they do not start a range.
_PLAIN_TEXT = re.compile(r'[^"\\]+')
_PLAIN_CLASS = re.compile(r"[^\]\\-]+(?!-)")
_NEWLINE = re.compile(r"\r\n|\r|\n")


class ParsedGrammar(NamedTuple):
    """A parsed grammar: it has every rule that `root` needs, and each rule has a text."""

    pool: ExpressionPool
    rules: dict[str, int]
    root: str

    @property
    def tokens(self) -> list[TokenReference]:
        """The references to tokens, in no particular order."""
        found = {id for rule in self.rules.values() for id in self.pool.descendants(rule)}
        return [value for id in found if isinstance(value := self.pool[id].value, TokenReference)]


def parse(source: str, root: str = "root") -> ParsedGrammar:
    """Read a grammar.

    Args:
        source: the grammar in GBNF.
        root: the rule that a whole text matches.

    Returns:
        the rules that `root` leads to.

    Raises:
        GrammarError: the source is not GBNF, a rule is missing, or a rule has no finite text; with line and column.
    """
    parser = _Parser(source)
    parser.read()
    if not parser.rules:
        raise GrammarError('the grammar is empty; it needs a rule, such as root ::= "yes" | "no"')
    if root not in parser.rules:
        raise GrammarError(f"the grammar has no rule {root!r}; it has {_some(parser.rules)}")
    parser.check_references()
    rules = reachable_rules(parser.pool, parser.rules, root)
    have_texts = satisfying(parser.pool, rules, lambda id: id != parser.pool.empty_set)
    for name, id in rules.items():
        if id not in have_texts:
            parser.fail(f"the rule {name!r} has no finite text", parser.defined[name])
    return ParsedGrammar(parser.pool, rules, root)


def _place(source: str, at: int) -> tuple[int, int]:
    """Return line and column, from 1, of an offset in a text."""
    before = list(_NEWLINE.finditer(source, 0, at))
    return len(before) + 1, at - (before[-1].end() if before else 0) + 1


def error_at(source: str, at: int, problem: str) -> GrammarError:
    """Return an error with line and column, which quotes the source there."""
    line, column = _place(source, at)
    shown = _NEWLINE.split(source[at : at + 40])[0]
    problem = f"{problem}: {shown!r}" if shown else problem
    return GrammarError(f"line {line}, column {column}: {problem}", line=line, column=column)


class _Group(NamedTuple):
    """The options and items of an open parenthesis, or of a rule."""

    options: list[int]
    items: list[int]
    at: int


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.pool = ExpressionPool()
        self.rules: dict[str, int] = {}
        self.defined: dict[str, int] = {}
        self.references: dict[str, int] = {}

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        raise error_at(self.source, self.at if at is None else at, problem)

    def read(self) -> None:
        bad = re.search("[\0\ud800-\udfff]", self.source)
        if bad is not None:
            self.fail("a character that no text contains", bad.start())
        self._skip_space(newlines=True)
        while self.at < len(self.source):
            self._parse_rule()

    def check_references(self) -> None:
        for id in sorted({id for rule in self.rules.values() for id in self.pool.descendants(rule)}):
            name = self.pool[id].value
            if self.pool[id].kind is ExpressionKind.REFERENCE and isinstance(name, str) and name not in self.rules:
                self.fail(f"there is no rule {name!r}", self.references[name])

    def _parse_rule(self) -> None:
        start = self.at
        name = self._take(_NAME, "expected the name of a rule")
        self._skip_space()
        if not self.source.startswith("::=", self.at):
            self.fail("expected ::=")
        self.at += 3
        self._skip_space(newlines=True)
        # The last of two definitions counts.
        self.rules[name] = self._parse_alternatives()
        self.defined[name] = start
        if len(self.rules) > _MAX_RULES:
            self.fail(f"more than {_MAX_RULES} rules", start)
        if self.at < len(self.source) and not _NEWLINE.match(self.source, self.at):
            self.fail("expected a new line or an element of a rule")
        self._skip_space(newlines=True)

    def _parse_alternatives(self) -> int:
        """Parse the alternatives after ::=, up to the first character that cannot belong to them."""
        pending = [_Group([], [], self.at)]
        while True:
            nested, next_ = len(pending) > 1, self.source[self.at : self.at + 1]
            group = pending[-1]
            if next_ == "(":
                if len(pending) > _MAX_NESTING:
                    self.fail(f"nested too deeply: more than {_MAX_NESTING} parentheses are open")
                pending.append(_Group([], [], self.at))
                self.at += 1
                self._skip_space(newlines=True)
            elif next_ == "|":
                group.options.append(self.pool.sequence(group.items))
                group.items.clear()
                self.at += 1
                self._skip_space(newlines=True)
            elif next_ == ")" and nested:
                pending.pop()
                self.at += 1
                pending[-1].items.append(self._close_group(group))
                self._skip_space(newlines=len(pending) > 1)
            elif next_ and next_ in "*+?{":
                self._parse_repetition(group.items, nested)
            elif (item := self._parse_item(next_)) is not None:
                group.items.append(item)
                self._skip_space(newlines=nested)
            elif nested:
                self.fail("expected ')'" if next_ else "never closed", None if next_ else group.at)
            else:
                return self._close_group(group)

    def _close_group(self, group: _Group) -> int:
        return self.pool.choice([*group.options, self.pool.sequence(group.items)])

    def _parse_item(self, next_: str) -> int | None:
        if next_ == '"':
            return self._parse_string()
        if next_ == "[":
            return self._parse_class()
        if next_ == ".":
            self.at += 1
            return self.pool.chars([(0, MAX_CODE_POINT)])
        if next_ and next_ in "<!":
            return self._parse_token()
        if _NAME.match(next_):
            at = self.at
            name = self._take(_NAME, "")
            self.references.setdefault(name, at)
            return self.pool.reference(name)
        return None

    def _parse_repetition(self, items: list[int], nested: bool) -> None:
        at, sign = self.at, self.source[self.at]
        if not items:
            self.fail("the repetition has no element before it")
        self.at += 1
        self._skip_space(newlines=nested)
        minimum, maximum = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign) or self._parse_bounds(nested)
        for bound in (minimum, maximum or 0):
            if bound > _MAX_REPETITIONS:
                self.fail(f"at most {_MAX_REPETITIONS} repetitions can be counted", at)
        if maximum is not None and maximum < minimum:
            self.fail(f"at least {minimum} repetitions, and at most {maximum}", at)
        items[-1] = self.pool.repeat(items[-1], minimum, maximum)

    def _parse_bounds(self, nested: bool) -> tuple[int, int | None]:
        minimum = self._parse_number(nested)
        maximum: int | None = minimum
        if self.source.startswith(",", self.at):
            self.at += 1
            self._skip_space(newlines=nested)
            maximum = self._parse_number(nested) if _DIGITS.match(self.source, self.at) else None
        if not self.source.startswith("}", self.at):
            self.fail("expected '}'")
        self.at += 1
        self._skip_space(newlines=nested)
        return minimum, maximum

    def _parse_number(self, nested: bool) -> int:
        digits = self._take(_DIGITS, "expected a number").lstrip("0")
        self._skip_space(newlines=nested)
        # Nine digits exceed every limit, and Python refuses thousands of digits.
        return int(digits[:9] or "0")

    def _parse_string(self) -> int:
        start = self.at
        self.at += 1
        points: list[int] = []
        while not self.source.startswith('"', self.at):
            if (plain := _PLAIN_TEXT.match(self.source, self.at)) is not None:
                points += map(ord, plain.group())
                self.at = plain.end()
                continue
            at = self.at
            point = self._parse_char(start)
            if point > MAX_CODE_POINT or SURROGATES[0] <= point <= SURROGATES[1]:
                self.fail(f"U+{point:04X} is not a character; write one above U+FFFF as \\U0001F600", at)
            points.append(point)
        self.at += 1
        return self.pool.literal(points)

    def _parse_class(self) -> int:
        start = self.at
        negated = self.source.startswith("[^", start)
        self.at += 2 if negated else 1
        ranges: list[tuple[int, int]] = []
        while not self.source.startswith("]", self.at):
            if (plain := _PLAIN_CLASS.match(self.source, self.at)) is not None:
                ranges += ((point, point) for point in map(ord, set(plain.group())))
                self.at = plain.end()
                continue
            low = high = self._parse_char(start)
            if self.source.startswith("-", self.at) and not self.source.startswith("-]", self.at):
                self.at += 1
                high = self._parse_char(start)
            ranges.append((low, high))
        self.at += 1
        if not ranges:
            return self.pool.empty_text
        ranges = list(normalize(ranges))
        if len(ranges) > _MAX_RANGES:
            self.fail(
                f"a character class of {len(ranges)} separate ranges; at most {_MAX_RANGES} are supported", start
            )
        return self.pool.chars(complement(ranges) if negated else ranges)

    def _parse_char(self, start: int) -> int:
        """Parse one character of the string or class that begins at `start`."""
        if self.at >= len(self.source):
            self.fail("never closed", start)
        char = self.source[self.at]
        if char != "\\":
            self.at += 1
            return ord(char)
        escape = self.source[self.at + 1 : self.at + 2]
        if escape in _ESCAPES:
            self.at += 2
            return ord(_ESCAPES[escape])
        if escape not in _HEX:
            self.fail("unknown escape")
        digits = self.source[self.at + 2 : self.at + 2 + _HEX[escape]]
        if not re.fullmatch(f"[0-9a-fA-F]{{{_HEX[escape]}}}", digits):
            self.fail(f"\\{escape} takes {_HEX[escape]} hexadecimal digits")
        self.at += 2 + len(digits)
        return int(digits, 16)

    def _parse_token(self) -> int:
        at = self.at
        negated = self.source.startswith("!", at)
        found = _TOKEN.match(self.source, at + int(negated))
        if found is None:
            self.fail("expected a token, such as <[1234]> or <|name|>")
        self.at = found.end()
        number = found.group(1)
        return self.pool.token(
            TokenReference(None if number is None else int(number[:18]), found.group(), negated, at)
        )

    def _take(self, pattern: re.Pattern[str], problem: str) -> str:
        found = pattern.match(self.source, self.at)
        if found is None:
            self.fail(problem)
        self.at = found.end()
        return found.group()

    def _skip_space(self, newlines: bool = False) -> None:
        found = (_SPACE_AND_NEWLINES if newlines else _SPACE).match(self.source, self.at)
        assert found is not None
        self.at = found.end()


def _some(names: dict[str, int]) -> str:
    shown = list(names)[:5]
    return ", ".join(map(repr, shown)) + (" and others" if len(names) > len(shown) else "")
