"""What a family's way of writing tool calls is, and how a call that a model wrote is read.

A `ToolFormat` is a value: the texts around calls, and their syntax as pieces
(see `erllama.chat.tool_calls.call_grammar`, which writes grammars of the same pieces).
JSON is read by a JSON reader and everything else by position, from the first
character to the last, so that no argument can be taken for syntax, and in time
in proportion to the text. The families are a table in `erllama.chat.tool_calls.formats`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from erllama.chat.json_values import (
    GEMMA,
    GEMMA_QUOTE,
    PYTHON,
    PYTHON_ARGUMENTS,
    Unreadable,
    after_space,
    json_of,
    read_json,
    suggestion,
)
from erllama.chat.messages import TOOL_NAME
from erllama.chat.tool_calls.call_grammar import (
    ID,
    JSON_TYPES,
    Arguments,
    Frame,
    Parameters,
    Shape,
    is_raw,
    lark,
    listing_of,
    properties_of,
    types_of,
)
from erllama.chat.tool_calls.tools import parameters_of
from erllama.engine import ToolCall
from erllama.errors import OptionError, ToolCallError

NAME_KEYS = ("name", "tool_name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A family's way of writing tool calls. Special tokens are spelled out in all texts.

    Attributes:
        name: in `TOOL_FORMATS`.
        open: texts, any of which begins a span of one or more calls.
        close: texts that end it, and are part of it; () where it runs to the end of the reply.
        payload_open: within a span, after any of these arguments begin; the rest is syntax.
        payload_close: where they end; () for: with the span.
        leading: texts, compared with white space left out, that begin a span only where the reply begins with them.
        skip: texts around the phases of a reply that belong to none of them.
    """

    name: str
    open: tuple[str, ...]
    close: tuple[str, ...]
    payload_open: tuple[str, ...]
    payload_close: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    # The syntax: calls as JSON objects where `envelope` is set, else as the shapes have it.
    frames: tuple[Frame, ...] = (Frame(),)
    shapes: tuple[Shape, ...] = ()
    arguments: Arguments = "json"
    envelope: bool = False
    # A regular expression of the ids that are written, what an id is made of, and how long one made up is.
    id: str = ""
    id_form: str = ""
    id_length: int = 0

    @property
    def quotes(self) -> tuple[str, ...]:
        """What begins and ends strings in arguments; () where they are listed, with texts as they are."""
        if isinstance(self.arguments, Parameters):
            return ()
        return {"json": ('"',), "python": ('"', "'"), "gemma": (GEMMA_QUOTE,)}[self.arguments]

    def parse(self, full: str, tools: Sequence[Mapping[str, object]]) -> list[ToolCall]:
        """The calls of a span, or of several with white space between.

        Args:
            full: exactly what was sampled, from the text of `open` through that of `close`, which may be missing
                where the model ended its turn instead, and the call is whole without it.
            tools: as `normalized_tools` gives them.

        Raises:
            ToolCallError: what is written is no call, or calls no tool of these; with the place.
        """
        return _Reader(self, full, parameters_of(tools)).calls()

    def grammar(
        self,
        tools: Sequence[Mapping[str, object]],
        *,
        name: str | None,
        parallel: bool,
        literal: Callable[[str], str],
        relaxed: Mapping[str, dict[str, object] | None] | None = None,
    ) -> str:
        """What a model may write as calls, from the first byte of `open` on: Lark, for `Grammar.lark`.

        Args:
            tools: as `normalized_tools` gives them; at least one.
            name: the one tool to call; None for any.
            parallel: whether several calls may follow each other, in families that have that.
            literal: the Lark expression for a text in which special tokens may be spelled out.
            relaxed: what is enforced instead of the parameters' schema, by the names of tools; None for nothing.

        Raises:
            GrammarError: a tool's parameters cannot be written in this family's way.
        """
        enforced: dict[str, dict[str, object] | None] = {**parameters_of(tools), **(relaxed or {})}
        parameters = {tool: schema for tool, schema in enforced.items() if name in (None, tool)}
        if not parameters:
            raise OptionError(
                "a grammar of tool calls needs a tool" if name is None else f"no tool is called {name!r}"
            )
        return lark(
            self.frames, self.shapes, self.arguments, parameters, parallel=parallel, id=self.id, literal=literal
        )


# --- Reading -----------------------------------------------------------------------------------


class _Reader:
    """One text, read from its beginning to its end."""

    def __init__(self, format: ToolFormat, text: str, parameters: Mapping[str, dict[str, object]]) -> None:
        self._format, self._text, self._parameters = format, text, parameters
        self._at = 0
        self._found: list[ToolCall] = []
        self._ids: set[str] = set()

    def calls(self) -> list[ToolCall]:
        self._space()
        read = self._objects if self._format.envelope else self._span
        while not self._found or self._at < len(self._text):
            read()
            self._space()
        return self._found

    # --- Calls as JSON objects -----------------------------------------------------------------

    def _objects(self) -> None:
        format = self._format
        if not self._take(format.open) and not format.leading:
            raise self._error(f"{' or '.join(map(repr, format.open))} is missing")
        self._space()
        at = self._at
        found = self._value(read_json)
        for call in found if isinstance(found, list) else [found]:
            self._add_object(call, at)
        if not found:
            raise self._error("an empty list of calls", at)
        self._space()
        if not self._take(format.close) and format.close and self._at < len(self._text):
            raise self._error(f"{format.close[0]!r} is missing")
        if format.leading:
            self._space()
            self._take((";",))

    def _add_object(self, call: object, at: int) -> None:
        id = call.get("id") if isinstance(call, dict) else None
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            self._only(call, ("type", "id", "function"), at)
            call = call["function"]
        if not isinstance(call, dict):
            raise self._error(f"a call is a JSON object, not {json.dumps(call)[:40]}", at)
        name, arguments = self._named(call, at) if self._format.shapes[0].before == '{"' else self._keyed(call, at)
        if isinstance(arguments, str):
            try:
                arguments = json_of(arguments)
            except Unreadable as error:
                raise self._error(f"the arguments are no JSON: {error}", at) from None
        self._add(name, arguments, id if self._format.id and isinstance(id, str) and id else None, at)

    def _named(self, call: dict[str, object], at: int) -> tuple[object, object]:
        if len(call) != 1:
            raise self._error("a call is an object with one key, the tool's name", at)
        return next(iter(call.items()))

    def _keyed(self, call: dict[str, object], at: int) -> tuple[object, object]:
        names = [key for key in NAME_KEYS if key in call]
        payloads = [key for key in ARGUMENT_KEYS if key in call]
        for found, keys in ((names, NAME_KEYS), (payloads, ARGUMENT_KEYS)):
            if len(found) != 1:
                raise self._error(f"a call has one of {', '.join(map(repr, keys))}, not {len(found)}", at)
        self._only(call, ("type", "id", "tool_call_id", *names, *payloads), at)
        return call[names[0]], call[payloads[0]]

    def _only(self, call: Mapping[str, object], known: Sequence[str], at: int) -> None:
        others = [key for key in call if key not in known]
        if others:
            raise self._error(f"a call has no {others[0]!r:.60}", at)

    # --- Calls in a family's own syntax --------------------------------------------------------

    def _span(self) -> None:
        frame = self._format.frames[0]
        if not self._piece(frame.begin):
            raise self._error(f"{_shown(frame.begin)!r} is missing")
        self._call()
        while frame.between is not None:
            at = self._at
            if not self._piece(frame.between) or not self._begins_call():
                self._at = at
                break
            self._call()
        self._require(frame.end)

    def _begins_call(self) -> bool:
        at = self._at
        found = any(shape.before and self._piece(shape.before) for shape in self._format.shapes)
        # Where nothing stands before a name, a separator told that one follows.
        found = found or not self._format.shapes[0].before
        self._at = at
        return found

    def _call(self) -> None:
        begin = self._at
        shape, name, id = self._header()
        if name not in self._parameters:
            raise self._error(f"there is no tool {name!r}{suggestion(name, self._parameters)}", begin)
        arguments = self._arguments(self._parameters[name])
        # Where arguments are listed, the text after the last one is all that tells that there are no more.
        listed = isinstance(self._format.arguments, Parameters)
        self._require(shape.after, () if listed and shape.after.strip("~") in self._format.close else None)
        self._add(name, arguments, self._format.id_form.format(name=name, id=id) if id else None, begin)

    def _header(self) -> tuple[Shape, str, str]:
        begin, furthest = self._at, (self._at, f"{_shown(self._format.shapes[0].before)!r} is missing")
        for shape in self._format.shapes:
            self._at = begin
            if not self._piece(shape.before):
                continue
            match = TOOL_NAME.match(self._text, self._at)
            if match is None:
                furthest = max(furthest, (self._at, "a tool's name is missing"))
                continue
            self._at = match.end()
            before, slot, after = shape.middle.partition(ID)
            id = re.compile(self._format.id)
            if not self._piece(before):
                furthest = max(furthest, (self._at, f"{_shown(before)!r} is missing"))
                continue
            found = id.match(self._text, self._at) if slot else None
            if slot:
                if found is None:
                    furthest = max(furthest, (self._at, "a call's id is missing"))
                    continue
                self._at = found.end()
            if self._piece(after):
                return shape, match.group(), found.group() if found else ""
            furthest = max(furthest, (self._at, f"{_shown(after)!r} is missing"))
        raise self._error(furthest[1], furthest[0])

    def _arguments(self, schema: dict[str, object]) -> object:
        kind = self._format.arguments
        if isinstance(kind, Parameters):
            return self._listed(kind, schema)
        if kind == "python":
            return self._value(lambda text, at: PYTHON_ARGUMENTS.mapping(text, at, "=", ")"))
        if kind == "gemma":
            return self._value(lambda text, at: GEMMA.mapping(text, at, ":", "}"))
        self._space()
        return self._value(read_json)

    def _listed(self, kind: Parameters, schema: dict[str, object]) -> dict[str, object]:
        found: dict[str, object] = {}
        properties = properties_of(listing_of(schema))
        names = sorted(properties, key=len, reverse=True)
        while self._piece(kind.open):
            at = self._at
            name = self._argument_name(kind, names)
            if name in found:
                raise self._error(f"the argument {name!r:.60} comes twice", at)
            types = types_of(properties[name], schema) if name in properties else JSON_TYPES
            found[name] = self._argument(kind, name, types, at)
        return found

    def _argument_name(self, kind: Parameters, known: Sequence[str]) -> str:
        at = self._at
        for name in known:
            # What ends a name may be part of a name that is known.
            if self._text.startswith(name, at):
                self._at = at + len(name)
                if self._piece(kind.middle):
                    return name
                self._at = at
        name = self._until(kind.middle.partition("~")[0])
        self._piece(kind.middle)
        return name

    def _argument(self, kind: Parameters, name: str, types: frozenset[str], at: int) -> object:
        begin = self._at
        close = kind.close.partition("~")[0]
        if not is_raw(types):
            # What ends an argument may be part of a string in JSON.
            try:
                value, self._at = read_json(self._text, after_space(self._text, begin))
                self._space()
                if _is_of(value, types) and self._text.startswith(close, self._at):
                    self._piece(kind.close)
                    return value
            except Unreadable:
                pass
            self._at = begin
        raw = self._until(close)
        self._piece(kind.close)
        if kind.framed:
            raw = raw.removeprefix("\n").removesuffix("\n")
        return self._converted(name, raw, types, at)

    def _converted(self, name: str, raw: str, types: frozenset[str], at: int) -> object:
        """A value that is written without quotes, by what the schema says it is."""
        # Where hardly anything but text is allowed, quotes are part of it.
        wanted = types - {"string"} if types <= {"string", "null"} else types
        for read in (json_of, _python_of) if wanted else ():
            try:
                found = read(raw)
            except Unreadable:
                continue
            if _is_of(found, wanted):
                return found
        if "string" in types:
            return raw
        raise self._error(f"the argument {name!r:.60} is none of {', '.join(sorted(types))}", at)

    # --- The text ------------------------------------------------------------------------------

    def _add(self, name: object, arguments: object, id: str | None, at: int) -> None:
        if not isinstance(name, str) or name not in self._parameters:
            hint = suggestion(name, self._parameters) if isinstance(name, str) else ""
            raise self._error(f"there is no tool {name!r:.80}{hint}", at)
        if not isinstance(arguments, dict):
            raise self._error(f"the arguments of {name!r} are no JSON object", at)
        if id is None or id in self._ids:
            length = self._format.id_length
            id = secrets.token_hex(length)[:length] if length else f"call_{secrets.token_hex(12)}"
        self._ids.add(id)
        self._found.append(ToolCall(id, name, arguments))

    def _value(self, read: Callable[[str, int], tuple[object, int]]) -> object:
        try:
            found, self._at = read(self._text, self._at)
        except Unreadable as error:
            raise self._error(str(error), error.at) from None
        return found

    def _until(self, mark: str) -> str:
        end = self._text.find(mark, self._at)
        if end < 0:
            raise self._error(f"{mark!r} is missing")
        found, self._at = self._text[self._at : end], end
        return found

    def _space(self) -> None:
        self._at = after_space(self._text, self._at)

    def _take(self, marks: Iterable[str]) -> bool:
        for mark in sorted(marks, key=len, reverse=True):
            if self._text.startswith(mark, self._at):
                self._at += len(mark)
                return True
        return False

    def _piece(self, piece: str) -> bool:
        """Go past a piece that is here, or stay."""
        at = self._at
        for n, part in enumerate(piece.split("~")):
            if n:
                self._space()
            if not self._take((part,)):
                self._at = at
                return False
        return True

    def _require(self, piece: str, may_lack: Sequence[str] | None = None) -> None:
        """Go past a piece, of which what closes the span may be missing at the end of the text."""
        may_lack = self._format.close if may_lack is None else may_lack
        for n, part in enumerate(piece.split("~")):
            if n:
                self._space()
            if not self._take((part,)):
                ended = after_space(self._text, self._at) == len(self._text)
                if not ended or part not in may_lack:
                    raise self._error(f"{part!r} is missing")

    def _error(self, problem: str, at: int | None = None) -> ToolCallError:
        place = self._at if at is None else at
        return ToolCallError(f"no tool call as {self._format.name!r} writes it: {problem}, at character {place}")


def _python_of(raw: str) -> object:
    found, end = PYTHON.read(raw, 0)
    if isinstance(found, str) or after_space(raw, end) < len(raw):
        raise Unreadable("not a value alone, or a text, which is written without quotes", end)
    return found


def _is_of(value: object, types: frozenset[str]) -> bool:
    if isinstance(value, bool) or value is None:
        return ("null" if value is None else "boolean") in types
    if isinstance(value, int):
        return not types.isdisjoint({"integer", "number"})
    if isinstance(value, float):
        return "number" in types or ("integer" in types and value.is_integer())
    return ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object") in types


def _shown(piece: str) -> str:
    return piece.replace("~", "")
