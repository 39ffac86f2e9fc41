"""Logit biases that need a model's vocabulary: of texts, and of the tokens that end a reply."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from erllama._model.model import Model
from erllama.server.conduct.errors import ApiError

_NAME = "logit_bias"
_MAX_CHARACTERS = 2000  # of all texts: more would keep the event loop from other requests


def read_biases(model: Model, value: Mapping[str, object] | Sequence[object] | None) -> dict[int, float]:
    """Return biases by token id.

    Args:
        value: OpenAI's mapping, or llama-server's list of pairs, from a token to a number. A token is an id, or a
            text, all of whose tokens get the number. False excludes a token.

    Raises:
        ApiError: an item is neither of these, or the texts are too long.
    """
    pairs = list(value.items()) if isinstance(value, Mapping) else list(value or ())
    n_characters = sum(len(pair[0]) for pair in pairs if isinstance(pair, list | tuple) and _has_text(pair))
    if n_characters > _MAX_CHARACTERS:
        message = f"{_NAME} has texts of {n_characters:,} characters; the limit is {_MAX_CHARACTERS:,}, so send ids"
        raise ApiError("invalid_request", message, param=_NAME)
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _wrong(pair, "pairs of a token and a number")
        token, bias = pair
        if bias is False:
            number = -math.inf
        elif isinstance(bias, int | float) and not isinstance(bias, bool):
            number = float(bias)
        else:
            raise _wrong(pair, "a number, or false, as the bias")
        for id in _token_ids(model, token, pair):
            biases[id] = number
    return biases


def _has_text(pair: Sequence[object]) -> bool:
    return bool(pair) and isinstance(pair[0], str) and not pair[0].isdecimal()


def _token_ids(model: Model, token: object, pair: object) -> list[int]:
    if isinstance(token, str) and not token.isdecimal():
        ids: list[int] = model.tokenize(token, add_special=False).tolist()
        return ids
    if isinstance(token, str) or (isinstance(token, int) and not isinstance(token, bool)):
        # Clients send one list to models of several sizes of vocabulary.
        return [int(token)] if 0 <= int(token) < model.n_vocab else []
    raise _wrong(pair, "a token id or a text")


def _wrong(pair: object, expected: str) -> ApiError:
    return ApiError("invalid_request", f"{_NAME} has {pair!r:.60}; send {expected}", param=_NAME)


def end_biases(model: Model) -> dict[int, float]:
    """Return biases that exclude the tokens that end a reply."""
    ends: list[int] = np.flatnonzero(model._vocabulary.is_eog).tolist()
    return dict.fromkeys(ends, -math.inf)
