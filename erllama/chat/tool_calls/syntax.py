"""Syntax of tool calls: the text that a model family writes around calls, names and arguments.

All values here are immutable. `formats` has one `ToolFormat` for each family; `reader` reads calls by it, and
`call_grammar` writes grammars from it.

The syntax consists of pieces. A piece is text as the model writes it, special tokens spelled out, in which `~`
stands for optional white space and `ID` for the id of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from erllama.chat.tool_calls.literals import GEMMA_QUOTE

ID = "\0"


@dataclass(frozen=True, slots=True)
class SpanSyntax:
    """Pieces around the calls of one span.

    Attributes:
        begin: before the first call.
        between: between two calls; None if a span has one call only.
        end: after the last call.
    """

    begin: str = ""
    between: str | None = "~"
    end: str = ""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Pieces of one call.

    Attributes:
        before: before the tool's name.
        middle: between the name and the arguments. May contain `ID`.
        after: after the arguments.
    """

    before: str
    middle: str
    after: str = ""


@dataclass(frozen=True, slots=True)
class ListedArguments:
    """Pieces of one argument, for a family that writes arguments one by one, each with its name.

    Attributes:
        open: before the name.
        middle: between the name and the value.
        close: after the value.
        on_own_lines: the value is on separate lines: one newline before it and one after it are not part of it.
    """

    open: str
    middle: str
    close: str
    on_own_lines: bool = False


ArgumentSyntax = Literal["json", "python", "gemma"] | ListedArguments


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The syntax of a model family's tool calls. All texts have special tokens spelled out.

    Attributes:
        name: key in `TOOL_FORMATS`.
        open: texts; each begins a span of one or more calls.
        close: texts that end a span and are part of it. Empty if a span extends to the end of the reply.
        payload_open: texts within a span after which arguments begin. The rest of a span is syntax.
        payload_close: texts that end the arguments. Empty if arguments end with the span.
        leading: texts that begin a span only at the beginning of a reply. White space is ignored.
        skip: texts around the phases of a reply that belong to no phase.
        spans: the possible pieces around calls.
        calls: the possible pieces of a call.
        arguments: how the arguments of a call are written.
        json_calls: calls are JSON objects. Otherwise they are written as `calls` has them.
        id_pattern: regular expression of the ids that the model writes. Empty if it writes none.
        id_template: `str.format` text of the call's id, with the `{name}` and the `{id}` that the model wrote.
        id_length: number of characters of a generated id. 0 for the default form, `call_…`.
    """

    name: str
    open: tuple[str, ...]
    close: tuple[str, ...]
    payload_open: tuple[str, ...]
    payload_close: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    spans: tuple[SpanSyntax, ...] = (SpanSyntax(),)
    calls: tuple[CallSyntax, ...] = ()
    arguments: ArgumentSyntax = "json"
    json_calls: bool = False
    id_pattern: str = ""
    id_template: str = ""
    id_length: int = 0

    @property
    def quotes(self) -> tuple[str, ...]:
        """Texts that begin and end a string in arguments. Empty if arguments are listed without quotes."""
        if isinstance(self.arguments, ListedArguments):
            return ()
        return {"json": ('"',), "python": ('"', "'"), "gemma": (GEMMA_QUOTE,)}[self.arguments]
