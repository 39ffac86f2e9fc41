"""Lark rules as data: built, simplified and written. `engine.grammar.schemas.rules` builds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from erllama.errors import GrammarError

# A text as JSON has it here: escapes are for control characters, the quote and the backslash only.
ANY_TEXT = r'/"(?:[^"\\\x00-\x1F\x7F]|\\["\\bfnrt]|\\u00(?:[01][0-9A-Fa-f]|7[Ff]))*"/'
_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\\\"}


class Times(NamedTuple):
    """A symbol repeated; `most` None is without limit."""

    symbol: str
    least: int
    most: int | None


# The alternatives of a rule, each a sequence of names of rules, terminals, and Lark that stands for itself.
Body = list[list["str | Times"]]


class Written(NamedTuple):
    """A schema as Lark: what stands for it in a rule, and the rules and terminals that it needs."""

    expression: str
    lines: list[str]


def quoted(name: str) -> str:
    """A regular expression of a name as JSON writes it, in every way that `ANY_TEXT` has for it."""
    return "\\x{22}" + "".join(map(_spelled, name)) + "\\x{22}"


def _spelled(character: str) -> str:
    point = ord(character)
    if 0xD800 <= point <= 0xDFFF:
        raise GrammarError(f"a name in the schema has U+{point:04X}, a character that no text has")
    if point >= 0x20 and point != 0x7F and point not in _SHORT:
        return character if point < 128 and character.isalnum() else f"\\x{{{point:X}}}"
    ways = [f"\\\\{_SHORT[point]}"] if point in _SHORT else []
    if point < 0x20 or point == 0x7F:
        digits = "".join(f"[{digit.lower()}{digit.upper()}]" for digit in f"{point:02X}")
        ways.append(f"\\\\u00{digits}")
    return f"(?:{'|'.join(ways)})"


def sequence(symbols: Sequence[str | Times]) -> str:
    return " ".join(symbol if isinstance(symbol, str) else _times(symbol) for symbol in symbols) or '""'


def _times(times: Times) -> str:
    if (times.least, times.most) == (0, None):
        return f"{times.symbol}*"
    return f"{times.symbol}{{{times.least},{'' if times.most is None else times.most}}}"


def productive(bodies: dict[str, Body]) -> dict[str, Body]:
    """The rules that have a text, of the alternatives that have one."""
    users: dict[str, list[tuple[str, int]]] = {}
    missing: dict[tuple[str, int], int] = {}
    found: set[str] = set()
    open_: list[str] = []
    for name, body in bodies.items():
        for at, symbols in enumerate(body):
            needed = {rule for symbol in symbols if (rule := _needed(symbol)) in bodies}
            missing[name, at] = len(needed)
            for rule in needed:
                users.setdefault(rule, []).append((name, at))
            if not needed:
                open_.append(name)
    while open_:
        name = open_.pop()
        if name in found:
            continue
        found.add(name)
        for user, at in users.get(name, ()):
            missing[user, at] -= 1
            if not missing[user, at]:
                open_.append(user)
    return {
        name: [
            [symbol for symbol in symbols if not isinstance(symbol, Times) or symbol.symbol in found]
            for at, symbols in enumerate(bodies[name])
            if not missing[name, at]
        ]
        for name in bodies
        if name in found
    }


def _needed(symbol: str | Times) -> str:
    """The symbol that must have a text; what may be repeated zero times need not."""
    if isinstance(symbol, str):
        return symbol
    return symbol.symbol if symbol.least else ""


def reached(bodies: dict[str, Body], start: str) -> dict[str, None]:
    found = {start: None}
    open_ = [start]
    while open_:
        for symbols in bodies.get(open_.pop(), []):
            for symbol in symbols:
                name = symbol if isinstance(symbol, str) else symbol.symbol
                if name not in found:
                    found[name] = None
                    open_.append(name)
    return found
