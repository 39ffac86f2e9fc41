"""Conversations as callers give them, brought into the one form that chat templates take.

OpenAI's messages and Anthropic's are read alike: texts, parts and blocks,
reasoning, calls of tools and their results. What comes out is fresh and plain,
the same whichever way it was said, and the same when read again; what cannot
be read is a `ChatError` that names the message. `Chat` calls this before
anything is rendered; no model is involved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from erllama.chat.json_values import Unreadable, json_of, plain, plain_text, suggestion
from erllama.errors import ChatError

ROLES = ("system", "developer", "user", "assistant", "tool")
# OpenAI's rule, with dots, which some families' own tools have.
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_KEYS = (
    *("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"),
    *("refusal", "function_call"),
)
# Parts of a reply that servers send along, and clients send back: they say nothing to a model.
_IGNORED = frozenset({"annotations", "audio", "parsed"})
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# What calls have; a key that is misspelt would lose the arguments without a word.
_CALL_KEYS = ("id", "type", "function", "index")
_FUNCTION_KEYS = ("name", "arguments", "parsed_arguments")
_TOOL_USE_KEYS = ("type", "id", "name", "input", "cache_control", "caller")
_MEDIA = ("image", "audio", "video", "file", "document")


def normalized_messages(messages: object) -> list[dict[str, object]]:
    """A conversation as Hugging Face's chat templates take it.

    Args:
        messages: a sequence of mappings, each in OpenAI's form (content a text or parts, tool_calls, role "tool";
            the older function_call and role "function") or Anthropic's (blocks: text, thinking, tool_use,
            tool_result). Left as it is.

    Returns:
        each message with "role" (one of `ROLES`) and "content" (text; parts are joined), and where they apply
        "name", "reasoning_content", "tool_calls" with arguments as dicts, and "tool_call_id". Results inside a user
        message come before it, as messages of their own. Calls without an id are given one.

    Raises:
        ChatError: with the index of the message at fault: unknown roles and keys, no content, a result without its
            call, an id used twice, arguments that are no JSON object, images, text that UTF-8 cannot encode.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a sequence of mappings, not {type(messages).__name__}")
    if not messages:
        raise ChatError("no messages: a conversation has at least one")
    conversation = _Conversation()
    for index, message in enumerate(messages):
        try:
            conversation.add(index, message)
        except (Unreadable, _Fault) as fault:
            raise ChatError(f"message {index}: {fault}", index=index) from None
    return conversation.messages


class _Fault(Exception):  # noqa: N818
    """What is wrong with the message that is being read."""


class _Conversation:
    """The messages so far, and the calls that have no result yet."""

    def __init__(self) -> None:
        self.messages: list[dict[str, object]] = []
        # Names of calls, by id, in order.
        self._open: dict[str, str] = {}
        self._answered: set[str] = set()

    def add(self, index: int, given: object) -> None:
        message = _mapping(given, "a message")
        _known({key: message[key] for key in message if key not in _IGNORED}, _KEYS, "a message")
        role = message.get("role")
        if not isinstance(role, str) or role not in (*ROLES, "function"):
            hint = suggestion(role, ROLES) if isinstance(role, str) else f"; there is {', '.join(map(repr, ROLES))}"
            raise _Fault(f"its role is {role!r:.60}{hint}")
        if role in ("tool", "function"):
            self._add_result(message)
        elif role == "assistant":
            self._add_reply(index, message)
        else:
            self._add_said(str.__str__(role), message)

    def _add_said(self, role: str, message: Mapping[object, object]) -> None:
        _only(message, role, ("content", "name"))
        texts: list[str] = []
        results: list[dict[str, object]] = []

        def block(kind: str, part: Mapping[object, object]) -> bool:
            if kind != "tool_result" or role != "user":
                return False
            is_error = part.get("is_error")
            if is_error is not None and not isinstance(is_error, bool):
                raise _Fault(f"is_error is {is_error!r:.60}; it takes True or False")
            content = part.get("content")
            said = "" if content is None else _joined(content, "a tool_result")
            results.append(self._result(part.get("tool_use_id"), None, said, "tool_use_id"))
            return True

        content = message.get("content")
        if content is None:
            raise _Fault(f"a message of role {role!r} has no content")
        _read_content(content, texts, block)
        self.messages += results
        if texts or not results:
            self.messages.append({"role": role, "content": "".join(texts), **_name_of(message)})

    def _add_reply(self, index: int, message: Mapping[object, object]) -> None:
        _only(message, "assistant", set(_KEYS) - {"tool_call_id"})
        texts: list[str] = []
        thoughts = _reasoning(message)
        calls: list[tuple[object, object, object]] = []

        def block(kind: str, part: Mapping[object, object]) -> bool:
            if kind == "thinking":
                thoughts.append(_text(part.get("thinking"), "thinking"))
            elif kind == "tool_use":
                _known(part, _TOOL_USE_KEYS, "a tool_use")
                calls.append((part.get("id"), part.get("name"), part.get("input")))
            else:
                return kind == "redacted_thinking"
            return True

        content, refusal = message.get("content"), message.get("refusal")
        if content is not None:
            _read_content(content, texts, block, may_be_empty=True)
        if refusal is not None:
            texts.append(_text(refusal, "refusal"))
        calls += _calls_of(message)
        reply: dict[str, object] = {"role": "assistant", "content": "".join(texts), **_name_of(message)}
        if any(thoughts):
            reply["reasoning_content"] = "".join(thoughts)
        if calls:
            reply["tool_calls"] = [self._call(index, n, *call) for n, call in enumerate(calls)]
        elif not texts and not _is_given(content):
            raise _Fault("a message of role 'assistant' has neither content nor tool_calls")
        self.messages.append(reply)

    def _call(self, index: int, number: int, id: object, name: object, arguments: object) -> dict[str, object]:
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise _Fault(f"a tool call's name is {name!r:.80}; it takes 1 to 64 letters, digits, '_', '.' and '-'")
        name = str.__str__(name)
        if id is None:
            id = f"call_{index}_{number}"
            while id in self._open or id in self._answered:
                id += "_"
        id = _text(id, "a tool call's id")
        if not id:
            raise _Fault("a tool call's id is empty")
        if id in self._open:
            raise _Fault(f"two tool calls have the id {id!r:.80}")
        self._open[id] = name
        self._answered.discard(id)
        function = {"name": name, "arguments": _arguments(name, arguments)}
        return {"id": id, "type": "function", "function": function}

    def _add_result(self, message: Mapping[object, object]) -> None:
        _only(message, "tool", ("content", "name", "tool_call_id"))
        content = message.get("content")
        if content is None:
            raise _Fault("a tool's result has no content")
        name = _name_of(message).get("name")
        said = _joined(content, "a tool's result")
        self.messages.append(self._result(message.get("tool_call_id"), name, said, "tool_call_id"))

    def _result(self, id: object, name: str | None, content: str, key: str) -> dict[str, object]:
        """A tool's message. Without an id it is of the first open call, of that name if it has one."""
        if id is None:
            waiting = [open_ for open_, called in self._open.items() if name in (None, called)]
            if not waiting or (name is None and len(waiting) > 1):
                raise _Fault(f"a tool's result has no {key}, and what it has leads to no call that waits for one")
            id = waiting[0]
        id = _text(id, key)
        if id in self._answered:
            raise _Fault(f"a second result of the tool call {id!r:.80}")
        if id not in self._open:
            raise _Fault(f"the result of a tool call {id!r:.80} that nobody made{suggestion(id, self._open)}")
        called = self._open[id]
        if name not in (None, called):
            raise _Fault(f"the result of the tool call {id!r:.80} is named {name!r:.80}; {called!r} was called")
        del self._open[id]
        self._answered.add(id)
        return {"role": "tool", "content": content, "tool_call_id": id, "name": called}


def _read_content(
    content: object,
    texts: list[str],
    block: Callable[[str, Mapping[object, object]], bool],
    *,
    may_be_empty: bool = False,
) -> None:
    """Put a content's texts in a list, and hand what is not text to `block`, which tells whether it took it."""
    if isinstance(content, str):
        texts.append(plain_text(content))
        return
    if not isinstance(content, list | tuple):
        raise _Fault(f"content is of type {type(content).__name__}; it takes a text or a list of parts")
    if not content and not may_be_empty:
        raise _Fault("content is an empty list")
    for given in content:
        if isinstance(given, str):
            texts.append(plain_text(given))
            continue
        part = _mapping(given, "a part of content")
        kind = part.get("type")
        if not isinstance(kind, str):
            raise _Fault(f"the type of a part of content is {kind!r:.60}; it takes 'text' and others")
        if kind in _TEXTS:
            texts.append(_text(part.get(_TEXTS[kind]), f"the {_TEXTS[kind]!r} of a part of content"))
        elif not block(kind, part):
            if any(medium in kind for medium in _MEDIA):
                raise _Fault(f"a part of type {kind!r:.60}: this model reads text only")
            known = (*_TEXTS, "thinking", "redacted_thinking", "tool_use", "tool_result")
            raise _Fault(f"a part of type {kind!r:.60} has no place here{suggestion(kind, known)}")


def _joined(content: object, where: str) -> str:
    texts: list[str] = []
    try:
        _read_content(content, texts, lambda kind, part: False, may_be_empty=True)
    except _Fault as fault:
        raise _Fault(f"{where}: {fault}") from None
    return "".join(texts)


def _calls_of(message: Mapping[object, object]) -> list[tuple[object, object, object]]:
    """Ids, names and arguments in OpenAI's form, and in the older one."""
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list | tuple):
        raise _Fault(f"tool_calls is of type {type(calls).__name__}; it takes a list")
    found: list[tuple[object, object, object]] = []
    for given in calls or ():
        call = _mapping(given, "a tool call")
        if call.get("type", "function") != "function":
            raise _Fault(f"a tool call is of type {call.get('type')!r:.60}; there is 'function'")
        _known(call, _CALL_KEYS, "a tool call")
        found.append((call.get("id"), *_function_of(call.get("function"), "the 'function' of a tool call")))
    if message.get("function_call") is not None:
        found.append((None, *_function_of(message["function_call"], "function_call")))
    return found


def _function_of(given: object, where: str) -> tuple[object, object]:
    function = _mapping(given, where)
    _known(function, _FUNCTION_KEYS, where)
    return function.get("name"), function.get("arguments")


def _arguments(name: str, given: object) -> object:
    if given is None or (isinstance(given, str) and not given):
        return {}
    where = f"the arguments of {name!r}"
    if isinstance(given, str):
        try:
            found = json_of(plain_text(given))
        except Unreadable as error:
            raise _Fault(f"{where} are no JSON: {error}, at character {error.at}") from None
    else:
        found = plain(given)
    if not isinstance(found, dict):
        raise _Fault(f"{where} are of type {type(found).__name__}; they are a JSON object")
    return found


def _reasoning(message: Mapping[object, object]) -> list[str]:
    said = {key: _text(message[key], key) for key in _REASONING if message.get(key) is not None}
    if len(set(said.values())) > 1:
        raise _Fault(f"{' and '.join(map(repr, said))} say different things; one is enough")
    return list(said.values())[:1]


def _name_of(message: Mapping[object, object]) -> dict[str, str]:
    return {} if message.get("name") is None else {"name": _text(message["name"], "name")}


def _only(message: Mapping[object, object], role: str, keys: Collection[str]) -> None:
    for key in _KEYS:
        if key != "role" and key not in keys and _is_given(message.get(key)):
            raise _Fault(f"a message of role {role!r} has no {key!r}")


def _is_given(value: object) -> bool:
    """None, and no calls, are what clients send for what is not there."""
    return value is not None and not (isinstance(value, list | tuple) and not value)


def _known(given: Mapping[object, object], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise _Fault(f"{where} has no key {key!r:.60}{suggestion(str(key), known)}")


def _mapping(value: object, where: str) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise _Fault(f"{where} must be a mapping, not {type(value).__name__}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _Fault(f"{where} must be a text, not {type(value).__name__}")
    return plain_text(value)
