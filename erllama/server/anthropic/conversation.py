"""Reads Anthropic's conversations and tools into the form that `Model.chat` takes.

Blocks that only Anthropic's own servers can use are skipped. So are thoughts with a signature of another server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from erllama.server.anthropic.signatures import ThoughtSigner, decode_signature
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError

# Blocks of Anthropic's server tools. Their results have names that end with "_tool_result".
_SKIPPED = frozenset({"redacted_thinking", "server_tool_use", "mcp_tool_use", "container_upload", "browser_state"})
_TOOL_KEYS = frozenset({"name", "description", "input_schema", "strict"})
# Returns the block of a kind at a place in the body.
_BlockReader = Callable[[str, str, Json], Json]
_BETWEEN_MESSAGES = "\n\n"  # two user messages in a row become one


class ConversationReader:
    """Reads one conversation.

    Attributes:
        n_unverified: number of thoughts that were skipped, because this server did not sign them.
    """

    def __init__(self, signer: ThoughtSigner) -> None:
        self._signer = signer
        self.n_unverified = 0

    def read(self, system: str | Sequence[Json] | None, messages: Sequence[Json]) -> list[Json]:
        """Return the messages of a body.

        Consecutive messages of the user are one message, as in Anthropic's API, and so are those of the assistant.
        A system message keeps its place. A conversation without messages has an empty one of the user.

        Raises:
            ApiError: a role or a block is unknown, or has a medium other than text.
        """
        read: list[Json] = []
        if system:
            read.append({"role": "system", "content": _read_text_blocks("system", system)})
        for index, message in enumerate(messages):
            self._add(read, f"messages[{index}]", message)
        if not messages:
            read.append({"role": "user", "content": ""})
        for message in read:
            if message["role"] == "assistant":
                message["content"] = self._verified(message["content"])
            message["content"] = message["content"] or ""
        return read

    def _add(self, read: list[Json], where: str, message: Json) -> None:
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise _error(f"{where}.role", f"is {role!r:.60}; it takes user, assistant and system")
        where += ".content"
        if role == "system":
            read.append({"role": role, "content": _read_text_blocks(where, content)})
            return
        blocks = _read_blocks(where, content, _read_user_block if role == "user" else _read_reply_block)
        if not read or read[-1]["role"] != role:
            read.append({"role": role, "content": blocks})
            return
        before = read[-1]["content"]
        if role == "user" and _has_text(before) and _has_text(blocks):
            before.append({"type": "text", "text": _BETWEEN_MESSAGES})
        before += blocks

    def _verified(self, blocks: list[Json]) -> list[Json]:
        """Return the blocks of a reply without thoughts that were changed or come from elsewhere.

        A thought without a signature is kept, since several clients drop signatures.
        """
        kept, thinking = [], ""
        for block in blocks:
            if block["type"] != "thinking":
                kept.append(block)
                continue
            signature, hidden = decode_signature(block["signature"])
            thought = block["thinking"] or hidden
            # A reply that follows another one directly begins anew.
            begins = [begin for begin in (thinking, "") if self._signer.is_valid(begin + thought, signature)]
            thinking = next(iter(begins), thinking) + thought
            if begins or not block["signature"]:
                kept.append({"type": "thinking", "thinking": thought})
            else:
                self.n_unverified += 1
        return kept


def read_tools(tools: Sequence[Json] | None) -> list[Json]:
    """Return the tools that the client runs, as `Model.chat` takes them. Anthropic's own tools are skipped."""
    return [
        {key: value for key, value in tool.items() if key in _TOOL_KEYS and value is not None}
        for tool in tools or ()
        if tool.get("type") in (None, "custom")
    ]


def _read_blocks(where: str, content: object, read_block: _BlockReader) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _error(where, f"is {content!r:.60}; send a text or a list of blocks")
    read = []
    for index, block in enumerate(content):
        at = f"{where}[{index}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if not isinstance(kind, str):
            raise _error(at, f"is {block!r:.60}; send a block with a type")
        if kind in _SKIPPED or kind.endswith("_tool_result"):
            continue
        if kind in ("image", "audio", "video"):
            raise _error(at, f"{kind} input is not supported: this server reads text; remove the block")
        if kind == "text":
            read.append({"type": "text", "text": _text(at, block, "text")})
        else:
            read.append(read_block(at, kind, block))
    return read


def _read_user_block(where: str, kind: str, block: Json) -> Json:
    if kind == "tool_result":
        return _read_result(where, block)
    return _read_document(where, kind, block)


def _read_reply_block(where: str, kind: str, block: Json) -> Json:
    if kind == "thinking":
        signature = block.get("signature")
        if not isinstance(signature, str | None):
            raise _error(f"{where}.signature", f"is {signature!r:.60}; send a text")
        return {"type": kind, "thinking": _text(where, block, "thinking"), "signature": signature or ""}
    if kind == "tool_use":
        return {key: block.get(key) for key in ("type", "id", "name", "input")}
    raise _error(f"{where}.type", f"is {kind!r:.60}; an assistant message takes text, thinking and tool_use")


def _read_result(where: str, block: Json) -> Json:
    """Return a tool result whose content is text. Templates do not know failed tools, so the text says it."""
    content, is_error = block.get("content"), block.get("is_error")
    if not isinstance(is_error, bool | None):
        raise _error(f"{where}.is_error", f"is {is_error!r:.60}; send true or false")
    blocks = _read_blocks(f"{where}.content", content, _read_document) if content is not None else []
    text = "".join(each["text"] for each in blocks)
    if is_error and "error" not in text.lower():
        text = f"Error: {text}" if text else "Error"
    return {"type": "tool_result", "tool_use_id": block.get("tool_use_id"), "content": text}


def _read_document(where: str, kind: str, block: Json) -> Json:
    """Return the text of a block that has it in another form."""
    if kind == "tool_reference":
        return {"type": "text", "text": _text(where, block, "tool_name")}
    if kind == "search_result":
        return _joined(block, _read_text_blocks(f"{where}.content", block.get("content")))
    if kind == "document":
        source = block.get("source")
        source_kind = source.get("type") if isinstance(source, Mapping) else None
        if isinstance(source, dict) and source_kind == "text":
            return _joined(block, [{"text": _text(f"{where}.source", source, "data")}])
        if isinstance(source, dict) and source_kind == "content":
            return _joined(block, _read_text_blocks(f"{where}.source.content", source.get("content")))
        raise _error(f"{where}.source", f"has the type {source_kind!r:.60}; this server reads text and content")
    known = "text, tool_result, document and search_result"
    raise _error(f"{where}.type", f"is {kind!r:.60}; this server reads {known}")


def _joined(block: Json, parts: Sequence[Json]) -> Json:
    title = block.get("title")
    heading = f"{title}\n" if isinstance(title, str) and title else ""
    return {"type": "text", "text": heading + "".join(part["text"] for part in parts)}


def _read_text_blocks(where: str, content: object) -> list[Json]:
    return _read_blocks(where, content, _refuse_block)


def _refuse_block(where: str, kind: str, block: Json) -> Json:
    raise _error(f"{where}.type", f"is {kind!r:.60}; only text is allowed here")


def _has_text(blocks: Sequence[Json]) -> bool:
    return any(block["type"] == "text" for block in blocks)


def _text(where: str, block: Json, key: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise _error(f"{where}.{key}", f"is {value!r:.60}; send a text")
    return value


def _error(where: str, problem: str) -> ApiError:
    return ApiError("invalid_request", f"{where} {problem}", param=where)
