"""Model families: how a family marks thinking and writes tool calls, found by its chat template.

`Family.from_template` finds the markers and the tool-call format for one turn. `erllama.chat.chats` passes them to
the engine; `erllama.chat.turn` reads the calls of the reply with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erllama._types import Message
from erllama.chat.thinking import find_thinking_markers
from erllama.chat.tool_calls.constrained_calls import CallConstraint, constrain_calls
from erllama.chat.tool_calls.formats import find_tool_format, get_tool_format
from erllama.chat.tool_calls.reader import read_calls
from erllama.chat.tool_calls.rule_writer import quote
from erllama.chat.tool_calls.schema_enforcement import find_violation
from erllama.chat.tool_calls.syntax import ToolFormat
from erllama.chat.tool_calls.tools import ToolChoice, get_parameters, get_tool_names
from erllama.engine import Markers, ToolCall
from erllama.engine.output.token_codec import TokenCodec
from erllama.errors import OptionError, ToolCallError


@dataclass(frozen=True, slots=True)
class Family:
    """The syntax of a model family's replies.

    Attributes:
        format: the format of tool calls; None if no tool may be called.
        calls, payload, leading: texts that mark calls in a reply, and arguments within them.
        own_markers: the caller supplied the markers of calls, which `format` does not read.
        thinking: texts that begin and end thinking; None if the family has none.
        skip: texts around the phases of a reply that belong to no phase.
        opens: texts that begin a span of calls and that a prompt may end with.
        quotes: texts that begin and end strings in the arguments of calls.
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
    def may_call(self) -> bool:
        """Whether the reply may call tools."""
        return self.format is not None

    @classmethod
    def from_template(
        cls,
        template: str,
        *,
        may_call: bool,
        format: str | None = None,
        thinking: Markers | None = None,
        calls: Markers | None = None,
        payload: Markers | None = None,
    ) -> Family:
        """Return the family of a template.

        Args:
            template: the template's source.
            may_call: whether the reply may call tools.
            format: name of the tool-call format. Overrides the template's.
            thinking, calls, payload: markers. Override the template's.

        Raises:
            OptionError: no format has this name.
        """
        thinking = thinking or find_thinking_markers(template)
        known = find_tool_format(template)
        requested = None if format is None else get_tool_format(format)
        skip, opens = (known.skip, known.open) if known is not None else ((), ())
        if not may_call:
            return cls(None, None, None, (), False, thinking, skip, opens)
        if calls is not None:
            format_used = requested or get_tool_format("json")
            return cls(format_used, calls, payload, (), True, thinking, skip, opens, format_used.quotes)
        format_used = requested or known or get_tool_format("json")
        return cls(
            format_used,
            Markers(format_used.open, format_used.close) if format_used.open else None,
            Markers(format_used.payload_open, format_used.payload_close) if format_used.payload_open else None,
            format_used.leading,
            False,
            thinking,
            format_used.skip,
            format_used.open,
            format_used.quotes,
        )

    def read_calls(
        self, full: str, tools: Sequence[Message], validated: frozenset[str] = frozenset()
    ) -> Sequence[ToolCall]:
        """Return the calls of a span.

        Args:
            full: the span as the model wrote it, markers included.
            validated: names of the tools whose arguments are validated.

        Raises:
            ToolCallError: the text is not a call, or the arguments violate the schema of a validated tool.
        """
        assert self.format is not None
        if self.own_markers and self.calls is not None:
            full = full.removeprefix(next(filter(full.startswith, self.calls.open), ""))
            full = full.removesuffix(next(filter(full.endswith, self.calls.close), ""))
        calls = read_calls(self.format, full, tools)
        parameters = get_parameters(tools)
        for call in calls:
            problem = find_violation(parameters[call.name], call.arguments) if call.name in validated else ""
            if problem:
                raise ToolCallError(f"the arguments of {call.name!r} violate its parameters: {problem}")
        return calls

    def constrain_calls(
        self,
        tools: Sequence[Message],
        choice: ToolChoice,
        codec: TokenCodec,
        *,
        parallel: bool,
        strict: frozenset[str] = frozenset(),
    ) -> CallConstraint:
        """Return the constraint that keeps calls to the tools' schemas.

        Args:
            parallel: whether a span may have several calls.
            strict: names of the tools whose parameters must be enforced by a grammar.

        Raises:
            GrammarError: a tool is strict, and its parameters cannot be enforced in the family's format; or a call
                is required, and the tools are too large for one grammar.
            OptionError: a tool is strict, and the caller's own markers leave no grammar to enforce it.
        """
        names = frozenset(get_tool_names(tools) if choice.name is None else [choice.name])
        strict &= names
        if self.format is None or self.own_markers:
            if strict and self.format is not None:
                raise OptionError(
                    f"tool {min(strict)!r} is strict, and no grammar enforces calls by tool_markers; "
                    "remove 'strict' or tool_markers"
                )
            return CallConstraint(None, names)
        return constrain_calls(
            self.format,
            tools,
            name=choice.name,
            parallel=parallel,
            literal=lambda text: _lark_literal(codec, text),
            strict=strict,
            required=choice.kind == "required",
        )

    def has_thinking_marker(self, text: str) -> bool:
        """Return whether a text contains a marker of thinking."""
        return self.thinking is not None and any(m in text for m in (*self.thinking.open, *self.thinking.close))

    def is_thinking_at_end(self, text: str) -> bool:
        """Return whether thinking has begun in a text and not ended."""
        if self.thinking is None:
            return False
        begin = max(text.rfind(marker) for marker in self.thinking.open)
        return begin > max((text.rfind(marker) for marker in self.thinking.close), default=-1)


def _lark_literal(codec: TokenCodec, text: str) -> str:
    """Return the Lark expression of a text in which special tokens are spelled out."""
    parts = codec.split(codec.encode_marker(text))
    return " ".join(
        f"<[{part}]>" if isinstance(part, int) else quote(part.decode("utf-8", "replace")) for part in parts
    )
