"""Prompts as llama-server's and OpenAI's APIs take them: one or several, as texts, token ids, or both mixed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from erllama._model.model import Model
from erllama.server.conduct.errors import ApiError
from erllama.server.replies.embeddings import check_number

Tokens = NDArray[np.int32]


async def read_prompts(model: Model, value: object, where: str = "prompt") -> list[Tokens]:
    """Return the token ids of each prompt, int32, shape (n,). Tokenizes in a thread.

    A list of token ids is one prompt, and so is a list with texts and ids. A list of texts, or of lists, has one
    prompt for each item. An object has its text as `prompt_string`. Special tokens in texts are parsed. A prompt
    that begins with a text begins with the model's BOS.

    Args:
        where: path of the field, for error messages.

    Raises:
        ApiError: the value has another type, contains images or audio, or has too many prompts.
    """
    return await asyncio.to_thread(_read_prompts, model, value, where)


def _read_prompts(model: Model, value: object, where: str) -> list[Tokens]:
    if isinstance(value, list) and value and not _is_one_prompt(value):
        check_number(value, where)
        return [_read_prompt(model, item, f"{where}[{index}]") for index, item in enumerate(value)]
    return [_read_prompt(model, value, where)]


def _is_one_prompt(items: Sequence[object]) -> bool:
    """Return whether the items of a list are the parts of one prompt: token ids, perhaps with texts among them."""
    return any(_is_id(item) for item in items) and all(_is_id(item) or isinstance(item, str) for item in items)


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _read_prompt(model: Model, value: object, where: str) -> Tokens:
    if isinstance(value, dict):
        if value.get("multimodal_data"):
            raise ApiError(
                "invalid_request", f"{where} has images or audio, and models here read text", param=where
            )
        value = value.get("prompt_string")
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not (isinstance(value, str) or _is_one_prompt(parts)):
        raise ApiError(
            "invalid_request", f"{where} is {value!r:.60}; send a text, token ids, or a list of those", param=where
        )
    return read_parts(model, parts, where)


def read_parts(
    model: Model, parts: Sequence[object], where: str, add_special: bool = True, parse_special: bool = True
) -> Tokens:
    """Return the token ids of texts and ids that form one sequence, int32, shape (n,).

    Args:
        where: path of the field, for error messages.
        add_special: begin with the tokens that the model requires, if the first part is a text.
        parse_special: parse the text of special tokens as those tokens.

    Raises:
        ApiError: a part is neither text nor the id of a token.
    """
    found, at = [], 0
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        run = list(group)
        if is_text:
            for index, text in enumerate(run, at):
                special = add_special and index == 0
                found.append(model.tokenize(str(text), add_special=special, parse_special=parse_special))
        else:
            found.append(_check_ids(model, run, where, at if len(parts) > 1 else None))
        at += len(run)
    return np.concatenate(found).astype(np.int32) if found else np.empty(0, np.int32)


def _check_ids(model: Model, tokens: Sequence[object], where: str, first: int | None) -> Tokens:
    """Return token ids as an array, int32, shape (n,).

    Args:
        first: index of the first of them in the list at `where`; None if `where` is the only token.
    """
    n_vocab = model.n_vocab
    for index, token in enumerate(tokens):
        if type(token) is int and 0 <= token < n_vocab:
            continue
        place = where if first is None else f"{where}[{first + index}]"
        if type(token) is int:
            message = f"{place} is {token}; token ids of this model are 0 to {n_vocab - 1}"
        else:
            message = f"{place} is {token!r:.60}; send a text or token ids"
        raise ApiError("invalid_request", message, param=place)
    return np.array(tokens, np.int32)
