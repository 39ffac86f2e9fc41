"""The writer of GBNF rules as a Lark grammar for llguidance, of exactly the same language.

It rewrites the rules (`engine.grammar.rule_rewriting`), builds terminals (`engine.grammar.terminals`), and writes
the result. Called by `engine.grammar.grammar`.
"""

from __future__ import annotations

from collections.abc import Callable

from erllama.engine.grammar.expressions import ExpressionKind, ExpressionPool, Ranges, RepeatBounds, TokenReference
from erllama.engine.grammar.rule_rewriting import eliminate_tail_recursion, inline_rules
from erllama.engine.grammar.terminals import fits_terminal, split_into_terminals

# llguidance refuses about 30 nested parentheses. Deeper ones become separate rules.
_MAX_PARENTHESES = 5
_HEADER = '%llguidance {"no_forcing": true}\n'


def write_lark(
    pool: ExpressionPool, rules: dict[str, int], root: str, format_token: Callable[[TokenReference], str]
) -> str:
    """Write a grammar in llguidance's Lark.

    Args:
        pool: the expressions.
        rules: by name, with every rule that they refer to. Each rule must have a text.
        root: the rule that a whole text matches.
        format_token: writes a token reference in Lark, such as `<[12]>`.

    Returns:
        a text whose start symbol has the language of `root`.
    """
    rules = eliminate_tail_recursion(pool, rules)
    rules = inline_rules(pool, rules, root)
    if pool[rules[root]].regular and fits_terminal(pool, rules[root]):
        # The whole grammar is one terminal.
        return _HEADER + f"start: ALL\nALL: /{_pattern(pool, rules[root])}/\n"
    return _LarkWriter(pool, split_into_terminals(pool, rules, root), root, format_token).text()


class _LarkWriter:
    """Writes expressions of terminals as Lark."""

    def __init__(
        self, pool: ExpressionPool, rules: dict[str, int], root: str, format_token: Callable[[TokenReference], str]
    ) -> None:
        self._pool, self._rules, self._root, self._format_token = pool, rules, root, format_token
        self._names = {name: f"r{at}" for at, name in enumerate(rules)}
        self._terminals: dict[int, str] = {}
        self._groups: dict[int, str] = {}
        self._pending: list[int] = []

    def text(self) -> str:
        lines = [f"start: {self._names[self._root]}"]
        lines += [f"{self._names[name]}: {self._body(id)}" for name, id in self._rules.items()]
        while self._pending:
            id = self._pending.pop()
            lines.append(f"{self._groups[id]}: {self._body(id)}")
        lines += [f"{name}: /{_pattern(self._pool, read)}/" for read, name in self._terminals.items()]
        return _HEADER + "\n".join(lines) + "\n"

    def _body(self, id: int, level: int = 0) -> str:
        expression = self._pool[id]
        inner = [self._item(part, level) for part in expression.parts]
        if expression.kind is ExpressionKind.SEQUENCE:
            return " ".join(inner) or '""'
        if expression.kind is ExpressionKind.CHOICE:
            return " | ".join(inner)
        return self._item(id, level)

    def _item(self, id: int, level: int) -> str:
        expression, value = self._pool[id], self._pool[id].value
        if expression.kind is ExpressionKind.REFERENCE:
            return self._names[str(value)]
        if isinstance(value, TokenReference):
            return self._format_token(value)
        if isinstance(value, int):
            return self._terminals.setdefault(self._pool.nonempty(value), f"L{len(self._terminals)}")
        if isinstance(value, RepeatBounds):
            inner = expression.parts[0]
            again = self._pool[inner].kind is ExpressionKind.REPEAT
            return (self._group(inner) if again else self._item(inner, level)) + _quantifier(value)
        if id == self._pool.empty_text:
            return '""'
        if id == self._pool.empty_set:
            # No character is both.
            return "/[a&&b]/"
        return f"({self._body(id, level + 1)})" if level < _MAX_PARENTHESES else self._group(id)

    def _group(self, id: int) -> str:
        """Return the name of a new rule for an expression."""
        if id not in self._groups:
            self._groups[id] = f"g{len(self._groups)}"
            self._pending.append(id)
        return self._groups[id]


def _pattern(pool: ExpressionPool, id: int) -> str:
    """Return the text of a regular expression."""
    texts: dict[int, str] = {}
    for below in pool.descendants(id):
        expression = pool[below]
        inner = [texts[part] for part in expression.parts]
        if expression.kind is ExpressionKind.CHARS:
            texts[below] = _char_class(pool.ranges(below))
        elif expression.kind is ExpressionKind.SEQUENCE:
            texts[below] = "".join(inner)
        elif expression.kind is ExpressionKind.CHOICE:
            texts[below] = f"(?:{'|'.join(inner)})"
        else:
            plain = pool[expression.parts[0]].kind in (ExpressionKind.CHARS, ExpressionKind.CHOICE)
            texts[below] = (inner[0] if plain else f"(?:{inner[0]})") + _quantifier(pool.bounds(below))
    return texts[id]


def _char_class(ranges: Ranges) -> str:
    if not ranges:
        return "[a&&b]"
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _char(ranges[0][0])
    return "[" + "".join(_char(low) + (f"-{_char(high)}" if high > low else "") for low, high in ranges) + "]"


def _char(point: int) -> str:
    return chr(point) if point < 128 and chr(point).isalnum() else f"\\x{{{point:X}}}"


def _quantifier(bounds: RepeatBounds) -> str:
    signs = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    maximum = "" if bounds.maximum is None else bounds.maximum
    return signs.get(bounds) or f"{{{bounds.minimum},{maximum}}}"
