"""What the bodies of chat and generate have in common, translated into options of the façade."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from erllama._model.requests.options import ChatOptions, CompletionOptions
from erllama.errors import OptionError
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.durations import parse_duration
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel
from erllama.server.replies.sampling import SamplingBody

_LEVELS = ("low", "medium", "high")


class Options(SamplingBody, kw_only=True):
    """`options` of a body: Ollama's, and further ones of `SamplingBody`.

    Options that only loading can set, such as `num_gpu`, are unknown fields here. docs/server/ollama.md lists them.
    """

    num_predict: int | None = None
    num_ctx: int | None = None


class ReplyBody(msgspec.Struct, kw_only=True):
    """Fields of the bodies that ask for a reply."""

    model: str | None = None
    stream: bool | None = None
    format: str | Json | None = None
    think: bool | str | None = None
    keep_alive: float | str | None = None
    options: Options | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    @property
    def is_stream(self) -> bool:
        """Whether the reply is streamed, which is Ollama's default."""
        return self.stream is not False


def completion_options(call: Call, served: ServedModel, body: ReplyBody) -> CompletionOptions:
    """Return the options of `Model.complete` for a body: sampling, length, format and log-probabilities."""
    sent = body.options or Options()
    options = sent.sampling_options(served.model)
    if sent.num_predict is not None and sent.num_predict > 0:  # Ollama's other values are no limit
        options["max_tokens"] = sent.num_predict
    if sent.num_ctx is not None and sent.num_ctx > served.model.n_ctx:
        call.record.notes.append(f"num_ctx {sent.num_ctx} has no effect: the context has {served.model.n_ctx}")
    schema = _read_format(body.format)
    if schema is not None:
        options["json_schema"] = schema
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    return options


def read_keep_alive(value: float | str | None) -> float | None:
    """Return the seconds of `keep_alive`, infinite for ever; None if it is absent.

    Raises:
        ApiError: it is not a duration.
    """
    if value is None:
        return None
    try:
        return parse_duration("keep_alive", value)
    except OptionError as error:
        raise ApiError("invalid_request", str(error), param="keep_alive") from None


async def load_or_unload(call: Call, body: ReplyBody) -> str:
    """Load the model of a request without a prompt, or unload it if `keep_alive` is 0. Return its `done_reason`.

    A model that requests use is unloaded once they have ended.
    """
    keep_alive = read_keep_alive(body.keep_alive)
    model = call.find_model(body.model)
    if keep_alive == 0 and model.entry is not None:
        call.server.models.unload(model)
        return "unload"
    await call.use_model(body.model, keep_alive)
    return "load"


def _read_format(format: str | Json | None) -> Json | None:
    """Return the JSON schema of `format`; None for any text."""
    if format is None or format == "":
        return None
    if isinstance(format, str):
        if format == "json":
            return {"type": "object"}
        raise ApiError(
            "invalid_request", f'format is {format!r:.60}; it takes "json" or a JSON schema', param="format"
        )
    return format


def thinking_options(served: ServedModel, think: bool | str | None) -> ChatOptions:
    """Return the options for `think`: whether the model thinks, and the level for templates that have levels.

    Raises:
        ApiError: the level is unknown, or thinking is requested of a model whose template has none.
    """
    if think is None:
        return {}
    if isinstance(think, str) and think not in _LEVELS:
        levels = ", ".join(f'"{level}"' for level in _LEVELS)
        raise ApiError("invalid_request", f"think is {think!r:.60}; it takes true, false, {levels}", param="think")
    if think is not False and not served.can_think:
        raise ApiError(
            "unsupported", f"the model {served.name!r} does not support thinking; leave out think", "unsupported"
        )
    if isinstance(think, str):
        return {"thinking": True, "template_args": {"reasoning_effort": think}}
    return {"thinking": think}


def refuse_images(images: object, path: str) -> None:
    """Raise ApiError if a field has images."""
    if images:
        raise ApiError(
            "unsupported", f"{path}: models of this server read text only; remove the images", param=path
        )
