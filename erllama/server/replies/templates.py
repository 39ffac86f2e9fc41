"""Options of bodies that change how the chat template renders, and the length of the prompt that comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Unpack, cast

from erllama._model.requests.options import TemplateOptions
from erllama._types import Messages
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel
from erllama.server.replies.unstable_prefixes import drop_unstable_headers

_TEMPLATE_OPTIONS = frozenset(TemplateOptions.__annotations__)


def thinking_options(variables: Json | None, effort: str | None) -> TemplateOptions:
    """Return the options for llama-server's `chat_template_kwargs` and OpenAI's reasoning effort.

    Args:
        variables: of the template. `enable_thinking` among them decides whether the model thinks.
        effort: passed to the template as `reasoning_effort`, unless `variables` has that. "none" disables thinking.

    Raises:
        ApiError: `enable_thinking` is neither true nor false.
    """
    options: TemplateOptions = {}
    args = dict(variables or {})
    enabled = args.pop("enable_thinking", None)
    if isinstance(enabled, bool):
        options["thinking"] = enabled
    elif enabled is not None:
        where = "chat_template_kwargs.enable_thinking"
        raise ApiError("invalid_request", f"{where} is {enabled!r:.60}; send true or false", param=where)
    elif effort is not None:
        options["thinking"] = effort != "none"
    if effort is not None:
        args.setdefault("reasoning_effort", effort)
    if args:
        options["template_args"] = args
    return options


def rendering_options(served: ServedModel, options: Mapping[str, object]) -> TemplateOptions:
    """Return the options that change the prompt: a request's, or else the model's."""
    found = {name: value for name, value in served.with_defaults(options).items() if name in _TEMPLATE_OPTIONS}
    return cast(TemplateOptions, {"special_tokens_in_content": served.special_tokens_in_content, **found})


async def count_prompt_tokens(
    call: Call,
    served: ServedModel,
    messages: Messages,
    cache_salt: str | None = None,
    **options: Unpack[TemplateOptions],
) -> int:
    """Return how many tokens the prompt of a conversation has: the same prompt that `open_chat` submits."""
    if call.server.options.drop_unstable_headers:
        messages = drop_unstable_headers(messages)
    tokens = await asyncio.to_thread(
        served.model.apply_chat_template,
        messages,
        cache_salt=call.cache_salt(cache_salt),
        **rendering_options(served, options),
    )
    return len(tokens)
