"""Tools as callers give them, brought into OpenAI's form, and which of them a reply must call.

A tool is checked here, before any model runs: first its form, which takes little
time, then, once the conversation is known to fit, its schema, which is compiled.
A reply is kept to the schema as far as a grammar can enforce it (see
`erllama.chat.tool_calls.schema_enforcement`). `Chat` calls this; `erllama.chat.tool_calls.formats` reads the result.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from erllama.chat.json_values import Unreadable, plain, plain_text, suggestion
from erllama.chat.messages import TOOL_NAME
from erllama.chat.tool_calls.schema_enforcement import fault_of, problem_of
from erllama.errors import ChatError, OptionError

_NO_PARAMETERS: Mapping[str, object] = {"type": "object", "properties": {}}
_KEYS = ("name", "description", "parameters", "input_schema", "strict", "type", "cache_control", "return")
_KINDS: Mapping[object, Literal["auto", "none", "required"]] = {
    "auto": "auto",
    "none": "none",
    "required": "required",
    "any": "required",
}


def normalized_tools(tools: object) -> list[dict[str, object]]:
    """Tools in OpenAI's form.

    Args:
        tools: a sequence of mappings, each in OpenAI's form ("type" and "function"), a function alone (name,
            description, parameters), or Anthropic's (name, description, input_schema). Left as it is.

    Returns:
        `{"type": "function", "function": {"name", "description", "parameters"}}` each; a tool without parameters
        has a schema of objects without properties, one without a description an empty one.

    Raises:
        ChatError: naming the tool: its name is none that models can write, or given twice; or its parameters are
            no mapping, or none of objects. `check_schemas` checks the rest.
    """
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise ChatError(f"tools must be a sequence of mappings, not {type(tools).__name__}")
    found: dict[str, dict[str, object]] = {}
    for number, tool in enumerate(tools):
        try:
            function = _function(tool)
            name = str(function["name"])
            if name in found:
                raise ChatError("the name comes twice")
        except (ChatError, Unreadable) as error:
            raise ChatError(f"tool {_called(tool, number)}: {error}") from None
        found[name] = {"type": "function", "function": function}
    return list(found.values())


def check_schemas(tools: Sequence[Mapping[str, object]], strict: Collection[str] = ()) -> None:
    """Compile the parameters of each tool. Takes time in proportion to all of them.

    Args:
        tools: as `normalized_tools` gives them.
        strict: the names of those whose parameters a grammar must enforce.

    Raises:
        ChatError: naming the tool: its parameters are no JSON schema, or one that no arguments have; or it is
            strict, and no grammar can enforce its parameters.
    """
    for name, parameters in parameters_of(tools).items():
        fault = _fault(json.dumps(parameters), name in strict)
        if fault:
            raise ChatError(f"tool {name!r}: {fault}")


# Tools come with each turn. More of them than this seldom fit a context.
@lru_cache(maxsize=4096)
def _fault(schema: str, strict: bool) -> str:
    """What is wrong with the parameters of a tool, as JSON text; empty where they are sound."""
    fault = fault_of(schema)
    if fault:
        return f"its parameters do not compile: {fault}"
    problem = problem_of(schema) if strict else ""
    return f"it is strict, and its parameters cannot be enforced: {problem}; leave 'strict' out" if problem else ""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether a reply may, must not or must call tools.

    Attributes:
        kind: "auto", "none" or "required".
        name: with "required", the one tool to be called; None for any.
    """

    kind: Literal["auto", "none", "required"]
    name: str | None = None


def tool_choice_of(choice: object, tools: Sequence[Mapping[str, object]]) -> ToolChoice:
    """What OpenAI's or Anthropic's `tool_choice` asks for.

    Args:
        choice: "auto", "none", "required", a tool's name, OpenAI's `{"type": "function", "function": {"name": …}}`
            or Anthropic's `{"type": "auto" | "any" | "none" | "tool", "name": …}`; None is "auto".
        tools: as `normalized_tools` gives them.

    Raises:
        OptionError: it is none of these, names no tool of those given, or requires one where there are none.
    """
    if choice is None:
        return ToolChoice("auto")
    if isinstance(choice, ToolChoice):
        kind, name = choice.kind, choice.name
    else:
        kind, name = _asked_for(choice, tool_names(tools))
    if name is not None and name not in tool_names(tools):
        raise OptionError(f"tool_choice names no tool: {name!r:.80}{suggestion(name, tool_names(tools))}")
    if kind == "required" and not tools:
        raise OptionError("tool_choice requires a tool call, and there are no tools")
    return ToolChoice(kind, name)


def strict_names(tools: object) -> frozenset[str]:
    """The names of the tools that are strict.

    Args:
        tools: as callers give them, and `normalized_tools` takes them.
    """
    given = tools if isinstance(tools, Sequence) else ()
    functions = (tool.get("function", tool) for tool in given if isinstance(tool, Mapping))
    return frozenset(str(function["name"]) for function in functions if function.get("strict"))


def tool_names(tools: Sequence[Mapping[str, object]]) -> list[str]:
    """The names of normalized tools, in order."""
    return [str(function["name"]) for function in map(_function_of, tools)]


def parameters_of(tools: Sequence[Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """The schemas of normalized tools' parameters, by name."""
    found: dict[str, dict[str, object]] = {}
    for function in map(_function_of, tools):
        parameters = function["parameters"]
        assert isinstance(parameters, dict)
        found[str(function["name"])] = parameters
    return found


def _asked_for(choice: object, names: Sequence[str]) -> tuple[Literal["auto", "none", "required"], str | None]:
    if isinstance(choice, str):
        # A tool may be called "auto": the word is meant all the same.
        return (_KINDS[choice], None) if choice in _KINDS and choice != "any" else ("required", str.__str__(choice))
    if isinstance(choice, Mapping):
        kind, function = choice.get("type"), choice.get("function")
        if kind == "function" and isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return "required", str(function["name"])
        if kind in ("tool", "function") and isinstance(choice.get("name"), str):
            return "required", str(choice["name"])
        if isinstance(kind, str) and kind in _KINDS:
            return _KINDS[kind], None
    takes = ", ".join(map(repr, ["auto", "none", "required", *names]))
    raise OptionError(f"tool_choice={choice!r:.120}; it takes {takes}, or OpenAI's or Anthropic's mapping of these")


def _function(tool: object) -> dict[str, object]:
    if not isinstance(tool, Mapping):
        raise ChatError(f"it must be a mapping, not {type(tool).__name__}")
    function = tool
    if "function" in tool:
        _known(tool, ("type", "function", "cache_control"))
        function = tool["function"]
        if not isinstance(function, Mapping):
            raise ChatError(f"its function must be a mapping, not {type(function).__name__}")
    # Anthropic's own tools have other types, and no schema.
    if tool.get("type", "function") not in ("function", "custom", None):
        raise ChatError(f"it is of type {tool['type']!r:.60}; there is 'function'")
    _known(function, _KEYS)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise ChatError(f"its name is {name!r:.80}; it takes 1 to 64 letters, digits, '_', '.' and '-'")
    if not isinstance(function.get("strict"), bool | None):
        raise ChatError(f"strict={function['strict']!r:.60}; it takes true, false or null")
    if description is not None and not isinstance(description, str):
        raise ChatError(f"its description must be a text, not {type(description).__name__}")
    return {
        "name": str.__str__(name),
        "description": plain_text(description or ""),
        "parameters": _parameters(function),
    }


def _parameters(function: Mapping[object, object]) -> dict[str, object]:
    both = [function[key] for key in ("parameters", "input_schema") if function.get(key) is not None]
    if len(both) > 1:
        raise ChatError("it has 'parameters' and 'input_schema'; one is enough")
    schema = plain(both[0] if both else _NO_PARAMETERS)
    if not isinstance(schema, dict):
        raise ChatError(f"its parameters must be a schema, not {type(schema).__name__}")
    if not schema:
        schema = dict(plain(_NO_PARAMETERS))  # type: ignore[call-overload]
    # What leaves the type out, as $ref and anyOf do, is told by the grammar of objects: nothing else is asked for.
    if schema.setdefault("type", "object") != "object":
        raise ChatError(f"its parameters are of type {json.dumps(schema['type'])[:60]}; arguments are an object")
    return schema


def _known(given: Mapping[object, object], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ChatError(f"it has no key {key!r:.60}{suggestion(str(key), known)}")


def _called(tool: object, number: int) -> str:
    """How an error names a tool: by its name, or its place."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
    name = function.get("name") if isinstance(function, Mapping) else None
    return repr(name)[:80] if isinstance(name, str) else str(number)


def _function_of(tool: Mapping[str, object]) -> Mapping[str, object]:
    function = tool["function"]
    assert isinstance(function, Mapping)
    return function
