"""Grammar of tool calls in Lark, written from a family's syntax and the tools' schemas.

`write_call_grammar` writes it. `reader.read_calls` reads every text that the grammar accepts, and the arguments
then match the schemas. `constrained_calls` decides how much of each schema the grammar enforces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from erllama.chat.tool_calls.gemma_grammar import GemmaWriter
from erllama.chat.tool_calls.literals import PYTHON_KEY
from erllama.chat.tool_calls.parameter_schemas import (
    add_definitions,
    find_allowed_types,
    get_choices,
    get_listed_properties,
    get_required_names,
    is_unquoted,
    resolve_root,
)
from erllama.chat.tool_calls.rule_writer import RuleWriter, escape_regex, is_quoted, quote
from erllama.chat.tool_calls.syntax import ArgumentSyntax, ListedArguments, ToolFormat
from erllama.chat.tool_calls.tools import get_parameters
from erllama.errors import GrammarError, OptionError


def write_call_grammar(
    format: ToolFormat,
    tools: Sequence[Mapping[str, object]],
    *,
    name: str | None,
    parallel: bool,
    literal: Callable[[str], str],
    relaxed: Mapping[str, dict[str, object] | None] | None = None,
) -> str:
    """Return the grammar of a span of calls, from the first byte of `format.open`, as text for `Grammar.lark`.

    Args:
        tools: as `normalize_tools` returns them; at least one.
        name: the one tool that may be called; None for any.
        parallel: whether a span may have several calls, in families that allow several.
        literal: returns the Lark expression for a text in which special tokens may be spelled out.
        relaxed: schemas by tool name to enforce instead of the tools' parameters; None for any arguments.

    Raises:
        GrammarError: this family cannot write a tool's parameters.
        OptionError: there are no tools, or none has this name.
    """
    enforced: dict[str, dict[str, object] | None] = {**get_parameters(tools), **(relaxed or {})}
    parameters = {tool: schema for tool, schema in enforced.items() if name in (None, tool)}
    if not parameters:
        raise OptionError(
            "a grammar of tool calls needs at least one tool" if name is None else f"no tool has the name {name!r}"
        )
    rules = RuleWriter(literal, format.id_pattern)
    arguments = _ArgumentsWriter(rules, format.arguments)
    calls: list[str] = []
    for tool, schema in parameters.items():
        payload = rules.add_rule(arguments.write(schema))
        calls += (
            f"{rules.write_piece(call.before)} {literal(tool)} {rules.write_piece(call.middle)} {payload} "
            f"{rules.write_piece(call.after)}"
            for call in format.calls
        )
    call = rules.add_rule(*calls)
    spans = []
    for span in format.spans:
        between = rules.write_piece(span.between) if parallel and span.between is not None else None
        several = "" if between is None else f"({between} {call})*"
        spans.append(f"{rules.write_piece(span.begin)} {call} {several} {rules.write_piece(span.end)}")
    return rules.source(spans)


class _ArgumentsWriter:
    """Writes the expressions of calls' arguments."""

    def __init__(self, rules: RuleWriter, syntax: ArgumentSyntax) -> None:
        self._rules, self._syntax = rules, syntax
        self._gemma = GemmaWriter(rules)

    def write(self, schema: dict[str, object] | None) -> str:
        """Return the expression of the arguments that a schema allows; of any arguments for None."""
        syntax = self._syntax
        if schema is None:
            return self._any_arguments()
        if syntax == "json":
            return self._rules.write_json(schema)
        listing = resolve_root(schema)
        if isinstance(syntax, ListedArguments):
            return self._listed_arguments(syntax, listing, schema)
        if syntax == "python":
            entries = {
                name: f"{_python_key(name)} {self._python_value(part, schema)}"
                for name, part in get_listed_properties(listing).items()
            }
            return self._rules.write_separated(entries, get_required_names(listing), self._rules.write_piece(",~"))
        return self._gemma.write_entries(listing, schema)

    def _any_arguments(self) -> str:
        rules, syntax = self._rules, self._syntax
        if syntax == "json":
            return rules.write_json({"type": "object"})
        if isinstance(syntax, ListedArguments):
            mark = syntax.middle.partition("~")[0]
            name = rules.add_terminal(f"/(?s:.+)/ & ~/(?s:.*){escape_regex(mark)}(?s:.*)/")
            if is_quoted(rules.literal(mark)):
                name = rules.add_terminal(
                    f"(/(?s:.+)/ & ~/(?s:.*){escape_regex(mark)}(?s:.*)/) {rules.literal(mark)}"
                )
                middle = rules.write_piece(syntax.middle.removeprefix(mark))
            else:
                middle = rules.write_piece(syntax.middle)
            head = f"{rules.write_piece(syntax.open)} {name} {middle}"
            return f"({self._with_value(head, syntax, {'type': 'string'}, {})})*"
        if syntax == "python":
            entry = f'{rules.add_terminal("/[A-Za-z_][A-Za-z0-9_]*/")} "=" {rules.write_json({})}'
            return f"({entry} ({rules.write_piece(',~')} {entry})*)?"
        return self._gemma.write_any_entries()

    def _listed_arguments(
        self, syntax: ListedArguments, listing: Mapping[str, object], root: dict[str, object]
    ) -> str:
        properties, required = get_listed_properties(listing), get_required_names(listing)
        _check_distinguishable(list(properties), syntax.middle.partition("~")[0])
        arguments = (
            self._listed_argument(syntax, name, part, root) + ("" if name in required else "?")
            for name, part in properties.items()
        )
        return " ".join(arguments) or '""'

    def _listed_argument(self, syntax: ListedArguments, name: str, schema: object, root: dict[str, object]) -> str:
        head = f"{self._rules.write_piece(syntax.open)} {quote(name)} {self._rules.write_piece(syntax.middle)}"
        return self._rules.add_rule(self._with_value(head, syntax, schema, root))

    def _with_value(self, head: str, syntax: ListedArguments, schema: object, root: dict[str, object]) -> str:
        """Return the expression of a listed argument.

        Args:
            head: expression of the pieces and the name before the value.
        """
        close, *rest = re.split("(~)", syntax.close, maxsplit=1)
        line = "\n" if syntax.on_own_lines else ""
        if is_unquoted(find_allowed_types(schema, root)):
            value = self._rules.write_unquoted(schema, root, line, close)
        else:
            json_value = self._rules.write_json(add_definitions(schema, root))
            value = f"{json_value} {self._rules.literal(line + close)}"
        if line:
            value = f"{self._rules.literal(line)} {value}"
        return f"{head} {value} {self._rules.write_piece(''.join(rest))}"

    def _python_value(self, schema: object, root: dict[str, object]) -> str:
        if find_allowed_types(schema, root) == {"boolean"} and get_choices(schema) is None:
            return '("True" | "False")'
        return self._rules.write_json(add_definitions(schema, root))


def _python_key(name: str) -> str:
    """Return the expression of a keyword: bare if Python allows it, and quoted otherwise."""
    return quote(f"{name if PYTHON_KEY.fullmatch(name) else quote(name)}=")


def _check_distinguishable(names: Sequence[str], mark: str) -> None:
    """Raise GrammarError if one name followed by `mark` is the beginning of another name."""
    known = set(names)
    for name in names:
        at = name.find(mark)
        while at >= 0:
            if name[:at] in known:
                raise GrammarError(
                    f"the parameters {name[:at]!r} and {name!r} are ambiguous in this model's format of calls"
                )
            at = name.find(mark, at + 1)
