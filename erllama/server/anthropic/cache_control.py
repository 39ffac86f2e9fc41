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
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel
from erllama.server.pins import PinOrder
from erllama.server.replies.templates import rendering_options
from erllama.server.replies.unstable_prefixes import drop_unstable_headers

TTLS = ("5m", "1h")


class _Place(NamedTuple):
    """A block that a request asks to pin up to.

    Attributes:
        ttl: for how long.
        tools: number of tools up to it; None if it is not a tool.
        system: number of system blocks up to it; None if it is not one.
        message: index of its message; None if it is not in a message.
        blocks: number of blocks of that message up to it.
    """

    ttl: str
    tools: int | None = None
    system: int | None = None
    message: int | None = None
    blocks: int = 0


def pin_prefixes(call: Call, served: ServedModel, body: MessagesBody, prompt: NDArray[np.int32]) -> None:
    """Begin to pin the prefixes that a request asks for. Call it when the request has ended. Returns at once.

    Args:
        prompt: the request's prompt, token ids, int32, shape (n,).
    """
    salt, key = call.cache_salt(body.cache_salt), call.key

    def charge(n_tokens: int) -> None:
        if key is not None:
            call.server.rate_limits.charge(key, n_tokens)

    for place in {place.ttl: place for place in _places(body)}.values():  # the last one of each time
        tokens = partial(asyncio.to_thread, _prefix_tokens, call, served, _body_up_to(body, place), prompt)
        order = PinOrder(
            model=served.model, find_prefix=tokens, ttl=place.ttl, cache_salt=salt, key=key, charge=charge
        )
        call.server.client_pins.begin(order)


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


def _places(body: MessagesBody) -> Iterator[_Place]:
    """Yield the places in the order of the prompt: tools, system blocks, then messages."""
    for n, tool in enumerate(body.tools or (), 1):
        if ttl := _ttl(tool):
            yield _Place(ttl, tools=n)
    for n, block in enumerate(body.system if isinstance(body.system, list) else (), 1):
        if ttl := _ttl(block):
            yield _Place(ttl, system=n)
    for at, message in enumerate(body.messages):
        content = message.get("content")
        for n, block in enumerate(content if isinstance(content, list) else (), 1):
            if ttl := _ttl(block):
                yield _Place(ttl, message=at, blocks=n)


def _body_up_to(body: MessagesBody, place: _Place) -> MessagesBody:
    """Return the body of the conversation up to a place."""
    if place.tools is not None:
        return msgspec.structs.replace(body, tools=(body.tools or [])[: place.tools], system=None, messages=[])
    if place.system is not None:
        return msgspec.structs.replace(body, system=(body.system or [])[: place.system], messages=[])
    assert place.message is not None
    last = body.messages[place.message]
    cut = {**last, "content": last["content"][: place.blocks]}
    return msgspec.structs.replace(body, messages=[*body.messages[: place.message], cut])


def _ttl(block: object) -> str | None:
    """Return the time that a block asks for; None if it asks for none that is known."""
    control = block.get("cache_control") if isinstance(block, Mapping) else None
    ttl = control.get("ttl") if isinstance(control, Mapping) else None
    return ttl if isinstance(ttl, str) and ttl in TTLS else None
