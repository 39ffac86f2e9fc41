"""The options of a request, as the methods of a model take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from erllama.engine import RequestOptions, SamplingOptions, SamplingState, Step
from erllama.errors import reject_unknown


class PrefillOptions(TypedDict, total=False):
    """Options of `Model.prefill`; see `Model.complete`."""

    reproducible: bool
    cache_salt: str | None
    parent_key: bytes | None
    session_id: str | None
    timeout: float | None


class CompletionOptions(PrefillOptions, total=False):
    """Options of `Model.complete`, and of all that streams and waits."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    logit_bias: Mapping[int, float] | None
    banned_tokens: Sequence[int]
    repeat_penalty: float
    repeat_last_n: int
    frequency_penalty: float
    presence_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    top_n_sigma: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    min_keep: int
    samplers: Sequence[str | Step]
    sampling_state: SamplingState | None
    stop: str | Sequence[str]
    logprobs: int | None


_SAMPLING = frozenset(SamplingOptions.__dataclass_fields__)
_COMPLETION = frozenset(CompletionOptions.__annotations__) | frozenset(PrefillOptions.__annotations__)
_PREFILL = frozenset(PrefillOptions.__annotations__)


def request_options(
    given: CompletionOptions | PrefillOptions, where: str, cache_salt: str | None, *, prefill: bool = False
) -> RequestOptions:
    """The checked options of one call.

    Args:
        given: as the caller wrote them.
        where: the name of the method, for errors.
        cache_salt: the model's own.
        prefill: only those that make sense where nothing is sampled.
    """
    options: dict[str, object] = dict(given)
    known = _PREFILL if prefill else _COMPLETION
    reject_unknown({name: value for name, value in options.items() if name not in known}, known, where)
    if prefill:
        options["max_tokens"] = 0
    if options.get("cache_salt") is None:
        options["cache_salt"] = cache_salt
    sampling: dict[str, object] = {name: options.pop(name) for name in _SAMPLING & options.keys()}
    # Checked there, value by value.
    options["sampling"] = SamplingOptions(**sampling)  # type: ignore[arg-type]
    return RequestOptions(**options)  # type: ignore[arg-type]
