"""Parts of bodies that several endpoints of OpenAI's API have."""

from __future__ import annotations

import msgspec

from erllama.server.conduct.errors import ApiError

MAX_CHOICES = 16

# Texts or token ids, one or several. `read_inputs` checks that a list has items of one type.
Inputs = str | list[str | int | list[int]]


class StreamOptions(msgspec.Struct):
    """`stream_options`: whether the stream ends with token counts."""

    include_usage: bool | None = None


def read_inputs(inputs: Inputs, field: str) -> list[str] | list[list[int]]:
    """Return the texts, or the sequences of token ids, of a field that takes one or several.

    Args:
        field: the field's name, for errors.

    Raises:
        ApiError: the list is empty, or mixes texts and token ids.
    """
    if isinstance(inputs, str):
        return [inputs]
    if not inputs:
        raise ApiError("invalid_request", f"{field} is an empty list; send at least one text", param=field)
    if all(isinstance(item, int) for item in inputs):
        return [inputs]  # type: ignore[return-value]
    for kind in (str, list):
        if all(isinstance(item, kind) for item in inputs):
            return inputs  # type: ignore[return-value]
    raise ApiError(
        "invalid_request",
        f"{field} mixes texts and token ids; send texts, token ids, or lists of these",
        param=field,
    )
