"""Lark rules as data: their types, their simplification and their text.

`engine.grammar.schemas.rules` builds the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from erllama.errors import GrammarError

# A JSON string. Escapes are for control characters, the quote and the backslash only.
JSON_STRING = r'/"(?:[^"\\\x00-\x1F\x7F]|\\["\\bfnrt]|\\u00(?:[01][0-9A-Fa-f]|7[Ff]))*"/'
_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\\\"}


class Repetition(NamedTuple):
    """A repeated symbol; a `maximum` of None is without limit."""

    symbol: str
    minimum: int
    maximum: int | None


# The alternatives of a rule. Each is a sequence of names of rules and terminals, and of literal Lark.
Body = list[list["str | Repetition"]]


class LarkFragment(NamedTuple):
    """A schema in Lark: the expression for it in a rule, and the lines of the rules and terminals that it needs."""

    expression: str
    lines: list[str]


def quoted_name(name: str) -> str:
    """Return a regular expression of a name in JSON, with every spelling that `JSON_STRING` allows."""
    return "\\x{22}" + "".join(map(_character_pattern, name)) + "\\x{22}"


def _character_pattern(character: str) -> str:
    point = ord(character)
    if 0xD800 <= point <= 0xDFFF:
        raise GrammarError(f"a name in the schema has U+{point:04X}, a surrogate, which no text contains")
    if point >= 0x20 and point != 0x7F and point not in _SHORT:
        return character if point < 128 and character.isalnum() else f"\\x{{{point:X}}}"
    spellings = [f"\\\\{_SHORT[point]}"] if point in _SHORT else []
    if point < 0x20 or point == 0x7F:
        digits = "".join(f"[{digit.lower()}{digit.upper()}]" for digit in f"{point:02X}")
        spellings.append(f"\\\\u00{digits}")
    return f"(?:{'|'.join(spellings)})"


def format_sequence(symbols: Sequence[str | Repetition]) -> str:
    """Return a sequence of symbols in Lark."""
    return " ".join(symbol if isinstance(symbol, str) else _format_repetition(symbol) for symbol in symbols) or '""'


def _format_repetition(repetition: Repetition) -> str:
    if (repetition.minimum, repetition.maximum) == (0, None):
        return f"{repetition.symbol}*"
    return f"{repetition.symbol}{{{repetition.minimum},{'' if repetition.maximum is None else repetition.maximum}}}"


def productive_rules(bodies: dict[str, Body]) -> dict[str, Body]:
    """Return the rules that have a text, with the alternatives that have one.

    Removes repetitions of at most zero times, which llguidance refuses.
    """
    users: dict[str, list[tuple[str, int]]] = {}
    missing: dict[tuple[str, int], int] = {}
    found: set[str] = set()
    pending: list[str] = []
    for name, body in bodies.items():
        for at, symbols in enumerate(body):
            needed = {rule for symbol in symbols if (rule := _needed(symbol)) in bodies}
            missing[name, at] = len(needed)
            for rule in needed:
                users.setdefault(rule, []).append((name, at))
            if not needed:
                pending.append(name)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        for user, at in users.get(name, ()):
            missing[user, at] -= 1
            if not missing[user, at]:
                pending.append(user)
    return {
        name: [
            [
                symbol
                for symbol in symbols
                if isinstance(symbol, str) or (symbol.maximum != 0 and symbol.symbol in found)
            ]
            for at, symbols in enumerate(bodies[name])
            if not missing[name, at]
        ]
        for name in bodies
        if name in found
    }


def _needed(symbol: str | Repetition) -> str:
    """Return the symbol that must have a text; empty for a symbol that may occur zero times."""
    if isinstance(symbol, str):
        return symbol
    return symbol.symbol if symbol.minimum else ""


def reachable(bodies: dict[str, Body], start: str) -> dict[str, None]:
    """Return the symbols that `start` leads to, in order of discovery."""
    found = {start: None}
    pending = [start]
    while pending:
        for symbols in bodies.get(pending.pop(), []):
            for symbol in symbols:
                name = symbol if isinstance(symbol, str) else symbol.symbol
                if name not in found:
                    found[name] = None
                    pending.append(name)
    return found
