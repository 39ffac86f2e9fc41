"""The text of a model's thinking in reasoning items.

A reasoning item has the thinking as its content. Clients that return only `encrypted_content` get it there again:
the text in base64, not encrypted, because this server is the one that reads it and the client has the text anyway.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

_PREFIX = "erllama-1:"


def encode_thinking(text: str) -> str:
    """Return thinking as `encrypted_content`."""
    return _PREFIX + base64.b64encode(text.encode("utf-8", "replace")).decode()


def _decode_thinking(encoded: object) -> str:
    """Return the thinking in `encrypted_content`; "" if another server wrote it."""
    if not isinstance(encoded, str) or not encoded.startswith(_PREFIX):
        return ""
    try:
        return base64.b64decode(encoded.removeprefix(_PREFIX), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def thinking_of(item: Mapping[str, object]) -> str:
    """Return the thinking of a reasoning item that a client sends: its content, or else what replaces it."""
    return (
        _join(item.get("content"), "reasoning_text", "")
        or _decode_thinking(item.get("encrypted_content"))
        or _join(item.get("summary"), "summary_text", "\n\n")
    )


def _join(parts: object, kind: str, separator: str) -> str:
    if not isinstance(parts, list):
        return ""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == kind]
    return separator.join(text for text in texts if isinstance(text, str))
