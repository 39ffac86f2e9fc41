"""Tools of requests.

A function within a namespace has a name of its own in the prompt, which `ToolNames` maps back.

Tools of other types than `function` and `namespace` are services of OpenAI, and are skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.replies.messages import read_tools

_MAX_NAME = 64  # longer names are not names of tools
_DEFAULT_NAMESPACE = "functions"  # Codex's name for that of tools without a namespace


class ToolNames:
    """The names that functions have in the prompt, and the namespaces and names that the client knows them by."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[str | None, str]] = {}

    def add(self, namespace: str | None, name: str) -> str:
        """Add a function, and return its name in the prompt."""
        in_prompt = name_in_prompt(namespace, name)
        self._parts.setdefault(in_prompt, (namespace, name))
        return in_prompt

    def split(self, in_prompt: str) -> tuple[str | None, str]:
        """Return the namespace and the name of a function; None for the namespace if it is in none."""
        return self._parts.get(in_prompt, (None, in_prompt))

    def find(self, namespace: str | None, name: str) -> str:
        """Return the name in the prompt of a function that a client names, perhaps without its namespace."""
        in_prompt = name_in_prompt(namespace, name)
        if in_prompt not in self._parts and namespace is None:
            same = [each for each, parts in self._parts.items() if parts[1] == name]
            return same[0] if len(same) == 1 else name
        return in_prompt


def name_in_prompt(namespace: str | None, name: str) -> str:
    """Return the name that a function has in the prompt: the same for the same function on each turn."""
    if not namespace or namespace == _DEFAULT_NAMESPACE:
        return name
    whole = f"{namespace.removesuffix('__')}__{name}"
    if len(whole) <= _MAX_NAME:
        return whole
    digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{whole[: _MAX_NAME - 9]}_{digest}"


class Tools(NamedTuple):
    """The tools of a request.

    Attributes:
        functions: as `Model.chat` takes them; None if no tool is a function.
        names: of these functions.
        shown: the functions and namespaces as the client sent them, for the response.
    """

    functions: list[Json] | None
    names: ToolNames
    shown: list[Json]


def read_response_tools(tools: Sequence[Json] | None) -> Tools:
    """Return the tools of a request.

    Raises:
        ApiError: a tool or a namespace has no name, or the tools of a namespace are not a list.
    """
    names = ToolNames()
    functions: list[Json] = []
    shown: list[Json] = []
    for index, tool in enumerate(tools or ()):
        kind, where = tool.get("type"), f"tools[{index}]"
        if kind == "function":
            functions += _read_function(tool, None, names, where)
        elif kind == "namespace":
            functions += _read_namespace(tool, names, where)
        if kind in ("function", "namespace"):
            shown.append(tool)
    return Tools(functions or None, names, shown)


def _read_function(tool: Json, namespace: str | None, names: ToolNames, where: str) -> list[Json]:
    """Return a function as `Model.chat` takes it, with its name in the prompt."""
    function = {**tool, "name": names.add(namespace, _name(tool, where))}
    try:
        return read_tools([function], where) or []
    except ApiError as error:
        if error.param is not None:
            error.param = error.param.replace(f"{where}[0]", where)
        error.message = error.message.replace(f"{where}[0]", where)
        raise


def _read_namespace(tool: Json, names: ToolNames, where: str) -> list[Json]:
    """Return the functions of a namespace. The first one has the description of the namespace before its own."""
    namespace, members = _name(tool, where), tool.get("tools")
    if not isinstance(members, list) or not all(isinstance(member, dict) for member in members):
        raise ApiError("invalid_request", f"{where}.tools is not a list of tools; send one", param=f"{where}.tools")
    functions: list[Json] = []
    for index, member in enumerate(members):
        if member.get("type") == "function":
            functions += _read_function(member, namespace, names, f"{where}.tools[{index}]")
    description = tool.get("description")
    if functions and isinstance(description, str) and description:
        first = functions[0]["function"]
        own = first.get("description")
        first["description"] = f"{description}\n\n{own}" if own else description
    return functions


def _name(value: Json, where: str) -> str:
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise ApiError("invalid_request", f"{where}.name is {name!r:.60}; send a name", param=f"{where}.name")
    return name


class Choice(NamedTuple):
    """What a reply may call.

    Attributes:
        tool_choice: as `Model.chat` takes it.
        functions: the functions that the reply may call; None if no tool is a function.
    """

    tool_choice: str | Json | None
    functions: list[Json] | None


def read_tool_choice(choice: str | Json | None, tools: Tools) -> Choice:
    """Return the meaning of `tool_choice`.

    A choice of several of the tools removes the others from the prompt, since a reply cannot be kept from calling
    them otherwise. So it costs the cached prefix.

    Raises:
        ApiError: the choice has another form, or names a tool that is not there.
    """
    if choice is None or isinstance(choice, str):
        return Choice(choice, tools.functions)
    kind = choice.get("type")
    if kind == "allowed_tools" and isinstance(choice.get("tools"), list) and isinstance(choice.get("mode"), str):
        return _read_allowed(choice["tools"], choice["mode"], tools)
    if kind == "function" and isinstance(choice.get("name"), str):
        return Choice({"type": "function", "name": _find(choice, tools)}, tools.functions)
    raise ApiError(
        "invalid_request",
        f"tool_choice is {choice!r:.120}; it takes auto, none, required, a function and allowed_tools",
        param="tool_choice",
    )


def _read_allowed(allowed: Sequence[object], mode: str, tools: Tools) -> Choice:
    wanted = {
        _find(each, tools)
        for each in allowed
        if isinstance(each, Mapping) and each.get("type") == "function" and isinstance(each.get("name"), str)
    }
    functions = [each for each in tools.functions or () if each["function"]["name"] in wanted]
    if len(functions) == len(tools.functions or ()):
        return Choice(mode, tools.functions)
    if not functions:
        return Choice("none", tools.functions)
    if mode == "required" and len(functions) == 1:
        return Choice({"type": "function", "name": functions[0]["function"]["name"]}, tools.functions)
    return Choice(mode, functions)


def _find(function: Mapping[str, object], tools: Tools) -> str:
    """Return the name in the prompt of a function that `tool_choice` names."""
    namespace = function.get("namespace")
    name = tools.names.find(namespace if isinstance(namespace, str) else None, str(function["name"]))
    known = [each["function"]["name"] for each in tools.functions or ()]
    if name not in known:
        raise ApiError(
            "invalid_request",
            f"tool_choice names {function['name']!r:.80}, and the tools are {', '.join(known) or 'empty'}",
            param="tool_choice",
        )
    return name
