"""Python functions as tools: their schemas from signatures and docstrings, and calls of them.

`tool_schemas` makes schemas of the functions among a request's tools. `FunctionTools` calls the functions that a
reply names.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from erllama._types import Message
from erllama.checks import shown
from erllama.engine import ToolCall
from erllama.errors import OptionError

Tool = Mapping[str, object] | Callable[..., object]
Schema = dict[str, object]

_SIMPLE: Mapping[object, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    None: "null",
    dict: "object",
    list: "array",
}
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?|Attributes):?\s*$")
_ARGUMENT = re.compile(r"^(\*{0,2}\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_PARAM = re.compile(r"^:param\s+(?:[\w\[\], ]+\s)?(\w+):\s*(.*)$")


def tool_schemas(tools: object) -> object:
    """Return tools with a schema in the place of each function; other values are returned as they are.

    Raises:
        OptionError: a function has a parameter that a JSON schema cannot describe.
    """
    if callable(tools):
        raise OptionError(f"tools={shown(tools)}; pass a list of functions")
    if not isinstance(tools, list | tuple):
        return tools
    return [function_schema(tool) if callable(tool) else tool for tool in tools]


def function_schema(function: Callable[..., object]) -> Schema:
    """Return the tool of a function, in the form of OpenAI's clients.

    The description is the docstring up to its first section. Descriptions of parameters come from its section
    "Args", from ":param name:" lines, or from `Annotated[T, "description"]`. Parameters without a default are
    required.

    Raises:
        OptionError: a parameter has no annotation or one that JSON cannot express, or has no name.
    """
    name = getattr(function, "__name__", type(function).__name__)
    description, documented = _read_docstring(inspect.getdoc(function) or "")
    properties: dict[str, object] = {}
    required = []
    for parameter, annotation in _parameters(function, name):
        schema = _schema(annotation, f"parameter {parameter.name!r} of {name}")
        if parameter.name in documented:
            schema.setdefault("description", documented[parameter.name])
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif _is_json(parameter.default):
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    parameters: Schema = {"type": "object", "properties": properties, "required": required}
    parameters["additionalProperties"] = False
    described: Schema = {"name": name, "description": description} if description else {"name": name}
    return {"type": "function", "function": {**described, "parameters": parameters}}


def _parameters(function: Callable[..., object], name: str) -> list[tuple[inspect.Parameter, object]]:
    """Return the parameters of a function with their annotations."""
    try:
        signature = inspect.signature(function)
        called = function if inspect.isroutine(function) else type(function).__call__
        hints = get_type_hints(called, include_extras=True)
    except (NameError, TypeError, ValueError) as error:
        raise OptionError(f"the signature of {name} cannot be read: {error}") from None
    found = []
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise OptionError(f"parameter {parameter.name!r} of {name} has no name in calls; use named parameters")
        if parameter.name not in hints:
            raise OptionError(f"parameter {parameter.name!r} of {name} has no annotation; add its type")
        found.append((parameter, hints[parameter.name]))
    return found


def _schema(annotation: object, where: str) -> Schema:
    """Return the JSON schema of a type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        schema, texts = _schema(arguments[0], where), [text for text in arguments[1:] if isinstance(text, str)]
        return schema | {"description": texts[0]} if texts else schema
    if origin in (Required, NotRequired):
        return _schema(arguments[0], where)
    if annotation is Any:
        return {}
    if annotation in _SIMPLE:
        return {"type": _SIMPLE[annotation]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(each, where) for each in arguments]}
    if origin in (list, Sequence):
        return {"type": "array", "items": _schema(arguments[0], where)}
    if origin in (dict, Mapping) and arguments[0] is str:
        return {"type": "object", "additionalProperties": _schema(arguments[1], where)}
    if is_typeddict(annotation):
        hints = get_type_hints(annotation, include_extras=True)
        required = sorted(getattr(annotation, "__required_keys__", hints))
        properties = {key: _schema(hint, f"{key!r} in {where}") for key, hint in hints.items()}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    raise OptionError(
        f"{where} has the type {annotation!r:.60}; use str, int, float, bool, list, dict, Literal, a TypedDict, "
        "or a union of them"
    )


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description of a function, and those of its parameters by name."""
    description: list[str] = []
    parameters: dict[str, str] = {}
    section, name, indent = "", "", 0
    for line in text.splitlines():
        stripped, depth = line.strip(), len(line) - len(line.lstrip())
        if heading := _SECTION.match(stripped):
            section, name = heading[1], ""
        elif param := _PARAM.match(stripped):
            section, name, indent = "Args", param[1], depth
            parameters[name] = param[2]
        elif stripped.startswith((":return", ":raise", ":rtype")):
            section, name = "Returns", ""
        elif not section:
            description.append(stripped)
        elif section in ("Args", "Arguments", "Parameters"):
            argument = _ARGUMENT.match(stripped)
            if argument and (not name or depth <= indent):
                name, indent = argument[1].lstrip("*"), depth
                parameters[name] = argument[2]
            elif name and stripped:
                parameters[name] = f"{parameters[name]} {stripped}".strip()
    return "\n".join(description).strip(), parameters


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of one call of a function.

    Attributes:
        call: the call.
        content: what the model reads: the returned text, or the returned value as JSON; for an error, its type and
            message.
        value: what the function returned; None for an error.
        error: the exception that it raised; None without one.
    """

    call: ToolCall
    content: str
    value: object = None
    error: Exception | None = None

    @property
    def message(self) -> Message:
        """The result as a message of the conversation."""
        return {"role": "tool", "tool_call_id": self.call.id, "name": self.call.name, "content": self.content}


class FunctionTools:
    """The functions that replies may call.

    Raises:
        OptionError: there is none, a tool is not a function, two have one name, or a schema cannot be made.
    """

    def __init__(self, tools: object) -> None:
        if not isinstance(tools, list | tuple) or not tools:
            raise OptionError(f"tools={shown(tools)}; pass a list of functions")
        self.schemas: list[Schema] = []
        self._functions: dict[str, Callable[..., object]] = {}
        for tool in tools:
            if not callable(tool):
                raise OptionError(f"tools has {shown(tool)}; pass functions, or run the calls of `chat` yourself")
            schema = function_schema(tool)
            name = str(schema["function"]["name"])  # type: ignore[index]
            if name in self._functions:
                raise OptionError(f"tools has two functions named {name!r}; rename one")
            self.schemas.append(schema)
            self._functions[name] = tool

    def reject_async(self) -> None:
        """Raise OptionError if a function is a coroutine function."""
        for name, function in self._functions.items():
            if is_async(function):
                raise OptionError(f"{name} is a coroutine function; use arun_tools or astream_run_tools")

    def function(self, call: ToolCall) -> Callable[..., object]:
        """Return the function of a call."""
        return self._functions[call.name]

    def call(self, call: ToolCall) -> ToolResult:
        """Call a function and return its result, also if it raises an exception."""
        try:
            return returned(call, self.function(call)(**call.arguments))
        except Exception as error:  # any exception goes to the model
            return raised(call, error)


def is_async(function: Callable[..., object]) -> bool:
    """Return whether a function, or an object that is called as one, is a coroutine function."""
    return any(inspect.iscoroutinefunction(each) for each in (function, type(function).__call__))


def returned(call: ToolCall, value: object) -> ToolResult:
    """Return the result of a call whose function returned. A value that JSON lacks becomes its text."""
    content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return ToolResult(call, content, value)


def raised(call: ToolCall, error: Exception) -> ToolResult:
    """Return the result of a call whose function raised an exception."""
    return ToolResult(call, f"Error: {type(error).__name__}: {error}", error=error)
