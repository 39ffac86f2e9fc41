"""`cache_control` with a `ttl`: the prefix of a conversation up to a block, pinned for that time after the request.

Without `ttl`, `cache_control` has no effect: every prefix is cached until other blocks need its room. A client that
names a time asks for more than that. The longest prefix of each time is pinned, which contains the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import common_prefix
from erllama.server.anthropic.bodies import MessagesBody
from erllama.server.anthropic.conversation import ConversationReader
from erllama.server.anthropic.options import template_options
from erllama.server.anthropic.signatures import ThoughtSigner
from erllama.server.conduct.bodies import Json
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel
from erllama.server.replies.templates import rendering_options
from erllama.server.replies.unstable_prefixes import drop_unstable_headers

TTLS = ("5m", "1h")


class Breakpoint(NamedTuple):
    """A place that a request asks to pin: the time, and the body up to it."""

    ttl: str
    body: MessagesBody


def find_breakpoints(body: MessagesBody) -> list[Breakpoint]:
    """Return the last breakpoint of each time. Other values of `cache_control` are ignored."""
    return list({found.ttl: found for found in _breakpoints(body)}.values())


def pin_prefixes(call: Call, served: ServedModel, body: MessagesBody, prompt: NDArray[np.int32]) -> None:
    """Begin to pin the prefixes that a request asks for. Call it when the request has ended. Returns at once.

    Args:
        prompt: the request's prompt, token ids, int32, shape (n,).
    """
    salt = call.cache_salt(body.cache_salt)
    for ttl, prefix in find_breakpoints(body):
        tokens = partial(asyncio.to_thread, _prefix_tokens, call, served, prefix, prompt)
        call.server.client_pins.begin(served.model, tokens, ttl, salt)


def _prefix_tokens(
    call: Call, served: ServedModel, body: MessagesBody, prompt: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Return the tokens that a prompt and its conversation up to a breakpoint have in common."""
    messages = ConversationReader(ThoughtSigner(call.server.signing_key)).read(body.system, body.messages)
    options = rendering_options(served, template_options(body, messages))
    if call.server.options.drop_unstable_headers:
        messages = drop_unstable_headers(messages)  # type: ignore[assignment]
    tokens = served.model.apply_chat_template(messages, cache_salt=call.cache_salt(body.cache_salt), **options)
    return prompt[: common_prefix(prompt, tokens)]


def _breakpoints(body: MessagesBody) -> Iterator[Breakpoint]:
    """Yield the breakpoints in the order of the prompt: tools, system blocks, then messages."""
    tools, system = body.tools or [], body.system if isinstance(body.system, list) else []
    for n, tool in enumerate(tools, 1):
        if ttl := _ttl(tool):
            yield Breakpoint(ttl, _replace(body, tools=tools[:n], system=None, messages=[]))
    for n, block in enumerate(system, 1):
        if ttl := _ttl(block):
            yield Breakpoint(ttl, _replace(body, system=system[:n], messages=[]))
    for at, message in enumerate(body.messages):
        content = message.get("content")
        for n, block in enumerate(content if isinstance(content, list) else (), 1):
            if ttl := _ttl(block):
                last = {**message, "content": content[:n]}  # type: ignore[index]
                yield Breakpoint(ttl, _replace(body, messages=[*body.messages[:at], last]))


def _ttl(block: object) -> str | None:
    """Return the time that a block asks for; None if it asks for none that is known."""
    control = block.get("cache_control") if isinstance(block, Mapping) else None
    ttl = control.get("ttl") if isinstance(control, Mapping) else None
    return ttl if isinstance(ttl, str) and ttl in TTLS else None


def _replace(body: MessagesBody, **changes: list[Json] | None) -> MessagesBody:
    return msgspec.structs.replace(body, **changes)
