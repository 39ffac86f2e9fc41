"""Tools as callers define them, in one form, and the caller's choice of which tool a reply calls.

`normalize_tools` checks the form of a tool, which takes little time. `check_schemas` compiles its schema, once the
conversation is known to fit the context. `erllama.chat.chats` calls both before a request is made.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from erllama.chat.json_values import InvalidValueError, check_text, copy_json_value
from erllama.chat.suggestions import suggest_name
from erllama.chat.tool_calls.schema_enforcement import find_enforcement_problem, find_schema_error
from erllama.chat.types import TOOL_NAME
from erllama.errors import ChatError, OptionError

_NO_PARAMETERS: Mapping[str, object] = {"type": "object", "properties": {}}
_KEYS = ("name", "description", "parameters", "input_schema", "strict", "type", "cache_control", "return")
_CHOICES: Mapping[object, Literal["auto", "none", "required"]] = {
    "auto": "auto",
    "none": "none",
    "required": "required",
    "any": "required",
}


def normalize_tools(tools: object) -> list[dict[str, object]]:
    """Return tools in OpenAI's form.

    Args:
        tools: a sequence of mappings, each in OpenAI's form ("type" and "function"), a function alone (name,
            description, parameters), or Anthropic's form (name, description, input_schema). It is not changed.

    Returns:
        For each tool `{"type": "function", "function": {"name", "description", "parameters"}}`. The default schema
        is an object without properties. The default description is "".

    Raises:
        ChatError: a tool's name is not one that models can write, or is repeated; or its parameters are not a
            mapping, or not a schema of objects. The message names the tool. `check_schemas` checks the rest.
    """
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise ChatError(f"tools must be a sequence of mappings, not {type(tools).__name__}")
    by_name: dict[str, dict[str, object]] = {}
    for number, tool in enumerate(tools):
        try:
            function = _normalize_function(tool)
            name = str(function["name"])
            if name in by_name:
                raise ChatError("the name is repeated")
        except (ChatError, InvalidValueError) as error:
            raise ChatError(f"tool {_label(tool, number)}: {error}") from None
        by_name[name] = {"type": "function", "function": function}
    return list(by_name.values())


def check_schemas(tools: Sequence[Mapping[str, object]], strict: Collection[str] = ()) -> None:
    """Compile the parameters of each tool. Takes time in proportion to their size.

    Args:
        tools: as `normalize_tools` returns them.
        strict: names of the tools whose parameters a grammar must enforce.

    Raises:
        ChatError: a tool's parameters are not a JSON schema, or one that no arguments can match; or the tool is
            strict and no grammar can enforce its parameters. The message names the tool.
    """
    for name, parameters in get_parameters(tools).items():
        error = _check_schema(json.dumps(parameters), name in strict)
        if error:
            raise ChatError(f"tool {name!r}: {error}")


# Each turn has the same tools. More tools than this rarely fit a context.
@lru_cache(maxsize=4096)
def _check_schema(schema: str, strict: bool) -> str:
    """Return the error in a tool's parameters (JSON text); "" if they have no error."""
    error = find_schema_error(schema)
    if error:
        return f"its parameters do not compile: {error}"
    problem = find_enforcement_problem(schema) if strict else ""
    return f"it is strict, and its parameters cannot be enforced: {problem}; leave 'strict' out" if problem else ""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The caller's choice: whether a reply may, must or must not call tools.

    Attributes:
        kind: "auto", "none" or "required".
        name: with "required", the one tool that the reply calls; None for any.
    """

    kind: Literal["auto", "none", "required"]
    name: str | None = None


def parse_tool_choice(choice: object, tools: Sequence[Mapping[str, object]]) -> ToolChoice:
    """Parse OpenAI's or Anthropic's `tool_choice`.

    Args:
        choice: "auto", "none", "required", a tool's name, OpenAI's `{"type": "function", "function": {"name": …}}`
            or Anthropic's `{"type": "auto" | "any" | "none" | "tool", "name": …}`; None is "auto".
        tools: as `normalize_tools` returns them.

    Raises:
        OptionError: the choice has another form, names a tool that is not in `tools`, or requires a call without
            tools.
    """
    if choice is None:
        return ToolChoice("auto")
    if isinstance(choice, ToolChoice):
        kind, name = choice.kind, choice.name
    else:
        kind, name = _parse_choice(choice, get_tool_names(tools))
    if name is not None and name not in get_tool_names(tools):
        raise OptionError(
            f"tool_choice names an unknown tool: {name!r:.80}{suggest_name(name, get_tool_names(tools))}"
        )
    if kind == "required" and not tools:
        raise OptionError("tool_choice requires a tool call, but there are no tools")
    return ToolChoice(kind, name)


def find_strict_tools(tools: object) -> frozenset[str]:
    """Return the names of the tools that are strict.

    Args:
        tools: as callers write them.
    """
    entries = tools if isinstance(tools, Sequence) else ()
    functions = (tool.get("function", tool) for tool in entries if isinstance(tool, Mapping))
    return frozenset(str(function["name"]) for function in functions if function.get("strict"))


def get_tool_names(tools: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the names of normalized tools, in order."""
    return [str(function["name"]) for function in map(_function_of, tools)]


def get_parameters(tools: Sequence[Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """Return the schemas of normalized tools' parameters, by tool name."""
    by_name: dict[str, dict[str, object]] = {}
    for function in map(_function_of, tools):
        parameters = function["parameters"]
        assert isinstance(parameters, dict)
        by_name[str(function["name"])] = parameters
    return by_name


def _parse_choice(choice: object, names: Sequence[str]) -> tuple[Literal["auto", "none", "required"], str | None]:
    if isinstance(choice, str):
        # Even if a tool has the name "auto", the word means the choice.
        return (
            (_CHOICES[choice], None)
            if choice in _CHOICES and choice != "any"
            else ("required", str.__str__(choice))
        )
    if isinstance(choice, Mapping):
        kind, function = choice.get("type"), choice.get("function")
        if kind == "function" and isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return "required", str(function["name"])
        if kind in ("tool", "function") and isinstance(choice.get("name"), str):
            return "required", str(choice["name"])
        if isinstance(kind, str) and kind in _CHOICES:
            return _CHOICES[kind], None
    takes = ", ".join(map(repr, ["auto", "none", "required", *names]))
    raise OptionError(f"tool_choice={choice!r:.120}; expected {takes}, or OpenAI's or Anthropic's mapping of these")


def _normalize_function(tool: object) -> dict[str, object]:
    if not isinstance(tool, Mapping):
        raise ChatError(f"a tool must be a mapping, not {type(tool).__name__}")
    function = tool
    if "function" in tool:
        _check_keys(tool, ("type", "function", "cache_control"))
        function = tool["function"]
        if not isinstance(function, Mapping):
            raise ChatError(f"its function must be a mapping, not {type(function).__name__}")
    # Anthropic's built-in tools have other types and no schema, so they are refused.
    if tool.get("type", "function") not in ("function", "custom", None):
        raise ChatError(f"its type is {tool['type']!r:.60}; expected 'function'")
    _check_keys(function, _KEYS)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise ChatError(f"its name is {name!r:.80}; a name has 1 to 64 letters, digits, '_', '.' and '-'")
    if not isinstance(function.get("strict"), bool | None):
        raise ChatError(f"strict={function['strict']!r:.60}; expected true, false or null")
    if description is not None and not isinstance(description, str):
        raise ChatError(f"its description must be a string, not {type(description).__name__}")
    return {
        "name": str.__str__(name),
        "description": check_text(description or ""),
        "parameters": _normalize_parameters(function),
    }


def _normalize_parameters(function: Mapping[object, object]) -> dict[str, object]:
    both = [function[key] for key in ("parameters", "input_schema") if function.get(key) is not None]
    if len(both) > 1:
        raise ChatError("it has both 'parameters' and 'input_schema'; remove one")
    schema = copy_json_value(both[0] if both else _NO_PARAMETERS)
    if not isinstance(schema, dict):
        raise ChatError(f"its parameters must be a schema, not {type(schema).__name__}")
    if not schema:
        schema = dict(copy_json_value(_NO_PARAMETERS))  # type: ignore[call-overload]
    # A schema may leave the type out, as with $ref and anyOf. Arguments are an object in any case.
    if schema.setdefault("type", "object") != "object":
        raise ChatError(
            f"its parameters have the type {json.dumps(schema['type'])[:60]}; the type of arguments is 'object'"
        )
    return schema


def _check_keys(mapping: Mapping[object, object], known: Sequence[str]) -> None:
    for key in mapping:
        if key not in known:
            raise ChatError(f"unknown key {key!r:.60}{suggest_name(str(key), known)}")


def _label(tool: object, number: int) -> str:
    """Return the name of a tool, or its number, for an error message."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    name = function.get("name") if isinstance(function, Mapping) else None
    return repr(name)[:80] if isinstance(name, str) else str(number)


def _function_of(tool: Mapping[str, object]) -> Mapping[str, object]:
    function = tool["function"]
    assert isinstance(function, Mapping)
    return function
