"""Rules and terminals of a Lark grammar: pieces of syntax, JSON by a schema, and unquoted text.

`RuleWriter` collects the rules of one grammar. Equal rules are written once. `call_grammar` and `gemma_grammar`
write with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from erllama.chat.tool_calls.parameter_schemas import (
    MAX_DEPTH,
    as_list,
    find_allowed_types,
    get_choices,
    resolve_reference,
)
from erllama.chat.tool_calls.syntax import ID
from erllama.engine.grammar.schemas import json_schema as schemas
from erllama.engine.grammar.schemas.keywords import with_plain_counts
from erllama.errors import GrammarError

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
# Text that is read as null if an argument may be a string or null.
_NULLS = r"[\x20\t\r\n]*(?:null|None)[\x20\t\r\n]*"


def quote(text: str) -> str:
    """Return a text as a Lark string: a JSON string without DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def is_quoted(expression: str) -> bool:
    """Return whether a Lark expression is one string."""
    return _QUOTED.fullmatch(expression) is not None


def escape_regex(text: str) -> str:
    """Return a text escaped for a regular expression in Lark."""
    return "".join(f"\\x{{{ord(letter):x}}}" if not letter.isalnum() else letter for letter in text)


class RuleWriter:
    """Collects the rules and terminals of one grammar.

    Args:
        literal: returns the Lark expression for a text in which special tokens may be spelled out.
        id_pattern: regular expression of call ids.
    """

    def __init__(self, literal: Callable[[str], str], id_pattern: str) -> None:
        self.literal = literal
        self._id_pattern = id_pattern
        self._rules: list[str] = []
        self._names: dict[str, str] = {}

    def source(self, starts: Sequence[str]) -> str:
        """Return the grammar's text, whose start rule has these alternatives."""
        space = "WS: /[\\x20\\t\\r\\n]{1,40}/"
        return "\n".join([f"start: {' | '.join(starts)}", space, *self._rules, ""])

    def add_rule(self, *alternatives: str) -> str:
        """Add a rule and return its name."""
        return self._add("r", " | ".join(f"({alternative})" for alternative in alternatives))

    def add_terminal(self, expression: str) -> str:
        """Add a terminal and return its name."""
        return self._add("T", expression)

    def add_named_rule(self, name: str, expression: str) -> None:
        """Add a rule with this name."""
        self._rules.append(f"{name}: {expression}")

    def write_piece(self, piece: str) -> str:
        """Return the expression of a piece of syntax."""
        parts = []
        for part in re.split(f"([~{ID}])", piece):
            if part == "~":
                parts.append("WS?")
            elif part == ID:
                parts.append(self.add_terminal(f"/{self._id_pattern}/"))
            elif part:
                parts.append(self.literal(part))
        return " ".join(parts) or '""'

    def write_json(self, schema: Mapping[str, object]) -> str:
        """Return the expression of JSON by a schema. Equal schemas share their rules."""
        expression, lines = schemas.to_lark(schemas.to_source(schema))
        self._rules += (line for line in lines if line not in self._rules)
        return expression

    def write_separated(self, entries: Mapping[str, str], required: set[str], comma: str) -> str:
        """Return the expression of entries in order, separated by commas. Entries outside `required` are optional.

        Args:
            entries: expressions by name.
        """
        # Rules from the last entry to the first: what may follow before any entry, and after one.
        first = after = '""'
        for name, entry in reversed(list(entries.items())):
            optional = name not in required
            first, after = (
                self.add_rule(f"{entry} {after}", *([first] if optional else [])),
                self.add_rule(f"{comma} {entry} {after}", *([after] if optional else [])),
            )
        return first

    def write_unquoted(self, schema: object, root: dict[str, object], line: str, close: str) -> str:
        """Return the expression of an unquoted text by a schema, and of the text that ends it.

        Args:
            line: a newline that precedes `close`, or "".
            close: the text that ends the value, and so must not be in it.

        Raises:
            GrammarError: the schema allows no text without `close`.
        """
        pattern = _text_pattern(schema, root, close, 0)
        if pattern is None:
            raise GrammarError(
                f"the schema of a text allows only texts that contain {close!r}, which ends the text"
            )
        if "null" in find_allowed_types(schema, root):
            # The text null stands for the value null.
            pattern = f'(({pattern}) & ~/{_NULLS}/) | "null"'
        text = f"({pattern}) & ~/(?s:.*){escape_regex(close)}(?s:.*)/"
        ending = self.literal(close)
        if is_quoted(ending):
            # The lexer takes the longest lexeme, so the text and its end are one lexeme.
            return self.add_terminal(f"({text}) {quote(line + close)}")
        return f"{self.add_terminal(f'({text}) {quote(line)}' if line else text)} {ending}"

    def _add(self, prefix: str, expression: str) -> str:
        known = f"{prefix}: {expression}"
        if known not in self._names:
            self._names[known] = f"{prefix}{len(self._names)}"
            self._rules.append(f"{self._names[known]}: {expression}")
        return self._names[known]


def _text_pattern(schema: object, root: Mapping[str, object], without: str, depth: int) -> str | None:
    """Return the terminal of the texts that a schema of strings and null allows; None if it allows none."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return None if schema is False else "/(?s:.*)/"
    choices = get_choices(schema)
    declared = schema.get("type", "string")
    types = as_list(declared) or [declared]
    if choices is not None:
        texts = [choice for choice in choices if isinstance(choice, str) and without not in choice]
        texts += ["null"] if None in choices else []
        needed = [" | ".join(map(quote, texts))]
    else:
        kinds = [_string_pattern(schema)] if "string" in types else []
        needed = [" | ".join([*kinds, *(['"null"'] if "null" in types else [])])]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            parts = (_text_pattern(part, root, without, depth + 1) for part in as_list(schema[key]))
            needed.append(" | ".join(part for part in parts if part))
    needed += (_text_pattern(part, root, without, depth + 1) or "" for part in as_list(schema.get("allOf")))
    if isinstance(schema.get("$ref"), str):
        target = resolve_reference(root, str(schema["$ref"]))
        needed.append(_text_pattern(target, root, without, depth + 1) or "")
    return " & ".join(f"({part})" for part in needed) if all(needed) else None


def _string_pattern(schema: Mapping[str, object]) -> str:
    """Return the terminal of the strings that a schema's length limits and pattern allow."""
    counts = with_plain_counts(dict(schema))
    min_length, max_length = counts.get("minLength"), counts.get("maxLength")
    low, high = (str(length) if isinstance(length, int) else "" for length in (min_length, max_length))
    limits = f"{{{low or 0},{high}}}"
    terminal = f"/(?s:.{limits})/" if limits != "{0,}" else "/(?s:.*)/"
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        # A JSON Schema pattern is not anchored.
        at_start, at_end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        inner = pattern[at_start : len(pattern) - at_end].replace("\\/", "/").replace("/", "\\/")
        inner = inner.replace("\n", "\\n")
        terminal += f" & /{'' if at_start else '(?s:.*)'}(?:{inner}){'' if at_end else '(?s:.*)'}/"
    return terminal
