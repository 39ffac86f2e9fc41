"""The sampling options that bodies of several APIs have, under the names of OpenAI and llama-server."""

from __future__ import annotations

from typing import Any

import msgspec

from erllama._model.model import Model
from erllama._model.requests.options import CompletionOptions
from erllama.server.conduct.bodies import Json
from erllama.server.replies.biases import end_biases, read_biases

# Fields that have the same name and meaning in `Model.complete`.
_SAME = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold"),
    *("repeat_penalty", "repeat_last_n", "frequency_penalty", "presence_penalty", "dry_multiplier", "dry_base"),
    *("dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "mirostat", "mirostat_tau"),
    *("mirostat_eta", "dynatemp_range", "dynatemp_exponent", "min_keep", "grammar", "cache_salt", "session_id"),
)


class SamplingBody(msgspec.Struct, kw_only=True):
    """Fields of a body that choose how tokens are sampled. Clients send null for an absent field."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    min_keep: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float | bool] | list[list[Any]] | None = None
    grammar: str | None = None
    json_schema: Json | bool | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    ignore_eos: bool | None = None
    reproducible: bool | None = None

    def sampling_options(self, model: Model) -> CompletionOptions:
        """Return the options of `Model.complete` for the fields that have a value.

        Args:
            model: the model of the request, whose vocabulary has the tokens of `logit_bias` and `ignore_eos`.

        Raises:
            ApiError: `logit_bias` is invalid.
        """
        options: dict[str, object] = {
            name: value for name in _SAME if (value := getattr(self, name)) not in (None, "")
        }
        _read_off_values(options)
        if self.seed is not None and self.seed >= 0:  # llama-server's -1 is a random seed
            options["seed"] = self.seed
        if self.stop:
            options["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.json_schema is not None:
            options["json_schema"] = self.json_schema
        biases = read_biases(model, self.logit_bias) | (end_biases(model) if self.ignore_eos else {})
        if biases:
            options["logit_bias"] = biases
        if self.reproducible:
            options["reproducible"] = True
        return options  # type: ignore[return-value]


def _read_off_values(options: dict[str, object]) -> None:
    """Replace the numbers by which llama-server's clients turn a step off, and which are out of range here."""
    for name in ("temperature", "top_k", "top_n_sigma"):
        value = options.get(name)
        if isinstance(value, int | float) and value < 0:
            options[name] = type(value)(0)
    threshold = options.get("xtc_threshold")
    if isinstance(threshold, int | float) and threshold > 0.5:  # no two tokens are that likely
        for name in ("xtc_threshold", "xtc_probability"):
            options.pop(name, None)
