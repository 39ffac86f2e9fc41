"""Messages as callers write them, in the one form that chat templates read.

OpenAI's and Anthropic's messages are both accepted: texts, parts and blocks, reasoning, tool calls and their
results. `normalize_messages` returns fresh plain data, the same for either notation. A second call does not change
them. A message that cannot be read is a `ChatError` that names its index. `erllama.chat.chats` calls it before a
template renders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from erllama._types import Message
from erllama.chat.json_values import InvalidValueError, check_text, copy_json_value, parse_json
from erllama.chat.suggestions import suggest_name
from erllama.chat.types import ROLES, TOOL_NAME
from erllama.errors import ChatError

_KEYS = (
    *("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"),
    *("refusal", "function_call"),
)
# Keys of replies that servers send and clients return. Templates do not use them, so they are dropped.
_IGNORED = frozenset({"annotations", "audio", "parsed"})
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Keys of calls. Others are refused, since a misspelt key would silently lose the arguments.
_CALL_KEYS = ("id", "type", "function", "index")
_FUNCTION_KEYS = ("name", "arguments", "parsed_arguments")
_TOOL_USE_KEYS = ("type", "id", "name", "input", "cache_control", "caller")
_MEDIA = ("image", "audio", "video", "file", "document")


def normalize_messages(messages: object) -> list[Message]:
    """Return a conversation in the form that Hugging Face's chat templates read.

    Args:
        messages: a sequence of mappings, each in OpenAI's form (content that is a string or parts, tool_calls, role
            "tool"; the older function_call and role "function") or Anthropic's (blocks: text, thinking, tool_use,
            tool_result). It is not changed.

    Returns:
        Messages with "role" (one of `ROLES`) and "content" (a string; parts are joined), and, if they apply,
        "name", "reasoning_content", "tool_calls" with arguments as dicts, and "tool_call_id". Tool results within a
        user message become separate messages, before it. Calls without an id get one.

    Raises:
        ChatError: a role or key is unknown, content is missing, a result has no call, an id is used twice,
            arguments are not a JSON object, a part is an image or another medium, or UTF-8 cannot encode a text.
            The error has the index of the message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a sequence of mappings, not {type(messages).__name__}")
    if not messages:
        raise ChatError("messages is empty; a conversation has at least one message")
    normalizer = _MessageNormalizer()
    for index, message in enumerate(messages):
        try:
            normalizer.add(index, message)
        except (InvalidValueError, _MessageError) as error:
            raise ChatError(f"message {index}: {error}", index=index) from None
    return normalizer.messages


class _MessageError(Exception):
    """An error in one message; `normalize_messages` adds the index."""


class _MessageNormalizer:
    """Normalizes the messages of one conversation, in order, and matches results with calls."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        # Tool names of the calls that have no result yet, by id, in order.
        self._unanswered: dict[str, str] = {}
        self._answered: set[str] = set()

    def add(self, index: int, value: object) -> None:
        message = _require_mapping(value, "a message")
        _check_keys({key: message[key] for key in message if key not in _IGNORED}, _KEYS, "a message")
        role = message.get("role")
        if not isinstance(role, str) or role not in (*ROLES, "function"):
            hint = (
                suggest_name(role, ROLES)
                if isinstance(role, str)
                else f"; known names: {', '.join(map(repr, ROLES))}"
            )
            raise _MessageError(f"unknown role {role!r:.60}{hint}")
        if role in ("tool", "function"):
            self._add_result(message)
        elif role == "assistant":
            self._add_reply(index, message)
        else:
            self._add_content_message(str.__str__(role), message)

    def _add_content_message(self, role: str, message: Mapping[object, object]) -> None:
        _check_role_keys(message, role, ("content", "name"))
        texts: list[str] = []
        results: list[Message] = []

        def read_block(kind: str, part: Mapping[object, object]) -> bool:
            if kind != "tool_result" or role != "user":
                return False
            is_error = part.get("is_error")
            if is_error is not None and not isinstance(is_error, bool):
                raise _MessageError(f"is_error is {is_error!r:.60}; expected True or False")
            content = part.get("content")
            text = "" if content is None else _join_content(content, "a tool_result")
            results.append(self._make_result(part.get("tool_use_id"), None, text, "tool_use_id"))
            return True

        content = message.get("content")
        if content is None:
            raise _MessageError(f"a message with the role {role!r} must have content")
        _read_content(content, texts, read_block)
        self.messages += results
        if texts or not results:
            self.messages.append({"role": role, "content": "".join(texts), **_name_entry(message)})

    def _add_reply(self, index: int, message: Mapping[object, object]) -> None:
        _check_role_keys(message, "assistant", set(_KEYS) - {"tool_call_id"})
        texts: list[str] = []
        thoughts = _find_reasoning(message)
        calls: list[tuple[object, object, object]] = []

        def read_block(kind: str, part: Mapping[object, object]) -> bool:
            if kind == "thinking":
                thoughts.append(_require_text(part.get("thinking"), "thinking"))
            elif kind == "tool_use":
                _check_keys(part, _TOOL_USE_KEYS, "a tool_use")
                calls.append((part.get("id"), part.get("name"), part.get("input")))
            else:
                return kind == "redacted_thinking"
            return True

        content, refusal = message.get("content"), message.get("refusal")
        if content is not None:
            _read_content(content, texts, read_block, may_be_empty=True)
        if refusal is not None:
            texts.append(_require_text(refusal, "refusal"))
        calls += _parse_calls(message)
        reply: dict[str, object] = {"role": "assistant", "content": "".join(texts), **_name_entry(message)}
        if any(thoughts):
            reply["reasoning_content"] = "".join(thoughts)
        if calls:
            reply["tool_calls"] = [self._make_call(index, n, *call) for n, call in enumerate(calls)]
        elif not texts and not _is_present(content):
            raise _MessageError("a message with the role 'assistant' must have content or tool_calls")
        self.messages.append(reply)

    def _make_call(self, index: int, number: int, id: object, name: object, arguments: object) -> dict[str, object]:
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise _MessageError(
                f"a tool call's name is {name!r:.80}; a name has 1 to 64 letters, digits, '_', '.' and '-'"
            )
        name = str.__str__(name)
        if id is None:
            id = f"call_{index}_{number}"
            while id in self._unanswered or id in self._answered:
                id += "_"
        id = _require_text(id, "a tool call's id")
        if not id:
            raise _MessageError("a tool call's id is empty")
        if id in self._unanswered:
            raise _MessageError(f"two tool calls have the id {id!r:.80}")
        self._unanswered[id] = name
        self._answered.discard(id)
        function = {"name": name, "arguments": _parse_arguments(name, arguments)}
        return {"id": id, "type": "function", "function": function}

    def _add_result(self, message: Mapping[object, object]) -> None:
        _check_role_keys(message, "tool", ("content", "name", "tool_call_id"))
        content = message.get("content")
        if content is None:
            raise _MessageError("a tool result must have content")
        name = _name_entry(message).get("name")
        text = _join_content(content, "a tool result")
        self.messages.append(self._make_result(message.get("tool_call_id"), name, text, "tool_call_id"))

    def _make_result(self, id: object, name: str | None, content: str, key: str) -> dict[str, object]:
        """Return a tool message. Without an id, it answers the first open call of its name, or the only one."""
        if id is None:
            unanswered = [call_id for call_id, tool in self._unanswered.items() if name in (None, tool)]
            if not unanswered or (name is None and len(unanswered) > 1):
                raise _MessageError(
                    f"a tool result has no {key}, and no unanswered tool call can be found for it without one"
                )
            id = unanswered[0]
        id = _require_text(id, key)
        if id in self._answered:
            raise _MessageError(f"the tool call {id!r:.80} has two results")
        if id not in self._unanswered:
            raise _MessageError(
                f"a tool result names the unknown tool call {id!r:.80}{suggest_name(id, self._unanswered)}"
            )
        tool = self._unanswered[id]
        if name not in (None, tool):
            raise _MessageError(
                f"the result of the tool call {id!r:.80} has the name {name!r:.80}; the call has {tool!r}"
            )
        del self._unanswered[id]
        self._answered.add(id)
        return {"role": "tool", "content": content, "tool_call_id": id, "name": tool}


def _read_content(
    content: object,
    texts: list[str],
    read_block: Callable[[str, Mapping[object, object]], bool],
    *,
    may_be_empty: bool = False,
) -> None:
    """Append the texts in content to `texts`. Pass other parts to `read_block`, which returns if it accepts one."""
    if isinstance(content, str):
        texts.append(check_text(content))
        return
    if not isinstance(content, list | tuple):
        raise _MessageError(f"content has the type {type(content).__name__}; expected a string or a list of parts")
    if not content and not may_be_empty:
        raise _MessageError("content is an empty list")
    for value in content:
        if isinstance(value, str):
            texts.append(check_text(value))
            continue
        part = _require_mapping(value, "a part of content")
        kind = part.get("type")
        if not isinstance(kind, str):
            raise _MessageError(f"the type of a part of content is {kind!r:.60}; expected a name such as 'text'")
        if kind in _TEXTS:
            texts.append(_require_text(part.get(_TEXTS[kind]), f"the {_TEXTS[kind]!r} of a part of content"))
        elif not read_block(kind, part):
            if any(medium in kind for medium in _MEDIA):
                raise _MessageError(f"a part of content has the type {kind!r:.60}; only text is supported")
            known = (*_TEXTS, "thinking", "redacted_thinking", "tool_use", "tool_result")
            raise _MessageError(
                f"a part of content has the type {kind!r:.60}, which is not allowed here{suggest_name(kind, known)}"
            )


def _join_content(content: object, where: str) -> str:
    texts: list[str] = []
    try:
        _read_content(content, texts, lambda kind, part: False, may_be_empty=True)
    except _MessageError as error:
        raise _MessageError(f"{where}: {error}") from None
    return "".join(texts)


def _parse_calls(message: Mapping[object, object]) -> list[tuple[object, object, object]]:
    """Return the id, name and arguments of each call, in OpenAI's form or the older one."""
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list | tuple):
        raise _MessageError(f"tool_calls has the type {type(calls).__name__}; expected a list")
    parsed: list[tuple[object, object, object]] = []
    for value in calls or ():
        call = _require_mapping(value, "a tool call")
        if call.get("type", "function") != "function":
            raise _MessageError(f"a tool call has the type {call.get('type')!r:.60}; expected 'function'")
        _check_keys(call, _CALL_KEYS, "a tool call")
        parsed.append((call.get("id"), *_parse_function(call.get("function"), "the 'function' of a tool call")))
    if message.get("function_call") is not None:
        parsed.append((None, *_parse_function(message["function_call"], "function_call")))
    return parsed


def _parse_function(value: object, where: str) -> tuple[object, object]:
    function = _require_mapping(value, where)
    _check_keys(function, _FUNCTION_KEYS, where)
    return function.get("name"), function.get("arguments")


def _parse_arguments(name: str, value: object) -> object:
    if value is None or (isinstance(value, str) and not value):
        return {}
    where = f"the arguments of {name!r}"
    if isinstance(value, str):
        try:
            arguments = parse_json(check_text(value))
        except InvalidValueError as error:
            raise _MessageError(f"{where} are not JSON: {error}, at character {error.at}") from None
    else:
        arguments = copy_json_value(value)
    if not isinstance(arguments, dict):
        raise _MessageError(f"{where} have the type {type(arguments).__name__}; expected a JSON object")
    return arguments


def _find_reasoning(message: Mapping[object, object]) -> list[str]:
    texts = {key: _require_text(message[key], key) for key in _REASONING if message.get(key) is not None}
    if len(set(texts.values())) > 1:
        raise _MessageError(f"{' and '.join(map(repr, texts))} differ; use one of them")
    return list(texts.values())[:1]


def _name_entry(message: Mapping[object, object]) -> dict[str, str]:
    return {} if message.get("name") is None else {"name": _require_text(message["name"], "name")}


def _check_role_keys(message: Mapping[object, object], role: str, keys: Collection[str]) -> None:
    for key in _KEYS:
        if key != "role" and key not in keys and _is_present(message.get(key)):
            raise _MessageError(f"a message with the role {role!r} must not have {key!r}")


def _is_present(value: object) -> bool:
    """Return whether a key has a value. Clients send None or an empty list for an absent one."""
    return value is not None and not (isinstance(value, list | tuple) and not value)


def _check_keys(value: Mapping[object, object], known: Sequence[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise _MessageError(f"{where} has the unknown key {key!r:.60}{suggest_name(str(key), known)}")


def _require_mapping(value: object, where: str) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise _MessageError(f"{where} must be a mapping, not {type(value).__name__}")
    return value


def _require_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _MessageError(f"{where} must be a string, not {type(value).__name__}")
    return check_text(value)
