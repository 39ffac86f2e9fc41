"""The body of `/completion`, and the options of `Model.complete` that it asks for."""

from __future__ import annotations

from typing import Annotated, Any, cast

from msgspec import Meta

from erllama._model.requests.options import CompletionOptions
from erllama.engine.sampling.draws import Mirostat
from erllama.engine.sampling.options import SAMPLERS
from erllama.engine.sampling.steps import CHAIN
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.llama_server.settings import sampler_names
from erllama.server.models import ServedModel
from erllama.server.replies.running import completion_defaults
from erllama.server.replies.sampling import SamplingBody

_MAX_REPLIES = 16
_MAX_PROBS = 100


class CompletionBody(SamplingBody, kw_only=True):
    """The fields of `/completion`, without the prompt.

    `n_predict`, `max_tokens` and `max_completion_tokens` are names of one field, as are `n_probs` and `logprobs`,
    and `n_cmpl` and `n`.
    """

    model: str | None = None
    stream: bool | None = None
    n_predict: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n_probs: Annotated[int, Meta(le=_MAX_PROBS)] | None = None
    logprobs: Annotated[int, Meta(le=_MAX_PROBS)] | None = None
    post_sampling_probs: bool | None = None
    n_cmpl: Annotated[int, Meta(ge=1, le=_MAX_REPLIES)] | None = None
    n: Annotated[int, Meta(ge=1, le=_MAX_REPLIES)] | None = None
    samplers: str | list[str] | None = None
    cache_prompt: bool | None = None
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    response_fields: list[str] | None = None
    t_max_predict_ms: float | None = None
    lora: list[Any] | None = None

    @property
    def n_replies(self) -> int:
        """How many replies each prompt gets."""
        return self.n_cmpl or self.n or 1

    @property
    def n_top(self) -> int:
        """How many of the most likely tokens the answer has for each token; 0 for none."""
        found = self.n_probs if self.n_probs is not None else self.logprobs
        return max(found or 0, 0)

    def options(self, served: ServedModel) -> CompletionOptions:
        """Return the options of `Model.complete`, with those of the model where the body has none.

        Raises:
            ApiError: the body asks for what a request cannot have.
        """
        if self.lora:
            raise ApiError(
                "unsupported",
                "lora in a request; POST /lora-adapters sets the scales of adapters for all requests",
                param="lora",
            )
        options = cast(Json, {**completion_defaults(served), **self.sampling_options(served.model)})
        for limit in (self.n_predict, self.max_completion_tokens, self.max_tokens):
            if limit is not None:
                options["max_tokens"] = limit if limit >= 0 else None
                break
        if self.n_top:
            options["logprobs"] = _MAX_PROBS if self.post_sampling_probs else self.n_top
        if self.samplers is not None:
            options["samplers"] = sampler_names(self.samplers)
        if options.get("grammar") is not None:
            options["json_schema"] = None
        if self.cache_prompt is False:  # who turns the cache off wants the same reply at each run
            options["reproducible"] = True
        _set_unused(options)
        return cast(CompletionOptions, options)


def _set_unused(options: Json) -> None:
    """Set the options of steps that do not run to their defaults.

    llama-server's clients send all of them. The façade refuses options without effect.
    """
    if options.get("temperature") == 0:
        options["dynatemp_range"] = 0.0
        options["mirostat"] = 0
    if not options.get("mirostat"):
        options |= {option.name: option.default for option in Mirostat.declared_options() if not option.shared}
    else:
        options["samplers"] = list(SAMPLERS)
    for step in CHAIN:
        used = step.name in options.get("samplers", SAMPLERS)
        if not used or (options.get("mirostat") and step.drops_candidates):
            options |= {option.name: option.default for option in step.declared_options() if not option.shared}
