"""The token ids of a request's prompt, without computing it: for routers that look for the replica that has it.

The endpoints with `/render` answer with them. A request passes the checks of the endpoint that would compute it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from erllama._model.requests.options import ChatOptions, CompletionOptions
from erllama._types import Messages, Prompt
from erllama.server.conduct.bodies import Json
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel
from erllama.server.replies.running import (
    compile_grammar,
    prepare_chat,
    prepare_completion,
    tokenize,
    wait_for_process,
)


async def render_chat(
    call: Call, served: ServedModel, messages: Messages, **options: Unpack[ChatOptions]
) -> NDArray[np.int32]:
    """Return the token ids of the prompt that `open_chat` submits, int32, shape (n,).

    Raises:
        Error: as `open_chat`, except for a full queue and a session in use.
    """
    options, messages = prepare_chat(call, served, messages, options)
    await wait_for_process(call, served)
    chats = served.model._chat_requests
    return await asyncio.to_thread(chats.checked_prompt, messages, options, "astream_chat")


async def render_completions(
    call: Call,
    served: ServedModel,
    prompts: Sequence[Prompt],
    *,
    suffix: str | None = None,
    **options: Unpack[CompletionOptions],
) -> list[NDArray[np.int32]]:
    """Return the token ids of the prompts that `open_completions` submits, each int32, shape (n,).

    Raises:
        Error: as `open_completions`, except for a full queue and a session in use.
    """
    options = prepare_completion(call, served, options)
    await wait_for_process(call, served)
    await compile_grammar(served, options)
    requests = served.model._requests
    return [
        await asyncio.to_thread(requests.checked_prompt, await tokenize(served, prompt, suffix), options, "astream")
        for prompt in prompts
    ]


def rendered(call: Call, served: ServedModel, prefix: str, tokens: NDArray[np.int32]) -> Json:
    """Return the answer for one prompt, in the form of vLLM's endpoints.

    Args:
        prefix: of the request's id.
    """
    return {"request_id": f"{prefix}-{call.record.id}", "model": served.name, "token_ids": tokens.tolist()}
