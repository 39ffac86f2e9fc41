"""The grammar of a reply's tool calls, with as much of each tool's schema as can be enforced.

`constrain_calls` makes it. A schema that cannot be enforced is relaxed, for that tool alone, and the names of such
tools are returned: their arguments are validated after a call is read. `erllama.chat.family` calls it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from erllama._runtime.log import logger
from erllama._types import Message
from erllama.chat.tool_calls.call_grammar import write_call_grammar
from erllama.chat.tool_calls.schema_enforcement import find_enforcement_problem, relax_schema
from erllama.chat.tool_calls.syntax import ToolFormat
from erllama.chat.tool_calls.tools import get_parameters
from erllama.engine import Grammar
from erllama.errors import GrammarError

log = logger("erllama")


class CallConstraint(NamedTuple):
    """The constraint of calls to the tools' schemas.

    Attributes:
        grammar: the grammar of a span of calls; None if no grammar constrains calls.
        validated: names of the tools whose arguments are validated after a call is read, since the grammar does not
            enforce all of their schema.
    """

    grammar: Grammar | None
    validated: frozenset[str]


def constrain_calls(
    format: ToolFormat,
    tools: Sequence[Message],
    *,
    name: str | None,
    parallel: bool,
    literal: Callable[[str], str],
    strict: frozenset[str],
    required: bool,
) -> CallConstraint:
    """Return the constraint of calls to tools.

    Args:
        tools: as `normalize_tools` returns them.
        name: the one tool that may be called; None for any.
        parallel: whether a span may have several calls.
        literal: returns the Lark expression for a text in which special tokens may be spelled out.
        strict: names of the tools whose parameters the grammar must enforce.
        required: the reply must be a call.

    Raises:
        GrammarError: a tool is strict, and its parameters cannot be enforced; or a call is required, and the tools
            are too large for one grammar.
    """
    return _ConstraintBuilder(format, tools, name, parallel, literal).build(strict, required=required)


class _ConstraintBuilder:
    """Builds the constraint that `constrain_calls` returns."""

    def __init__(
        self,
        format: ToolFormat,
        tools: Sequence[Message],
        name: str | None,
        parallel: bool,
        literal: Callable[[str], str],
    ) -> None:
        self._format, self._tools, self._name, self._parallel = format, tools, name, parallel
        self._literal = literal

    def build(self, strict: frozenset[str], *, required: bool) -> CallConstraint:
        parameters = {
            tool: schema for tool, schema in get_parameters(self._tools).items() if self._name in (None, tool)
        }
        if not any(find_enforcement_problem(json.dumps(schema)) for schema in parameters.values()):
            with suppress(GrammarError):
                return CallConstraint(self._write({}), frozenset())
        relaxed: dict[str, dict[str, object] | None] = {}
        for tool, schema in parameters.items():
            problem = self._find_problem(tool, schema)
            if problem and tool in strict:
                raise GrammarError(f"tool {tool!r} is strict, and its parameters cannot be enforced: {problem}")
            if problem:
                log.info("tool %r: arguments are validated after a call is read: %s", tool, problem)
                relaxed[tool] = next(
                    (part for part in relax_schema(schema, self._format.arguments) if self._can_write(tool, part)),
                    None,
                )
        try:
            return CallConstraint(self._write(relaxed), frozenset(relaxed))
        except GrammarError as error:
            if required or strict:
                raise
            log.info("no grammar constrains tool calls; arguments are validated after a call is read: %s", error)
            return CallConstraint(None, frozenset(parameters))

    def _find_problem(self, tool: str, schema: dict[str, object]) -> str:
        """Return why a tool's schema cannot be enforced; "" if it can."""
        problem = find_enforcement_problem(json.dumps(schema))
        if not problem:
            try:
                self._write({}, only=tool)
            except GrammarError as error:
                problem = str(error)
        return problem

    def _can_write(self, tool: str, schema: dict[str, object] | None) -> bool:
        try:
            self._write({tool: schema}, only=tool)
        except GrammarError:
            return False
        return True

    def _write(self, relaxed: Mapping[str, dict[str, object] | None], *, only: str | None = None) -> Grammar:
        text = write_call_grammar(
            self._format,
            self._tools,
            name=only or self._name,
            parallel=self._parallel,
            literal=self._literal,
            relaxed=relaxed,
        )
        return Grammar.lark(text)
