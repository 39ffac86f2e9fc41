"""How a model's family writes what is no text: thinking, and calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erllama._log import logger
from erllama.chat.call_formats import ToolFormat
from erllama.chat.formats import find_tool_format, tool_format
from erllama.chat.thinking import find_thinking
from erllama.chat.tools import ToolChoice
from erllama.engine import Grammar, Markers, ToolCall
from erllama.engine.phases import Script
from erllama.errors import GrammarError

log = logger("erllama")

Message = dict[str, object]


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
    """

    format: ToolFormat | None
    calls: Markers | None
    payload: Markers | None
    leading: tuple[str, ...]
    own_markers: bool
    thinking: Markers | None
    skip: tuple[str, ...]
    opens: tuple[str, ...]

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
            return cls(asked or tool_format("json"), calls, payload, (), True, thinking, skip, opens)
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
        )

    def read(self, full: str, tools: Sequence[Message]) -> Sequence[ToolCall]:
        """The calls of what was written as one.

        Raises:
            ToolCallError: it is none.
        """
        assert self.format is not None
        if self.own_markers and self.calls is not None:
            full = full.removeprefix(next(filter(full.startswith, self.calls.open), ""))
            full = full.removesuffix(next(filter(full.endswith, self.calls.close), ""))
        return self.format.parse(full, tools)

    def grammar(
        self, tools: Sequence[Message], choice: ToolChoice, script: Script, *, parallel: bool
    ) -> Grammar | None:
        """What a call must be of; None where that is left to the model.

        Raises:
            GrammarError: a call is required, and a tool's schema cannot be written in the family's way.
        """
        if self.format is None or self.own_markers:
            return None

        def literal(text: str) -> str:
            return _literal(script, text)

        try:
            return Grammar.lark(self.format.grammar(tools, name=choice.name, parallel=parallel, literal=literal))
        except GrammarError:
            if choice.kind == "required":
                raise
            # Some schemas cannot be kept to in some families' ways: the calls are then the model's own.
            log.info("calls are not kept to the tools' schemas", exc_info=True)
            return None

    def mentions_thinking(self, text: str) -> bool:
        """Whether a thought begins or ends in a text, were it an empty one."""
        return self.thinking is not None and any(m in text for m in (*self.thinking.open, *self.thinking.close))

    def is_thinking_at_end(self, text: str) -> bool:
        """Whether a thought has begun in a text, and not ended."""
        if self.thinking is None:
            return False
        opened = max(text.rfind(marker) for marker in self.thinking.open)
        return opened > max((text.rfind(marker) for marker in self.thinking.close), default=-1)


def _literal(script: Script, text: str) -> str:
    """A text, special tokens written out, in Lark."""
    parts = script.runs(script.of_marker(text))
    return " ".join(
        f"<[{part}]>" if isinstance(part, int) else _quoted(part.decode("utf-8", "replace")) for part in parts
    )


def _quoted(text: str) -> str:
    """A string of Lark's."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(character, character) for character in text) + '"'
