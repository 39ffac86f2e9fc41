"""Conversations that a client names by a key: their context stays in its cells for the next request."""

from __future__ import annotations

from typing import Unpack

from erllama._model.requests.options import ChatOptions
from erllama._types import Messages
from erllama.chat.results import ChatCompletion
from erllama.errors import SessionBusy
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel
from erllama.server.replies.running import Replies, open_chat


async def open_chat_of_key(
    call: Call, served: ServedModel, messages: Messages, cache_key: str | None, **options: Unpack[ChatOptions]
) -> Replies[ChatCompletion]:
    """Submit a conversation, as `open_chat`, in the session of OpenAI's `prompt_cache_key`.

    A key is a hint. Clients may send the same key with several requests at once. One of them has the session, and the
    others run without it. A `session_id` of the body takes precedence.

    Args:
        cache_key: the client's key; None or "" for none.
    """
    if cache_key and options.get("session_id") is None:
        try:
            return await open_chat(call, served, messages, **options, session_id=f"prompt_cache_key:{cache_key}")
        except SessionBusy:
            call.record.notes.append("prompt_cache_key is in use; the request runs without its session")
    return await open_chat(call, served, messages, **options)
