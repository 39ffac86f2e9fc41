"""How a model's family writes what is no text: thinking, and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from erllama._runtime.log import logger
from erllama.chat.thinking import find_thinking
from erllama.chat.tool_calls.call_grammar import quoted
from erllama.chat.tool_calls.formats import find_tool_format, tool_format
from erllama.chat.tool_calls.reader import ToolFormat
from erllama.chat.tool_calls.schema_enforcement import problem_of, relaxations, violation_of
from erllama.chat.tool_calls.tools import ToolChoice, parameters_of, tool_names
from erllama.engine import Grammar, Markers, ToolCall
from erllama.engine.output.phases import Script
from erllama.errors import GrammarError, OptionError, ToolCallError

log = logger("erllama")

Message = dict[str, object]


class CallGrammar(NamedTuple):
    """What keeps calls to the tools' schemas.

    Attributes:
        grammar: what a call must be of; None where no grammar constrains calls.
        checked: the names of tools whose arguments are validated after the call is read, since no grammar enforces
            all of their schema.
    """

    grammar: Grammar | None
    checked: frozenset[str]


@dataclass(frozen=True, slots=True)
class Family:
    """How a model's replies are written.

    Attributes:
        format: how calls are read; None where no tools may be called.
        calls, payload, leading: how they are found.
        own_markers: calls are found by the caller's markers, which are no part of what `format` reads.
        thinking: between which it thinks.
        skip: what belongs to nothing.
        opens: what a prompt may end with that is the beginning of a reply's markers.
        quotes: what begins and ends strings in the arguments of calls.
    """

    format: ToolFormat | None
    calls: Markers | None
    payload: Markers | None
    leading: tuple[str, ...]
    own_markers: bool
    thinking: Markers | None
    skip: tuple[str, ...]
    opens: tuple[str, ...]
    quotes: tuple[str, ...] = ('"',)

    @property
    def calling(self) -> bool:
        """Whether tools may be called."""
        return self.format is not None

    @classmethod
    def of(
        cls,
        template: str,
        *,
        calling: bool,
        format: str | None = None,
        thinking: Markers | None = None,
        calls: Markers | None = None,
        payload: Markers | None = None,
    ) -> Family:
        """That of a template's source.

        Args:
            calling: tools may be called.
            format: the name of how they are, in place of what the template tells.
            thinking, calls, payload: markers in place of those that it tells.
        """
        thinking = thinking or find_thinking(template)
        known = find_tool_format(template)
        asked = None if format is None else tool_format(format)
        skip, opens = (known.skip, known.open) if known is not None else ((), ())
        if not calling:
            return cls(None, None, None, (), False, thinking, skip, opens)
        if calls is not None:
            found = asked or tool_format("json")
            return cls(found, calls, payload, (), True, thinking, skip, opens, found.quotes)
        found = asked or known or tool_format("json")
        return cls(
            found,
            Markers(found.open, found.close) if found.open else None,
            Markers(found.payload_open, found.payload_close) if found.payload_open else None,
            found.leading,
            False,
            thinking,
            found.skip,
            found.open,
            found.quotes,
        )

    def read(
        self, full: str, tools: Sequence[Message], checked: frozenset[str] = frozenset()
    ) -> Sequence[ToolCall]:
        """The calls of what was written as one.

        Args:
            checked: the names of tools whose arguments are to be validated.

        Raises:
            ToolCallError: it is none, or the arguments violate the schema of one of these tools.
        """
        assert self.format is not None
        if self.own_markers and self.calls is not None:
            full = full.removeprefix(next(filter(full.startswith, self.calls.open), ""))
            full = full.removesuffix(next(filter(full.endswith, self.calls.close), ""))
        calls = self.format.parse(full, tools)
        parameters = parameters_of(tools)
        for call in calls:
            problem = violation_of(parameters[call.name], call.arguments) if call.name in checked else ""
            if problem:
                raise ToolCallError(f"the arguments of {call.name!r} violate its parameters: {problem}")
        return calls

    def grammar(
        self,
        tools: Sequence[Message],
        choice: ToolChoice,
        script: Script,
        *,
        parallel: bool,
        strict: frozenset[str] = frozenset(),
    ) -> CallGrammar:
        """What a call must be of.

        Args:
            strict: the names of tools whose parameters are enforced, or refused.

        Raises:
            GrammarError: a tool is strict, and its parameters cannot be enforced in the family's way; or a call is
                required, and the tools take too much for one grammar.
            OptionError: a tool is strict, and no grammar enforces calls by the caller's own markers.
        """
        names = frozenset(tool_names(tools) if choice.name is None else [choice.name])
        strict &= names
        if self.format is None or self.own_markers:
            if strict and self.format is not None:
                raise OptionError(
                    f"tool {min(strict)!r} is strict, and no grammar enforces calls by tool_markers; "
                    "leave 'strict' or tool_markers out"
                )
            return CallGrammar(None, names)
        writer = _CallWriter(self.format, tools, choice.name, parallel, lambda text: _literal(script, text))
        return writer.grammar(strict, required=choice.kind == "required")

    def mentions_thinking(self, text: str) -> bool:
        """Whether a thought begins or ends in a text, were it an empty one."""
        return self.thinking is not None and any(m in text for m in (*self.thinking.open, *self.thinking.close))

    def is_thinking_at_end(self, text: str) -> bool:
        """Whether a thought has begun in a text, and not ended."""
        if self.thinking is None:
            return False
        opened = max(text.rfind(marker) for marker in self.thinking.open)
        return opened > max((text.rfind(marker) for marker in self.thinking.close), default=-1)


class _CallWriter:
    """Writes the grammar of calls, with as much of each tool's schema as can be enforced."""

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

    def grammar(self, strict: frozenset[str], *, required: bool) -> CallGrammar:
        parameters = {
            tool: schema for tool, schema in parameters_of(self._tools).items() if self._name in (None, tool)
        }
        if not any(problem_of(json.dumps(schema)) for schema in parameters.values()):
            with suppress(GrammarError):
                return CallGrammar(self._written({}), frozenset())
        relaxed: dict[str, dict[str, object] | None] = {}
        for tool, schema in parameters.items():
            problem = self._problem(tool, schema)
            if problem and tool in strict:
                raise GrammarError(f"tool {tool!r} is strict, and its parameters cannot be enforced: {problem}")
            if problem:
                log.info("tool %r is validated after its calls are read: %s", tool, problem)
                relaxed[tool] = next(
                    (part for part in relaxations(schema, self._format.arguments) if self._can_write(tool, part)),
                    None,
                )
        try:
            return CallGrammar(self._written(relaxed), frozenset(relaxed))
        except GrammarError as error:
            if required or strict:
                raise
            log.info("no grammar constrains the calls, which are validated after they are read: %s", error)
            return CallGrammar(None, frozenset(parameters))

    def _problem(self, tool: str, schema: dict[str, object]) -> str:
        """Why a tool's schema cannot be enforced; empty where it can."""
        problem = problem_of(json.dumps(schema))
        if not problem:
            try:
                self._written({}, only=tool)
            except GrammarError as error:
                problem = str(error)
        return problem

    def _can_write(self, tool: str, schema: dict[str, object] | None) -> bool:
        try:
            self._written({tool: schema}, only=tool)
        except GrammarError:
            return False
        return True

    def _written(self, relaxed: Mapping[str, dict[str, object] | None], *, only: str | None = None) -> Grammar:
        name = only or self._name
        text = self._format.grammar(
            self._tools, name=name, parallel=self._parallel, literal=self._literal, relaxed=relaxed
        )
        return Grammar.lark(text)


def _literal(script: Script, text: str) -> str:
    """A text, special tokens written out, in Lark."""
    parts = script.runs(script.of_marker(text))
    return " ".join(
        f"<[{part}]>" if isinstance(part, int) else quoted(part.decode("utf-8", "replace")) for part in parts
    )
