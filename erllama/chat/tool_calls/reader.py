"""Reading tool calls: from the text of a span, exactly as a model wrote it, to calls.

`read_calls` reads every family's syntax. JSON is read by a JSON reader. Everything else is read by position, from
the first character to the last, so that no part of an argument is mistaken for syntax. Reading takes time in
proportion to the text. `erllama.chat.family` calls it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence

from erllama.chat.json_values import InvalidValueError, parse_json, read_json, skip_white_space
from erllama.chat.suggestions import suggest_name
from erllama.chat.tool_calls.literals import GEMMA, PYTHON, PYTHON_ARGUMENTS
from erllama.chat.tool_calls.parameter_schemas import (
    JSON_TYPES,
    find_allowed_types,
    get_properties,
    is_unquoted,
    list_arguments,
)
from erllama.chat.tool_calls.syntax import ID, CallSyntax, ListedArguments, ToolFormat
from erllama.chat.tool_calls.tools import get_parameters
from erllama.chat.types import TOOL_NAME
from erllama.engine import ToolCall
from erllama.errors import ToolCallError

NAME_KEYS = ("name", "tool_name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")


def read_calls(format: ToolFormat, full: str, tools: Sequence[Mapping[str, object]]) -> list[ToolCall]:
    """Return the calls of a span, or of several spans with white space between them.

    Args:
        full: the text as sampled, from a text of `format.open` through one of `format.close`. The latter may be
            missing if the model ended its turn instead and the call is complete without it.
        tools: as `normalize_tools` returns them.

    Raises:
        ToolCallError: the text is not a call, or calls a tool that is not in `tools`. The message has the position.
    """
    return _CallReader(format, full, get_parameters(tools)).read()


class _CallReader:
    """Reads one text from its beginning to its end."""

    def __init__(self, format: ToolFormat, text: str, parameters: Mapping[str, dict[str, object]]) -> None:
        self._format, self._text, self._parameters = format, text, parameters
        self._at = 0
        self._calls: list[ToolCall] = []
        self._ids: set[str] = set()

    def read(self) -> list[ToolCall]:
        self._skip_space()
        read_span = self._read_json_span if self._format.json_calls else self._read_span
        while not self._calls or self._at < len(self._text):
            read_span()
            self._skip_space()
        return self._calls

    # --- Calls as JSON objects -----------------------------------------------------------------

    def _read_json_span(self) -> None:
        format = self._format
        if not self._skip_any(format.open) and not format.leading:
            raise self._error(f"{' or '.join(map(repr, format.open))} is missing")
        self._skip_space()
        at = self._at
        value = self._read_value(read_json)
        for call in value if isinstance(value, list) else [value]:
            self._add_json_call(call, at)
        if not value:
            raise self._error("an empty list of calls", at)
        self._skip_space()
        if not self._skip_any(format.close) and format.close and self._at < len(self._text):
            raise self._error(f"{format.close[0]!r} is missing")
        if format.leading:
            self._skip_space()
            self._skip_any((";",))

    def _add_json_call(self, call: object, at: int) -> None:
        id = call.get("id") if isinstance(call, dict) else None
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            self._check_keys(call, ("type", "id", "function"), at)
            call = call["function"]
        if not isinstance(call, dict):
            raise self._error(f"a call must be a JSON object, not {json.dumps(call)[:40]}", at)
        name_is_key = self._format.calls[0].before == '{"'
        name, arguments = self._single_entry(call, at) if name_is_key else self._name_and_arguments(call, at)
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments)
            except InvalidValueError as error:
                raise self._error(f"the arguments are not JSON: {error}", at) from None
        has_id = self._format.id_pattern and isinstance(id, str) and id
        self._add_call(name, arguments, id if has_id else None, at)

    def _single_entry(self, call: dict[str, object], at: int) -> tuple[object, object]:
        if len(call) != 1:
            raise self._error("a call must be an object with one key, the tool's name", at)
        return next(iter(call.items()))

    def _name_and_arguments(self, call: dict[str, object], at: int) -> tuple[object, object]:
        names = [key for key in NAME_KEYS if key in call]
        payloads = [key for key in ARGUMENT_KEYS if key in call]
        for present, keys in ((names, NAME_KEYS), (payloads, ARGUMENT_KEYS)):
            if len(present) != 1:
                raise self._error(f"a call must have one of {', '.join(map(repr, keys))}, not {len(present)}", at)
        self._check_keys(call, ("type", "id", "tool_call_id", *names, *payloads), at)
        return call[names[0]], call[payloads[0]]

    def _check_keys(self, call: Mapping[str, object], known: Sequence[str], at: int) -> None:
        others = [key for key in call if key not in known]
        if others:
            raise self._error(f"a call has the unknown key {others[0]!r:.60}", at)

    # --- Calls in a family's own syntax --------------------------------------------------------

    def _read_span(self) -> None:
        span = self._format.spans[0]
        if not self._skip_piece(span.begin):
            raise self._error(f"{_without_space(span.begin)!r} is missing")
        self._read_call()
        while span.between is not None:
            at = self._at
            if not self._skip_piece(span.between) or not self._is_at_call():
                self._at = at
                break
            self._read_call()
        self._skip_required(span.end)

    def _is_at_call(self) -> bool:
        at = self._at
        is_call = any(call.before and self._skip_piece(call.before) for call in self._format.calls)
        # Where a call begins with its name, the separator before it shows that a call follows.
        is_call = is_call or not self._format.calls[0].before
        self._at = at
        return is_call

    def _read_call(self) -> None:
        begin = self._at
        call, name, id = self._read_header()
        if name not in self._parameters:
            raise self._error(f"there is no tool {name!r}{suggest_name(name, self._parameters)}", begin)
        arguments = self._read_arguments(self._parameters[name])
        # Only the text after the last listed argument shows that the list is complete, so it is required, unless it
        # is the text that closes the span.
        is_listed = isinstance(self._format.arguments, ListedArguments)
        self._skip_required(call.after, () if is_listed and call.after.strip("~") in self._format.close else None)
        self._add_call(name, arguments, self._format.id_template.format(name=name, id=id) if id else None, begin)

    def _read_header(self) -> tuple[CallSyntax, str, str]:
        """Read the name and the id of a call. Returns the call's syntax, the name, and the id or ""."""
        begin, furthest = self._at, (self._at, f"{_without_space(self._format.calls[0].before)!r} is missing")
        for call in self._format.calls:
            self._at = begin
            if not self._skip_piece(call.before):
                continue
            match = TOOL_NAME.match(self._text, self._at)
            if match is None:
                furthest = max(furthest, (self._at, "a tool's name is missing"))
                continue
            self._at = match.end()
            before, slot, after = call.middle.partition(ID)
            id_pattern = re.compile(self._format.id_pattern)
            if not self._skip_piece(before):
                furthest = max(furthest, (self._at, f"{_without_space(before)!r} is missing"))
                continue
            id = id_pattern.match(self._text, self._at) if slot else None
            if slot:
                if id is None:
                    furthest = max(furthest, (self._at, "a call's id is missing"))
                    continue
                self._at = id.end()
            if self._skip_piece(after):
                return call, match.group(), id.group() if id else ""
            furthest = max(furthest, (self._at, f"{_without_space(after)!r} is missing"))
        raise self._error(furthest[1], furthest[0])

    def _read_arguments(self, schema: dict[str, object]) -> object:
        syntax = self._format.arguments
        if isinstance(syntax, ListedArguments):
            return self._read_listed_arguments(syntax, schema)
        if syntax == "python":
            return self._read_value(lambda text, at: PYTHON_ARGUMENTS.read_mapping(text, at, "=", ")"))
        if syntax == "gemma":
            return self._read_value(lambda text, at: GEMMA.read_mapping(text, at, ":", "}"))
        self._skip_space()
        return self._read_value(read_json)

    # --- Arguments that are listed one by one --------------------------------------------------

    def _read_listed_arguments(self, syntax: ListedArguments, schema: dict[str, object]) -> dict[str, object]:
        arguments: dict[str, object] = {}
        properties = get_properties(list_arguments(schema))
        names = sorted(properties, key=len, reverse=True)
        while self._skip_piece(syntax.open):
            at = self._at
            name = self._read_argument_name(syntax, names)
            if name in arguments:
                raise self._error(f"the argument {name!r:.60} is repeated", at)
            types = find_allowed_types(properties[name], schema) if name in properties else JSON_TYPES
            arguments[name] = self._read_argument(syntax, name, types, at)
        return arguments

    def _read_argument_name(self, syntax: ListedArguments, known: Sequence[str]) -> str:
        at = self._at
        for name in known:
            # A known name may contain the text that ends a name.
            if self._text.startswith(name, at):
                self._at = at + len(name)
                if self._skip_piece(syntax.middle):
                    return name
                self._at = at
        name = self._read_until(syntax.middle.partition("~")[0])
        self._skip_piece(syntax.middle)
        return name

    def _read_argument(self, syntax: ListedArguments, name: str, types: frozenset[str], at: int) -> object:
        begin = self._at
        close = syntax.close.partition("~")[0]
        if not is_unquoted(types):
            # A JSON string may contain the text that ends an argument.
            try:
                value, self._at = read_json(self._text, skip_white_space(self._text, begin))
                self._skip_space()
                if _has_type(value, types) and self._text.startswith(close, self._at):
                    self._skip_piece(syntax.close)
                    return value
            except InvalidValueError:
                pass
            self._at = begin
        raw = self._read_until(close)
        self._skip_piece(syntax.close)
        if syntax.on_own_lines:
            raw = raw.removeprefix("\n").removesuffix("\n")
        return self._convert(name, raw, types, at)

    def _convert(self, name: str, raw: str, types: frozenset[str], at: int) -> object:
        """Return the value of an unquoted text, according to the types that the schema allows."""
        # Where only strings and null are allowed, quotes are part of the string.
        wanted = types - {"string"} if types <= {"string", "null"} else types
        for parse in (parse_json, _parse_python) if wanted else ():
            try:
                value = parse(raw)
            except InvalidValueError:
                continue
            if _has_type(value, wanted):
                return value
        if "string" in types:
            return raw
        raise self._error(f"the argument {name!r:.60} has none of the types {', '.join(sorted(types))}", at)

    # --- The text ------------------------------------------------------------------------------

    def _add_call(self, name: object, arguments: object, id: str | None, at: int) -> None:
        if not isinstance(name, str) or name not in self._parameters:
            hint = suggest_name(name, self._parameters) if isinstance(name, str) else ""
            raise self._error(f"there is no tool {name!r:.80}{hint}", at)
        if not isinstance(arguments, dict):
            raise self._error(f"the arguments of {name!r} are not a JSON object", at)
        if id is None or id in self._ids:
            length = self._format.id_length
            id = secrets.token_hex(length)[:length] if length else f"call_{secrets.token_hex(12)}"
        self._ids.add(id)
        self._calls.append(ToolCall(id, name, arguments))

    def _read_value(self, read: Callable[[str, int], tuple[object, int]]) -> object:
        try:
            value, self._at = read(self._text, self._at)
        except InvalidValueError as error:
            raise self._error(str(error), error.at) from None
        return value

    def _read_until(self, mark: str) -> str:
        end = self._text.find(mark, self._at)
        if end < 0:
            raise self._error(f"{mark!r} is missing")
        text, self._at = self._text[self._at : end], end
        return text

    def _skip_space(self) -> None:
        self._at = skip_white_space(self._text, self._at)

    def _skip_any(self, marks: Iterable[str]) -> bool:
        """Skip the longest of these texts that begins here. Return whether one does."""
        for mark in sorted(marks, key=len, reverse=True):
            if self._text.startswith(mark, self._at):
                self._at += len(mark)
                return True
        return False

    def _skip_piece(self, piece: str) -> bool:
        """Skip a piece and return True if it begins here; otherwise return False and skip no text."""
        at = self._at
        for n, part in enumerate(piece.split("~")):
            if n:
                self._skip_space()
            if not self._skip_any((part,)):
                self._at = at
                return False
        return True

    def _skip_required(self, piece: str, may_lack: Sequence[str] | None = None) -> None:
        """Skip a piece.

        Args:
            may_lack: texts that may be missing at the end of the text; None for those that close a span.
        """
        may_lack = self._format.close if may_lack is None else may_lack
        for n, part in enumerate(piece.split("~")):
            if n:
                self._skip_space()
            if not self._skip_any((part,)):
                at_end = skip_white_space(self._text, self._at) == len(self._text)
                if not at_end or part not in may_lack:
                    raise self._error(f"{part!r} is missing")

    def _error(self, problem: str, at: int | None = None) -> ToolCallError:
        place = self._at if at is None else at
        return ToolCallError(
            f"not a tool call in the format {self._format.name!r}: {problem}, at character {place}"
        )


def _parse_python(raw: str) -> object:
    value, end = PYTHON.read(raw, 0)
    if isinstance(value, str) or skip_white_space(raw, end) < len(raw):
        raise InvalidValueError("not a single value, or a string, which must be written without quotes", end)
    return value


def _has_type(value: object, types: frozenset[str]) -> bool:
    if isinstance(value, bool) or value is None:
        return ("null" if value is None else "boolean") in types
    if isinstance(value, int):
        return not types.isdisjoint({"integer", "number"})
    if isinstance(value, float):
        return "number" in types or ("integer" in types and value.is_integer())
    return ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object") in types


def _without_space(piece: str) -> str:
    return piece.replace("~", "")
