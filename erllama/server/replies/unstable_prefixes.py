"""Unstable prefixes: what makes the beginning of a conversation's prompt differ from request to request.

A prefix cache serves a prompt up to the first token that differs. So the server removes known texts that change
with each request (`_RULES`), and reports other changes (`note_prefix_change`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama._types import Messages
from erllama.server.conduct.metrics import PREFIX_CHANGED
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel

log = logging.getLogger("erllama.server")


class _Rule(NamedTuple):
    """A text that is removed where a system message begins with it.

    Attributes:
        prefix: how it begins.
        pattern: matches all of it.
    """

    prefix: str
    pattern: re.Pattern[str]


# Each rule is listed in docs/server/anthropic.md.
_RULES = (
    # Claude Code's first system block, for Anthropic's billing: fields such as "cch=a5145;", which change with each
    # request. Proxies that join blocks put it on one line with the next block.
    _Rule(
        "x-anthropic-billing-header:",
        re.compile(r"x-anthropic-billing-header:(?:(?:[ \t]*[\w.-]+=[^;\s]*;?)+|[^\n]*)[ \t]*\n?"),
    ),
)
_SYSTEM_ROLES = ("system", "developer")


def drop_unstable_headers(messages: Messages) -> Messages:
    """Return messages without the texts of `_RULES`. A system message of which nothing remains is left out.

    Other messages are the same objects.
    """
    kept: list[Mapping[str, object]] = []
    for message in messages:
        if message.get("role") not in _SYSTEM_ROLES:
            kept.append(message)
            continue
        content = message.get("content")
        stable = _stable_parts(content) if isinstance(content, list) else _stable_text(content)
        if stable or stable == content:
            kept.append(message if stable == content else {**message, "content": stable})
    return kept


def _stable_parts(parts: list[object]) -> list[object]:
    stable: list[object] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        rest = _stable_text(text)
        if rest == text:
            stable.append(part)
        elif rest:
            stable.append({**part, "text": rest} if isinstance(part, dict) else rest)
    return stable


def _stable_text(text: object) -> object:
    if isinstance(text, str):
        for rule in _RULES:
            if text.startswith(rule.prefix):
                text = rule.pattern.sub("", text, count=1)
    return text


def note_prefix_change(call: Call, served: ServedModel, prompt: NDArray[np.int32]) -> None:
    """Compare a prompt with earlier ones of the same key and model, and report if its prefix changed.

    The note is part of the access log, and `erllama_prefix_changes` counts it.

    Args:
        prompt: token ids, int32, shape (n,).
    """
    client = (call.key.secret if call.key is not None else "", served.name)
    change = call.server.prefixes.add(client, prompt)
    if change is not None:
        note = f"{PREFIX_CHANGED} at token {change.at} of {change.n_tokens}"
        call.record.notes.append(note)
        log.info("model %s: %s; what comes after it is computed again", served.name, note)
