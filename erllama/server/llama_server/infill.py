"""`/infill`: the text between two texts, for editors, with other files as context."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import msgspec
import numpy as np
from starlette.responses import Response

from erllama._model.model import Model
from erllama.engine.backend import InfillTokens
from erllama.errors import Unsupported
from erllama.server.endpoints import Call, Endpoint
from erllama.server.llama_server.completion import answer_prompts
from erllama.server.llama_server.completion_body import CompletionBody
from erllama.server.llama_server.errors import ERRORS
from erllama.server.replies.prompts import Tokens

# Tokens that begin a file in models that were trained on several files at once.
_FILE_MARKS = ("<|file_sep|>", "<|file_separator|>", "<file_sep>")
_MAX_REPLY = 128  # tokens that stay free for a reply without a limit


class ExtraText(msgspec.Struct):
    """A text from another file."""

    text: str
    filename: str | None = None


class InfillBody(CompletionBody, kw_only=True):
    """The body of `/infill`.

    Attributes:
        input_prefix, input_suffix: the texts before and after the gap.
        input_extra: texts of other files, the most useful last.
        prompt: the beginning of the text in the gap.
    """

    input_prefix: str
    input_suffix: str
    input_extra: list[ExtraText] | None = None
    prompt: str | None = None


def endpoints() -> list[Endpoint[InfillBody]]:
    """Return the endpoints of this module."""
    return [Endpoint("POST", "/infill", InfillBody, answer, ERRORS, "Fill the gap between two texts.")]


async def answer(call: Call, body: InfillBody) -> Response:
    """Answer with the text in the gap, whole or as a stream."""
    served = await call.use_model(body.model)
    limit = body.options(served).get("max_tokens")
    prompt = await asyncio.to_thread(infill_prompt, served.model, body, _MAX_REPLY if limit is None else limit)
    return await answer_prompts(call, body, served, [prompt])


def infill_prompt(model: Model, body: InfillBody, n_reply: int) -> Tokens:
    """Return the prompt, int32, shape (n,): other files, then the text before the gap, and the text after it.

    What does not fit the context is cut: first other files, then the text far from the gap.

    Args:
        n_reply: tokens that stay free for the reply.

    Raises:
        Unsupported: the model has no tokens that mark gaps.
    """
    marks: InfillTokens | None = getattr(model._vocabulary, "infill_tokens", None)
    if marks is None:
        raise Unsupported(f"model {model.id!r} cannot fill gaps: its vocabulary has no tokens that mark them (FIM)")
    plain = partial(model.tokenize, add_special=False)
    before, after, start = plain(body.input_prefix), plain(body.input_suffix), plain(body.prompt or "")
    extra = _extra_tokens(model, body.input_extra or ())
    room = max(model.n_ctx - n_reply - len(marks.begin) - 3 - len(start), 2)
    n_after = min(len(after), max(room // 4, room - len(before)))
    before, after = _last(before, room - n_after), after[:n_after]
    extra = _last(extra, room - len(before) - len(after))
    parts = ((marks.prefix,), before, start, (marks.suffix,), after, (marks.middle,))
    return np.concatenate([np.asarray(part, np.int32) for part in (marks.begin, extra, *parts)])


def _last(tokens: Tokens, n: int) -> Tokens:
    return tokens[max(len(tokens) - n, 0) :]


def _extra_tokens(model: Model, texts: Sequence[ExtraText]) -> Tokens:
    """Return the tokens of other files, each after the model's mark of a file, or after a line with its name."""
    mark = next((ids for text in _FILE_MARKS if len(ids := _special(model, text)) == 1), None)
    parts: list[Tokens] = []
    for each in texts:
        name = each.filename or "tmp"
        if mark is not None:
            parts += [mark, model.tokenize(f"{name}\n{each.text}", add_special=False)]
        else:
            parts.append(model.tokenize(f"\n\n--- {name} ---\n\n{each.text}", add_special=False))
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _special(model: Model, text: str) -> Tokens:
    return model.tokenize(text, add_special=False, parse_special=True)
